"""What several ranks give, as rows of tables, and its way into `book/results`.

`book/results` holds files of `hnerv-clip scale`: `scaling.json` of GPUs, `scaling_cpu.json` of a
CPU's ranks, and in `scaling_run` the small files of the GPUs' whole run. Each part of the first
says when and on what it was measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from hnerv_clip.bench.multi_gpu import RUN, joint_curve, run_figures, time_to_reach
from hnerv_clip.book.markdown import join_words, three_digits
from hnerv_clip.book.results import ResultsError, read_json
from hnerv_clip.evaluate import summarise
from hnerv_clip.labels import FRAME_WORDS, SOURCE_WORDS
from hnerv_clip.runs.provenance import commit_words
from hnerv_clip.runs.run_dir import RunDir, RunError, write_json

RUN_FILES = ("config.json", "provenance.json", "summary.json", "metrics.csv", "evaluation.csv")
PARTS = {"speed": "speed", "correctness": "comparison with one rank", "checkpoint": "checkpoints",
         "kill": "killed rank", "sweep": "independent runs", "run": "complete run"}
Row = dict[str, Any]


def collect_scaling(results: Path, outf: Path) -> None:
    """Take a measurement of `hnerv-clip scale` into `results`, its parts in place of those there.

    Parts, and a whole run, that it does not have stay as they were, if they are of the same
    settings, also of another number of GPUs; otherwise they go.

    Raises:
        RunError: `outf` holds none, or its whole run is not finished.
    """
    if not (outf / "scaling.json").exists():
        raise RunError(f"{outf} has no scaling.json; measure first, hnerv-clip scale --outf {outf}")
    measured = json.loads((outf / "scaling.json").read_text(encoding="utf-8"))
    on_gpu = measured["backend"] == "nccl"
    folder, path = results / "scaling_run", results / f"scaling{'' if on_gpu else '_cpu'}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else measured
    same = all(measured["settings"].get(name, value) == value
               for name, value in before["settings"].items())
    own = [name for name, part in measured["parts"].items() if part["complete"]]
    measured["parts"] = {name: {"gpus": found["gpus"], **part}
                         for found in (before, measured) if same or found is measured
                         for name, part in found["parts"].items() if part["complete"]}
    if same and "speed" not in own:  # that part's GPUs are the file's
        measured["gpus"] = before["gpus"]
    figures = run_figures(outf / RUN) if on_gpu and (outf / RUN).exists() else None
    if on_gpu and not same:
        shutil.rmtree(folder, ignore_errors=True)
    if figures:
        if RUN in own:  # read there and then; a copy's files may have other times
            figures["wall_s"] = measured["parts"][RUN]["wall_s"]
        folder.mkdir(exist_ok=True)
        for name in RUN_FILES:
            shutil.copyfile(outf / RUN / name, folder / name)
        write_json(folder / "figures.json", figures)
    write_json(path, measured)


def answer_words(measured: dict[str, Any]) -> tuple[str, str]:
    """What several GPUs give: (how much faster, and at what PSNR; PSNR at other learning rates, and
    when one GPU's is reached).

    Args:
        measured: with the part `speed`.
    """
    part, runs = measured["parts"]["speed"], _read_runs(measured)
    alone, *others = [run for run in runs if run["learning_rate"] == "kept"]
    most = others.pop()
    rates = "".join(f" ({run['frames_per_s'] / alone['frames_per_s']:.2f} times on {run['ranks']})"
                    for run in others)
    widest = [run for run in runs if run["ranks"] == most["ranks"]]
    reached = [run for run in widest if run["time_to_quality_s"] is not None]
    quality = "is reached by none of these"
    if reached:
        best = min(reached, key=lambda run: run["time_to_quality_s"])
        quality = f"is reached in {best['time_to_quality_s']:.1f} s with {_rate_words(best, alone)}"
        if best["learning_rate"] != "kept":
            quality += "; one GPU was not run with that rate"
    speed_up = most["frames_per_s"] / alone["frames_per_s"]
    more = [f"PSNR changes by {quality_words(alone, [run])}{_lost_words(run)}"
            f"{_cosine_words(run, alone)}." for run in widest if run is not most]
    return (f"On {most['ranks']} GPUs training runs {speed_up:.2f} times as fast as on one{rates}; "
            f"after {alone['epochs']} epochs on each, with fewer steps, PSNR changes by "
            f"{most['psnr_db'] - alone['psnr_db']:+.2f} dB.",
            " ".join(filter(None, [*more, "The PSNR that one GPU has after "
                                   f"{alone['time_to_quality_s']:.1f} s of steps {quality}.",
                                   failed_words(part)])))


def failed_words(part: Row) -> str:
    """Which runs of the part `speed` failed, and with what error; or nothing."""
    return " ".join(f"The run on {run['ranks']} with the learning rate {run['learning_rate']} has "
                    f"no result ({_reason(run)})." for run in part.get("failed", []))


def _reason(failed: Row) -> str:
    """The error of a run, without the run's name, and with files by their names alone."""
    words = failed["why"].removeprefix(f"run {failed['run']} failed: ").split(" ")
    return " ".join(PurePosixPath(word).name if word.count("/") > 1 and word[0] == "/" else word
                    for word in words)


def _read_runs(measured: dict[str, Any]) -> list[Row]:
    """Runs of the part `speed`; no evaluation of the warm-up counts, see `joint_curve`.

    A run whose picture was best in that phase has `lost_db`: that PSNR, the next and the last one.
    """
    part, rows = measured["parts"]["speed"], []
    for run in part["runs"]:
        if curve := run.get("curve"):
            both = joint_curve(run, measured["settings"])
            run = {**run, "time_to_quality_s": time_to_reach(both, part["quality_db"])}
            best = max(curve, key=lambda point: point[2])
            if both and best not in both:
                run["lost_db"] = (best[2], both[0][2], both[-1][2])
        rows.append(run)
    return rows


def _lost_words(run: Row) -> str:
    """What became of a picture that was best in its warm-up; or nothing."""
    if "lost_db" not in run:
        return ""
    best, joined, last = run["lost_db"]
    return (f": it fell from {best:.2f} dB in the warm-up to {joined:.2f} dB when the cosine "
            f"term joined, and had {last:.2f} dB at its last evaluation")


def _cosine_words(row: Row, alone: Row) -> str:
    """The semantic head's score beside a change of PSNR, where both are known."""
    one, other = (run.get("cosine_centred") for run in (alone, row))
    if one is None or other is None:
        return ""
    word = "falls" if other < one else "rises"
    return f", and the mean-centered cosine {word} from {one:.2f} to {other:.2f}"


def _rate_words(row: Row, alone: Row) -> str:
    rate, _, more = row["learning_rate"].partition(", ")
    times = row["epochs"] / alone["epochs"]
    return ("the learning rate kept" if rate == "kept" else f"the learning rate {rate}") + (
        f", {more}" if more else "") + (f" ({times:g} times the epochs)" if times != 1 else "")


def quality_words(alone: Row, others: list[Row]) -> str:
    """How PSNR changes with more ranks: of the same epochs, and where epochs differ, of how many.

    Args:
        alone, others: rows of the part `speed`: one rank, and more of them.
    """
    return join_words([f"{row['psnr_db'] - alone['psnr_db']:+.2f} dB with {_rate_words(row, alone)}"
                       for row in others])


def read_scaling(folder: str | Path, name: str, needs: Iterable[str]) -> dict[str, Any]:
    """A file of `hnerv-clip scale` in `book/results` with some of its parts.

    Raises:
        ResultsError: it is missing, or a part of `needs` was not measured.
    """
    fix = f"hnerv-clip scale --outf FOLDER, then hnerv-clip pages --scaling FOLDER ({name})"
    measured = read_json(folder, name, fix=fix)
    missing = [part for part in needs if not measured["parts"].get(part, {}).get("complete")]
    if missing:
        raise ResultsError(f"{folder}/{name} has no {', '.join(missing)}; measure with {fix}")
    return measured


def speed_rows(measured: dict[str, Any]) -> list[Row]:
    """Speed and quality over ranks, a row per run of the part `speed`; [] where it is missing."""
    part = measured["parts"].get("speed")
    if not part or not part["complete"]:
        return []
    reached, ranks = f"{part['quality_db']:.2f} dB after (s)", _ranks_word(measured)
    rows = [{ranks: run["ranks"], "frames/s": three_digits(run["frames_per_s"]),
             "PSNR (dB)": f"{run['psnr_db']:.2f}",
             "learning rate": run["learning_rate"],
             "mean-centered cosine": None if run.get("cosine_centred") is None
             else f"{run['cosine_centred']:.3f}",
             "efficiency": f"{run['efficiency']:.0%}",
             reached: "never" if run["time_to_quality_s"] is None
             else f"{run['time_to_quality_s']:.1f}", "training (s)": f"{run['train_time_s']:.1f}",
             "whole run (s)": "resumed" if run["wall_s"] is None else f"{run['wall_s']:.0f}"}
            for run in _read_runs(measured)]
    return rows + [{ranks: run["ranks"], "learning rate": run["learning_rate"],
                    "frames/s": "failed"} for run in part["failed"]]


def _ranks_word(measured: dict[str, Any]) -> str:
    return "GPUs" if measured["backend"] == "nccl" else "ranks"


def correctness_rows(measured: dict[str, Any]) -> list[Row]:
    """One rank against all of them on the same global batches, a row per precision and engine."""
    part = measured["parts"].get("correctness")
    if not part or not part["complete"]:
        return []
    return [{
        "precision, engine": f"{case['precision']}, {case['engine']}",
        "weights, largest difference": _differs(case["ranks_differ"]),
        "PSNR: one, all (dB)": f"{case['psnr_one_db']:.2f}, {case['psnr_ranks_db']:.2f}",
        "loss of the first, last epoch": ", ".join(
            "equal" if one == ranks else f"{abs(ranks / one - 1):.1e}" for one, ranks in [
                (case["loss_one"][i], case["loss_ranks"][i]) for i in (0, -1)]),
        "one rank twice: weights": _differs(case["repeat_differs"]),
        _ranks_word(measured): case["ranks"], "global batch": case["global_batch"],
        "epochs": case["epochs"]}
        for case in part["cases"]]


def _differs(found: dict[str, Any]) -> str:
    return "equal bits" if found["identical"] else \
        f"{found['largest']:.1e} (relative {found['relative']:.1e})"


def machine_words(measured: dict[str, Any]) -> str:
    """What was measured, and on what, for a caption."""
    settings = measured["settings"]
    teacher = f"teacher {measured['teacher']}" if measured["teacher"] else "pixels only"
    size = (settings["resize_list"] or settings["crop_list"]).replace("_", "×") or "whole frames"
    machines: dict[str, list[str]] = {}
    for name, part in measured["parts"].items():
        count = f"{part.get('gpus', measured['gpus'])} × " if measured["backend"] == "nccl" else ""
        machines.setdefault(f"{count}{part['device']}, PyTorch {part['versions']['torch']}, commit "
                            f"{commit_words(part)}", []).append(PARTS.get(name, name))
    several = len(machines) > 1
    return (f"{settings['data_path']} at {size}, {settings['modelsize']:g} million stored values, "
            f"{settings['epochs']} epochs, batch {settings['batch_size']} a rank, precision "
            f"{settings['precision']}, {teacher}; over {measured['backend']}; "
            + "; ".join(f"{join_words(parts)}: {words}" if several else words
                        for words, parts in machines.items()))


def evaluation_rows(run: RunDir) -> list[Row]:
    """The means of a run's evaluation: pictures, their file, and the CLIP head.

    Returns:
        a row per frames and source; columns of which nothing is known hold None.
    """
    table = summarise(pd.read_csv(run.path / "evaluation.csv"))
    values = table[table.frames != "all"].set_index(["frames", "source", "variant"])
    columns = {"PSNR (dB)": ("psnr_db", "trained", 2), "from the file": ("psnr_db", "quantised", 2),
               "MS-SSIM": ("ms_ssim", "trained", 4),
               "cosine to the teacher": ("clip_similarity", "trained", 3),
               "mean-centered cosine": ("clip_centred", "trained", 3)}
    rows = []
    for frames, source in dict.fromkeys(key[:2] for key in values.index):
        row = {"frames": f"{FRAME_WORDS[frames]}, per-frame embedding {SOURCE_WORDS[source]}",
               "n": values.n[frames, source, "trained"]}
        for name, (measure, variant, digits) in columns.items():
            value = values[measure].get((frames, source, variant), float("nan"))
            row[name] = None if pd.isna(value) else f"{value:.{digits}f}"
        rows.append(row)
    return rows
