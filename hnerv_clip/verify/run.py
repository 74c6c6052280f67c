"""Verify a trained run and keep the result in its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from hnerv_clip.config import embed_kind
from hnerv_clip.field.query import has_field, load_field
from hnerv_clip.files import check_keys, check_writable, read_json
from hnerv_clip.inference import (
    Run,
    check_head,
    decode_frames,
    load_run,
    predict_embeddings,
    sources_of,
)
from hnerv_clip.metrics import check_embeddings
from hnerv_clip.paths import match_paths, resolve_path
from hnerv_clip.runs.provenance import code_version
from hnerv_clip.runs.run_dir import FIELD, RunDir, RunError, write_atomic, write_json
from hnerv_clip.teachers import (
    Teacher,
    cache_path,
    encode_queries,
    load_teacher,
    parse_queries,
    run_teacher,
)
from hnerv_clip.teachers.cache import write_cache
from hnerv_clip.verify.evidence import Evidence
from hnerv_clip.verify.report import report_text, summary
from hnerv_clip.verify.scores import Verification, verify_embeddings
from hnerv_clip.verify.side_file import store_embeddings
from hnerv_clip.verify.verdict import answer_table

FORMAT = 3  # of verification.json
# What it must hold besides
KEYS = {"video": str, "kind": str, "seed": int, "phase": int, "teacher": str, "shuffle_seed": int,
        "near": int, "checkpoint": str, "params": dict, "sources": dict}
TABLES = ("table", "improvements", "measures")


def held_out_frames(run: Run) -> np.ndarray:
    """Every frame that did not train."""
    return np.setdiff1d(np.arange(len(run.dataset.video.frames)), run.dataset.split.train)


def verify_run(run: Run, *, teacher: Teacher | None = None, seed: int = 0, near: int = 2,
               labels: str | Iterable[str] = "", all_sources: bool = False,
               by_field: bool = False, cache_dir: str | Path | None = None
               ) -> dict[str, Verification]:
    """Verify what a run predicts for the frames that it did not train on.

    It predicts by its CLIP head, or, where it was trained without one, by its field, which is asked
    at the patches. Beside the baselines of `verify_embeddings` it is compared with a side file of
    as many bytes as the head takes, and on held-out frames with the teacher run on the decoded
    frame.

    Args:
        teacher: the run's, loaded if it is not given.
        seed: of the random embeddings and the shuffles.
        near: see `verify_embeddings`.
        labels: texts to rank and label patches by, see `teachers.parse_queries`; none by default.
        all_sources: also what a hybrid model predicts when its encoder sees the held-out frame.
        by_field: by its field even where it has a CLIP head.
        cache_dir: keeps what the teacher says of the patches, where it was not asked before.
    Returns:
        {source: its Verification}, the prediction last; see `inference.sources_of`.
    Raises:
        ConfigError: the run has neither a CLIP head nor a field, its teacher's weights are not
            there, or the teacher does not know a label.
        RunError: by_field, and the run has none; or see `reference_embeddings`.
        ValueError: as `verify_embeddings` and `teachers.encode_queries`.
    """
    by_field = by_field or predicts_by_field(run)
    if not by_field:
        check_head(run.model)
    model, dataset = run.model, run.dataset
    train, held_out = dataset.split.train, held_out_frames(run)
    teacher = teacher or load_teacher(run.config.teacher, next(model.parameters()).device)
    reference = reference_embeddings(run, teacher, cache_dir=cache_dir)
    texts = encode_queries(parse_queries(labels), teacher) if labels else None
    _, side_file = store_embeddings(reference, train, head_bytes(run, by_field=by_field))
    studies = {}
    for source in sources_of(model) if all_sources else sources_of(model)[-1:]:
        others = {"side_file": side_file}
        if len(held_out):
            decoded = decode_frames(model, dataset, held_out.tolist(), source=source)
            others["decoded"] = held_out, run_teacher(teacher, decoded, dataset.grid,
                                                      progress=False)
        predicted = patch_embeddings(run, source=source, by_field=by_field)
        studies[source] = verify_embeddings(
            predicted, reference, train, held_out, seed=seed, source=source, others=others,
            teacher_label=dataset.teacher_label, near=near, texts=texts,
            predictor="the field" if by_field else "the network")
    return studies


def reference_embeddings(run: Run, teacher: Teacher, *, cache_dir: str | Path | None = None
                         ) -> np.ndarray:
    """The teacher's own embeddings of the run's patches: [T, P, D].

    The teacher runs where the run was loaded without them.

    Args:
        cache_dir: where they are then kept for the next time that the run is loaded; None keeps
            them nowhere.
    Raises:
        RunError: `cache_dir` can't be written; said before the teacher runs.
    """
    data = run.dataset
    known = data.embeddings
    if known is None:
        if cache_dir is not None:
            check_writable(resolve_path(cache_dir))
        known = run_teacher(teacher, data.video.frames, data.grid, progress=False).float()
        if cache_dir is not None:
            write_cache(cache_path(data.video, data.grid, run.config.teacher, cache_dir), known,
                        {"video": data.video.name, "teacher": teacher.label})
    return check_embeddings(known, "teacher")


def patch_embeddings(run: Run, *, source: str, by_field: bool = False) -> Tensor:
    """What a run predicts for its patches: [T, P, D], by its CLIP head or by its field.

    Args:
        by_field: by its field even where it has a CLIP head.
    """
    if not (by_field or predicts_by_field(run)):
        return predict_embeddings(run.model, run.dataset, source=source)
    return load_field(run, source=source).embed(np.arange(run.model.frame_count),
                                                run.dataset.grid.boxes)


def predicts_by_field(run: Run) -> bool:
    """Whether a run has no CLIP head, but a field."""
    return not run.model.config.predict_clip and has_field(run.run_dir)


def head_bytes(run: Run, *, by_field: bool = False) -> int:
    """Bytes of the CLIP head at the width in which a run stores its weights; of a field, the
    entropy of its rounded weights, or that width where they are not rounded."""
    if by_field or predicts_by_field(run):
        field, size = load_field(run), 0.0
        for name, weight in field.head.named_parameters():
            if name in field.steps:
                _, counts = np.unique(np.round(weight.detach().cpu().numpy() / field.steps[name]),
                                      return_counts=True)
                size -= (counts * np.log2(counts / weight.numel())).sum() / 8
            else:
                size += weight.numel() * run.config.train.quant_model_bit / 8
        return int(np.ceil(size))
    return run.model.part_sizes()["clip_head"] * run.config.train.quant_model_bit // 8


def write_verification(run: Run, studies: dict[str, Verification], *,
                       labels: str | Iterable[str] = "") -> list[Path]:
    """Write the result of `verify_run` to the run's folder, each file atomically.

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
        "phase": run.config.video.split_phase,
        "sources": {source: _contents(study) for source, study in studies.items()}}
    paths = [folder / f"verification.{ending}" for ending in ("csv", "txt", "json")]
    order = [*facts, "source", *first.measures.columns]
    write_atomic(paths[0], lambda file: file.write(long[order].to_csv(index=False).encode()))
    text = "\n".join(report_text(study) for study in studies.values())
    write_atomic(paths[1], lambda file: file.write(text.encode()))
    write_json(paths[2], content)  # last: where it stands, the others do
    return paths


