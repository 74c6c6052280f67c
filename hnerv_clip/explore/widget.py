"""The explorer: a widget for JupyterLab, whose state this holds; `widget.js` draws it.

Everything is a trait: setting `frame`, `text` or `region` does what a hand does. A thread opens the
video and loads what searches need, so that the first frame is seen before the rest is there.
"""

from __future__ import annotations

import base64
import gc
import io
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import anywidget
import numpy as np
import traitlets as t
from PIL import Image

from hnerv_clip.explore import SIDE
from hnerv_clip.explore.kept import PICTURES, KeptFrame
from hnerv_clip.labels import match_words

if TYPE_CHECKING:  # these import torch: more than a second, which the thread waits for
    import pandas as pd

    from hnerv_clip.explore.video import ExploredVideo

GAIN = 5  # how much an error is enlarged
HITS = 6
THUMBNAIL = 120  # pixels, the longer side of a hit's picture
KEPT = 64  # decoded frames
REFERENCES = 400  # patches of the video that a region is compared with
STATE = ("facts", "shown", "quality", *PICTURES)  # with which the first frame is seen
EXPECTED = (ValueError, RuntimeError, OSError, ImportError)  # errors whose words say what to do
FOLDER = Path(__file__).parent
IMPORTING = threading.Lock()  # of the switches below, which are those of the whole process


def explore(path: str | Path, *, original: str = "", text: str = "",
            cache_dir: str | Path = "output/cache", device: str = "auto") -> Explorer:
    """Explore a run or a stored video in JupyterLab.

    The video is opened in the background; what goes wrong is shown in the explorer. In a cache
    folder that is there already the first frame is kept: it is seen at once the next time.

    Args:
        path: folder of a run, or NAME.hnerv.
        original: the video that a stored one was made from, to see the error; a file or a name. It
            is cut about the center to the stored shape, which is told where `encode` does not cut
            so by itself.
        text: searched as soon as everything is loaded.
        cache_dir: with the teacher's embeddings, of a run.
    """
    def open_it() -> ExploredVideo:
        _import_torch()
        from hnerv_clip.explore.video import open_video

        return open_video(path, original=original, cache_dir=cache_dir, device=device)

    return Explorer(open_it, text=text, kept=KeptFrame(path, cache_dir, original, device))


def _import_torch() -> None:
    """Import PyTorch for a process that somebody waits for, beside other jobs.

    Without collecting garbage, of which its import makes none. Its threads then wait for each other
    asleep, with the same results: spinning they took up to twice as long beside another job.
    """
    with IMPORTING:  # else the second of two explorers takes the first one's switches for given
        collects, policy = gc.isenabled(), os.environ.get("OMP_WAIT_POLICY")
        gc.disable()
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            import torch  # noqa: F401
        finally:
            if collects:
                gc.enable()
            if policy is None:  # for this process alone, not for those that it starts
                os.environ.pop("OMP_WAIT_POLICY", None)


