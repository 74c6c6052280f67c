"""Every GPU result of the book, in order of value, within a time limit.

    hnerv-clip study --plan book --minutes 9 --out book/results

A step is a run of the study, a seed of the fidelity runs, a field, a part of the benchmark, and so
on. Steps run side by side, by default one on each GPU; what ended is not done again, and what was
stopped goes on from its last checkpoint. After each step the results that it belongs to are
written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hnerv_clip.config import Config
from hnerv_clip.devices import usable_cores, visible_gpus
from hnerv_clip.files import read_json, unpack, write_json
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.run_dir import BEST, RunDir
from hnerv_clip.study.collect import collect_results
from hnerv_clip.study.cross_fit import cross_fit_names
from hnerv_clip.study.fields import NETWORKS, SIZES
from hnerv_clip.study.folders import BUNDLED, Folders
from hnerv_clip.study.plan import VIDEOS, study_base, study_configs
from hnerv_clip.study.recipe_parts import WHOLE, part_config, part_folder, part_names
from hnerv_clip.study.run import is_done, make_run, note_end, prepare_study
from hnerv_clip.study.table import write_pack
from hnerv_clip.study.worker_pool import Ended, WorkerPool, end_on_sigterm

TIMES = "times.json"
# Minutes of a step on one H100, by the longest beginning of its name. Recorded ones win.
MINUTES = {"train bunny": 1.2, "train bikes": 1.3, "fidelity": 0.9, "field bunny": 0.8,
           "field bikes": 0.9, "teacher bunny": 0.4, "teacher bikes": 0.5, "rates": 7.5,
           "bench ceilings": 0.3, "bench train": 0.8, "bench profile": 0.4, "bench decode": 0.4,
           "bench scaling": 1.5, "bench teacher": 0.3, "bench fit": 1.0, "scale": 7.0,
           "recipe": 1.2, **{f"field {video} frozen {size}": minutes for video in VIDEOS
                             for size, minutes in {"largest": 2.8, "largest_long": 4.8}.items()}}
STATE, STATE_BYTES = (".json", ".csv", ".done", ".txt"), 2**21
GOES_ON = ("train", "fidelity", "rates", "scale", "recipe")  # stopped, these lose little


@dataclass(frozen=True)
class Step:
    """One thing to run. alone: on all GPUs, with nothing beside it."""

    kind: str  # a key of `DO`
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    alone: bool = False

    @property
    def name(self) -> str:
        return " ".join((self.kind, *self.arguments))


def _train(name: str) -> Step:
    return Step("train", (name,))


def _field(video: str, network: str, size: str, seed: int) -> Step:
    run = f"{video}_hybrid_{NETWORKS[network]}_s{seed}"
    return Step("field", (video, network, size, str(seed)), needs=(f"train {run}",))


def _pairs(seed: int) -> list[Step]:
    """The same field on a network of pixels alone and on one that was trained with the head."""
    steps: list[Step] = []
    for video in VIDEOS:
        steps += [_train(f"{video}_hybrid_{variant}_s{seed}") for variant in NETWORKS.values()]
        steps += [_field(video, network, "default", seed) for network in NETWORKS]
    return steps


def book_steps(gpus: int, outf: Path) -> list[Step]:
    """All steps, the most valuable first; those of several GPUs where there are any.

    Args:
        outf: folder of the runs, in which videos for the recipe may lie.
    """
    steps = [Step("fidelity", ("0",))]
    steps += [_train(name) for video in VIDEOS for name in cross_fit_names(video, (0,))]
    steps += _pairs(0)
    steps += [Step("fidelity", (str(seed),)) for seed in (1, 2)]
    steps += [Step("teacher", (video,), needs=(f"train {video}_hybrid_base_s0",))
              for video in VIDEOS]
    steps += [_field(video, "frozen", size, 0) for size in ("large", "small") for video in VIDEOS]
    steps += [*_pairs(1), *_pairs(2)]
    steps += [_field(video, "frozen", size, seed) for size in ("large_many", "small_many")
              for seed in range(3) for video in VIDEOS]
    steps += [Step("rates", ("head",))]
    steps += [Step("bench", (part,)) for part in ("ceilings", "train", "profile", "decode", "fit")]
    if gpus > 1:
        steps += [Step("scale", (), alone=True)]
    steps += [_train(f"bunny_hybrid_{variant}_s0") for variant in (
        "stage_2", "lambda_0.1", "lambda_0.02", "lambda_0.2", "lambda_1", "warmup_0",
        "warmup_100")]
    steps += [Step("fidelity", (str(seed),)) for seed in range(3, 9)]
    steps += [_train(name) for seed in (1, 2) for video in VIDEOS
              for name in cross_fit_names(video, (seed,))]
    steps += [_field(video, "frozen", size, 0) for size in SIZES for video in VIDEOS]
    steps += [Step("rates", ("pixels",))]
    steps += [Step("bench", (part,)) for part in ("teacher", "scaling")]
    steps += [Step("recipe", part) for part in part_names(outf)]
    steps += [_train(name) for name in study_configs(study_base("full", BUNDLED))]
    return list({step.name: step for step in steps}.values())


def _do_train(folders: Folders, name: str) -> None:
    path = folders.study / name
    if RunDir(path).finished and not (path / BEST).is_file():  # restored without its weights
        shutil.rmtree(path)
    make_run((name, folders.configs[name].params()), {
        "folder": folders.study, "cache_dir": folders.cache_dir, "verify": True,
        "grid": folders.base.params()["patch_grid"], "runs_per_device": 1})


def _do_fidelity(folders: Folders, seed: str) -> None:
    from hnerv_clip.train import train

    train(folders.fidelity(seed), folders.outf / "fidelity" / f"seed{seed}",
          cache_dir=folders.cache_dir, progress=False)


def _do_recipe(folders: Folders, *part: str) -> None:
    from hnerv_clip.train import train

    path, began = part_folder(folders.outf, *part), time.perf_counter()
    resumed = path.exists()
    train(part_config(folders.outf, *part).replace(**folders.settings), path,
          cache_dir=folders.cache_dir, progress=False)
    if folders.alone and not resumed:
        write_json(path / WHOLE, {"seconds": time.perf_counter() - began})


def _do_field(folders: Folders, video: str, network: str, size: str, seed: str) -> None:
    from hnerv_clip.inference import load_run
    from hnerv_clip.study.fields import measure_field

    name = f"{video}_hybrid_{NETWORKS[network]}_s{seed}"
    run = load_run(_with_weights(folders, name), cache_dir=folders.cache_dir)
    given = {key: folders.settings[f"field_{key}"] for key in ("steps", "boxes")
             if f"field_{key}" in folders.settings}
    row = measure_field(run, size, network=network, seed=int(seed), cache_dir=folders.cache_dir,
                        folder=folders.outf / "fields", **given)
    write_json(folders.field_row((video, network, size, seed)), row | _origin())


def _do_teacher(folders: Folders, video: str) -> None:
    from hnerv_clip.inference import load_run
    from hnerv_clip.study.fields import measure_teacher

    run = load_run(_with_weights(folders, f"{video}_hybrid_base_s0"), cache_dir=folders.cache_dir)
    write_json(folders.outf / "fields" / f"teacher_{video}.json", {
        "rows": measure_teacher(run, folder=folders.outf / "fields",
                                cache_dir=folders.cache_dir), **_origin()})


def _with_weights(folders: Folders, name: str) -> Path:
    """A run of the study, trained again where `restore_state` brought it without its weights."""
    path = folders.study / name
    if not (path / BEST).is_file():
        _do_train(folders, name)
    return path


def _do_rates(folders: Folders, kind: str) -> None:
    from hnerv_clip.bench import rate_gpu

    settings = {"predict_clip": False, "head": "original"} if kind == "pixels" else {}
    own = {"epochs": folders.settings["epochs"]} if "epochs" in folders.settings else {}
    rate_gpu.measure_gpu(
        folders.outf / "rates" / kind, settings={**settings, **folders.settings},
        targets=rate_gpu.TARGETS, cache_dir=folders.cache_dir,
        device=folders.settings.get("device", "auto"), **own)


def _do_bench(folders: Folders, part: str) -> None:
    from hnerv_clip.bench.harness import bench

    config = Config.from_params(**{"preset": "paper", "data_path": "bunny", "precision": "bf16",
                                   **BUNDLED, **({"data_split": "1_1_1"} if part == "fit" else {}),
                                   **folders.settings})
    bench(config, parts=[part], out=folders.outf / "bench" / f"{part}.json",
          outf=folders.outf / "bench" / "fit", cache_dir=folders.cache_dir)


def _do_scale(folders: Folders) -> None:
    from hnerv_clip.bench.multi_gpu import SETTINGS, measure_scaling

    end_on_sigterm()  # and stop its ranks
    measure_scaling(Config.from_params(**{**SETTINGS, **folders.settings}),
                    folders.outf / "scaling", cache_dir=folders.cache_dir)


def _origin() -> dict[str, Any]:
    """Commit and device of what was measured just now."""
    from hnerv_clip.devices import select_device
    from hnerv_clip.runs.provenance import code_version, device_name, package_versions

    commit, dirty = code_version()
    return {"commit": commit, "dirty": dirty, "device": device_name(select_device("auto")),
            "versions": package_versions(), "date": time.strftime("%Y-%m-%d")}


DO: dict[str, Callable[..., None]] = {
    "train": _do_train, "fidelity": _do_fidelity, "recipe": _do_recipe, "field": _do_field,
    "teacher": _do_teacher, "rates": _do_rates, "bench": _do_bench, "scale": _do_scale}


def step_done(step: Step, folders: Folders) -> bool:
    """Whether a step came to its end."""
    match step.kind, step.arguments:
        case "train", (name,):
            return is_done(folders.study / name, folders.configs[name], True)
        case "fidelity", (seed,):
            return RunDir(folders.outf / "fidelity" / f"seed{seed}").finished
        case "recipe", part:
            return RunDir(part_folder(folders.outf, *part)).finished
        case "field", arguments:
            return folders.field_row(arguments).is_file()
        case "teacher", (video,):
            return (folders.outf / "fields" / f"teacher_{video}.json").is_file()
        case _:
            return _mark(step.kind, step.arguments, folders).is_file()


def _mark(kind: str, arguments: tuple[str, ...], folders: Folders) -> Path:
    """The file that stands for the end of a step whose results do not tell."""
    return folders.outf / "done" / f"{'_'.join((kind, *arguments))}.done"


def do_step(job: tuple[str, str, tuple[str, ...]], options: dict[str, Any]) -> None:
    """Run a step in a worker process: job is (name, kind, arguments), options has folders."""
    folders: Folders = options["folders"]
    _, kind, arguments = job
    DO[kind](folders, *arguments)
    mark = _mark(kind, arguments, folders)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text("", encoding="utf-8")


def minutes_of(step: Step, recorded: dict[str, float]) -> float:
    """How long a step takes: as recorded on this machine, else on an H100."""
    if step.name in recorded:
        return recorded[step.name]
    def kind(name: str) -> str:
        return max((key for key in MINUTES if name.startswith(key)), key=len, default="")

    key = kind(step.name)
    like = sorted(value for name, value in recorded.items() if key and kind(name) == key)
    return like[len(like) // 2] if like else MINUTES.get(key, 1.0)


def show_steps(steps: list[Step], folders: Folders) -> str:
    """What is missing, in order, with its minutes on one GPU, as text."""
    recorded = _read_times(folders)
    lines, total, done = [], 0.0, 0
    for step in steps:
        if step_done(step, folders):
            done += 1
            continue
        minutes = minutes_of(step, recorded)
        total += minutes
        lines.append(f"{step.name:<44}{minutes:>6.1f} min {total:>7.1f}")
    return "\n".join([*lines, f"{len(lines)} steps missing, {total:.0f} minutes of one GPU; "
                              f"{done} done"])


def run_book(folders: Folders, *, minutes: float = float("inf"), only: tuple[str, ...] = (),
             workers: int = 0, say: Callable[[str], Any] = print) -> dict[str, str]:
    """Run what is missing, the most valuable first, and write the results.

    Args:
        minutes: after so many everything is stopped; steps that could not go on later are not
            begun when too little is left.
        only: beginnings of steps' names, such as "field bunny"; all by default. What a chosen
            step needs is run as well.
        workers: processes, spread over the GPUs; 0 for one on each, or one on a CPU. More than
            one on a GPU end more steps in a given time, but slow each other down: not for what
            measures speed.
    Returns:
        {name: finished, failed, stopped or waiting}.
    """
    deadline = time.monotonic() + 60 * minutes
    gpus = visible_gpus()
    steps = chosen_steps(book_steps(len(gpus), folders.outf), only)
    folders.outf.mkdir(parents=True, exist_ok=True)
    states = {step.name: "finished" if step_done(step, folders) else "waiting" for step in steps}
    recorded = _read_times(folders)
    collect_results(folders, say=say)
    if minutes <= 0 or "waiting" not in states.values():
        return states
    count = workers or max(1, len(gpus))
    waiting = [step for step in steps if states[step.name] == "waiting"]
    _prepare(folders, first_steps(waiting, minutes * count, recorded), say)
    options = {"folders": replace(folders, alone=count <= max(1, len(gpus))),
               "threads": max(1, usable_cores() // count)}

    def next_job() -> tuple[str, Any] | None:
        while step := next_step(steps, states, left=(deadline - time.monotonic()) / 60,
                                recorded=recorded, busy=[worker.name for worker in pool.busy]):
            if not step.alone:
                states[step.name] = "stopped"  # until it ends
                return step.name, (step.name, step.kind, step.arguments)
            error = _run_alone(step, folders, deadline, options)
            states[step.name] = "failed" if error else "finished"
            say(f"{step.name}: {error or 'finished'}")
            collect_results(folders, kinds=(step.kind,), say=say)
        return None

    def on_end(ended: Ended) -> None:
        note_end(ended, states, folders.outf, say)
        if not ended.error:
            recorded[ended.name] = round(ended.seconds / 60, 2)
            write_json(folders.outf / TIMES, recorded)
            collect_results(folders, kinds=(ended.name.split()[0],), say=say)

    with WorkerPool(do_step, options, count=count, gpus=gpus) as pool:
        if not pool.run(next_job, on_end, deadline=deadline):
            say(f"{minutes:g} minutes are over; what is under way resumes next time")
    return states


def chosen_steps(steps: list[Step], only: tuple[str, ...]) -> list[Step]:
    """Steps whose name begins so, and what they need, in order.

    Raises:
        ValueError: a beginning that no step has.
    """
    for start in only:
        if not any(step.name.startswith(start) for step in steps):
            raise ValueError(f"--only {start!r} begins no step; see hnerv-clip study --plan book "
                             "--list")
    chosen = [step for step in steps if not only or step.name.startswith(tuple(only))]
    needed = {name for step in chosen for name in step.needs} | {step.name for step in chosen}
    return [step for step in steps if step.name in needed]


def first_steps(steps: list[Step], minutes: float, recorded: dict[str, float]) -> list[Step]:
    """The steps that are begun within so many minutes of one GPU, one more than would end."""
    total, chosen = 0.0, []
    for step in steps:
        if total > minutes:
            break
        total += minutes_of(step, recorded)
        chosen.append(step)
    return chosen


def next_step(steps: list[Step], states: dict[str, str], *, left: float,
              recorded: dict[str, float], busy: list[str]) -> Step | None:
    """The first step that can begin with so many minutes left, None where one must wait.

    One that needs all GPUs keeps later ones back until the others have ended.
    """
    for step in steps:
        if states[step.name] != "waiting" or any(
                states.get(name, "finished") != "finished" for name in step.needs):
            continue
        needed = min(minutes_of(step, recorded), 0.5) if step.kind in GOES_ON \
            else minutes_of(step, recorded)
        if needed > left:
            continue
        if step.alone and busy:
            return None
        return step
    return None


def _run_alone(step: Step, folders: Folders, deadline: float, options: dict[str, Any]) -> str:
    """A step on all GPUs, in a process of its own that is stopped in time; its error, or ""."""
    with WorkerPool(do_step, options, count=1, gpus=[]) as pool:
        pool.begin(0, step.name, (step.name, step.kind, step.arguments))
        ended = pool.wait(deadline - time.monotonic())
    if not ended:
        return "stopped, resumes next time"
    return ended[0].error.strip().splitlines()[-1] if ended[0].error else ""


def _prepare(folders: Folders, steps: list[Step], say: Callable[[str], Any]) -> None:
    """Run the teacher where the study's runs need it, before they begin."""
    names = [step.arguments[0] for step in steps if step.kind == "train"]
    if names:
        prepare_study([folders.configs[name] for name in names], base=folders.base,
                      cache_dir=folders.cache_dir, say=say)


