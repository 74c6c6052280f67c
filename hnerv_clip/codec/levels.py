"""Tensors as integers: uniform quantisation, by HNeRV's rule or with a given step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Quantised:
    """A tensor as integers: value ≈ shift + scale · level, level 0 near the value 0."""

    levels: np.ndarray  # int32, the tensor's shape
    shift: np.ndarray  # broadcastable to it; float32 of one value, float16 along an axis
    scale: np.ndarray
    axis: int = -1  # the axis over which `shift` and `scale` hold for all; −1: for the whole tensor

    def dequantise(self) -> Tensor:
        """float32, the original shape."""
        shift, scale = self.shift.astype(np.float32), self.scale.astype(np.float32)
        value = shift + scale * self.levels.astype(np.float32)
        return torch.from_numpy(np.asarray(value))  # of no dimension, numpy gives a scalar


def bounds_shape(shape: list[int] | tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of a tensor's `shift` and `scale`."""
    return tuple(1 if axis in (-1, i) else n for i, n in enumerate(shape))


def quantise(tensor: Tensor, *, bits: int) -> Quantised:
    """Quantise uniformly between minimum and maximum, whichever way errs least.

    HNeRV's rule: over the whole tensor, or along one axis. Per-axis bounds are kept in float16 and
    considered where the axis is longer than 50, so that they are under 2% of the values, as in
    HNeRV's code; constants (minimum = maximum) come back exactly, along an axis as float16.

    Args:
        tensor: any shape, finite.
        bits: 1 to 16.
    Raises:
        ValueError: the tensor holds NaN or infinity.
    """
    values = _finite(tensor)
    top = 2**bits - 1
    axes = [-1] + [i for i in range(values.ndim) if values.shape[i] > 50]
    best, best_error = None, np.inf
    for axis in axes:
        kind, over = (np.float32, None) if axis < 0 else (np.float16, axis)
        low = values.min(axis=over, keepdims=True).astype(kind).astype(np.float32)
        # float16 may round a minimum up, past the maximum of a slice that hardly varies
        span = np.maximum(values.max(axis=over, keepdims=True) - low, 0)
        scale = (span / top).astype(kind)
        step = np.where(scale > 0, scale, 1).astype(np.float32)
        zero = np.clip(np.round(-low / step), 0, top)  # the level of the value 0
        shift = np.where(scale > 0, low + step * zero, low).astype(kind)
        zero = np.where(scale > 0, zero, 0)
        levels = np.clip(np.round((values - shift) / step), -zero, top - zero).astype(np.int32)
        candidate = Quantised(levels, shift, scale, axis)
        error = np.abs(candidate.dequantise().numpy() - values).mean()
        if error < best_error:
            best, best_error = candidate, error
    return best


def quantise_by_step(tensor: Tensor, step: float | Tensor) -> Quantised:
    """Round to multiples of a step, as learned in rate-aware training.

    Args:
        step: of the whole tensor, or [1, I, …] for each input channel of a tensor [O, I, …],
            as `stored_step` gives them.
    Raises:
        ValueError: NaN or infinity, a step not above 0, or one so small that levels overflow.
    """
    values = _finite(tensor)
    axis = 0 if isinstance(step, Tensor) and step.ndim else -1
    steps = np.broadcast_to(np.asarray(step, np.float32), values.shape if axis < 0 else (
        1, *values.shape[1:]))
    if not (np.isfinite(steps) & (steps > 0)).all() or \
            np.abs(values / steps).max(initial=0) > 2**15:
        raise ValueError(f"a step of {steps.min():g} does not suit values up to "
                         f"{np.abs(values).max(initial=0):g}: give one above 0, at least a "
                         "2^-15th of them")
    kind, shape = np.float32 if axis < 0 else np.float16, bounds_shape(values.shape, axis)
    scale = np.full(shape, step, kind) if axis < 0 else steps.astype(kind)
    return Quantised(np.round(values / scale.astype(np.float32)).astype(np.int32),
                     np.zeros(shape, kind), scale, axis)


def stored_step(steps: Tensor) -> Tensor:
    """The steps of input channels as a file keeps them, in float16; float32, in its range.

    Rounded by their bits: a compiler may leave out a conversion to float16 and back.
    """
    bits = steps.detach().float().clamp(2.0**-14, 2.0**15).view(torch.int32)
    bits = bits + 0xFFF + ((bits >> 13) & 1)  # half of what is cut off; ties to even
    return (bits & ~0x1FFF).view(torch.float32)


def _finite(tensor: Tensor) -> np.ndarray:
    values = tensor.detach().cpu().float().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"a tensor of shape {values.shape} holds NaN or infinity; "
                         "it cannot be quantised: go back to the last good checkpoint")
    return values
