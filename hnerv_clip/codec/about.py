"""What a stored video says of its source and of the teacher, from a run's dataset."""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hnerv_clip.codec.video import About
from hnerv_clip.config import BUNDLED, Config, ConfigError, TeacherConfig

if TYPE_CHECKING:
    from hnerv_clip.dataset import Dataset


def describe_dataset(dataset: Dataset, config: Config) -> About:
    """Times, sizes and the teacher's identity, for `encode_video`."""
    video = dataset.video
    times = getattr(video, "times_s", None)
    if times is None:
        times = [i / video.fps for i in range(len(video.frames))]
    if any(after - before < 2e-6 for before, after in zip(times, times[1:])):
        warnings.warn(f"the times of {video.name} do not rise; its file gets even ones, "
                      f"{video.fps:g} frames a second", stacklevel=2)
        times = [i / video.fps for i in range(len(video.frames))]
    with_teacher = config.model.predict_clip or config.model.head == "field"
    return About(name=video.name, times_s=[float(t) for t in times],
                 teacher_name=dataset.teacher_name if with_teacher else "",
                 teacher_label=dataset.teacher_label if with_teacher else "",
                 weights=weights_digest(config.teacher) if with_teacher else "")


def weights_digest(config: TeacherConfig) -> str:
    """`sha256:…` of the teacher's weights where they are on this machine, else empty."""
    path = _weights(config)
    if path is None:
        return ""
    stat = path.stat()
    return _digest_once(path, stat.st_mtime_ns, stat.st_size)


def _weights(config: TeacherConfig) -> Path | None:
    from importlib import metadata

    from hnerv_clip.teachers import clip_weights
    from hnerv_clip.teachers.efficientnet import BUNDLED_PACKAGE

    try:
        if config.teacher == BUNDLED:
            files = metadata.files(BUNDLED_PACKAGE) or []
            return next((Path(f.locate()) for f in files if f.suffix == ".pth"), None)
        if clip_weights.is_file(config.clip_pretrained) or \
                config.clip_pretrained.startswith(clip_weights.LOCAL_DIR):
            return clip_weights.weights_file(config)
        from open_clip.pretrained import get_pretrained_cfg  # takes seconds

        cached = clip_weights._cached_weights(
            get_pretrained_cfg(config.clip_model, config.clip_pretrained))
        return Path(cached) if cached else None
    except (metadata.PackageNotFoundError, ConfigError):
        return None


@functools.lru_cache(maxsize=8)
def _digest_once(path: Path, mtime_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
