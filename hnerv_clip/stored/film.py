"""A stored video written as a film, with its own times, or as a folder of pictures."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm

from hnerv_clip.codec.container import expand_ticks
from hnerv_clip.devices import fetch, usable_cores

if TYPE_CHECKING:
    from hnerv_clip.stored.video import StoredVideo

AHEAD = 4  # batches decoded before they are written
RUN = 8  # frames in a row that an encoder is given in its turn, as many as a file codes together
WAITING = 2 * RUN  # frames that wait for their encoder, at most
SEGMENT = (24, 64)  # frames that one encoder takes, at least and at most; each begins anew
WAITING_BYTES = 2**30  # of decoded frames that wait for their encoder, about
BT709 = 1  # matrix, primaries and transfer of HD video, in ffmpeg's numbers
LIMITED = 1  # luma 16…235
# R, G, B in 0…255 to Y, Cb, Cr (ITU-R BT.709, limited range)
MATRIX = [[0.2126 * 219, 0.7152 * 219, 0.0722 * 219],
          [-0.2126 / 1.8556 * 224, -0.7152 / 1.8556 * 224, (1 - 0.0722) / 1.8556 * 224],
          [(1 - 0.2126) / 1.5748 * 224, -0.7152 / 1.5748 * 224, -0.0722 / 1.5748 * 224]]
OFFSET = [16.0, 128.0, 128.0]


def write_film(path: Path, video: StoredVideo, chosen: Sequence[int], *, crf: int = 16,
               preset: str = "veryfast", progress: bool = True) -> None:
    """Write frames as H.264 in MP4 or Matroska, each at its own time.

    Pictures with an odd side are stored without chroma subsampling, so that their size stays.
    Segments of frames are decoded in turns and encoded at the same time, on all cores.

    Args:
        chosen: rising frame numbers; the first is shown at time 0.
        crf, preset: x264's.
    """
    times = video.header.meta["video"]["times"]
    ticks = expand_ticks(times)
    rate = max(Fraction(video.fps).limit_denominator(1001), Fraction(1, 1000))
    film = _Film(video.size, Fraction(*times["unit"]), rate, crf=crf, preset=preset)

    def draw(order: list[int]) -> Iterator[np.ndarray]:
        batches = _ahead(video, [chosen[i] for i in order], progress,
                         lambda batch: to_planes(batch, film.halved))
        return (image for batch in batches for image in batch)

    encode_film(path, film, draw, [ticks[i] - ticks[chosen[0]] for i in chosen])


@dataclass(frozen=True)
class _Film:
    """What all segments of a film share."""

    size: tuple[int, int]  # (H, W)
    unit: Fraction  # seconds of a tick
    rate: Fraction
    crf: int
    preset: str

    @property
    def halved(self) -> bool:
        """Chroma at half the resolution (4:2:0)."""
        return not any(side % 2 for side in self.size)

    @property
    def pix_fmt(self) -> str:
        """In ffmpeg's words."""
        return "yuv420p" if self.halved else "yuv444p"

    def set_up(self, context: av.VideoCodecContext, threads: int = 1) -> None:
        """Give an encoder these settings."""
        context.height, context.width = self.size
        context.pix_fmt, context.framerate, context.time_base = self.pix_fmt, self.rate, self.unit
        context.options = {"crf": str(self.crf), "preset": self.preset}
        context.thread_count = threads
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED

    def encode(self, images: Iterable[np.ndarray], ticks: Sequence[int], flags: int,
               threads: int = 1) -> list[av.Packet]:
        """The packets of a segment that stands alone."""
        context = av.CodecContext.create("libx264", "w")
        self.set_up(context, threads)
        context.flags = flags
        packets = []
        for image, tick in zip(images, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format=self.pix_fmt)
            frame.colorspace, frame.color_range = BT709, LIMITED
            frame.pts, frame.time_base = tick, self.unit
            packets += context.encode(frame)
        return packets + context.encode()


class _Segment:
    """A part of a film with an encoder of its own, which takes frames as they come."""

    def __init__(self, pool: ThreadPoolExecutor, film: _Film, ticks: Sequence[int], *settings: int):
        self.missing = len(ticks)
        self.frames: queue.Queue[np.ndarray | None] = queue.Queue(WAITING)
        self.packets = pool.submit(film.encode, self._given(), ticks, *settings)

    def _given(self) -> Iterator[np.ndarray]:
        while (image := self.frames.get()) is not None:
            yield image

    def give(self, image: np.ndarray) -> None:
        """Wait until the encoder has room for its next frame; what stopped it is raised."""
        self.missing -= 1
        for item in [image] if self.missing else [image, None]:
            while True:
                try:
                    self.frames.put(item, timeout=0.2)
                    break
                except queue.Full:
                    if self.packets.done():
                        self.packets.result()

    def stop(self) -> None:
        """Let the encoder end without the frames that are missing."""
        with self.frames.mutex:
            self.frames.queue.clear()
        self.frames.put(None)


