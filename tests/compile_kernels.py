"""Compile every kernel of a training step for an H100, without a GPU; `test_engine` runs it.

Triton's by the processes of `compile_workers`, whose results must then be found on disk. Apart
from the tests, because they run Triton's interpreter, which allows what no GPU can do.
"""

import os
import sys
import tempfile
from contextlib import nullcontext, suppress
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hnerv_clip.config import Config
from hnerv_clip.dataset import load_dataset
from hnerv_clip.engines.fused import engine, workspace
from hnerv_clip.engines.fused.decoding import Decoder
from hnerv_clip.kernels import async_fence, hopper, launch
from hnerv_clip.kernels.compile_workers import NamedGPU
from hnerv_clip.model import build_model

SETTINGS = dict(data_path="bunny", crop_list="640_1280", frame_limit=4, data_split="1_1_1",
                teacher="efficientnet-lite0", clip_dim=1280)
# The smallest widths that are allowed, and the paper's
CONFIGS = ({"resize_list": "80_160", "enc_strds": "5 4 2 2", "dec_strds": "5 4 2 2",
            "enc_dim": "16_8", "modelsize": 0.05}, {})


def main() -> None:
    cache, jobs = tempfile.TemporaryDirectory(), []
    os.environ["TRITON_CACHE_DIR"] = cache.name
    workspace.working_dtype = lambda device: torch.bfloat16
    engine.compile_all = lambda step, _: jobs.extend(launch.record(step))
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    for changes, on_hopper in ((CONFIGS[0], False), (CONFIGS[1], False), (CONFIGS[1], True)):
        hopper.available = lambda device, known=on_hopper: known
        config = Config.from_params(**SETTINGS | changes)
        dataset = load_dataset(config.replace(predict_clip=False), "")
        dataset.embeddings = torch.randn(4, len(dataset.grid), 1280)
        model = build_model(config.model, frame_hw=dataset.video.frame_hw, frame_count=4)
        engine.FusedEngine(config, model, dataset, autocast=torch.bfloat16)
        decoder = Decoder(model, batch=4, centres=dataset.grid.centres)
        jobs.extend(launch.record(lambda own=decoder: own._run(True, True)))
    driver.set_active(NamedGPU(GPUTarget("cuda", 90, 32)))
    torch.cuda.device = nullcontext
    triton.compiler.CompiledKernel._init_handles = lambda self: None
    type(hopper.convolve).warmup = compile_for_hopper
    found = []
    knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append((src.name, cache_hit))
    with suppress(Exception):  # what failed is said below, all of it
        launch.build_all(jobs, cores=4)
    failed, unfenced = 0, set()
    for kernel, grid, values, settings in jobs:
        try:
            ptx = getattr(kernel.warmup(*values, grid=grid, **settings), "asm", {}).get("ptx", "")
            if ptx != async_fence.add_fences(ptx):
                unfenced.add(kernel.__name__)
        except Exception as error:
            failed += 1
            print(kernel.__name__, settings, error, file=sys.stderr)
    missed = {name for name, hit in found if not hit}
    if missed:
        print("not compiled by the processes:", *missed, file=sys.stderr)
    if unfenced:
        print("need @with_async_fence:", *unfenced, file=sys.stderr)
    print(f"{len(jobs)} kernels, {failed} failed, {len(found)} found on disk")
    sys.exit(failed > 0 or bool(missed) or bool(unfenced) or not found)


def compile_for_hopper(kernel, *values, grid, **macros):
    if hopper.nvrtc:
        hopper.build(macros)
    return kernel


if __name__ == "__main__":
    main()
