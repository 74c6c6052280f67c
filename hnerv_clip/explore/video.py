"""What can be explored: a run's folder, or a stored video, in one form.

Boxes are (x0, y0, x1, y1) in pixels of the picture, x to the right and y down. H, W height and
width of the picture, T frames, P patches, D embedding size, N names that a text is compared with.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hnerv_clip.config import Config, ConfigError, VideoConfig
from hnerv_clip.explore import SIDE
from hnerv_clip.field.query import Field, has_field, load_field, missing_field_fix
from hnerv_clip.metrics import psnr
from hnerv_clip.patches import PatchGrid, make_grid
from hnerv_clip.paths import resolve_path
from hnerv_clip.readers import VIDEO_SUFFIXES
from hnerv_clip.runs.provenance import commit_words
from hnerv_clip.runs.run_dir import VIDEO, RunDir
from hnerv_clip.search.boxes import around_positions, search_boxes
from hnerv_clip.search.maps import spread_scores
from hnerv_clip.search.rank import match_scores, rank_patches, similar_patches
from hnerv_clip.stored.checks import box_corners
from hnerv_clip.teachers.base import Teacher, describe_teacher
from hnerv_clip.teachers.text import encode_queries, reference_vectors
from hnerv_clip.video import CREDITS, find_source, has_source, load_video

if TYPE_CHECKING:
    import pandas as pd  # imported where a table is made: it takes a quarter of a second

STEP = 0.4  # between boxes that a field's search looks at, in their own side
HEAT_SIDES = (0.42, 0.6, 0.85)  # of the squares that a text's heat map is the mean over
CELLS, TEACHER_CELLS = 20, 5  # of a heat map, from top to bottom; the teacher sees each square
SAME_SHAPE = 1.03  # ratio of two aspect ratios up to which they are taken for one


class Once:
    """A function without arguments that is called once, also where threads ask at the same time."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._lock, self.done = make, threading.RLock(), False

    def __call__(self) -> Any:
        with self._lock:
            if not self.done:
                self._value, self.done = self._make(), True
            return self._value


@dataclass
class Loaded:
    """What takes a second or more: all frames, and what the network says of them.

    head: a fitted field, which answers for any box; or patch embeddings, float32 [T, P, D], of the
    original head; None where there is neither. warning: why the original may be another video.
    """

    decode: Callable[[int], np.ndarray]  # a frame's number to uint8 [H, W, 3]
    originals: Tensor | None  # uint8 [T, 3, H, W]
    head: Field | np.ndarray | None
    taught: np.ndarray | None = None  # the teacher's own patch embeddings, [T, P, D]
    warning: str = ""


