"""Where training runs: in this process, in local processes, or as Slurm jobs. All submitit code.

`launch` starts runs, or finds those that are finished or under way, and returns a `Job` for each;
`follow` shows them until all have ended. One task drives one GPU. Each run folder holds

    job.json       which job trains this run, and where: written when it is submitted
    outcome.json   how that job ended: written by the job itself
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import psutil
import submitit
import submitit.helpers
from submitit.core.utils import JobPaths
from tqdm.auto import tqdm

from hnerv_clip.config import Config
from hnerv_clip.runs import RunDir, resolve_path, write_json

CLUSTERS = ("inline", "local", "slurm")
NO_LIMIT_MIN = 10 * 365 * 24 * 60  # submitit's local executor wants a limit; there is none
SILENT_S = 900  # a run of another machine that wrote nothing for so long is taken for dead
SETTLE_S = 15  # a shared file system may show a file that late
START_TIMEOUT = timedelta(minutes=5)  # between the first and the last rank to start
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # dead ranks are seen by `_Peers` long before
ENDING = "ending"  # gone or failed, but perhaps not to its last file yet
STOPPED = "stopped by a signal"  # said by a rank that is requeued or interrupted


class LaunchError(RuntimeError):
    """Runs can't be started as asked; the message says the fix."""


class JobFailed(RuntimeError):
    """A run did not reach its end; the message says why and shows the end of its log."""


def launch(
    configs: Config | Mapping[str, Config],
    outf: str | Path,
    *,
    cluster: str = "inline",
    cache_dir: str | Path = "output/cache",
    nodes: int = 1,
    gpus_per_node: int = 1,
    timeout_min: int = 240,
    slurm_partition: str = "",
    slurm_account: str = "",
    slurm_array_parallelism: int = 8,
    slurm_extra: Mapping[str, Any] | None = None,
    slurm_setup: Sequence[str] = (),
    cpus_per_task: int = 4,
    signal_delay_s: int = 90,
    run: Callable[..., Any] | None = None,
) -> list[Job]:
    """Train one configuration, or many; safe to call again.

    A finished run is picked up, one that is under way is followed, one that failed or died goes
    on from its last checkpoint. Nothing is submitted twice.

    Args:
        configs: one Config, trained in `outf`, or {name: Config}, each trained in `outf`/name.
        cluster: "inline" (here and now, one run after the other), "local" (processes on this
            machine that outlive this one) or "slurm" (many configs become one job array).
        cache_dir: where notebook 01 left the teacher's embeddings.
        nodes, gpus_per_node: of each run; one task a GPU. Without GPUs on the machine, local
            tasks and the Slurm tasks run on the CPU; 0 asks for no GPU and one task.
        timeout_min: Slurm's time limit; a run that reaches it is requeued and goes on.
        slurm_array_parallelism: how many of the runs go at once; in local processes too, where
            the GPUs or else the CPU cores also bound it.
        slurm_extra: more sbatch options, as {"qos": "high", "mem": "64G", "exclusive": True}.
        slurm_setup: shell lines to run before the tasks, as ["module load cuda"].
        signal_delay_s: seconds between Slurm's signal and the time limit.
        run: what trains; `hnerv_clip.train.train` unless told.
    Returns:
        Jobs in the order of `configs`. Inline, they have ended; a single config's error is
        raised, among many it is kept in `Job.why`.
    Raises:
        LaunchError: the settings don't fit this machine.
        RunError: a run folder holds another configuration.
    """
    if cluster not in CLUSTERS:
        raise LaunchError(f"cluster={cluster!r} is unknown; use one of {', '.join(CLUSTERS)}")
    for name, value, low in [("nodes", nodes, 1), ("gpus_per_node", gpus_per_node, 0),
                             ("timeout_min", timeout_min, 1), ("cpus_per_task", cpus_per_task, 1),
                             ("slurm_array_parallelism", slurm_array_parallelism, 1)]:
        if value < low:
            raise LaunchError(f"{name}={value} must be at least {low}")
    if cluster == "slurm":
        _check_slurm(timeout_min, signal_delay_s)
    if cluster == "local" and nodes > 1:
        raise LaunchError(f'nodes={nodes}: cluster="local" has one node; use cluster="slurm"')
    outf, single = resolve_path(outf), isinstance(configs, Config)
    if not configs:
        raise LaunchError("configs is empty; give a Config or a dict of them")
    named = {outf.name: configs} if single else dict(configs)
    if run is None:
        from hnerv_clip.train import (
            check_run,  # imported here, as jobs that only wait need no model
        )

        for config in named.values():
            check_run(config)
    folders = {name: outf if single else outf / name for name in named}
    jobs = [Job(name, RunDir.create(folders[name], config).path, config=config,
                task=_Task(config.params(), str(folders[name]), str(resolve_path(cache_dir)), run))
            for name, config in named.items()]  # every folder is checked before any is touched
    with _alone(outf):
        while any(job.why == ENDING for job in jobs):  # whether it is to start again shows soon
            time.sleep(0.5)
        idle = [job for job in jobs if job.state in ("new", "failed")]
        _print_plan(jobs, idle, cluster)
        if cluster == "local" and idle:
            _LocalQueue(idle, outf / "submitit", gpus_per_node, slurm_array_parallelism)
        elif cluster == "slurm" and idle:
            _submit_to_slurm(idle, outf / "submitit", slurm_array_parallelism, {
                "name": "hnerv-clip", "nodes": nodes, "tasks_per_node": max(1, gpus_per_node),
                "gpus_per_node": gpus_per_node or None, "timeout_min": timeout_min,
                "cpus_per_task": cpus_per_task, "slurm_partition": slurm_partition or None,
                "slurm_account": slurm_account or None, "slurm_signal_delay_s": signal_delay_s,
                "slurm_setup": [f"export OMP_NUM_THREADS={cpus_per_task}", *slurm_setup],
                # from 22.05 on, srun no longer inherits --cpus-per-task from the batch script
                "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}"],
                "slurm_additional_parameters": {"requeue": True, **(slurm_extra or {})}})
    for job in idle if cluster == "inline" else ():
        job._run_inline(keep_error=not single)
    return jobs


