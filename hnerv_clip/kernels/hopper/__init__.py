"""The decoder's large convolutions on Hopper GPUs, in CUDA, compiled when first needed.

Triton's products read every pixel K times from the second-level cache, which bounds them. Here the
copy engine brings a pixel to shared memory once for each row of the kernel. For that its channels
lie in units of 8, see `layout.Conv.units`. Elsewhere, and for small images, `kernels` does it.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from hnerv_clip.kernels.decoder_kernels import ACTIVATIONS
from hnerv_clip.kernels.tiles import H100_SHARED_BYTES, ceil_to

try:
    from cuda.bindings import driver, nvrtc  # come with PyTorch's CUDA builds
except ImportError:
    driver = nvrtc = None

FOLDER = Path(__file__).parent
HEADS = ("tanh", "sigmoid", "add")
MODES = ("l2", "pred", "uint8")
SIZES = {"forward": ((256, 3), (128, 3), (256, 2), (128, 2)),  # (BM, STAGES), the best first
         "back": ((256, 4), (256, 3), (128, 4), (128, 3)), "rgb": ((256, 6), (256, 4)),
         "rgb_back": ((256, 4), (256, 3), (128, 3)),
         "weights": ((256, 6), (128, 3), (64, 3))}


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


def choose(way: str, *, xc: int, yc: int, kernel: int, hw: tuple[int, int],
           **settings: int | str) -> dict[str, int | str] | None:
    """What the source is to be compiled for, as macros, or None where it cannot do that.

    Args:
        way: "forward"; "back", from the gradient at the output to that at the input, by weights as
            the way forward has them; "weights", their gradient; "rgb", forward to colours; or
            "rgb_back", from their gradient to that before the last activation and pixel shuffle.
        xc, yc: channels in memory: of the input and the output, on the ways back of the gradient at
            the output and that at the input.
        hw: height and width of an image with its edges.
        settings: of the way forward act, SH, SW, CG, CN, EDGE as in `kernels.convolve`, and
            OUT_UNITS: 1 for an output in units of channels, 0 for channels last. Of the way to
            colours head, OFFSET and mode as in `kernels.rgb_forward`; of the way back from them
            act, SH, SW, CG as in `kernels.rgb_backward`, and EDGE of the images before the shuffle.
    Returns:
        {name: value} of the macros that the sources' first lines explain.
    """
    macros = {"K": kernel, "XC": xc, "YC": yc, "HEIGHT": hw[0], "WIDTH": hw[1]}
    for name, values in (("act", ACTIVATIONS), ("head", HEADS), ("mode", MODES)):
        if name in settings:
            macros[name.upper()] = values.index(settings.pop(name))
    macros |= settings
    if way == "weights":
        fold = yc == 8
        units = (kernel if fold else kernel**2) * xc // 8
        macros |= {"WEIGHTS": 1, "FOLD": int(fold), "BLOCK": 16 if units <= 16 else
                   48 if 32 < units <= 48 and yc <= 104 else 32}
    elif way == "back":
        parts = -(-xc // 64)
        macros |= {"BACK": 1, "PART": ceil_to(-(-xc // 8 // parts), 2)}
    elif way == "rgb_back":
        macros |= {"RGB_BACK": 1}
        if xc != 8 or max(macros["SH"], macros["SW"]) > 2 or \
                macros["SH"] * macros["SW"] * macros["CG"] % 8:
            return None
    else:
        macros |= {"BACK": 0, "PART": xc // 8} | ({"RGB": 1} if way == "rgb" else {})
    if kernel > 9 or xc % 8 or yc % 8 or yc > 256 or settings.get("CG", 0) % 2:
        return None
    if way == "back" and xc % 16:
        return None
    for size, stages in SIZES[way]:
        macros |= {"BM": size, "STAGES": stages}
        sums = macros["BLOCK"] // 16 * product_columns(macros) // 2 if way == "weights" else yc // 2
        most = 160 if way == "weights" or size == 128 else 60  # of a thread
        # A last copy reads on into the next unit's upper edge, where gradients are 0
        far = way == "weights" and kernel // 2 * hw[1] < size
        if shared_bytes(macros) <= H100_SHARED_BYTES and sums <= most and not far:
            return macros
    return None


def knows(xc: int, yc: int, kernel: int, hw: tuple[int, int], **shuffle: int) -> bool:
    """Whether a convolution from xc to yc channels can be done, all ways; see `choose`."""
    return all(choose(way, xc=a, yc=b, kernel=kernel, hw=hw, **given) for way, a, b, given in (
        ("forward", xc, yc, shuffle), ("back", yc, xc, {}), ("weights", xc, yc, {})))


def knows_rgb(xc: int, yc: int, kernel: int, hw: tuple[int, int]) -> bool:
    """Whether the RGB head can be done, forward and its weights' gradient."""
    return all(choose(way, xc=xc, yc=yc, kernel=kernel, hw=hw) for way in ("rgb", "weights"))


