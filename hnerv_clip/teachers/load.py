"""Load a teacher, and run it over a video's patches."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hnerv_clip.config import BUNDLED, ConfigError, TeacherConfig
from hnerv_clip.devices import select_device
from hnerv_clip.patches import PatchGrid, cut_patches
from hnerv_clip.teachers.base import Teacher, describe_teacher
from hnerv_clip.teachers.clip import ClipTeacher
from hnerv_clip.teachers.efficientnet import BundledTeacher

PATCHES_AT_ONCE = (16, 256)  # on a CPU, on a GPU


def load_teacher(config: TeacherConfig, device: str | torch.device = "auto") -> Teacher:
    """Load a teacher's weights, onto the GPU where there is one.

    With `teacher_precision="bf16"` CLIP encodes patches in bf16 where PyTorch's autocast deems it
    safe: faster on a GPU, cosines to fp32 above 0.999. Resizing and texts stay in fp32, and so does
    the bundled teacher, whose cosines would fall to 0.99.

    Raises:
        ConfigError: weights that are missing, unreachable, unreadable, or of another architecture;
            at once, with the ways out; or a GPU whose memory they do not fit.
    """
    device = select_device(device)
    try:
        return BundledTeacher(device) if config.teacher == BUNDLED else ClipTeacher(config, device)
    except torch.cuda.OutOfMemoryError as error:
        raise _no_memory(describe_teacher(config).label) from error


def run_teacher(teacher: Teacher, frames: Tensor, grid: PatchGrid, *,
                progress: bool = True) -> Tensor:
    """Encode the patches of uint8 [T, 3, H, W] frames, some hundreds at a time on a GPU.

    Patches are cut and resized on the teacher's device, and the embeddings fetched once, at the
    end, so that a GPU never waits for the CPU. Where the GPU's memory runs out, fewer at a time.

    Returns:
        float32 [T, P, D] on the CPU, unit length.
    Raises:
        ConfigError: the GPU's memory does not hold a single patch.
    """
    at_once, done = PATCHES_AT_ONCE[teacher.device.type != "cpu"], []
    with tqdm(total=len(frames), desc=teacher.name, unit="frame", disable=not progress) as bar:
        for batch in frames.split(max(1, at_once // len(grid))):
            left = cut_patches(batch.to(teacher.device, non_blocking=True), grid).flatten(0, 1)
            while len(left):
                try:
                    done.append(teacher.encode_patches(left[:at_once]))
                    left = left[at_once:]
                except torch.cuda.OutOfMemoryError:
                    at_once = _fewer(teacher, at_once)
            bar.update(len(batch))
        embeddings = torch.cat(done).cpu()
    return embeddings.view(len(frames), len(grid), -1)


def _fewer(teacher: Teacher, at_once: int) -> int:
    """Half as many patches at once, after the GPU's memory ran out: they give the same result."""
    if at_once == 1:
        raise _no_memory(teacher.label)
    torch.cuda.empty_cache()
    warnings.warn(f"the GPU's memory holds no {at_once} patches for {teacher.label} at once: fewer "
                  "at a time, which gives the same result", stacklevel=3)
    return at_once // 2


def _no_memory(label: str) -> ConfigError:
    return ConfigError(f"the GPU's memory is too small for {label}; use device='cpu', or end what "
                       "else runs on the GPU")