def follow(jobs: Sequence[Job], *, poll_s: float = 2.0) -> pd.DataFrame:
    """Show progress until every job has ended; interrupting it stops the watching only.

    Returns:
        A row per job: name, state, epoch, why (empty unless it failed).
    """
    with _bars([job for job in jobs if not job.ended]) as bars:
        while bars:
            for job, bar in bars:
                bar.n = job.epoch
                bar.set_postfix_str(f"{job.state} {job.why} {job.figures()}")
            if all(job.ended for job in jobs):
                break
            time.sleep(poll_s)
    for job in jobs:
        if job.state == "failed":
            print(f"{job.name} failed: {job.why}\n  log: {job.log_path}")
    return pd.DataFrame([{"name": job.name, "state": job.state, "epoch": job.epoch,
                          "why": job.why} for job in jobs])


@contextmanager
def _bars(jobs: Sequence[Job]) -> Iterator[list[tuple[Job, tqdm]]]:
    bars = [(job, tqdm(total=job.config.train.epochs, desc=job.name, unit="epoch"))
            for job in jobs]
    try:
        yield bars
    finally:
        for _, bar in bars:
            bar.close()


@dataclass(eq=False)
class Job:
    """One run under way or ended.

    Attributes:
        name, run_dir, config: of the run.
    """

    name: str
    run_dir: Path
    config: Config
    task: _Task = field(repr=False)
    _queue: _LocalQueue | None = field(default=None, repr=False)
    _result: Any = field(default=None, repr=False)
    _gone_since: float | None = field(default=None, repr=False)

    @property
    def state(self) -> str:
        """`new`, `waiting`, `running`, `finished` or `failed` (also: died, was cancelled)."""
        return self._look()[0]

    @property
    def why(self) -> str:
        """Why it failed, or what it waits for; else empty."""
        return self._look()[1]

    @property
    def ended(self) -> bool:
        """Whether it is finished or failed."""
        return self.state in ("finished", "failed")

    @property
    def record(self) -> dict[str, Any]:
        """What job.json says: cluster, job_id, host and pid, folder; empty before submission."""
        return _read_json(self.run_dir / "job.json")

    @property
    def epoch(self) -> int:
        """Epochs trained so far."""
        return int(float(self._last_metrics().get("epoch") or 0))

    @property
    def log_path(self) -> Path | None:
        """The log of rank 0's process; None where there is none of its own."""
        record = self.record
        if not record.get("folder"):
            return None
        return JobPaths(record["folder"], job_id=record["job_id"], task_id=0).stderr

    def log(self, lines: int = 20) -> str:
        """The end of what rank 0 printed, errors included; inline, of the run's own log."""
        path = self.log_path or self.run_dir / "rank0.txt"
        files = [path.with_suffix(".out"), path] if path.suffix == ".err" else [path]
        text = "".join(file.read_text(errors="replace") for file in files if file.exists())
        return "\n".join(text.splitlines()[-lines:])

    def figures(self) -> str:
        """How well it goes, from the last row of metrics.csv: PSNR, and the CLIP cosine."""
        last = {name: float(text) for name, text in self._last_metrics().items() if text}
        shown = [f"{last['psnr_db']:.2f} dB"] if "psnr_db" in last else []
        shown += [f"cos {1 - last['clip_loss']:.3f}"] if "clip_loss" in last else []
        return " ".join(shown)

    def result(self) -> Any:
        """Wait for the end, and return what training returns.

        Raises:
            JobFailed: it did not reach its end.
        """
        while not self.ended:
            time.sleep(1)
        if self.state == "failed":
            raise JobFailed(f"run {self.name} failed: {self.why}\n{self.log()}\n"
                            f"launch it again to go on from its last checkpoint in {self.run_dir}")
        if self._result is None:  # a finished run returns at once
            self._result = self.task.train()
        return self._result

    def cancel(self) -> None:
        """Stop it; its checkpoints stay, and launching it again goes on from them."""
        record = self.record
        if self._queue:
            self._queue.waiting = [job for job in self._queue.waiting if job is not self]
        if record.get("cluster") == "slurm":
            subprocess.run(["scancel", record["job_id"]], check=True)
        elif record.get("cluster") == "local" and _alive(record):
            os.killpg(record["pid"], signal.SIGKILL)

    def _last_metrics(self) -> dict[str, str]:
        try:
            with open(self.run_dir / "metrics.csv") as file:
                header, *rows = file.read().splitlines()
        except (FileNotFoundError, ValueError):
            return {}
        return dict(zip(header.split(","), rows[-1].split(","))) if rows else {}

    def _look(self) -> tuple[str, str]:
        """(state, why)."""
        if RunDir(self.run_dir).finished:
            return "finished", ""
        if self._queue:
            self._queue.pump()
            if self in self._queue.waiting:
                return "waiting", "for other runs of this machine"
        record = self.record
        if not record:
            return "new", ""
        outcome = _read_json(self.run_dir / "outcome.json")
        if outcome.get("token") == record["token"]:
            ending = record["cluster"] == "local" and _alive(record)
            return ("running", ENDING) if ending else ("failed", outcome["error"])
        on_slurm = record["cluster"] == "slurm"
        state, why = _slurm_state(record) if on_slurm else _local_state(self.run_dir, record)
        if state != "gone":
            self._gone_since = None
            return state, why
        if on_slurm:  # its last files may not be visible yet
            self._gone_since = self._gone_since or time.monotonic()
            os.listdir(self.run_dir)
            if time.monotonic() < self._gone_since + SETTLE_S:
                return "running", ENDING
        return "failed", why

    def _run_inline(self, *, keep_error: bool) -> None:
        token = self._record("inline", pid=os.getpid())
        try:
            self._result = self.task.train(progress=True)
        except Exception as error:
            _write_outcome(self.run_dir, token, error)
            if not keep_error:
                raise
            traceback.print_exc()
        except BaseException as error:  # interrupted: the notebook lives on, the run does not
            _write_outcome(self.run_dir, token, error)
            raise

    def _record(self, cluster: str, *, token: str = "", **facts: Any) -> str:
        """Write job.json, atomically; returns the token that ties outcome.json to it."""
        token = token or os.urandom(8).hex()
        if "pid" in facts:
            facts["pid_start"] = _process_start(facts["pid"])
        write_json(self.run_dir / "job.json", {
            "cluster": cluster, "token": token, "host": socket.gethostname(), **facts,
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        return token


# ---------------------------------------------------------------- what runs in each process


class _Task(submitit.helpers.Checkpointable):
    """What a process of a job runs. It has no state: a requeued job goes on from the run folder."""

    def __init__(self, params: dict[str, Any], run_dir: str, cache_dir: str,
                 run: Callable[..., Any] | None):
        self.params, self.run_dir, self.cache_dir, self.run = params, run_dir, cache_dir, run
        self.token = os.urandom(8).hex()

    def train(self, *, progress: bool = False) -> Any:
        if self.run is None:
            from hnerv_clip.train import train  # only here: submitting needs no training code
            run = train
        else:
            run = self.run
        return run(Config.from_params(**self.params), self.run_dir, cache_dir=self.cache_dir,
                   progress=progress)

    def __call__(self) -> None:
        with _distributed(functools.partial(_write_outcome, Path(self.run_dir), self.token)):
            self.train()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues again on Slurm's signal."""
        signal.signal(submitit.JobEnvironment._usr_sig(), signal.SIG_IGN)  # once is enough
        return submitit.helpers.DelayedSubmission(self)


@contextmanager
def _distributed(report: Callable[[Any], None]) -> Iterator[None]:
    """Join the job's other tasks in torch.distributed, and end all of them when one dies.

    Args:
        report: writes down why the job failed.
    """
    env = submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False,
                                                                overwrite=True)
    if env.world_size == 1:
        try:
            yield
        except Exception as error:
            report(error)
            raise
        return
    import torch
    import torch.distributed as dist

    on_gpu, device = torch.cuda.is_available(), None
    if on_gpu:
        device = torch.device("cuda", env.local_rank % torch.cuda.device_count())  # or its own only
        torch.cuda.set_device(device)
    store = dist.TCPStore(env.master_addr, env.master_port, env.world_size,
                          is_master=env.rank == 0, timeout=START_TIMEOUT)
    peers = _Peers(store, env, report)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=env.rank,
                            world_size=env.world_size, timeout=COLLECTIVE_TIMEOUT,
                            device_id=device)
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        time.sleep(2)  # if another rank's death is the cause, its own message comes first
        peers.end(f"rank {env.rank} of {env.world_size}: {_describe(error)}")
    except BaseException as error:  # submitit leaves by SystemExit once it has requeued the job
        peers.end(STOPPED, code=error.code if isinstance(error, SystemExit) else 1)
    peers.finish()
    dist.destroy_process_group()


