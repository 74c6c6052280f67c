"""What a model is worth: one table, a row per frame, variant and way of getting the embedding.

`variant`: the weights `trained`, or `quantised`, decoded from the file that `codec` wrote.
`source`: how a frame's embedding came about. `encoder`: the hybrid model saw the frame itself.
`interpolated`: from the embeddings of the training frames around it, so it is a prediction.
`coordinates`: from the time (and place) alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.dataset import Dataset, load_dataset
from hnerv_clip.devices import no_bfloat16, no_kernels, select_device, synchronise
from hnerv_clip.losses import MS_SSIM_MIN_SIDE
from hnerv_clip.model import HNeRV, build_model
from hnerv_clip.runs import RunDir

try:
    from hnerv_clip.engines.fused import network as fused
    from hnerv_clip.engines.fused.decoding import Decoder
except ImportError:  # no Triton: it is made for Linux
    fused = None

if TYPE_CHECKING:
    from hnerv_clip.engines.fused.engine import FusedEngine  # stands above this module

BATCH = 4  # frames decoded at once
PASS_S = 2.0  # a pass of `measure_decoding` is shorter, or one batch
SOURCE_WORDS = {"encoder": "encoded from the frame itself",
                "interpolated": "predicted from their neighbours' embeddings",
                "coordinates": "predicted from coordinates"}


def psnr(pred: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each frame, in dB.

    Args:
        pred, target: [B, 3, H, W] float in [0, 1].
        mask: [H, W] of 0 and 1; only pixels under a 1 count.
    Returns:
        [B] float32; inf where identical.
    Raises:
        ValueError: shapes differ.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ")
    error = (pred.float() - target.float()).square()
    if mask is None:
        mse = error.flatten(1).mean(1)
    else:
        mse = (error * mask).flatten(1).sum(1) / (mask.sum() * pred.shape[1])
    return -10 * torch.log10(mse)


def set_precision(precision: str, device: torch.device) -> torch.dtype:
    """Choose the arithmetic: switch tf32 on or off, and return the autocast type.

    `auto` is tf32 on a GPU and fp32 on a CPU.
    """
    tf32 = device.type == "cuda" and precision in ("auto", "tf32", "bf16")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def frame_times(indices: Tensor, frame_count: int) -> Tensor:
    """Times of frames, index / T, float64 [B]."""
    return indices.double() / frame_count


@torch.no_grad()  # else what the encoder computed of every frame is kept, gigabytes
def embed_frames(model: HNeRV, dataset: Dataset, chosen: np.ndarray | None = None) -> Tensor:
    """The model's embedding of every frame, or of the chosen: [T, C, h, w], on its device.

    The encoder sees frames as in training: with hidden pixels black.
    """
    return torch.cat([model.embed(frames if dataset.mask is None else
                                  frames * dataset.mask.to(frames.device), times)
                      for _, frames, times in _batches(model, dataset, chosen)])


def interpolate_embeddings(embeddings: Tensor, train: np.ndarray) -> Tensor:
    """Replace the embeddings of all but the training frames by what lies between those.

    Args:
        embeddings: [T, C, h, w]; rows outside `train` are not read.
        train: rising training frame indices; frames outside their range take the nearest one.
    Returns:
        [T, C, h, w].
    """
    frames = np.arange(len(embeddings))
    left, right = _neighbours(frames, train)
    gap = np.maximum(right - left, 1)
    share = torch.tensor(np.clip((frames - left) / gap, 0, 1), dtype=embeddings.dtype,
                         device=embeddings.device).view(-1, *[1] * (embeddings.ndim - 1))
    return embeddings[left] * (1 - share) + embeddings[right] * share


def _neighbours(frames: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The training frames at or before, and at or after each frame; the nearest at the ends."""
    after = np.clip(np.searchsorted(train, frames), 0, len(train) - 1)
    before = np.clip(np.searchsorted(train, frames, side="right") - 1, 0, len(train) - 1)
    return train[before], train[after]


def sources_of(model: HNeRV) -> tuple[str, ...]:
    """The ways in which this model's embeddings come about."""
    return ("encoder", "interpolated") if model.kind == "hybrid" else ("coordinates",)


def frame_embeddings(model: HNeRV, dataset: Dataset, source: str,
                     chosen: np.ndarray | None = None) -> Tensor:
    """Embeddings [N, C, h, w] of all frames or the chosen, by `source`; see the module's top."""
    if source not in sources_of(model):
        raise ConfigError(f"source={source!r} does not suit this {model.kind} model; "
                          f"use {' or '.join(sources_of(model))}")
    if source != "interpolated":
        return embed_frames(model, dataset, chosen)
    train = dataset.split.train
    chosen = np.arange(model.frame_count) if chosen is None else np.asarray(chosen)
    asked = np.unique(_neighbours(chosen, train))
    known = embed_frames(model, dataset, asked)
    whole = known.new_zeros(model.frame_count, *known.shape[1:])
    whole[asked] = known
    return interpolate_embeddings(whole, train)[chosen]


