"""What cross-fitted verifications and simulated data say, as sentences and rows of a page.

`verification_cross_fit.json` holds runs, the seven answers of every video (phases `all`, and each
phase by itself) and mean cosines; `verification_calibration.json` the tables of
`verify.simulation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hnerv_clip.book.markdown import Markup, escape, join_words
from hnerv_clip.book.results import ResultsError, read_json
from hnerv_clip.runs.provenance import commit_words
from hnerv_clip.verify.report import answer_words, join_claims, join_denials, short_verdict
from hnerv_clip.verify.simulation import DESIGNS, PLANTED, SERIES
from hnerv_clip.verify.verdict import QUESTIONS, Answer, name_of

FREE = ("neighbour", "between", "side_file")  # questions about what needs no network
ORDER = ("decoded", *(question for question in QUESTIONS if question != "decoded"))
UNDECIDED = {"cannot tell": "these frames cannot tell"}
Row = dict[str, Any]


class Judged(NamedTuple):
    """Verified runs whose held-out frames tile their video.

    runs: a row per run. answers: a row per video and question, of all phases together.
    phases: the same of each phase by itself. means: a row per video and condition.
    """

    runs: pd.DataFrame
    answers: pd.DataFrame
    phases: pd.DataFrame
    means: pd.DataFrame

    @property
    def videos(self) -> list[str]:
        return list(self.answers.video.unique())

    @property
    def teacher_label(self) -> str:
        return ", ".join(self.runs.teacher_label.unique())


def read_judged(folder: str | Path) -> Judged:
    """`verification_cross_fit.json`.

    Raises:
        ResultsError: it is missing, damaged, or a video lacks the answer to a question.
    """
    fix = "git checkout book/results"
    tables = {name: pd.DataFrame(rows) for name, rows in
              read_json(folder, "verification_cross_fit.json", fix=fix).items()}
    answers = tables["answers"].sort_values(
        "question", key=lambda names: names.map(ORDER.index), kind="stable")
    numbers = ["estimate", "low", "high", "p", "p_holm", "error_ratio", "effective_size"]
    answers[numbers] = answers[numbers].astype(float)  # None where frames were too few for a test
    whole = answers.phases == "all"
    found = Judged(tables["runs"], answers[whole], answers[~whole], tables["means"])
    for video in found.runs.video.unique():
        own = found.answers[found.answers.video == video]
        if missing := [question for question in QUESTIONS if question not in set(own.question)]:
            raise ResultsError(f"{folder}/verification_cross_fit.json has no answer of {video} to "
                               f"{', '.join(missing)}; write it again with {fix}")
    return found


def read_made(folder: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables planted and intervals of `verification_calibration.json`.

    Raises:
        ResultsError: it is missing or damaged.
    """
    found = read_json(folder, "verification_calibration.json", fix="python -m "
                      "hnerv_clip.verify.simulation --out book/results/"
                      "verification_calibration.json")
    return pd.DataFrame(found["planted"]), pd.DataFrame(found["intervals"])


def answer_sentences(judged: Judged) -> Markup:
    """The page's answer, one short sentence in bold (`report.short_verdict`), then all of them.

    A question that videos answer differently is said video by video, and counts as not shown in
    the short sentence.
    """
    given = judged.answers.pivot(index="question", columns="video", values="answer")
    order = [*(q for q in ORDER if q not in FREE), *FREE]
    yes, no = ([q for q in order if (given.loc[q] == word).all()]
               for word in ("yes", "no"))
    short = short_verdict(
        {q: "yes" if q in yes else "no" if q in no else "open" for q in order},
        f"on held-out frames of {join_words([escape(v) for v in judged.videos])} the head")
    text = f"It {join_claims(yes)}" if yes else "It beats nothing"
    text += f", but it {join_denials(no)}" if no else ""
    mixed = [f"{QUESTIONS[q][0]} On " + ", on ".join(
        f"{escape(v)} {UNDECIDED.get(given.loc[q, v], given.loc[q, v])}" for v in judged.videos)
             for q in order if given.loc[q].nunique() > 1]
    unknown = [QUESTIONS[q][0] for q in order if (given.loc[q] == "cannot tell").all()]
    said = [text + ".", *[f"{words}." for words in mixed],
            *([f"These frames cannot tell: {' '.join(unknown)}"] if unknown else [])]
    return Markup(f"**{short}** {' '.join(said)}")


