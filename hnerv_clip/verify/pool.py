"""Several verified runs (seeds, kinds of embedding, videos) joined, without a model or a video."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hnerv_clip.config import RUNTIME_PARAMS
from hnerv_clip.verify.run import read_verification
from hnerv_clip.verify.scores import LIMITS, MEASURES
from hnerv_clip.verify.time_series import holm, pool_intervals
from hnerv_clip.verify.verdict import CONTROLS, name_of, p_words

STUDY_MEASURES = ("clip_similarity", "clip_centred", "skill", "r1", "r5", "median_rank", "cka",
                  "text_rank", "text_top20", "label_top1")


@dataclass(frozen=True)
class Study:
    """Several runs joined. All tables begin with video, kind, the columns of `by`, source, split.

    runs: a row per run: folder, video, kind, seed, epochs.
    seeds: a row per run, condition and measure: value.
    measures: a row per condition and measure: mean over seeds, sd between seeds, seeds, and the
        pooled interval low to high (`time_series.pool_intervals`).
    comparisons: learned minus every other condition: difference, sd, seeds, low, high, p, p_holm,
        outcome (beaten, unproven, not beaten). Holm's correction is over all rows of a split.
    alignment: a row per run: its test in time, see `scores.Verification.alignment`.
    table: a row per video, kind, source and split: mean, sd, low and high of each of
        `STUDY_MEASURES`, seeds, and the baselines beaten (with their p after Holm's correction),
        unproven and not beaten.
    """

    runs: pd.DataFrame
    seeds: pd.DataFrame
    measures: pd.DataFrame
    comparisons: pd.DataFrame
    alignment: pd.DataFrame
    table: pd.DataFrame
    teacher_label: str


def join_runs(folders: Iterable, *, by: tuple[str, ...] = ()) -> Study:
    """Join the verifications of several runs; models and videos are not needed.

    Runs of one video and kind of embedding must be seeds of one setting. Training frames count
    once: for a hybrid model they are the same from the encoder and interpolated.

    Args:
        folders: run folders that hold a verification.json.
        by: parameters that tell settings apart, such as clip_loss_weight.
    Raises:
        RunError: see `read_verification`.
        ValueError: no run, different teachers, a seed twice, runs that differ in more than their
            seed or were verified with other labels, an unknown name in `by`, or a cosine without a
            value.
    """
    contents = {str(folder): read_verification(folder) for folder in folders}
    if not contents:
        raise ValueError("no run to join; give run folders that `hnerv-clip verify` has seen")
    runs = pd.DataFrame([{"folder": folder, "video": content["video"], "kind": content["kind"],
                          **_chosen(content, by, folder), "seed": content["seed"],
                         "epochs": content["params"]["epochs"]}
                         for folder, content in contents.items()])
    keys = ["video", "kind", *by]
    _check_runs(runs, contents, keys)
    seeds, differences, timing = [], [], []
    for (folder, content), run in zip(contents.items(), runs.to_dict("records")):
        where = {name: run[name] for name in [*keys, "seed"]}
        for source, study in content["sources"].items():
            for rows, kept in ((study["measures"], seeds), (study["comparisons"], differences),
                               (study["alignment"], timing)):
                kept += [where | {"source": source} | row for row in rows
                         if not (source == "interpolated" and row["split"] == "train")]
        bad = [row for row in seeds
               if row["measure"] in ("clip_similarity", "clip_centred") and row["value"] is None]
        if bad:
            what = f"{MEASURES[bad[0]['measure']]} of {bad[0]['condition']}"
            raise ValueError(f"{folder}: the {what} has no value (NaN): remove its "
                             "verification.json and verify again")
    place = [*keys, "source", "split"]
    seeds, differences = (pd.DataFrame(rows).infer_objects() for rows in (seeds, differences))
    measures = _pool(seeds, [*place, "condition", "measure"], "value", "mean").drop(columns="p")
    comparisons = _outcomes(_pool(differences, [*place, "over"], "difference", "difference"))
    return Study(runs=runs, seeds=seeds[[*place, "seed", "condition", "measure", "value"]],
                 measures=measures, comparisons=comparisons, alignment=pd.DataFrame(timing),
                 table=_study_table(measures, comparisons, place),
                 teacher_label=next(iter(contents.values()))["teacher_label"])


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
        if group.seed.duplicated().any():
            twice = group.folder[group.seed.duplicated(keep=False)].tolist()
            raise ValueError(f"{name}: {' and '.join(twice[:2])} have the same seed; give one of "
                             "them, or name in `by` what tells them apart")
        sets = {tuple(contents[folder].get("labels", ())) for folder in group.folder} - {()}
        if len(sets) > 1:
            raise ValueError(f"{name}: verified with different labels, "
                             f"{' and '.join(map(str, sorted(sets)))}; verify with the same ones")
        first, *rest = (contents[folder]["params"] for folder in group.folder)
        for folder, params in zip(group.folder[1:], rest):
            differ = [x for x in first if first[x] != params.get(x)
                      and x not in ("seed", *RUNTIME_PARAMS)]
            if differ:
                raise ValueError(f"{name}: {folder} and {group.folder.iloc[0]} differ in "
                                 f"{', '.join(differ)}, so they are no seeds of one setting: name "
                                 "it in `by`, or join them apart")


def _pool(rows, keys, value, name):
    """Mean over seeds, sd between them and the pooled interval of every group."""
    pooled = []
    for key, group in rows.groupby(keys, sort=False, dropna=False):
        values = group[value].astype(float)
        row = dict(zip(keys, key)) | {
            name: values.mean(skipna=False), "sd": values.std(ddof=1, skipna=False),
            "seeds": len(group), "low": np.nan, "high": np.nan, "p": np.nan}
        parts = group[[value, "standard_error", "freedom"]].astype(float)
        if parts.notna().all(axis=None):
            found = pool_intervals(*parts.to_numpy().T)
            low, high = LIMITS.get(row.get("measure"), (-np.inf, np.inf))
            row |= {"low": max(found.low, low), "high": min(found.high, high), "p": found.p}
        pooled.append(row)
    return pd.DataFrame(pooled)


def _outcomes(comparisons):
    comparisons["p_holm"] = np.nan
    for _, rows in comparisons.groupby("split"):
        tested = rows.index[rows.p.notna()]
        comparisons.loc[tested, "p_holm"] = holm(comparisons.p[tested])
    comparisons["outcome"] = np.where(
        comparisons.p_holm < 0.05, "beaten",
        np.where(comparisons.difference > 1e-9, "unproven", "not beaten"))
    return comparisons


def study_words(study: Study) -> pd.DataFrame:
    """`Study.table` for reading: means ± sd between seeds, with the pooled interval in brackets."""
    table = study.table
    place = list(table.columns[:table.columns.get_loc("seeds") + 1])

    def cell(row, measure):
        spread = "" if np.isnan(row[f"{measure}_sd"]) else f" ± {row[f'{measure}_sd']:.2g}"
        interval = "" if np.isnan(row[f"{measure}_low"]) else \
            f" [{row[f'{measure}_low']:.3g}, {row[f'{measure}_high']:.3g}]"
        return f"{row[measure]:.3g}{spread}{interval}"

    words = table[place].copy()
    for measure in [measure for measure in STUDY_MEASURES if measure in table]:
        words[MEASURES[measure]] = [cell(row, measure) for _, row in table.iterrows()]
    return words.assign(beaten=table.beaten, unproven=table.unproven,
                        **{"not beaten": table.not_beaten})


def alignment_words(study: Study) -> pd.DataFrame:
    """The tests in time over seeds: correlations, and the largest p with the number of shifts."""
    rows, alignment = [], study.alignment
    place = list(alignment.columns[:alignment.columns.get_loc("seed")]) + ["source", "split"]
    for key, part in alignment.groupby(place, sort=False, dropna=False):
        rows.append(dict(zip(place, key)) | {
            "seeds": len(part), "correlation": " ".join(f"{x:.2f}" for x in part.observed),
            "effect": " ".join(f"{x:.1f}" for x in part.effect),
            "largest p": f"{p_words(part.p.max())} of {part.shifts.iloc[0]} shifts"})
    return pd.DataFrame(rows)


def _study_table(measures, comparisons, place):
    own = measures[(measures.condition == "learned") & measures.measure.isin(STUDY_MEASURES)]
    rows = []
    for key, group in own.groupby(place, sort=False, dropna=False):
        row = dict(zip(place, key)) | {"seeds": group.seeds.max()}
        for found in group[group.seeds == row["seeds"]].itertuples():  # measured in all of them
            row |= {found.measure: found.mean, f"{found.measure}_sd": found.sd,
                    f"{found.measure}_low": found.low, f"{found.measure}_high": found.high}
        mine = (comparisons[place] == list(key)).all(axis=1) & ~comparisons.over.isin(CONTROLS)
        for outcome, against in comparisons[mine].groupby("outcome"):
            row[outcome.replace(" ", "_")] = "; ".join(
                f"{name_of(x.over).lower()}" + (f" ({p_words(x.p_holm)})" if outcome == "beaten"
                                                else "") for x in against.itertuples())
        rows.append(row)
    table = pd.DataFrame(rows)
    for outcome in ("beaten", "unproven", "not_beaten"):
        table[outcome] = table[outcome].fillna("") if outcome in table else ""
    return table
