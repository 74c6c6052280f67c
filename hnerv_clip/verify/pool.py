"""Several verified runs (phases, seeds, kinds of embedding, videos) joined, without a model.

Runs of one video and setting are pooled: those of several phases hold out other frames
(cross-fitting), those of several seeds the same. Every group of runs is judged by itself, so that
its answers do not depend on which other runs are joined.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hnerv_clip.config import RUNTIME_PARAMS
from hnerv_clip.paths import resolve_path
from hnerv_clip.verify.evidence import Evidence, pool_evidence
from hnerv_clip.verify.report import answer_words
from hnerv_clip.verify.run import read_verification
from hnerv_clip.verify.scores import MEASURES
from hnerv_clip.verify.time_series import pool_intervals
from hnerv_clip.verify.verdict import QUESTIONS, Answer, answer_table, judge

STUDY_MEASURES = ("clip_similarity", "clip_centred", "skill", "r1", "r5", "median_rank", "cka",
                  "text_rank", "text_top20", "label_top1")
REPEATS = ("seed", "split_phase")  # what may differ between runs that are pooled


@dataclass(frozen=True)
class Study:
    """Several runs joined. Tables begin with video, kind, the columns of `by`, and source.

    runs: a row per run: folder, video, kind, seed, phase, epochs.
    measures: a row per group, split, condition and measure: mean over runs, sd between them, runs,
        and the pooled interval low to high (`time_series.pool_intervals`).
    answers: a row per group and question: the fields of `verdict.Answer`, and runs.
    seeds: a row per run, split, condition and measure: value.
    """

    runs: pd.DataFrame
    measures: pd.DataFrame
    answers: pd.DataFrame
    seeds: pd.DataFrame
    teacher_label: str

    @property
    def table(self) -> pd.DataFrame:
        """A row per group: runs, the network's `STUDY_MEASURES` on held-out frames, the answers."""
        keys = list(self.answers.columns[:self.answers.columns.get_loc("question")])
        answers = self.answers.pivot_table(index=keys, columns="question", values="answer",
                                           aggfunc="first", sort=False)
        own = self.measures[(self.measures.condition == "learned")
                            & (self.measures.split == "held_out")
                            & self.measures.measure.isin(STUDY_MEASURES)]
        means = own.pivot_table(index=[key for key in keys if key != "runs"], columns="measure",
                                values="mean", sort=False)
        joined = answers.reset_index("runs").join(means).reset_index()
        order = [*keys, *[x for x in STUDY_MEASURES if x in means], *answers.columns]
        return joined[order].rename_axis(columns=None)


def join_runs(folders: Iterable, *, by: tuple[str, ...] = ()) -> Study:
    """Join the verifications of several runs; models and videos are not needed.

    Runs of one video and kind of embedding must be phases and seeds of one setting.

    Args:
        folders: run folders that hold a verification.json.
        by: parameters that tell settings apart, such as clip_loss_weight.
    Raises:
        RunError: see `read_verification`.
        ValueError: no run, different teachers, a seed and phase twice, runs that differ in more
            than these or were verified with other labels, an unknown name in `by`, or a cosine
            without a value.
    """
    contents = {str(folder): read_verification(folder) for folder in folders}
    if not contents:
        raise ValueError("no run to join; run `hnerv-clip verify` on run folders and give these")
    runs = pd.DataFrame([{"folder": folder, "video": content["video"], "kind": content["kind"],
                          **_chosen(content, by, folder), "seed": content["seed"],
                          "phase": content["phase"], "epochs": content["params"]["epochs"]}
                         for folder, content in contents.items()])
    keys = ["video", "kind", *by]
    _check_runs(runs, contents, keys)
    seeds, answers = [], []
    for key, group in runs.groupby(keys, sort=False):
        where = dict(zip(keys, key))
        members = [contents[folder] for folder in group.folder]
        for folder, run in zip(group.folder, members):
            seeds += [row for source in run["sources"] for row in _values(folder, run, source,
                                                                          where)]
        for source in members[0]["sources"]:
            found = [run["sources"][source]["evidence"] for run in members
                     if source in run["sources"]]
            found = [Evidence(pd.DataFrame(x["frames"]), pd.DataFrame(x["knows"], columns=KNOWN))
                     for x in found if x["frames"]]
            if found:
                table = answer_table(judge(pool_evidence(found)))
                answers.append(table.assign(**where, source=source, runs=len(found)))
    order = [*keys, "source", "runs"]
    answers = pd.concat(answers, ignore_index=True) if answers else pd.DataFrame(
        columns=[*order, "question", "answer"])
    seeds = pd.DataFrame(seeds).infer_objects()
    return Study(runs=runs, seeds=seeds,
                 measures=_pool(seeds, [*keys, "source", "split", "condition", "measure"]),
                 answers=answers[[*order, *[x for x in answers if x not in order]]],
                 teacher_label=next(iter(contents.values()))["teacher_label"])


