"""The verification put to trained runs: one in depth, and several at once.

`verify_run` asks one run and `write_verification` keeps the answer in the run's folder, so that
`join_runs` can join many runs (seeds, kinds of embedding, videos) without a model or a video.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hnerv_clip.config import RUNTIME_PARAMS, embed_kind
from hnerv_clip.controls import linear_map, store_embeddings
from hnerv_clip.evaluate import (
    BATCH,
    Run,
    check_head,
    decode_frames,
    embed_frames,
    interpolate_embeddings,
    load_run,
    measure_decoding,
    sources_of,
)
from hnerv_clip.measures import check_embeddings
from hnerv_clip.model import HNeRV, build_model
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs import RunDir, RunError, code_version, write_atomic, write_json
from hnerv_clip.search import encode_queries, parse_queries
from hnerv_clip.speed import read_decoding, read_teacher_rates
from hnerv_clip.statistics import holm, pool_intervals
from hnerv_clip.teachers import Teacher, load_teacher, run_teacher
from hnerv_clip.verify import (
    CONTROLS,
    LIMITS,
    MEASURES,
    Verification,
    name_of,
    p_words,
    report_text,
    verify_embeddings,
)

FORMAT = 2  # of verification.json
TABLES = ("table", "improvements", "comparisons", "alignment", "measures")
STUDY_MEASURES = ("clip_similarity", "clip_centred", "skill", "r1", "r5", "median_rank", "cka",
                  "text_rank", "text_top20", "label_top1")


def held_out_frames(run: Run) -> np.ndarray:
    """Every frame that did not train."""
    return np.setdiff1d(np.arange(len(run.dataset.video.frames)), run.dataset.split.train)


def verify_run(run: Run, *, teacher: Teacher | None = None, seed: int = 0, near: int = 2,
               labels: str | Iterable[str] = "") -> dict[str, Verification]:
    """Verify a run in every way in which its embeddings come about.

    Beside the baselines of `verify_embeddings`, the prediction meets an untrained head on the
    trained network, a linear map of the per-frame embedding, a side file of as many bytes as the
    head takes, and on held-out frames the teacher run on the decoded frame.

    Args:
        teacher: the run's, loaded if it is not given.
        seed: of the random embeddings, the shuffles and the untrained head.
        near: see `verify_embeddings`.
        labels: texts to rank and to label patches by, see `search.parse_queries`; none by default.
    Returns:
        {source: its Verification}, the prediction last; see `evaluate.sources_of`.
    Raises:
        ConfigError: the run has no CLIP head, its teacher's weights are not there, or the teacher
            does not know a label.
        ValueError: as `verify_embeddings` and `search.encode_queries`.
    """
    check_head(run.model)
    model, dataset = run.model, run.dataset
    reference = check_embeddings(dataset.embeddings, "teacher")
    train, held_out = dataset.split.train, held_out_frames(run)
    teacher = teacher or load_teacher(run.config.teacher, _device(model))
    texts = encode_queries(parse_queries(labels), teacher) if labels else None
    untrained, (_, side_file) = _untrained_head(run, seed + 1), store_embeddings(
        reference, train, head_bytes(run))
    studies = {}
    for source, (per_frame, predicted, by_untrained) in _ask_heads(run, untrained).items():
        others = {"Untrained Head": by_untrained,
                  "Linear Map": linear_map(per_frame, reference, train), "Side File": side_file}
        if len(held_out):
            decoded = decode_frames(model, dataset, held_out.tolist(), source=source)
            others["Teacher on Decoded Frame"] = held_out, run_teacher(
                teacher, decoded, dataset.grid, progress=False)
        studies[source] = verify_embeddings(
            predicted, reference, train, held_out, seed=seed, source=source, others=others,
            teacher_label=dataset.teacher_label, near=near, texts=texts)
    return studies


@torch.inference_mode()
def _ask_heads(run: Run, untrained: HNeRV) -> dict[str, tuple[np.ndarray, ...]]:
    """{source: (per-frame embeddings, the run's answers, the untrained head's)}, [T, …] each.

    The decoder runs once for both heads, and only where an embedding differs from another source's.
    """
    model, dataset, found = run.model, run.dataset, {}
    centres = dataset.grid.centres.to(_device(model))
    frames, embeddings = np.arange(model.frame_count), embed_frames(model, dataset)
    answers = [torch.zeros(dataset.embeddings.shape) for _ in range(2)]
    for source in sources_of(model):
        if source == "interpolated":  # training frames keep their own embedding
            frames = held_out_frames(run)
            embeddings = interpolate_embeddings(embeddings, dataset.split.train)
        answers = [answer.clone() for answer in answers]
        for start in range(0, len(frames), BATCH):
            part = frames[start:start + BATCH]
            stages = model.stages(embeddings[part], last=model.clip_stages[-1])
            for answer, network in zip(answers, (model, untrained)):
                answer[part] = network.clip_at(stages, centres).float().cpu()
        found[source] = (embeddings.cpu().numpy(), *(answer.numpy() for answer in answers))
    return found


def head_bytes(run: Run) -> int:
    """Bytes of the CLIP head at the width in which a run stores its weights."""
    return run.model.part_sizes()["clip_head"] * run.config.train.quant_model_bit // 8


def _untrained_head(run: Run, seed: int) -> HNeRV:
    """The trained network with a head as it was before training."""
    model = build_model(run.config.model, frame_hw=run.model.frame_hw,
                        frame_count=run.model.frame_count, seed=seed)
    body = {name: value for name, value in run.model.state_dict().items()
            if not name.startswith("clip_head")}
    model.load_state_dict(body, strict=False)
    return model.to(_device(run.model)).eval()


def _device(model: HNeRV) -> torch.device:
    return next(model.parameters()).device


def measure_costs(run: Run, teacher: Teacher, *, frames: int = 8, repeats: int = 5
                  ) -> pd.DataFrame:
    """Embeddings a second: predicted, by decoding and the teacher, and by the teacher alone.

    Returns:
        A row per way: embeddings_per_s (median over passes after a warm-up), min, max, n passes.
    """
    grid, timed = run.dataset.grid, run.dataset.video.frames[:frames]
    decoding = measure_decoding(run.model, run.dataset, repeats=repeats).set_index("mode")
    run_teacher(teacher, timed, grid, progress=False)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        run_teacher(teacher, timed, grid, progress=False)  # its result is on the CPU: it is done
        rates.append(len(timed) / (time.perf_counter() - start))
    return _cost_table(decoding, {"median": np.median(rates), "min": min(rates),
                                  "max": max(rates)}, len(grid))


def read_costs(path: str | Path, run: Run) -> tuple[pd.DataFrame, str]:
    """`measure_costs` on another machine, from a bench file, and in words where and when.

    Raises:
        ValueError: see `speed.read_decoding` and `speed.read_teacher_rates`.
    """
    decoding, where = read_decoding(path, run.config, batch_size=BATCH)
    patches = len(run.dataset.grid)
    rates = {name: rate / patches for name, rate in
             read_teacher_rates(path, run.dataset.teacher_label).items()}
    return _cost_table(decoding.set_index("mode"), rates, patches), where


def _cost_table(decoding: pd.DataFrame, teacher: dict[str, float], patches: int) -> pd.DataFrame:
    """Rates in frames a second, of decoding by mode and of the teacher, as embeddings a second."""
    columns = {"embeddings_per_s": ("frames_per_s", "median"), "min": ("frames_per_s_min", "min"),
               "max": ("frames_per_s_max", "max")}
    ways = {"predicted": lambda rgb, own, taught: own,
            "frame decoded, then the teacher": lambda rgb, own, taught: 1 / (1 / rgb + 1 / taught),
            "teacher, frame at hand": lambda rgb, own, taught: taught}
    return pd.DataFrame([{"way": way, **{name: patches * rate(
        decoding[column]["RGB"], decoding[column]["embeddings only"], teacher[kind])
        for name, (column, kind) in columns.items()}, "n": decoding.n.iloc[0]}
        for way, rate in ways.items()])


def write_verification(run: Run, studies: dict[str, Verification], *,
                       labels: str | Iterable[str] = "") -> list[Path]:
    """Keep what `verify_run` found in the run's folder, each file whole or not at all.

    `verification.csv`: a row per source, split, condition and measure. `verification.json`: every
    table, the verdicts, and what was verified. `verification.txt`: the reports.

    Args:
        labels: those that `verify_run` was given.
    Returns:
        The three paths.
    """
    folder, first = run.run_dir.path, next(iter(studies.values()))
    facts = {"video": run.dataset.video.name, "kind": embed_kind(run.config.model.embed),
             "seed": run.config.train.seed}
    long = pd.concat([study.measures.assign(source=source, **facts)
                      for source, study in studies.items()], ignore_index=True)
    commit, dirty = code_version()
    content = {
        "format": FORMAT, **facts, "teacher": run.dataset.teacher_name,
        "teacher_label": first.teacher_label, "shuffle_seed": first.seed, "near": first.near,
        "labels": parse_queries(labels) if labels else [],
        "checkpoint": checkpoint_digest(folder), "commit": commit, "dirty": dirty,
        "params": run.config.params(),
        "sources": {source: {"verdict": study.verdict,
                             **{name: _records(getattr(study, name)) for name in TABLES}}
                    for source, study in studies.items()}}
    paths = [folder / f"verification.{ending}" for ending in ("csv", "txt", "json")]
    order = [*facts, "source", *first.measures.columns]
    write_atomic(paths[0], lambda file: file.write(long[order].to_csv(index=False).encode()))
    text = "\n".join(report_text(study) for study in studies.values())
    write_atomic(paths[1], lambda file: file.write(text.encode()))
    write_json(paths[2], content)  # last: where it stands, the others do
    return paths


def _records(table):
    rows = table.astype(object)
    return [{name: value.item() if isinstance(value, np.generic) else value
             for name, value in row.items()}
            for row in rows.where(rows.notna(), None).to_dict("records")]


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of a run's best checkpoint, which a verification belongs to; "" without one."""
    path = resolve_path(folder) / "model_best.pth"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_verification(folder) -> dict:
    """The content of a run's verification.json.

    Raises:
        RunError: none there, damaged, or of another format.
    """
    path = resolve_path(folder) / "verification.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
    except FileNotFoundError:
        raise RunError(f"{folder} holds no verification.json: run `hnerv-clip verify {folder}`"
                       ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): remove it and verify again") from error
    if found != FORMAT:
        raise RunError(f"{path} has format {found}, this version reads {FORMAT}: verify again")
    return content


