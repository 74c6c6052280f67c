"""The decoder's large convolutions on Hopper GPUs, in CUDA, compiled when first needed.

Triton's products read every pixel K times from the L2 cache, which bounds them. Here TMA brings a
pixel to shared memory once for each row of the kernel. For that images are channel-blocked, [C / 8,
pixels, 8]. Elsewhere, and for small images, the Triton kernels of `conv` and `rgb_head` do it.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from hnerv_clip.kernels.activations import ACTIVATIONS
from hnerv_clip.kernels.tiles import H100_SHARED_BYTES, ceil_to

try:
    from cuda.bindings import driver, nvrtc  # come with PyTorch's CUDA builds
except ImportError:
    driver = nvrtc = None

FOLDER = Path(__file__).parent
HEADS = ("tanh", "sigmoid", "add")
MODES = ("l2", "pred", "uint8")
SIZES = {"forward": ((256, 3), (128, 3), (256, 2), (128, 2)),  # (BM, STAGES), the best first
         "input_gradient": ((256, 4), (256, 3), (128, 4), (128, 3)),
         "weight_gradient": ((256, 6), (128, 3), (64, 3)), "rgb_forward": ((256, 6), (256, 4)),
         "rgb_backward": ((256, 4), (256, 3), (128, 3))}


@cache
def available(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU, for which code can be compiled here."""
    if device.type != "cuda" or nvrtc is None or \
            torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        status, major, _ = nvrtc.nvrtcVersion()
    except Exception:  # the library itself is looked for at the first call, and may be missing
        return False
    return not status.value and major >= 12


