"""What each part of the preset `best` gives: the trainings of page 20, and their rows.

Groups as in `recipe_h100.json` of the results: the preset and changes of it (`preset`), its parts
added to HNeRV's settings (`added`), single changes of HNeRV's settings at twice its learning rate
(`rows`), other numbers of values (`sizes`), every other frame held out (`held_out`), and other
videos (`videos`). What a search found (`recipe_search.json`) is trained as a whole, too.
`study.book_runs` trains them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hnerv_clip.config import PRESETS, Config
from hnerv_clip.files import read_json
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.sizes import choose_modelsize
from hnerv_clip.video import load_video

HNERV, BEST, FOUND = "HNeRV's settings", "preset best", "found by the search"
BASE: dict[str, Any] = {"precision": "bf16", "predict_clip": False, "data_split": "1_1_1"}
PAPER = {"preset": "paper", "data_path": "bunny", **BASE}
PRESET = PRESETS["best"]
ADAM = {"optimizer": "adam", "lr": 2e-3}
EVERY_OTHER = {"data_split": "1_1_2"}
# The best trial of `recipe_search.json`, beside the preset
SEARCHED = PRESET | {"lr": 5.56e-3, "lr_type": "cosine_0.243891_1_0.1", "reduce": 1.3123}
# By group: of each change the settings, over `PAPER`, and the number of seeds
GROUPS: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "preset": {change: (PRESET | own, seeds) for change, own, seeds in (
        (BEST, {}, 3), ("Adam at 2e-3", ADAM, 3), ("batch 2", {"batch_size": 2}, 3),
        ("300 epochs", {"epochs": 300}, 3), ("340 epochs", {"epochs": 340}, 1),
        ("300 epochs, Adam at 2e-3", ADAM | {"epochs": 300}, 2), ("lr 5e-3", {"lr": 5e-3}, 1),
        ("Adam at 3e-3", ADAM | {"lr": 3e-3}, 1),
        ("300 epochs, lr 2.5e-3", {"epochs": 300, "lr": 2.5e-3}, 1),
        ("300 epochs, lr 5e-3", {"epochs": 300, "lr": 5e-3}, 1),
        ("300 epochs, lr 8e-3", {"epochs": 300, "lr": 8e-3}, 1),
        ("300 epochs, lr 1.2e-2", {"epochs": 300, "lr": 1.2e-2}, 1), (FOUND, SEARCHED, 2))},
    "added": {change: (own, 3) for change, own in (
        ("batch 1", {"batch_size": 1}), ("lr 2e-3", {"lr": 2e-3}),
        ("Adan at 3.5e-3", {"optimizer": "adan", "lr": 3.5e-3}), ("600 epochs", {"epochs": 600}))},
    "held_out": {HNERV: (EVERY_OTHER, 1), BEST: (PRESET | EVERY_OTHER, 1)},
    "sizes": {f"{size:g} M values": (PRESET | {"modelsize": size}, 1) for size in (0.75, 3.0)},
    # Where a change alters the number of values, `modelsize` brings it back to within 1.5%
    "rows": {change: ({"lr": 2e-3} | own, 1) for change, own in (
        ("lr 2e-3", {}), ("lr 4e-3", {"lr": 4e-3}), ("batch 1", {"batch_size": 1}),
        ("two decoder blocks a stage", {"num_blks": "1_2", "modelsize": 1.39}),
        ("reduce 1.4", {"reduce": 1.4}), ("reduce 1", {"reduce": 1.0, "modelsize": 1.52}),
        ("kernels up to 3", {"ks": "0_1_3", "modelsize": 1.52}),
        ("embedding twice as wide", {"enc_dim": "64_32"}), ("L1 loss", {"loss": "L1"}),
        ("Swish", {"act": "swish"}), ("batch 1, 600 epochs", {"batch_size": 1, "epochs": 600}),
        ("batch 1, 1200 epochs", {"batch_size": 1, "epochs": 1200}))} | {
            "paper": ({}, 1)},  # for its time: nine seeds lie in `fidelity.json`
}
# The first frames of videos, with as many values per pixel as 1.5 M are for bunny. What lies in
# `FOLDER` of the trainings' folder joins those that come with the library
FRAMES, BUILT_IN, FOLDER = 64, ("bikes", "carphone"), "videos"
RECIPES: dict[str, dict[str, Any]] = {HNERV: {}, BEST: PRESET, FOUND: SEARCHED}
WHOLE = "whole.json"  # in a run's folder: seconds from its start to its end, where it ran alone


def part_names(outf: Path) -> list[tuple[str, str, str]]:
    """(group, change, seed) of every training; of `videos` the change is `RECIPE: VIDEO`."""
    names = [(group, change, str(seed)) for group, changes in GROUPS.items()
             for change, (_, seeds) in changes.items() for seed in range(seeds)]
    files = sorted(path.name for path in (outf / FOLDER).glob("*") if path.is_file())
    return names + [("videos", f"{recipe}: {video}", "0") for video in (*BUILT_IN, *files)
                    for recipe in RECIPES]


def part_folder(outf: Path, group: str, change: str, seed: str) -> Path:
    """Of a training's run: spaces become underscores, which an underscore of a name does not."""
    name = change.replace("%", "%25").replace("_", "%5F").replace(" ", "_")
    return outf / "recipe" / group / f"{name}_s{seed}"


