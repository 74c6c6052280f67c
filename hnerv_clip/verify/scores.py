"""Is what the CLIP head learned real? The verification study: measures and their intervals.

Pure functions on arrays: predicted p and teacher g, unit vectors [T, P, D]. A raw cosine is high
for any prediction, because the embeddings of one video share most of their direction; so beside it
(`clip_similarity`) every condition is measured after the mean of the training frames' teacher
embeddings is subtracted (`clip_centred`), and compared with what needs no learning (`baselines`).
The verdict is that of `verdict`, from held-out frames alone. No model and no teacher is run here:
`run` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from hnerv_clip.metrics import centred_cosine, check_pair, cosine, skill
from hnerv_clip.verify.baselines import conditions, control_cosines
from hnerv_clip.verify.cka import cka_without_frames, debiased_cka
from hnerv_clip.verify.evidence import Evidence, collect_evidence
from hnerv_clip.verify.retrieval import retrieval_ranks, retrieval_summary
from hnerv_clip.verify.time_series import (
    MIN_FRAMES,
    Interval,
    mean_interval,
    median_interval,
    smooth_interval,
)
from hnerv_clip.verify.verdict import CONDITIONS, CONTROLS, Answer, judge
from hnerv_clip.verify.zero_shot import score_words, word_agreement

SPLIT_LABELS = {"train": "training frames", "held_out": "held-out frames"}
# Measures of `Verification.measures` → how a table names them.
MEASURES = {
    "clip_similarity": "raw cosine", "clip_centred": "centred cosine", "skill": "skill",
    "r1": "R@1", "r5": "R@5", "median_rank": "median rank", "r1_near": "R@1 near",
    "r5_near": "R@5 near", "median_rank_near": "median rank near", "cka": "CKA",
    "text_rank": "rank correlation", "text_top20": "top 20 found", "label_top1": "same label",
}
MIN_EFFECTIVE = 2  # independent frames; with fewer no interval is given
CKA_ROWS = 4000  # patches up to which a CKA gets an interval, which needs a matrix of their square
SOURCES = {
    "encoder": "held-out frames go through the encoder: the model sees the frame it is asked about",
    "interpolated": "held-out frames are predicted: their per-frame embedding (the decoder's "
                    "input) is interpolated between those of the training frames on either side",
    "coordinates": "held-out frames are predicted: the model sees coordinates alone",
}


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify_embeddings`. Tables have a column `split`, train or held_out.

    predicted: [T, P, D], what was verified.
    evidence: of the held-out frames, see `evidence.Evidence`; None without any.
    answers: what follows from it, see `verdict.judge`.
    scores: a row per condition, frame and patch, with `clip_similarity` and `clip_centred`; of a
        control, one draw.
    table: a row per split and condition: mean and standard deviation of both and `skill` against
        the constant, and n. Of the controls, over `draws` draws, raw alone.
    improvements: a row per split and other condition: learned minus it in raw cosine, its interval
        low to high, p (one-sided, uncorrected), effective_size (independent frames that tell as
        much), and `significant` (p below 5%). No answer
        depends on these.
    measures: a row per condition and measure (a key of `MEASURES`): value, its 95% interval low
        to high, standard_error and freedom of Student's t, the value that chance gives (NaN where
        that is not known), and frames. Without an interval where frames are fewer than 8 or
        worth fewer than `MIN_EFFECTIVE` independent ones, where they do not vary, and for a CKA
        other than the network's or of more than `CKA_ROWS` patches.
    candidates, near: how many patches retrieval looks among, and its tolerance in frames.
    source: where held-out embeddings came from, a key of `SOURCES` or "".
    draws, seed: of the controls.
    predictor: what was verified, in the words of a sentence.
    """

    predicted: np.ndarray
    evidence: Evidence | None
    answers: list[Answer]
    scores: pd.DataFrame
    table: pd.DataFrame
    improvements: pd.DataFrame
    measures: pd.DataFrame
    candidates: int
    near: int
    teacher_label: str
    source: str
    draws: int
    seed: int
    predictor: str = "the network"