def choose_macros(op: str, *, xc: int, yc: int, kernel: int, hw: tuple[int, int],
                  **settings: int | str) -> dict[str, int | str] | None:
    """What the source is to be compiled for, as macros, or None where it cannot do that.

    Args:
        op: "forward"; "input_gradient", from the gradient at the output, by weights as the forward
            pass has them; "weight_gradient"; "rgb_forward", the RGB head with its loss; or
            "rgb_backward", from the head's gradient to that before the last activation and pixel
            shuffle.
        xc, yc: channels in memory of the input and the output; for input_gradient and rgb_backward,
            of the gradient at the output and that at the input.
        hw: height and width of an image with its edges.
        settings: for forward act, SH, SW, CG, CN, EDGE as in `conv.conv_forward`, and OUT_BLOCKED:
            1 for a channel-blocked output, 0 for channels last. For rgb_forward head, OFFSET and
            mode as in `rgb_head.rgb_forward`; for rgb_backward act, SH, SW, CG as in
            `rgb_head.rgb_backward`, and EDGE of the images before the shuffle.
    Returns:
        {name: value} of the macros that the sources' first lines explain.
    """
    macros = {"K": kernel, "XC": xc, "YC": yc, "HEIGHT": hw[0], "WIDTH": hw[1]}
    for name, values in (("act", ACTIVATIONS), ("head", HEADS), ("mode", MODES)):
        if name in settings:
            macros[name.upper()] = values.index(settings.pop(name))
    macros |= settings
    if op == "weight_gradient":
        fold = yc == 8
        rows8 = (kernel if fold else kernel**2) * xc // 8
        macros |= {"WEIGHT_GRADIENT": 1, "FOLD": int(fold), "ROWS8": 16 if rows8 <= 16 else
                   48 if 32 < rows8 <= 48 and yc <= 104 else 32}
    elif op == "input_gradient":
        chunks = -(-xc // 64)
        macros |= {"INPUT_GRADIENT": 1, "CHUNK": ceil_to(-(-xc // 8 // chunks), 2)}
    elif op == "rgb_backward":
        macros |= {"RGB_BACKWARD": 1}
        if xc != 8 or max(macros["SH"], macros["SW"]) > 2 or \
                macros["SH"] * macros["SW"] * macros["CG"] % 8:
            return None
    else:
        macros |= {"INPUT_GRADIENT": 0, "CHUNK": xc // 8}
        macros |= {"RGB_FORWARD": 1} if op == "rgb_forward" else {}
    if kernel > 9 or xc % 8 or yc % 8 or yc > 256 or settings.get("CG", 0) % 2:
        return None
    if op == "input_gradient" and xc % 16:
        return None
    for size, stages in SIZES[op]:
        macros |= {"BM": size, "STAGES": stages}
        sums = yc // 2  # accumulators of a thread
        if op == "weight_gradient":
            sums = macros["ROWS8"] // 16 * wgmma_columns(macros) // 2
        most = 160 if op == "weight_gradient" or size == 128 else 60
        # A last copy reads on into the next block's upper edge, where gradients are 0
        far = op == "weight_gradient" and kernel // 2 * hw[1] < size
        if shared_bytes(macros) <= H100_SHARED_BYTES and sums <= most and not far:
            return macros
    return None


def supports(xc: int, yc: int, kernel: int, hw: tuple[int, int], **shuffle: int) -> bool:
    """Whether a convolution from xc to yc channels can be done, forward and backward."""
    return bool(choose_macros("forward", xc=xc, yc=yc, kernel=kernel, hw=hw, **shuffle)
                and choose_macros("input_gradient", xc=yc, yc=xc, kernel=kernel, hw=hw)
                and choose_macros("weight_gradient", xc=xc, yc=yc, kernel=kernel, hw=hw))


def supports_rgb(xc: int, yc: int, kernel: int, hw: tuple[int, int]) -> bool:
    """Whether the RGB head can be done, forward and its weights' gradient."""
    return all(choose_macros(op, xc=xc, yc=yc, kernel=kernel, hw=hw)
               for op in ("rgb_forward", "weight_gradient"))


def block_size(macros: dict[str, int]) -> int:
    """Threads of a thread block."""
    return 384 if "WEIGHT_GRADIENT" in macros else 2 * macros["BM"] + 128


def shared_bytes(macros: dict[str, int]) -> int:
    """Shared memory of a thread block, as the source lays it out."""
    K, BM, x8, y8 = macros["K"], macros["BM"], macros["XC"] // 8, macros["YC"] // 8
    rest = BM // 2 * y8  # results, staged in shared memory
    if "RGB_BACKWARD" in macros:
        stage = BM * macros["SH"] * macros["CG"] // 8 + (macros["SH"] + K - 1) * (BM + 8)
        return 16 * (macros["STAGES"] * (stage + 1) + K * (K + 1) * macros["YC"])
    if "WEIGHT_GRADIENT" in macros:
        lines = 1 if macros["FOLD"] else min(K, (macros["ROWS8"] + K * x8 - 2) // (K * x8) + 1)
        stage, rest = BM * wgmma_columns(macros) // 8 + lines * (BM + 8) * x8, 0
    elif macros["INPUT_GRADIENT"]:
        stage = (BM + 8 + K * 8 * y8) * macros["CHUNK"]
    elif "RGB_FORWARD" in macros:
        stage, rest = (BM + 8) * x8, K * (K * 8 * x8 + 8)
    else:
        stage = (BM + 8) * x8 + (K * 8 * x8 + 8) * y8
    return 16 * (macros["STAGES"] * (stage + 1) + rest)  # 16 more: two mbarriers


def grid_size(macros: dict[str, int], pixels: int, num_sms: int) -> int:
    """Thread blocks to start for so many pixels: at most one for each of so many SMs."""
    if "WEIGHT_GRADIENT" in macros:
        return _row_tiles(macros) * split_k(macros, num_sms)
    return min(num_sms, -(-pixels // macros["BM"]))


def split_k(macros: dict[str, int], num_sms: int) -> int:
    """Into how many partial sums a weight gradient is split."""
    return max(1, num_sms // _row_tiles(macros))


def _row_tiles(macros: dict[str, int]) -> int:
    """Thread blocks that it takes to have all rows of a weight gradient."""
    rows = macros["K"] if macros["FOLD"] else macros["K"]**2
    return -(-rows * macros["XC"] // 8 // macros["ROWS8"])


def _wgmma_macros(columns: int, b_k_major: bool) -> str:
    """The macros WGMMA and WGMMA_REGISTERS(d, a, b, add): d[columns / 2] += a·b, or = a·b.

    Args:
        b_k_major: b is [columns][k], 8 values of k side by side; else 8 columns (MN-major).
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"((d)[{i}])' for i in range(count))
    macros = ""
    for name, size, settings in (
            ("WGMMA", 1, f"1, 1, 0, {0 if b_k_major else 1}"),
            ("WGMMA_REGISTERS", 4, "1, 1, 1")):
        first = f"%{count}" if size == 1 else \
            "{" + ", ".join(f"%{count + i}" for i in range(size)) + "}"
        given = '"l"(a)' if size == 1 else ", ".join(f'"r"((a)[{i}])' for i in range(size))
        macros += (
            f'#define {name}(d, a, b, add) asm volatile("{{ .reg .pred p; setp.ne.b32 p, '
            f'%{count + size + 1}, 0; wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 '
            f'{{{sums}}}, {first}, %{count + size}, p, {settings}; }}" '
            f': {outputs} : {given}, "l"(b), "r"((int)(add)))\n')
    return macros


def sources(macros: dict[str, int | str]) -> list[str]:
    """The files of one operation, in their order."""
    if "WEIGHT_GRADIENT" in macros or "RGB_BACKWARD" in macros:
        return ["ptx.cu", "pipeline.cu",
                "weight_gradient.cu" if "WEIGHT_GRADIENT" in macros else "rgb_backward.cu"]
    return ["ptx.cu", "pipeline.cu", "kernel_row.cu",
            "rgb_forward.cu" if "RGB_FORWARD" in macros else "conv.cu"]


def enums() -> str:
    """The names of ACT's, HEAD's and MODE's values."""
    return "".join(f"enum {{ {', '.join(values).upper()} }};\n"
                   for values in (ACTIVATIONS, HEADS, MODES))


def b_k_major(macros: dict[str, int | str]) -> bool:
    """Whether wgmma's operand b is [columns][k], as weights are for gradients at an input."""
    return bool(macros.get("INPUT_GRADIENT") or "RGB_BACKWARD" in macros)


def wgmma_columns(macros: dict[str, int]) -> int:
    """Columns N of one wgmma."""
    rows = macros["K"] if "RGB_FORWARD" in macros or macros.get("FOLD") else 1  # side by side
    return macros["YC"] * rows


def build(macros: dict[str, int]) -> bytes:
    """Machine code of the source for those macros, cached on disk beside Triton's.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    defined = macros | {"SHARED": shared_bytes(macros)}
    source = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    source += enums() + _wgmma_macros(wgmma_columns(macros), b_k_major(macros))
    source += "".join((FOLDER / name).read_text(encoding="utf-8") for name in sources(macros))
    cache = get_cache_manager(hashlib.sha256(
        repr((nvrtc.nvrtcVersion()[1:], source)).encode()).hexdigest())
    if path := cache.get_file("hopper.cubin"):
        return Path(path).read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"hopper.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    status, = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"the CUDA source does not compile: {log.decode().rstrip(chr(0))}")
    code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    cache.put(code, "hopper.cubin")
    return code


def _check(answer: tuple):
    """The value of a CUDA call.

    Raises:
        RuntimeError: it failed.
    """
    status, *values = answer
    if status.value:
        raise RuntimeError(f"CUDA says {status.name}")
    return values[0] if values else None


class _Convolution:
    """Launched and compiled as a Triton kernel is, see `launch.launch`.

    Values: as the source's `convolve` has them, None for those that are not there.
    """

    __name__ = "hopper_convolution"

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*values: Tensor | float | int | None, **macros: int | str) -> None:
            device = next(v.device for v in values if isinstance(v, Tensor))
            kernel = _load(device.index, tuple(macros.items()))
            plain = tuple(v.data_ptr() if isinstance(v, Tensor) else v or 0 for v in values)
            kinds = tuple({int: ctypes.c_int, float: ctypes.c_float}.get(type(v), ctypes.c_void_p)
                          for v in values)
            _check(driver.cuLaunchKernel(kernel, grid[0], 1, 1, block_size(macros), 1, 1,
                                         shared_bytes(macros),
                                         torch.cuda.current_stream(device).cuda_stream,
                                         (plain, kinds), 0))
        return run

    def warmup(self, *values: Tensor | int | None, grid: tuple[int, ...], **macros: int
               ) -> _Convolution:
        device = next(v.device for v in values if isinstance(v, Tensor))
        _load(device.index, tuple(macros.items()))
        return self

    def _init_handles(self) -> None:
        """Loaded already."""


@cache
def _load(device: int, macros: tuple[tuple[str, int | str], ...]):
    """The compiled source on a GPU, as the driver launches it."""
    # A new thread has no CUDA context until it is given the device's
    _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(device))))
    module = _check(driver.cuModuleLoadData(build(dict(macros))))
    kernel = _check(driver.cuModuleGetFunction(module, b"convolve"))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(kernel, limit, shared_bytes(dict(macros))))
    return kernel


convolve = _Convolution()
