"""What fields gave on frozen networks, as tables of `book/results/field_h100.json`.

Skill is (s − s_const) / (1 − s_const) of the mean cosine s to the teacher; that of the best
constant is 0. A row of `fields` is one fit of one seed; a design is the mean over its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.bench import rate_quality
from hnerv_clip.book.markdown import join_words
from hnerv_clip.book.results import ResultsError, read_json
from hnerv_clip.paths import resolve_path
from hnerv_clip.study.ablations import PAPER_EPOCHS
from hnerv_clip.study.fields import BOXES, TESTS
from hnerv_clip.verify.paired import Paired, compare_paired

FILE = "field_h100.json"
LABELLED = "field_labels.json"
TOGETHER, RATES = "field_together.json", "rate_quality.json"
NEAREST, INTERPOLATED = "nearest training frame", "interpolated teacher"
FIX = "git checkout book/results"
GOALS = {"any_held": {"bunny": 0.90, "bikes": 0.85}, "eight_held": {"bunny": 0.94, "bikes": 0.88}}
SETTINGS = {"rank": "rank", "hidden": "width", "layers": "layers", "points": "points",
            "map_channels": "map channels", "steps": "steps", "rate_weight": "rate weight"}
COST = ("A field is fitted to the frozen network, whose weights stay as they are: the picture "
        "costs 0 dB by construction; the field's bytes are added to the file.")


def read_fields(folder: str | Path) -> dict[str, Any]:
    """The measurement: `about`; `fields` and `baselines` (tables); `shifts` by video.

    `fields` has the columns of `study.fields.measure_field` and `change` in words, `is_rounded`
    (whether its bytes are of the weights whose skill is given) and `kb` (10³ bytes). `moved` has,
    by video and pixels, the teacher's skill for a box that moves; `side_files` what bytes alone
    give, with the columns any_held and eight_held of fields.

    Raises:
        ResultsError: the file is missing, or has no field.
    """
    measured = read_json(folder, FILE, fix=FIX)
    rows = measured["rows"]
    found = [{**row, "change": _words(row["change"]), "kb": row["bytes"] / 1e3,
              "is_rounded": (row["change"]["fit"] or {}).get("rounding", 1) > 0}
             for row in sorted(rows, key=_bunny_first) if "head" in row]
    if not found:
        raise ResultsError(f"{FILE} has no field; take it back with {FIX}")
    return {"about": measured["about"], "fields": pd.DataFrame(found),
            "baselines": pd.DataFrame([row for row in rows if "baseline" in row]),
            "moved": pd.DataFrame([row for row in rows if row.get("what") == "moved"],
                                  columns=["video", "pixels", "skill", "mean_of_4"]),
            "side_files": pd.DataFrame(
                [{**row, "kb": row["size_bytes"] / 1e3, f"{row['where']}_held": row["skill"]}
                 for row in rows if row.get("what") == "side file"],
                columns=["video", "where", "budget", "kb", "boxes", "every", "rank", "bits",
                         "any_held", "eight_held"]),
            "shifts": {row["video"]: row for row in rows if row.get("what") == "shifts"},
            "smoothed": {row["video"]: row["any_held"] for row in rows
                         if row.get("what", "").startswith("smoothed")}}


def read_original(folder: str | Path) -> dict[str, dict[str, float]]:
    """The original head by video: skill at its `eight` positions and at `any` box, on held-out
    frames from interpolated embeddings; means over so many `seeds`."""
    return read_json(folder, FILE, fix=FIX)["original"]


@dataclass(frozen=True)
class Pairs:
    """The same field on networks trained with the original head, less those without, by seeds."""

    video: str
    frozen: float  # skill at any box of held-out frames, without
    skill: Paired
    psnr: Paired  # in dB, held-out frames


def compare_pairs(folder: str | Path) -> list[Pairs]:
    """Every video's pairs of seeds that both networks have; none where none was measured."""
    rows = read_json(folder, FILE, fix=FIX).get("pairs", [])
    pairs, found = pd.DataFrame(sorted(rows, key=_bunny_first)), []
    for video, part in pairs.groupby("video", sort=False) if len(pairs) else ():
        joint, frozen = (part[part.network == name].set_index("seed")
                         for name in ("joint", "frozen"))
        if len(joint.index.intersection(frozen.index)):
            found.append(Pairs(video, frozen.any_held.mean(), *(
                compare_paired(joint[name], frozen[name]) for name in ("any_held",
                                                                       "psnr_held_db"))))
    return found


