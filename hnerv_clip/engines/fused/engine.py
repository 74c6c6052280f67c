"""The training step on our own kernels, see `network`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hnerv_clip.config import Config
from hnerv_clip.dataset import Dataset
from hnerv_clip.distributed import count_ranks
from hnerv_clip.engines.fused.decoding import Decoder
from hnerv_clip.engines.fused.layout import Parameters
from hnerv_clip.engines.fused.network import BUILD_ERRORS, Network
from hnerv_clip.engines.plain import COLUMNS, PlainEngine, SetupError, explain
from hnerv_clip.engines.profile_marks import CLIP, ENCODER, OPTIMIZER, RGB, span
from hnerv_clip.kernels.launch import compile_all
from hnerv_clip.losses import pixel_loss
from hnerv_clip.metrics import LEAST_MSE, psnr
from hnerv_clip.model import HNeRV, frame_times, pad_edges


class KernelOptimizer:
    """The optimizer's state where a kernel takes the step; saved and loaded as PyTorch's do.

    Without that class itself, which imports PyTorch's compiler: seconds.
    """

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.param_groups = [{"params": self.parameters}]

    def state_dict(self) -> dict:
        numbers = {p: i for i, p in enumerate(self.parameters)}
        return {"state": {numbers[p]: values for p, values in self.state.items()},
                "param_groups": [{"params": list(numbers.values()), "fused": True,
                                  "capturable": True}]}  # so that the step is taken as a tensor

    def load_state_dict(self, state: dict) -> None:
        self.state = {self.parameters[i]: {name: value.to(self.parameters[i])
                                           for name, value in values.items()}
                      for i, values in state["state"].items()}


class FusedEngine(PlainEngine):
    """The same step in bfloat16 on our own kernels, replayed as a CUDA graph; see `network`.

    Several ranks add their gradients inside the graph. The model and the optimizer lag behind
    until `sync`.
    """

    decodes = True

    def __init__(self, config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype):
        super().__init__(config, model, dataset, autocast=autocast)
        size = config.train.batch_size
        height, width = self.model.frame_hw
        # The kernels see the padded frames, everybody else the same memory without the padding
        self.padded = pad_edges(self.frames, model.plan.padded_hw)
        self.frames = self.padded[..., :height, :width]
        self.seen = self.mask  # by the encoder, of the padded frame
        if self.mask is not None:
            self.seen = pad_edges(self.mask[None, None], model.plan.padded_hw)[0, 0].contiguous()
        self.networks = {size: Network(model, Parameters(config.train.optimizer), batch=size)}
        self.parameters = self.networks[size].parameters
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.indices: dict[tuple[int, int], Tensor] = {}
        if model.kind != "hybrid":
            times = frame_times(torch.arange(model.frame_count, device=self.device),
                                model.frame_count)
            self.positions = model.positions(times).to(
                self.parameters.param_bf16.dtype)  # [T, h, w, 2·levels]
        self.centres, self.decoder = None, None
        if config.model.predict_clip:
            self.centres = dataset.grid.centres
            self._prepare_clip()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._compile((size, size * ranks))

    def _compile(self, key: tuple[int, int]) -> None:
        """Compile what steps of (own frames, frames of all ranks) launch."""
        start = time.perf_counter()
        network, (size, count) = self.networks[key[0]], key
        indices = torch.zeros(size, dtype=torch.int64, device=self.device)
        compile_all(lambda: (self._gradients(network, indices, count),
                             self.parameters.update(self.lr), network.rgb_forward("pred")),
                    self.device)
        self.compile_s += time.perf_counter() - start

    def _prepare_clip(self) -> None:
        """Share the head's memory, and note the cells that it looks at, where they are fixed."""
        self.head: list[tuple[nn.Parameter, slice]] = []
        for name, parameter in self.model.named_parameters():
            if name.startswith("clip_head."):
                start = int(self.parameters.index[name].flatten()[0])
                self.head.append((parameter, slice(start, start + parameter.numel())))
                parameter.data = self.parameters.param[self.head[-1][1]].view(parameter.shape)
        blocks = self.config.model.num_blks[1]
        self.clip_layers = [stage * blocks for stage in self.model.clip_stages]
        self.cells = None
        if not self.config.model.clip_pool and not self.config.train.clip_jitter:
            # Only these cells are given to the head, one beside the other
            self.cells = self.clip.cells
            row = torch.zeros_like(self.cells[0][0])
            self.clip.cells = [(row, torch.arange(len(row), device=self.device))] * len(self.cells)

    def step(self, indices: Tensor, *, count: int, lr: float, weight: float) -> Tensor:
        self.lr.fill_(lr)
        self.weight.fill_(weight)
        key = (len(indices), count)
        if key not in self.graphs:
            return self._set_up(key, indices)
        self.indices[key].copy_(indices)
        self.graphs[key].replay()
        return self.sums[key]

    def _set_up(self, key: tuple[int, int], indices: Tensor) -> Tensor:
        """A step whose graph is not there yet: the first as it comes, the second is captured.

        Raises:
            SetupError: it fails here, or on another rank; on all ranks, and before any update.
            torch.cuda.OutOfMemoryError: likewise, where it is memory that this rank lacks.
        """
        size, _ = key
        first = key not in self.indices
        if first or self.device.type != "cuda":  # or by Triton's interpreter, in tests
            with self._together():
                if size and size not in self.networks:
                    self.networks[size] = Network(self.model, self.parameters, batch=size)
                    self._compile(key)
                self.indices[key] = indices.clone()
                columns = self._own_gradients(key)
            return self._update(columns)
        self.indices[key].copy_(indices)
        with self._together():
            self.graphs[key] = self._capture(key)
        self.graphs[key].replay()
        return self.sums[key]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Set up something that some ranks may fail at: then all of them do."""
        error = None
        try:
            yield
        except BUILD_ERRORS as caught:  # OutOfMemoryError is a RuntimeError
            error = caught
        failed = count_ranks(error is not None, self.device)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise error
        if error is not None:
            raise SetupError(explain(error)) from error
        if failed:
            raise SetupError(f"{failed} of {dist.get_world_size()} ranks cannot, see their output")

    def _capture(self, key: tuple[int, int]) -> torch.cuda.CUDAGraph:
        """The graph of a step of (own frames, frames of all ranks); nothing runs yet."""
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device, priority=-1)
        # Other threads, NCCL's among them, may ask the GPU meanwhile
        with torch.cuda.graph(graph, stream=main, capture_error_mode="thread_local"):
            try:
                self.sums[key] = self._update(self._own_gradients(key))
            except BaseException:  # a side stream left open would be reported in place of the cause
                with suppress(RuntimeError):
                    for network in self.networks.values():
                        network.join()
                raise
        return graph

    def eager_step(self, indices: Tensor, *, count: int, lr: float, weight: float) -> Tensor:
        self.lr.fill_(lr)
        self.weight.fill_(weight)
        key = (len(indices), count)
        self.indices[key].copy_(indices)
        return self._update(self._own_gradients(key))

    def _make_optimizer(self) -> KernelOptimizer:
        return KernelOptimizer(self.model)

    @torch.no_grad()
    def embed_frames(self) -> Tensor:
        """The embedding of every frame [T, C, h, w], as a step computes it."""
        network, size = self.networks[self.part], self.part
        stem, parts = network.convs[0], []
        for indices in torch.arange(self.model.frame_count, device=self.device).split(size):
            rows = self._embed(network, _filled(indices, size))
            cells = rows.view(size, stem.H, stem.W, stem.CI)[:len(indices)]
            parts.append(cells.permute(0, 3, 1, 2).to(torch.float32, copy=True))
        return torch.cat(parts)

    @torch.no_grad()
    def decode_frames(self, embeddings: Tensor, *, clip: bool) -> tuple[Tensor, Tensor | None]:
        """Frames float32 [B, 3, H, W], and with `clip` unit vectors [B, P, D], as a step does.

        Args:
            embeddings: [B, C, h, w].
        """
        size, outputs = self.part, []
        if self.decoder is None:
            self.decoder = Decoder(self.model, batch=size, network=self.networks[size],
                                   centres=self.centres)
        for part in embeddings.split(size):
            frames, vectors = self.decoder(_filled(part, size), clip=clip)
            outputs.append((frames[:len(part)].clone(),
                          vectors[:len(part)].clone() if clip else None))
        frames, vectors = zip(*outputs)
        return torch.cat(frames), torch.cat(vectors) if clip else None

    def sync(self) -> None:
        states = self.parameters.store()
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                "step": self.parameters.count.clone()} | states[name]

    def load_optimizer(self, state: dict) -> None:
        super().load_optimizer(state)
        states = {name: self.optimizer.state[p] for name, p in self.model.named_parameters()}
        self.parameters.load(states, float(next(iter(states.values()))["step"]))

    def _own_gradients(self, key: tuple[int, int]) -> Tensor:
        """The gradients of this rank's frames, and their `COLUMNS` [4, B]."""
        size, count = key
        if size:
            return self._gradients(self.networks[size], self.indices[key], count)
        self.parameters.grad.zero_()
        return torch.zeros(len(COLUMNS), 1, device=self.device)

    def _update(self, columns: Tensor) -> Tensor:
        """Add the ranks' gradients, and take the step; the sums [4] of `columns`."""
        if dist.is_initialized():
            dist.all_reduce(self.parameters.grad)
        self.parameters.count.add_(1)
        with span(OPTIMIZER):
            self.parameters.update(self.lr)
        return columns.sum(1)

    def _gradients(self, network: Network, indices: Tensor, count: int) -> Tensor:
        """Forward and backward pass for frames [B]: `COLUMNS` of them, [4, B]."""
        with span(ENCODER):
            embedding = self._embed(network, indices)
        network.decode(embedding)
        extra, gathered, cells = {}, {}, {}
        with network.side_stream("clip"):
            if self.config.model.predict_clip:
                with span(CLIP):
                    clip, term = self._clip_gradients(network, indices, count, extra, gathered,
                                                      cells)
        with span(RGB):
            pixel, psnr_db = self._pixel_gradients(network, indices, count)
        network.backward(embedding, extra=extra, gathered=gathered, cells=cells)
        if not self.config.model.predict_clip:
            clip = term = torch.zeros_like(pixel)
        return torch.stack([pixel, clip, pixel + self.weight * term, psnr_db])

    def _embed(self, network: Network, indices: Tensor) -> Tensor:
        """The embeddings of frames [B], in the network's rows [N, C]."""
        if self.model.kind == "hybrid":
            return network.encode(network.frame_patches(self.padded, indices, self.seen))
        positions = network.copy_input(self.positions[indices].flatten(0, 2))
        return network.encode(positions) if self.model.kind == "xyt" else positions

    def _pixel_gradients(self, network: Network, indices: Tensor, count: int
                         ) -> tuple[Tensor, Tensor]:
        """Pixel loss and PSNR of frames, both [B]; leaves the gradient in the RGB head."""
        height, width = self.model.frame_hw
        values = 3 * height * width
        if self.config.train.loss == "L2" and self.mask is None and not self.model.plan.pads:
            network.rgb_forward("l2", video=self.frames, indices=indices,
                                scale=1 / (values * count))
            error = network.rgb_head.squared_error.sum(1) / values
            return error, -10 * torch.log10(error.clamp(min=LEAST_MSE))
        network.rgb_forward("pred")
        frames = self.frames[indices].float() / 255
        pred = network.rgb_head.pred[..., :height, :width].detach().requires_grad_()
        with torch.enable_grad():
            pixel = pixel_loss(pred, frames, loss=self.config.train.loss, mask=self.mask,
                               constants=self.ssim)
            gradient, = torch.autograd.grad(pixel.sum() / count, pred)
        pred = pred.detach()
        bias = self.config.model.out_bias
        derivative = 2 * pred * (1 - pred) if bias == "tanh" else \
            pred * (1 - pred) if bias == "sigmoid" else 1
        below, right = (p - side for p, side in zip(self.model.plan.padded_hw, (height, width)))
        network.rgb_head.set_gradient(F.pad(gradient * derivative, (0, right, 0, below)))
        return pixel.detach(), psnr(pred, frames)

    def _clip_gradients(self, network: Network, indices: Tensor, count: int,
                        extra: dict[int, Tensor], gathered: dict[int, Tensor],
                        cells: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The CLIP head's losses [B], its gradients, and those of the features that it read."""
        stages: list[Tensor | None] = [None] * (max(self.model.clip_stages) + 1)
        for i, (stage, layer) in enumerate(zip(self.model.clip_stages, self.clip_layers)):
            if self.cells is None:
                features = network.features_nchw(layer)
            else:
                rows, cols = self.cells[i]
                cells[layer] = rows * self.model.stage_hw(stage)[1] + cols
                width = self.model.plan.widths[stage]
                features = network.gather_features(layer, rows, cols)[:, :width, None]
                features = features.float()  # [B, C, 1, P]
            stages[stage] = features.detach().requires_grad_()
        read = [stages[stage] for stage in self.model.clip_stages]
        with torch.enable_grad():
            clip, term = self.clip(stages, indices, self.lr)
            gradients = torch.autograd.grad((self.weight * term).sum() / count,
                                            [*read, *(p for p, _ in self.head)])
        for (_, where), gradient in zip(self.head, gradients[len(read):]):
            self.parameters.grad[where] = gradient.flatten()
        for layer, gradient in zip(self.clip_layers, gradients):
            if self.cells is not None:
                gathered[layer] = gradient[:, :, 0].transpose(1, 2).contiguous()
            else:
                extra[layer] = gradient.permute(0, 2, 3, 1).contiguous()
        return clip.detach(), term.detach()


def _filled(rows: Tensor, count: int) -> Tensor:
    """Rows, the last one repeated until there are so many."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])])
