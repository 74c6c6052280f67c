"""What a GPU measures for the rate–quality results: one training, its stored files, and films.

    python -m hnerv_clip.bench.rate_gpu output/rate/head --minutes 9
    python -m hnerv_clip.bench.rate_gpu output/rate/pixels --minutes 9 -p predict_clip False

trains with the settings of `encode`, stores the network as it is and fine-tuned at several rates,
and writes films. Everything goes into FOLDER/rate.json as it is measured, so the same command goes
on where it stopped; `hnerv_clip.bench.rate_quality --run` puts the file into the book's results.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hnerv_clip
from hnerv_clip.config import BUNDLED, BUNDLED_DIM
from hnerv_clip.devices import select_device, synchronise
from hnerv_clip.evaluate import evaluate_stored, store_video
from hnerv_clip.files import write_json
from hnerv_clip.inference import Run, load_run
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.stored.film import write_film
from hnerv_clip.stored.fine_tune import Tuner, fine_tune
from hnerv_clip.stored.make import ENCODE, prepare_encoding
from hnerv_clip.train import train

RATES = (0.0005, 0.001, 0.002, 0.004, 0.01, 0.02)
SETTINGS = {"data_path": "bunny", "preset": "paper", **ENCODE, "teacher": BUNDLED,
            "clip_dim": BUNDLED_DIM, "checkpoint_s": 60.0, "eval_freq": 1000}
PRESETS = ("veryfast", "superfast", "ultrafast")
CPU_FRAMES = 4  # that are decoded on both devices


def measure_gpu(folder: Path, *, settings: dict[str, Any], rates: Sequence[float] = RATES,
                epochs: int = 150, lr: float = 1e-3, minutes: float = math.inf,
                cache_dir: str | Path = "output/cache", device: str = "auto") -> dict[str, Any]:
    """Go on with the programme above; what is done already is not done again.

    Args:
        rates, epochs, lr: of the fine-tunings.
        minutes: no new fine-tuning or film is begun after so many.
    Returns:
        What FOLDER/rate.json holds: commit, dirty, device, settings, trained (the run's summary),
        points, fine_tune_lr, and, where all is done, the films' speed and the difference between
        devices.
    """
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    run_dir, out = folder / "run", folder / "rate.json"
    config, dataset = prepare_encoding({**SETTINGS, **settings, "device": device}, run_dir,
                                       cache_dir=cache_dir)
    train(config, run_dir, cache_dir=cache_dir, dataset=dataset)
    run = load_run(run_dir, cache_dir=cache_dir, device=device)
    target = select_device(device)
    measured = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {
        **dict(zip(("commit", "dirty"), code_version())), "device": device_name(target),
        "settings": run.config.params(), "fine_tune_lr": lr, "points": [],
        "trained": run.run_dir.summary()}
    done = {(point["kind"], point.get("rate")) for point in measured["points"]}

    def keep(point: dict[str, Any], path: Path) -> None:
        measured["points"].append(point | _measure_file(path, run, target))
        write_json(out, measured)

    for bits in (8, 6):
        if (f"{bits} bits", None) not in done:
            path = folder / f"{bits}_bits.hnerv"
            store_video(run.model, run.dataset, path, config=run.config.replace(
                quant_model_bit=bits))
            keep({"kind": f"{bits} bits"}, path)
    tuner = None
    for rate in rates:
        if ("tuned", rate) in done:
            continue
        if time.monotonic() > end:
            return measured
        tuner = tuner or Tuner(run.model, run.dataset, run.config)
        start = time.perf_counter()
        tuned = fine_tune(run.model, run.dataset, run.config, rate=rate, epochs=epochs, lr=lr,
                          tuner=tuner)
        took, path = time.perf_counter() - start, folder / f"rate_{rate:g}.hnerv"
        tuned.store(path, run.dataset, run.config)
        keep({"kind": "tuned", "rate": rate, "tune_s": round(took, 1), "epochs": epochs,
              "history": [tuned.history[0], *tuned.history[9::10]]}, path)
    if "decode_frames_per_s" not in measured and time.monotonic() < end:
        measured |= _measure_films(path := folder / f"rate_{rates[0]:g}.hnerv", target) | \
            _compare_devices(path, target)
        write_json(out, measured)
    return measured


def _measure_file(path: Path, run: Run, device: torch.device) -> dict[str, Any]:
    table, rate_bpp = evaluate_stored(path, run.dataset, device=device)
    own = table[table.source != "interpolated"]
    names = ("psnr_db", "ms_ssim", "clip_similarity", "clip_centred")
    return {"rate_bpp": rate_bpp, "size_bytes": path.stat().st_size,
            **{name: float(own[name].mean()) for name in names if name in own}}


def _measure_films(path: Path, device: torch.device) -> dict[str, Any]:
    """Frames a second of whole films, and of the network alone with frames brought to the CPU; the
    best of two each, after a warm-up."""
    video, speeds = hnerv_clip.open(path, device=str(device)), {}
    chosen = range(len(video))

    def frames_per_s(call) -> float:
        took = []
        for _ in range(3):
            synchronise(device)
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
        return round(len(chosen) / min(took[1:]), 1)

    with tempfile.TemporaryDirectory() as folder:
        for preset in PRESETS:
            film = Path(folder) / f"{preset}.mp4"
            speeds[preset] = frames_per_s(lambda film=film, preset=preset: write_film(
                film, video, chosen, preset=preset, progress=False))
            speeds[f"{preset}, bytes"] = film.stat().st_size
    sizes = {preset: speeds.pop(f"{preset}, bytes") for preset in PRESETS}
    speeds["network alone"] = frames_per_s(lambda: sum(1 for _ in video.frames(chosen)))
    return {"decode_frames_per_s": speeds, "film_bytes": sizes,
            "cpu": device_name(torch.device("cpu"))}


def _compare_devices(path: Path, device: torch.device) -> dict[str, Any]:
    chosen = np.linspace(0, len(hnerv_clip.open(path, device="cpu")) - 1, CPU_FRAMES).astype(int)
    here, there = (np.stack(list(hnerv_clip.open(path, device=name).frames(chosen.tolist())))
                   for name in ("cpu", str(device)))
    difference = np.abs(here.astype(int) - there)
    found = {"gpu_cpu_largest_level": int(difference.max()),
             "gpu_cpu_share_different": float((difference > 0).mean())}
    video = hnerv_clip.open(path, device="cpu")
    if video.has_head:
        start = time.perf_counter()
        _ = video.patch_embeddings
        found["cpu_all_patches_s"] = round(time.perf_counter() - start, 2)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a setting, as of hnerv-clip train")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--epochs", type=int, default=150, help="of each fine-tuning")
    parser.add_argument("--lr", type=float, default=1e-3, help="of each fine-tuning")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--cache_dir", default="output/cache")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    options = {field: getattr(args, field) for field in (
        "rates", "epochs", "lr", "minutes", "cache_dir", "device")}
    measured = measure_gpu(args.folder, settings=dict(args.p), **options)
    complete = "decode_frames_per_s" in measured
    print(f"{args.folder / 'rate.json'}: {len(measured['points'])} files measured; "
          + ("complete" if complete else "not complete: run again"))


if __name__ == "__main__":
    main()
