"""What `auto` means: strides, padding and patch positions for a frame of any size.

All of it depends on height and width alone, and the size of the network for `encode` on the number
of frames as well. At the sizes of HNeRV's paper it gives the paper's values: at 640×1280 strides of
5 4 4 2 2, no padding, and 2×4 patches; for 132 such frames 1.5 M values.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations_with_replacement

FACTORS, MOST_STAGES = (5, 4, 3, 2), 5
BASE_CELLS = 8  # of the embedding, as the paper's 2×4
# Cost of an embedding of four times as many cells or a quarter, in padded pixels per pixel
CELLS_COST = 0.08

VALUES_PER_PIXEL = 1.5e6 / (132 * 640 * 1280)  # of the paper's 1.5 M for Big Buck Bunny
LEAST_SIZE, MOST_SIZE = 0.1, 12.0  # millions of values that are chosen

PATCH_SHARE = 448 / 640  # side of a patch, of the frame's shorter side
PATCH_STEP = 277 / 640  # distance between patches along the longer side, likewise


@lru_cache
def _strides_by_product() -> dict[int, tuple[int, ...]]:
    """{product: strides}, largest first, ending in 2, as the fast kernels and HNeRV have them."""
    found: dict[int, tuple[int, ...]] = {}
    for count in range(MOST_STAGES):
        for others in combinations_with_replacement(FACTORS, count):
            strides = (*others, 2)
            product = math.prod(strides)
            found[product] = max(found.get(product, ()), strides)  # large steps first
    return found


def choose_strides(frame_hw: tuple[int, int], cells: int = BASE_CELLS) -> tuple[int, ...]:
    """Strides whose product pads the frame little and leaves about so many embedding cells.

    Args:
        frame_hw: height and width of a frame, in pixels.
        cells: rows times columns of the embedding.
    Returns:
        From the embedding to the frame, for example (5, 4, 4, 2, 2) at 640×1280.
    """
    def cost(product: int) -> float:
        height, width = pad_to(frame_hw, product)
        octaves = math.log2(height * width / product**2 / cells)
        return height * width / math.prod(frame_hw) + CELLS_COST * (octaves / 2)**2

    known = _strides_by_product()
    return known[min(sorted(known), key=cost)]


def choose_modelsize(frame_hw: tuple[int, int], frames: int) -> float:
    """Millions of values for a video: as many for each pixel of each frame as the paper's."""
    millions = VALUES_PER_PIXEL * frames * math.prod(frame_hw) / 1e6
    return round(min(MOST_SIZE, max(LEAST_SIZE, millions)), 3)


def pad_to(frame_hw: tuple[int, int], product: int) -> tuple[int, int]:
    """Height and width of the next multiples of a product."""
    return tuple(-(-side // product) * product for side in frame_hw)


def choose_patch_size(frame_hw: tuple[int, int]) -> int:
    """Side of a patch in pixels: 448 where the shorter side is 640, and in proportion."""
    return max(1, round(min(frame_hw) * PATCH_SHARE))


def choose_patch_grid(frame_hw: tuple[int, int], size: int) -> tuple[int, int]:
    """(rows, columns) of patches of a size that lie as close as the paper's 2×4 at 640×1280.

    Two along the shorter side, and along the longer as many as its length asks for; one where the
    patch is as long as the frame.
    """
    step = max(1, min(frame_hw) * PATCH_STEP)
    counts = []
    for side in frame_hw:
        most = max(0, side - size) + 1  # different positions
        needed = max(2, math.ceil((side - size) / step - 0.01) + 1)
        counts.append(min(most, needed))
    return tuple(counts)
