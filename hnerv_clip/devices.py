"""What depends on the device alone."""

from __future__ import annotations

import os

import torch


def visible_gpus() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them, by number or identifier."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [
        str(number) for number in range(count)]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What `auto` stands for: tf32 on a GPU, fp32 on a CPU."""
    return precision if precision != "auto" else "tf32" if device.type == "cuda" else "fp32"
