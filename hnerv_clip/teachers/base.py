"""What a teacher is, what is known of one before it is loaded, and how it sees a patch.

N patches of h rows and w columns, K texts, D values in an embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hnerv_clip.config import BUNDLED, BUNDLED_DIM, ConfigError, TeacherConfig
from hnerv_clip.paths import resolve_path
from hnerv_clip.teachers.clip_weights import LOCAL_DIR, is_file, read_architecture


class Teacher(Protocol):
    """Unit embeddings of patches and texts, comparable by their scalar product."""

    name: str  # short, for file names and tables
    label: str  # for captions
    dim: int  # D
    is_clip: bool
    device: torch.device

    def encode_patches(self, patches: Tensor) -> Tensor:
        """uint8 [N, 3, h, w] RGB to float32 [N, D], unit length, on the teacher's device."""

    def encode_text(self, texts: list[str]) -> Tensor:
        """K texts to float32 [K, D], unit length, on the teacher's device."""


class TeacherFacts(NamedTuple):
    """What is known of a teacher before its weights are loaded."""

    name: str
    label: str
    is_clip: bool


def describe_teacher(config: TeacherConfig) -> TeacherFacts:
    """Name, label for captions, and whether it is CLIP; loads no weights."""
    if config.teacher == BUNDLED:
        return TeacherFacts(BUNDLED, "EfficientNet-Lite0 on ImageNet (bundled teacher, not CLIP)",
                            False)
    source = config.clip_pretrained
    if source.startswith(LOCAL_DIR):
        folder = resolve_path(source.removeprefix(LOCAL_DIR)).name
        return TeacherFacts(f"clip-{folder}", f"CLIP from the folder {folder}", True)
    origin = Path(source).name if is_file(source) else source
    return TeacherFacts(f"clip-{config.clip_model}-{Path(origin).stem}",
                        f"CLIP {config.clip_model} ({origin})", True)


def teacher_dim(config: TeacherConfig) -> int:
    """D, read from the architecture; loads no weights.

    Raises:
        ConfigError: an unknown architecture or tag, a missing file, a `local-dir:` folder without
            a configuration, or weights that were trained with another activation.
    """
    return BUNDLED_DIM if config.teacher == BUNDLED else read_architecture(config)["embed_dim"]


def preprocess(patches: Tensor, size: tuple[int, int], *, mean: tuple[float, ...],
               std: tuple[float, ...], interpolation: str = "bicubic",
               resize_mode: str = "shortest") -> Tensor:
    """Resize, crop and normalise as open_clip does with images, to one grey level.

    Its images are resized in two passes, width then height, and rounded to 0…255 after each; a
    single pass differs by up to 12 levels.

    Args:
        patches: uint8 [N, 3, h, w].
        size: (height, width) that the network takes.
        resize_mode: "shortest" resizes the shorter side and crops the centre, "squash" resizes
            both.
    Returns:
        float32 [N, 3, *size].
    Raises:
        ConfigError: another resize mode.
    """
    if resize_mode not in ("shortest", "squash"):
        raise ConfigError(f"the teacher's resize_mode={resize_mode!r} is not built; use a model "
                          "with 'shortest' or 'squash', such as ViT-B-32-quickgelu")
    height, width = patches.shape[-2:]
    new_h, new_w = size
    if resize_mode == "shortest":
        scale = max(new_h / height, new_w / width)
        new_h, new_w = max(new_h, int(height * scale)), max(new_w, int(width * scale))
    mode = "bilinear" if interpolation == "bilinear" else "bicubic"
    pixels = patches.float()
    for target in ((height, new_w), (new_h, new_w)):
        if tuple(pixels.shape[-2:]) != target:
            pixels = interpolate(pixels, size=target, mode=mode, antialias=True)
            pixels = pixels.add_(0.5).floor_().clamp_(0, 255)  # Pillow rounds halves up
    top, left = round((new_h - size[0]) / 2), round((new_w - size[1]) / 2)
    pixels = pixels[..., top:top + size[0], left:left + size[1]]
    shift, scale = (torch.tensor(v).view(3, 1, 1).to(pixels.device, non_blocking=True) * 255
                    for v in (mean, std))
    return (pixels - shift) / scale
