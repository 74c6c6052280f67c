"""Fitting a field to teacher embeddings of boxes, down to the bytes that it will be stored in.

In the last part of the fit weights are rounded to a learned step (LSQ, Esser et al. 2020, arXiv
1902.08153), and a penalty on their estimated bits trades the field's size against its agreement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnerv_clip.config import ConfigError
from hnerv_clip.heads.field import FieldConfig, FieldHead

FIRST_STEP = 1 / 16  # of a tensor's root mean square, where rounding begins


@dataclass(frozen=True)
class FitSettings:
    """How a field is fitted."""

    steps: int = 4000
    frames: int = 32  # a step
    boxes: int = 64  # of each of them
    lr: float = 4e-3  # largest learning rate of Adam: linear warm-up, cosine to 0
    weight_decay: float = 1e-4
    rounding: float = 0.4  # last share of the steps, in which weights are rounded; 0 for never
    rate_weight: float = 1e-7  # of the estimated bits in the loss, which is 1 − cosine
    between: float = 0.5  # share of frames that a step sees as interpolated from their neighbors
    patches: float = 0.0  # share of boxes that are patches of the run, see `fit_field`
    bf16: bool = False  # the perceptron's products in bf16, until weights are rounded
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("between", "patches", "rounding"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name):g} is a share: give 0 to 1")


def fit_field(config: FieldConfig, features: Tensor | None, times: Tensor, boxes: Tensor,
              targets: Tensor, *, between: Tensor | None = None, patches: int = 0,
              settings: FitSettings = FitSettings(),
              progress: Callable[[int, float], None] | None = None
              ) -> tuple[FieldHead, dict[str, float]]:
    """Fit a field; on a GPU as CUDA graphs of whole steps.

    Args:
        features: [N, C, …] of N training frames; None for a field of time alone.
        times: [N], in frames.
        boxes: [N, P, 4] top, left, height, width in pixels.
        targets: [N, P, D] unit embeddings, any float type, on the device that fits.
        between: features of the same frames as interpolated from the training frames around each,
            as held-out frames are; for `settings.between`.
        patches: so many of the boxes, the last ones, are drawn with the share `settings.patches`.
        progress: called with (steps done, loss) now and then.
    Returns:
        The field in eval mode, its weights whole multiples of their steps; and the steps by
        parameter name, empty without rounding.
    Raises:
        ConfigError: shapes that do not belong together, or a fit that diverged.
    """
    if targets.shape[:2] != boxes.shape[:2] or targets.shape[2] != config.dim \
            or len(times) != len(boxes):
        raise ConfigError(f"boxes {tuple(boxes.shape)}, targets {tuple(targets.shape)} and times "
                          f"{tuple(times.shape)} do not belong together, or D is not {config.dim}")
    device = targets.device
    fit = _Fit(config, features, times, boxes, targets, settings, between=between, patches=patches)
    begin = round(settings.steps * (1 - settings.rounding))
    for first, last, rounded in ((0, begin, False), (begin, settings.steps, True)):
        if last > first:
            if rounded:
                fit.begin_rounding()
            _repeat(lambda r=rounded: fit.step(r), last - first, device,
                    lambda done, f=first: progress and progress(f + done, float(fit.loss)))
    if not math.isfinite(float(fit.loss)):
        raise ConfigError(f"the field's fit diverged (loss {float(fit.loss)}): use a smaller lr "
                          f"than {settings.lr:g}")
    return fit.finish()


def _repeat(step, count: int, device: torch.device, report) -> None:
    """Run a step so many times; on a GPU it is captured once and replayed."""
    if device.type != "cuda":
        for i in range(count):
            step()
            if i % 100 == 99:
                report(i + 1)
        return
    warm = min(3, count)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    if count == warm:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(count - warm):
        graph.replay()
        if i % 500 == 499:
            report(warm + i + 1)


class _Fit:
    """The state of one fit: weights, optimizer, and what a step needs on the device."""

    def __init__(self, config: FieldConfig, features: Tensor | None, times: Tensor, boxes: Tensor,
                 targets: Tensor, settings: FitSettings, *, between: Tensor | None = None,
                 patches: int = 0):
        device = targets.device
        self.settings, self.device, self.patches = settings, device, patches
        self.features = None if features is None else features.detach().float().to(device)
        self.between = None if between is None else between.detach().float().to(device)
        self.times, self.boxes = times.to(device).float(), boxes.to(device).float()
        self.targets = targets
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed)  # `pca_lowrank` draws, too
            self.head = FieldHead(config)
            start_basis(self.head, targets)
        self.head.to(device).train()
        self.names = [name for name, _ in self.head.named_parameters()]
        self.weights = list(self.head.parameters())
        self.log_steps = nn.Parameter(torch.zeros(len(self.weights), device=device))
        self.count = torch.zeros((), device=device)
        self.loss = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [{"params": self.weights, "weight_decay": settings.weight_decay},
             {"params": [self.log_steps], "weight_decay": 0.0}], betas=(0.9, 0.99),
            lr=torch.zeros((), device=device) if cuda else settings.lr, capturable=cuda, fused=cuda)
        self.generator = None
        if not cuda:
            self.generator = torch.Generator().manual_seed(settings.seed)
        else:
            torch.cuda.manual_seed(settings.seed)

    def begin_rounding(self) -> None:
        with torch.no_grad():
            rms = torch.stack([w.square().mean().sqrt() for w in self.weights])
            self.log_steps.copy_((rms * FIRST_STEP + 1e-12).log())

    def rounded(self) -> tuple[dict[str, Tensor], Tensor]:
        """Weights as whole multiples of their steps, differentiable, and their estimated bits."""
        values, bits, steps = {}, 0.0, self.log_steps.exp()
        for i, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            scaled = weight / steps[i]
            values[name] = (scaled + (scaled.round() - scaled).detach()) * steps[i]
            axis = scale_axis(weight)
            others = [d for d in range(weight.ndim) if d != axis]
            power = scaled.square().mean(others) if axis is not None else scaled.square().mean()
            bits = bits + (0.5 * torch.log2(2 * math.pi * math.e * (power + 1 / 12))
                           ).sum() * (weight.numel() / power.numel())
        return values, bits

    def step(self, rounded: bool) -> None:
        s = self.settings
        count, per_frame = self.boxes.shape[0], self.boxes.shape[1] - self.patches
        draws = {"device": self.device, "generator": self.generator}
        frame = torch.randint(count, (s.frames,), **draws)
        box = torch.randint(per_frame, (s.frames, s.boxes), **draws)
        if self.patches and s.patches:
            patch = per_frame + torch.randint(self.patches, box.shape, **draws)
            box = torch.where(torch.rand(box.shape, **draws) < s.patches, patch, box)
        features = None if self.features is None else self.features[frame]
        if self.between is not None and s.between:
            chosen = torch.rand(s.frames, **draws) < s.between
            features = torch.where(chosen.view(-1, *[1] * (features.ndim - 1)),
                                   self.between[frame], features)
        inputs = (features, self.times[frame], self.boxes[frame[:, None], box])
        target = self.targets[frame[:, None], box].float()
        self.optimizer.zero_grad(set_to_none=True)
        if rounded:
            values, bits = self.rounded()
            output = torch.func.functional_call(self.head, values, inputs)
        else:
            maps = self.head.maps(*inputs[:2])  # boxes need full precision
            with torch.autocast(self.device.type, torch.bfloat16, enabled=s.bf16):
                output = self.head.decode(self.head.codes(maps, inputs[2]))
            output, bits = F.normalize(output.float(), dim=-1), 0.0
        error = 1 - (output * target).sum(-1).mean()
        (error + s.rate_weight * bits).backward()
        if not rounded:
            self.log_steps.grad = torch.zeros_like(self.log_steps)
        self.count += 1
        share = self.count / s.steps
        rate = s.lr * torch.minimum((1 + torch.cos(math.pi * share)) / 2, share / 0.05)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # on a GPU, where a graph reads it
                group["lr"].copy_(rate)
            else:
                group["lr"] = float(rate)
        self.optimizer.step()
        self.loss.copy_(error.detach())

    @torch.no_grad()
    def finish(self) -> tuple[FieldHead, dict[str, float]]:
        if not self.settings.rounding:
            return self.head.eval(), {}
        steps = self.log_steps.exp().float().cpu()
        for weight, step in zip(self.weights, steps.tolist(), strict=True):
            weight.copy_((weight / step).round() * step)
        return self.head.eval(), dict(zip(self.names, steps.tolist(), strict=True))


def scale_axis(weight: Tensor) -> int | None:
    """The axis along which a weight's spread varies: its shorter one, none for a vector."""
    if weight.ndim < 2:
        return None
    if weight.ndim == 4:
        return 0 if weight.shape[2] == weight.shape[3] else 1  # a convolution, or latent maps
    return 0 if weight.shape[0] <= weight.shape[1] else 1


@torch.no_grad()
def start_basis(head: FieldHead, targets: Tensor, *, sample: int = 8192) -> None:
    """Start the output basis at the mean and principal components of the targets."""
    flat = targets.flatten(0, 1)
    flat = flat[:: max(1, len(flat) // sample)].float()
    mean = flat.mean(0)
    _, spread, rows = torch.pca_lowrank(flat - mean, q=min(head.config.rank, *flat.shape),
                                        center=False, niter=2)
    scale = spread / math.sqrt(len(flat))
    rank = min(head.config.rank, rows.shape[1])
    # In units in which the mean embedding has length about 1 per value, as the weights around it
    gain = math.sqrt(head.config.dim)
    head.basis.weight.zero_()
    head.basis.weight[:, :rank] = (rows * scale)[:, :rank].cpu() * gain
    head.basis.bias.copy_(mean.cpu() * gain)
