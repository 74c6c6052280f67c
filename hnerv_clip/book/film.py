"""The landing page's film: original, reconstruction and where the network finds a text.

Made from a run's folder or a stored video by `hnerv-clip pages --film`, with the text that says
what it shows; nothing of it is made by hand.
"""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from PIL import Image

from hnerv_clip.config import ConfigError
from hnerv_clip.explore.film import film_panels, join_panels, write_frames
from hnerv_clip.explore.page import find_texts, mean_psnr, rate
from hnerv_clip.explore.video import ExploredVideo, open_video
from hnerv_clip.field.query import Field
from hnerv_clip.figures.overlay import TEXT_RANGE

LIMIT_BYTES = 1_500_000  # of each film
CRFS = (21, 24, 27, 30, 33, 36)  # x264's quality: the best that keeps within it
PANELS = {False: 480, True: 540}  # pixels of a panel's width: side by side, one below the other
MOVING = {"width": 260, "quality": 45}  # of the animated picture for the README
TEXTS = {"bunny": "hare", "bikes": "moped"}  # what the heat map is of, if no text is given
FILM_FILES = ("film.mp4", "film_tall.mp4", "film_poster.webp", "film_tall_poster.webp",
              "film.webp")

FILM = """<figure class="film" style="margin: 0">
<video id="film" muted loop playsinline controls preload="metadata"
 poster="../_static/film_poster.webp" width="{width}" height="{height}"
 style="width: 100%; height: auto; background: #000"
 aria-label="{label}">
<source media="(max-width: 600px)" src="../_static/film_tall.mp4" type="video/mp4">
<source src="../_static/film.mp4" type="video/mp4">
</video>
<script>
(() => {{
  const film = document.getElementById("film");
  if (matchMedia("(max-width: 600px)").matches) film.poster = "../_static/film_tall_poster.webp";
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) film.play().catch(() => {{}});
}})();
</script>
<figcaption><p>{caption}</p>
<details><summary>How it was made</summary><p>{made}</p></details></figcaption>
</figure>
"""


def make_film(book: Path, path: str | Path, *, text: str = "", original: str = "",
              cache_dir: str | Path = "output/cache", moving: bool = True) -> list[Path]:
    """Write `_static/film.mp4`, `film_tall.mp4` for phones, a poster of each, the animated
    `film.webp`, and `_generated/film.md`, which a page includes.

    Without a text it is that of `TEXTS`; where that has no match, there is no heat map.

    Args:
        book: the folder with the pages.
        path: folder of a run, or NAME.hnerv.
        text: what the heat map is of.
        original: of a stored video, what it was made from.
        moving: also `film.webp`.
    Returns:
        the files written.
    Raises:
        ConfigError: a film that stays too large; the text has no match in the video, or is not
            known; or there is no original.
    """
    video = open_video(path, original=original, cache_dir=cache_dir)
    if not video.has_original:
        raise ConfigError(f"the film shows the original beside {path}: give it, "
                          "--film_original VIDEO, a file or a name such as bunny")
    text, frame = _choose_text(video, text)
    static, written = book / "_static", []
    static.mkdir(exist_ok=True)
    shapes, panels = {}, film_panels(video, text)
    for tall, width in PANELS.items():
        frames = join_panels(panels, width=width, tall=tall)
        name = "film_tall" if tall else "film"
        written.append(write_small(static / f"{name}.mp4", frames, rate(video)))
        poster = static / f"{name}_poster.webp"
        Image.fromarray(frames[frame]).save(poster, quality=80, method=6)
        written.append(poster)
        shapes[tall] = frames.shape
    if moving:
        written.append(write_moving(static / "film.webp", join_panels(
            panels, width=MOVING["width"]), rate(video)))
    height, width = shapes[False][1:3]
    page = book / "_generated" / "film.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(FILM.format(
        width=width, height=height, caption=caption(video, text), made=made_words(video, text),
        label=html.escape(f"Film: {video.name}, its reconstruction by the network"
                          + (f", and a heat map of {text}" if text else ""))), encoding="utf-8")
    return [*written, page]


def _choose_text(video: ExploredVideo, text: str) -> tuple[str, int]:
    """The text of the heat map, "" for none, and the frame of its best hit."""
    given, text = text, text or TEXTS.get(video.name, "")
    if not text or (not video.has_head and not given):
        return "", len(video) // 3
    try:
        best = find_texts(video, [text]).iloc[0]
    except ConfigError:  # another teacher's words, or none of its weights here
        if given:
            raise
        return "", len(video) // 3
    if best.found:
        return text, int(best.frame)
    if given:
        raise ConfigError(f"{text!r} has no match in {video.name} ({best.match:.1f}): a film of "
                          "nothing; give another --film_text")
    return "", len(video) // 3


def write_small(path: Path, frames: np.ndarray, fps: float) -> Path:
    """Write frames as MP4 of at most `LIMIT_BYTES`.

    Raises:
        ConfigError: it is larger at the lowest quality.
    """
    for crf in CRFS:
        write_frames(path, frames, fps, crf=crf)
        if path.stat().st_size <= LIMIT_BYTES:
            return path
    raise ConfigError(f"{path.name} has {path.stat().st_size:,} bytes, more than {LIMIT_BYTES:,}: "
                      "make it of a shorter video (frame_limit)")


def write_moving(path: Path, frames: np.ndarray, fps: float) -> Path:
    """Write frames as an animated WebP, for where a film cannot play."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0,
               quality=MOVING["quality"], method=4)
    return path


def caption(video: ExploredVideo, text: str) -> str:
    """What the film shows, in HTML."""
    where = (f", and where the network finds “{text}” (colored where this text scores "
             f"{TEXT_RANGE[0]:g} standard deviations or more above other texts)" if text else "")
    return _as_html("A video, the network's reconstruction of it "
                    f"({mean_psnr(video):.1f} dB PSNR, the mean over all frames){where}.",
                    f"Teacher: {video.teacher_label}." if video.has_head else "",
                    f"{video.credit}." if video.credit else "")


def made_words(video: ExploredVideo, text: str) -> str:
    """What the film was made with, in HTML."""
    height, width = video.size
    return _as_html(f"{video.name}, {len(video)} frames of {height}×{width}.", video.about,
                    _fit_words(video) if text else "")


def _as_html(*sentences: str) -> str:
    return " ".join(html.escape(words, quote=False) for words in sentences if words)


def _fit_words(video: ExploredVideo) -> str:
    """How the field that answers was fitted; nothing of the original head, or where it is unknown.
    """
    about = video.head.about if isinstance(video.head, Field) else {}
    if not {"boxes", "settings"} <= about.keys():
        return ""
    return (f"A field answers, fitted afterwards to {about['boxes']} boxes in each training frame "
            f"in {about['settings']['steps']:,} steps.")
