"""Find patches by text: rank embeddings by a query vector, and lay the scores over the frame.

Queries are unit vectors of the teacher's text space [D]; embeddings are unit vectors [T, P, D],
predicted by a run or made by the teacher. Scores compare within one query, not across queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hnerv_clip.metrics import check_embeddings, check_pair, rank_correlation
from hnerv_clip.teachers.text import parse_queries

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second: imported where a table is made


def rank_patches(query: npt.ArrayLike, embeddings: npt.ArrayLike, top_k: int | None = None, *,
                 apart: int = 0) -> pd.DataFrame:
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
    import pandas as pd

    scores = score_patches(query, embeddings)
    order = np.argsort(-scores, axis=None, kind="stable")
    order = _spread(order, scores.shape, apart, top_k)[:_check_top_k(top_k)]
    frame, patch = np.unravel_index(order, scores.shape)
    return pd.DataFrame({"rank": np.arange(1, len(order) + 1), "frame": frame, "patch": patch,
                         "score": scores.ravel()[order]})


def check_query(query: npt.ArrayLike, dim: int) -> np.ndarray:
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


def similar_patches(frame: int, patch: int, embeddings: npt.ArrayLike, top_k: int | None = None, *,
                    within: Any = None, apart: int = 0) -> pd.DataFrame:
    """Patches like a given one, best first; the patch itself is left out.

    Args:
        frame, patch: the patch asked about.
        embeddings: [T, P, D] unit vectors to take it from.
        top_k, apart: as in `rank_patches`; `apart` also keeps away from the patch asked about.
        within: [T', P', D] unit vectors to look in, for instance of another video; then nothing
            is left out. None looks in `embeddings`.
    Raises:
        ValueError: no such frame or patch; and as `rank_patches`.
    """
    embeddings = check_embeddings(embeddings)
    for name, value, count in (("frame", frame, len(embeddings)),
                               ("patch", patch, embeddings.shape[1])):
        if not 0 <= value < count:
            raise ValueError(f"{name}={value} must lie between 0 and {count - 1}")
    query = embeddings[frame, patch]
    if within is not None:
        return rank_patches(query, within, top_k, apart=apart)
    ranking = rank_patches(query, embeddings, apart=apart)
    own = (ranking.patch == patch) & ((ranking.frame - frame).abs() <= apart)
    ranking = ranking[~own].head(_check_top_k(top_k) or len(ranking)).reset_index(drop=True)
    return ranking.assign(rank=np.arange(1, len(ranking) + 1))


def score_patches(query: npt.ArrayLike, embeddings: npt.ArrayLike) -> np.ndarray:
    """Cosine of a query with every patch: float32 [T, P]; for a strip over time."""
    embeddings = check_embeddings(embeddings)
    return embeddings @ check_query(query, embeddings.shape[-1])


def match_scores(query: npt.ArrayLike, references: npt.ArrayLike, embeddings: npt.ArrayLike
                 ) -> np.ndarray:
    """How far embeddings answer a query rather than others: a standard score, comparable between
    queries.

    The cosine of an embedding with the query, less its mean cosine with N references, over the
    standard deviation of those. References of a text are names of many things
    (`teachers.reference_vectors`): at 0 the text fits as well as any name, and what no text fits is
    bright for none of them.

    Args:
        query: [D].
        references: [N, D] unit vectors, at least 2 that differ.
        embeddings: [..., D] unit vectors.
    Returns:
        float32 [...].
    Raises:
        ValueError: a bad query, or too few references.
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    references = np.asarray(references, dtype=np.float32)
    if references.ndim != 2 or len(references) < 2:
        raise ValueError(f"references have shape {references.shape}; give [N, D], at least 2")
    others = embeddings @ references.T  # [..., N]
    spread = others.std(axis=-1)
    return ((embeddings @ check_query(query, references.shape[1]) - others.mean(axis=-1))
            / np.maximum(spread, 1e-6)).astype(np.float32)


