"""What the layers of one network share: parameters, buffers, streams, and their convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from hnerv_clip.engines.fused.layout import Conv, Parameters
from hnerv_clip.kernels import conv as conv_kernels
from hnerv_clip.kernels import hopper
from hnerv_clip.kernels.launch import launch
from hnerv_clip.kernels.tiles import (
    ceil_to,
    gradient_tile,
    product_tile,
    program_columns,
)

MAX_KERNEL = 11  # rows and columns of a convolution
NUM_SMS = 132  # streaming multiprocessors of an H100, by which work is divided
MAX_PROGRAMS = 8 * NUM_SMS  # of a sum over pixels
# SMs that a Hopper kernel leaves to the small kernels beside it: the CLIP head's and the encoder's
# backward pass
RESERVED_SMS = {"rgb_forward": 4, "rgb_backward": 4, "weight_gradient": 12}
# Streams beside the main one, with their priorities: three for sums and weight gradients, which the
# optimizer alone waits for, and the last, before all others, for the CLIP head's many small kernels
SIDE_STREAMS = {"decoder": 0, "sums": 0, "encoder": 0, "clip": -2}


def working_dtype(device: torch.device) -> torch.dtype:
    """Of activations: Triton's interpreter, on the CPU, has no bfloat16 products."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def plane(image: Tensor, blocked: bool) -> int:
    """PLANE of an image, see `kernels`."""
    return image.numel() // (8 * len(image)) if blocked else 0


def program_count(N: int, tile: int) -> int:
    """Programs, and so partial sums, for a sum over N pixels in tiles."""
    return max(1, min(MAX_PROGRAMS, triton.cdiv(N, tile)))


