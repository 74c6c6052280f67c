"""What the result notebooks read: files of `book/results`, as tables of means and differences.

Means and differences are over seeds, of runs measured on the same frames. Their intervals are
Student's t over seeds and say nothing of other frames or videos; one seed has none. A difference
pairs runs of one seed (`verify.paired`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hnerv_clip import files
from hnerv_clip.book.markdown import Markup, interval
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import commit_words
from hnerv_clip.study.plan import ENCODINGS, REMEDIES
from hnerv_clip.study.table import read_study
from hnerv_clip.verify.paired import Paired, compare_paired

# Kind of network → what its decoder is given for a frame
KINDS = {"hybrid": "hybrid", "xyt": "position and time", "pe": "time only"}
SUPERVISED, BETWEEN, ANYWHERE = "held_out", "between_held_out", "anywhere_held_out"


class ResultsError(ValueError):
    """A file of results is missing or lacks what a page needs; the message says which and how."""


def read_json(folder: str | Path, name: str, *, fix: str) -> dict[str, Any]:
    """A JSON file of results.

    Args:
        fix: the command that writes it, for the error.
    Raises:
        ResultsError: it is missing or is no JSON.
    """
    path = resolve_path(folder) / name
    try:
        return files.read_json(path, fix=f"write it again with {fix}")
    except FileNotFoundError:
        raise ResultsError(f"{path} does not exist; write it with {fix}") from None
    except files.RunError as error:
        raise ResultsError(str(error)) from error


def read_runs(folder: str | Path, name: str = "study.csv", *, needs: Iterable[str] = ()
              ) -> pd.DataFrame:
    """A table of `hnerv-clip study --csv`, a row per run.

    Raises:
        ResultsError: it is missing, empty, or lacks a column of `needs`.
    """
    path = resolve_path(folder) / name
    try:
        runs = read_study(path)
    except (ValueError, RuntimeError) as error:
        raise ResultsError(str(error)) from error
    missing = [column for column in needs if column not in runs or runs[column].isna().all()]
    if missing or not len(runs):
        raise ResultsError(f"{path} has no {', '.join(missing) or 'runs'}; write it again with "
                           f"hnerv-clip study --csv {path.name}")
    return runs


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its 95% confidence interval; NaN bounds for one seed."""

    values: tuple[float, ...]
    mean: float
    low: float
    high: float

    def text(self, digits: int = 3, *, sign: bool = False, unit: str = "") -> Markup:
        """`0.512 [0.490, 0.534]`."""
        return interval(self.mean, self.low, self.high, digits=digits, sign=sign, unit=unit)

    @property
    def outcome(self) -> str:
        """`above` or `below` 0 by the interval, `open` where it includes 0 or is not known."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "open"


def mean_over_seeds(values: Iterable[float]) -> Mean:
    """The mean of a seed's values each, with Student's t interval; NaN of none."""
    known = np.asarray([v for v in values if not pd.isna(v)], float)
    if len(known) == 0:
        return Mean((), math.nan, math.nan, math.nan)
    mean, reach = known.mean(), math.nan
    if len(known) > 1:
        reach = stats.t.ppf(0.975, len(known) - 1) * stats.sem(known)
    return Mean(tuple(known), float(mean), mean - reach, mean + reach)


def column_mean(runs: pd.DataFrame, column: str) -> Mean:
    """`mean_over_seeds` of a column that may be missing."""
    return mean_over_seeds(runs[column] if column in runs else [])


def groups(runs: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(video, kind, runs), videos as they come, kinds in the order of `KINDS`."""
    found = [(video, kind, runs[(runs.video == video) & (runs.kind == kind)])
             for video in runs.video.unique() for kind in KINDS]
    return [group for group in found if len(group[2])]


def paired_difference(runs: pd.DataFrame, column: str, variant: str, against: str) -> Paired | None:
    """A variant less another over the seeds that both have; None where there is no such pair."""
    if column not in runs:
        return None
    by_seed = runs.set_index("seed")
    own, other = (by_seed[by_seed.variant == name][column] for name in (variant, against))
    if (own - other).dropna().empty:
        return None
    return compare_paired(own, other)


def paired_text(found: Paired | None, digits: int = 2) -> Markup:
    """`+0.07 [+0.02, +0.12]`, empty for None."""
    return Markup("") if found is None else interval(
        found.difference, found.low, found.high, digits=digits, sign=True)


