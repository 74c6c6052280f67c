"""Run the parts of a benchmark and keep their figures in one JSON file."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hnerv_clip.bench.context import Bench
from hnerv_clip.bench.measure import (
    fill_shares,
    measure_ceilings,
    measure_decode,
    measure_fit,
    measure_profile,
    measure_scaling,
    measure_teacher,
    measure_train,
)
from hnerv_clip.config import RUNTIME_PARAMS, Config, ConfigError
from hnerv_clip.devices import select_device
from hnerv_clip.files import read_json
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.locks import process_start
from hnerv_clip.runs.provenance import code_version, device_name, package_versions
from hnerv_clip.runs.run_dir import write_json

PARTS = ("ceilings", "train", "profile", "scaling", "decode", "teacher", "fit")
DEFAULT_PARTS = PARTS[:-1]  # `fit` takes a whole training


def bench(config: Config, *, parts: list[str] = DEFAULT_PARTS, out: str | Path,
          cache_dir: str | Path = "output/cache", outf: str | Path = "output/bench/fit",
          say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the parts and write one JSON file, after every row, so that nothing is lost.

    A part replaces its rows of an earlier call; `fit` adds a row for each run folder.

    Args:
        out: the JSON file; parts measured earlier on the same device stay in it.
        outf: run folder of `fit`, which must be new.
    Returns:
        device, `made` (for each part: commit, dirty, versions, settings, time) and `parts` (rows).
    Raises:
        ConfigError: the file holds another device's measurements, or a part (not `fit`) with other
            settings, or an unknown part.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"parts={unknown[0]!r} is unknown; use any of {', '.join(PARTS)}")
    import_s = time.time() - process_start(os.getpid())
    device, path = select_device(config.train.device), resolve_path(out)
    results = _open_results(path, device_name(device))
    for part in parts:
        if part != "fit" and part in results["made"]:
            _check_settings(path, part, results["made"][part]["settings"], config.params())
    gpu = device.type == "cuda"
    bench = Bench(config, device, repeats=7 if gpu else 2, repeat_s=0.3 if gpu else 0.0,
                  results=results, cache_dir=cache_dir, outf=outf, import_s=import_s)
    if "train" in parts and "ceilings" not in [*parts, *results["parts"]]:
        parts = ["ceilings", *parts]
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in sorted(parts, key=PARTS.index):
        started = time.perf_counter()
        kept = [row for row in results["parts"].get(part, [])
                if part == "fit" and row["run"] != Path(outf).name]
        say(f"\n{part} …")
        results["made"][part] = _provenance(config)
        results["parts"][part] = kept
        for row in MEASURES[part](bench):
            kept.append(row)
            results["made"][part]["seconds"] = round(time.perf_counter() - started, 1)
            fill_shares(results)
            write_json(path, results)
        say(f"{show_rows(kept)}\n{time.perf_counter() - started:.0f} s")
    say(f"\n{path}")
    return results


def show_rows(rows: list[dict[str, Any]]) -> str:
    """Rows as a table of text, empty columns left out."""
    table = pd.DataFrame(rows).dropna(axis=1, how="all")
    return table.to_string(index=False, na_rep="", float_format="{:.4g}".format)


def _open_results(path: Path, device: str) -> dict[str, Any]:
    if not path.exists():
        return {"device": device, "made": {}, "parts": {}}
    results = read_json(path, keys={"device": str, "made": dict, "parts": dict},
                        fix="give another --out, or remove it")
    if results["device"] != device:
        raise ConfigError(f"{path} holds measurements of {results['device']}, and this is {device}:"
                          " give another --out")
    return results


def _check_settings(path: Path, part: str, measured: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse to replace rows of other settings; a setting younger than the file has its default."""
    measured = Config().params() | measured
    differing = [name for name in own if name not in RUNTIME_PARAMS
                 and own[name] != measured[name]]
    if differing:
        raise ConfigError(f"{path} holds the part {part} with other {', '.join(differing)}, and "
                          "would lose it: give another --out")


def _provenance(config: Config) -> dict[str, Any]:
    commit, dirty = code_version()
    return {"commit": commit, "dirty": dirty, "python": platform.python_version(),
            "versions": package_versions(), "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": config.params()}


MEASURES: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "ceilings": measure_ceilings, "train": measure_train, "profile": measure_profile,
    "scaling": measure_scaling, "decode": measure_decode, "teacher": measure_teacher,
    "fit": measure_fit}
