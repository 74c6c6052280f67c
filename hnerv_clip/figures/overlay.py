"""A heat map as a picture to lay over a frame, in one color scale everywhere.

A heat map holds standard scores, see `search.rank.match_scores`. Below the range it is clear, so
that noise has no bright spot; frames lie gray beneath, so that color means heat alone.
"""

from __future__ import annotations

import matplotlib as mpl  # its colors alone: the explorer waits for it
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from PIL import Image

from hnerv_clip.labels import DISTINGUISHED

TEXT_RANGE = (DISTINGUISHED, 4.0)  # standard scores of a text among names: clear to full
REGION_RANGE = (0.5, 2.5)  # of a region among the video's own patches
STRENGTH = 0.75  # opacity at the top
GRAY = 0.6  # brightness of a frame beneath
# How far a query is answered, and nothing else
HEAT = LinearSegmentedColormap.from_list("heat", mpl.colormaps["inferno"](
    np.linspace(0.35, 1, 64)))


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
