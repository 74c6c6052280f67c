"""Find patches by text: rank embeddings by a query vector, and lay the scores over the frame.

Queries are unit vectors of the teacher's text space [D]; embeddings are unit vectors [T, P, D],
predicted by a run or made by the teacher. Scores compare within one query, not across queries.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hnerv_clip.measures import check_embeddings, check_pair, rank_correlation


def parse_queries(queries) -> list[str]:
    """Queries from "hare; wood rabbit" or a list of texts, in order.

    Raises:
        ValueError: no query, an empty one, or the same one twice.
    """
    parts = queries.split(";") if isinstance(queries, str) else list(queries)
    if isinstance(queries, str) and parts and not parts[-1].strip() and len(parts) > 1:
        parts = parts[:-1]  # a trailing semicolon
    names = [part.strip() if isinstance(part, str) else part for part in parts]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"queries={queries!r} hold an empty query; "
                             "write for example queries=\"hare; wood rabbit\"")
    if not names:
        raise ValueError("queries is empty; write for example queries=\"hare; wood rabbit\"")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"query {twice[0]!r} is given twice; name each once")
    return names


def rank_patches(query, embeddings, top_k: int | None = None, *, apart: int = 0) -> pd.DataFrame:
    """Patches by their cosine with a query, best first.

    Args:
        query: [D] vector of any length above 0.
        embeddings: [T, P, D] unit vectors.
        top_k: keep so many; None keeps all.
        apart: leave out a patch when a better one of its position lies within so many frames, so
            that one still moment does not fill the list.
    Returns:
        rank (from 1), frame, patch, score. Ties keep the order of time.
    Raises:
        ValueError: no query, another size than the embeddings', not finite, zero, or top_k < 1.
    """
    embeddings = check_embeddings(embeddings)
    scores = embeddings @ check_query(query, embeddings.shape[-1])
    order = np.argsort(-scores, axis=None, kind="stable")
    order = _spread(order, scores.shape, apart, top_k)[:_check_top_k(top_k)]
    frame, patch = np.unravel_index(order, scores.shape)
    return pd.DataFrame({"rank": np.arange(1, len(order) + 1), "frame": frame, "patch": patch,
                         "score": scores.ravel()[order]})


def check_query(query, dim: int) -> np.ndarray:
    """The query as a unit vector [D], or an error that says what is wrong with it."""
    if query is None or np.size(query) == 0:
        raise ValueError("the query is empty; give a text, encoded by the run's teacher")
    query = np.asarray(query, dtype=np.float32)
    if query.shape != (dim,):
        raise ValueError(f"the query has shape {query.shape}, the embeddings have {dim} values: "
                         "encode the text with the teacher that the run was trained with")
    length = np.linalg.norm(query)
    if not np.isfinite(length) or length < 1e-8:
        raise ValueError(f"the query has length {length}; give a finite vector that is not zero")
    return query / length


def _spread(order, shape, apart, top_k):
    if apart < 1:
        return order
    kept, free = [], np.ones(shape, dtype=bool)
    for index in order:
        frame, patch = divmod(index, shape[1])
        if free[frame, patch]:
            kept.append(index)
            free[max(frame - apart, 0):frame + apart + 1, patch] = False
        if len(kept) == top_k:
            break
    return np.array(kept)


def _check_top_k(top_k):
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    return top_k


def compare_rankings(queries, vectors, predicted, teacher, top_k: int = 20) -> pd.DataFrame:
    """How far the predicted embeddings rank patches as the teacher's own do, per query.

    Args:
        queries: K names.
        vectors: [K, D], the queries in the teacher's text space.
        predicted, teacher: [T, P, D] unit vectors.
        top_k: size of the two heads that are compared.
    Returns:
        query, spearman (over all patches), overlap (share of the teacher's top_k that is in the
        predicted top_k), chance (the overlap of a random ranking), top_k, patches.
    Raises:
        ValueError: as `rank_patches`; top_k beyond the patches; K names for another number of rows.
    """
    predicted, teacher = check_pair(predicted, teacher)
    queries, vectors = parse_queries(queries), np.asarray(vectors)
    if len(queries) != len(vectors):
        raise ValueError(f"{len(queries)} queries come with {len(vectors)} vectors; give one each")
    patches = teacher.shape[0] * teacher.shape[1]
    if not 1 <= top_k <= patches:
        raise ValueError(f"top_k={top_k} must lie between 1 and the {patches} patches of the video")
    rows = []
    for name, vector in zip(queries, vectors, strict=True):
        vector = check_query(vector, teacher.shape[-1])
        own, reference = (embeddings @ vector for embeddings in (predicted, teacher))
        heads = [np.argsort(-scores, axis=None, kind="stable")[:top_k]
                 for scores in (own, reference)]
        rows.append({"query": name, "spearman": rank_correlation(own, reference),
                     "overlap": len(np.intersect1d(*heads)) / top_k, "chance": top_k / patches,
                     "top_k": top_k, "patches": patches})
    return pd.DataFrame(rows)


def heat_map(query, dense_map) -> np.ndarray:
    """Cosine of a query with every position of a dense embedding map.

    Args:
        query: [D].
        dense_map: [D, h, w] as the CLIP head gives it, or [h, w, D].
    Returns:
        [h, w] float32.
    Raises:
        ValueError: no axis, or both outer axes, have the query's size; NaN.
    """
    dense_map = np.asarray(dense_map, dtype=np.float32)
    dim = np.size(query)
    if dense_map.ndim != 3 or dim not in (dense_map.shape[0], dense_map.shape[-1]):
        raise ValueError(f"the map has shape {dense_map.shape} and the query {dim} values; "
                         "give the map of the same teacher as [D, h, w] or [h, w, D]")
    if dense_map.shape[0] == dense_map.shape[-1]:
        raise ValueError(f"the map's shape {dense_map.shape} leaves open which axis holds the "
                         f"{dim} values; take another stride")
    if dense_map.shape[0] == dim:
        dense_map = np.moveaxis(dense_map, 0, -1)
    if not np.isfinite(dense_map).all():
        raise ValueError("the map holds NaN or infinite values: train again")
    lengths = np.maximum(np.linalg.norm(dense_map, axis=-1), 1e-8)
    return dense_map @ check_query(query, dim) / lengths
