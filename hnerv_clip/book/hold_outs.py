"""How fields of small networks generalize in time: tables of `book/results/hold_outs.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.book.markdown import join_words
from hnerv_clip.book.results import read_json
from hnerv_clip.paths import resolve_path

FILE = "hold_outs.json"
FIX = "git checkout book/results"
ORDER = ("one frame in 5", "one frame in 16", "blocks of 2 s")


def read_hold_outs(folder: str | Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Rows of `study.hold_outs`, and what they are of (`about`).

    `name` is the video and in what its network's settings differ, `loss` of skill at any box from
    training to held-out frames.

    Returns:
        (rows, those whose network learned nothing, about). On the latter a field is no better than
        a constant even in training frames. All empty where nothing was measured.
    """
    if not (resolve_path(folder) / FILE).is_file():
        return pd.DataFrame(), pd.DataFrame(), {}
    found = read_json(folder, FILE, fix=FIX)
    rows = pd.DataFrame(found["rows"])
    rows["name"] = [_name(row) for row in found["rows"]]
    rows["loss"] = rows.any_train - rows.any_held
    rows["place"] = rows.hold_out.map(ORDER.index)
    videos = {name: place for place, name in enumerate(rows.name.unique())}
    rows = rows.sort_values(["place", "name", "seed"], key=lambda column: column.map(
        videos) if column.name == "name" else column, ignore_index=True)
    return rows[rows.any_train > 0], rows[rows.any_train <= 0], found["about"]


def _name(row: dict[str, Any]) -> str:
    words = {"lr": "learning rate {}", "optimizer": "by {}"}
    changes = ", ".join(words.get(name, f"{name} {{}}").format(str(value).replace("adan", "Adan"))
                        for name, value in row["changes"].items())
    return row["video"] + (f" ({changes})" if changes else "")


def hold_out_rows(rows: pd.DataFrame) -> list[dict[str, str]]:
    """A row per video and hold-out, means over seeds."""
    found = []
    for (name, hold_out), part in rows.groupby(["name", "hold_out"], sort=False):
        means = part.mean(numeric_only=True)
        found.append({
            "video": name, "held out": f"{hold_out} ({means.held:.0f} of {means.frames:.0f})",
            "seeds": str(len(part)), "any box, training frames": f"{means.any_train:.2f}",
            "any box, held out": f"{means.any_held:.2f}",
            "teacher, interpolated": f"{means.interpolated_held:.2f}",
            "eight patches, held out": f"{means.eight_held:.2f}",
            "PSNR, held out": f"{means.psnr_held_db:.1f} dB"})
    return found


def hold_out_words(rows: pd.DataFrame) -> str:
    """What each hold-out costs, in sentences: means over the videos that have all of them."""
    kinds = rows.groupby("name").hold_out.nunique()
    whole = rows[rows.name.isin(kinds[kinds == kinds.max()].index)]
    costs, alone = [], []
    for hold_out, part in whole.groupby("hold_out", sort=False):
        videos = part.groupby("name").mean(numeric_only=True)
        costs.append(f"from {videos.any_train.mean():.2f} to {videos.any_held.mean():.2f} with "
                     f"{hold_out} held out ({_range(videos.loss)} lost)")
        alone.append(f"{videos.interpolated_held.mean():.2f}")
    return (f"From training to held-out frames mean skill at any box goes {join_words(costs)}, "
            f"over {_count(whole.name.nunique(), 'video')}. The teacher's own embeddings of the "
            f"very box, interpolated in time, have {join_words(alone)} there.")


def _range(values: pd.Series) -> str:
    return f"{values.min():.2f} to {values.max():.2f}" if len(values) > 1 \
        else f"{values.iloc[0]:.2f}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def origin_words(rows: pd.DataFrame) -> str:
    """On which devices and at which commits rows were measured."""
    return "; ".join(
        f"{device}, commit{'s' if part.commit.nunique() > 1 else ''} "
        + join_words([commit[:12] for commit in part.commit.unique()])
        for device, part in rows.groupby("device", sort=False))


def nothing_learned_words(rows: pd.DataFrame) -> str:
    """Which networks learned nothing, as a sentence; empty without any."""
    if rows.empty:
        return ""
    videos = [f"{name} ({part.psnr_held_db.min():.1f} to {part.psnr_held_db.max():.1f} dB)"
              for name, part in rows.groupby("name", sort=False)]
    return (f"Left out: {join_words(videos)}, by the settings of the other videos: the network "
            "itself learned next to nothing, so that a field is worse than a constant even in "
            "training frames.")
