"""Frames and CLIP vectors from stored embeddings, as fast as the fused network can."""

from __future__ import annotations

import torch
from torch import Tensor

from hnerv_clip.engines.fused.network import Network
from hnerv_clip.kernels.launch import compile_all
from hnerv_clip.model import HNeRV


class Decoder:
    """Frames and CLIP vectors from stored embeddings, in bfloat16, a CUDA graph for each wish."""

    def __init__(self, model: HNeRV, *, batch: int, centres: Tensor | None = None,
                 network: Network | None = None):
        """
        Args:
            batch: frames decoded at once.
            centres: [P, 2] (y, x) in frame pixels where CLIP vectors are wanted.
            network: one of as many frames that trains, whose buffers are used; frames are then
                float32 in [0, 1].
        """
        self.model = model
        self.network = network or Network(model, batch=batch, train=False)
        self.places = None if centres is None else model.need_clip_head().places(
            centres.to(self.network.device))
        stem = self.network.convs[0]
        self.input = self.network.with_room(batch * stem.H * stem.W, stem.CI)
        self.graphs: dict[tuple[bool, bool], torch.cuda.CUDAGraph] = {}
        self.vectors: dict[tuple[bool, bool], Tensor | None] = {}

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor, *, rgb: bool = True, clip: bool = False
                 ) -> tuple[Tensor | None, Tensor | None]:
        """Decode one batch.

        Args:
            embeddings: [B, C, h, w].
        Returns:
            [B, 3, H, W] frames, uint8 but for a network that trains, and float32 [B, P, D] unit
            vectors, each None where not wanted; the next call overwrites them.
        """
        wish = (rgb, clip)
        self.input.copy_(embeddings.permute(0, 2, 3, 1).reshape(self.input.shape))
        if not self.network.cuda:  # Triton's interpreter, in tests
            self.vectors[wish] = self._run(*wish)
        elif wish not in self.graphs:
            compile_all(lambda: self._run(*wish), self.network.device)
            self._run(*wish)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as in `engine`
                self.vectors[wish] = self._run(*wish)
            self.graphs[wish] = graph
        if self.network.cuda:
            self.graphs[wish].replay()
        height, width = self.model.frame_hw  # without the padding
        return self.network.pred[..., :height, :width] if rgb else None, self.vectors[wish]

    def _run(self, rgb: bool, clip: bool) -> Tensor | None:
        blocks = self.model.config.num_blks[1]
        last = None if rgb else self.model.clip_stages[-1] * blocks
        self.network.decode(self.input, last=last)
        vectors = None
        if clip:
            with self.network.aside(-1):  # its small kernels, while the frame is drawn
                vectors = self._vectors(blocks)
        if rgb:
            self.network.colour("pred" if self.network.train else "uint8")
        self.network.join()
        return vectors

    def _vectors(self, blocks: int) -> Tensor:
        if self.model.config.clip_pool:
            stages = [self.network.picture(stage * blocks)
                      for stage in range(self.model.clip_stages[-1] + 1)]
            return self.model.clip_head.at_places(stages, self.places)
        return self.model.clip_head.of_cells([
            self.network.pick(stage * blocks, *place)
            for stage, place in zip(self.model.clip_stages, self.places)])
