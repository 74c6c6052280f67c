"""Embeddings at positions, computing only what those positions depend on.

The decoder is convolutions, so that an embedding of the CLIP head depends on a small window of each
stage's input: at 640×1280, eight positions take a three-hundredth of a frame's decoding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hnerv_clip.layers import UpBlock
from hnerv_clip.model import HNeRV
from hnerv_clip.patches import check_positions


@torch.inference_mode()
def clip_at(model: HNeRV, embeddings: Tensor, centres: Tensor) -> Tensor:
    """What `model.clip_at(model.stages(embeddings), centres)` returns.

    Args:
        embeddings: [B, C, h, w] per-frame embeddings.
        centres: [P, 2] (y, x) in frame pixels.
    Returns:
        [B, P, D] unit vectors, float32.
    Raises:
        ConfigError: the model has no CLIP head.
        ValueError: a position outside the frame.
    """
    head = model.need_clip_head()
    if head.clip_pool or model.config.norm == "in":
        # these look at the whole frame, or at windows that are not known here
        return head.at(model.stages(embeddings, last=head.stages[-1]), centres)
    check_positions(centres, model.frame_hw)
    return head.of_cells([features_at(model, embeddings, stage, *cells)
                          for stage, cells in zip(head.stages, head.cells(centres))])


def features_at(model: HNeRV, embeddings: Tensor, stage: int, rows: Tensor, cols: Tensor) -> Tensor:
    """A stage's features at some cells of it.

    Args:
        embeddings: [B, C, h, w].
        stage: which; 0 is the stem.
        rows, cols: int64 [P], cells of the stage.
    Returns:
        [B, C', P].
    """
    blocks, per_stage = list(model.decoder)[1:], model.config.num_blks[1]
    starts, size, plan = (rows, cols), 1, []  # backwards: the window that each block has to give
    whole = stage
    while whole > 0:
        before = list(plan)
        for block in reversed(blocks[(whole - 1) * per_stage:whole * per_stage]):
            before.append((block, starts, size))
            starts, size = _input_window(block, starts, size)
        area = model.stage_hw(whole - 1)[0] * model.stage_hw(whole - 1)[1]
        plan, whole = before, whole - 1
        if size * size * len(rows) >= area:  # from here on the whole is less
            break
    x = model.stages(embeddings, last=whole)[-1][:, :model.plan.widths[whole]]  # without padding
    hw = model.stage_hw(whole)
    x = _windows(x, starts, size, hw)  # [B·P, C, size, size]
    for block, wanted, wanted_size in reversed(plan):
        x = block.act(block.norm(F.pixel_shuffle(
            F.conv2d(x, block.conv.weight, block.conv.bias), block.stride)))
        starts = tuple((start + block.conv.padding[0]) * block.stride for start in starts)
        hw = tuple(side * block.stride for side in hw)
        x = _crop(x, tuple(w - s for w, s in zip(wanted, starts)), wanted_size, len(embeddings))
        starts = wanted
        x = x * _inside(starts, wanted_size, hw, len(embeddings)).to(x.dtype)
    return x[..., 0, 0].unflatten(0, (len(embeddings), -1)).transpose(1, 2)


def _input_window(block: UpBlock, starts: tuple[Tensor, Tensor], size: int
                  ) -> tuple[tuple[Tensor, Tensor], int]:
    """Where a block's input begins and how long it is, for windows of its output."""
    stride, reach = block.stride, block.conv.padding[0]
    longest = (size + 2 * stride - 2) // stride  # of the convolution's output, however it falls
    return tuple(start.div(stride, rounding_mode="floor") - reach for start in starts), \
        longest + 2 * reach


def _windows(x: Tensor, starts: tuple[Tensor, Tensor], size: int, hw: tuple[int, int]) -> Tensor:
    """Windows of [B, C, H, W] at P places, zero beyond its edges: [B·P, C, size, size]."""
    steps = torch.arange(size, device=x.device)
    rows, cols = (start[:, None] + steps for start in starts)  # [P, size]
    inside = ((rows >= 0) & (rows < hw[0]))[:, :, None] & ((cols >= 0) & (cols < hw[1]))[:, None]
    cut = x[:, :, rows.clamp(0, hw[0] - 1)[:, :, None], cols.clamp(0, hw[1] - 1)[:, None]]
    return (cut * inside.to(x.dtype)).transpose(1, 2).flatten(0, 1)


def _crop(x: Tensor, starts: tuple[Tensor, Tensor], size: int, frames: int) -> Tensor:
    """Each window's part that begins at its own start: [B·P, C, size, size]."""
    steps = torch.arange(size, device=x.device)
    rows, cols = ((start[:, None] + steps).repeat(frames, 1) for start in starts)
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return x[each, :, rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2)


def _inside(starts: tuple[Tensor, Tensor], size: int, hw: tuple[int, int], frames: int) -> Tensor:
    """1 where a window lies within the frame: [B·P, 1, size, size]."""
    steps = torch.arange(size, device=starts[0].device)
    rows, cols = (start[:, None] + steps for start in starts)
    inside = ((rows >= 0) & (rows < hw[0]))[:, :, None] & ((cols >= 0) & (cols < hw[1]))[:, None]
    return inside.repeat(frames, 1, 1)[:, None]
