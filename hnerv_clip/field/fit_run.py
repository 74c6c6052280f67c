"""Fit a field on a trained run's frozen network, and measure it on frames that it never saw."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hnerv_clip.config import Config
from hnerv_clip.field.fit import FitSettings, fit_field
from hnerv_clip.field.query import FIELD, Field, field_config, make_field
from hnerv_clip.heads.field import FieldConfig
from hnerv_clip.inference import Run, embed_frames, sources_of
from hnerv_clip.metrics import bracket_frames
from hnerv_clip.teachers import teacher_embeddings
from hnerv_clip.teachers.boxes import BoxSampling, box_targets, draw_boxes

TEST_SEED = 1_000_003  # of the boxes that measure a field: none that it is fitted to
TEST_BOXES = 48
CPU_BATCH = {"frames": 8, "boxes": 32}  # 11 ms a step on one core; a GPU's would take 150


def sampling_of(run: Run) -> BoxSampling:
    """The boxes that a run's field is fitted to, from its settings."""
    return box_sampling(run.config)


def box_sampling(config: Config) -> BoxSampling:
    """Those that the field of a run with these settings is fitted to."""
    train = config.train
    return BoxSampling(count=train.field_boxes, shapes=train.field_boxes, seed=train.seed)


def fit_head(run: Run, *, cache_dir: str | Path = "output/cache",
             device: str | torch.device = "auto", progress: bool = True,
             settings: FitSettings | None = None, patches: float = 0.0, **changes: Any) -> Field:
    """Fit a field to the teacher's embeddings of random boxes of the training frames, and save it.

    The network does not change, so neither does the picture. `field.pth` goes into the run's
    folder; one that is there is replaced.

    Args:
        device: that runs the teacher, where its embeddings are not cached.
        settings: by default from the run's own settings, and `patches`.
        patches: share of the boxes that are the run's patches, which it then knows better.
        changes: fields of `FieldConfig` other than the run's settings make them.
    Raises:
        ConfigError: see `load_teacher`; or the fit diverged.
    """
    train, start = run.config.train, time.perf_counter()
    sampling, frames = sampling_of(run), np.asarray(run.dataset.split.train)
    target_device = next(run.model.parameters()).device
    batch = {} if target_device.type == "cuda" else CPU_BATCH
    settings = settings or FitSettings(steps=train.field_steps, rate_weight=train.field_rate_weight,
                                       seed=train.seed, patches=patches, **batch)
    boxes, targets = box_targets(run.dataset.video, frames, run.config.teacher, sampling,
                                 cache_dir=cache_dir, device=device, progress=progress)
    if settings.patches:
        boxes, targets = _with_patches(run, frames, boxes, targets, cache_dir=cache_dir,
                                       device=device, progress=progress)
    taught = time.perf_counter()
    config, features, between = _source(run, frames, sampling, changes)
    with tqdm(total=settings.steps, desc="fitting the field", unit="step",
              disable=not progress) as bar:
        def report(done: int, loss: float) -> None:
            bar.set_postfix(cosine=f"{1 - loss:.3f}", refresh=False)
            bar.update(done - bar.n)

        head, steps = fit_field(config, features, torch.as_tensor(frames), boxes,
                                targets.to(target_device), between=between,
                                patches=boxes.shape[1] - sampling.count, settings=settings,
                                progress=report)
        bar.update(settings.steps - bar.n)
    data = run.dataset
    field = make_field(run, head, steps=steps, teacher={
        "name": data.teacher_name, "label": data.teacher_label}, about={
        "teacher_s": round(taught - start, 2), "fit_s": round(time.perf_counter() - taught, 2),
        "boxes": int(sampling.count), "settings": dataclasses.asdict(settings)})
    field.save(run.run_dir.path / FIELD)
    return field


def measure_fit(run: Run, *, steps: int = 40) -> float:
    """Seconds of the fit's steps on this CPU, by a few of them with targets that mean nothing."""
    frames = np.asarray(run.dataset.split.train)[:CPU_BATCH["frames"]]
    sampling = BoxSampling(count=CPU_BATCH["boxes"])
    boxes = draw_boxes(sampling, run.model.frame_hw, len(frames))
    targets = F.normalize(torch.rand(*boxes.shape[:2], run.config.model.clip_dim), dim=-1)
    config, features, between = _source(run, frames, sampling, {})
    start = time.perf_counter()
    fit_field(config, features, torch.as_tensor(frames), boxes, targets, between=between,
              settings=FitSettings(steps=steps, **CPU_BATCH))
    return (time.perf_counter() - start) * run.config.train.field_steps / steps


