"""Is what the CLIP head learnt real? The study of the project's description, and an honest reading.

Pure functions on arrays: predicted p and teacher g, unit vectors [T, P, D]. A raw cosine flatters,
because the embeddings of one video share most of their direction; so beside it (`clip_similarity`)
every condition is measured after the mean of the training frames' teacher embeddings is taken off
(`clip_centred`), and stands beside what needs no learning (`controls`). No model and no teacher is
touched here: trained runs are put to it by `verify_runs`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hnerv_clip.controls import conditions
from hnerv_clip.measures import (
    centred_cosine,
    check_pair,
    cka_without_frames,
    cosine,
    debiased_cka,
    gap_band,
    retrieval_ranks,
    retrieval_summary,
    score_words,
    similarity_band,
    skill,
    word_agreement,
)
from hnerv_clip.statistics import (
    MIN_FRAMES,
    Interval,
    ShiftTest,
    holm,
    mean_interval,
    median_interval,
    shift_test,
    smooth_interval,
)

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
SPLIT_LABELS = {"train": "training frames", "held_out": "held-out frames"}
# Measures of `Verification.measures` → how a table names them.
MEASURES = {
    "clip_similarity": "raw cosine", "clip_centred": "centred cosine", "skill": "skill",
    "r1": "R@1", "r5": "R@5", "median_rank": "median rank", "r1_near": "R@1 near",
    "r5_near": "R@5 near", "median_rank_near": "median rank near", "cka": "CKA",
    "text_rank": "rank correlation", "text_top20": "top 20 found", "label_top1": "same label",
}
# The values that a measure can take, where an interval ends.
LIMITS = {**dict.fromkeys(("clip_similarity", "clip_centred", "text_rank"), (-1, 1)),
          **dict.fromkeys(("skill", "cka"), (-np.inf, 1)),
          **dict.fromkeys(("r1", "r5", "r1_near", "r5_near", "text_top20", "label_top1"),
                          (0, 1)),
          **dict.fromkeys(("median_rank", "median_rank_near"), (1, np.inf))}
CKA_ROWS = 4000  # patches up to which a CKA gets an interval, which needs a matrix of their square
SOURCES = {
    "encoder": "held-out frames go through the encoder: the model sees the frame it is asked about",
    "interpolated": "held-out frames are predicted: their embedding is interpolated from the "
                    "training frames on either side",
    "coordinates": "held-out frames are predicted: the model sees coordinates alone",
}


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify_embeddings`. Tables have a column `split`, train or held_out.

    predicted: [T, P, D], what was verified.
    scores: a row per condition, frame and patch, with `clip_similarity` and `clip_centred`.
    table: a row per condition: mean and standard deviation of both, and `n`.
    improvements: a row per other condition: learned minus it, in both, and `clear`:
        whether the raw improvement exceeds twice the other's standard deviation (the user's rule;
        a rule of thumb, not a test).
    comparisons: the same with intervals and tests, see `compare`.
    shift_tests: by split, whether the prediction knows when things happen
        (`statistics.shift_test`); `alignment` is the same as a table.
    measures: a row per condition and measure (a key of `MEASURES`): value, its 95 % interval low
        to high, standard_error and freedom of Student's t, the value that chance gives (NaN where
        that is not known), and frames. Without an interval where frames are fewer than 8, where
        they do not vary, and for a CKA of more than `CKA_ROWS` patches.
    candidates, near: how many patches retrieval looks among, and its tolerance in frames.
    verdict: what `judge` says.
    source: where held-out embeddings came from, a key of `SOURCES` or "".
    """

    predicted: np.ndarray
    scores: pd.DataFrame
    table: pd.DataFrame
    improvements: pd.DataFrame
    comparisons: pd.DataFrame
    shift_tests: dict[str, ShiftTest]
    measures: pd.DataFrame
    candidates: int
    near: int
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


