"""Figures of the verification: conditions side by side, and similarity over time."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hnerv_clip.figures.style import PALETTE, caption, new_figure
from hnerv_clip.verify import CONDITIONS, SOURCES

MEASURES = {"raw": "raw cosine", "centred": "cosine, training mean taken off"}
SPLIT_NAMES = {"train": "training", "val": "held-out"}
# "position" is a finer mean: the colour of "mean", drawn with another dash where lines are drawn.
CONDITION_COLOURS = {name: PALETTE["mean" if name == "position" else name] for name in CONDITIONS}
CONDITION_DASHES = {name: "--" if name == "position" else "-" for name in CONDITIONS}


def short_name(condition: str) -> str:
    """A condition as an axis names it: "Learned (Your Model)" → "learned"."""
    return CONDITIONS[condition].split(" (")[0].lower()


def plot_conditions(scores: pd.DataFrame, teacher_label: str, source: str = "") -> Figure:
    """Cosine of every condition, raw beside centred, training above held-out frames.

    Args:
        scores: `Verification.scores`.
        teacher_label: the teacher in words, for the caption.
        source: a key of `verify.SOURCES`, for the caption.
    """
    order = [name for name in CONDITIONS if name in set(scores.condition)]
    splits = [name for name in SPLIT_NAMES if name in set(scores.split)]
    figure, axes = new_figure(1, 2, height=0.55 * len(order) + 1.2, sharey=True)
    for panel, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        panel.axvline(0, color="#606060", linewidth=0.8)
        sns.violinplot(scores, x=measure, y="condition", hue="split", order=order,
                       hue_order=splits, split=len(splits) == 2, inner=None, cut=0, width=0.9,
                       density_norm="width", linewidth=0.6, ax=panel, legend=False,
                       palette=[PALETTE[name] for name in splits])
        means = scores.groupby(["condition", "split"])[measure].mean()
        for row, condition in enumerate(order):
            for split in splits:
                side = 0 if len(splits) == 1 else -0.18 if split == "train" else 0.18
                panel.plot(means[condition, split], row + side, "o", color="white",
                           markeredgecolor="black", markersize=4)
        panel.set(xlabel=label, ylabel="", xlim=(min(-0.3, scores[measure].min() - 0.03), 1.03))
    axes[0].set_yticks(range(len(order)), [short_name(name) for name in order])
    handles = [Patch(color=PALETTE[name], label=f"{SPLIT_NAMES[name]} frames")
               for name in splits]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return caption(figure, _words(
        "Similarity to the teacher of every patch of every frame; dots are means.",
        teacher_label, source))


def plot_similarity_over_time(scores: pd.DataFrame, teacher_label: str, source: str = "", *,
                              shown=("learned", "neighbour", "position", "mean")) -> Figure:
    """Mean cosine of each frame over time, with held-out frames marked.

    Args:
        scores: `Verification.scores`.
        teacher_label, source: for the caption, as in `plot_conditions`.
        shown: the conditions to draw.
    """
    figure, axes = new_figure(2, 1, height=4.6, sharex=True)
    held_out = np.sort(scores.frame[scores.split == "val"].unique())
    for panel, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        frames = scores.pivot_table(index="frame", columns="condition", values=measure)
        for condition in reversed(shown):
            front = condition == "learned"
            panel.plot(frames.index, frames[condition], CONDITION_DASHES[condition],
                       color=CONDITION_COLOURS[condition], linewidth=2 if front else 1.2,
                       zorder=3 if front else 2, label=short_name(condition))
        panel.plot(held_out, frames["learned"].reindex(held_out), "o", color=PALETTE["val"],
                   markeredgecolor="black", markeredgewidth=0.5, zorder=4,
                   label="learned, held-out frame")
        panel.set_ylabel(label.replace(", ", ",\n"))
    axes[1].axhline(0, color="#606060", linewidth=0.8)
    axes[1].set_xlabel("frame")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5)
    return caption(figure, _words(
        "Similarity to the teacher, mean over the patches of each frame.", teacher_label, source))


def _words(text, teacher_label, source=""):
    source = f" {SOURCES[source][0].upper()}{SOURCES[source][1:]}." if source else ""
    return f"{text} Teacher: {teacher_label}.{source}"
