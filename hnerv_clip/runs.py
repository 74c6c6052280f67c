"""The run directory: what was run, its checkpoints, its log and its metrics.

Checkpoints hold tensors and plain values only, are written atomically and are checked when read.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pandas as pd
import psutil
import torch

from hnerv_clip.config import Config
from hnerv_clip.paths import resolve_path, tell_apart

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

PACKAGES = ("hnerv-clip", "torch", "torchvision", "numpy", "open_clip_torch", "timm", "av",
            "pytorch-msssim")


# Files of which a run that has begun has at least one
STARTED = ("model_latest.pth", "model_best.pth", "metrics.csv", "summary.json", "job.json")


NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # some cluster disks
SILENT_S = 900  # a process of another machine that wrote nothing for so long is taken for dead


class RunError(RuntimeError):
    """A run directory or checkpoint can't be used as asked; the message says the fix."""


class Held(RuntimeError):
    """Another process holds a lock; the message names it."""


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that at any moment either the old or the new content is there, whole.

    Raises:
        RunError: the disk is full or read-only; what stood there before is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error}. What stood there before is intact; free "
                       "space or make the folder writable, then run again to resume") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


@contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file for this process.

    By flock, which the system releases when the process dies. Where the disk has none, by a file
    beside it that only one process can make; what a dead process left is taken over.

    Args:
        wait: for the process that holds it, instead of raising.
    Raises:
        Held: another process holds it.
    """
    with open(path, "a+") as file:
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
        with open(path, "x") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _read_holder(path: Path) -> dict[str, Any] | None:
    """Who made an exclusive file: pid, start, host; empty where it does not say, None without."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
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
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def is_alive(process: dict[str, Any]) -> bool:
    """Whether the process with this pid and start runs on this machine."""
    start = process_start(process["pid"])
    return start is not None and abs(start - process["start"]) < 2  # the clock may be adjusted


