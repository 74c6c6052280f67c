"""The page «How fast» and the README's figures of speed, from the JSON files in `book/results`.

`bench_*.json` are files of `hnerv-clip bench`, one for each device. What no file holds, the text
says was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hnerv_clip.bench_results import Bench, Row, load_benches, load_optional, part_rows
from hnerv_clip.runs import commit_words


def speed_pages(results: Path) -> dict[str, str]:
    """The generated parts of `how_fast.md`, by name."""
    benches = load_benches(results)
    reference = json.loads((results / "reference_speed.json").read_text(encoding="utf-8"))
    return {
        "speed_goals": goals_markdown(benches),
        "speed_train": training_markdown(benches, reference),
        "speed_fit": fit_markdown(benches),
        "speed_decode": decoding_markdown(benches, reference),
        "speed_teacher": teacher_markdown(benches),
        "speed_ceilings": ceilings_markdown(benches),
        "speed_profile": profile_markdown(step_profile(results)),
        "speed_growth": growth_markdown(benches),
        "speed_tried": tried_markdown(load_optional(results / "tried.json")),
    }


def training_markdown(benches: list[Bench], reference: dict[str, Any]) -> str:
    """A training step on each device, by engine, precision and head, beside other codes."""
    measured = part_rows(benches, "train")
    blocks = []
    for bench, rows in measured:
        lines = [[f"{row['engine']} engine, {row['precision']}, from "
                  f"{'coordinates' if row['embed'] else 'frames'}", _on(row["clip_head"]),
                  _spread(row, "step_ms"), f"**{_number(row['frames_per_s'])}**",
                  _gib(row["peak_memory_bytes"]),
                  _number(row["compile_s"]) if row["compile_s"] else "",
                  _percent(row["compute_share"]), _percent(row["bandwidth_share"])]
                 for row in rows]
        table = _table(["here", "CLIP head", "step (ms)", "frames/s", "peak memory (GiB)",
                        "compilation (s)", "compute share", "bandwidth share"], lines)
        failed = [f"- {row['engine']}, {row.get('precision', '')}: failed, {row['failed']}"
                  for row in bench["parts"]["train"] if "failed" in row]
        blocks.append("\n\n".join([table, *failed, _head_cost(rows) + _made(bench, "train")]))
    if not any(_is_gpu(bench) for bench, _ in measured):
        blocks.append(_not_measured("training on a GPU", "train"))
    others = _table(["other codes on one H100", "CLIP head", "frames/s"], [
        [row["what"], _on(row["clip_head"]), _between(row["frames_per_s"])]
        for row in reference["rows"]])
    return "\n\n".join([*blocks, others, reference["source"] + "."]) + "\n"


def _head_cost(rows: list[Row]) -> str:
    """What the CLIP head adds to a step, where both were measured."""
    steps = {(r["embed"], r["engine"], r["precision"], r["clip_head"]): r["step_ms"] for r in rows}
    costs = [f"{with_head / steps[*which, False] - 1:+.1%} ({which[1]}, {which[2]}, from "
             f"{'coordinates' if which[0] else 'frames'})"
             for (*which, head), with_head in steps.items() if head and (*which, False) in steps]
    return f"The head changes a step by {_and(costs)}. " if costs else ""


def fit_markdown(benches: list[Bench]) -> str:
    """Whole trainings: where their wall clock goes, and what they reach."""
    measured = part_rows(benches, "fit")
    if not measured:
        return _not_measured("a whole training", "fit") + "\n"
    blocks = []
    for bench, rows in measured:
        clocks = [("data", "data_s"), ("setting up", "setup_time_s"), ("compilation", "compile_s"),
                  ("training", "train_time_s"), ("evaluation", "eval_time_s"),
                  ("stored file", "stored_time_s"), ("checkpoints", "checkpoint_time_s"),
                  ("the rest", "rest_s")]
        lines = [[f"`{row['run']}`", f"{row['epochs']}", f"{row['seed']}", _on(row["clip_head"]),
                  f"**{row['wall_s']:.0f}**", *(_seconds(row.get(name)) for _, name in clocks),
                  f"{row['psnr_db']:.2f}", _gib(row["peak_memory_bytes"]), commit_words(row)]
                 for row in rows]
        blocks += [_table(["run", "epochs", "seed", "CLIP head", "wall clock (s)",
                           *(f"{words} (s)" for words, _ in clocks), "PSNR (dB)",
                           "peak memory (GiB)", "commit"], lines),
                   f"{bench['device']}. {_clock_words(rows)}"]
    return "\n\n".join(blocks) + "\n"


def _clock_words(rows: list[Row]) -> str:
    """What the columns of `fit_markdown` hold."""
    if not all("setup_time_s" in row for row in rows):
        return ("The rest: setting up, loading the video again, and the stored file, written, "
                "decoded and measured.")
    before = _and([_seconds(row["import_s"]) for row in rows])
    return (f"Not in the wall clock: {before} s from the process's start until its packages are "
            "imported. Evaluations are by the engine that trains, but for the last one, of the "
            "best weights, which is by the plain model; what that needs from disk is loaded while "
            "kernels compile, and counts as setting up where it takes longer. The stored file is "
            "written, decoded and measured. The rest: logs and the best weights.")


def decoding_markdown(benches: list[Bench], reference: dict[str, Any]) -> str:
    """Decoded frames a second, by what is decoded and how many at once."""
    measured = part_rows(benches, "decode")
    if not measured:
        return _not_measured("decoding", "decode") + "\n"
    blocks = []
    for bench, rows in measured:
        lines = [[row["mode"], row["decoder"], f"{row['batch_size']}",
                  _spread(row, "frames_per_s")] for row in rows]
        losses = [f"{loss:.1%} ({decoder}, {size} at once)"
                  for (decoder, size), loss in embedding_losses(rows).items()]
        words = f"Embeddings take {_and(losses)} of the speed. " if losses else ""
        blocks += [_table(["decoded", "decoder", "at once", "frames/s"], lines),
                   words + _made(bench, "decode")]
    others = [f"{row['what']}: {_between(row['decode_frames_per_s'])}"
              + (f" ({row['note']})" if "decod" in row["note"] else "")
              for row in reference["rows"] if row["decode_frames_per_s"]]
    return "\n\n".join([*blocks, f"For comparison, RGB on an H100, frames/s: {'; '.join(others)}."]
                       ) + "\n"


def embedding_losses(rows: list[Row]) -> dict[tuple[str, int], float]:
    """The share of RGB's speed that embeddings take, by decoder and frames at once."""
    speeds = {(row["mode"], row["decoder"], row["batch_size"]): row["frames_per_s"]
              for row in rows}
    return {(decoder, size): 1 - speeds["RGB and embeddings", decoder, size] / alone
            for (mode, decoder, size), alone in speeds.items()
            if mode == "RGB" and ("RGB and embeddings", decoder, size) in speeds}


