"""Is what the CLIP head learnt real? The study of the project's description, and an honest reading.

Pure functions on arrays: predicted p and teacher g, unit vectors [T, P, D]. A raw cosine flatters,
because the embeddings of one video share most of their direction; so every condition is also
measured after the mean of the training frames' teacher embeddings is taken off (`centred`), and
stands beside what needs no learning (`controls`). No model and no teacher is touched here.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hnerv_clip.controls import conditions
from hnerv_clip.measures import (
    centred_cosine,
    check_pair,
    cosine,
    debiased_cka,
    gap_band,
    retrieval_ranks,
    retrieval_summary,
    similarity_band,
    skill,
)
from hnerv_clip.statistics import MIN_FRAMES, ShiftTest, holm, mean_interval, shift_test

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
SPLIT_LABELS = {"train": "training frames", "val": "held-out frames"}
SOURCES = {
    "encoder": "held-out frames go through the encoder: the model sees the frame it is asked about",
    "interpolated": "held-out frames are predicted: their embedding is interpolated from the "
                    "training frames on either side",
    "coordinates": "held-out frames are predicted: the model sees coordinates alone",
}


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify_embeddings`. Tables have a column `split`, train or val.

    scores: a row per condition, frame and patch, with `raw` and `centred` cosine.
    table: a row per condition: mean and standard deviation of both, and `n`.
    improvements: a row per other condition: learned minus it, raw and centred, and `clear`:
        whether the raw improvement exceeds twice the other's standard deviation (the user's rule;
        a rule of thumb, not a test).
    comparisons: the same with intervals and tests, see `compare`.
    shift_tests: by split, whether the prediction knows when things happen
        (`statistics.shift_test`); `alignment` is the same as a table.
    retrieval: a row per condition, see `measures.retrieval_summary`; and `cka`.
    verdict: what `judge` says.
    source: where held-out embeddings came from, a key of `SOURCES` or "".
    """

    scores: pd.DataFrame
    table: pd.DataFrame
    improvements: pd.DataFrame
    comparisons: pd.DataFrame
    shift_tests: dict[str, ShiftTest]
    retrieval: pd.DataFrame
    verdict: dict
    teacher_label: str
    source: str
    seed: int

    @property
    def alignment(self) -> pd.DataFrame:
        """A row per split: the correlation as aligned, and under all other shifts in time."""
        return pd.DataFrame([
            {"split": split, "observed": test.observed, "null_mean": test.null.mean(),
             "null_std": test.null.std(ddof=1), "effect": test.effect, "p": test.p,
             "shifts": test.shifts} for split, test in self.shift_tests.items()])


def name_of(condition: str) -> str:
    """A condition as a table names it; one that the caller added is its own name."""
    return CONDITIONS.get(condition, condition)


def verify_embeddings(predicted, teacher, train_frames, val_frames, *, seed: int = 0,
                      source: str = "", teacher_label: str = "", others: dict | None = None,
                      near: int = 2) -> Verification:
    """Measure the predicted embeddings against controls and baselines.

    Args:
        predicted, teacher: [T, P, D] unit vectors of the same frames and patches.
        train_frames, val_frames: frame numbers, or boolean masks [T]. Held-out frames may be
            none (a split such as 1_1_1).
        seed: of the random embeddings and the shuffles.
        source: how held-out frames were predicted, a key of `SOURCES` or "".
        teacher_label: the teacher in words, for the report.
        others: more baselines, {name: [T, P, D] unit vectors}, or {name: (frames, [N, P, D])} for
            one that answers only those frames; a part that it does not cover goes without it.
        near: frames of tolerance in the near retrieval, see `measures.retrieval_ranks`.
    Raises:
        ValueError: shapes differ, NaN, another teacher's size, a frame in both parts, or a part
            of one frame, for which no shuffle in time exists.
    """
    predicted, teacher = check_pair(predicted, teacher)
    others = {name: _whole(answer, teacher, name) for name, answer in (others or {}).items()}
    parts = _parts(train_frames, val_frames, len(teacher))
    if source and source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; use one of {', '.join(SOURCES)}")
    centre = teacher[parts["train"]].mean(axis=(0, 1))
    rng = np.random.default_rng(seed)
    scores, shift_tests, retrieval = [], {}, []
    for split, frames in parts.items():
        target = teacher[frames]
        answers = conditions(predicted, teacher, parts["train"], frames, rng)
        answers |= {name: answer[frames] for name, (known, answer) in others.items()
                    if np.isin(frames, known).all()}
        for condition, answer in answers.items():
            where = {"split": split, "condition": condition}
            scores.append(_score_rows(where, frames, answer, target, centre))
            retrieval.append(where | _structure(answer, teacher, frames, near))
        shift_tests[split] = shift_test(predicted[frames], target)
    scores = pd.concat(scores, ignore_index=True)
    table, comparisons = summarise_scores(scores), compare(scores)
    return Verification(
        scores=scores, table=table, improvements=improvement_table(table), comparisons=comparisons,
        shift_tests=shift_tests, retrieval=pd.DataFrame(retrieval),
        verdict=judge(table, comparisons, source), teacher_label=teacher_label, source=source,
        seed=seed)


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


