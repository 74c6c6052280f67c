"""Small things that every clock needs."""

from __future__ import annotations

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
