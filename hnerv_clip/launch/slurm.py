"""Jobs of a Slurm cluster."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
import submitit.helpers

from hnerv_clip.launch.errors import Launched, LaunchError


def check(timeout_min: int, signal_delay_s: int) -> None:
    """Raise LaunchError where jobs can't be submitted so."""
    if not shutil.which("sbatch"):
        raise LaunchError('cluster="slurm" needs sbatch, which this machine lacks; start the '
                          'notebook on a login node, or use cluster="local"')
    if signal_delay_s >= timeout_min * 60:
        raise LaunchError(f"signal_delay_s={signal_delay_s} must be shorter than "
                          f"timeout_min={timeout_min}")


def submit(jobs: Sequence[Launched], folder: Path, *, parallelism: int, parameters: dict[str, Any]
           ) -> None:
    """Submit runs as one array.

    What is about to be submitted is written down before, under a name that no other job has: should
    this process die before it writes down the job's id, `find` finds the job by that name.
    """
    name = f"hnerv-clip-{os.urandom(4).hex()}"
    executor = submitit.AutoExecutor(folder / "%j", cluster="slurm",
                                     slurm_max_num_timeout=sys.maxsize)
    executor.update_parameters(slurm_array_parallelism=parallelism, name=name, **parameters)
    facts = {"folder": str(folder / "%j"), "slurm_cluster": _cluster(), "job_name": name}
    for index, job in enumerate(jobs):
        (job.run_dir / "outcome.json").unlink(missing_ok=True)
        job.write_record("slurm", token=job.task.token, job_id="", **facts,
                         array_index=index if len(jobs) > 1 else None)
    try:
        # From within a job, sbatch would inherit that job's settings
        where = {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS")}
        with submitit.helpers.clean_env(), submitit.helpers.environment_variables(**where):
            submitted = executor.submit_array([job.task for job in jobs])
    except Exception as error:
        for job in jobs:
            (job.run_dir / "job.json").unlink()
        raise LaunchError(f"Slurm refused the job: {error}") from error
    for job, started in zip(jobs, submitted):
        job.write_record("slurm", token=job.task.token, job_id=started.job_id, **facts)
    _query.cache_clear()


def find(record: dict[str, Any]) -> str:
    """The id of a job whose launcher died before it wrote it down; empty if Slurm has none."""
    rows = _query(record["slurm_cluster"], int(time.monotonic() / 2)) or {}
    ids = [job_id for job_id, (_, _, name) in rows.items() if name == record["job_name"]]
    if not ids:
        return ""
    index = record["array_index"]
    return ids[0] if index is None else f"{ids[0].partition('_')[0]}_{index}"


def state(record: dict[str, Any]) -> tuple[str, str]:
    """(waiting, running or gone, why)."""
    rows = _query(record["slurm_cluster"], int(time.monotonic() / 2))
    if rows is None:
        return "running", "Slurm does not answer"
    if not record["job_id"]:
        return "gone", "its launcher died before Slurm had it"
    state, reason, _ = rows.get(record["job_id"], ("", "", ""))
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"):
        return "waiting", reason
    if state in ("RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "PREEMPTED",
                 "RESIZING", "STOPPED"):
        return "running", ""
    return "gone", _end(record["job_id"], state)


@functools.lru_cache(maxsize=1)
def _query(cluster: str, tick: int) -> dict[str, tuple[str, str, str]] | None:
    """{job id: (state, reason, name)} of this user's jobs; None if Slurm does not answer.

    `tick` makes the cache forget: Slurm is asked once in a while for all jobs together.
    """
    try:
        squeue = subprocess.run(
            ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%r|%j"],
            capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if squeue.returncode or cluster != _cluster():
        return None
    rows = (line.split("|", 3) for line in squeue.stdout.splitlines())
    return {job_id: tuple(facts) for job_id, *facts in rows}


@functools.lru_cache(maxsize=1)
def _cluster() -> str:
    config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    for line in config.stdout.splitlines():
        if line.startswith("ClusterName"):
            return line.split("=")[1].strip()
    raise LaunchError(f"scontrol show config does not answer: {config.stderr.strip()}")


def _end(job_id: str, state: str) -> str:
    """How Slurm says that a job ended; accounting may be switched off."""
    sacct = subprocess.run(["sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,ExitCode"],
                           capture_output=True, text=True)
    state, _, code = (sacct.stdout.strip() or f"{state or 'UNKNOWN'}|").partition("|")
    return f"Slurm job {job_id} ended as {state}" + (f", exit code {code}" if code else "")
