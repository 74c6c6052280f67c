"""What `hnerv-clip bench` measured, read from its files: `bench_*.json`, one for each device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.config import Config
from hnerv_clip.files import read_json
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import commit_words

Bench = dict[str, Any]  # a file of `hnerv-clip bench`
Row = dict[str, Any]


def load_benches(results: str | Path) -> list[Bench]:
    """Every device's measurements, GPUs before CPUs.

    Raises:
        ValueError: there is none.
    """
    benches = [_read(path, {"device": str})
               for path in sorted(resolve_path(results).glob("bench_*.json"))]
    if not benches:
        raise ValueError(f"{results} has no bench_*.json; measure with hnerv-clip bench --out "
                         f"{results}/bench_mine.json")
    return sorted(benches, key=lambda bench: not is_gpu(bench))


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
    measured = Config().params() | measured  # a setting that is younger than the file
    network = ["data_path", "crop_list", "resize_list", "patch_grid", "patch_size", "patch_stride",
               *(field.name for field in fields(config.model))]
    for name in network:
        if own[name] != measured[name]:
            raise ValueError(f"{path} measured another network: {name}={measured[name]!r}, the "
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


def _read(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    return read_json(path, keys=keys, fix="measure again, or put the file back")


def part_rows(benches: list[Bench], part: str) -> list[tuple[Bench, list[Row]]]:
    """The devices that have rows of a part, with those that did not fail."""
    found = [(bench, [row for row in bench["parts"].get(part, []) if "failed" not in row])
             for bench in benches]
    return [(bench, rows) for bench, rows in found if rows]


def training_rates(benches: list[Bench], reference: dict[str, Any]) -> pd.DataFrame:
    """Training speed on a GPU beside other codes', the fastest first.

    Args:
        reference: what `reference_speed.json` holds.
    Returns:
        name, clip_head, frames_per_s, own (False for other codes), device.
    """
    own = [{"name": f"{row['engine']} engine, {row['precision']}", "clip_head": row["clip_head"],
            "frames_per_s": row["frames_per_s"], "own": True, "device": bench["device"]}
           for bench, rows in part_rows(benches, "train") if is_gpu(bench)
           for row in rows if not row["embed"]]
    others = [{"name": row["what"].split(",")[0], "clip_head": row["clip_head"],
               "frames_per_s": sum(row["frames_per_s"]) / len(row["frames_per_s"]), "own": False,
               "device": ""} for row in reference["rows"] if "first engine" not in row["what"]]
    return pd.DataFrame(own + others).sort_values("frames_per_s", ascending=False)


def head_costs(rows: list[Row]) -> pd.DataFrame:
    """What the CLIP head adds to a training step, where both were measured.

    Returns:
        given (frames or coordinates), engine, precision, share.
    """
    steps = {(r["embed"], r["engine"], r["precision"], r["clip_head"]): r["step_ms"] for r in rows}
    return pd.DataFrame([
        {"given": "coordinates" if embed else "frames", "engine": engine, "precision": precision,
         "share": step / steps[embed, engine, precision, False] - 1}
        for (embed, engine, precision, head), step in steps.items()
        if head and (embed, engine, precision, False) in steps])


def embedding_losses(rows: list[Row]) -> dict[tuple[str, int], float]:
    """The share of RGB's speed that embeddings take, by decoder and frames at once."""
    speeds = {(row["mode"], row["decoder"], row["batch_size"]): row["frames_per_s"]
              for row in rows}
    return {(decoder, size): 1 - speeds["RGB and embeddings", decoder, size] / alone
            for (mode, decoder, size), alone in speeds.items()
            if mode == "RGB" and ("RGB and embeddings", decoder, size) in speeds}


def step_profile(benches: list[Bench]) -> tuple[list[Row], str]:
    """The parts of a training step by the plain and the fused engine, where both were measured.

    Returns:
        rows: part, before_ms (plain), after_ms (fused); and where, in words. Nothing: [], "".
    """
    for bench, rows in part_rows(benches, "profile"):
        times = {(row["engine"], _part_words(row["part"])): row["ms"] for row in rows}
        if {"plain", "fused"} <= {engine for engine, _ in times}:
            parts = dict.fromkeys(part for _, part in times)
            commit = commit_words(bench["made"]["profile"])
            return [{"part": part, "before_ms": times.get(("plain", part), 0.0),
                     "after_ms": times.get(("fused", part), 0.0)} for part in parts], (
                f"{bench['device']}, before by the plain engine in bf16, now by the fused one, "
                f"commit {commit}")
    return [], ""


def _part_words(part: str) -> str:
    """A part of a step as pages name it."""
    return part.replace("both ways", "forward and backward").removesuffix(", back") + (
        ", backward" if part.endswith(", back") else "")


