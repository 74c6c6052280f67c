"""What one training step computes, and three ways to compute it.

`PlainEngine` is the definition: eager PyTorch, any device. `FusedEngine` computes the same on a GPU
in bfloat16, forward and back on our own kernels. `CompiledEngine` leaves that to `torch.compile`,
in any precision and for every setting of the model. Both replay a step as one CUDA graph.
"""

from __future__ import annotations

import time
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.dataset import Dataset
from hnerv_clip.devices import no_bfloat16, no_kernels
from hnerv_clip.evaluate import frame_times, psnr
from hnerv_clip.losses import ClipObjective, pixel_loss
from hnerv_clip.model import HNeRV

try:
    from hnerv_clip import fused
    from hnerv_clip.decoder import Decoder
    from hnerv_clip.tiles import compile_all
except ImportError:  # no Triton: it is made for Linux
    fused = None

# What a step measures of each frame
COLUMNS = ("pixel_loss", "clip_loss", "total_loss", "psnr_db")


class Moments:
    """The state of Adam where a kernel takes the step; saved and loaded as PyTorch's Adam does.

    Without that class itself, which imports PyTorch's compiler: seconds.
    """

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.param_groups = [{"params": self.parameters}]

    def state_dict(self) -> dict:
        numbers = {p: i for i, p in enumerate(self.parameters)}
        return {"state": {numbers[p]: kept for p, kept in self.state.items()},
                "param_groups": [{"params": list(numbers.values()), "fused": True,
                                  "capturable": True}]}  # so that Adam takes the step as a tensor

    def load_state_dict(self, state: dict) -> None:
        self.state = {self.parameters[i]: {name: value.to(self.parameters[i])
                                           for name, value in kept.items()}
                      for i, kept in state["state"].items()}


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
        self.optimizer = self._make_optimizer()
        self.compile_s = 0.0  # spent on compilation so far
        self.part = config.train.batch_size  # frames worked on at once

    def _make_optimizer(self) -> torch.optim.Optimizer | Moments:
        return torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=True,
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
        self.optimizer.step()
        return sums

    def _backward(self, indices: Tensor, count: int) -> Tensor:
        """Gradients of frames, and the sums [4] of their `COLUMNS`."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(COLUMNS), device=self.device)
        for part in indices.split(self.part) if len(indices) else ():
            columns = self.frame_losses(part)
            (columns[2].sum() / count).backward()
            sums += columns.detach().sum(1)
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
        for parameter, kept in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # in the parameter's memory format, see below
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


class CompiledEngine(PlainEngine):
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


class FusedEngine(PlainEngine):
    """The same step in bfloat16 on our own kernels, replayed as a CUDA graph; see `fused`.

    Several ranks add their gradients inside the graph. The model and the optimizer lag behind
    until `sync`.
    """

    def __init__(self, config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype):
        super().__init__(config, model, dataset, autocast=autocast)
        size = config.train.batch_size
        self.networks = {size: fused.Network(model, batch=size)}
        self.parameters = self.networks[size].parameters
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.indices: dict[tuple[int, int], Tensor] = {}
        if model.kind != "hybrid":
            times = frame_times(torch.arange(model.frame_count, device=self.device),
                                model.frame_count)
            self.positions = model.positions(times).to(
                self.parameters.small.dtype)  # [T, h, w, 2·levels]
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
                             self.parameters.update(self.lr), network.colour("pred")), self.device)
        self.compile_s += time.perf_counter() - start

    def _prepare_clip(self) -> None:
        """Share the head's memory, and note the cells that it looks at, where they are fixed."""
        self.head: list[tuple[nn.Parameter, slice]] = []
        for name, parameter in self.model.named_parameters():
            if name.startswith("clip_head."):
                start = int(self.parameters.places[name].flatten()[0])
                self.head.append((parameter, slice(start, start + parameter.numel())))
                parameter.data = self.parameters.param[self.head[-1][1]].view(parameter.shape)
        blocks = self.config.model.num_blks[1]
        self.clip_layers = [stage * blocks for stage in self.model.clip_stages]
        self.cells = None
        if not self.config.model.clip_pool and not self.config.train.clip_jitter:
            # Only these cells are given to the head, one beside the other
            self.cells = self.clip.places
            row = torch.zeros_like(self.cells[0][0])
            self.clip.places = [(row, torch.arange(len(row), device=self.device))] * len(self.cells)

    def step(self, indices: Tensor, *, count: int, lr: float, weight: float) -> Tensor:
        self.lr.fill_(lr)
        self.weight.fill_(weight)
        key = (len(indices), count)
        if len(indices) and len(indices) not in self.networks:
            self.networks[len(indices)] = fused.Network(self.model, self.parameters,
                                                        batch=len(indices))
            self._compile(key)
        if key not in self.indices:  # the first step as it comes, the second is captured
            self.indices[key], self.graphs[key] = indices.clone(), None
            return self._update(key)
        self.indices[key].copy_(indices)
        if self.device.type != "cuda":  # Triton's interpreter, in tests
            return self._update(key)
        if self.graphs[key] is None:
            graph, main = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device, priority=-1)
            # Other threads, NCCL's among them, may ask the GPU meanwhile
            with torch.cuda.graph(graph, stream=main, capture_error_mode="thread_local"):
                self.sums[key] = self._update(key)
            self.graphs[key] = graph
        self.graphs[key].replay()
        return self.sums[key]

    def _make_optimizer(self) -> Moments:
        return Moments(self.model)

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
        size, found = self.part, []
        if self.decoder is None:
            self.decoder = Decoder(self.model, batch=size, network=self.networks[size],
                                   centres=self.centres)
        for part in embeddings.split(size):
            frames, vectors = self.decoder(_filled(part, size), clip=clip)
            found.append((frames[:len(part)].clone(),
                          vectors[:len(part)].clone() if clip else None))
        frames, vectors = zip(*found)
        return torch.cat(frames), torch.cat(vectors) if clip else None

    def sync(self) -> None:
        moments = self.parameters.store()
        for name, parameter in self.model.named_parameters():
            mean, square = moments[name]
            self.optimizer.state[parameter] = {
                "step": self.parameters.count.clone(), "exp_avg": mean, "exp_avg_sq": square}

    def load_optimizer(self, state: dict) -> None:
        super().load_optimizer(state)
        kept = {name: self.optimizer.state[p] for name, p in self.model.named_parameters()}
        self.parameters.load({n: (s["exp_avg"], s["exp_avg_sq"]) for n, s in kept.items()},
                             float(next(iter(kept.values()))["step"]))

    def _update(self, key: tuple[int, int]) -> Tensor:
        size, count = key
        if size:
            columns = self._gradients(self.networks[size], self.indices[key], count)
        else:
            self.parameters.grad.zero_()
            columns = torch.zeros(len(COLUMNS), 1, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(self.parameters.grad)
        self.parameters.count.add_(1)
        self.parameters.update(self.lr)
        return columns.sum(1)

    def _gradients(self, network: fused.Network, indices: Tensor, count: int) -> Tensor:
        """Forward and back for frames [B]: `COLUMNS` of them, [4, B]."""
        embedding = self._embed(network, indices)
        network.decode(embedding)
        extra, picked, places = {}, {}, {}
        with network.aside(-1):
            if self.config.model.predict_clip:
                clip, term = self._clip_gradients(network, indices, count, extra, picked, places)
        pixel, psnr_db = self._pixel_gradients(network, indices, count)
        network.backward(embedding, extra=extra, picked=picked, places=places)
        if not self.config.model.predict_clip:
            clip = term = torch.zeros_like(pixel)
        return torch.stack([pixel, clip, pixel + self.weight * term, psnr_db])

    def _embed(self, network: fused.Network, indices: Tensor) -> Tensor:
        """The embeddings of frames [B], in the network's rows [N, C]."""
        if self.model.kind == "hybrid":
            return network.encode(network.frame_patches(self.frames, indices, self.mask))
        positions = network.take(self.positions[indices].flatten(0, 2))
        return network.encode(positions) if self.model.kind == "xyt" else positions

    def _pixel_gradients(self, network: fused.Network, indices: Tensor, count: int
                         ) -> tuple[Tensor, Tensor]:
        """Pixel loss and PSNR of frames, both [B]; leaves the gradient in `network.drgb`."""
        height, width = self.model.frame_hw
        values = 3 * height * width
        if self.config.train.loss == "L2" and self.mask is None:
            network.colour("l2", video=self.frames, indices=indices, scale=1 / (values * count))
            error = network.error.sum(1) / values
            return error, -10 * torch.log10(error)
        network.colour("pred")
        frames = self.frames[indices].float() / 255
        pred = network.pred.detach().requires_grad_()
        with torch.enable_grad():
            pixel = pixel_loss(pred, frames, loss=self.config.train.loss, mask=self.mask)
            gradient, = torch.autograd.grad(pixel.sum() / count, pred)
        pred = pred.detach()
        bias = self.config.model.out_bias
        slope = 2 * pred * (1 - pred) if bias == "tanh" else \
            pred * (1 - pred) if bias == "sigmoid" else 1
        network.set_colour_gradient(gradient * slope)
        return pixel.detach(), psnr(pred, frames)

    def _clip_gradients(self, network: fused.Network, indices: Tensor, count: int,
                        extra: dict[int, Tensor], picked: dict[int, Tensor],
                        places: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The CLIP head's losses [B], its gradients, and those of the features that it read."""
        stages: list[Tensor | None] = [None] * (max(self.model.clip_stages) + 1)
        for i, (stage, layer) in enumerate(zip(self.model.clip_stages, self.clip_layers)):
            if self.cells is None:
                features = network.picture(layer)
            else:
                rows, cols = self.cells[i]
                places[layer] = rows * self.model.stage_hw(stage)[1] + cols
                features = network.pick(layer, rows, cols)[:, :self.model.plan.widths[stage], None]
                features = features.float()  # [B, C, 1, P]
            stages[stage] = features.detach().requires_grad_()
        read = [stages[stage] for stage in self.model.clip_stages]
        with torch.enable_grad():
            clip, term = self.clip(stages, indices, self.lr)
            gradients = torch.autograd.grad((self.weight * term).sum() / count,
                                            [*read, *(p for p, _ in self.head)])
        for (_, place), gradient in zip(self.head, gradients[len(read):]):
            self.parameters.grad[place] = gradient.flatten()
        for layer, gradient in zip(self.clip_layers, gradients):
            if self.cells is not None:
                picked[layer] = gradient[:, :, 0].transpose(1, 2).contiguous()
            else:
                extra[layer] = gradient.permute(0, 2, 3, 1).contiguous()
        return clip.detach(), term.detach()


def _filled(rows: Tensor, count: int) -> Tensor:
    """Rows, the last one repeated until there are so many."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])])


def make_engine(config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype
                ) -> PlainEngine:
    """The engine that `engine` asks for.

    `auto` takes the fused one for bfloat16 on a GPU, or on one rank the compiled one for a model
    that the kernels do not know; elsewhere the plain one, with a warning where a fast one was to be
    expected and cannot be had. `fast` insists: fused in bfloat16 likewise, else compiled.

    Raises:
        ConfigError: engine=fast where it cannot be had; the message says why.
    """
    wish, half = config.train.engine, autocast == torch.bfloat16
    device = next(model.parameters()).device
    if wish == "plain" or wish == "auto" and (device.type != "cuda" or not half):
        if wish == "auto" and half and config.train.device == "auto":
            warnings.warn("no GPU here: training by the plain engine on the CPU, which is far "
                          "slower", stacklevel=2)
        return PlainEngine(config, model, dataset, autocast=autocast)
    engine, reason = _fast_engine(config, model, dataset, autocast=autocast)
    if dist.is_initialized():  # one rank in another engine would wait for the others for ever
        failed = torch.tensor(float(engine is None), device=device)
        dist.all_reduce(failed)
        if failed and engine:
            engine, reason = None, f"{int(failed)} other ranks cannot have it, see their output"
    if engine:
        return engine
    if wish == "fast":
        raise ConfigError(f"engine='fast' cannot be had: {reason}; use engine='auto' or 'plain'")
    warnings.warn(f"training by the plain engine, several times slower: {reason}", stacklevel=2)
    return PlainEngine(config, model, dataset, autocast=autocast)


def _fast_engine(config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype
                 ) -> tuple[PlainEngine | None, str]:
    """The fastest engine for a model in a precision, or None and why there is none."""
    half, device = autocast == torch.bfloat16, next(model.parameters()).device
    if reason := _no_fast_engine(device, half):
        return None, reason
    missing = fused.unsupported(model) if half else None
    if missing and dist.is_initialized():
        return None, f"several ranks need the fused kernels, which do not know {missing}"
    kind = FusedEngine if half and not missing else CompiledEngine
    try:
        return kind(config, model, dataset, autocast=autocast), ""
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, "the GPU's memory is too small for its buffers"
    except fused.BUILD_ERRORS as error:
        return None, f"its kernels do not build here ({str(error).strip().splitlines()[0]})"


def _no_fast_engine(device: torch.device, half: bool) -> str | None:
    """Why this machine cannot run a fast engine, or None where it can."""
    if reason := no_kernels(device) or (no_bfloat16(device) if half else None):
        return reason
    if not half and dist.is_initialized():
        return "several ranks need precision='bf16'"
    return None
