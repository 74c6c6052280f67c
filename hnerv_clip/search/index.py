"""An index over the patches of many videos, kept in a folder and searched in milliseconds.

The vectors are held by faiss, an optional dependency (`pip install "hnerv-clip[index]"`). Up to
`EXACT` patches the search is exact; beyond, vectors are grouped into cells and stored in a byte per
value, and a search looks into the nearest cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hnerv_clip.config import Config, TeacherConfig
from hnerv_clip.files import (
    RunError,
    check_keys,
    explain,
    read_json,
    remove_stale,
    write_atomic,
    write_json,
)
from hnerv_clip.metrics import check_embeddings
from hnerv_clip.paths import resolve_path, tell_apart
from hnerv_clip.search.cache import frame_times_s
from hnerv_clip.search.rank import check_query

if TYPE_CHECKING:
    from hnerv_clip.inference import Run

EXACT = 100_000  # patches up to which every vector is compared
PROBED = 8  # beyond, one cell of so many is looked into: texts lie far from all patches
FORMAT = 2  # 1 had no checksums
TEACHER_SETTINGS = ("teacher", "clip_model", "clip_pretrained", "teacher_precision", "clip_dim")


@dataclass
class PatchIndex:
    """Patches of videos, in the order in which they were given.

    faiss_index: the vectors. videos: name, frames, patches of each, and from `index_runs` how its
    network was trained. dim: values a vector. teacher: name of the teacher whose space this is.
    settings: that teacher's settings, where runs were indexed. label: its name for captions.
    times_s: when each frame of a video is shown, likewise.
    boxes: top, left, height, width of the boxes [P][4] of each video with a field.
    """

    faiss_index: object
    videos: pd.DataFrame
    dim: int
    teacher: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    times_s: dict[str, list[float]] = field(default_factory=dict)
    boxes: dict[str, list[list[float]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.faiss_index.ntotal

    def search(self, query: npt.ArrayLike, top_k: int = 20, *, apart: int = 0) -> pd.DataFrame:
        """The patches nearest to a query: rank, video, frame, patch, score (cosine).

        Where a video has a field: top, left, height, width too; empty for the others.

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
            kept = found[np.array(_apart(found, apart, self.boxes), bool)]
            if len(kept) >= top_k or len(found) < asked:
                kept = kept.head(top_k).reset_index(drop=True)
                kept.insert(0, "rank", np.arange(1, len(kept) + 1))
                if self.boxes:
                    kept[["top", "left", "height", "width"]] = [
                        self.boxes[hit.video][hit.patch] if hit.video in self.boxes else
                        [np.nan] * 4 for hit in kept.itertuples()]
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

    def embeddings(self, found: pd.DataFrame) -> np.ndarray:
        """The vectors of a table of `search`, float32 [K, D]; to a byte per value beyond `EXACT`.
        """
        counts = (self.videos.frames * self.videos.patches).to_numpy()
        first = dict(zip(self.videos.video, counts.cumsum() - counts))
        patches = self.videos.set_index("video").patches
        if hasattr(self.faiss_index, "make_direct_map"):  # of cells, where each vector lies
            self.faiss_index.make_direct_map()
        return np.stack([self.faiss_index.reconstruct(int(
            first[hit.video] + hit.frame * patches[hit.video] + hit.patch))
            for hit in found.itertuples()])

    def times_of(self, found: pd.DataFrame) -> list[float]:
        """When the frames of a table of `search` are shown, in seconds."""
        fps = self.videos.set_index("video").get("fps", {})  # all that the first format knew
        return [self.times_s[hit.video][hit.frame] if hit.video in self.times_s else
                hit.frame / fps.get(hit.video, float("nan")) for hit in found.itertuples()]

    def teacher_config(self) -> TeacherConfig:
        """The teacher that encodes texts for this index.

        Raises:
            ValueError: the index was not made from runs, so it does not say.
        """
        if not self.settings:
            raise ValueError(f"the index names its teacher {self.teacher}, but not its settings; "
                             "build it from runs: hnerv-clip index FOLDER RUN ...")
        return Config.from_params(**self.settings).teacher

    def save(self, folder: str | Path) -> Path:
        """Write the index to a folder, so that a reader finds the old or the new one, whole.

        The vectors go to a file that is named by their SHA-256; videos.json, which names that file
        and ends with a checksum of its own, is written last; then the old vectors are removed.

        Raises:
            RunError: it can't be written; an index that stood there is intact.
        """
        folder = resolve_path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the index folder {explain(error)}") from error
        vectors = _faiss().serialize_index(self.faiss_index).tobytes()
        digest = hashlib.sha256(vectors).hexdigest()
        path = folder / f"vectors-{digest[:16]}.faiss"
        write_atomic(path, lambda file: file.write(vectors))
        about = {"format": FORMAT, "dim": self.dim, "teacher": self.teacher, "label": self.label,
                 "settings": self.settings, "times_s": self.times_s, "boxes": self.boxes,
                 "vectors": path.name, "sha256": digest,
                 "videos": self.videos.to_dict("records")}
        write_json(folder / "videos.json", {**about, "checksum": _checksum(about)})
        for old in (*folder.glob("vectors-*.faiss"), folder / "vectors.faiss"):
            if old != path:
                old.unlink(missing_ok=True)
        remove_stale(folder)
        return folder


