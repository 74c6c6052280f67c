"""The RGB head on our own kernels, forward with its loss, and backward to the last layer."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hnerv_clip.engines.fused.decoder import DecoderLayers
from hnerv_clip.engines.fused.layout import Conv, Parameters
from hnerv_clip.engines.fused.workspace import NUM_SMS, Workspace, plane
from hnerv_clip.kernels import hopper, pixel_shuffle, rgb_head
from hnerv_clip.kernels.launch import launch
from hnerv_clip.kernels.tiles import power_of_two
from hnerv_clip.model import HNeRV


class RgbHead:
    """A 3×3 convolution of the last features to frames [B, 3, H, W]."""

    def __init__(self, model: HNeRV, parameters: Parameters, last: Conv, device: torch.device):
        """Lay the weights [3, 3·CN, CO] out, and where the kernels find each of them there.

        See `rgb_head.rgb_forward`, from runs of features to 4·pixel + channel, and `rgb_backward`,
        from runs of CO·pixel + channel to the features of SW pixels, row by row from the last.

        Args:
            last: the decoder's last convolution.
        """
        self.model = model
        C, SW, CG, CN = model.rgb_head.in_channels, last.SW, last.CG, last.CN
        H, W = model.plan.padded_hw
        blocked = last.blocked and hopper.supports_rgb(CN, 8, 3, (H + 2, W + 2))
        CO = 8 if blocked else 4  # channels in memory, three of them used
        k, c, y, x = torch.meshgrid(*map(torch.arange, (3, C, 3, 3)), indexing="ij")
        index = ((y * 3 + x) * CN + c) * CO + k
        weight = parameters.add("rgb_head.weight", index, 9 * CN * CO)
        bias = parameters.add("rgb_head.bias", torch.arange(3), CO)
        self.conv = Conv(H, W, CN, CO, 3, weight, bias, blocked=blocked)
        zero = 3  # a weight of an idle channel
        self.group = 2 if W % 2 == 0 else 1
        self.forward_run = power_of_two((2 + self.group) * CN)
        j = torch.arange(self.group).view(-1, 1, 1, 1, 1)
        forward = torch.full((3, self.forward_run, 16), zero)
        forward[y, (x + j) * CN + c, 4 * j + k] = index.expand(self.group, *index.shape)
        self.backward_run, self.row = power_of_two(CO * (SW + 2)), power_of_two(SW * CG)
        j = torch.arange(SW).view(-1, 1, 1, 1, 1)
        backward = torch.full((3, self.backward_run, self.row), zero)
        backward[2 - y, (2 + j - x) * CO + k, j * CG + c] = index.expand(SW, *index.shape)
        self.forward_index, self.backward_index = forward.to(device), backward.to(device)

    def allocate(self, work: Workspace, last: Conv) -> None:
        """Buffers of frames and, to train, of gradients and partial sums."""
        self.work, self.parameters, self.batch = work, work.parameters, work.batch
        H, W = self.model.plan.padded_hw
        self.pred = torch.zeros(self.batch, 3, H, W, device=work.device,
                                dtype=torch.float32 if work.train else torch.uint8)
        if not work.train:
            return
        self.dout = work.zeros_with_guard(self.batch, H + 2, W + 2, self.conv.CO)
        programs = triton.cdiv((H + 2) * (W + 2), 128 * self.group)
        if self.conv.blocked:  # sums of each warp
            programs = 16 * work.hopper_grid("rgb_forward", self.conv, mode="l2")[1]
        self.squared_error = torch.zeros(self.batch, programs, device=work.device)
        self.dbias = torch.zeros(self.batch, programs, 4 if self.conv.blocked else 16,
                                 device=work.device)
        self.scattered = torch.zeros(self.batch, last.CO, device=work.device)

    def forward(self, features: Tensor, mode: str, *, video: Tensor | None = None,
                indices: Tensor | None = None, scale: float = 0.0) -> None:
        """See `rgb_head.rgb_forward` for the modes: results in `pred`, or `squared_error`, `dout`.
        """
        H, W = self.model.plan.padded_hw
        bias, conv, p = self.model.config.out_bias, self.conv, self.parameters
        squashed = bias in ("tanh", "sigmoid")
        head, offset = bias if squashed else "add", 0.0 if squashed else float(bias)
        results = (self.dout, self.squared_error, self.dbias) if self.work.train else (None,) * 3
        if conv.blocked:
            self.work.launch_hopper(
                "rgb_forward", conv, features, p.param_bf16[conv.weight], p.param[conv.bias],
                video, indices, self.pred, *results, float(scale), self.batch * conv.pixels,
                mode=mode, head=head, OFFSET=f"{offset}f")
        else:
            launch(rgb_head.rgb_forward, (triton.cdiv((H + 2) * (W + 2), 128 * self.group),
                   self.batch), features, p.param_bf16[conv.weight][self.forward_index],
                   p.param[conv.bias], video, indices, self.pred, *results, H=H, W=W, CN=conv.CI,
                   GROUP=self.group, HEAD=head, OFFSET=offset, MODE=mode, SCALE=scale, BM=128,
                   BK=self.forward_run)
        if mode == "l2":
            with self.work.side_stream("sums"):
                torch.sum(self.dbias.view(-1, 4), 0, out=p.grad[conv.bias][:4])

    def set_gradient(self, gradient: Tensor) -> None:
        """Take a gradient [B, 3, H, W] at the convolution's output, for other losses than L2."""
        self.dout[:, 1:-1, 1:-1, :3] = gradient.permute(0, 2, 3, 1)
        self.parameters.grad[self.conv.bias][:3] = gradient.sum((0, 2, 3))

    def backward(self, decoder: DecoderLayers, *, extra: Tensor | None, gathered: Tensor | None,
                 cells: Tensor | None) -> None:
        """Gradient `dpre` of the decoder's last layer, and of its bias; see `Network.backward`."""
        last, p, work, act = decoder.convs[-1], self.parameters, self.work, decoder.act
        pre, dpre = decoder.pre[-1], decoder.dpre[-1]
        shuffle = dict(SH=last.SH, SW=last.SW, CG=last.CG)
        shape = dict(shuffle, H=last.H, W=last.W, P=last.edge, CO=last.CO,
                     PLANE=plane(dpre, last.blocked), ACT=act)
        row, settings = last.SW * last.CG, dict(shuffle, act=act, EDGE=last.edge)
        weight = p.param_bf16[self.conv.weight]
        if extra is None and self.conv.blocked and last.blocked and work.hopper_macros(
                "rgb_backward", self.conv, **settings):
            S = 16 * work.hopper_grid("rgb_backward", self.conv, **settings)[1]  # of each warp
            sums = work.buffer("dlast", S, last.SH, row, dtype=torch.float32)
            work.launch_hopper("rgb_backward", self.conv, self.dout, weight, pre, dpre, sums,
                               self.batch * self.conv.pixels, **settings)
        else:
            S = min(2 * NUM_SMS, self.batch * last.H * triton.cdiv(last.W, 64))
            sums = work.buffer("dlast", S, last.SH, self.row, dtype=torch.float32)
            launch(rgb_head.rgb_backward, (S, last.SH), self.dout, pre,
                   weight[self.backward_index], extra, dpre, sums, self.batch * last.H, **shape,
                   CN=last.CN, DC=self.conv.CO, RB=self.row, KB=self.backward_run, S=S, BM=64)
        work.wait_for("clip")  # what the CLIP head adds is there
        self.scattered.zero_()
        if gathered is not None:
            C = self.model.plan.widths[-1]
            launch(pixel_shuffle.scatter_gradient, (self.batch,), gathered, cells, pre, dpre,
                   self.scattered, len(cells), **shape, C=C, CB=power_of_two(C), num_warps=1)
        with work.side_stream("decoder"):
            bias = self.scattered.sum(0)
            bias[:last.SH * row].view(last.SH, row).add_(sums.sum(0)[:, :row])
            p.grad[last.bias].copy_(bias)
