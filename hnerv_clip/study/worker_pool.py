"""Processes that work side by side, each on one GPU and at one job at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

Work = Callable[[Any, dict[str, Any]], None]  # (job, options)


class Ended(NamedTuple):
    """A job that ended: its name, how long it took, and its error's text, or nothing."""

    name: str
    seconds: float
    error: str


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    name: str = ""
    started: float = 0.0


class WorkerPool:
    """Workers, started when they are first needed; a context that stops them at its end, and when
    the process is asked to end (SIGTERM).

    Args:
        work: called in a worker as work(job, options); a function of a module.
        options: likewise; `threads` of PyTorch among them.
        count: workers. gpus: identifiers over which they are spread; none on a CPU.
    """

    def __init__(self, work: Work, options: dict[str, Any], *, count: int, gpus: list[str]):
        self.work, self.options, self.gpus = work, options, gpus
        self.workers: list[_Worker | None] = [None] * count
        self.on_sigterm: Any = None  # what to restore

    def __enter__(self) -> WorkerPool:
        self.on_sigterm = end_on_sigterm()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop what runs; what is idle ends by itself."""
        try:
            self._stop()
        finally:
            signal.signal(signal.SIGTERM, self.on_sigterm)

    def _stop(self) -> None:
        for worker in filter(None, self.workers):
            worker.connection.close()
            if worker.name:
                worker.process.terminate()
        for worker in filter(None, self.workers):
            worker.process.join(timeout=30)
            worker.process.kill()

    def run(self, next_job: Callable[[], tuple[str, Any] | None], on_end: Callable[[Ended], None],
            *, deadline: float) -> bool:
        """Keep every worker at a job until there is none left, or the time is over.

        Args:
            next_job: asked for each free worker; (name, job), or None for nothing at present.
            on_end: called with each job that ended.
            deadline: of `time.monotonic`; jobs under way are then left to the context's end.
        Returns:
            Whether all jobs ended in time.
        """
        while True:
            for slot in self.free:
                if job := next_job():
                    self.begin(slot, *job)
            if not self.busy:
                return True
            left_s = deadline - time.monotonic()
            ended = self.wait(min(left_s, 3600))
            if not ended and left_s <= 0:
                return False
            for one in ended:
                on_end(one)

    @property
    def free(self) -> list[int]:
        """Slots without a job."""
        return [slot for slot, worker in enumerate(self.workers) if not worker or not worker.name]

    @property
    def busy(self) -> list[_Worker]:
        """Workers at a job."""
        return [worker for worker in self.workers if worker and worker.name]

    def begin(self, slot: int, name: str, job: Any) -> None:
        """Give a job to a free slot."""
        worker = self.workers[slot] = self.workers[slot] or self._start(slot)
        worker.connection.send(job)
        worker.name, worker.started = name, time.monotonic()

    def wait(self, timeout: float) -> list[Ended]:
        """The jobs that ended, of those under way; none where the time is over before.

        After an error a device may be in a bad state, so that slot continues with a new process.
        """
        ready = wait([worker.connection for worker in self.busy], timeout=max(0, timeout))
        ended = []
        for slot, worker in enumerate(self.workers):
            if worker and worker.connection in ready:
                error = _outcome(worker)
                ended.append(Ended(worker.name, time.monotonic() - worker.started, error))
                worker.name = ""
                if error:
                    worker.process.join()
                    self.workers[slot] = None
        return ended

    def _start(self, slot: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        own, other = context.Pipe()
        process = context.Process(target=_live, args=(other, self.work, self.options),
                                  name=f"study-{slot}")
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        try:
            if self.gpus:  # the worker sees its own alone
                os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
            process.start()
        finally:
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
            elif self.gpus:
                del os.environ["CUDA_VISIBLE_DEVICES"]
        other.close()
        return _Worker(process, own)


def end_on_sigterm() -> Any:
    """Let SIGTERM raise SystemExit, so that contexts are left; returns what it did before."""
    return signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _outcome(worker: _Worker) -> str:
    """What a worker reported of its job: an error's text, or nothing."""
    try:
        return worker.connection.recv()
    except EOFError:
        worker.process.join()
        return f"the process ended with exit code {worker.process.exitcode}"


def _live(connection: Connection, work: Work, options: dict[str, Any]) -> None:
    """A worker's life: jobs until the pipe closes, or one fails."""
    import torch

    torch.set_num_threads(options["threads"])
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            work(job, options)
        except Exception:
            connection.send(traceback.format_exc())
            return
        connection.send("")
