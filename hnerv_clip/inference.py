"""Outputs of a trained network: per-frame embeddings, frames, CLIP embeddings.

`source`: how a frame's embedding was obtained. `encoder`: the hybrid model saw the frame itself.
`interpolated`: from the embeddings of the training frames around it, so it is a prediction.
`coordinates`: from the time (and position) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.dataset import Dataset, check_same_video, inpainting_mask, load_dataset
from hnerv_clip.devices import select_device, set_precision
from hnerv_clip.metrics import bracket_frames
from hnerv_clip.model import HNeRV, build_model, frame_times
from hnerv_clip.patches import make_grid
from hnerv_clip.runs.run_dir import BEST, RunDir, RunError, load_weights
from hnerv_clip.video import FrameSplit, Video, has_source, load_video

BATCH = 4  # frames decoded at once


@torch.no_grad()  # else what the encoder computed of every frame is kept, gigabytes
def embed_frames(model: HNeRV, dataset: Dataset, chosen: np.ndarray | None = None) -> Tensor:
    """The model's embedding of every frame, or of the chosen: [T, C, h, w], on its device.

    The encoder sees frames as in training: with hidden pixels black.
    """
    return torch.cat([model.embed(frames if dataset.mask is None else
                                  frames * dataset.mask.to(frames.device), times)
                      for _, frames, times in frame_batches(model, dataset, chosen)])


def interpolate_embeddings(embeddings: Tensor, train: np.ndarray) -> Tensor:
    """Replace the embeddings of all but the training frames by interpolation between those.

    Args:
        embeddings: [T, C, h, w]; rows outside `train` are not read.
        train: rising training frame indices; frames outside their range take the nearest one.
    Returns:
        [T, C, h, w].
    """
    before, after, share = bracket_frames(np.arange(len(embeddings)), train)
    share = torch.tensor(share, dtype=embeddings.dtype, device=embeddings.device).view(
        -1, *[1] * (embeddings.ndim - 1))
    return embeddings[before] * (1 - share) + embeddings[after] * share


def sources_of(model: HNeRV) -> tuple[str, ...]:
    """The sources from which this model's embeddings can be obtained."""
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
    asked = np.unique(bracket_frames(chosen, train)[:2])
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


@dataclass
class Run:
    """A trained run, loaded."""

    run_dir: RunDir
    config: Config
    model: HNeRV  # with its best weights, in eval mode
    dataset: Dataset
    checkpoint: str = BEST  # the file that the weights came from


def load_run(run_dir: str | Path, *, cache_dir: str | Path = "output/cache", device: str = "auto",
             checkpoint: str = BEST, needs_head: bool = False, data_path: str = "",
             dataset: Dataset | None = None) -> Run:
    """Load a run's model and the data that it was trained on; no teacher is loaded.

    Args:
        needs_head: refuse a run without the CLIP head, before its weights are looked for.
        data_path: the path of its video, if that has changed.
        dataset: its data, if already loaded.
    Raises:
        RunError: no run there, a damaged or foreign checkpoint, no video, or another one's frames.
        ConfigError: the teacher's embeddings are not in `cache_dir`; or there is no head where one
            is needed.
    """
    run = RunDir(run_dir)
    config = run.config_with_head() if needs_head else run.config()
    state = run.load_checkpoint(checkpoint)
    if data_path:
        config = config.replace(data_path=data_path)
    elif not dataset and not has_source(config.video.data_path):
        raise RunError(f"the video of {run.path}, {config.video.data_path}, is not there any more: "
                       "give where it is now with --data_path (data_path= in Python)")
    video = dataset.video if dataset else load_video(config.video)
    check_same_video(run, video, config.video.data_path)
    dataset = dataset or load_dataset(config, cache_dir, video=video)
    model = _load_network(run, config, state, frame_hw=dataset.video.frame_hw,
                          frame_count=len(dataset.video.frames), device=device,
                          checkpoint=checkpoint)
    return Run(run, config, model, dataset, checkpoint)


def _load_network(run: RunDir, config: Config, state: dict[str, Any], *,
                  frame_hw: tuple[int, int], frame_count: int, device: str, checkpoint: str
                  ) -> HNeRV:
    target = select_device(device)
    set_precision(config.train.precision, target)
    model = build_model(config.model, frame_hw=frame_hw, frame_count=frame_count)
    load_weights(model, state, run.path / checkpoint, fix=run.checkpoint_fix(checkpoint))
    return model.to(target).eval()


def decode_first(run: RunDir, config: Config, video: Video, *, frame_count: int, device: str
                 ) -> Tensor:
    """The first frame of a run, decoded before the others are read: uint8 [3, H, W].

    Args:
        video: the first frame of the run's.
        frame_count: T, of the run's whole video.
    Raises:
        RunError: a damaged or foreign checkpoint.
    """
    model = _load_network(run, config, run.load_checkpoint(), frame_hw=video.frame_hw,
                          frame_count=frame_count, device=device, checkpoint=BEST)
    alone = Dataset(video, FrameSplit(np.array([0]), np.array([], int), ["train"]),
                    make_grid(config.teacher, video.frame_hw), None, "", "",
                    inpainting_mask(video.frame_hw, config.train.inpaint_size))
    return decode_frames(model, alone, [0])[0]


def frame_batches(model: HNeRV, dataset: Dataset, chosen: np.ndarray | None = None
             ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(indices [B], frames [B, 3, H, W] float in [0, 1], times [B]) over frames, in order."""
    device = next(model.parameters()).device
    wanted = torch.arange(model.frame_count) if chosen is None else torch.as_tensor(chosen)
    for indices in wanted.split(BATCH):
        frames = dataset.video.frames[indices].to(device).float() / 255
        yield indices, frames, frame_times(indices.to(device), model.frame_count)
