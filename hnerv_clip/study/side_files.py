"""What a field has to beat in bytes: teacher embeddings of some boxes, stored and interpolated.

Embeddings of G boxes, the same in every n-th training frame, are written as principal components,
rounded, with differences in time. Those of another box and time are interpolated: linearly in time,
and between boxes by the best linear combination under a covariance that falls with their distance
(kriging), whose scale is chosen on the stored boxes alone. Sizes are the entropy of the rounded
values, which no coder without contexts gets below, and so kind to the side file.

N training frames, G boxes, R components, D values of an embedding, M frames and P boxes asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from hnerv_clip.metrics import bracket_frames, cosine, skill, unit

BOXES, EVERY = (16, 32, 64, 160), (1, 2, 4, 8, 16)
RANKS, BITS = (4, 8, 16, 24, 32, 48, 64, 96), (3, 4, 5, 6)
SCALES, NOISES = (0.3, 0.6, 1.2, 2.4), (0.01, 0.05, 0.2)
BASIS_BITS = 6
HEADER_BYTES = 32


@dataclass(frozen=True)
class Stored:
    """Embeddings of boxes in training frames, and what is asked of a side file of them.

    boxes [G, 4], asked [P, 4]: top, left, height, width in pixels; frame_height in pixels. train
    [N], frames [M]: frame numbers. mean [D], axes [D, C], values [N, G, C]: the embeddings are
    mean + values · axesᵀ. truth [M, P, D], constant [D]: the teacher's, to measure against.
    """

    boxes: npt.NDArray[np.float64]
    train: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float32]
    axes: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    asked: npt.NDArray[np.float64]
    frames: npt.NDArray[np.int64]
    truth: npt.NDArray[np.float32]
    constant: npt.NDArray[np.float32]
    frame_height: int


def side_file_curve(stored: Stored, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    """The best side file within each budget.

    Returns:
        A row for each budget that holds one: budget and size in bytes, skill, and its settings
        boxes, every (n-th training frame), rank, bits.
    """
    found = []
    for count, every in product(BOXES, EVERY):
        if count > len(stored.boxes) or len(stored.train) < 2 * every:
            continue
        mix = kriging_weights(stored.boxes[:count], stored.asked, stored.values[::every, :count],
                              frame_height=stored.frame_height)
        kept = np.arange(0, len(stored.train), every)
        values = stored.values[kept][:, :count]
        center = values.mean((0, 1))
        _, _, turn = np.linalg.svd((values - center).reshape(-1, values.shape[-1]),
                                   full_matrices=False)
        scores, basis = (values - center) @ turn.T, turn @ stored.axes.T  # [n, G, C], [C, D]
        mean = stored.mean + center @ stored.axes.T
        for rank, bits in product(RANKS, BITS):
            if rank > len(basis):
                continue
            rounded, size = _rounded(scores[..., :rank], bits)
            axes, axes_size = _rounded(basis[None, :rank].transpose(0, 2, 1), BASIS_BITS)
            size += axes_size + 2 * stored.mean.size + 8 * count + HEADER_BYTES
            if size > max(budgets):
                continue
            answer = _interpolated(rounded, stored.train[kept], stored.frames)  # [M, G, R]
            answer = np.einsum("pg,mgr->mpr", mix, answer) @ axes[0].T + mean
            found.append({"size_bytes": int(size), "boxes": count, "every": every, "rank": rank,
                          "bits": bits, "skill": _skill(answer, stored)})
    rows = []
    for budget in budgets:
        within = [row for row in found if row["size_bytes"] <= budget]
        if within:
            rows.append({"budget": budget, **max(within, key=lambda row: row["skill"])})
    return rows


def kriging_weights(boxes: npt.NDArray, asked: npt.NDArray, values: npt.NDArray, *,
                    frame_height: int) -> npt.NDArray[np.float64]:
    """Weights [P, G] of stored boxes for those asked for; they add up to 1.

    Scale and noise of the covariance are those with the smallest error at each stored box, as the
    others predict it.

    Args:
        boxes: [G, 4]. asked: [P, 4]. values: [N, G, C] at the stored boxes.
    """
    at, to = _place(boxes, frame_height), _place(asked, frame_height)
    flat = np.concatenate(list(values - values.mean(1, keepdims=True)), axis=1)  # [G, N·C]
    best = None
    for scale, noise in product(SCALES, NOISES):
        inverse = np.linalg.inv(_covariance(at, at, scale) + noise * np.eye(len(at)))
        error = np.square((inverse @ flat) / np.diag(inverse)[:, None]).mean()
        if best is None or error < best[0]:
            best = error, scale, inverse
    _, scale, inverse = best
    weights = _covariance(to, at, scale) @ inverse
    return weights + (1 - weights.sum(1, keepdims=True)) / len(at)


def _place(boxes: npt.NDArray, height: int) -> npt.NDArray:
    """Center in frame heights, and logarithms of size and aspect ratio: [G, 4]."""
    top, left, tall, wide = np.asarray(boxes, dtype=np.float64).T
    return np.stack([(top + tall / 2) / height, (left + wide / 2) / height,
                     np.log(tall * wide) / 2, np.log(wide / tall) / 2], axis=1)


def _covariance(a: npt.NDArray, b: npt.NDArray, scale: float) -> npt.NDArray:
    return np.exp(-np.linalg.norm(a[:, None] - b[None], axis=-1) / scale)


def _rounded(values: npt.NDArray, bits: int) -> tuple[npt.NDArray, float]:
    """Values [n, G, R] to so many bits of the widest column, and the bytes of their differences
    from frame to frame: for each column the entropy of the whole numbers that they are."""
    step = max(float(np.abs(values).max()) / 2**(bits - 1), 1e-12)
    whole = np.round(values / step).astype(np.int64)
    changes = np.diff(whole, axis=0, prepend=np.zeros_like(whole[:1]))
    size = 0.0
    for column in changes.reshape(-1, values.shape[-1]).T:
        counts = np.unique(column, return_counts=True)[1]
        size -= (counts * np.log2(counts / len(column))).sum() / 8 - 2 * len(counts)
    return whole * step, size


def _interpolated(values: npt.NDArray, train: npt.NDArray, frames: npt.NDArray) -> npt.NDArray:
    rows = {int(frame): row for row, frame in enumerate(train)}
    before, after, share = bracket_frames(frames, train)
    left, right = (values[[rows[int(f)] for f in own]] for own in (before, after))
    return left + np.asarray(share)[:, None, None] * (right - left)


def _skill(answer: npt.NDArray, stored: Stored) -> float:
    constant = unit(stored.constant)
    own = cosine(unit(answer), stored.truth).mean()
    return float(skill(own, (stored.truth @ constant).mean()))
