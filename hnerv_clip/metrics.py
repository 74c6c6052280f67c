"""Measures of agreement between embeddings, on NumPy arrays.

T frames, P patches a frame, D values an embedding. Embeddings are unit vectors, float32 [T, P, D].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor  # its import takes seconds, which a search need not wait for

# Of a frame: an exact one counts as the highest value, else no mean over frames said anything
MOST_DB = 100.0
LEAST_MSE = 10 ** (-MOST_DB / 10)


def check_embeddings(embeddings: npt.ArrayLike, name: str = "embeddings") -> np.ndarray:
    """The embeddings as float32 [T, P, D], or a clear error.

    Args:
        embeddings: [T, P, D] array or CPU tensor of unit vectors.
        name: what the messages call it.
    Raises:
        ValueError: missing, not three axes, empty, not finite, or not unit vectors.
    """
    if embeddings is None:
        raise ValueError(f"there are no {name} embeddings: the run has no CLIP head "
                         "(predict_clip=False); train with predict_clip=True")
    array = np.asarray(embeddings, dtype=np.float32)
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"{name} embeddings have shape {array.shape}; "
                         "give [frames, patches, values], none of them 0")
    lengths = np.linalg.norm(array, axis=-1)
    if not np.isfinite(lengths).all():
        frame, patch = np.argwhere(~np.isfinite(lengths))[0]
        raise ValueError(f"{name} embeddings are not finite, first at frame {frame}, patch "
                         f"{patch}: train or encode again")
    off = np.abs(lengths - 1)
    if off.max() > 0.01:
        frame, patch = np.unravel_index(off.argmax(), off.shape)
        raise ValueError(f"{name} embedding of frame {frame}, patch {patch} has length "
                         f"{lengths[frame, patch]:.4g}; embeddings must be unit vectors: "
                         "divide each by its length")
    return array


def check_pair(predicted: npt.ArrayLike, teacher: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float32 [T, P, D], or an error that quotes both shapes."""
    predicted = check_embeddings(predicted, "predicted")
    teacher = check_embeddings(teacher, "teacher")
    if predicted.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"predicted embeddings have {predicted.shape[-1]} values (shape "
                         f"{predicted.shape}) and the teacher's {teacher.shape[-1]} (shape "
                         f"{teacher.shape}): they belong to different teachers; "
                         "load the teacher that the run was trained with")
    if predicted.shape != teacher.shape:
        raise ValueError(f"predicted embeddings have shape {predicted.shape}, the teacher's "
                         f"{teacher.shape}: give the same frames and patches for both")
    return predicted, teacher


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine over the last axis, float64; 0 where a vector has no length.

    Args:
        a, b: [..., D], broadcast against each other.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    dots = np.einsum("...d,...d->...", a, b)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    # A vector shorter than 1e-6 is rounding: an embedding minus itself, not a direction.
    return np.where(lengths > 1e-6, dots / np.maximum(lengths, 1e-6), 0.0)


def centred_cosine(a: np.ndarray, b: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Cosine after `centre` [D] is subtracted from both, so that the common part does not count."""
    return cosine(a - centre, b - centre)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors divided by their length over the last axis; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def skill(score: npt.ArrayLike, reference: npt.ArrayLike) -> np.ndarray:
    """Improvement over a reference score relative to a perfect one: (score - ref) / (1 - ref).

    1 is perfect, 0 is no better than the reference, negative is worse.
    """
    return (np.asarray(score) - reference) / np.maximum(1 - np.asarray(reference), 1e-12)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two lists of numbers; ties share their mean rank.

    Raises:
        ValueError: different lengths, fewer than 2 values, or one list is constant.
    """
    a, b = np.ravel(a), np.ravel(b)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"rank correlation needs two lists of the same length of at least 2; "
                         f"got {len(a)} and {len(b)} values")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError("rank correlation is undefined: all values of one list are equal")
    from scipy import stats  # takes half a second

    return float(stats.spearmanr(a, b).statistic)


