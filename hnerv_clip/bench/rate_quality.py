"""Rate and quality of stored videos beside other codecs: what is kept, and what follows from it.

    python -m hnerv_clip.bench.rate_quality book/results/rate_quality.json \
        --run rate.json COMMIT LR [--run ...] [--films films.json] [--moved films.json]
        [--splits rate.json ...] [--fuzz logs.txt COMMIT]

puts measured runs into the file that holds the other codecs; a run takes the place of one of the
same commit that has a head, or none, as it has. What `bench.decoding` measured of films takes the
place of what the same device gave at the same commit; of a file that was written on another device
only how far both draw it alike is kept. Runs of a small video, their epochs split
between training and fine-tuning, are kept as well. Counts of damaged files add up, each seed of a
commit once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hnerv_clip.bench.damaged_files import add_damaged, all_damaged, count_damaged
from hnerv_clip.bench.decoding import FETCHED, NETWORK
from hnerv_clip.bench.video_codecs import bd_rate
from hnerv_clip.files import write_atomic

Point = dict[str, Any]
# What was aimed at: at 640×1280, with the head, through the file
GOALS = {"psnr_db": 35.5, "rate_bpp": 0.055, "recipe_psnr_db": 37.0, "recipe_rate_bpp": 0.060,
         "similarity_loss": 0.005, "film_frames_per_s": 500, "damaged_files": 10**6}
NEAR = 0.03  # of a rate
LEAST_RANGE_DB = 0.5  # of PSNR that two curves share, for a mean over it to mean something
FUZZ_MEMORY_BYTES, FUZZ_TIME_S = 2 * 2**30, 2  # what tests/fuzz_file.py allows for each of them
ORIGINAL, FIELD, NO_HEAD = "with head", "with field", "no head"
SETTINGS = ("epochs", "lr", "batch_size", "modelsize", "predict_clip", "clip_loss_weight",
            "teacher", "data_split", "precision", "seed", "head", "optimizer")
FILM_MEASURES = ("gpu_cpu_largest_level", "gpu_cpu_share_different", "gpu_cpu_frames",
                 "decode_frames_per_s", "film_bytes", "picture_precision", "encoders",
                 "segment_frames", "open_s", "cpu", "cpu_all_patches_s")
MEASURES = (*FILM_MEASURES, "compile_s")


def run_of(measured: dict[str, Any], *, commit: str, fine_tune_lr: float) -> dict[str, Any]:
    """What is kept of one training and its stored files.

    Args:
        measured: device, settings, trained (a run's summary) and points, each with kind (`tuned`
            for fine-tuned ones), rate_bpp, size_bytes and psnr_db; and any of `MEASURES`.
        commit, fine_tune_lr: of the run.
    """
    trained, settings = measured["trained"], measured["settings"]
    points = [{**point, "history": [
        {key: row[key] for key in ("epoch", "psnr_db", "rate_bpp")} for row in point["history"]]}
        if "history" in point else point for point in measured["points"]]
    return {"device": measured["device"], "commit": commit, "fine_tune_lr": fine_tune_lr,
            "settings": {name: settings[name] for name in SETTINGS},
            "trained_psnr_db": trained["eval_psnr_all"], "train_s": trained.get("train_time_s"),
            "trained_clip_similarity": trained.get("eval_clip_similarity_all"), "points": points,
            **{name: measured[name] for name in MEASURES if name in measured}}


def split_of(measured: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a small run: how it split its epochs, and its smallest file."""
    settings, point = measured["settings"], measured["points"][-1]
    return {name: measured[name] for name in ("commit", "dirty", "device", "fine_tune_lr")} | {
        **{name: settings[name] for name in ("data_path", "resize_list", "frame_limit",
                                             "modelsize", "epochs", "lr", "batch_size")},
        "trained_psnr_db": measured["trained"]["eval_psnr_all"], "tune_epochs": point["epochs"],
        **{name: point[name] for name in ("target_bpp", "rate_bpp", "psnr_db")}}


