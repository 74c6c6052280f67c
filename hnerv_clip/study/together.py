"""Does training together give a field what a frozen network cannot?

    python -m hnerv_clip.study.together output/together bunny bikes --seeds 0 1 2 --publish

Of one trained network, the same field is fitted afterwards on it as it is (`frozen`), and on what
becomes of it when it goes on with a field at each λ (`train.together`). λ = 0 goes on with the
picture alone, so that more epochs are not taken for what λ does. And on a network of the same seed
that learned picture and field together from its first epoch, in as many epochs as the frozen one.
The command does this with networks that are small enough for a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hnerv_clip.config import BUNDLED, BUNDLED_DIM, Config, TeacherConfig
from hnerv_clip.devices import synchronise
from hnerv_clip.files import write_json
from hnerv_clip.inference import Run, load_run
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.study.fields import BOXES, held_out_psnr, measure_field
from hnerv_clip.teachers.base import describe_teacher
from hnerv_clip.train import train
from hnerv_clip.train.together import TogetherSettings, fit_together
from hnerv_clip.video import label_video, load_video

FILE = "field_together.json"
WEIGHTS = (0.0, 0.002, 0.005, 0.02)
KEPT = ("eight_held", "any_train", "any_held", "any_held_smooth", "square_held", "own_boxes",
        "params", "bytes")
# Of the command: the first frames of each video, of one shot
SETTINGS = {"teacher": BUNDLED, "clip_dim": BUNDLED_DIM, "predict_clip": False, "modelsize": 0.25,
            "data_split": "4_5_5", "epochs": 16, "batch_size": 1, "lr": 5e-3, "eval_freq": 16,
            "field_boxes": 32, "field_steps": 500, "frame_limit": 30}
HEIGHT, EPOCHS, STEPS = 168, 6, 1500  # of a frame; of going on; of the fields that are measured
SMALL_WEIGHTS, FIRST_WEIGHTS = (0.0, 0.005, 0.02), (0.005,)


def measure_together(run: Run, *, folder: Path, cache_dir: str | Path, seed: int = 0,
                     weights: Sequence[float] = WEIGHTS, first: Sequence[float] = (),
                     epochs: int = 30, steps: int = 0, boxes: int = BOXES,
                     go_on: Callable[[], bool] = lambda: True) -> list[dict[str, Any]]:
    """Measure the same field on a network as it is and after training together with each λ.

    Args:
        run: trained for the picture alone, with a teacher; it gets a field where it has none.
        folder: where the new runs, fields and rows go; what is there is not made again.
        weights: λ of going on, for so many `epochs`.
        first: λ of training together from the first epoch, for as many as the run's.
        steps, boxes: of the fields that are measured, 0 steps for the settings'.
        go_on: asked before each network; False ends with the rows so far.
    Returns:
        Rows: video, frames, size (of a frame), network ("frozen", "together" or "first", from the
        first epoch), weight (λ; None where frozen), epochs (together), seed, boxes, the skills and
        bytes of `measure_field`, psnr_held_db, psnr_train_db, device, commit.
    """
    rows = []
    kinds = [("frozen", None), *(("together", weight) for weight in weights),
             *(("first", weight) for weight in first)]
    for kind, weight in kinds:
        settings = None if kind == "frozen" else \
            TogetherSettings(weight=weight, epochs=epochs) if kind == "together" else \
            TogetherSettings.from_first_epoch(run.config, weight=weight)
        name = kind if settings is None else \
            f"{'lambda' if kind == 'together' else kind}_{weight:g}_{settings.epochs}"
        name = f"{run.run_dir.path.name}_{name}_s{seed}"
        path = folder / f"{name}.json"
        if path.is_file():
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        if not go_on():
            break
        own = run
        if settings is not None:
            fit_together(run, folder / name, cache_dir=cache_dir, progress=False,
                         settings=settings)
            device = next(run.model.parameters()).device
            own = load_run(folder / name, cache_dir=cache_dir, device=str(device),
                           dataset=run.dataset)
            synchronise(device)
        found = measure_field(own, "default", network="frozen", seed=seed, folder=folder / "fields",
                              cache_dir=cache_dir, steps=steps, boxes=boxes)
        height, width = run.model.frame_hw
        rows.append({
            "video": found["video"], "frames": run.model.frame_count, "size": f"{height}×{width}",
            "boxes": boxes, "network": kind, "weight": weight,
            "epochs": 0 if settings is None else settings.epochs, "seed": seed,
            **{key: found[key] for key in KEPT}, "psnr_held_db": held_out_psnr(own),
            "psnr_train_db": float(own.run_dir.summary()["eval_psnr_train"]),
            "device": device_name(next(run.model.parameters()).device),
            "commit": code_version()[0]})
        write_json(path, rows[-1])
    return rows


def measure_small(data_path: str, folder: Path, *, cache_dir: str | Path, seed: int = 0,
                  **changes: Any) -> list[dict[str, Any]]:
    """`measure_together` of a small network, which is trained first.

    Args:
        changes: settings other than `SETTINGS`.
    """
    height, width = load_video(Config.from_params(data_path=data_path, frame_limit=1).video
                               ).frame_hw
    width = 24 * round(HEIGHT * width / height / 24)
    config = Config.from_params(**{**SETTINGS, "data_path": data_path, "seed": seed,
                                   "resize_list": f"{HEIGHT}_{width}", **changes})
    label = f"{label_video(data_path)}_s{seed}"
    train(config, folder / label, cache_dir=cache_dir, progress=False)
    return measure_together(
        load_run(folder / label, cache_dir=cache_dir), folder=folder, cache_dir=cache_dir,
        seed=seed, weights=SMALL_WEIGHTS, first=FIRST_WEIGHTS, epochs=EPOCHS, steps=STEPS,
        boxes=config.train.field_boxes)


def collect_together(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Put rows of `measure_together` into `out`/field_together.json, beside or for what is there.

    Rows of one video, size, device, λ, number of epochs and seed replace each other.
    """
    path, keys = out / FILE, ("video", "size", "device", "network", "weight", "epochs", "seed")
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    kept = {tuple(row[key] for key in keys): row for row in [*known, *rows]}
    write_json(path, {"about": {"teacher": describe_teacher(TeacherConfig(teacher=BUNDLED)).label,
                                "made by": "hnerv_clip.study.together.measure_together"},
                      "rows": list(kept.values())})


def main(argv: Sequence[str] | None = None) -> None:
    """The command in this module's first lines; prints the rows, which stay in the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("videos", nargs="+", help="bunny, bikes, carphone or files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cache_dir", default="output/cache")
    parser.add_argument("--publish", action="store_true", help=f"put them into book/results/{FILE}")
    args = parser.parse_args(argv)
    for seed in args.seeds:
        for video in args.videos:
            rows = measure_small(video, args.folder, cache_dir=args.cache_dir, seed=seed)
            print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), flush=True)
            if args.publish:
                collect_together(rows, resolve_path("book/results"))


if __name__ == "__main__":
    main()