KNOWN = ("run", "test", "estimate", "standard_error", "t", "freedom")


def _values(folder, run, source, where):
    for row in run["sources"][source]["measures"]:
        if row["measure"] in ("clip_similarity", "clip_centred") and row["value"] is None:
            raise ValueError(f"{folder}: the {MEASURES[row['measure']]} of {row['condition']} has "
                             "no value (NaN): remove its verification.json and verify again")
        yield {**where, "source": source, "seed": run["seed"], "phase": run["phase"], **row}


def _chosen(content, by, folder):
    unknown = [name for name in by if name not in content["params"]]
    if unknown:
        raise ValueError(f"by={unknown[0]!r} is no parameter of {folder}; "
                         "see `hnerv-clip settings`")
    return {name: content["params"][name] for name in by}


def _check_runs(runs, contents, keys):
    teachers = sorted({content["teacher"] for content in contents.values()})
    if len(teachers) > 1:
        raise ValueError(f"runs of different teachers do not compare: {', '.join(teachers)}")
    for key, group in runs.groupby(keys, sort=False):
        name = " ".join(map(str, key))
        repeated = group.duplicated(["seed", "phase"], keep=False)
        if repeated.any():
            twice = group.folder[repeated].tolist()
            raise ValueError(f"{name}: {' and '.join(twice[:2])} have the same seed and phase; give"
                             " one of them, or name in `by` what tells them apart")
        sets = {tuple(contents[folder].get("labels", ())) for folder in group.folder} - {()}
        if len(sets) > 1:
            raise ValueError(f"{name}: verified with different labels, "
                             f"{' and '.join(map(str, sorted(sets)))}; verify with the same ones")
        first, *rest = (contents[folder]["params"] for folder in group.folder)
        for folder, params in zip(group.folder[1:], rest):
            differ = [x for x in first if first[x] != params.get(x)
                      and x not in (*REPEATS, *RUNTIME_PARAMS)]
            if differ:
                raise ValueError(f"{name}: {folder} and {group.folder.iloc[0]} differ in "
                                 f"{', '.join(differ)}, so they are no seeds of one setting: name "
                                 "it in `by`, or join them apart")


def _pool(rows, keys):
    """Mean over runs, sd between them and the pooled interval of every group."""
    pooled = []
    for key, group in rows.groupby(keys, sort=False, dropna=False):
        values = group.value.astype(float)
        row = dict(zip(keys, key)) | {
            "mean": values.mean(skipna=False), "sd": values.std(ddof=1, skipna=False),
            "runs": len(group), "low": np.nan, "high": np.nan}
        parts = group[["value", "standard_error", "freedom"]].astype(float)
        if parts.notna().all(axis=None):
            found = pool_intervals(*parts.to_numpy().T)
            row |= {"low": found.low, "high": found.high}
        pooled.append(row)
    return pd.DataFrame(pooled)


def read_answers(path: str) -> pd.DataFrame | None:
    """Published answers of cross-fitted runs for reading; None where there is no such file.

    Returns:
        video, question, answer, evidence, frames.
    """
    path = resolve_path(path)
    if not path.is_file():
        return None
    fields = Answer.__dataclass_fields__
    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["answers"]
            if row["phases"] == "all"]
    return pd.DataFrame([{
        "video": row["video"], "question": QUESTIONS[row["question"]][0], "answer": row["answer"],
        "evidence": answer_words(Answer(**{
            key: np.nan if row[key] is None else row[key] for key in fields})),
        "frames": row["frames"]} for row in rows])


def study_words(study: Study) -> pd.DataFrame:
    """The answers for reading: a row per group and question."""
    fields = Answer.__dataclass_fields__
    return pd.DataFrame([{
        **{key: row[key] for key in study.answers.columns if key not in fields},
        "question": QUESTIONS[row["question"]][0], "answer": row["answer"],
        "evidence": answer_words(Answer(**{key: row[key] for key in fields})),
        "frames": row["frames"]} for row in study.answers.to_dict("records")])
