"""The fence that Triton before 3.8 leaves out in pipelined products on Hopper GPUs.

Their wgmma reads through the async proxy what cp.async wrote to shared memory through the generic
one. PTX's memory model asks for `fence.proxy.async` between the two; without it wgmma may read old
values. Here it is added to the PTX of our own kernels, unless `enable(False)` says otherwise;
`bench.replay` compares both.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from triton import JITFunction
from triton.backends.nvidia.compiler import CUDABackend

FENCE = "\tfence.proxy.async.shared::cta;\n"
lacking = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)  # later ones emit it
enabled = lacking
_kernels: dict[str, JITFunction] = {}
_make_ptx = CUDABackend.make_ptx


class FencedFunction(JITFunction):
    """A kernel whose cached code is found only by those that want it with the fence."""

    @property
    def cache_key(self) -> str:
        return super().cache_key + "-fence"


def with_async_fence(kernel: Any) -> Any:
    """Decorates a Triton kernel that has products."""
    if isinstance(kernel, JITFunction):  # else of Triton's interpreter
        _kernels[kernel.__name__] = kernel
        kernel.__class__ = FencedFunction if enabled else JITFunction
    return kernel


def enable(on: bool = True) -> None:
    """Switch the fence on or off, where Triton leaves it out; before anything is compiled."""
    global enabled
    enabled = on and lacking
    # Not by `knobs.runtime.add_stages_inspection_hook`: Triton 3.5 has none, 3.6 leaves it out of
    # the cache key, and 3.7 calls it at every launch and puts it into the key of all kernels
    CUDABackend.make_ptx = _make_fenced_ptx if enabled else _make_ptx
    for kernel in _kernels.values():
        with_async_fence(kernel)


def add_fences(ptx: str) -> str:
    """PTX with a fence before the first wgmma after each barrier, as Triton 3.8 writes it.

    Unchanged without wgmma, which only Hopper GPUs have, or cp.async, and where the fence is there.
    """
    if "wgmma.mma_async" not in ptx or "cp.async.commit_group" not in ptx:
        return ptx
    lines, fenced = [], False
    for line in ptx.splitlines(keepends=True):
        if "wgmma.fence" in line and not fenced:
            lines.append(FENCE)
        if "wgmma.fence" in line or "fence.proxy.async" in line:
            fenced = True
        elif "bar.sync" in line or "barrier" in line or line.startswith("$L__BB"):
            fenced = False  # a label, too: it can be reached from elsewhere
        lines.append(line)
    return "".join(lines)


@functools.wraps(_make_ptx)
def _make_fenced_ptx(self, src, metadata, *settings):
    ptx = _make_ptx(self, src, metadata, *settings)
    return add_fences(ptx) if metadata["name"] in _kernels else ptx


enable()