def split_words(splits: Sequence[dict[str, Any]]) -> str:
    """What the best of `split_of` gains over the worst, and where it stands."""
    best, worst = (end(splits, key=lambda row: row["psnr_db"]) for end in (max, min))
    epochs = {row["epochs"] + row["tune_epochs"] for row in splits}
    height, width = best["resize_list"].split("_")
    return (f"{best['frame_limit']} frames of {height}×{width} in {best['modelsize']:g} M values, "
            f"{' to '.join(map(str, sorted(epochs)))} epochs in all: {best['epochs']} of training "
            f"and {best['tune_epochs']} of fine-tuning at a learning rate of "
            f"{best['fine_tune_lr']:g} end {best['psnr_db'] - worst['psnr_db']:.1f} dB above "
            f"{worst['epochs']} and {worst['tune_epochs']} at {worst['fine_tune_lr']:g}")


def damaged_words(rows: Sequence[dict[str, Any]]) -> str:
    """How damaged files ended, and which processes did not come to their end, in sentences.

    Args:
        rows: of the damaged files, one for each commit, see `bench.damaged_files`: commit, seeds,
            files, refused, read, failed.
    """
    counts = all_damaged(rows)
    said = [f"Of {counts['files']:,} damaged files, half of them with right checksums, "
            f"{counts['refused']:,} ended in the one documented error and {counts['read']:,} could "
            "be read; no abort, no hang and no other error in the "
            f"{counts['processes']} processes that are counted, each file under "
            f"{FUZZ_MEMORY_BYTES / 2**30:g} GiB and {FUZZ_TIME_S} s."]
    for row in rows:
        if row["failed"]:
            words = "1 process" if row["failed"] == 1 else f"{row['failed']} processes"
            said.append(f"At commit {row['commit'][:12]}, {words} more did not come to the end; "
                        "files of such a process are not counted.")
    return " ".join(said)


def tuned_points(runs: Sequence[dict[str, Any]]) -> list[Point]:
    """The fine-tuned points of all runs by rate, each with its run's commit, device, head and
    modelsize."""
    return [point for point in _points(runs) if point["kind"] == "tuned"]


def plain_points(runs: Sequence[dict[str, Any]]) -> list[Point]:
    """Likewise the files of networks as they were trained."""
    return [point for point in _points(runs) if point["kind"] != "tuned"]


def _points(runs: Sequence[dict[str, Any]]) -> list[Point]:
    points = [{**point, "commit": run["commit"], "device": run["device"], "head": head_of(run),
               "modelsize": run["settings"]["modelsize"]}
              for run in runs for point in run["points"]]
    return sorted(points, key=lambda point: point["rate_bpp"])


def at_rate(points: Sequence[Point], rate_bpp: float) -> float:
    """PSNR in dB at a rate, linear over its logarithm between points; NaN outside them."""
    points = sorted(points, key=lambda point: point["rate_bpp"])
    return float(np.interp(np.log(rate_bpp), np.log([p["rate_bpp"] for p in points]),
                           [p["psnr_db"] for p in points], left=np.nan, right=np.nan))


def at_psnr(points: Sequence[Point], psnr_db: float) -> float:
    """The rate in bits per pixel at a PSNR, the inverse of `at_rate`; NaN outside the points."""
    points = sorted(points, key=lambda point: point["psnr_db"])
    return float(np.exp(np.interp(psnr_db, [p["psnr_db"] for p in points],
                                  np.log([p["rate_bpp"] for p in points]),
                                  left=np.nan, right=np.nan)))


def with_head(points: Sequence[Point]) -> list[Point]:
    """Those of files that answer for embeddings."""
    return [point for point in points if point["head"] != NO_HEAD]


def reached(points: Sequence[Point], rate_bpp: float) -> float:
    """The best PSNR in dB at a rate or below it, between points of one training as `at_rate`; NaN
    where no file is so small."""
    found = [point["psnr_db"] for point in points if point["rate_bpp"] <= rate_bpp]
    found += [at_rate(curve, rate_bpp) for curve in trainings(points)]
    return float(np.nanmax([np.nan, *found])) if np.isfinite(found).any() else np.nan


