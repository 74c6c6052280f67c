"""Jobs as processes of this machine, which outlive the one that starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
import submitit.helpers

from hnerv_clip.devices import usable_cores, visible_gpus
from hnerv_clip.launch.errors import Launched, LaunchError
from hnerv_clip.runs.locks import SILENT_S, is_alive, silent_s

NO_LIMIT_MIN = 10 * 365 * 24 * 60  # submitit's local executor wants a limit; there is none


class _DetachedExecutor(submitit.LocalExecutor):
    """Jobs in a session of their own: Jupyter's interrupt and shutdown signal the kernel's group.

    submitit has no setting for that, so its controller is started here, as its `start_controller`
    (1.5) does for jobs without a `setup`.
    """

    def _submit_command(self, command: str) -> submitit.LocalJob[Any]:
        tasks, gpus = self.parameters["tasks_per_node"], self.parameters["visible_gpus"]
        env = os.environ | {
            "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_NTASKS": str(tasks), "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1", "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * self.parameters["timeout_min"]),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30", "SUBMITIT_STDERR_TO_STDOUT": "",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        process = subprocess.Popen([sys.executable, "-m", "submitit.local._local",
                                    str(self.folder)], env=env, start_new_session=True)
        return submitit.LocalJob(folder=self.folder, job_id=str(process.pid), process=process,
                                 tasks=list(range(tasks)))


class LocalQueue:
    """Starts waiting jobs when others end."""

    def __init__(self, jobs: Sequence[Launched], folder: Path, gpus_per_job: int, parallelism: int):
        on_cpu = all(job.config.train.device == "cpu" for job in jobs)
        gpus = [] if on_cpu else visible_gpus()
        if 0 < len(gpus) < gpus_per_job:
            raise LaunchError(f"gpus_per_node={gpus_per_job}, but this machine shows {len(gpus)}; "
                              f"use gpus_per_node={len(gpus)}")
        self.folder, self.tasks = folder, max(1, gpus_per_job)
        if gpus and gpus_per_job:
            starts = range(0, len(gpus) - gpus_per_job + 1, gpus_per_job)
            slots = [gpus[start:start + gpus_per_job] for start in starts]
        else:
            slots = [[]] * max(1, usable_cores() // self.tasks)
        self.slots = dict(enumerate(slots[:min(parallelism, len(jobs))]))
        self.waiting, self.running = list(jobs), {}
        for job in jobs:
            job._queue = self
        self.pump()

    def pump(self) -> None:
        """Start as many as there are free slots for."""
        self.running = {slot: job for slot, job in self.running.items()
                        if alive(job.record)}
        for slot in self.slots.keys() - self.running.keys():
            if self.waiting:
                job = self.waiting.pop(0)
                self._start(job, self.slots[slot])
                self.running[slot] = job

    def _start(self, job: Launched, gpus: list[str]) -> None:
        executor = _DetachedExecutor(self.folder / "%j", max_num_timeout=sys.maxsize)
        executor.update_parameters(timeout_min=NO_LIMIT_MIN, tasks_per_node=self.tasks,
                                   gpus_per_node=len(gpus))
        executor.parameters["visible_gpus"] = gpus  # the checked way refuses identifiers
        (job.run_dir / "outcome.json").unlink(missing_ok=True)
        threads = max(1, usable_cores() // (len(self.slots) * self.tasks))
        with (submitit.helpers.clean_env(),
              submitit.helpers.environment_variables(OMP_NUM_THREADS=threads)):
            started = executor.submit(job.task)
        job.write_record("local", token=job.task.token, job_id=started.job_id,
                         pid=int(started.job_id), folder=str(executor.folder))
        threading.Thread(target=started._process.wait, daemon=True).start()  # leave no zombie


def state(run_dir: Path, record: dict[str, Any]) -> tuple[str, str]:
    """(running or gone, why)."""
    if record["host"] == socket.gethostname():
        if alive(record):
            return "running", ""
        return "gone", f"process {record['pid']} ended without a word (killed?)"
    silence = silent_s(run_dir)
    if silence < SILENT_S:
        return "running", f"on {record['host']}"
    return "gone", f"process {record['pid']} on {record['host']} is silent for {silence:.0f} s"


def alive(record: dict[str, Any]) -> bool:
    """Whether the process of a job runs, here."""
    return bool(record) and is_alive({"pid": record["pid"], "start": record["pid_start"]})
