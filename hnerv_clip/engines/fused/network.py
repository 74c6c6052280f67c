"""The network on our own kernels: the same as the model's, forward and backward, by hand.

The order is the network's: patches → encoder stages → decoder layers → RGB head, and back.
"""

from __future__ import annotations

import subprocess

import triton
from torch import Tensor

from hnerv_clip.engines.fused.decoder import DecoderLayers
from hnerv_clip.engines.fused.encoder import EncoderLayers
from hnerv_clip.engines.fused.layout import Parameters
from hnerv_clip.engines.fused.rgb_head import RgbHead
from hnerv_clip.engines.fused.workspace import MAX_KERNEL, Workspace
from hnerv_clip.engines.profile_marks import DECODER, DECODER_BACKWARD, ENCODER_BACKWARD, span
from hnerv_clip.kernels.activations import ACTIVATIONS
from hnerv_clip.model import HNeRV

BUILD_ERRORS = (triton.TritonError, OSError, RuntimeError, subprocess.CalledProcessError)


def unsupported(model: HNeRV) -> str | None:
    """What of a model the kernels do not support, or None where they do all of it."""
    config = model.config
    if config.act not in ACTIVATIONS or config.norm != "none":
        return (f"act={config.act!r} with norm={config.norm!r} (they know "
                f"{', '.join(ACTIVATIONS)} without a norm)")
    if max(model.plan.kernels) > MAX_KERNEL:
        return f"a kernel of {max(model.plan.kernels)} (they know {MAX_KERNEL} at most)"
    if model.plan.output_hw != model.plan.padded_hw:
        return "a decoder that is resized to the frame (leave fc_hw to auto)"
    last = config.dec_strds[-1] if config.num_blks[1] == 1 else 1
    if last & (last - 1):
        return f"a last stride of {last}, no power of two"
    return None


class Network:
    """The layers with the buffers of one batch size; everything on one device.

    `encode`, `decode` and `rgb_forward` fill the buffers from frames or embeddings, `backward` the
    gradients.
    """

    def __init__(self, model: HNeRV, parameters: Parameters | None = None, *, batch: int,
                 train: bool = True):
        """
        Args:
            parameters: of another network of the same model, to share, or fresh ones.
            batch: frames at once.
            train: whether to make buffers for the backward pass.
        """
        self.model, self.batch, self.train = model, batch, train
        self.device = next(model.parameters()).device
        self.cuda = self.device.type == "cuda"
        self.parameters = parameters or Parameters()
        fresh = not self.parameters.index
        # Two networks over the same parameters lay them out alike, so the second only reads
        target = self.parameters if fresh else Parameters()
        self.encoder = EncoderLayers(model, target)
        self.decoder = DecoderLayers(model, target, hw=self.encoder.output_hw, device=self.device)
        self.convs = self.decoder.convs
        self.rgb_head = RgbHead(model, target, self.convs[-1], self.device)
        self.work = Workspace(self.device, self.parameters, batch=batch, train=train)
        if fresh:
            self.parameters.allocate(model, self.device, self.work.dtype)
            self.parameters.load({}, 0)
        self.encoder.allocate(self.work)
        self.decoder.allocate(self.work, self.rgb_head.conv)
        self.rgb_head.allocate(self.work, self.convs[-1])
        first = self.encoder.stages[0][0] if self.encoder.stages else self.convs[0]
        self.input = self.work.zeros_with_guard(batch * first.H * first.W, first.CI)
        self.side_stream, self.join = self.work.side_stream, self.work.join
        self.features_nchw = self.decoder.features_nchw
        self.gather_features = self.decoder.gather_features

    def frame_patches(self, video: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
        """Frames [B] of the video as the first convolution's input [N, CI]."""
        self.encoder.patchify(video, indices, mask, self.input)
        return self.input

    def copy_input(self, rows: Tensor) -> Tensor:
        """Other input of the first convolution [N, CI], copied to where it has its guard."""
        return self.input.copy_(rows)

    def encode(self, x: Tensor) -> Tensor:
        """The encoder's stages, from patches [N, CI] to embeddings [N', C]."""
        return self.encoder.forward(x)

    def decode(self, x: Tensor, *, last: int | None = None) -> list[Tensor]:
        """The stem and the blocks, from embeddings [N, C]: features [B, H', W', CN] of each."""
        with span(DECODER):
            return self.decoder.forward(x, last=last)

    def rgb_forward(self, mode: str, *, video: Tensor | None = None, indices: Tensor | None = None,
                    scale: float = 0.0) -> None:
        """The RGB head over the last features; see `RgbHead.forward`."""
        self.rgb_head.forward(self.decoder.features[-1], mode, video=video, indices=indices,
                              scale=scale)

    def backward(self, x: Tensor, *, extra: dict[int, Tensor], gathered: dict[int, Tensor],
                 cells: dict[int, Tensor]) -> None:
        """Gradients of every parameter, from the RGB head's and what the CLIP head adds.

        Args:
            x: [N, C] embeddings that `decode` started from.
            extra: gradients [B, H', W', CN] of layers' features.
            gathered: gradients [B, P, C] at single cells of layers' features.
            cells: int64 [P] (row · width + column) of those cells.
        """
        with span(DECODER_BACKWARD):
            if extra:
                self.join()
            with self.side_stream("encoder"):  # while the CLIP head's kernels leave the GPU to it
                self.work.weight_gradient(self.rgb_head.conv, self.decoder.features[-1],
                                          self.rgb_head.dout)
            last = len(self.convs) - 1
            self.rgb_head.backward(self.decoder, extra=extra.get(last),
                                   gathered=gathered.get(last), cells=cells.get(last))
            self.decoder.backward(extra=extra, gathered=gathered, cells=cells,
                                  to_embedding=bool(self.encoder.stages))
            # The large weight gradients fill the GPU while the encoder's small kernels wait for
            # each other; started earlier they would hold up what the encoder waits for
            with self.side_stream("decoder"):
                self.decoder.weight_gradients(x)
            if self.encoder.stages:
                with span(ENCODER_BACKWARD):
                    self.encoder.backward(self.decoder.dfeatures[0][0])
            self.join()