def teacher_markdown(benches: list[Bench]) -> str:
    """Patches a second of the teachers."""
    measured = part_rows(benches, "teacher")
    if not measured:
        return _not_measured("the teacher's pass", "teacher") + "\n"
    blocks = []
    for bench, rows in measured:
        lines = [[row["teacher"], row["precision"], _spread(row, "patches_per_s"),
                  f"{row['patches']}", f"{row['cosine_to_fp32_min']:.5f}"] for row in rows]
        blocks += [_table(["teacher", "precision", "patches/s", "patches",
                           "lowest cosine to fp32"], lines), _made(bench, "teacher")]
    return "\n\n".join(blocks) + "\n"


def ceilings_markdown(benches: list[Bench]) -> str:
    """What the devices reach at best."""
    measured = part_rows(benches, "ceilings")
    if not measured:
        return _not_measured("the ceilings", "ceilings") + "\n"
    lines = []
    for bench, rows in measured:
        for row in rows:
            flop = "tflop_per_s" in row
            measure, unit = ("tflop_per_s", "TFLOP/s") if flop else ("gb_per_s", "GB/s")
            lines.append([bench["device"], row["what"], row["precision"],
                          f"{_spread(row, measure)} {unit}"])
    return _table(["device", "what", "precision", "measured"], lines) + "\n"


def step_profile(results: Path) -> dict[str, Any] | None:
    """The parts of a step by the plain and the fused engine on a GPU, where they were measured.

    Returns:
        device, and rows: part, before_ms (plain), after_ms (fused).
    """
    for bench, rows in part_rows(load_benches(results), "profile"):
        times = {(row["engine"], row["part"]): row["ms"] for row in rows}
        if {"plain", "fused"} <= {engine for engine, _ in times}:
            return {"device": f"{bench['device']}, before by the plain engine in bf16, now by the "
                              f"fused one, commit {commit_words(bench['made']['profile'])}",
                    "rows": [{"part": part, "before_ms": times.get(("plain", part), 0.0),
                              "after_ms": times.get(("fused", part), 0.0)}
                             for part in dict.fromkeys(part for _, part in times)]}
    return load_optional(results / "profile_h100.json")


def profile_markdown(profile: dict[str, Any] | None) -> str:
    """Where a step's time goes, plainly and by the fused engine."""
    if not profile:
        return "*The parts of a step were not measured yet.*\n"
    lines = [[row["part"], f"{row['before_ms']:.2f}", f"{row['after_ms']:.2f}"]
             for row in profile["rows"]]
    lines.append(["**sum**", *(f"**{sum(row[when] for row in profile['rows']):.2f}**"
                               for when in ("before_ms", "after_ms"))])
    return "\n\n".join([_figure("speed_profile", "Where a step's time goes, part by part"),
                        _table(["part", "before (ms)", "now (ms)"], lines),
                        f"{profile['device']}."]) + "\n"


