"""The search for the preset `best`: the settings that give the best picture in a given time.

`search` fits segments of several videos for a fixed time each, by settings that Optuna proposes;
many processes share the GPUs and one journal file, and a search that was stopped can be resumed.
On a GPU one process at a time takes its timed steps and evaluates; compilation and warm-up steps of
the others share the GPU meanwhile, and may slow it.
`compare` then trains the winner and the faithful preset on whole videos and with seeds that the
search did not use, one run at a time, to equal size and in equal time. The search has seen the
first frames of bunny, bikes and carphone; any other video is new to it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hnerv_clip.config import PRESETS, Config, ConfigError
from hnerv_clip.dataset import load_dataset, resolve_config
from hnerv_clip.devices import select_device, set_precision, synchronise, visible_gpus
from hnerv_clip.engines.select import make_engine, settle
from hnerv_clip.evaluate import evaluate_model
from hnerv_clip.files import RunError, check_keys, read_json, write_json
from hnerv_clip.losses import learning_rate
from hnerv_clip.model import build_model
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.locks import hold
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.sizes import LEAST_SIZE, VALUES_PER_PIXEL, choose_strides
from hnerv_clip.train import epoch_order, train
from hnerv_clip.video import label_video

# What the search sees: the first frames of three videos. The rest of these, and any other file, is
# left for the comparison
SEGMENTS: dict[str, dict[str, Any]] = {
    "bunny": {"data_path": "bunny", "frame_limit": 32},
    "bikes": {"data_path": "bikes", "frame_limit": 64},
    "carphone": {"data_path": "carphone", "frame_limit": 64},
}
FAITHFUL = {"batch_size": 2, "lr": 1e-3}  # the paper's
BASE = {"predict_clip": False, "data_split": "1_1_1"}
SEARCH_SEED = 1000  # the comparison's are 0, 1, 2, …
ROW_KEYS = {"recipe": str, "video": str, "seed": int, "seconds": (int, float)}
PROBE_S = 3.0  # of steps, that tell how long one takes
WARM_UP = 8  # steps before the clock starts: they compile and capture
REPORTS = 4  # of a fit, at which it may be pruned
# By name: all the values of a setting, or the limits of a number. The fused engine knows them all
SPACE: dict[str, list[Any] | tuple[float, float]] = {
    "lr": (1.5e-3, 8e-3),
    "batch_size": [1, 2],
    "warm_up": (0.02, 0.3),  # share of training
    "loss": ["L2", "Fusion6"],
    "act": ["gelu", "swish", "sin"],
    "ks": ["0_1_3", "0_1_5", "0_1_7", "0_3_3", "0_3_5"],
    "num_blks": ["1_1", "1_2", "2_1"],
    "reduce": (1.0, 1.5),
    "encoder_width": [32, 64],
    "embedding_channels": [4, 8, 16, 32],
    "cells": [2, 8, 32, 128],
}
# Named by the space, as Optuna refuses a study that was begun with another
STUDY = f"recipe {hashlib.sha256(repr(SPACE).encode()).hexdigest()[:8]}"
# The preset `best`, and single changes of it: what the search begins with
PRESET = {"lr": PRESETS["best"]["lr"], "batch_size": PRESETS["best"]["batch_size"], "warm_up": 0.1,
          "loss": "L2", "act": "gelu", "ks": "0_1_5", "num_blks": "1_1", "reduce": 1.2,
          "encoder_width": 64, "embedding_channels": 16, "cells": 8}
KNOWN = tuple(PRESET | change for change in (
    {}, {"batch_size": 2}, {"lr": 5e-3}, {"lr": 2.5e-3}, {"cells": 32, "embedding_channels": 8},
    {"embedding_channels": 8}, {"encoder_width": 32}, {"reduce": 1.35}, {"ks": "0_3_5"},
    {"warm_up": 0.2}, {"num_blks": "1_2"}, {"act": "sin"}))


class Fit(NamedTuple):
    """What a fit of fixed time gave."""

    psnr_db: float  # mean over all frames
    steps: int
    step_s: float
    stored: int  # values


def fit(config: Config, *, seconds: float, cache_dir: str | Path = "output/cache",
        lock: Path | None = None,
        report: Callable[[int, float], Any] = lambda part, psnr_db: None) -> Fit:
    """Train for some seconds of steps and measure; the learning rate follows the clock.

    Args:
        config: `epochs` is not used; the device is `device`'s.
        seconds: of training steps, without compilation and evaluation.
        lock: a file that one process at a time holds while its clock runs and it evaluates.
        report: called after each of `REPORTS` equal parts with its number and the training frames'
            mean PSNR since the last.
    """
    dataset = load_dataset(config, cache_dir)
    config = resolve_config(config, dataset.video)
    device, options = select_device(config.train.device), config.train
    choice = settle(options, device)
    autocast = set_precision(choice.precision, device)
    model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                        frame_count=len(dataset.video.frames), seed=options.seed)
    model.to(device, memory_format=torch.channels_last).train()
    engine = make_engine(config.replace(engine=choice.engine), model, dataset, autocast=autocast)
    batches: list[torch.Tensor] = []
    progress, steps, epoch, parts, seen, total = 0.0, 0, 0, 0, 0, 0.0
    began = time.perf_counter()
    with contextlib.ExitStack() as alone:
        while progress < 1:
            if not batches:
                order = epoch_order(dataset.split.train, seed=options.seed, epoch=epoch)
                batches = list(order.to(device).split(options.batch_size))
                epoch += 1
            indices = batches.pop()
            sums = engine.step(indices, count=len(indices), weight=0.0, lr=learning_rate(
                progress, lr=options.lr, lr_type=options.lr_type))
            total, seen, steps = total + sums[3], seen + len(indices), steps + 1
            if steps == WARM_UP:
                synchronise(device)
                if lock:
                    alone.enter_context(hold(lock, wait=True))
                began = time.perf_counter()
            if steps > WARM_UP and (steps % 16 == 0 or device.type == "cpu"):
                synchronise(device)
                progress = (time.perf_counter() - began) / seconds
                if progress * REPORTS >= parts + 1 and parts < REPORTS:
                    report(parts, float(total) / seen)
                    parts, seen, total = int(progress * REPORTS), 0, 0.0
        elapsed = time.perf_counter() - began
        engine.sync()
        psnr_db = evaluate_model(model, dataset).psnr_db.mean()
    return Fit(float(psnr_db), steps, elapsed / max(1, steps - WARM_UP),
               model.part_sizes()["stored"])


def trial_settings(trial: optuna.Trial) -> dict[str, Any]:
    """The settings that a trial stands for, flat, as `sized_config` takes them."""
    found = {name: trial.suggest_categorical(name, values) if isinstance(values, list) else
             trial.suggest_float(name, *values, log=name == "lr") for name, values in SPACE.items()}
    width, channels = found.pop("encoder_width"), found.pop("embedding_channels")
    return {"optimizer": PRESETS["best"]["optimizer"], "enc_dim": f"{width}_{channels}",
            "lr_type": f"cosine_{found.pop('warm_up'):g}_1_0.1", **found}


def sized_config(video: dict[str, Any], settings: dict[str, Any]) -> Config:
    """The pixel-only run of a video by some settings, at as many values per pixel as the paper's.

    Args:
        video: flat settings of the video.
        settings: those of the recipe, and seed and device; they win. `cells`, if there, stands for
            strides that leave about so many cells of the embedding.
    """
    frames = load_dataset(Config.from_params(**BASE | video)).video.frames  # [T, 3, H, W]
    millions = round(VALUES_PER_PIXEL * frames[:, 0].numel() / 1e6, 3)
    settings = {"modelsize": max(LEAST_SIZE, millions)} | settings
    if cells := settings.pop("cells", None):
        strides = choose_strides(tuple(frames.shape[2:]), cells)
        settings |= {"enc_strds": strides, "dec_strds": strides}
    return Config.from_params(**BASE | video | settings)


def objective(trial: optuna.Trial, *, segments: dict[str, dict[str, Any]], seconds: float,
              device: str = "auto", lock: Path | None = None) -> float:
    """Mean PSNR over the segments; a trial that falls behind the median is pruned.

    Args:
        segments: flat settings of each, by name.
        seconds: of training steps for each.
        lock: see `fit`.
    Raises:
        optuna.TrialPruned: it fell behind, became NaN, or its settings fit no network.
    """
    settings, figures = trial_settings(trial), {}
    for number, (name, segment) in enumerate(segments.items()):
        before = sum(figure.psnr_db for figure in figures.values())

        def report(part: int, psnr_db: float, number: int = number, before: float = before) -> None:
            # A pruner looks at the best report, so that they must rise from segment to segment
            trial.report(before + psnr_db, number * REPORTS + part)
            if trial.should_prune() or not math.isfinite(psnr_db):
                raise optuna.TrialPruned
        try:
            figures[name] = fit(sized_config(segment, settings | {
                "seed": SEARCH_SEED, "device": device}), seconds=seconds, lock=lock, report=report)
        except (ConfigError, torch.cuda.OutOfMemoryError) as error:
            trial.set_user_attr("error", str(error))
            raise optuna.TrialPruned from error
        trial.set_user_attr(name, figures[name]._asdict())
    trial.set_user_attr("settings", settings)
    return statistics.mean(figure.psnr_db for figure in figures.values())


def open_study(folder: Path) -> optuna.Study:
    """The study of a folder, made where there is none; any number of processes may open it."""
    folder.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))), study_name=STUDY,
        direction="maximize", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=6, n_warmup_steps=1))


def search(folder: str | Path, *, seconds: float, minutes: float, workers: int = 0,
           trials: int | None = None, device: str = "auto",
           segments: dict[str, dict[str, Any]] = SEGMENTS) -> optuna.Study:
    """Propose and fit until the time is over; what earlier calls found is kept and used.

    No trial begins after the time, and the one that is under way ends.

    Args:
        folder: of the journal; results go to its trials.json after each trial.
        seconds: of training steps for each segment.
        workers: processes, spread over the GPUs; 0 for one on each GPU, or one on the CPU. With
            four or more on a GPU, it seldom waits for a compilation.
        trials: also stop after so many of each process.
        segments: what is fitted, see `objective`.
    Raises:
        RunError: every process failed; where only some did, a warning says so.
    """
    folder = resolve_path(folder)
    study, gpus = open_study(folder), visible_gpus()
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # a process was stopped
    for known in KNOWN:
        study.enqueue_trial(known, skip_if_exists=True)
    options = (folder, seconds, 60 * minutes, trials, device, segments)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(gpus[i % len(gpus)] if gpus else "", *options))
                 for i in range(workers or max(1, len(gpus)))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    write_trials(study, folder)
    if failed := [str(process.exitcode) for process in processes if process.exitcode]:
        message = (f"{len(failed)} of {len(processes)} processes of the search failed, exit codes "
                   f"{' '.join(failed)}: read their errors above")
        if len(failed) == len(processes):
            raise RunError(f"{message}, then run the same command again to go on")
        warnings.warn(message, stacklevel=2)
    return study


def write_trials(study: optuna.Study, folder: Path) -> None:
    """All trials so far, a row each, to the folder's trials.json."""
    write_json(folder / "trials.json", {"trials": [
        {"number": t.number, "state": t.state.name, "value": t.value, "params": t.params,
         **t.user_attrs} for t in study.trials]})


