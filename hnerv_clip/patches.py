"""Where the patches of a frame lie, and where a frame position lies in a feature map.

Positions are (y, x) in frame pixels, y down and x right. P patches of h rows and w columns cover a
frame of H rows and W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hnerv_clip.config import ConfigError, TeacherConfig, resolve_patch_grid
from hnerv_clip.sizes import choose_patch_size


@dataclass(frozen=True)
class PatchGrid:
    """Patches of one size at every pair of `tops` and `lefts`, row by row."""

    frame: tuple[int, int]  # (H, W)
    size: tuple[int, int]  # (h, w)
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows of patches."""
        return len(self.tops)

    @property
    def cols(self) -> int:
        """How many columns of patches."""
        return len(self.lefts)

    def __len__(self) -> int:
        return self.rows * self.cols

    @property
    def boxes(self) -> Tensor:
        """int64 [P, 4]: top, left, height, width."""
        return torch.tensor([(top, left, *self.size) for top in self.tops for left in self.lefts])

    @property
    def centres(self) -> Tensor:
        """float32 [P, 2]: (y, x), where a pixel's center is at its index plus one half."""
        boxes = self.boxes.float()
        return boxes[:, :2] + boxes[:, 2:] / 2

    def coverage(self) -> Tensor:
        """int64 [H, W]: how many patches each pixel lies in."""
        count = torch.zeros(self.frame, dtype=torch.int64)
        for top, left, height, width in self.boxes.tolist():
            count[top:top + height, left:left + width] += 1
        return count


def make_grid(config: TeacherConfig, frame_hw: tuple[int, int]) -> PatchGrid:
    """The patch grid of a frame.

    `patch_grid` (rows, columns) places patches evenly from edge to edge: at 640×1280, patches of
    448 at tops 0, 192 and lefts 0, 277, 555, 832; `auto` takes as many as the frame's shape asks
    for, 4×2 where it is upright. Without it the patch sweeps by `patch_stride`, and a last row or
    column flush with the edge is added where the sweep leaves a rest, so that the whole frame is
    covered.

    Raises:
        ConfigError: a patch larger than the frame, or a stride that leaves gaps.
    """
    height, width = frame_hw
    size = config.patch_size or choose_patch_size(frame_hw)
    if not 1 <= size <= min(frame_hw):
        raise ConfigError(f"patch_size={config.patch_size} is not between 1 and the shorter side "
                          f"of the frame {height}×{width}: use "
                          f"patch_size={choose_patch_size(frame_hw)}, or 0")
    counts = resolve_patch_grid(config, frame_hw)
    if counts is not None:
        tops, lefts = (_spread(length - size, count)
                       for length, count in zip(frame_hw, counts, strict=True))
    else:
        stride = config.patch_stride or max(1, size // 2)
        if not 1 <= stride <= size:
            raise ConfigError(f"patch_stride={stride} must lie between 1 and the patch size {size},"
                              f" or pixels are left out: use patch_stride={max(1, size // 2)}")
        tops, lefts = (_sweep(length - size, stride) for length in frame_hw)
    return PatchGrid(frame=(height, width), size=(size, size), tops=tops, lefts=lefts)


def _spread(last: int, count: int) -> tuple[int, ...]:
    """`count` starts from 0 to `last`, evenly; the middle where there is one only."""
    if count == 1:
        return (last // 2,)
    starts = tuple(round(last * i / (count - 1)) for i in range(count))
    if len(set(starts)) < count:
        raise ConfigError(f"patch_grid places {count} patches on {last + 1} positions, so that "
                          f"some coincide: use at most {last + 1} there, or a smaller patch_size")
    return starts


def _sweep(last: int, stride: int) -> tuple[int, ...]:
    starts = list(range(0, last + 1, stride))
    return tuple(starts if starts[-1] == last else [*starts, last])


def feature_index(centres: Tensor, frame_hw: tuple[int, int],
                  feature_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The cell of a feature map that holds each frame position.

    Args:
        centres: [P, 2] (y, x) in frame pixels.
        feature_hw: rows and columns of a feature map that spans the frame.
    Returns:
        (rows, columns), each int64 [P].
    Raises:
        ValueError: a position outside the frame.
    """
    check_positions(centres, frame_hw)
    rows, cols = (axis_cells(centres[..., i], frame_hw[i], feature_hw[i]) for i in (0, 1))
    return rows, cols


def check_positions(centres: Tensor, frame_hw: tuple[int, int]) -> None:
    """Raise ValueError where a position [..., 2] lies outside the frame."""
    if (centres < 0).any() or (centres > torch.tensor(frame_hw, device=centres.device)).any():
        raise ValueError(f"positions {centres.tolist()} must lie within the frame "
                         f"{frame_hw[0]}×{frame_hw[1]}")


def axis_cells(positions: Tensor, length: int, cells: int) -> Tensor:
    """The cell of one axis that holds each position; the far edge is in the last cell.

    Args:
        positions: [...] float, in frame pixels along the axis.
        length: pixels of the frame along it.
        cells: cells of the feature map along it.
    Returns:
        int64 [...].
    """
    return (positions * cells / length).floor().long().clamp(0, cells - 1)


def axis_shares(positions: Tensor, side: float, length: int, cells: int, *,
                frame: int | None = None) -> Tensor:
    """How much of each cell of one axis lies within `side` pixels around each position.

    Args:
        positions: [...] float, in frame pixels along the axis.
        length: pixels that the cells span.
        frame: those of them that belong to the frame, the first; all by default.
    Returns:
        [..., cells] float32 that sums to 1; what reaches beyond the frame is left out.
    """
    scale = cells / length
    end = cells if frame in (None, length) else frame * scale
    low = ((positions - side / 2) * scale).clamp(0, end)[..., None]
    high = ((positions + side / 2) * scale).clamp(0, end)[..., None]
    start = torch.arange(cells, device=positions.device)
    inside = (torch.minimum(high, start + 1) - torch.maximum(low, start)).clamp(min=0)
    return inside / inside.sum(-1, keepdim=True)


def cut_patches(frames: Tensor, grid: PatchGrid) -> Tensor:
    """Cut the patches out of frames.

    Args:
        frames: [B, 3, H, W], any type.
    Returns:
        [B, P, 3, h, w], a copy, patches row by row.
    Raises:
        ValueError: frames of another size than the grid's.
    """
    if tuple(frames.shape[-2:]) != grid.frame:
        raise ValueError(f"frames are {tuple(frames.shape)}, but the grid is for "
                         f"{grid.frame[0]}×{grid.frame[1]}")
    h, w = grid.size
    return torch.stack([frames[..., top:top + h, left:left + w]
                        for top in grid.tops for left in grid.lefts], dim=1)


def linear_weights(wanted: Tensor, known: Tensor) -> Tensor:
    """Weights of known coordinates in linear interpolation, constant beyond the first and the last.

    Args:
        wanted: [...] floating point.
        known: [K], in rising order.
    Returns:
        [..., K].
    """
    if len(known) == 1:
        return torch.ones_like(wanted)[..., None]
    left = ((wanted[..., None] >= known).sum(-1) - 1).clamp(0, len(known) - 2)
    share = ((wanted - known[left]) / (known[left + 1] - known[left])).clamp(0, 1)
    left, at = left[..., None], torch.arange(len(known), device=known.device)
    return (at == left) * (1 - share[..., None]) + (at == left + 1) * share[..., None]
