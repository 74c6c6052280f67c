"""How often the verdict errs, on simulated data with a known answer.

`simulate_planted` puts a truth (the teacher plus noise) or a null (an unrelated series, the teacher
rolled in time, another video, ...) where a network's prediction would be, and counts how often each
question is answered yes. `simulate_interval` counts how often an interval holds the truth.

    python -m hnerv_clip.verify.simulation --force --out book/results/verification_calibration.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.signal import lfilter

from hnerv_clip.config import Split
from hnerv_clip.devices import usable_cores
from hnerv_clip.files import check_free, write_atomic
from hnerv_clip.metrics import cosine, unit
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import code_version
from hnerv_clip.verify.baselines import interpolate_teacher, nearest_training_frame
from hnerv_clip.verify.evidence import (
    KNOWS,
    Evidence,
    collect_evidence,
    net_wins,
    pool_evidence,
)
from hnerv_clip.verify.time_series import mean_interval
from hnerv_clip.verify.verdict import judge
from hnerv_clip.video import split_frames


class Design(NamedTuple):
    """Which frames are asked about: of `frames`, those that runs of these phases hold out."""

    frames: int
    split: Split
    phases: tuple[int, ...] = (0,)


DESIGNS = {"quick": Design(44, Split(1, 2, 2)), "one run": Design(132, Split(4, 5, 5)),
           "cross-fitted": Design(132, Split(4, 5, 5), (0, 1, 2, 3, 4))}
RHOS = (0.5, 0.9, 0.97)  # lag-one autocorrelations of the teacher's embeddings
NOISES = (0.25, 0.5)  # of a planted truth, in standard deviations of what changes
# Planted as a prediction → what it is.
PLANTED = {
    "perfect": "the teacher itself",
    **{f"noise {level}": f"the teacher with noise of {level} of its standard deviation"
       for level in NOISES},
    "unrelated": "an unrelated series around the same constant",
    "position means": "an unrelated series around the right means per position",
    "trend": "an unrelated series; both have trends",
    "shared trend": "an unrelated series; both have the same trend",
    "rolled": "the teacher a quarter to three quarters of the video later",
    "reversed": "the teacher backwards",
    "another video": "an unrelated series around another constant",
    "permuted": "the teacher at other positions",
    "equal": "as good as the teacher on the decoded frame",
}
# Series of mean 0 → what it is
SERIES = {"autoregression": "an autoregression", "net wins": "net wins between equals"}
TRUTHS = tuple(name for name in PLANTED if name == "perfect" or name.startswith("noise"))
EVERY_RHO = (*TRUTHS, "unrelated", "equal")  # the others at 0.9 alone
DECODED_NOISE = 0.6  # of the teacher on decoded frames, as slow as what changes
SIDE_FILE_NOISE = 0.3  # of a side file, interpolated in time
PATCHES, SIZE, TREND = 8, 16, 4.0
# Mean from which on a yes is expected: net wins (closer at four of five patches), or a score
TRUTH = {"wins": 0.6, "score": 0.4}


def autoregression(rng: np.random.Generator, shape: tuple[int, ...], rho: float) -> np.ndarray:
    """Stationary AR(1) series of unit variance along the first axis."""
    noise = rng.standard_normal(shape)
    noise[1:] *= np.sqrt(1 - rho ** 2)
    return lfilter([1], [1, -rho], noise, axis=0)


def plant(rng: np.random.Generator, planted: str, *, frames: int, datasets: int, rho: float
          ) -> tuple[np.ndarray, ...]:
    """Simulated data: the prediction, the teacher, and the teacher on decoded frames.

    A teacher's embedding is a constant, a mean per position, and an AR(1) of which half the
    variance is common to all positions.

    Returns:
        predicted, teacher, decoded: unit vectors [T, M, P, D] of M data sets.
    """
    shape = (frames, datasets, PATCHES, SIZE)

    def moving():
        return np.sqrt(0.5) * (autoregression(rng, shape, rho)
                               + autoregression(rng, (frames, datasets, 1, SIZE), rho))

    def around(series, constant, means):
        return unit(3 * constant + means + series)

    constant, other = unit(rng.standard_normal((2, datasets, 1, SIZE))) * np.sqrt(SIZE)
    means, others = 0.7 * rng.standard_normal((2, datasets, PATCHES, SIZE))
    truth, own = moving(), moving()
    if planted in ("trend", "shared trend"):
        slopes = rng.standard_normal((2, *shape[1:]))
        time = TREND * np.linspace(-0.5, 0.5, frames)[:, None, None, None]
        truth = truth + time * slopes[0]
        own = own + time * slopes[0 if planted == "shared trend" else 1]
    teacher = around(truth, constant, means)
    decoded = around(truth + DECODED_NOISE * moving(), constant, means)
    if planted == "perfect":
        predicted = teacher
    elif planted.startswith("noise"):
        noise = float(planted.split()[1]) * rng.standard_normal(shape)
        predicted = around(truth + noise, constant, means)
    elif planted == "equal":
        predicted = around(truth + DECODED_NOISE * own, constant, means)
    elif planted == "rolled":
        predicted = np.roll(teacher, rng.integers(frames // 4, 3 * frames // 4), axis=0)
    elif planted == "reversed":
        predicted = teacher[::-1]
    elif planted == "permuted":
        predicted = np.roll(teacher, rng.integers(1, PATCHES), axis=2)
    elif planted == "another video":
        predicted = around(own, other, others)
    elif planted == "position means":
        predicted = around(own, constant, means)
    else:
        predicted = around(own, constant, others)
    return predicted, teacher, decoded


def made_evidence(predicted: npt.ArrayLike, teacher: npt.ArrayLike, decoded: Any, train: Any,
                  held_out: Any, rng: Any) -> list[Evidence]:
    """`evidence.collect_evidence` of each of M data sets: [T, M, P, D] each."""
    right, known = teacher[held_out], teacher[train]
    flat = teacher.reshape(len(teacher), -1, teacher.shape[-1])
    between = interpolate_teacher(flat, train, held_out).reshape(right.shape)
    spread = SIDE_FILE_NOISE / np.sqrt(10 * SIZE) * rng.standard_normal(right.shape)
    answers = {
        "learned": predicted[held_out], "mean": unit(known.mean(axis=(0, 2), keepdims=True)),
        "position": unit(known.mean(axis=0, keepdims=True)),
        "neighbour": teacher[nearest_training_frame(held_out, train)], "between": between,
        "side_file": unit(between + spread), "decoded": decoded[held_out]}
    whole = {name: np.broadcast_to(answer, right.shape) for name, answer in answers.items()}
    return [collect_evidence({name: answer[:, i] for name, answer in whole.items()}, right[:, i],
                             held_out) for i in range(right.shape[1])]


def simulate_planted(planted: str, design: str, *, rho: float = 0.9, datasets: int = 1000,
                     seed: int = 0) -> pd.DataFrame:
    """Judge planted predictions.

    Args:
        planted: a key of `PLANTED`. design: a key of `DESIGNS`.
        rho: lag-one autocorrelation of everything that moves, per frame.
    Returns:
        A row per question: planted, design, rho, question, kind (null where the planted thing has
        no such merit, truth where one of `TRUTHS` has it by `TRUTH` or more, else between), yes
        (share of data sets, after Holm's correction), rejected (share with p of 5% or less,
        uncorrected), no, estimate (mean), datasets.
    """
    seeds = [list(PLANTED).index(planted), list(DESIGNS).index(design), round(100 * rho), seed]
    rng, (frames, split, phases), answers = np.random.default_rng(seeds), DESIGNS[design], []
    for start in range(0, datasets, 50):
        made = plant(rng, planted, frames=frames, datasets=min(50, datasets - start), rho=rho)
        runs = [made_evidence(*made, parts.train, parts.val, rng)
                for parts in (split_frames(frames, split, phase) for phase in phases)]
        answers += [judge(pool_evidence(tables)) for tables in zip(*runs)]
    rows = []
    for found in zip(*answers):
        estimate = np.mean([answer.estimate for answer in found])
        rows.append({
            "planted": planted, "design": design, "rho": rho, "question": found[0].question,
            "kind": _kind(planted, found[0].question, estimate),
            "yes": np.mean([answer.answer == "yes" for answer in found]),
            "rejected": np.mean([answer.p <= 0.05 for answer in found]),
            "no": np.mean([answer.answer == "no" for answer in found]),
            "estimate": estimate, "datasets": datasets})
    return pd.DataFrame(rows)


def _kind(planted, question, estimate):
    knows = planted in (*TRUTHS, "equal") or (planted, question) == ("permuted", "when")
    if question in KNOWS and not knows:
        return "null"
    # "equal" is made so that it wins as often as the teacher on the decoded frame
    if estimate <= 0 or (planted, question) == ("equal", "decoded"):
        return "null"
    enough = TRUTH["score" if question in KNOWS else "wins"]
    return "truth" if planted in TRUTHS and estimate >= enough else "between"


def simulate_interval(*, datasets: int = 1000, designs: Any = tuple(DESIGNS),
                      rhos: Sequence[float] = (0, *RHOS), seed: int = 0,
                      series: Sequence[str] = tuple(SERIES)) -> pd.DataFrame:
    """How often `mean_interval` holds the true mean of 0, and rejects it.

    Args:
        rhos: lag-one autocorrelations per frame of the video, of the AR(1) or of what moves.
        series: keys of `SERIES`.
    Returns:
        series, design, frames (held out), rho, covered, rejected (p of 5% or less), datasets.
    """
    rows = []
    for kind, design, rho in itertools.product(series, designs, rhos):
        seeds = [list(SERIES).index(kind), list(DESIGNS).index(design), round(100 * rho), seed]
        rng, (frames, split, phases) = np.random.default_rng(seeds), DESIGNS[design]
        held_out = np.sort(np.concatenate([split_frames(frames, split, x).val for x in phases]))
        made = np.concatenate([_made_series(kind, rng, frames, min(100, datasets - start), rho)
                               for start in range(0, datasets, 100)])
        found = [mean_interval(x) for x in made[:, held_out]]
        rows.append({"series": kind, "design": design, "frames": len(held_out), "rho": rho,
                     "covered": np.mean([x.low <= 0 <= x.high for x in found]),
                     "rejected": np.mean([x.p <= 0.05 for x in found]), "datasets": datasets})
    return pd.DataFrame(rows)


def _made_series(kind, rng, frames, datasets, rho):
    """[datasets, frames]"""
    if kind == "autoregression":
        return autoregression(rng, (frames, datasets), rho).T
    predicted, teacher, decoded = plant(rng, "equal", frames=frames, datasets=datasets, rho=rho)
    return net_wins(*(1 - cosine(x, teacher) for x in (predicted, decoded))).T


def simulate_all(*, datasets: int = 1000, seed: int = 0,
                 designs: Any = tuple(DESIGNS)) -> pd.DataFrame:
    """`simulate_planted` of everything; what `EVERY_RHO` names at every autocorrelation."""
    return pd.concat([simulate_planted(planted, design, rho=rho, datasets=datasets, seed=seed)
                      for design in designs for planted, rho in _plans()], ignore_index=True)


def _plans():
    return [(planted, rho) for planted in PLANTED
            for rho in (RHOS if planted in EVERY_RHO else (0.9,))]


def join_parts(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table of several of `simulate_planted` or `simulate_interval` with other seeds."""
    table = pd.concat(parts, ignore_index=True)
    shares = [name for name in ("yes", "rejected", "no", "estimate", "covered") if name in table]
    keys = [name for name in table if name not in (*shares, "kind", "datasets")]
    table[shares] = table[shares].mul(table.datasets, axis=0)
    found = table.groupby(keys, sort=False, as_index=False)[[*shares, "datasets"]].sum()
    found[shares] = found[shares].div(found.datasets, axis=0)
    if "question" in found:
        found.insert(len(keys), "kind", [_kind(row.planted, row.question, row.estimate)
                                         for row in found.itertuples()])
    return found


