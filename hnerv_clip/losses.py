"""Losses and schedules: functions of tensors and numbers, and what the CLIP head is trained to.

total = pixel + λ·(1 − mean cosine), the second term from epoch `pixel_loss_warmup_epochs` on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_msssim import ssim
from pytorch_msssim.ssim import _ssim as ssim_maps
from torch import Tensor

from hnerv_clip.config import Config, ConfigError, parse_lr_type
from hnerv_clip.model import HNeRV
from hnerv_clip.patches import linear_weights

# Each pixel loss as weights of its terms; the Fusion mixtures are HNeRV's.
PIXEL_LOSSES: dict[str, dict[str, float]] = {
    "L2": {"l2": 1.0},
    "L1": {"l1": 1.0},
    "SSIM": {"ssim": 1.0},
    "Fusion1": {"l2": 0.3, "ssim": 0.7},
    "Fusion2": {"l1": 0.3, "ssim": 0.7},
    "Fusion3": {"l2": 0.5, "ssim": 0.5},
    "Fusion4": {"l1": 0.5, "ssim": 0.5},
    "Fusion5": {"l2": 0.7, "ssim": 0.3},
    "Fusion6": {"l1": 0.7, "ssim": 0.3},
    "Fusion7": {"l2": 0.7, "l1": 0.3},
    "Fusion8": {"l2": 0.5, "l1": 0.5},
    "Fusion9": {"l1": 0.9, "ssim": 0.1},
    "Fusion10": {"l1": 0.7, "ms_ssim": 0.3},
    "Fusion11": {"l1": 0.9, "ms_ssim": 0.1},
    "Fusion12": {"l1": 0.8, "ms_ssim": 0.2},
}
TEMPERATURE = 0.07  # of the contrastive loss: CLIP's initial value
MS_SSIM_MIN_SIDE = 161  # five scales of an 11-pixel window


class SsimConstants(NamedTuple):
    """What SSIM and MS-SSIM read beside the frames, as Wang et al. give it, on the device.

    A copy from the CPU within a step would stop it until the GPU is done, and cannot be captured in
    a CUDA graph.
    """

    window: Tensor  # [3, 1, 1, 11] Gaussian, σ = 1.5
    scales: Tensor  # [5, 1, 1] exponents of MS-SSIM


def ssim_constants(device: torch.device) -> SsimConstants:
    """Make them; once, before steps are captured."""
    offsets = torch.arange(11, dtype=torch.float) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (window / window.sum()).repeat(3, 1, 1, 1)
    scales = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]).view(5, 1, 1)
    return SsimConstants(window.to(device), scales.to(device))


def _l2(pred: Tensor, target: Tensor, _) -> Tensor:
    return (pred - target).square().flatten(1).mean(1)


def _l1(pred: Tensor, target: Tensor, _) -> Tensor:
    return (pred - target).abs().flatten(1).mean(1)


def _ssim(pred: Tensor, target: Tensor, constants: SsimConstants) -> Tensor:
    return 1 - ssim(pred, target, data_range=1, size_average=False, win=constants.window)


def _ms_ssim(pred: Tensor, target: Tensor, constants: SsimConstants) -> Tensor:
    """As `pytorch_msssim.ms_ssim`, whose backward pass asks the GPU for a number and so cannot be
    captured; and a scale without any contrast has a gradient of 0 here, there it is NaN."""
    check_ms_ssim_size(pred.shape[-2:])
    product = 1.0
    for scale, exponent in enumerate(constants.scales):
        whole, contrast = ssim_maps(pred, target, data_range=1, win=constants.window)
        last = scale == len(constants.scales) - 1
        product = product * (whole if last else contrast).clamp(min=1e-8) ** exponent  # [B, 3]
        if not last:
            padding = [side % 2 for side in pred.shape[2:]]
            pred, target = (F.avg_pool2d(x, 2, padding=padding) for x in (pred, target))
    return 1 - product.mean(1)


_TERMS = {"l2": _l2, "l1": _l1, "ssim": _ssim, "ms_ssim": _ms_ssim}


def check_ms_ssim_size(frame_hw: tuple[int, int]) -> None:
    """Raise ConfigError where MS-SSIM with its five scales is not defined."""
    if min(frame_hw) < MS_SSIM_MIN_SIDE:
        raise ConfigError(f"MS-SSIM needs frames of at least {MS_SSIM_MIN_SIDE} pixels a side, not "
                          f"{frame_hw[0]}×{frame_hw[1]}; use a larger resize_list, or loss=Fusion6")


def pixel_loss(pred: Tensor, target: Tensor, *, loss: str = "L2", mask: Tensor | None = None,
               constants: SsimConstants | None = None) -> Tensor:
    """Reconstruction loss of each frame.

    Args:
        pred, target: [B, 3, H, W] float in [0, 1].
        loss: a row of `PIXEL_LOSSES`.
        mask: [H, W] of 1 where pixels count and 0 where not; both frames are multiplied by it, as
            HNeRV's inpainting does.
        constants: `ssim_constants` of the device, made anew by default.
    Returns:
        [B].
    Raises:
        ValueError: shapes differ, or an unknown loss.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ")
    if loss not in PIXEL_LOSSES:
        raise ValueError(f"loss={loss!r} is unknown; use one of {', '.join(PIXEL_LOSSES)}")
    if mask is not None:
        pred, target = pred * mask, target * mask
    if constants is None and needs_ssim(loss):
        constants = ssim_constants(pred.device)
    return sum(weight * _TERMS[term](pred, target, constants)
               for term, weight in PIXEL_LOSSES[loss].items())


def needs_ssim(loss: str) -> bool:
    """Whether SSIM or MS-SSIM is one of a loss's terms."""
    return bool({"ssim", "ms_ssim"} & set(PIXEL_LOSSES[loss]))


