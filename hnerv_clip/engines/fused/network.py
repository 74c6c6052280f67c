"""The training step on `kernels` and `hopper`: the same network, forward and back, by hand.

`Network` holds the buffers of one batch size and runs the layers. The order of the modules is the
network's: patches → encoder stages → decoder blocks → heads, and back.
"""

from __future__ import annotations

import math
import subprocess
from contextlib import contextmanager

import torch
import triton
from torch import Tensor, nn

from hnerv_clip.engines.fused.layout import Conv, Parameters, pack_convolution, pack_patches
from hnerv_clip.kernels import decoder_kernels as kernels
from hnerv_clip.kernels import encoder_kernels, hopper
from hnerv_clip.kernels.launch import launch
from hnerv_clip.kernels.tiles import (
    ceil_to,
    gradient_tile,
    power_of_two,
    product_tile,
    program_columns,
)
from hnerv_clip.model import HNeRV

BUILD_ERRORS = (triton.TritonError, OSError, RuntimeError, subprocess.CalledProcessError)
LARGE = 65536  # pixels from which on a layer is bound by memory, not by waiting
MOST_KERNEL = 11  # rows and columns of a convolution
MULTIPROCESSORS = 132  # of an H100, by which work is shared out
PROGRAMS = 8 * MULTIPROCESSORS  # at most, of a sum over pixels
# Multiprocessors that a Hopper kernel leaves to the small ones which run beside it: the CLIP head's
# and the encoder's way back
LEFT = {"rgb": 4, "rgb_back": 4, "weights": 12}


def unsupported(model: HNeRV) -> str | None:
    """What of a model the kernels do not know, or None where they know it all."""
    config = model.config
    if config.act not in kernels.ACTIVATIONS or config.norm != "none":
        return (f"act={config.act!r} with norm={config.norm!r} (they know "
                f"{', '.join(kernels.ACTIVATIONS)} without a norm)")
    if max(model.plan.kernels) > MOST_KERNEL:
        return f"a kernel of {max(model.plan.kernels)} (they know {MOST_KERNEL} at most)"
    if model.plan.output_hw != model.plan.padded_hw:
        return "a decoder that is resized to the frame (leave fc_hw to auto)"
    last = config.dec_strds[-1] if config.num_blks[1] == 1 else 1
    if last & (last - 1):
        return f"a last stride of {last}, no power of two"
    return None


