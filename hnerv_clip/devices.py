"""Devices: choice, precision, and what they support."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from hnerv_clip.config import ConfigError


def select_device(device: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: a device that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={str(device)!r} can't be used here "
                          f"({str(error).splitlines()[0]}); use device='auto' or 'cpu'") from error


def usable_cores() -> int:
    """Processor cores that this process may use; all of the machine where the system can't tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them, by number or identifier."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [
        str(number) for number in range(count)]


def synchronise(device: torch.device) -> None:
    """Wait until all work given to the device is done; returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resolve_precision(precision: str, device: torch.device) -> str:
    """The precision of computations.

    `auto` is bf16 on a GPU that has it, tf32 on another, and fp32 on a CPU, which also has fp32 in
    the place of tf32.
    """
    if device.type != "cuda":
        return "fp32" if precision in ("auto", "tf32") else precision
    if precision != "auto":
        return precision
    return "tf32" if no_bfloat16(device) else "bf16"


def no_kernels(device: torch.device) -> str | None:
    """Why this machine cannot build and run our kernels, or None where it can."""
    if device.type != "cuda":
        return f"it needs a GPU, not {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "its kernels are started through a C compiler, and there is none (install gcc)"
    return None


def no_bfloat16(device: torch.device) -> str | None:
    """Why this GPU does not compute in bfloat16, or None where it does."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    return f"{torch.cuda.get_device_name(device)} has no bfloat16" if old else None


def set_precision(precision: str, device: torch.device) -> torch.dtype:
    """Choose the arithmetic: switch tf32 on or off, and return the autocast type.

    See `resolve_precision` for `auto`.
    """
    used = resolve_precision(precision, device)
    tf32 = device.type == "cuda" and used in ("tf32", "bf16")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    return torch.bfloat16 if used == "bf16" else torch.float32


def fetch(batches: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Tensors as arrays on the CPU, in turn; a GPU computes the next one while one is copied."""
    before: tuple[Tensor, torch.cuda.Event | None] | None = None
    for batch in batches:
        now: tuple[Tensor, torch.cuda.Event | None] = batch, None
        if batch.device.type == "cuda":
            host = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
            host.copy_(batch, non_blocking=True)
            now = host, torch.cuda.Event()
            now[1].record()
        if before is not None:
            yield _arrived(*before)
        before = now
    if before is not None:
        yield _arrived(*before)


def _arrived(host: Tensor, copied: torch.cuda.Event | None) -> np.ndarray:
    if copied is not None:
        copied.synchronize()
    return host.numpy()
