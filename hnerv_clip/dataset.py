"""All that a run learns from: frames, their split, their patches, and the teacher's embeddings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hnerv_clip.config import AUTO, Config, ConfigError
from hnerv_clip.metrics import mean_energy
from hnerv_clip.patches import PatchGrid, make_grid
from hnerv_clip.runs.run_dir import RunDir, RunError
from hnerv_clip.teachers import (
    cache_path,
    cached_embeddings,
    describe_teacher,
    teacher_dim,
    teacher_embeddings,
)
from hnerv_clip.video import FrameSplit, Video, load_video, split_frames

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second: imported where a table is made


@dataclass
class Dataset:
    """T frames and, of each, P patches with teacher embeddings of D values."""

    video: Video
    split: FrameSplit
    grid: PatchGrid
    embeddings: Tensor | None  # float32 [T, P, D], unit length
    teacher_name: str
    teacher_label: str  # for captions
    mask: Tensor | None = None  # float32 [H, W], 0 where pixels are hidden from the run

    def facts(self) -> pd.DataFrame:
        """A description of the data, as a table of values by name."""
        import pandas as pd

        height, width = self.video.frame_hw
        rows = {
            "video": self.video.name,
            "frames": len(self.video.frames),
            "frame size": f"{height} × {width}",
            "frames per second": round(self.video.fps, 3),
            "training / held out / skipped":
                " / ".join(str(self.split.labels.count(k)) for k in ("train", "val", "skip")),
            "patches per frame": f"{len(self.grid)} ({self.grid.rows} × {self.grid.cols})",
            "patch size": f"{self.grid.size[0]} × {self.grid.size[1]}",
            "teacher": self.teacher_label,
        }
        if self.embeddings is not None:
            rows["embedding values"] = self.embeddings.shape[-1]
            rows["squared length of the mean embedding"] = f"{mean_energy(self.embeddings):.1%}"
        return pd.DataFrame({"value": rows})


def resolve_config(config: Config, video: Video | None = None) -> Config:
    """A configuration with every `auto` resolved for its teacher and its video.

    Args:
        video: its video, else one frame of it is read where the size is needed.
    """
    if config.model.clip_dim == AUTO and config.embeds:
        config = config.replace(clip_dim=teacher_dim(config.teacher))
    if config.resolved:
        return config
    video = video or load_video(dataclasses.replace(config.video, frame_limit=1))
    return config.resolve(video.frame_hw)


def check_same_video(run: RunDir, video: Video, data_path: str) -> None:
    """Raise where a run that has begun was trained on other frames than these.

    The frames are compared, not where they lie.

    Raises:
        RunError: they differ; the message names both.
    """
    recorded = run.recorded_video()
    if recorded and recorded["data_digest"] != video.digest:
        height, width = video.frame_hw
        raise RunError(
            f"{data_path} shows other frames ({len(video.frames)} of {height}×{width}, sha256 "
            f"{video.digest[:12]}) than {run.path} was trained on ({recorded['data']}, sha256 "
            f"{recorded['data_digest'][:12]}): give that video with --data_path, or train on this "
            "one in another outf")


def check_given_video(run: RunDir, config: Config, video: Video | None = None) -> None:
    """Raise where a run that has begun was trained on other frames than a configuration's video.

    Without `video` it is decoded only where it lies elsewhere than the run's.

    Args:
        video: that of the configuration, if it is already decoded.
    Raises:
        RunError: see `check_same_video`.
        ConfigError: the video cannot be read.
    """
    data_path = config.video.data_path
    if run.begun and (video or data_path != run.config().video.data_path):
        check_same_video(run, video or load_video(config.video), data_path)


def prepare_dataset(config: Config, cache_dir: str | Path = "output/cache", *,
                    device: str | torch.device = "auto", progress: bool = True,
                    video: Video | None = None) -> Dataset:
    """Load the video and its teacher embeddings, running the teacher where they are not cached.

    A pixel-only run (`predict_clip=False`) takes cached embeddings, or goes without.

    Args:
        video: the video, if it is already decoded.
    Raises:
        ConfigError: see `load_video`, `make_grid` and `load_teacher`; or the teacher's dimension
            is not `clip_dim`.
    """
    dataset = _without_embeddings(config, video)
    arguments = (dataset.video, dataset.grid, config.teacher)
    if config.model.predict_clip:
        dataset.embeddings = teacher_embeddings(*arguments, cache_dir=cache_dir, device=device,
                                                progress=progress)
    else:
        dataset.embeddings = cached_embeddings(*arguments, cache_dir)
    return dataset


def load_dataset(config: Config, cache_dir: str | Path = "output/cache", *,
                 video: Video | None = None) -> Dataset:
    """Load the video and its cached teacher embeddings; never runs a teacher.

    Args:
        video: the video, if it is already decoded.
    Raises:
        ConfigError: as `prepare_dataset`, or the embeddings are not cached.
    """
    dataset = _without_embeddings(config, video)
    arguments = (dataset.video, dataset.grid, config.teacher, cache_dir)
    dataset.embeddings = cached_embeddings(*arguments)
    if dataset.embeddings is None and config.model.predict_clip:
        raise ConfigError(
            f"no embeddings of {dataset.teacher_label} for {dataset.video.name} at "
            f"{cache_path(*arguments)}: run notebook 01_prepare_data first, with the same video "
            f"and teacher parameters and cache_dir={str(cache_dir)!r}")
    return dataset


def _without_embeddings(config: Config, video: Video | None) -> Dataset:
    facts = describe_teacher(config.teacher)
    if config.model.predict_clip:
        _check_dim(config, facts.label)
    video = video or load_video(config.video)
    return Dataset(
        video=video, split=split_frames(len(video.frames), config.video.data_split,
                                        config.video.split_phase),
        grid=make_grid(config.teacher, video.frame_hw), embeddings=None,
        teacher_name=facts.name, teacher_label=facts.label,
        mask=inpainting_mask(video.frame_hw, config.train.inpaint_size))


def _check_dim(config: Config, label: str) -> None:
    dim = teacher_dim(config.teacher)
    if config.model.clip_dim not in (AUTO, dim):
        raise ConfigError(f"clip_dim={config.model.clip_dim}, but the teacher {label} gives "
                          f"embeddings of {dim} values: use clip_dim={dim}, or leave it out")


def inpainting_mask(frame_hw: tuple[int, int], size: int) -> Tensor | None:
    """1 everywhere but in five boxes: the center and the four quarter points, as in HNeRV.

    Args:
        size: side of a box, in pixels (an odd one loses a pixel); 0 for no boxes.
    Returns:
        [H, W] float32, or None without boxes.
    Raises:
        ConfigError: the boxes would leave no pixel.
    """
    if size == 0:
        return None
    height, width = frame_hw
    mask = torch.ones(height, width)
    half = size // 2
    for y, x in [(0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]:
        row, col = int(y * height), int(x * width)
        mask[max(row - half, 0):row + half, max(col - half, 0):col + half] = 0
    if not mask.any():
        raise ConfigError(f"inpaint_size={size} covers the whole frame {height}×{width}; "
                          f"use a size below {min(frame_hw) // 4}")
    return mask
