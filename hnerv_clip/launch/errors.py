"""What goes wrong with launching, and what a queue needs to know of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from hnerv_clip.config import Config
from hnerv_clip.launch.ranks import Task


class Launched(Protocol):
    """A job as the queues see it; `jobs.Job` is one."""

    name: str
    run_dir: Path
    config: Config
    task: Task
    _queue: Any

    @property
    def record(self) -> dict[str, Any]:
        """What job.json says."""

    def write_record(self, cluster: str, **facts: Any) -> None:
        """Write job.json."""


class LaunchError(RuntimeError):
    """Runs can't be started as asked; the message says the fix."""


class JobFailed(RuntimeError):
    """A run did not reach its end; the message says why and shows the end of its log."""
