"""How the network's parameters lie in the memory that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor, nn

from hnerv_clip.engines import adan
from hnerv_clip.kernels import adam, hopper
from hnerv_clip.kernels.launch import launch
from hnerv_clip.kernels.tiles import ceil_to

STATES = {"adam": ("exp_avg", "exp_avg_sq"), "adan": adan.STATE}  # as PyTorch names them
LARGE_IMAGE = 32768  # pixels from which on a convolution keeps a Hopper GPU busy


class Parameters:
    """Flat memory of all parameters: float32 values, gradients, the optimizer's state (`STATES`),
    and bfloat16 copies."""

    ALIGN = 64

    def __init__(self, optimizer: str = "adam"):
        self.optimizer = optimizer
        self.size = 0
        self.index: dict[str, Tensor] = {}  # where a parameter's values lie, in its shape

    def add(self, name: str, index: Tensor, size: int) -> slice:
        """Reserve `size` values, those at `index` for the parameter; the rest stays 0."""
        reserved = slice(self.size, self.size + size)
        self.index[name] = index + self.size
        self.size += ceil_to(size, self.ALIGN)
        return reserved

    def add_row(self, names: list[str], sizes: list[int]) -> dict[str, slice]:
        """Vectors side by side without gaps, as one kernel sums their gradients; "" is the row."""
        start = self.size
        row = {"": slice(start, start + sum(sizes))}
        for name, size in zip(names, sizes, strict=True):
            row[name] = slice(start, start + size)
            self.index[name] = torch.arange(start, start + size)
            start += size
        self.size += ceil_to(sum(sizes), self.ALIGN)
        return row

    def allocate(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Make the arrays once all is added; parameters that nothing packs lie as they are."""
        for name, parameter in model.named_parameters():
            if name not in self.index:
                self.add(name, torch.arange(parameter.numel()).view(parameter.shape),
                         parameter.numel())
        self.model = model
        self.param, self.grad = (torch.zeros(self.size, device=device) for _ in range(2))
        self.state = {name: torch.zeros(self.size, device=device)
                      for name in STATES[self.optimizer]}
        self.param_bf16 = torch.zeros(self.size, dtype=dtype, device=device)
        self.index = {n: index.to(device) for n, index in self.index.items()}
        self.count = torch.zeros((), device=device)  # steps taken

    def load(self, states: dict[str, dict[str, Tensor]], count: float) -> None:
        """Take over the model's parameters, and its optimizer's state where it has some."""
        for name, parameter in self.model.named_parameters():
            index = self.index[name]
            self.param[index] = parameter.detach().clone()  # the CLIP head lies in it
            if name in states:
                for key, flat in self.state.items():
                    flat[index] = states[name][key]
        self.count.fill_(count)
        self.param_bf16.copy_(self.param)

    def store(self) -> dict[str, dict[str, Tensor]]:
        """Write the parameters into the model, and return the optimizer's state by their names."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.param[self.index[name]])
        return {name: {key: flat[index] for key, flat in self.state.items()}
                for name, index in self.index.items()}

    def update(self, lr: Tensor) -> None:
        """One step of the optimizer, the one that `count` names."""
        block = 1024
        kernel, betas, eps = (adam.adan_step, adan.BETAS, adan.EPS) if self.optimizer == "adan" \
            else (adam.adam_step, (0.9, 0.999), 1e-8)
        launch(kernel, (triton.cdiv(self.size, block),), self.param, self.grad,
               *self.state.values(), self.param_bf16, lr, self.count, self.size,
               **{f"BETA{i}": beta for i, beta in enumerate(betas, 1)}, EPS=eps, BLOCK=block)


@dataclass
class Conv:
    """A convolution's geometry, and where its parameters lie.

    Input [B, H, W, CI] with an edge of K//2; the output's channels are CO ≥ SH·SW·CG, shuffled to
    [B, H·SH, W·SW, CN]: CG channels are written for each pixel, CN lie in memory.
    """

    H: int
    W: int
    CI: int
    CO: int
    K: int
    weight: slice
    bias: slice
    SH: int = 1
    SW: int = 1
    CG: int = 0
    CN: int = 0
    blocked: bool = False  # by `hopper`: input, gradients and weights are channel-blocked

    @property
    def edge(self) -> int:
        return self.K // 2

    @property
    def pixels(self) -> int:
        """Of one frame, with the edge."""
        return (self.H + 2 * self.edge) * (self.W + 2 * self.edge)

    @property
    def geometry(self) -> dict[str, int]:
        return {"H": self.H, "W": self.W, "CI": self.CI, "CO": self.CO, "K": self.K}

    @property
    def shuffle(self) -> dict[str, int]:
        return {"SH": self.SH, "SW": self.SW, "CG": self.CG, "CN": self.CN}


def pack_convolution(parameters: Parameters, name: str, conv: nn.Conv2d, *, hw: tuple[int, int],
                     in_width: int, factors: tuple[int, int], blocked: bool = False) -> Conv:
    """Lay a decoder convolution out for the kernels; see `Conv`.

    Args:
        in_width: channels of the input's memory, zeros after the convolution's own.
        factors: (rows, columns) of the pixel shuffle after it.
        blocked: let `hopper` do it if it can, and if the image is large enough to be worth it.
    """
    (out, inner, K, _), (SH, SW) = conv.weight.shape, factors
    width, CI = out // (SH * SW), in_width
    CG = _shuffle_width(width, SH * SW, 16)
    blocked = blocked and K > 1 and hw[0] * hw[1] >= LARGE_IMAGE and hopper.supports(
        CI, SH * SW * CG, K, (hw[0] + K - 1, hw[1] + K - 1), CG=CG)
    if not blocked:
        CG = _shuffle_width(width, SH * SW, 8)
    CO = SH * SW * CG
    c, ij, ci, ky, kx = torch.meshgrid(*map(torch.arange, (width, SH * SW, inner, K, K)),
                                       indexing="ij")
    co = ij * CG + c
    index = ((ky * K + kx) * CI + ci) * CO + co if not blocked else \
        ((ky * CO + co // 8 * 8) * K + kx * 8) * CI + ci * 8 + co % 8
    weight = parameters.add(f"{name}.weight", index.reshape(conv.weight.shape), K * K * CI * CO)
    bias = parameters.add(f"{name}.bias", co[..., 0, 0, 0].reshape(out), CO)
    return Conv(*hw, CI, CO, K, weight, bias, SH, SW, CG, ceil_to(width, 8), blocked)


def _shuffle_width(width: int, factor: int, multiple: int) -> int:
    """Channels from `width` on of which `factor` times as many are a multiple."""
    return next(w for w in range(width, width + multiple) if factor * w % multiple == 0)


def pack_patches(parameters: Parameters, name: str, conv: nn.Conv2d, *, hw: tuple[int, int],
                 in_width: int, order: str, bias: slice | None) -> Conv:
    """Lay a convolution of kernel = stride out as a matrix [in_width, O] over patches.

    Args:
        hw: of the output.
        order: of a patch's values: "cyx" (channel first) or "yxc".
        bias: where it lies already, if so.
    """
    out, inner, K, _ = conv.weight.shape
    o, c, y, x = torch.meshgrid(*map(torch.arange, (out, inner, K, K)), indexing="ij")
    e = (c * K + y) * K + x if order == "cyx" else (y * K + x) * inner + c
    weight = parameters.add(f"{name}.weight", e * out + o, in_width * out)
    bias = bias or parameters.add(f"{name}.bias", torch.arange(out), out)
    return Conv(*hw, in_width, out, 1, weight, bias)
