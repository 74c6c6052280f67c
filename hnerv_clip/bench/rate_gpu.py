"""What a GPU measures for the rate–quality results: one training, its stored files, and films.

    python -m hnerv_clip.bench.rate_gpu output/rate/field --minutes 9
    python -m hnerv_clip.bench.rate_gpu output/rate/larger --minutes 9 -p modelsize 2.2

trains with the preset `best`, fine-tunes at rates from the largest to the smallest, each from the
one before, fits a field on each file and stores it there, and writes films. Everything goes into
FOLDER/rate.json as it is measured, so the same command goes on where it stopped, and
`hnerv_clip.bench.rate_quality --run` puts the file into the book's results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hnerv_clip
from hnerv_clip.bench.decoding import compare_devices, measure_films
from hnerv_clip.codec.about import describe_dataset
from hnerv_clip.codec.video import FIELD, encode_video
from hnerv_clip.config import BUNDLED, BUNDLED_DIM, PRESETS, Config, ConfigError
from hnerv_clip.devices import select_device, synchronise
from hnerv_clip.evaluate import evaluate_stored
from hnerv_clip.field.fit_run import sampling_of
from hnerv_clip.field.query import Field, load_field
from hnerv_clip.files import write_json
from hnerv_clip.inference import embed_frames, load_run
from hnerv_clip.metrics import centred_cosine, cosine
from hnerv_clip.model import build_model
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.stored.fine_tune import Tuned, Tuner, fine_tune
from hnerv_clip.stored.make import ENCODE, fit_on_file, prepare_encoding
from hnerv_clip.teachers import teacher_embeddings
from hnerv_clip.teachers.boxes import box_targets
from hnerv_clip.train import train

TARGETS = (0.060, 0.055, 0.045)  # bits per pixel of whole files, from the largest
# The weight of bits that a network of so many bits per pixel ends at, about, measured on bunny; and
# how it falls with them
USUAL_RATE, USUAL_BPP, STEEPNESS = 0.01, 0.05, 3.0
RATES = (5e-4, 0.05)  # that a fine-tuning begins with, at least and at most
SETTINGS = {**ENCODE, **PRESETS["best"], "preset": "paper", "data_path": "bunny",
            "teacher": BUNDLED, "clip_dim": BUNDLED_DIM, "head": "field", "field_boxes": 320,
            "checkpoint_s": 60.0, "eval_freq": 1000}
TUNE_BATCH = 2  # frames of a step of fine-tuning
TIMED_STEPS = 20


class _Programme:
    """One training and what is measured of it; `measured` is what FOLDER/rate.json holds."""

    def __init__(self, folder: Path, *, settings: dict[str, Any], cache_dir: str | Path,
                 device: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.out, self.cache_dir = folder, folder / "rate.json", cache_dir
        self.device, self.target = device, select_device(device)
        self.config, self.dataset = prepare_encoding(
            {**SETTINGS, **settings, "device": device}, folder / "run", cache_dir=cache_dir)
        self.tuner: Tuner | None = None

    def make_tuner(self) -> None:
        """Compile the step of fine-tuning, which needs no trained network."""
        model = build_model(self.config.model, frame_hw=self.dataset.video.frame_hw,
                            frame_count=len(self.dataset.video.frames)).to(
            self.target, memory_format=torch.channels_last)
        self.tuner = Tuner(model.eval(), self.dataset, self.tuning)
        self.tuner.reset(model)
        steps = [self.tuner.step(self.batch, rate=USUAL_RATE, lr=0.0, step_lr=0.0)
                 for _ in range(Tuner.WARM_UP + 2)]
        if not torch.allclose(steps[0], steps[-1], rtol=0.01):
            warnings.warn(f"a captured step measures {steps[-1].tolist()} where a plain one "
                          f"measures {steps[0].tolist()}: steps are not captured", stacklevel=2)
            self.tuner.captures = False

    def prepare(self) -> None:
        """Fill the caches that `measure_gpu` reads: of the compiler and of the teacher."""
        if self.config.model.head == FIELD:
            options = {"cache_dir": self.cache_dir, "device": self.device}
            box_targets(self.dataset.video, self.dataset.split.train, self.config.teacher,
                        sampling_of(self), **options)
            teacher_embeddings(self.dataset.video, self.dataset.grid, self.config.teacher,
                               **options)
        self.make_tuner()

    @property
    def tuning(self) -> Config:
        """The run's settings, with the batch of fine-tuning."""
        return self.config.replace(batch_size=min(TUNE_BATCH, len(self.dataset.split.train)))

    @property
    def batch(self) -> torch.Tensor:
        """Frames of one step."""
        return torch.from_numpy(self.dataset.split.train)[:self.tuning.train.batch_size].to(
            self.target)

    def epochs_in(self, seconds: float) -> int:
        """Epochs of fine-tuning that take so long."""
        start = time.perf_counter()
        for _ in range(TIMED_STEPS):
            self.tuner.step(self.batch, rate=USUAL_RATE, lr=0.0, step_lr=0.0)
        synchronise(self.target)
        step_s = (time.perf_counter() - start) / TIMED_STEPS
        return int(seconds / step_s / -(-len(self.dataset.split.train) // len(self.batch)))

    def begin(self) -> dict[str, Any]:
        """Train, or go on with what is there."""
        train(self.config, self.folder / "run", cache_dir=self.cache_dir, dataset=self.dataset)
        self.run = load_run(self.folder / "run", cache_dir=self.cache_dir, device=self.device)
        if self.out.exists():
            return json.loads(self.out.read_text(encoding="utf-8"))
        trained = dict(self.run.run_dir.summary())
        if self.run.config.model.head == FIELD:
            field = load_field(self.run)
            trained["eval_clip_similarity_all"] = self.agreement(field.embed(
                np.arange(len(self.dataset.video.frames)), self.dataset.grid.boxes).numpy()
                )["clip_similarity"]
        return {**dict(zip(("commit", "dirty"), code_version())),
                "device": device_name(self.target), "settings": self.run.config.params(),
                "points": [], "trained": trained}

    def agreement(self, embeddings: np.ndarray) -> dict[str, float]:
        """Cosine to the teacher at the patches, raw and mean-centered over the training frames."""
        teacher = teacher_embeddings(self.dataset.video, self.dataset.grid, self.config.teacher,
                                     cache_dir=self.cache_dir, device=self.device).numpy()
        centre = teacher[self.dataset.split.train].mean((0, 1))
        return {"clip_similarity": float(cosine(embeddings, teacher).mean()),
                "clip_centred": float(centred_cosine(embeddings, teacher, centre).mean())}

    def store(self, path: Path, tuned: Tuned, field: Field | None = None) -> dict[str, Any]:
        """Write a file with its field, which is fitted on it where none is given.

        Returns:
            field_bytes and field_s; nothing for a run without a field.
        """
        config, start = self.run.config, time.perf_counter()
        tuned.store(path, self.dataset, config)
        if config.model.head != FIELD:
            return {}
        before = path.stat().st_size
        field = field or fit_on_file(self.run, path, cache_dir=self.cache_dir, device=self.device)
        steps = {f"{FIELD}.{name}": step for name, step in field.steps.items()}
        size = encode_video(tuned.model, tuned.embeddings, path, config=config, field=field.head,
                            steps=tuned.steps | steps, about=describe_dataset(self.dataset, config))
        return {"field_bytes": size - before, "field_s": round(time.perf_counter() - start, 1)}

    def store_trained(self, path: Path) -> dict[str, Any]:
        """Write the network as it was trained, likewise."""
        model, field = self.run.model, None
        with torch.inference_mode():
            embeddings = embed_frames(model, self.dataset) if model.kind == "hybrid" else None
        if self.run.config.model.head == FIELD:
            field = load_field(self.run)
        return self.store(path, Tuned(model, embeddings, {}), field)

    def measure(self, path: Path) -> dict[str, Any]:
        """Rate, quality and agreement of a file."""
        table, rate_bpp = evaluate_stored(path, self.dataset, device=self.target)
        own = table[table.source != "interpolated"]
        names = ("psnr_db", "ms_ssim", "clip_similarity", "clip_centred")
        found = {"rate_bpp": rate_bpp, "size_bytes": path.stat().st_size,
                 **{name: float(own[name].mean()) for name in names if name in own}}
        video = hnerv_clip.open(path, device=str(self.target))
        return found | (self.agreement(video.patch_embeddings) if video.has_field else {})


def network_bpp(target: float, beside_bpp: float) -> float:
    """What a file of `target` bits per pixel leaves for its network beside the field's.

    Raises:
        ConfigError: nothing.
    """
    if target <= beside_bpp:
        raise ConfigError(f"--targets {target:g} leaves nothing for the network: the field alone "
                          f"takes {beside_bpp:.4f} bits per pixel. Name larger ones, or give a "
                          "larger field_rate_weight, which makes the field smaller")
    return target - beside_bpp


def measure_gpu(folder: Path, *, settings: dict[str, Any], targets: Sequence[float] = TARGETS,
                epochs: int = 300, more_epochs: int = 100, tune_s: float = math.inf,
                lr: float = 1e-3, minutes: float = math.inf, films: bool = True,
                cache_dir: str | Path = "output/cache", device: str = "auto") -> dict[str, Any]:
    """Go on with the programme above; what is done already is not done again.

    Args:
        targets: bits per pixel of whole files, falling.
        epochs, more_epochs: of the first fine-tuning, and of each one that goes on from there.
        tune_s: longest time of the first one; those that go on take their share of it.
        lr: of the first one; half for those that go on.
        minutes: no new fine-tuning or film is begun after so many.
        films: write films of the first file, and compare devices.
    Returns:
        What FOLDER/rate.json holds: commit, dirty, device, settings, trained (the run's summary),
        points, fine_tune_lr, and, where all is done, the films' speed and the difference between
        devices.
    """
    end = time.monotonic() + 60 * minutes
    work = _Programme(folder, settings=settings, cache_dir=cache_dir, device=device)
    measured = work.begin() | {"fine_tune_lr": lr}
    done = {(point["kind"], point.get("target_bpp")) for point in measured["points"]}

    def keep(point: dict[str, Any], path: Path) -> None:
        measured["points"].append(point | work.measure(path))
        write_json(work.out, measured)

    if ("8 bits", None) not in done:
        path = folder / "8_bits.hnerv"
        keep({"kind": "8 bits", **work.store_trained(path)}, path)
    pixels = work.run.model.frame_count * math.prod(work.run.model.frame_hw)
    beside_bpp = 8 * measured["points"][0].get("field_bytes", 0) / pixels  # what no step estimates
    tuned: Tuned | None = None
    rate, before = USUAL_RATE, USUAL_BPP
    for target in sorted(targets, reverse=True):
        path = folder / f"{target:g}_bpp.hnerv"
        if ("tuned", target) in done:
            continue
        if time.monotonic() > end:
            break
        if work.tuner is None:
            start = time.perf_counter()
            work.make_tuner()
            measured["compile_s"] = round(time.perf_counter() - start, 1)
        planned, share = (epochs, 1.0) if tuned is None else (more_epochs, more_epochs / epochs)
        planned = min(planned, max(1, work.epochs_in(tune_s * share))) if tune_s < math.inf else \
            planned
        start, begun, aim = time.perf_counter(), tuned, network_bpp(target, beside_bpp)
        rate = min(max(rate * (before / aim) ** STEEPNESS, RATES[0]), RATES[1])
        tuned = fine_tune(work.run.model, work.dataset, work.tuning, rate=rate, epochs=planned,
                          lr=lr if begun is None else lr / 2, tuner=work.tuner, start=begun,
                          target_bpp=aim)
        took, before = time.perf_counter() - start, tuned.history[-1]["rate_bpp"]
        rate = tuned.history[-1]["rate"]
        extra = work.store(path, tuned)
        beside_bpp = 8 * path.stat().st_size / pixels - before
        keep({"kind": "tuned", "target_bpp": target, "rate": rate, "tune_s": round(took, 1),
              "epochs": planned, "goes_on": begun is not None, **extra,
              "history": [tuned.history[0], *tuned.history[9::10]]}, path)
        if films and "decode_frames_per_s" not in measured:
            measured |= measure_films(path, work.target) | compare_devices(path, work.target)
            write_json(work.out, measured)
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a setting, as of hnerv-clip train")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS,
                        help="bits per pixel of whole files")
    parser.add_argument("--epochs", type=int, default=300, help="of the first fine-tuning")
    parser.add_argument("--more_epochs", type=int, default=100, help="of each that goes on")
    parser.add_argument("--tune_s", type=float, default=math.inf,
                        help="longest time of the first fine-tuning, in seconds")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the first fine-tuning")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--films", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cache_dir", default="output/cache")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile_only", action="store_true", help="compile the step of "
                        "fine-tuning and make the teacher's embeddings for another call, beside "
                        "its training, and stop")
    args = vars(parser.parse_args(argv))
    folder, settings = args.pop("folder"), dict(args.pop("p"))
    if args.pop("compile_only"):
        _Programme(folder, settings=settings, cache_dir=args["cache_dir"],
                   device=args["device"]).prepare()
        return
    measured = measure_gpu(folder, settings=settings, **args)
    files = sum(point["kind"] == "tuned" for point in measured["points"])
    print(f"{folder / 'rate.json'}: {files} of {len(args['targets'])} fine-tuned files"
          + ("" if files == len(args["targets"]) else "; run again"))


if __name__ == "__main__":
    main()
