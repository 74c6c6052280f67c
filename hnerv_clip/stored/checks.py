"""Whether a box and a time that are asked about lie in a video; the messages say the rule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from numbers import Real

import numpy as np

from hnerv_clip.config import ConfigError


def box_corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    """A box's x0, y0, x1, y1 in pixels.

    Raises:
        ConfigError: not four numbers.
    """
    with suppress(TypeError, ValueError):
        corners = np.asarray(box)
        if corners.shape == (4,) and corners.dtype.kind not in "US":  # no texts
            return tuple(map(float, corners.tolist()))
    raise ConfigError(f"box {box!r} must be four numbers x0, y0, x1, y1 in pixels; write for "
                      "example (0, 0, 448, 448)")


def check_box(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The corners of a box that is within pictures of (H, W) pixels.

    Raises:
        ConfigError: not four numbers, or not within.
    """
    x0, y0, x1, y1 = box_corners(box)
    height, width = size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ConfigError(f"box {x0:g},{y0:g},{x1:g},{y1:g} is not within the picture of "
                          f"{width}×{height}: x0 < x1 ≤ {width}, y0 < y1 ≤ {height}")
    return x0, y0, x1, y1


def check_time(time_s: float, times_s: Sequence[float]) -> None:
    """Refuse a time at which no frame is shown; the last is shown as long as the one before.

    Args:
        times_s: [T], when each frame is shown.
    Raises:
        ConfigError: it is so, or no number.
    """
    if not isinstance(time_s, Real):
        raise ConfigError(f"time {time_s!r} must be a number of seconds, such as 1.5")
    last = times_s[-1] + (times_s[-1] - times_s[-2] if len(times_s) > 1 else 1.0)
    if not times_s[0] <= time_s <= last:
        raise ConfigError(f"time {time_s:g} s is outside the video, which is shown from "
                          f"{times_s[0]:g} to {last:g} s")