def needed(points: Sequence[Point], psnr_db: float) -> float:
    """The lowest rate in bits per pixel that gives a PSNR or more, likewise; NaN for none."""
    found = [point["rate_bpp"] for point in points if point["psnr_db"] >= psnr_db]
    found += [at_psnr(curve, psnr_db) for curve in trainings(points)]
    return float(np.nanmin([np.nan, *found])) if np.isfinite(found).any() else np.nan


def next_above(points: Sequence[Point], rate_bpp: float) -> str:
    """What the first file above a rate gives, in words, where it beats all at or below it and is
    near, within `NEAR`; else nothing."""
    there = reached(points, rate_bpp)
    above = [p for p in points if rate_bpp < p["rate_bpp"] <= rate_bpp * (1 + NEAR)
             and p["psnr_db"] > np.nan_to_num(there, nan=-np.inf)]
    first = min(above, key=lambda p: p["rate_bpp"], default=None)
    return "" if first is None else f", {_db(first['psnr_db'])} at {first['rate_bpp']:.4f}"


def trainings(points: Sequence[Point]) -> list[list[Point]]:
    """Points of `tuned_points`, those of each training together."""
    names = ("commit", "head", "modelsize")
    return [[point for point in points if [point[name] for name in names] == list(key)]
            for key in dict.fromkeys(tuple(point[name] for name in names) for point in points)]