def _read_times(folders: Folders) -> dict[str, float]:
    path = folders.outf / TIMES
    return read_json(path, fix="remove it") if path.is_file() else {}


def pack_state(folders: Folders, path: str | Path, *, force: bool = False) -> None:
    """Keep what ended, without checkpoints, in a .tar.xz, so that another machine can resume.

    Args:
        force: leave out what only a pack in its place holds.
    """
    files = [file for file in sorted(folders.outf.rglob("*")) if _is_state(folders, file)]
    write_pack(resolve_path(path), folders.outf, files, force=force)


def _is_state(folders: Folders, file: Path) -> bool:
    """Whether a file is one of what came to its end, and small."""
    if not file.is_file() or file.suffix not in STATE or file.stat().st_size > STATE_BYTES:
        return False
    kind, *names = file.relative_to(folders.outf).parts
    if kind == "rates":
        return _mark(kind, (names[0],), folders).is_file()
    if kind == "scaling":
        return _mark("scale", (), folders).is_file()
    return not (file.parent / "config.json").is_file() or RunDir(file.parent).finished


def restore_state(folders: Folders, path: str | Path) -> None:
    """Unpack what `pack_state` kept, where nothing is there yet."""
    path = resolve_path(path)
    if path.is_file() and not (folders.outf / TIMES).exists():
        unpack(path, folders.outf)
