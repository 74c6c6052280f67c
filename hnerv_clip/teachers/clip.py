"""The teacher that the project is about: CLIP, through open_clip."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import init
from torch.nn.functional import normalize

from hnerv_clip.config import ConfigError, TeacherConfig
from hnerv_clip.teachers.base import describe_teacher, preprocess, teacher_dim
from hnerv_clip.teachers.clip_weights import (
    PREPROCESSING,
    check_text_tower,
    find_source,
    load_tokenizer,
    read_architecture,
)


class ClipTeacher:
    """CLIP by open_clip: a tag, a checkpoint file, or `local-dir:FOLDER`.

    With a tag, weights in the local cache are used without asking the network. With `local-dir:`
    the architecture is the folder's own, and `clip_model` is not read.
    """

    is_clip = True

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        import open_clip  # takes seconds to import, and only this teacher needs it

        self.name, self.label, _ = describe_teacher(config)
        self.dim = teacher_dim(config)
        self.device, self.in_bf16 = device, config.teacher_precision == "bf16"
        source = find_source(config)
        self.architecture, self.model_name = read_architecture(config), source.model
        check_text_tower(self.architecture, source.origin)
        try:
            with _without_init(self.architecture):
                model = open_clip.create_model(
                    source.model, pretrained=source.weights, device=device,
                    require_pretrained=True, weights_only=True,
                    force_preprocess_cfg=source.preprocess)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a file that is not these weights fails in many ways
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ConfigError(
                f"the weights {source.origin} do not load into {source.model} ({reason}). Give "
                "clip_model the architecture that they were saved from, and a plain state dict "
                "(.pt, .bin or .safetensors; TorchScript archives must be re-saved)") from error
        self.model = model.eval()
        cfg = model.visual.preprocess_cfg
        size = cfg["size"]
        self.image_size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        self.preprocess_cfg = {name: cfg[name] for name in PREPROCESSING}

    @functools.cached_property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """Loaded for the first text: pictures need none."""
        return load_tokenizer(self.model_name, self.architecture)

    @torch.no_grad()
    def encode_patches(self, patches: Tensor) -> Tensor:
        """See `Teacher`."""
        pixels = preprocess(patches.to(self.device), self.image_size, **self.preprocess_cfg)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            features = self.model.encode_image(pixels)
        return normalize(features.float(), dim=1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """See `Teacher`."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return normalize(self.model.encode_text(tokens).float(), dim=1)


@contextlib.contextmanager
def _without_init(architecture: dict) -> Iterator[None]:
    """Draw no random weights, which takes a second: a file gives every one of them, or is refused.

    Towers of other packages, which may make more than their weights so, are left alone.
    """
    own = not any(name in tower for tower in (architecture["vision_cfg"], architecture["text_cfg"])
                  for name in ("timm_model_name", "hf_model_name"))
    names = [name for name in dir(init) if name.endswith("_") and name[0] != "_"] if own else []
    drawn = {name: getattr(init, name) for name in names}
    try:
        for name in names:
            setattr(init, name, lambda tensor, *args, **options: tensor)
        yield
    finally:
        for name, function in drawn.items():
            setattr(init, name, function)
