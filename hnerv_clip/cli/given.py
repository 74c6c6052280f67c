"""What a path on the command line is: a run's folder, a stored video or an index."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hnerv_clip.config import ConfigError
from hnerv_clip.files import RunError
from hnerv_clip.paths import match_paths, resolve_path

if TYPE_CHECKING:
    from hnerv_clip.inference import Run
    from hnerv_clip.runs.run_dir import RunDir


def check_run(outf: str | Path) -> Path:
    """The folder of a run; warns of one that is not finished.

    Raises:
        ConfigError: a stored video or an index.
    """
    from hnerv_clip.runs.run_dir import RunDir

    path = resolve_path(outf)
    if path.is_file():
        raise ConfigError(f"{path} is a file, not a run: give the folder that was trained in (of "
                          "encode: its --work, or output/encode/NAME)")
    if is_index(path):
        raise ConfigError(f"{path} is an index, not a run: give the folder of one of its runs")
    run = RunDir(path)
    if run.begun and not run.finished:
        warnings.warn(f"the training in {path} is not finished: {epochs_done(run)} of "
                      f"{run.config().train.epochs} epochs; this is of what it has learned so far",
                      stacklevel=2)
    return path


def epochs_done(run: RunDir) -> int:
    """How many epochs a run has behind it."""
    try:
        return len(run.metrics())
    except RunError:  # not one yet
        return 0


def check_stored(file: str | Path) -> Path:
    """The file of a stored video.

    Raises:
        ConfigError: a folder.
    """
    path = resolve_path(file)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a stored video: hnerv-clip store {file} "
                          "NAME.hnerv makes one of a run")
    return path


def is_index(path: Path) -> bool:
    """Whether a folder holds an index over runs."""
    return (path / "videos.json").is_file() and not (path / "config.json").is_file()


def load_run(args: argparse.Namespace) -> Run:
    """The one run that a command names."""
    from hnerv_clip import inference

    check_run(args.outf)
    path, = match_paths(args.data_path, 1)
    return inference.load_run(args.outf, cache_dir=args.cache_dir, device=args.device,
                              data_path=path)
