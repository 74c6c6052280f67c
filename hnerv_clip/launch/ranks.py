"""What runs in each process of a job: the training, joined with the job's other tasks."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import submitit
import submitit.helpers

from hnerv_clip.config import Config
from hnerv_clip.files import write_json

if TYPE_CHECKING:  # submitting loads no torch
    from hnerv_clip.dataset import Dataset

START_TIMEOUT = timedelta(minutes=5)  # between the first and the last rank to start
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # dead ranks are seen by `Peers` long before
STOPPED = "stopped by a signal"  # said by a rank that is requeued or interrupted


class Task(submitit.helpers.Checkpointable):
    """What a process of a job runs. It has no state: a requeued job resumes from the run folder."""

    def __init__(self, params: dict[str, Any], run_dir: str, cache_dir: str,
                 run: Callable[..., Any] | None):
        self.params, self.run_dir, self.cache_dir, self.run = params, run_dir, cache_dir, run
        self.token = os.urandom(8).hex()

    def train(self, *, progress: bool = False, dataset: Dataset | None = None) -> Any:
        if self.run is None:
            from hnerv_clip.train import train  # only here: submitting needs no training code
            run = train
        else:
            run = self.run
        loaded = {"dataset": dataset} if dataset else {}
        return run(Config.from_params(**self.params), self.run_dir, cache_dir=self.cache_dir,
                   progress=progress, **loaded)

    def __call__(self) -> None:
        report = functools.partial(write_outcome, Path(self.run_dir), self.token)
        with distributed(report, on_cpu=self.params["device"] == "cpu"):
            self.train()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues again on Slurm's signal."""
        signal.signal(submitit.JobEnvironment._usr_sig(), signal.SIG_IGN)  # once is enough
        return submitit.helpers.DelayedSubmission(self)


@contextmanager
def distributed(report: Callable[[Any], None], *, on_cpu: bool = False) -> Iterator[None]:
    """Join the job's other tasks in torch.distributed, and end all of them when one dies.

    Args:
        report: writes down why the job failed.
        on_cpu: use gloo and the CPU even where there are GPUs.
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

    if env.local_world_size == env.world_size:  # one node, whose name may not resolve
        env.master_addr = "127.0.0.1"
    on_gpu, device = torch.cuda.is_available() and not on_cpu, None
    if on_gpu:
        device = torch.device("cuda", env.local_rank % torch.cuda.device_count())  # or its own only
        torch.cuda.set_device(device)
    store = dist.TCPStore(env.master_addr, env.master_port, env.world_size,
                          is_master=env.rank == 0, timeout=START_TIMEOUT)
    peers = Peers(store, env, report)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=env.rank,
                            world_size=env.world_size, timeout=COLLECTIVE_TIMEOUT,
                            device_id=device)
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        time.sleep(2)  # if another rank's death is the cause, its own message comes first
        peers.end(f"rank {env.rank} of {env.world_size}: {describe(error)}")
    except BaseException as error:  # submitit leaves by SystemExit once it has requeued the job
        peers.end(STOPPED, code=error.code if isinstance(error, SystemExit) else 1)
    peers.finish()
    dist.destroy_process_group()


class Peers:
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


def write_outcome(run_dir: Path, token: str, error: Any) -> None:
    """Leave what became of a job in its run folder; `error` is empty where it ended well."""
    text = error if isinstance(error, str) else describe(error)
    try:
        write_json(run_dir / "outcome.json", {"token": token, "error": text})
    except Exception as failure:  # a full disk must not hide the error itself
        print(failure, file=sys.stderr)


def describe(error: BaseException) -> str:
    """An error in one line, its type first."""
    return f"{type(error).__name__}: {error}"
