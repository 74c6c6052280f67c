"""Predictions at positions without supervision: half-way between the patches, and anywhere.

Three answers are compared at a position: the network's own; its answers at the supervised
positions, interpolated, for which the head is not evaluated elsewhere; and the teacher's embeddings
at the supervised positions, interpolated, which needs no network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from hnerv_clip.inference import Run, predict_embeddings, sources_of
from hnerv_clip.metrics import centred_cosine, check_pair, cosine, unit
from hnerv_clip.patches import PatchGrid, linear_weights
from hnerv_clip.teachers import teacher_embeddings
from hnerv_clip.verify.time_series import MIN_FRAMES, mean_interval

ANYWHERE = (4, 8)  # rows and columns of cells
ANSWERS = ("network", "own_places", "teacher_places")


class Positions(NamedTuple):
    """Some positions of every frame, and the embeddings there: [T, P, D] unit vectors."""

    centres: np.ndarray  # [P, 2] (y, x) in frame pixels
    teacher: np.ndarray  # the reference
    network: np.ndarray
    own_places: np.ndarray
    teacher_places: np.ndarray


def halfway_grid(grid: PatchGrid) -> PatchGrid:
    """The grid with a row and a column more between every two: each second one is the given's.

    Of a grid of 2×4 patches placed evenly it is the grid of 3×7.
    """
    def fill(starts):
        even = tuple(round(starts[-1] * i / max(1, 2 * len(starts) - 2))
                     for i in range(2 * len(starts) - 1))
        if even[::2] == starts:
            return even
        middles = ((a + b) // 2 for a, b in zip(starts, starts[1:]))
        return tuple(sorted({*starts, *middles}))

    return dataclasses.replace(grid, tops=fill(grid.tops), lefts=fill(grid.lefts))


def anywhere_grid(grid: PatchGrid) -> PatchGrid:
    """Patches in the middle of 4×8 cells of equal size between the grid's outermost ones.

    A mean over them stands for all positions (the midpoint rule), and grids of 2×4, 3×7 and 5×13
    patches have none of them.
    """
    def middles(starts, cells):
        first, last = starts[0], starts[-1]
        return tuple(sorted({first + round((last - first) * (i + 0.5) / cells)
                             for i in range(cells)}))

    return dataclasses.replace(grid, tops=middles(grid.tops, ANYWHERE[0]),
                               lefts=middles(grid.lefts, ANYWHERE[1]))


def interpolate_positions(embeddings: npt.ArrayLike, taught: PatchGrid,
                       wanted: PatchGrid) -> np.ndarray:
    """Embeddings [T, P, D] at a grid's patches, bilinearly at another's: unit [T, P', D]."""
    weights = [linear_weights(torch.tensor(at, dtype=torch.float64), torch.tensor(known)).numpy()
               for at, known in ((wanted.tops, taught.tops), (wanted.lefts, taught.lefts))]
    return unit(np.einsum("pk,tkd->tpd", np.kron(*weights), np.asarray(embeddings)))


def position_grids(taught: PatchGrid) -> dict[str, tuple[PatchGrid, np.ndarray]]:
    """{supervised, between, anywhere: (a grid, [P] which of its patches)}, where there are any."""
    dense = halfway_grid(taught)
    boxes = taught.boxes.tolist()
    known = np.array([box in boxes for box in dense.boxes.tolist()])
    anywhere = anywhere_grid(taught)
    grids = {"supervised": (dense, known), "between": (dense, ~known),
             "anywhere": (anywhere, np.ones(len(anywhere), bool))}
    return {name: (grid, chosen) for name, (grid, chosen) in grids.items() if chosen.any()}


def answer_positions(run: Run, *, taught: PatchGrid | None = None, source: str | None = None,
               cache_dir: str | Path = "output/cache", device: str | torch.device = "auto",
               progress: bool = True) -> dict[str, Positions]:
    """What a run predicts at `position_grids`, and the teacher's embeddings there.

    The teacher embeds each of those patches (cached like others): at 2×4 supervised ones these are
    21 + 32 a frame, so 6.6 times the teacher's usual work.

    Args:
        taught: the grid of the positions that count as supervised, by default the run's own.
        source: how frames' embeddings are obtained, a prediction by default (`sources_of(…)[-1]`).
    Raises:
        ConfigError: the run has no CLIP head, or its teacher's weights are not there.
    """
    taught = taught or run.dataset.grid
    grids = position_grids(taught)
    distinct = list(dict.fromkeys(grid for grid, _ in grids.values()))
    centres = torch.cat([grid.centres for grid in distinct])
    predicted = predict_embeddings(run.model, run.dataset, centres=centres,
                                   source=source or sources_of(run.model)[-1])
    found = {grid: (own.numpy(), teacher_embeddings(
        run.dataset.video, grid, run.config.teacher, cache_dir=cache_dir, device=device,
        progress=progress).numpy())
        for grid, own in zip(distinct, predicted.split([len(grid) for grid in distinct], dim=1))}
    return join_positions(found, grids, taught)


def join_positions(found: Mapping[PatchGrid, tuple[np.ndarray, np.ndarray]],
                grids: Mapping[str, tuple[PatchGrid, np.ndarray]], taught: PatchGrid
                ) -> dict[str, Positions]:
    """`answer_positions` from embeddings: {grid: (predicted, teacher), each [T, P, D]}."""
    dense, known = grids["supervised"]
    corners = [values[:, known] for values in check_pair(*found[dense])]
    found_at = {}
    for name, (grid, chosen) in grids.items():
        predicted, teacher = check_pair(*found[grid])
        own, reference = (interpolate_positions(values, taught, grid) for values in corners)
        found_at[name] = Positions(grid.centres.numpy()[chosen], teacher[:, chosen],
                             *(values[:, chosen] for values in (predicted, own, reference)))
    return found_at


def position_scores(run: Run, *, taught: PatchGrid | None = None, source: str | None = None,
                    cache_dir: str | Path = "output/cache", device: str | torch.device = "auto",
                    progress: bool = True) -> pd.DataFrame:
    """How well a run predicts at its patches, half-way between them, and anywhere.

    Args:
        taught, source, cache_dir, device, progress: see `answer_positions`.
    Returns:
        A row per frame, position and answer (of `ANSWERS`): source, split (train, held_out),
        where (supervised, between, anywhere), frame, y, x (centre in pixels), answer,
        clip_similarity (raw cosine) and clip_centred.
    Raises:
        ConfigError: see `answer_positions`.
    """
    source = source or sources_of(run.model)[-1]
    answers = answer_positions(run, taught=taught, source=source, cache_dir=cache_dir,
                               device=device, progress=progress)
    return score_positions(answers, run.dataset.split.train).assign(source=source)


def score_positions(answers: Mapping[str, Positions], train_frames: npt.ArrayLike) -> pd.DataFrame:
    """`position_scores` of answers, centered at the teacher's mean at the supervised positions."""
    centre = answers["supervised"].teacher[train_frames].mean(axis=(0, 1))
    rows = []
    for name, found in answers.items():
        frames, count = found.teacher.shape[:2]
        split = np.where(np.isin(np.arange(frames), train_frames), "train", "held_out")
        where = {"split": np.repeat(split, count), "where": name,
                 "frame": np.repeat(np.arange(frames), count),
                 "y": np.tile(found.centres[:, 0], frames),
                 "x": np.tile(found.centres[:, 1], frames)}
        for answer in ANSWERS:
            given = getattr(found, answer)
            rows.append(pd.DataFrame(where | {
                "answer": answer, "clip_similarity": cosine(given, found.teacher).ravel(),
                "clip_centred": centred_cosine(given, found.teacher, centre).ravel()}))
    return pd.concat(rows, ignore_index=True)


def summarise_positions(scores: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Means of `position_scores`, with intervals over frames as in `verify.compare`.

    Returns:
        source, split, where, answer, clip_similarity, clip_centred, low and high (of clip_centred,
        within −1…1; empty with fewer than 8 frames), over_own_places (clip_centred of the network
        minus that of its own interpolated answers: above 0, evaluating the head there is worth it),
        frames, positions.
    """
    rows = []
    keys = ["source", "split", "where"]
    for key, part in scores.groupby(keys, sort=False):
        means = part.groupby("answer", sort=False).clip_centred.mean()
        for answer, own in part.groupby("answer", sort=False):
            series = own.groupby("frame").clip_centred.mean()
            row = dict(zip(keys, key)) | {
                "answer": answer, "clip_similarity": own.clip_similarity.mean(),
                "clip_centred": own.clip_centred.mean(),
                "low": np.nan, "high": np.nan, "over_own_places":
                means["network"] - means["own_places"] if answer == "network" else np.nan,
                "frames": len(series), "positions": len(own) // len(series)}
            if len(series) >= MIN_FRAMES:
                found = mean_interval(series.to_numpy(), level=level)
                row |= {"low": max(found.low, -1), "high": min(found.high, 1)}
            rows.append(row)
    return pd.DataFrame(rows)
