"""Embeddings a second: predicted, or by the teacher."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd

from hnerv_clip.bench.decoding import measure_decoding
from hnerv_clip.bench.results import read_decoding, read_teacher_rates
from hnerv_clip.inference import BATCH, Run
from hnerv_clip.teachers import Teacher, run_teacher


def measure_costs(run: Run, teacher: Teacher, *, frames: int = 8, repeats: int = 5
                  ) -> pd.DataFrame:
    """Embeddings a second: predicted, by decoding and the teacher, and by the teacher alone.

    Returns:
        A row per way: embeddings_per_s (median over passes after a warm-up), min, max, n passes.
    """
    grid, timed = run.dataset.grid, run.dataset.video.frames[:frames]
    decoding = measure_decoding(run.model, run.dataset, repeats=repeats).set_index("mode")
    run_teacher(teacher, timed, grid, progress=False)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        run_teacher(teacher, timed, grid, progress=False)  # its result is on the CPU: it is done
        rates.append(len(timed) / (time.perf_counter() - start))
    return _cost_table(decoding, {"median": np.median(rates), "min": min(rates),
                                  "max": max(rates)}, len(grid))


def read_costs(path: str | Path, run: Run) -> tuple[pd.DataFrame, str]:
    """`measure_costs` on another machine, from a bench file, and in words where and when.

    Raises:
        ValueError: see `bench.results.read_decoding` and `read_teacher_rates`.
    """
    decoding, where = read_decoding(path, run.config, batch_size=BATCH)
    patches = len(run.dataset.grid)
    rates = {name: rate / patches for name, rate in
             read_teacher_rates(path, run.dataset.teacher_label).items()}
    return _cost_table(decoding.set_index("mode"), rates, patches), where


def _cost_table(decoding: pd.DataFrame, teacher: dict[str, float], patches: int) -> pd.DataFrame:
    """Rates in frames a second, of decoding by mode and of the teacher, as embeddings a second."""
    columns = {"embeddings_per_s": ("frames_per_s", "median"), "min": ("frames_per_s_min", "min"),
               "max": ("frames_per_s_max", "max")}
    ways = {"predicted": lambda rgb, own, taught: own,
            "frame decoded, then the teacher": lambda rgb, own, taught: 1 / (1 / rgb + 1 / taught),
            "teacher, frame at hand": lambda rgb, own, taught: taught}
    return pd.DataFrame([{"way": way, **{name: patches * rate(
        decoding[column]["RGB"], decoding[column]["embeddings only"], teacher[kind])
        for name, (column, kind) in columns.items()}, "n": decoding.n.iloc[0]}
        for way, rate in ways.items()])
