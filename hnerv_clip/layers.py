"""Building blocks: ConvNeXt encoder, stem, upsampling blocks, sinusoidal encoding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": nn.ReLU, "leaky": nn.LeakyReLU, "leaky01": lambda: nn.LeakyReLU(0.1),
    "relu6": nn.ReLU6, "gelu": nn.GELU, "sin": lambda: Sine(), "swish": nn.SiLU,
    "softplus": nn.Softplus, "hardswish": nn.Hardswish,
}
NORMS = {"none": lambda width: nn.Identity(), "bn": nn.BatchNorm2d, "in": nn.InstanceNorm2d}


class Sine(nn.Module):
    """sin(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """7×7 depthwise convolution and a two-layer perceptron per pixel, residual.

    ConvNeXt (Liu et al. 2022, arXiv 2201.03545), layer scale starting at 1e-6.
    """

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        y = self.depthwise(x).permute(0, 2, 3, 1)  # [B, H, W, C]
        y = self.contract(F.gelu(self.expand(self.norm(y)))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """ConvNeXt stages: a strided convolution with a channel norm, then residual blocks."""

    def __init__(self, in_channels: int, *, strides: tuple[int, ...], widths: tuple[int, ...],
                 blocks: int):
        super().__init__()
        stages = []
        for i, (stride, width) in enumerate(zip(strides, widths, strict=True)):
            conv = nn.Conv2d(in_channels, width, stride, stride)
            norm = ChannelNorm(in_channels if i else width, eps=1e-6)
            down = [norm, conv] if i else [conv, norm]
            stages.append(nn.Sequential(*down, *(ConvNeXtBlock(width) for _ in range(blocks))))
            in_channels = width
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)


class UpBlock(nn.Module):
    """Convolution to s² times the width, pixel shuffle by s, norm, activation."""

    def __init__(self, in_width: int, width: int, *, stride: int, kernel: int, norm: str, act: str):
        super().__init__()
        self.conv = nn.Conv2d(in_width, width * stride**2, kernel, padding=(kernel - 1) // 2)
        self.stride = stride
        self.norm = NORMS[norm](width)
        self.act = ACTIVATIONS[act]()
        self.multiple = 1  # pad the width inside to a multiple of it; see HNeRV.pad_channels

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        if self.multiple > 1:
            weight, bias = pad_convolution(weight, bias, in_width=x.shape[1],
                                           multiple=self.multiple, group=self.stride**2)
        x = F.conv2d(x, weight, bias, padding=self.conv.padding)
        return self.act(self.norm(F.pixel_shuffle(x, self.stride)))


def pad_convolution(weight: Tensor, bias: Tensor, *, in_width: int, multiple: int, group: int = 1
                    ) -> tuple[Tensor, Tensor]:
    """Zeros around a convolution's channels, so that kernels made for round widths run.

    Args:
        weight, bias: [group·O, I, k, k] and [group·O].
        in_width: channels of the input, I or more.
        multiple: O is rounded up to a multiple of it.
    Returns:
        [group·O', in_width, k, k] and [group·O'].
    """
    out_width, kernel = weight.shape[0] // group, weight.shape[2]
    more_in, more_out = in_width - weight.shape[1], -out_width % multiple
    if not more_in and not more_out:
        return weight, bias
    weight = F.pad(weight.view(out_width, group, -1, kernel, kernel),
                   (0, 0, 0, 0, 0, more_in, 0, 0, 0, more_out))
    return weight.flatten(0, 1), F.pad(bias.view(out_width, group), (0, 0, 0, more_out)).flatten()


class Stem(nn.Module):
    """1×1 convolution from the embedding to the decoder's width, unfolded over (fc_h, fc_w)."""

    def __init__(self, in_channels: int, width: int, *, unfold: tuple[int, int], norm: str,
                 act: str):
        super().__init__()
        self.unfold = unfold
        out_channels = width * unfold[0] * unfold[1]
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.norm = NORMS[norm](out_channels)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, width, fc_h·h, fc_w·w]
        x = self.act(self.norm(self.conv(x)))
        if self.unfold == (1, 1):
            return x
        (b, _, h, w), (fc_h, fc_w) = x.shape, self.unfold
        x = x.view(b, -1, fc_h, fc_w, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(b, -1, fc_h * h, fc_w * w)


def sinusoids(position: Tensor, *, base: float, levels: int) -> Tensor:
    """sin and cos of π·baseⁱ·position for i < levels (NeRV, arXiv 2110.13903, equation 1).

    Args:
        position: [...] float64; the highest frequencies need the precision.
    Returns:
        [..., 2·levels] float32: all sines, then all cosines.
    """
    # Frequencies in float32 and their product with the position in float64, as the authors have it
    frequencies = (base ** torch.arange(levels, device=position.device) * math.pi).double()
    angles = position.double()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
