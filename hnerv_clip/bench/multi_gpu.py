"""What more ranks give: speed, quality, correctness, sweeps, and what a dead rank costs.

`measure_scaling` trains through `launch` in processes of this machine, one task a GPU (on a CPU:
ranks over gloo), and writes `scaling.json` as it goes: a part that is there is not measured again,
and what a time limit interrupts resumes after its last finished run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from hnerv_clip.config import Config, ConfigError, TrainConfig
from hnerv_clip.dataset import prepare_dataset
from hnerv_clip.files import read_json
from hnerv_clip.launch import Job, launch
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import code_version, device_name, package_versions
from hnerv_clip.runs.rows import run_row
from hnerv_clip.runs.run_dir import LATEST, RunDir, write_json

# What `hnerv-clip scale` trains by default: the paper's network and the bundled teacher, which is
# not CLIP, for so many epochs that all parts fit seven minutes of two GPUs.
SETTINGS = {"precision": "bf16", "teacher": "efficientnet-lite0", "epochs": 40,
            "pixel_loss_warmup_epochs": 10, "eval_freq": 4}
LAMBDAS = (0.5, 0.1, 0.2, 1.0, 0.0)  # the sweep's; then again with the next seed
WARM_UP_EPOCHS = 2  # not timed: compilation, first use of the algorithms
KILL_CHECKPOINT_S = 1.0
RUN = "run"  # the folder of the whole training


class ScalingError(RuntimeError):
    """The measurement can't be made, or one of its runs failed; the message says why."""


