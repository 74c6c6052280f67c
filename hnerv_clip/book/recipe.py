"""How far beyond HNeRV's picture this project is: `recipe_h100.json` and `recipe_cpu.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.book.results import read_json

GPU, CPU = "recipe_h100.json", "recipe_cpu.json"
FIX = "git checkout book/results"
CHANCE_DB = 0.3  # about two standard deviations over seeds at full size
BASE, BEST = "lr 2e-3", "batch 1, 600 epochs"  # what a single change is to; the preset `best`


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """What was measured on the GPU: `about`, and the tables `rows`, `goals` and `published`.

    Raises:
        ResultsError: the file is missing.
    """
    measured = read_json(folder, GPU, fix=FIX)
    return {"about": measured["about"]} | {
        name: pd.DataFrame(measured[name]) for name in ("rows", "goals", "published")}


def read_ranking(folder: str | Path) -> dict[str, Any]:
    """The ranking at small scale on a CPU: `about`, and the table `rows` with `gain_db`.

    A gain is over the row of the same group that is marked as its base.

    Raises:
        ResultsError: the file is missing.
    """
    measured = read_json(folder, CPU, fix=FIX)
    rows = pd.DataFrame(measured["rows"])
    base = rows[rows.base].set_index("group").psnr_db
    rows["gain_db"] = rows.psnr_db - rows.group.map(base)
    return {"about": measured["about"], "rows": rows}


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Every single change at 300 epochs with `gain_db` over `BASE`, the best first."""
    tried = rows[(rows.lr > 1e-3) & (rows.epochs == 300)].copy()
    base, = tried[tried.change == BASE].psnr_db
    tried["gain_db"] = tried.psnr_db - base
    return tried.sort_values("psnr_db", ascending=False)


def one(rows: pd.DataFrame, change: str) -> pd.Series:
    """The only row of a change."""
    row, = rows[rows.change == change].itertuples(index=False)
    return pd.Series(row._asdict())


def reached(rows: pd.DataFrame, *, seconds: float) -> float | None:
    """The best PSNR of a whole run, all of its time counted, within so many seconds."""
    within = rows[rows.total_s <= seconds].psnr_db
    return None if within.empty else float(within.max())