class _Peers:
    """Sees a rank die: each holds a connection to rank 0, which the kernel closes at its death.

    Neither gloo nor NCCL does: the other ranks would wait for the dead one.
    """

    def __init__(self, store: Any, env: Any, report: Callable[[Any], None]):
        self.rank, self.world_size, self.report = env.rank, env.world_size, report
        self.finished, self.ending = False, threading.Lock()
        if self.rank == 0:
            server = socket.create_server(("", 0), backlog=self.world_size)
            server.settimeout(START_TIMEOUT.total_seconds())
            store.set("peers", str(server.getsockname()[1]))
            self.connections = {}
            while len(self.connections) < self.world_size - 1:
                connection, _ = server.accept()
                self.connections[int.from_bytes(connection.recv(4), "big")] = connection
        else:
            port = int(store.get("peers"))
            connection = socket.create_connection((env.master_addr, port))
            connection.sendall(self.rank.to_bytes(4, "big"))
            self.connections = {0: connection}
        for peer, connection in self.connections.items():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in [("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)]:
                if hasattr(socket, option):  # a node that lost its power sends no farewell
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            threading.Thread(target=self._watch, args=(peer, connection), daemon=True).start()

    def _watch(self, peer: int, connection: socket.socket) -> None:
        heard = b""
        try:
            while data := connection.recv(4096):
                heard += data
        except OSError:
            pass
        if heard == b"finished" or self.finished:
            return
        died = f"rank {peer} of {self.world_size} died; the other ranks stopped with it"
        # rank 0 writes down why, and rank 1 in place of a rank 0 that can't
        self.end(heard.decode(errors="replace") or died, write=self.rank == 0 or (
            self.rank == 1 and not heard))

    def end(self, message: str, *, write: bool | None = None, code: Any = 1) -> None:
        """Tell the others why, and end this process; never returns."""
        with self.ending:  # never released: the first cause is the one to report
            if message != STOPPED and (self.rank == 0 if write is None else write):
                self.report(message)
            self._tell(message.encode()[:4000])
            print(f"rank {self.rank} ends: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(code & 0xFF if isinstance(code, int) else 1)  # NCCL's exit may wait for ever

    def finish(self) -> None:
        """This rank reached its end: its silence from now on is no alarm."""
        self.finished = True
        self._tell(b"finished")

    def _tell(self, message: bytes) -> None:
        for connection in self.connections.values():
            try:
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)
            except OSError:  # it is gone already
                pass


def _write_outcome(run_dir: Path, token: str, error: Any) -> None:
    text = error if isinstance(error, str) else _describe(error)
    try:
        write_json(run_dir / "outcome.json", {"token": token, "error": text})
    except Exception as failure:  # a full disk must not hide the error itself
        print(failure, file=sys.stderr)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------- processes of this machine


class _LocalQueue:
    """Starts waiting jobs when others end; their processes outlive this one."""

    def __init__(self, jobs: Sequence[Job], folder: Path, gpus_per_job: int, parallelism: int):
        gpus = _visible_gpus()
        if 0 < len(gpus) < gpus_per_job:
            raise LaunchError(f"gpus_per_node={gpus_per_job}, but this machine shows {len(gpus)}; "
                              f"use gpus_per_node={len(gpus)}")
        self.folder, self.tasks = folder, max(1, gpus_per_job)
        if gpus and gpus_per_job:
            starts = range(0, len(gpus) - gpus_per_job + 1, gpus_per_job)
            slots = [gpus[start:start + gpus_per_job] for start in starts]
        else:
            slots = [[]] * max(1, _cpu_count() // self.tasks)
        self.slots = dict(enumerate(slots[:min(parallelism, len(jobs))]))
        self.waiting, self.running = list(jobs), {}
        for job in jobs:
            job._queue = self
        self.pump()

    def pump(self) -> None:
        """Start what there is room for."""
        self.running = {slot: job for slot, job in self.running.items()
                        if _alive(job.record)}
        for slot in self.slots.keys() - self.running.keys():
            if self.waiting:
                job = self.waiting.pop(0)
                self._start(job, self.slots[slot])
                self.running[slot] = job

    def _start(self, job: Job, gpus: list[int]) -> None:
        executor = submitit.LocalExecutor(self.folder / "%j", max_num_timeout=sys.maxsize)
        executor.update_parameters(timeout_min=NO_LIMIT_MIN, tasks_per_node=self.tasks,
                                   gpus_per_node=len(gpus), visible_gpus=gpus)
        (job.run_dir / "outcome.json").unlink(missing_ok=True)
        # Its own session: Jupyter's interrupt and shutdown signal the kernel's whole group
        detached = types.SimpleNamespace(
            Popen=functools.partial(subprocess.Popen, start_new_session=True))
        threads = max(1, _cpu_count() // (len(self.slots) * self.tasks))
        with (submitit.helpers.clean_env(),
              submitit.helpers.environment_variables(OMP_NUM_THREADS=threads),
              mock.patch("submitit.local.local.subprocess", detached)):
            started = executor.submit(job.task)
        job._record("local", token=job.task.token, job_id=started.job_id, pid=int(started.job_id),
                    folder=str(executor.folder))
        threading.Thread(target=started._process.wait, daemon=True).start()  # leave no zombie


def _visible_gpus() -> list[int]:
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if shown and all(part.strip().isdigit() for part in shown.split(",")):
        return [int(part) for part in shown.split(",")][:count]
    return list(range(count))


def _local_state(run_dir: Path, record: dict[str, Any]) -> tuple[str, str]:
    """(running or gone, why)."""
    if record["host"] == socket.gethostname():
        if _alive(record):
            return "running", ""
        return "gone", f"process {record['pid']} ended without a word (killed?)"
    silent_s = time.time() - max(file.stat().st_mtime for file in run_dir.iterdir())
    if silent_s < SILENT_S:
        return "running", f"on {record['host']}"
    return "gone", f"process {record['pid']} on {record['host']} is silent for {silent_s:.0f} s"


def _alive(record: dict[str, Any]) -> bool:
    start = _process_start(record["pid"]) if record else None
    return start is not None and abs(start - record["pid_start"]) < 2  # the clock may be adjusted


def _process_start(pid: int) -> float | None:
    """When a process began, which tells it from a later one of the same id; None if it ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


# ---------------------------------------------------------------- Slurm


def _check_slurm(timeout_min: int, signal_delay_s: int) -> None:
    if not shutil.which("sbatch"):
        raise LaunchError('cluster="slurm" needs sbatch, which this machine lacks; start the '
                          'notebook on a login node, or use cluster="local"')
    if signal_delay_s >= timeout_min * 60:
        raise LaunchError(f"signal_delay_s={signal_delay_s} must be shorter than "
                          f"timeout_min={timeout_min}")


def _submit_to_slurm(jobs: Sequence[Job], folder: Path, parallelism: int,
                     parameters: dict[str, Any]) -> None:
    executor = submitit.AutoExecutor(folder / "%j", cluster="slurm",
                                     slurm_max_num_timeout=sys.maxsize)
    executor.update_parameters(slurm_array_parallelism=parallelism, **parameters)
    for job in jobs:
        (job.run_dir / "outcome.json").unlink(missing_ok=True)
    try:
        # From within a job, sbatch would inherit that job's settings
        where = {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS")}
        with submitit.helpers.clean_env(), submitit.helpers.environment_variables(**where):
            submitted = executor.submit_array([job.task for job in jobs])
    except Exception as error:
        raise LaunchError(f"Slurm refused the job: {error}") from error
    for job, started in zip(jobs, submitted):
        job._record("slurm", token=job.task.token, job_id=started.job_id,
                    folder=str(folder / "%j"), slurm_cluster=_slurm_cluster())
    _slurm_query.cache_clear()


def _slurm_state(record: dict[str, Any]) -> tuple[str, str]:
    """(waiting, running or gone, why)."""
    rows = _slurm_query(record["slurm_cluster"], int(time.monotonic() / 2))
    if rows is None:
        return "running", "Slurm does not answer"
    state, reason = rows.get(record["job_id"], ("", ""))
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"):
        return "waiting", reason
    if state in ("RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "PREEMPTED",
                 "RESIZING", "STOPPED"):
        return "running", ""
    return "gone", _slurm_end(record["job_id"], state)


@functools.lru_cache(maxsize=1)
def _slurm_query(cluster: str, tick: int) -> dict[str, tuple[str, str]] | None:
    """{job id: (state, reason)} of this user's jobs; None if Slurm does not answer.

    `tick` makes the cache forget: Slurm is asked once in a while for all jobs together.
    """
    try:
        squeue = subprocess.run(["squeue", "--me", "--array", "--noheader", "--states=all",
                                 "--format=%i|%T|%r"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if squeue.returncode or cluster != _slurm_cluster():
        return None
    rows = (line.split("|", 2) for line in squeue.stdout.splitlines())
    return {job_id: (state, reason) for job_id, state, reason in rows}


@functools.lru_cache(maxsize=1)
def _slurm_cluster() -> str:
    config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    for line in config.stdout.splitlines():
        if line.startswith("ClusterName"):
            return line.split("=")[1].strip()
    raise LaunchError(f"scontrol show config does not answer: {config.stderr.strip()}")


def _slurm_end(job_id: str, state: str) -> str:
    """How Slurm says that a job ended; accounting may be switched off."""
    sacct = subprocess.run(["sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,ExitCode"],
                           capture_output=True, text=True)
    state, _, code = (sacct.stdout.strip() or f"{state or 'UNKNOWN'}|").partition("|")
    return f"Slurm job {job_id} ended as {state}" + (f", exit code {code}" if code else "")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One launcher at a time looks at the runs in `folder` and submits the missing ones."""
    with open(folder / ".launch", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks; the run's own lock remains
            pass
        yield


def _print_plan(jobs: Sequence[Job], idle: Sequence[Job], cluster: str) -> None:
    finished = sum(job.state == "finished" for job in jobs)
    where = {"inline": "in this process", "local": "in processes of this machine",
             "slurm": "on Slurm"}[cluster]
    print(f"{len(jobs)} run{'s' if len(jobs) != 1 else ''}: {finished} finished, "
          f"{len(jobs) - finished - len(idle)} under way, {len(idle)} to start {where}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
