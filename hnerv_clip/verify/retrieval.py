"""Is the right patch found among all patches of the video? Recall at k and median rank."""

from __future__ import annotations

import numpy as np
import pandas as pd


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
    pool, positions = candidates.reshape(-1, dim).T, np.arange(patches)
    ranks, ranks_near, right = [], [], []
    for frame, answer in zip(frames, predicted):
        scores = (answer @ pool).reshape(patches, total, patches)
        first, last = max(frame - near, 0), min(frame + near, total - 1)
        ranks.append(_rank(scores, scores[positions, frame, positions]))
        ranks_near.append(_rank(scores, scores[positions, first:last + 1, positions].max(axis=1)))
        right.append(last - first + 1)
    return pd.DataFrame({
        "frame": np.repeat(frames, patches), "patch": np.tile(positions, len(ranks)),
        "rank": np.concatenate(ranks), "rank_near": np.concatenate(ranks_near),
        "right": np.repeat(right, patches), "candidates": total * patches})


def _rank(scores, right):
    right = right[:, None, None]
    above = (scores > right).sum(axis=(1, 2))
    return 1 + above + ((scores == right).sum(axis=(1, 2)) - 1) / 2


def retrieval_summary(ranks: pd.DataFrame) -> dict[str, float]:
    """R@1, R@5 and median rank, exact and near, each recall beside that of a random ranking."""
    from scipy import stats  # takes half a second

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
