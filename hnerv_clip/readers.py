"""Frames out of files: videos by PyAV, folders of images and animated WebP by Pillow.

A reader yields `Picture`s in the order in which they are shown. What it cannot give whole and
right, it refuses.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageOps, UnidentifiedImageError

from hnerv_clip.config import ConfigError

FOLDER_FPS = 25.0  # images carry no frame rate
REORDERED = 16  # decoded frames held back, at most, to put them in the order of their times
VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts",
                  ".m2ts", ".wmv", ".flv", ".3gp", ".ogv", ".y4m"}
# Images that Pillow does not read
FOREIGN_IMAGES = {".heic", ".heif", ".jxl", ".exr", ".dng", ".cr2", ".nef", ".arw", ".svg"}
NO_PICTURES = {"tty"}  # FFmpeg draws any text as a video
WIDEST_PIXEL = 4  # to its height; DV and anamorphic DVDs have up to 1.46, scope prints 2
COVER = Disposition.attached_pic | Disposition.timed_thumbnails
CORRUPT = "{path} is damaged at frame {number}; {fix}"
FIX = ("give a file that ffmpeg plays without errors, re-encode it, or set frame_limit below the "
       "damage")


class Picture(NamedTuple):
    """A frame as it is shown."""

    pixels: np.ndarray  # uint8 [H, W, 3], RGB
    time_s: float  # since the first one


def open_source(path: Path, *, square: bool = True) -> VideoFile | ImageFolder | AnimatedImage:
    """What reads a file or a folder.

    Args:
        square: give a video's pixels as they are shown where they are not square, else as stored.
    Raises:
        ConfigError: a pipe, a device, or a folder that is no sequence of images.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return ImageFolder(path)
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is a pipe, a socket or a device, which can be read only once or "
                          "without end: write it to a file first")
    return AnimatedImage(path) if path.suffix.lower() == ".webp" else VideoFile(path, square)


class VideoFile:
    """A video file, read with PyAV."""

    def __init__(self, path: Path, square: bool = True) -> None:
        self.path, self.square, self.fps = path, square, FOLDER_FPS

    def read(self, stride: int, limit: int = 0) -> Iterator[Picture]:
        """Yield every stride-th frame, at most `limit` of them (0: all), turned as it is shown."""
        shown = 0
        try:
            # FFmpeg's playlists may name files and addresses: this file alone is opened
            with av.open(str(self.path), options={"protocol_whitelist": "file"}) as container:
                stream = self._stream(container)
                rate = stream.average_rate or stream.guessed_rate or Fraction(FOLDER_FPS)
                self.fps, aspect = float(rate), Fraction(1)
                if self.square:
                    aspect = _pixel_aspect(stream, self.path)
                first, end = None, None
                frames = _in_order(_decode(container, stream))
                for shown, (frame, seen) in enumerate(frames, 1):
                    end = seen
                    if frame.is_corrupt:
                        raise ConfigError(CORRUPT.format(path=self.path, number=shown - 1, fix=FIX))
                    time = frame.time if frame.time is not None else (shown - 1) / self.fps
                    first = time if first is None else first
                    if (shown - 1) % stride == 0:
                        yield Picture(_as_shown(frame, self.path, aspect), time - first)
                        if limit and (shown - 1) // stride + 1 == limit:
                            return
                self._check_end(stream, end, shown)
        except (av.error.FFmpegError, OSError) as error:
            where = f"does not decode after frame {shown}" if shown else \
                "is no video, or damaged from its beginning"
            raise ConfigError(f"{self.path} {where} ({error.strerror or error}); {FIX}") from error

    def _stream(self, container: av.container.InputContainer) -> av.VideoStream:
        """The first video that is no cover picture."""
        moving = [stream for stream in container.streams.video
                  if not stream.disposition & COVER]
        if moving and container.format.name not in NO_PICTURES:
            # In frame threads FFmpeg loses the mark of a damaged frame now and then (H.264: in 12
            # of 2,400 readings on busy cores), in slice threads always; in one thread never
            moving[0].thread_type = "NONE"
            if moving[0].codec_context.name == "mjpeg":  # it marks no frame; others do, or cannot
                moving[0].codec_context.options = {"err_detect": "explode"}
            return moving[0]
        cover = " but a cover picture" if container.streams.video and not moving else ""
        raise ConfigError(f"{self.path} holds no video stream{cover}; give a video file or a "
                          "folder of images")

    def _check_end(self, stream: av.VideoStream, end_s: float | None, shown: int) -> None:
        """Warn where a file was cut off between frames, which no decoder notices.

        By time: a header's number of frames also counts those that an edit list hides, and in AVI
        those that repeat the one before.
        """
        if not stream.duration or end_s is None:
            return
        start = stream.start_time or 0
        promised = float(stream.duration * stream.time_base)
        missing = promised - (end_s - float(start * stream.time_base))
        if missing > max(2 / self.fps, 0.01 * promised):
            warnings.warn(f"{self.path} ends {missing:.2f} s before the {promised:.2f} s that its "
                          f"index promises, after {shown} of the {stream.frames or 'unknown'} "
                          "frames; the end may be missing", stacklevel=3)


