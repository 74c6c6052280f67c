"""Is what the CLIP head learnt real? The study of the project's description, and an honest reading.

Pure functions on arrays: predicted p and teacher g, unit vectors [T, P, D]. A raw cosine flatters,
because the embeddings of one video share most of their direction; so every condition is also
measured after the mean of the training frames' teacher embeddings is taken off (`centred`), and
stands beside what needs no learning: that mean, the mean of each position, and the teacher's
embedding of the nearest training frame. No model and no teacher is touched here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hnerv_clip.measures import (
    centred_cosine,
    check_pair,
    cosine,
    gap_band,
    similarity_band,
    skill,
    unit,
)

# Condition → how a table names it. The first four are the user's; the others need no learning.
CONDITIONS = {
    "learned": "Learned (Your Model)",
    "random": "Random Embeddings",
    "shuffled": "Shuffled Pairing",
    "temporal": "Temporal Shuffle",
    "mean": "Constant Mean",
    "position": "Mean per Position",
    "neighbour": "Nearest Training Frame",
}
BASELINES = ("mean", "position", "neighbour")
SPLIT_LABELS = {"train": "training frames", "val": "held-out frames"}
SOURCES = {
    "encoder": "held-out frames go through the encoder: the model sees the frame it is asked about",
    "interpolated": "held-out frames are predicted: their embedding is interpolated from the "
                    "training frames on either side",
    "coordinates": "held-out frames are predicted: the model sees coordinates alone",
}


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify_embeddings`.

    scores: a row per split, condition, frame and patch, with `raw` and `centred` cosine.
    table: a row per split and condition: mean and standard deviation of both, and `n`.
    improvements: a row per split and other condition: learned minus it, raw and centred, and
        `clear`: whether the raw improvement exceeds twice the other's standard deviation (the
        user's rule; a rule of thumb, not a test).
    verdict: what `judge` says.
    source: where held-out embeddings came from, a key of `SOURCES` or "".
    """

    scores: pd.DataFrame
    table: pd.DataFrame
    improvements: pd.DataFrame
    verdict: dict
    teacher_label: str
    source: str
    seed: int


def frame_indices(frames, frame_count: int, name: str = "frames") -> np.ndarray:
    """Frame numbers, ascending, from numbers or from a boolean mask over all frames.

    Raises:
        ValueError: a mask of another length, a number outside the video, or one given twice.
    """
    frames = np.asarray(frames)
    if frames.dtype == bool:
        if frames.shape != (frame_count,):
            raise ValueError(f"the mask of {name} has shape {frames.shape}, "
                             f"the video {frame_count} frames: give one value a frame")
        return np.flatnonzero(frames)
    frames = np.sort(frames.astype(int).ravel())
    if len(frames) and not 0 <= frames[0] <= frames[-1] < frame_count:
        raise ValueError(f"{name} run from {frames[0]} to {frames[-1]}, but the embeddings have "
                         f"frames 0 to {frame_count - 1}")
    if len(np.unique(frames)) != len(frames):
        raise ValueError(f"{name} name a frame twice; name each once")
    return frames


def nearest_training_frame(frames: np.ndarray, train_frames: np.ndarray) -> np.ndarray:
    """For each frame the nearest training frame other than itself; the earlier one of two.

    Args:
        frames: [N] frame numbers.
        train_frames: [M] frame numbers.
    Returns:
        [N] frame numbers out of `train_frames`.
    Raises:
        ValueError: no training frame is left for some frame.
    """
    train_frames = np.sort(np.asarray(train_frames))
    distance = np.abs(np.asarray(frames)[:, None] - train_frames[None]).astype(float)
    distance[distance == 0] = np.inf
    if distance.size == 0 or not np.isfinite(distance).any(axis=1).all():
        raise ValueError(f"{len(train_frames)} training frames leave no other frame to compare "
                         "with: use at least 2 training frames")
    return train_frames[distance.argmin(axis=1)]