def relevancy(query: npt.ArrayLike, neutral: npt.ArrayLike, embeddings: npt.ArrayLike, *,
              scale: float = 10.0) -> np.ndarray:
    """How far patches answer a query rather than any of some neutral phrases: [T, P] in (0, 1).

    The smallest two-way softmax between query and phrase, as in LERF (arXiv 2303.09553, section
    3.3), above 0.5 where the query wins against all. Only for a teacher whose scores compare
    across texts, such as CLIP.

    Args:
        query: [D].
        neutral: [K, D], such as the texts "object", "things", "stuff", "texture".
        embeddings: [T, P, D] unit vectors.
        scale: inverse temperature of the softmax.
    """
    if len(neutral) == 0:
        raise ValueError("relevancy needs at least one neutral phrase, such as \"object\"")
    own = score_patches(query, embeddings)
    others = np.max([score_patches(phrase, embeddings) for phrase in neutral], axis=0)
    return 1 / (1 + np.exp(scale * (others - own)))


def compare_relevancy(queries: Sequence[str], vectors: npt.ArrayLike, neutral: npt.ArrayLike,
                      predicted: npt.ArrayLike, teacher: npt.ArrayLike, *,
                      scale: float = 10.0) -> pd.DataFrame:
    """How many patches are relevant to each query (above 0.5), to the network and to the teacher.

    Args:
        queries: K names.
        vectors: [K, D], the queries in the teacher's text space.
        neutral, scale: as for `relevancy`.
        predicted, teacher: [T, P, D] unit vectors.
    Returns:
        query, predicted and teacher (share of relevant patches), both (share relevant to both),
        agreement (share of patches on which they say the same), best_predicted and best_teacher
        (highest relevancy).
    """
    import pandas as pd

    predicted, teacher = check_pair(predicted, teacher)
    queries, rows = parse_queries(queries), []
    for name, vector in zip(queries, vectors, strict=True):
        own, right = (relevancy(vector, neutral, embeddings, scale=scale)
                      for embeddings in (predicted, teacher))
        rows.append({"query": name, "predicted": (own > 0.5).mean(),
                     "teacher": (right > 0.5).mean(),
                     "both": ((own > 0.5) & (right > 0.5)).mean(),
                     "agreement": ((own > 0.5) == (right > 0.5)).mean(),
                     "best_predicted": own.max(), "best_teacher": right.max()})
    return pd.DataFrame(rows)


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


def compare_rankings(queries: Sequence[str], vectors: npt.ArrayLike, predicted: npt.ArrayLike,
                     teacher: npt.ArrayLike, top_k: int = 20) -> pd.DataFrame:
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
        ValueError: as `rank_patches`; top_k of all patches or more; fewer than 3 patches; K names
            for another number of rows.
    """
    import pandas as pd

    predicted, teacher = check_pair(predicted, teacher)
    queries, vectors = parse_queries(queries), np.asarray(vectors)
    if len(queries) != len(vectors):
        raise ValueError(f"{len(queries)} queries come with {len(vectors)} vectors; give one each")
    patches = teacher.shape[0] * teacher.shape[1]
    if patches < 3:
        raise ValueError(f"two rankings of {patches} patches in all cannot be compared, at least 3 "
                         "are needed: take more frames, or a finer patch_grid")
    if not 1 <= top_k < patches:  # among all of them, all are found
        raise ValueError(f"top_k={top_k} must lie between 1 and {patches - 1}, below the number of "
                         "the video's patches")
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


def answer_words(agreement: pd.DataFrame) -> str:
    """Whether the network finds what the teacher would find, in Markdown.

    Args:
        agreement: as from `compare_rankings`. Over all queries: no where at most twice as many of
            the teacher's best patches are found as by chance, else yes where at least half are,
            else in part.
    """
    found, chance = agreement.overlap.mean(), agreement.chance.iloc[0]
    said = "No" if found <= 2 * chance else "Yes" if found >= 0.5 else "In part"
    return (f"**{said}: of the {agreement.top_k.iloc[0]} patches that the teacher ranks best for a "
            f"text, out of {agreement.patches.iloc[0]:,}, the network's own best hold {found:.0%} "
            f"(by chance {chance:.0%}).** Over all patches the two rankings have a rank "
            f"correlation of {agreement.spearman.mean():.2f}. Means over {len(agreement)} "
            "texts. Yes: at least half of them are found; no: at most twice as many as by "
            "chance; in part: between.")
