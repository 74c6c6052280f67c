"""A short film of a video: original, reconstruction, and where the network finds a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from hnerv_clip.explore.video import ExploredVideo
from hnerv_clip.figures.overlay import lay_heat
from hnerv_clip.video import write_video

GAP = 4  # pixels between panels
SMOOTH = 3  # frames that a heat map of a film is the mean of


def film_panels(video: ExploredVideo, text: str) -> dict[str, np.ndarray]:
    """What the film shows, by name: original (where there is one), reconstruction, heat map.

    Heat maps are means over `SMOOTH` frames, so that a film does not flicker.

    Args:
        text: what the heat map is of; "" for none.
    Returns:
        {name: uint8 [T, H, W, 3]}.
    Raises:
        as `ExploredVideo.encode`.
    """
    count = range(len(video))
    decoded = np.stack([video.decode(i) for i in count])
    panels = {} if not video.has_original else {
        "original": np.stack([video.original(i) for i in count])}
    panels["reconstruction"] = decoded
    if text:
        query = video.encode(text)
        heats = smooth(np.stack([video.heat(query, i) for i in count]))
        panels[f"“{text}”"] = np.stack([lay_heat(frame, heat)
                                        for frame, heat in zip(decoded, heats)])
    return panels


def join_panels(panels: dict[str, np.ndarray], *, width: int = 480, tall: bool = False
                ) -> np.ndarray:
    """The frames of a film, panels side by side or, if `tall`, one below the other.

    Args:
        panels: {name: uint8 [T, H, W, 3]}; each carries its name.
        width: of a panel, in pixels.
    Returns:
        uint8 [T, h, w, 3].
    """
    rows, columns = next(iter(panels.values())).shape[1:3]
    size = (width, round(width * rows / columns / 2) * 2)
    return np.stack([_join([_panel(picture, name, size) for name, picture in zip(panels, pictures)],
                           tall=tall) for pictures in zip(*panels.values())])


def smooth(heats: np.ndarray) -> np.ndarray:
    """Means over `SMOOTH` frames of heat maps [T, h, w]; fewer at the ends."""
    reach = SMOOTH // 2
    return np.stack([heats[max(0, i - reach):i + reach + 1].mean(axis=0)
                     for i in range(len(heats))])


def write_frames(path: str | Path, frames: np.ndarray, fps: float, *, crf: int = 26) -> Path:
    """Write frames [T, h, w, 3] as H.264 in MP4."""
    return write_video(path, torch.from_numpy(frames).permute(0, 3, 1, 2), fps, crf=crf)


def _panel(picture, words, size):
    image = Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.LANCZOS)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), max(13, size[0] // 26))
    draw = ImageDraw.Draw(image, "RGBA")
    left, top, right, bottom = draw.textbbox((10, 8), words, font=font)
    draw.rounded_rectangle((left - 6, top - 4, right + 6, bottom + 4), 4, fill=(0, 0, 0, 165))
    draw.text((10, 8), words, font=font, fill="white")
    return np.asarray(image)


def _join(panels, *, tall):
    axis = 0 if tall else 1
    shape = list(panels[0].shape)
    shape[axis] = GAP
    parts = [part for panel in panels for part in (np.zeros(shape, np.uint8), panel)]
    return np.concatenate(parts[1:], axis=axis)