def clip_loss(pred: Tensor, target: Tensor) -> Tensor:
    """1 − mean cosine over a frame's patches.

    Args:
        pred, target: [B, P, D] unit vectors.
    Returns:
        [B].
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ")
    return 1 - (pred * target).sum(-1).mean(-1)


class ClipObjective:
    """The objective of the CLIP head; its tensors are made once and stay on the device.

    Nothing in a call waits for the GPU or depends on values for its shapes, so that a step with it
    can be captured in a CUDA graph.
    """

    def __init__(self, config: Config, model: HNeRV, *, targets: Tensor, centres: Tensor,
                 train: Sequence[int]):
        """
        Args:
            targets: [T, P, D] unit vectors of the teacher.
            centres: [P, 2] (y, x) patch centres in frame pixels, row by row of a grid.
            train: the frames that train; the mean and the contrasts come from them alone.
        """
        device = next(model.parameters()).device
        self.model, self.kind = model, config.train.clip_loss_type
        self.jitter, self.seed = config.train.clip_jitter, config.train.seed
        self.targets, self.centres = targets.to(device), centres.to(device)
        self.axes = [self.centres[:, axis].unique() for axis in (0, 1)]  # rows' y, columns' x
        self.cells = model.clip_head.cells(self.centres)
        known = self.targets[torch.as_tensor(np.asarray(train), device=device)]  # [T', P, D]
        self.centre = known.mean((0, 1))
        self.contrasts = F.normalize(known.flatten(0, 1) - self.centre, dim=1)  # [T'·P, D]

    def __call__(self, stages: list[Tensor], indices: Tensor, key: Tensor
                 ) -> tuple[Tensor, Tensor]:
        """1 − mean cosine of frames, and the term that is minimised: both [B].

        They are the same tensor for `clip_loss_type=cosine`.

        Args:
            stages: what `HNeRV.stages` returned for the frames.
            indices: int64 [B] frames.
            key: float32 scalar that differs from step to step and that a resumed run repeats, as
                the learning rate does; it seeds the jitter.
        """
        cells, target = self.cells, self.targets[indices]
        if self.jitter:
            moved = self.centres + self._moves(indices, key)
            moved = torch.stack([moved[..., i].clamp(ends[0], ends[-1])
                                 for i, ends in enumerate(self.axes)], dim=-1)
            cells, target = self.model.clip_head.cells(moved), self._target_at(target, moved)
        pred = self.model.clip_head.at_cells(stages, cells)
        cosine = clip_loss(pred, target)
        if self.kind == "cosine":
            return cosine, cosine
        pred, target = (F.normalize(v - self.centre, dim=-1) for v in (pred, target))
        term = clip_loss(pred, target) if self.kind == "centred" else \
            contrastive_loss(pred, target, self.contrasts)
        return cosine, term

    def _target_at(self, target: Tensor, positions: Tensor) -> Tensor:
        """The teacher's embeddings [B, P, D] interpolated, bilinearly, at positions [B, P, 2]."""
        rows, cols = (linear_weights(positions[..., axis], known)
                      for axis, known in enumerate(self.axes))
        weights = (rows[..., :, None] * cols[..., None, :]).flatten(-2)  # [B, P, P]
        # a sum, not a product of matrices, which autocast would compute in half precision
        return F.normalize((weights[..., None] * target[:, None]).sum(2), dim=-1)

    def _moves(self, indices: Tensor, key: Tensor) -> Tensor:
        """Uniform in ±jitter pixels for each frame, patch and axis: [B, P, 2]."""
        step = _scramble(key.view(torch.int32).long() + self.seed)
        counter = indices[:, None] * self.centres.numel() + torch.arange(
            self.centres.numel(), device=indices.device)
        noise = _scramble(_scramble(counter) + step).double() / 2**32
        return ((2 * noise - 1) * self.jitter).float().view(len(indices), -1, 2)


def _scramble(x: Tensor) -> Tensor:
    """A hash of the low 32 bits of int64 values, in [0, 2³²).

    C. Wellons, «Prospecting for hash functions», `hash32` of bias 0.107: the factors keep products
    within 63 bits.
    """
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def contrastive_loss(pred: Tensor, target: Tensor, contrasts: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) against a bank of other embeddings.

    Multiplied by its temperature, a deviation that makes its gradients as large as a cosine's:
    τ·log Σ exp(s/τ) − s⁺, mean over a frame's patches.

    Args:
        pred, target: [B, P, D] unit vectors.
        contrasts: [N, D] unit vectors, the targets among them.
    Returns:
        [B].
    """
    matching = (pred * target).sum(-1)
    others = torch.matmul(pred, contrasts.T) / TEMPERATURE
    return (TEMPERATURE * others.logsumexp(-1) - matching).mean(-1)


def clip_weight(epoch: int, *, clip_loss_weight: float, pixel_loss_warmup_epochs: int) -> float:
    """λ of an epoch (counted from 0): 0 in the warm-up, `clip_loss_weight` after it."""
    return 0.0 if epoch < pixel_loss_warmup_epochs else clip_loss_weight


def learning_rate(progress: float, *, lr: float, lr_type: str = "cosine_0.1_1_0.1") -> float:
    """Warm-up, then cosine to 0, as in HNeRV.

    Args:
        progress: share of training that is done, in [0, 1).
        lr: the peak.
        lr_type: cosine_SHARE_POWER_START: from START·lr to lr over the first SHARE of training.
    """
    share, power, start = parse_lr_type(lr_type)
    if progress < share:
        return lr * (start + (1 - start) * (progress / share) ** power)
    return lr * 0.5 * (math.cos(math.pi * (progress - share) / (1 - share)) + 1)
