"""The decoder in fp16, as a player runs it on a GPU: several times as fast as layer by layer.

Weights are converted and padded once, and pixels are shuffled where a pixel's channels lie side by
side, so that no layer has to turn its input around.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hnerv_clip.layers import UpBlock, pad_convolution
from hnerv_clip.model import HNeRV

MULTIPLE = 8  # of a width, for tensor cores


class HalfDecoder:
    """What `model.features` gives, in fp16; extra channels at its end are zero."""

    def __init__(self, model: HNeRV, dtype: torch.dtype = torch.float16):
        self.model, self.dtype = model, dtype
        self.layers: list[tuple[UpBlock, Tensor, Tensor]] = []
        width = model.plan.widths[0]
        for block in model.decoder[1:]:
            weight, bias = pad_convolution(block.conv.weight, block.conv.bias, in_width=width,
                                           multiple=MULTIPLE, group=block.stride**2)
            # From channels × s × s, as pixels are shuffled elsewhere, to s × s × channels
            weight, bias = (t.unflatten(0, (-1, block.stride**2)).transpose(0, 1).flatten(0, 1)
                            for t in (weight, bias))
            self.layers.append((block, weight.to(dtype, memory_format=torch.channels_last),
                                bias.to(dtype)))
            width = len(bias) // block.stride**2

    @staticmethod
    def suits(model: HNeRV) -> bool:
        """Whether a zero stays zero in every layer, as padding needs it, and no norm is there."""
        return model.config.norm == "none" and model.config.act != "softplus"

    @torch.inference_mode()
    def features(self, embeddings: Tensor) -> Tensor:
        """[B, C, h, w] embeddings to the last block's output [B, n, H', W'], channels last."""
        x = self.model.decoder[0](embeddings).to(self.dtype, memory_format=torch.channels_last)
        for block, weight, bias in self.layers:
            x = block.act(F.conv2d(x, weight, bias, padding=block.conv.padding))
            x = shuffle_pixels(x, block.stride)
        return x


def shuffle_pixels(x: Tensor, stride: int) -> Tensor:
    """[B, s·s·C, H, W] to [B, C, s·H, s·W], both channels last in memory."""
    if stride == 1:
        return x
    x = x.permute(0, 2, 3, 1).unflatten(3, (stride, stride, -1))  # [B, H, W, s, s, C]
    x = x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    return x.permute(0, 3, 1, 2)
