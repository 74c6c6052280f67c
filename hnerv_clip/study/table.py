"""What the study's runs gave: measured by positions, gathered in one table, packed into a file."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from hnerv_clip.config import RUNTIME_PARAMS
from hnerv_clip.files import RunError, open_archive, read_table, write_atomic
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.rows import MEASURES as FIGURES
from hnerv_clip.runs.rows import run_row
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.study.plan import plan_runs

# What is known of a run without its checkpoints
PACKED = ("config.json", "provenance.json", "summary.json", "study.json", "metrics.csv",
          "evaluation.csv", "measures.csv", "verification*")
SETTINGS = ("embed", "predict_clip", "clip_loss_weight", "pixel_loss_warmup_epochs", "clip_stage",
            "clip_pool", "clip_loss_type", "clip_jitter", "patch_grid", "epochs")
MEASURES = ["clip_similarity", "clip_centred", "skill", "r1", "r5", "median_rank"]
BASELINES = ["r1_chance", "constant", "neighbour", "interpolated", "over_neighbour",
             "over_interpolated", "skill_own_places", "skill_teacher_places", "over_own_places"]
SHOWN = ["psnr_train_db", "psnr_held_out_db", "clip_centred_train", "clip_centred_held_out",
         "skill_held_out", "r1_held_out", "train_time_s"]  # of the table, on the terminal
PACK_LIMIT_BYTES = 16 * 2**20


class StudyError(RuntimeError):
    """The study cannot go on; the message says the fix."""


def measure_run(run: Any, *, grid: str, cache_dir: str | Path) -> pd.DataFrame:
    """How well a run predicts embeddings, at the supervised positions, between them and anywhere.

    Args:
        run: an `evaluate.Run` with the CLIP head.
        grid: the study's `patch_grid`, the same for all runs whatever their own: a run that was
            taught by a denser one was taught at the positions between, but never at those that
            stand for anywhere, see `positions.anywhere_grid`.
    Returns:
        A row per source, split (train, held_out) and place (supervised, between, anywhere): frames,
        n, means clip_similarity and clip_centred, skill against the constant, r1, r5 and
        median_rank among all patches of that place, chance r1_chance; what needs no network:
        constant (raw cosine), neighbour and interpolated (centred cosine of the nearest training
        frame's and of the interpolated teacher's embeddings), and by how much the network is over
        those two; away from the supervised positions also the skill of their answers, interpolated:
        skill_own_places of the network's, skill_teacher_places of the teacher's, and
        over_own_places, how much centred cosine asking the head there brings. With 8 frames or
        more, MEASURE_se and MEASURE_freedom of some, see `statistics.mean_interval`.
    """
    from hnerv_clip.inference import sources_of
    from hnerv_clip.patches import make_grid
    from hnerv_clip.verify.positions import answer_positions

    taught = make_grid(run.config.replace(patch_grid=grid).teacher, run.dataset.video.frame_hw)
    split, found = run.dataset.split, []
    for source in sources_of(run.model):
        answers = answer_positions(run, taught=taught, source=source, cache_dir=cache_dir,
                                   device=run.config.train.device, progress=False)
        known = answers["supervised"].teacher[split.train].mean((0, 1))  # [D]
        for part, frames in [("train", split.train), ("held_out", split.val)]:
            if len(frames) and not (part == "train" and source == "interpolated"):
                found += [{"source": source, "split": part, "place": name,
                           **_measures(name, place, frames, split.train, known)}
                          for name, place in answers.items()]
    return pd.DataFrame(found)


def _measures(name: str, place, frames: np.ndarray, train: np.ndarray, known: np.ndarray
              ) -> dict[str, float]:
    """The columns of `measure_run` for a `positions.Positions` on some frames."""
    from hnerv_clip.metrics import centred_cosine, cosine, skill, unit
    from hnerv_clip.verify.baselines import interpolate_teacher, nearest_training_frame
    from hnerv_clip.verify.retrieval import retrieval_ranks, retrieval_summary
    from hnerv_clip.verify.time_series import MIN_FRAMES, mean_interval, smooth_interval

    own, right = place.network[frames], place.teacher[frames]
    raw, constant = cosine(own, right).mean(1), cosine(unit(known), right).mean(1)  # [N]
    centred, neighbour, interpolated, own_places = (
        centred_cosine(answer, right, known).mean(1) for answer in (
            own, place.teacher[nearest_training_frame(frames, train)],
            interpolate_teacher(place.teacher, train, frames), place.own_places[frames]))
    over = {"over_neighbour": centred - neighbour, "over_interpolated": centred - interpolated}
    ranks = retrieval_summary(retrieval_ranks(own, place.teacher, frames))
    found = {
        "frames": len(frames), "n": own.shape[0] * own.shape[1], "clip_similarity": raw.mean(),
        "clip_centred": centred.mean(), "skill": float(skill(raw.mean(), constant.mean())),
        **{measure: ranks[measure] for measure in ("r1", "r5", "median_rank", "r1_chance")},
        "constant": constant.mean(), "neighbour": neighbour.mean(),
        "interpolated": interpolated.mean()}
    if name != "supervised":
        over["over_own_places"] = centred - own_places
        found |= {f"skill_{answer}": float(skill(
            cosine(getattr(place, answer)[frames], right).mean(), constant.mean()))
            for answer in ("own_places", "teacher_places")}
    found |= {measure: series.mean() for measure, series in over.items()}
    if len(frames) >= MIN_FRAMES:
        others = len(frames) - 1
        without = skill((raw.sum() - raw) / others, (constant.sum() - constant) / others)
        intervals = {"clip_centred": mean_interval(centred),
                     "skill": smooth_interval(found["skill"], without),
                     **{measure: mean_interval(series) for measure, series in over.items()}}
        for measure, interval in intervals.items():
            found |= {f"{measure}_se": interval.standard_error,
                      f"{measure}_freedom": interval.freedom}
    return found


def study_table(folder: str | Path) -> pd.DataFrame:
    """What the finished runs in a folder gave, a row per run, in the study's order.

    Returns:
        run, video, kind, variant, seed; every setting in which runs differ; psnr_…_db, ms_ssim_…
        of train and held_out (interpolated or from coordinates) and held_out_encoder; the measures
        of `measure_run` as MEASURE_PART and, by place, MEASURE_between_PART, MEASURE_anywhere_PART;
        rate_bpp, size_bytes, stored_values, clip_head_values, train_time_s, train_frames_per_s,
        runs_per_device, device, commit, dirty, teacher_label. Empty where a run has no such figure;
        cosines alone where it was not measured as the study does.
    Raises:
        StudyError: no finished run there.
    """
    folder = resolve_path(folder)
    names = [path.parent.name for path in sorted(folder.glob("*/study.json"))
             if RunDir(path.parent).finished]
    if not names:
        raise StudyError(f"{folder} holds no finished run of the study; run `hnerv-clip study` "
                         "first, or unpack its results there")
    order = {"_".join(map(str, run[:3])) + f"_s{run[3]}": i for i, run in enumerate(plan_runs())}
    names.sort(key=lambda name: (order.get(name, len(order)), name))
    params = pd.DataFrame([RunDir(folder / name).config().params() for name in names])
    shown = [c for c in params if c in SETTINGS or params[c].nunique() > 1]
    shown = [c for c in shown if c not in ("seed", "data_path", *RUNTIME_PARAMS)]
    rows = [_row(RunDir(folder / name)) for name in names]
    head = pd.DataFrame(rows)
    first = ["run", "video", "kind", "variant", "seed"]
    return pd.concat([head[first], params[shown], head.drop(columns=first)], axis=1)


def _row(run: RunDir) -> dict[str, Any]:
    from hnerv_clip.teachers import describe_teacher

    config, figures = run.config(), run_row(run)
    study = run._read_json("study.json")
    row = {"run": study["name"], "video": study["video"], "kind": figures["kind"],
           "variant": study["variant"], "seed": figures["seed"]}
    for part in ("train", "held_out", "held_out_encoder"):  # as the run itself evaluated them
        row |= {name: figures[name] for column in FIGURES
                if (name := column.format(part)) in figures}
    if (run.path / "measures.csv").exists():
        measured = read_table(run.path / "measures.csv", ("source", "split", "place"),
                              fix="remove it and run the study again")
        for found in measured.to_dict("records"):
            part = found["split"]
            if found["source"] == "encoder" and part == "held_out":
                part = "held_out_encoder"
            place = "" if found["place"] == "supervised" else f"{found['place']}_"
            measures = MEASURES + ([] if part == "held_out_encoder" else BASELINES)
            for column, value in found.items():
                measure = column.removesuffix("_se").removesuffix("_freedom")
                if measure in measures and pd.notna(value):
                    row[f"{column}_{place}{part}"] = value
    names = ("rate_bpp", "size_bytes", "stored_values", "clip_head_values", "train_time_s",
             "train_frames_per_s")
    return row | {name: figures[name] for name in names} | {
        "runs_per_device": study["runs_per_device"],
        **{name: figures[name] for name in ("device", "commit", "dirty")},
        "teacher_label": describe_teacher(config.teacher).label if config.model.predict_clip
        else None}


def pack_study(folder: str | Path, path: str | Path, *, force: bool = False) -> int:
    """Put a study's finished runs, without checkpoints, into a .tar.xz; returns its size_bytes.

    Unpacked into a folder, `study_table` reads it as it reads the runs.

    Args:
        force: leave out what only a pack in its place holds.

    Raises:
        StudyError: nothing to pack, or more than 16 MiB.
    """
    folder, path = resolve_path(folder), resolve_path(path)
    files = [file for pattern in PACKED for file in sorted(folder.glob(f"*/{pattern}"))
             if RunDir(file.parent).finished]  # one under way is nothing without its checkpoint
    files += sorted(folder.glob("*.error.txt"))
    if not files:
        raise StudyError(f"{folder} holds no runs to pack")
    return write_pack(path, folder, files, force=force, limit_bytes=PACK_LIMIT_BYTES)


def write_pack(path: Path, folder: Path, files: Sequence[Path], *, force: bool = False,
               limit_bytes: float = math.inf) -> int:
    """Put files of a folder into a .tar.xz, with what else a pack in its place holds.

    Such as a run that was finished, and is trained again: it stays as it was packed.

    Args:
        force: leave out what only the old pack holds.
    Returns:
        size_bytes.
    Raises:
        StudyError: the pack would be larger than the limit.
        RunError: the file in its place is no pack.
    """
    new = {file.relative_to(folder).as_posix(): file for file in files}
    runs = {PurePosixPath(name).parent for name in new if name.endswith("/config.json")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w:xz") as archive:
        for name, file in new.items():
            archive.add(file, name)
        if path.exists() and not force:
            with open_archive(path) as old:
                for member in old:
                    if member.isfile() and not member.name.endswith(".error.txt") \
                            and member.name not in new \
                            and PurePosixPath(member.name).parent not in runs:
                        archive.addfile(member, old.extractfile(member))
    size_bytes = partial.stat().st_size
    if size_bytes > limit_bytes:
        partial.unlink()
        raise StudyError(f"{path.name} would have {size_bytes / 2**20:.1f} MiB, above "
                         f"{limit_bytes / 2**20:.0f}; move some runs to another folder and "
                         "pack that apart")
    partial.replace(path)
    return size_bytes


def check_pack(folder: str | Path, path: str | Path) -> None:
    """Refuse to put a pack of a folder in place of a file that holds more than the folder.

    Args:
        folder: of the runs.
        path: of the pack that is going to be written, by `pack_study` or `book_runs.pack_state`.
    Raises:
        RunError: the file is no pack.
        StudyError: it has a run or another file that the folder has not.
    """
    folder, path = resolve_path(folder), resolve_path(path)
    if not path.exists():
        return
    fix = "choose another --pack, or add --force to replace it"
    try:
        with open_archive(path) as archive:
            names = [PurePosixPath(member.name) for member in archive if member.isfile()]
    except (OSError, RunError) as error:
        raise RunError(f"{path} exists and is no pack: {fix}") from error
    runs = {name.parent for name in names if name.name == "config.json"}
    # A run that is trained again lacks files meanwhile, and an error goes once its run succeeds
    held = {name.parent if name.parent in runs else name for name in names
            if not name.name.endswith(".error.txt")}
    if lost := sorted(name for name in held if not (folder / name).exists()):
        raise StudyError(f"{path} holds what {folder} has not, such as {lost[0]}, and would lose "
                         f"{len(lost)} of {len(held)}: {fix}; with --plan book an empty "
                         "--outf resumes from it")


def check_replaced(path: str | Path, table: pd.DataFrame) -> None:
    """Refuse to put a table of the study in place of one that says more.

    Args:
        table: with the column run, and any of those of `study_table`.
    Raises:
        StudyError: the file has a run that the table lacks, or has with other settings.
    """
    path = resolve_path(path)
    if not path.exists():
        return
    new = pd.read_csv(io.StringIO(_as_csv(table)), dtype=str).fillna("").set_index("run")
    old = read_table(path, ("run",), dtype=str, fix="remove it").fillna("").set_index("run")
    fix = "give another --csv, or add --force to replace it"
    if lost := [run for run in old.index if run not in new.index]:
        raise StudyError(f"{path} holds runs that are not among these, such as {lost[0]}, and "
                         f"would lose {len(lost)} of {len(old)}: {fix}")
    for name in (*SETTINGS, "stored_values"):
        if name in old and name in new and (old[name] != new[name].loc[old.index]).any():
            raise StudyError(f"{path} holds these runs with another {name}: {fix}")


def _as_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, float_format="%.6g")


def write_study(folder: str | Path, path: str | Path, *, force: bool = False) -> pd.DataFrame:
    """Write `study_table` as CSV, with six significant digits, and return it.

    Args:
        force: replace a file that says more.
    Raises:
        StudyError: see `study_table` and `check_replaced`.
    """
    table = study_table(folder)
    if not force:
        check_replaced(path, table)
    path = resolve_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _as_csv(table)
    write_atomic(path, lambda file: file.write(text.encode()))
    return table


def read_study(path: str | Path) -> pd.DataFrame:
    """What `write_study` wrote.

    Raises:
        StudyError: there is no such file, or a run in it lacks what every run has.
    """
    try:
        table = read_table(resolve_path(path), ("run", "variant"), dtype={
            "embed": str, "patch_grid": str}, fix="write it again with hnerv-clip study --csv")
    except FileNotFoundError:
        raise StudyError(f"{path} does not exist; write it with hnerv-clip study --csv") from None
    for column, rows in {"psnr_train_db": table,
                         "clip_centred_train": table[table.variant != "pixels_only"]}.items():
        broken = rows[rows[column].isna()] if column in table else rows
        if len(broken):
            raise StudyError(f"{path}: {broken.run.iloc[0]} has no {column}; write the table again "
                             "with hnerv-clip study --csv, or leave that run out")
    return table.fillna({"embed": "", "patch_grid": ""})