def cost_words(folder: str | Path) -> str:
    """What the default head costs in held-out PSNR after all epochs, in a sentence; or nothing."""
    pairs = [f"{one.psnr.words('dB')} on {one.video}" for one in compare_pairs(folder)]
    return "" if not pairs else (
        f"After {PAPER_EPOCHS} epochs the default head changes it by {join_words(pairs)} ([page 19]"
        "(19_ask_any_region.ipynb)).")


def pair_rows(pairs: list[Pairs]) -> list[dict[str, str]]:
    """A row per video."""
    return [{"video": one.video, "any box, without the head": f"{one.frozen:.3f}",
             "any box, with it less without": one.skill.words(digits=3),
             "held-out PSNR, with it less without": one.psnr.words("dB")} for one in pairs]


def pair_answer(pairs: list[Pairs]) -> str:
    """Whether a field knows more on networks that were trained with the head, in words."""
    more = [one.video for one in pairs if one.skill.low > 0]
    less = [one.video for one in pairs if one.skill.high < 0]
    if any(one.skill.n < 2 for one in pairs):
        return "One pair of networks cannot tell"
    if not more and not less:
        return "No gain in skill could be measured: its 95% interval includes 0 on every video"
    return "; ".join(f"{word} on {join_words(videos)}"
                     for word, videos in (("Yes", more), ("No, less", less)) if videos)


def read_together(folder: str | Path) -> pd.DataFrame:
    """Rows of `study.together`: the same field on networks as they are and trained together.

    Empty where none was measured. `where` says video, frames, their size, and device.
    """
    if not (resolve_path(folder) / TOGETHER).is_file():
        return pd.DataFrame()
    rows = pd.DataFrame(read_json(folder, TOGETHER, fix=FIX)["rows"])
    rows["where"] = (rows.video + ", " + rows.frames.astype(str) + " frames of " + rows["size"]
                     + ", " + rows.device)
    return rows


@dataclass(frozen=True)
class Together:
    """Networks trained together at a λ, less those that learned the picture alone for as long.

    first: from the first epoch; else after the network had been trained.
    """

    where: str
    first: bool
    weight: float
    skill: Paired  # at any box, held-out frames
    psnr: Paired  # in dB, likewise


def compare_together(together: pd.DataFrame) -> list[Together]:
    """Every λ of each `where`, by pairs of equal seeds: going on against λ = 0, and from the first
    epoch against the frozen network, each of which had as many epochs."""
    found = []
    for where, part in together.groupby("where", sort=False):
        for first in (False, True):
            joint = part[(part.network == ("first" if first else "together"))
                         & (part.weight > 0)]
            alone = part[part.network == "frozen"] if first else \
                part[(part.network == "together") & (part.weight == 0)]
            alone = alone.set_index("seed")
            for weight, own in joint.groupby("weight"):
                own = own.set_index("seed")
                if len(own.index.intersection(alone.index)):
                    found.append(Together(where, first, weight, *(
                        compare_paired(own[name], alone[name])
                        for name in ("any_held", "psnr_held_db"))))
    return found


def together_rows(together: pd.DataFrame) -> list[dict[str, str]]:
    """Means over seeds, and differences to what learned the picture alone for as long, in words.

    A row for each of `where`, way and λ: skill at any box and PSNR on held-out frames.
    """
    pairs = {(one.where, one.first, one.weight): one for one in compare_together(together)}
    ways = {"frozen": "frozen", "together": "going on", "first": "from the first epoch"}
    rows = []
    for (where, way), part in together.groupby(["where", "network"], sort=False):
        for weight, own in part.groupby(part.weight.fillna(-1)):
            pair = pairs.get((where, way == "first", weight))
            rows.append({
                "measured on": where,
                "network": ways[way] + ("" if weight < 0 else f", λ = {weight:g}"),
                "seeds": str(len(own)),
                "any box": f"{own.any_held.mean():.3f}",
                "any box, less the picture alone": pair and pair.skill.words(digits=3),
                "PSNR": f"{own.psnr_held_db.mean():.2f} dB",
                "PSNR, less the picture alone": pair and pair.psnr.words("dB", digits=3),
                "kB": f"{own.bytes.mean() / 1e3:.0f}"})
    return rows


def best_together_rows(together: pd.DataFrame) -> list[dict[str, str]]:
    """Of each `where` and way the λ that gained most skill, with what it did to the picture."""
    best: dict[tuple[str, bool], Together] = {}
    for one in compare_together(together):
        key = (one.where, one.first)
        if key not in best or one.skill.difference > best[key].skill.difference:
            best[key] = one
    return [{"measured on": one.where,
             "learned together": f"{'from the first epoch' if one.first else 'going on'}, "
                                 f"λ = {one.weight:g}",
             "pairs": str(one.skill.n), "skill at any box": one.skill.interval(digits=3),
             "from, to": f"{one.skill.values.min():+.3f}, {one.skill.values.max():+.3f}"
             if one.skill.n > 1 else "",
             "held-out PSNR": one.psnr.interval("dB", digits=3)} for one in best.values()]


