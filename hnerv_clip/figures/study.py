"""Figures of the research questions: seeds as dots, means with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hnerv_clip.figures.style import PALETTE, caption, name_rows, new_figure, row_height

KIND_NAMES = {"hybrid": "hybrid", "xyt": "position and time", "pe": "time only"}


def plot_learning(rows: pd.DataFrame, *, teacher_label: str) -> Figure:
    """Mean-centered cosine on held-out frames, by what the network is given, a panel per video.

    Args:
        rows: video, kind, seeds (a list of values), mean, low, high (NaN for no interval),
            neighbour and interpolated (what needs no network).
    """
    videos = list(rows.video.unique())
    figure, axes = new_figure(1, len(videos), squeeze=False, sharex=True,
                              height=1.5 + 0.5 * rows.groupby("video").size().max())
    for panel, video in zip(axes[0], videos):
        part = rows[rows.video == video]
        for y, row in enumerate(part.itertuples()):
            _seeds(panel, row.seeds, y, row.low, row.high, PALETTE["predicted"])
            for value, color in [(row.neighbour, PALETTE["neighbour"]),
                                 (row.interpolated, PALETTE["teacher"])]:
                panel.plot([value, value], [y - 0.3, y + 0.3], color=color, linewidth=2)
        _name_rows(panel, [KIND_NAMES[kind] for kind in part.kind])
        panel.set_title(video, parse_math=False)
        panel.set(xlabel="mean-centered cosine, held-out frames")
    handles = [Line2D([], [], marker="o", color=PALETTE["predicted"],
                      label="the network, a dot a seed; bar: 95% interval"),
               Line2D([], [], color=PALETTE["neighbour"], label="nearest training frame"),
               Line2D([], [], color=PALETTE["teacher"], label="interpolated between them")]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8)
    return caption(figure, "Right is better; a constant scores 0. The vertical lines need the "
                           "teacher's embeddings of the training frames and no network. Teacher: "
                           f"{teacher_label}.")


def plot_differences(rows: pd.DataFrame, *, panels: dict[str, str], teacher_label: str,
                     words: str) -> Figure:
    """Differences of paired runs, seeds as dots, a row per comparison, a panel per measure.

    Args:
        rows: name, color (a key of PALETTE), and of each measure MEASURE (a list of values a
            seed), MEASURE_low and MEASURE_high.
        panels: {measure: axis label}.
        words: what is compared, for the caption.
    """
    figure, axes = new_figure(1, len(panels), sharey=True, squeeze=False,
                              height=1.3 + row_height(list(rows["name"]), 0.42) * len(rows))
    for panel, (measure, label) in zip(axes[0], panels.items()):
        panel.axvline(0, color="#606060", linewidth=0.8)
        for y, row in enumerate(rows.to_dict("records")):
            _seeds(panel, row[measure], y, row[f"{measure}_low"], row[f"{measure}_high"],
                   PALETTE[row["color"]])
        panel.set_xlabel(label.replace(", ", ",\n"))
    _name_rows(axes[0][0], list(rows["name"]))
    return caption(figure, f"{words} A dot is a pair of runs of one seed, a bar the 95% interval "
                           f"of their mean over seeds. Teacher: {teacher_label}.")


def plot_pareto(rows: pd.DataFrame, *, pixels_only: dict[str, float], teacher_label: str) -> Figure:
    """Reconstruction against semantics, a point per weight λ and warm-up, a panel per split.

    Args:
        rows: clip_loss_weight, pixel_loss_warmup_epochs, is_base_warmup, psnr_{train,held_out}_db,
            clip_centred_{train,held_out} (means over seeds), and the same with `_seeds` (lists).
        pixels_only: PSNR in dB of the network without the head, by part; may be empty.
    """
    figure, axes = new_figure(1, 2, height=3.8, sharey=True)
    parts = {"held_out": "held-out frames", "train": "training frames"}
    for panel, (part, title) in zip(axes, parts.items()):
        color = PALETTE[part]
        x, y = f"psnr_{part}_db", f"clip_centred_{part}"
        curve = rows[rows.is_base_warmup].sort_values("clip_loss_weight")
        panel.plot(curve[x], curve[y], color=color, marker="o", label="λ")
        others = rows[~rows.is_base_warmup]
        panel.plot(others[x], others[y], color=color, marker="D", linestyle="none", label="warm-up")
        for row in rows.to_dict("records"):
            panel.plot(row[f"{x}_seeds"], row[f"{y}_seeds"], ".", color=color, alpha=0.4,
                       markersize=4)
            text = f"λ {row['clip_loss_weight']:g}" if row["is_base_warmup"] else \
                f"warm-up {row['pixel_loss_warmup_epochs']:g}"
            place = {"rotation": 90, "xytext": (0, 6), "va": "bottom"} if row[  # points are near
                "is_base_warmup"] else {"xytext": (0, -6), "va": "top"}
            panel.annotate(text, (row[x], row[y]), textcoords="offset points", fontsize=8,
                           ha="center", **place)
        if np.isfinite(pixels_only.get(part, np.nan)):
            panel.axvline(pixels_only[part], color=PALETTE["pixel-only"], linestyle="--",
                          linewidth=1.2)
        panel.set(title=title, xlabel="PSNR (dB)")
        panel.margins(x=0.1, y=0.2)
        panel.xaxis.set_major_locator(MaxNLocator(5))
    axes[0].set_ylabel("mean-centered cosine")
    return caption(figure, "Up and right is better. Circles: λ at the base's warm-up; diamonds: "
                           "other warm-ups; small dots: seeds; dashed: PSNR of pixels only. "
                           f"Teacher: {teacher_label}.")


def _seeds(panel: Axes, values: Sequence[float], y: float, low: float, high: float, color: str
           ) -> None:
    """The values of the seeds at height y, and their interval, if there is one."""
    if np.isfinite([low, high]).all():
        panel.plot([low, high], [y, y], color=color, linewidth=2.5, alpha=0.45,
                   solid_capstyle="butt")
    panel.plot(values, [y] * len(values), "o", color=color, markersize=4.5)


def _name_rows(panel: Axes, names: list[str]) -> None:
    name_rows(panel, names)
    panel.set_ylim(len(names) - 0.5, -0.5)
