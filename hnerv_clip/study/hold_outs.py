"""Does a field answer for frames that lie further from any that it was fitted to?

    python -m hnerv_clip.study.hold_outs output/hold_outs bunny FILE … --publish

Small networks of some videos, each trained for the picture alone on three parts of the frames, a
field fitted to each on its frozen weights: one frame in 5 held out, one in 16, and blocks of two
seconds. Such networks, small enough for a CPU, show how a field generalizes in time, not how good
it can be. `--publish` puts all rows of the folder into `book/results/hold_outs.json`; without
videos it does nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hnerv_clip.config import BUNDLED, BUNDLED_DIM, Config, TeacherConfig
from hnerv_clip.field.fit import FitSettings
from hnerv_clip.field.fit_run import (
    CPU_BATCH,
    TEST_BOXES,
    TEST_SEED,
    evaluate_field,
    fit_head,
    summarise_field,
)
from hnerv_clip.files import write_json
from hnerv_clip.inference import Run, load_run, sources_of
from hnerv_clip.metrics import bracket_frames
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.study.fields import box_skill, held_out_psnr
from hnerv_clip.teachers import load_teacher
from hnerv_clip.teachers.base import describe_teacher
from hnerv_clip.teachers.boxes import BoxSampling, box_targets, embed_boxes
from hnerv_clip.train import train
from hnerv_clip.video import label_video, load_video

FILE = "hold_outs.json"
FRAMES, RATE = 40, 8.0  # of each video, at about so many a second
BLOCK_S = 2.0
ASKED = 250  # boxes that tell what time alone allows
SETTINGS = {"teacher": BUNDLED, "clip_dim": BUNDLED_DIM, "predict_clip": False, "modelsize": 0.25,
            "epochs": 30, "batch_size": 1, "lr": 5e-3, "eval_freq": 30, "field_boxes": 32,
            "field_steps": 2000, "frame_limit": FRAMES}


def hold_out_splits(rate: float) -> dict[str, str]:
    """`data_split` by name, for so many frames a second: whole blocks alternate."""
    block = round(BLOCK_S * rate)
    return {"one frame in 5": "4_5_5", "one frame in 16": "15_16_16",
            "blocks of 2 s": f"{block}_{block}_{2 * block}"}


def measure_hold_outs(data_path: str, folder: Path, *, cache_dir: str | Path, seed: int = 0,
                      betweens: Sequence[float] = (0.5,), height: int = 168, **changes: Any
                      ) -> list[dict[str, Any]]:
    """Train, fit and measure each hold-out of a video; what is in the folder is not made again.

    Args:
        betweens: see `field.fit.FitSettings`; a field for each.
        height: frames are resized to it, and to a width that divides by 24.
        changes: settings other than `SETTINGS`.
    Returns:
        Rows: video, size, frames, held (frames), hold_out, between (share of frames that a fit's
        steps see as interpolated), seed, changes, any_train, any_held, eight_held,
        any_held_centered, interpolated_held (of `interpolated_skill`), psnr_held_db, device,
        commit.
    """
    full = load_video(Config.from_params(data_path=data_path, frame_limit=2).video)
    stride = max(1, round(full.fps / RATE))
    width = 24 * round(height * full.frame_hw[1] / full.frame_hw[0] / 24)
    rows = []
    for name, split in hold_out_splits(full.fps / stride).items():
        label = f"{label_video(data_path)}_{name.replace(' ', '_')}_s{seed}"
        path = folder / f"{label}.json"
        if path.is_file():
            rows += read_rows(path, cache_dir=cache_dir)
            continue
        config = Config.from_params(**{**SETTINGS, "data_path": data_path, "data_split": split,
                                       "frame_stride": stride, "seed": seed,
                                       "resize_list": f"{height}_{width}", **changes})
        train(config, folder / label, cache_dir=cache_dir, progress=False)
        run = load_run(folder / label, cache_dir=cache_dir)
        own, time_alone = [], interpolated_skill(run, cache_dir=cache_dir)
        for between in betweens:
            field = fit_head(run, cache_dir=cache_dir, progress=False, settings=FitSettings(
                steps=config.train.field_steps, rate_weight=config.train.field_rate_weight,
                seed=seed, between=between, **CPU_BATCH))
            found = summarise_field(evaluate_field(run, field, cache_dir=cache_dir,
                                                   progress=False))
            at = found.set_index(["where", "split", "source"]).sort_index()
            first, last = sources_of(run.model)[0], sources_of(run.model)[-1]
            held = at.loc[("any box", "held_out", last)]
            row = {"video": run.dataset.video.name, "size": f"{height}×{width}",
                   "frames": run.model.frame_count, "held": len(run.dataset.split.val),
                   "hold_out": name, "between": between, "seed": seed, "changes": changes,
                   "any_train": at.loc[("any box", "train", first)].skill,
                   "any_held": held.skill, "any_held_centered": held.clip_centered,
                   "eight_held": at.loc[("patches", "held_out", last)].skill,
                   "interpolated_held": time_alone, "psnr_held_db": held_out_psnr(run),
                   "device": device_name(next(run.model.parameters()).device),
                   "commit": code_version()[0]}
            own.append({key: round(float(value), 4) if isinstance(value, (float, np.floating))
                        else value for key, value in row.items()})
        write_json(path, own)
        rows += own
    return rows


def interpolated_skill(run: Run, *, cache_dir: str | Path) -> float:
    """What time alone allows: the skill of the teacher's embeddings of the very boxes that
    `evaluate_field` asks in held-out frames, interpolated from the training frames around.

    Of those boxes about `ASKED`, as the teacher has to look at each in two frames.
    """
    video, train = run.dataset.video, np.asarray(run.dataset.split.train)
    every = np.arange(len(video.frames))
    held = np.setdiff1d(every, train)
    boxes, truth = box_targets(
        video, every, run.config.teacher,
        BoxSampling(count=TEST_BOXES, shapes=TEST_BOXES, seed=TEST_SEED), cache_dir=cache_dir,
        progress=False)
    teacher = load_teacher(run.config.teacher, next(run.model.parameters()).device)
    before, after, share = bracket_frames(held, train)
    chosen = slice(None, None, max(1, round(len(held) * boxes.shape[1] / ASKED)))
    left, right = (embed_boxes(teacher, video.frames[near], boxes[held][:, chosen]).float().cpu()
                   for near in (before, after))
    way = torch.as_tensor(share).float()[:, None, None]
    found = F.normalize(torch.lerp(left, right, way), dim=-1)
    return box_skill(found, truth[held][:, chosen].float(), truth[train].float().mean((0, 1)))


def read_rows(path: Path, *, cache_dir: str | Path) -> list[dict[str, Any]]:
    """The rows that a file of the folder keeps; what older ones lack is added from their run."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if any("interpolated_held" not in row for row in rows):
        run = load_run(path.with_suffix(""), cache_dir=cache_dir)
        known = round(interpolated_skill(run, cache_dir=cache_dir), 4)
        rows = [{"changes": {}, **row, "interpolated_held": known} for row in rows]
        write_json(path, rows)
    return rows


