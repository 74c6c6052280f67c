"""The parts of a training step, as the engines mark them for a profiler.

A span lasts as long as its context; inside another one it interrupts it. `begin_backward` marks
where autograd comes to a tensor: that part lasts until the next one, or until the span around it
ends. Without a profiler nothing is marked.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.profiler import record_function

PREFIX = "part of a step: "
BEGIN = "part of a step from here: "
PARTS = (ENCODER, DECODER, RGB, CLIP, DECODER_BACKWARD, ENCODER_BACKWARD, OPTIMIZER, REST) = (
    "encoder, forward", "decoder, forward", "RGB head and loss", "CLIP head, both ways",
    "decoder and RGB head, back", "encoder, back", "optimizer", "the rest")


def profiled() -> bool:
    """Whether a profiler listens; never while `torch.compile` traces."""
    return not torch.compiler.is_compiling() and torch.autograd._profiler_enabled()


def span(part: str) -> record_function | nullcontext:
    """What is launched inside belongs to a part."""
    return record_function(PREFIX + part) if profiled() else nullcontext()


def begin_backward(tensor: Tensor, part: str) -> None:
    """Let a part begin with the gradient at a tensor."""
    def mark(gradient: Tensor) -> None:
        with record_function(BEGIN + part):
            pass

    if profiled() and tensor.requires_grad:
        tensor.register_hook(mark)