def encode_film(path: Path, film: _Film, draw: Callable[[list[int]], Iterable[np.ndarray]],
                ticks: Sequence[int], *, workers: int | None = None) -> None:
    """Encode frames in segments, several at a time, into one stream.

    Args:
        draw: gives the planes of frames, uint8 as of `to_planes`, in the order that it is told.
        ticks: when each is shown, rising, in units of the film.
        workers: threads that encode; None for the cores of this process.
    """
    workers = workers or usable_cores()
    encoders, length = plan_segments(len(ticks), film.size, workers=workers)
    options = {"movflags": "faststart"} if path.suffix.lower() != ".mkv" else {}
    # the last frame is shown for as long as the one before it
    last = ticks[-1] - ticks[-2] if len(ticks) > 1 else round(1 / (film.rate * film.unit))
    shown = dict(zip(ticks, [b - a for a, b in pairwise(ticks)] + [last], strict=True))
    segments: dict[int, _Segment] = {}  # that are not written yet, by their number
    written = coded = 0
    delay: int | None = None  # packets by which x264 reorders frames
    with av.open(str(path), "w", options=options) as container, \
            ThreadPoolExecutor(encoders) as pool:
        stream = container.add_stream("libx264", rate=film.rate)
        film.set_up(stream.codec_context)
        stream.time_base = film.unit
        settings = stream.codec_context.flags, workers // encoders

        def write_first() -> None:
            nonlocal written, coded, delay
            packets = segments.pop(written).packets.result()
            written += 1
            if delay is None:
                delay = sum(packet.dts < packets[0].pts for packet in packets)
            for packet in packets:  # the order of decoding goes on over the segments' borders
                at = coded - delay
                packet.dts = ticks[at] if at >= 0 else ticks[0] + at
                packet.duration = shown[packet.pts]
                packet.stream, coded = stream, coded + 1
                if coded == len(ticks) and options:  # MP4 counts from the first packet's dts
                    packet.duration = ticks[-1] + last - delay - packet.dts
                container.mux(packet)

        order = encoding_order(len(ticks), encoders, length)
        try:
            for frame, image in zip(order, draw(order), strict=True):
                number, first = frame // length, frame // length * length
                if frame == first:
                    segments[number] = _Segment(pool, film, ticks[first:first + length], *settings)
                segments[number].give(image)
                while written in segments and segments[written].packets.done():
                    write_first()
            while segments:
                write_first()
        finally:
            for segment in segments.values():
                segment.stop()


def encoding_order(frames: int, encoders: int, length: int) -> list[int]:
    """The order in which frames are drawn, so that all encoders have work and end together.

    Args:
        encoders, length: see `plan_segments`.
    """
    order: list[int] = []
    for start in range(0, frames, encoders * length):
        group = [range(first, min(first + length, frames))
                 for first in range(start, min(start + encoders * length, frames), length)]
        for at in range(0, length, RUN):
            for segment in group:
                order += segment[at:at + RUN]
    return order


def plan_segments(frames: int, size: tuple[int, int], *, workers: int) -> tuple[int, int]:
    """How a film is cut for its encoders.

    Few or large frames leave fewer segments than cores: each encoder has more threads then.

    Args:
        size: (H, W).
        workers: threads of all encoders together.
    Returns:
        (encoders at a time, frames of each segment but the last).
    """
    shortest, longest = SEGMENT
    waiting = max(1, WAITING_BYTES // (2 * math.prod(size)))  # frames
    encoders = max(1, min(workers, frames // shortest, waiting // shortest))
    return encoders, min(longest, -(-frames // encoders), waiting // encoders)


def to_planes(frames: Tensor, halved: bool) -> Tensor:
    """RGB to the planes of YUV, on the frames' device.

    Args:
        frames: uint8 [B, 3, H, W].
        halved: chroma at half the resolution (4:2:0); H and W are even then.
    Returns:
        uint8 [B, 3H/2, W] for 4:2:0, as `VideoFrame.from_ndarray` takes it; else [B, 3, H, W].
    """
    matrix = torch.tensor(MATRIX, device=frames.device) / 255
    offset = torch.tensor(OFFSET, device=frames.device).view(3, 1, 1)
    yuv = torch.einsum("kc,bchw->bkhw", matrix, frames.float()) + offset
    if halved:
        chroma = avg_pool2d(yuv[:, 1:], 2)
        height, width = frames.shape[2:]
        yuv = torch.cat([yuv[:, 0], chroma.reshape(len(frames), height // 2, width)], dim=1)
    return yuv.round_().clamp_(0, 255).byte()


def write_pictures(path: Path, video: StoredVideo, chosen: Sequence[int], *,
                   progress: bool = True) -> None:
    """Write frames as PNG files, named by their number, into a new folder."""
    path.mkdir()
    digits = max(5, len(str(len(video))))
    numbers = iter(chosen)
    for images in _ahead(video, chosen, progress,
                         lambda batch: batch.permute(0, 2, 3, 1).contiguous()):
        for image in images:
            Image.fromarray(image).save(path / f"{next(numbers):0{digits}d}.png",
                                        compress_level=1)


def _ahead(video: StoredVideo, chosen: Sequence[int], progress: bool,
           finish: Callable[[Tensor], Tensor]) -> Iterator[np.ndarray]:
    """Batches of frames in turn, finished, decoded in a thread while others are written."""
    waiting: queue.Queue = queue.Queue(AHEAD)
    stopped = threading.Event()

    def give(item: object) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=0.2)
            except queue.Full:
                continue

    def decode() -> None:
        try:
            with torch.inference_mode():
                for fetched in fetch(finish(batch) for batch in video.batches(chosen)):
                    give(fetched)
                    if stopped.is_set():
                        return
            give(None)
        except BaseException as error:  # raised where it is waited for
            give(error)

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    try:
        with tqdm(total=len(chosen), unit="frame", desc=video.name, disable=not progress) as bar:
            while (batch := waiting.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
                bar.update(len(batch))
    finally:
        stopped.set()
        thread.join()
