"""Learned against every other condition, and what follows."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hnerv_clip.labels import gap_band, similarity_band
from hnerv_clip.metrics import skill
from hnerv_clip.verify.time_series import MIN_FRAMES, holm, mean_interval

# Condition → how a table names it. The first four are the user's, the fifth is a control like them;
# the others need no learning. More baselines can be given by name to `verify_embeddings`.
CONDITIONS = {
    "learned": "Learned (Your Model)",
    "random": "Random Embeddings",
    "shuffled": "Shuffled Pairing",
    "temporal": "Temporal Shuffle",
    "spatial": "Spatial Shuffle",
    "mean": "Constant Mean",
    "position": "Mean per Position",
    "neighbour": "Nearest Training Frame",
    "between": "Between Training Frames",
}
CONTROLS = ("random", "shuffled", "temporal", "spatial")


def name_of(condition: str) -> str:
    """A condition as a table names it; one that the caller added is its own name."""
    return CONDITIONS.get(condition, condition)


def summarise_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over (frame, patch) for each split and condition."""
    table = scores.groupby(["split", "condition"], sort=False).agg(
        clip_similarity_mean=("clip_similarity", "mean"),
        clip_similarity_std=("clip_similarity", "std"), clip_centred_mean=("clip_centred", "mean"),
        clip_centred_std=("clip_centred", "std"), n=("frame", "size"))
    return table.reset_index()


def improvement_table(table: pd.DataFrame) -> pd.DataFrame:
    """Learned minus every other condition, a row per split and condition."""
    rows = []
    for split, part in table.groupby("split", sort=False):
        part = part.set_index("condition")
        for other in part.index.drop("learned"):
            raw = part.clip_similarity_mean["learned"] - part.clip_similarity_mean[other]
            rows.append({
                "split": split, "over": other, "clip_similarity": raw,
                "clip_centred": part.clip_centred_mean["learned"] - part.clip_centred_mean[other],
                "clear": bool(raw > 2 * part.clip_similarity_std[other]),
            })
    return pd.DataFrame(rows)


def compare(scores: pd.DataFrame, *, measure: str = "clip_centred", level: float = 0.95
            ) -> pd.DataFrame:
    """Learned against every other condition, frame by frame, with intervals and tests.

    The unit is the frame: patches of one frame overlap, so their mean counts once. The interval
    and the one-sided p-value allow for autocorrelation (`statistics.mean_interval`): circular
    shifts, which test whether a prediction is aligned in time (`shift_tests`), leave the mean of a
    difference as it is, so they cannot test that. Holm's correction is over all comparisons of a
    split.

    Args:
        scores: `Verification.scores`.
    Returns:
        split, over, difference, low, high, effect_size (mean over standard deviation of the
        per-frame differences), share_better (of the frames), standard_error and freedom of
        Student's t, block, frames, independent (how many independent frames would give the same
        standard error), p, p_holm. With fewer than 8 frames
        there are differences, and no interval or p.
    """
    rows = []
    for split, part in scores.groupby("split", sort=False):
        series = part.pivot_table(index="frame", columns="condition", values=measure, sort=False)
        others = [name for name in part.condition.unique() if name != "learned"]
        family = [{"split": split, "over": other,
                   **_difference((series["learned"] - series[other]).sort_index(), level)}
                  for other in others]
        tested = [row for row in family if np.isfinite(row["p"])]
        for row, p in zip(tested, holm([row["p"] for row in tested])):
            row["p_holm"] = p
        rows += family
    return pd.DataFrame(rows)


def _difference(series, level):
    spread = series.std()
    row = {"difference": series.mean(), "low": np.nan, "high": np.nan,
           "effect_size": series.mean() / spread if spread > 1e-12 else 0.0,
           "share_better": (series > 1e-9).mean(), "standard_error": np.nan, "freedom": np.nan,
           "block": np.nan, "frames": len(series),
           "independent": np.nan, "p": np.nan, "p_holm": np.nan}
    if len(series) >= MIN_FRAMES:
        found = mean_interval(series.to_numpy(), level=level)
        alike = (spread / found.standard_error) ** 2 if found.standard_error > 1e-12 else np.nan
        row |= {"low": found.low, "high": found.high, "block": found.block, "p": found.p,
                "standard_error": found.standard_error, "freedom": found.freedom,
                "independent": min(alike, len(series))}
    return row


