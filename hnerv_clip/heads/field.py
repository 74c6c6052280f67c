"""A semantic field: the embedding of any box at any time, read from a frozen video network.

The original head answers at a few supervised positions. This one is asked for a box: it samples a
small map of semantic features inside the box and turns them, with the box's position and size,
into an embedding. The map comes from what the network already stores (the per-frame embedding, or
a decoder stage's output), from latent maps of its own that are interpolated in time, or from both.
B frames, P boxes, D embedding size, T frames of the video, H and W frame height and width.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnerv_clip.config import ConfigError

OUTPUTS = ("linear", "relu")
LEAK = 0.01  # slope of the relu output below zero while it is fitted


@dataclass(frozen=True)
class FieldConfig:
    """What a field is built from. Plain values only: `to_dict` goes into a file's header."""

    dim: int  # D, values of the teacher's embedding
    frame_hw: tuple[int, int]
    frame_count: int  # T
    source_channels: int = 0  # channels of the frame's features; 0 takes the time alone
    source_stage: int = -1  # decoder stage that gives them; -1 is the per-frame embedding
    source_scale: float = 1.0  # they are multiplied by it
    up: int = 4  # how much finer the map is than those features, in each direction
    mid_channels: int = 32  # between the features and the map
    map_channels: int = 12
    map_hw: tuple[int, int] = (8, 16)
    keyframes: int = 0  # own latent maps, evenly over the video; 0 for none
    latent_channels: int = 0  # of them
    points: int = 3  # the map is sampled at points × points positions of a box
    hidden: int = 128
    layers: int = 2
    rank: int = 64  # values that the output basis combines
    output: str = "linear"  # linear, or relu for a teacher whose values are never negative
    frequencies: int = 4  # octaves of the sinusoidal encoding of a box
    size_range: tuple[float, float] = (0.3, 1.0)  # sides fitted, square root of area in heights
    aspect_range: tuple[float, float] = (0.5, 2.0)  # width / height fitted

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise ConfigError(f"output={self.output!r} is unknown; use one of {', '.join(OUTPUTS)}")
        if not self.source_channels and not self.keyframes:
            raise ConfigError("a field without source_channels needs keyframes of its own, at "
                              "least 2: use keyframes=16")

    def to_dict(self) -> dict[str, Any]:
        """Scalars only, pairs packed as "8_16", for the header of a file."""
        return {name: "_".join(map(str, value)) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FieldConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a name that this version does not know, or a pair that does not parse.
        """
        defaults = {f.name: f.type for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(defaults)):
            raise ConfigError(f"the field's configuration has {', '.join(unknown)}, which this "
                              "version does not know: update hnerv-clip")
        parsed = dict(values)
        for name, kind in defaults.items():
            if kind.startswith("tuple") and name in values:
                number = int if "int" in kind else float
                try:
                    low, high = (number(v) for v in str(values[name]).split("_"))
                except ValueError:
                    raise ConfigError(f"the field's {name}={values[name]!r} is not a pair such as "
                                      "8_16") from None
                parsed[name] = (low, high)
        return cls(**parsed)


class FieldHead(nn.Module):
    """`forward(features, times, boxes)` → unit embeddings [B, P, D]."""

    def __init__(self, config: FieldConfig):
        super().__init__()
        self.config = c = config
        if c.source_channels:
            self.mix = nn.Conv2d(c.source_channels, c.mid_channels, 3, padding=1)
            self.unfold = nn.Conv2d(c.mid_channels, c.map_channels * c.up**2, 1)
        channels = (c.map_channels if c.source_channels else 0) + c.latent_channels
        if c.keyframes:
            self.latents = nn.Parameter(torch.randn(c.keyframes, c.latent_channels, *c.map_hw))
        box_values = 4 * (1 + 2 * c.frequencies)
        self.first = nn.Linear(channels * c.points**2 + box_values, c.hidden)
        self.hidden = nn.ModuleList(nn.Linear(c.hidden, c.hidden) for _ in range(c.layers - 1))
        self.code = nn.Linear(c.hidden, c.rank)
        self.basis = nn.Linear(c.rank, c.dim)

    @classmethod
    def from_config(cls, config: FieldConfig | dict[str, Any]) -> FieldHead:
        """A field with random weights, for `load_state_dict`."""
        return cls(config if isinstance(config, FieldConfig) else FieldConfig.from_dict(config))

    def maps(self, features: Tensor | None, times: Tensor) -> Tensor:
        """The semantic map of each frame: [B, C, h, w].

        Args:
            features: [B, source_channels, …] of the frames; None where the field takes none.
            times: [B], in frames from 0 to T − 1, whole or not.
        """
        c, parts = self.config, []
        if c.source_channels:
            x = self.unfold(F.gelu(self.mix(features * c.source_scale)))
            parts.append(_resize(F.pixel_shuffle(x, c.up), c.map_hw))
        if c.keyframes:
            at = times.to(self.latents.dtype) * ((c.keyframes - 1) / max(c.frame_count - 1, 1))
            left = at.floor().clamp(0, max(c.keyframes - 2, 0))
            share = (at - left).view(-1, 1, 1, 1)
            left = left.long()
            right = (left + 1).clamp(max=c.keyframes - 1)
            parts.append(torch.lerp(self.latents[left], self.latents[right], share))
        return torch.cat(parts, dim=1)

    def codes(self, maps: Tensor, boxes: Tensor) -> Tensor:
        """What the basis combines: [B, P, rank], from `maps` and boxes [P, 4] or [B, P, 4]."""
        c = self.config
        boxes = boxes.to(maps.dtype)
        if boxes.ndim == 2:
            boxes = boxes.expand(len(maps), -1, -1)
        sampled = sample_boxes(maps, boxes, frame_hw=c.frame_hw, points=c.points)
        x = self.first(torch.cat([sampled, encode_boxes(
            boxes, frame_hw=c.frame_hw, frequencies=c.frequencies)], dim=-1))
        for layer in self.hidden:
            x = layer(F.gelu(x))
        return self.code(F.gelu(x))

    def forward(self, features: Tensor | None, times: Tensor, boxes: Tensor) -> Tensor:
        """Unit embeddings [B, P, D].

        Args:
            features: [B, source_channels, …]: per-frame embeddings, or the outputs of decoder
                stage `source_stage`; None where the field takes none.
            times: [B], in frames from 0 to T − 1, whole or not.
            boxes: [P, 4], or [B, P, 4] for boxes of each frame: top, left, height, width in frame
                pixels, whole or not. See `check_boxes`.
        """
        return F.normalize(self.decode(self.codes(self.maps(features, times), boxes)), dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [..., rank] to embeddings [..., D] of any length."""
        x = self.basis(codes)
        if self.config.output == "linear":
            return x
        return F.leaky_relu(x, LEAK) if self.training else F.relu(x)

    def scorer(self, queries: Tensor) -> Callable[[Tensor], Tensor]:
        """Cosines of unit queries [K, D] with embeddings, from codes [..., rank]: [..., K].

        For a linear output they need no embedding: W c + b meets the queries in their span, and its
        length comes from Wᵀ W.
        """
        if self.config.output != "linear":
            def score_decoded(codes: Tensor) -> Tensor:
                vectors = self.decode(codes)
                return vectors @ queries.T / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            return score_decoded
        weight = torch.cat([self.basis.weight, self.basis.bias[:, None]], dim=1)  # [D, rank + 1]
        gram, met = weight.T @ weight, queries @ weight

        def score(codes: Tensor) -> Tensor:
            codes = F.pad(codes, (0, 1), value=1.0)
            length = ((codes @ gram) * codes).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
            return codes @ met.T / length

        return score

    def parameter_count(self) -> int:
        """Values to be stored."""
        return sum(p.numel() for p in self.parameters())


def encode_boxes(boxes: Tensor, *, frame_hw: tuple[int, int], frequencies: int) -> Tensor:
    """Center and size of boxes, plain and through sines and cosines: [..., 4·(1 + 2·frequencies)].

    Args:
        boxes: [..., 4] top, left, height, width in frame pixels.
    """
    height, width = frame_hw
    top, left, tall, wide = boxes.unbind(-1)
    values = torch.stack([(2 * top + tall) / height - 1, (2 * left + wide) / width - 1,
                          torch.log(tall / height), torch.log(wide / height)], dim=-1)
    if not frequencies:
        return values
    octaves = 2.0 ** torch.arange(frequencies, device=boxes.device) * (math.pi / 2)
    angles = (values[..., None] * octaves).flatten(-2)
    return torch.cat([values, angles.sin(), angles.cos()], dim=-1)


def sample_boxes(maps: Tensor, boxes: Tensor, *, frame_hw: tuple[int, int], points: int) -> Tensor:
    """A map's values at evenly spaced points of each box, bilinear: [B, P, C·points²].

    Args:
        maps: [B, C, h, w], spanning the frame.
        boxes: [B, P, 4] top, left, height, width in frame pixels.
    """
    height, width = frame_hw
    inside = (torch.arange(points, device=maps.device, dtype=maps.dtype) + 0.5) / points
    top, left, tall, wide = boxes[..., None].unbind(-2)  # [B, P, 1]
    y = (top + tall * inside) * (2 / height) - 1  # [B, P, points], -1 and 1 at the edges
    x = (left + wide * inside) * (2 / width) - 1
    grid = torch.stack([x[..., None, :].expand(*x.shape[:2], points, points),
                        y[..., :, None].expand(*y.shape[:2], points, points)], dim=-1)
    sampled = F.grid_sample(maps, grid.flatten(2, 3), mode="bilinear", padding_mode="border",
                          align_corners=False)  # [B, C, P, points²]
    return sampled.permute(0, 2, 1, 3).flatten(2)


def check_boxes(boxes: Tensor, frame_hw: tuple[int, int], *,
                size_range: tuple[float, float] | None = None) -> None:
    """Refuse boxes that cannot be asked about; warn of those smaller than any that was fitted.

    Args:
        boxes: [..., 4] top, left, height, width in frame pixels.
        size_range: sides that were fitted, square root of the area in frame heights.
    Raises:
        ConfigError: another shape, not finite, empty, or reaching outside the frame.
    """
    height, width = frame_hw
    if boxes.ndim < 1 or boxes.shape[-1] != 4 or not boxes.numel():
        raise ConfigError(f"boxes have shape {tuple(boxes.shape)}; give [P, 4]: top, left, height, "
                          "width in pixels")
    rows = boxes.detach().reshape(-1, 4).double().cpu()
    for bad, why in [
            (~rows.isfinite().all(1), "is not finite"),
            ((rows[:, 2:] <= 0).any(1), "is empty: height and width must be above 0"),
            ((rows[:, :2] < -1e-3).any(1) | (rows[:, 0] + rows[:, 2] > height + 1e-3)
             | (rows[:, 1] + rows[:, 3] > width + 1e-3),
             f"reaches outside the frame {height}×{width}: cut it at the frame's edge")]:
        if bad.any():
            box = ", ".join(f"{value:g}" for value in rows[bad][0].tolist())
            raise ConfigError(f"box ({box}) as top, left, height, width {why}")
    if size_range is None:
        return
    smallest = float((rows[:, 2] * rows[:, 3]).sqrt().min()) / height
    if smallest < 0.95 * size_range[0]:
        warnings.warn(
            f"a box of side {smallest:.2f} frame heights is smaller than any that the field was "
            f"fitted to ({size_range[0]:g}): its embedding is a guess; ask for a larger box, or "
            "fit again with smaller ones", stacklevel=3)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