def part_config(outf: Path, group: str, change: str, seed: str) -> Config:
    """The settings of a training."""
    if group != "videos":
        settings = PAPER | GROUPS[group][change][0]
    else:
        recipe, video = change.split(": ", 1)
        settings = BASE | {"data_path": video if video in BUILT_IN else str(outf / FOLDER / video),
                           "frame_limit": FRAMES} | RECIPES[recipe]
        frames = load_video(Config.from_params(**settings).video).frames
        settings["modelsize"] = choose_modelsize(tuple(frames.shape[2:]), len(frames))
    config = Config.from_params(**settings | {"seed": int(seed)})
    return config.replace(eval_freq=config.train.epochs)


def part_row(run: RunDir, group: str, change: str) -> dict[str, Any]:
    """What a finished training gave, as a row of its group; PSNR in dB, times in seconds, None
    where other work shared the GPU or the training was resumed; `lr_after_collapse` is the learning
    rate that a collapsed training began again with, else None."""
    summary, config, origin = run.summary(), run.config(), run.provenance()
    train, whole = config.train, run.path / WHOLE
    row: dict[str, Any] = {
        "change": change, "optimizer": train.optimizer, "lr": train.lr,
        "batch_size": train.batch_size, "epochs": train.epochs, "seed": train.seed,
        "lr_after_collapse": origin.get("recoveries", [{}])[-1].get("lr"),
        "modelsize": config.model.modelsize, "stored": summary["part_sizes"]["stored"],
        "size_bytes": summary["size_bytes"], "train_time_s": None, "total_s": None}
    if whole.is_file():
        row["train_time_s"] = round(summary["train_time_s"], 1)
        row["total_s"] = round(read_json(whole, fix="remove it")["seconds"], 1)
    if group == "videos":
        row["recipe"], row["video"] = row.pop("change").split(": ", 1)
    names = {"psnr_db": ("eval_psnr_all", 3), "ms_ssim": ("eval_ms_ssim_all", 5),
             "quantised_psnr_db": ("quantised_eval_psnr_all", 3), "rate_bpp": ("rate_bpp", 4)}
    if group == "held_out":
        names |= {f"psnr_{ours}_db": (f"eval_psnr_{theirs}", 3) for ours, theirs in (
            ("train", "train"), ("held", "val"), ("held_interpolated", "val_interpolated"))}
    measured = {name: round(summary[key], digits) if key in summary else None
                for name, (key, digits) in names.items()}
    commit = origin["commit"][:7] + " with changes" * bool(origin["dirty"])
    return row | measured | {"device": origin["device"], "commit": commit}
