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
    for frames, words in FRAMES.items():
        for asked, at in ((ANY, "at any box"), (PATCHES, "at the patches")):
            own = rows[(rows.frames == frames) & (rows.asked == asked)]
            if len(own):
                wins = int((own.centered > own.decoded_centered).sum())
                said.append(f"in {words} {at} in {wins} of {len(own)}")
    return f"Of the stored files the field is closer to the teacher {join_words(said)}."


def decoded_words(rows: pd.DataFrame) -> str:
    """Both centered cosines at any box, at the smallest and at the largest file of each video."""
    said = []
    for video, part in rows[rows.asked == ANY].groupby("video", sort=False):
        for frames, words in FRAMES.items():
            own = part[part.frames == frames].sort_values("rate_bpp")
            if len(own):
                ends = own.iloc[[0, -1]] if len(own) > 1 else own
                said.append(f"on {video} in {words} " + " and ".join(
                    f"{row.centered:.2f} against {row.decoded_centered:.2f} at "
                    f"{row.rate_bpp:.3f} bits per pixel ({row.psnr_db:.1f} dB)"
                    for row in ends.itertuples()))
    return "Mean-centered cosine at any box, field against teacher on decoded frames: " \
        + "; ".join(said) + "."


def decoded_rows(rows: pd.DataFrame) -> list[dict[str, str]]:
    """A row per file and part of the frames: both answers' centered cosine and skill."""
    found = []
    for (curve, _, frames), part in rows.groupby(["curve", "digest", "frames"], sort=False):
        at, first = part.set_index("asked"), part.iloc[0]
        row = {"trained on": curve, "frames": FRAMES[frames],
               "bits per pixel": f"{first.rate_bpp:.4f}", "PSNR (dB)": f"{first.psnr_db:.2f}"}
        for asked in (ANY, PATCHES):
            own = at.loc[asked]
            row[f"{asked}: field"] = f"{own.centered:.3f} ({own.skill:.2f})"
            row[f"{asked}: decoded"] = f"{own.decoded_centered:.3f} ({own.decoded_skill:.2f})"
        found.append(row)
    return found
