"""Notebooks executed with papermill and rendered with Jupyter Book.

`build` makes the book, `pages` what README and pages take from `book/results`.
"""

from __future__ import annotations

from typing import Any

LAZY = ("BookError", "list_notebooks", "make_book", "repository_root")  # of `build`
__all__ = [*LAZY]


def __getattr__(name: str) -> Any:
    """The names of `build`, which is imported when one is asked for: papermill is heavy."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hnerv_clip.book import build

    return getattr(build, name)
