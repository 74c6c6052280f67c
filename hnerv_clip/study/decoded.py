"""What a stored file says of its boxes, against the teacher that looks at the file's own frames.

    python -m hnerv_clip.study.decoded rows.json a.hnerv … -p data_path bunny -p data_split 1_1_1

`data_split` is that of the file's training, which the file does not say: `hnerv-clip encode` trains
on all frames (1_1_1).

Without a field, one would decode the file and run the teacher on its frames. Both answers are
compared with the teacher's for the frames of the video itself, at random boxes and at the patches,
in the frames that trained and in held-out ones. `--publish` puts the rows into
`book/results/decoded_files.json`.
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
from torch import Tensor

from hnerv_clip.codec.container import Header
from hnerv_clip.codec.video import decode_video, open_network
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.devices import select_device
from hnerv_clip.field.fit_run import TEST_BOXES, TEST_SEED
from hnerv_clip.field.query import Field
from hnerv_clip.files import file_digest, write_json
from hnerv_clip.inference import BATCH, interpolate_embeddings
from hnerv_clip.metrics import psnr, skill
from hnerv_clip.model import HNeRV, frame_times
from hnerv_clip.patches import make_grid
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.teachers import load_teacher, teacher_embeddings
from hnerv_clip.teachers.base import Teacher
from hnerv_clip.teachers.boxes import BoxSampling, box_targets, embed_boxes
from hnerv_clip.video import Video, load_video, split_frames

FILE = "decoded_files.json"
LEAST_DB, TRIED = 15.0, 4  # what a file of this video has at least, on so many training frames
SPLIT = ("1_1_1 where it was made by `hnerv-clip encode`, which trains on all frames, else the "
         "run's, such as 4_5_5")


def measure_file(path: str | Path, settings: dict[str, Any], *, cache_dir: str | Path,
                 device: str = "auto", video: Video | None = None, teacher: Teacher | None = None
                 ) -> list[dict[str, Any]]:
    """Compare a stored file's field with the teacher on the frames decoded from that file.

    Args:
        settings: of the video that the file was made from: data_path, data_split, and sizes where
            they are not the default. The teacher is the file's.
        video, teacher: if already loaded.
    Returns:
        A row each for the frames that trained (`train`), decoded from their own embeddings, and
        for the others (`held_out`), from interpolated ones, asked at `any box` (as
        `field.fit_run.evaluate_field`) and at the `patches`: video, size (of a frame), file,
        digest, size_bytes, rate_bpp, field_bytes, modelsize, teacher (its label), frames, n (of
        them), asked, psnr_db of these frames; skill and centered (mean-centered cosine) of the
        field's answer, decoded_skill and decoded_centered of the teacher's for the decoded frames;
        device, commit.
    Raises:
        ConfigError: no data_split, the file has no field, or is of other frames than the video.
        FileError: see `codec.video.decode_video`.
    """
    if "data_split" not in settings:
        raise ConfigError(f"data_split is missing, and {path} does not say it: give {SPLIT}")
    wanted, stored, target = Config.from_params(**settings), open_network(path), \
        select_device(device)
    config = stored.header.config
    video = video or load_video(wanted.video)
    _check(path, stored.header, video)
    teacher = teacher or load_teacher(config.teacher, target)
    split = split_frames(len(video.frames), wanted.video.data_split, wanted.video.split_phase)
    grid = make_grid(config.teacher, video.frame_hw)
    model, embeddings = decode_video(path)
    model = model.to(target).eval()
    embeddings = None if embeddings is None else embeddings.to(target)
    tried = split.train[np.linspace(0, len(split.train) - 1, TRIED).astype(int)]
    if (found := _decode(model, video, embeddings, tried)[1]) < LEAST_DB:
        raise ConfigError(f"the frames in {path} have {found:.1f} dB against those of {video.name} "
                          f"as it is read here, less than {LEAST_DB:g}: give the data_path, "
                          "crop_list, resize_list and frame_stride that the file was made with")
    head = stored.load_field().to(target)
    every, train = np.arange(model.frame_count), split.train
    options = {"cache_dir": cache_dir, "device": device, "progress": False}
    boxes, truth = box_targets(video, every, config.teacher, BoxSampling(
        count=TEST_BOXES, shapes=TEST_BOXES, seed=TEST_SEED), **options)
    asked = {"any box": (boxes, truth.float()), "patches": (
        torch.as_tensor(grid.boxes).expand(len(every), -1, -1),
        teacher_embeddings(video, grid, config.teacher, **options))}
    size = stored.header.size_bytes
    facts = {"video": video.name, "size": "×".join(map(str, model.frame_hw)),
             "file": Path(path).name, "digest": _digest(Path(path)), "size_bytes": size,
             "rate_bpp": 8 * size / (len(every) * model.frame_hw[0] * model.frame_hw[1]),
             "field_bytes": sum(part.size for name, part in stored.header.parts.items()
                                if name.startswith("field.")),
             "modelsize": config.model.modelsize,
             "teacher": stored.header.meta["teacher"]["label"]}
    rows = []
    for frames, chosen in (("train", train), ("held_out", np.setdiff1d(every, train))):
        if not len(chosen):
            continue
        used = embeddings if frames == "train" or embeddings is None else interpolate_embeddings(
            embeddings, train)
        field = Field(head, model, used)
        decoded, quality = _decode(model, video, used, chosen)
        for name, (own, known) in asked.items():
            mean = known[train].mean((0, 1))
            answers = {"": field.embed(chosen, own[chosen]),
                       "decoded_": embed_boxes(teacher, decoded, own[chosen]).float().cpu()}
            found = {f"{who}{measure}": value for who, answer in answers.items()
                     for measure, value in _agreement(answer, known[chosen], mean).items()}
            rows.append({**facts, "frames": frames, "n": len(chosen), "asked": name,
                         "psnr_db": quality, **found})
    about = {"device": device_name(target), "commit": code_version()[0]}
    return [{key: round(value, 5) if isinstance(value, float) else value
             for key, value in row.items()} | about for row in rows]


def _check(path: str | Path, header: Header, video: Video) -> None:
    """Raise ConfigError where the file has no field, or the video has other frames."""
    if not header.meta["heads"]:
        raise ConfigError(f"{path} holds no field, which answers for any box; encode the video "
                          "with head=field")
    if (len(video.frames), video.frame_hw) != (header.frame_count, header.size):
        own, given = (f"{count} frames of {height}×{width}" for count, (height, width) in (
            (header.frame_count, header.size), (len(video.frames), video.frame_hw)))
        raise ConfigError(f"{path} holds {own}, but {video.name} as it is read here {given}: give "
                          "the settings that the file was made with")


@torch.inference_mode()
def _decode(model: HNeRV, video: Video, embeddings: Tensor | None, chosen: np.ndarray
            ) -> tuple[Tensor, float]:
    """Pictures [N, 3, H, W] uint8 of some frames, and their mean PSNR in dB."""
    device = next(model.parameters()).device
    pictures, quality = [], []
    for part in np.array_split(chosen, -(-len(chosen) // BATCH)):
        z = model.embed(None, frame_times(torch.as_tensor(part, device=device), model.frame_count)
                        ) if embeddings is None else embeddings[part]
        drawn = (model.rgb(model.features(z)).float() * 255).round().clamp(0, 255)
        quality.append(psnr(drawn / 255, video.frames[part].to(device).float() / 255).cpu())
        pictures.append(drawn.byte().cpu())
    return torch.cat(pictures), float(torch.cat(quality).mean())


def _agreement(found: Tensor, truth: Tensor, mean: Tensor) -> dict[str, float]:
    """Skill and mean-centered cosine of answers [N, P, D]; mean [D] is that of the training
    frames."""
    constant = (truth @ F.normalize(mean, dim=0)).mean()
    return {"skill": float(skill(float((found * truth).sum(-1).mean()), float(constant))),
            "centered": float(F.cosine_similarity(found - mean, truth - mean, dim=-1).mean())}


def _digest(path: Path) -> str:
    return file_digest(path)[:16]


def collect_files(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Put rows of `measure_file` into `out`/decoded_files.json, beside or for what is there.

    Rows of a file replace all that are there of this file.
    """
    path = out / FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    new = {row["digest"] for row in rows}
    # Older rows do not say their teacher: they had the one that the results name
    rows = [{**row, "teacher": row.get("teacher") or known["about"]["teacher"]}
            for row in [*(r for r in known["rows"] if r["digest"] not in new), *rows]]
    write_json(path, {"about": {"teacher": "; ".join(dict.fromkeys(row["teacher"] for row in rows)),
                                "made by": "hnerv_clip.study.decoded.measure_file"},
                      "rows": rows})


def main(argv: Sequence[str] | None = None) -> None:
    """The command in this module's first lines; what OUT has already is measured again with
    `--force` only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="JSON file for the rows")
    parser.add_argument("files", type=Path, nargs="*", help="stored videos with a field")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a setting of their video, such as -p data_path bunny; data_split: "
                             + SPLIT)
    parser.add_argument("--cache_dir", default="output/cache")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--force", action="store_true",
                        help="measure files again whose rows are in OUT, and replace these")
    parser.add_argument("--publish", action="store_true",
                        help=f"put OUT's rows into book/results/{FILE}")
    args = parser.parse_args(argv)
    if args.files and "data_split" not in dict(args.p):
        parser.error(f"-p data_split SPLIT is missing: give {SPLIT}")
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    for path in args.files:
        digest = _digest(path)
        if not args.force and any(row["digest"] == digest for row in rows):
            continue
        found = measure_file(path, dict(args.p), cache_dir=args.cache_dir, device=args.device)
        rows = [row for row in rows if row["digest"] != digest] + found
        write_json(args.out, rows)
    if args.publish:
        collect_files(rows, resolve_path("book/results"))


if __name__ == "__main__":
    main()