def _decode(container: av.container.InputContainer, stream: av.VideoStream
            ) -> Iterator[tuple[av.VideoFrame, float | None]]:
    """Decoded frames, each with the end in seconds of the last packet so far."""
    end = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise av.error.InvalidDataError(0, "a packet that the file marks as corrupt")
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.size and time is not None:
            last = float((time + (packet.duration or 0)) * packet.time_base)
            end = last if end is None else max(end, last)
        for frame in packet.decode():
            yield frame, end


def _in_order(frames: Iterable[tuple[av.VideoFrame, float | None]]
              ) -> Iterator[tuple[av.VideoFrame, float | None]]:
    """Frames in the order of their time stamps.

    A decoder may give the first ones before it knows how far a stream is out of order. Frames that
    came before an error are given before it is raised.
    """
    waiting: list[tuple[int, int, av.VideoFrame]] = []
    last, end, error = 0, None, None
    try:
        for number, (frame, end) in enumerate(frames):
            last = frame.pts if frame.pts is not None else last
            heapq.heappush(waiting, (last, number, frame))
            if len(waiting) > REORDERED:
                yield heapq.heappop(waiting)[2], end
    except (av.error.FFmpegError, OSError) as caught:
        error = caught
    while waiting:
        yield heapq.heappop(waiting)[2], end
    if error is not None:
        raise error


def _pixel_aspect(stream: av.VideoStream, path: Path) -> Fraction:
    """Width to height of a pixel as it is shown; 1 where a file says nothing.

    Raises:
        ConfigError: a ratio that no camera writes.
    """
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        raise ConfigError(f"{path} asks for pixels {aspect.numerator}:{aspect.denominator} wide to "
                          "high: re-encode it with square ones, ffmpeg -i IN -vf setsar=1 OUT")
    return aspect


def _as_shown(frame: av.VideoFrame, path: Path, aspect: Fraction) -> np.ndarray:
    """The pixels, made square by resizing the width, then turned and mirrored as the file asks."""
    image = frame.to_ndarray(format="rgb24", width=max(1, round(frame.width * aspect)),
                             interpolation="BICUBIC") if aspect != 1 else \
        frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if not (a or b or c or d):
        return image
    if abs(b) + abs(c) <= 1e-3 * (abs(a) + abs(d)):  # x' = a·x, y' = d·y
        flip_columns, flip_rows = a < 0, d < 0
    elif abs(a) + abs(d) <= 1e-3 * (abs(b) + abs(c)):  # x' = c·y, y' = b·x
        image, flip_columns, flip_rows = image.transpose(1, 0, 2), c < 0, b < 0
    else:
        raise ConfigError(f"{path} asks to be shown turned by {frame.rotation}°, no quarter turn; "
                          "re-encode it upright: ffmpeg -i IN OUT")
    return np.ascontiguousarray(image[::-1 if flip_rows else 1, ::-1 if flip_columns else 1])


