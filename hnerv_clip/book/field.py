"""What fields gave on frozen networks, as tables of `book/results/field_h100.json`.

Skill is (s − s_const) / (1 − s_const) of the mean cosine s to the teacher; that of the best
constant is 0. A field here is one fit of one seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.book.markdown import join_words
from hnerv_clip.book.results import ResultsError, read_json
from hnerv_clip.paths import resolve_path
from hnerv_clip.verify.paired import compare_paired

FILE, SCOUT = "field_h100.json", "semantic_scout_h100.json"
TOGETHER = "field_together.json"
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


def read_together(folder: str | Path) -> pd.DataFrame:
    """Rows of `study.together`: the same field on networks as they are and that went on at a λ.

    Empty where none was measured. `where` says video, size and device.
    """
    if not (resolve_path(folder) / TOGETHER).is_file():
        return pd.DataFrame()
    rows = pd.DataFrame(read_json(folder, TOGETHER, fix=FIX)["rows"])
    rows["where"] = rows.video + " " + rows["size"] + ", " + rows.device
    return rows


def together_rows(together: pd.DataFrame) -> list[dict[str, str]]:
    """Means over seeds and differences to going on with the picture alone (λ = 0), in words.

    A row for each of `where` and λ: skill at any box and PSNR on held-out frames, paired by seed.
    """
    rows = []
    for where, part in together.groupby("where", sort=False):
        alone = part[part.weight == 0].set_index("seed")
        for weight, own in part.groupby(part.weight.fillna(-1)):
            own = own.set_index("seed")
            less = weight > 0 and len(own.index.intersection(alone.index)) > 0
            rows.append({
                "measured on": where, "λ": "frozen" if weight < 0 else f"{weight:g}",
                "any box": f"{own.any_held.mean():.3f}",
                "any box, less λ = 0": compare_paired(own.any_held, alone.any_held).words(
                    digits=3) if less else None,
                "PSNR": f"{own.psnr_held_db.mean():.2f} dB",
                "PSNR, less λ = 0": compare_paired(own.psnr_held_db, alone.psnr_held_db).words("dB")
                if less else None,
                "kB": f"{own.bytes.mean() / 1e3:.0f}"})
    return rows


def together_answer(together: pd.DataFrame) -> str:
    """The largest gain of skill at any box that going on at a λ had, and what it cost, in words."""
    said = []
    for where, part in together.groupby("where", sort=False):
        alone = part[part.weight == 0].set_index("seed")
        pairs = []
        for weight, own in part[part.weight > 0].groupby("weight"):
            own = own.set_index("seed")
            if len(own.index.intersection(alone.index)):
                pairs.append((weight, compare_paired(own.any_held, alone.any_held),
                              compare_paired(own.psnr_held_db, alone.psnr_held_db)))
        if pairs:
            weight, gain, cost = max(pairs, key=lambda pair: pair[1].difference)
            said.append(f"{gain.words(digits=3)} in skill at any box and {cost.words('dB')} in "
                        f"held-out PSNR at λ = {weight:g} ({where})")
    return join_words(said)


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
