"""Figures of speed: how a step's time grows, and where it goes."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from hnerv_clip.figures.style import CYCLE, PALETTE, SHADES, caption, name_rows, new_figure

DEVICES = [*SHADES[1:], *CYCLE[2:]]


def plot_rates(rows: pd.DataFrame) -> Figure:
    """Training frames a second, a bar for each engine and for other codes.

    Args:
        rows: name, clip_head, frames_per_s, own (False for other codes), device.
    """
    figure, axes = new_figure(height=1.0 + 0.3 * len(rows))
    colors = [PALETTE["learned"] if own else PALETTE["reference"] for own in rows.own]
    bars = axes.barh(range(len(rows)), rows.frames_per_s, color=colors)
    axes.bar_label(bars, [f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
                          for rate in rows.frames_per_s], padding=3, fontsize=8)
    name_rows(axes, [f"{name}, {'with' if head else 'no'} CLIP head"
                     for name, head in zip(rows["name"], rows.clip_head)])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="training frames/s")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    devices = ", ".join(dict.fromkeys(device for device in rows.device if device))
    return caption(figure, f"Blue: here, on one {devices}. Gray: other implementations as "
                           "published, on an H100. Logarithmic axis; right is better.")


def plot_growth(devices: dict[str, list[dict[str, Any]]],
                axes: dict[str, tuple[str, str]]) -> Figure:
    """Time of a training step over one thing at a time, a line for each device.

    Args:
        devices: by name, rows of `hnerv-clip bench --parts scaling`.
        axes: by axis of the rows, its label and the column of its values.
    """
    figure, panels = new_figure(2, 3, height=4.6, sharey=True)
    for panel, (axis, (label, column)) in zip(panels.flat, axes.items()):
        for rows, color in zip(devices.values(), DEVICES):
            own = sorted((row for row in rows if row["axis"] == axis), key=lambda r: r[column])
            x, y = [row[column] for row in own], [row["step_ms"] for row in own]
            low = [row["step_ms"] - row["step_ms_min"] for row in own]
            high = [row["step_ms_max"] - row["step_ms"] for row in own]
            panel.errorbar(x, y, yerr=[low, high], marker="o", color=color)
        values = sorted({row[column] for rows in devices.values() for row in rows
                         if row["axis"] == axis})
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.set_xticks(values, [f"{v / 1e6:.2g} M" if v >= 1e4 else f"{v:g}" for v in values],
                         fontsize=8)
        for label, side in zip((panel.get_xticklabels()[0], panel.get_xticklabels()[-1]),
                               ("left", "right")):  # so that they do not run into the next panel's
            label.set_ha(side)
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for panel in panels[:, 0]:
        panel.set_ylabel("step (ms)")
    for panel in panels.flat[len(axes):]:
        panel.axis("off")
    handles = [Line2D([], [], marker="o", color=color, label=name)
               for name, color in zip(devices, DEVICES)]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return caption(figure, "One thing varied at a time, each point a fresh model; whiskers from "
                           "the fastest to the slowest repeat. Both axes logarithmic.")


def plot_profile(rows: list[dict[str, Any]], *, device: str) -> Figure:
    """Where a training step's time went before the engine was optimised, and goes now.

    Args:
        rows: part, before_ms, after_ms.
    """
    figure, axes = new_figure(height=0.9 + 0.42 * len(rows))
    for offset, when, color, label in [(-0.2, "before_ms", PALETTE["reference"], "before"),
                                       (0.2, "after_ms", PALETTE["learned"], "now")]:
        axes.barh([i + offset for i in range(len(rows))], [row[when] for row in rows], height=0.38,
                  color=color, label=label)
    axes.set_yticks(range(len(rows)), [row["part"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    axes.legend()
    return caption(figure, f"Parts of one training step on {device}.")
