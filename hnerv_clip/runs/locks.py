"""One process at a time: locks of folders that end with their holder, also on cluster disks."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from hnerv_clip.files import RunError, open_own, read_json

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # some cluster disks
SILENT_S = 900  # a process of another machine that wrote nothing for so long is taken for dead


class Held(RuntimeError):
    """Another process holds a lock; the message names it."""


@contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file for this process.

    By flock, which the system releases when the process dies. Where the disk has none, by a file
    beside it that only one process can make; what a dead process left is taken over. (The package
    filelock does the second for ENOSYS alone, which NFS and Lustre do not answer with, and neither
    names the holder nor takes over what a dead machine left.)

    Args:
        wait: for the process that holds it, instead of raising.
    Raises:
        Held: another process holds it.
    """
    with open_own(path, "a+") as file:
        if _flock(file, wait=wait):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield
            return
    own = {"pid": os.getpid(), "start": process_start(os.getpid()), "host": platform.node()}
    exclusive = path.with_name(f"{path.name}.held")
    while not _make_exclusive(exclusive, json.dumps(own)):
        if not wait:
            holder = _read_holder(exclusive)
            raise Held("process {pid} on {host}".format(**holder) if holder else "unknown")
        time.sleep(0.2)
    try:
        yield
    finally:
        if _read_holder(exclusive) == own:
            exclusive.unlink()


def _flock(file: IO[str], *, wait: bool) -> bool:
    """Take the lock of an open file; False where the disk has no locks."""
    try:
        if fcntl is None:
            return False
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        file.seek(0)
        raise Held(file.read().strip() or "unknown") from None
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False


def _make_exclusive(path: Path, content: str) -> bool:
    """Make a file that must not exist yet; what a dead process left is removed first."""
    holder = _read_holder(path)
    if holder is not None and _is_dead(holder, path):
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            os.rename(path, aside)
        except FileNotFoundError:  # another process was as quick
            return False
        taken = _read_holder(aside)
        if taken != holder:  # another process was quicker, and this is its own
            os.rename(aside, path)
            return False
        aside.unlink()
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _read_holder(path: Path) -> dict[str, Any] | None:
    """Who made an exclusive file: pid, start, host; empty where it does not say, None without."""
    try:
        return read_json(path, keys={"pid": int, "host": str, "start": (int, float)}, fix="")
    except FileNotFoundError:
        return None
    except RunError:
        return {}


def _is_dead(holder: dict[str, Any], path: Path) -> bool:
    if holder.get("host") == platform.node():
        return not is_alive(holder)
    return silent_s(path.parent) > SILENT_S


def silent_s(folder: Path) -> float:
    """Seconds since a file of the folder was last written."""
    times = []
    for file in folder.iterdir():
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:  # a temporary one, gone since
            continue
    return time.time() - max(times, default=0.0)


def process_start(pid: int) -> float | None:
    """When a process began, which tells it from a later one of the same id; None if it ended."""
    if not 0 < pid < 2**31:
        return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def is_alive(process: dict[str, Any]) -> bool:
    """Whether the process with this pid and start runs on this machine."""
    start, then = process_start(process["pid"]), process["start"]
    return None not in (start, then) and abs(start - then) < 2  # the clock may be adjusted