def growth_markdown(benches: list[Bench]) -> str:
    """The figure of growth, and every value in it."""
    measured = part_rows(benches, "scaling")
    if not measured:
        return _not_measured("how cost grows", "scaling") + "\n"
    blocks = [_figure("speed_growth", "Time of a training step over resolution, model size, "
                      "batch, patches and frames")]
    for bench, rows in measured:
        lines = [[AXES[row["axis"]][0], AXES[row["axis"]][2](row), _spread(row, "step_ms"),
                  _number(row["frames_per_s"]), _gib(row["peak_memory_bytes"])] for row in rows]
        blocks += ["````{dropdown} The values: " + bench["device"], _table(
            ["grows", "value", "step (ms)", "frames/s", "peak memory (GiB)"], lines),
            _made(bench, "scaling"), "````"]
    return "\n\n".join(blocks) + "\n"


# What `scaling` varies: its name, the column on the axis, and the value in words
AXES: dict[str, tuple[str, str, Callable[[Row], str]]] = {
    "resolution": ("pixels of a frame", "pixels", lambda row: row["frame"]),
    "modelsize": ("stored values (millions)", "modelsize", lambda row: f"{row['modelsize']:g}"),
    "batch_size": ("frames of a step", "batch_size", lambda row: f"{row['batch_size']}"),
    "patches": ("patches of a frame", "patches", lambda row: f"{row['patches']}"),
    "frames": ("frames of the video", "frames", lambda row: f"{row['frames']}"),
}


def tried_markdown(tried: dict[str, Any] | None) -> str:
    """What was tried on the engine: expected and measured change of a step's time by each."""
    if not tried:
        return "*Nothing is recorded yet.*\n"
    return _table(["change", "expected (ms)", "measured (ms)", "kept", "why", "device"], [
        [row["change"], _gain(row["expected_ms"]), _gain(row["measured_ms"]),
         "yes" if row["kept"] else "no", row["why"], row["device"]] for row in tried["rows"]]
                  ) + "\n"


def goals_markdown(benches: list[Bench]) -> str:
    """What was aimed at on one H100, and what was measured."""
    gpus = [bench for bench in benches if _is_gpu(bench)]
    if not gpus:
        return _not_measured("the goals, which are for one H100", "ceilings train decode teacher"
                             ) + "\n"
    lines = [[what, goal, *(_cell(find(bench), text) for bench in gpus)]
             for what, goal, find, text in GOALS]
    return _table(["", "goal", *(bench["device"] for bench in gpus)], lines) + "\n"


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


# What is aimed at on an H100: words, goal, how it is found in a file, and how it is shown
GOALS: tuple[tuple[str, str, Callable[[Bench], float | None], str], ...] = (
    ("training with the CLIP head, frames/s", "≥\u00a01000",
     lambda b: _pick(b, "train", "frames_per_s", clip_head=True, embed=""), "{:.0f}"),
    ("peak memory of its step, GiB", "≤\u00a01.5", _fastest_memory, "{:.2f}"),
    ("training without the head, frames/s", "≥\u00a01050",
     lambda b: _pick(b, "train", "frames_per_s", clip_head=False, embed=""), "{:.0f}"),
    ("300 epochs with everything around them, s", "≤\u00a060",
     lambda b: _pick(b, "fit", "wall_s", min, epochs=300), "{:.0f}"),
    ("decoding, RGB, frames/s", "≥\u00a04000",
     lambda b: _pick(b, "decode", "frames_per_s", mode="RGB"), "{:.0f}"),
    ("what 8 embeddings a frame cost when decoding", "≤\u00a03 %", _decode_loss, "{:.1%}"),
    ("ViT-B-32 in bf16, patches/s", "≥\u00a01000",
     lambda b: _pick(b, "teacher", "patches_per_s", precision="bf16"), "{:.0f}"),
)


# Words and cells


def _is_gpu(bench: Bench) -> bool:
    return "cores" not in bench["device"]


def _cell(value: float | None, text: str) -> str:
    return "not measured" if value is None else text.format(value)


def _table(names: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; columns without any value are left out."""
    kept = [i for i in range(len(names)) if any(line[i] for line in lines)]
    return "\n".join("| " + " | ".join(cells[i] for i in kept) + " |"
                     for cells in [names, ["---"] * len(names), *lines])


def _figure(name: str, alt: str) -> str:
    return f"```{{figure}} _generated/{name}.svg\n:alt: {alt}\n```"


def _on(head: bool) -> str:
    return "on" if head else "off"


def _number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def _spread(row: Row, measure: str) -> str:
    """Median (lowest–highest)."""
    middle, low, high = (_number(row[measure + end]) for end in ("", "_min", "_max"))
    return f"{middle} ({low}–{high})"


def _between(values: list[float]) -> str:
    return "–".join(dict.fromkeys(f"{value:g}" for value in values))


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _gib(size_bytes: float | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 2**30:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _gain(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _made(bench: Bench, part: str) -> str:
    """Where a part's rows come from, in a sentence."""
    made, rows = bench["made"][part], bench["parts"][part]
    counts = sorted({row["n"] for row in rows if "n" in row})
    return (f"Medians of {_and([str(n) for n in counts])} repeats (lowest–highest); "
            f"{bench['device']}, PyTorch {made['versions']['torch']}, {made['threads']} CPU "
            f"threads, commit {commit_words(made)}.")


def _not_measured(what: str, parts: str) -> str:
    return f"*Not measured yet: {what}. On your own machine: `hnerv-clip bench --parts {parts}`.*"
