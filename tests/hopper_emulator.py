"""Run the Hopper kernels' sources on the CPU, see `hopper_emulator.cc`."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hnerv_clip.kernels import hopper

EMULATOR = Path(__file__).with_name("hopper_emulator.cc")
COMPILE = ["g++", "-std=c++17", "-O1", "-fPIC", "-w"]
# Which of a source's values are in bfloat16, in its order: those that it reads, and writes
BF16_VALUES = {"conv.cu": ((0, 1), (3, 4)), "weight_gradient.cu": ((0, 1), ()),
               "rgb_forward.cu": ((0, 1), (6,)), "rgb_backward.cu": ((0, 1, 2), (3,))}


@functools.cache
def _headers() -> tempfile.TemporaryDirectory:
    """The system's headers, compiled once: half a second for each kernel."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "headers.h"
    path.write_text("".join(line for line in EMULATOR.open() if line.startswith("#include <")))
    subprocess.run([*COMPILE, "-x", "c++-header", str(path)], check=True)
    return folder


class EmulatedKernel:
    """The sources for some macros, compiled for this machine."""

    def __init__(self, macros: dict[str, int | str], folder: Path, *, old: str = "", new: str = ""):
        """Text of the sources can be replaced, to see that a mistake is found."""
        self.macros = macros
        folder = Path(tempfile.mkdtemp(dir=folder))  # a library is loaded once from each place
        columns = hopper.wgmma_columns(macros)
        text = hopper.enums() + "".join((hopper.FOLDER / name).read_text()
                                        for name in hopper.sources(macros)
                                        if name != "ptx.cu")
        assert old in text
        text = text.replace(old, new) if old else text
        (folder / "sources.cu").write_text(text)
        given = macros | {"SHARED": hopper.shared_bytes(macros), "COLUMNS": columns,
                          "B_K_MAJOR": int(hopper.b_k_major(macros))}
        (folder / "program.cc").write_text("\n".join([  # a macro must not change the headers
            '#include "headers.h"', *(f"#define {name} {value}" for name, value in given.items()),
            f'#include "{EMULATOR}"']))
        subprocess.run([*COMPILE, "-shared", f"-I{folder}", f"-I{_headers().name}",
                        str(folder / "program.cc"), "-o", str(folder / "program.so")], check=True)
        self.run = ctypes.CDLL(str(folder / "program.so")).run
        self.run.restype = ctypes.c_char_p

    def __call__(self, grid: int, *values: Tensor | int | float | None, seed: int = 0) -> None:
        """Launch; tensors may be copied from with the guard around them.

        Raises:
            RuntimeError: the emulator's complaint.
        """
        kinds = {int: ctypes.c_int, float: ctypes.c_float}
        held = [kinds.get(type(v), ctypes.c_void_p)(v.data_ptr() if isinstance(v, Tensor) else v)
                for v in values]
        arguments = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
        ranges = []
        for value in values:
            if isinstance(value, Tensor):
                memory = value.untyped_storage()
                ranges += [memory.data_ptr(), memory.data_ptr() + memory.nbytes()]
        complaint = self.run(grid, hopper.block_size(self.macros), arguments,
                             (ctypes.c_void_p * len(ranges))(*ranges), len(ranges) // 2, seed)
        if complaint:
            raise RuntimeError(complaint.decode())


class Launcher:
    """Stands in for `hopper.convolve` where activations are float32, as in Triton's interpreter."""

    __name__ = hopper.convolve.__name__

    def __init__(self, folder: Path):
        self.folder, self.kernels = folder, {}

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*values: Tensor | float | int | None, **macros: int | str) -> None:
            key = tuple(macros.items())
            if key not in self.kernels:
                self.kernels[key] = EmulatedKernel(macros, self.folder)
            read, written = BF16_VALUES[hopper.sources(macros)[-1]]
            values = list(values)
            results = {i: values[i] for i in written if values[i] is not None}
            for i in (*read, *results):
                values[i] = _to_bf16(values[i])
            self.kernels[key](grid[0], *values)
            for i, result in results.items():
                result.copy_(values[i])
        return launch


def _to_bf16(tensor: Tensor) -> Tensor:
    """A copy in bfloat16, with the guard around it."""
    guard = torch.empty(0).set_(tensor.untyped_storage()).to(torch.bfloat16)
    return guard.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def to_blocked(image: Tensor, edge: int, guard: int) -> Tensor:
    """[B, C, H, W] as bfloat16 [C / 8, B, H, W, 8] with edges, and a guard of zeros."""
    image = torch.nn.functional.pad(image, (edge,) * 4)
    B, C, H, W = image.shape
    blocked = image.view(B, C // 8, 8, H, W).permute(1, 0, 3, 4, 2).to(torch.bfloat16)
    flat = torch.zeros(blocked.numel() + 2 * guard, dtype=torch.bfloat16)
    flat[guard:guard + blocked.numel()] = blocked.flatten()
    return flat[guard:guard + blocked.numel()].view(blocked.shape)


def to_kernel_rows(weight: Tensor) -> Tensor:
    """[O, C, K, K] in bfloat16 as [K, O / 8, K·C, 8], see `layout.pack_convolution`."""
    out, inner, K, _ = weight.shape
    return weight.view(out // 8, 8, inner, K, K).permute(3, 0, 4, 2, 1).reshape(
        K, out // 8, K * inner, 8).to(torch.bfloat16)