def _parts(train_frames, val_frames, frame_count):
    """{split: frames} of the parts that exist, checked."""
    parts = {"train": frame_indices(train_frames, frame_count, "training frames"),
             "val": frame_indices(val_frames, frame_count, "held-out frames")}
    both = np.intersect1d(parts["train"], parts["val"])
    if len(both):
        raise ValueError(f"frame {both[0]} is in the training and the held-out part; "
                         "a frame belongs to one")
    for split, frames in parts.items():
        if len(frames) < 2 and not (split == "val" and not len(frames)):
            raise ValueError(f"there are {len(frames)} {SPLIT_LABELS[split]}; shuffling in time "
                             "needs at least 2: use a longer video or another data_split")
    return {split: frames for split, frames in parts.items() if len(frames)}


def _whole(answer, teacher, name):
    """(frames answered, [T, P, D]) of a baseline that the caller gave."""
    known, answer = answer if isinstance(answer, tuple) else (np.arange(len(teacher)), answer)
    known = np.asarray(known)
    if name in CONDITIONS:
        raise ValueError(f"{name!r} is one of the study's own conditions; choose another name")
    answer, _ = check_pair(answer, teacher[known])
    whole = np.zeros_like(teacher)
    whole[known] = answer
    return known, whole


def _score_rows(where, frames, answer, target, centre):
    patches = target.shape[1]
    return pd.DataFrame({
        **where, "frame": np.repeat(frames, patches),
        "patch": np.tile(np.arange(patches), len(frames)),
        "raw": cosine(answer, target).ravel(),
        "centred": centred_cosine(answer, target, centre).ravel(),
    })


def _structure(answer, teacher, frames, near):
    """Retrieval of the answers among the whole video, and their alignment of structure."""
    dim = teacher.shape[-1]
    flat, target = answer.reshape(-1, dim), teacher[frames].reshape(-1, dim)
    varies = len(flat) >= 4 and min(np.ptp(flat, axis=0).max(), np.ptp(target, axis=0).max()) > 1e-5
    summary = retrieval_summary(retrieval_ranks(answer, teacher, frames, near=near))
    return summary | {"near": near, "cka": debiased_cka(flat, target) if varies else np.nan}


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


