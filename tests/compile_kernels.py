"""Compile every kernel of a training step for an H100, without a GPU; `test_engine` runs it.

Apart from the tests, because they run Triton's interpreter, which allows what no GPU can do.
"""

import os
import sys
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hnerv_clip import engine, fused, hopper, tiles
from hnerv_clip.config import Config
from hnerv_clip.dataset import load_dataset
from hnerv_clip.model import build_model

NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8"}
SETTINGS = dict(data_path="bunny", crop_list="640_1280", frame_limit=4, data_split="1_1_1",
                teacher="efficientnet-lite0", clip_dim=1280)
# The smallest widths that are allowed, and the paper's
CONFIGS = ({"resize_list": "80_160", "enc_strds": "5 4 2 2", "dec_strds": "5 4 2 2",
            "enc_dim": "16_8", "modelsize": 0.05}, {})


def main() -> None:
    jobs = []
    fused.working_dtype = lambda device: torch.bfloat16
    fused.compile_all = lambda step, device: jobs.extend(tiles.record(step))
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    for changes, on_hopper in ((CONFIGS[0], False), (CONFIGS[1], False), (CONFIGS[1], True)):
        hopper.available = lambda device, known=on_hopper: known
        config = Config.from_params(**SETTINGS | changes)
        dataset = load_dataset(config.replace(predict_clip=False), "")
        dataset.embeddings = torch.randn(4, len(dataset.grid), 1280)
        model = build_model(config.model, frame_hw=dataset.video.frame_hw, frame_count=4)
        engine.FusedEngine(config, model, dataset, autocast=torch.bfloat16)
    failed = 0
    for kernel, _, values, settings in jobs:
        try:
            if kernel is not hopper.convolve:
                compile_for_h100(kernel, values, settings)
            elif hopper.nvrtc:
                hopper.build(settings)
        except Exception as error:
            failed += 1
            print(kernel.__name__, settings, error, file=sys.stderr)
    print(f"{len(jobs)} kernels, {failed} failed")
    sys.exit(failed > 0 or not jobs)


def compile_for_h100(kernel: triton.JITFunction, values: tuple, settings: dict) -> None:
    given = dict(zip(kernel.arg_names, values)) | settings
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        known = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or known:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], hints[i,] = NAMES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                hints[i,] = [["tt.divisibility", 16]]
    options = {name: value for name, value in given.items() if name not in kernel.arg_names}
    triton.compile(ASTSource(kernel, signature, constants, hints),
                   target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    main()