def decoded_words(judged: Judged) -> str:
    """`0.951 against 0.728 on bunny and …`: the head, the teacher on the decoded frame."""
    means = judged.means.set_index(["video", "condition"]).clip_centred
    return join_words([f"{means[v, 'learned']:.3f} against {means[v, 'decoded']:.3f} on {escape(v)}"
                       for v in judged.videos])


def evidence_rows(judged: Judged, video: str) -> list[Row]:
    """A row per question of one video: the answer, its evidence, and frames."""
    own = judged.answers[judged.answers.video == video].set_index("question")
    rows = []
    for question in ORDER:
        row = own.loc[question]
        values = {key: np.nan if row.get(key, question) is None else row.get(key, question)
                  for key in Answer.__dataclass_fields__}
        rows.append({"question": QUESTIONS[question][0], "answer": Markup(f"**{row.answer}**"),
                     "evidence": answer_words(Answer(**values)) + (
                         " (over the mean per position)" if row.test == "position" else ""),
                     "frames (effective sample size)":
                     f"{row.frames}" + ("" if np.isnan(row.effective_size) else
                                        f" ({row.effective_size:.0f})")})
    return rows


def mean_rows(judged: Judged) -> list[Row]:
    """Mean-centered and raw cosine to the teacher, a row per condition."""
    means = judged.means.set_index(["video", "condition"])
    conditions = list(judged.means.condition.unique())
    order = ["learned", "decoded", *[c for c in conditions if c not in ("learned", "decoded")]]
    return [{"mean-centered (raw) cosine": "the network" if condition == "learned"
             else name_of(condition).lower(), **{
        video: f"{means.clip_centred[video, condition]:.3f} "
               f"({means.clip_similarity[video, condition]:.3f})" for video in judged.videos}}
        for condition in order]


def phase_rows(judged: Judged) -> list[Row]:
    """How each phase by itself answers, a row per question."""
    words = ("yes", "no", "cannot tell")
    return [{"each phase by itself": QUESTIONS[question][0], **{
        video: ", ".join(f"{count} {word}" for word in words if (count := sum(
            part[part.question == question].answer == word)))
        for video, part in judged.phases.groupby("video", sort=False)}} for question in ORDER]


def run_rows(judged: Judged) -> list[Row]:
    """Where the runs come from, a row per video."""
    return [{"video": video, "runs": str(len(part)),
             "phases": ", ".join(map(str, sorted(part.phase.unique()))),
             "seeds": ", ".join(map(str, sorted(part.seed.unique()))),
             "epochs": ", ".join(map(str, part.epochs.unique())),
             "head's bytes": f"{part.head_bytes.max():,}",
             "device": ", ".join(part.device.unique()),
             "commit": ", ".join(sorted({commit_words({"commit": c, "dirty": None})
                                         for c in part.commit}))}
            for video, part in judged.runs.groupby("video", sort=False)]


def limit_words(judged: Judged) -> str:
    """How few runs and videos there are, and which frames no run held out."""
    seeds = judged.runs.groupby(["video", "phase"]).seed.nunique()
    many = "one seed" if seeds.max() == 1 else f"{_range(seeds, 'd')} seeds"
    wanted, short = len(DESIGNS["cross-fitted"].phases), []
    for video, part in judged.runs.groupby("video", sort=False):
        if (have := part.phase.nunique()) < wanted:
            short.append(f"{have} of {wanted} phases on {escape(video)}, so that one frame in "
                         f"{wanted} was never held out" if wanted - have == 1 else
                         f"{have} of {wanted} phases on {escape(video)}")
    return f"{many} a phase; {len(judged.videos)} videos" + "".join(f"; {x}" for x in short)