def compare(scores: pd.DataFrame, *, measure: str = "centred", level: float = 0.95) -> pd.DataFrame:
    """Learned against every other condition, frame by frame, with intervals and tests.

    The unit is the frame: patches of one frame overlap, so their mean counts once. The interval
    and the one-sided p-value allow for autocorrelation (`statistics.mean_interval`); Holm's
    correction is over all comparisons of a split.

    Args:
        scores: `Verification.scores`.
    Returns:
        split, over, difference, low, high, effect_size (mean over standard deviation of the
        per-frame differences), share_better (of the frames), block, frames, independent (how many
        independent frames would give the same standard error), p, p_holm. With fewer than 8 frames
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
           "share_better": (series > 1e-9).mean(), "block": np.nan, "frames": len(series),
           "independent": np.nan, "p": np.nan, "p_holm": np.nan}
    if len(series) >= MIN_FRAMES:
        found = mean_interval(series.to_numpy(), level=level)
        alike = (spread / found.standard_error) ** 2 if found.standard_error > 1e-12 else np.nan
        row |= {"low": found.low, "high": found.high, "block": found.block, "p": found.p,
                "independent": min(alike, len(series))}
    return row


def judge(table: pd.DataFrame, comparisons: pd.DataFrame, source: str = "") -> dict:
    """The user's verdict by raw cosine, and beside it the honest one by held-out skill.

    The user's: the band of the mean raw cosine, and the band of the train-validation gap. The
    honest one sorts the baselines by the centred cosine on held-out frames: `beaten` (at 5 % after
    Holm's correction), `unproven` (the network is above, but that may be chance), `not_beaten` (it
    is not above). `learned` is True when all are beaten, False when one is not, else None.
    """
    mean = table.set_index(["split", "condition"])
    splits = list(dict.fromkeys(table.split))
    verdict = {f"{split}_similarity": float(mean.raw_mean[split, "learned"]) for split in splits}
    overall = np.average([mean.raw_mean[split, "learned"] for split in splits],
                         weights=[mean.n[split, "learned"] for split in splits])
    verdict |= {"all_similarity": float(overall), "quality": similarity_band(overall)[0],
                "quality_meaning": similarity_band(overall)[1]}
    for split in splits:
        verdict[f"{split}_skill"] = float(skill(mean.raw_mean[split, "learned"],
                                                mean.raw_mean[split, "mean"]))
        verdict[f"{split}_centred"] = float(mean.centred_mean[split, "learned"])
    if "val" not in splits:
        return verdict | {"beaten": [], "unproven": [], "not_beaten": [], "learned": None,
                          "honest": "No verdict: no frame was held out, and training frames only "
                                    "show what was memorised. Use data_split=\"4_5_5\"."}
    gap = verdict["train_similarity"] - verdict["val_similarity"]
    rows = comparisons[(comparisons.split == "val") & ~comparisons.over.isin(CONTROLS)]
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


def report_text(verification: Verification) -> str:
    """The verification as the plain table of the project's description."""
    wide, thin = "=" * 78, "-" * 78
    verdict = verification.verdict
    lines = [wide, "CLIP LEARNING VERIFICATION RESULTS", wide]
    lines += [f"Teacher: {verification.teacher_label}"] if verification.teacher_label else []
    lines += [f"Source: {SOURCES[verification.source]}"] if verification.source else []
    for split, part in verification.table.groupby("split", sort=False):
        lines += ["", f"{SPLIT_LABELS[split].capitalize()} (n = {part.n.iloc[0]} embeddings)", "",
                  f"{'Condition':<34}{'Mean':>10}{'Std':>10}{'Centred':>12}{'Std':>10}", thin]
        lines += [f"{name_of(row.condition):<34}{row.raw_mean:>10.4f}{row.raw_std:>10.4f}"
                  f"{row.centred_mean:>12.4f}{row.centred_std:>10.4f}"
                  for row in part.itertuples()]
        lines += [thin]
    lines += ["", "IMPROVEMENT ANALYSIS", "raw and centred difference; 95 % interval of the "
              "centred one; p after Holm's correction"]
    rows = verification.improvements.merge(verification.comparisons, on=["split", "over"])
    for row in rows.itertuples():
        tested = f"[{row.low:7.4f}, {row.high:7.4f}]  {p_words(row.p_holm)}" \
            if np.isfinite(row.p_holm) else "too few frames for a test"
        mark = "✓" if row.p_holm < 0.05 else "✗"
        lines += [f"{row.split:<6}over {name_of(row.over).lower():<27}{row.raw:>8.4f}"
                  f"{row.centred:>9.4f}  {mark} {tested}"]
    for row in verification.alignment.itertuples():
        lines += [f"{row.split:<6}in time: correlation {row.observed:.3f} with what changes, "
                  f"{p_words(row.p)} of {row.shifts} shifts"]
    lines += ["", f"Overall Quality: {verdict['quality'].upper()} by raw cosine "
                  f"({verdict['all_similarity']:.4f}: {verdict['quality_meaning']})"]
    if "gap" in verdict:
        lines += [f"Train-validation gap: {verdict['gap']:.4f}, {verdict['gap_band'].lower()} "
                  f"({verdict['gap_meaning']})",
                  f"Skill against the constant: {verdict['train_skill']:.4f} on training, "
                  f"{verdict['val_skill']:.4f} on held-out frames"]
    return "\n".join(lines + [*textwrap.wrap(verdict["honest"], 78), wide, ""])


def p_words(p: float) -> str:
    """A p-value as a text gives it: "p = 0.023", "p < 0.0001"."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def write_report(verification: Verification, folder, name: str = "verification") -> list[Path]:
    """Write NAME.csv (the table), NAME.json (everything but the scores) and NAME.txt.

    Returns:
        The three paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("csv", "json", "txt")]
    verification.table.to_csv(paths[0], index=False)
    content = {"teacher_label": verification.teacher_label, "source": verification.source,
               "seed": verification.seed, "verdict": verification.verdict}
    for part in ("table", "improvements", "comparisons", "alignment", "retrieval"):
        rows = getattr(verification, part).astype(object)
        content[part] = rows.where(rows.notna(), None).to_dict("records")
    paths[1].write_text(json.dumps(content, indent=2, allow_nan=False, default=_plain) + "\n",
                        encoding="utf-8")
    paths[2].write_text(report_text(verification), encoding="utf-8")
    return paths


def _plain(value):
    return value.item()  # numpy scalars
