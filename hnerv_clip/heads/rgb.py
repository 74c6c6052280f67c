"""The RGB head: a 3×3 convolution and an output function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnerv_clip.layers import pad_convolution


class RgbHead(nn.Conv2d):
    """Features [B, n, H', W'] to pictures [B, 3, H, W].

    Args:
        width: n, channels of the features; more of them, all zero, are ignored.
        out_bias: `tanh` and `sigmoid` give values in [0, 1]; a number is added and nothing else.
        frame_hw: (H, W) of the pictures.
        pads: the features are those of a padded frame, and H×W is their top left part; else
            features of another size are resized bilinearly.
    """

    def __init__(self, width: int, *, out_bias: str, frame_hw: tuple[int, int], pads: bool):
        super().__init__(width, 3, 3, padding=1)
        self.out_bias, self.frame_hw, self.pads = out_bias, frame_hw, pads

    def forward(self, features: Tensor) -> Tensor:
        weight, bias = pad_convolution(self.weight, self.bias, in_width=features.shape[1],
                                       multiple=1)
        x = F.conv2d(features, weight, bias, padding=1)
        x = torch.tanh(x) * 0.5 + 0.5 if self.out_bias == "tanh" else \
            torch.sigmoid(x) if self.out_bias == "sigmoid" else x + float(self.out_bias)
        if self.pads:
            x = x[..., :self.frame_hw[0], :self.frame_hw[1]]
        elif x.shape[-2:] != self.frame_hw:
            x = F.interpolate(x, size=self.frame_hw, mode="bilinear", align_corners=False)
        return x