def verify_embeddings(predicted, teacher, train_frames, held_out_frames, *, seed: int = 0,
                      source: str = "", teacher_label: str = "", others: dict | None = None,
                      near: int = 2, texts: np.ndarray | None = None) -> Verification:
    """Measure the predicted embeddings against controls and baselines.

    Args:
        predicted, teacher: [T, P, D] unit vectors of the same frames and patches.
        train_frames, held_out_frames: frame numbers, or boolean masks [T]. Held-out frames may be
            none (a split such as 1_1_1).
        seed: of the random embeddings and the shuffles.
        source: how held-out frames were predicted, a key of `SOURCES` or "".
        teacher_label: the teacher in words, for the report.
        others: more baselines, {name: [T, P, D] unit vectors}, or {name: (frames, [N, P, D])} for
            one that answers only those frames; a part that it does not cover goes without it.
        near: frames of tolerance in the near retrieval, see `measures.retrieval_ranks`.
        texts: [K, D] vectors of the teacher's text space; with them the measures include how far
            patches are ranked by each text, and labelled, as the teacher does.
    Raises:
        ValueError: shapes differ, NaN, another teacher's size, a frame in both parts, or a part
            of one frame, for which no shuffle in time exists.
    """
    predicted, teacher = check_pair(predicted, teacher)
    others = {name: _whole(answer, teacher, name) for name, answer in (others or {}).items()}
    parts = _parts(train_frames, held_out_frames, len(teacher))
    if source and source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; use one of {', '.join(SOURCES)}")
    centre = teacher[parts["train"]].mean(axis=(0, 1))
    rng = np.random.default_rng(seed)
    scores, shift_tests, measures = [], {}, []
    for split, frames in parts.items():
        target = teacher[frames]
        answers = conditions(predicted, teacher, parts["train"], frames, rng)
        answers |= {name: answer[frames] for name, (known, answer) in others.items()
                    if np.isin(frames, known).all()}
        constant = cosine(answers["mean"], target)
        words = score_words(target, texts, centre=centre) if texts is not None else None
        for condition, answer in answers.items():
            where = {"split": split, "condition": condition}
            scores.append(_score_rows(where, frames, answer, target, centre))
            cosines = [scores[-1][name].to_numpy().reshape(target.shape[:2])
                       for name in ("clip_similarity", "clip_centred")]
            measures += [where | row for row in
                         _measure_rows(answer, teacher, frames, *cosines, constant, near)]
            if words is not None:
                measures += [where | row for row in _word_rows(
                    score_words(answer, texts, centre=centre), words)]
        shift_tests[split] = shift_test(predicted[frames], target)
    scores = pd.concat(scores, ignore_index=True)
    table, comparisons = summarise_scores(scores), compare(scores)
    return Verification(
        predicted=predicted, scores=scores, table=table, improvements=improvement_table(table),
        comparisons=comparisons, shift_tests=shift_tests, measures=pd.DataFrame(measures),
        candidates=teacher.shape[0] * teacher.shape[1], near=near,
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


def _parts(train_frames, held_out_frames, frame_count):
    """{split: frames} of the parts that exist, checked."""
    parts = {"train": frame_indices(train_frames, frame_count, "training frames"),
             "held_out": frame_indices(held_out_frames, frame_count, "held-out frames")}
    both = np.intersect1d(parts["train"], parts["held_out"])
    if len(both):
        raise ValueError(f"frame {both[0]} is in the training and the held-out part; "
                         "a frame belongs to one")
    for split, frames in parts.items():
        if len(frames) < 2 and not (split == "held_out" and not len(frames)):
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
        "clip_similarity": cosine(answer, target).ravel(),
        "clip_centred": centred_cosine(answer, target, centre).ravel(),
    })


def _measure_rows(answer, teacher, frames, raw, centred, constant, near):
    """A row per measure of one condition; raw, centred and constant [N, P] are cosines."""
    ranks = retrieval_ranks(answer, teacher, frames, near=near)
    summary = retrieval_summary(ranks)
    away, reference = ((1 - x).mean(axis=1) for x in (raw, constant))  # [N], distance from 1
    rest = np.maximum(reference.sum() - reference, 1e-12)
    rows = [
        _measured("clip_similarity", raw.mean(), raw, lambda: mean_interval(raw.mean(axis=1))),
        _measured("clip_centred", centred.mean(), centred,
                  lambda: mean_interval(centred.mean(axis=1))),
        _measured("skill", skill(raw.mean(), constant.mean()), raw, lambda: smooth_interval(
            skill(raw.mean(), constant.mean()), 1 - (away.sum() - away) / rest)),
    ]
    for near_by in ("", "_near"):
        found = ranks[f"rank{near_by}"].to_numpy().reshape(len(frames), -1)
        for top in (1, 5):
            hits, name = (found <= top).mean(axis=1), f"r{top}{near_by}"
            row = _measured(name, summary[name], hits, lambda hits=hits: mean_interval(hits))
            rows.append(row | {"chance": summary[f"{name}_chance"]})
        name = f"median_rank{near_by}"
        rows.append(_measured(name, summary[name], found,
                              lambda found=found: median_interval(found)))
    rows.append(_cka_row(answer, teacher[frames]) | {"chance": 0.0})
    return rows


def _word_rows(own, teacher):
    """A row per measure of agreement in words; chance as for answers of these shares at random."""
    shares = [np.bincount(x.labels.ravel(), minlength=len(x.top)) / x.labels.size
              for x in (own, teacher)]
    chance = {"text_rank": 0.0, "text_top20": own.top_k / own.labels.size,
              "label_top1": float(shares[0] @ shares[1])}
    rows = []
    for measure, (value, series) in word_agreement(own, teacher).items():
        interval = smooth_interval if measure == "text_rank" else lambda _, shares: mean_interval(
            shares)
        known = np.isfinite(series).all() and np.isfinite(value)
        row = _measured(measure, value, series if known else np.empty(0),
                        lambda i=interval, v=value, s=series: i(v, s))
        rows.append(row | {"chance": chance[measure], "frames": len(own.labels)})
    return rows