def change_words(kind: str, variant: str) -> str:
    """What a variant of the study changes, from its settings."""
    words: dict[str, Callable[[Any], str]] = {
        "patch_grid": lambda v: f"{math.prod(map(int, v.split('_')))} patches a frame",
        "clip_pool": lambda v: f"mean over {v:g} of the height",
        "clip_stage": lambda v: "read at " + (
            "all decoder stages" if v == "all" else f"decoder stage {v}"),
        "clip_loss_type": lambda v: f"{v} loss",
        "clip_jitter": lambda v: "positions moved by half their distance",
        "embed": lambda v: f"{v.rpartition('_')[2]} frequencies"}
    if variant in ("base", "pixels_only"):
        return {"base": "default head", "pixels_only": "pixels only"}[variant]
    changes = REMEDIES.get(variant) or ENCODINGS.get(kind, {}).get(variant)
    return ", ".join(words[name](value) for name, value in changes.items()) if changes else variant


def learning(runs: pd.DataFrame) -> pd.DataFrame:
    """What base runs learned of held-out frames, a row per video and kind.

    Returns:
        video, kind, given, n (seeds); Means skill, between, anywhere, over_neighbour,
        over_interpolated, centred, centred_train, psnr_train, psnr_held_out; r1, r1_chance;
        neighbour, interpolated (mean-centered cosine of what needs no network).
    """
    columns = {"skill": f"skill_{SUPERVISED}", "between": f"skill_{BETWEEN}",
               "anywhere": f"skill_{ANYWHERE}", "over_neighbour": "over_neighbour_held_out",
               "over_interpolated": "over_interpolated_held_out",
               "centred": "clip_centred_held_out", "centred_train": "clip_centred_train",
               "psnr_train": "psnr_train_db", "psnr_held_out": "psnr_held_out_db"}
    rows = [{"video": video, "kind": kind, "given": KINDS[kind], "n": len(part),
             **{name: column_mean(part, column) for name, column in columns.items()},
             **{name: part[f"{name}_held_out"].mean() for name in (
                 "r1", "r1_chance", "neighbour", "interpolated")}}
            for video, kind, part in groups(runs[runs.variant == "base"])]
    return pd.DataFrame(rows)


def comparisons(runs: pd.DataFrame, columns: dict[str, str], *, against: str,
                variants: Iterable[str]) -> pd.DataFrame:
    """Paired differences to `against`, a row per video, kind and variant that has a pair.

    Args:
        columns: {name: column}; the first decides whether there is a pair.
    Returns:
        video, kind, given, variant, change (words), n (pairs), head_values; of each name a Paired
        or None, and NAME_mean, the variant's own Mean.
    Raises:
        ResultsError: no pair.
    """
    rows = []
    for video, kind, part in groups(runs):
        for variant in variants:
            found = {name: paired_difference(part, column, variant, against)
                     for name, column in columns.items()}
            first, own = next(iter(found.values())), part[part.variant == variant]
            if first is not None:
                rows.append({
                    "video": video, "kind": kind, "given": KINDS[kind], "variant": variant,
                    "change": change_words(kind, variant), "n": first.n,
                    "head_values": own.clip_head_values.iloc[0],
                    "stored_values": own.stored_values.iloc[0], **found,
                    **{f"{name}_mean": column_mean(own, c) for name, c in columns.items()}})
    if not rows:
        raise ResultsError(f"the runs have no pair of one seed against {against}; train both with "
                           "hnerv-clip study")
    return pd.DataFrame(rows)


def heads_of(runs: pd.DataFrame) -> list[str]:
    """The variants that change the head or what it is taught at the base's λ, `base` first."""
    there = set(runs.variant)
    return [v for v in ("base", *REMEDIES, *(v for k in ENCODINGS.values() for v in k))
            if v in there]


def best_heads(rows: pd.DataFrame) -> Markup:
    """Which heads gain most skill, one short sentence in bold; then by how much, with intervals.

    Args:
        rows: of `comparisons`, of several seeds, with skill (at the supervised positions),
            anywhere and psnr. Only a gain whose interval excludes 0 counts.
    """
    short, details, base = [], [], " against the default head"
    for name, where, verb in (("skill", "at the supervised positions", " it is"),
                              ("anywhere", "anywhere in the frame", "")):
        gains = {i: found.difference for i, found in rows[name].items()
                 if found is not None and found.outcome == "higher"}
        if not gains:
            short.append(f"{where}{verb} the default head, which none beats significantly")
            continue
        best = rows.loc[max(gains, key=gains.__getitem__)]
        short.append(f"{where}{verb} “{best.change}” (PSNR {best.psnr.interval('dB')}{base})")
        base = ""  # said once
        details.append(f"{where} “{best.change}” changes skill by {paired_text(best[name], 3)}")
    text = ", ".join(short)
    return Markup(f"**{text[0].upper()}{text[1:]}.**" + (
        f" Against the default head, {', and '.join(details)}. A head is named by what it changes "
        "of the default one, see below." if details else ""))


