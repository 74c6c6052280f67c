"""Frames and CLIP vectors from stored embeddings, as fast as the fused network can."""

from __future__ import annotations

import torch
from torch import Tensor

from hnerv_clip.engines.fused.network import Network
from hnerv_clip.kernels.launch import compile_all
from hnerv_clip.model import HNeRV


class Decoder:
    """Frames and CLIP vectors in bfloat16, with a CUDA graph for each choice of outputs."""

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
        self.cells = None if centres is None else model.need_clip_head().cells(
            centres.to(self.network.device))
        stem = self.network.convs[0]
        self.input = self.network.work.zeros_with_guard(batch * stem.H * stem.W, stem.CI)
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
        wanted = (rgb, clip)
        self.input.copy_(embeddings.permute(0, 2, 3, 1).reshape(self.input.shape))
        if not self.network.cuda:  # Triton's interpreter, in tests
            self.vectors[wanted] = self._run(*wanted)
        elif wanted not in self.graphs:
            compile_all(lambda: self._run(*wanted), self.network.device)
            self._run(*wanted)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as in `engine`
                self.vectors[wanted] = self._run(*wanted)
            self.graphs[wanted] = graph
        if self.network.cuda:
            self.graphs[wanted].replay()
        height, width = self.model.frame_hw  # without the padding
        frames = self.network.rgb_head.pred[..., :height, :width]
        return frames if rgb else None, self.vectors[wanted]

    def _run(self, rgb: bool, clip: bool) -> Tensor | None:
        blocks = self.model.config.num_blks[1]
        last = None if rgb else self.model.clip_stages[-1] * blocks
        self.network.decode(self.input, last=last)
        vectors = None
        if clip:
            with self.network.side_stream("clip"):  # its small kernels, while the frame is drawn
                vectors = self._vectors(blocks)
        if rgb:
            self.network.rgb_forward("pred" if self.network.train else "uint8")
        self.network.join()
        return vectors

    def _vectors(self, blocks: int) -> Tensor:
        if self.model.config.clip_pool:
            stages = [self.network.features_nchw(stage * blocks)
                      for stage in range(self.model.clip_stages[-1] + 1)]
            return self.model.clip_head.at_cells(stages, self.cells)
        return self.model.clip_head.of_cells([
            self.network.gather_features(stage * blocks, *cells)
            for stage, cells in zip(self.model.clip_stages, self.cells)])
