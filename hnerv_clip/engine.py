"""What one training step computes, by the plain path or the fast one.

`PlainEngine` is the definition: eager PyTorch, any device. `FastEngine` computes the same on a GPU
in bf16 where it is safe, compiled, with channels padded to multiples of 8 inside (the parameters
stay the paper's), and replays the whole step, optimizer included, as one CUDA graph.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.dataset import Dataset
from hnerv_clip.evaluate import frame_times, psnr
from hnerv_clip.losses import ClipObjective, pixel_loss
from hnerv_clip.model import HNeRV

# What a step measures of each frame
COLUMNS = ("pixel_loss", "clip_loss", "total_loss", "psnr_db")


class PlainEngine:
    """Eager steps; the model, its optimizer and the video live on one device."""

    def __init__(self, config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype):
        self.config, self.model, self.autocast = config, model, autocast
        self.device = next(model.parameters()).device
        self.frames = dataset.video.frames.to(self.device)  # uint8 [T, 3, H, W]
        self.mask = None if dataset.mask is None else dataset.mask.to(self.device)
        if config.model.predict_clip:
            self.clip = ClipObjective(config, model, targets=dataset.embeddings,
                                      centres=dataset.grid.centres, train=dataset.split.train)
        self.lr = torch.tensor(config.train.lr, device=self.device)
        self.weight = torch.tensor(0.0, device=self.device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=self.lr, fused=True,
                                          capturable=self.device.type == "cuda")
        self.compile_s = 0.0  # spent on compilation so far

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
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(COLUMNS), device=self.device)
        if len(indices):
            columns = self.frame_losses(indices)
            (columns[2].sum() / count).backward()
            sums = columns.detach().sum(1)
        if dist.is_initialized():
            self._reduce_gradients()
        self.optimizer.step()
        return sums

    def frame_losses(self, indices: Tensor) -> Tensor:
        """`COLUMNS` of frames [B]: [4, B]."""
        frames = (self.frames[indices].float() / 255).contiguous(memory_format=torch.channels_last)
        seen = frames if self.mask is None else frames * self.mask
        with torch.autocast(self.device.type, self.autocast,
                            enabled=self.autocast != torch.float32):
            stages = self.model.stages(self.model.embed(
                seen, frame_times(indices, self.model.frame_count)))
            pred = self.model.rgb(stages[-1])
        pred = pred.float()
        pixel = pixel_loss(pred, frames, loss=self.config.train.loss, mask=self.mask)
        clip, total = torch.zeros_like(pixel), pixel
        if self.config.model.predict_clip:
            clip, term = self.clip(stages, indices, self.lr)  # 1 − cosine, and what is minimised
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

    def _reduce_gradients(self) -> None:
        """Sum the ranks' gradients, in one message."""
        parameters = list(self.model.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        # Back into tensors of the parameters' memory format: fused Adam reads them in step
        for parameter, grad, part in zip(parameters, grads, flat.split([g.numel() for g in grads])):
            parameter.grad = grad.copy_(part.view_as(grad))


class FastEngine(PlainEngine):
    """The same step, compiled and replayed as a CUDA graph; short batches go the plain way."""

    WARM_UP = 3  # real steps before the capture: they compile, and make the optimizer's state

    def __init__(self, config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype):
        super().__init__(config, model, dataset, autocast=autocast)
        model.pad_channels(8)
        torch.compiler.reset()  # else many runs in one process reach the limit, and go on eagerly
        self.compiled = torch.compile(self.frame_losses, dynamic=False)
        self.indices = torch.zeros(config.train.batch_size, dtype=torch.int64, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warmed_up = 0
        self.stream = torch.cuda.Stream(self.device)

    def step(self, indices: Tensor, *, count: int, lr: float, weight: float) -> Tensor:
        if len(indices) != len(self.indices) or count != len(indices):
            return super().step(indices, count=count, lr=lr, weight=weight)
        self.lr.fill_(lr)
        self.weight.fill_(weight)
        self.indices.copy_(indices)
        if self.graph is None:
            self.stream.wait_stream(torch.cuda.current_stream())
            if self.warmed_up < self.WARM_UP:
                self.warmed_up += 1
                with torch.cuda.stream(self.stream):
                    self.sums = self._update()
                torch.cuda.current_stream().wait_stream(self.stream)
                return self.sums
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.sums = self._update()
            self.graph = graph
        self.graph.replay()
        return self.sums

    def _update(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        columns = self.compiled(self.indices)
        (columns[2].sum() / len(self.indices)).backward()
        self.optimizer.step()
        return columns.detach().sum(1)


def make_engine(config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype
                ) -> PlainEngine:
    """The engine that `engine` asks for; `auto` is fast on a GPU with bf16, plain elsewhere."""
    device = next(model.parameters()).device
    if config.train.engine == "fast" and (device.type != "cuda" or dist.is_initialized()):
        raise ConfigError(f"engine='fast' needs one GPU and one rank, not {device} and "
                          f"{dist.get_world_size() if dist.is_initialized() else 1}; use "
                          "engine='auto'")
    fast = config.train.engine == "fast" or (
        config.train.engine == "auto" and device.type == "cuda" and autocast == torch.bfloat16
        and not dist.is_initialized())
    return (FastEngine if fast else PlainEngine)(config, model, dataset, autocast=autocast)
