"""Where a relative path starts: one rule for notebooks, command line and batch jobs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path


def resolve_path(path: str | Path) -> Path:
    """An absolute path.

    A relative path starts at the repository root, the nearest folder at or above the current one
    that holds both `pyproject.toml` and `_toc.yml`, so that a notebook in `notebooks/` and its
    executed copy in `book/` mean the same file. Outside a repository it starts at the current
    folder.

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
    roots = [folder for folder in (here, *here.parents)
             if (folder / "pyproject.toml").is_file() and (folder / "_toc.yml").is_file()]
    return (roots[0] if roots else here) / path


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