def threads(macros: dict[str, int]) -> int:
    """Threads of a program."""
    return 384 if "WEIGHTS" in macros else 2 * macros["BM"] + 128


def shared_bytes(macros: dict[str, int]) -> int:
    """Shared memory of a program, as the source lays it out."""
    K, BM, x8, y8 = macros["K"], macros["BM"], macros["XC"] // 8, macros["YC"] // 8
    rest = BM // 2 * y8  # results on their way out
    if "RGB_BACK" in macros:
        units = BM * macros["SH"] * macros["CG"] // 8 + (macros["SH"] + K - 1) * (BM + 8)
        return 16 * (macros["STAGES"] * (units + 1) + K * (K + 1) * macros["YC"])
    if "WEIGHTS" in macros:
        lines = 1 if macros["FOLD"] else min(K, (macros["BLOCK"] + K * x8 - 2) // (K * x8) + 1)
        units, rest = BM * product_columns(macros) // 8 + lines * (BM + 8) * x8, 0
    elif macros["BACK"]:
        units = (BM + 8 + K * 8 * y8) * macros["PART"]
    elif "RGB" in macros:
        units, rest = (BM + 8) * x8, K * (K * 8 * x8 + 8)
    else:
        units = (BM + 8) * x8 + (K * 8 * x8 + 8) * y8
    return 16 * (macros["STAGES"] * (units + 1) + rest)


def programs(macros: dict[str, int], pixels: int, processors: int) -> int:
    """Programs to start for so many pixels: one for each of so many multiprocessors, at most."""
    if "WEIGHTS" in macros:
        return _blocks(macros) * shares(macros, processors)
    return min(processors, -(-pixels // macros["BM"]))


def shares(macros: dict[str, int], processors: int) -> int:
    """Into how many partial sums a weight gradient is divided."""
    return max(1, processors // _blocks(macros))


def _blocks(macros: dict[str, int]) -> int:
    """Programs that it takes to have all rows of a weight gradient."""
    rows = macros["K"] if macros["FOLD"] else macros["K"]**2
    return -(-rows * macros["XC"] // 8 // macros["BLOCK"])


def _products(columns: int, weights_first: bool) -> str:
    """The macros WGMMA and WGMMA_REGISTERS(d, a, b, add): d[columns / 2] += a·b, or = a·b.

    Args:
        weights_first: b lies as [columns][sum], 8 values of the sum side by side; else the columns.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"((d)[{i}])' for i in range(count))
    macros = ""
    for name, size, settings in (
            ("WGMMA", 1, f"1, 1, 0, {0 if weights_first else 1}"),
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
    """The files of one way, in their order."""
    if "WEIGHTS" in macros or "RGB_BACK" in macros:
        return ["primitives.cu", "common.cu",
                "weights.cu" if "WEIGHTS" in macros else "rgb_back.cu"]
    return ["primitives.cu", "common.cu", "rows.cu",
            "rgb.cu" if "RGB" in macros else "convolution.cu"]


def names() -> str:
    """The names of ACT's, HEAD's and MODE's values."""
    return "".join(f"enum {{ {', '.join(values).upper()} }};\n"
                   for values in (ACTIVATIONS, HEADS, MODES))


def weights_first(macros: dict[str, int | str]) -> bool:
    """Whether a product's second operand lies as [columns][sum], as weights on the ways back."""
    return bool(macros.get("BACK") or "RGB_BACK" in macros)


def product_columns(macros: dict[str, int]) -> int:
    """Of the matrix product that is started at once."""
    rows = macros["K"] if "RGB" in macros or macros.get("FOLD") else 1  # beside each other
    return macros["YC"] * rows


def build(macros: dict[str, int]) -> bytes:
    """Machine code of the source for those macros, kept on disk beside Triton's.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    defined = macros | {"SHARED": shared_bytes(macros)}
    source = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    source += names() + _products(product_columns(macros), weights_first(macros))
    source += "".join((FOLDER / name).read_text(encoding="utf-8") for name in sources(macros))
    kept = get_cache_manager(hashlib.sha256(
        repr((nvrtc.nvrtcVersion()[1:], source)).encode()).hexdigest())
    if found := kept.get_file("hopper.cubin"):
        return Path(found).read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"hopper.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    status, = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"the CUDA source does not compile: {log.decode().rstrip(chr(0))}")
    code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    kept.put(code, "hopper.cubin")
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
            _check(driver.cuLaunchKernel(kernel, grid[0], 1, 1, threads(macros), 1, 1,
                                         shared_bytes(macros),
                                         torch.cuda.current_stream(device).cuda_stream,
                                         (plain, kinds), 0))
        return run

    def warmup(self, *values: Tensor | int | None, grid: tuple[int, ...], **macros: int):
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
