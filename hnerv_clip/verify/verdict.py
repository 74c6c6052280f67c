"""Answers, each yes, no or cannot tell: what a prediction knows, and what it is better than.

**What is estimated.** For one video and one setting: the mean, over the moments of a long video of
which the frames at hand are a stretch, of net wins or of a change score (`evidence`), for a
network that did not train on the moment in question. With cross-fitting every frame of the video
counts once, by the run that held it out; with several seeds, by the mean over these.
**Why the interval is valid.** The mean of such a series is about normal. Its variance depends on
the autocorrelation, which some twenty frames hardly tell, so none is estimated: the variance is
averaged over all autocorrelations, each weighted by its likelihood, and Student's t has fewer
degrees of freedom the less these agree (`time_series`). `simulation` measures how often intervals
hold the truth, and how often each answer is a wrong yes. Intervals are for this video; for other
videos, videos are the units (`paired.compare_paired`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from hnerv_clip.verify.evidence import KNOWS, Evidence
from hnerv_clip.verify.time_series import MIN_FRAMES, Interval, holm, make_interval, mean_interval

MARGIN = 0.1  # net wins and scores smaller than this count as none: 45 to 55% of the patches
LEVEL = 0.05  # of the whole family, after Holm's correction

# Condition → how a table names it. The first four are those of the project's description.
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
    "side_file": "Side File of Equal Bytes",
    "decoded": "Teacher on Decoded Frame",
}
CONTROLS = ("random", "shuffled", "temporal", "spatial")

# Question → (how a report asks it, the tests that must all say yes). A test is a score of
# `evidence.KNOWS`, or the net wins over a condition.
QUESTIONS = {
    "constant": ("Does it beat a constant?", ("mean",)),
    "when": ("Does it know when?", ("when",)),
    "where": ("Does it know where?", ("where", "position")),
    "neighbour": ("Is it better than the nearest training frame?", ("neighbour",)),
    "between": ("Is it better than interpolating the teacher?", ("between",)),
    "side_file": ("Is it better than a side file of equal bytes?", ("side_file",)),
    "decoded": ("Is it better than the teacher on the decoded frame?", ("decoded",)),
}


@dataclass(frozen=True)
class Answer:
    """One question answered.

    answer: `yes` (p_holm below 5%, and not by small wins that cost more elsewhere: error_ratio
        below 1), `no` (below the margin, with 95% confidence), else `cannot tell`.
    test: which of the question's tests decides, the one of the largest p.
    estimate, low, high: its mean with the 95% interval; p and p_holm: one-sided, of 0 or less.
    equivalent: within the margin on both sides, see `time_series.Interval.within`.
    error_ratio: error of the network over that of the baseline, NaN for a score.
    frames, effective_size: how many, and how many independent ones tell as much.
    """

    question: str
    answer: str
    test: str
    estimate: float
    low: float
    high: float
    p: float
    p_holm: float
    equivalent: bool
    error_ratio: float
    frames: int
    effective_size: float


def judge(evidence: Evidence) -> list[Answer]:
    """Answer every question that the evidence bears on; Holm's family is these questions.

    A question of two tests needs both, so its p is the larger one (intersection-union, Berger
    1982). With fewer than 8 frames every answer is `cannot tell`, without p.

    Args:
        evidence: see `evidence.collect_evidence`, of one run or pooled.
    """
    frames = evidence.frames.sort_values("frame")
    found = []
    for question, (_, tests) in QUESTIONS.items():
        if all(test in KNOWS or f"wins_{test}" in frames for test in tests):
            results = {test: _interval(evidence, frames, test) for test in tests}
            found.append(_answer(question, results, frames))
    asked = [answer for answer in found if np.isfinite(answer["p"])]
    for answer, p in zip(asked, holm([answer["p"] for answer in asked])):
        answer["p_holm"] = float(p)
        if p < LEVEL and not answer["error_ratio"] >= 1:
            answer["answer"] = "yes"
    return [Answer(**answer) for answer in found]


def _interval(evidence, frames, test) -> Interval | None:
    """The mean of what a test is about, None with too few frames."""
    if len(frames) < MIN_FRAMES:
        return None
    if test not in KNOWS:
        wins, count = frames[f"wins_{test}"], len(frames)
        lost = 1 + abs(wins.mean())  # where all frames are alike, one more might be the opposite
        return mean_interval(wins, least_variance=lost ** 2 * count / (count + 1) ** 2)
    own = evidence.knows[evidence.knows.test == test]
    if own.empty:
        return None
    # Runs of one video are not independent: the standard error of their mean is at most the mean of
    # theirs, whatever their dependence (Minkowski), so that is taken.
    return make_interval(own.estimate.mean(), own.standard_error.mean(), own.freedom.min(),
                         count=len(frames))


def _answer(question, results: dict[str, Interval | None], frames):
    if None in results.values():
        test, found, below = next(iter(results)), None, False
    else:
        test = max(results, key=lambda name: results[name].p)
        found, below = results[test], min(x.p_below(MARGIN) for x in results.values()) < LEVEL
    nan = float("nan")
    values = (found.mean, found.low, found.high, found.p, found.effective_size) if found else \
        (nan,) * 5
    return {"question": question, "answer": "no" if below else "cannot tell", "test": test,
            **dict(zip(("estimate", "low", "high", "p", "effective_size"), values)),
            "p_holm": nan, "equivalent": bool(found and found.within(MARGIN, LEVEL)),
            "error_ratio": nan if test in KNOWS else float(
                frames.error_learned.mean() / max(frames[f"error_{test}"].mean(), 1e-12)),
            "frames": len(frames)}


def answer_table(answers: list[Answer]) -> pd.DataFrame:
    """A row per `Answer`, with its fields as columns."""
    return pd.DataFrame([asdict(answer) for answer in answers])


def name_of(condition: str) -> str:
    """A condition as a table names it; one that the caller added is its own name."""
    return CONDITIONS.get(condition, condition)


def p_words(p: float) -> str:
    """A p-value as a text gives it: "p = 0.023", "p < 0.0001"."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