def bracket_frames(frames: np.ndarray, train_frames: np.ndarray, *, exclude_self: bool = False
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The training frames around each frame, and where it lies between them.

    Args:
        frames: [N] frame numbers.
        train_frames: [M] frame numbers.
        exclude_self: a training frame lies between its neighbors, not on itself.
    Returns:
        (before, after, share), each [N]: frame numbers out of `train_frames`, equal where there is
        one on one side only, and the share of the way from the first to the second in [0, 1].
    Raises:
        ValueError: no training frame is left for some frame.
    """
    frames, train_frames = np.asarray(frames), np.sort(np.asarray(train_frames))
    sides = ("left", "right") if exclude_self else ("right", "left")
    first = np.searchsorted(train_frames, frames, side=sides[0]) - 1
    second = np.searchsorted(train_frames, frames, side=sides[1])
    count = len(train_frames)
    first, second = np.where(first < 0, second, first), np.where(second >= count, first, second)
    if (np.minimum(first, second) < 0).any() or (np.maximum(first, second) >= count).any():
        raise ValueError(f"{count} training frames leave no other frame to compare "
                         "with: use at least 2 training frames")
    before, after = train_frames[first], train_frames[second]
    return before, after, np.clip((frames - before) / np.maximum(after - before, 1), 0, 1)


def mean_energy(embeddings: npt.ArrayLike) -> float:
    """The share of unit embeddings [T, P, D] that their constant mean holds: its squared length.

    At 1 all are the same; a constant prediction then has cosine 1.
    """
    return float(np.square(np.mean(np.asarray(embeddings), axis=(0, 1), dtype=np.float64)).sum())


def frame_similarity(embeddings: npt.ArrayLike, *, centred: bool = False) -> np.ndarray:
    """Cosine between frames, averaged over patch positions.

    Args:
        embeddings: [T, P, D], unit length.
        centred: subtract the mean over all frames and patches first.
    Returns:
        float32 [T, T].
    """
    embeddings = np.asarray(embeddings)
    frames, patches, _ = embeddings.shape
    if centred:
        embeddings = unit(embeddings - embeddings.mean(axis=(0, 1)))
    flat = embeddings.reshape(frames, -1)
    return flat @ flat.T / patches


def similarity_by_lag(similarity: np.ndarray) -> np.ndarray:
    """Mean similarity of frames that lie so many frames apart.

    Args:
        similarity: [T, T], as `frame_similarity` gives it.
    Returns:
        [L] for 0, 1, … L-1 frames apart, up to half the video; the first is a frame with itself.
    """
    frame_count = len(similarity)
    lags = range(max(min(2, frame_count), frame_count // 2))
    return np.array([similarity.diagonal(lag).mean() for lag in lags])


class Structure(NamedTuple):
    """How a teacher's embeddings of one video relate; cosines at the same patch position."""

    raw: np.ndarray  # [T, T] cosine between frames
    centred: np.ndarray  # [T, T], the mean of all embeddings subtracted first
    raw_by_lag: np.ndarray  # [L] of frames 0, 1, … L-1 apart
    centred_by_lag: np.ndarray
    mean_energy: float  # see `mean_energy`
    constant_cosine: float  # what the constant mean embedding scores
    neighbour_cosine: float  # what the frame before scores; NaN for a single frame


def describe_structure(embeddings: npt.ArrayLike) -> Structure:
    """How similar the embeddings [T, P, D] of a video are, as a baseline for scores."""
    raw, centred = frame_similarity(embeddings), frame_similarity(embeddings, centred=True)
    by_lag, energy = similarity_by_lag(raw), mean_energy(embeddings)
    return Structure(
        raw=raw, centred=centred, raw_by_lag=by_lag, centred_by_lag=similarity_by_lag(centred),
        mean_energy=energy, constant_cosine=energy ** 0.5,
        neighbour_cosine=float(by_lag[1]) if len(by_lag) > 1 else float("nan"))


def psnr(pred: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each frame, in dB.

    Args:
        pred, target: [B, 3, H, W] float in [0, 1].
        mask: [H, W] of 0 and 1; only pixels under a 1 count.
    Returns:
        [B] float32; at most `MOST_DB`, as of identical frames.
    Raises:
        ValueError: shapes differ.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ")
    error = (pred.float() - target.float()).square()
    if mask is None:
        mse = error.flatten(1).mean(1)
    else:
        mse = (error * mask).flatten(1).sum(1) / (mask.sum() * pred.shape[1])
    return -10 * mse.clamp(min=LEAST_MSE).log10()
