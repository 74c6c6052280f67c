"""What fields gave on frozen networks, as tables of `book/results/field_h100.json`.

Skill is (s − s_const) / (1 − s_const) of the mean cosine s to the teacher; that of the best
constant is 0. A field here is one fit of one seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.book.results import ResultsError, read_json
from hnerv_clip.verify.paired import compare_paired

FILE, SCOUT = "field_h100.json", "semantic_scout_h100.json"
NEAREST, INTERPOLATED = "nearest training frame", "interpolated teacher"
FIX = "git checkout book/results"
GOALS = {"any_held": {"bunny": 0.90, "bikes": 0.85}, "eight_held": {"bunny": 0.94, "bikes": 0.88}}
SETTINGS = {"rank": "rank", "hidden": "width", "layers": "layers", "output": "output",
            "source_stage": "stage", "stage": "stage", "points": "points",
            "frequencies": "frequencies", "map_channels": "map channels", "per_key":
            "frames a latent map", "steps": "steps", "lr": "lr", "rate_weight": "rate weight"}


def read_fields(folder: str | Path) -> dict[str, Any]:
    """The measurement: `about`; `fields` and `baselines` (tables); `runs` and `shifts` by video.

    `fields` has the columns of the file and `change` in words, `is_rounded` (whether its bytes
    are of the weights whose skill is given) and `kb` (10³ bytes).

    Raises:
        ResultsError: the file is missing, or has no field.
    """
    measured = read_json(folder, FILE, fix=FIX)
    rows = measured["rows"]
    found = [{**row, "change": _words(row["change"]), "kb": row["bytes"] / 1e3,
              "is_rounded": (row["change"]["fit"] or {}).get("rounding", 1) > 0}
             for row in rows if "head" in row]
    if not found:
        raise ResultsError(f"{FILE} has no field; take it back with {FIX}")
    return {"about": measured["about"], "fields": pd.DataFrame(found),
            "baselines": pd.DataFrame([row for row in rows if "baseline" in row]),
            "runs": {row["run"].split("_")[0]: row for row in rows if "run" in row},
            "shifts": {row["video"]: row for row in rows if row.get("what") == "shifts"},
            "smoothed": {row["video"]: row["any_held"] for row in rows
                         if row.get("what", "").startswith("smoothed")}}


def read_original(folder: str | Path) -> dict[str, dict[str, float]]:
    """The original head by video: skill at its `eight` positions, skill at `any` box, `cost_db`.

    The cost is in PSNR, on held-out frames from interpolated embeddings, against no head. From the
    pairs of networks without and with the head, where there are any (`study.fields`), with their
    number, `seeds`; else from the scout's single runs.
    """
    found = read_json(folder, FILE, fix=FIX).get("original", {})
    rows = read_json(folder, SCOUT, fix=FIX)["rows"]
    psnr = {row["run"]: row["eval_psnr_val_interpolated"] for row in rows if "run" in row}
    return {row["video"]: {"eight": row["skill"]["grid8"], "any": row["skill"]["any"], "cost_db":
                           psnr[f"{row['video']}_px"] - psnr[f"{row['video']}_user"]}
            for row in rows if row.get("head", "").startswith("user's head")} | found


def pair_rows(folder: str | Path) -> list[dict[str, str]]:
    """The same field on a network trained for the picture alone and on one trained with the head.

    A row per video, of the seeds that both have: skill at any box and PSNR in dB on held-out
    frames, joint less frozen (`verify.paired`). Empty where there are no pairs.
    """
    pairs, rows = pd.DataFrame(read_json(folder, FILE, fix=FIX).get("pairs", [])), []
    for video, part in pairs.groupby("video", sort=False) if len(pairs) else ():
        joint, frozen = (part[part.network == name].set_index("seed")
                         for name in ("joint", "frozen"))
        if len(joint.index.intersection(frozen.index)):
            rows.append({"video": video, "any box, frozen": f"{frozen.any_held.mean():.3f}",
                         "any box, joint less frozen": compare_paired(
                             joint.any_held, frozen.any_held).words(digits=3),
                         "held-out PSNR, joint less frozen": compare_paired(
                             joint.psnr_held_db, frozen.psnr_held_db).words("dB")})
    return rows


def read_perceptrons(folder: str | Path) -> dict[str, dict[str, Any]]:
    """By video the best of the perceptrons fitted before fields were, a row of the scout's file."""
    best: dict[str, dict[str, Any]] = {}
    for row in read_json(folder, SCOUT, fix=FIX)["rows"]:
        if row.get("head", "").startswith("post-hoc"):
            best[row["video"]] = max(row, best.get(row["video"], row),
                                     key=lambda one: one["skill"]["any"])
    return best


def best_field(fields: pd.DataFrame, video: str, *, column: str = "any_held",
               max_kb: float = float("inf")) -> pd.Series:
    """The rounded field of a video with the highest value of a column, of at most so many kB."""
    own = fields[(fields.video == video) & fields.is_rounded & (fields.kb <= max_kb)]
    return own.loc[own[column].idxmax()]


def smallest_field(fields: pd.DataFrame, video: str, *, any_held: float) -> pd.Series | None:
    """The rounded field of a video with the fewest bytes for this skill, or None."""
    own = fields[(fields.video == video) & fields.is_rounded & (fields.any_held >= any_held)]
    return None if own.empty else own.loc[own.kb.idxmin()]


def capacity(fields: pd.DataFrame) -> pd.DataFrame:
    """Fields that were also asked at their own boxes and differ in size alone, by parameters.

    A finer map or more frequencies are other designs, and left out.
    """
    asked = fields[fields.own_boxes.notna() & ~fields.change.str.contains("points|frequencies")]
    return asked.sort_values("params")


def baseline(baselines: pd.DataFrame, video: str, name: str) -> pd.Series:
    """One baseline's row."""
    return baselines[(baselines.video == video) & (baselines.baseline == name)].iloc[0]


def _words(change: dict[str, Any]) -> str:
    """What differs from the first field, in words: `rank 96, rate weight 1e-07`."""
    values = {**change, **(change.get("fit") or {})}
    said = [f"{words} {values[key]:g}" if isinstance(values[key], (int, float)) else
            f"{values[key]} {words}" for key, words in SETTINGS.items() if key in values]
    return ", ".join(said) or "as it was at first"
