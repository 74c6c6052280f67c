"""For dark mode, a second file of each figure with pictures in it: dark paper, the same pictures.

`book.js` shows `_images/dark-NAME` in place of `_images/NAME` where the page is dark. Drawings
without pictures need none: a style sheet inverts them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

INK = "#dddddd"  # of what has no color of its own
WHITE = 238  # from where a gray level counts as paper, JPEG's ripples included
SMALLEST, FULL = 10, 0.6  # pixels a side, and share that is not paper, of what is a picture
# Inverts colors and turns their hue back, as the style sheet does for drawings
TURN = np.array([[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]])


def darken_raster(pixels: np.ndarray) -> np.ndarray:
    """A figure on white paper, on dark paper.

    Args:
        pixels: uint8 [H, W, 3].
    Returns:
        uint8 [H, W, 3]; rectangles filled with other than white, the pictures, are unchanged.
    """
    ink = (pixels < WHITE).any(-1)
    parts, _ = ndimage.label(ink, np.ones((3, 3)))
    keep = np.zeros_like(ink)
    for i, box in enumerate(ndimage.find_objects(parts)):
        part = parts[box]
        if min(part.shape) >= SMALLEST and (part == i + 1).mean() >= FULL:
            keep[box] = True
    turned = np.clip((255.0 - pixels) @ TURN.T, 0, 255) * 0.93 + 18
    return np.where(keep[..., None], pixels, turned.round().astype(np.uint8))


def darken_svg(text: str) -> str:
    """The same for a drawing of Matplotlib's with pictures inside."""
    parts = re.split(r"(<image\b[^>]*>)", text)
    parts = [part if part.startswith("<image") else _recolor(part) for part in parts]
    return "".join(parts).replace("<svg ", f'<svg fill="{INK}" ', 1)


def _recolor(part: str) -> str:
    """Grays become what the style sheet makes of them: black light, white dark."""
    def turned(found: re.Match) -> str:
        level = round((255 - int(found[2], 16)) * 0.93) + 18
        return found[1] + f"#{min(level, 255):02x}" + f"{min(level, 255):02x}" * 2

    return re.sub(r"((?:fill|stroke): ?)#([0-9a-f]{2})\2\2\b", turned, part)


def write_dark_files(app, exception) -> None:
    """Beside each image with the class `picture` on a built page."""
    if exception or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "_images"
    for path in list(folder.glob("*")) if folder.exists() else []:
        target = path.with_name(f"dark-{path.name}")
        if path.name.startswith("dark-") or target.exists():
            continue
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            if "<image" in text:
                target.write_text(darken_svg(text), encoding="utf-8")
        elif path.suffix in (".png", ".jpg", ".jpeg"):
            pixels = darken_raster(np.asarray(Image.open(path).convert("RGB")))
            Image.fromarray(pixels).save(target, quality=88)


def setup(app) -> dict:
    """Write the files when the book is built."""
    app.connect("build-finished", write_dark_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
