"""How the kernels' work is cut into programs, and how they are launched and compiled."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from hnerv_clip.compilers import MOST, Compilers, describe

H100_SHARED_BYTES = 232448  # that a program may use
_recorded: list | None = None


def launch(kernel, grid: tuple[int, ...], *values, **settings) -> None:
    """Run a kernel, Triton's or `hopper.convolve`, or note it for `record`."""
    if _recorded is None:
        kernel[grid](*values, **settings)
    else:
        _recorded.append((kernel, grid, values, settings))


def record(step: Callable[[], object]) -> list[tuple]:
    """What a step would launch, each compilation once: (kernel, grid, values, settings).

    The step launches nothing.
    """
    global _recorded
    _recorded = []
    try:
        step()
        return list({_compiled_as(*job): job for job in _recorded}.values())
    finally:
        _recorded = None


def compile_all(step: Callable[[], object], device: torch.device) -> None:
    """Compile what a step launches, on all processor cores at once; the step launches nothing."""
    jobs = record(step)
    if device.type != "cuda":  # Triton's interpreter has nothing to compile
        return
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    cores = max(1, len(os.sched_getaffinity(0)) // ranks)  # ranks of one machine share them
    with torch.cuda.device(device):
        build_all(jobs, cores)


def build_all(jobs: list[tuple], cores: int) -> None:
    """Compile and load what `record` noted, in threads; what is not on disk yet in processes."""
    known = get_cache_manager(_fingerprint(jobs))  # an entry of Triton's own cache
    apart = cores >= 4 and len(jobs) >= 8 and not known.has_file("compiled")
    lines = describe(jobs) if apart else [None] * len(jobs)
    device, compilers, failed = driver.active.get_current_device(), Compilers(), []

    def build(job: tuple, line: str | None) -> None:
        kernel, grid, values, settings = job
        if line and (error := compilers.compile(line)):
            failed.append(error)
        with torch.cuda.device(device):
            kernel.warmup(*values, grid=grid, **settings)._init_handles()  # that it fits, too

    try:
        with ThreadPoolExecutor(min(cores, MOST) if apart else cores) as pool:
            list(pool.map(build, jobs, lines))
    finally:
        compilers.close()
    if failed:
        warnings.warn(f"{len(failed)} kernels were not compiled in processes ({failed[0]}); slower "
                      "threads compiled them", stacklevel=2)
    else:
        known.put(b"", "compiled")


def _fingerprint(jobs: list[tuple]) -> str:
    """Of what is compiled, by what."""
    words = [triton.__version__, torch.version.cuda, str(driver.active.get_current_target()),
             *sorted(_compiled_as(*job) for job in jobs),
             *sorted({getattr(job[0], "cache_key", "") for job in jobs})]
    return hashlib.sha256(repr(words).encode()).hexdigest()


def _compiled_as(kernel, grid: tuple[int, ...], values: tuple, settings: dict) -> str:
    """What tells one compilation from another."""
    loose = {p.name for p in getattr(kernel, "params", ()) if p.do_not_specialize}
    given = dict(zip(getattr(kernel, "arg_names", range(len(values))), values)) | settings
    return str((kernel.__name__, [(name, v.dtype if isinstance(v, Tensor) else v)
                                  for name, v in given.items() if name not in loose]))


def ceil_to(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def power_of_two(value: int, least: int = 16) -> int:
    """The next power of two; matrix products take no fewer than 16."""
    return max(least, triton.next_power_of_2(value))


def program_columns(width: int, tile: dict[str, int]) -> int:
    """Programs that a tile needs for an output of some channels."""
    return triton.cdiv(width, tile["BN"] + tile["BN2"])


def product_tile(N: int, columns: int, run: int, *, back: bool = False) -> dict[str, int]:
    """Block sizes of a matrix product for N rows, an output of some columns and a run of values.

    Chosen by measurements on an H100.
    """
    if N >= 32768 and columns > 128:
        return _fit(BM=128, BN=128, BN2=16 if columns <= 144 else 0, BK=32, STAGES=4, num_warps=4)
    if N >= 32768 and columns > 96:
        return _fit(BM=256, BN=128, BN2=0, BK=64, STAGES=3, num_warps=8)
    if N >= 32768:
        return _fit(BM=256, BN=64, BN2=power_of_two(columns - 64) if columns > 64 else 0,
                    BK=32 if back else 64, STAGES=4, num_warps=8)
    if N >= 4096 and columns > 64:
        return _fit(BM=64, BN=128, BN2=0, BK=64, STAGES=3, num_warps=4)
    BM = 128 if N >= 4096 else 64 if N >= 256 else 16
    return _fit(BM=BM, BN=min(64, power_of_two(columns)), BN2=0, BK=min(64, power_of_two(run)),
                STAGES=3 if BM == 128 else 4, num_warps=4)


def gradient_tile(N: int, columns: int, run: int) -> dict[str, int]:
    """Block sizes of `convolve_weight_gradient`, likewise."""
    if N >= 4096 and run > 128 and columns > 64:
        return _fit(BM=256, BN=128, BN2=16 if 128 < columns <= 144 else 0, BK=32, STAGES=4,
                    num_warps=8)
    return _fit(BM=min(128, power_of_two(run)), BN=min(64, power_of_two(columns)), BN2=0,
                BK=64 if N >= 4096 else 16 if N < 64 else 32, STAGES=4, num_warps=4)


def _fit(**tile: int) -> dict[str, int]:
    """Fewer loads in flight, then smaller blocks, where the GPU's shared memory is smaller."""
    room = _shared_memory()

    def need() -> int:
        return 2 * tile["STAGES"] * tile["BK"] * (tile["BM"] + tile["BN"] + tile["BN2"])

    while need() > room and tile["STAGES"] > 2:
        tile["STAGES"] -= 1
    while need() > room and tile["BM"] > 16:
        tile["BM"] //= 2
    return tile


@lru_cache
def _shared_memory() -> int:
    """Bytes that a program may use; an H100's where there is no GPU."""
    if not torch.cuda.is_available():
        return H100_SHARED_BYTES
    return torch.cuda.get_device_properties(
        torch.cuda.current_device()).shared_memory_per_block_optin
