"""A stored video written as a film, with its own times, or as a folder of pictures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from hnerv_clip.codec.container import expand_ticks

if TYPE_CHECKING:
    from hnerv_clip.player import StoredVideo

AHEAD = 16  # frames decoded before they are written


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
        stream.codec_context.time_base = stream.time_base = unit
        for image, number in zip(_ahead(video, chosen, progress), chosen):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = ticks[number] - ticks[chosen[0]], unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_pictures(path: Path, video: StoredVideo, chosen: Sequence[int], *,
                   progress: bool = True) -> None:
    """Write frames as PNG files, named by their number, into a new folder."""
    path.mkdir()
    digits = max(5, len(str(len(video))))
    for image, number in zip(_ahead(video, chosen, progress), chosen):
        Image.fromarray(image).save(path / f"{number:0{digits}d}.png", compress_level=1)


def _ahead(video: StoredVideo, chosen: Sequence[int], progress: bool) -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3] in turn, decoded in a thread while others are written."""
    waiting: queue.Queue = queue.Queue(AHEAD)
    stopped = threading.Event()

    def decode() -> None:
        try:
            for image in video.frames(chosen):
                while not stopped.is_set():
                    try:
                        waiting.put(np.ascontiguousarray(image), timeout=0.2)
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
            while (image := waiting.get()) is not None:
                if isinstance(image, BaseException):
                    raise image
                yield image
                bar.update()
    finally:
        stopped.set()
        thread.join()