# What the part `scaling` varies: its name, the column on the axis, and the value in words
AXES: dict[str, tuple[str, str, Callable[[Row], str]]] = {
    "resolution": ("pixels of a frame", "pixels", lambda row: row["frame"]),
    "modelsize": ("stored values (millions)", "modelsize", lambda row: f"{row['modelsize']:g}"),
    "batch_size": ("frames of a step", "batch_size", lambda row: f"{row['batch_size']}"),
    "patches": ("patches of a frame", "patches", lambda row: f"{row['patches']}"),
    "frames": ("frames of the video", "frames", lambda row: f"{row['frames']}"),
}


def goals(benches: list[Bench]) -> pd.DataFrame:
    """What was aimed at on one GPU, and what was measured: what, goal, measured, met, device."""
    return pd.DataFrame([
        {"what": what, "goal": f"{sign}\u00a0{text.format(limit)}",
         "measured": text.format(value),
         "met": "yes" if (value >= limit if sign == "≥" else value <= limit) else "no",
         "device": bench["device"]}
        for bench in benches if is_gpu(bench)
        for what, sign, limit, find, text in GOALS if (value := find(bench)) is not None])


def is_gpu(bench: Bench) -> bool:
    """Whether a file's device is no CPU."""
    return "cores" not in bench["device"]


def made_words(bench: Bench, part: str) -> str:
    """Where a part's rows come from, in a sentence."""
    made, rows = bench["made"][part], bench["parts"][part]
    counts = sorted({row["n"] for row in rows if "n" in row})
    repeats = f"Medians of {' or '.join(map(str, counts))} repeats (lowest–highest); " \
        if counts else ""
    return (f"{repeats}{bench['device']}, PyTorch {made['versions']['torch']}, {made['threads']} "
            f"CPU threads, commit {commit_words(made)}.{_other_version(bench, part)}")


def _other_version(bench: Bench, part: str) -> str:
    """Said of a growth whose step, in the setting of `train`, took another time at its commit."""
    made = bench["made"]
    if part != "scaling" or made.get("train", made[part])["commit"] == made[part]["commit"]:
        return ""
    same = ("precision", "engine", "batch_size", "gflop_per_frame")
    for row in bench["parts"][part]:
        for other in bench["parts"]["train"]:
            if (other["clip_head"] and not other["embed"]
                    and all(row.get(key) == other.get(key) for key in same)
                    and abs(row["step_ms"] / other["step_ms"] - 1) > 0.1):
                digits = 2 if other["step_ms"] < 100 else 0
                return (" Measured at another commit than the table of training, where the step of "
                        f"{row['step_ms']:.{digits}f} ms takes {other['step_ms']:.{digits}f} ms.")
    return ""


def _pick(bench: Bench, part: str, measure: str, choose: Callable[[Iterable[float]], float] = max,
          **wanted: Any) -> float | None:
    """The best value of a measure among a part's rows with the wanted values."""
    found = [row[measure] for row in bench["parts"].get(part, [])
             if row.get(measure) is not None and all(row.get(k) == v for k, v in wanted.items())]
    return choose(found) if found else None


def _decode_loss(bench: Bench) -> float | None:
    """The share of speed that embeddings take where RGB is fastest."""
    rows = bench["parts"].get("decode", [])
    fastest = max((row for row in rows if row["mode"] == "RGB"),
                  key=lambda row: row["frames_per_s"], default=None)
    return fastest and embedding_losses(rows).get((fastest["decoder"], fastest["batch_size"]))


def _fastest_memory(bench: Bench) -> float | None:
    """GiB that the fastest training with the head takes."""
    rows = [row for row in bench["parts"].get("train", [])
            if row["clip_head"] and not row["embed"] and "failed" not in row]
    fastest = max(rows, key=lambda row: row["frames_per_s"], default={})
    size_bytes = fastest.get("peak_memory_bytes")
    return size_bytes and size_bytes / 2**30


# What is aimed at on an H100: words, sign and limit, how it is found in a file and shown
GOALS: tuple[tuple[str, str, float, Callable[[Bench], float | None], str], ...] = (
    ("training with the CLIP head, frames/s", "≥", 1000,
     lambda b: _pick(b, "train", "frames_per_s", clip_head=True, embed=""), "{:.0f}"),
    ("peak memory of its step, GiB", "≤", 1.5, _fastest_memory, "{:.2f}"),
    ("training without the head, frames/s", "≥", 1050,
     lambda b: _pick(b, "train", "frames_per_s", clip_head=False, embed=""), "{:.0f}"),
    ("300 epochs without the head and everything around them, s", "≤", 60,
     lambda b: _pick(b, "fit", "wall_s", statistics.median, epochs=300, clip_head=False), "{:.0f}"),
    ("decoding, RGB, frames/s", "≥", 4000,
     lambda b: _pick(b, "decode", "frames_per_s", mode="RGB"), "{:.0f}"),
    ("what 8 embeddings a frame cost when decoding", "≤", 0.03, _decode_loss, "{:.1%}"),
    ("ViT-B-32 in bf16, patches/s", "≥", 1000,
     lambda b: _pick(b, "teacher", "patches_per_s", precision="bf16"), "{:.0f}"),
)
