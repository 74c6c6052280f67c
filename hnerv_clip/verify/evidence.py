"""Evidence from held-out frames: one table of a prediction, from which the verdict follows.

The error of an answer at a patch is 1 - cosine, half the squared distance between unit vectors. For
each frame and baseline,

    wins = share of patches where the network's error is smaller - share where it is larger,

in -1…1, which changes sign when the two are exchanged: 1 for a network that is always closer, 0 for
equals. Unlike a mean difference of errors it does not depend on the few frames on which something
happens, and it saturates, so that a network that is far better has a steady series.

*When* and *where* are tested on *changes*: what changes from one held-out frame
of a run to its next, at every patch position, less its least-squares line in time (so that no
constant and no linear or quadratic trend is left), scaled to unit length over all positions. For
the changes u_k of the prediction and v_j of the teacher,

    when[k, j] = Σ_i <u_k[i], v_j[i]>,
    where[k, j] = when[k, j] - mean of the same over all pairs of different positions.

If the prediction carries nothing about time, or about position, k = j is like any other pair. The
mean over k = j, less that of all pairs, is compared with the spread along all other diagonals,
which is every temporal shift at once: nothing is drawn at random (`diagonal_test`). Differences of
slow series are nearly independent, so this test keeps its size where one on the series themselves
does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from hnerv_clip.metrics import cosine
from hnerv_clip.verify.time_series import MIN_FRAMES

KNOWS = ("when", "where")


def net_wins(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of patches with a smaller error less the share with a larger: [N, P] twice → [N]."""
    return np.sign(np.where(np.abs(other - own) > 1e-6, other - own, 0)).mean(axis=-1)


def change_matrices(predicted: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`when` and `where` of the module's top, of the N - 1 changes between N frames.

    Args:
        predicted, teacher: [N, P, D] of the same frames, in order of time.
    Returns:
        when, where: [N - 1, N - 1]; `where` is 0 for a single patch.
    """
    own, right = (_unit_changes(x) for x in (predicted, teacher))
    same = _products(own, right)
    patches = own.shape[1]
    if patches == 1:
        return same, np.zeros_like(same)
    every = own.sum(axis=1) @ right.sum(axis=1).T
    return same, same - (every - same) / (patches - 1)


def _unit_changes(embeddings):
    changes = _without_trend(np.diff(np.asarray(embeddings, np.float64), axis=0))
    lengths = np.linalg.norm(changes, axis=(1, 2), keepdims=True)
    return np.where(lengths > 1e-6, changes / np.maximum(lengths, 1e-6), 0)


def _products(own, right):
    return own.reshape(len(own), -1) @ right.reshape(len(right), -1).T


class DiagonalTest(NamedTuple):
    """Is k = j unlike other pairs? estimate: by how much, on average; t: over standard_error.

    freedom: degrees of freedom of Student's t, n - 2 since a line was subtracted.
    """

    estimate: float
    standard_error: float
    t: float
    freedom: int


def diagonal_test(matrix: np.ndarray) -> DiagonalTest:
    """Test whether the diagonal of a similarity matrix [n, n] between two series stands out.

    The matrix is centered by row and column. If the series are unrelated, its sum along the
    diagonal is about normal with mean 0, as under random permutations (Hoeffding 1951), with the
    variance of sums along diagonals: n times the autocovariance of entries along diagonals, summed
    over lags up to a fifth of the series with falling weights (Newey and West 1987). Entries on and
    beside the diagonal, which hold what is tested, are left out of it.
    """
    count = len(matrix)
    centered = matrix - matrix.mean(axis=0) - matrix.mean(axis=1, keepdims=True) + matrix.mean()
    rows, columns = np.indices(matrix.shape)
    apart = np.abs(rows - columns) > 1
    variance = power = (centered[apart] ** 2).mean()
    lags = max(1, count // 5)
    for lag in range(1, lags + 1):
        along = (centered[:-lag, :-lag] * centered[lag:, lag:])[apart[lag:, lag:]]
        variance = variance + 2 * (1 - lag / (lags + 1)) * along.mean()
    error = np.sqrt(max(variance, power) / (count - 2))
    estimate = np.trace(centered) / count
    return DiagonalTest(float(estimate), float(error), float(estimate / max(error, 1e-12)),
                        count - 2)


def _without_trend(changes):
    """Changes [N, P, D] less their least-squares line in time."""
    count = len(changes)
    line = np.stack([np.ones(count), np.linspace(-1, 1, count)], axis=1)
    basis, _ = np.linalg.qr(line)  # [N, 2]
    flat = changes.reshape(count, -1)
    return (flat - basis @ (basis.T @ flat)).reshape(changes.shape)


class Evidence(NamedTuple):
    """The evidence of held-out frames.

    frames: a row per frame: frame, of every answer error_CONDITION (mean over patches), and of all
        but learned wins_CONDITION, the network's net wins over it.
    knows: a row per run and of when and where: run, test, and the fields of `DiagonalTest`.
    """

    frames: pd.DataFrame
    knows: pd.DataFrame


def collect_evidence(answers: Mapping[str, np.ndarray], teacher: np.ndarray, frames: np.ndarray
                     ) -> Evidence:
    """The evidence of one run.

    Args:
        answers: {condition: [N, P, D]} on held-out frames, `learned` among them.
        teacher: [N, P, D] unit vectors of the same frames.
        frames: [N] their numbers, rising.
    """
    errors = {name: 1 - cosine(answer, teacher) for name, answer in answers.items()}  # [N, P]
    table = pd.DataFrame({
        "frame": frames, **{f"error_{name}": error.mean(axis=1) for name, error in errors.items()},
        **{f"wins_{name}": net_wins(errors["learned"], error) for name, error in errors.items()
           if name != "learned"}})
    rows = []
    if len(frames) >= MIN_FRAMES:
        matrices = change_matrices(answers["learned"], teacher)
        rows = [{"run": 0, "test": test, **diagonal_test(matrix)._asdict()}
                for test, matrix in zip(KNOWS, matrices)]
    return Evidence(table, pd.DataFrame(
        rows, columns=["run", "test", *DiagonalTest._fields]))


def pool_evidence(runs: Sequence[Evidence]) -> Evidence:
    """The evidence of several runs of one setting and video.

    Runs of several phases bring different frames. Seeds bring the same ones: their rows are
    averaged, so that what follows holds for the mean over these seeds.

    Raises:
        ValueError: no run, or runs that were compared with different baselines.
    """
    if not runs:
        raise ValueError("no run to pool; give the evidence of at least one")
    if any(set(run.frames) != set(runs[0].frames) for run in runs):
        raise ValueError("the runs were compared with different baselines; verify them again")
    frames = pd.concat([run.frames for run in runs]).groupby("frame", as_index=False).mean()
    return Evidence(frames, pd.concat([run.knows.assign(run=i) for i, run in enumerate(runs)],
                                      ignore_index=True))
