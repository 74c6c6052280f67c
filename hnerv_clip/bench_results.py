"""What `hnerv-clip bench` measured, read from its files: `bench_*.json`, one for each device."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.config import Config
from hnerv_clip.files import read_json
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs import commit_words

Bench = dict[str, Any]  # a file of `hnerv-clip bench`
Row = dict[str, Any]


def load_benches(results: Path) -> list[Bench]:
    """Every device's measurements, GPUs before CPUs."""
    benches = [_read(path, {"device": str}) for path in sorted(results.glob("bench_*.json"))]
    return sorted(benches, key=lambda bench: "cores" in bench["device"])


def read_decoding(path: str | Path, config: Config, *, batch_size: int) -> tuple[pd.DataFrame, str]:
    """What `evaluate.measure_decoding` gave on another machine, from a bench file.

    For pages that are executed where other work would spoil a measurement.

    Args:
        path: a file of `hnerv-clip bench`.
        config: the run's settings; its network must be the one that was measured.
        batch_size: frames decoded at once.
    Returns:
        The rows of that batch size, by the fastest decoder there, and in words where and when.
    Raises:
        ValueError: no such file or measurement, or of another network.
    """
    bench = _read_bench(path, "decode")
    measured, own = bench["made"]["decode"]["settings"], config.params()
    network = [field.name for field in fields(config.model)] + [
        "data_path", "crop_list", "resize_list", "patch_grid", "patch_size", "patch_stride"]
    for name in network:
        if own[name] != measured.get(name):
            raise ValueError(f"{path} measured another network: {name}={measured.get(name)!r}, the "
                             f"run has {own[name]!r}; measure here, with an empty path")
    rows = pd.DataFrame(bench["parts"]["decode"])
    rows = rows[rows.batch_size == batch_size]
    if not len(rows):
        raise ValueError(f"{path} has no decoding of {batch_size} frames at once; use one of "
                         f"{sorted({row['batch_size'] for row in bench['parts']['decode']})}")
    rows = rows[rows.decoder == rows.decoder.iloc[-1]].reset_index(drop=True)
    commit = commit_words(bench["made"]["decode"])
    return rows, f"{bench['device']}, measured apart, commit {commit}"


def read_teacher_rates(path: str | Path, label: str) -> dict[str, float]:
    """Patches a second of a teacher, from a bench file: median, min and max over passes.

    Raises:
        ValueError: no such file, or that teacher was not measured.
    """
    rows = _read_bench(path, "teacher")["parts"]["teacher"]
    known = [row for row in rows if row["teacher"] == label and row["precision"] == "fp32"]
    if not known:
        raise ValueError(f"{path} has no speed of {label}; there are "
                         f"{', '.join(sorted({row['teacher'] for row in rows}))}")
    return {"median": known[0]["patches_per_s"], "min": known[0]["patches_per_s_min"],
            "max": known[0]["patches_per_s_max"]}


def _read_bench(path: str | Path, part: str) -> Bench:
    path = resolve_path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a file of hnerv-clip bench, such as "
                         "book/results/bench_h100.json")
    bench = _read(path, {"parts": dict})
    if part not in bench["parts"]:
        raise ValueError(f"{path} has no part {part}; run hnerv-clip bench --parts {part}")
    return bench


def load_optional(path: Path) -> dict[str, Any] | None:
    """A JSON file that may not be there yet."""
    return _read(path) if path.exists() else None


def _read(path: Path, keys: dict[str, Any] | None = None) -> dict[str, Any]:
    return read_json(path, keys=keys, fix="measure again, or put the file back")


def part_rows(benches: list[Bench], part: str) -> list[tuple[Bench, list[Row]]]:
    """The devices that have rows of a part, with those that did not fail."""
    found = [(bench, [row for row in bench["parts"].get(part, []) if "failed" not in row])
             for bench in benches]
    return [(bench, rows) for bench, rows in found if rows]
