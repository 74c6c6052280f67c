"""Processes that compile Triton's kernels into its cache on disk.

Threads of one process would wait for each other: a third of a compilation holds Python's lock. A
process here imports no PyTorch and touches no GPU, only its name. It ends when its input ends, also
when the one that started it was killed.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable

from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

from hnerv_clip.kernels import async_fence

MOST = 16  # processes, a quarter of a gigabyte each


class NamedGPU:
    """A driver for compilation alone."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def describe(jobs: Iterable[tuple]) -> list[str | None]:
    """What a process needs to know to compile each job of `launch.record`, as a line of text.

    None where there is nothing to do: Triton has it in memory, or it is no kernel of Triton's.
    """
    lines, target, before = [], driver.active.get_current_target(), knobs.runtime.jit_cache_hook

    def note(*, fn, compile, **_) -> bool:
        lines[-1] = json.dumps([fn.module, fn.name, compile["specialization_data"],
                                [target.backend, target.arch, target.warp_size],
                                async_fence.enabled])
        return True  # compile nothing now

    knobs.runtime.jit_cache_hook = note
    try:
        for kernel, grid, values, settings in jobs:
            lines.append(None)
            if isinstance(kernel, JITFunction):
                kernel.warmup(*values, grid=grid, **settings)
    finally:
        knobs.runtime.jit_cache_hook = before
    return lines


class Compilers:
    """A process for each thread that asks, started when it first does; close it in the end."""

    def __init__(self):
        self._own, self._all = threading.local(), []

    def compile(self, line: str) -> str:
        """Let this thread's process compile what `describe` wrote, and wait for it.

        Returns:
            What went wrong, if anything. The cache is then as it was: who needs the kernel compiles
            it and meets the error.
        """
        process = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hnerv_clip.kernels.compile_workers"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
            self._all.append(process)
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return "the process is gone"

    def close(self) -> None:
        for process in self._all:
            process.communicate()


def build_launcher(kernel: CompiledKernel) -> None:
    """Build the C module that launches a kernel, into Triton's cache on disk.

    Up to 3.6 Triton builds one for each signature when a kernel is loaded, which `launch` does in
    one thread at a time; later ones have one for all, and `make_launcher` no more.
    """
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def main() -> None:
    """Compile the lines of the standard input, with a line of answer to each."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever is printed meanwhile is no answer
    for line in sys.stdin:
        try:
            module, name, data, target, fence = json.loads(line)
            if fence != async_fence.enabled:
                async_fence.enable(fence)
            driver.set_active(NamedGPU(GPUTarget(*target)))
            build_launcher(getattr(importlib.import_module(module), name).preload(data))
            answer = ""
        except Exception as error:
            answer = str(error)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