def codec_curves(codecs: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each codec and preset, in the order of their names."""
    return {name: [point for point in codecs if point["codec"] == name]
            for name in sorted({point["codec"] for point in codecs})}


def bd_rates(codecs: Sequence[Point], tuned: Sequence[Point]) -> list[dict[str, Any]]:
    """`bd_rate` of the fine-tuned points against each codec: anchor, bd_rate_percent, and the
    range of PSNR that both reach, low_db and high_db; no row where it is below `LEAST_RANGE_DB`."""
    rows = []
    for name, points in codec_curves(codecs).items():
        value = bd_rate(points, tuned)
        low, high = (side(end(p["psnr_db"] for p in part) for part in (points, tuned))
                     for side, end in ((max, min), (min, max)))
        if np.isfinite(value) and high - low >= LEAST_RANGE_DB:
            rows.append({"anchor": name, "bd_rate_percent": value, "low_db": low, "high_db": high})
    return rows


def side_file(measured: dict[str, Any], head: str = FIELD) -> Point:
    """The smallest side file that is as near to the teacher at its patches as stored heads of a
    kind, by the mean cosine raw and mean-centered; the largest where none is.

    Args:
        head: FIELD or ORIGINAL; where no file has such a one, the other.
    """
    points = [(head_of(run) == head, point) for run in measured["runs"]
              for point in run["points"] if "clip_centred" in point]
    heads = [point for own, point in points if own] or [point for _, point in points]
    names = ("clip_similarity", "clip_centred")
    needed = {name: float(np.mean([point[name] for point in heads])) for name in names}
    rows = sorted(measured["side_files"]["points"], key=lambda row: row["size_bytes"])
    return next((row for row in rows if all(row[name] >= needed[name] for name in names)),
                rows[-1])


def searchable(points: Sequence[Point], measured: dict[str, Any]) -> list[Point]:
    """Points whose bytes allow a search: where there is no head, a side file's are added."""
    pixels = math.prod(measured[name] for name in ("frames", "height", "width"))
    extra = side_file(measured)["size_bytes"]
    return [point if point.get("head", NO_HEAD) != NO_HEAD else {
        **point, "size_bytes": point["size_bytes"] + extra,
        "rate_bpp": 8 * (point["size_bytes"] + extra) / pixels} for point in points]


def films_of(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured of playing files, the last one at the end: device, commit and
    `FILM_MEASURES`, of which older ones have fewer."""
    return [row for row in (*measured["runs"], *measured.get("films", []))
            if "decode_frames_per_s" in row]


def film_rates(row: dict[str, Any]) -> dict[str, float]:
    """Frames a second of whole films, by x264's preset, of a row of `films_of`."""
    return {name: rate for name, rate in row["decode_frames_per_s"].items()
            if name not in (NETWORK, FETCHED)}


def moved_words(measured: dict[str, Any]) -> str:
    """How far a file from a CPU differs on a GPU, in a sentence; nothing where it is not known."""
    moved = measured.get("written_on_cpu")
    return "" if moved is None else (
        f" A file that was written on a CPU differs by at most {moved['gpu_cpu_largest_level']} "
        f"level, in {moved['gpu_cpu_share_different']:.1%} of the values of "
        f"{moved['gpu_cpu_frames']} frames (commit {moved['commit'][:12]}).")


def time_rows(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What each codec takes: encode_s and decode_s of the whole film in seconds of one core, and
    the quality that was timed; of this codec, a row for each training, with its commit, whose
    encoding is a GPU's."""
    times = measured["times"]
    rows = [{"codec": row["codec"], "psnr_db": row["psnr_db"], "rate_bpp": row["rate_bpp"],
             "encode_s": row["encode_cpu_s"], "decode_s": row["decode_cpu_s"], "encoder": "CPU"}
            for row in times["codecs"]]
    own = times["own"]
    for run in measured["runs"]:
        points, spent = [], 0.0
        for point in run["points"]:
            if point["kind"] == "tuned":  # which may go on from the one before
                spent = point.get("tune_s", 0.0) + (spent if point.get("goes_on") else 0.0)
                points.append(point | {"spent_s": spent})
        if run.get("train_s") and points:
            point = min(points, key=lambda point: abs(point["psnr_db"] - GOALS["psnr_db"]))
            rows.append({
                "codec": "this codec", "commit": run["commit"],
                "psnr_db": point["psnr_db"], "rate_bpp": point["rate_bpp"],
                "encode_s": run["train_s"] + run.get("compile_s", 0.0) + point["spent_s"],
                "decode_s": own["open_cpu_s"]
                + own["decode_cpu_s"] / own["frames"] * times["frames"],
                "encoder": run["device"]})
    return rows


def collect(path: Path, runs: Sequence[dict[str, Any]], damaged: dict[str, Any] | None = None,
            films: Sequence[dict[str, Any]] = (), splits: Sequence[dict[str, Any]] = (),
            moved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Put runs (as from `run_of`) and the count of damaged files into the file at `path`.

    Args:
        damaged: {commit: what `count_damaged` gave}.
        films: what `decoding.main` wrote.
        splits: from `split_of`, in place of those there.
        moved: as `films`, of a file that was written on a CPU and played on a GPU.
    Raises:
        ImportError: bjontegaard, which gives the BD-rate, is not installed.
        ValueError: damaged files that are counted already.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    found = {(run["commit"], head_of(run), run["settings"]["modelsize"]): run
             for run in [*kept.pop("runs", []), *runs]}
    kept.pop("hnerv_clip", None)  # one run, without its commit
    kept["runs"] = list(found.values())
    played = {(row["commit"], row["device"]): row for row in [*kept.pop("films", []), *films]}
    if played:
        kept["films"] = list(played.values())
    if splits:
        kept["splits"] = list(splits)
    if moved:
        kept["written_on_cpu"] = {name: moved[name] for name in (
            "commit", "device", "gpu_cpu_largest_level", "gpu_cpu_share_different",
            "gpu_cpu_frames")}
    for commit, counted in (damaged or {}).items():
        kept["damaged"] = add_damaged(kept.get("damaged", []), counted, commit=commit)
    tuned = with_head(tuned_points(kept["runs"]))
    kept["bd_rate"] = bd_rates(kept["codecs"], tuned)
    if "side_files" in kept:
        kept["bd_rate_searchable"] = bd_rates(searchable(kept["codecs"], kept),
                                              searchable(tuned, kept))
    text = json.dumps(kept, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))
    return kept


def head_of(point_or_run: dict[str, Any]) -> str:
    """What answers for embeddings, of a run or a point of `tuned_points`."""
    if "settings" not in point_or_run:
        return point_or_run["head"]
    settings = point_or_run["settings"]
    if settings.get("head") == "field":
        return FIELD
    return ORIGINAL if settings["predict_clip"] else NO_HEAD


def optimizer_of(run: dict[str, Any]) -> str:
    """What a run was trained by, as its authors write it; files from before `optimizer`: Adam."""
    return run["settings"].get("optimizer", "adam").title()


def run_words(run: dict[str, Any]) -> str:
    """A training's name: "1.2 M, 600 epochs by Adan, with field"."""
    return (f"{run['settings']['modelsize']:g} M, {run['settings']['epochs']} epochs by "
            f"{optimizer_of(run)}, {head_of(run)}")


def tried_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, str | None]]:
    """Trainings with a field, in turn, and what their files reach at the goals' rates."""
    rows = []
    for run in (run for run in runs if head_of(run) == FIELD):
        points = tuned_points([run])
        tuned = _first_tuned(run)
        rows.append({
            "values, epochs": f"{run['settings']['modelsize']:g} M, {run['settings']['epochs']} by "
                              f"{optimizer_of(run)}",
            "before rounding (dB)": f"{run['trained_psnr_db']:.2f}",
            "first fine-tuning": f"{tuned['epochs']} epochs, {tuned['tune_s']:.0f} s, learning "
                                 f"rate {run['fine_tune_lr']:g}",
            **{f"dB at {rate:g}": f"{there:.2f}" if math.isfinite(there) else "–"
               for rate in (GOALS["rate_bpp"], GOALS["recipe_rate_bpp"])
               for there in [reached(points, rate)]}})
    return rows


def length_words(runs: Sequence[dict[str, Any]]) -> str:
    """What longer trainings with a field gave, of one size and optimizer, in sentences."""
    alike: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["settings"]["epochs"]):
        if head_of(run) == FIELD:
            alike.setdefault((run["settings"]["modelsize"], optimizer_of(run)), []).append(run)
    said = []
    for (size, optimizer), part in alike.items():
        ends = [(f"{run['settings']['epochs']} epochs and a first fine-tuning of "
                 f"{_first_tuned(run)['epochs']}", reached(tuned_points([run]), GOALS["rate_bpp"]))
                for run in (part[-1], part[0])]
        if len(part) > 1 and all(math.isfinite(there) for _, there in ends):
            said.append(f"Of {size:g} M values by {optimizer}, " + " and ".join(
                f"{words} give {there:.2f} dB" for words, there in ends)
                + f" at {GOALS['rate_bpp']:g} bits per pixel.")
    return " ".join(said)


