"""The explorer: a widget for JupyterLab, whose state this holds; `widget.js` draws it.

Everything is a trait: setting `frame`, `text` or `region` does what a hand does.
"""

from __future__ import annotations

import base64
import io
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import anywidget
import numpy as np
import pandas as pd
import traitlets as t
from PIL import Image

from hnerv_clip.explore.page import picture_psnr
from hnerv_clip.explore.video import SIDE, ExploredVideo, open_video
from hnerv_clip.figures.overlay import REGION_RANGE, TEXT_RANGE, heat_image
from hnerv_clip.search.boxes import SIDES

GAIN = 5  # how much an error is enlarged
HITS = 6
THUMBNAIL = 120  # pixels, the longer side of a hit's picture
KEPT = 64  # decoded frames
REFERENCES = 400  # patches of the video that a region is compared with
FOLDER = Path(__file__).parent


def explore(path: str | Path, *, original: str = "", text: str = "",
            cache_dir: str | Path = "output/cache", device: str = "auto") -> Explorer:
    """Explore a run or a stored video in JupyterLab.

    Args:
        path: folder of a run, or NAME.hnerv.
        original: the video that a stored one was made from, to see the error; a file or a name.
        text: searched at once.
    Raises:
        as `explore.video.open_video`.
    """
    explorer = Explorer(open_video(path, original=original, cache_dir=cache_dir, device=device))
    explorer.get_ready()
    if text:
        explorer.text = text
    return explorer


class Explorer(anywidget.AnyWidget):
    """Scrub, compare, search by text or by clicking.

    Set by hand or in Python: `frame`, `view`, `heat_of`, `side`, `text`, `region`. The rest
    answers: `hits`, pictures as bytes, and `problem`, what went wrong with its fix, or "".
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
    problem = t.Unicode("").tag(sync=True)

    def __init__(self, video: ExploredVideo):
        has_original = video.originals is not None
        height, width = video.size
        super().__init__(facts={
            "name": video.name, "frames": len(video), "height": height, "width": width,
            "times": [round(float(s), 3) for s in video.times_s], "credit": video.credit,
            "teacher": video.teacher_label, "has_original": has_original, "gain": GAIN,
            "has_teacher": video.taught is not None, "has_head": video.head is not None,
            "sides": list(SIDES) if video.has_field else []})
        self.video = video
        self._query: tuple[np.ndarray, np.ndarray | None] | None = None  # vector, references
        self._decoded = lru_cache(KEPT)(video.decode)
        self._ready = False
        self._problems = {"search": "" if video.head is not None else _sentence(video.silent),
                          "look": ""}
        if has_original:
            self.view = "wipe"
        self._tell()
        self.show()
        self._ready = True

    def get_ready(self) -> None:
        """Load the teacher now, so that the first search need not wait; else the search says why
        it cannot."""
        if self.video.head is not None:
            with suppress(ValueError, RuntimeError, OSError, ImportError):
                _ = self.video.names

    # Pictures

    @t.observe("frame", "view", "heat_of")
    def _on_look(self, change) -> None:
        if self._ready:
            self._try(self.show, "look")

    def show(self) -> None:
        """Make the pictures of `frame` that `view` needs."""
        frame = min(max(self.frame, 0), len(self.video) - 1)
        original = self.video.original(frame)
        if self.view != "decoded" and original is None:
            self.view = "decoded"
            raise ValueError("there is no original beside a stored video alone: open it with "
                             'explore(path, original="VIDEO"), the video that it was made from')
        if self.shown != frame:
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
    def _on_text(self, change) -> None:
        if self.text.strip():
            self.region = {}
            self._try(self._search_text, "search")

    @t.observe("region")
    def _on_region(self, change) -> None:
        if self.region:
            self._try(self._search_region, "search")

    @t.observe("side")
    def _on_side(self, change) -> None:
        if self.region:
            self._try(self._search_region, "search")

    def _search_text(self) -> None:
        text, started = self.text.strip(), time.perf_counter()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            vector = self.video.encode(text)
        found = self.video.search(vector, HITS)
        found["match"] = self.video.matches(vector, found)
        best = float(found.match.max())
        words = (f"“{text}”: best match {best:.1f}" if best >= TEXT_RANGE[0] else
                 f"“{text}” has no match in this video: its best place has {best:z.1f}, and only "
                 f"from {TEXT_RANGE[0]:g} on is a text distinguished from others")
        self._found(found, (vector, None), words, started, asked={})
        if told:
            self._problems["search"] = _sentence(str(told[-1].message))
            self._tell()

    def _search_region(self) -> None:
        started = time.perf_counter()
        frame = int(self.region.get("frame", self.frame))
        box = self.video.region(float(self.region["x"]), float(self.region["y"]), side=self.side)
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
            self._ready, self.frame = False, rows[0]["frame"]
            self._ready = True
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
        """An error is shown, with its fix, in place of a traceback that nobody sees.

        What was found before a search that failed goes, so that it is not read as its answer.
        """
        self._problems[what] = ""
        try:
            act()
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            self._problems[what] = _sentence(str(error))
            if what == "search":
                self._query, self.asked, self.hits, self.answer = None, {}, [], ""
                self.heat = b""
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


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]