def is_verified(folder, *, seed: int = 0, near: int = 2, labels: str | Iterable[str] = ""
                ) -> bool:
    """Whether a run's verification is there, of its checkpoint as it is, made in the same way.

    Without labels, one with any will do.
    """
    try:
        content = read_verification(folder)
    except RunError:
        return False
    digest = checkpoint_digest(folder)
    return (content["shuffle_seed"], content["near"]) == (seed, near) \
        and (not labels or content.get("labels", []) == parse_queries(labels)) \
        and digest in ("", content["checkpoint"])


def verify_folders(folders: Iterable, *, cache_dir: str | Path = "output/cache",
                   device: str = "auto", seed: int = 0, near: int = 2,
                   labels: str | Iterable[str] = "", force: bool = False) -> list[Path]:
    """Verify runs one after the other, and keep the answers in their folders.

    A run whose verification is there, of the same checkpoint, seed, near and labels, is left as it
    is; so is one with these whose checkpoint is not here any more. The teacher is loaded once for
    runs that share it.

    Returns:
        The folders, as `Path`s.
    Raises:
        RunError: some could not be verified, after all others were; the message says which and why.
    """
    folders, failed, teachers = [RunDir(folder).path for folder in folders], {}, {}
    for folder in tqdm(folders, desc="verify", unit="run", disable=len(folders) < 2):
        if not force and is_verified(folder, seed=seed, near=near, labels=labels):
            continue
        try:
            run = load_run(folder, cache_dir=cache_dir, device=device)
            name = run.dataset.teacher_name
            if name not in teachers:
                teachers[name] = load_teacher(run.config.teacher, device)
            write_verification(run, verify_run(
                run, teacher=teachers[name], seed=seed, near=near, labels=labels), labels=labels)
        except (RunError, ValueError) as error:
            failed[folder] = error
    if failed:
        raise RunError("; ".join(f"{folder}: {error}" for folder, error in failed.items()))
    return folders


def find_verified(folder, names: str = "*") -> list[Path]:
    """Run folders with a verification below a folder, in order of their names.

    Args:
        names: a pattern of the run folders' names, such as "*_base_s*".
    Raises:
        RunError: none there.
    """
    folder = resolve_path(folder)
    found = sorted(path.parent for path in folder.rglob("verification.json")
                   if fnmatch(path.parent.name, names))
    if not found:
        raise RunError(f"no run named {names!r} below {folder} holds a verification.json: run "
                       "`hnerv-clip verify RUN …` first, or correct the folder or the names")
    return found


@dataclass(frozen=True)
class Study:
    """Several runs joined. All tables begin with video, kind, the columns of `by`, source, split.

    runs: a row per run: folder, video, kind, seed, epochs.
    seeds: a row per run, condition and measure: value.
    measures: a row per condition and measure: mean over seeds, sd between seeds, seeds, and the
        pooled interval low to high (`statistics.pool_intervals`).
    comparisons: learned minus every other condition: difference, sd, seeds, low, high, p, p_holm,
        outcome (beaten, unproven, not beaten). Holm's correction is over all rows of a split.
    alignment: a row per run: its test in time, see `verify.Verification.alignment`.
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
