"""x264, x265 and SVT-AV1 on the same frames, for the rate–quality results.

Encoded and decoded by PyAV with its own conversion between RGB and 4:2:0, which is that of the
named videos' source, so that no codec pays for another one; tuned for PSNR, which is what is
reported. Rates count packets, not the container.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from torch import Tensor


class Setting(NamedTuple):
    """A codec at a preset, and the qualities that are tried."""

    label: str
    codec: str
    preset: str
    tune: dict[str, str]
    crfs: tuple[int, ...]


SETTINGS = (
    Setting("x264 medium", "libx264", "medium", {"tune": "psnr"}, (20, 23, 26, 29, 32, 35)),
    Setting("x264 veryslow", "libx264", "veryslow", {"tune": "psnr"}, (20, 23, 26, 29, 32, 35)),
    Setting("x265 medium", "libx265", "medium", {"tune": "psnr"}, (18, 21, 24, 27, 30, 33)),
    Setting("x265 veryslow", "libx265", "veryslow", {"tune": "psnr"}, (18, 21, 24, 27, 30, 33)),
    Setting("SVT-AV1 preset 8", "libsvtav1", "8", {"svtav1-params": "tune=1"},
            (20, 26, 32, 38, 44, 50)),
    Setting("SVT-AV1 preset 4", "libsvtav1", "4", {"svtav1-params": "tune=1"},
            (20, 26, 32, 38, 44, 50)),
)


def available(settings: Iterable[Setting] = SETTINGS) -> list[Setting]:
    """Those whose encoder this PyAV has."""
    found = []
    for setting in settings:
        try:
            av.codec.Codec(setting.codec, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        found.append(setting)
    return found


def measure_codec(frames: Tensor, setting: Setting, crf: int, *, fps: float = 25.0,
                  threads: int = 0) -> dict[str, Any]:
    """Encode, decode and measure.

    Args:
        frames: uint8 [T, 3, H, W].
        threads: of encoder and decoder; 0 lets them choose.
    Returns:
        codec, preset, crf, size_bytes, rate_bpp, psnr_db (mean over frames, RGB), encode_s,
        decode_s, and encode_cpu_s, decode_cpu_s, what all of its threads took of the processor.
    """
    images = frames.permute(0, 2, 3, 1).contiguous().numpy()
    height, width = images.shape[1:3]
    file, size_bytes, start = io.BytesIO(), 0, _clocks()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(setting.codec,
                                      rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf), "preset": setting.preset, **setting.tune}
        stream.codec_context.thread_count = threads
        for image in (*images, None):
            given = None if image is None else av.VideoFrame.from_ndarray(image, format="rgb24")
            for packet in stream.encode(given):
                size_bytes += packet.size
                container.mux(packet)
    encode_s, encode_cpu_s = _clocks() - start
    file.seek(0)
    start, decoded = _clocks(), []
    with av.open(file) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            decoded.append(frame.to_ndarray(format="rgb24"))
    decode_s, decode_cpu_s = _clocks() - start
    if len(decoded) != len(images):
        raise RuntimeError(f"{setting.label} gave {len(decoded)} of {len(images)} frames back")
    errors = [np.square(a.astype(np.float32) - b).mean() for a, b in zip(decoded, images)]
    psnr = np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-12)))
    return {"codec": setting.label, "preset": setting.preset, "crf": crf, "size_bytes": size_bytes,
            "rate_bpp": 8 * size_bytes / (len(images) * height * width), "psnr_db": float(psnr),
            "encode_s": round(encode_s, 3), "decode_s": round(decode_s, 3),
            "encode_cpu_s": round(encode_cpu_s, 3), "decode_cpu_s": round(decode_cpu_s, 3)}


def _clocks() -> np.ndarray:
    """[2]: seconds of the wall clock, and of the processor in all threads."""
    return np.array([time.perf_counter(), time.process_time()])


def time_codecs(frames: Tensor, points: Sequence[dict[str, Any]], *, psnr_db: float,
                fps: float = 25.0) -> Iterator[dict[str, Any]]:
    """`measure_codec` on one thread, each codec at the quality whose measured PSNR is nearest.

    Args:
        points: measured before, with codec, crf and psnr_db.
    """
    for setting in available():
        own = [point for point in points if point["codec"] == setting.label]
        if own:
            crf = min(own, key=lambda point: abs(point["psnr_db"] - psnr_db))["crf"]
            yield measure_codec(frames, setting, crf, fps=fps, threads=1)


def bd_rate(anchor: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]) -> float:
    """Bjøntegaard's mean difference in rate at equal PSNR, in percent; negative: `test` is smaller.

    Akima interpolation over the PSNR that both reach, by the package bjontegaard; NaN where they
    share none.

    Args:
        anchor, test: four points or more each, with rate_bpp and psnr_db.
    Raises:
        ImportError: the package is not installed.
    """
    import bjontegaard

    curves = []
    for points in (anchor, test):
        points = sorted(points, key=lambda point: point["rate_bpp"])
        rates, qualities = (np.array([p[name] for p in points]) for name in ("rate_bpp", "psnr_db"))
        rising = np.concatenate([[True], np.diff(np.maximum.accumulate(qualities)) > 1e-6])
        curves += [rates[rising], qualities[rising]]
    low, high = max(curves[1][0], curves[3][0]), min(curves[1][-1], curves[3][-1])
    if high <= low or min(len(curves[0]), len(curves[2])) < 4:
        return float("nan")
    return float(bjontegaard.bd_rate(*curves, method="akima", require_matching_points=False,
                                     min_overlap=0))
