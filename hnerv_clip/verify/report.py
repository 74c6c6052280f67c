"""A verification as text and as tables for reading."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hnerv_clip.labels import gap_band, similarity_band
from hnerv_clip.verify.scores import MEASURES, SOURCES, SPLIT_LABELS, Verification
from hnerv_clip.verify.verdict import KNOWS, QUESTIONS, Answer, name_of, p_words

if TYPE_CHECKING:
    from hnerv_clip.inference import Run

WIDTH = 78
# What a question is about: a baseline that is to be beaten, or what is to be known
BASELINES = {"constant": "a constant", "neighbour": "the nearest training frame",
             "between": "interpolating the teacher", "side_file": "a side file of equal bytes",
             "decoded": "the teacher on the decoded frame"}
KNOWLEDGE = {"when": "when things happen", "where": "where"}

NO_VERDICT = ("No verdict: no frame was held out, and training frames only show what was "
              "memorised. Use data_split=\"4_5_5\".")


def short_verdict(given: Mapping[str, str], start: str) -> str:
    """The verdict in one sentence: on the two baselines that matter most, and how often yes.

    Args:
        given: {question: answer}; an answer other than yes or no counts as not shown.
        start: which frames and what predicted them, "on held-out frames the network".
    """
    asked = {"yes": [], "no": [], "open": []}
    for question in ("decoded", "neighbour"):
        answer = given.get(question)
        if answer is not None:
            asked[answer if answer in ("yes", "no") else "open"].append(BASELINES[question])
    parts = [f"{words} {_join(asked[answer], last)}" for answer, words, last in (
        ("yes", "beats", "and"), ("no", "is no better than", "or"),
        ("open", "is not shown to beat", "or")) if asked[answer]]
    between = ", but " if asked["yes"] else ", and "
    count = list(given.values()).count("yes")
    so = "Yes" if count == len(given) else "In part" if count else "That is not shown"
    return f"{so}: {start} {between.join(parts)} (yes to {count} of {len(given)} questions)."


def verdict_sentence(answers: list[Answer], source: str = "", predictor: str = "the network"
                     ) -> str:
    """The verdict in plain sentences.

    Args:
        predictor: what gave the answers, see `Verification.predictor`.
    """
    if not answers:
        return NO_VERDICT
    parts = {kind: [answer.question for answer in answers if answer.answer == kind]
             for kind in ("yes", "no", "cannot tell")}
    start, said = f"On {_frames(source)} {predictor}", []
    if parts["yes"]:
        said.append(f"{start} {join_claims(parts['yes'])}.")
    if parts["no"]:
        start = "It" if said else start
        said.append(f"{start} {join_denials(parts['no'])}.")
    if parts["cannot tell"]:
        frames = min(answer.frames for answer in answers)
        said.append(f"{frames} frames cannot tell whether it "
                    f"{join_claims(parts['cannot tell'], 'or')}.")
    return " ".join(said)


def _frames(source):
    return "frames that it was shown but not trained on" if source == "encoder" \
        else "held-out frames"


def verdict_words(verification: Verification) -> str:
    """The verdict for a page: one short sentence in bold, then all answers."""
    answers, source, predictor = (verification.answers, verification.source,
                                  verification.predictor)
    if not answers:
        return f"**{NO_VERDICT}**"
    given = {answer.question: answer.answer for answer in answers}
    short = short_verdict(given, f"on {_frames(source)} {predictor}")
    return f"**{short}** {verdict_sentence(answers, source, predictor)}"


def setting_words(run: Run) -> str:
    """What was trained for how long, and whether the frames were made smaller for it."""
    config, video = run.config, run.dataset.video
    height, width = video.frame_hw
    small = config.video.resize_list is not None or config.video.frame_stride > 1
    text = (f"{len(video.frames)} frames of {height}×{width} of {video.name}, "
            f"{config.model.modelsize:g} million stored values, {config.train.epochs} epochs, seed "
            f"{config.train.seed}")
    return f"**This is a reduced setting, made for a CPU:** {text}." if small \
        else f"Setting: {text}."


def join_claims(questions: list[str], last: str = "and") -> str:
    """What is claimed: "beats a constant and knows when things happen"."""
    return _join([f"beats {BASELINES[x]}" if x in BASELINES else f"knows {KNOWLEDGE[x]}"
                  for x in questions], last)


def join_denials(questions: list[str]) -> str:
    """What is denied, with "is no better than" said once."""
    said = [f"does not know {KNOWLEDGE[x]}" for x in questions if x in KNOWLEDGE]
    beaten = [BASELINES[x] for x in questions if x in BASELINES]
    return _join(said + ([f"is no better than {_join(beaten, 'or')}"] if beaten else []))


def _join(words, last="and"):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def answer_words(answer: Answer) -> str:
    """The evidence of one answer: "net wins 0.61 [0.55, 0.67], p < 0.0001".

    Before it, where a baseline has an error, how many times as large the error is here.
    """
    what = "correlation of changes" if answer.test in KNOWS else "net wins"
    if answer.test == "where":
        what += " beyond other positions"
    found = f" {answer.estimate:.2f}" if np.isfinite(answer.estimate) else ""
    found += f" [{answer.low:.2f}, {answer.high:.2f}], {p_words(answer.p_holm)}" \
        if np.isfinite(answer.p) else ": too few frames for a test"
    ratio = f"its error is {answer.error_ratio:.2f} times the baseline's; " \
        if np.isfinite(answer.error_ratio) else ""
    same = "; equal within the margin" if answer.equivalent else ""
    return f"{ratio}{what}{found}{same}"


TESTS = {"when": "correlation of changes",
         "where": "correlation of changes beyond other positions"}  # else net wins over a baseline


def answer_rows(answers: list[Answer]) -> pd.DataFrame:
    """A row per question for reading: question, answer, evidence, frames."""
    return pd.DataFrame([{
        "question": QUESTIONS[answer.question][0], "answer": answer.answer,
        "evidence": answer_words(answer),
        "decided by": TESTS.get(answer.test) or name_of(answer.test).lower(),
        "frames": answer.frames,
        "effective sample size": f"{answer.effective_size:.0f}"
        if np.isfinite(answer.effective_size) else ""} for answer in answers])


def report_text(verification: Verification) -> str:
    """The verification as text: the verdict, then the summary in the original format."""
    wide, thin = "=" * WIDTH, "-" * WIDTH
    lines = [wide, "CLIP LEARNING VERIFICATION RESULTS", wide]
    lines += [f"Teacher: {verification.teacher_label}"] if verification.teacher_label else []
    lines += [f"Source: {SOURCES[verification.source]}"] if verification.source else []
    lines += ["", *textwrap.wrap(verdict_sentence(
        verification.answers, verification.source, verification.predictor), WIDTH), ""]
    for answer in verification.answers:
        lines += [f"{QUESTIONS[answer.question][0]:<52}{answer.answer.upper()}",
                  f"    {answer_words(answer)}"]
    splits = list(dict.fromkeys(verification.table.split))[::-1]  # held-out frames first
    table = verification.table.set_index(["condition", "split"])
    head = "".join(f"{name:>24}" for name in map(_split_head, splits))
    columns = f"{'Mean':>14}{'Std':>10}" * len(splits)
    lines += ["", f"{'':<30}{head}", f"{'Condition':<30}{columns}", thin]
    for condition in dict.fromkeys(verification.table.condition):
        cells = [table.loc[(condition, split)] if (condition, split) in table.index else None
                 for split in splits]
        lines += [f"{name_of(condition):<30}" + "".join(
            f"{'':>24}" if cell is None else
            f"{cell.clip_similarity_mean:>14.4f}{cell.clip_similarity_std:>10.4f}"
            for cell in cells)]
    lines += [thin, "", "IMPROVEMENT ANALYSIS" + (
        f" (controls: mean of {verification.draws} draws)")]
    for row in verification.improvements.itertuples():
        if row.over in ("random", "shuffled") and row.split == splits[0]:
            mark = "too few frames" if np.isnan(row.p) else \
                "✓ Significant" if row.significant else "✗ Not significant"
            if np.isfinite(row.p):
                mark += (f" ({p_words(row.p)}, effective sample size {row.effective_size:.1f} "
                         "frames)")
            words = f"Improvement over {row.over}:"
            lines += [f"{words:<31}{row.clip_similarity:>8.4f}  {mark}"]
    return "\n".join(lines + ["", *_quality(verification), wide, ""])


def _split_head(split):
    return {"train": "Training frames", "held_out": "Held-out frames"}[split]


def summary(verification: Verification) -> dict:
    """Means of raw and centered cosine and skill by split, quality in the original bands, gap."""
    rows = verification.table[verification.table.condition == "learned"].set_index("split")
    found = {f"{name}_{split}": float(rows[column][split]) for split in rows.index
             for name, column in (("clip_similarity", "clip_similarity_mean"),
                                  ("clip_centred", "clip_centred_mean"), ("skill", "skill"))}
    overall = float(np.average(rows.clip_similarity_mean, weights=rows.n))
    found |= {"clip_similarity_all": overall,
              **dict(zip(("quality", "quality_meaning"), similarity_band(overall)))}
    if "held_out" in rows.index:
        gap = found["clip_similarity_train"] - found["clip_similarity_held_out"]
        found |= {"gap": gap, **dict(zip(("gap_band", "gap_meaning"), gap_band(gap)))}
    return found


def _quality(verification):
    found = summary(verification)
    lines = [f"Overall Quality: {found['quality'].upper()} by raw cosine "
             f"({found['clip_similarity_all']:.4f}: {found['quality_meaning']})"]
    if "gap" in found:
        lines += [f"Train-validation gap: {found['gap']:.4f}, {found['gap_band'].lower()} "
                  f"({found['gap_meaning']})",
                  f"Centered cosine: {found['clip_centred_train']:.4f} on training, "
                  f"{found['clip_centred_held_out']:.4f} on held-out frames",
                  f"Skill against the constant: {found['skill_train']:.4f} on training, "
                  f"{found['skill_held_out']:.4f} on held-out frames"]
    return lines


def measure_table(measures: pd.DataFrame, names: Any = tuple(MEASURES)) -> pd.DataFrame:
    """Measures for reading: a row per part and condition, cells "value [low, high]"."""
    names = [name for name in names if name in set(measures.measure)]
    chosen = measures[measures.measure.isin(names)]
    cells = chosen.assign(cell=[
        "" if np.isnan(row.value) else _short(row.value) if np.isnan(row.low) else
        f"{_short(row.value)} [{_short(row.low)}, {_short(row.high)}]"
        for row in chosen.itertuples()])
    cells = cells.assign(frames=cells.split.map(SPLIT_LABELS), embeddings=[
        name_of(condition) for condition in cells.condition])
    table = cells.pivot_table(index=["frames", "embeddings"], columns="measure", values="cell",
                              aggfunc="first", sort=False)[names]
    return table.rename(columns=MEASURES).rename_axis(columns=None).reset_index()


def _short(value: float) -> str:
    """Three digits, without a power of ten where there are more of them, as in a rank."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
