"""Figures of the verification: conditions side by side, over time, tested, and what they cost."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hnerv_clip.figures.style import PALETTE, caption, new_figure
from hnerv_clip.verify.pool import Study
from hnerv_clip.verify.scores import SOURCES
from hnerv_clip.verify.verdict import name_of, p_words

MEASURES = {"clip_similarity": "raw cosine", "clip_centred": "cosine, training mean taken off"}
SPLIT_NAMES = {"train": "training", "held_out": "held-out"}
# Finer versions of a baseline have its colour, and another dash where lines are drawn.
COLOURS = {"position": "mean", "between": "neighbour", "spatial": "temporal"}
DASHES = {"position": "--", "between": "--"}
OVER_TIME = ("learned", "between", "neighbour", "position", "mean")


def short_name(condition: str) -> str:
    """A condition as an axis names it: "Learned (Your Model)" → "learned"."""
    return name_of(condition).split(" (Your")[0].lower()


def plot_conditions(scores: pd.DataFrame, teacher_label: str, source: str = "") -> Figure:
    """Cosine of every condition, raw beside centred, training above held-out frames.

    Args:
        scores: `Verification.scores`.
        teacher_label: the teacher in words, for the caption.
        source: a key of `verify.SOURCES`, for the caption.
    """
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
                              shown=OVER_TIME) -> Figure:
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


def plot_comparisons(comparisons: pd.DataFrame, teacher_label: str, source: str = "") -> Figure:
    """Centred cosine of the network minus that of every other condition, with intervals.

    Args:
        comparisons: `Verification.comparisons`.
        teacher_label, source: for the caption, as in `plot_conditions`.
    """
    order, splits = list(comparisons.over.unique()), _splits(comparisons)
    figure, panel = new_figure(height=0.4 * len(order) + 1.2)
    panel.axvline(0, color="black", linewidth=1)
    for split in splits:
        rows = comparisons[comparisons.split == split].set_index("over").reindex(order)
        places = np.arange(len(order)) + _side(split, splits)
        panel.hlines(places, rows.low, rows.high, color=PALETTE[split], linewidth=2.5)
        panel.plot(rows.difference, places, "o", color=PALETTE[split], markeredgecolor="black",
                   markeredgewidth=0.5)
        for place, row in zip(places, rows.itertuples()):
            if row.p_holm < 0.05:
                panel.annotate("✱", (row.high, place), (4, 0), textcoords="offset points",
                               va="center", fontsize=8)
    panel.set_yticks(range(len(order)), [f"over {short_name(name)}" for name in order])
    panel.invert_yaxis()
    panel.set_xlabel("centred cosine, learned minus the other")
    _split_legend(figure, splits)
    count = ", ".join(f"{rows.frames.iloc[0]:.0f} {SPLIT_NAMES[split]}"
                      for split, rows in comparisons.groupby("split", sort=False))
    return caption(figure, _words(
        "Right of zero the network is better. Bars: 95 % intervals of the mean over frames "
        f"({count}), allowing for autocorrelation; none where frames are too few. Star: better at "
        "5 % after Holm's correction over all rows of its colour.", teacher_label, source))


def plot_shift_tests(shift_tests: dict, teacher_label: str, source: str = "") -> Figure:
    """Correlation with the teacher under every shift in time, and as aligned.

    Args:
        shift_tests: `Verification.shift_tests`.
        teacher_label, source: for the caption, as in `plot_conditions`.
    """
    figure, axes = new_figure(1, len(shift_tests), height=2.8, squeeze=False)
    for panel, (split, test) in zip(axes[0], shift_tests.items()):
        span = test.null.shape[1] + 1
        shifts = (np.arange(span) + span // 2) % span - span // 2
        for null, style in zip(test.null, ("-", ":")):
            values = np.concatenate([[test.observed], null])[np.argsort(shifts)]
            panel.plot(np.sort(shifts), values, style, color=PALETTE["temporal"], linewidth=1.4)
        panel.plot(0, test.observed, "o", color=PALETTE["learned"], markeredgecolor="black",
                   markersize=7, zorder=4)
        panel.set(xlabel=f"shift ({SPLIT_NAMES[split]} frames)", ylabel="correlation")
        panel.set_title(f"{SPLIT_NAMES[split]}: {p_words(test.p)}, {test.shifts} shifts")
    return caption(figure, _words(
        "What changes over time in the prediction, mirrored at its end and shifted against the "
        "teacher by every number of frames (dotted: the other way round). The dot is the "
        "prediction as it is; it knows when things happen if it stands out.",
        teacher_label, source))


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
        "finds the right one first, and likeness of structure; dotted: by chance. Lines: 95 % "
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
        figure.colorbar(shade, ax=map_panel, label="centred cosine", shrink=0.8)
        means = scores[scores.split == split].groupby(["where", "answer"]).clip_centred.mean()
        places = [name for name in ("supervised", "between", "anywhere") if name in means]
        for shift, (kind, colour) in zip((-0.25, 0, 0.25), kinds.items()):
            panel.bar(np.arange(len(places)) + shift, [means[place, kind] for place in places],
                      width=0.24, color=colour, label=ANSWER_WORDS[kind] if split == splits[0]
                      else None)
        panel.set_xticks(range(len(places)), places)
        panel.set(ylabel="centred cosine", ylim=(min(0, means.min()) - 0.02, 1.02))
    figure.legend(loc="outside upper right", ncols=3)
    return caption(figure, _words(
        "Left: mean centred cosine at the supervised positions (circles) and half-way between. "
        "Right: the head asked at the position; its own answers at the supervised positions, "
        "interpolated; the teacher's there, interpolated. Anywhere: in the middle of 4 × 8 equal "
        "cells.", teacher_label, source))


STUDY_LINES = {"position": "--", "between": "-.", "Linear Map": ":", "Side File": "-"}
STUDY_PANELS = {"clip_centred": "centred cosine", "r1": "R@1", "cka": "CKA"}


def plot_study(study: Study, *, split: str = "held_out") -> Figure:
    """Several runs at once: seeds as dots, pooled intervals as bars, baselines as lines.

    Args:
        study: `verify_runs.join_runs`.
        split: train or held_out.
    Raises:
        ValueError: no run has frames of that split.
    """
    place = list(study.table.columns[:list(study.table.columns).index("split")])
    own = study.measures[study.measures.split == split]
    if own.empty:
        raise ValueError(f"no run of the study has {split} frames; it has "
                         f"{', '.join(study.measures.split.unique())}: use another data_split")
    videos = list(own.video.unique())
    counts = [len(own[own.video == name][place].drop_duplicates()) for name in videos]
    figure, axes = new_figure(
        len(videos), len(STUDY_PANELS), height=0.42 * sum(counts) + 0.9 * len(videos) + 0.8,
        squeeze=False, sharex="col", height_ratios=counts)
    for panels, video in zip(axes, videos):
        settings = own[own.video == video][place].drop_duplicates()
        names = [" ".join(map(str, row[1:])) for row in settings.itertuples(index=False)]
        for panel, measure in zip(panels, STUDY_PANELS):
            for row, setting in enumerate(settings.itertuples(index=False, name=None)):
                _study_row(panel, row, study, own, place, setting, split, measure)
            panel.set_yticks(range(len(names)), names if measure == "clip_centred" else [])
            panel.set_ylim(len(names) - 0.5, -0.5)
        panels[0].set_title(video)
    for panel, label in zip(axes[-1], STUDY_PANELS.values()):
        panel.set_xlabel(label)
    handles = [Line2D([], [], color="black", linestyle=style, label=short_name(name))
               for name, style in STUDY_LINES.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    seeds = study.table.seeds
    count = str(seeds.min()) if seeds.nunique() == 1 else f"{seeds.min()} to {seeds.max()}"
    return caption(figure, _words(
        f"{SPLIT_NAMES[split].capitalize()} frames: a dot a seed ({count} a row), bar: 95 % "
        "interval over frames and seeds, lines: baselines, averaged over seeds. A hybrid row is "
        "named by where the embedding comes from; through the encoder the network sees the frame.",
        study.teacher_label))


def _study_row(panel, row, study, own, place, setting, split, measure):
    def of(table):
        return table[(table[place] == list(setting)).all(axis=1) & (table.split == split)
                     & (table.measure == measure)].set_index("condition")

    pooled, seeds = of(own), of(study.seeds)
    for name, style in STUDY_LINES.items():
        if name in pooled.index:
            panel.plot([pooled["mean"][name]] * 2, [row - 0.42, row + 0.42], color="black",
                       linestyle=style, linewidth=1.2)
    learned, colour = pooled.loc["learned"], PALETTE[setting[1]]
    panel.hlines(row, learned.low, learned.high, color=colour, linewidth=5, alpha=0.4)
    values = seeds.loc[["learned"], "value"].astype(float)
    panel.plot(values, [row] * len(values), "o", color=colour, markeredgecolor="black",
               markeredgewidth=0.5)


def plot_side_files(files, head_bytes: int, learned: float, teacher_label: str,
                    frames: str = "held-out") -> Figure:
    """Similarity of stored embeddings against their bytes, beside the network's head.

    Args:
        files: table, or list of rows, with size_bytes and clip_centred, a row per budget.
        head_bytes, learned: the head's size and its centred cosine on the same frames.
        teacher_label: the teacher in words, for the caption.
        frames: which frames, for the axis.
    """
    figure, panel = new_figure(height=3.0)
    files = pd.DataFrame(files).sort_values("size_bytes")
    panel.plot(files.size_bytes / 1000, files.clip_centred, "o-", color=PALETTE["teacher"],
               label="stored: PCA, quantised, interpolated in time")
    panel.plot(head_bytes / 1000, learned, "D", color=PALETTE["learned"], markersize=8,
               markeredgecolor="black", label="network: its CLIP head")
    ticks = np.round([*files.size_bytes / 1000]).astype(int)
    panel.set(xscale="log", xlabel="kilobytes", ylabel=f"centred cosine, {frames} frames")
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()
    panel.legend(loc="best")
    return caption(figure, "What the same bytes hold without a network: the teacher's embeddings of"
                           " the training frames, compressed, and interpolated for held-out frames."
                           f" Teacher: {teacher_label}.")


def plot_simulations(shifts: pd.DataFrame, intervals: pd.DataFrame) -> Figure:
    """What the tests do on made data with a known answer.

    Args:
        shifts: `statistics.simulate_shift_test`.
        intervals: `statistics.simulate_interval`.
    """
    figure, axes = new_figure(1, 3, height=3.0)
    colours = sns.color_palette("viridis", intervals.rho.nunique())
    for effect, style in zip(sorted(shifts.effect.unique()), ("o-", "s--", "^:", "v-.")):
        rows = shifts[shifts.effect == effect]
        axes[0].errorbar(rows.rho, rows.rejected, 2 * rows.error, fmt=style, capsize=3,
                         label=f"effect {effect:g}")
    axes[0].axhline(0.05, color=PALETTE["reference"], linestyle="--", linewidth=1)
    axes[0].set(xlabel="autocorrelation ρ", ylabel="share rejected", ylim=(0, 1.03),
                title="test in time")
    for panel, column, wanted, title in ((axes[1], "covered", 0.95, "95 % interval covers"),
                                         (axes[2], "rejected", 0.05, "no effect, rejected")):
        for colour, (rho, rows) in zip(colours, intervals.groupby("rho")):
            panel.errorbar(rows.frames, rows[column], 2 * rows.error, fmt="o-", capsize=3,
                           color=colour, label=f"ρ = {rho:g}")
        panel.axhline(wanted, color=PALETTE["reference"], linestyle="--", linewidth=1)
        panel.set(xlabel="frames", xscale="log", title=title)
        panel.set_xticks(rows.frames, rows.frames)
        panel.minorticks_off()
    axes[0].legend()
    axes[2].legend()
    return caption(figure, f"Tests on {shifts.datasets.iloc[0]} and {intervals.datasets.iloc[0]} "
                           "made data sets a point, of autocorrelated series; dashed: as promised. "
                           f"Left: {shifts.frames.iloc[0]} frames, share rejected at 5 %. Bars: two"
                           " standard errors.")


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
    figure.legend(handles=handles, loc="outside upper right", ncols=2)


def _words(text, teacher_label, source=""):
    source = f" {SOURCES[source][0].upper()}{SOURCES[source][1:]}." if source else ""
    return f"{text} Teacher: {teacher_label}.{source}"
