"""What agreement between embeddings is worth: plain measures on numpy arrays.

T frames, P patches a frame, D values an embedding. Embeddings are unit vectors, float32 [T, P, D].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

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


def retrieval_ranks(predicted: np.ndarray, candidates: np.ndarray, frames: np.ndarray, *,
                    near: int = 2) -> pd.DataFrame:
    """Where the right patch stands when a prediction is looked up among all patches of the video.

    Args:
        predicted: [N, P, D] unit vectors, the answers for `frames`.
        candidates: [T, P, D] teacher embeddings of every frame.
        frames: [N] frame numbers.
        near: the same position up to so many frames away counts as right for `rank_near`.
    Returns:
        A row per frame and patch: frame, patch, rank, rank_near (1 is best; ties share their mean
        rank), right (how many candidates count for `rank_near`), candidates (how many there are).
    """
    total, patches, dim = candidates.shape
    pool, places = candidates.reshape(-1, dim).T, np.arange(patches)
    ranks, ranks_near, right = [], [], []
    for frame, answer in zip(frames, predicted):
        scores = (answer @ pool).reshape(patches, total, patches)
        first, last = max(frame - near, 0), min(frame + near, total - 1)
        ranks.append(_rank(scores, scores[places, frame, places]))
        ranks_near.append(_rank(scores, scores[places, first:last + 1, places].max(axis=1)))
        right.append(last - first + 1)
    return pd.DataFrame({
        "frame": np.repeat(frames, patches), "patch": np.tile(places, len(ranks)),
        "rank": np.concatenate(ranks), "rank_near": np.concatenate(ranks_near),
        "right": np.repeat(right, patches), "candidates": total * patches})


def _rank(scores, right):
    right = right[:, None, None]
    above = (scores > right).sum(axis=(1, 2))
    return 1 + above + ((scores == right).sum(axis=(1, 2)) - 1) / 2


def retrieval_summary(ranks: pd.DataFrame) -> dict[str, float]:
    """R@1, R@5 and median rank, exact and near, each recall beside that of a random ranking."""
    summary = {"median_rank": float(ranks["rank"].median()),
               "median_rank_near": float(ranks.rank_near.median()),
               "candidates": int(ranks.candidates.iloc[0]), "n": len(ranks)}
    for top in (1, 5):
        summary |= {
            f"r{top}": float((ranks["rank"] <= top).mean()),
            f"r{top}_chance": float(np.minimum(top / ranks.candidates, 1).mean()),
            f"r{top}_near": float((ranks.rank_near <= top).mean()),
            f"r{top}_near_chance": float(np.mean(
                stats.hypergeom.sf(0, ranks.candidates, ranks.right, top))),
        }
    return summary


def debiased_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of vectors, with the unbiased HSIC estimator.

    1: equal up to rotation and scale; about 0 for unrelated sets, where the plain estimate rises
    with the dimension. Kornblith et al. 2019 (arXiv 1905.00414); the estimator is that of Song et
    al. 2012, eq. 5. Computed from D×D products, so that N may be large.

    Args:
        a, b: [N, D1] and [N, D2], row by row of the same things.
    Raises:
        ValueError: other numbers of rows, fewer than 4, or a set without any variation.
    """
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA needs the same rows of both, at least 4; got {len(a)} and {len(b)}")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    own, other = _unbiased_hsic(a, a), _unbiased_hsic(b, b)
    if own <= 1e-18 or other <= 1e-18:
        raise ValueError("CKA is undefined: one set of vectors does not vary")
    return float(_unbiased_hsic(a, b) / np.sqrt(own * other))


def _unbiased_hsic(a, b):
    # With Gram matrices K = aaᵀ and L = bbᵀ whose diagonals are set to 0:
    # [tr(KL) + (1ᵀK1)(1ᵀL1) / ((n-1)(n-2)) - 2/(n-2) 1ᵀKL1] / (n (n-3))
    n = len(a)
    diagonals = (a ** 2).sum(axis=1), (b ** 2).sum(axis=1)
    trace = ((a.T @ b) ** 2).sum() - diagonals[0] @ diagonals[1]
    rows = [x @ x.sum(axis=0) - diagonal for x, diagonal in zip((a, b), diagonals)]
    total = rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2))
    return (trace + total - 2 / (n - 2) * (rows[0] @ rows[1])) / (n * (n - 3))


