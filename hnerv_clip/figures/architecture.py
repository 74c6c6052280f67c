"""The network as it is built: every number in the drawing comes from the configuration."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from ..config import Config, embed_kind
from ..model import Plan
from .style import PALETTE, new_figure, picture_axes

STEP = 1.0  # from one block to the next, in drawing units


def plot_architecture(config: Config, plan: Plan, *, frame_hw: tuple[int, int], patch_count: int,
                      sizes: dict[str, int]) -> Figure:
    """Draw the path from a frame (or its coordinates) to a frame and its patch embeddings.

    A block's height grows with the resolution of what it gives, on a logarithmic scale; under it
    stand channels and resolution.

    Args:
        plan: of the model, see `model.plan_model`.
        frame_hw: height and width of a frame, in pixels.
        patch_count: P, the patches of a frame.
        sizes: values of each part, see `HNeRV.part_sizes`.
    """
    figure, axes = new_figure(height=3.4)
    picture_axes(axes)
    x = _draw_source(axes, config, frame_hw=frame_hw)
    x, hw = _draw_embedding(axes, x, config, plan, frame_hw)
    start = x
    hw = (hw[0] * plan.unfold[0], hw[1] * plan.unfold[1])
    x = _block(axes, x, hw, plan.widths[0], "decoder", "1×1", frame_hw)
    stages = zip(config.model.dec_strds, plan.widths[1:], plan.kernels)
    for i, (stride, width, kernel) in enumerate(stages):
        hw = (hw[0] * stride, hw[1] * stride)
        x = _block(axes, x, hw, width, "decoder", f"{kernel}×{kernel}\n↑{stride}", frame_hw,
                   arrow=i < len(plan.kernels) - 1)
    _title(axes, (start + x) / 2 - STEP / 2, "decoder", sizes["decoder"])
    x = _draw_heads(axes, x, config, plan, frame_hw=frame_hw, patch_count=patch_count, sizes=sizes)
    if "encoder" in sizes and sizes["encoder"]:
        _title(axes, (STEP + start - 2 * STEP) / 2, "encoder (not stored)", sizes["encoder"])
    axes.set_xlim(-0.6, x + 0.5)
    axes.set_ylim(-2.75, 2.3)
    return figure


def _draw_source(axes: Axes, config: Config, *, frame_hw: tuple[int, int]) -> float:
    kind = embed_kind(config.model.embed)
    if kind == "hybrid":
        _block(axes, 0, frame_hw, 3, "neutral", "frame", frame_hw)
    else:
        words = "time\nt" if kind == "pe" else "grid of\n(x, y, t)"
        axes.text(0, 0, words, ha="center", va="center", fontsize=9)
        _arrow(axes, 0.75, 1.1)
        return 1.6
    return STEP


def _draw_embedding(axes: Axes, x: float, config: Config, plan: Plan, frame_hw: tuple[int, int]
                    ) -> tuple[float, tuple[int, int]]:
    kind = embed_kind(config.model.embed)
    if kind == "hybrid":
        hw, strides = frame_hw, config.model.enc_strds
        for i, stride in enumerate(strides):
            hw = (hw[0] // stride, hw[1] // stride)
            last = i == len(strides) - 1
            width = plan.embed_channels if last else int(config.model.enc_dim[0])
            x = _block(axes, x, hw, width, "embedding" if last else "encoder", f"↓{stride}",
                       frame_hw)
        axes.text(x - STEP, 1.0, "embedding", ha="center", fontsize=8)
        return x, hw
    hw = (1, 1) if kind == "pe" else config.model.fc_hw
    if kind == "xyt":
        x = _block(axes, x, hw, 2 * plan.levels, "embedding", "sinus-\noids", frame_hw)
        x = _block(axes, x, hw, plan.embed_channels, "encoder", "Conv-\nNeXt", frame_hw)
    else:
        x = _block(axes, x, hw, plan.embed_channels, "embedding", "sinus-\noids", frame_hw)
    return x, hw


def _draw_heads(axes: Axes, x: float, config: Config, plan: Plan, *, frame_hw: tuple[int, int],
                patch_count: int, sizes: dict[str, int]) -> float:
    width = plan.widths[-1]
    heads = [("rgb", f"RGB head\n3×3: {width} → 3, {config.model.out_bias}",
              f"frame\n3 · {frame_hw[0]}×{frame_hw[1]}\n(pixel loss)")]
    if config.model.predict_clip:
        heads.append(("clip", f"CLIP head, 1×1\n{width} → {2 * width} → {config.model.clip_dim}",
                      f"unit embeddings\n{patch_count} patches · {config.model.clip_dim}\n"
                      "(cosine loss)"))
    heights = [0.0] if len(heads) == 1 else [1.1, -1.1]
    for (name, words, gives), y in zip(heads, heights):
        axes.add_patch(FancyArrowPatch((x - 0.7, 0), (x - 0.2, y), arrowstyle="-|>",
                                       mutation_scale=9, color="#606060", linewidth=1))
        axes.add_patch(FancyBboxPatch((x - 0.1, y - 0.6), 2.7, 1.2, linewidth=0, alpha=0.25,
                                      boxstyle="round,pad=0.05", facecolor=PALETTE[name]))
        axes.text(x + 1.25, y, f"{words}\n{_count(sizes[f'{name}_head'])}", ha="center",
                  va="center", fontsize=8)
        _arrow(axes, x + 2.7, x + 3.1, y)
        axes.text(x + 3.2, y, gives, ha="left", va="center", fontsize=8)
    return x + 5.1


def _block(axes: Axes, x: float, hw: tuple[int, int], channels: int, part: str, words: str,
           frame_hw: tuple[int, int], *, arrow: bool = True) -> float:
    height = 0.35 + 2.6 * math.log2(1 + hw[0]) / math.log2(1 + frame_hw[0])
    width = 0.14 + 0.4 * min(1.0, channels / 80)
    face = PALETTE.get(part, "#B8B8B8")
    size = f"{hw[0]}×{hw[1]}" if hw[1] < 100 else f"{hw[0]}×\n{hw[1]}"  # else it meets the next
    axes.add_patch(Rectangle((x - width / 2, -height / 2), width, height, facecolor=face,
                             edgecolor="white", linewidth=0.5))
    axes.text(x, height / 2 + 0.08, words, ha="center", va="bottom", fontsize=8,
              linespacing=1.1)
    axes.text(x, -height / 2 - 0.08, f"{channels}\n{size}", ha="center", va="top",
              fontsize=7, linespacing=1.2)
    if arrow:
        _arrow(axes, x + 0.32, x + STEP - 0.32)
    return x + STEP


def _arrow(axes: Axes, start: float, end: float, y: float = 0.0) -> None:
    axes.add_patch(FancyArrowPatch((start, y), (end, y), arrowstyle="-|>", mutation_scale=8,
                                   color="#606060", linewidth=1, shrinkA=0, shrinkB=0))


def _title(axes: Axes, x: float, words: str, count: int) -> None:
    axes.text(x, -2.55, f"{words}: {_count(count)}", ha="center", va="bottom", fontsize=9)


def _count(values: int) -> str:
    if values >= 1e6:
        return f"{values / 1e6:.2f} M values"
    return f"{values:,} values"
