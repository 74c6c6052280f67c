"""A verification as text and as tables for reading."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd

from hnerv_clip.verify.scores import MEASURES, SOURCES, SPLIT_LABELS, Verification
from hnerv_clip.verify.verdict import name_of, p_words


def measure_table(measures: pd.DataFrame, names=tuple(MEASURES)) -> pd.DataFrame:
    """Measures for reading: a row per split and condition, cells "value [low, high]"."""
    names = [name for name in names if name in set(measures.measure)]
    chosen = measures[measures.measure.isin(names)]
    cells = chosen.assign(cell=[
        "" if np.isnan(row.value) else f"{row.value:.3g}" if np.isnan(row.low) else
        f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]" for row in chosen.itertuples()])
    table = cells.pivot_table(index=["split", "condition"], columns="measure", values="cell",
                              aggfunc="first", sort=False)[names]
    return table.rename(columns=MEASURES, index=name_of).rename_axis(columns=None).reset_index()


def comparison_table(comparisons: pd.DataFrame) -> pd.DataFrame:
    """`compare` for reading: differences, intervals, effect sizes, p after Holm's correction."""
    return pd.DataFrame([{
        "split": row.split, "over": name_of(row.over),
        "difference": f"{row.difference:.3f}" + (
            f" [{row.low:.3f}, {row.high:.3f}]" if np.isfinite(row.low) else ""),
        "effect size": f"{row.effect_size:.2f}", "frames": row.frames,
        "better": f"{row.share_better:.0%}",
        "independent frames": f"{max(row.independent, 1):.0f}" if np.isfinite(row.independent)
        else "",
        "p (Holm)": p_words(row.p_holm).removeprefix("p ").removeprefix("= ")
        if np.isfinite(row.p_holm) else "too few frames"} for row in comparisons.itertuples()])


def report_text(verification: Verification) -> str:
    """The verification as the plain table of the project's description."""
    wide, thin = "=" * 78, "-" * 78
    verdict = verification.verdict
    lines = [wide, "CLIP LEARNING VERIFICATION RESULTS", wide]
    lines += [f"Teacher: {verification.teacher_label}"] if verification.teacher_label else []
    lines += [f"Source: {SOURCES[verification.source]}"] if verification.source else []
    for split, part in verification.table.groupby("split", sort=False):
        lines += ["", f"{SPLIT_LABELS[split].capitalize()} (n = {part.n.iloc[0]} embeddings)", "",
                  f"{'Condition':<34}{'Mean':>10}{'Std':>10}{'Centred':>12}{'Std':>10}", thin]
        lines += [f"{name_of(row.condition):<34}{row.clip_similarity_mean:>10.4f}"
                  f"{row.clip_similarity_std:>10.4f}{row.clip_centred_mean:>12.4f}{row.clip_centred_std:>10.4f}"
                  for row in part.itertuples()]
        lines += [thin]
    lines += ["", "IMPROVEMENT ANALYSIS", "raw and centred difference; 95 % interval of the "
              "centred one; p after Holm's correction"]
    rows = verification.improvements.merge(verification.comparisons, on=["split", "over"])
    for row in rows.itertuples():
        tested = f"[{row.low:7.4f}, {row.high:7.4f}]  {p_words(row.p_holm)}" \
            if np.isfinite(row.p_holm) else "too few frames for a test"
        mark = "✓" if row.p_holm < 0.05 else "✗"
        lines += [f"{row.split:<9}over {name_of(row.over).lower():<26}{row.clip_similarity:>8.4f}"
                  f"{row.clip_centred:>9.4f}  {mark} {tested}"]
    for row in verification.alignment.itertuples():
        lines += [f"{row.split:<9}in time: correlation {row.observed:.3f} with what changes, "
                  f"{p_words(row.p)} of {row.shifts} shifts"]
    lines += ["", f"Overall Quality: {verdict['quality'].upper()} by raw cosine "
                  f"({verdict['clip_similarity_all']:.4f}: {verdict['quality_meaning']})"]
    if "gap" in verdict:
        lines += [f"Train-validation gap: {verdict['gap']:.4f}, {verdict['gap_band'].lower()} "
                  f"({verdict['gap_meaning']})",
                  f"Skill against the constant: {verdict['skill_train']:.4f} on training, "
                  f"{verdict['skill_held_out']:.4f} on held-out frames"]
    return "\n".join(lines + [*textwrap.wrap(verdict["honest"], 78), wide, ""])