class RunDir:
    """The folder of one run. `RunDir.create` for a run to make, `RunDir(path)` for one to read."""

    def __init__(self, path: str | Path):
        self.path = resolve_path(path)

    @classmethod
    def create(cls, path: str | Path, config: Config) -> RunDir:
        """Open a run's folder, new or the same run's; another configuration's is never touched.

        A folder whose run never finished a step, as after a wrong setting, is taken over.

        Raises:
            RunError: the folder holds another configuration, or other files.
        """
        run = cls(path)
        if (run.path / "config.json").exists():
            differences = config.diff(run.config())
            begun = any((run.path / name).exists() for name in STARTED)
            if differences and not begun:
                write_json(run.path / "config.json", config.params())
            elif differences:
                listed = "; ".join(f"{name}: {old!r} there, {new!r} asked"
                                   for name, (new, old) in differences.items())
                raise RunError(f"{run.path} holds a run of another configuration ({listed}). "
                               "Choose another outf, or remove that folder")
            return run
        if run.path.exists() and any(p for p in run.path.iterdir() if not p.name.startswith(".")):
            raise RunError(f"{run.path} is not empty and holds no config.json, so it is no run of "
                           "this project. Choose another outf")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run folder {run.path}: {error}. "
                           "Choose a writable outf") from error
        write_json(run.path / "config.json", config.params())
        return run

    def config(self) -> Config:
        """The configuration that the run was made with.

        Raises:
            RunError: there is no run here, or its config.json is damaged.
        """
        file = self.path / "config.json"
        try:
            return Config.from_params(**json.loads(file.read_text()))
        except FileNotFoundError:
            raise RunError(f"{self.path} holds no run (no config.json); train one first with "
                           "02_train or `hnerv-clip train`, or correct outf") from None
        except ValueError as error:
            raise RunError(f"{file} is damaged: {error}") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's folder for one process; released by the system when the process dies.

        Raises:
            RunError: another process trains this run.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(self.path / ".lock"))
            except Held as held:
                raise RunError(f"{self.path} is being trained by another process ({held}); wait "
                               "for it, or stop it first") from None
            for half_written in self.path.glob(".model_*.tmp"):  # by a process that was killed
                half_written.unlink(missing_ok=True)
            yield

    @property
    def finished(self) -> bool:
        """Whether the run was trained and evaluated to its end."""
        return (self.path / "summary.json").exists()

    def summary(self) -> dict[str, Any]:
        """The final figures of a finished run."""
        return self._read_json("summary.json")

    def provenance(self) -> dict[str, Any]:
        """What was run, on what; see `make_provenance`."""
        return self._read_json("provenance.json")

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path} has no {name}: the run is not finished; train it to its "
                           "end with the same parameters and outf") from None

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Write tensors and plain values to `name`, atomically."""
        write_atomic(self.path / name, lambda file: torch.save(state, file))

    def load_checkpoint(self, name: str = "model_best.pth") -> dict[str, Any]:
        """Read and check a checkpoint of this run, onto the CPU.

        Raises:
            RunError: missing, truncated, altered, or of another configuration.
        """
        state = load_checkpoint(self.path / name)
        differences = self.config().diff(Config.from_params(**state["config"]))
        if differences:
            raise RunError(f"{self.path / name} belongs to another configuration (differs in "
                           f"{', '.join(differences)}); put the run's own file back, or remove it")
        return state

    def metrics(self) -> pd.DataFrame:
        """A row per epoch; evaluation columns are empty between evaluations."""
        try:
            return pd.read_csv(self.path / "metrics.csv")
        except FileNotFoundError:
            raise RunError(f"{self.path} has no metrics.csv yet: no epoch is complete") from None

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV, atomically."""
        write_atomic(self.path / name, lambda file: file.write(table.to_csv(index=False).encode()))

    def log(self, message: str) -> None:
        """Append a line with the time to rank0.txt."""
        with open(self.path / "rank0.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file; nothing in it is executed.

    Raises:
        RunError: missing, truncated, altered, or not a checkpoint of this project.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums
            damaged = archive.testzip()
        if damaged:
            raise RunError(f"{path} is damaged at {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; train the run first, or correct the path") from None
    except Exception as error:  # a damaged zip or pickle raises nearly anything
        raise RunError(f"{path} is not a readable checkpoint ({error}). It is truncated, altered "
                       "or foreign; remove it, and training starts at its first epoch"
                       ) from error
    if not isinstance(state, dict) or not {"config", "model", "epoch"} <= state.keys():
        raise RunError(f"{path} is no checkpoint of HNeRV-CLIP: it lacks config, model or epoch")
    return state


def make_provenance(config: Config, *, device: torch.device, data_digest: str, teacher: str | None,
                    world_size: int = 1) -> dict[str, Any]:
    """What is about to run, on what: known before the first step.

    Args:
        data_digest: hash of the frames.
        teacher: name of the teacher whose embeddings are learnt; None without the CLIP head.
    """
    commit, dirty = code_version()
    return {
        "commit": commit, "dirty": dirty, "device": device_name(device), "world_size": world_size,
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "versions": package_versions(), "cuda": torch.version.cuda,
        "seed": config.train.seed, "data": config.video.data_path, "data_digest": data_digest,
        "teacher": teacher, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def code_version() -> tuple[str, bool | None]:
    """(commit, whether tracked files differ from it).

    Outside a checkout: what HNERV_CLIP_COMMIT says, for copies without their .git, or the package's
    version; and None, as nobody can tell whether it was changed.
    """
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the checkout is another's
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain",
                                                  "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        recorded = os.environ.get("HNERV_CLIP_COMMIT")
        return recorded or f"package {package_versions().get('hnerv-clip', 'unknown')}", None


def commit_words(facts: dict[str, Any]) -> str:
    """The commit and dirty of `code_version`, as a reader needs them."""
    changes = {True: " with uncommitted changes", False: "", None: " (changes unknown)"}
    return facts["commit"][:12] + changes[facts["dirty"]]


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def device_name(device: torch.device) -> str:
    """The device in words: its product name on a GPU, model name and cores on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def provenance_table(*run_dirs: str | Path) -> pd.DataFrame:
    """What each run was made with, a column per run, for the end of a page."""
    columns = {}
    for path, name in zip(run_dirs, tell_apart(run_dirs)):
        run = RunDir(path)
        facts = run.provenance()
        summary = run.summary() if run.finished else {}
        columns[name] = {
            "commit": commit_words(facts),
            "device": facts["device"] + (f" × {facts['world_size']}" if facts["world_size"] > 1
                                         else ""),
            "versions": ", ".join(f"{n} {v}" for n, v in facts["versions"].items()),
            "python": facts["python"], "seed": facts["seed"],
            "data": f"{facts['data']} (sha256 {facts['data_digest'][:12]})",
            "teacher": facts["teacher"] or "none", "started": facts["started"],
            "training time (s)": round(summary.get("train_time_s", float("nan")), 1),
        }
    return pd.DataFrame(columns)