def _first_tuned(run: dict[str, Any]) -> Point:
    return next(point for point in run["points"] if point["kind"] == "tuned")


def fine_tuning_words(point: Point) -> str:
    """How a fine-tuning went, from its history (over training, before the file)."""
    history = point["history"]
    lowest, last = min(history, key=lambda row: row["psnr_db"]), history[-1]
    words = f"After {last['epoch']} epochs the rounded network is at {last['psnr_db']:.2f} dB"
    if lowest["epoch"] != last["epoch"]:
        words = (f"It is lowest at epoch {lowest['epoch']}, {lowest['psnr_db']:.2f} dB, while the "
                 f"learning rate is high. {words}")
    begins = "goes on, from a larger file's network," if point.get("goes_on") else "begins"
    return (f"Fine-tuning {begins} at {history[0]['psnr_db']:.2f} dB. {words}, and the file's "
            f"decoded frames are at {point['psnr_db']:.2f} dB.")


def writing_words(points: Sequence[Point]) -> str:
    """How far files lie from their last epochs, from the lowest to the highest."""
    changes = sorted(point["psnr_db"] - point["history"][-1]["psnr_db"] for point in points)
    ends = dict.fromkeys(f"{change:+.2f}" for change in (changes[0], changes[-1]))
    return f"{' to '.join(ends)} dB"


