"""A stored file's field against the teacher on its frames: `book/results/decoded_files.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.book.markdown import join_words
from hnerv_clip.book.results import read_json
from hnerv_clip.paths import resolve_path

FILE = "decoded_files.json"
FIX = "git checkout book/results"
ANY, PATCHES = "any box", "patches"
FRAMES = {"train": "training frames", "held_out": "held-out frames"}


def read_decoded(folder: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of `study.decoded`, and what they are of (`about`); both empty without any.

    `curve` tells trainings apart: their files are alike in it. `kb`: 10³ bytes of the file.
    """
    if not (resolve_path(folder) / FILE).is_file():
        return pd.DataFrame(), {}
    found = read_json(folder, FILE, fix=FIX)
    rows = pd.DataFrame(found["rows"])
    whole = rows.groupby("digest").n.transform("sum") / rows.groupby("digest").asked.transform(
        "nunique")
    trained = rows.digest.map(rows[rows.frames == "train"].groupby("digest").n.first())
    rows["all_train"] = trained == whole
    rows["curve"] = (rows.video + rows.all_train.map({True: ", all frames", False: ""})
                     + ", " + rows.modelsize.map("{:g} M".format))
    rows["kb"] = rows.size_bytes / 1e3
    return rows.sort_values(["video", "all_train", "rate_bpp", "frames"],
                            ascending=[False, True, True, False], ignore_index=True), found["about"]


def decoded_answer(rows: pd.DataFrame) -> str:
    """In how many files a field is closer to the teacher than the teacher on decoded frames."""
    said = []
    for frames in ("held_out", "train"):
        part = rows[rows.frames == frames]
        if len(part):
            closer = part.centered > part.decoded_centered
            at = closer.groupby(part.asked).sum()
            said.append(f"in {at[ANY]} of {part.digest.nunique()} files in {FRAMES[frames]} (at "
                        f"the eight patches in {at[PATCHES]})")
    return (f"The field is closer to the teacher on the video {join_words(said)}. The files of one "
            "training share its network, one seed each: this counts, and does not test.")


def crossing_words(rows: pd.DataFrame) -> str:
    """Over which rates a field's agreement hardly moves, and in which files the teacher on decoded
    frames is closer, at any box: from a PSNR on, if it is in every file of at least that."""
    own = rows[rows.asked == ANY]
    moves = own.groupby(["curve", "frames"]).centered.agg(lambda found: found.max() - found.min())
    said = ["From file to file of a training the field's cosine moves by at most "
            f"{moves.max():.3f}, while the teacher's on the decoded frames follows the picture"]
    for (video, frames), part in own.groupby(["video", "frames"], sort=False):
        ahead = part[part.decoded_centered > part.centered]
        if len(ahead):
            least = ahead.psnr_db.min().round(1)
            clear = (part.psnr_db.round(1) >= least).sum() == len(ahead)
            said.append(f"in {FRAMES[frames]} of {video} it is closer in " + (
                f"files of {least:.1f} dB and more" if clear else
                f"{len(ahead)} of {len(part)} files"))
    return "; ".join(said) + "."


def decoded_words(rows: pd.DataFrame) -> str:
    """Both centered cosines at any box, at the smallest and at the largest file of each video."""
    said = []
    for video, part in rows[rows.asked == ANY].groupby("video", sort=False):
        for frames, words in FRAMES.items():
            own = part[part.frames == frames].sort_values("rate_bpp")
            if len(own):
                ends = own.iloc[[0, -1]] if len(own) > 1 else own
                said.append(f"{video}, {words}: " + ", ".join(
                    f"{row.centered:.2f} against {row.decoded_centered:.2f} at "
                    f"{row.rate_bpp:.3f} bpp ({row.psnr_db:.1f} dB)" for row in ends.itertuples()))
    return "\n".join(f"- {line}" for line in said)


def decoded_rows(rows: pd.DataFrame) -> list[dict[str, str]]:
    """A row per file and part of the frames: both answers' centered cosine and skill."""
    found = []
    for (curve, _, frames), part in rows.groupby(["curve", "digest", "frames"], sort=False):
        at, first = part.set_index("asked"), part.iloc[0]
        (one, other), (three, four) = (
            (f"{at.loc[asked].centered:.3f} ({at.loc[asked].skill:.2f})",
             f"{at.loc[asked].decoded_centered:.3f} ({at.loc[asked].decoded_skill:.2f})")
            for asked in (ANY, PATCHES))
        found.append({"file": f"{curve}: {first.rate_bpp:.4f} bpp, {first.psnr_db:.1f} dB, "
                              f"{FRAMES[frames].split()[0]}",
                      "any box, field": one, "decoded": other, "patches, field": three,
                      "patches, decoded": four})
    return found