def _measured(measure: str, value: float, series, interval: Callable[[], Interval]) -> dict:
    """One measure's row; the interval is asked for where frames are enough and vary."""
    row = {"measure": measure, "value": float(value), "low": np.nan, "high": np.nan,
           "standard_error": np.nan, "freedom": np.nan, "chance": np.nan, "frames": len(series)}
    if len(series) < MIN_FRAMES or np.ptp(series) < 1e-9:
        return row
    found, (low, high) = interval(), LIMITS[measure]
    return row | {"low": max(found.low, low), "high": min(found.high, high),
                  "standard_error": found.standard_error, "freedom": found.freedom}


def _cka_row(answer, target):
    flat = [x.reshape(-1, x.shape[-1]) for x in (answer, target)]
    if len(flat[0]) < 4 or min(np.ptp(x, axis=0).max() for x in flat) < 1e-5:
        return _measured("cka", np.nan, np.zeros(len(target)), None)
    if len(target) < MIN_FRAMES or len(flat[0]) > CKA_ROWS:
        return _measured("cka", debiased_cka(*flat), np.zeros(len(target)), None)
    value, without = cka_without_frames(answer, target)
    if not np.isfinite(without).all():
        return _measured("cka", value, np.zeros(len(target)), None)
    return _measured("cka", value, without, lambda: smooth_interval(value, without))


def measure_table(measures: pd.DataFrame, names=tuple(MEASURES)) -> pd.DataFrame:
    """Measures for reading: a row per split and condition, cells "value [low, high]"."""
    names = [name for name in names if name in set(measures.measure)]
    chosen = measures[measures.measure.isin(names)]
    cells = chosen.assign(cell=[
        "" if np.isnan(row.value) else f"{row.value:.3g}" if np.isnan(row.low) else
        f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]" for row in chosen.itertuples()])
    table = cells.pivot_table(index=["split", "condition"], columns="measure", values="cell",
                              aggfunc="first", sort=False)[names]
    return table.rename(columns=MEASURES, index=name_of).rename_axis(columns=None).reset_index()


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


def comparison_table(comparisons: pd.DataFrame) -> pd.DataFrame:
    """`compare` for reading: differences, intervals, effect sizes, p after Holm's correction."""
    return pd.DataFrame([{
        "split": row.split, "over": name_of(row.over),
        "difference": f"{row.difference:.3f}" + (
            f" [{row.low:.3f}, {row.high:.3f}]" if np.isfinite(row.low) else ""),
        "effect size": f"{row.effect_size:.2f}", "frames": row.frames,
        "better": f"{row.share_better:.0%}",
        "independent frames": f"{max(row.independent, 1):.0f}" if np.isfinite(row.independent)
        else "",
        "p (Holm)": p_words(row.p_holm).removeprefix("p ").removeprefix("= ")
        if np.isfinite(row.p_holm) else "too few frames"} for row in comparisons.itertuples()])


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
        lines += [f"{name_of(row.condition):<34}{row.clip_similarity_mean:>10.4f}"
                  f"{row.clip_similarity_std:>10.4f}{row.clip_centred_mean:>12.4f}{row.clip_centred_std:>10.4f}"
                  for row in part.itertuples()]
        lines += [thin]
    lines += ["", "IMPROVEMENT ANALYSIS", "raw and centred difference; 95 % interval of the "
              "centred one; p after Holm's correction"]
    rows = verification.improvements.merge(verification.comparisons, on=["split", "over"])
    for row in rows.itertuples():
        tested = f"[{row.low:7.4f}, {row.high:7.4f}]  {p_words(row.p_holm)}" \
            if np.isfinite(row.p_holm) else "too few frames for a test"
        mark = "✓" if row.p_holm < 0.05 else "✗"
        lines += [f"{row.split:<9}over {name_of(row.over).lower():<26}{row.clip_similarity:>8.4f}"
                  f"{row.clip_centred:>9.4f}  {mark} {tested}"]
    for row in verification.alignment.itertuples():
        lines += [f"{row.split:<9}in time: correlation {row.observed:.3f} with what changes, "
                  f"{p_words(row.p)} of {row.shifts} shifts"]
    lines += ["", f"Overall Quality: {verdict['quality'].upper()} by raw cosine "
                  f"({verdict['clip_similarity_all']:.4f}: {verdict['quality_meaning']})"]
    if "gap" in verdict:
        lines += [f"Train-validation gap: {verdict['gap']:.4f}, {verdict['gap_band'].lower()} "
                  f"({verdict['gap_meaning']})",
                  f"Skill against the constant: {verdict['skill_train']:.4f} on training, "
                  f"{verdict['skill_held_out']:.4f} on held-out frames"]
    return "\n".join(lines + [*textwrap.wrap(verdict["honest"], 78), wide, ""])


def p_words(p: float) -> str:
    """A p-value as a text gives it: "p = 0.023", "p < 0.0001"."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
