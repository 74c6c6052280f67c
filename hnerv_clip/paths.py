"""Where a relative path starts: one rule for notebooks, command line and batch jobs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path


def resolve_path(path: str | Path) -> Path:
    """An absolute path.

    A relative path starts at the current folder. In `notebooks/` and `book/` of a checkout, which
    hold a notebook and its executed copy, it starts at the folder above, so that both mean the same
    file as the command line there.

    Raises:
        ValueError: a null character, or the home of a user that there is not.
    """
    if "\0" in str(path):
        raise ValueError(f"path {str(path)!r} holds a null character; write it without")
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise ValueError(f"path {str(path)!r}: {error}; write the path without ~") from None
    if path.is_absolute():
        return path
    here = Path.cwd()
    inside = here.name in ("notebooks", "book") and _is_checkout(here.parent)
    return (here.parent if inside else here) / path


def find_checkout() -> Path:
    """The nearest folder at or above the current one that is a checkout; else the current one."""
    here = Path.cwd()
    return next(filter(_is_checkout, (here, *here.parents)), here)


def _is_checkout(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and (folder / "_toc.yml").is_file()


def tell_apart(paths: Iterable[str | Path]) -> list[str]:
    """Short names of folders: the last part, with as many before it as make all different.

    Raises:
        ValueError: the same folder twice.
    """
    folders = [resolve_path(path).resolve() for path in paths]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; give each folder once")
    for parts in itertools.count(1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names


def match_paths(data_paths: Iterable[str], count: int) -> list[str]:
    """A path for each of so many runs: one for all, one for each, or none ("").

    Raises:
        ValueError: another number of paths.
    """
    paths = list(data_paths)
    if len(paths) not in (0, 1, count):
        raise ValueError(f"--data_path names {len(paths)} videos for {count} runs: give one for "
                          "all of them, or one for each")
    return paths if len(paths) == count else (paths or [""]) * count