def _checksum(about: dict[str, Any]) -> str:
    """SHA-256 of what videos.json says, but for the checksum itself."""
    said = {name: value for name, value in about.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def build_index(videos: dict, *, teacher: str, exact: bool | None = None) -> PatchIndex:
    """Index the embeddings of videos.

    Args:
        videos: {name: [T, P, D] unit vectors}; T and P may differ between videos.
        teacher: name of the teacher whose space this is; kept, so that a query of another teacher
            can be determined.
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


def _apart(found: pd.DataFrame, apart: int, boxes: dict[str, list[list[float]]]) -> list[bool]:
    """Which hits, best first, have no better one of their position within so many frames.

    Boxes of a field are of one position where they overlap by 0.3 (intersection over union).
    """
    from hnerv_clip.search.boxes import overlap

    kept, before = [], {}
    for hit in found.itertuples():
        own = boxes.get(hit.video)
        near = before.setdefault(hit.video if own else (hit.video, hit.patch), [])
        rivals = [patch for frame, patch in near if abs(hit.frame - frame) <= apart]
        if own and rivals:
            rivals = [patch for patch, shared in zip(rivals, overlap(
                own[hit.patch], [own[patch] for patch in rivals])) if shared > 0.3]
        kept.append(apart < 1 or not rivals)
        if kept[-1]:
            near.append((hit.frame, hit.patch))
    return kept


def index_runs(runs: Iterable[Run]) -> PatchIndex:
    """Index what several runs predict, each named by its video, with its folder if shared.

    Of a run with a field, square boxes of several sizes; of another, its patches.

    The embeddings are the prediction's (`evaluate.sources_of(…)[-1]`), so a hybrid network does not
    see the held-out frames. `videos` also says how each network was trained: run, source, epochs,
    modelsize, height, width, fps.

    Raises:
        ValueError: no run, runs of different teachers, or the same folder twice.
        ConfigError: a run with neither the original head nor a field.
    """
    from hnerv_clip.field.query import has_field, load_field
    from hnerv_clip.inference import predict_embeddings, sources_of
    from hnerv_clip.search.boxes import square_boxes

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
    videos, boxes = {}, {}
    for name, run, source in zip(names, runs, sources):
        if has_field(run.run_dir.path):
            at = square_boxes(run.model.frame_hw, step=0.5)
            videos[name] = load_field(run, source=source).embed(
                np.arange(run.model.frame_count), at)
            boxes[name] = at.tolist()
        else:
            videos[name] = predict_embeddings(run.model, run.dataset, source=source)
    built = build_index(videos, teacher=runs[0].dataset.teacher_name if runs else "")
    sizes = [run.dataset.video.frame_hw for run in runs]
    built.videos = built.videos.assign(
        run=folders, source=sources, epochs=[run.config.train.epochs for run in runs],
        modelsize=[run.config.model.modelsize for run in runs],
        height=[height for height, _ in sizes], width=[width for _, width in sizes],
        fps=[run.dataset.video.fps for run in runs])
    params = runs[0].config.params()
    built.settings = {name: params[name] for name in TEACHER_SETTINGS}
    built.label, built.boxes = runs[0].dataset.teacher_label, boxes
    built.times_s = {name: frame_times_s(run.dataset.video).tolist()
                     for name, run in zip(names, runs)}
    return built


def load_index(folder: str | Path, *, teacher: str | None = None) -> PatchIndex:
    """Read an index that `PatchIndex.save` wrote.

    Args:
        teacher: name of the teacher that will encode queries; None does not compare.
    Raises:
        FileNotFoundError: there is none.
        RunError: damaged, or of an unknown format.
        ValueError: of another teacher.
    """
    folder = resolve_path(folder)
    about = _read_about(folder)
    data = _read_vectors(folder, about)
    videos = pd.DataFrame(about["videos"])
    try:
        index = _faiss().deserialize_index(np.frombuffer(data, np.uint8))
        count = int((videos.frames * videos.patches).sum())
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise _damaged(folder, " ".join(str(error).split())[:200]) from error
    if index.d != about["dim"] or index.ntotal != count:
        raise _damaged(folder, f"{index.ntotal} vectors of {index.d} values, where {count} of "
                               f"{about['dim']} are listed")
    if teacher not in (None, about["teacher"]):
        raise ValueError(f"the index in {folder} is of the teacher {about['teacher']}, but queries "
                         f"are encoded by {teacher}: load that teacher, or build it again")
    return PatchIndex(index, videos, about["dim"], about["teacher"], about.get("settings", {}),
                      about.get("label", about["teacher"]), about.get("times_s", {}),
                      about.get("boxes", {}))


def _read_about(folder: Path) -> dict[str, Any]:
    """What videos.json says, checked."""
    path, fix = folder / "videos.json", "build the index again: hnerv-clip index FOLDER RUN ..."
    try:
        about = read_json(path, keys={"format": int, "dim": int, "teacher": str, "videos": list},
                          fix=fix)
    except FileNotFoundError:
        raise FileNotFoundError(f"no index in {folder}: {path.name} is missing; "
                                "build and save one first") from None
    if about["format"] not in (1, FORMAT):
        raise RunError(f"the index in {folder} is of format {about['format']}, not {FORMAT}; {fix}")
    if about["format"] == FORMAT:
        check_keys(about, {"vectors": str, "sha256": str, "checksum": str}, path, fix=fix)
        if about["checksum"] != _checksum(about):
            raise _damaged(folder, f"{path.name} does not match its checksum")
    return about


def _read_vectors(folder: Path, about: dict[str, Any]) -> bytes:
    """The content of the vectors' file, checked."""
    path = folder / Path(about.get("vectors", "vectors.faiss")).name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no index in {folder}: {path.name} is missing; "
                                "build and save one first") from None
    if about["format"] == FORMAT and hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise _damaged(folder, f"{path.name} does not match its checksum")
    return data


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(f"the index in {folder} is damaged: {why}; build it again: "
                    "hnerv-clip index FOLDER RUN ...")


def _faiss():
    try:
        import faiss
    except ImportError:
        raise ImportError("an index over many videos needs faiss: "
                          "pip install \"hnerv-clip[index]\" (or faiss-cpu)") from None
    return faiss
