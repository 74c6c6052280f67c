"""Figures of the verification: conditions side by side, over time, tested, and what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hnerv_clip.figures.style import PALETTE, SHADES, caption, name_rows, new_figure
from hnerv_clip.verify.pool import Study
from hnerv_clip.verify.scores import SOURCES
from hnerv_clip.verify.verdict import MARGIN, QUESTIONS, name_of

MEASURES = {"clip_similarity": "raw cosine", "clip_centred": "mean-centered cosine"}
SHORT = {"neighbour": "nearest frame", "between": "interpolation", "side_file": "side file",
         "decoded": "decoded frame"}  # questions where there is room for a word or two
SPLIT_NAMES = {"train": "training", "held_out": "held-out"}
# Finer versions of a baseline have its color, and another dash where lines are drawn.
COLOURS = {"position": "mean", "between": "neighbour", "spatial": "temporal"}
DASHES = {"position": "--", "between": "--"}
OVER_TIME = ("learned", "between", "neighbour", "position", "mean")


def short_name(condition: str) -> str:
    """A condition as an axis names it: "Learned (Your Model)" → "learned"."""
    return condition if condition == "learned" else name_of(condition).lower()


def plot_conditions(scores: pd.DataFrame, teacher_label: str, source: str = "") -> Figure:
    """Cosine of every condition, raw beside mean-centered, training above held-out frames.

    Args:
        scores: `Verification.scores`.
        teacher_label: the teacher in words, for the caption.
        source: a key of `verify.SOURCES`, for the caption.
    """
    import seaborn as sns  # takes a second, and only this figure needs it

    order, splits = list(scores.condition.unique()), _splits(scores)
    figure, axes = new_figure(1, 2, height=0.5 * len(order) + 1.2, sharey=True)
    for panel, (measure, label) in zip(axes, MEASURES.items()):
        panel.axvline(0, color="#606060", linewidth=0.8)
        sns.violinplot(scores, x=measure, y="condition", hue="split", order=order,
                       hue_order=splits, split=len(splits) == 2, inner=None, cut=0, width=0.9,
                       density_norm="width", linewidth=0.6, ax=panel, legend=False,
                       palette=[PALETTE[name] for name in splits])
        means = scores.groupby(["condition", "split"])[measure].mean()
        for row, condition in enumerate(order):
            for split in means[condition].index:
                panel.plot(means[condition, split], row + _side(split, splits), "o", color="white",
                           markeredgecolor="black", markersize=4)
        panel.set(xlabel=label, ylabel="", xlim=(min(-0.3, scores[measure].min() - 0.03), 1.03))
    axes[0].set_yticks(range(len(order)), [short_name(name) for name in order])
    _split_legend(figure, splits)
    return caption(figure, _words(
        "Similarity to the teacher of every patch of every frame; dots are means.",
        teacher_label, source))


def plot_similarity_over_time(scores: pd.DataFrame, teacher_label: str, source: str = "", *,
                              shown: Any = OVER_TIME) -> Figure:
    """Mean cosine of each frame over time, with held-out frames marked.

    Args:
        scores: `Verification.scores`.
        teacher_label, source: for the caption, as in `plot_conditions`.
        shown: the conditions to draw.
    """
    _check_values(scores)
    figure, axes = new_figure(2, 1, height=4.6, sharex=True)
    held_out = np.sort(scores.frame[scores.split == "held_out"].unique())
    for panel, (measure, label) in zip(axes, MEASURES.items()):
        frames = scores.pivot_table(index="frame", columns="condition", values=measure)
        for condition in reversed(shown):
            front = condition == "learned"
            panel.plot(frames.index, frames[condition], DASHES.get(condition, "-"),
                       color=PALETTE[COLOURS.get(condition, condition)], zorder=3 if front else 2,
                       linewidth=2 if front else 1.2, label=short_name(condition))
        panel.plot(held_out, frames["learned"].reindex(held_out), "o", color=PALETTE["held_out"],
                   markeredgecolor="black", markeredgewidth=0.5, zorder=4,
                   label="learned, held-out frame")
        panel.set_ylabel(label.replace(", ", ",\n"))
    axes[1].axhline(0, color="#606060", linewidth=0.8)
    axes[1].set_xlabel("frame")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return caption(figure, _words(
        "Similarity to the teacher, mean over the patches of each frame.", teacher_label, source))


WIDEST = 2  # net wins as far as intervals are drawn; none can lie beyond 1, so these say nothing


def plot_answers(answers: pd.DataFrame, teacher_label: str, source: str = "") -> Figure:
    """Every question's answer: the mean of its deciding test with its interval.

    Args:
        answers: `verdict.answer_table`.
        teacher_label, source: for the caption, as in `plot_conditions`.
    """
    figure, panel = new_figure(height=0.46 * len(answers) + 1.2)
    _draw_answers(panel, answers)
    name_rows(panel, [f"{QUESTIONS[row.question][0]} {row.answer.upper()}"
                      for row in answers.itertuples()])
    panel.set_xlabel("net wins over the baseline, or correlation of changes")
    return caption(figure, _words(_answer_caption(answers.frames.iloc[0]), teacher_label, source))


def plot_judged(answers: pd.DataFrame, teacher_label: str) -> Figure:
    """`plot_answers` of several videos side by side.

    Args:
        answers: rows of `verdict.Answer`, and video; questions are drawn in their order.
        teacher_label: the teacher in words, for the caption.
    """
    videos, questions = list(answers.video.unique()), list(answers.question.unique())
    figure, axes = new_figure(1, len(videos), height=0.46 * len(questions) + 1.2, sharey=True,
                              squeeze=False)
    for panel, video in zip(axes[0], videos):
        own = answers[answers.video == video].set_index("question", drop=False).loc[questions]
        _draw_answers(panel, own)
        for place, row in enumerate(own.itertuples()):
            left = row.estimate < 0
            panel.text(row.high + 0.08 if left else row.low - 0.08, place, row.answer, va="center",
                       ha="left" if left else "right", fontsize=9)
        panel.set(title=f"{video}, {own.frames.iloc[0]} frames",
                  xlabel="net wins,\nor correlation of changes")
    name_rows(axes[0, 0], [QUESTIONS[name][0] for name in questions])
    frames = " and ".join(str(n) for n in answers.groupby("video", sort=False).frames.first())
    return caption(figure, _words(_answer_caption(frames), teacher_label))


def _answer_caption(frames):
    return ("Right of zero the network is better, or knows. Net wins: share of patches where its "
            "error is smaller less the share where it is larger. Bars: 95% intervals over "
            f"{frames} held-out frames, allowing for autocorrelation, drawn as far as "
            f"{WIDEST:g}; gray band: too small to matter.")


def _draw_answers(panel, answers):
    colours = {"yes": PALETTE["learned"], "no": PALETTE["reference"], "cannot tell": "#b0b0b0"}
    panel.axvline(0, color="black", linewidth=1)
    panel.axvspan(-MARGIN, MARGIN, color="#606060", alpha=0.15, linewidth=0)
    for place, row in enumerate(answers.itertuples()):
        colour = colours[row.answer]
        panel.hlines(place, row.low, row.high, color=colour, linewidth=2.5)
        panel.plot(row.estimate, place, "o", color=colour, markeredgecolor="black",
                   markeredgewidth=0.5)
    left, right = min(-1.1, answers.low.min() - 0.05), max(1.1, answers.high.max() + 0.05)
    panel.set(xlim=(max(left, -WIDEST), min(right, WIDEST)), ylim=(len(answers) - 0.5, -0.5))


def plot_retrieval(measures: pd.DataFrame, teacher_label: str, source: str = "", *,
                   candidates: int, near: int) -> Figure:
    """How often the right patch of the video is found first, exactly and within a few frames.

    Args:
        measures: `Verification.measures`.
        teacher_label, source: for the caption, as in `plot_conditions`.
        candidates, near: `Verification.candidates` and `near`.
    """
    order, splits = list(measures.condition.unique()), _splits(measures)
    panels = {"r1": "exact patch first", "r1_near": f"first within ±{near} frames",
              "cka": "CKA (debiased)"}
    figure, axes = new_figure(1, 3, height=0.36 * len(order) + 1.2, sharey=True)
    for panel, (measure, label) in zip(axes, panels.items()):
        own = measures[measures.measure == measure]
        for split in splits:
            rows = own[own.split == split].set_index("condition").reindex(order)
            places = np.arange(len(order)) + _side(split, splits)
            panel.barh(places, rows.value, height=0.36, color=PALETTE[split])
            panel.hlines(places, rows.low, rows.high, color="black", linewidth=1)
        panel.axvline(own.chance.mean(), color="black", linestyle=":", linewidth=1.2)
        panel.set(xlabel=label, xlim=(min(0, own.value.min() - 0.02), 1.02))
    axes[0].set_yticks(range(len(order)), [short_name(name) for name in order])
    axes[0].invert_yaxis()
    _split_legend(figure, splits)
    return caption(figure, _words(
        f"Share of patches whose embedding, looked up among the {candidates} of the whole video, "
        "finds the right one first, and likeness of structure; dotted: by chance. Lines: 95% "
        "intervals, where frames are enough and differ. No bar where an answer does not vary.",
        teacher_label, source))


ANSWER_WORDS = {"network": "the head there", "own_places": "own answers, interpolated",
                "teacher_places": "teacher's, interpolated"}


def plot_positions(scores: pd.DataFrame, teacher_label: str, source: str = "") -> Figure:
    """How well a run answers at its patches' positions, half-way between them, and anywhere.

    Args:
        scores: `positions.position_scores`.
        teacher_label, source: for the caption, as in `plot_conditions`.
    """
    splits = _splits(scores)
    figure, axes = new_figure(len(splits), 2, height=2.1 * len(splits) + 0.8, squeeze=False,
                              width_ratios=(1.5, 1))
    kinds = {"network": PALETTE["learned"], "own_places": PALETTE["encoder"],
             "teacher_places": PALETTE["teacher"]}
    network = scores[scores.answer == "network"]
    maps = network[network["where"] != "anywhere"].pivot_table(
        index=["split", "y"], columns="x", values="clip_centred")
    low, high = maps.min(axis=None), maps.max(axis=None)
    for (map_panel, panel), split in zip(axes, splits):
        shade = map_panel.pcolormesh(maps.columns, maps.loc[split].index, maps.loc[split],
                                     vmin=low, vmax=high, shading="nearest")
        known = network[(network["where"] == "supervised") & (network.split == split)]
        map_panel.plot(known.x, known.y, "o", color="white", markeredgecolor="black")
        map_panel.set(xlabel="x (pixels)", ylabel="y (pixels)", aspect="equal")
        map_panel.invert_yaxis()
        map_panel.grid(False)
        map_panel.set_title(f"network, {SPLIT_NAMES[split]} frames")
        figure.colorbar(shade, ax=map_panel, label="mean-centered cosine", shrink=0.8)
        means = scores[scores.split == split].groupby(["where", "answer"]).clip_centred.mean()
        places = [name for name in ("supervised", "between", "anywhere") if name in means]
        for shift, (kind, colour) in zip((-0.25, 0, 0.25), kinds.items()):
            panel.bar(np.arange(len(places)) + shift, [means[place, kind] for place in places],
                      width=0.24, color=colour, label=ANSWER_WORDS[kind] if split == splits[0]
                      else None)
        panel.set_xticks(range(len(places)), places)
        panel.set(ylabel="mean-centered cosine", ylim=(min(0, means.min()) - 0.02, 1.02))
    figure.legend(loc="outside upper left", ncols=3)
    return caption(figure, _words(
        "Left: mean-centered cosine at the supervised positions (circles) and half-way between. "
        "Right: the head asked at the position; its own answers at the supervised positions, "
        "interpolated; the teacher's there, interpolated. Anywhere: in the middle of 4 × 8 equal "
        "cells.", teacher_label, source))


def plot_study(study: Study) -> Figure:
    """The answers of several groups of runs side by side.

    Args:
        study: `pool.join_runs`.
    Raises:
        ValueError: no run held a frame out.
    """
    if study.answers.empty:
        raise ValueError("no run of the study held a frame out: use another data_split")
    keys = list(study.answers.columns[:study.answers.columns.get_loc("question")])
    groups = list(study.answers.groupby(keys, sort=False))
    questions = list(dict.fromkeys(study.answers.question))
    codes = {"no": 0, "cannot tell": 1, "yes": 2}
    grid = np.full((len(groups), len(questions)), np.nan)
    figure, panel = new_figure(height=0.5 * len(groups) + 2.2)
    for row, (_, part) in enumerate(groups):
        for found in part.itertuples():
            column = questions.index(found.question)
            grid[row, column] = codes[found.answer]
            panel.text(column, row, f"{found.answer}\n{found.estimate:.2f}", ha="center",
                       va="center", fontsize=7)
    panel.imshow(grid, cmap="RdYlGn", vmin=-1, vmax=3, aspect="auto", alpha=0.6)
    panel.set_xticks(range(len(questions)), [name.replace("_", " ") for name in questions],
                     rotation=30, ha="right")
    panel.set_yticks(range(len(groups)), [
        " ".join(map(str, key[:-2])) + f" ({key[-1]} runs)" for key, _ in groups])
    panel.grid(False)
    return caption(figure, _words("Every group of runs, pooled over phases and seeds: the answer "
                                  "to each question, and the mean of its deciding test.",
                                  study.teacher_label))


def plot_side_files(files: Any, head_bytes: int, learned: float, teacher_label: str,
                    frames: str = "held-out") -> Figure:
    """Similarity of stored embeddings against their bytes, beside the network's head.

    Args:
        files: table, or list of rows, with size_bytes and clip_centred, a row per budget.
        head_bytes, learned: the head's size and its mean-centered cosine on the same frames.
        teacher_label: the teacher in words, for the caption.
        frames: which frames, for the axis.
    """
    figure, panel = new_figure(height=3.0)
    files = pd.DataFrame(files).sort_values("size_bytes")
    panel.plot(files.size_bytes / 1000, files.clip_centred, "o-", color=PALETTE["teacher"],
               label="stored: PCA, quantized, interpolated in time")
    panel.plot(head_bytes / 1000, learned, "D", color=PALETTE["learned"], markersize=8,
               markeredgecolor="black", label="network: its CLIP head")
    ticks = np.round([*files.size_bytes / 1000]).astype(int)
    panel.set(xscale="log", xlabel="kilobytes", ylabel=f"mean-centered cosine, {frames} frames")
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()
    panel.legend(loc="best")
    return caption(figure, "What the same bytes hold without a network: the teacher's embeddings of"
                           " the training frames, compressed, and interpolated for held-out frames."
                           f" Teacher: {teacher_label}.")


def plot_calibration(planted: pd.DataFrame) -> Figure:
    """How often each question is answered yes on simulated data.

    Args:
        planted: `simulation.simulate_all`.
    """
    figure, axes = new_figure(1, 2, height=3.3)
    designs, questions = list(planted.design.unique()), list(planted.question.unique())
    for panel, kind, wanted, title in ((axes[0], "null", 0.05, "data without an effect"),
                                       (axes[1], "truth", 0.9, "data with an effect")):
        rows = planted[planted.kind == kind]
        column = "rejected" if kind == "null" else "yes"
        worst = rows.groupby(["design", "question"])[column].agg("max" if kind == "null" else "min")
        for shift, design, color in zip(np.linspace(-0.25, 0.25, len(designs)), designs, SHADES):
            panel.bar(np.arange(len(questions)) + shift,
                      [worst.get((design, name), np.nan) for name in questions],
                      width=0.5 / len(designs), label=design, color=color)
        panel.axhline(wanted, color=PALETTE["reference"], linestyle="--", linewidth=1)
        panel.set_xticks(range(len(questions)), [SHORT.get(name, name) for name in questions],
                         rotation=30, ha="right")
        panel.set_title(title)
    axes[0].set_ylabel("largest share of p ≤ 5%, uncorrected")
    axes[1].set_ylabel("smallest share answered yes")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return caption(figure, "The worst case of each question; "
                           f"{planted.datasets.min():,} or more simulated data sets each. "
                           "Left, before Holm's correction: a wrong yes is rarer. "
                           "Dashed: at most 5%, at least 90%.")


def _splits(table):
    _check_values(table)
    return [name for name in SPLIT_NAMES if name in set(table.split)]


def _check_values(table):
    """Raise ValueError where a value to draw is missing."""
    for column in {"clip_similarity", "clip_centred", "difference"}.intersection(table):
        if table[column].isna().any():
            row = table[table[column].isna()].iloc[0].to_dict()
            raise ValueError(f"{column} is NaN, first in the row {row}: look for empty or NaN "
                             "embeddings")


def _side(split, splits):
    """Where a row's part for this split stands: above its middle, or below."""
    return 0 if len(splits) == 1 else -0.19 if split == "train" else 0.19


def _split_legend(figure, splits):
    handles = [Patch(color=PALETTE[name], label=f"{SPLIT_NAMES[name]} frames") for name in splits]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)


def _words(text, teacher_label, source=""):
    source = f" {SOURCES[source][0].upper()}{SOURCES[source][1:]}." if source else ""
    return f"{text} Teacher: {teacher_label}.{source}"
