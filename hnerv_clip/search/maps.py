"""Scores of a query laid over the frame: dense embedding maps and heat maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from hnerv_clip.metrics import check_pair
from hnerv_clip.model import HNeRV
from hnerv_clip.patches import PatchGrid, linear_weights
from hnerv_clip.search.rank import check_query

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second: imported where a table is made

MAP_VALUES = 2 ** 26  # of a dense embedding map at once: 256 MiB


def map_embeddings(predicted: npt.ArrayLike, teacher: npt.ArrayLike, *, points: int = 600,
                   perplexity: float = 30, seed: int = 0) -> pd.DataFrame:
    """A map of the embedding space in two dimensions, predicted and teacher's in one (t-SNE).

    Neighbours on the map are neighbours in the space; distances between groups mean little.

    Args:
        predicted, teacher: [T, P, D] unit vectors.
        points: patches of each kind at most; frames are thinned evenly.
        perplexity: size of a neighbourhood, lowered where there are few points.
    Returns:
        kind (predicted, teacher), frame, patch, x, y.
    """
    import pandas as pd
    from sklearn.decomposition import PCA  # a second, with scipy, that a search need not wait for
    from sklearn.manifold import TSNE

    predicted, teacher = check_pair(predicted, teacher)
    frames, patches, dim = teacher.shape
    kept = np.arange(0, frames, max(1, -(-frames * patches // points)))
    vectors = np.concatenate([predicted[kept].reshape(-1, dim), teacher[kept].reshape(-1, dim)])
    if len(vectors) < 8:
        raise ValueError(f"a map needs at least 4 patches of each kind, got {len(vectors) // 2}")
    reduced = PCA(min(50, *vectors.shape), random_state=seed).fit_transform(vectors)
    places = TSNE(perplexity=min(perplexity, (len(vectors) - 1) / 3), init="pca",
                  random_state=seed).fit_transform(reduced)
    count = len(vectors) // 2
    return pd.DataFrame({
        "kind": np.repeat(["predicted", "teacher"], count),
        "frame": np.tile(np.repeat(kept, patches), 2),
        "patch": np.tile(np.arange(patches), 2 * len(kept)), "x": places[:, 0], "y": places[:, 1]})


def spread_scores(scores: npt.ArrayLike, grid: PatchGrid, *, stride: int = 8) -> np.ndarray:
    """Scores of patches laid over the frame: bilinear between their centres, constant beyond.

    For a network that was taught at the patches alone this is steadier than asking its head
    everywhere, see `positions`.

    Args:
        scores: [T, P], as `score_patches` gives them.
        stride: pixels between the positions of the map.
    Returns:
        [T, h, w] float32, at the positions of `HNeRV.clip_map`.
    Raises:
        ValueError: scores of another number of patches, or a bad stride.
    """
    scores = np.asarray(scores, dtype=np.float32)
    if scores.ndim != 2 or scores.shape[1] != len(grid):
        raise ValueError(f"scores have shape {scores.shape}; give [T, {len(grid)}], one for each "
                         "patch of the grid")
    _check_stride(stride, grid.frame)
    rows, cols = (linear_weights(torch.arange(stride // 2, length, stride).double() + 0.5,
                                 torch.tensor(starts) + side / 2).numpy() for starts, side, length
                  in zip((grid.tops, grid.lefts), grid.size, grid.frame))
    return np.einsum("tkl,yk,xl->tyx", scores.reshape(-1, grid.rows, grid.cols), rows, cols,
                     optimize=True).astype(np.float32)


def score_map(model: HNeRV, stages: list[torch.Tensor], vectors: npt.ArrayLike, *, stride: int = 8
              ) -> np.ndarray:
    """Cosine of queries with what the CLIP head answers everywhere in the frame: heat maps.

    Of the dense embedding map, gigabytes for a large frame at a small stride, only a few rows exist
    at a time.

    Args:
        model: with a CLIP head.
        stages: what `model.stages` returned for B frames.
        vectors: [K, D], the queries in the teacher's text space.
        stride: pixels between the positions of the map, any from 1 on.
    Returns:
        [B, K, h, w] float32, at the positions of `HNeRV.clip_map`.
    Raises:
        ValueError: a bad query, one of another teacher's size, a bad stride, or NaN in the map.
        ConfigError: the model has no CLIP head.
    """
    dim, frames = model.config.clip_dim, len(stages[0])
    _check_stride(stride, model.frame_hw)
    queries = torch.from_numpy(np.stack([check_query(vector, dim) for vector in vectors]))
    rows, cols = (len(range(stride // 2, cells, stride)) for cells in model.plan.shown_hw)
    at_once = max(1, MAP_VALUES // (frames * cols * dim))
    with torch.inference_mode():
        strips = [torch.einsum("bdyx,kd->bkyx", model.clip_map(
            stages, stride=stride, rows=slice(row, row + at_once)), queries.to(stages[0].device))
            for row in range(0, rows, at_once)]
        heats = torch.cat(strips, dim=2).cpu().numpy()
    if not np.isfinite(heats).all():
        raise ValueError("the map holds NaN or infinite values: train again")
    return heats


def match_map(model: HNeRV, stages: list[torch.Tensor], query: npt.ArrayLike,
              references: npt.ArrayLike, *, stride: int = 8) -> np.ndarray:
    """`rank.match_scores` of a query with what the CLIP head answers everywhere: [B, h, w] float32.

    Args:
        model, stages, stride: as for `score_map`.
        query, references: as for `rank.match_scores`.
    """
    query = check_query(query, model.config.clip_dim)
    references = np.asarray(references, np.float32)
    # Of many references only the mean and the spread count: those come from their mean and
    # principal axes, so that no map of each is held
    center = references.mean(axis=0)
    _, lengths, axes = np.linalg.svd(references - center, full_matrices=False)
    axes = axes[lengths > 1e-6 * lengths[0]] * (lengths[lengths > 1e-6 * lengths[0], None]
                                                / np.sqrt(len(references)))
    head = torch.from_numpy(np.concatenate([[query, center], axes]).astype(np.float32))
    _check_stride(stride, model.frame_hw)
    rows, cols = (len(range(stride // 2, cells, stride)) for cells in model.plan.shown_hw)
    at_once = max(1, MAP_VALUES // (len(stages[0]) * cols * (len(head) + model.config.clip_dim)))
    found = []
    with torch.inference_mode():
        for row in range(0, rows, at_once):
            dense = model.clip_map(stages, stride=stride, rows=slice(row, row + at_once))
            part = torch.einsum("bdyx,kd->kbyx", dense, head.to(dense.device))
            found.append((part[0] - part[1]) / part[2:].square().sum(0).sqrt().clamp(min=1e-6))
    return torch.cat(found, dim=1).cpu().numpy()


def _check_stride(stride, frame_hw):
    if not 1 <= stride <= min(frame_hw):
        raise ValueError(f"stride={stride} must lie between 1 and the frame's {min(frame_hw)} "
                         "pixels; use 8")