class Explorer(anywidget.AnyWidget):
    """Scrub, compare, search by text or by clicking.

    Set by hand or in Python: `frame`, `view`, `heat_of`, `side`, `text`, `region`. The rest
    answers: `hits`, pictures as bytes, and `problem`, what went wrong with its fix, or "". While
    `progress` says what is loaded, what is set is answered later; `get_ready` waits for it.
    """

    _esm = FOLDER / "widget.js"
    _css = FOLDER / "widget.css"

    # asked
    frame = t.Int(0).tag(sync=True)
    view = t.Enum(["original", "decoded", "error", "wipe"], "decoded").tag(sync=True)
    heat_of = t.Enum(["off", "network", "teacher"], "network").tag(sync=True)
    side = t.Float(SIDE).tag(sync=True)  # of a clicked square, in frame heights
    text = t.Unicode("").tag(sync=True)
    region = t.Dict().tag(sync=True)  # frame, x, y in pixels of a click; {} for none
    # answered
    facts = t.Dict().tag(sync=True)
    shown = t.Int(-1).tag(sync=True)  # the frame that the pictures below show
    original = t.Bytes(b"").tag(sync=True)  # JPEG
    decoded = t.Bytes(b"").tag(sync=True)
    error = t.Bytes(b"").tag(sync=True)
    heat = t.Bytes(b"").tag(sync=True)  # PNG with opacity
    quality = t.Unicode("").tag(sync=True)
    hits = t.List(t.Dict()).tag(sync=True)  # frame, time_s, x0, y0, x1, y1, score, match, picture
    asked = t.Dict().tag(sync=True)  # the box that was clicked: frame, x0, y0, x1, y1
    answer = t.Unicode("").tag(sync=True)  # what was found, in words
    progress = t.Unicode("").tag(sync=True)  # what is being loaded; "" once everything is
    problem = t.Unicode("").tag(sync=True)

    def __init__(self, video: ExploredVideo | Callable[[], ExploredVideo], *, text: str = "",
                 kept: KeptFrame | None = None):
        """
        Args:
            video: to explore, or what opens it.
            text: searched as soon as everything is loaded.
            kept: where the first frame is kept for the next time.
        """
        super().__init__()
        self.video: ExploredVideo | None = None
        self._query: tuple[np.ndarray, np.ndarray | None] | None = None  # vector, references
        self._problems = {"search": "", "look": "", "original": ""}
        self._failed: Exception | None = None
        self._moving = False  # to the frame of a hit, or to the first view
        self._preparing = True  # what is asked meanwhile is answered at its end
        self._lock, self._done = threading.RLock(), threading.Event()  # one answer at a time
        self._thread = threading.Thread(target=self._prepare, name="explorer", args=(
            video if callable(video) else lambda: video, kept))
        for name, value in (kept.read() if kept else {}).items():
            self._know(value) if name == "facts" else setattr(self, name, value)
        self.text, self.progress = text, "Opening the video …"
        self._thread.start()

    def get_ready(self) -> ExploredVideo:
        """Wait until everything is loaded, and what was asked meanwhile is answered.

        Returns:
            The video.
        Raises:
            as `explore.video.open_video`.
        """
        # Not in Event.wait or Thread.join, whose locks an interrupt can leave taken; and in short
        # sleeps, as an interrupt just before one is seen at its end
        while not self._done.is_set():
            time.sleep(0.05)
        if self._failed is not None:
            raise self._failed
        return self.video

    def _prepare(self, open_it: Callable[[], ExploredVideo], kept: KeptFrame | None) -> None:
        """Load everything, then answer what was asked meanwhile. Of a thread nobody sees a
        traceback: errors are shown."""
        try:
            try:
                self._load(open_it, kept)
            except Exception as error:
                self._failed = error
                self._problems["look"] = _words(error)
                self._tell()
            with self._lock:
                self._preparing = False
                if self._failed is None:
                    self._try(self.show, "look")
                    self._on_region() if self.region else self._on_text()
                self.progress = ""
        finally:
            self._done.set()

    def _load(self, open_it: Callable[[], ExploredVideo], kept: KeptFrame | None) -> None:
        """Open the video, show its first frame, load the rest."""
        self.video = video = open_it()
        self._decoded = lru_cache(KEPT)(video.decode)
        self._know(self._facts())
        self._problems["search"] = "" if video.has_head else _sentence(video.silent)
        self._tell()
        if video.first is not None and not self.frame:
            # what was kept is replaced, not taken away first; else the original is seen at once
            with self.hold_sync() if self.decoded else nullcontext():
                self._try(lambda: self.show(anew=True), "look")
            if kept is not None and self.shown == 0 and self.decoded:  # not of a failed attempt
                kept.write({name: getattr(self, name) for name in STATE})
        self.progress = "Loading all frames, what the network says of them, and the teacher …"
        with ThreadPoolExecutor(1) as pool:  # frames are read while modules are imported
            rest = pool.submit(lambda: video.loaded)
            if video.has_head:
                import pandas  # noqa: F401, ICN001  what a search imports

                from hnerv_clip.figures import overlay  # noqa: F401

                with suppress(*EXPECTED):
                    _ = video.names  # else the search says why it cannot
            self._problems["original"] = _sentence(rest.result().warning)
        self._tell()
        self._know(self._facts())

    def _know(self, facts: dict) -> None:
        is_first = not self.facts
        self.facts = facts  # before any picture, which is drawn by them
        if is_first and facts["has_original"]:
            self._moving = True
            self.view = "wipe"
            self._moving = False

    def _facts(self) -> dict:
        from hnerv_clip.search.boxes import SIDES

        video, (height, width) = self.video, self.video.size
        return {
            "name": video.name, "frames": len(video), "height": height, "width": width,
            "times": [round(float(s), 3) for s in video.times_s], "credit": video.credit,
            "teacher": video.teacher_label, "has_original": video.has_original, "gain": GAIN,
            "has_teacher": video.has_taught, "has_head": video.has_head,
            "sides": list(SIDES) if video.has_field else []}

    # Pictures

    @t.observe("frame", "view", "heat_of")
    def _on_look(self, change=None) -> None:
        if not self._moving:
            self._try(self.show, "look")

    def show(self, *, anew: bool = False) -> None:
        """Make the pictures of `frame` that `view` needs, and are not there or wanted anew."""
        from hnerv_clip.explore.video import picture_psnr

        frame = min(max(self.frame, 0), len(self.video) - 1)
        original = self.video.original(frame)
        if self.view != "decoded" and original is None:
            self.view = "decoded"
            raise ValueError("there is no original beside a stored video alone: open it with "
                             'explore(path, original="VIDEO"), the video that it was made from')
        if anew or self.shown != frame:
            self.original = b"" if original is None else encode_jpeg(original)
            self.decoded = self.error = b""
            self.quality = ""
        if self.view != "original" and not self.decoded:
            picture = self._decoded(frame)
            self.decoded = encode_jpeg(picture)
            if original is not None:
                self.error = encode_jpeg(enlarged_error(original, picture))
                self.quality = f"PSNR {picture_psnr(picture, original):.1f} dB"
        self._show_heat(frame)
        self.shown = frame

    def _show_heat(self, frame):
        if self._query is None or self.heat_of == "off":
            self.heat = b""
            return
        from hnerv_clip.figures.overlay import REGION_RANGE, TEXT_RANGE, heat_image

        vector, references = self._query
        heat = self.video.heat(vector, frame, references=references,
                               side=None if references is None else self.side,
                               by_teacher=self.heat_of == "teacher")
        file = io.BytesIO()
        Image.fromarray(heat_image(heat, tuple(-(-side // 2) for side in self.video.size),
                                   span=TEXT_RANGE if references is None else REGION_RANGE)
                        ).save(file, "PNG", compress_level=1)
        self.heat = file.getvalue()

    # Searches

    @t.observe("text")
    def _on_text(self, change=None) -> None:
        if self.text.strip():
            self.region = {}
            self._try(self._search_text, "search")

    @t.observe("region", "side")
    def _on_region(self, change=None) -> None:
        if region := self.region:  # a text that is set meanwhile takes it away
            self._try(lambda: self._search_region(region), "search")

    def _search_text(self) -> None:
        text, started = self.text.strip(), time.perf_counter()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            vector = self.video.encode(text)
        found = self.video.search(vector, HITS)
        found["match"] = self.video.matches(vector, found)
        self._found(found, (vector, None), match_words(text, float(found.match.max())), started,
                    asked={})
        if told:
            self._problems["search"] = _sentence(str(told[-1].message))
            self._tell()

    def _search_region(self, region: dict) -> None:
        started = time.perf_counter()
        frame = int(region.get("frame", self.frame))
        box = self.video.region(float(region["x"]), float(region["y"]), side=self.side)
        vector = self.video.embed(frame, box)
        found = self.video.similar(frame, box, HITS)
        others = self.video.patches.reshape(-1, len(vector))
        references = others[::-(-len(others) // REFERENCES)]
        self._found(found, (vector, references), f"like the region of frame {frame}: best cosine "
                    f"{found.score.max():.2f}", started,
                    asked={"frame": frame, **dict(zip(("x0", "y0", "x1", "y1"), map(float, box)))})

    def _found(self, found: pd.DataFrame, query, words: str, started: float, asked: dict) -> None:
        """Boxes first, then the picture that they are on, then pictures of them."""
        self._query, self.asked = query, asked
        columns = [name for name in ("frame", "x0", "y0", "x1", "y1", "score", "match")
                   if name in found]
        rows = [{name: float(hit[name]) for name in columns} | {
            "frame": int(hit["frame"]), "time_s": float(self.video.times_s[int(hit["frame"])])}
            for hit in found[columns].to_dict("records")]
        with self.hold_trait_notifications():
            self.hits = rows
            self.answer = f"{words}. {len(rows)} hits in {time.perf_counter() - started:.2f} s."
        if rows and not asked:
            self._moving = True
            try:
                self.frame = rows[0]["frame"]
            finally:
                self._moving = False
        self.show()
        self.hits = [row | {"picture": self._thumbnail(row)} for row in rows]

    def _thumbnail(self, hit: dict) -> str:
        picture = self.video.original(hit["frame"])
        picture = self._decoded(hit["frame"]) if picture is None else picture
        box = [round(hit[corner]) for corner in ("x0", "y0", "x1", "y1")]
        image = Image.fromarray(picture).crop(box)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        data = encode_jpeg(np.asarray(image), quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(data).decode()

    def _try(self, act: Callable[[], None], what: str) -> None:
        """An error is shown, with its fix, in place of a traceback that nobody sees: of the thread
        any error, else those that are expected.

        What was found before a search that failed goes, so that it is not read as its answer.
        """
        asked = threading.current_thread() is not self._thread
        told = EXPECTED if asked else Exception
        with self._lock:
            if self.video is None or asked and self._preparing:
                return  # the thread says why, or answers what is asked now
            self._problems[what] = ""
            try:
                act()
            except told as error:
                self._problems[what] = _words(error)
                if what == "search":
                    self._query, self.asked, self.hits, self.answer = None, {}, [], ""
                    self.heat = b""
            except KeyboardInterrupt:
                self._problems[what] = "Interrupted: ask again."
                raise
            finally:
                self._tell()

    def _tell(self) -> None:
        self.problem = " ".join(filter(None, self._problems.values()))


def encode_jpeg(picture: np.ndarray, *, quality: int = 90) -> bytes:
    """uint8 [H, W, 3] as JPEG, with colors at full resolution."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "JPEG", quality=quality,
                                                        subsampling=0)
    return file.getvalue()


def enlarged_error(original: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Mean absolute error over the colors, `GAIN` times as large: uint8 [H, W, 3], gray."""
    error = np.abs(original.astype(np.int16) - decoded).mean(axis=-1) * GAIN
    return np.repeat(error.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _words(error: Exception) -> str:
    return _sentence(str(error) or type(error).__name__)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]
