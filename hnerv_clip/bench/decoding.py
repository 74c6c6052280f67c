"""Decoding speed: of a network, from embeddings to frames on the device; of a file, to a film.

    python -m hnerv_clip.bench.decoding video.hnerv films.json

measures what the player makes of a file on this machine, and how far its devices differ;
`hnerv_clip.bench.rate_quality --films` puts that into the book's results.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import hnerv_clip
from hnerv_clip.dataset import Dataset
from hnerv_clip.devices import (
    no_bfloat16,
    no_kernels,
    select_device,
    synchronise,
    usable_cores,
)
from hnerv_clip.files import check_free, write_json
from hnerv_clip.inference import BATCH, embed_frames
from hnerv_clip.model import HNeRV
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.stored.film import plan_segments, write_film

try:
    from hnerv_clip.engines.fused import network as fused
    from hnerv_clip.engines.fused.decoding import Decoder
except ImportError:  # no Triton: it is made for Linux
    fused = None

PASS_S = 2.0  # a pass of `measure_decoding` is shorter, or one batch
FILMS = ("veryfast", "superfast", "ultrafast")  # presets of x264
NETWORK, FETCHED = "network alone", "frames brought to the CPU"
CPU_FRAMES = 4  # that are decoded on both devices


def decoders(model: HNeRV) -> tuple[str, ...]:
    """How frames can be decoded here: plain, and fused where a GPU runs our kernels."""
    device = next(model.parameters()).device
    known = not (no_kernels(device) or no_bfloat16(device) or fused.unsupported(model))
    return ("plain", "fused") if known else ("plain",)


@torch.inference_mode()
def measure_decoding(model: HNeRV, dataset: Dataset, *, batch_size: int = BATCH, repeats: int = 5,
                     decoder: str | None = None) -> pd.DataFrame:
    """Decoding speed from stored embeddings to frames on the device: RGB, both heads, CLIP alone.

    A pass is 8 batches; where those take more than `PASS_S`, fewer, at least one.

    Args:
        decoder: one of `decoders`, the last by default.
    Returns:
        A row per mode: frames_per_s (median over passes), frames_per_s_min, frames_per_s_max,
        n passes, batch_size, decoder.
    """
    embeddings = embed_frames(model, dataset, np.arange(min(model.frame_count, 8 * batch_size)))
    embeddings = embeddings.repeat(-(-8 * batch_size // len(embeddings)), 1, 1, 1)[:8 * batch_size]
    decoder = decoder or decoders(model)[-1]
    centres = dataset.grid.centres.to(embeddings.device)
    with_clip = model.config.predict_clip
    if decoder == "fused":
        decode = Decoder(model, batch=batch_size, centres=centres if with_clip else None)
    else:
        def decode(chunk: Tensor, *, rgb: bool, clip: bool) -> None:
            stages = model.stages(chunk, last=None if rgb else model.clip_stages[-1])
            if rgb:
                model.rgb(stages[-1])
            if clip:
                model.clip_at(stages, centres)

    modes = {"RGB": (True, False)}
    if with_clip:
        modes |= {"RGB and embeddings": (True, True), "embeddings only": (False, True)}
    rows = []
    for name, (rgb, clip) in modes.items():
        def seconds(chunks: tuple[Tensor, ...], rgb: bool = rgb, clip: bool = clip) -> float:
            synchronise(embeddings.device)
            start = time.perf_counter()
            for chunk in chunks:
                decode(chunk, rgb=rgb, clip=clip)
            synchronise(embeddings.device)
            return time.perf_counter() - start

        chunks = embeddings.split(batch_size)
        seconds(chunks[:1])  # warm-up
        chunks = chunks[:max(1, int(PASS_S / seconds(chunks[:1])))]
        rates = [sum(map(len, chunks)) / seconds(chunks) for _ in range(repeats)]
        rows.append({"mode": name, "frames_per_s": float(np.median(rates)),
                     "frames_per_s_min": min(rates), "frames_per_s_max": max(rates),
                     "n": repeats, "batch_size": batch_size, "decoder": decoder})
    return pd.DataFrame(rows)


def measure_films(path: Path, device: torch.device, *, presets: Sequence[str] = FILMS,
                  repeats: int = 2) -> dict[str, Any]:
    """Frames a second of a file's player: of whole films, and of what comes before the encoder.

    Args:
        presets: x264's.
        repeats: the best of so many, after a warm-up.
    Returns:
        decode_frames_per_s by preset, and of the network alone, with frames that stay on the
        device, and those brought to the CPU as RGB; film_bytes by preset; picture_precision;
        encoders and segment_frames, see `plan_segments`; cpu; open_s, from a file that nothing was
        read of to its first frame.
    """
    video = hnerv_clip.open(path, device=str(device))
    synchronise(device)
    start = time.perf_counter()
    video[0]
    open_s, chosen = time.perf_counter() - start, range(len(video))

    def frames_per_s(call: Callable[[], object]) -> float:
        took = []
        for _ in range(1 + repeats):
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            took.append(time.perf_counter() - start)
        return round(len(chosen) / min(took[1:]), 1)

    speeds, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for preset in presets:
            film = Path(folder) / f"{preset}.mp4"
            speeds[preset] = frames_per_s(lambda film=film, preset=preset: write_film(
                film, video, chosen, preset=preset, progress=False))
            sizes[preset] = film.stat().st_size
    speeds[NETWORK] = frames_per_s(lambda: sum(map(len, video.batches(chosen))))
    speeds[FETCHED] = frames_per_s(lambda: sum(1 for _ in video.frames(chosen)))
    encoders, length = plan_segments(len(video), video.size, workers=usable_cores())
    return {"decode_frames_per_s": speeds, "film_bytes": sizes,
            "picture_precision": "fp16" if video.half else "fp32", "encoders": encoders,
            "segment_frames": length, "cpu": device_name(torch.device("cpu")),
            "open_s": round(open_s, 3)}


def compare_devices(path: Path, device: torch.device, *, frames: int = CPU_FRAMES
                    ) -> dict[str, Any]:
    """How far the pictures of one file differ between the CPU and another device.

    Returns:
        gpu_cpu_largest_level, of 255, and gpu_cpu_share_different, of all values; and, where there
        is a head, cpu_all_patches_s.
    """
    video = hnerv_clip.open(path, device="cpu")
    chosen = np.linspace(0, len(video) - 1, min(frames, len(video))).astype(int).tolist()
    there = hnerv_clip.open(path, device=str(device))
    largest = different = values = 0
    for here, other in zip(video.frames(chosen), there.frames(chosen), strict=True):
        difference = np.abs(here.astype(int) - other)
        largest = max(largest, int(difference.max()))
        different, values = different + int((difference > 0).sum()), values + difference.size
    found = {"gpu_cpu_largest_level": largest, "gpu_cpu_share_different": different / values,
             "gpu_cpu_frames": len(chosen)}
    if video.has_head:
        start = time.perf_counter()
        _ = video.patch_embeddings
        found["cpu_all_patches_s"] = round(time.perf_counter() - start, 2)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above.

    Raises:
        RunError: OUT is there.
    """
    parser = argparse.ArgumentParser(description="how fast a stored video plays")
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new JSON file")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.add_argument("--presets", nargs="+", default=FILMS, help="of x264")
    parser.add_argument("--frames", type=int, default=CPU_FRAMES, help="compared between devices")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    check_free(args.out, force=args.force)
    device = select_device(args.device)
    measured = {**dict(zip(("commit", "dirty"), code_version())), "device": device_name(device),
                "file_bytes": args.file.stat().st_size,
                **measure_films(args.file, device, presets=args.presets)}
    write_json(args.out, measured)  # what comes next takes a CPU's time
    write_json(args.out, measured | compare_devices(args.file, device, frames=args.frames))


if __name__ == "__main__":
    main()
