"""Trains and measures the study's runs on any number of GPUs, and resumes where it was stopped."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.config import Config
from hnerv_clip.devices import usable_cores, visible_gpus
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.run_dir import RunDir, RunError, write_json
from hnerv_clip.study.plan import LABELS
from hnerv_clip.study.worker_pool import Ended, WorkerPool


def run_study(configs: dict[str, Config], folder: str | Path, *, base: Config,
              cache_dir: str | Path = "output/cache", workers: int = 0,
              minutes: float = float("inf"), with_verify: bool = True,
              say: Callable[[str], Any] = print) -> dict[str, str]:
    """Train and measure the runs that are not finished, each worker one at a time.

    If it is killed, the next call resumes from the last checkpoints. A run that fails is
    reported and the others go on; another process that trains a run is left alone.

    Args:
        configs: as from `study_configs`.
        folder: where the runs' folders go, by name; errors go to NAME.error.txt.
        base: says at which positions all runs are measured.
        workers: processes, spread over the GPUs; 0 for one on each GPU, or one on the CPU.
        minutes: after so many, workers are stopped; before, no run is begun that would not end in
            time, judged by those that did.
        with_verify: also verify each run (`verify.run`).
    Returns:
        {name: finished, failed, stopped, busy or waiting}.
    """
    folder, deadline = resolve_path(folder), time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    states = {name: "finished" if is_done(folder / name, config, with_verify) else "waiting"
              for name, config in configs.items()}
    queue = [name for name, state in states.items() if state == "waiting"]
    if minutes <= 0 or not queue:
        return states
    prepare_study([configs[name] for name in queue], base=base, cache_dir=cache_dir, say=say)
    gpus = visible_gpus()
    count = min(workers or max(1, len(gpus)), len(queue))
    options = {"folder": folder, "cache_dir": cache_dir, "grid": base.params()["patch_grid"],
               "verify": with_verify,
               "runs_per_device": -(-count // max(1, len(gpus))),
               "threads": max(1, usable_cores() // count)}
    durations: list[float] = []

    def next_job() -> tuple[str, Any] | None:
        name = _next_run(queue, states, folder, deadline, durations)
        if name is None:
            return None
        states[name] = "stopped"  # until it ends
        return name, (name, configs[name].params())

    def on_end(ended: Ended) -> None:
        durations.extend([ended.seconds] * (not ended.error))
        note_end(ended, states, folder, say)

    with WorkerPool(make_run, options, count=count, gpus=gpus) as pool:
        if not pool.run(next_job, on_end, deadline=deadline):
            say(f"{minutes:g} minutes are over; the runs under way go on next time")
    return states


def note_end(ended: Ended, states: dict[str, str], folder: Path, say: Callable[[str], Any]
             ) -> None:
    """Say how a job ended and note it in `states`; an error's text goes to NAME.error.txt."""
    path = folder / f"{ended.name.replace(' ', '_')}.error.txt"
    if ended.error:
        states[ended.name] = "failed"
        path.write_text(ended.error, encoding="utf-8")
        say(f"{ended.name} failed after {ended.seconds:.0f} s: "
            f"{ended.error.strip().splitlines()[-1]}")
        return
    states[ended.name] = "finished"
    path.unlink(missing_ok=True)
    say(f"{ended.name} finished after {ended.seconds:.0f} s "
        f"({list(states.values()).count('finished')} of {len(states)})")


def is_done(run_dir: Path, config: Config, with_verify: bool) -> bool:
    """Whether a run is finished, measured and (where asked) verified."""
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


def make_run(job: tuple[str, dict[str, Any]], options: dict[str, Any]) -> None:
    """Train one run to its end, and write what was found beside it.

    Args:
        job: the run's name, and its flat parameters.
        options: folder, cache_dir, grid (the patch_grid of all measurements), verify and
            runs_per_device.
    """
    from hnerv_clip.inference import load_run
    from hnerv_clip.study.table import measure_run
    from hnerv_clip.train import train
    from hnerv_clip.verify.run import verify_run, write_verification

    name, config = job[0], Config.from_params(**job[1])
    run_dir = options["folder"] / name
    train(config, run_dir, cache_dir=options["cache_dir"], progress=False)
    video, _, variant = name[:name.rindex("_s")].split("_", 2)
    write_json(run_dir / "study.json", {"name": name, "video": video, "variant": variant,
                                        "runs_per_device": options["runs_per_device"]})
    if config.model.predict_clip:
        run = load_run(run_dir, cache_dir=options["cache_dir"], device=config.train.device)
        run.run_dir.write_table("measures.csv", measure_run(
            run, grid=options["grid"], cache_dir=options["cache_dir"]))
        if options["verify"]:
            labels = LABELS[video]
            write_verification(run, verify_run(run, labels=labels), labels=labels)


def prepare_study(configs: Iterable[Config], *, base: Config, cache_dir: str | Path,
                  say: Callable[[str], Any] = print) -> None:
    """Check every run, and run the teacher where its embeddings are not cached: at the patches of
    each run, and wherever `measure_run` asks.

    Raises:
        ConfigError: see `check_run` and `prepare_dataset`.
    """
    from hnerv_clip.dataset import prepare_dataset
    from hnerv_clip.teachers import teacher_embeddings
    from hnerv_clip.train import check_run
    from hnerv_clip.verify.positions import position_grids

    wanted: dict[tuple, tuple[Config, bool]] = {}
    for config in configs:
        check_run(config)
        own, shared = config.params()["patch_grid"], base.params()["patch_grid"]
        for grid in dict.fromkeys((shared, own)):
            needed = config.replace(patch_grid=grid, predict_clip=True)
            wanted.setdefault((needed.video, needed.teacher), (needed, grid == shared))
    for config, measured in wanted.values():
        started, device = time.monotonic(), config.train.device
        dataset = prepare_dataset(config, cache_dir, device=device, progress=False)
        grids = {grid for grid, _ in position_grids(dataset.grid).values()} if measured else ()
        for grid in grids:
            teacher_embeddings(dataset.video, grid, config.teacher, cache_dir=cache_dir,
                               device=device, progress=False)
        say(f"{dataset.video.name}, {sum(map(len, (dataset.grid, *grids)))} patches a frame, "
            f"{dataset.teacher_label}: {time.monotonic() - started:.0f} s")


def count_states(states: dict[str, str]) -> str:
    """How many runs are in which state, in a line."""
    counts = pd.Series(states).value_counts()
    return ", ".join(f"{count} {state}" for state, count in counts.items())
