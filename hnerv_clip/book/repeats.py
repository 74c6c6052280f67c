"""Whether runs that were made twice went the same way: tables of `book/results/repeats.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hnerv_clip.book.markdown import join_words
from hnerv_clip.book.results import KINDS, change_words, read_json
from hnerv_clip.study.ablations import PAPER_EPOCHS

FILE = "repeats.json"
NEARLY_ALL, ENOUGH = 0.95, 20  # share and number of pairs, from which on commits compare


def read_repeats(folder: str | Path) -> dict[str, Any]:
    """`rows` as a table, as of `study.repeats`, `replays` (single steps with fixed weights, beside
    other work: steps, buffers and in how many of the checks some differed), and `about`."""
    found = read_json(folder, FILE, fix="git checkout book/results")
    return {**found, "rows": pd.DataFrame(found["rows"])}


def repeat_words(measured: dict[str, Any]) -> str:
    """How many repeated runs went the same way, and what the others have in common."""
    rows, replays = measured["rows"], measured["replays"]
    other = rows[~rows.same]
    said = f"{rows.same.sum()} of {len(rows)} runs ended alike, to the last digit"
    if len(other):
        apart = [f"{_name(row)} ({row.psnr_db[0]:.2f} and {row.psnr_db[1]:.2f} dB)"
                 for row in other.itertuples()]
        said += (f"; not {join_words(apart)}. Of the {rows['head'].sum()} pairs with a head "
                 f"{other['head'].sum() or 'none'} differ, of the {(~rows['head']).sum()} without "
                 f"one {(~other['head']).sum() or 'none'}")
    if not replays:
        return said
    steps, differing = (sum(row[name] for row in replays) for name in ("steps", "differing"))
    fenced = sum(row["steps"] for row in replays if row.get("fence"))
    commits = {row["device"]: dict.fromkeys(other["commit"][:7] for other in replays
                                            if other["device"] == row["device"])
               for row in replays}
    where = [f"{device}, commit{'s' if len(found) > 1 else ''} {join_words(list(found))}"
             for device, found in commits.items()]
    found = f"other bits in {differing} checks" if differing else "the same bits in every buffer"
    part = f", {fenced:,} of them with the fence named below" if fenced else ""
    return (f"{said}. With fixed weights {steps:,} further steps{part}, beside other work on the "
            f"same GPU, gave {found} ({max(row['buffers'] for row in replays)} buffers; "
            f"{join_words(where)})")


def across_commits_words(measured: dict[str, Any]) -> str:
    """How many pairs were trained at two commits, and whether pages of two commits compare."""
    rows = measured["rows"]
    across = rows[rows["first"].str["commit"].str[:7] != rows["second"].str["commit"].str[:7]]
    if across.empty:
        return ""
    return f"Of the {len(across)} pairs that were trained at two commits {across.same.sum()} " + (
        "ended alike: results of pages that name different commits can be compared."
        if across.same.mean() >= NEARLY_ALL and len(across) >= ENOUGH else "ended alike.")


def cause_words(measured: dict[str, Any]) -> str:
    """What is known of why pairs differ, and what was done about it; nothing where none does."""
    rows = measured["rows"]
    apart = rows[~rows.same]
    if apart.empty:
        return ""
    known = apart.get("same_epochs", pd.Series(np.nan, apart.index))
    since = f"only that they part after epoch {known.min():.0f} or later" if known.notna().all() \
        else "nor from which step on: not all of their folders were kept"
    tried = rows[rows.get("fence", pd.Series(None, rows.index)).notna()]  # without it, and with it
    both = (f" {tried.same.sum()} of {len(tried)} pairs, one run without that fence and one with "
            "it, ended alike, which is too few to tell whether it was the cause." if len(tried)
            else "")
    return (f"Why {len(apart)} differ is not known, {since}. One step that goes another way is "
            "enough, as later ones carry it on, also in a run that is killed and resumed. A "
            "candidate is Triton before 3.8, which compiled some of the kernels: in pipelined "
            "matrix products it leaves out the fence between a copy to shared memory and the read "
            "by the tensor cores ([pull request 9610]"
            "(https://github.com/triton-lang/triton/pull/9610)). Commits "
            "later than those of the table add it (`hnerv_clip.kernels.async_fence`)."
            f"{both}")


def repeat_rows(measured: dict[str, Any]) -> list[dict[str, str]]:
    """A row per pair of runs, those that differ first."""
    rows = measured["rows"].sort_values("same", kind="stable")
    return [{"run": _name(row), "epochs": str(row.epochs), "compared": row.compared,
             "same": "yes" if row.same else "no",
             "PSNR (dB)": f"{row.psnr_db[0]:.3f}, {row.psnr_db[1]:.3f}",
             **{words: f"{source['device'].removeprefix('NVIDIA ')}, {source['commit'][:7]}"
                for words, source in (("first", row.first), ("second", row.second))}}
            for row in rows.itertuples()]


def seed_words(measured: dict[str, Any], video: str, epochs: int) -> str:
    """What seeds of the default hybrid network cost after as many epochs; "" for fewer than two."""
    rows = measured["rows"][measured["rows"].epochs == epochs]
    psnr = dict(zip(rows.run, rows.psnr_db.str[0]))
    pairs = [(psnr[run], psnr[alone]) for run in psnr if run.startswith(f"{video}_hybrid_base_s")
             and (alone := run.replace("_base_", "_pixels_only_")) in psnr]
    if len(pairs) < 2:
        return ""
    own, costs = (join_words([f"{value:.2f}" for value in values]) for values in (
        [with_head for with_head, _ in pairs], [alone - with_head for with_head, alone in pairs]))
    return (f"{len(pairs)} seeds of the default setting were trained for {epochs} epochs, too "
            f"([page 14](14_check_fidelity.ipynb)): on training frames they reach {own} dB, "
            f"{costs} dB less than with pixels only.")


def _name(row: Any) -> str:
    """A run in words: those of the study are called `VIDEO_KIND_VARIANT_sSEED`."""
    found = re.fullmatch(rf"(.+)_({'|'.join(KINDS)})_(.+)_s(\d+)", row.run)
    if not found:
        return row.run
    video, kind, variant, seed = found.groups()
    name, _, value = variant.partition("_")
    if name == "lambda":
        words = f"λ = {value}"
    elif name == "warmup":  # in epochs of 300, see `study.plan`
        words = f"warm-up of {round(int(value) * row.epochs / PAPER_EPOCHS)} epochs"
    else:
        words = change_words(kind, variant)
    return f"{video}, {KINDS[kind]}, {words}, seed {seed}"
