"""How the kernels' work is cut into programs."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

H100_SHARED_BYTES = 232448  # that a program may use


def ceil_to(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def power_of_two(value: int, least: int = 16) -> int:
    """The next power of two; matrix products take no fewer than 16."""
    return max(least, triton.next_power_of_2(value))


def program_columns(width: int, tile: dict[str, int]) -> int:
    """Programs that a tile needs for an output of some channels."""
    return triton.cdiv(width, tile["BN"] + tile["BN2"])


def product_tile(N: int, columns: int, run: int, *, transposed: bool = False) -> dict[str, int]:
    """Block sizes of a matrix product for N rows, an output of some columns and a run of values.

    Chosen by measurements on an H100. `transposed`: for the gradient at the input.
    """
    if N >= 32768 and columns > 128:
        return _fit(BM=128, BN=128, BN2=16 if columns <= 144 else 0, BK=32, STAGES=4, num_warps=4)
    if N >= 32768 and columns > 96:
        return _fit(BM=256, BN=128, BN2=0, BK=64, STAGES=3, num_warps=8)
    if N >= 32768:
        return _fit(BM=256, BN=64, BN2=power_of_two(columns - 64) if columns > 64 else 0,
                    BK=32 if transposed else 64, STAGES=4, num_warps=8)
    if N >= 4096 and columns > 64:
        return _fit(BM=64, BN=128, BN2=0, BK=64, STAGES=3, num_warps=4)
    BM = 128 if N >= 4096 else 64 if N >= 256 else 16
    return _fit(BM=BM, BN=min(64, power_of_two(columns)), BN2=0, BK=min(64, power_of_two(run)),
                STAGES=3 if BM == 128 else 4, num_warps=4)


def gradient_tile(N: int, columns: int, run: int) -> dict[str, int]:
    """Block sizes of `conv.conv_weight_gradient`, likewise."""
    if N >= 4096 and run > 128 and columns > 64:
        return _fit(BM=256, BN=128, BN2=16 if 128 < columns <= 144 else 0, BK=32, STAGES=4,
                    num_warps=8)
    return _fit(BM=min(128, power_of_two(run)), BN=min(64, power_of_two(columns)), BN2=0,
                BK=64 if N >= 4096 else 16 if N < 64 else 32, STAGES=4, num_warps=4)


def _fit(**tile: int) -> dict[str, int]:
    """Fewer loads in flight, then smaller blocks, where the GPU's shared memory is smaller."""
    available = _shared_memory()

    def need() -> int:
        return 2 * tile["STAGES"] * tile["BK"] * (tile["BM"] + tile["BN"] + tile["BN2"])

    while need() > available and tile["STAGES"] > 2:
        tile["STAGES"] -= 1
    while need() > available and tile["BM"] > 16:
        tile["BM"] //= 2
    return tile


@lru_cache
def _shared_memory() -> int:
    """Bytes that a program may use; an H100's where there is no GPU."""
    if not torch.cuda.is_available():
        return H100_SHARED_BYTES
    return torch.cuda.get_device_properties(
        torch.cuda.current_device()).shared_memory_per_block_optin
