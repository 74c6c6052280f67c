"""Evaluation of a model: one table, a row per frame, variant and way of getting the embedding.

`variant`: the weights `trained`, or `quantised`, decoded from the file that `codec` wrote.
`source`: how a frame's embedding was obtained. `encoder`: the hybrid model saw the frame itself.
`interpolated`: from the embeddings of the training frames around it, so it is a prediction.
`coordinates`: from the time (and position) alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pytorch_msssim import ms_ssim
from torch import Tensor

from hnerv_clip.codec.about import describe_dataset
from hnerv_clip.codec.video import decode_video, encode_video
from hnerv_clip.config import Config
from hnerv_clip.dataset import Dataset
from hnerv_clip.files import RunError
from hnerv_clip.inference import (
    BATCH,
    Run,
    embed_frames,
    frame_batches,
    interpolate_embeddings,
    sources_of,
)
from hnerv_clip.losses import MS_SSIM_MIN_SIDE
from hnerv_clip.metrics import psnr
from hnerv_clip.model import HNeRV
from hnerv_clip.runs.run_dir import VIDEO

if TYPE_CHECKING:
    from hnerv_clip.engines.fused.engine import FusedEngine  # stands above this module


@torch.inference_mode()
def evaluate_embeddings(model: HNeRV, dataset: Dataset, embeddings: Tensor,
                        chosen: np.ndarray | None = None, *, engine: FusedEngine | None = None
                        ) -> pd.DataFrame:
    """Decode frames from their embeddings and measure them.

    Args:
        embeddings: [T, C, h, w] per-frame embeddings, on the model's device.
        chosen: which frames, all by default.
        engine: see `evaluate_model`.
    Returns:
        A row per frame: frame, split, psnr_db, ms_ssim (empty below 161 pixels a side, where its
        five scales are undefined), clip_similarity and clip_centred (cosine with the teacher, raw
        and with the mean of its training embeddings subtracted from both; means over patches, only
        with the CLIP head); where a mask hides boxes, psnr_outside_db and psnr_inside_db.
    """
    device = embeddings.device
    mask = None if dataset.mask is None else dataset.mask.to(device)
    columns: dict[str, list[Tensor]] = {}
    if with_clip := model.config.predict_clip and dataset.embeddings is not None:
        centres = dataset.grid.centres.to(device)
        centre = dataset.embeddings[dataset.split.train].mean((0, 1)).to(device)  # [D]

    def add(name: str, values: Tensor) -> None:
        columns.setdefault(name, []).append(values.float())

    for indices, frames, _ in frame_batches(model, dataset, chosen):
        if engine:
            pred, clip = engine.decode_frames(embeddings[indices], clip=with_clip)
        else:
            stages = model.stages(embeddings[indices])
            pred = model.rgb(stages[-1]).float()
            clip = model.clip_at(stages, centres) if with_clip else None
        add("psnr_db", psnr(pred, frames))
        layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        add("ms_ssim", ms_ssim(*(x.contiguous(memory_format=layout) for x in (pred, frames)),
                               data_range=1, size_average=False)  # on a CPU three times as fast
            if min(model.frame_hw) >= MS_SSIM_MIN_SIDE else torch.full((len(pred),), float("nan")))
        if mask is not None:
            add("psnr_outside_db", psnr(pred, frames, mask=mask))
            add("psnr_inside_db", psnr(pred, frames, mask=1 - mask))
        if with_clip:
            target = dataset.embeddings[indices].to(device)
            add("clip_similarity", (clip * target).sum(-1).mean(-1))
            centred = F.cosine_similarity(clip - centre, target - centre, dim=-1)
            add("clip_centred", centred.mean(-1))
    chosen = np.arange(len(embeddings)) if chosen is None else chosen
    table = pd.DataFrame({"frame": chosen, "split": np.array(dataset.split.labels)[chosen]})
    for name, values in columns.items():
        table[name] = torch.cat(values).cpu().numpy().astype(float)
    return table


@torch.inference_mode()
def evaluate_model(model: HNeRV, dataset: Dataset, *, variant: str = "trained",
                   embeddings: Tensor | None = None, share: tuple[int, int] = (0, 1),
                   engine: FusedEngine | None = None) -> pd.DataFrame:
    """`evaluate_embeddings` for every source of a model.

    Args:
        embeddings: [T, C, h, w] to use instead of the encoder's, as a stored video has them.
        engine: what trains the model, to encode and decode as its steps do: in bfloat16 and on its
            kernels, several times faster. By default the plain model, in the precision set.
        share: (rank, ranks): measure only the batches of frames that fall to this rank.
    Returns:
        Columns variant and source, then those of `evaluate_embeddings`. Interpolated rows are there
        only for frames that did not train.
    """
    was_training = model.training
    model.eval()
    if embeddings is None:
        embeddings = engine.embed_frames() if engine else embed_frames(model, dataset)
    tables = []
    for source in sources_of(model):
        frames, used = np.arange(len(embeddings)), embeddings
        if source == "interpolated":
            frames = np.setdiff1d(frames, dataset.split.train)
            used = interpolate_embeddings(embeddings, dataset.split.train)
        frames = _share(frames, *share)
        if len(frames):
            table = evaluate_embeddings(model, dataset, used, frames, engine=engine)
            tables.append(table.assign(variant=variant, source=source))
    model.train(was_training)
    if not tables:  # more ranks than batches
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    return table[["variant", "source", *[c for c in table if c not in ("variant", "source")]]]


@torch.inference_mode()
def warm_up(model: HNeRV, dataset: Dataset) -> None:
    """Evaluate some frames and discard the result: the plain model's libraries load slowly."""
    frames = np.arange(min(BATCH, model.frame_count))
    evaluate_embeddings(model, dataset, embed_frames(model, dataset, frames), frames)


