"""The network: an embedding per frame, a decoder, an RGB head and a CLIP head.

HNeRV (Chen et al. 2023, arXiv 2304.02633) with a second output. The parameters are those of the
authors' implementation: `from_hnerv_state` renames its weights, which then give its output.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hnerv_clip.config import ConfigError, ModelConfig, clip_stages, embed_kind, resolve_model
from hnerv_clip.heads.clip import ClipHead
from hnerv_clip.heads.rgb import RgbHead
from hnerv_clip.layers import Encoder, Stem, UpBlock, sinusoids
from hnerv_clip.sizes import choose_strides


def pad_edges(frames: Tensor, padded_hw: tuple[int, int]) -> Tensor:
    """[B, C, H, W] of any type with its last row and column repeated, to `padded_hw` (H', W')."""
    height, width = frames.shape[2:]
    if (height, width) == tuple(padded_hw):
        return frames
    padded = frames.new_empty(*frames.shape[:2], *padded_hw)
    padded[..., :height, :width] = frames
    padded[..., :height, width:] = frames[..., -1:]
    padded[..., height:, :] = padded[..., height - 1:height, :]
    return padded


class HNeRV(nn.Module):
    """A video as a network. Build it with `build_model`.

    `embed` → `stages` → `rgb` of the last, `clip_at` or `clip_map` of all; calling the module does
    all in one.
    """

    def __init__(self, config: ModelConfig, *, frame_hw: tuple[int, int], frame_count: int,
                 plan: Plan | None = None):
        """
        Args:
            plan: widths other than `plan_model`'s.
        """
        super().__init__()
        config = resolve_model(config, frame_hw)
        self.config, self.frame_hw, self.frame_count = config, frame_hw, frame_count
        self.kind = embed_kind(config.embed)
        self.plan = plan = plan or plan_model(config, frame_hw=frame_hw, frame_count=frame_count)
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
        self.rgb_head = RgbHead(plan.widths[-1], out_bias=config.out_bias, frame_hw=frame_hw,
                                pads=plan.pads)
        if config.predict_clip:
            self.clip_stages = clip_stages(config)
            self.clip_head = ClipHead(
                self.clip_stages, widths=[plan.widths[i] for i in self.clip_stages],
                stage_hws=[self.stage_hw(i) for i in self.clip_stages], clip_dim=config.clip_dim,
                clip_pool=config.clip_pool, frame_hw=frame_hw, padded_hw=plan.padded_hw,
                map_hw=plan.shown_hw)
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
        """The input of a coordinate model: the encoded time, and for xyt also the position.

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
                if isinstance(block, UpBlock):
                    block.multiple = multiple

    def rgb(self, features: Tensor) -> Tensor:
        """[B, n, H', W'] features to frames [B, 3, H, W], in [0, 1] for tanh and sigmoid."""
        return self.rgb_head(features)

    def clip_at(self, stages: list[Tensor], centres: Tensor) -> Tensor:
        """Embeddings [B, P, D] at positions of the frame; see `ClipHead.at`."""
        return self.need_clip_head().at(stages, centres)

    def clip_map(self, stages: list[Tensor], *, stride: int = 1, rows: slice = slice(None)
                 ) -> Tensor:
        """The dense map of embeddings; see `ClipHead.map`."""
        return self.need_clip_head().map(stages, stride=stride, rows=rows)

    def stage_hw(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's output; stage 0 is the stem."""
        rest = math.prod(self.config.dec_strds[stage:])
        return self.plan.output_hw[0] // rest, self.plan.output_hw[1] // rest

    def forward(self, frames: Tensor | None, times: Tensor, centres: Tensor | None = None
                ) -> tuple[Tensor, Tensor | None]:
        """Frames [B, 3, H, W] and, where `centres` [P, 2] is given, embeddings [B, P, D]."""
        stages = self.stages(self.embed(frames, times))
        return self.rgb(stages[-1]), None if centres is None else self.clip_at(stages, centres)

    def part_sizes(self) -> dict[str, int]:
        """Values of each part; `stored` is what must be stored to play the video.

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
        """The state that must be stored to play the video: all but the hybrid model's encoder."""
        return {n: t for n, t in self.state_dict().items() if not n.startswith("encoder.")}

    def need_clip_head(self) -> ClipHead:
        """The CLIP head, or ConfigError where there is none."""
        if not self.config.predict_clip:
            raise ConfigError("this model has no CLIP head (predict_clip=False); "
                              "train with predict_clip=True to predict embeddings")
        return self.clip_head


@dataclass(frozen=True)
class Plan:
    """The sizes that follow from `modelsize` and the frame size."""

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
    plan = Plan(widths=[], kernels=kernels, unfold=unfold, embed_channels=channels,
                embed_values=values, base=base, levels=levels, frame_hw=tuple(frame_hw),
                padded_hw=padded_hw, output_hw=out_hw)
    by_stride = config.reduce == -1
    # Block i holds s²·k²·w_i·w_(i+1) weights, with w_i ≈ w₀ / rⁱ
    r = up ** (0.5 / len(config.dec_strds)) if by_stride else config.reduce
    a = sum(s**2 * k**2 * r ** -(2 * i + 1)
            for i, (s, k) in enumerate(zip(config.dec_strds, kernels, strict=True)))
    budget = config.modelsize * 1e6 - values - extra
    width = int((-b + math.sqrt(b * b + 4 * a * budget)) / (2 * a)) if budget > 0 else 0
    if width < 1:
        raise ConfigError(
            f"modelsize={config.modelsize} is too small: {values} embedding values "
            f"{'and a coordinate encoder of ' + str(extra) + ' ' if extra else ''}leave no room "
            f"for a decoder; use at least {(values + extra + a + b) / 1e6:.3f}")
    return dataclasses.replace(plan, widths=_narrow(width, config))


def _narrow(width: int, config: ModelConfig) -> list[int]:
    """Channels after the stem, `width`, and after each decoder stage."""
    widths = [width]
    for stride in config.dec_strds:
        reduction = math.sqrt(stride) if config.reduce == -1 else config.reduce
        widths.append(int(max(round(widths[-1] / reduction), config.lower_width)))
    return widths


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


def _size(hw: tuple[int, int]) -> str:
    return f"{hw[0]}×{hw[1]}"


def frame_times(indices: Tensor, frame_count: int) -> Tensor:
    """Times of frames, index / T, float64 [B]."""
    return indices.double() / frame_count