def judge(table: pd.DataFrame, comparisons: pd.DataFrame, source: str = "") -> dict:
    """The user's verdict by raw cosine, and beside it the honest one by held-out skill.

    The user's: the band of the mean raw cosine, and that of the gap between training and held-out
    frames. The
    honest one sorts the baselines by the centred cosine on held-out frames: `beaten` (at 5 % after
    Holm's correction), `unproven` (the network is above, but that may be chance), `not_beaten` (it
    is not above). `learned` is True when all are beaten, False when one is not, else None.
    """
    mean = table.set_index(["split", "condition"])
    splits = list(dict.fromkeys(table.split))
    verdict = {f"clip_similarity_{split}": float(mean.clip_similarity_mean[split, "learned"])
               for split in splits}
    overall = np.average([mean.clip_similarity_mean[split, "learned"] for split in splits],
                         weights=[mean.n[split, "learned"] for split in splits])
    verdict |= {"clip_similarity_all": float(overall), "quality": similarity_band(overall)[0],
                "quality_meaning": similarity_band(overall)[1]}
    for split in splits:
        verdict[f"skill_{split}"] = float(skill(mean.clip_similarity_mean[split, "learned"],
                                                mean.clip_similarity_mean[split, "mean"]))
        verdict[f"clip_centred_{split}"] = float(mean.clip_centred_mean[split, "learned"])
    if "held_out" not in splits:
        return verdict | {"beaten": [], "unproven": [], "not_beaten": [], "learned": None,
                          "honest": "No verdict: no frame was held out, and training frames only "
                                    "show what was memorised. Use data_split=\"4_5_5\"."}
    gap = verdict["clip_similarity_train"] - verdict["clip_similarity_held_out"]
    rows = comparisons[(comparisons.split == "held_out") & ~comparisons.over.isin(CONTROLS)]
    sure, above = rows.p_holm < 0.05, rows.difference > 1e-9
    sorted_out = {"beaten": list(rows.over[sure]), "unproven": list(rows.over[above & ~sure]),
                  "not_beaten": list(rows.over[~above & ~sure])}
    learned = False if sorted_out["not_beaten"] else None if sorted_out["unproven"] else True
    return verdict | sorted_out | {
        "gap": float(gap), "gap_band": gap_band(gap)[0], "gap_meaning": gap_band(gap)[1],
        "learned": learned, "honest": _honest_words(sorted_out, source, rows)}


def _honest_words(sorted_out, source, rows):
    def named(kind):
        return ", ".join(name_of(condition).lower() for condition in sorted_out[kind])

    # With the encoder, the model sees the held-out frame: recognising it is not predicting it.
    what = "Held-out skill" + (" (frame seen, no prediction)" if source == "encoder" else "")
    beaten, unproven, below = (named(kind) for kind in ("beaten", "unproven", "not_beaten"))
    answer = "YES" if not unproven and not below else \
        "IN PART" if beaten and below else "NO" if below else "NOT PROVEN"
    words = f"{what}: {answer}."
    words += f" Centred cosine beats {beaten}." if beaten else ""
    words += f" It is no better than {below}." if below else ""
    if unproven:
        frames, alike = int(rows.frames.iloc[0]), rows.independent.min()
        words += f" It is above {unproven}, but that may be chance: {frames} held-out frames "
        words += f"tell as much as {max(1, round(alike))} independent ones." \
            if np.isfinite(alike) else f"are too few for a test, which needs {MIN_FRAMES}."
    return words


def p_words(p: float) -> str:
    """A p-value as a text gives it: "p = 0.023", "p < 0.0001"."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
