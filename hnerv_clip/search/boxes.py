"""Search a field: boxes by text or by region, heat maps at several scales, tracking in time.

Queries are unit vectors [K, D] of the teacher's space. Boxes are (top, left, height, width) in
pixels; sides are in frame heights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from hnerv_clip.config import ConfigError
from hnerv_clip.field.query import Field

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second: imported where a table is made

SIDES = (0.3, 0.42, 0.6, 0.85)  # of square boxes that a search looks at
STEP = 0.25  # between them, in their own side


def square_boxes(frame_hw: tuple[int, int], sides: Sequence[float] = SIDES, *, step: float = STEP
                 ) -> torch.Tensor:
    """Square boxes all over the frame, evenly from edge to edge: float32 [P, 4].

    Args:
        sides: in frame heights; a side larger than the frame is cut at it.
        step: largest distance between neighbours, in their side.
    Raises:
        ConfigError: no side, or one not above 0.
    """
    height, width = frame_hw
    boxes = []
    for side in sides:
        if not side > 0:
            raise ConfigError(f"side {side:g} of a box must be above 0, in frame heights: {SIDES}")
        tall, wide = min(side * height, height), min(side * height, width)
        rows, cols = (np.linspace(0, length - size, 1 + int(np.ceil((length - size) / (step * size)
                                                                    - 1e-9)))
                      for length, size in ((height, tall), (width, wide)))
        boxes += [(top, left, tall, wide) for top in rows for left in cols]
    if not boxes:
        raise ConfigError(f"sides is empty: give sides of boxes in frame heights, such as {SIDES}")
    return torch.tensor(boxes, dtype=torch.float32)


def overlap(box: npt.ArrayLike, boxes: npt.ArrayLike) -> np.ndarray:
    """Intersection over union of a box [4] with boxes [P, 4]: [P]."""
    box, boxes = np.asarray(box, float), np.asarray(boxes, float)
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[:2] + box[2:], boxes[:, :2] + boxes[:, 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=1)
    return both / (np.prod(box[2:]) + np.prod(boxes[:, 2:], axis=1) - both)


def search_boxes(field: Field, query: npt.ArrayLike, top_k: int = 5, *,
                 sides: Sequence[float] = SIDES, step: float = STEP, apart: float = 4,
                 most_overlap: float = 0.3, times: npt.ArrayLike = None,
                 not_near: tuple[float, Sequence[float]] | None = None) -> pd.DataFrame:
    """The moments and boxes that answer a query best.

    Of boxes that overlap within `apart` frames only the best is kept.

    Args:
        query: [D], from a text (`encode_queries`) or a region (`field.embed`).
        top_k: so many at most.
        times: moments to look at, every frame by default.
        not_near: (time, box) of a region asked about, which is left out.
    Returns:
        rank (from 1), frame (a float where times are), top, left, height, width, score (cosine).
    Raises:
        ConfigError: see `Field.scores` and `square_boxes`; top_k below 1.
    """
    import pandas as pd

    if top_k < 1:
        raise ConfigError(f"top_k={top_k} must be at least 1")
    times = np.arange(field.frame_count) if times is None else np.asarray(times)
    boxes = square_boxes(field.head.config.frame_hw, sides, step=step)
    scores = field.scores(np.asarray(query)[None], times, boxes)[0].numpy()  # [B, P]
    free = np.ones_like(scores, dtype=bool)
    if not_near is not None:
        free[np.abs(times - not_near[0]) <= apart] &= overlap(not_near[1], boxes) <= most_overlap
    rows = []
    while free.any() and len(rows) < top_k:
        at, box = np.unravel_index(np.argmax(np.where(free, scores, -np.inf)), scores.shape)
        rows.append((len(rows) + 1, times[at], *boxes[box].tolist(), scores[at, box]))
        free[np.abs(times - times[at]) <= apart] &= overlap(boxes[box], boxes) <= most_overlap
        free[at, box] = False
    return pd.DataFrame(rows, columns=["rank", "frame", "top", "left", "height", "width", "score"])


def heat_maps(field: Field, queries: npt.ArrayLike, times: npt.ArrayLike, *,
              sides: Sequence[float] = SIDES, stride: int = 32) -> np.ndarray:
    """Cosine of queries with square boxes around every position: [B, K, S, h, w] float32.

    The boxes are those of `around_positions`.

    Args:
        queries: [K, D].
        times: B of them, in frames.
        sides: S scales, in frame heights.
        stride: pixels between positions.
    Raises:
        ConfigError: see `Field.scores`; a stride not between 1 and the frame's shorter side.
    """
    boxes, hw = around_positions(field.head.config.frame_hw, sides, stride=stride)
    times = np.atleast_1d(times)
    scores = field.scores(queries, times, boxes).numpy()  # [K, B, S·h·w]
    return scores.reshape(len(scores), len(times), len(sides), *hw).transpose(1, 0, 2, 3, 4)


def around_positions(frame_hw: tuple[int, int], sides: Sequence[float] = SIDES, *, stride: int = 32
                     ) -> tuple[np.ndarray, tuple[int, int]]:
    """Square boxes around evenly spaced positions: float32 [S·h·w, 4], and (h, w).

    Near the frame's edge a box is shifted inwards, so that it stays whole.

    Raises:
        ConfigError: a stride not between 1 and the frame's shorter side.
    """
    height, width = frame_hw
    if not 1 <= stride <= min(height, width):
        raise ConfigError(f"stride={stride} must lie between 1 and the frame's "
                          f"{min(height, width)} pixels; use 32")
    y = np.arange(stride // 2, height, stride) + 0.5
    x = np.arange(stride // 2, width, stride) + 0.5
    boxes = []
    for side in sides:
        tall, wide = min(side * height, height), min(side * height, width)
        tops, lefts = (np.clip(at - size / 2, 0, length - size)
                       for at, size, length in ((y, tall, height), (x, wide, width)))
        boxes += [(top, left, tall, wide) for top in tops for left in lefts]
    return np.array(boxes, np.float32), (len(y), len(x))


def track(field: Field, query: npt.ArrayLike, times: npt.ArrayLike = None, *,
          start: Sequence[float] | None = None, sides: Sequence[float] = SIDES, step: float = STEP,
          stiffness: float = 0.1) -> pd.DataFrame:
    """Follow a query through time: the path of boxes with the best sum of scores.

    Found by dynamic programming (Viterbi) over boxes of several sizes.

    Args:
        query: [D].
        times: rising moments, every frame by default.
        start: box that the path begins nearest to; by default the best begins.
        stiffness: cosine that a move by one's own side between two moments costs.
    Returns:
        frame, top, left, height, width, score.
    """
    import pandas as pd

    times = np.arange(field.frame_count) if times is None else np.asarray(times)
    boxes = square_boxes(field.head.config.frame_hw, sides, step=step).numpy()
    scores = field.scores(np.asarray(query)[None], times, boxes)[0].numpy()
    center = boxes[:, :2] + boxes[:, 2:] / 2
    side = np.sqrt(boxes[:, 2] * boxes[:, 3])
    between = np.minimum(side[:, None], side)
    move = np.linalg.norm(center[:, None] - center, axis=-1) / between
    cost = stiffness * (move + np.abs(np.log(side[:, None] / side)))  # [P, P]
    best = scores[0].copy()
    if start is not None:
        near = np.argmax(overlap(start, boxes))
        best[np.arange(len(boxes)) != near] = -np.inf
    came = np.zeros(scores.shape, int)
    for i in range(1, len(times)):
        reached = best[:, None] - cost
        came[i] = reached.argmax(0)
        best = reached.max(0) + scores[i]
    path = [int(best.argmax())]
    for i in range(len(times) - 1, 0, -1):
        path.append(int(came[i][path[-1]]))
    path = np.array(path[::-1])
    return pd.DataFrame({"frame": times, **dict(zip(("top", "left", "height", "width"),
                                                    boxes[path].T)),
                         "score": scores[np.arange(len(times)), path]})
