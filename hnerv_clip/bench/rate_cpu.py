"""What a CPU measures for the rate–quality results: other codecs, side files, and times.

    python -m hnerv_clip.bench.rate_cpu book/results/rate_quality.json

puts `side_files` and `times` into the file that holds the other codecs' points; `--points` measures
these, where the file has none, and `--only` times some codecs; both leave all else as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hnerv_clip
from hnerv_clip.bench.rate_quality import GOALS
from hnerv_clip.bench.video_codecs import available, measure_codec, time_codecs
from hnerv_clip.codec.video import encode_video
from hnerv_clip.config import BUNDLED, BUNDLED_DIM, Config
from hnerv_clip.dataset import Dataset, prepare_dataset, resolve_config
from hnerv_clip.files import write_json
from hnerv_clip.metrics import centred_cosine, cosine
from hnerv_clip.model import build_model
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.verify.side_file import write_side_file
from hnerv_clip.video import load_video

BUDGETS = tuple(1000 * kb for kb in (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96))
SETTINGS = {"data_path": "bunny", "preset": "paper", "data_split": "1_1_1", "teacher": BUNDLED,
            "clip_dim": BUNDLED_DIM, "predict_clip": True}
OWN_FRAMES = 8  # of this codec that are decoded to be timed


def side_file_curve(embeddings: np.ndarray, budgets: Sequence[int] = BUDGETS
                    ) -> list[dict[str, Any]]:
    """The best side file at each size: what the embeddings of a film's patches take beside it.

    Args:
        embeddings: [T, P, D] unit vectors.
        budgets: bytes; those that do not hold the mean are left out.
    Returns:
        size_bytes, components, bits, clip_similarity and clip_centred (means of cosines with what
        went in, raw and less the mean over frames and patches).
    """
    centre, rows = embeddings.mean(axis=(0, 1)), []
    for budget in budgets:
        try:
            side = write_side_file(embeddings, budget)
        except ValueError:
            continue
        rows.append({"size_bytes": side.size_bytes, "components": side.components,
                     "bits": side.bits,
                     "clip_similarity": float(cosine(side.embeddings, embeddings).mean()),
                     "clip_centred": float(centred_cosine(side.embeddings, embeddings,
                                                          centre).mean())})
    return rows


def time_decoding(dataset: Dataset, config: Config, *, frames: int = OWN_FRAMES) -> dict[str, Any]:
    """What this codec takes to open a file of these settings and to decode frames of it, on one
    thread; how long that takes depends on no weight, so the network is not trained.

    Returns:
        open_cpu_s, decode_cpu_s (of `frames`) and frames.
    """
    count = len(dataset.video.frames)
    model = build_model(config.model, frame_hw=dataset.video.frame_hw, frame_count=count)
    shape = (count, model.plan.embed_channels, *(
        side // np.prod(config.model.enc_strds) for side in model.plan.padded_hw))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "v.hnerv"
            encode_video(model.eval(), torch.randn(shape), path, config=config)
            start = time.process_time()
            video = hnerv_clip.open(path, device="cpu")
            _ = video[0]
            first = time.process_time()
            _ = video[:frames]
            took = time.process_time() - first
    finally:
        torch.set_num_threads(threads)
    return {"open_cpu_s": round(max(first - start - took / frames, 0.0), 3),
            "decode_cpu_s": round(took, 3), "frames": frames}


def measure_cpu(path: Path, *, cache_dir: str | Path = "output/cache",
                settings: dict[str, Any] = SETTINGS, without: Sequence[str] = ()
                ) -> dict[str, Any]:
    """Measure both and put them into the file at `path`, with commit and device, one by one.

    Args:
        without: codecs that are not timed, as some take minutes for a film.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    config = Config.from_params(**settings)
    dataset = prepare_dataset(config, cache_dir, device="cpu")
    config, frames = resolve_config(config, dataset.video), dataset.video.frames
    commit, dirty = code_version()
    made = {"device": device_name(torch.device("cpu")), "commit": commit, "dirty": dirty}
    kept["side_files"] = made | {"teacher": dataset.teacher_label,
                                 "points": side_file_curve(dataset.embeddings.numpy())}
    times = kept["times"] = made | {"frames": len(frames), "own": time_decoding(dataset, config),
                                    "codecs": []}
    points = [point for point in kept["codecs"] if point["codec"] not in without]
    for row in time_codecs(frames, points, psnr_db=GOALS["psnr_db"], fps=dataset.video.fps):
        times["codecs"].append(row)
        write_json(path, kept)
    return kept


def measure_points(path: Path, *, settings: dict[str, Any] = SETTINGS) -> dict[str, Any]:
    """`measure_codec` at each quality of each codec that the file, if it is there, has no point of;
    it is written after each."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    points = kept.setdefault("codecs", [])
    video, done = load_video(Config.from_params(**settings).video), {
        (point["codec"], point["crf"]) for point in points}
    for setting in available():
        for crf in setting.crfs:
            if (setting.label, crf) not in done:
                points.append(measure_codec(video.frames, setting, crf, fps=video.fps))
                write_json(path, kept)
    return kept


def time_more(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Time some codecs and put them into the file at `path`, each with its own commit and device.

    Raises:
        ValueError: no point of such a codec is there.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    if missing := set(names) - {point["codec"] for point in kept["codecs"]}:
        raise ValueError(f"{path} has no points of {sorted(missing)}: it knows "
                         f"{sorted({point['codec'] for point in kept['codecs']})}")
    video = load_video(Config.from_params(**SETTINGS).video)
    made = dict(zip(("commit", "dirty"), code_version())) | {
        "device": device_name(torch.device("cpu"))}
    points = [point for point in kept["codecs"] if point["codec"] in names]
    for row in time_codecs(video.frames, points, psnr_db=GOALS["psnr_db"], fps=video.fps):
        others = [old for old in kept["times"]["codecs"] if old["codec"] != row["codec"]]
        kept["times"]["codecs"] = [*others, row | made]
        write_json(path, kept)
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--cache_dir", default="output/cache")
    parser.add_argument("--without", nargs="+", default=[], metavar="CODEC",
                        help="not timed, for example 'x265 veryslow'")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--points", action="store_true",
                       help="measure the codecs' points that the file lacks, nothing else")
    alone.add_argument("--only", nargs="+", default=[], metavar="CODEC", help="time these alone")
    args = parser.parse_args(argv)
    if args.points:
        measure_points(args.path)
        return
    if args.only:
        time_more(args.path, args.only)
        return
    measure_cpu(args.path, cache_dir=args.cache_dir, without=args.without)


if __name__ == "__main__":
    main()