@dataclass
class ExploredVideo:
    """A video with its network's answers; what takes long is loaded when it is first asked for.

    silent: what to do where there is no head. first: what gives the original, where there is one,
    and the decoded frame 0, uint8 [H, W, 3], before all is loaded; None where that needs it all.
    """

    name: str
    size: tuple[int, int]  # (H, W)
    times_s: np.ndarray  # [T]
    grid: PatchGrid
    teacher_label: str  # for captions
    load: Callable[[], Loaded]
    load_teacher: Callable[[], Teacher]
    has_original: bool
    has_head: bool
    has_field: bool  # whether any box can be searched; otherwise only the patches can
    has_taught: bool = False  # whether the teacher's own embeddings are here, as far as is known
    silent: str = ""
    credit: str = ""
    about: str = ""  # how it was fitted, for captions
    first: tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]] | None = None

    def __post_init__(self) -> None:
        self.load, self.load_teacher = Once(self.load), Once(self.load_teacher)

    def __len__(self) -> int:
        return len(self.times_s)

    def with_head(self, head: Field | np.ndarray) -> ExploredVideo:
        """The same video, of which another head answers; see `Loaded`."""
        return dataclasses.replace(
            self, load=lambda: dataclasses.replace(self.load(), head=head), has_head=True,
            has_field=isinstance(head, Field))

    @property
    def loaded(self) -> Loaded:
        """All of it."""
        return self.load()

    @property
    def originals(self) -> Tensor | None:
        """uint8 [T, 3, H, W], or None where there is no original."""
        return self.loaded.originals

    @property
    def head(self) -> Field | np.ndarray | None:
        """See `Loaded`."""
        return self.loaded.head

    @property
    def taught(self) -> np.ndarray | None:
        """The teacher's own patch embeddings, [T, P, D]."""
        return self.loaded.taught

    @cached_property
    def _first_original(self) -> np.ndarray:
        return self.first[0]()

    @cached_property
    def _first_decoded(self) -> np.ndarray:
        return self.first[1]()

    def _is_early(self, frame: int) -> bool:
        return frame == 0 and self.first is not None and not self.load.done

    def decode(self, frame: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return self._first_decoded if self._is_early(frame) else self.loaded.decode(frame)

    def original(self, frame: int) -> np.ndarray | None:
        """uint8 [H, W, 3], or None where there is no original."""
        if not self.has_original:
            return None
        if self._is_early(frame):
            return self._first_original
        return self.originals[frame].permute(1, 2, 0).numpy()

    @property
    def teacher(self) -> Teacher:
        """For texts."""
        return self.load_teacher()

    @cached_property
    def names(self) -> np.ndarray:
        """float32 [N, D]: what a text is compared with, see `match_scores`."""
        return reference_vectors(self.teacher)

    @cached_property
    def patches(self) -> np.ndarray:
        """float32 [T, P, D]: what the network says of the patches."""
        head = self.need_head()
        return head.embed(np.arange(len(self)), self.grid.boxes).numpy() if self.has_field else head

    def need_head(self) -> Field | np.ndarray:
        """The head.

        Raises:
            ConfigError: there is none; the message says how to get one.
        """
        if not self.has_head:
            raise ConfigError(self.silent)
        return self.head

    def encode(self, text: str) -> np.ndarray:
        """A text in the teacher's space: float32 [D], unit length.

        Raises:
            ConfigError: there is no head, the teacher does not know the text, or its weights are
                not on this machine.
            ValueError: an empty text.
        """
        self.need_head()
        return encode_queries([text], self.teacher)[0]

    def search(self, query: np.ndarray, top_k: int = 6, *, apart: int = 4) -> pd.DataFrame:
        """What answers a query best: frame, x0, y0, x1, y1, score (cosine), best first.

        Args:
            query: [D].
            apart: frames between two hits of one place.
        """
        if self.has_field:
            return _with_corners(search_boxes(self.head, query, top_k, apart=apart, step=STEP))
        ranking = rank_patches(query, self.need_head(), top_k, apart=apart)
        return ranking.assign(**self._corners(ranking.patch))

    def similar(self, frame: int, box: Sequence[float], top_k: int = 6, *, apart: int = 4
                ) -> pd.DataFrame:
        """What is like a box, as `search` gives it; the box itself and its moment are left out."""
        if self.has_field:
            found = search_boxes(self.head, self.embed(frame, box), top_k, apart=apart, step=STEP,
                                 not_near=(frame, _top_left(box)))
            return _with_corners(found)
        ranking = similar_patches(frame, self._patch_at(box), self.need_head(), top_k, apart=apart)
        return ranking.assign(**self._corners(ranking.patch))

    def region(self, x: float, y: float, *, side: float = SIDE) -> tuple[float, ...]:
        """The box that is asked about where a position is clicked.

        With a field a square around it, shifted into the frame; else the patch whose center is
        nearest.

        Args:
            x, y: pixels.
            side: of the square, in frame heights.
        """
        height, width = self.size
        if not self.has_field:
            top, left, tall, wide = self.grid.boxes[self._nearest(x, y)].tolist()
            return left, top, left + wide, top + tall
        tall, wide = min(side * height, height), min(side * height, width)
        left = min(max(x - wide / 2, 0), width - wide)
        top = min(max(y - tall / 2, 0), height - tall)
        return left, top, left + wide, top + tall

    def embed(self, frame: int, box: Sequence[float]) -> np.ndarray:
        """What the network says of a box: float32 [D]."""
        if self.has_field:
            return self.head.embed(frame, _top_left(box)).numpy()
        return self.need_head()[frame, self._patch_at(box)]

    def matches(self, query: np.ndarray, found: pd.DataFrame) -> np.ndarray:
        """How far each hit answers a text rather than other names, see `match_scores`: [K]."""
        vectors = [self.embed(int(hit.frame), (hit.x0, hit.y0, hit.x1, hit.y1))
                   for hit in found.itertuples()]
        return match_scores(query, self.names, np.array(vectors))

    def heat(self, query: np.ndarray, frame: int, *, references: np.ndarray | None = None,
             by_teacher: bool = False, side: float | None = None) -> np.ndarray:
        """Match of a query all over a frame: float32 [h, w].

        Args:
            query: [D].
            references: [N, D] that it is compared with; the teacher's names by default.
            by_teacher: by the teacher's own embeddings of the patches, interpolated.
            side: of the squares that a field is asked about, in frame heights; None is the mean
                over `HEAT_SIDES`. The original head is asked about its patches, interpolated.
        Raises:
            ConfigError: no head, or no embeddings of the teacher.
        """
        references = self.names if references is None else references
        stride = max(1, round(self.size[0] / CELLS))
        if by_teacher or not self.has_field:
            known = self.taught if by_teacher else self.need_head()
            if known is None:
                raise ConfigError("the teacher's own embeddings are not here: open the run's "
                                  "folder, with the cache_dir that it was trained with")
            scores = match_scores(query, references, known[frame])[None]
            return spread_scores(scores, self.grid, stride=stride)[0]
        return self._mean_over_squares(
            HEAT_SIDES if side is None else [side], stride, lambda boxes: match_scores(
                query, references, self.head.embed(frame, boxes).numpy()))

    def teacher_heat(self, query: np.ndarray, frame: int) -> np.ndarray:
        """What the teacher gives at the squares of `heat`, run on the original frame: [h, w].

        Seconds, as it sees every square; so `TEACHER_CELLS` of them.
        """
        from hnerv_clip.teachers.boxes import embed_boxes

        def score(boxes: np.ndarray) -> np.ndarray:
            whole = torch.from_numpy(boxes).round().long()[None]
            seen = embed_boxes(self.teacher, self.originals[frame:frame + 1], whole)[0]
            return match_scores(query, self.names, seen.float().cpu().numpy())

        return self._mean_over_squares(HEAT_SIDES, max(1, round(self.size[0] / TEACHER_CELLS)),
                                       score)

    def _mean_over_squares(self, sides, stride, score):
        """[h, w] means over the squares around each position, of the scores [P] of squares [P, 4].

        Squares near the edge, which are shifted into the frame, coincide: each is asked once."""
        boxes, hw = around_positions(self.size, sides, stride=stride)
        distinct, places = np.unique(boxes, axis=0, return_inverse=True)
        return score(distinct)[places].reshape(len(sides), *hw).mean(axis=0)

    def _nearest(self, x, y):
        centres = self.grid.centres
        return int((centres - torch.tensor([float(y), float(x)])).square().sum(1).argmin())

    def _patch_at(self, box):
        x0, y0, x1, y1 = box_corners(box)
        return self._nearest((x0 + x1) / 2, (y0 + y1) / 2)

    def _corners(self, patch):
        top, left, height, width = self.grid.boxes.numpy()[np.asarray(patch)].T
        return {"x0": left, "y0": top, "x1": left + width, "y1": top + height}


def open_video(path: str | Path, *, original: str = "", cache_dir: str | Path = "output/cache",
               device: str = "auto") -> ExploredVideo:
    """A run's folder, or a stored video, to explore. Its frames and its head are loaded later.

    Args:
        path: folder of a run, or NAME.hnerv.
        original: the video that a stored video was made from, a file or a name such as bunny; a
            run knows its own, or is told here where it lies now. A stored video does not say how it
            was cropped, so one of another shape is not refused, see `shape_warning`.
        cache_dir: of a run, the teacher's embeddings.
    Raises:
        RunError: no run there. FileError: no such file, another one, or a damaged one.
        ConfigError: no such original. Once it is loaded: an original of other times than the
            file's, or of a run another video, or no embeddings of the teacher.
    """
    file = resolve_path(path)
    if file.is_file() or file.suffix.lower() in {".hnerv", *VIDEO_SUFFIXES}:
        return _from_file(file, original, device)
    return _from_run(path, original, cache_dir, device)


def _from_file(path: Path, original: str, device: str) -> ExploredVideo:
    from hnerv_clip import open as open_stored

    video = open_stored(path, device=device)
    credit = CREDITS.get(find_source(original)[1], "") if original else ""

    def load():
        head = None
        if video.has_head:
            head = video.field if video.has_field else video.patch_embeddings
        originals = load_original(original, video.size, video.times_s)[0] if original else None
        return Loaded(video.__getitem__, originals, head,
                      warning=shape_warning(original, video.size) if original else "")

    def first_original():
        frames = load_video(_like(original, video.size, frame_limit=1)).frames
        return frames[0].permute(1, 2, 0).numpy()

    at_0 = video.times_s[0] == 0  # else the original's first frame is another
    return ExploredVideo(
        name=video.name, size=video.size, times_s=video.times_s, grid=video.grid, load=load,
        first=(first_original, lambda: video[0]) if at_0 else None,
        has_original=bool(original), has_head=video.has_head, has_field=video.has_field,
        teacher_label=video.header.meta["teacher"]["label"], load_teacher=video.teacher,
        credit=credit, about=f"From a file of {video.header.size_bytes:,} bytes alone.", silent=(
            f"{path.name} holds no head for embeddings, so it is not searched: encode the video "
            "again with predict_clip=True or head=field"))


def _from_run(path: str | Path, data_path: str, cache_dir: str | Path, device: str
              ) -> ExploredVideo:
    from hnerv_clip.inference import decode_first, decode_frames, load_run, predict_embeddings
    from hnerv_clip.search.cache import frame_times_s
    from hnerv_clip.teachers import load_teacher

    run_dir = RunDir(path)
    config = run_dir.config()
    config = config.replace(data_path=data_path) if data_path else config

    load_whole = Once(lambda: load_run(path, cache_dir=cache_dir, device=device,
                                       data_path=data_path))

    def load():
        run, head = load_whole(), None
        if has_field(run_dir):
            head = load_field(run)
        elif config.model.predict_clip:
            head = predict_embeddings(run.model, run.dataset).numpy()
        video.times_s = frame_times_s(run.dataset.video)  # a file's are rounded
        taught = run.dataset.embeddings
        video.has_taught = taught is not None
        return Loaded(
            lambda i: decode_frames(run.model, run.dataset, [i])[0].permute(1, 2, 0).numpy(),
            run.dataset.video.frames, head, None if taught is None else taught.numpy())

    def first_decoded():
        return decode_first(run_dir, config, frame, frame_count=len(times_s), device=device
                            ).permute(1, 2, 0).numpy()

    times_s = _stored_times(run_dir)
    early = times_s is not None and has_source(config.video.data_path)
    if early:
        frame = load_video(dataclasses.replace(config.video, frame_limit=1))
    else:  # an unfinished run; or one without its video, of which this says what to do
        frame = load_whole().dataset.video
        times_s = frame_times_s(frame)
    video = ExploredVideo(
        name=frame.name, size=frame.frame_hw, times_s=times_s, load=load,
        first=(lambda: frame.frames[0].permute(1, 2, 0).numpy(), first_decoded) if early else None,
        grid=make_grid(config.teacher, frame.frame_hw),
        has_original=True, has_head=config.model.predict_clip or has_field(run_dir),
        has_field=has_field(run_dir), has_taught=config.model.predict_clip,
        teacher_label=describe_teacher(config.teacher).label,
        load_teacher=lambda: load_teacher(config.teacher, device), credit=frame.credit,
        about=_about(run_dir), silent=(
            f"the run in {run_dir.path.name} has no head for embeddings, so it is not searched:"
            f" {missing_field_fix(run_dir)}, or train with predict_clip=True"))
    return video


def _stored_times(run_dir: RunDir) -> np.ndarray | None:
    """When each frame of a run is shown, from its own stored video: [T]; None without one."""
    from hnerv_clip.codec.container import FileError, read_header

    with suppress(FileError, OSError):
        if run_dir.holds_video():  # another video's file would give another number of frames
            return np.array(read_header(run_dir.path / VIDEO).times())
    return None


def _about(run: RunDir) -> str:
    """How a run was fitted: reduced or not, epochs, seed, device, commit."""
    config, facts = run.config(), run.provenance()
    video = config.video
    less = [f"one frame in {video.frame_stride}"] * (video.frame_stride > 1)
    if video.resize_list:
        less.append("resized to {}×{}".format(*video.resize_list))
    reduced = f"Reduced setting: {', '.join(less)}. " if less else ""
    return (f"{reduced}{config.train.epochs} epochs, seed {facts['seed']}, {facts['device']}, "
            f"commit {commit_words(facts)}.")


def load_original(data_path: str, size: tuple[int, int], times_s: np.ndarray
                  ) -> tuple[Tensor, str]:
    """The frames that a stored video was made from, and whose they are.

    They are cut about the center to the file's shape and resized to its size; of each of its times
    the nearest frame is taken.

    Args:
        size: (H, W) of the stored video.
        times_s: [T], its times.
    Returns:
        uint8 [T, 3, H, W], and a credit or "".
    Raises:
        ConfigError: no such video, or one that ends long before the file does.
    """
    video = load_video(_like(data_path, size))
    known = np.asarray(video.times_s)
    nearest = np.abs(known[None] - np.asarray(times_s)[:, None]).argmin(axis=1)
    if len(times_s) > 1 and times_s[-1] - known[-1] > 2 * np.median(np.diff(times_s)):
        raise ConfigError(f"the original {data_path!r} ends at {known[-1]:.2f} s, the stored video "
                          f"at {times_s[-1]:.2f} s: give the video that it was made from")
    return video.frames[nearest], video.credit


def shape_warning(data_path: str, size: tuple[int, int]) -> str:
    """What to say of an original that `load_original` cuts, though `encode` would not; else "".

    `encode` keeps whole frames, but for bunny, unless it is told a crop_list, which its file does
    not hold: such an original may be right. Another size of the same shape always is.

    Args:
        size: (H, W) of the stored video.
    """
    whole = load_video(VideoConfig(data_path=data_path, frame_limit=1)).frame_hw
    usual = Config.from_params(data_path=data_path).video.crop_list or whole
    aspect = size[1] / size[0]
    if any(max(w / h / aspect, aspect / (w / h)) <= SAME_SHAPE for h, w in (whole, usual)):
        return ""
    return (f"the original {data_path!r} has frames of {whole[0]}×{whole[1]}, another shape than "
            f"the stored video's {size[0]}×{size[1]}: its center is compared, which is right only "
            "where the video was encoded with such a crop_list; else give original= the video that "
            "it was made from")


def picture_psnr(decoded: np.ndarray, original: np.ndarray) -> float:
    """PSNR of uint8 [H, W, 3], in dB."""
    pair = (torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float() / 255
            for picture in (decoded, original))
    return float(psnr(*pair)[0])


def _like(data_path: str, size: tuple[int, int], *, frame_limit: int = 0) -> VideoConfig:
    """How a video is read that becomes of a size (H, W), cut about the center to its shape."""
    height, width = load_video(VideoConfig(data_path=data_path, frame_limit=1)).frame_hw
    scale = min(height / size[0], width / size[1])
    crop = (round(size[0] * scale), round(size[1] * scale))
    return VideoConfig(data_path=data_path, frame_limit=frame_limit,
                       resize_list=size if crop != size else None,
                       crop_list=crop if crop != (height, width) else None)


def _top_left(box):
    x0, y0, x1, y1 = box_corners(box)
    return y0, x0, y1 - y0, x1 - x0


def _with_corners(found: pd.DataFrame) -> pd.DataFrame:
    return found.assign(frame=found.frame.astype(int), x0=found.left, y0=found.top,
                        x1=found.left + found.width, y1=found.top + found.height)
