"""The whole study as a list of runs, a runner for any number of GPUs, and one table of results.

The runs differ from one base: in video, embedding and seed; in the weight and the start of the CLIP
loss; and in what might make the embeddings of held-out frames better (`REMEDIES`, `ENCODINGS`).
`run_study` works through them, most important first, and goes on where it was stopped;
`study_table` gathers what they gave.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hnerv_clip.ablations import PAPER_EPOCHS
from hnerv_clip.config import Config, ConfigError, embed_kind, profile_params
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs import RunDir, RunError, write_json

# bikes is smaller: 272×640, of which a crop is divisible by its strides
VIDEOS: dict[str, dict[str, Any]] = {
    "bunny": {},
    "bikes": {"data_path": "bikes", "crop_list": "256_640", "enc_strds": "4 4 2 2 2",
              "dec_strds": "4 4 2 2 2", "fc_hw": "2_5"},
}
KINDS = {"hybrid": "", "xyt": "xyt_1.25_80", "pe": "pe_1.25_80"}
LAMBDAS = (0.1, 0.05, 1, 0.2, 0.02)  # beside the base's 0.5
WARMUPS = (0, 100)  # beside the base's 50
# What might help on held-out frames and between the supervised positions, one at a time
REMEDIES: dict[str, dict[str, Any]] = {
    "pool_0.7": {"clip_pool": 0.7},
    "pool_0.35": {"clip_pool": 0.35},
    "stage_all": {"clip_stage": "all"},
    "stage_1": {"clip_stage": "1"},
    "stage_3": {"clip_stage": "3"},
    "centred": {"clip_loss_type": "centred"},
    "contrastive": {"clip_loss_type": "contrastive"},
    "jitter": {},  # by a tenth of the frame's height, see `_changes`
    "dense": {"patch_grid": "3_7"},
    "combined": {"clip_stage": "all", "clip_pool": 0.7, "clip_loss_type": "centred"},
}
# Fewer frequencies of the coordinates: the base's highest are far above one period a frame
ENCODINGS: dict[str, dict[str, dict[str, Any]]] = {
    "xyt": {"levels_40": {"embed": "xyt_1.25_40"}, "levels_24": {"embed": "xyt_1.25_24"}},
    "pe": {"levels_20": {"embed": "pe_1.25_20"}, "levels_12": {"embed": "pe_1.25_12"}},
}
# What is known of a run without its checkpoints
PACKED = ("config.json", "provenance.json", "summary.json", "study.json", "metrics.csv",
          "evaluation.csv", "measures.csv", "verification*")
SETTINGS = ("embed", "predict_clip", "clip_loss_weight", "pixel_loss_warmup_epochs", "clip_stage",
            "clip_pool", "clip_loss_type", "clip_jitter", "patch_grid", "epochs")
MEASURES = ["clip_similarity", "clip_centred", "skill", "r1", "r5", "median_rank"]
BASELINES = ["r1_chance", "constant", "neighbour", "interpolated", "over_neighbour",
             "over_interpolated"]
SHOWN = ["psnr_train_db", "psnr_held_out_db", "clip_centred_train", "clip_centred_held_out",
         "skill_held_out", "r1_held_out", "train_time_s"]  # of the table, on the terminal
PACK_LIMIT_BYTES = 16 * 2**20
SPLITS = {"train": "train", "val": "held_out"}


class StudyError(RuntimeError):
    """The study cannot go on; the message says the fix."""


# Which runs


def study_base(profile: str, settings: dict[str, Any]) -> Config:
    """The settings that the study's runs share: a profile's, evaluated at the end alone, and own.

    Args:
        settings: flat parameters that win over the profile's. With `epochs`, the warm-up shortens
            in proportion, unless it is given too.
    """
    own = profile_params(profile)
    params = own | settings
    epochs = Config.from_params(**params).train.epochs
    shorter = {"eval_freq": epochs, "pixel_loss_warmup_epochs": round(
        own["pixel_loss_warmup_epochs"] * epochs / own["epochs"])}
    return Config.from_params(**{**params, **{
        name: value for name, value in shorter.items() if name not in settings}})


def study_configs(base: Config, only: Iterable[str] = ()) -> dict[str, Config]:
    """Every run of the study by name, the most important first.

    Args:
        base: the settings that the runs share, with the CLIP head; its video is the first.
        only: patterns such as `bunny_xyt_*`; a run needs to match one of them. All by default.
    Returns:
        {VIDEO_KIND_VARIANT_sSEED: config}.
    Raises:
        ConfigError: a base without the CLIP head, or a pattern that no run matches.
    """
    if not base.model.predict_clip:
        raise ConfigError("the study's base needs the CLIP head: leave predict_clip=True; the runs "
                          "without it are in the study already")
    configs = {}
    for video, kind, variant, seed in _plan():
        first = base.replace(embed=KINDS[kind], seed=seed, **VIDEOS[video])
        configs[f"{video}_{kind}_{variant}_s{seed}"] = first.replace(
            **_changes(kind, variant, first))
    patterns = list(only)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in configs):
            raise ConfigError(f"--only {pattern!r} matches no run; see hnerv-clip study --list")
    return {name: config for name, config in configs.items()
            if not patterns or any(fnmatch(name, pattern) for pattern in patterns)}


def _plan() -> list[tuple[str, str, str, int]]:
    """(video, kind, variant, seed) of every run, in order."""
    lambdas = [f"lambda_{value:g}" for value in LAMBDAS]
    warmups = [f"warmup_{value}" for value in WARMUPS]
    later = (1, 2)
    runs = [("bunny", kind, "base", seed) for seed in (0, *later) for kind in KINDS]
    runs += [("bunny", "hybrid", "pixels_only", seed) for seed in (0, *later)]
    runs += [("bikes", kind, "base", 0) for kind in KINDS]
    runs += [("bunny", "hybrid", variant, 0) for variant in lambdas + warmups]
    runs += [("bunny", "xyt", variant, 0) for variant in ("levels_40", *REMEDIES)]
    runs += [("bikes", kind, "base", seed) for seed in later for kind in KINDS]
    runs += [("bunny", "hybrid", variant, seed) for seed in later
             for variant in ("lambda_0.1", "lambda_0.05")]
    runs += [("bunny", kind, variant, 0) for kind in ENCODINGS for variant in ENCODINGS[kind]]
    runs += [("bunny", "hybrid", variant, 0) for variant in REMEDIES]
    runs += [("bikes", "hybrid", "pixels_only", seed) for seed in (0, *later)]
    runs += [("bunny", kind, "pixels_only", seed) for kind in ("xyt", "pe")
             for seed in (0, *later)]
    runs += [("bunny", "hybrid", variant, seed) for seed in later for variant in lambdas + warmups]
    runs += [("bunny", kind, variant, seed) for seed in later for kind in ENCODINGS
             for variant in ENCODINGS[kind]]
    runs += [("bunny", kind, variant, seed) for seed in later for kind in ("xyt", "hybrid")
             for variant in REMEDIES]
    return list(dict.fromkeys(runs))


def _changes(kind: str, variant: str, base: Config) -> dict[str, Any]:
    """The settings in which a variant differs from the base; warm-ups count in 300 epochs."""
    if variant == "base":
        return {}
    if variant == "pixels_only":
        return {"predict_clip": False}
    name, _, value = variant.partition("_")
    if name == "lambda":
        return {"clip_loss_weight": float(value)}
    if name == "warmup":
        return {"pixel_loss_warmup_epochs": round(
            int(value) * base.train.epochs / PAPER_EPOCHS)}
    if name == "jitter":
        return {"clip_jitter": round((base.video.resize_list or base.video.crop_list)[0] / 10)}
    return REMEDIES.get(variant) or ENCODINGS[kind][variant]


def between_grid(config: Config) -> str:
    """The base's patch grid with a row and a column between each two: `2_4` gives `3_7`.

    Every second of its patches is one of the base's.

    Raises:
        ConfigError: the base places its patches by stride.
    """
    if config.teacher.patch_grid is None:
        raise ConfigError("the study measures between the supervised positions of a grid; set "
                          "patch_grid, for example 2_4")
    return "_".join(str(2 * count - 1) for count in config.teacher.patch_grid)


# Run them


@dataclass
class _Worker:
    """A process that works through runs, and the run that it is at."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    name: str = ""
    started: float = 0.0


