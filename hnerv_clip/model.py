"""The network: an embedding per frame, a decoder, an RGB head and a CLIP head.

HNeRV (Chen et al. 2023, arXiv 2304.02633) with a second output. The parameters are those of the
authors' implementation: `from_hnerv_state` renames its weights, which then give its output.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnerv_clip.config import ConfigError, ModelConfig, clip_stages, embed_kind, resolve_model
from hnerv_clip.patches import axis_cells, axis_shares, check_positions
from hnerv_clip.sizes import choose_strides

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


def pad_edges(frames: Tensor, padded_hw: tuple[int, int]) -> Tensor:
    """[B, C, H, W] with the last row and column repeated up to height and width `padded_hw`."""
    below, right = padded_hw[0] - frames.shape[2], padded_hw[1] - frames.shape[3]
    return F.pad(frames, (0, right, 0, below), mode="replicate") if below or right else frames


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


class HNeRV(nn.Module):
    """A video as a network. Build it with `build_model`.

    `embed` → `stages` → `rgb` of the last, `clip_at` or `clip_map` of all; calling the module does
    all in one.
    """

    def __init__(self, config: ModelConfig, *, frame_hw: tuple[int, int], frame_count: int):
        super().__init__()
        config = resolve_model(config, frame_hw)
        self.config, self.frame_hw, self.frame_count = config, frame_hw, frame_count
        self.kind = embed_kind(config.embed)
        self.plan = plan = plan_model(config, frame_hw=frame_hw, frame_count=frame_count)
        if self.kind == "hybrid":
            self.encoder = Encoder(3, strides=config.enc_strds, blocks=config.num_blks[0], widths=(
                *[int(config.enc_dim[0])] * (len(config.enc_strds) - 1), plan.embed_channels))
        elif self.kind == "xyt":
            self.coordinate_encoder = Encoder(2 * plan.levels, strides=(1,), widths=(
                plan.embed_channels,), blocks=config.num_blks[0])
        layers: list[nn.Module] = [Stem(plan.embed_channels, plan.widths[0], unfold=plan.unfold,
                                        norm=config.norm, act=config.act)]
        for i, stride in enumerate(config.dec_strds):
            width_in, width = plan.widths[i], plan.widths[i + 1]
            for block in range(config.num_blks[1]):
                layers.append(UpBlock(width if block else width_in, width,
                                      stride=1 if block else stride, kernel=plan.kernels[i],
                                      norm=config.norm, act=config.act))
        self.decoder = nn.Sequential(*layers)
        self.rgb_head = nn.Conv2d(plan.widths[-1], 3, 3, padding=1)
        if config.predict_clip:
            self.clip_stages = clip_stages(config)
            width = sum(plan.widths[i] for i in self.clip_stages)
            self.clip_head = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(),
                                           nn.Conv2d(2 * width, config.clip_dim, 1))
        if plan.output_hw != plan.padded_hw:  # only without padding
            warnings.warn(
                f"the decoder gives {_size(plan.output_hw)} and is resized bilinearly to the frame "
                f"{_size(frame_hw)}; leave fc_hw to auto to avoid this", stacklevel=2)

    def embed(self, frames: Tensor | None, times: Tensor) -> Tensor:
        """The embedding of each frame, from the frame (hybrid) or from its time alone.

        Args:
            frames: [B, 3, H, W] float in [0, 1]; unused and may be None for coordinates.
            times: [B] float64, frame index / T; unused by the hybrid model.
        Returns:
            [B, C, h, w].
        """
        if self.kind == "hybrid":
            return self.encoder(pad_edges(frames, self.plan.padded_hw))
        positions = self.positions(times).permute(0, 3, 1, 2)
        return positions if self.kind == "pe" else self.coordinate_encoder(positions)

    def positions(self, times: Tensor) -> Tensor:
        """What a coordinate model sees: the encoded time, and for xyt the place too.

        Args:
            times: [B] float64.
        Returns:
            [B, h, w, 2·levels] float32, on the grid `fc_hw` for xyt, 1×1 for pe.
        """
        base, levels = self.plan.base, self.plan.levels
        if self.kind == "pe":
            return sinusoids(times, base=base, levels=levels)[:, None, None]
        h, w = self.config.fc_hw
        y = (torch.arange(h, device=times.device, dtype=torch.float64) + 0.5) / h
        x = (torch.arange(w, device=times.device, dtype=torch.float64) + 0.5) / w
        parts = [(x[None, None, :], levels // 4), (y[None, :, None], levels // 4),
                 (times[:, None, None], levels // 2)]
        return torch.cat([sinusoids(p, base=base, levels=n).expand(len(times), h, w, 2 * n)
                          for p, n in parts], dim=-1)

    def features(self, embedding: Tensor) -> Tensor:
        """[B, C, h, w] embeddings to the last decoder block's output [B, n, H', W']."""
        return self.stages(embedding)[-1]

    def stages(self, embedding: Tensor, *, last: int | None = None) -> list[Tensor]:
        """The outputs of the stem and of each decoder stage after it, [B, Cᵢ, Hᵢ, Wᵢ].

        Args:
            embedding: [B, C, h, w].
            last: compute no stage beyond this one; the last of `clip_stages` is enough for the
                CLIP head alone.
        """
        outputs = [self.decoder[0](embedding)]
        blocks = self.config.num_blks[1]
        for i in range(len(self.config.dec_strds) if last is None else last):
            outputs.append(self.decoder[1 + i * blocks:1 + (i + 1) * blocks](outputs[-1]))
        return outputs

    def pad_channels(self, multiple: int) -> None:
        """Compute with widths rounded up to a multiple, padded with zeros; parameters stay as is.

        `features` then has extra channels at its end, all zero, which the heads ignore. Does
        nothing where a zero would not stay zero: with a norm, or an activation with act(0) ≠ 0.
        """
        if self.config.norm == "none" and self.config.act != "softplus":
            for block in self.decoder[1:]:
                block.multiple = multiple

    def rgb(self, features: Tensor) -> Tensor:
        """[B, n, H', W'] features to frames [B, 3, H, W], in [0, 1] for tanh and sigmoid."""
        head = self.rgb_head
        weight, bias = pad_convolution(head.weight, head.bias, in_width=features.shape[1],
                                       multiple=1)
        x = F.conv2d(features, weight, bias, padding=1)
        out_bias = self.config.out_bias
        x = torch.tanh(x) * 0.5 + 0.5 if out_bias == "tanh" else \
            torch.sigmoid(x) if out_bias == "sigmoid" else x + float(out_bias)
        if self.plan.pads:
            x = x[..., :self.frame_hw[0], :self.frame_hw[1]]
        elif x.shape[-2:] != self.frame_hw:
            x = F.interpolate(x, size=self.frame_hw, mode="bilinear", align_corners=False)
        return x

    def clip_at(self, stages: list[Tensor], centres: Tensor) -> Tensor:
        """Embeddings at positions of the frame.

        The head's 1×1 convolutions commute with picking positions: these are the values of the
        dense map there, and only they are computed.

        Args:
            stages: what `stages` returned, at least up to the last one that feeds the head.
            centres: [P, 2], or [B, P, 2] for positions of each frame, (y, x) in frame pixels.
        Returns:
            [B, P, D] unit vectors, float32.
        Raises:
            ValueError: a position outside the frame.
        """
        check_positions(centres, self.frame_hw)
        return self.clip_at_places(stages, self.clip_places(centres))

    def clip_places(self, centres: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where `clip_at` looks, for `clip_at_places`: computed once, used in every step.

        Returns:
            Of each stage that feeds the head, (rows, columns): int64 [..., P] cells, or with
            `clip_pool` the share of every row and column, [..., P, Hᵢ] and [..., P, Wᵢ].
        """
        self._need_clip_head()
        return [tuple(self._axis(centres[..., axis], axis, stage) for axis in (0, 1))
                for stage in self.clip_stages]

    def clip_at_places(self, stages: list[Tensor], places: list[tuple[Tensor, Tensor]]) -> Tensor:
        """`clip_at` for places that `clip_places` found: nothing here waits for the GPU."""
        picked = []
        for stage, (rows, cols) in zip(self.clip_stages, places, strict=True):
            features = stages[stage]
            if self.config.clip_pool:  # as products: rows, then columns
                found = _weigh_rows(features, rows)  # [B, P, W, C]
                found = (found * cols.to(found.dtype)[..., None]).sum(-2).transpose(1, 2)
            else:  # from channels-last memory: else its gradient would be laid out anew, and slowly
                frame = slice(None) if rows.ndim == 1 else \
                    torch.arange(len(rows), device=rows.device)[:, None]
                found = features.permute(0, 2, 3, 1)[frame, rows, cols].transpose(1, 2)
            picked.append(found)  # [B, Cᵢ, P]
        return self.clip_of_cells(picked)

    def clip_of_cells(self, picked: list[Tensor]) -> Tensor:
        """Embeddings [B, P, D] from what the stages that feed the head have there: [B, Cᵢ, P]."""
        read = [found[:, :self.plan.widths[stage]].float()
                for stage, found in zip(self.clip_stages, picked, strict=True)]
        return self._clip_vectors(torch.cat(read, dim=1)[..., None])[..., 0].transpose(1, 2)

    def clip_map(self, stages: list[Tensor], *, stride: int = 1, rows: slice = slice(None)
                 ) -> Tensor:
        """Embeddings at every so-manieth cell of the last stage: [B, D, ⌈H'/stride⌉, ⌈W'/stride⌉].

        Args:
            stages: what `stages` returned, at least up to the last one that feeds the head.
            rows: only these rows of the map.
        """
        self._need_clip_head()
        device, picked = stages[0].device, []
        positions = [(torch.arange(stride // 2, cells, stride, device=device) + 0.5)
                     * (length / cells)
                     for cells, length in zip(self.plan.shown_hw, self.frame_hw, strict=True)]
        positions[0] = positions[0][rows]
        for stage in self.clip_stages:
            ys, xs = (self._axis(positions[axis], axis, stage) for axis in (0, 1))
            if self.config.clip_pool:
                found = _weigh_rows(stages[stage], ys)
                found = torch.matmul(xs.to(found.dtype), found).permute(0, 3, 1, 2)
            else:
                found = stages[stage][:, :, ys[:, None], xs]
            picked.append(found[:, :self.plan.widths[stage]].float())
        return self._clip_vectors(torch.cat(picked, dim=1))

    def _axis(self, positions: Tensor, axis: int, stage: int) -> Tensor:
        """Cells or shares of a stage's rows (axis 0) or columns (1) at positions in pixels."""
        length, cells = self.plan.padded_hw[axis], self.stage_hw(stage)[axis]
        if not self.config.clip_pool:
            return axis_cells(positions, length, cells)
        return axis_shares(positions, self.config.clip_pool * self.frame_hw[0], length, cells,
                           frame=self.frame_hw[axis])

    def stage_hw(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's output; stage 0 is the stem."""
        rest = math.prod(self.config.dec_strds[stage:])
        return self.plan.output_hw[0] // rest, self.plan.output_hw[1] // rest

    def _clip_vectors(self, picked: Tensor) -> Tensor:
        """[B, n, h, w] float32 to unit vectors [B, D, h, w]."""
        return F.normalize(self.clip_head(picked), dim=1)

    def forward(self, frames: Tensor | None, times: Tensor, centres: Tensor | None = None
                ) -> tuple[Tensor, Tensor | None]:
        """Frames [B, 3, H, W] and, where `centres` [P, 2] is given, embeddings [B, P, D]."""
        stages = self.stages(self.embed(frames, times))
        return self.rgb(stages[-1]), None if centres is None else self.clip_at(stages, centres)

    def part_sizes(self) -> dict[str, int]:
        """Values of each part; `stored` is what must be kept to show the video.

        Returns:
            encoder (hybrid only, not stored), embeddings (hybrid only), coordinate_encoder,
            decoder, rgb_head, clip_head, stored.
        """
        def count(name: str) -> int:
            module = getattr(self, name, None)
            return sum(p.numel() for p in module.parameters()) if module is not None else 0

        sizes = {name: count(name) for name in
                 ("encoder", "coordinate_encoder", "decoder", "rgb_head", "clip_head")}
        sizes["embeddings"] = self.plan.embed_values
        return sizes | {"stored": sum(sizes.values()) - sizes["encoder"]}

    def stored_state(self) -> dict[str, Tensor]:
        """The state that must be kept to show the video: all but the hybrid model's encoder."""
        return {n: t for n, t in self.state_dict().items() if not n.startswith("encoder.")}

    def _need_clip_head(self) -> None:
        if not self.config.predict_clip:
            raise ConfigError("this model has no CLIP head (predict_clip=False); "
                              "train with predict_clip=True to predict embeddings")


@dataclass(frozen=True)
class Plan:
    """What `modelsize` and the frame's size decide."""

    widths: list[int]  # channels after the stem and after each decoder stage
    kernels: list[int]  # of each decoder stage
    unfold: tuple[int, int]  # (fc_h, fc_w) that the stem unfolds its channels over
    embed_channels: int
    embed_values: int  # stored embedding values of all frames together; 0 for coordinates
    frame_hw: tuple[int, int]
    padded_hw: tuple[int, int]  # of the frame with its edges repeated below and to the right
    output_hw: tuple[int, int]  # of the decoder
    base: float  # of the sinusoidal encoding
    levels: int

    @property
    def pads(self) -> bool:
        """Whether the decoder's output holds more than the frame, below and to the right."""
        return self.padded_hw != self.frame_hw

    @property
    def shown_hw(self) -> tuple[int, int]:
        """Rows and columns of the decoder's output that show the frame, without the padding."""
        return self.frame_hw if self.pads else self.output_hw


def plan_model(config: ModelConfig, *, frame_hw: tuple[int, int], frame_count: int) -> Plan:
    """Solve the decoder's width from `modelsize`, as HNeRV's training script does.

    The stored values are about a·w² + b·w plus the embeddings' (and, for xyt, the coordinate
    encoder's, a deviation that keeps its size honest); biases and heads are left out.

    Raises:
        ConfigError: the encoder's strides do not divide the padded frame or pad it far too much,
            or `modelsize` is too small.
    """
    config, kind = resolve_model(config, frame_hw), embed_kind(config.embed)
    up = math.prod(config.dec_strds)
    padded_hw = _check_padding(config, frame_hw)
    values, extra, base, levels, unfold = 0, 0, 0.0, 0, (1, 1)
    if kind == "hybrid":
        down = math.prod(config.enc_strds)
        if padded_hw[0] % down or padded_hw[1] % down:
            raise ConfigError(
                f"the {'padded ' if config.pad_list else ''}frame {_size(padded_hw)} is not "
                f"divisible by the product {down} of enc_strds="
                f"'{' '.join(map(str, config.enc_strds))}'; use pad_list='auto'")
        if down < up:
            raise ConfigError(f"the product {up} of dec_strds is above the product {down} of "
                              "enc_strds; make them equal")
        h, w = padded_hw[0] // down, padded_hw[1] // down
        unfold = (down // up, down // up)
        share = config.enc_dim[1]
        channels = int(share if share >= 1 else
                       share * config.modelsize * 1e6 / frame_count / (h * w))
        if channels < 1:
            raise ConfigError(f"enc_dim='{config.enc_dim[0]}_{share}' leaves no embedding channel "
                              f"for {frame_count} frames; raise its second value")
        values = channels * h * w * frame_count
        b = 9 * channels * unfold[0] ** 2
        out_hw = (h * unfold[0] * up, w * unfold[1] * up)
    else:
        base, levels = float(config.embed.split("_")[1]), int(float(config.embed.split("_")[2]))
        out_hw = (config.fc_hw[0] * up, config.fc_hw[1] * up)
        if kind == "pe":
            channels, unfold = 2 * levels, config.fc_hw
            b = channels * math.prod(unfold)
        else:
            b = channels = int(config.enc_dim[0])
            extra = sum(p.numel() for p in Encoder(2 * levels, strides=(1,), widths=(channels,),
                                                   blocks=config.num_blks[0]).parameters())
    kernels = [min(config.ks[1] + 2 * i, config.ks[2]) for i in range(len(config.dec_strds))]
    by_stride = config.reduce == -1
    reductions = [math.sqrt(s) if by_stride else config.reduce for s in config.dec_strds]
    # Block i holds s²·k²·w_i·w_(i+1) weights, with w_i ≈ w₀ / rⁱ
    r = up ** (0.5 / len(reductions)) if by_stride else config.reduce
    a = sum(s**2 * k**2 * r ** -(2 * i + 1)
            for i, (s, k) in enumerate(zip(config.dec_strds, kernels, strict=True)))
    budget = config.modelsize * 1e6 - values - extra
    width = int((-b + math.sqrt(b * b + 4 * a * budget)) / (2 * a)) if budget > 0 else 0
    if width < 1:
        raise ConfigError(
            f"modelsize={config.modelsize} is too small: {values} embedding values "
            f"{'and a coordinate encoder of ' + str(extra) + ' ' if extra else ''}leave no room "
            f"for a decoder; use at least {(values + extra + a + b) / 1e6:.3f}")
    widths = [width]
    for reduction in reductions:
        widths.append(int(max(round(widths[-1] / reduction), config.lower_width)))
    return Plan(widths=widths, kernels=kernels, unfold=unfold, embed_channels=channels,
                embed_values=values, base=base, levels=levels, frame_hw=tuple(frame_hw),
                padded_hw=padded_hw, output_hw=out_hw)


def _check_padding(config: ModelConfig, frame_hw: tuple[int, int]) -> tuple[int, int]:
    """The padded frame's (H, W)."""
    padded = config.pad_list or tuple(frame_hw)
    if any(p < side for p, side in zip(padded, frame_hw)):
        raise ConfigError(f"pad_list {_size(padded)} is smaller than the frame {_size(frame_hw)}; "
                          "use pad_list='auto'")
    if math.prod(padded) > 2 * math.prod(frame_hw) and \
            config.enc_strds != choose_strides(frame_hw):
        raise ConfigError(
            f"enc_strds='{' '.join(map(str, config.enc_strds))}' pads the frame {_size(frame_hw)} "
            f"to {_size(padded)}, more than twice as large; leave enc_strds and dec_strds to auto, "
            "or give smaller ones, or a larger resize_list")
    return padded


def build_model(config: ModelConfig, *, frame_hw: tuple[int, int], frame_count: int, seed: int = 0
                ) -> HNeRV:
    """The network with its initial weights, the same for the same seed, on the CPU.

    Args:
        frame_hw: height and width of a frame, in pixels.
        frame_count: frames of the video; decides the embeddings' share of `modelsize`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HNeRV(config, frame_hw=frame_hw, frame_count=frame_count)


# The authors' names, as regular expressions, and ours
_HNERV_NAMES = (
    (r"^encoder\.downsample_layers\.(\d+)\.(\d)", r"encoder.stages.\1.\2"),
    (r"^encoder\.stages\.(\d+)\.(\d+)\.", lambda m: f"encoder.stages.{m[1]}.{int(m[2]) + 2}."),
    (r"\.dwconv\.", ".depthwise."), (r"\.pwconv1\.", ".expand."), (r"\.pwconv2\.", ".contract."),
    (r"\.gamma$", ".scale"), (r"\.conv\.(up|down)conv(\.0)?\.", ".conv."),
    (r"^head_layer\.", "rgb_head."),
)


def from_hnerv_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a hybrid model of the authors' implementation, for `load_state_dict`.

    Args:
        state: a state dict with ConvNeXt encoder and pixel-shuffle decoder.
    """
    renamed = {}
    for name, value in state.items():
        for i, (pattern, ours) in enumerate(_HNERV_NAMES):
            changed = re.sub(pattern, ours, name)
            if i == 0 and changed != name:  # a downsampling layer is complete with its new place
                name = changed
                break
            name = changed
        renamed[name] = value
    return renamed


def _weigh_rows(features: Tensor, rows: Tensor) -> Tensor:
    """Sums of the rows of [B, C, H, W] by weights [P, H] or [B, P, H]: [B, P, W, C]."""
    columns = features.permute(0, 2, 3, 1).flatten(2)  # [B, H, W·C], a view in channels-last
    return torch.matmul(rows.to(features.dtype), columns).unflatten(2, (features.shape[3], -1))


def _size(hw: tuple[int, int]) -> str:
    return f"{hw[0]}×{hw[1]}"


def frame_times(indices: Tensor, frame_count: int) -> Tensor:
    """Times of frames, index / T, float64 [B]."""
    return indices.double() / frame_count
