"""Fewer bytes at the same quality: a trained network fine-tuned for its quantised self.

Weights and per-frame embeddings are rounded to multiples of learned steps in every forward pass,
one for each input channel of a layer (straight-through gradients; LSQ, Esser et al. 2020, arXiv
1902.08153), and an estimate of the coded
size joins the loss: distortion + `rate` · bits per pixel. The estimate is the entropy of two-sided
geometric distributions whose spread is a product of one number per row and one per column of a
tensor, which is how `codec` codes them (dual axes as in NVRC, arXiv 2409.07414).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from hnerv_clip.codec.about import describe_dataset
from hnerv_clip.codec.levels import stored_step
from hnerv_clip.codec.network import EMBEDDINGS
from hnerv_clip.codec.video import encode_video
from hnerv_clip.config import Config
from hnerv_clip.dataset import Dataset
from hnerv_clip.devices import set_precision
from hnerv_clip.inference import embed_frames
from hnerv_clip.losses import ClipObjective, learning_rate, pixel_loss
from hnerv_clip.metrics import psnr
from hnerv_clip.model import HNeRV, build_model, frame_times

STEP_LR = 5e-3  # of the logarithms of the steps
FIRST_LEVEL = 5.0  # mean absolute level of a weight at first: about 4.8 bits each
# A target for the rate. Each epoch the logarithm of the weight of bits moves by that of the rate's
# excess times a gain: the first value divided by all epochs, at most the second. The rate may
# exceed the target by SLACK at first, less and less: a falling learning rate lowers it at a
# constant weight, and a larger weight until then costs quality in the end.
RATE_GAIN, SLACK = (24.0, 0.3), 0.15
FIRST_LEVEL_BIAS = 30.0  # of biases, which are few and matter
SCHEDULE = "cosine_0.05_1_0.1"


@dataclass
class Tuned:
    """A network fine-tuned for its file.

    steps: by tensor, as `encode_video` takes them: of weights, one for each
    input channel. history: per epoch, what the quantised network
    measures of its training frames: pixel_loss, clip_loss, psnr_db, rate_bpp (estimated); and
    rate, the weight of a bit per pixel.
    """

    model: HNeRV
    embeddings: Tensor | None  # [T, C, h, w]
    steps: dict[str, float | Tensor]
    history: list[dict[str, float]] = field(default_factory=list)

    def store(self, path: str | Path, dataset: Dataset, config: Config) -> int:
        """Write the file; returns its size_bytes."""
        return encode_video(self.model, self.embeddings, path, config=config, steps=self.steps,
                            about=describe_dataset(dataset, config))


def fine_tune(model: HNeRV, dataset: Dataset, config: Config, *, rate: float, epochs: int = 60,
              lr: float = 5e-4, compiled: bool | None = None, progress: bool = True,
              tuner: Tuner | None = None, start: Tuned | None = None,
              target_bpp: float | None = None) -> Tuned:
    """Fine-tune a trained network for quality at few bytes; the encoder is not needed any more.

    Args:
        model: trained, on the device to work on; it is left as it is.
        config: of its run; loss, clip_loss_weight, batch_size, precision and seed are taken from
            it.
        rate: what a bit per pixel costs in units of the loss; larger gives smaller files. With L2
            between 0.0005 (near the trained quality) and 0.02.
        epochs: passes over the training frames.
        lr: largest learning rate of Adam for the weights.
        compiled: see `Tuner`.
        tuner: of an earlier call with the same model, which saves compiling again.
        start: go on from an earlier result for this model, with its steps.
        target_bpp: estimated bits per pixel to end at: `rate` is only the first one then, and
            follows from epoch to epoch.
    Raises:
        ValueError: a rate that is negative or not finite, or a target that is not above 0.
    """
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate={rate} must be 0 or more and finite; 0.002 is a good start")
    if target_bpp is not None and not (0 < target_bpp < math.inf and rate > 0):
        raise ValueError(f"target_bpp={target_bpp} and the first rate={rate} must be above 0 and "
                         "finite; 0.05 and 0.002 are a good start")
    tuner = tuner or Tuner(model, dataset, config, compiled=compiled)
    tuner.reset(model, start)
    frames = torch.from_numpy(dataset.split.train)
    order = torch.Generator().manual_seed(config.train.seed)
    history, steps = [], -(-len(frames) // config.train.batch_size)
    bar = tqdm(range(epochs), desc="fine-tuning for the file", unit="epoch", disable=not progress)
    for epoch in bar:
        sums, batches = 0.0, frames[torch.randperm(len(frames), generator=order)].split(
            config.train.batch_size)
        for i, indices in enumerate(batches):
            now = learning_rate((epoch + i / steps) / epochs, lr=1.0, lr_type=SCHEDULE)
            sums = sums + tuner.step(indices.to(tuner.device), rate=rate, lr=lr * now,
                                     step_lr=STEP_LR * now)
        pixel, clip, psnr_db, bpp = (sums / len(frames)).tolist()
        history.append({"epoch": epoch + 1, "pixel_loss": pixel, "clip_loss": clip,
                        "psnr_db": psnr_db, "rate_bpp": bpp, "rate": rate})
        bar.set_postfix_str(f"PSNR {psnr_db:.2f} dB, {bpp:.3f} bits a pixel")
        if target_bpp is not None:
            aim = target_bpp * (1 + SLACK * (1 - (epoch + 1) / epochs))
            rate *= (bpp / aim) ** min(RATE_GAIN[0] / epochs, RATE_GAIN[1])
    return tuner.result(history)


class Tuner:
    """Weights, embeddings and steps that are fine-tuned, and their optimizer."""

    WARM_UP = 3  # steps before one is captured: they compile, and make the optimizer's state

    def __init__(self, model: HNeRV, dataset: Dataset, config: Config, *,
                 compiled: bool | None = None):
        """
        Args:
            compiled: compile the step, and on a GPU replay it as a CUDA graph; None does on a GPU.
        """
        self.config = config
        self.device = next(model.parameters()).device
        self.autocast = set_precision(config.train.precision, self.device)
        on_gpu = self.device.type == "cuda"
        compiled = on_gpu if compiled is None else compiled
        self.model, self.dataset = copy.deepcopy(model), dataset
        if on_gpu:
            self.model.pad_channels(8)
        self.network = _Losses(self.model, dataset, config, self.autocast)
        self.pixels = model.frame_count * math.prod(model.frame_hw)
        self.frames = dataset.video.frames.to(self.device)
        self.train = torch.from_numpy(dataset.split.train).to(self.device)
        self.position = torch.zeros(model.frame_count, dtype=torch.long, device=self.device)
        self.position[self.train] = torch.arange(len(self.train), device=self.device)
        self.lr, self.step_lr, self.rate = (torch.tensor(0.0, device=self.device)
                                            for _ in range(3))
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss
        self.indices = torch.zeros(config.train.batch_size, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warmed_up = 0
        self.captures = compiled and on_gpu
        self.stream = torch.cuda.Stream(self.device) if self.captures else None
        self.weights: dict[str, Tensor] = {}

    def reset(self, model: HNeRV, start: Tuned | None = None) -> None:
        """Begin anew from a trained model: its weights, its encoder's embeddings, first steps; or
        from an earlier result."""
        state = model.state_dict()
        names = [name for name, _ in model.named_parameters() if not name.startswith("encoder.")]
        if start is not None:
            state = start.model.state_dict()
        values = {name: state[name].detach().float().clone(
            memory_format=torch.preserve_format) for name in names}
        if model.kind == "hybrid":
            if start is None:
                with torch.inference_mode():
                    whole = embed_frames(model, self.dataset).float()
            else:
                whole = start.embeddings
            self.whole = whole.clone()
            values[EMBEDDINGS] = self.whole[self.train].clone()
        first = _first_steps(values) if start is None else {
            name: torch.as_tensor(start.steps[name], device=self.device) for name in values}
        if self.weights:  # in place, for what is compiled or captured
            with torch.no_grad():
                for name, value in values.items():
                    self.weights[name].copy_(value)
                    self.log_steps[name].copy_(first[name].log())
            for moments in self.optimizer.state.values():
                for moment in moments.values():
                    moment.zero_()
            return
        self.weights = {name: nn.Parameter(value) for name, value in values.items()}
        self.log_steps = {name: nn.Parameter(step.log()) for name, step in first.items()}
        self.optimizer = torch.optim.Adam(
            [{"params": list(self.weights.values()), "lr": self.lr},
             {"params": list(self.log_steps.values()), "lr": self.step_lr}],
            fused=True, capturable=self.device.type == "cuda")

    def step(self, indices: Tensor, *, rate: float, lr: float, step_lr: float) -> Tensor:
        """One update; sums over the frames of pixel_loss, clip_loss, psnr_db and rate_bpp."""
        self.lr.fill_(lr)
        self.step_lr.fill_(step_lr)
        self.rate.fill_(rate)
        if len(indices) != len(self.indices):  # a short batch at the end of an epoch
            return self._update(self._loss, indices)
        self.indices.copy_(indices)
        if not self.captures:
            return self._update(self.loss, self.indices)
        if self.graph is None:
            self.stream.wait_stream(torch.cuda.current_stream())
            if self.warmed_up < self.WARM_UP:
                with torch.cuda.stream(self.stream):
                    measured = self._update(self.loss, self.indices)
                torch.cuda.current_stream().wait_stream(self.stream)
                self.warmed_up += 1
                return measured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.measured = self._update(self.loss, self.indices)
            self.graph = graph
        self.graph.replay()
        return self.measured.clone()

    def _update(self, loss: Callable[..., tuple[Tensor, Tensor]], indices: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total, measured = loss(self.weights, self.log_steps, indices, self.rate)
        total.backward()
        self.optimizer.step()
        return measured

    def _loss(self, weights: dict[str, Tensor], log_steps: dict[str, Tensor], indices: Tensor,
              rate: Tensor) -> tuple[Tensor, Tensor]:
        rounded, bits = {}, torch.zeros((), device=self.device)
        for name, value in weights.items():
            step = as_stored(log_steps[name].exp())
            levels = round_through(value / step)
            rounded[name] = levels * step
            # a held-out frame's embedding is coded, too, at about the same cost
            share = self.model.frame_count / len(value) if name == EMBEDDINGS else 1.0
            bits = bits + estimate_bits(levels.transpose(0, 1) if name == EMBEDDINGS else levels,
                                        columns=name != EMBEDDINGS) * share
        bpp = bits / self.pixels
        embeddings = rounded.pop(EMBEDDINGS, None)
        if embeddings is not None:
            embeddings = embeddings[self.position[indices]]
        frames = (self.frames[indices].float() / 255).contiguous(memory_format=torch.channels_last)
        own = {f"model.{name}": value for name, value in rounded.items()}
        columns, total = functional_call(self.network, own,
                                         (embeddings, frames, indices, self.lr))
        total = total.mean() + rate * bpp
        return total, torch.cat([columns.detach().sum(1), (bpp * len(indices)).detach()[None]])

    @torch.no_grad()
    def result(self, history: list[dict[str, float]]) -> Tuned:
        """The network as it stands."""
        model = build_model(self.config.model, frame_hw=self.model.frame_hw,
                            frame_count=self.model.frame_count).to(self.device)
        state = self.model.state_dict()
        state |= {n: w.detach().clone() for n, w in self.weights.items() if n != EMBEDDINGS}
        model.load_state_dict(state)
        steps = {name: stored_step(step.exp()).cpu() if step.ndim else float(step.exp())
                 for name, step in self.log_steps.items()}
        embeddings = None
        if EMBEDDINGS in self.weights:
            embeddings = self.whole.clone()  # held-out frames keep their encoder's
            embeddings[self.train] = self.weights[EMBEDDINGS]
        return Tuned(model.eval(), embeddings, steps, history)


class _Losses(nn.Module):
    """From embeddings to losses, as a module whose parameters can be exchanged."""

    def __init__(self, model: HNeRV, dataset: Dataset, config: Config, autocast: torch.dtype):
        super().__init__()
        self.model, self.config, self.autocast = model, config, autocast
        self.clip = None
        device = next(model.parameters()).device
        self.mask = None if dataset.mask is None else dataset.mask.to(device)
        if config.model.predict_clip:
            self.clip = ClipObjective(config, model, targets=dataset.embeddings,
                                      centres=dataset.grid.centres, train=dataset.split.train)

    def forward(self, embeddings: Tensor | None, frames: Tensor, indices: Tensor, key: Tensor
                ) -> tuple[Tensor, Tensor]:
        """([3, B] pixel_loss, clip_loss, psnr_db; [B] what is minimised)."""
        train = self.config.train
        with torch.autocast(frames.device.type, self.autocast,
                            enabled=self.autocast != torch.float32):
            if embeddings is None:
                embeddings = self.model.embed(None, frame_times(indices, self.model.frame_count))
            stages = self.model.stages(embeddings)
            pred = self.model.rgb(stages[-1])
        pred = pred.float()
        pixel = pixel_loss(pred, frames, loss=train.loss, mask=self.mask)
        clip, total = torch.zeros_like(pixel), pixel
        if self.clip is not None:
            clip, term = self.clip(stages, indices, key)
            total = pixel + train.clip_loss_weight * term
        return torch.stack([pixel, clip, psnr(pred.detach(), frames)]), total


def round_through(levels: Tensor) -> Tensor:
    """Rounded, with the gradient of what was not."""
    return levels + (levels.round() - levels).detach()


def as_stored(steps: Tensor) -> Tensor:
    """Steps as the file rounds them, with the gradient of what was not: else weights that training
    left at the border of two levels fall to either side, which costs half a decibel."""
    return steps + (stored_step(steps) - steps).detach() if steps.ndim else steps


def estimate_bits(levels: Tensor, *, columns: bool = True) -> Tensor:
    """Bits that levels take under two-sided geometric distributions, per row and column.

    P(k) = (1 − θ)/(1 + θ) · θ^|k|, with θ of an entry from the mean |k| that its row and its column
    lead to expect. The spreads are those that fit best, so that their own gradient is 0.

    Args:
        levels: whole numbers, [rows, columns, …]; below two dimensions all share one spread.
        columns: False gives all columns one spread.
    Returns:
        Scalar.
    """
    size = levels.abs()
    if size.ndim < 2:
        mean = size.mean().reshape(1, 1)
    else:
        mean = size.flatten(2).mean(-1) if size.ndim > 2 else size  # [rows, columns]
        if not columns:
            mean = mean.mean(1, keepdim=True)
    with torch.no_grad():
        all_rows, all_columns = mean.mean(1, keepdim=True), mean.mean(0, keepdim=True)
        spread = all_rows * all_columns / mean.mean().clamp_min(1e-6)
        spread = spread.clamp_min(2e-3)
        theta = spread / (1 + (1 + spread.square()).sqrt())
    bits = ((1 + theta) / (1 - theta)).log2() - mean * theta.log2()
    return bits.mean() * levels.numel()


def _first_steps(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Steps that make the mean absolute level of each tensor so large; a constant 0 takes any."""
    steps = {}
    for name, value in values.items():
        level = FIRST_LEVEL if value.ndim > 1 else FIRST_LEVEL_BIAS
        step = (value.abs().mean() / level).clamp_min(1e-6)
        if value.ndim > 1 and name != EMBEDDINGS:  # one for each input channel
            step = step.repeat(1, value.shape[1], *[1] * (value.ndim - 2))
        steps[name] = step
    return steps
