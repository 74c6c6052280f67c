"""Provenance of a run: commit, device, versions, data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hnerv_clip.config import Config
from hnerv_clip.paths import tell_apart
from hnerv_clip.runs.run_dir import RunDir

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second: imported where a table is made
    import torch  # seconds, which what only reads a run's tables need not wait for

PACKAGES = ("hnerv-clip", "torch", "torchvision", "numpy", "open_clip_torch", "timm", "av",
            "pytorch-msssim")


def make_provenance(config: Config, *, device: torch.device, data_digest: str, teacher: str | None,
                    world_size: int = 1) -> dict[str, Any]:
    """The provenance of a run, known before its first step.

    Args:
        data_digest: hash of the frames.
        teacher: name of the teacher whose embeddings are learned; None without the CLIP head.
    """
    import torch

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

    HNERV_CLIP_COMMIT names the commit of a copy whose .git is absent or another commit's. Without
    both, the package's version. Where git doesn't tell, the second is None: nobody knows whether
    the code was changed.
    """
    if recorded := os.environ.get("HNERV_CLIP_COMMIT"):
        return recorded, None
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the checkout is another's
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain",
                                                  "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return f"package {package_versions().get('hnerv-clip', 'unknown')}", None


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
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def provenance_table(*run_dirs: str | Path) -> pd.DataFrame:
    """Provenance of runs, a column per run, for the end of a page."""
    import pandas as pd

    columns = {}
    for path, name in zip(run_dirs, tell_apart(run_dirs)):
        run = RunDir(path)
        facts = run.provenance()
        summary = run.summary() if run.finished else {}
        columns[name] = {
            "commit": commit_words(facts),
            "device": facts["device"] + (f" × {facts['world_size']}" if facts["world_size"] > 1
                                         else ""),
            "computed": f"{facts['precision']} by the {facts['engine']} engine"
            if {"precision", "engine"} <= facts.keys() else "not noted",
            "versions": ", ".join(f"{n} {v}" for n, v in facts["versions"].items()),
            "python": facts["python"], "seed": facts["seed"],
            "data": f"{facts['data']} (sha256 {facts['data_digest'][:12]})",
            "teacher": facts["teacher"] or "none", "started": facts["started"],
            "training time (s)": round(summary.get("train_time_s", float("nan")), 1),
        }
    return pd.DataFrame(columns)
