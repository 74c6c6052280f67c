"""A stored video written as a film, with its own times, or as a folder of pictures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
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

if TYPE_CHECKING:
    from hnerv_clip.stored.video import StoredVideo

AHEAD = 4  # batches decoded before they are written
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

    Args:
        chosen: rising frame numbers; the first is shown at time 0.
        crf, preset: x264's.
    """
    times = video.header.meta["video"]["times"]
    ticks = expand_ticks(times)
    height, width = video.size
    options = {"movflags": "faststart"} if path.suffix.lower() != ".mkv" else {}
    with av.open(str(path), "w", options=options) as container:
        unit = Fraction(*times["unit"])
        rate = Fraction(video.fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        stream.options = {"crf": str(crf), "preset": preset}
        context = stream.codec_context
        context.thread_count = 0  # as many as there are cores
        context.time_base = stream.time_base = unit
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        halved = stream.pix_fmt == "yuv420p"
        numbers = iter(chosen)
        for planes in _ahead(video, chosen, progress, lambda batch: to_planes(batch, halved)):
            for image in planes:
                frame = av.VideoFrame.from_ndarray(image, format=stream.pix_fmt)
                frame.colorspace, frame.color_range = BT709, LIMITED
                frame.pts, frame.time_base = ticks[next(numbers)] - ticks[chosen[0]], unit
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def to_planes(frames: Tensor, halved: bool) -> np.ndarray:
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
    return yuv.round_().clamp_(0, 255).byte().cpu().numpy()


def write_pictures(path: Path, video: StoredVideo, chosen: Sequence[int], *,
                   progress: bool = True) -> None:
    """Write frames as PNG files, named by their number, into a new folder."""
    path.mkdir()
    digits = max(5, len(str(len(video))))
    numbers = iter(chosen)
    for images in _ahead(video, chosen, progress,
                         lambda batch: batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
        for image in images:
            Image.fromarray(image).save(path / f"{next(numbers):0{digits}d}.png",
                                        compress_level=1)


def _ahead(video: StoredVideo, chosen: Sequence[int], progress: bool,
           finish: Callable[[Tensor], np.ndarray]) -> Iterator[np.ndarray]:
    """Batches of frames in turn, finished, decoded in a thread while others are written."""
    waiting: queue.Queue = queue.Queue(AHEAD)
    stopped = threading.Event()

    def decode() -> None:
        try:
            for batch in video.batches(chosen):
                done = finish(batch)
                while not stopped.is_set():
                    try:
                        waiting.put(done, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set():
                    return
            waiting.put(None)
        except BaseException as error:  # raised where it is waited for
            waiting.put(error)

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