def check_head(model: HNeRV) -> None:
    """Raise ConfigError unless the model has a CLIP head."""
    if not model.config.predict_clip:
        raise ConfigError("this run has no CLIP head (predict_clip=False), so it predicts no "
                          "embeddings: train one with predict_clip=True")


@torch.inference_mode()
def predict_embeddings(model: HNeRV, dataset: Dataset, *, source: str | None = None,
                       centres: Tensor | None = None) -> Tensor:
    """CLIP embeddings that the model predicts for every patch, without decoding a pixel.

    Args:
        source: `encoder`, `interpolated` or `coordinates`; the model's first by default.
        centres: other positions to ask for, [P, 2] (y, x) in frame pixels.
    Returns:
        [T, P, D] float32 unit vectors, on the CPU.
    Raises:
        ConfigError: the model has no CLIP head.
    """
    check_head(model)
    embeddings = frame_embeddings(model, dataset, source or sources_of(model)[0])
    centres = (dataset.grid.centres if centres is None else centres).to(embeddings.device)
    return torch.cat([model.clip_at(model.stages(chunk, last=model.clip_stages[-1]), centres).cpu()
                      for chunk in embeddings.split(BATCH)])


@torch.inference_mode()
def decode_frames(model: HNeRV, dataset: Dataset, frames: list[int], *, source: str | None = None
                  ) -> Tensor:
    """Decoded pictures of some frames: uint8 [len(frames), 3, H, W], on the CPU."""
    embeddings = frame_embeddings(model, dataset, source or sources_of(model)[0],
                                  np.asarray(frames, int))
    return torch.cat([_to_uint8(model.rgb(model.features(chunk))).cpu()
                      for chunk in embeddings.split(BATCH)])


def _to_uint8(frames: Tensor) -> Tensor:
    return (frames.float() * 255).round().clamp(0, 255).byte()


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
        and with the mean of its training embeddings taken off both; means over patches, there with
        the CLIP head only); where a mask hides boxes, psnr_outside_db and psnr_inside_db.
    """
    device = embeddings.device
    mask = None if dataset.mask is None else dataset.mask.to(device)
    columns: dict[str, list[Tensor]] = {}
    if with_clip := model.config.predict_clip and dataset.embeddings is not None:
        centres = dataset.grid.centres.to(device)
        centre = dataset.embeddings[dataset.split.train].mean((0, 1)).to(device)  # [D]

    def add(name: str, values: Tensor) -> None:
        columns.setdefault(name, []).append(values.float())

    for indices, frames, _ in _batches(model, dataset, chosen):
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
    """Evaluate some frames for nothing: the libraries of the plain model take seconds to load."""
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


@dataclass
class Run:
    """A trained run, loaded."""

    run_dir: RunDir
    config: Config
    model: HNeRV  # with its best weights, in eval mode
    dataset: Dataset


def load_run(run_dir: str | Path, *, cache_dir: str | Path = "output/cache", device: str = "auto",
             checkpoint: str = "model_best.pth") -> Run:
    """Load a run's model and the data that it was trained on; no teacher is loaded.

    Raises:
        RunError: no run there, or a damaged or foreign checkpoint.
        ConfigError: the teacher's embeddings are not in `cache_dir`.
    """
    run = RunDir(run_dir)
    config = run.config()
    state = run.load_checkpoint(checkpoint)
    dataset = load_dataset(config, cache_dir)
    target = select_device(device)
    set_precision(config.train.precision, target)
    model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                        frame_count=len(dataset.video.frames))
    model.load_state_dict(state["model"])
    return Run(run, config, model.to(target).eval(), dataset)


def evaluate_run(run: Run) -> pd.DataFrame:
    """Stand-alone evaluation of a run: as trained, and from its file `video.hnerv`.

    The file is written where there is none, as in a run that is not finished.
    """
    trained = evaluate_model(run.model, run.dataset)
    path = run.run_dir.path / "video.hnerv"
    if not path.exists():
        store_video(run.model, run.dataset, path, config=run.config)
    stored, _ = evaluate_stored(path, run.dataset, device=next(run.model.parameters()).device)
    return pd.concat([trained, stored], ignore_index=True)


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


def _batches(model: HNeRV, dataset: Dataset, chosen: np.ndarray | None = None
             ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(indices [B], frames [B, 3, H, W] float in [0, 1], times [B]) over frames, in order."""
    device = next(model.parameters()).device
    wanted = torch.arange(model.frame_count) if chosen is None else torch.as_tensor(chosen)
    for indices in wanted.split(BATCH):
        frames = dataset.video.frames[indices].to(device).float() / 255
        yield indices, frames, frame_times(indices.to(device), model.frame_count)
