"""A step compiled by `torch.compile`, in any precision and for every setting of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from hnerv_clip.config import Config
from hnerv_clip.dataset import Dataset
from hnerv_clip.engines.plain import PlainEngine, SetupError, explain
from hnerv_clip.model import HNeRV


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
            try:
                return self._set_up()
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler fails in many ways
                raise SetupError(explain(error)) from error
        self.graph.replay()
        return self.sums

    def _set_up(self) -> Tensor:
        """A step before the graph is there."""
        self.stream.wait_stream(torch.cuda.current_stream())
        if self.warmed_up < self.WARM_UP:
            with torch.cuda.stream(self.stream):
                self.sums = self._update()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.warmed_up += 1
            return self.sums
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.sums = self._update()
        self.graph = graph
        graph.replay()
        return self.sums

    def _update(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        columns = self.compiled(self.indices)
        (columns[2].sum() / len(self.indices)).backward()
        self.optimizer.step()
        return columns.detach().sum(1)