def measure_scaling(config: Config, outf: str | Path, *, gpus: int = 0,
                    parts: Sequence[str] = (), correctness_epochs: int = 4, sweep_epochs: int = 0,
                    run_epochs: int = 300, cache_dir: str | Path = "output/cache"
                    ) -> dict[str, Any]:
    """Measure and write `outf`/scaling.json.

    Args:
        config: what each rank trains; batch_size is per rank.
        gpus: ranks of the largest run; 0 for every GPU, and on a CPU for two ranks.
        parts: which of `PARTS`, all by default, in the order given.
            speed: 1, 2, 4, … ranks at the same batch per rank, the most also with the learning
                rate scaled.
            correctness: the same global batch on one rank and on all.
            checkpoint: the cost of checkpoints in the runs of `speed`.
            kill: a rank killed halfway, and the run resumed.
            sweep: as many independent one-rank runs as GPUs, at once and in sequence.
            run: one whole training on all ranks, in `outf`/run.
        correctness_epochs: of the fp32 comparison.
        sweep_epochs: of each run of the sweep; by default a third of the others'.
        run_epochs: of the whole training; the CLIP loss joins after a sixth of them.
    Returns:
        What scaling.json holds: gpus, settings, and each part with its figures, the code's version
        and the machine.
    Raises:
        ScalingError: fewer than two ranks, or more than GPUs; `outf` holds other settings'
            measurements; or a run failed.
        ConfigError: settings that no run would accept.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigError(f"parts={' '.join(unknown)} unknown; use any of {' '.join(PARTS)}")
    visible = 0 if config.train.device == "cpu" else torch.cuda.device_count()
    gpus = gpus or visible or 2
    if gpus < 2:
        raise ScalingError(f"gpus={gpus}, but scaling needs two ranks or more; measure one GPU "
                           "with `hnerv-clip bench`")
    if visible and gpus > visible:
        raise ScalingError(f"gpus={gpus}, but this machine shows {visible}; use --gpus {visible}")
    if config.train.epochs < WARM_UP_EPOCHS + 2:
        raise ConfigError(f"epochs={config.train.epochs} must be at least {WARM_UP_EPOCHS + 2}: "
                          f"the first {WARM_UP_EPOCHS} are not timed")
    scaling = _Scaling(config, resolve_path(outf), gpus, on_gpu=visible > 0, cache_dir=cache_dir,
                   correctness_epochs=correctness_epochs, run_epochs=run_epochs,
                   sweep_epochs=sweep_epochs or max(1, config.train.epochs // 3))
    scaling.open()
    dataset = prepare_dataset(config, cache_dir, device=config.train.device)
    scaling.measured["teacher"] = dataset.teacher_label if config.model.predict_clip else None
    for name in parts or PARTS:
        if scaling.measured["parts"].get(name, {}).get("complete"):
            print(f"{name}: measured already, see {scaling.path}")
            continue
        print(f"== {name}", flush=True)
        scaling.started = time.monotonic()
        PARTS[name](scaling)
    return scaling.measured


@dataclass
class _Scaling:
    """Where the measurement stands."""

    config: Config
    outf: Path
    gpus: int
    on_gpu: bool
    cache_dir: str | Path
    correctness_epochs: int
    sweep_epochs: int
    run_epochs: int
    started: float = 0.0  # of the part

    @property
    def path(self) -> Path:
        return self.outf / "scaling.json"

    def open(self) -> None:
        """Take up what is measured already; of the same settings only."""
        fresh = {"gpus": self.gpus, "backend": "nccl" if self.on_gpu else "gloo",
                 "settings": self.config.params(), "sweep_epochs": self.sweep_epochs,
                 "correctness_epochs": self.correctness_epochs, "run_epochs": self.run_epochs}
        self.measured = {**fresh, "parts": {}}
        if not self.path.exists():
            return
        found = read_json(self.path, keys={"parts": dict},
                          fix="give another outf, or remove that file")
        differing = [name for name, value in json.loads(json.dumps(fresh)).items()
                     if found.get(name) != value]
        if differing:
            raise ScalingError(f"{self.path} was measured with other {', '.join(differing)}; "
                               "give another outf, or remove that folder")
        self.measured = found

    def save(self, part: str, figures: dict[str, Any], *, complete: bool) -> None:
        """Write a part as far as it is measured."""
        commit, dirty = code_version()
        self.measured["parts"][part] = {
            **figures, "complete": complete, "gpus": self.gpus,
            "took_s": time.monotonic() - self.started, "commit": commit, "dirty": dirty,
            "device": device_name(torch.device("cuda" if self.on_gpu else "cpu")),
            "cores": os.cpu_count(), "versions": package_versions(), "cuda": torch.version.cuda,
            "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.outf.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.measured)

    def train(self, name: str, config: Config, ranks: int) -> Path:
        """One run on so many ranks; a finished one is taken as it stands."""
        return self.wait(launch(config, self.outf / name, cluster="local", gpus_per_node=ranks,
                                cache_dir=self.cache_dir))[0]

    def train_many(self, folder: Path, configs: dict[str, Config], *, at_once: int) -> list[Path]:
        """Independent runs of one rank each."""
        return self.wait(launch(configs, folder, cluster="local", gpus_per_node=1,
                                slurm_array_parallelism=at_once, cache_dir=self.cache_dir))

    def wait(self, jobs: list[Job]) -> list[Path]:
        started = time.monotonic()
        while not all(job.ended for job in jobs):
            time.sleep(0.1)
        for job in jobs:
            if job.state == "failed":
                raise ScalingError(f"run {job.name} failed: {job.why}\n{job.log()}")
            print(f"  {job.name}: {job.figures()}, {time.monotonic() - started:.0f} s", flush=True)
        return [job.run_dir for job in jobs]

    def fresh_folder(self, stem: str) -> Path:
        """A folder of this name and a number that nothing was run in: clocks need new runs."""
        number = 1
        while (folder := self.outf / f"{stem}{number}").exists():
            number += 1
        return folder


# The parts
def _measure_speed(scaling: _Scaling) -> None:
    figures: dict[str, Any] = {"runs": [], "failed": []}
    for ranks in rank_counts(scaling.gpus):
        for name, lr, config in speed_runs(scaling.config, ranks, largest=ranks == scaling.gpus):
            row = {"run": name, "ranks": ranks, "learning_rate": lr}
            try:
                row |= run_figures(scaling.train(name, config, ranks))
            except ScalingError as error:
                if lr == "kept":
                    raise
                print(error)  # too large a learning rate is a result
                figures["failed"].append(row | {"why": str(error).splitlines()[0]})
                continue
            alone = (figures["runs"] or [row])[0]
            figures["quality_db"] = alone["curve"][-1][2]
            row["efficiency"] = row["frames_per_s"] / (ranks * alone["frames_per_s"])
            row["time_to_quality_s"] = time_to_reach(
                joint_curve(row, scaling.config.params()), figures["quality_db"])
            figures["runs"].append(row)
            scaling.save("speed", figures, complete=False)
    scaling.save("speed", figures, complete=True)


def _measure_correctness(scaling: _Scaling) -> None:
    """The same global batches on one rank, on one rank again (what a repeat differs by), on all."""
    exact = scaling.config.replace(
        precision="fp32", engine="plain", epochs=scaling.correctness_epochs,
        eval_freq=scaling.correctness_epochs,
        pixel_loss_warmup_epochs=scaling.correctness_epochs // 2)
    cases = [("exact", "exact_ranks", exact)]
    if scaling.on_gpu:  # and as it is trained, if that is not the same
        cases.append(("whole", f"ranks{scaling.gpus}", scaling.config))
    alone = {name: config.replace(batch_size=config.train.batch_size * scaling.gpus)
             for name, _, config in cases}
    twice = iter(scaling.train_many(scaling.outf / "one_rank", {
        f"{name}_{which}": config for name, config in alone.items() for which in ("one", "again")},
        at_once=scaling.gpus))
    rows: list[dict[str, Any]] = []
    for (name, on_all, config), one, again in zip(cases, twice, twice):
        ranks = scaling.train(on_all, config, scaling.gpus)
        losses = {key: RunDir(path).metrics().total_loss.tolist()
                  for key, path in [("loss_one", one), ("loss_ranks", ranks)]}
        rows.append({"precision": config.train.precision, "engine": config.train.engine,
                     "epochs": config.train.epochs, "ranks": scaling.gpus,
                     "global_batch": alone[name].train.batch_size,
                     "ranks_differ": weight_difference(one, ranks),
                     "repeat_differs": weight_difference(one, again), **losses,
                     "psnr_one_db": RunDir(one).summary()["eval_psnr_train"],
                     "psnr_ranks_db": RunDir(ranks).summary()["eval_psnr_train"]})
        scaling.save("correctness", {"cases": rows}, complete=len(rows) == len(cases))


def _measure_sweep(scaling: _Scaling) -> None:
    folder, count = scaling.fresh_folder("sweep"), scaling.gpus
    configs = sweep_configs(scaling.config, count, epochs=scaling.sweep_epochs)
    figures: dict[str, Any] = {"runs": count, "epochs": scaling.sweep_epochs}
    for way, at_once in [("at_once", count), ("in_sequence", 1)]:
        started = time.monotonic()
        folders = scaling.train_many(folder / way, configs, at_once=at_once)
        figures[f"{way}_s"] = time.monotonic() - started
        figures[f"{way}_rank_s"] = figures[f"{way}_s"] * at_once  # GPUs held, times seconds
        figures[f"{way}_psnr_db"] = {path.name: RunDir(path).summary()["eval_psnr_train"]
                                     for path in folders}
        scaling.save("sweep", figures, complete=False)
    figures["speed_up"] = figures["in_sequence_s"] / figures["at_once_s"]
    scaling.save("sweep", figures, complete=True)


def _measure_kill(scaling: _Scaling) -> None:
    whole = scaling.train(f"ranks{scaling.gpus}", scaling.config, scaling.gpus)
    config = scaling.config.replace(checkpoint_s=KILL_CHECKPOINT_S)
    folder, half = scaling.fresh_folder("killed"), scaling.config.train.epochs // 2
    [job] = launch(config, folder, cluster="local", gpus_per_node=scaling.gpus,
                   cache_dir=scaling.cache_dir)
    controller = psutil.Process(job.record["pid"])
    victim = None
    while job.epoch < half:
        if not controller.is_running() or controller.status() == psutil.STATUS_ZOMBIE:
            raise ScalingError(f"run {job.name} ended before it was killed: {job.why}\n{job.log()}")
        if victim is None:  # found early: later there is no time to lose
            processes = [controller, *controller.children()]
            victim = next((process for process in processes[1:] if process.environ().get(
                "SUBMITIT_LOCAL_GLOBALID") == str(scaling.gpus - 1)), None)
        time.sleep(0.01)
    if victim is None:
        raise ScalingError(f"rank {scaling.gpus - 1} of {job.name} was not found among its "
                           "processes in half its epochs; raise epochs")
    killed_epoch, killed = job.epoch, time.monotonic()
    victim.kill()
    while not job.ended:
        time.sleep(0.02)
    figures = {"ranks": scaling.gpus, "checkpoint_s": KILL_CHECKPOINT_S,
               "killed_epoch": killed_epoch,
               "down_s": time.monotonic() - killed, "message": job.why}
    _, alive = psutil.wait_procs(processes, timeout=60)
    if alive:
        raise ScalingError(f"{len(alive)} processes of the killed run are still there after a "
                           "minute")
    figures["all_processes_gone_s"] = time.monotonic() - killed
    figures["resumed_epoch"] = RunDir(folder).load_checkpoint(LATEST)["epoch"] if (
        folder / LATEST).exists() else 0
    scaling.save("kill", figures, complete=False)
    resumed = scaling.train(folder.name, config, scaling.gpus)
    figures |= {"differs": weight_difference(whole, resumed),
                "psnr_uninterrupted_db": RunDir(whole).summary()["eval_psnr_train"],
                "psnr_resumed_db": RunDir(resumed).summary()["eval_psnr_train"]}
    scaling.save("kill", figures, complete=True)


def _measure_checkpoint(scaling: _Scaling) -> None:
    default_s, rows = TrainConfig().checkpoint_s, []
    for ranks in (1, scaling.gpus):
        run = RunDir(scaling.train(f"ranks{ranks}", scaling.config, ranks))
        summary = run.summary()
        mean_s = summary["checkpoint_time_s"] / summary["checkpoints"]
        rows.append({"ranks": ranks, "checkpoints": summary["checkpoints"], "mean_s": mean_s,
                     "size_bytes": (run.path / LATEST).stat().st_size,
                     "share": mean_s / (default_s + mean_s)})
    scaling.save("checkpoint", {"checkpoint_s": default_s, "runs": rows}, complete=True)


def _measure_run(scaling: _Scaling) -> None:
    config = whole_run(scaling.config, scaling.run_epochs)
    figures = run_figures(scaling.train(RUN, config, scaling.gpus))
    scaling.save("run", {"ranks": scaling.gpus, **figures}, complete=True)


PARTS: dict[str, Callable[[_Scaling], None]] = {
    "speed": _measure_speed, "correctness": _measure_correctness,
    "checkpoint": _measure_checkpoint, "kill": _measure_kill, "sweep": _measure_sweep,
    "run": _measure_run}


# What is run, and what is read off a run
def rank_counts(gpus: int) -> list[int]:
    """1, 2, 4, … and `gpus` itself."""
    return [2**k for k in range(gpus.bit_length()) if 2**k < gpus] + [gpus]


def speed_runs(config: Config, ranks: int, *, largest: bool) -> list[tuple[str, str, Config]]:
    """(name, what the learning rate is, configuration) of the runs on so many ranks.

    With several ranks an epoch has fewer steps. The largest number is therefore also trained with
    the learning rate scaled, and so for as many steps as one rank.
    """
    runs, train = [(f"ranks{ranks}", "kept", config)], config.train
    if largest and ranks > 1:
        scaled = config.replace(lr=train.lr * ranks)
        runs.append((f"ranks{ranks}_scaled", f"×{ranks}", scaled))
        runs.append((f"ranks{ranks}_steps", f"×{ranks}, as many steps", scaled.replace(
            epochs=train.epochs * ranks, eval_freq=train.eval_freq * ranks,
            pixel_loss_warmup_epochs=train.pixel_loss_warmup_epochs * ranks)))
    return runs


def sweep_configs(config: Config, count: int, *, epochs: int) -> dict[str, Config]:
    """So many runs that differ in λ, or else in the seed; they cost the same."""
    shorter = epochs / config.train.epochs
    base = config.replace(epochs=epochs, eval_freq=epochs, pixel_loss_warmup_epochs=round(
        config.train.pixel_loss_warmup_epochs * shorter))
    runs = {}
    for index in range(count):
        value, seed = LAMBDAS[index % len(LAMBDAS)], config.train.seed + index // len(LAMBDAS)
        runs[f"lambda_{value:g}_seed{seed}"] = base.replace(clip_loss_weight=value, seed=seed)
    return runs


def whole_run(config: Config, epochs: int) -> Config:
    """A training of so many epochs, its phases and evaluations as in the paper's 300."""
    return config.replace(epochs=epochs, pixel_loss_warmup_epochs=round(epochs / 6),
                          eval_freq=max(1, epochs // 10))


def run_figures(run_dir: Path) -> dict[str, Any]:
    """Speed and quality of a finished run.

    Returns:
        frames_per_s: median over epochs, without the first `WARM_UP_EPOCHS`, evaluation,
        checkpoints and compilation, with its 10th and 90th percentile; wall_s: from submission to
        the last file, by when job.json and summary.json were last written (a copy of the folder
        may have other times), None where the run was resumed; curve: (epoch, train_time_s, PSNR of
        training frames in dB) at each evaluation; and settings and figures of the run.
    """
    run = RunDir(run_dir)
    row, metrics = run_row(run, parts=("train",)), run.metrics()
    evaluation = run.evaluation()
    frames = evaluation.frame[evaluation.split == "train"].nunique()
    rates = frames / np.diff(metrics.train_time_s)[WARM_UP_EPOCHS - 1:]
    low, median, high = (float(value) for value in np.percentile(rates, [10, 50, 90]))
    measured = metrics[metrics.eval_psnr_train.notna()]
    provenance = run.provenance()
    submitted, ended = ((run.path / name).stat().st_mtime for name in ("job.json", "summary.json"))
    return {
        **{name: row[name] for name in ("engine", "batch_size", "lr", "epochs")},
        "steps": int(metrics.step.iloc[-1]),
        "frames_per_s": median, "frames_per_s_p10": low, "frames_per_s_p90": high,
        "epochs_timed": len(rates),
        "wall_s": None if provenance["resumed_at_epoch"] else ended - submitted,
        **{name: row[name] for name in ("train_time_s", "compile_s", "eval_time_s",
                                        "peak_memory_bytes")},
        "psnr_db": row["psnr_train_db"],
        "cosine_centred": run.summary().get("eval_clip_centred_train"),
        "curve": [[int(epoch), float(time_s), float(psnr_db)] for epoch, time_s, psnr_db in zip(
            measured.epoch, measured.train_time_s, measured.eval_psnr_train)]}


def joint_curve(run: dict[str, Any], settings: dict[str, Any]) -> list[Sequence[float]]:
    """Evaluations after a run's warm-up, in which a network with a head has one task.

    Args:
        run: curve and epochs, to which the phase is in proportion.
        settings: of the measurement, flat.
    """
    phase = settings["predict_clip"] * settings["pixel_loss_warmup_epochs"]
    return [point for point in run["curve"]
            if point[0] * settings["epochs"] > phase * run["epochs"]]


def time_to_reach(curve: Sequence[Sequence[float]], psnr_db: float) -> float | None:
    """Training seconds until a quality is first reached, between evaluations linearly.

    Args:
        curve: rows of epoch, train_time_s and PSNR.
    Returns:
        None where it is never reached.
    """
    before = None
    for _, time_s, reached_db in curve:
        if reached_db >= psnr_db:
            if before is None:
                return time_s
            share = (psnr_db - before[1]) / (reached_db - before[1])
            return before[0] + share * (time_s - before[0])
        before = time_s, reached_db
    return None


def weight_difference(one: Path, other: Path) -> dict[str, Any]:
    """How far the last weights of two runs lie apart.

    Returns:
        identical: bit for bit; largest: of all weights; relative: root of the summed squares of
        the differences over that of the weights.
    """
    pairs = [(value.double(), RunDir(other).load_checkpoint(LATEST)["model"][name].double())
             for name, value in RunDir(one).load_checkpoint(LATEST)["model"].items()]
    gap = sum((a - b).square().sum() for a, b in pairs)
    return {"identical": all(torch.equal(a, b) for a, b in pairs),
            "largest": max(float((a - b).abs().max()) for a, b in pairs),
            "relative": float((gap / sum(a.square().sum() for a, _ in pairs)).sqrt())}
