"""Does going on together give a field what a frozen network cannot?

Of one trained network, the same field is fitted afterwards on it as it is (`frozen`), and on what
becomes of it when it goes on with a field at each λ (`train.together`). λ = 0 goes on with the
picture alone, so that more epochs are not taken for what λ does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hnerv_clip.config import BUNDLED, TeacherConfig
from hnerv_clip.devices import synchronise
from hnerv_clip.files import write_json
from hnerv_clip.inference import Run, load_run
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.study.fields import BOXES, held_out_psnr, measure_field
from hnerv_clip.teachers.base import describe_teacher
from hnerv_clip.train.together import TogetherSettings, fit_together

FILE = "field_together.json"
WEIGHTS = (0.0, 0.002, 0.005, 0.02)
KEPT = ("eight_held", "any_train", "any_held", "any_held_smooth", "square_held", "own_boxes",
        "params", "bytes")


def measure_together(run: Run, *, folder: Path, cache_dir: str | Path, seed: int = 0,
                     weights: Sequence[float] = WEIGHTS, epochs: int = 30, steps: int = 0,
                     boxes: int = BOXES, go_on: Callable[[], bool] = lambda: True
                     ) -> list[dict[str, Any]]:
    """Measure the same field on a network as it is and after going on with each λ.

    Args:
        run: trained for the picture alone, with a teacher; it gets a field where it has none.
        folder: where the new runs, fields and rows go; what is there is not made again.
        steps, boxes: of the fields that are measured, 0 steps for the settings'.
        go_on: asked before each network; False ends with the rows so far.
    Returns:
        Rows: video, frames, size (of a frame), network ("frozen" or "together"), weight (λ; None
        where frozen), epochs, seed, boxes, the skills and bytes of `measure_field`, psnr_held_db,
        psnr_train_db, device, commit.
    """
    rows = []
    for weight in (None, *weights):
        name = "frozen" if weight is None else f"lambda_{weight:g}_{epochs}"
        name = f"{run.run_dir.path.name}_{name}_s{seed}"
        path = folder / f"{name}.json"
        if path.is_file():
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        if not go_on():
            break
        own = run
        if weight is not None:
            fit_together(run, folder / name, cache_dir=cache_dir, progress=False,
                         settings=TogetherSettings(weight=weight, epochs=epochs))
            device = next(run.model.parameters()).device
            own = load_run(folder / name, cache_dir=cache_dir, device=str(device),
                           dataset=run.dataset)
            synchronise(device)
        found = measure_field(own, "default", network="frozen", seed=seed, folder=folder / "fields",
                              cache_dir=cache_dir, steps=steps, boxes=boxes)
        height, width = run.model.frame_hw
        rows.append({
            "video": found["video"], "frames": run.model.frame_count, "size": f"{height}×{width}",
            "boxes": boxes, "network": "frozen" if weight is None else "together",
            "weight": weight, "epochs": 0 if weight is None else epochs, "seed": seed,
            **{key: found[key] for key in KEPT}, "psnr_held_db": held_out_psnr(own),
            "psnr_train_db": float(own.run_dir.summary()["eval_psnr_train"]),
            "device": device_name(next(run.model.parameters()).device),
            "commit": code_version()[0]})
        write_json(path, rows[-1])
    return rows


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