def _work(gpu: str, folder: Path, seconds: float, timeout: float, trials: int | None, device: str,
          segments: dict[str, dict[str, Any]]) -> None:
    """What one process of a search does."""
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    else:
        torch.set_num_threads(1)
    lock = folder / f"gpu{gpu}.lock" if gpu else None
    open_study(folder).optimize(
        lambda trial: objective(trial, segments=segments, seconds=seconds, device=device,
                                lock=lock),
        timeout=timeout, n_trials=trials, catch=(RuntimeError,),
        callbacks=[lambda study, _: write_trials(study, folder)])


def compare(folder: str | Path, recipes: dict[str, dict[str, Any]], *, videos: Iterable[str],
            seeds: Iterable[int], seconds: Iterable[float], minutes: float = math.inf,
            cache_dir: str | Path = "output/cache", device: str = "auto") -> list[dict[str, Any]]:
    """Whole runs of recipes, one at a time, with as many epochs as fit the time.

    Each recipe's step is timed first, and the plan, with the recipe's settings, kept in a file
    beside the run's folder. Stopped at any moment, the next call resumes.

    Args:
        folder: of the runs; the rows go to its comparison.json, beside those of other calls.
        recipes: flat settings by name.
        videos: `data_path` of each.
        seconds: of training steps.
        minutes: begin no run after so many.
    Returns:
        A row for each finished run: recipe, video, seed, seconds, epochs, step_s, and the figures
        of its summary.json.
    Raises:
        RunError: runs of the folder have the name of a recipe, and other settings; or a plan or
            the comparison.json that is there lacks what it needs.
    """
    folder, deadline, rows = resolve_path(folder), time.monotonic() + 60 * minutes, []
    for path in sorted(folder.glob("*_seed*.json")):
        _check_plan(path, recipes)
    known = folder / "comparison.json"
    before = _read_rows(known) if known.is_file() else []
    for seed, video, limit, (name, settings) in itertools.product(
            seeds, videos, seconds, recipes.items()):
        run = RunDir(folder / f"{label_video(video)}_{name}_{limit:g}s_seed{seed}")
        planned = run.path.with_name(f"{run.path.name}.json")  # the run's folder is its own
        if not run.finished and time.monotonic() >= deadline:
            continue
        if not planned.exists():
            config = sized_config({"data_path": video}, settings | {"seed": seed, "device": device})
            step_s = fit(config, seconds=PROBE_S, cache_dir=cache_dir).step_s
            steps = -(-len(load_dataset(config).split.train) // config.train.batch_size)
            epochs = max(1, int(limit / (steps * step_s)))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(planned, {"recipe": name, "settings": settings, "step_s": step_s,
                                 "params": config.replace(
                                     epochs=epochs, eval_freq=epochs).params()})
        plan = read_json(planned, keys={"params": dict, "step_s": (int, float)}, fix="remove it")
        config = Config.from_params(**plan["params"])
        result = train(config, run.path, cache_dir=cache_dir)
        rows.append({"recipe": name, "video": label_video(video), "seed": seed, "seconds": limit,
                     "epochs": config.train.epochs, "step_s": plan["step_s"],
                     "device": run.provenance()["device"], **result.summary})
        write_json(known, {"rows": list({tuple(row[key] for key in ROW_KEYS): row
                                         for row in [*before, *rows]}.values())})
    return rows


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a comparison.json, each with what tells it from others."""
    fix = "remove it, or move it away: the rows of finished runs are written again"
    rows = read_json(path, keys={"rows": list}, fix=fix)["rows"]
    for row in rows:
        if not isinstance(row, dict):
            raise RunError(f"{path} is damaged: a row is {str(row)[:40]!r}; {fix}")
        check_keys(row, ROW_KEYS, path, fix=fix)
    return rows


def _check_plan(path: Path, recipes: dict[str, dict[str, Any]]) -> None:
    """Refuse a run that was planned with other settings than its recipe has now."""
    plan = read_json(path, keys={"recipe": str, "settings": dict}, fix="choose another --outf, or "
                     "remove it and the folder of the same name")
    name, kept = plan["recipe"], plan["settings"]
    if (now := recipes.get(name, kept)) != kept:
        raise RunError(f'{path.name} was planned with recipe "{name}" as {kept}, which is now '
                       f"{now}: one name would stand for both. Compare in another --outf, or "
                       "remove these plans and their runs")


def main(arguments: list[str] | None = None) -> None:
    """The command line: `python -m hnerv_clip.study.recipe --help`."""
    parser = argparse.ArgumentParser(prog="python -m hnerv_clip.study.recipe",
                                     description=__doc__, allow_abbrev=False)
    parser.add_argument("parts", nargs="+", choices=("search", "compare"))
    parser.add_argument("--outf", default="output/recipe", help="folder of all that is found")
    parser.add_argument("--minutes", type=float, required=True, help="for each part; the next call "
                                                                     "goes on")
    parser.add_argument("--workers", type=int, default=0, help="of the search, spread over the "
                        "GPUs (0: one on each); several share one")
    parser.add_argument("--fit_seconds", type=float, default=10, help="of each segment's fit")
    parser.add_argument("--seconds", type=float, nargs="+", default=[60, 180],
                        help="of each whole run of the comparison")
    parser.add_argument("--videos", nargs="+", default=["bunny"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    if "search" in args.parts:
        study = search(args.outf, seconds=args.fit_seconds, minutes=args.minutes,
                       workers=args.workers, device=args.device)
        print(f"{len(study.trials)} trials")
        with contextlib.suppress(ValueError):  # none has ended yet
            print(f"the best: {study.best_trial.user_attrs['settings']}, {study.best_value:.2f} dB")
    if "compare" in args.parts:
        recipes = {"hnerv": FAITHFUL, "best": PRESETS["best"]}
        with contextlib.suppress(ValueError):
            recipes["found"] = open_study(resolve_path(args.outf)).best_trial.user_attrs["settings"]
        compare(args.outf, recipes, videos=args.videos, seeds=args.seeds, seconds=args.seconds,
                minutes=args.minutes, device=args.device)


if __name__ == "__main__":
    main()
