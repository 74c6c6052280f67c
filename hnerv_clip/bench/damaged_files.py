"""Counts of damaged stored files: how `tests/fuzz_file.py` saw each of them end."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

COUNTS = ("files", "refused", "read", "failed")  # of damaged files, and of processes the last


def count_damaged(log: str) -> dict[str, Any]:
    """How damaged files ended, from what `tests/fuzz_file.py` printed in several processes.

    Returns:
        files, refused (with the documented error), read (nothing was wrong with them), seeds of
        the processes that came to their end, and failed, the number of those that did not.
    """
    found = {int(seed): (int(files), ast.literal_eval(counts)) for files, seed, counts in
             re.findall(r"^(\d+) files of seed (\d+): (\{.*\})$", log, re.M)}
    ends = re.search(r"(?:(?:^.*\n)?^rc \d+\n)+", log, re.M)  # each process once, one by one
    return {"files": sum(files for files, _ in found.values()),
            **{name: sum(counts.get(name, 0) for _, counts in found.values())
               for name in ("refused", "read")}, "seeds": sorted(found),
            "failed": len(re.findall(r"^rc [1-9]", ends[0], re.M)) if ends else 0}


def add_damaged(kept: Sequence[dict[str, Any]], counted: dict[str, Any], *, commit: str
                ) -> list[dict[str, Any]]:
    """Counts as of `count_damaged`, a row for each commit, with one more.

    Raises:
        ValueError: seeds of this commit that are counted already.
    """
    rows = {row["commit"]: row for row in kept}
    old = rows.get(commit, dict.fromkeys(COUNTS, 0) | {"seeds": []})
    if twice := set(old["seeds"]) & set(counted["seeds"]):
        raise ValueError(f"seeds {sorted(twice)} of {commit} are counted already: give a log of "
                         "others")
    rows[commit] = {"commit": commit, **{name: old[name] + counted[name] for name in COUNTS},
                    "seeds": [*old["seeds"], *counted["seeds"]]}
    return list(rows.values())


def all_damaged(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The sums over all commits: files, refused, read, failed, and processes."""
    return {name: sum(row[name] for row in rows) for name in COUNTS} | {
        "processes": sum(len(row["seeds"]) for row in rows)}
