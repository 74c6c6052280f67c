"""The cost of a frame, counted from the plan: operations and values moved."""

from __future__ import annotations

from typing import NamedTuple

from hnerv_clip.config import ModelConfig, clip_stages, embed_kind
from hnerv_clip.model import Plan


class Layer(NamedTuple):
    """The work of one part of the network for one frame, forward."""

    part: str
    macs: int  # multiplications with an addition
    values: int  # read and written by its matrix products: their inputs and outputs


def count_work(config: ModelConfig, plan: Plan, *, frame_hw: tuple[int, int],
               patch_count: int) -> list[Layer]:
    """The cost of a frame, counted from the plan: convolutions and linear layers, widths unpadded.

    Training takes three times as much: forward, gradients of the inputs, gradients of the weights
    (an upper bound by one layer, since the frame needs no gradient). Element-wise work is left out,
    as it can be fused away, and so are weights, which are few.

    Args:
        patch_count: P, positions of the CLIP head.
    Returns:
        encoder (hybrid), coordinate_encoder (xyt), decoder, rgb_head, and clip_head where it is on.
    """
    def conv(width_in: int, width: int, kernel_area: int, cells: int, scale: int = 1
             ) -> tuple[int, int]:  # `scale`: input cells of an output cell
        return width_in * width * kernel_area * cells, (width_in * scale + width) * cells

    def blocks(width: int, cells: int) -> list[tuple[int, int]]:
        return config.num_blks[0] * [
            (7**2 * width * cells, 2 * width * cells), conv(width, 4 * width, 1, cells),
            conv(4 * width, width, 1, cells)]

    parts: dict[str, list[tuple[int, int]]] = {}
    kind = embed_kind(config.embed)
    if kind == "hybrid":
        parts["encoder"], width_in, (h, w) = [], 3, plan.padded_hw
        for i, stride in enumerate(config.enc_strds):
            last = i == len(config.enc_strds) - 1
            width = plan.embed_channels if last else int(config.enc_dim[0])
            h, w = h // stride, w // stride
            parts["encoder"] += [conv(width_in, width, stride**2, h * w, scale=stride**2),
                                 *blocks(width, h * w)]
            width_in = width
    else:
        h, w = config.fc_hw if kind == "xyt" else (1, 1)
        if kind == "xyt":
            parts["coordinate_encoder"] = [
                conv(2 * plan.levels, plan.embed_channels, 1, h * w),
                *blocks(plan.embed_channels, h * w)]
    fc_h, fc_w = plan.unfold
    decoder = [conv(plan.embed_channels, plan.widths[0] * fc_h * fc_w, 1, h * w)]
    h, w = h * fc_h, w * fc_w
    for i, stride in enumerate(config.dec_strds):
        for block in range(config.num_blks[1]):
            width_in, s = plan.widths[i + (block > 0)], 1 if block else stride
            width, kernel = plan.widths[i + 1], plan.kernels[i]
            decoder.append(conv(width_in, width * s**2, kernel**2, h * w))
            h, w = h * s, w * s
    parts["decoder"] = decoder
    width = plan.widths[-1]
    parts["rgb_head"] = [conv(width, 3, 9, h * w)]
    if config.predict_clip:
        width = sum(plan.widths[stage] for stage in clip_stages(config))
        parts["clip_head"] = [conv(width, 2 * width, 1, patch_count),
                              conv(2 * width, config.clip_dim, 1, patch_count)]
    return [Layer(part, *(sum(column) for column in zip(*layers)))
            for part, layers in parts.items()]
