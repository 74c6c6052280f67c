"""The training step in eager PyTorch on any device: the reference for the other engines."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hnerv_clip.config import Config
from hnerv_clip.dataset import Dataset
from hnerv_clip.engines import profile_marks as marks
from hnerv_clip.engines.adan import Adan
from hnerv_clip.losses import ClipObjective, needs_ssim, pixel_loss, ssim_constants
from hnerv_clip.metrics import psnr
from hnerv_clip.model import HNeRV, frame_times

# What a step measures of each frame
COLUMNS = ("pixel_loss", "clip_loss", "total_loss", "psnr_db")


class SetupError(RuntimeError):
    """A step of a fast engine could not be compiled or captured; nothing of it has been applied."""


def explain(error: Exception) -> str:
    """What failed, in a line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


class PlainEngine:
    """Eager steps; the model, its optimizer and the video live on one device."""

    decodes = False  # whether it gives embeddings and frames itself, see `FusedEngine`

    def __init__(self, config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype):
        self.config, self.model, self.autocast = config, model, autocast
        self.device = next(model.parameters()).device
        self.frames = dataset.video.frames.to(self.device)  # uint8 [T, 3, H, W]
        self.mask = None if dataset.mask is None else dataset.mask.to(self.device)
        if config.model.predict_clip:
            self.clip = ClipObjective(config, model, targets=dataset.embeddings,
                                      centres=dataset.grid.centres, train=dataset.split.train)
        self.ssim = ssim_constants(self.device) if needs_ssim(config.train.loss) else None
        self.lr = torch.tensor(config.train.lr, device=self.device)
        self.weight = torch.tensor(0.0, device=self.device)
        self.optimizer = self._make_optimizer()
        self.compile_s = 0.0  # spent on compilation so far
        self.part = config.train.batch_size  # frames worked on at once

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained, as groups of an optimizer; each without its own lr takes the run's."""
        return [{"params": list(self.model.parameters())}]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        if self.config.train.optimizer == "adan":
            return Adan(self._groups(), lr=self.lr)
        return torch.optim.Adam(self._groups(), lr=self.lr, fused=True,
                                capturable=self.device.type == "cuda")

    def step(self, indices: Tensor, *, count: int, lr: float, weight: float) -> Tensor:
        """One update.

        Args:
            indices: int64 [B] frames of this rank, on the device; may be empty on some ranks.
            count: frames of all ranks together; gradients are their mean.
            lr: learning rate.
            weight: λ of the cosine term; at 0 the CLIP head is measured, and its gradient is 0.
        Returns:
            [4] sums of `COLUMNS` over this rank's frames.
        """
        self.lr.fill_(lr)
        self.weight.fill_(weight)
        while True:
            try:
                sums = self._backward(indices, count)
                break
            except torch.cuda.OutOfMemoryError:
                # Half the frames at a time: the same sums, unless a batch norm looks at them
                if self.part == 1 or self.config.model.norm == "bn":
                    raise
            self.part = -(-self.part // 2)
            torch.cuda.empty_cache()
            warnings.warn(f"the GPU's memory holds no {2 * self.part} frames of a step at once: "
                          f"{self.part} at a time, which gives the same result", stacklevel=2)
        if dist.is_initialized():
            self._reduce_gradients()
        with marks.span(marks.OPTIMIZER):
            self.optimizer.step()
        return sums

    def eager_step(self, indices: Tensor, *, count: int, lr: float, weight: float) -> Tensor:
        """`step` outside of CUDA graphs, for a profiler; only after a step of as many frames."""
        return PlainEngine.step(self, indices, count=count, lr=lr, weight=weight)

    def _backward(self, indices: Tensor, count: int) -> Tensor:
        """Gradients of frames, and the sums [4] of their `COLUMNS`."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(COLUMNS), device=self.device)
        for part in indices.split(self.part) if len(indices) else ():
            with marks.span(marks.RGB):  # what is in no part of its own
                columns = self.frame_losses(part)
            first = marks.CLIP if self.config.model.predict_clip else marks.RGB  # it begins there
            with marks.span(first):
                (columns[2].sum() / count).backward()
            sums += columns.detach().sum(1)
        return sums

    def reconstruct(self, indices: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Frames [B, 3, H, W] as they are and as the network gives them, and its stages."""
        frames = (self.frames[indices].float() / 255).contiguous(memory_format=torch.channels_last)
        seen = frames if self.mask is None else frames * self.mask
        with torch.autocast(self.device.type, self.autocast,
                            enabled=self.autocast != torch.float32):
            with marks.span(marks.ENCODER):
                embedding = self.model.embed(seen, frame_times(indices, self.model.frame_count))
            marks.begin_backward(embedding, marks.ENCODER_BACKWARD)
            with marks.span(marks.DECODER):
                stages = self.model.stages(embedding)
            pred = self.model.rgb(stages[-1])
            marks.begin_backward(pred, marks.DECODER_BACKWARD)
        return frames, pred.float(), stages

    def frame_losses(self, indices: Tensor) -> Tensor:
        """`COLUMNS` of frames [B]: [4, B]."""
        frames, pred, stages = self.reconstruct(indices)
        pixel = pixel_loss(pred, frames, loss=self.config.train.loss, mask=self.mask,
                           constants=self.ssim)
        clip, total = torch.zeros_like(pixel), pixel
        if self.config.model.predict_clip:
            with marks.span(marks.CLIP):
                clip, term = self.clip(stages, indices, self.lr)  # 1 − cosine; what is minimised
            total = pixel + self.weight * term
        return torch.stack([pixel, clip, total, psnr(pred.detach(), frames)])

    def sync(self) -> None:
        """Bring the model and the optimizer up to date, before they are read or saved."""

    def load_optimizer(self, state: dict) -> None:
        """Take over the moments of a saved optimizer, whichever engine saved it."""
        settings = [{k: v for k, v in group.items() if k != "params"}
                    for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)
        for parameter, kept in self.optimizer.state.items():
            for name in kept.keys() - {"step"}:  # in the parameter's memory format, see below
                kept[name] = torch.empty_like(parameter).copy_(kept[name])

    def _reduce_gradients(self) -> None:
        """Sum the ranks' gradients, in one message."""
        parameters = list(self.model.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        # Back into tensors of the parameters' memory format: fused Adam reads them in step
        for parameter, grad, part in zip(parameters, grads, flat.split([g.numel() for g in grads])):
            parameter.grad = grad.copy_(part.view_as(grad))
