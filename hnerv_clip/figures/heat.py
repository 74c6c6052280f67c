"""Heat maps: where a frame answers a query, in the color scale of `overlay`."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hnerv_clip.figures.overlay import HEAT, TEXT_RANGE, lay_heat
from hnerv_clip.figures.style import (
    PALETTE,
    WIDTH,
    caption,
    new_figure,
    picture_axes,
    text_color,
)

WORDS = ("Color: how many standard deviations the text lies above the names of ImageNet's classes, "
         f"none up to {TEXT_RANGE[0]:g}, brightest from {TEXT_RANGE[1]:g} on; one scale for all.")


def plot_heat_maps(rows: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]], teacher_label: str,
                   *, boxes: dict[str, tuple[float, ...]] | None = None) -> Figure:
    """Of each query a frame, and where the network and the teacher find it, in one scale.

    Args:
        rows: {query: (frame uint8 [H, W, 3], {whose: heat map [h, w]})}; whose is `predicted` or
            `teacher`, or other words.
        teacher_label: the teacher in words, for the caption.
        boxes: {query: (x0, y0, x1, y1)} to draw on the frame, in pixels.
    """
    titles = list(dict.fromkeys(title for _, heats in rows.values() for title in heats))
    height, width = next(iter(rows.values()))[0].shape[:2]
    columns = 1 + len(titles)
    cell = 0.9 * WIDTH / columns * height / width
    figure, axes = new_figure(len(rows), columns, height=len(rows) * (cell + 0.46) + 0.1,
                              squeeze=False)
    for panels, (query, (frame, heats)) in zip(axes, rows.items(), strict=True):
        for panel in panels:
            picture_axes(panel)
        panels[0].imshow(frame)
        panels[0].set_title(f"“{query}”", fontsize=9)
        if boxes and query in boxes:
            x0, y0, x1, y1 = boxes[query]
            for color, line in (("white", 3.5), (PALETTE["predicted"], 1.8)):
                panels[0].add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False,
                                              edgecolor=color, linewidth=line))
        for panel, title in zip(panels[1:], titles):
            if title in heats:
                panel.imshow(lay_heat(frame, heats[title]))
                panel.set_title(f"{title}\nup to {heats[title].max():z.1f}", fontsize=9,
                                color=text_color(title))
    _scale(figure, axes)
    box = " Box: the best hit." if boxes else ""
    return caption(figure, f"Where each text is found, the frame gray beneath.{box} {WORDS} "
                           f"Teacher: {teacher_label}.")


def _scale(figure, axes):
    from matplotlib.cm import ScalarMappable

    shade = ScalarMappable(Normalize(*TEXT_RANGE), HEAT)
    bar = figure.colorbar(shade, ax=list(axes.flat), shrink=min(1.0, 1.6 / len(axes)), pad=0.01,
                          ticks=np.arange(TEXT_RANGE[0], TEXT_RANGE[1] + 1))
    bar.set_label("standard score", fontsize=9)
    bar.outline.set_visible(False)
