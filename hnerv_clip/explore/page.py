"""What the explorer shows, as tables and still pictures, for a page that cannot be clicked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hnerv_clip.explore import SIDE
from hnerv_clip.explore.video import ExploredVideo, picture_psnr
from hnerv_clip.labels import DISTINGUISHED


def find_texts(video: ExploredVideo, texts: Sequence[str]) -> pd.DataFrame:
    """The best hit of each text, the best matches first.

    Returns:
        text, match (standard score, see `match_scores`), found (whether it is distinguished from
        other names), frame, time_s, x0, y0, x1, y1 (pixels).
    Raises:
        as `ExploredVideo.encode`.
    """
    rows = []
    for text in texts:
        query = video.encode(text)
        hits = video.search(query, 3)
        hits["match"] = video.matches(query, hits)
        best = hits.sort_values("match", ascending=False).iloc[0]
        rows.append({"text": text, "match": best.match, "found": best.match >= DISTINGUISHED,
                     "frame": int(best.frame), "time_s": video.times_s[int(best.frame)],
                     **{corner: round(best[corner]) for corner in ("x0", "y0", "x1", "y1")}})
    return pd.DataFrame(rows).sort_values("match", ascending=False, ignore_index=True)


def answer_words(table: pd.DataFrame) -> str:
    """Which of the texts the network finds in the video, in Markdown."""
    def listed(rows):
        return ", ".join(f"{row.text} ({row.match:.1f} σ)" for row in rows.itertuples())

    found, rest = table[table.found], table[~table.found]
    words = f"**Of {len(table)} texts the network finds {len(found)}"
    words += f": {listed(found)}.**" if len(found) else ".**"
    words += f" Not distinguished from other names: {listed(rest)}." if len(rest) else ""
    return words + (f" σ: standard deviations above other names in the same box; from "
                    f"{DISTINGUISHED:g} σ on a text counts as found, whether or not the thing is "
                    "there: see the limits.")


def facts_words(video: ExploredVideo) -> str:
    """Size, length, and which regions can be searched, in words."""
    height, width = video.size
    asked = ("any box can be searched" if video.has_field else
             f"{len(video.grid)} patches per frame can be searched")
    return (f"{video.name}, {len(video)} frames of {height}×{width}, "
            f"{len(video) / rate(video):.1f} s; {asked}. {video.about}".strip())


def rate(video: ExploredVideo) -> float:
    """Mean frames per second."""
    return (len(video) - 1) / float(video.times_s[-1] - video.times_s[0]) if len(video) > 1 else 25


def mean_psnr(video: ExploredVideo) -> float:
    """Of the decoded frames against the originals, in dB, the mean over frames."""
    pairs = ((video.decode(i), video.original(i)) for i in range(len(video)))
    return float(np.mean([picture_psnr(decoded, original) for decoded, original in pairs]))


def frame_rows(video: ExploredVideo, frames: Sequence[int]
               ) -> tuple[np.ndarray, dict[str, np.ndarray], list[int], list[str]]:
    """Frames, decoded ones, numbers and times, as `figures.plot_reconstructions` takes them.

    Where there is no original, the decoded frames stand in both places.
    """
    decoded = np.stack([video.decode(i) for i in frames]).transpose(0, 3, 1, 2)
    originals = decoded if not video.has_original else np.asarray(video.originals)[list(frames)]
    return originals, {"decoded": decoded}, list(frames), [f"{video.times_s[i]:.2f} s"
                                                           for i in frames]


def heat_rows(video: ExploredVideo, table: pd.DataFrame
              ) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Frame and heat maps of each text at its best hit, as `figures.plot_heat_maps` takes them.

    By the network, and by the teacher: its own embeddings of the same boxes of the original frame,
    or those of the patches that are kept; left out where there is no original.
    """
    rows = {}
    for hit in table.itertuples():
        query, frame = video.encode(hit.text), hit.frame
        shown = video.decode(frame) if not video.has_original else video.original(frame)
        heats = {"predicted": video.heat(query, frame)}
        if video.taught is not None and not video.has_field:
            heats["teacher"] = video.heat(query, frame, by_teacher=True)
        elif video.has_original:
            heats["teacher"] = video.teacher_heat(query, frame)
        rows[hit.text] = (shown, heats)
    return rows


def similar_rows(video: ExploredVideo, frame: int, x: float, y: float, *, side: float = SIDE,
                 top_k: int = 5) -> tuple[np.ndarray, tuple[float, ...], list]:
    """A place, and what is like it, as `figures.plot_similar` takes it.

    Args:
        x, y: shares of the width and height.
        side: of the square that a field is asked about, in frame heights.
    Returns:
        the frame, the box asked about, and (picture, words) of each hit.
    """
    height, width = video.size
    box = video.region(x * width, y * height, side=side)

    def picture(number):
        return video.decode(number) if not video.has_original else video.original(number)

    hits = []
    for hit in video.similar(frame, box, top_k).itertuples():
        rows, columns = (slice(round(low), round(high)) for low, high in
                         ((hit.y0, hit.y1), (hit.x0, hit.x1)))
        hits.append((picture(int(hit.frame))[rows, columns],
                     f"frame {int(hit.frame)}\ncosine {hit.score:.2f}"))
    return picture(frame), box, hits