def worst_cases(planted: pd.DataFrame) -> pd.DataFrame:
    """A row per design and question: the largest shares of wrong answers, the smallest power.

    Returns:
        design, question, wrong yes (after Holm's correction), p ≤ 5% (without), power.
    """
    keys = ["design", "question"]
    null, truth = (planted[planted.kind == kind].groupby(keys, sort=False)
                   for kind in ("null", "truth"))
    return pd.DataFrame({"wrong yes": null.yes.max(), "p ≤ 5%": null.rejected.max(),
                         "power": truth.yes.min()}).reset_index()


def read_calibration(path: str) -> dict[str, pd.DataFrame] | None:
    """The tables that `main` wrote: planted and intervals; None where there is no such file."""
    path = resolve_path(path)
    if not path.is_file():
        return None
    return {name: pd.DataFrame(rows)
            for name, rows in json.loads(path.read_text(encoding="utf-8")).items()}


def calibrate(path: str, *, datasets: int = 1000, part: int = 1000, processes: int = 1,
              limit_s: float = np.inf) -> None:
    """Write both tables as JSON, anew every ten seconds or so.

    Args:
        datasets: for each thing planted, autocorrelation and design; twice as many for intervals.
        part: data sets that one process simulates at a time. All first parts come first, and of
            these the ones of few frames.
        limit_s: no part is begun later; at the end `datasets` says how many there were.
    """
    start, written, parts = time.monotonic(), 0.0, {}
    jobs = [(name, (seed, *cell)) for seed in range(-(-datasets // part)) for design in DESIGNS
            for name, cell in (*(("intervals", (kind, design, rho)) for kind in SERIES
                                 for rho in (0, *RHOS)),
                               *(("planted", (planted, design, rho)) for planted, rho in _plans()))]
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(_simulate_part, name, min(part, datasets - cell[0] * part), *cell,
                               start + limit_s): (name, *cell) for name, cell in jobs}
        for future in as_completed(futures):
            parts[futures[future]] = future.result()
            if any(part is not None for part in parts.values()) and (
                    time.monotonic() > written + 10 or len(parts) == len(jobs)):
                written = time.monotonic()
                done = [(name, parts[name, *cell]) for name, cell in jobs
                        if parts.get((name, *cell)) is not None]
                _write_tables(path, {table: [x for name, x in done if name == table]
                                     for table in ("planted", "intervals")})


def _simulate_part(name, datasets, seed, what, design, rho, deadline):
    if time.monotonic() > deadline:
        return None
    if name == "planted":
        return simulate_planted(what, design, rho=rho, datasets=datasets, seed=seed)
    return simulate_interval(datasets=2 * datasets, designs=(design,), rhos=(rho,), seed=seed,
                             series=(what,))


def _write_tables(path, parts):
    tables = {name: join_parts(found) for name, found in parts.items() if found}
    if "intervals" in tables:
        tables["intervals"] = tables["intervals"].sort_values(
            "series", key=lambda names: names.map(list(SERIES).index), kind="stable")
    commit, dirty = code_version()
    tables["made"] = pd.DataFrame([{"commit": commit, "dirty": dirty, "datasets": min(
        table.datasets.min() for table in tables.values())}])
    text = json.dumps({name: table.round(5).to_dict("records")
                       for name, table in tables.items()}, indent=1)
    write_atomic(resolve_path(path), lambda file: file.write(f"{text}\n".encode()))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables as JSON.

    Raises:
        RunError: OUT is there.
    """
    parser = argparse.ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="a new JSON file")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--limit_s", type=float, default=np.inf)
    args = parser.parse_args(argv)
    check_free(resolve_path(args.out), force=args.force)
    calibrate(args.out, datasets=args.datasets, processes=args.processes, limit_s=args.limit_s)
    print(args.out)


if __name__ == "__main__":
    main()