def cka_without_frames(predicted: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
    """`debiased_cka` of all patches, and without the patches of each frame, for its interval.

    Computed from Gram matrices of all patches, so for some thousands of them.

    Args:
        predicted, teacher: [N, P, D] of the same frames, at least 3 beyond the one left out.
    Returns:
        (CKA, [N] CKA without each frame, NaN where the rest does not vary).
    Raises:
        ValueError: a set without any variation.
    """
    frames, patches, _ = teacher.shape
    grams = [_gram(x) for x in (predicted, teacher)]
    left_out = np.kron(np.eye(frames, frames + 1), np.ones((patches, 1)))  # the last: none
    both, own, other = (_hsic_without(grams[i], grams[j], left_out)
                        for i, j in ((0, 1), (0, 0), (1, 1)))
    varies = np.minimum(own, other) > 1e-18
    if not varies[-1]:
        raise ValueError("CKA is undefined: one set of vectors does not vary")
    cka = np.where(varies, both / np.sqrt(np.where(varies, own * other, 1)), np.nan)
    return float(cka[-1]), cka[:-1]


def _gram(vectors):
    flat = np.asarray(vectors, np.float64).reshape(-1, vectors.shape[-1])
    flat = flat - flat.mean(axis=0)
    gram = flat @ flat.T
    np.fill_diagonal(gram, 0)
    return gram


def _hsic_without(k, m, left_out):
    # The estimator of `_unbiased_hsic` without the rows that each column of `left_out` marks.
    kept = 1 - left_out
    n, products = kept.sum(axis=0), k * m
    trace = products.sum() - 2 * products.sum(axis=1) @ left_out \
        + (left_out * (products @ left_out)).sum(axis=0)
    rows = [kept * (x.sum(axis=1)[:, None] - x @ left_out) for x in (k, m)]
    total = rows[0].sum(axis=0) * rows[1].sum(axis=0) / ((n - 1) * (n - 2))
    return (trace + total - 2 / (n - 2) * (rows[0] * rows[1]).sum(axis=0)) / (n * (n - 3))


def label_agreement(labels, vectors: np.ndarray, predicted: np.ndarray, teacher: np.ndarray, *,
                    centre: np.ndarray | None = None) -> dict:
    """Zero-shot labels: how often the predicted embedding names what the teacher's names.

    Args:
        labels: K names.
        vectors: [K, D], the labels in the teacher's text space.
        predicted, teacher: [N, P, D] unit vectors of the frames asked about.
        centre: [D], taken off both first: without it a teacher whose scores do not compare across
            texts gives one label to everything.
    Returns:
        agreement (share of equal labels), chance (expected from how often each is given, as in
        Cohen's kappa), kappa, n, and `table`: label, teacher, predicted (shares), found.
    Raises:
        ValueError: fewer than 2 labels, one twice or empty, or another number of vectors.
    """
    labels = list(labels)
    predicted, teacher = check_pair(predicted, teacher)
    if len(labels) < 2 or not all(isinstance(name, str) and name.strip() for name in labels):
        raise ValueError(f"labels={labels} must be at least 2 texts, none of them empty")
    twice = [name for name in labels if labels.count(name) > 1]
    if twice:
        raise ValueError(f"label {twice[0]!r} is in the set twice; name each once")
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape != (len(labels), teacher.shape[-1]):
        raise ValueError(f"{len(labels)} labels of {teacher.shape[-1]} values expected, got "
                         f"vectors of shape {vectors.shape}: encode them with the run's teacher")
    centre = np.zeros(teacher.shape[-1], np.float32) if centre is None else centre
    own, right = ((unit(x - centre) @ vectors.T).argmax(axis=-1).ravel()
                  for x in (predicted, teacher))
    shares = [np.bincount(x, minlength=len(labels)) / len(x) for x in (right, own)]
    found = [float((own[right == k] == k).mean()) if (right == k).any() else np.nan
             for k in range(len(labels))]
    agreement, chance = float((own == right).mean()), float(shares[0] @ shares[1])
    table = pd.DataFrame({"label": labels, "teacher": shares[0], "predicted": shares[1],
                          "found": found})
    return {"agreement": agreement, "chance": chance, "n": len(own), "table": table,
            "kappa": (agreement - chance) / (1 - chance) if chance < 1 else np.nan}


class WordScores(NamedTuple):
    """What embeddings of some frames say of texts, see `score_words`."""

    ranks: np.ndarray  # [N + 1, K, N·P], see `_unit_ranks`
    top: np.ndarray  # [K, N·P] how surely a patch is among the first top_k of a text
    labels: np.ndarray  # [N, P] the text that lies nearest
    top_k: int


def score_words(embeddings: np.ndarray, vectors: np.ndarray, *, centre: np.ndarray,
                top_k: int = 20) -> WordScores:
    """Rank the patches by each text, and give each patch a label.

    Args:
        embeddings: [N, P, D] unit vectors of some frames.
        vectors: [K, D], texts in the teacher's text space.
        centre: [D], taken off before a label is given, as in `label_agreement`.
        top_k: patches that head a ranking; where there are no more, all but one of them.
    Raises:
        ValueError: vectors of another size.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != embeddings.shape[-1]:
        raise ValueError(f"texts of shape {vectors.shape} do not belong to embeddings of "
                         f"{embeddings.shape[-1]} values: encode them with the run's teacher")
    # Equal embeddings must tie, whatever the order in which their products were summed
    scores = np.round(embeddings @ vectors.T, 5).transpose(2, 0, 1)  # [K, N, P]
    flat = scores.reshape(len(vectors), -1)
    top_k = min(top_k, max(1, flat.shape[1] - 1))
    last = -np.partition(-flat, top_k - 1)[:, top_k - 1, None]
    above, tied = flat > last, flat == last  # those that tie for the last places share them
    share = (top_k - above.sum(1, keepdims=True)) / tied.sum(1, keepdims=True)
    labels = (unit(embeddings - centre) @ vectors.T).argmax(axis=-1)
    return WordScores(_unit_ranks(scores), above + tied * share, labels, top_k)


def _unit_ranks(scores):
    """Ranks of all patches and of those without each frame, as unit vectors around 0.

    [K, N, P] → [N + 1, K, N·P], 0 where left out, NaN where all scores are equal; the last is of
    all. The product of two is Spearman's correlation.
    """
    texts, frames, _ = scores.shape
    found = np.zeros((frames + 1, texts, scores[0].size), np.float32)
    for out in range(frames + 1):
        kept = np.delete(scores, out, axis=1) if out < frames else scores
        ranks = stats.rankdata(kept.reshape(texts, -1), axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            ranks = (ranks / np.linalg.norm(ranks, axis=1, keepdims=True)).reshape(kept.shape)
        place = found[out].reshape(scores.shape)
        place[:, np.arange(frames) != out] = ranks
    return found


def word_agreement(own: WordScores, teacher: WordScores) -> dict[str, tuple[float, np.ndarray]]:
    """How far an answer ranks and labels patches as the teacher does, over several texts.

    Args:
        own, teacher: of the same frames and texts.
    Returns:
        {measure: (value, what its interval is made of)}: text_rank, Spearman's correlation over all
        patches, mean over texts, with [N] values without each frame; text_top20, the share of the
        teacher's top patches that are in the answer's, with nothing; label_top1, the share of equal
        labels, with the [N] shares of each frame. NaN where the answer ranks nothing, or where
        there is one label.
    """
    ranks = np.einsum("fkn,fkn->fk", own.ranks, teacher.ranks).mean(axis=1, dtype=np.float64)
    same = (own.labels == teacher.labels).mean(axis=1)
    texts = len(own.top)
    return {"text_rank": (float(ranks[-1]), ranks[:-1]),
            "text_top20": (float((own.top * teacher.top).sum() / own.top_k / texts), np.empty(0)),
            "label_top1": (float(same.mean()) if texts > 1 else np.nan, same)}


def mean_energy(embeddings) -> float:
    """The share of unit embeddings [T, P, D] that their constant mean holds: its squared length.

    At 1 all are the same; a constant prediction then has cosine 1.
    """
    return float(np.square(np.mean(np.asarray(embeddings), axis=(0, 1), dtype=np.float64)).sum())


def frame_similarity(embeddings, *, centred: bool = False) -> np.ndarray:
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
    centred: np.ndarray  # [T, T], the mean of all embeddings taken off first
    raw_by_lag: np.ndarray  # [L] of frames 0, 1, … L-1 apart
    centred_by_lag: np.ndarray
    mean_energy: float  # see `mean_energy`
    constant_cosine: float  # what the constant mean embedding scores
    neighbour_cosine: float  # what the frame before scores; NaN for a single frame


def describe_structure(embeddings) -> Structure:
    """How alike the embeddings [T, P, D] of a video are, so that a score can be judged."""
    raw, centred = frame_similarity(embeddings), frame_similarity(embeddings, centred=True)
    by_lag, energy = similarity_by_lag(raw), mean_energy(embeddings)
    return Structure(
        raw=raw, centred=centred, raw_by_lag=by_lag, centred_by_lag=similarity_by_lag(centred),
        mean_energy=energy, constant_cosine=energy ** 0.5,
        neighbour_cosine=float(by_lag[1]) if len(by_lag) > 1 else float("nan"))