def run_study(configs: dict[str, Config], folder: str | Path, *, base: Config,
              cache_dir: str | Path = "output/cache", workers: int = 0,
              minutes: float = float("inf"), with_verify: bool = True,
              say: Callable[[str], Any] = print) -> dict[str, str]:
    """Train and measure the runs that are not finished, each worker one at a time.

    Killed at any moment, the next call goes on from the last checkpoints. A run that fails is
    reported and the others go on; another process that trains a run is left alone.

    Args:
        configs: as from `study_configs`.
        folder: where the runs' folders go, by name; errors go to NAME.error.txt.
        base: says at which positions all runs are measured.
        workers: processes, spread over the GPUs; 0 for one on each GPU, or one on the CPU.
        minutes: after so many, workers are stopped; before, no run is begun that would not end in
            time, judged by those that did.
        with_verify: put each run to `verify_runs.verify_run`, too.
    Returns:
        {name: finished, failed, stopped, busy or waiting}.
    """
    folder, deadline = resolve_path(folder), time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    states = {name: "finished" if _is_done(folder / name, config, with_verify) else "waiting"
              for name, config in configs.items()}
    queue = [name for name, state in states.items() if state == "waiting"]
    if minutes <= 0 or not queue:
        return states
    prepare_study([configs[name] for name in queue], base=base, cache_dir=cache_dir, say=say)
    gpus = _visible_gpus()
    count = min(workers or max(1, len(gpus)), len(queue))
    options = {"folder": folder, "cache_dir": cache_dir, "grid": base.params()["patch_grid"],
               "between": between_grid(base), "verify": with_verify,
               "runs_per_device": -(-count // max(1, len(gpus))),
               "threads": max(1, (os.cpu_count() or 1) // count)}
    crew: list[_Worker | None] = [None] * count
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and stop the workers
    durations: list[float] = []
    try:
        while True:
            for place in range(count):
                name = _next_run(queue, states, folder, deadline, durations)
                if name and (crew[place] is None or not crew[place].name):
                    crew[place] = crew[place] or _start_worker(gpus, place, options)
                    crew[place].connection.send((name, configs[name].params()))
                    crew[place].name, crew[place].started = name, time.monotonic()
                    states[name] = "stopped"  # until it ends
                elif name:
                    queue.insert(0, name)
            busy = {worker.connection: place for place, worker in enumerate(crew)
                    if worker and worker.name}
            if not busy:
                break
            left = deadline - time.monotonic()
            ready = wait(list(busy), timeout=min(max(left, 0), 3600))
            if not ready and left <= 0:
                say(f"{minutes:g} minutes are over; the runs under way go on next time")
                break
            for connection in ready:
                place = busy[connection]
                worker = crew[place]
                error = _outcome(worker)
                seconds = time.monotonic() - worker.started
                if error:  # its device may be in a bad state: go on with a new process
                    states[worker.name] = "failed"
                    (folder / f"{worker.name}.error.txt").write_text(error)
                    say(f"{worker.name} failed after {seconds:.0f} s: "
                        f"{error.strip().splitlines()[-1]}")
                    worker.process.join()
                    crew[place] = None
                else:
                    states[worker.name] = "finished"
                    (folder / f"{worker.name}.error.txt").unlink(missing_ok=True)
                    durations.append(seconds)
                    say(f"{worker.name} finished after {seconds:.0f} s "
                        f"({list(states.values()).count('finished')} of {len(states)})")
                worker.name = ""
    finally:
        for worker in filter(None, crew):
            worker.connection.close()  # an idle one ends by itself
            if worker.name:
                worker.process.terminate()
        for worker in filter(None, crew):
            worker.process.join(timeout=30)
            worker.process.kill()
        signal.signal(signal.SIGTERM, before)
    return states


def _is_done(run_dir: Path, config: Config, with_verify: bool) -> bool:
    wanted = ["study.json"] + ["measures.csv"] * config.model.predict_clip
    wanted += ["verification.json"] * (config.model.predict_clip and with_verify)
    return RunDir(run_dir).finished and all((run_dir / name).exists() for name in wanted)


def _next_run(queue: list[str], states: dict[str, str], folder: Path, deadline: float,
              durations: list[float]) -> str | None:
    """Take the next run that nobody trains, if there is time for it."""
    needed = statistics.median(durations) if durations else 0
    while queue and time.monotonic() + needed < deadline:
        name = queue.pop(0)
        if not (folder / name).exists():
            return name
        try:
            with RunDir(folder / name).lock():
                return name
        except RunError:
            states[name] = "busy"
    return None


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or every GPU."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _start_worker(gpus: list[str], place: int, options: dict[str, Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=_work, args=(other, options), name=f"study-{place}")
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        if gpus:  # the worker sees its own alone
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
        process.start()
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif gpus:
            del os.environ["CUDA_VISIBLE_DEVICES"]
    other.close()
    return _Worker(process, own)


def _outcome(worker: _Worker) -> str:
    """What a worker reported of its run: an error's text, or nothing."""
    try:
        return worker.connection.recv()
    except EOFError:
        worker.process.join()
        return f"the process ended with exit code {worker.process.exitcode}"


def _work(connection: Connection, options: dict[str, Any]) -> None:
    """A worker's life: runs until the pipe closes, or one fails."""
    import torch

    torch.set_num_threads(options["threads"])
    while True:
        try:
            name, params = connection.recv()
        except EOFError:
            return
        try:
            _make_run(name, Config.from_params(**params), options)
        except Exception:
            connection.send(traceback.format_exc())
            return
        connection.send("")


def _make_run(name: str, config: Config, options: dict[str, Any]) -> None:
    """Train one run to its end, and write what was found beside it."""
    from hnerv_clip.evaluate import load_run
    from hnerv_clip.train import train
    from hnerv_clip.verify_runs import verify_run, write_verification

    run_dir = options["folder"] / name
    train(config, run_dir, cache_dir=options["cache_dir"], progress=False)
    video, _, variant = name[:name.rindex("_s")].split("_", 2)
    write_json(run_dir / "study.json", {"name": name, "video": video, "variant": variant,
                                        "runs_per_device": options["runs_per_device"]})
    if config.model.predict_clip:
        run = load_run(run_dir, cache_dir=options["cache_dir"], device=config.train.device)
        run.run_dir.write_table("measures.csv", measure_run(
            run, grid=options["grid"], between=options["between"],
            cache_dir=options["cache_dir"]))
        if options["verify"]:
            write_verification(run, verify_run(run))


def prepare_study(configs: Iterable[Config], *, base: Config, cache_dir: str | Path,
                  say: Callable[[str], Any] = print) -> None:
    """Check every run, and run the teacher where its embeddings are not cached.

    Raises:
        ConfigError: see `check_run` and `prepare_dataset`.
    """
    from hnerv_clip.dataset import prepare_dataset
    from hnerv_clip.train import check_run

    wanted: dict[tuple, Config] = {}
    for config in configs:
        check_run(config)
        grids = {config.params()["patch_grid"], base.params()["patch_grid"], between_grid(base)}
        for grid in grids:
            needed = config.replace(patch_grid=grid, predict_clip=True)
            wanted.setdefault((needed.video, needed.teacher), needed)
    for config in wanted.values():
        started = time.monotonic()
        dataset = prepare_dataset(config, cache_dir, device=config.train.device, progress=False)
        say(f"{dataset.video.name}, {len(dataset.grid)} patches a frame, "
            f"{dataset.teacher_label}: {time.monotonic() - started:.0f} s")


# What a run gave


def measure_run(run, *, grid: str, between: str, cache_dir: str | Path) -> pd.DataFrame:
    """How well a run predicts embeddings, at the supervised positions and between them.

    Args:
        run: an `evaluate.Run` with the CLIP head.
        grid: the study's `patch_grid`, the same for all runs whatever their own.
        between: `between_grid` of it.
    Returns:
        A row per source, split (train, held_out) and place (supervised, between): frames, n, means
        clip_similarity and clip_centred, skill against the constant, r1, r5 and median_rank among
        all patches of that place, chance r1_chance; what needs no network: constant (raw cosine),
        neighbour and interpolated (centred cosine of the nearest training frame's and of the
        interpolated teacher's embeddings), and by how much the network is over those two. With 8
        frames or more, MEASURE_se and MEASURE_freedom of four of them, see
        `statistics.mean_interval`.
    """
    from hnerv_clip.evaluate import predict_embeddings, sources_of
    from hnerv_clip.patches import make_grid
    from hnerv_clip.teachers import cached_embeddings

    teacher = run.config.replace(patch_grid=between).teacher
    patches = make_grid(teacher, run.dataset.video.frame_hw)
    target = cached_embeddings(run.dataset.video, patches, teacher, cache_dir)
    if target is None:
        raise ConfigError(f"no embeddings for patch_grid={between}; call prepare_study first")
    dense = replace(run.dataset, grid=patches, embeddings=target)
    rows, cols = (int(count) for count in grid.split("_"))
    chosen = np.zeros((patches.rows, patches.cols), bool)
    # a grid of one row or column has it in the middle, as the other grid has
    chosen[::2 if rows > 1 else 1, ::2 if cols > 1 else 1] = True
    places = {"supervised": chosen.ravel(), "between": ~chosen.ravel()}
    target = target.numpy()
    split = run.dataset.split
    known = target[split.train][:, places["supervised"]].mean((0, 1))  # [D]
    found = []
    for source in sources_of(run.model):
        predicted = predict_embeddings(run.model, dense, source=source).numpy()
        for part, frames in [("train", split.train), ("val", split.val)]:
            if len(frames) and not (part == "train" and source == "interpolated"):
                found += [{"source": source, "split": SPLITS[part], "place": place,
                           **_measures(predicted[:, where], target[:, where], frames, split.train,
                                       known)} for place, where in places.items() if where.any()]
    return pd.DataFrame(found)


def _measures(predicted: np.ndarray, target: np.ndarray, frames: np.ndarray, train: np.ndarray,
              known: np.ndarray) -> dict[str, float]:
    """The columns of `measure_run` for embeddings [T, P, D] on some frames."""
    from hnerv_clip.controls import interpolate_teacher, nearest_training_frame
    from hnerv_clip.measures import (
        centred_cosine,
        cosine,
        retrieval_ranks,
        retrieval_summary,
        skill,
        unit,
    )
    from hnerv_clip.statistics import MIN_FRAMES, mean_interval, smooth_interval

    own, right = predicted[frames], target[frames]
    raw, constant = cosine(own, right).mean(1), cosine(unit(known), right).mean(1)  # [N]
    centred, neighbour, interpolated = (
        centred_cosine(answer, right, known).mean(1) for answer in (
            own, target[nearest_training_frame(frames, train)],
            interpolate_teacher(target, train, frames)))
    ranks = retrieval_summary(retrieval_ranks(own, target, frames))
    found = {
        "frames": len(frames), "n": own.shape[0] * own.shape[1], "clip_similarity": raw.mean(),
        "clip_centred": centred.mean(), "skill": float(skill(raw.mean(), constant.mean())),
        **{name: ranks[name] for name in ("r1", "r5", "median_rank", "r1_chance")},
        "constant": constant.mean(), "neighbour": neighbour.mean(),
        "interpolated": interpolated.mean(),
        "over_neighbour": (centred - neighbour).mean(),
        "over_interpolated": (centred - interpolated).mean()}
    if len(frames) >= MIN_FRAMES:
        others = len(frames) - 1
        without = skill((raw.sum() - raw) / others, (constant.sum() - constant) / others)
        intervals = {"clip_centred": mean_interval(centred),
                     "skill": smooth_interval(found["skill"], without),
                     "over_neighbour": mean_interval(centred - neighbour),
                     "over_interpolated": mean_interval(centred - interpolated)}
        for name, interval in intervals.items():
            found |= {f"{name}_se": interval.standard_error, f"{name}_freedom": interval.freedom}
    return found


def study_table(folder: str | Path) -> pd.DataFrame:
    """What the finished runs in a folder gave, a row per run, in the study's order.

    Returns:
        run, video, kind, variant, seed; every setting in which runs differ; psnr_…_db, ms_ssim_…
        of train and held_out (interpolated or from coordinates) and held_out_encoder; the measures
        of `measure_run` as MEASURE_PART and, between the positions, MEASURE_between_PART;
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
    order = {"_".join(map(str, run[:3])) + f"_s{run[3]}": i for i, run in enumerate(_plan())}
    names.sort(key=lambda name: (order.get(name, len(order)), name))
    params = pd.DataFrame([RunDir(folder / name).config().params() for name in names])
    shown = [c for c in params if c in SETTINGS or params[c].nunique() > 1]
    shown = [c for c in shown if c not in ("seed", "data_path")]
    rows = [_row(RunDir(folder / name)) for name in names]
    head = pd.DataFrame(rows)
    first = ["run", "video", "kind", "variant", "seed"]
    return pd.concat([head[first], params[shown], head.drop(columns=first)], axis=1)


def _row(run: RunDir) -> dict[str, Any]:
    from hnerv_clip.teachers import describe_teacher

    config, summary, facts = run.config(), run.summary(), run.provenance()
    study = run._read_json("study.json")
    kind = embed_kind(config.model.embed)
    parts = {"train": "train", "held_out": "val_interpolated" if kind == "hybrid" else "val"}
    parts |= {"held_out_encoder": "val"} if kind == "hybrid" else {}
    row = {"run": study["name"], "video": study["video"], "kind": kind,
           "variant": study["variant"], "seed": config.train.seed}
    for name, part in parts.items():
        row[f"psnr_{name}_db"] = summary.get(f"eval_psnr_{part}", float("nan"))
        row[f"ms_ssim_{name}"] = summary.get(f"eval_ms_ssim_{part}", float("nan"))
        for measure in ("clip_similarity", "clip_centred"):  # as the run itself evaluated them
            row[f"{measure}_{name}"] = summary.get(f"eval_{measure}_{part}", float("nan"))
    if (run.path / "measures.csv").exists():
        for found in pd.read_csv(run.path / "measures.csv").to_dict("records"):
            part = found["split"]
            if found["source"] == "encoder" and part == "held_out":
                part = "held_out_encoder"
            place = "" if found["place"] == "supervised" else "between_"
            measures = MEASURES + ([] if part == "held_out_encoder" else BASELINES)
            for measure in [*measures, *(c for c in found if c.endswith(("_se", "_freedom"))
                                         and c.rsplit("_", 1)[0] in measures)]:
                row[f"{measure}_{place}{part}"] = found[measure]
    sizes = summary["part_sizes"]
    return row | {
        "rate_bpp": summary["rate_bpp"], "size_bytes": summary["size_bytes"],
        "stored_values": sizes["stored"], "clip_head_values": sizes["clip_head"],
        "train_time_s": summary["train_time_s"],
        "train_frames_per_s": summary["train_frames_per_s"],
        "runs_per_device": study["runs_per_device"], "device": facts["device"],
        "commit": facts["commit"], "dirty": facts["dirty"],
        "teacher_label": describe_teacher(config.teacher).label if config.model.predict_clip
        else None}


def pack_study(folder: str | Path, path: str | Path) -> int:
    """Put all but the checkpoints of a study's runs into a .tar.xz; returns its size_bytes.

    Unpacked into a folder, `study_table` reads it as it reads the runs.

    Raises:
        StudyError: nothing to pack, or more than 16 MiB.
    """
    folder, path = resolve_path(folder), resolve_path(path)
    files = [file for pattern in PACKED for file in sorted(folder.glob(f"*/{pattern}"))]
    files += sorted(folder.glob("*.error.txt"))
    if not files:
        raise StudyError(f"{folder} holds no runs to pack")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w:xz") as archive:
        for file in files:
            archive.add(file, str(file.relative_to(folder)))
    size_bytes = partial.stat().st_size
    if size_bytes > PACK_LIMIT_BYTES:
        partial.unlink()
        raise StudyError(f"{path.name} would have {size_bytes / 2**20:.1f} MiB, above "
                         f"{PACK_LIMIT_BYTES / 2**20:.0f}; move some runs to another folder and "
                         "pack that apart")
    partial.replace(path)
    return size_bytes


def write_study(folder: str | Path, path: str | Path) -> pd.DataFrame:
    """Write `study_table` as CSV, with six significant digits, and return it."""
    table = study_table(folder)
    path = resolve_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.6g")
    return table


def read_study(path: str | Path) -> pd.DataFrame:
    """What `write_study` wrote.

    Raises:
        StudyError: there is no such file.
    """
    try:
        table = pd.read_csv(resolve_path(path), dtype={"embed": str, "patch_grid": str})
    except FileNotFoundError:
        raise StudyError(f"{path} does not exist; write it with hnerv-clip study --csv") from None
    return table.fillna({"embed": "", "patch_grid": ""})


def count_states(states: dict[str, str]) -> str:
    """How many runs are in which state, in a line."""
    counts = pd.Series(states).value_counts()
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def show_plan(configs: dict[str, Config], base: Config) -> str:
    """The runs as text, a line each, with what differs from the base."""
    lines = []
    for name, config in configs.items():
        changed = ", ".join(f"{key}={new!r}" for key, (_, new) in base.diff(config).items())
        lines.append(f"{name:<32}{changed}")
    return "\n".join(lines) + f"\n{len(configs)} runs"
