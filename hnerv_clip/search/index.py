"""An index over the patches of many videos, kept in a folder and searched in milliseconds.

The vectors are held by faiss, an optional dependency (`pip install "hnerv-clip[index]"`). Up to
`EXACT` patches the search is exact; beyond, vectors are grouped into cells and stored in a byte per
value, and a search looks into the nearest cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hnerv_clip.config import Config, TeacherConfig
from hnerv_clip.inference import Run, predict_embeddings, sources_of
from hnerv_clip.metrics import check_embeddings
from hnerv_clip.paths import resolve_path, tell_apart
from hnerv_clip.search.rank import check_query

EXACT = 100_000  # patches up to which every vector is compared
PROBED = 8  # beyond, one cell of so many is looked into: texts lie far from all patches
FORMAT = 1
TEACHER_SETTINGS = ("teacher", "clip_model", "clip_pretrained", "teacher_precision", "clip_dim")


@dataclass
class PatchIndex:
    """Patches of videos, in the order in which they were given.

    faiss_index: the vectors. videos: name, frames, patches of each, and from `index_runs` how its
    network was trained. dim: values a vector. teacher: name of the teacher whose space this is.
    settings: that teacher's settings, where runs were indexed.
    """

    faiss_index: object
    videos: pd.DataFrame
    dim: int
    teacher: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.faiss_index.ntotal

    def search(self, query, top_k: int = 20, *, apart: int = 0) -> pd.DataFrame:
        """The patches nearest to a query: rank, video, frame, patch, score (cosine).

        Args:
            query: [D].
            top_k: so many at most.
            apart: as in `search.rank_patches`.
        Raises:
            ValueError: a bad query, one of another teacher's size, or top_k < 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        query, asked = check_query(query, self.dim), top_k
        while True:
            found = self._nearest(query, asked)
            kept = found[np.array(_apart(found, apart), bool)]
            if len(kept) >= top_k or len(found) < asked:
                kept = kept.head(top_k).reset_index(drop=True)
                kept.insert(0, "rank", np.arange(1, len(kept) + 1))
                return kept
            asked *= 4

    def _nearest(self, query: np.ndarray, count: int) -> pd.DataFrame:
        scores, found = self.faiss_index.search(query[None], min(count, len(self)))
        scores, found = scores[0][found[0] >= 0], found[0][found[0] >= 0]
        ends = (self.videos.frames * self.videos.patches).cumsum().to_numpy()
        video = np.searchsorted(ends, found, side="right")
        inside = found - np.concatenate([[0], ends])[video]
        patches = self.videos.patches.to_numpy()[video]
        return pd.DataFrame({"video": self.videos.video.to_numpy()[video],
                             "frame": inside // patches, "patch": inside % patches,
                             "score": scores})

    def teacher_config(self) -> TeacherConfig:
        """The teacher that encodes texts for this index.

        Raises:
            ValueError: the index was not made from runs, so it does not say.
        """
        if not self.settings:
            raise ValueError(f"the index names its teacher {self.teacher}, but not its settings; "
                             "build it from runs: hnerv-clip index FOLDER RUN ...")
        return Config.from_params(**self.settings).teacher

    def save(self, folder) -> Path:
        """Write the index to a folder: vectors.faiss and videos.json."""
        folder = resolve_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _faiss().write_index(self.faiss_index, str(folder / "vectors.faiss"))
        about = {"format": FORMAT, "dim": self.dim, "teacher": self.teacher,
                 "settings": self.settings, "videos": self.videos.to_dict("records")}
        (folder / "videos.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return folder


def build_index(videos: dict, *, teacher: str, exact: bool | None = None) -> PatchIndex:
    """Index the embeddings of videos.

    Args:
        videos: {name: [T, P, D] unit vectors}; T and P may differ between videos.
        teacher: name of the teacher whose space this is; kept, so that a query of another teacher
            can be told.
        exact: compare every vector; None decides by their number.
    Raises:
        ValueError: no video, a bad one, or videos of different D.
        ImportError: faiss is not installed.
    """
    if not videos:
        raise ValueError("no videos to index; give {name: embeddings}")
    faiss, rows = _faiss(), []
    arrays = {name: check_embeddings(embeddings, str(name)) for name, embeddings in videos.items()}
    dims = {name: array.shape[-1] for name, array in arrays.items()}
    if len(set(dims.values())) > 1:
        raise ValueError(f"embeddings of different sizes, so of different teachers: {dims}; "
                         "index each teacher's videos apart")
    for name, array in arrays.items():
        rows.append({"video": str(name), "frames": array.shape[0], "patches": array.shape[1]})
    dim, count = next(iter(dims.values())), sum(row["frames"] * row["patches"] for row in rows)
    exact = count <= EXACT if exact is None else exact
    if exact:
        index = faiss.IndexFlatIP(dim)
    else:
        cells = max(1, int(4 * count ** 0.5))
        index = faiss.index_factory(dim, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(arrays.values(), 40 * cells))
        index.nprobe = max(1, cells // PROBED)
    for array in arrays.values():
        index.add(np.ascontiguousarray(array.reshape(-1, dim)))
    return PatchIndex(index, pd.DataFrame(rows), dim, teacher)


def _sample(arrays: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Some of all patches: at most [count, D]."""
    flat = [array.reshape(-1, array.shape[-1]) for array in arrays]
    ends = np.cumsum([len(rows) for rows in flat])
    chosen = np.sort(np.random.default_rng(0).permutation(ends[-1])[:count])
    return np.concatenate([rows[own - end + len(rows)] for rows, end, own in zip(
        flat, ends, np.split(chosen, np.searchsorted(chosen, ends[:-1])))])


def _apart(found: pd.DataFrame, apart: int) -> list[bool]:
    """Which hits, best first, have no better one of their position within so many frames."""
    kept, frames = [], {}
    for hit in found.itertuples():
        near = frames.setdefault((hit.video, hit.patch), [])
        kept.append(apart < 1 or all(abs(hit.frame - frame) > apart for frame in near))
        if kept[-1]:
            near.append(hit.frame)
    return kept


def index_runs(runs: Iterable[Run]) -> PatchIndex:
    """Index what several runs predict, each named by its video, with its folder if shared.

    The embeddings are the prediction's (`evaluate.sources_of(…)[-1]`), so a hybrid network does not
    see the held-out frames. `videos` also says how each network was trained: run, source, epochs,
    modelsize, height, width, fps.

    Raises:
        ValueError: no run, runs of different teachers, or the same folder twice.
        ConfigError: a run without the CLIP head.
    """
    runs = list(runs)
    folders = tell_apart(run.run_dir.path for run in runs)
    teachers = {folder: run.dataset.teacher_name for folder, run in zip(folders, runs)}
    if len(set(teachers.values())) > 1:
        raise ValueError(f"runs of different teachers cannot share an index: {teachers}; "
                         "index each teacher's runs apart")
    names = [run.dataset.video.name for run in runs]
    names = [name if names.count(name) == 1 else f"{name} ({folder})"
             for name, folder in zip(names, folders)]
    sources = [sources_of(run.model)[-1] for run in runs]
    videos = {name: predict_embeddings(run.model, run.dataset, source=source)
              for name, run, source in zip(names, runs, sources)}
    built = build_index(videos, teacher=runs[0].dataset.teacher_name if runs else "")
    sizes = [run.dataset.video.frame_hw for run in runs]
    built.videos = built.videos.assign(
        run=folders, source=sources, epochs=[run.config.train.epochs for run in runs],
        modelsize=[run.config.model.modelsize for run in runs],
        height=[height for height, _ in sizes], width=[width for _, width in sizes],
        fps=[run.dataset.video.fps for run in runs])
    params = runs[0].config.params()
    built.settings = {name: params[name] for name in TEACHER_SETTINGS}
    return built


def load_index(folder, *, teacher: str | None = None) -> PatchIndex:
    """Read an index that `PatchIndex.save` wrote.

    Args:
        teacher: name of the teacher that will encode queries; None does not compare.
    Raises:
        FileNotFoundError: there is none.
        ValueError: the two files do not belong together, are of another format, or of another
            teacher.
    """
    folder = resolve_path(folder)
    paths = [folder / "videos.json", folder / "vectors.faiss"]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no index in {folder}: {path.name} is missing; "
                                    "build and save one first")
    about = json.loads(paths[0].read_text(encoding="utf-8"))
    index, videos = _faiss().read_index(str(paths[1])), pd.DataFrame(about["videos"])
    count = int((videos.frames * videos.patches).sum())
    if about["format"] != FORMAT or index.d != about["dim"] or index.ntotal != count:
        raise ValueError(f"the index in {folder} is damaged: {index.ntotal} vectors of {index.d} "
                         f"values, where {count} of {about['dim']} are listed; build it again")
    if teacher not in (None, about["teacher"]):
        raise ValueError(f"the index in {folder} is of the teacher {about['teacher']}, but queries "
                         f"are encoded by {teacher}: load that teacher, or build it again")
    return PatchIndex(index, videos, about["dim"], about["teacher"], about.get("settings", {}))


def _faiss():
    try:
        import faiss
    except ImportError:
        raise ImportError("an index over many videos needs faiss: "
                          "pip install \"hnerv-clip[index]\" (or faiss-cpu)") from None
    return faiss
