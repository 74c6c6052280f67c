"""The encoder's ConvNeXt stages on our own kernels, forward and backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn

from hnerv_clip.engines.fused.layout import Conv, Parameters, pack_patches
from hnerv_clip.engines.fused.workspace import Workspace
from hnerv_clip.kernels import conv as conv_kernels
from hnerv_clip.kernels import convnext, depthwise_conv
from hnerv_clip.kernels.launch import launch
from hnerv_clip.kernels.tiles import ceil_to, power_of_two, product_tile, program_columns
from hnerv_clip.model import HNeRV


class EncoderLayers:
    """`encoder` or `coordinate_encoder` of a model; without stages where it has neither."""

    def __init__(self, model: HNeRV, parameters: Parameters):
        """Lay the parameters out."""
        self.model = model
        self.stages: list[tuple[Conv, str, list[str]]] = []  # (downsampling, its norm, blocks)
        self.vectors: dict[str, slice] = {}  # parameters that are no convolution's, by name
        self.output_hw = (1, 1)
        root = next((name for name in ("encoder", "coordinate_encoder") if hasattr(model, name)),
                    None)
        if root is None:
            return
        h, w = model.plan.padded_hw if root == "encoder" else model.config.fc_hw
        for i, stage in enumerate(getattr(model, root).stages):
            at = 0 if i == 0 else 1
            conv, norm = stage[at], stage[1 - at]
            s, width = conv.stride[0], conv.in_channels * conv.stride[0]**2
            h, w = h // s, w // s
            norm_name, name = f"{root}.stages.{i}.{1 - at}", f"{root}.stages.{i}.{at}"
            C = norm.weight.numel()
            parts = [f"{norm_name}.weight", f"{norm_name}.bias"] + [f"{name}.bias"] * (i == 0)
            row = parameters.add_row(parts, [C] * len(parts))
            self.vectors[norm_name] = row.pop("")
            self.vectors |= row
            down = pack_patches(parameters, name, conv, hw=(h, w),
                                in_width=width if i else ceil_to(width, 8),
                                order="yxc" if i else "cyx", bias=row.get(f"{name}.bias"))
            blocks = []
            for k, block in enumerate(stage[2:]):
                blocks.append(f"{root}.stages.{i}.{k + 2}")
                self._pack_block(parameters, blocks[-1], block)
            self.stages.append((down, norm_name, blocks))
        self.output_hw = (h, w)

    def _pack_block(self, parameters: Parameters, name: str, block: nn.Module) -> None:
        C = block.scale.numel()
        tap, c = torch.arange(49).view(1, 1, 7, 7), torch.arange(C).view(C, 1, 1, 1)
        self.vectors[f"{name}.depthwise.weight"] = parameters.add(f"{name}.depthwise.weight",
                                                                  tap * C + c, 49 * C)
        for part, linear in (("expand", block.expand), ("contract", block.contract)):
            out, inner = linear.weight.shape
            index = torch.arange(inner) * out + torch.arange(out)[:, None]
            self.vectors[f"{name}.{part}.weight"] = parameters.add(f"{name}.{part}.weight", index,
                                                                   inner * out)
        # In the order of `convnext.block_backward`'s sums
        parts = ("norm.weight", "norm.bias", "depthwise.bias", "contract.bias", "scale",
                 "expand.bias")
        row = parameters.add_row([f"{name}.{part}" for part in parts], [C] * 5 + [4 * C])
        self.vectors[name] = row.pop("")
        self.vectors |= row

    def allocate(self, work: Workspace) -> None:
        """Take the memory that it works in; buffers are made when first asked for."""
        self.work, self.parameters, self.batch = work, work.parameters, work.batch

    def _value(self, name: str) -> Tensor:
        return self.parameters.param[self.vectors[name]]

    def _bf16(self, name: str) -> Tensor:
        return self.parameters.param_bf16[self.vectors[name]]

    def _grad(self, name: str) -> Tensor:
        return self.parameters.grad[self.vectors[name]]

    # Forward

    def patchify(self, video: Tensor, indices: Tensor, mask: Tensor | None, out: Tensor) -> None:
        """Frames of the video as the first convolution's input OUT [N, CI]."""
        H, W = self.model.plan.padded_hw
        conv = self.stages[0][0]
        stride, BM = H // conv.H, 32
        launch(convnext.patchify_frames, (triton.cdiv(conv.H * conv.W, BM), self.batch), video,
               indices, mask, out, H=H, W=W, STRIDE=stride, KP=conv.CI, KB=power_of_two(conv.CI),
               BM=BM)

    def forward(self, x: Tensor) -> Tensor:
        """The stages, from patches [N, CI] to embeddings [N', C]."""
        buffers = self.work.buffers
        for i, (down, norm, blocks) in enumerate(self.stages):
            C, N = down.CO, self.batch * down.H * down.W
            if i:
                before = self.stages[i - 1][0]
                x = self._norm_forward(norm, x, hw=(before.H, before.W), stride=before.H // down.H)
            out = self.work.buffer(f"{norm}.down", N, C)
            buffers[f"{norm}.in"] = x
            self._linear(down, x, out)
            x = out
            if i == 0:
                x = self._norm_forward(norm, x, hw=(down.H, down.W), stride=1)
            for block in blocks:
                x = self._block_forward(block, x, down)
        return x

    def _linear(self, conv: Conv, x: Tensor, out: Tensor) -> None:
        N, p = self.batch * conv.H * conv.W, self.parameters
        tile = product_tile(N, conv.CO, conv.CI)
        launch(conv_kernels.conv_forward,
               (triton.cdiv(N, tile["BM"]), program_columns(conv.CO, tile)), x,
               p.param_bf16[conv.weight], p.param[conv.bias], out, None, N, **conv.geometry, SH=1,
               SW=1, CG=1, CN=1, EDGE=0, PLANE=0, MODE="bias", ACT="gelu", **tile)

    def _norm_forward(self, name: str, x: Tensor, *, hw: tuple[int, int], stride: int) -> Tensor:
        (N, C), buffer = x.shape, self.work.buffer
        out = buffer(f"{name}.out", N // stride**2, C * stride**2)
        BM = 32
        launch(convnext.layer_norm_forward, (triton.cdiv(N, BM),), x,
               self._value(f"{name}.weight"), self._value(f"{name}.bias"), out,
               buffer(f"{name}.xhat", N, C), buffer(f"{name}.scale", N, dtype=torch.float32), N,
               H=hw[0], W=hw[1], C=C, CB=power_of_two(C), STRIDE=stride, BM=BM)
        return out

    def _block_parameters(self, name: str) -> list[Tensor]:
        return [self._value(f"{name}.norm.weight"), self._value(f"{name}.norm.bias"),
                self._bf16(f"{name}.expand.weight"), self._value(f"{name}.expand.bias"),
                self._bf16(f"{name}.contract.weight"), self._value(f"{name}.contract.bias"),
                self._value(f"{name}.scale")]

    def _block_forward(self, name: str, x: Tensor, stage: Conv) -> Tensor:
        (N, C), buffer = x.shape, self.work.buffer
        out, y = buffer(f"{name}.out", N, C), buffer(f"{name}.y", N, C)
        self.work.buffers[f"{name}.in"] = x
        self._depthwise(name, x, y, stage, bias=self._value(f"{name}.depthwise.bias"))
        BM = 32 if N >= 4096 else 16
        launch(convnext.block_forward, (triton.cdiv(N, BM),), x, y, *self._block_parameters(name),
               out, buffer(f"{name}.xhat", N, C), buffer(f"{name}.rstd", N, dtype=torch.float32),
               N, C=C, CB=power_of_two(C), HB=min(64, power_of_two(4 * C)), BM=BM, num_warps=4)
        return out

    def _depthwise(self, name: str, x: Tensor, out: Tensor, stage: Conv, *,
                   bias: Tensor | None = None, add: Tensor | None = None) -> None:
        C, BM = x.shape[1], 8
        runs = self.batch * stage.H * triton.cdiv(stage.W, 8)
        launch(depthwise_conv.depthwise_conv, (triton.cdiv(runs, BM),), x,
               self._value(f"{name}.depthwise.weight"), bias, add, out, len(x), H=stage.H,
               W=stage.W, C=C, CB=power_of_two(C), BM=BM, num_warps=4)

    # Backward

    def backward(self, d: Tensor) -> None:
        """Gradients of every parameter, from that at the embeddings [N', C]."""
        work = self.work
        for i in range(len(self.stages) - 1, -1, -1):
            down, norm, blocks = self.stages[i]
            C = down.CO
            for block in reversed(blocks):
                d = self._block_backward(block, d, down)
            if i:
                with work.side_stream("encoder"):
                    work.weight_gradient(down, work.buffers[f"{norm}.in"], d)
                    torch.sum(d, 0, dtype=torch.float32, out=self.parameters.grad[down.bias])
                dpatch = work.buffer(f"{norm}.dpatch", 1, len(d), down.CI)
                work.input_gradient(down, d, dpatch)
                before = self.stages[i - 1][0]
                d = self._norm_backward(norm, dpatch, (before.H, before.W), before.CO,
                                        before.H // down.H)
            else:
                d = self._norm_backward(norm, d, (down.H, down.W), C, 1)
                work.weight_gradient(down, work.buffers[f"{norm}.in"], d)

    def _norm_backward(self, name: str, d: Tensor, hw: tuple[int, int], C: int, stride: int
                       ) -> Tensor:
        """Gradient [N, C] before a norm; sums for γ and β, and a bias before it, are kept."""
        N, BM, buffers = self.batch * hw[0] * hw[1], 32, self.work.buffers
        S = triton.cdiv(N, BM)
        out = self.work.buffer(f"{name}.dx", N, C)
        partial = self.work.buffer(f"{name}.sums", S, 3 * C, dtype=torch.float32)
        launch(convnext.layer_norm_backward, (S,), d, buffers[f"{name}.xhat"],
               buffers[f"{name}.scale"], self._value(f"{name}.weight"), out, partial, N, H=hw[0],
               W=hw[1], C=C, CB=power_of_two(C), STRIDE=stride, BM=BM)
        with self.work.side_stream("sums"):
            row = self._grad(name)
            torch.sum(partial[:, :len(row)], 0, out=row)
        return out

    def _linear_gradient(self, name: str, x: Tensor, dy: Tensor) -> None:
        weight = self.vectors[f"{name}.weight"]
        self.work.weight_gradient(Conv(1, len(x), x.shape[1], dy.shape[1], 1, weight, weight), x,
                                  dy)

    def _block_backward(self, name: str, d: Tensor, stage: Conv) -> Tensor:
        (N, C), work = d.shape, self.work
        buffer, buffers = work.buffer, work.buffers
        BM = 32 if N >= 4096 else 16
        S = triton.cdiv(N, BM)
        dy, normed, d2 = (buffer(f"{name}.{part}", N, C) for part in ("dy", "normed", "d2"))
        hidden, dhidden = (buffer(f"{name}.{part}", N, 4 * C) for part in ("hidden", "dhidden"))
        partial = buffer(f"{name}.sums", S, 9 * C, dtype=torch.float32)
        launch(convnext.block_backward, (S,), d, buffers[f"{name}.xhat"], buffers[f"{name}.rstd"],
               *self._block_parameters(name), dy, normed, hidden, dhidden, d2, partial, N, C=C,
               CB=power_of_two(C), HB=min(32, power_of_two(4 * C)), BM=BM, num_warps=4)
        x = buffers[f"{name}.in"]
        with work.side_stream("sums"):
            torch.sum(partial, 0, out=self._grad(name))
            self._linear_gradient(f"{name}.expand", normed, dhidden)
        with work.side_stream("sums"):
            self._linear_gradient(f"{name}.contract", hidden, d2)
        with work.side_stream("encoder"):
            runs, BM = self.batch * stage.H * triton.cdiv(stage.W, 8), 8
            S = max(1, min(64, triton.cdiv(runs, BM)))
            taps = buffer(f"{name}.taps", S, 49 * C, dtype=torch.float32)
            launch(depthwise_conv.depthwise_conv_weight_gradient, (7, S), x, dy, taps, N,
                   H=stage.H, W=stage.W, C=C, CB=power_of_two(C), S=S, BM=BM, num_warps=4)
            torch.sum(taps, 0, out=self._grad(f"{name}.depthwise.weight"))
        dx = buffer(f"{name}.dx", N, C)
        self._depthwise(name, dy, dx, stage, add=d)
        return dx
