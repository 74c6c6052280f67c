"""A job, its state as its files, its process and Slurm tell it, and the table of many."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from submitit.core.utils import JobPaths
from tqdm.auto import tqdm

from hnerv_clip.config import Config
from hnerv_clip.files import RunError, check_keys, read_json, write_json
from hnerv_clip.launch import local, slurm
from hnerv_clip.launch.errors import JobFailed
from hnerv_clip.launch.ranks import Task, write_outcome
from hnerv_clip.runs.locks import process_start
from hnerv_clip.runs.run_dir import RunDir

if TYPE_CHECKING:  # submitting loads no torch
    from hnerv_clip.dataset import Dataset

SETTLE_S = 15  # a shared file system may show a file that late
ENDING = "ending"  # gone or failed, but perhaps not to its last file yet
# What job.json must hold besides, by cluster
RECORDS: dict[str, dict[str, Any]] = {
    "inline": {"pid": int, "pid_start": (int, float, type(None))},
    "local": {"pid": int, "pid_start": (int, float, type(None)), "job_id": str, "folder": str},
    "slurm": {"job_id": str, "folder": str, "slurm_cluster": str},
}
FIX = ("make sure that no job trains this run, remove that file, and launch the run again: it goes "
       "on from its last checkpoint")


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
    task: Task = field(repr=False)
    _queue: local.LocalQueue | None = field(default=None, repr=False)
    _result: Any = field(default=None, repr=False)
    _gone_since: float | None = field(default=None, repr=False)

    @property
    def state(self) -> str:
        """`new`, `waiting`, `running`, `finished` or `failed` (died or was cancelled, too)."""
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
        """What job.json says (cluster, job_id, host and pid, folder); empty before submission.

        Raises:
            RunError: it is damaged.
        """
        path = self.run_dir / "job.json"
        record = _read_json(path, {"cluster": str, "token": str, "host": str})
        if record:
            if record["cluster"] not in RECORDS:
                raise RunError(f"{path} is damaged: its cluster is {record['cluster'][:40]!r}; "
                               f"{FIX}")
            check_keys(record, RECORDS[record["cluster"]], path, fix=FIX)
            if record.get("job_id") == "":  # found by its name then
                check_keys(record, {"job_name": str, "array_index": (int, type(None))}, path,
                           fix=FIX)
        return record

    @property
    def epoch(self) -> int:
        """Epochs trained so far."""
        return int(self._last_metrics().get("epoch", 0))

    @property
    def log_path(self) -> Path | None:
        """The log of rank 0's process; None where there is none of its own."""
        record = self.record
        if not record.get("job_id"):
            return None
        return JobPaths(record["folder"], job_id=record["job_id"], task_id=0).stderr

    def log(self, lines: int = 20) -> str:
        """The end of what rank 0 printed, errors included; inline, of the run's own log."""
        path = self.log_path or self.run_dir / "rank0.txt"
        files = [path.with_suffix(".out"), path] if path.suffix == ".err" else [path]
        text = "".join(file.read_text(encoding="utf-8", errors="replace")
                       for file in files if file.exists())
        return "\n".join(text.splitlines()[-lines:])

    def figures(self) -> str:
        """How well it goes, from the last row of metrics.csv: PSNR, and the CLIP cosine."""
        last = self._last_metrics()
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
        """Stop it; its checkpoints stay, and launching it again resumes from them."""
        self._look()  # finds the id of a job that lacks it
        record = self.record
        if self._queue:
            self._queue.waiting = [job for job in self._queue.waiting if job is not self]
        if record.get("cluster") == "slurm" and record["job_id"]:
            subprocess.run(["scancel", record["job_id"]], check=True)
        elif record.get("cluster") == "local" and local.alive(record):
            os.killpg(record["pid"], signal.SIGKILL)

    def _last_metrics(self) -> dict[str, float]:
        try:
            text = (self.run_dir / "metrics.csv").read_text(encoding="utf-8")
            header, *rows = text.splitlines()
            last = zip(header.split(","), rows[-1].split(",")) if rows else ()
            return {name: float(text) for name, text in last if text}
        except (OSError, ValueError):  # none yet, or damaged: the next epoch writes it anew
            return {}

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
        outcome = _read_json(self.run_dir / "outcome.json", {"token": str, "error": str})
        if outcome.get("token") == record["token"]:
            ending = record["cluster"] == "local" and local.alive(record)
            return ("running", ENDING) if ending else ("failed", outcome["error"])
        on_slurm = record["cluster"] == "slurm"
        if on_slurm and not record["job_id"] and (job_id := slurm.find(record)):
            record["job_id"] = job_id
            write_json(self.run_dir / "job.json", record)
        state, why = slurm.state(record) if on_slurm else local.state(self.run_dir, record)
        if state != "gone":
            self._gone_since = None
            return state, why
        if on_slurm:  # its last files may not be visible yet
            self._gone_since = self._gone_since or time.monotonic()
            os.listdir(self.run_dir)
            if time.monotonic() < self._gone_since + SETTLE_S:
                return "running", ENDING
        return "failed", why

    def run_inline(self, *, keep_error: bool, dataset: Dataset | None = None) -> None:
        """Train in this process; an error is kept in `why`, and raised unless `keep_error`.

        Args:
            dataset: the run's data, if already loaded.
        """
        token = self.write_record("inline", pid=os.getpid())
        try:
            self._result = self.task.train(progress=True, dataset=dataset)
        except Exception as error:
            write_outcome(self.run_dir, token, error)
            if not keep_error:
                raise
            traceback.print_exc()
        except BaseException as error:  # interrupted: the notebook lives on, the run does not
            write_outcome(self.run_dir, token, error)
            raise

    def write_record(self, cluster: str, *, token: str = "", **facts: Any) -> str:
        """Write job.json, atomically; returns the token that ties outcome.json to it."""
        token = token or os.urandom(8).hex()
        if "pid" in facts:
            facts["pid_start"] = process_start(facts["pid"])
        write_json(self.run_dir / "job.json", {
            "cluster": cluster, "token": token, "host": socket.gethostname(), **facts,
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        return token


def _read_json(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    try:
        return read_json(path, keys=keys, fix=FIX)
    except FileNotFoundError:
        return {}