def _share(frames: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """Whole batches, so that a frame is measured beside the same others on any number of ranks."""
    return np.concatenate([frames[:0], *[frames[start:start + BATCH] for start in range(
        rank * BATCH, len(frames), ranks * BATCH)]])


def store_video(model: HNeRV, dataset: Dataset, path: Path, *, config: Config) -> int:
    """Write the video that a model stores, and return the file's size_bytes."""
    with torch.inference_mode():
        embeddings = embed_frames(model, dataset) if model.kind == "hybrid" else None
    return encode_video(model, embeddings, path, config=config,
                        about=describe_dataset(dataset, config))


def evaluate_stored(path: Path, dataset: Dataset, *, device: torch.device,
                    share: tuple[int, int] = (0, 1)) -> tuple[pd.DataFrame, float]:
    """Decode a stored video and measure what comes out.

    Args:
        share: see `evaluate_model`.
    Returns:
        The table of `evaluate_model` with variant `quantised`, and the file's rate_bpp.
    """
    stored, embeddings = decode_video(path)
    table = evaluate_model(stored.to(device), dataset, variant="quantised", share=share,
                           embeddings=None if embeddings is None else embeddings.to(device))
    return table, 8 * path.stat().st_size / (stored.frame_count * math.prod(stored.frame_hw))


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means over frames: those that trained, those held out, and all, per variant and source.

    Returns:
        Columns variant, source, frames (train, held_out or all), n, then the mean of each measure.
    """
    measures = [c for c in table if c not in ("variant", "source", "frame", "split")]
    rows = []
    for (variant, source), group in table.groupby(["variant", "source"], sort=False):
        parts = {"train": group[group.split == "train"],
                 "held_out": group[group.split != "train"], "all": group}
        rows += [{"variant": variant, "source": source, "frames": name, "n": len(part),
                  **part[measures].mean()} for name, part in parts.items()
                 if len(part) and (name != "all" or source != "interpolated")]
    return pd.DataFrame(rows)


def evaluate_run(run: Run) -> pd.DataFrame:
    """Stand-alone evaluation of a run: as trained, and from its file `video.hnerv`.

    The file is written where there is none, as in a run that is not finished, and anew where it is
    not this checkpoint's or does not decode.
    """
    trained = evaluate_model(run.model, run.dataset)
    path = run.run_dir.path / VIDEO
    device = next(run.model.parameters()).device
    try:
        if not run.run_dir.holds_video(run.checkpoint):
            raise RunError("not this checkpoint's")
        stored, _ = evaluate_stored(path, run.dataset, device=device)
    except RunError:
        store_video(run.model, run.dataset, path, config=run.config)
        run.run_dir.bind_video(run.checkpoint)
        stored, _ = evaluate_stored(path, run.dataset, device=device)
    return pd.concat([trained, stored], ignore_index=True)


def evaluation_columns(table: pd.DataFrame) -> dict[str, float]:
    """Means of an evaluation table as flat columns.

    Returns:
        eval_{psnr,ms_ssim,clip_similarity,clip_centred}_{all,train,val} from the encoder or the
        coordinates, and eval_…_val_interpolated for held-out frames of a hybrid model. `val` is
        there where frames validate.
    """
    short = {"psnr_db": "psnr", "ms_ssim": "ms_ssim", "clip_similarity": "clip_similarity",
             "clip_centred": "clip_centred", "psnr_inside_db": "psnr_inside",
             "psnr_outside_db": "psnr_outside"}
    asked = table[table.source != "interpolated"]
    parts = {"all": asked, "train": asked[asked.split == "train"],
             "val": asked[asked.split == "val"],
             "val_interpolated": table[(table.source == "interpolated") & (table.split == "val")]}
    return {f"eval_{name}_{part}": float(rows[measure].mean())
            for measure, name in short.items() if measure in table
            for part, rows in parts.items() if len(rows) and rows[measure].notna().any()}
