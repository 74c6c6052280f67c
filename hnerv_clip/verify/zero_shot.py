"""Do predictions rank and label patches by text as the teacher does?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from hnerv_clip.metrics import check_pair, unit


def label_agreement(labels: Sequence[str], vectors: np.ndarray, predicted: np.ndarray,
                    teacher: np.ndarray, *, centre: np.ndarray | None = None) -> dict:
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
    """How the embeddings of some frames rank texts and patches, see `score_words`."""

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
    above, tied = flat > last, flat == last  # those that tie for the last ranks share them
    share = (top_k - above.sum(1, keepdims=True)) / tied.sum(1, keepdims=True)
    labels = (unit(embeddings - centre) @ vectors.T).argmax(axis=-1)
    return WordScores(_unit_ranks(scores), above + tied * share, labels, top_k)


def _unit_ranks(scores):
    """Ranks of all patches and of those without each frame, as unit vectors around 0.

    [K, N, P] → [N + 1, K, N·P], 0 where left out, NaN where all scores are equal; the last is of
    all. The product of two is Spearman's correlation.
    """
    from scipy import stats  # takes half a second

    texts, frames, _ = scores.shape
    found = np.zeros((frames + 1, texts, scores[0].size), np.float32)
    for out in range(frames + 1):
        kept = np.delete(scores, out, axis=1) if out < frames else scores
        ranks = stats.rankdata(kept.reshape(texts, -1), axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            ranks = (ranks / np.linalg.norm(ranks, axis=1, keepdims=True)).reshape(kept.shape)
        ranked = found[out].reshape(scores.shape)
        ranked[:, np.arange(frames) != out] = ranks
    return found


def word_agreement(own: WordScores, teacher: WordScores) -> dict[str, tuple[float, np.ndarray]]:
    """Agreement of an answer with the teacher in ranking and labeling patches, over several texts.

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
