"""The decoder's stem and blocks on our own kernels, forward and backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hnerv_clip.engines.fused.layout import Conv, Parameters, pack_convolution
from hnerv_clip.engines.fused.workspace import Workspace, plane, program_count
from hnerv_clip.kernels import conv as conv_kernels
from hnerv_clip.kernels import hopper, pixel_shuffle
from hnerv_clip.kernels.launch import launch
from hnerv_clip.kernels.tiles import power_of_two, product_tile, program_columns
from hnerv_clip.model import HNeRV

LARGE = 65536  # pixels from which on a layer is bound by memory, not by waiting


class DecoderLayers:
    """Convolution, pixel shuffle and activation, layer by layer; layer 0 is the stem."""

    def __init__(self, model: HNeRV, parameters: Parameters, *, hw: tuple[int, int],
                 device: torch.device):
        """Lay the parameters out.

        Args:
            hw: height and width of the embeddings.
        """
        self.act = model.config.act
        stem = model.decoder[0]
        self.convs = [pack_convolution(parameters, "decoder.0.conv", stem.conv, hw=hw,
                                       in_width=stem.conv.in_channels, factors=stem.unfold)]
        for i, block in enumerate(model.decoder[1:], 1):
            before = self.convs[-1]
            self.convs.append(pack_convolution(
                parameters, f"decoder.{i}.conv", block.conv,
                hw=(before.H * before.SH, before.W * before.SW), in_width=before.CN,
                factors=(block.stride, block.stride), blocked=hopper.available(device)))

    def allocate(self, work: Workspace, head: Conv) -> None:
        """Buffers of activations and, to train, of gradients and partial sums.

        Args:
            head: the RGB head's convolution, which comes after the last layer.
        """
        self.work, self.parameters, self.batch = work, work.parameters, work.batch
        self.consumers = [*self.convs[1:], head]  # of each layer's features
        self.pre, self.features, self.dpre, self.dfeatures, self.dbias = [], [], [], [], []
        for conv, after in zip(self.convs, self.consumers):
            N = self.batch * conv.H * conv.W
            self.features.append(work.image(conv.H * conv.SH, conv.W * conv.SW, conv.CN,
                                            edge=after.edge, blocked=after.blocked))
            if work.train:
                self.pre.append(work.zeros_with_guard(self.batch * conv.pixels, conv.CO))
                self.dpre.append(work.image(conv.H, conv.W, conv.CO, edge=conv.edge,
                                            blocked=conv.blocked))
                split = conv.K if N < LARGE and not conv.blocked else 1
                self.dfeatures.append(torch.zeros(
                    split, N, conv.CI, dtype=torch.float32 if split > 1 else work.dtype,
                    device=work.device))
                self.dbias.append(torch.zeros(program_count(N, 32), conv.CO, device=work.device))

    # Forward

    def forward(self, x: Tensor, *, last: int | None = None) -> list[Tensor]:
        """From embeddings [N, C]: features [B, H', W', CN] of each layer, up to the last wanted."""
        p, train = self.parameters, self.work.train
        convs = self.convs if last is None else self.convs[:last + 1]
        for i, (conv, after) in enumerate(zip(convs, self.consumers)):
            N = self.batch * conv.pixels
            shuffle = dict(conv.shuffle, EDGE=after.edge)
            values = (x, p.param_bf16[conv.weight], p.param[conv.bias],
                      self.pre[i] if train else None, self.features[i], N)
            x = self.features[i]
            if conv.blocked:
                self.work.launch_hopper("forward", conv, *values, act=self.act,
                                        OUT_BLOCKED=int(after.blocked), **shuffle)
                continue
            tile = product_tile(N, conv.CO, conv.K * conv.CI)
            apart = train and N >= LARGE  # else the product's program has too much to hold
            launch(conv_kernels.conv_forward,
                   (triton.cdiv(N, tile["BM"]), program_columns(conv.CO, tile)), *values,
                   **conv.geometry, **shuffle, PLANE=plane(x, after.blocked), ACT=self.act,
                   MODE="bias" if apart else "shuffle", **tile)
            if apart:
                N = self.batch * conv.H * conv.W
                launch(pixel_shuffle.pixel_shuffle_forward, (triton.cdiv(N, 32), conv.SH),
                       self.pre[i], x, N, H=conv.H, W=conv.W, P=conv.edge, CO=conv.CO, **shuffle,
                       PLANE=plane(x, after.blocked), RB=power_of_two(conv.SW * conv.CN),
                       ACT=self.act, BM=32)
        return self.features[:len(convs)]

    def _inner(self, i: int) -> tuple[Tensor, int]:
        """A layer's features, and the width of their edge."""
        conv, features = self.convs[i], self.features[i]
        return features, (features.shape[-3] - conv.H * conv.SH) // 2

    def features_nchw(self, i: int) -> Tensor:
        """Layer i's features as [B, CN, H', W']: a view, or a copy where they are blocked."""
        features, edge = self._inner(i)
        inner = slice(edge, -edge or None)
        features = features[..., inner, inner, :]
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2)
        return features.permute(1, 0, 4, 2, 3).flatten(1, 2)

    def gather_features(self, i: int, rows: Tensor, cols: Tensor) -> Tensor:
        """Layer i's features at cells [P]: [B, CN, P]."""
        features, edge = self._inner(i)
        gathered = features[..., rows + edge, cols + edge, :]
        return gathered.transpose(1, 2) if gathered.ndim == 3 else \
            gathered.permute(1, 0, 3, 2).flatten(1, 2)

    # Backward

    def backward(self, *, extra: dict[int, Tensor], gathered: dict[int, Tensor],
                 cells: dict[int, Tensor], to_embedding: bool) -> None:
        """Gradients at every layer's input, from that in `dpre[-1]`; see `Network.backward`.

        Args:
            to_embedding: whether that at the embeddings is wanted, in `dfeatures[0]`.
        """
        for i in range(len(self.convs) - 1, -1, -1):
            if i or to_embedding:
                self.work.input_gradient(self.convs[i], self.dpre[i], self.dfeatures[i])
            if i:
                if i - 1 in extra:
                    self.dfeatures[i][0] += extra[i - 1].view_as(self.dfeatures[i][0])
                if i - 1 in gathered:
                    self._add_gathered(i - 1, gathered[i - 1], cells[i - 1])
                self._shuffle_backward(i - 1)

    def weight_gradients(self, x: Tensor) -> None:
        """Of every layer's weights and, but for the last one's, biases; x: embeddings [N, C]."""
        for i, conv in reversed(list(enumerate(self.convs))):
            self.work.weight_gradient(conv, self.features[i - 1] if i else x, self.dpre[i])
            if i < len(self.convs) - 1:
                torch.sum(self.dbias[i], 0, out=self.parameters.grad[conv.bias])

    def _shuffle_backward(self, i: int) -> None:
        conv, dfeatures = self.convs[i], self.dfeatures[i + 1]
        N = self.batch * conv.H * conv.W
        BN = min(128, power_of_two(conv.CO))
        S = len(self.dbias[i])
        launch(pixel_shuffle.pixel_shuffle_backward, (S, triton.cdiv(conv.CO, BN)), dfeatures,
               self.pre[i], self.dpre[i], self.dbias[i], N, H=conv.H, W=conv.W, P=conv.edge,
               CO=conv.CO, **conv.shuffle, PLANE=plane(self.dpre[i], conv.blocked),
               SPLIT=len(dfeatures), ACT=self.act, S=S, BM=32, BN=BN)

    def _add_gathered(self, i: int, gradient: Tensor, cells: Tensor) -> None:
        conv = self.convs[i]
        features = self.dfeatures[i + 1][0].view(self.batch, -1, conv.CN)
        frame = torch.arange(self.batch, device=self.work.device)[:, None]
        features[..., :gradient.shape[-1]].index_put_(
            (frame, cells[None]), gradient.to(features.dtype), accumulate=True)
