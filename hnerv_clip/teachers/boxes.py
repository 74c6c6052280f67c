"""Teacher embeddings of random boxes: what a field is fitted to.

A box is squashed to the teacher's square input, so that all of it counts. Boxes come in a set of
shapes: those of one shape are cut and resized together, a batch at a time on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from hnerv_clip.config import ConfigError, TeacherConfig
from hnerv_clip.paths import resolve_path
from hnerv_clip.teachers import load
from hnerv_clip.teachers.base import Teacher, describe_teacher, preprocess
from hnerv_clip.teachers.cache import (
    PREPROCESS_VERSION,
    identity,
    tensor_digest,
    write_cache,
)
from hnerv_clip.teachers.load import load_teacher
from hnerv_clip.video import Video

BOXES_VERSION = 1  # raise it when the sampling or the cutting changes


@dataclass(frozen=True)
class BoxSampling:
    """Which boxes are drawn of each frame."""

    count: int = 256  # a frame
    shapes: int = 64  # distinct heights and widths among them
    size_range: tuple[float, float] = (0.3, 1.0)  # square root of the area, in frame heights
    aspect_range: tuple[float, float] = (0.5, 2.0)  # width / height
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.shapes < 1:
            raise ConfigError(f"count={self.count} boxes in shapes={self.shapes} must be 1 or more")
        for name in ("size_range", "aspect_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high or not math.isfinite(high):
                raise ConfigError(f"{name}={low:g}, {high:g} must rise and be above 0; the default "
                                  f"is {getattr(BoxSampling, name)}")


def draw_boxes(sampling: BoxSampling, frame_hw: tuple[int, int], frames: int) -> Tensor:
    """Random boxes of each frame: int64 [T, count, 4] top, left, height, width.

    The shapes fill the range of sizes and aspect ratios evenly (in logarithms, a Kronecker
    sequence), and what is larger than the frame is cut at it. Positions are uniform. Box p of every
    frame has the same shape.
    """
    rng = np.random.default_rng(sampling.seed)
    height, width = frame_hw
    kinds = min(sampling.shapes, sampling.count)
    share = (rng.uniform(size=2) + np.arange(1, kinds + 1)[:, None] *
             np.array([0.7548776662466927, 0.5698402909980532])) % 1  # of the plastic number
    (small, large), (narrow, broad) = (np.log(r) for r in (sampling.size_range,
                                                           sampling.aspect_range))
    size = np.exp(small + share[:, 0] * (large - small)) * height
    aspect = np.exp(narrow + share[:, 1] * (broad - narrow))
    tall = np.clip(np.round(size / np.sqrt(aspect)), 1, height).astype(int)
    wide = np.clip(np.round(size * np.sqrt(aspect)), 1, width).astype(int)
    kind = np.arange(sampling.count) % kinds
    tall, wide = (np.broadcast_to(a[kind], (frames, sampling.count)) for a in (tall, wide))
    top, left = (np.floor(rng.uniform(size=tall.shape) * (length - side + 1)).astype(int)
                 for length, side in ((height, tall), (width, wide)))
    return torch.from_numpy(np.stack([top, left, tall, wide], axis=-1))


@torch.no_grad()
def embed_boxes(teacher: Teacher, frames: Tensor, boxes: Tensor, *, progress: bool = False
                ) -> Tensor:
    """The teacher's embeddings of boxes.

    Args:
        frames: uint8 [T, 3, H, W].
        boxes: int64 [T, P, 4] top, left, height, width.
    Returns:
        float16 [T, P, D], unit length, on the teacher's device.
    """
    size = getattr(teacher, "image_size", (224, 224))
    at_once = load.PATCHES_AT_ONCE[teacher.device.type != "cpu"]
    found = torch.empty(*boxes.shape[:2], teacher.dim, dtype=torch.float16, device=teacher.device)
    frames = frames.to(teacher.device)
    flat = boxes.reshape(-1, 4)
    shapes, kind = torch.unique(flat[:, 2:], dim=0, return_inverse=True)
    with tqdm(total=len(flat), desc=teacher.name, unit="box", disable=not progress) as bar:
        for k, (tall, wide) in enumerate(shapes.tolist()):
            for chosen in torch.nonzero(kind == k)[:, 0].split(at_once):
                cut = _cut(frames, chosen // boxes.shape[1], flat[chosen], tall, wide)
                # mean 0 and deviation 1/255 leave grey levels as they are
                cut = preprocess(cut, size, mean=(0.0,) * 3, std=(1 / 255,) * 3,
                                 resize_mode="squash").byte()
                found.flatten(0, 1)[chosen.to(found.device)] = teacher.encode_patches(cut).half()
                bar.update(len(chosen))
    return found


def _cut(frames: Tensor, frame: Tensor, boxes: Tensor, tall: int, wide: int) -> Tensor:
    """Boxes of one shape: [N, 3, tall, wide], in channels-last memory."""
    device = frames.device
    frame, boxes = frame.to(device), boxes.to(device)
    rows = boxes[:, :1] + torch.arange(tall, device=device)
    cols = boxes[:, 1:2] + torch.arange(wide, device=device)
    cut = frames.permute(0, 2, 3, 1)[frame[:, None, None], rows[:, :, None], cols[:, None]]
    return cut.permute(0, 3, 1, 2)


def box_targets(video: Video, chosen: np.ndarray, config: TeacherConfig, sampling: BoxSampling, *,
                cache_dir: str | Path, device: str | torch.device = "auto",
                progress: bool = True) -> tuple[Tensor, Tensor]:
    """Random boxes of some frames and the teacher's embeddings of them, from the cache if there.

    The cache's key holds the frames, which of them, the boxes, the teacher's weights and the
    versions of the preprocessing and of the sampling.

    Returns:
        boxes int64 [N, count, 4] and embeddings float16 [N, count, D], on the CPU.
    Raises:
        ConfigError: see `load_teacher`.
    """
    boxes = draw_boxes(sampling, video.frame_hw, len(video.frames))[chosen]
    path = _cache_path(video, chosen, config, sampling, cache_dir)
    targets = _read(path, tuple(boxes.shape[:2]))
    if targets is None:
        teacher = load_teacher(config, device)
        targets = embed_boxes(teacher, video.frames[chosen], boxes, progress=progress).cpu()
        write_cache(path, targets, {"video": video.name, "teacher": teacher.label})
    return boxes, targets


def _cache_path(video: Video, chosen: np.ndarray, config: TeacherConfig, sampling: BoxSampling,
                cache_dir: str | Path) -> Path:
    key = {"frames": video.digest, "chosen": [int(i) for i in chosen], "sampling": asdict(sampling),
           "teacher": identity(config), "preprocess": PREPROCESS_VERSION,
           "precision": config.teacher_precision, "boxes": BOXES_VERSION}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    folder = resolve_path(cache_dir)
    name = "".join(c if c.isalnum() or c in "-_." else "_"
                   for c in describe_teacher(config).name)
    return folder / f"{name}-boxes-{digest}.safetensors"


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            targets, written = file.get_tensor("embeddings"), file.metadata() or {}
        if tensor_digest(targets) != written.get("sha256"):
            raise ValueError("its checksum is wrong")
        if targets.shape[:2] != shape or targets.dtype != torch.float16:
            raise ValueError(f"it holds {targets.dtype} {tuple(targets.shape)}, not {shape}")
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"the cached embeddings of boxes {path} are damaged ({error}); the teacher "
                      "has to run again", stacklevel=3)
        return None
    return targets