def collect_hold_outs(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Put rows of `measure_hold_outs` into `out`/hold_outs.json, beside or for what is there.

    Rows of one video, size, device, hold-out, between, seed and changes replace each other.
    """
    path = out / FILE
    keys = ("video", "size", "device", "hold_out", "between", "seed", "changes")
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    kept = {json.dumps([row[key] for key in keys]): row for row in [*known, *rows]}
    settings = Config.from_params(**SETTINGS)
    write_json(path, {
        "about": {"teacher": describe_teacher(TeacherConfig(teacher=BUNDLED)).label,
                  "modelsize": settings.model.modelsize, "epochs": settings.train.epochs,
                  "boxes_a_frame": settings.train.field_boxes,
                  "steps": settings.train.field_steps,
                  "made by": "hnerv_clip.study.hold_outs.measure_hold_outs"},
        "rows": list(kept.values())})


def main(argv: Sequence[str] | None = None) -> None:
    """The command in this module's first lines; prints the rows, which stay in the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("videos", nargs="*", help="bunny, bikes, carphone or files")
    parser.add_argument("--cache_dir", default="output/cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--between", type=float, nargs="+", default=[0.5])
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a setting other than those of all, such as -p optimizer adan")
    parser.add_argument("--publish", action="store_true", help=f"put the folder's rows into "
                                                                f"book/results/{FILE}")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for video in args.videos:
        for row in measure_hold_outs(video, args.folder, cache_dir=args.cache_dir, seed=args.seed,
                                     betweens=args.between, **dict(args.p)):
            print(json.dumps(row, ensure_ascii=False), flush=True)
    if args.publish:
        collect_hold_outs([row for path in sorted(args.folder.glob("*.json"))
                           for row in read_rows(path, cache_dir=args.cache_dir)],
                          resolve_path("book/results"))


if __name__ == "__main__":
    main()