def error_sentences(planted: pd.DataFrame) -> Markup:
    """The largest shares of wrong answers over all simulated cases, in bold; and how many."""
    null, truth = planted[planted.kind == "null"], planted[planted.kind == "truth"]
    yes, p, weak = null.loc[null.yes.idxmax()], null.loc[null.rejected.idxmax()], \
        truth.loc[truth.yes.idxmin()]
    return Markup(
        f"**In simulated data without an effect, the answer is a wrong yes in at most "
        f"{yes.yes:.1%} of {yes.datasets:,} data sets; with an effect it is yes in at "
        f"least {weak.yes:.1%}.** "
        f"Each case is one kind of prediction, one autocorrelation, one size and one question: "
        f"{len(null)} cases without an effect, {len(truth)} with one. Before Holm's correction, p "
        f"is 5% or less in up to {p.rejected:.1%} ({_cell_words(p)}), and in more than 6% in "
        f"{sum(null.rejected > 0.06)} of the {len(null)} cases; the verdict uses the corrected p. "
        f"The power is lowest for: {_cell_words(weak)}")


def _cell_words(row) -> str:
    return (f"{escape(PLANTED[row.planted])}; autocorrelation {row.rho:g}; {row.design}; "
            f"{QUESTIONS[row.question][0]}")


def error_rows(planted: pd.DataFrame) -> list[Row]:
    """The worst of each size, a row per design."""
    rows = []
    for design in planted.design.unique():
        own = planted[planted.design == design]
        null, truth = own[own.kind == "null"], own[own.kind == "truth"]
        rows.append({"size": design, "largest wrong yes": f"{null.yes.max():.1%}",
                     "largest p ≤ 5%, uncorrected": f"{null.rejected.max():.1%}",
                     "smallest power": f"{truth.yes.min():.1%}"})
    return rows


def question_error_rows(worst: pd.DataFrame) -> list[Row]:
    """`simulation.worst_cases` for reading."""
    return [{"size": row["design"], "question": QUESTIONS[row["question"]][0], **{
        words: f"{row[key]:.1%}" for words, key in (
            ("wrong yes", "wrong yes"), ("p ≤ 5%, uncorrected", "p ≤ 5%"), ("power", "power"))}}
        for row in worst.to_dict("records")]


def weak_rows(planted: pd.DataFrame) -> list[Row]:
    """Truths too weak to count as one: true values, and how often they are answered yes."""
    rows = []
    for (name, question), part in planted[planted.kind == "between"].groupby(
            ["planted", "question"], sort=False):
        rows.append({"prediction": PLANTED[name], "question": QUESTIONS[question][0],
                     "value": _range(part.estimate, ".2f"), "answered yes": _range(part.yes, ".1%"),
                     "cases": str(len(part))})
    return rows


def _range(values, shape) -> str:
    low, high = f"{values.min():{shape}}", f"{values.max():{shape}}"
    return low if low == high else f"{low} to {high}"


def coverage_rows(intervals: pd.DataFrame) -> list[Row]:
    """How often 95% intervals hold the truth, a row per series and design."""
    return [{"mean of": SERIES[series], "size": design, "frames": str(part.frames.iloc[0]), **{
        # soft hyphens break the heading on a phone
        f"auto\u00adcorre\u00adlation {rho:g}": f"{part.covered[part.rho == rho].iloc[0]:.1%}"
        if rho in set(part.rho) else None for rho in sorted(intervals.rho.unique())}}
        for (series, design), part in intervals.groupby(["series", "design"], sort=False)]


def coverage_words(intervals: pd.DataFrame) -> str:
    """How far 95% intervals are from holding the truth in 95%, and where they do so too seldom."""
    low, high = intervals.covered.min(), intervals.covered.max()
    off = [f"up to {100 * abs(share - 0.95):.1f} points too {word}" for share, word, is_off in (
        (low, "seldom", low < 0.95), (high, "often", high > 0.95)) if is_off]
    text = (f"Of {intervals.datasets.min():,} simulated data sets each, 95% intervals hold the "
            f"true mean in {low:.1%} to {high:.1%}: {join_words(off) or 'exactly as often'}.")
    few = intervals[intervals.covered < 0.93]
    if len(few) and "series" in few:
        text += " More than two points too seldom, for " + join_words([
            f"{SERIES[row.series]} of {row.frames} frames with an autocorrelation of {row.rho:g}"
            for row in few.itertuples()]) + ": so few frames are too few for so slow a series."
    return text
