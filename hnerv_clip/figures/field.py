"""Figures of fields: bytes against skill, and where more parameters stop to help."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from hnerv_clip.figures.style import (
    BLACK,
    GREY,
    ORANGE,
    PALETTE,
    caption,
    name_rows,
    new_figure,
    row_height,
)

COLUMNS = {"any_held": "any box", "eight_held": "eight patches"}
BOX_LINES = {"own_boxes": ("train", "o-", "boxes fitted to, training frames"),
             "any_train": ("neighbour", "s-", "other boxes, training frames"),
             "any_held": ("held_out", "D-", "other boxes, held-out frames"),
             "any_held_smooth": ("clip", "^--", "the same, against the smoothed teacher")}


def plot_field_rate(fields: pd.DataFrame, *, baselines: pd.DataFrame, side_files: pd.DataFrame,
                    original: dict[str, dict[str, float]],
                    goals: dict[str, dict[str, float]], teacher_label: str) -> Figure:
    """Skill on held-out frames against bytes, a column of panels per video.

    Args:
        fields: video, kb, any_held, eight_held, of rounded fields.
        baselines: video, baseline, any_held, eight_held; PCA of rank R is named `PCA R …`.
        side_files: video, kb, any_held, eight_held, NaN where not asked.
        original: {video: {eight, any}}, skill of the original head.
        goals: {column: {video: skill}}.
    """
    videos = list(fields.video.unique())
    figure, axes = new_figure(2, len(videos), height=6.2, sharex=True, sharey=True, squeeze=False)
    for line, (column, words) in zip(axes, COLUMNS.items()):
        for panel, video in zip(line, videos):
            own = fields[fields.video == video].sort_values("kb")
            panel.plot(own.kb, own[column], ".", color=PALETTE["predicted"], alpha=0.45)
            front = own[own[column] >= own[column].cummax()]
            panel.plot(front.kb, front[column], "o-", color=PALETTE["predicted"])
            stored = side_files[(side_files.video == video) & side_files[column].notna()]
            panel.plot(stored.kb, stored[column], "s--", color=ORANGE, markersize=4)
            for row in baselines[baselines.video == video].itertuples():
                _reference(panel, row.baseline, getattr(row, column))
            panel.axhline(goals[column][video], color=BLACK, linestyle=":")
            known = original[video]["any" if column == "any_held" else "eight"]
            if known > 0.3:
                panel.axhline(known, color=PALETTE["clip"])
            else:
                panel.annotate(f"original head: {known:.2f}", (0.98, 0.02), ha="right",
                               xycoords="axes fraction", color=PALETTE["clip"], fontsize=8)
            panel.set_title(f"{video}, {words}", parse_math=False)
            panel.set(xscale="log", ylim=(0.3, 1.0))
            _plain_ticks(panel, (10, 20, 50, 100, 200, 500))
    for panel in axes[-1]:
        panel.set_xlabel("bytes (kB)")
    for panel in axes[:, 0]:
        panel.set_ylabel("skill, held-out frames")
    handles = [Line2D([], [], color=PALETTE["predicted"], marker="o", label="field, best so far"),
               Line2D([], [], color=ORANGE, marker="s", linestyle="--",
                      label="side file, best at its size"),
               Line2D([], [], color=PALETTE["teacher"], label="teacher, interpolated"),
               Line2D([], [], color=PALETTE["neighbour"], label="teacher, nearest frame"),
               Line2D([], [], color=GREY, linestyle="--", label="teacher, PCA of the rank"),
               Line2D([], [], color=PALETTE["clip"], label="original head"),
               Line2D([], [], color=BLACK, linestyle=":", label="goal")]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8)
    return caption(figure, "Up and left is better. A dot is one fit of one seed. A side file "
                           "stores the teacher's embeddings of some boxes and frames; what is "
                           "asked is interpolated between them. Horizontal lines need no field: "
                           "interpolated and nearest take the teacher's embedding of that box in "
                           "training frames, PCA in the frame itself. "
                           f"Teacher: {teacher_label}.")


def plot_field_limit(rows: pd.DataFrame, *, teacher_label: str) -> Figure:
    """Skill against parameters at the boxes fitted to and at others, a panel per video.

    Args:
        rows: video, params, boxes_a_frame, the same for all, own_boxes, any_train, any_held,
            any_held_smooth.
    """
    videos = list(rows.video.unique())
    figure, axes = new_figure(1, len(videos), height=3.8, sharey=True, squeeze=False)
    for panel, video in zip(axes[0], videos):
        own = rows[rows.video == video]
        for column, (color, style, words) in BOX_LINES.items():
            best = own.groupby("params", as_index=False)[column].max()
            panel.plot(best.params / 1e6, best[column], style, color=PALETTE[color], label=words)
        panel.set_title(video, parse_math=False)
        panel.set(xscale="log", xlabel="parameters of the field (millions)")
        _plain_ticks(panel, (0.1, 0.2, 0.5, 1, 2))
    axes[0][0].set_ylabel("skill")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=8)
    return caption(figure, f"Fitted to {rows.boxes_a_frame.iloc[0]:,} boxes of each frame, larger "
                           "fields meet these, not others. Smoothed: the teacher's mean over eight "
                           "boxes within 3%. Of several fits of one size, of one or more seeds, "
                           f"each line shows the best. Teacher: {teacher_label}.")


def plot_field_boxes(rows: pd.DataFrame, *, largest: pd.DataFrame, moved: pd.DataFrame,
                     goals: dict[str, float], teacher_label: str) -> Figure:
    """Skill of one field against the boxes of each frame that it was fitted to, a panel per video.

    Args:
        rows: video, boxes_a_frame, own_boxes, any_train, any_held, any_held_smooth; `largest` has
            the same columns, of the field with the highest any_held of each video.
        moved: video, pixels, skill of the teacher for a box that moves so far.
        goals: {video: skill}.
    """
    videos = list(rows.video.unique())
    figure, axes = new_figure(1, len(videos), height=4.2, sharey=True, squeeze=False)
    for panel, video in zip(axes[0], videos):
        own, best = rows[rows.video == video], largest[largest.video == video]
        for column, (color, style, words) in BOX_LINES.items():
            panel.plot(own.boxes_a_frame, own[column], style, color=PALETTE[color], label=words)
        panel.plot(best.boxes_a_frame, best.any_held, "*", color=PALETTE["held_out"], markersize=13,
                   label="largest field, other boxes, held-out frames")
        for row in moved[moved.video == video].itertuples():
            panel.axhline(row.skill, color=GREY, linestyle="--", linewidth=0.9)
            panel.annotate(f"{row.pixels} px", (1.0, row.skill), fontsize=7, color=GREY,
                           xycoords=("axes fraction", "data"), xytext=(2, -2),
                           textcoords="offset points")
        panel.axhline(goals[video], color=BLACK, linestyle=":", label="goal")
        panel.set_title(video, parse_math=False)
        panel.set(xscale="log", xlabel="boxes of each frame")
        ticks = own.boxes_a_frame.unique()
        _plain_ticks(panel, [*ticks[::max(1, round(len(ticks) / 4))], *best.boxes_a_frame])
    axes[0][0].set_ylabel("skill")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=8)
    return caption(figure, "More boxes help a field at boxes that it was not fitted to. Dashed "
                           "lines: the teacher's own skill for a test box once it moves by so many "
                           f"pixels. One seed. Teacher: {teacher_label}.")


def plot_hold_outs(rows: pd.DataFrame, *, teacher_label: str) -> Figure:
    """Skill at any box in training and in held-out frames, a panel for each hold-out.

    Args:
        rows: name, hold_out, any_train, any_held, interpolated_held; several seeds of a name are
            averaged.
    """
    names = list(rows.name.unique())
    kinds = list(rows.hold_out.unique())
    figure, axes = new_figure(1, len(kinds), sharex=True, sharey=True, squeeze=False,
                              height=1.6 + len(names) * row_height(names, 0.3))
    marks = {"any_train": ("train", "o", "training frames"),
             "any_held": ("held_out", "D", "held-out frames"),
             "interpolated_held": ("teacher", "|", "teacher, interpolated, held-out frames")}
    for panel, kind in zip(axes[0], kinds):
        own = rows[rows.hold_out == kind].groupby("name").mean(numeric_only=True)
        places = [names.index(name) for name in own.index]
        panel.hlines(places, own.any_held, own.any_train, color=GREY, linewidth=1)
        for column, (color, mark, words) in marks.items():
            panel.plot(own[column], places, mark, color=PALETTE[color], label=words, markersize=6,
                       markeredgewidth=2 if mark == "|" else None)
        panel.set_title(kind, parse_math=False)
        panel.set(xlabel="skill, any box", ylim=(len(names) - 0.5, -0.5))
    name_rows(axes[0][0], names)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=8)
    return caption(figure, "The further orange lies left of blue, the more a field loses in frames "
                           "that neither it nor its network was fitted to; the vertical mark is "
                           "what time alone allows. Small networks. "
                           f"Teacher: {teacher_label}.")


def plot_decoded(rows: pd.DataFrame, *, teacher_label: str) -> Figure:
    """Agreement with the teacher at any box against a file's rate, a panel per video.

    Args:
        rows: video, curve, frames ("train" or "held_out"), rate_bpp, centered, decoded_centered.
    """
    videos = list(rows.video.unique())
    figure, axes = new_figure(1, len(videos), height=4.2, sharey=True, squeeze=False)
    lines = {"centered": ("predicted", "field in the file"),
             "decoded_centered": ("teacher", "teacher on the file's frames")}
    marks = {"train": ("o-", None, "training frames"), "held_out": ("D--", "none", "held-out")}
    for panel, video in zip(axes[0], videos):
        own = rows[rows.video == video]
        for (_, frames), part in own.groupby(["curve", "frames"], sort=False):
            part = part.sort_values("rate_bpp")
            style, face, _ = marks[frames]
            for column, (color, _) in lines.items():
                panel.plot(part.rate_bpp, part[column], style, color=PALETTE[color],
                           markerfacecolor=face or PALETTE[color])
        panel.set_title(video, parse_math=False)
        panel.set_xlabel("bits per pixel, whole file")
    axes[0][0].set_ylabel("mean-centered cosine, any box")
    handles = [Line2D([], [], color=PALETTE[color], linewidth=3, label=words)
               for color, words in lines.values()]
    handles += [Line2D([], [], color=GREY, marker=style[0], linestyle=style[1:],
                       markerfacecolor=face or GREY, label=words)
                for style, face, words in marks.values()]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=8)
    return caption(figure, "Up is closer to the teacher on the video itself. A field reads the "
                           "file without drawing a frame; without one, the file's frames are "
                           "decoded and shown to the teacher. Held-out frames come from "
                           "interpolated embeddings, for both. Files of one training are joined"
                           + ("; points apart are of networks trained on all frames"
                              if rows.curve.str.contains("all frames").any() else "")
                           + f". Teacher: {teacher_label}.")


def _plain_ticks(panel: Axes, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.xaxis.set_minor_locator(NullLocator())


def _reference(panel: Axes, name: str, value: float) -> None:
    """A horizontal line for what needs no field, ranks of PCA by their number."""
    if not name.startswith("PCA"):
        color = PALETTE["neighbour" if name.startswith("nearest") else "teacher"]
        panel.axhline(value, color=color, linewidth=1.4)
        return
    panel.axhline(value, color=GREY, linestyle="--", linewidth=0.9)
    panel.annotate(name.split()[1], (1.0, value), xycoords=("axes fraction", "data"), fontsize=7,
                   color=GREY, xytext=(2, -2), textcoords="offset points")
