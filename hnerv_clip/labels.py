"""The words for splits, sources and scores, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second, which the explorer's words need not take

# The bands of the project's description: (lowest value, name, meaning).
SIMILARITY_BANDS = (
    (0.9, "Excellent", "strong semantic preservation"),
    (0.7, "Good", "captures most semantic features"),
    (0.4, "Moderate", "some semantic information preserved"),
    (-np.inf, "Poor", "limited semantic learning"),
)
GAP_BANDS = (
    (0.15, "Large gap", "overfitting to the training frames"),
    (0.05, "Medium gap", "acceptable, some overfitting"),
    (-np.inf, "Small gap", "good generalization"),
)
DISTINGUISHED = 2.0  # standard score (`search.rank.match_scores`) that tells a text from others


def match_words(text: str, best: float, *, where: str = "this video") -> str:
    """Whether a text has a match in a video, by the standard score of its best hit."""
    if best >= DISTINGUISHED:
        return f"“{text}”: best match with a standard score of {best:.1f}"
    return (f"“{text}” has no match in {where}: its best place has a standard score of "
            f"{best:z.1f}, and only from {DISTINGUISHED:g} on is a text distinguished from others")


def similarity_band(similarity: float) -> tuple[str, str]:
    """(name, meaning) of a mean raw cosine, by the original description's bands."""
    return _band(similarity, SIMILARITY_BANDS, "similarity")


def gap_band(gap: float) -> tuple[str, str]:
    """(name, meaning) of training minus held-out cosine, by the original description's bands."""
    return _band(gap, GAP_BANDS, "gap")


def _band(value, bands, name):
    if np.isnan(value):
        raise ValueError(f"{name} is NaN, so it lies in no band: look for empty or NaN embeddings")
    # The table's limits: the first band lies above its limit, the next include theirs.
    if value > bands[0][0]:
        return bands[0][1:]
    return next(band[1:] for band in bands[1:] if value >= band[0])


SOURCE_WORDS = {"encoder": "encoded from the frame itself",
                "interpolated": "interpolated between training frames",
                "coordinates": "computed from coordinates"}
FRAME_WORDS = {"train": "training", "val": "held out", "held_out": "held out", "skip": "skipped",
               "all": "all"}
# Columns of tables: what a reader is shown instead of the name, and how many digits.
COLUMN_WORDS = {
    "frames": "frames", "variant": "weights", "source": "per-frame embedding",
    "n": "number of frames",
    "psnr_db": "PSNR (dB)", "ms_ssim": "MS-SSIM", "clip_similarity": "cosine to the teacher",
    "clip_centred": "mean-centered cosine", "band": "band", "gap": "gap to training frames",
    "gap_band": "band of the gap",
    "run": "run", "psnr_held_out_db": "PSNR, held out (dB)",
    "psnr_train_db": "training frames (dB)",
    "clip_centred_held_out": "mean-centered cosine, held out",
    "clip_centred_train": "training frames",
    "rate_bpp": "bits per pixel", "train_time_s": "training (s)",
    "mode": "decoded", "batch_size": "batch", "frames_per_s": "frames/s",
    "frames_per_s_min": "slowest pass", "frames_per_s_max": "fastest pass",
    "query": "text", "spearman": "rank correlation", "overlap": "share of the teacher's best found",
    "chance": "by chance", "predicted": "relevant, network", "teacher": "relevant, teacher",
    "both": "to both", "agreement": "both say the same", "text": "text",
    "match": "standard score", "found": "found",
    "frame": "frame", "patch": "patch", "time_s": "time (s)", "score": "cosine"}
VALUE_WORDS = {"source": SOURCE_WORDS, "frames": FRAME_WORDS,
               "variant": {"trained": "as trained", "quantised": "from the file"},
               "found": {True: "yes", False: "no"}}
DIGITS = {"psnr_db": 2, "psnr_train_db": 2, "psnr_held_out_db": 2, "rate_bpp": 4, "train_time_s": 1,
          "frames_per_s": 0, "frames_per_s_min": 0, "frames_per_s_max": 0, "match": 1, "time_s": 2}


def in_words(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Columns of a table as a reader is shown them: names and values in words, numbers as text.

    Args:
        columns: names of `COLUMN_WORDS`, in the order shown; those that the table lacks, or that
            are empty in every row, are left out.
    Raises:
        KeyError: a name without words.
    """
    import pandas as pd

    def say(name, value):
        if pd.isna(value):
            return ""
        if isinstance(value, (float, np.floating)):
            return f"{value:.{DIGITS.get(name, 3)}f}"
        return VALUE_WORDS.get(name, {}).get(value, value)

    shown = [name for name in columns if name in table and table[name].notna().any()]
    words = [[say(name, value) for value in table[name]] for name in shown]
    return pd.DataFrame(list(zip(*words)), columns=[COLUMN_WORDS[name] for name in shown],
                        index=[""] * len(table))