def goals(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at and what was measured, in words, a row each; met is yes or no."""
    runs = measured["runs"]
    tuned = with_head(tuned_points(runs))
    there, rate = reached(tuned, GOALS["rate_bpp"]), needed(tuned, GOALS["psnr_db"])
    recipe = reached(tuned, GOALS["recipe_rate_bpp"])
    losses = [run["trained_clip_similarity"] - point["clip_similarity"] for run in runs
              for point in run["points"] if run["trained_clip_similarity"] is not None
              and "clip_similarity" in point]
    film = max((rate for row in films_of(measured) for rate in film_rates(row).values()),
               default=np.nan)
    damaged = measured.get("damaged", [])
    files, stopped = (all_damaged(damaged)[name] for name in ("files", "failed"))
    near = next_above(tuned, GOALS["rate_bpp"])
    rows = [
        (f"{GOALS['psnr_db']} dB at {GOALS['rate_bpp']} bits per pixel, head included",
         f"{_db(there)} there{near}; {GOALS['psnr_db']} dB at {rate:.4f}",
         there >= GOALS["psnr_db"]),
        (f"{GOALS['recipe_psnr_db']:g} dB at {GOALS['recipe_rate_bpp']:.3f} bits per pixel, "
         "head included", f"{_db(recipe)} there", recipe >= GOALS["recipe_psnr_db"]),
        (f"similarity loses at most {GOALS['similarity_loss']} through the file",
         f"at most {max(losses):.4f}", max(losses) <= GOALS["similarity_loss"]),
        (f"a film written at {GOALS['film_frames_per_s']} frames/s on an H100",
         f"{film:.0f} frames/s", film >= GOALS["film_frames_per_s"]),
        (f"{GOALS['damaged_files']:,} damaged files, no abort",
         f"{files:,} files, {f'stopped processes: {stopped}' if stopped else 'no abort'}",
         files >= GOALS["damaged_files"] and not stopped)]
    return [{"goal": goal, "measured": value, "met": "yes" if met else "no"}
            for goal, value, met in rows]


def goal_words(rate: str, there: float, near: str = "") -> str:
    """Whether a goal of `GOALS` is met, in a sentence; `rate` is rate_bpp or recipe_rate_bpp.

    `there` and `near` are of `reached` and `next_above`.
    """
    wanted = GOALS[rate.replace("rate_bpp", "psnr_db")]
    words = f"The goal, {wanted:g} dB at {GOALS[rate]:.3f} bits per pixel,"
    if there >= wanted:
        return f"{words} is met: {there:.2f} dB."
    short = f", {wanted - there:.2f} dB short" if math.isfinite(there) else ""
    return f"{words} is missed: {_db(there)} there{short}{near}."


def best_run(runs: Sequence[dict[str, Any]], rate_bpp: float) -> dict[str, Any]:
    """The run with the best file at a rate or below it, of those with a head; else the one whose
    smallest file comes nearest."""
    headed = [run for run in runs if with_head(tuned_points([run]))]
    best = {i: reached(tuned_points([run]), rate_bpp) for i, run in enumerate(headed)}
    if any(np.isfinite(list(best.values()))):
        return headed[max(best, key=lambda i: np.nan_to_num(best[i], nan=-np.inf))]
    return min(headed, key=lambda run: tuned_points([run])[0]["rate_bpp"])


def _db(psnr_db: float) -> str:
    return f"{psnr_db:.2f} dB" if math.isfinite(psnr_db) else "no file"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--run", nargs=3, action="append", default=[],
                        metavar=("FILE", "COMMIT", "LR"), help="a run, its commit and the learning "
                        "rate of its fine-tuning")
    parser.add_argument("--films", action="append", default=[], metavar="FILE",
                        help="what hnerv_clip.bench.decoding wrote")
    parser.add_argument("--moved", metavar="FILE", help="likewise of a file written on a CPU")
    parser.add_argument("--splits", nargs="+", default=[], metavar="FILE",
                        help="small runs that split their epochs differently")
    parser.add_argument("--fuzz", nargs=2, action="append", default=[],
                        metavar=("LOG", "COMMIT"), help="what tests/fuzz_file.py printed")
    args = parser.parse_args(argv)
    runs = [run_of(json.loads(Path(file).read_text(encoding="utf-8")), commit=commit,
                   fine_tune_lr=float(lr)) for file, commit, lr in args.run]
    damaged = {commit: count_damaged(Path(log).read_text(encoding="utf-8"))
               for log, commit in args.fuzz}
    films, splits = ([json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
                     for files in (args.films, args.splits))
    moved = json.loads(Path(args.moved).read_text(encoding="utf-8")) if args.moved else None
    collect(args.path, runs, damaged, films, [split_of(small) for small in splits], moved)


if __name__ == "__main__":
    main()
