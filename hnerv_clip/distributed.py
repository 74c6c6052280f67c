"""The ranks of a distributed training run: their number, agreement, and gathered results."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

from hnerv_clip.config import ConfigError
from hnerv_clip.devices import select_device


def ranks() -> tuple[int, int]:
    """(rank, ranks) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(value: float) -> float:
    """Rank 0's number, on every rank: clocks, and files on a shared disk, differ among them."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    number = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(number, src=0)
    return number.item()


def count_ranks(holds: bool, device: torch.device) -> int:
    """On how many ranks something holds. Every rank asks, of a device of its own."""
    if not dist.is_initialized():
        return int(holds)
    number = torch.tensor(float(holds), device=device)
    dist.all_reduce(number)
    return int(number)


def from_rank0(value: Any) -> Any:
    """Rank 0's object, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_rows(table: pd.DataFrame) -> pd.DataFrame:
    """On rank 0 the ranks' rows of an evaluation in one rank's order; elsewhere its own rows."""
    rank, world = ranks()
    if world == 1:
        return table
    tables = [None] * world if rank == 0 else None
    dist.gather_object(table, tables, dst=0)
    if rank:
        return table
    whole = pd.concat([part for part in tables if len(part)])
    return whole.sort_values(["source", "frame"], ignore_index=True)


def own_device(device: str) -> torch.device:
    """Where this process computes: under NCCL its rank's own GPU, whatever `device` names.

    Raises:
        ConfigError: a device that this machine lacks, or the CPU under NCCL.
    """
    if not (dist.is_initialized() and dist.get_backend() == "nccl"):
        return select_device(device)
    if torch.device("cuda" if device == "auto" else device).type != "cuda":
        raise ConfigError(f"device={device!r} does not go with NCCL; use device='auto', or start "
                          "the ranks with the gloo backend")
    return torch.device("cuda", torch.cuda.current_device())