class ImageFolder:
    """A folder of images in natural order (2.png before 10.png), read with Pillow."""

    fps = FOLDER_FPS

    def __init__(self, path: Path) -> None:
        self.path, kinds = path, _image_suffixes()
        images, videos, others = [], [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                kind = images if suffix in kinds else videos if suffix in VIDEO_SUFFIXES else others
                if suffix in FOREIGN_IMAGES:
                    raise ConfigError(f"{entry.name} in {path} is an image of a kind that is not "
                                      "read here: save all images as PNG")
                if kind is images and not entry.is_file():
                    raise ConfigError(f"{entry.name} in {path} is no file that can be read (a "
                                      "folder, a pipe, a device or a broken link): remove it")
                kind.append(Path(entry.path))
        if videos:
            raise ConfigError(f"the folder {path} holds videos ({videos[0].name}): train one run "
                              "for each (data_path=FILE), then search them together with "
                              "hnerv-clip index FOLDER RUN RUN …")
        if not images:
            raise ConfigError(f"the folder {path} holds no images; put PNG or JPEG files into it")
        if others:
            shown = ", ".join(sorted(file.name for file in others)[:3])
            warnings.warn(f"{len(others)} of the files in {path} are no images and are left out "
                          f"({shown})", stacklevel=3)
        self.paths = sorted(images, key=natural_key)

    def read(self, stride: int, limit: int = 0) -> Iterator[Picture]:
        """Yield every stride-th image, at most `limit` of them (0: all); no other is opened."""
        paths = self.paths[::stride][:limit or None]
        sizes = {}
        for path in paths:
            sizes[path] = self._size(path)
            if sizes[path] != sizes[paths[0]]:
                (w, h), (w0, h0) = sizes[path], sizes[paths[0]]
                raise ConfigError(f"{path.name} is {h}×{w} but {paths[0].name} is {h0}×{w0} "
                                  f"(height×width): all images of {path.parent} must have one "
                                  "size; resize or remove the odd ones")
        for number, path in enumerate(paths):
            with open_image(path) as image:
                pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
            yield Picture(pixels, number * stride / self.fps)

    @staticmethod
    def _size(path: Path) -> tuple[int, int]:
        with open_image(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # of phones: previews
                raise ConfigError(f"{path} holds {image.n_frames} pictures: give that file itself "
                                  "as data_path, or save each picture as a file of its own")
            if image.mode.startswith(("I", "F")):
                raise ConfigError(f"{path} has pixels of type {image.mode}: save it with 8 bits "
                                  "a channel")
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations that swap the sides
            return image.size[::-1] if turned else image.size


class AnimatedImage:
    """All pictures of a WebP file, which FFmpeg reads only where it is still."""

    def __init__(self, path: Path) -> None:
        self.path, self.fps = path, FOLDER_FPS

    def read(self, stride: int, limit: int = 0) -> Iterator[Picture]:
        """Yield every stride-th picture, at most `limit` of them (0: all)."""
        time_s, given = 0.0, 0
        with open_image(self.path) as image:
            count = getattr(image, "n_frames", 1)
            for number in range(count):
                image.seek(number)
                pixels = np.array(image.convert("RGB"))
                if number % stride == 0:
                    yield Picture(pixels, time_s)
                    given += 1
                    if given == limit:
                        return
                time_s += (image.info.get("duration") or 1000 / FOLDER_FPS) / 1000
            self.fps = count / time_s


class open_image:
    """`Image.open` whose errors, also those while reading pixels, name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            self.image = Image.open(self.path)
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise self._unreadable(error) from error
        return self.image

    def __exit__(self, kind, error, traceback) -> None:
        self.image.close()
        if isinstance(error, (OSError, EOFError, SyntaxError, Image.DecompressionBombError)):
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ConfigError:
        fix = "use a smaller one" if isinstance(error, Image.DecompressionBombError) else \
            "save it anew or remove it"
        return ConfigError(f"the image {self.path} does not read ({error}); {fix}")


def _image_suffixes() -> set[str]:
    """Endings of the images that Pillow reads."""
    return {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in ("MPEG", "PDF")} - VIDEO_SUFFIXES


def natural_key(path: Path) -> list:
    """Sorts 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)] + [path.name]