def _with_patches(run: Run, frames: np.ndarray, boxes: Tensor, targets: Tensor, **options: Any
                  ) -> tuple[Tensor, Tensor]:
    """Boxes and targets of frames with the run's patches after them."""
    data = run.dataset
    own = teacher_embeddings(data.video, data.grid, run.config.teacher, **options)[frames]
    patches = torch.as_tensor(data.grid.boxes).expand(len(frames), -1, -1)
    return torch.cat([boxes, patches], 1), torch.cat([targets, own.to(targets.dtype)], 1)


def _source(run: Run, frames: np.ndarray, sampling: BoxSampling, changes: dict[str, Any]
            ) -> tuple[FieldConfig, Tensor | None, Tensor | None]:
    """The field's configuration, and its inputs from the training frames: their own, and of a
    hybrid network those interpolated from the training frames around each."""
    model = run.config.model
    config = field_config(run, **{
        "hidden": model.field_hidden, "rank": model.field_rank, "size_range": sampling.size_range,
        "aspect_range": sampling.aspect_range, **changes})
    if not config.source_channels:
        return config, None, None

    def read(z: Tensor) -> Tensor:
        if config.source_stage >= 0:
            z = torch.cat([run.model.stages(part, last=config.source_stage)[config.source_stage]
                           for part in z.split(8)])
        return z.float().clone()

    with torch.inference_mode():
        z, between = embed_frames(run.model, run.dataset, frames), None
        features = read(z)
        if run.model.kind == "hybrid" and len(frames) > 1:
            before, after, share = bracket_frames(frames, frames, exclude_self=True)
            left, right = (z[np.searchsorted(frames, own)] for own in (before, after))
            between = read(torch.lerp(left, right, torch.as_tensor(
                share, dtype=z.dtype, device=z.device).view(-1, 1, 1, 1)))
    scale = 1 / max(float(features.std()), 1e-6)
    return dataclasses.replace(config, source_channels=features.shape[1], source_scale=scale
                               ), features, between


def evaluate_field(run: Run, field: Field, *, cache_dir: str | Path = "output/cache",
                   device: str | torch.device = "auto", progress: bool = True) -> pd.DataFrame:
    """Measure a field against the teacher at the run's patches and at boxes it never saw.

    Returns:
        A row per frame, source and kind of boxes: source, split (train, held_out), where
        (patches, any box), frame, clip_similarity (mean raw cosine), constant (the same of the
        teacher's mean over the training frames) and clip_centered. Held-out frames of a hybrid
        network come from interpolated embeddings.
    """
    data, rows = run.dataset, []
    count = len(data.video.frames)
    train = np.asarray(data.split.train)
    any_boxes, truth = box_targets(
        data.video, np.arange(count), run.config.teacher,
        BoxSampling(count=TEST_BOXES, shapes=TEST_BOXES, seed=TEST_SEED), cache_dir=cache_dir,
        device=device, progress=progress)
    patches = data.grid.boxes.expand(count, -1, -1)
    kinds = {"patches": (patches, teacher_embeddings(data.video, data.grid, run.config.teacher,
                                                     cache_dir=cache_dir, device=device,
                                                     progress=progress)),
             "any box": (any_boxes, truth.float())}
    for source in sources_of(run.model):
        asked = make_field(run, field.head, source=source)
        for where, (boxes, target) in kinds.items():
            mean = target[train].mean((0, 1))
            found = asked.embed(np.arange(count), boxes)
            rows.append(pd.DataFrame({
                "source": source, "where": where, "frame": np.arange(count),
                "split": np.where(np.isin(np.arange(count), train), "train", "held_out"),
                "clip_similarity": (found * target).sum(-1).mean(1),
                "constant": (target @ F.normalize(mean, dim=0)).mean(1),
                "clip_centered": F.cosine_similarity(found - mean, target - mean, dim=-1).mean(1)}))
    table = pd.concat(rows, ignore_index=True)
    return table[(table.source != "interpolated") | (table.split != "train")].reset_index(drop=True)


def summarise_field(table: pd.DataFrame) -> pd.DataFrame:
    """Means of `evaluate_field`: source, where, split, n frames, clip_similarity, clip_centered,
    skill = (s − s_const) / (1 − s_const), which is 0 for a constant answer and 1 for the teacher's.
    """
    means = table.groupby(["source", "where", "split"], sort=False).agg(
        n=("frame", "size"), clip_similarity=("clip_similarity", "mean"),
        constant=("constant", "mean"), clip_centered=("clip_centered", "mean")).reset_index()
    means["skill"] = (means.clip_similarity - means.constant) / (1 - means.constant)
    return means.drop(columns="constant")