def shuffle_pairs(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every (frame, patch) embedding [N, P, D] to another (frame, patch), at random."""
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    return flat[_cycle(len(flat), rng)].reshape(embeddings.shape)


def shuffle_time(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every embedding [N, P, D] to another frame of the same patch position, at random.

    Positions keep their content and lose their time; `shuffle_pairs` loses both.
    """
    moved = [embeddings[_cycle(len(embeddings), rng), patch]
             for patch in range(embeddings.shape[1])]
    return np.stack(moved, axis=1)


def _cycle(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation without fixed points: one cycle through everything (Sattolo 1986)."""
    order = rng.permutation(count)
    moved = np.empty(count, dtype=int)
    moved[order] = np.roll(order, 1)
    return moved


def conditions(predicted: np.ndarray, teacher: np.ndarray, train_frames: np.ndarray,
               frames: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What each condition would answer on some frames.

    Args:
        predicted, teacher: [T, P, D] unit vectors.
        train_frames: the only frames whose teacher embeddings a baseline may use.
        frames: [N] frames asked about.
    Returns:
        {condition: [N, P, D]}, in the order of `CONDITIONS`.
    """
    learned = predicted[frames]
    known = teacher[train_frames]
    constant = unit(known.mean(axis=(0, 1)))
    random = rng.standard_normal(learned.shape, dtype=np.float32)
    return {
        "learned": learned,
        "random": unit(random),
        "shuffled": shuffle_pairs(learned, rng),
        "temporal": shuffle_time(learned, rng),
        "mean": np.broadcast_to(constant, learned.shape),
        "position": np.broadcast_to(unit(known.mean(axis=0)), learned.shape),
        "neighbour": teacher[nearest_training_frame(frames, train_frames)],
    }


def verify_embeddings(predicted, teacher, train_frames, val_frames, *, seed: int = 0,
                      source: str = "", teacher_label: str = "") -> Verification:
    """Measure the predicted embeddings against controls and baselines.

    Args:
        predicted, teacher: [T, P, D] unit vectors of the same frames and patches.
        train_frames, val_frames: frame numbers, or boolean masks [T]. Held-out frames may be
            none (a split such as 1_1_1).
        seed: of the random embeddings and the shuffles.
        source: how held-out frames were predicted, a key of `SOURCES` or "".
        teacher_label: the teacher in words, for the report.
    Raises:
        ValueError: shapes differ, NaN, another teacher's size, a frame in both parts, or a part
            of one frame, for which no shuffle in time exists.
    """
    predicted, teacher = check_pair(predicted, teacher)
    parts = {"train": frame_indices(train_frames, len(teacher), "training frames"),
             "val": frame_indices(val_frames, len(teacher), "held-out frames")}
    both = np.intersect1d(parts["train"], parts["val"])
    if len(both):
        raise ValueError(f"frame {both[0]} is in the training and the held-out part; "
                         "a frame belongs to one")
    if source and source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; use one of {', '.join(SOURCES)}")
    centre = teacher[parts["train"]].mean(axis=(0, 1)) if len(parts["train"]) else None
    rng = np.random.default_rng(seed)
    rows = []
    for split, frames in parts.items():
        if split == "val" and not len(frames):
            continue
        if len(frames) < 2:
            raise ValueError(f"there are {len(frames)} {SPLIT_LABELS[split]}; shuffling in time "
                             "needs at least 2: use a longer video or another data_split")
        for condition, answer in conditions(predicted, teacher, parts["train"], frames,
                                            rng).items():
            rows.append(_score_rows(split, condition, frames, answer, teacher[frames], centre))
    scores = pd.concat(rows, ignore_index=True)
    table = summarise_scores(scores)
    improvements = improvement_table(table)
    verdict = judge(table, source)
    return Verification(scores, table, improvements, verdict, teacher_label, source, seed)


def _score_rows(split, condition, frames, answer, target, centre):
    patches = target.shape[1]
    return pd.DataFrame({
        "split": split, "condition": condition,
        "frame": np.repeat(frames, patches), "patch": np.tile(np.arange(patches), len(frames)),
        "raw": cosine(answer, target).ravel(),
        "centred": centred_cosine(answer, target, centre).ravel(),
    })


def summarise_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over (frame, patch) for each split and condition."""
    table = scores.groupby(["split", "condition"], sort=False).agg(
        raw_mean=("raw", "mean"), raw_std=("raw", "std"),
        centred_mean=("centred", "mean"), centred_std=("centred", "std"), n=("raw", "size"))
    return table.reset_index()


def improvement_table(table: pd.DataFrame) -> pd.DataFrame:
    """Learned minus every other condition, a row per split and condition."""
    rows = []
    for split, part in table.groupby("split", sort=False):
        part = part.set_index("condition")
        for other in part.index.drop("learned"):
            raw = part.raw_mean["learned"] - part.raw_mean[other]
            rows.append({
                "split": split, "over": other, "raw": raw,
                "centred": part.centred_mean["learned"] - part.centred_mean[other],
                "clear": bool(raw > 2 * part.raw_std[other]),
            })
    return pd.DataFrame(rows)


def judge(table: pd.DataFrame, source: str = "") -> dict:
    """The user's verdict by raw cosine, and beside it the honest one by held-out skill.

    The user's: the band of the mean raw cosine, and the band of the train-validation gap. The
    honest one asks whether the centred cosine on held-out frames beats the constant mean, the mean
    per position and the nearest training frame; the last is the one that a video makes hard.
    """
    mean = table.set_index(["split", "condition"])
    splits = list(dict.fromkeys(table.split))
    verdict = {f"{split}_similarity": float(mean.raw_mean[split, "learned"]) for split in splits}
    weights = [mean.n[split, "learned"] for split in splits]
    overall = np.average([mean.raw_mean[split, "learned"] for split in splits], weights=weights)
    verdict |= {"all_similarity": float(overall), "quality": similarity_band(overall)[0],
                "quality_meaning": similarity_band(overall)[1]}
    for split in splits:
        verdict[f"{split}_skill"] = float(skill(mean.raw_mean[split, "learned"],
                                                mean.raw_mean[split, "mean"]))
        verdict[f"{split}_centred"] = float(mean.centred_mean[split, "learned"])
    if "val" not in splits:
        return verdict | {"beaten": [], "not_beaten": [], "learned": None,
                          "honest": "No verdict: no frame was held out, and training frames only "
                                    "show what was memorised. Use data_split=\"4_5_5\"."}
    gap = verdict["train_similarity"] - verdict["val_similarity"]
    beaten = [name for name in BASELINES
              if mean.centred_mean["val", "learned"] > mean.centred_mean["val", name]]
    not_beaten = [name for name in BASELINES if name not in beaten]
    honest = _honest_words(beaten, not_beaten, source)
    return verdict | {"gap": float(gap), "gap_band": gap_band(gap)[0],
                      "gap_meaning": gap_band(gap)[1], "beaten": beaten, "not_beaten": not_beaten,
                      "learned": not not_beaten, "honest": honest}


def _honest_words(beaten, not_beaten, source):
    def named(names):
        return ", ".join(CONDITIONS[name].lower() for name in names)

    # With the encoder, the model sees the held-out frame: recognising it is not predicting it.
    what = "Held-out skill" + (" (frame seen, no prediction)" if source == "encoder" else "")
    if not not_beaten:
        return f"{what}: YES. Centred cosine beats {named(beaten)}."
    if not beaten:
        return f"{what}: NO. Centred cosine beats none of {named(not_beaten)}."
    return (f"{what}: IN PART. Centred cosine beats {named(beaten)}; "
            f"it does not beat {named(not_beaten)}.")


def report_text(verification: Verification) -> str:
    """The verification as the plain table of the project's description."""
    wide, thin = "=" * 70, "-" * 70
    verdict = verification.verdict
    lines = [wide, "CLIP LEARNING VERIFICATION RESULTS", wide]
    lines += [f"Teacher: {verification.teacher_label}"] if verification.teacher_label else []
    lines += [f"Source: {SOURCES[verification.source]}"] if verification.source else []
    for split, part in verification.table.groupby("split", sort=False):
        lines += ["", f"{SPLIT_LABELS[split].capitalize()} (n = {part.n.iloc[0]} embeddings)", "",
                  f"{'Condition':<26}{'Mean':>10}{'Std':>10}{'Centred':>12}{'Std':>10}", thin]
        lines += [f"{CONDITIONS[row.condition]:<26}{row.raw_mean:>10.4f}{row.raw_std:>10.4f}"
                  f"{row.centred_mean:>12.4f}{row.centred_std:>10.4f}"
                  for row in part.itertuples()]
        lines += [thin]
    lines += ["", "IMPROVEMENT ANALYSIS (raw; centred)"]
    for row in verification.improvements.itertuples():
        mark = "✓ above 2 std" if row.clear else "✗ within 2 std"
        lines += [f"{row.split:<6} over {CONDITIONS[row.over].lower():<24}{row.raw:>8.4f}"
                  f"{row.centred:>9.4f}  {mark}"]
    lines += ["", f"Overall Quality: {verdict['quality'].upper()} by raw cosine "
                  f"({verdict['all_similarity']:.4f}: {verdict['quality_meaning']})"]
    if "gap" in verdict:
        lines += [f"Train-validation gap: {verdict['gap']:.4f}, {verdict['gap_band'].lower()} "
                  f"({verdict['gap_meaning']})",
                  f"Skill against the constant: {verdict['train_skill']:.4f} on training, "
                  f"{verdict['val_skill']:.4f} on held-out frames"]
    return "\n".join(lines + [verdict["honest"], wide, ""])


def write_report(verification: Verification, folder, name: str = "verification") -> list[Path]:
    """Write NAME.csv (the table), NAME.json (everything but the scores) and NAME.txt.

    Returns:
        The three paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("csv", "json", "txt")]
    verification.table.to_csv(paths[0], index=False)
    content = {
        "teacher_label": verification.teacher_label, "source": verification.source,
        "seed": verification.seed, "verdict": verification.verdict,
        "table": verification.table.to_dict("records"),
        "improvements": verification.improvements.to_dict("records"),
    }
    paths[1].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    paths[2].write_text(report_text(verification), encoding="utf-8")
    return paths