def working_dtype(device: torch.device) -> torch.dtype:
    """Of activations: Triton's interpreter, on the CPU, has no bfloat16 products."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _plane(image: Tensor, units: bool) -> int:
    """PLANE of an image, see `kernels`."""
    return image.numel() // (8 * len(image)) if units else 0


class Network:
    """The layers with the buffers of one batch size; everything on one device.

    `encode`, `decode` and `colour` fill the buffers from frames or embeddings, `backward` the
    gradients.
    """

    def __init__(self, model: HNeRV, parameters: Parameters | None = None, *, batch: int,
                 train: bool = True):
        self.model, self.batch, self.train = model, batch, train
        self.device = next(model.parameters()).device
        self.cuda = self.device.type == "cuda"
        self.dtype = working_dtype(self.device)
        self.parameters = parameters or Parameters()
        fresh = parameters is None
        self._lay_out()
        if fresh:
            self.parameters.allocate(model, self.device, self.dtype)
            self.parameters.load({}, 0)
        self._allocate()
        # Beside the main stream: three for sums and weight gradients, which the optimizer alone
        # waits for, and the last, before all others, for the CLIP head's many small kernels
        self.sides = [torch.cuda.Stream(self.device, priority=priority)
                      for priority in (0, 0, 0, -2)] if self.cuda else []
        self.busy: set[torch.cuda.Stream] = set()

    # Layout

    def _lay_out(self) -> None:
        """The convolutions in order, each with the place of its parameters.

        Two networks over the same parameters lay them out alike, so the second only reads.
        """
        model, parameters = self.model, self.parameters
        known = parameters if not parameters.places else Parameters()
        self.encoder: list[tuple[Conv, str, list[str]]] = []  # (downsampling, its norm, blocks)
        self.vectors: dict[str, slice] = {}
        encoder = getattr(model, "encoder", None) or getattr(model, "coordinate_encoder", None)
        if encoder is not None:
            root = "encoder" if hasattr(model, "encoder") else "coordinate_encoder"
            h, w = model.plan.padded_hw if root == "encoder" else model.config.fc_hw
            for i, stage in enumerate(encoder.stages):
                at = 0 if i == 0 else 1
                conv, norm = stage[at], stage[1 - at]
                s, width = conv.stride[0], conv.in_channels * conv.stride[0]**2
                h, w = h // s, w // s
                norm_name, name = f"{root}.stages.{i}.{1 - at}", f"{root}.stages.{i}.{at}"
                C = norm.weight.numel()
                parts = [f"{norm_name}.weight", f"{norm_name}.bias"] + [f"{name}.bias"] * (i == 0)
                row = known.add_row(parts, [C] * len(parts))
                self.vectors[norm_name] = row.pop("")
                self.vectors |= row
                down = pack_patches(known, name, conv, hw=(h, w),
                                    in_width=width if i else ceil_to(width, 8),
                                    order="yxc" if i else "cyx", bias=row.get(f"{name}.bias"))
                blocks = []
                for k, block in enumerate(stage[2:]):
                    blocks.append(f"{root}.stages.{i}.{k + 2}")
                    self._pack_block(known, blocks[-1], block)
                self.encoder.append((down, norm_name, blocks))
        stem = model.decoder[0]
        h, w = (h, w) if encoder is not None else (1, 1)
        self.convs = [pack_convolution(known, "decoder.0.conv", stem.conv, hw=(h, w),
                                       in_width=stem.conv.in_channels, factors=stem.unfold)]
        for i, block in enumerate(model.decoder[1:], 1):
            before = self.convs[-1]
            self.convs.append(pack_convolution(
                known, f"decoder.{i}.conv", block.conv,
                hw=(before.H * before.SH, before.W * before.SW), in_width=before.CN,
                factors=(block.stride, block.stride), units=hopper.available(self.device)))
        self._lay_out_rgb(known)

    def _lay_out_rgb(self, parameters: Parameters) -> None:
        """The RGB head's weights [3, 3·CN, CO], and where the two ways find each of them there.

        See `kernels.rgb_forward`, from runs of features to 4·pixel + colour, and `rgb_backward`,
        from runs of CO·pixel + colour to the channels of SW pixels, row by row from the last.
        """
        last, C = self.convs[-1], self.model.rgb_head.in_channels
        SW, CG, CN = last.SW, last.CG, last.CN
        H, W = self.model.plan.padded_hw
        units = last.units and hopper.knows_rgb(CN, 8, 3, (H + 2, W + 2))
        CO = 8 if units else 4  # colours in memory, three of them used
        k, c, y, x = torch.meshgrid(*map(torch.arange, (3, C, 3, 3)), indexing="ij")
        place = ((y * 3 + x) * CN + c) * CO + k
        weight = parameters.add("rgb_head.weight", place, 9 * CN * CO)
        bias = parameters.add("rgb_head.bias", torch.arange(3), CO)
        self.rgb = Conv(H, W, CN, CO, 3, weight, bias, units=units)
        nothing = 3  # a weight of an idle colour
        self.group = 2 if W % 2 == 0 else 1
        self.KF = power_of_two((2 + self.group) * CN)
        j = torch.arange(self.group).view(-1, 1, 1, 1, 1)
        ahead = torch.full((3, self.KF, 16), nothing)
        ahead[y, (x + j) * CN + c, 4 * j + k] = place.expand(self.group, *place.shape)
        self.KB, self.RB = power_of_two(CO * (SW + 2)), power_of_two(SW * CG)
        j = torch.arange(SW).view(-1, 1, 1, 1, 1)
        back = torch.full((3, self.KB, self.RB), nothing)
        back[2 - y, (2 + j - x) * CO + k, j * CG + c] = place.expand(SW, *place.shape)
        self.rgb_ahead, self.rgb_back = ahead.to(self.device), back.to(self.device)

    def _pack_block(self, parameters: Parameters, name: str, block: nn.Module) -> None:
        C = block.scale.numel()
        tap, c = torch.arange(49).view(1, 1, 7, 7), torch.arange(C).view(C, 1, 1, 1)
        self.vectors[f"{name}.depthwise.weight"] = parameters.add(f"{name}.depthwise.weight",
                                                                tap * C + c, 49 * C)
        for part, linear in (("expand", block.expand), ("contract", block.contract)):
            out, inner = linear.weight.shape
            place = torch.arange(inner) * out + torch.arange(out)[:, None]
            self.vectors[f"{name}.{part}.weight"] = parameters.add(f"{name}.{part}.weight", place,
                                                                 inner * out)
        # In the order of `encoder_kernels.block_backward`'s sums
        parts = ("norm.weight", "norm.bias", "depthwise.bias", "contract.bias", "scale",
                 "expand.bias")
        row = parameters.add_row([f"{name}.{part}" for part in parts], [C] * 5 + [4 * C])
        self.vectors[name] = row.pop("")
        self.vectors |= row

    def _allocate(self) -> None:
        """Buffers of activations and, to train, of gradients and partial sums."""
        B, dtype = self.batch, self.dtype

        def full(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self.device)

        self.pre, self.features, self.dpre, self.dfeatures, self.dbias = [], [], [], [], []
        for i, conv in enumerate(self.convs):
            N = B * conv.H * conv.W
            after = self.convs[i + 1] if i + 1 < len(self.convs) else self.rgb
            self.features.append(self._image(conv.H * conv.SH, conv.W * conv.SW, conv.CN,
                                             edge=after.edge, units=after.units))
            if self.train:
                self.pre.append(self.with_room(B * conv.pixels, conv.CO))
                self.dpre.append(self._image(conv.H, conv.W, conv.CO, edge=conv.edge,
                                             units=conv.units))
                split = conv.K if N < LARGE and not conv.units else 1
                self.dfeatures.append(torch.zeros(
                    split, N, conv.CI, dtype=torch.float32 if split > 1 else dtype,
                    device=self.device))
                self.dbias.append(full(self._programs(N, 32), conv.CO))
        H, W = self.model.plan.padded_hw
        self.pred = torch.zeros(B, 3, H, W, device=self.device,
                                dtype=torch.float32 if self.train else torch.uint8)
        first = self.encoder[0][0] if self.encoder else self.convs[0]
        self.first = self.with_room(B * first.H * first.W, first.CI)
        self.work: dict[str, Tensor] = {}
        if not self.train:
            return
        self.drgb = self.with_room(B, H + 2, W + 2, self.rgb.CO)
        tiles = triton.cdiv((H + 2) * (W + 2), 128 * self.group)
        if self.rgb.units:  # sums of each warp
            tiles = 16 * self._programs_on_hopper("rgb", self.rgb, mode="l2")[1]
        self.error, self.dhead = full(B, tiles), full(B, tiles, 4 if self.rgb.units else 16)
        last = self.convs[-1]
        self.scattered = full(B, last.CO)
        self.partials: dict[int, Tensor] = {}

    def _image(self, height: int, width: int, channels: int, *, edge: int, units: bool) -> Tensor:
        """Zeros [B, H, W, C] with edges, or in units of channels [C / 8, B, H, W, 8]."""
        shape = (self.batch, height + 2 * edge, width + 2 * edge)
        return self.with_room(channels // 8, *shape, 8) if units else \
            self.with_room(*shape, channels)

    def with_room(self, *shape: int) -> Tensor:
        """Zeros, with zeros before and after them: kernels read past the ends of images."""
        lines = MOST_KERNEL // 2 + 1
        room = ceil_to((lines * max(shape[1:-1], default=1) + 1024) * shape[-1], 64)
        flat = torch.zeros(math.prod(shape) + 2 * room, dtype=self.dtype, device=self.device)
        return flat[room:room + math.prod(shape)].view(shape)

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer by name, made when first asked for."""
        if name not in self.work:
            self.work[name] = self.with_room(*shape) if dtype is None else \
                torch.zeros(shape, dtype=dtype, device=self.device)
        return self.work[name]

    @staticmethod
    def _programs(N: int, tile: int) -> int:
        return max(1, min(PROGRAMS, triton.cdiv(N, tile)))

    # Parameters as the kernels read them

    def _value(self, name: str) -> Tensor:
        return self.parameters.param[self.vectors[name]]

    def _small(self, name: str) -> Tensor:
        return self.parameters.small[self.vectors[name]]

    def _grad(self, name: str) -> Tensor:
        return self.parameters.grad[self.vectors[name]]

    # Forward

    def frame_patches(self, video: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
        """Frames of the video as the first convolution's input [N, CI]."""
        H, W = self.model.plan.padded_hw
        conv = self.encoder[0][0]
        stride, BM = H // conv.H, 32
        launch(encoder_kernels.patch_frames, (triton.cdiv(conv.H * conv.W, BM), self.batch), video,
               indices, mask, self.first, H=H, W=W, STRIDE=stride, KP=conv.CI,
               KB=power_of_two(conv.CI), BM=BM)
        return self.first

    def take(self, rows: Tensor) -> Tensor:
        """Other input of the first convolution [N, CI], copied to where there is room around."""
        return self.first.copy_(rows)

    def encode(self, x: Tensor) -> Tensor:
        """The encoder's stages, from patches [N, CI] to embeddings [N', C]."""
        B = self.batch
        for i, (down, norm, blocks) in enumerate(self.encoder):
            C, N = down.CO, B * down.H * down.W
            if i:
                before = self.encoder[i - 1][0]
                x = self._norm_forward(norm, x, hw=(before.H, before.W), stride=before.H // down.H)
            out = self._buffer(f"{norm}.down", N, C)
            self.work[f"{norm}.in"] = x
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
        launch(kernels.convolve, (triton.cdiv(N, tile["BM"]), program_columns(conv.CO, tile)), x,
               p.small[conv.weight], p.param[conv.bias], out, None, N, **conv.geometry, SH=1, SW=1,
               CG=1, CN=1, EDGE=0, PLANE=0, MODE="bias", ACT="gelu", **tile)

    def _norm_forward(self, name: str, x: Tensor, *, hw: tuple[int, int], stride: int) -> Tensor:
        N, C = x.shape
        out = self._buffer(f"{name}.out", N // stride**2, C * stride**2)
        BM = 32
        launch(encoder_kernels.norm_forward, (triton.cdiv(N, BM),), x,
               self._value(f"{name}.weight"), self._value(f"{name}.bias"), out,
               self._buffer(f"{name}.xhat", N, C),
               self._buffer(f"{name}.scale", N, dtype=torch.float32), N, H=hw[0], W=hw[1], C=C,
               CB=power_of_two(C), STRIDE=stride, BM=BM)
        return out

    def _block_parameters(self, name: str) -> list[Tensor]:
        return [self._value(f"{name}.norm.weight"), self._value(f"{name}.norm.bias"),
                self._small(f"{name}.expand.weight"), self._value(f"{name}.expand.bias"),
                self._small(f"{name}.contract.weight"), self._value(f"{name}.contract.bias"),
                self._value(f"{name}.scale")]

    def _block_forward(self, name: str, x: Tensor, stage: Conv) -> Tensor:
        N, C = x.shape
        out, y = self._buffer(f"{name}.out", N, C), self._buffer(f"{name}.y", N, C)
        self.work[f"{name}.in"] = x
        self._depthwise(name, x, y, stage, bias=self._value(f"{name}.depthwise.bias"))
        BM = 32 if N >= 4096 else 16
        launch(encoder_kernels.block_forward, (triton.cdiv(N, BM),), x, y,
               *self._block_parameters(name), out, self._buffer(f"{name}.xhat", N, C),
               self._buffer(f"{name}.rstd", N, dtype=torch.float32), N, C=C, CB=power_of_two(C),
               HB=min(64, power_of_two(4 * C)), BM=BM, num_warps=4)
        return out

    def _depthwise(self, name: str, x: Tensor, out: Tensor, stage: Conv, *,
                   bias: Tensor | None = None, add: Tensor | None = None) -> None:
        C, BM = x.shape[1], 8
        runs = self.batch * stage.H * triton.cdiv(stage.W, 8)
        launch(encoder_kernels.depthwise, (triton.cdiv(runs, BM),), x,
               self._value(f"{name}.depthwise.weight"), bias, add, out, len(x), H=stage.H,
               W=stage.W, C=C, CB=power_of_two(C), BM=BM, num_warps=4)

    def decode(self, x: Tensor, *, last: int | None = None) -> list[Tensor]:
        """The stem and the blocks, from embeddings [N, C]: features [B, H', W', CN] of each."""
        p = self.parameters
        convs = self.convs if last is None else self.convs[:last + 1]
        for i, conv in enumerate(convs):
            N, act = self.batch * conv.pixels, self.model.config.act
            after = self.convs[i + 1] if i + 1 < len(self.convs) else self.rgb
            shuffle = dict(conv.shuffle, EDGE=after.edge)
            given = (x, p.small[conv.weight], p.param[conv.bias],
                     self.pre[i] if self.train else None, self.features[i], N)
            x = self.features[i]
            if conv.units:
                self._on_hopper("forward", conv, *given, act=act, OUT_UNITS=int(after.units),
                                **shuffle)
                continue
            tile = product_tile(N, conv.CO, conv.K * conv.CI)
            apart = self.train and N >= LARGE  # else the product's program has too much to hold
            launch(kernels.convolve, (triton.cdiv(N, tile["BM"]), program_columns(conv.CO, tile)),
                   *given, **conv.geometry, **shuffle, PLANE=_plane(x, after.units), ACT=act,
                   MODE="bias" if apart else "shuffle", **tile)
            if apart:
                N = self.batch * conv.H * conv.W
                launch(kernels.shuffle_activate, (triton.cdiv(N, 32), conv.SH), self.pre[i],
                       x, N, H=conv.H, W=conv.W, P=conv.edge, CO=conv.CO, **shuffle,
                       PLANE=_plane(x, after.units), RB=power_of_two(conv.SW * conv.CN), ACT=act,
                       BM=32)
        return self.features[:len(convs)]

    def colour(self, mode: str, *, video: Tensor | None = None, indices: Tensor | None = None,
               scale: float = 0.0) -> None:
        """The RGB head over the last features; see `kernels.rgb_forward` for the modes."""
        H, W = self.model.plan.padded_hw
        bias = self.model.config.out_bias
        p = self.parameters
        known = bias in ("tanh", "sigmoid")
        head = {"head" if self.rgb.units else "HEAD": bias if known else "add",
                "OFFSET": 0.0 if known else float(bias)}
        results = (self.drgb, self.error, self.dhead) if self.train else (None, None, None)
        if self.rgb.units:
            head["OFFSET"] = f"{head['OFFSET']}f"
            self._on_hopper("rgb", self.rgb, self.features[-1], p.small[self.rgb.weight],
                            p.param[self.rgb.bias], video, indices, self.pred, *results,
                            float(scale), self.batch * self.rgb.pixels, mode=mode, **head)
        else:
            launch(kernels.rgb_forward, (triton.cdiv((H + 2) * (W + 2), 128 * self.group),
                   self.batch), self.features[-1], p.small[self.rgb.weight][self.rgb_ahead],
                   p.param[self.rgb.bias], video, indices, self.pred, *results, H=H, W=W,
                   CN=self.rgb.CI, GROUP=self.group, **head, MODE=mode, SCALE=scale, BM=128,
                   BK=self.KF)
        if mode == "l2":
            with self.aside(1):
                torch.sum(self.dhead.view(-1, 4), 0, out=p.grad[self.rgb.bias][:4])

    def set_colour_gradient(self, gradient: Tensor) -> None:
        """Take a gradient [B, 3, H, W] at the RGB head's convolution, for other losses than L2."""
        self.drgb[:, 1:-1, 1:-1, :3] = gradient.permute(0, 2, 3, 1)
        self.parameters.grad[self.rgb.bias][:3] = gradient.sum((0, 2, 3))

    def picture(self, i: int) -> Tensor:
        """Stage i's features as [B, CN, H', W']: a view, or a copy where they lie in units."""
        conv, features = self.convs[i], self.features[i]
        edge = (features.shape[-3] - conv.H * conv.SH) // 2
        inner = slice(edge, -edge or None)
        features = features[..., inner, inner, :]
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2)
        return features.permute(1, 0, 4, 2, 3).flatten(1, 2)

    def pick(self, i: int, rows: Tensor, cols: Tensor) -> Tensor:
        """Stage i's features at cells [P]: [B, CN, P]."""
        conv, features = self.convs[i], self.features[i]
        edge = (features.shape[-3] - conv.H * conv.SH) // 2
        found = features[..., rows + edge, cols + edge, :]
        return found.transpose(1, 2) if found.ndim == 3 else \
            found.permute(1, 0, 3, 2).flatten(1, 2)

    # Backward

    @contextmanager
    def aside(self, which: int = 0):
        """What is started here runs beside the main stream, once that has come this far."""
        if not self.cuda:
            yield
            return
        self.busy.add(self.sides[which])
        self.sides[which].wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.sides[which]):
            yield

    def join(self) -> None:
        """Let the main stream wait for what runs beside it."""
        while self.busy:
            torch.cuda.current_stream(self.device).wait_stream(self.busy.pop())

    def backward(self, x: Tensor, *, extra: dict[int, Tensor], picked: dict[int, Tensor],
                 places: dict[int, Tensor]) -> None:
        """Gradients of every parameter, from `drgb` and what the CLIP head adds.

        Args:
            x: [N, C] embeddings that `decode` started from.
            extra: gradients [B, H', W', CN] of stages' features.
            picked: gradients [B, P, C] at single cells of stages' features.
            places: int64 [P] (row · width + column) of those cells.
        """
        if extra:
            self.join()
        with self.aside(2):  # while the CLIP head's small kernels leave the GPU to it
            self._weight_gradient(self.rgb, self.features[-1], self.drgb)
        self._rgb_backward(extra.get(len(self.convs) - 1), picked, places)
        for i in range(len(self.convs) - 1, -1, -1):
            conv = self.convs[i]
            if i or self.encoder:
                self._convolve_back(conv, self.dpre[i], self.dfeatures[i])
            if i:
                if i - 1 in extra:
                    self.dfeatures[i][0] += extra[i - 1].view_as(self.dfeatures[i][0])
                if i - 1 in picked:
                    self._add_picked(i - 1, picked[i - 1], places[i - 1])
                self._unshuffle(i - 1)
        # The large weight gradients fill the GPU while the encoder's small kernels wait for each
        # other; started earlier they would hold up what the encoder waits for
        with self.aside():
            for i, conv in reversed(list(enumerate(self.convs))):
                self._weight_gradient(conv, self.features[i - 1] if i else x, self.dpre[i])
                if i < len(self.convs) - 1:
                    torch.sum(self.dbias[i], 0, out=self.parameters.grad[conv.bias])
        if self.encoder:
            self._encoder_backward(self.dfeatures[0][0])
        self.join()

    def _rgb_backward(self, extra: Tensor | None, picked: dict[int, Tensor],
                      places: dict[int, Tensor]) -> None:
        last, p, act = self.convs[-1], self.parameters, self.model.config.act
        cut = dict(SH=last.SH, SW=last.SW, CG=last.CG)
        shape = dict(cut, H=last.H, W=last.W, P=last.edge, CO=last.CO,
                     PLANE=_plane(self.dpre[-1], last.units), ACT=act)
        row, given = last.SW * last.CG, dict(cut, act=act, EDGE=last.edge)
        if extra is None and self.rgb.units and last.units and self._choose(
                "rgb_back", self.rgb, **given):
            S = 16 * self._programs_on_hopper("rgb_back", self.rgb, **given)[1]  # of each warp
            sums = self._buffer("dlast", S, last.SH, row, dtype=torch.float32)
            self._on_hopper("rgb_back", self.rgb, self.drgb, p.small[self.rgb.weight],
                            self.pre[-1], self.dpre[-1], sums, self.batch * self.rgb.pixels,
                            **given)
        else:
            S = min(2 * MULTIPROCESSORS, self.batch * last.H * triton.cdiv(last.W, 64))
            sums = self._buffer("dlast", S, last.SH, self.RB, dtype=torch.float32)
            launch(kernels.rgb_backward, (S, last.SH), self.drgb, self.pre[-1],
                   p.small[self.rgb.weight][self.rgb_back], extra, self.dpre[-1], sums,
                   self.batch * last.H, **shape, CN=last.CN, DC=self.rgb.CO, RB=self.RB,
                   KB=self.KB, S=S, BM=64)
        if self.cuda:  # what the CLIP head adds is there
            torch.cuda.current_stream(self.device).wait_stream(self.sides[-1])
        index = len(self.convs) - 1
        self.scattered.zero_()
        if index in picked:
            C = self.model.plan.widths[-1]
            launch(kernels.scatter_gradient, (self.batch,), picked[index], places[index],
                   self.pre[-1], self.dpre[-1], self.scattered, len(places[index]), **shape, C=C,
                   CB=power_of_two(C), num_warps=1)
        with self.aside():
            bias = self.scattered.sum(0)
            bias[:last.SH * row].view(last.SH, row).add_(sums.sum(0)[:, :row])
            p.grad[last.bias].copy_(bias)

    def _weight_gradient(self, conv: Conv, x: Tensor, dy: Tensor) -> None:
        """Weight gradient of a convolution from its input [N, CI] and its output's gradient."""
        N, run = dy.numel() // conv.CO, conv.K * conv.CI
        out = self.parameters.grad[conv.weight]
        if conv.units:
            macros, programs = self._programs_on_hopper("weights", conv)
            S = hopper.shares(macros, programs)
        else:
            tile = gradient_tile(N, conv.CO, run)
            mt, nt = triton.cdiv(run, tile["BM"]), program_columns(conv.CO, tile)
            S = max(1, min(triton.cdiv(N, tile["BK"] * 4),
                           MULTIPROCESSORS // (conv.K * mt * nt)))
        target = out
        if S > 1:
            key = conv.weight.start
            if key not in self.partials:
                self.partials[key] = torch.zeros(S, out.numel(), device=self.device)
            target = self.partials[key]
        if conv.units:
            self._on_hopper("weights", conv, x, dy, None, target, None, N)
        else:
            launch(kernels.convolve_weight_gradient, (conv.K, mt, nt * S), x, dy, target, N,
                   W=conv.W, CI=conv.CI, CO=conv.CO, K=conv.K, S=S, **tile)
        if S > 1:
            torch.sum(target, 0, out=out)

    def _convolve_back(self, conv: Conv, dy: Tensor, out: Tensor) -> None:
        """Gradient at a convolution's input: OUT [SPLIT, B·H·W, CI]."""
        if conv.units:
            self._on_hopper("back", conv, dy, self.parameters.small[conv.weight], None, None, out,
                            self.batch * conv.pixels)
            return
        split = len(out)
        group = 2 if conv.K > 1 and (conv.W + 2 * conv.edge) % 2 == 0 else 1
        rows, columns = self.batch * conv.pixels // group, group * conv.CI
        tile = product_tile(rows, columns, (conv.K - 1 + group) * conv.CO, back=True)
        launch(kernels.convolve_back, (triton.cdiv(rows, tile["BM"]), program_columns(columns,
               tile), split), dy, self.parameters.small[conv.weight], out, self.batch * conv.pixels,
               **conv.geometry, GROUP=group, SPLIT=split, **tile)

    def _on_hopper(self, way: str, conv: Conv, *values: Tensor | int | None, **settings) -> None:
        """A convolution by `hopper`, see there."""
        macros, programs = self._programs_on_hopper(way, conv, **settings)
        launch(hopper.convolve, (programs,), *values, **macros)

    def _programs_on_hopper(self, way: str, conv: Conv, **settings
                            ) -> tuple[dict[str, int | str], int]:
        """What is compiled, and how many programs of it are started."""
        macros = self._choose(way, conv, **settings)
        if macros is None:
            raise RuntimeError(f"no Hopper kernel for {way} of {conv}")
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return macros, hopper.programs(macros, self.batch * conv.pixels,
                                       max(1, processors - LEFT.get(way, 0)))

    @staticmethod
    def _choose(way: str, conv: Conv, **settings) -> dict[str, int | str] | None:
        xc, yc = (conv.CO, conv.CI) if way.endswith("back") else (conv.CI, conv.CO)
        hw = (conv.H + 2 * conv.edge, conv.W + 2 * conv.edge)
        return hopper.choose(way, xc=xc, yc=yc, kernel=conv.K, hw=hw, **settings)

    def _unshuffle(self, i: int) -> None:
        conv, dfeatures = self.convs[i], self.dfeatures[i + 1]
        N = self.batch * conv.H * conv.W
        BN = min(128, power_of_two(conv.CO))
        S = len(self.dbias[i])
        launch(kernels.unshuffle_gradient, (S, triton.cdiv(conv.CO, BN)), dfeatures, self.pre[i],
               self.dpre[i], self.dbias[i], N, H=conv.H, W=conv.W, P=conv.edge, CO=conv.CO,
               **conv.shuffle, PLANE=_plane(self.dpre[i], conv.units), SPLIT=len(dfeatures),
               ACT=self.model.config.act, S=S, BM=32, BN=BN)

    def _add_picked(self, i: int, gradient: Tensor, place: Tensor) -> None:
        conv = self.convs[i]
        cells = self.dfeatures[i + 1][0].view(self.batch, -1, conv.CN)
        frame = torch.arange(self.batch, device=self.device)[:, None]
        cells[..., :gradient.shape[-1]].index_put_((frame, place[None]), gradient.to(cells.dtype),
                                                   accumulate=True)

    def _encoder_backward(self, d: Tensor) -> None:
        for i in range(len(self.encoder) - 1, -1, -1):
            down, norm, blocks = self.encoder[i]
            C = down.CO
            for block in reversed(blocks):
                d = self._block_backward(block, d, down)
            if i:
                with self.aside(2):
                    self._weight_gradient(down, self.work[f"{norm}.in"], d)
                    torch.sum(d, 0, dtype=torch.float32, out=self.parameters.grad[down.bias])
                dpatch = self._buffer(f"{norm}.dpatch", 1, len(d), down.CI)
                self._convolve_back(down, d, dpatch)
                before = self.encoder[i - 1][0]
                d = self._norm_backward(norm, dpatch, (before.H, before.W), before.CO,
                                        before.H // down.H)
            else:
                d = self._norm_backward(norm, d, (down.H, down.W), C, 1)
                self._weight_gradient(down, self.work[f"{norm}.in"], d)

    def _norm_backward(self, name: str, d: Tensor, hw: tuple[int, int], C: int, stride: int
                       ) -> Tensor:
        """Gradient [N, C] before a norm; sums for γ and β, and a bias before it, are kept."""
        N, BM = self.batch * hw[0] * hw[1], 32
        S = triton.cdiv(N, BM)
        out = self._buffer(f"{name}.dx", N, C)
        partial = self._buffer(f"{name}.sums", S, 3 * C, dtype=torch.float32)
        launch(encoder_kernels.norm_backward, (S,), d, self.work[f"{name}.xhat"],
               self.work[f"{name}.scale"], self._value(f"{name}.weight"), out, partial, N, H=hw[0],
               W=hw[1], C=C, CB=power_of_two(C), STRIDE=stride, BM=BM)
        with self.aside(1):
            row = self._grad(name)
            torch.sum(partial[:, :len(row)], 0, out=row)
        return out

    def _linear_gradient(self, name: str, x: Tensor, dy: Tensor) -> None:
        place = self.vectors[f"{name}.weight"]
        self._weight_gradient(Conv(1, len(x), x.shape[1], dy.shape[1], 1, place, place), x, dy)

    def _block_backward(self, name: str, d: Tensor, stage: Conv) -> Tensor:
        N, C = d.shape
        BM = 32 if N >= 4096 else 16
        S = triton.cdiv(N, BM)
        dy, normed, d2 = (self._buffer(f"{name}.{part}", N, C) for part in ("dy", "normed", "d2"))
        hidden, dhidden = (self._buffer(f"{name}.{part}", N, 4 * C)
                           for part in ("hidden", "dhidden"))
        partial = self._buffer(f"{name}.sums", S, 9 * C, dtype=torch.float32)
        launch(encoder_kernels.block_backward, (S,), d, self.work[f"{name}.xhat"],
               self.work[f"{name}.rstd"], *self._block_parameters(name), dy, normed, hidden,
               dhidden, d2, partial, N, C=C, CB=power_of_two(C), HB=min(32, power_of_two(4 * C)),
               BM=BM, num_warps=4)
        x = self.work[f"{name}.in"]
        with self.aside(1):
            torch.sum(partial, 0, out=self._grad(name))
            self._linear_gradient(f"{name}.expand", normed, dhidden)
        with self.aside(1):
            self._linear_gradient(f"{name}.contract", hidden, d2)
        with self.aside(2):
            runs, BM = self.batch * stage.H * triton.cdiv(stage.W, 8), 8
            S = max(1, min(64, triton.cdiv(runs, BM)))
            taps = self._buffer(f"{name}.taps", S, 49 * C, dtype=torch.float32)
            launch(encoder_kernels.depthwise_weight_gradient, (7, S), x, dy, taps, N, H=stage.H,
                   W=stage.W, C=C, CB=power_of_two(C), S=S, BM=BM, num_warps=4)
            torch.sum(taps, 0, out=self._grad(f"{name}.depthwise.weight"))
        dx = self._buffer(f"{name}.dx", N, C)
        self._depthwise(name, dy, dx, stage, add=d)
        return dx
