"""Heat maps: where a frame answers a query, in one color scale everywhere.

A heat map holds standard scores, see `search.maps.match_scores`. Below the range it is clear, so
that noise has no bright spot; frames lie gray beneath, so that color means heat alone.
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from hnerv_clip.figures.style import (
    INFERNO,
    PALETTE,
    WIDTH,
    caption,
    new_figure,
    picture_axes,
    text_color,
)

TEXT_RANGE = (2.0, 4.0)  # standard scores of a text among names: clear to full
REGION_RANGE = (0.5, 2.5)  # of a region among the video's own patches
STRENGTH = 0.75  # opacity at the top
GRAY = 0.6  # brightness of a frame beneath
HEAT = LinearSegmentedColormap.from_list("heat", INFERNO(np.linspace(0.35, 1, 64)))
WORDS = ("Color: how many standard deviations the text lies above the names of ImageNet's classes, "
         f"none up to {TEXT_RANGE[0]:g}, brightest from {TEXT_RANGE[1]:g} on; one scale for all.")


def heat_image(heat: np.ndarray, size: tuple[int, int], *,
               span: tuple[float, float] = TEXT_RANGE) -> np.ndarray:
    """A heat map as a picture to lay over a frame: uint8 [H, W, 4], color and opacity.

    Args:
        heat: [h, w], enlarged bilinearly.
        size: (H, W).
        span: the values that are clear and brightest.
    """
    image = Image.fromarray(np.asarray(heat, np.float32))
    image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    share = np.clip(Normalize(*span)(np.asarray(image)).data, 0, 1)
    colors = HEAT(share)
    colors[..., 3] = STRENGTH * np.sqrt(share)
    return (colors * 255).round().astype(np.uint8)


def lay_heat(frame: np.ndarray, heat: np.ndarray, *, span: tuple[float, float] = TEXT_RANGE
             ) -> np.ndarray:
    """A frame, gray and darker, with a heat map over it: uint8 [H, W, 3].

    Args:
        frame: uint8 [H, W, 3].
        heat, span: as for `heat_image`.
    """
    layer = heat_image(heat, frame.shape[:2], span=span).astype(np.float32)
    gray = (frame.astype(np.float32) @ [0.299, 0.587, 0.114] * GRAY)[..., None]
    share = layer[..., 3:] / 255
    return (gray * (1 - share) + layer[..., :3] * share).round().astype(np.uint8)


def blend_heat(frames: np.ndarray, heats: np.ndarray, *, span: tuple[float, float] = TEXT_RANGE
               ) -> np.ndarray:
    """Frames with their heat maps laid over, for a film.

    Args:
        frames: uint8 [T, 3, H, W].
        heats: [T, h, w].
        span: as for `heat_image`.
    Returns:
        uint8 [T, 3, H, W].
    Raises:
        ValueError: another number of heat maps than frames.
    """
    if len(frames) != len(heats):
        raise ValueError(f"{len(heats)} heat maps for {len(frames)} frames; give one each")
    return np.stack([np.moveaxis(lay_heat(np.moveaxis(np.asarray(frame), 0, -1), heat, span=span),
                                 -1, 0) for frame, heat in zip(frames, heats)])


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
                panel.set_title(f"{title}\nup to {heats[title].max():.1f}", fontsize=9,
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