class Workspace:
    """The memory and the streams of one network for one batch size."""

    def __init__(self, device: torch.device, parameters: Parameters, *, batch: int, train: bool):
        self.device, self.parameters = device, parameters
        self.batch, self.train = batch, train
        self.cuda = device.type == "cuda"
        self.dtype = working_dtype(device)
        self.buffers: dict[str, Tensor] = {}
        self.partials: dict[int, Tensor] = {}  # of weight gradients, by where the weights begin
        self.streams = {name: torch.cuda.Stream(device, priority=priority)
                        for name, priority in SIDE_STREAMS.items()} if self.cuda else {}
        self.busy: set[torch.cuda.Stream] = set()

    # Memory

    def image(self, height: int, width: int, channels: int, *, edge: int, blocked: bool) -> Tensor:
        """Zeros [B, H, W, C] with edges, or channel-blocked [C / 8, B, H, W, 8]."""
        shape = (self.batch, height + 2 * edge, width + 2 * edge)
        return self.zeros_with_guard(channels // 8, *shape, 8) if blocked else \
            self.zeros_with_guard(*shape, channels)

    def zeros_with_guard(self, *shape: int) -> Tensor:
        """Zeros, with zeros before and after them: kernels read past the ends of images."""
        lines = MAX_KERNEL // 2 + 1
        guard = ceil_to((lines * max(shape[1:-1], default=1) + 1024) * shape[-1], 64)
        flat = torch.zeros(math.prod(shape) + 2 * guard, dtype=self.dtype, device=self.device)
        return flat[guard:guard + math.prod(shape)].view(shape)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer by name, made when first asked for."""
        if name not in self.buffers:
            self.buffers[name] = self.zeros_with_guard(*shape) if dtype is None else \
                torch.zeros(shape, dtype=dtype, device=self.device)
        return self.buffers[name]

    # Streams

    @contextmanager
    def side_stream(self, name: str) -> Iterator[None]:
        """What is started here runs beside the main stream, once that has come this far."""
        if not self.cuda:
            yield
            return
        stream = self.streams[name]
        self.busy.add(stream)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield

    def wait_for(self, name: str) -> None:
        """Let the main stream wait for one of those beside it."""
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_stream(self.streams[name])

    def join(self) -> None:
        """Let the main stream wait for all that runs beside it."""
        while self.busy:
            torch.cuda.current_stream(self.device).wait_stream(self.busy.pop())

    # Convolutions, by Triton or by the Hopper kernels

    def weight_gradient(self, conv: Conv, x: Tensor, dy: Tensor) -> None:
        """Weight gradient of a convolution from its input [N, CI] and its output's gradient."""
        N, run = dy.numel() // conv.CO, conv.K * conv.CI
        out = self.parameters.grad[conv.weight]
        if conv.blocked:
            macros, grid = self.hopper_grid("weight_gradient", conv)
            S = hopper.split_k(macros, grid)
        else:
            tile = gradient_tile(N, conv.CO, run)
            mt, nt = triton.cdiv(run, tile["BM"]), program_columns(conv.CO, tile)
            S = max(1, min(triton.cdiv(N, tile["BK"] * 4), NUM_SMS // (conv.K * mt * nt)))
        target = out
        if S > 1:
            key = conv.weight.start
            if key not in self.partials:
                self.partials[key] = torch.zeros(S, out.numel(), device=self.device)
            target = self.partials[key]
        if conv.blocked:
            self.launch_hopper("weight_gradient", conv, x, dy, None, target, None, N)
        else:
            launch(conv_kernels.conv_weight_gradient, (conv.K, mt, nt * S), x, dy, target, N,
                   W=conv.W, CI=conv.CI, CO=conv.CO, K=conv.K, S=S, **tile)
        if S > 1:
            torch.sum(target, 0, out=out)

    def input_gradient(self, conv: Conv, dy: Tensor, out: Tensor) -> None:
        """Gradient at a convolution's input: OUT [SPLIT, B·H·W, CI]."""
        weight, N = self.parameters.param_bf16[conv.weight], self.batch * conv.pixels
        if conv.blocked:
            self.launch_hopper("input_gradient", conv, dy, weight, None, None, out, N)
            return
        split = len(out)
        group = 2 if conv.K > 1 and (conv.W + 2 * conv.edge) % 2 == 0 else 1
        rows, columns = N // group, group * conv.CI
        tile = product_tile(rows, columns, (conv.K - 1 + group) * conv.CO, transposed=True)
        grid = (triton.cdiv(rows, tile["BM"]), program_columns(columns, tile), split)
        launch(conv_kernels.conv_input_gradient, grid, dy, weight, out, N, **conv.geometry,
               GROUP=group, SPLIT=split, **tile)

    def launch_hopper(self, op: str, conv: Conv, *values: Tensor | float | int | None,
                      **settings: int | str) -> None:
        """An operation of a convolution by `hopper`, see there."""
        macros, grid = self.hopper_grid(op, conv, **settings)
        launch(hopper.convolve, (grid,), *values, **macros)

    def hopper_grid(self, op: str, conv: Conv, **settings: int | str
                    ) -> tuple[dict[str, int | str], int]:
        """What is compiled, and how many thread blocks of it are started."""
        macros = self.hopper_macros(op, conv, **settings)
        if macros is None:
            raise RuntimeError(f"no Hopper kernel for {op} of {conv}")
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        return macros, hopper.grid_size(macros, self.batch * conv.pixels,
                                        max(1, num_sms - RESERVED_SMS.get(op, 0)))

    @staticmethod
    def hopper_macros(op: str, conv: Conv, **settings: int | str) -> dict[str, int | str] | None:
        """What `hopper` is to be compiled for, or None where it cannot do an operation."""
        from_output = op in ("input_gradient", "rgb_backward")
        xc, yc = (conv.CO, conv.CI) if from_output else (conv.CI, conv.CO)
        hw = (conv.H + 2 * conv.edge, conv.W + 2 * conv.edge)
        return hopper.choose_macros(op, xc=xc, yc=yc, kernel=conv.K, hw=hw, **settings)