def _contents(study):
    held_out = study.evidence or Evidence(pd.DataFrame(), pd.DataFrame())
    return {"summary": summary(study), "answers": _records(answer_table(study.answers)),
            "evidence": {"frames": _records(held_out.frames), "knows": _records(held_out.knows)},
            **{name: _records(getattr(study, name)) for name in TABLES}}


def _records(table):
    rows = table.astype(object)
    return [{name: value.item() if isinstance(value, np.generic) else value
             for name, value in row.items()}
            for row in rows.where(rows.notna(), None).to_dict("records")]


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of a run's best checkpoint, which a verification belongs to; "" without one. Where a
    field answers in place of a head, of the field's file after it."""
    path, run = resolve_path(folder) / "model_best.pth", RunDir(folder)
    if not path.is_file():
        return ""
    answers = run.path / FIELD
    parts = [path, answers] if answers.is_file() and not run.config().model.predict_clip else [path]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
    return digest.hexdigest()


def read_verification(folder: str | Path) -> dict:
    """The content of a run's verification.json.

    Raises:
        RunError: none there, damaged, or of another format.
    """
    path, fix = resolve_path(folder) / "verification.json", "remove it and verify again"
    try:
        content = read_json(path, keys={"format": int}, fix=fix)
    except FileNotFoundError:
        raise RunError(f"{folder} holds no verification.json: run `hnerv-clip verify {folder}`"
                       ) from None
    if content["format"] != FORMAT:
        raise RunError(f"{path} has format {content['format']}, this version reads {FORMAT}: "
                       "verify again")
    check_keys(content, KEYS, path, fix=fix)
    return content


def is_verified(folder: str | Path, *, seed: int = 0, near: int = 2,
                labels: str | Iterable[str] = "", all_sources: bool = False) -> bool:
    """Whether a run has a verification of its present checkpoint, made with these settings.

    Without labels, one with any labels counts; so does one of more sources.
    """
    try:
        content = read_verification(folder)
    except RunError:
        return False
    digest = checkpoint_digest(folder)
    return (content["shuffle_seed"], content["near"]) == (seed, near) \
        and (not labels or content.get("labels", []) == parse_queries(labels)) \
        and digest in ("", content["checkpoint"]) \
        and not (all_sources and list(content["sources"]) == ["interpolated"])


def verify_folders(folders: Iterable, *, cache_dir: str | Path = "output/cache",
                   device: str = "auto", seed: int = 0, near: int = 2,
                   labels: str | Iterable[str] = "", all_sources: bool = False,
                   force: bool = False, data_paths: Iterable[str] = ()) -> list[Path]:
    """Verify runs one after the other, and keep the results in their folders.

    A run whose verification is there, of the same checkpoint, seed, near and labels, is left as it
    is; so is one with these whose checkpoint is not here any more. The teacher is loaded once for
    runs that share it.

    Args:
        data_paths: where the runs' videos lie now: one for all, or one for each; see `load_run`.
    Returns:
        The folders, as `Path`s.
    Raises:
        RunError: some could not be verified, after all others were; the message says which and why.
    """
    folders, failed, teachers = [RunDir(folder).path for folder in folders], {}, {}
    paths = match_paths(data_paths, len(folders))
    for folder, data_path in tqdm(list(zip(folders, paths, strict=True)), desc="verify", unit="run",
                                  disable=len(folders) < 2):
        asked = {"seed": seed, "near": near, "labels": labels, "all_sources": all_sources}
        if not force and is_verified(folder, **asked):
            continue
        try:
            run = load_run(folder, cache_dir=cache_dir, device=device,
                           needs_head=not has_field(folder), data_path=data_path)
            name = run.dataset.teacher_name
            if name not in teachers:
                teachers[name] = load_teacher(run.config.teacher, device)
            write_verification(run, verify_run(run, teacher=teachers[name],
                                               cache_dir=cache_dir, **asked),
                               labels=labels)
        except (RunError, ValueError) as error:
            failed[folder] = error
    if failed:
        raise RunError("; ".join(f"{folder}: {error}" for folder, error in failed.items()))
    return folders


def find_verified(folder: str | Path, names: str = "*") -> list[Path]:
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
