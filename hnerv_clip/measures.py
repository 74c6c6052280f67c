"""What agreement between embeddings is worth: plain measures on numpy arrays.

T frames, P patches a frame, D values an embedding. Embeddings are unit vectors, float32 [T, P, D].
"""

from __future__ import annotations

import numpy as np
import pandas as pd

# The bands of the project's description: (lowest value, name, meaning).
SIMILARITY_BANDS = (
    (0.9, "Excellent", "strong semantic preservation"),
    (0.7, "Good", "captures most semantic features"),
    (0.4, "Moderate", "some semantic information preserved"),
    (-np.inf, "Poor", "limited semantic learning"),
)
GAP_BANDS = (
    (0.15, "Large gap", "overfitting to the training frames"),
    (0.05, "Medium gap", "acceptable, some overfitting"),
    (-np.inf, "Small gap", "good generalization"),
)


def similarity_band(similarity: float) -> tuple[str, str]:
    """(name, meaning) of a mean raw cosine, by the user's table: above 0.9 is excellent, ..."""
    return _band(similarity, SIMILARITY_BANDS, "similarity")


def gap_band(gap: float) -> tuple[str, str]:
    """(name, meaning) of training minus held-out cosine, by the user's table."""
    return _band(gap, GAP_BANDS, "gap")


def _band(value, bands, name):
    if np.isnan(value):
        raise ValueError(f"{name} is NaN, so it lies in no band: look for empty or NaN embeddings")
    # The table's limits: the first band lies above its limit, the next include theirs.
    if value > bands[0][0]:
        return bands[0][1:]
    return next(band[1:] for band in bands[1:] if value >= band[0])


def check_embeddings(embeddings, name: str = "embeddings") -> np.ndarray:
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


def check_pair(predicted, teacher) -> tuple[np.ndarray, np.ndarray]:
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
    """Cosine after `centre` [D] is taken off both: what is left when the common part is gone."""
    return cosine(a - centre, b - centre)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors divided by their length over the last axis; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def skill(score, reference):
    """Share of the way from a reference score to a perfect one: (score - ref) / (1 - ref).

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
    ranks = pd.DataFrame({"a": a, "b": b}).rank()
    if (ranks.nunique() < 2).any():
        raise ValueError("rank correlation is undefined: all values of one list are equal")
    return float(np.corrcoef(ranks["a"], ranks["b"])[0, 1])