def together_verdict(together: pd.DataFrame, *, first: bool, worth: float = 0.005) -> str:
    """Whether a way of training together adds skill: yes, no, or how far that can be told.

    Yes: everywhere some λ gains `worth` or more, and its 95% interval over seeds lies above 0.
    No: every λ gains less than `worth`, with 95% confidence. Empty without any pair.
    """
    pairs = [one for one in compare_together(together) if one.first == first]
    if not pairs:
        return ""
    clear = {one.where for one in pairs if one.skill.difference >= worth and one.skill.low > 0}
    if clear == {one.where for one in pairs}:
        return "yes"
    if all(one.skill.high < worth for one in pairs):  # NaN of a single pair is not
        return "no"
    values = [value for one in pairs for value in one.skill.values]
    more = sum(value >= worth for value in values)
    return (f"not significantly; {more or 'none'} of {len(values)} "
            f"pair{'' if len(values) == 1 else 's'} of networks gained {worth:g} or more")


def read_labelled(folder: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of `study.labels` for the teacher and a field, and what they are of (`about`).

    Empty where there are none.
    """
    if not (resolve_path(folder) / LABELLED).is_file():
        return pd.DataFrame(), {}
    found = read_json(folder, LABELLED, fix=FIX)
    return pd.DataFrame(found["rows"]), found["about"]


def asked_words(about: dict[str, Any]) -> str:
    """Which fields were asked for what the labels name, and how good they are, in a sentence."""
    fields = about["fields"]
    boxes = join_words([f"{count:,}" for count in sorted({one["boxes"] for one in fields})])
    return (f"The fields were fitted to {boxes} boxes of each training frame of networks that "
            "learned the picture alone; at any other box in held-out frames their skill is "
            + join_words([f"{one['any_held']:.2f} on {one['video']}" for one in fields]) + ".")


def labelled_rows(labelled: pd.DataFrame) -> list[dict[str, str]]:
    """A row per video, name and who answered: hits of all, and means of both overlaps."""
    rows = []
    for (video, query), part in labelled.groupby(["video", "query"], sort=False):
        for who in ("teacher", "teacher, in words", "field", "field, in words"):
            own = part[part.who == who]
            if len(own):
                rows.append({
                    "video, name": f"{video}, {query}", "who": who,
                    "hits": f"{own.hit.sum()} of {len(own)}",
                    "hits by chance": f"{own.chance.sum():.1f}",
                    "the frame's middle": f"{own.middle.sum()}",
                    "best box, IoU": f"{own.box_iou.mean():.2f}",
                    "heat map, IoU": f"{own.map_iou.mean():.2f}"})
    return rows


def labelled_words(labelled: pd.DataFrame) -> str:
    """Hits of the field and of its teacher on the same boxes, in words."""
    both = labelled[labelled.video.isin(labelled[labelled.who == "field"].video)]
    field, teacher = (both[both.who == who] for who in ("field", "teacher"))
    return (f"of {len(field)} boxes drawn by hand in held-out frames of "
            f"{join_words(list(field.video.unique()))}, {field.hit.sum()} hold the middle of the "
            f"box that a field finds best, and {teacher.hit.sum()} that of its teacher, which sees "
            f"the frame; by chance {field.chance.sum():.0f} would, and {field.middle.sum()} hold "
            "the frame's middle. The heat maps of the field and of the teacher overlap with them "
            f"by {field.map_iou.mean():.2f} and {teacher.map_iou.mean():.2f} (intersection over "
            "union). Boxes of one video are not independent, so no interval is given")


def in_words(labelled: pd.DataFrame) -> str:
    """The same boxes asked for in other words, which become mixtures of names; or nothing."""
    found = {}
    for who in ("field", "teacher"):
        asked = labelled[labelled.who == f"{who}, in words"]
        named = labelled[(labelled.who == who) & labelled.video.isin(asked.video)]
        if len(asked):
            found[who] = (
                f"{asked.hit.sum()} of {len(asked)} boxes ({named.hit.sum()} by name), with "
                f"overlaps of {asked.map_iou.mean():.2f} ({named.map_iou.mean():.2f})")
    if not found:
        return ""
    return ("Asked in other words (“a big grey bunny” for hare), which a sentence encoder, not "
            "CLIP, turns into mixtures of ImageNet's names, " + join_words(
                [f"the {who} finds {words}" for who, words in found.items()]) + ".")


def over_seeds(fields: pd.DataFrame) -> pd.DataFrame:
    """A row per video and design: means over seeds, `seeds` and `sd`, the standard deviation of
    any_held, NaN of one seed."""
    groups = fields.groupby(["video", "head"], sort=False)
    rows = groups.first()
    means = groups.mean(numeric_only=True).drop(columns=["seed", "params", "boxes_a_frame",
                                                         "patches", "is_rounded"])
    return rows.assign(**means, seeds=groups.seed.nunique(), sd=groups.any_held.std()
                       ).reset_index()


def best_field(fields: pd.DataFrame, video: str, *, column: str = "any_held",
               max_kb: float = float("inf"), rounded: bool = True) -> pd.Series:
    """The design of a video with the highest value of a column, of at most so many kB.

    Args:
        rounded: of those alone whose bytes are known.
    Returns:
        Its row of `over_seeds`.
    Raises:
        ResultsError: there is none.
    """
    means = over_seeds(fields)
    own = means[(means.video == video) & (means.is_rounded | (not rounded)) & (means.kb <= max_kb)]
    if own[column].isna().all():
        raise ResultsError(f"{FILE} has no field of {video} of at most {max_kb:g} kB; take it back "
                           f"with {FIX}")
    return own.loc[own[column].idxmax()]


def smallest_field(fields: pd.DataFrame, video: str, *, any_held: float) -> pd.Series | None:
    """The rounded design of a video with the fewest bytes for this skill, or None."""
    means = over_seeds(fields)
    own = means[(means.video == video) & means.is_rounded & (means.any_held >= any_held)]
    return None if own.empty else own.loc[own.kb.idxmin()]


def seed_words(fields: Iterable[pd.Series]) -> str:
    """How many seeds rows of `over_seeds` are means of, and their spread at any box, in words."""
    return join_words([f"{row.video} ± {row.sd:.3f} ({row.seeds} seeds)" if row.seeds > 1
                       else f"{row.video} one seed" for row in fields])


def speed_words(fields: Iterable[pd.Series]) -> str:
    """How many boxes a second rows of `over_seeds` answer for, in a sentence, or nothing."""
    timed = [row for row in fields if row.get("scores_per_s", math.nan) > 0]
    if not timed:
        return ""
    embedded, compared = (join_words([f"{row[name] / 1e6:.2g} million ({row.video})"
                                      for row in timed])
                          for name in ("embeddings_per_s", "scores_per_s"))
    return (f"In a second a stored field gives the embeddings of {embedded} boxes, copied to the "
            f"CPU, or compares {compared} boxes with a text (one {timed[0].device}; many boxes of "
            "a frame asked at once).")


def side_file_words(fields: pd.DataFrame, side_files: pd.DataFrame, video: str, *, kb: float = 60
                    ) -> str:
    """What the best side file and the best field of at most so many kB know of any box."""
    own = side_files[(side_files.video == video) & side_files.any_held.notna()]
    within, most = own[own.kb <= kb].iloc[-1], own.iloc[-1]
    field = best_field(fields, video, max_kb=kb)
    needed = smallest_field(fields, video, any_held=most.any_held)
    return (f"on {video} {within.any_held:.2f} in {within.kb:.0f} kB, where a field has "
            f"{field.any_held:.2f} in {field.kb:.0f} kB, and {most.any_held:.2f} in "
            f"{most.kb:.0f} kB, for which a field needs "
            + ("more than was tried" if needed is None else f"{needed.kb:.0f} kB"))


@dataclass(frozen=True)
class Exchange:
    """Bytes of the picture against decibels, by fine-tuned files of one training of bunny.

    From `kb` on, each e-fold of bytes gives `db`.
    """

    kb: float
    db: float

    def decibels(self, kb: float) -> float:
        """What so many kB more would give the picture."""
        return self.db * math.log1p(kb / self.kb)


def read_exchange(folder: str | Path) -> Exchange | None:
    """From the training with the most fine-tuned files of page 18; None without two."""
    measured = read_json(folder, RATES, fix=FIX)
    curves = rate_quality.trainings(rate_quality.tuned_points(measured["runs"]))
    points = max(curves, key=len, default=[])
    if len(points) < 2:
        return None
    first, last = (side(points, key=lambda point: point["size_bytes"]) for side in (min, max))
    return Exchange(first["size_bytes"] / 1e3, (last["psnr_db"] - first["psnr_db"])
                    / math.log(last["size_bytes"] / first["size_bytes"]))


def capacity(fields: pd.DataFrame) -> pd.DataFrame:
    """Fields that were fitted to the default number of boxes, by parameters."""
    return fields[fields.boxes_a_frame == BOXES].sort_values("params")


def by_boxes(fields: pd.DataFrame) -> pd.DataFrame:
    """The one field of each video that was fitted to the most different numbers of boxes.

    Never rounded, without patches among its boxes, of one size; the last fit for each number. Rows
    are in order of video and `boxes_a_frame`; no row of a video without two numbers.
    """
    tried = fields[~fields.is_rounded & (fields.patches == 0)]
    counts = tried.groupby(["video", "params"]).boxes_a_frame.nunique()
    best = counts[counts > 1].groupby(level="video").idxmax()
    chosen = tried[[(row.video, row.params) in set(best) for row in tried.itertuples()]]
    return chosen.drop_duplicates(["video", "boxes_a_frame"], keep="last").sort_values(
        ["video", "boxes_a_frame"], key=lambda column: column.map(
            {video: place for place, video in enumerate(fields.video.unique())}).fillna(column))


def largest_words(fields: pd.DataFrame) -> str:
    """What more boxes and steps give the largest design of each video, and how far its own boxes
    are ahead; or nothing."""
    said = []
    for video, part in over_seeds(fields).groupby("video", sort=False):
        own = part[part.params == part.params.max()].sort_values("boxes_a_frame")
        few, many = own.iloc[0], own.iloc[-1]
        if few.boxes_a_frame < many.boxes_a_frame:
            said.append(f"from {few.any_held:.2f} to {many.any_held:.2f} on {video}, where it has "
                        f"{many.own_boxes:.2f} at its own boxes")
            counts = f"from {few.boxes_a_frame:,} to {many.boxes_a_frame:,} boxes and more steps"
    return "" if not said else (f"The largest field, {counts}, goes at other boxes "
                                f"{'; '.join(said)}, still better than at others.")


def moved_words(moved: pd.DataFrame, best: pd.Series) -> str:
    """How far a test box moves before the teacher knows it less well than the best field does."""
    own = moved[moved.video == best.video].sort_values("pixels")
    least, most = own.iloc[0], own.iloc[-1]
    near = own[own.skill <= best.any_held]
    far = f"already by {near.iloc[0].pixels} pixels" if len(near) else \
        f"by more than {most.pixels} pixels"
    return (f"On {best.video} the teacher's own skill is {least.skill:.2f} for a test box that "
            f"moves by {_pixels(least.pixels)} and {most.skill:.2f} for one that moves by "
            f"{_pixels(most.pixels)}; for the {best.any_held:.2f} of the best field it has to move "
            f"{far}.")


def field_words(row: Any, fields: pd.DataFrame) -> str:
    """A field's name in a table: video, boxes, design, and its seed where there are several."""
    several = fields[(fields["head"] == row.head) & (fields.video == row.video)].seed.nunique() > 1
    return (f"{row.video}, {row.boxes_a_frame:,} boxes: {row.change}"
            + (f", seed {row.seed}" if several else ""))


def setting_words(fields: pd.DataFrame) -> str:
    """What networks and fields were made with, and which boxes were asked, in sentences."""
    asked, taught = TESTS["any"], fields[fields.patches > 0]
    (small, large), (narrow, broad) = asked.size_range, asked.aspect_range
    return ("The networks of bunny (640×1280) and bikes (256×640) learned the picture alone, for "
            "300 epochs in bf16, with one frame in 5 held out; held-out frames come from "
            "interpolated embeddings. Fields were fitted to these networks as they are. Asked were "
            f"{asked.count} boxes that no field was fitted to, of a size (square root of the area) "
            f"of {small:g} to {large:g} frame heights and {narrow:g} to {broad:g} times as wide as "
            f"high, and the eight patches, which {len(taught)} of {len(fields)} fields had among "
            "their boxes.")


def _pixels(count: int) -> str:
    return "one pixel" if count == 1 else f"{count} pixels"


def baseline(baselines: pd.DataFrame, video: str, name: str) -> pd.Series:
    """One baseline's row."""
    return baselines[(baselines.video == video) & (baselines.baseline == name)].iloc[0]


def _bunny_first(row: dict[str, Any]) -> bool:
    return row["video"] != "bunny"


def _words(change: dict[str, Any]) -> str:
    """What differs from the default field, of the design and of its fit: `rank 96, steps 8000`."""
    values = {**change, **(change["fit"] or {})}
    return ", ".join(f"{words} {values[name]:g}" for name, words in SETTINGS.items()
                     if name in values) or "default field"