def trade_off(runs: pd.DataFrame, video: str) -> pd.DataFrame:
    """Base runs of a hybrid network by λ and warm-up.

    Returns:
        clip_loss_weight, pixel_loss_warmup_epochs, is_base_warmup, n (seeds), setting (words);
        psnr_PART_db, clip_centred_PART (means over seeds), the same with `_seeds` (lists) and
        `_mean` (Means); cost_PART: Paired PSNR less that of pixels alone, or None.
    Raises:
        ResultsError: fewer than two settings.
    """
    runs = runs[(runs.video == video) & (runs.kind == "hybrid")]
    swept = runs[runs.variant.str.fullmatch("base|lambda_.*|warmup_.*")]
    if swept.variant.nunique() < 2:
        raise ResultsError(f"the runs of {video} have one weight λ only; train more with "
                           "hnerv-clip study --only 'bunny_hybrid_lambda_*'")
    base = swept[swept.variant == "base"]
    warmup = (base if len(base) else swept).pixel_loss_warmup_epochs.mode()[0]
    rows = []
    for (weight, epochs), part in swept.groupby(["clip_loss_weight", "pixel_loss_warmup_epochs"]):
        row = {"clip_loss_weight": weight, "pixel_loss_warmup_epochs": epochs, "n": len(part),
               "is_base_warmup": epochs == warmup,
               "setting": f"λ = {weight:g}" + ("" if epochs == warmup
                                               else f", warm-up {epochs:g}")}
        for split in ("train", "held_out"):
            for column in (f"psnr_{split}_db", f"clip_centred_{split}"):
                own = column_mean(part, column)
                row |= {column: own.mean, f"{column}_seeds": own.values, f"{column}_mean": own}
            row[f"cost_{split}"] = paired_difference(
                runs, f"psnr_{split}_db", part.variant.iloc[0], "pixels_only")
        rows.append(row)
    return pd.DataFrame(rows)


def repeated_words(swept: pd.DataFrame, folder: str | Path, name: str = "ablations.csv") -> str:
    """How far trainings of the same settings on page 5 came out alike, a sentence.

    Args:
        swept: see `trade_off`.
        folder, name: the table of page 5; "" where there is none, or it has no two such settings.
    """
    path = resolve_path(folder) / name
    if not path.exists():
        return ""
    again = pd.read_csv(path).query("kind == 'hybrid'")
    pairs = swept.merge(again, left_on=["clip_loss_weight", "pixel_loss_warmup_epochs"],
                        right_on=["clip_loss_weight", "warmup_epochs"], suffixes=("", "_again"))
    if len(pairs) < 2:
        return ""
    change = (pairs.psnr_held_out_db_again - pairs.psnr_held_out_db).abs()
    if change.max() < 0.005:
        return f"[Page 5](05_ablations.ipynb) has {len(pairs)} of these settings: equal figures."
    most = pairs.loc[change.idxmax()]
    return (f"[Page 5](05_ablations.ipynb) trained {len(pairs)} of these settings, too. "
            f"Held-out PSNR differs most for {most.setting}, "
            f"{most.psnr_held_out_db_again:.2f} dB there and {most.psnr_held_out_db:.2f} dB "
            f"here, and by at most {change.drop(change.idxmax()).max():.2f} dB for the others; one "
            "seed each.")


def pareto_optimal(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows that no other row beats in one column without losing in another."""
    values = rows[list(columns)].to_numpy(float)
    beaten = [((values >= own).all(1) & (values > own).any(1)).any() for own in values]
    return rows[~np.array(beaten)]


def teacher_labels(runs: pd.DataFrame) -> str:
    """Whose embeddings the runs learned from."""
    return ", ".join(dict.fromkeys(runs.teacher_label.dropna()))


def provenance(runs: pd.DataFrame) -> pd.DataFrame:
    """Where runs come from: number, epochs, seeds, teacher, devices, commits."""
    dirty = {"True": True, "False": False}
    commits = {commit_words({"commit": c, "dirty": dirty.get(str(d))})
               for c, d in zip(runs.commit, runs.dirty)}
    facts = {"runs": len(runs), "epochs": _listed(f"{v:.0f}" for v in runs.epochs),
             "seeds": _listed(f"{v:.0f}" for v in runs.seed), "teacher": teacher_labels(runs),
             "devices": _listed(runs.device), "commits": _listed(commits)}
    return pd.DataFrame(facts.items(), columns=["", "of the runs on this page"])


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def digests(folder: str | Path, *names: str) -> pd.DataFrame:
    """The files that a page was made from, and the beginning of their SHA-256."""
    return pd.DataFrame([{"file": f"book/results/{name}", "SHA-256": hashlib.sha256(
        (resolve_path(folder) / name).read_bytes()).hexdigest()[:12]} for name in names])
