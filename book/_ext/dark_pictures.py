"""For dark mode, a second file of each figure: dark paper, the same colors and pictures.

`book.js` shows `_images/dark-NAME` in place of `_images/NAME` where the page is dark.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

INK = "#dddddd"  # of what has no color of its own
LIGHTER = {"#0072b2": "#3d9ae0"}  # colors that are too dark for dark paper
WHITE = 238  # from where a gray level counts as paper, JPEG's ripples included
SMALLEST, FULL = 24, 0.6  # pixels a side, and share that is not paper, of what is a picture
MIDDLE = (0x7a, 0xd0)  # grays that are read on either paper
RIPPLES = 3  # pixels by which JPEG may widen a picture
# Inverts colors and turns their hue back: text, axes and lines beside pictures
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
            keep[_without_ripples(~ink, box)] = True
    turned = np.clip((255.0 - pixels) @ TURN.T, 0, 255) * 0.93 + 18
    return np.where(keep[..., None], pixels, turned.round().astype(np.uint8))


def _without_ripples(paper: np.ndarray, box: tuple[slice, slice]) -> tuple[slice, slice]:
    """A box less the outermost rows and columns that are mostly paper."""
    sides = []
    for axis, side in enumerate(box):
        lines = paper[box].mean(1 - axis) > 0.5
        first = next((i for i in range(RIPPLES) if not lines[i]), RIPPLES)
        last = next((i for i in range(RIPPLES) if not lines[-1 - i]), RIPPLES)
        sides.append(slice(side.start + first, side.stop - last))
    return sides[0], sides[1]


def darken_svg(text: str) -> str:
    """A drawing of Matplotlib's on dark paper; pictures inside it and its colors are unchanged."""
    parts = re.split(r"(<image\b[^>]*>)", text)
    parts = [part if part.startswith("<image") else _recolor(part) for part in parts]
    return "".join(parts).replace("<svg ", f'<svg fill="{INK}" ', 1)


def _recolor(part: str) -> str:
    """Black becomes light and white dark; what is gray on white is gray on dark paper, too."""
    def turned(found: re.Match) -> str:
        level = int(found[2], 16)
        if not MIDDLE[0] <= level <= MIDDLE[1]:
            level = round((255 - level) * 0.93) + 18
        return found[1] + f"#{min(level, 255):02x}" + f"{min(level, 255):02x}" * 2

    part = re.sub(r"((?:fill|stroke): ?)#([0-9a-f]{2})\2\2\b", turned, part)
    return re.sub("|".join(LIGHTER), lambda found: LIGHTER[found[0]], part)


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
            target.write_text(darken_svg(path.read_text(encoding="utf-8")), encoding="utf-8")
        elif path.suffix in (".png", ".jpg", ".jpeg"):
            pixels = darken_raster(np.asarray(Image.open(path).convert("RGB")))
            Image.fromarray(pixels).save(target, quality=88)


def setup(app) -> dict:
    """Write the files when the book is built."""
    app.connect("build-finished", write_dark_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
