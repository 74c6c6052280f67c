"""Compile a pipelined product for two GPUs, with `async_fence` and without, by a process and here.

Prints as JSON what came out; `test_async_fence` runs it, apart because tests run Triton's
interpreter.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hnerv_clip.kernels import async_fence
from hnerv_clip.kernels.compile_workers import Compilers, NamedGPU, describe
from hnerv_clip.kernels.conv import conv_weight_gradient

SETTINGS = dict(W=64, CI=64, CO=64, K=1, S=4, BM=64, BN=64, BN2=0, BK=64, STAGES=3)


def main() -> None:
    found, hits = [], []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    values = (*torch.zeros(2, 4096, 64, dtype=torch.bfloat16), torch.zeros(4, 64, 64), 4096)
    states = {async_fence.lacking, False}
    for arch in (90, 80):
        compilers = Compilers()
        for enabled in states:
            async_fence.enable(enabled)
            driver.set_active(NamedGPU(GPUTarget("cuda", arch, 32)))
            conv_weight_gradient.device_caches.clear()
            line, = describe([(conv_weight_gradient, (1, 1, 4), values, SETTINGS)])
            compilers.compile(line)
            kernel = conv_weight_gradient.warmup(*values, grid=(1, 1, 4), **SETTINGS)
            found.append({"arch": arch, "enabled": enabled, "hash": kernel.hash,
                          "by_process": hits[-1], "ptx": kernel.asm["ptx"],
                          "cubin": kernel.asm["cubin"][:4].hex()})
        compilers.close()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
