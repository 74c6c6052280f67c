"""How kernels are launched, and compiled before a step is captured."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from hnerv_clip.kernels.compile_workers import MOST, Compilers, describe

_recorded: list | None = None
# Held while a compiled kernel is loaded. Triton 3.6 loads a module of one and the same name for
# each signature, and a thread that loads another one meanwhile can be given its launch function
_loading = Lock()


def launch(kernel: Any, grid: tuple[int, ...], *values: Any, **settings: Any) -> None:
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
            compiled = kernel.warmup(*values, grid=grid, **settings)
            with _loading:
                compiled._init_handles()  # that it fits, too

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
