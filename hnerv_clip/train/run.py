"""Train a run to its end, or check it before anything takes time."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hnerv_clip.config import Config, VideoConfig
from hnerv_clip.dataset import (
    Dataset,
    check_given_video,
    check_same_video,
    load_dataset,
    prepare_dataset,
    resolve_config,
)
from hnerv_clip.distributed import agree, ranks
from hnerv_clip.engines.plain import SetupError
from hnerv_clip.field.fit_run import box_sampling, fit_head
from hnerv_clip.field.query import has_field
from hnerv_clip.files import check_writable
from hnerv_clip.inference import load_run
from hnerv_clip.losses import PIXEL_LOSSES, check_ms_ssim_size
from hnerv_clip.model import plan_model
from hnerv_clip.patches import make_grid
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.run_dir import RunDir, RunError
from hnerv_clip.teachers.boxes import box_targets
from hnerv_clip.train.trainer import Trainer, TrainError
from hnerv_clip.video import NAMED_VIDEOS, Video, find_source, load_video, split_frames

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass
class TrainResult:
    """A run that reached its end."""

    run_dir: Path
    summary: dict[str, Any]  # final figures, as in summary.json
    metrics: pd.DataFrame  # a row per epoch


def train(config: Config, run_dir: str | Path, *, cache_dir: str | Path = "output/cache",
          progress: bool = True, dataset: Dataset | None = None, fit: bool = True
          ) -> TrainResult | None:
    """Train a run to its end, from its last checkpoint where there is one.

    A finished run of the same video is returned as it stands. Under `torch.distributed` every rank
    calls this; each takes its share of every batch, and rank 0 alone writes.

    Args:
        run_dir: the run's folder; another configuration's is refused.
        cache_dir: where `prepare_dataset` left the teacher's embeddings.
        progress: show a progress bar.
        dataset: what `prepare_dataset` returned for this configuration, else it is loaded.
        fit: a field afterwards, where the head is one.
    Returns:
        The run's figures; None on ranks above 0, which may not see rank 0's files yet.
    Raises:
        ConfigError: before any long work, see there.
        RunError: likewise, as where the run is of another video; or the disk is full or became
            read-only, the last checkpoint is intact.
        TrainError: training collapsed, and `on_divergence` or the tries so far forbid another; or
            memory ran out.
    """
    rank, _ = ranks()
    config = resolve_config(config, dataset and dataset.video)
    run = RunDir.create(run_dir, config) if rank == 0 else RunDir(run_dir)
    if agree(run.finished):
        check_given_video(run, config, dataset and dataset.video)
    else:
        with run.lock() if rank == 0 else nullcontext():
            dataset = dataset or load_dataset(config, cache_dir)
            check_same_video(run, dataset.video, config.video.data_path)
            if rank == 0:
                run.note_location(config)
            loop = Trainer(config, run, dataset)
            try:
                loop.fit(progress=progress)
            except torch.cuda.OutOfMemoryError as error:
                raise TrainError(
                    f"the GPU's memory ran out ({str(error).splitlines()[0]}); lower batch_size="
                    f"{config.train.batch_size}, modelsize or resize_list. The last checkpoint of "
                    f"{run.path} is intact") from error
            except SetupError as error:
                raise TrainError(f"the fast engine cannot be set up here ({error}); use engine="
                                 f"'plain'. The last checkpoint of {run.path} is intact") from error
            except RuntimeError as error:
                if config.train.engine == "plain" or "C compiler" not in str(error):
                    raise
                raise TrainError(f"the fast engine can't be compiled here ({error}); install a C "
                                 "compiler such as gcc, or use engine='plain'") from error
            except OSError as error:  # of the log or TensorBoard; checkpoints say it themselves
                if error.errno not in UNWRITABLE:
                    raise
                raise RunError(f"cannot write to {run.path}: {error}. Its last checkpoint is "
                               "intact; free space or make the folder writable, then run again "
                               "to resume") from error
    if rank == 0 and fit and config.model.head == "field" and not has_field(run):
        fit_head(load_run(run.path, cache_dir=cache_dir, device=config.train.device,
                          dataset=dataset),
                 cache_dir=cache_dir, device=config.train.device, progress=progress)
    return None if rank else TrainResult(run.path, run.summary(), run.metrics())


def check_run(config: Config, video: Video | None = None) -> Config:
    """Raise what would stop a run later, before the teacher or any training takes time.

    Args:
        video: the video, if it is already decoded.
    Returns:
        The configuration with every `auto` resolved for the teacher and the video's size.
    Raises:
        ConfigError: see `load_video`, `make_grid`, `plan_model` and the MS-SSIM losses.
    """
    if config.video.data_path not in NAMED_VIDEOS:  # a job may start in another folder
        config = config.replace(data_path=str(find_source(config.video.data_path)[0]))
    frame_hw, frame_count = (video.frame_hw, len(video.frames)) if video else \
        _video_size(config.video)
    config = resolve_config(config.resolve(frame_hw))
    split_frames(frame_count, config.video.data_split, config.video.split_phase)
    make_grid(config.teacher, frame_hw)
    plan_model(config.model, frame_hw=frame_hw, frame_count=frame_count)
    if "ms_ssim" in PIXEL_LOSSES[config.train.loss]:
        check_ms_ssim_size(frame_hw)
    return config


def prepare_run(config: Config, cache_dir: str | Path = "output/cache",
                video: Video | None = None) -> tuple[Config, Dataset]:
    """Check a run, and run its teacher where its embeddings are not cached; decodes once.

    They are those of the patches, and for a field those of the boxes that it will be fitted to.

    Args:
        video: the video, if it is already decoded.
    Returns:
        The configuration with every `auto` resolved, and the data, for `train`.
    Raises:
        ConfigError: see `check_run` and `prepare_dataset`.
        RunError: `cache_dir` cannot be written.
    """
    check_writable(resolve_path(cache_dir))
    video = video or load_video(config.video)
    config = check_run(config, video)
    dataset = prepare_dataset(config, cache_dir, device=config.train.device, video=video)
    if config.model.head == "field":
        box_targets(dataset.video, dataset.split.train, config.teacher, box_sampling(config),
                    cache_dir=cache_dir, device=config.train.device)
    return config, dataset


@lru_cache
def _video_size(config: VideoConfig) -> tuple[tuple[int, int], int]:
    """((H, W), T) of a video, decoded once for many runs."""
    video = load_video(config)
    return video.frame_hw, len(video.frames)