def verify_embeddings(predicted: npt.ArrayLike, teacher: npt.ArrayLike, train_frames: npt.ArrayLike,
                      held_out_frames: npt.ArrayLike, *, seed: int = 0, source: str = "",
                      teacher_label: str = "", others: dict | None = None, near: int = 2,
                      texts: np.ndarray | None = None, draws: int = 200,
                      predictor: str = "the network") -> Verification:
    """Measure the predicted embeddings against controls and baselines.

    Args:
        predicted, teacher: [T, P, D] unit vectors of the same frames and patches.
        train_frames, held_out_frames: frame numbers, or boolean masks [T]. Held-out frames may be
            none (a split such as 1_1_1).
        seed: of the random embeddings and the shuffles, on which no answer depends.
        source: how held-out frames were predicted, a key of `SOURCES` or "".
        teacher_label: the teacher in words, for the report.
        others: more baselines, {name: [T, P, D] unit vectors}, or {name: (frames, [N, P, D])} for
            one that answers only those frames; a part that it does not cover goes without it.
            The verdict reads `side_file` and `decoded`.
        near: frames of tolerance in the near retrieval, see `retrieval.retrieval_ranks`.
        texts: [K, D] vectors of the teacher's text space; with them the measures include the
            agreement with the teacher in ranking and labeling patches by text.
        draws: of each control, of which the summary gives the mean.
        predictor: what predicted them, in the words of a sentence.
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
    scores, measures, table, improvements, evidence = [], [], [], [], None
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
            if condition in CONTROLS:
                continue
            raw, centred = (scores[-1][name].to_numpy().reshape(target.shape[:2])
                            for name in ("clip_similarity", "clip_centred"))
            table.append(where | _summary(raw, constant) | {
                "clip_centred_mean": centred.mean(), "clip_centred_std": centred.std(ddof=1)})
            measures += [where | row for row in
                         _measure_rows(answer, teacher, frames, raw, centred, constant, near,
                                       spread=condition == "learned")]
            if words is not None:
                measures += [where | row for row in _word_rows(
                    score_words(answer, texts, centre=centre), words)]
            if condition == "learned":
                own = raw
            else:
                improvements.append(_improvement(split, condition, own - raw))
        for control, drawn in control_cosines(predicted[frames], target, rng, draws).items():
            table.append({"split": split, "condition": control, **_summary(drawn, constant)})
            improvements.append(_improvement(split, control, own - drawn.mean(axis=0)))
        if split == "held_out":
            evidence = collect_evidence({name: answer for name, answer in answers.items()
                                         if name not in CONTROLS}, target, frames)
    order = {name: i for i, name in enumerate([*CONDITIONS, *others])}
    table = pd.DataFrame(table).sort_values(
        ["split", "condition"], kind="stable", ignore_index=True,
        key=lambda x: x.map(order) if x.name == "condition" else x == "held_out")
    return Verification(
        predicted=predicted, evidence=evidence, answers=judge(evidence) if evidence else [],
        scores=pd.concat(scores, ignore_index=True), table=table,
        improvements=pd.DataFrame(improvements), measures=pd.DataFrame(measures),
        candidates=teacher.shape[0] * teacher.shape[1], near=near, teacher_label=teacher_label,
        source=source, draws=draws, seed=seed, predictor=predictor)


def _summary(raw, constant):
    """Mean, spread and skill of raw cosines [..., N, P]."""
    return {"clip_similarity_mean": raw.mean(), "clip_similarity_std": raw.std(ddof=1),
            "skill": float(skill(raw.mean(), constant.mean())), "n": raw.shape[-2] * raw.shape[-1]}


def _improvement(split, over, difference):
    """A row of `Verification.improvements` from differences [N, P]."""
    series = difference.mean(axis=1)
    row = {"split": split, "over": over, "clip_similarity": series.mean(), "low": np.nan,
           "high": np.nan, "p": np.nan, "effective_size": np.nan, "significant": False}
    if len(series) < MIN_FRAMES:
        return row
    found = mean_interval(series)
    return row | {"low": found.low, "high": found.high, "p": found.p,
                  "effective_size": found.effective_size, "significant": found.p < 0.05}


def frame_indices(frames: npt.ArrayLike, frame_count: int, name: str = "frames") -> np.ndarray:
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
    if name in CONDITIONS and name not in ("side_file", "decoded"):
        raise ValueError(f"{name!r} is a condition of the study; choose another name")
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


def _measure_rows(answer, teacher, frames, raw, centred, constant, near, *, spread):
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
    rows.append(_cka_row(answer, teacher[frames], spread) | {"chance": 0.0})
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
    found = interval()
    if found.effective_size < MIN_EFFECTIVE:
        return row
    return row | {"low": found.low, "high": found.high, "freedom": found.freedom,
                  "standard_error": found.standard_error}


def _cka_row(answer, target, spread):
    flat = [x.reshape(-1, x.shape[-1]) for x in (answer, target)]
    if len(flat[0]) < 4 or min(np.ptp(x, axis=0).max() for x in flat) < 1e-5:
        return _measured("cka", np.nan, np.zeros(len(target)), None)
    if not spread or len(target) < MIN_FRAMES or len(flat[0]) > CKA_ROWS:
        return _measured("cka", debiased_cka(*flat), np.zeros(len(target)), None)
    value, without = cka_without_frames(answer, target)
    if not np.isfinite(without).all():
        return _measured("cka", value, np.zeros(len(target)), None)
    return _measured("cka", value, without, lambda: smooth_interval(value, without))
