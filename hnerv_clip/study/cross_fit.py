"""Runs whose held-out frames tile a video, judged together.

The runs are the study's base and its `phase_K` (`plan.PHASES`), put to `verify.run.verify_run`.
What they gave is `book/results/verification_cross_fit.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.rows import run_row
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.study.plan import PHASES, VIDEOS
from hnerv_clip.verify.evidence import DiagonalTest, Evidence, pool_evidence
from hnerv_clip.verify.run import read_verification
from hnerv_clip.verify.verdict import CONTROLS, answer_table, judge

Row = dict[str, Any]


def cross_fit_names(video: str, seeds: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """The study's runs that cross-fit a video, by seed and phase."""
    return [f"{video}_hybrid_{variant}_s{seed}" for seed in seeds
            for variant in ("base", *(f"phase_{phase}" for phase in PHASES))]


def cross_fit_results(folder: str | Path) -> dict[str, list[Row]]:
    """What the finished and verified runs in a study's folder say together.

    Returns:
        runs: a row per run. answers: a row per video and question, of all phases (phases "all")
        and of each ("0" to "4"), the fields of `verdict.Answer`. means: a row per video and
        condition: clip_similarity and clip_centred over all held-out patches of all runs, and the
        number of different frames.
    """
    folder, found = resolve_path(folder), {"runs": [], "answers": [], "means": []}
    for video in VIDEOS:
        names = [name for name in cross_fit_names(video)
                 if (folder / name / "verification.json").is_file()]
        if names:
            contents = [read_verification(folder / name) for name in names]
            found["runs"] += [_run_row(RunDir(folder / name), video, content)
                              for name, content in zip(names, contents)]
            found["answers"] += _answers(video, contents)
            found["means"] += _means(video, contents)
    return {name: [_plain(row) for row in rows] for name, rows in found.items()}


def _prediction(content):
    """The source that predicts, which stands last."""
    return list(content["sources"].items())[-1]


def _run_row(run: RunDir, video: str, content: Row) -> Row:
    row, summary = run_row(run), _prediction(content)[1]["summary"]
    return {
        "video": video, "phase": content["phase"], "seed": content["seed"],
        "epochs": content["params"]["epochs"], "source": _prediction(content)[0],
        "head_bytes": row["clip_head_values"] * content["params"]["quant_model_bit"] // 8,
        "device": row["device"], "commit": row["commit"], "dirty": row["dirty"],
        "teacher_label": content["teacher_label"], "train_raw": summary["clip_similarity_train"],
        "train_centered": summary["clip_centred_train"], "psnr_train_db": row["psnr_train_db"],
        "psnr_held_out_db": row["psnr_held_out_db"]}


def _answers(video: str, contents: list[Row]) -> list[Row]:
    groups: dict[str, list[Row]] = {}
    for content in contents:
        groups.setdefault(str(content["phase"]), []).append(content)
    rows = []
    for phases, members in [*sorted(groups.items()), ("all", contents)]:
        evidence = [_prediction(content)[1]["evidence"] for content in members]
        pooled = pool_evidence([Evidence(
            pd.DataFrame(part["frames"]),
            pd.DataFrame(part["knows"], columns=["run", "test", *DiagonalTest._fields]))
            for part in evidence])
        rows += [{"video": video, "phases": phases, **row}
                 for row in answer_table(judge(pooled)).to_dict("records")]
    return rows


def _means(video: str, contents: list[Row]) -> list[Row]:
    table = pd.concat([pd.DataFrame(_prediction(content)[1]["table"]) for content in contents])
    table = table[(table.split == "held_out") & ~table.condition.isin(CONTROLS)]
    frames = len({row["frame"] for content in contents
                  for row in _prediction(content)[1]["evidence"]["frames"]})
    rows = []
    for condition, part in table.groupby("condition", sort=False):
        means = {name: float(np.average(part[f"{name}_mean"], weights=part.n))
                 for name in ("clip_similarity", "clip_centred")}
        rows.append({"video": video, "condition": condition, **means, "frames": frames})
    return rows


def _plain(row: Row) -> Row:
    """Values as JSON takes them: numbers of six digits, None for NaN."""
    def plain(value):
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        if isinstance(value, (int, np.integer)):
            return int(value)
        if isinstance(value, (float, np.floating)):
            return round(float(value), 6) if np.isfinite(value) else None
        return value
    return {name: plain(value) for name, value in row.items()}


def merge_cross_fit(published: dict[str, list[Row]], found: dict[str, list[Row]]
                    ) -> dict[str, list[Row]]:
    """Put new results in the place of published ones, video by video.

    A video's stay where the new runs hold out fewer phases, or as many with fewer seeds.
    """
    def size(results, video):
        own = [row for row in results["runs"] if row["video"] == video]
        return len({row["phase"] for row in own}), len(own)

    videos = dict.fromkeys(row["video"] for row in [*published["runs"], *found["runs"]])
    chosen = {video: found if size(found, video) >= size(published, video) else published
              for video in videos}
    return {name: [row for video, source in chosen.items() for row in source[name]
                   if row["video"] == video] for name in ("runs", "answers", "means")}
