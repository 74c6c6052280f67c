"""A field and its network fitted together, after the network and after the field.

Afterwards, on a frozen network, a field costs the picture nothing. Here both go on at a small λ, so
that it can be measured whether the network has more to give when it may change. The field that the
new run keeps is fitted anew on the changed network, as any field is, so that the two compare.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.dataset import Dataset
from hnerv_clip.devices import set_precision
from hnerv_clip.distributed import ranks
from hnerv_clip.engines.plain import COLUMNS, PlainEngine
from hnerv_clip.engines.select import settle
from hnerv_clip.evaluate import evaluate_model, evaluation_columns
from hnerv_clip.field.fit import FitSettings
from hnerv_clip.field.fit_run import fit_head, sampling_of
from hnerv_clip.field.query import Field, has_field, load_field, network_digest
from hnerv_clip.files import RunError, check_keys, read_json, write_json
from hnerv_clip.heads.field import FieldHead
from hnerv_clip.inference import Run, load_run
from hnerv_clip.losses import clip_loss, learning_rate, pixel_loss
from hnerv_clip.metrics import psnr
from hnerv_clip.model import build_model, frame_times
from hnerv_clip.runs.provenance import make_provenance
from hnerv_clip.runs.run_dir import BEST, RunDir, load_checkpoint, load_weights
from hnerv_clip.teachers.boxes import box_targets
from hnerv_clip.train.outputs import final_figures
from hnerv_clip.train.trainer import TrainError, epoch_order

STATE, SETTINGS = "together.pth", "together.json"  # to go on from; what was asked for


@dataclass(frozen=True)
class TogetherSettings:
    """How a field and its network go on together."""

    weight: float = 0.01  # λ of 1 − cosine; 0 goes on with the picture alone, to compare with
    epochs: int = 30
    lr_share: float = 0.2  # of the run's lr, from which it goes to 0 as in training
    field_lr: float = 1e-3  # of the field, likewise
    boxes: int = 64  # of each frame of a step
    anew: bool = False  # begin with the network's and the field's initial weights

    @classmethod
    def from_first_epoch(cls, config: Config, *, weight: float) -> TogetherSettings:
        """Both learn together in all epochs of a run, at its whole lr."""
        return cls(weight=weight, epochs=config.train.epochs, lr_share=1.0, anew=True)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"λ={self.weight:g} must be 0 or more; 0.002 to 0.02 is small")
        if self.epochs < 1 or self.boxes < 1:
            raise ConfigError(f"epochs={self.epochs} and boxes={self.boxes} must be 1 or more")


class TogetherEngine(PlainEngine):
    """Plain steps that lower the pixel loss and λ · (1 − cosine of the field at random boxes)."""

    def __init__(self, config: Config, run: Run, field: FieldHead, boxes: Tensor, targets: Tensor,
                 settings: TogetherSettings, *, autocast: torch.dtype):
        """
        Args:
            boxes: [N, P, 4] of the N training frames. targets: [N, P, D] unit embeddings.
        """
        self.field, self.settings = field, settings
        super().__init__(config, run.model, run.dataset, autocast=autocast)
        train = torch.as_tensor(np.asarray(run.dataset.split.train))
        self.row = torch.zeros(run.model.frame_count, dtype=torch.int64).index_put(
            (train,), torch.arange(len(train))).to(self.device)
        self.boxes, self.targets = boxes.to(self.device).float(), targets.to(self.device)
        self.generator = torch.Generator(self.device)

    def _groups(self) -> list[dict[str, Any]]:
        self.field_lr = torch.tensor(self.settings.field_lr, device=self.device)
        return [*super()._groups(), {"params": list(self.field.parameters()), "lr": self.field_lr}]

    def frame_losses(self, indices: Tensor) -> Tensor:
        """`COLUMNS` of training frames [B]: [4, B]."""
        frames = (self.frames[indices].float() / 255).contiguous(memory_format=torch.channels_last)
        seen = frames if self.mask is None else frames * self.mask
        with torch.autocast(self.device.type, self.autocast,
                            enabled=self.autocast != torch.float32):
            embedding = self.model.embed(seen, frame_times(indices, self.model.frame_count))
            stages = self.model.stages(embedding)
            pred = self.model.rgb(stages[-1]).float()
        pixel = pixel_loss(pred, frames, loss=self.config.train.loss, mask=self.mask,
                           constants=self.ssim)
        c, rows = self.field.config, self.row[indices][:, None]
        chosen = torch.randint(self.boxes.shape[1], (len(indices), self.settings.boxes),
                               device=self.device, generator=self.generator)
        features = None if not c.source_channels else embedding if c.source_stage < 0 else \
            stages[c.source_stage][:, :c.source_channels]
        answer = self.field(None if features is None else features.float(), indices.float(),
                            self.boxes[rows, chosen])
        cosine = clip_loss(answer, self.targets[rows, chosen].float())
        return torch.stack([pixel, cosine, pixel + self.weight * cosine,
                            psnr(pred.detach(), frames)])


def fit_together(run: Run, run_dir: str | Path, *, settings: TogetherSettings = TogetherSettings(),
                 fit: FitSettings | None = None, cache_dir: str | Path = "output/cache",
                 progress: bool = True) -> Field:
    """Go on with a finished run's network and a field together, as a run in a folder of its own.

    The run itself is not changed, but gets a field where it has none. Frames are shuffled as in
    the epochs that would follow, and the run's optimizer starts anew. The plain engine computes it,
    whatever the run was trained by: the fused kernels know no field.

    With `settings.anew` the run gives the configuration, the data and the seed; its network begins
    with the weights that it once began with, and the field with random ones.

    Args:
        run_dir: folder of the new run; one that was interrupted goes on after its last epoch, and
            a finished one is returned as it stands.
        fit: of the fields, before and after; by default from the run's settings.
    Returns:
        The new run's field.
    Raises:
        ConfigError: see `TogetherSettings` and `load_teacher`.
        RunError: the folder holds something else, or was begun with other settings.
        TrainError: the loss became NaN or infinite.
    """
    if ranks()[1] > 1:
        raise ConfigError("a field and its network are fitted together by one process: run "
                          "without torchrun")
    data = run.dataset
    config = run.config.replace(head="field")
    new, asked = RunDir.check(run_dir, config), _asked(run, settings, fit)
    if (new.path / SETTINGS).exists():
        there = {"anew": False, **read_json(new.path / SETTINGS, fix="remove the folder")}
        if there != asked:
            raise RunError(f"{new.path} was begun with other settings or from another network "
                           f"({_differences(there, asked)}): choose another folder")
    elif new.begun:
        raise RunError(f"{new.path} holds another run: choose a folder of its own")
    new = RunDir.create(run_dir, config)
    write_json(new.path / SETTINGS, asked)
    with new.lock():
        if not new.finished:
            _fit(run, new, config, settings, fit, cache_dir=cache_dir, progress=progress)
    device = str(next(run.model.parameters()).device)
    result = load_run(new.path, cache_dir=cache_dir, device=device, dataset=data)
    return load_field(result) if has_field(new) else fit_head(
        result, cache_dir=cache_dir, device=config.train.device, settings=fit, progress=progress)


def _asked(run: Run, settings: TogetherSettings, fit: FitSettings | None) -> dict[str, Any]:
    """What a run of this kind is made from, for `SETTINGS`."""
    return {"network": network_digest(run.model), **dataclasses.asdict(settings),
            "fit": None if fit is None else dataclasses.asdict(fit)}


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {there.get(name)!r} there, {asked.get(name)!r} asked"
                     for name in sorted({*there, *asked}) if there.get(name) != asked.get(name))


def _fit(run: Run, new: RunDir, config: Config, settings: TogetherSettings,
         fit: FitSettings | None, *, cache_dir: str | Path, progress: bool) -> None:
    """Train, and write what a finished run holds, but for its field."""
    data, train = run.dataset, run.config.train
    field = load_field(run) if has_field(run.run_dir) else fit_head(
        run, cache_dir=cache_dir, device=train.device, settings=fit, progress=progress)
    device = next(run.model.parameters()).device
    boxes, targets = box_targets(data.video, np.asarray(data.split.train), config.teacher,
                                 sampling_of(run), cache_dir=cache_dir, device=train.device,
                                 progress=progress)
    autocast = set_precision(settle(train, device).precision, device)
    kept = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.model.to(memory_format=torch.channels_last)  # as in training
    head = _begin(run, field, anew=settings.anew)
    before = 0 if settings.anew else train.epochs
    engine = TogetherEngine(config, run, head.to(device), boxes, targets, settings,
                            autocast=autocast)
    try:
        write_json(new.path / "provenance.json", make_provenance(
            config, device=device, data_digest=data.video.digest, teacher=data.teacher_name)
            | {"engine": "plain", "part_sizes": run.model.part_sizes()})
        rows = _train(engine, new, before, data, settings, progress=progress)
        table = evaluate_model(run.model.eval(), data)
        new.save_checkpoint(BEST, {"config": config.params(), "model": run.model.state_dict(),
                                   "epoch": before + settings.epochs,
                                   **evaluation_columns(table)})
        _, figures = final_figures(run.model, data, new, config=config, device=device)
        write_json(new.path / "summary.json", {**figures, "together": dataclasses.asdict(settings),
                                               "train_time_s": rows[-1]["train_time_s"]})
        (new.path / STATE).unlink(missing_ok=True)
    finally:
        run.model.load_state_dict(kept)
        run.model.eval()


def _begin(run: Run, field: Field, *, anew: bool) -> FieldHead:
    """The field's head to begin with, and the run's network as it is to begin."""
    config = run.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        head = FieldHead.from_config(field.head.config)
    if anew:
        run.model.load_state_dict(build_model(
            config.model, frame_hw=run.model.frame_hw, frame_count=run.model.frame_count,
            seed=config.train.seed).state_dict())
    else:
        head.load_state_dict(field.head.state_dict())
    return head


def _train(engine: TogetherEngine, new: RunDir, before: int, data: Dataset,
           settings: TogetherSettings, *, progress: bool) -> list[dict[str, Any]]:
    """The epochs that are left, from the last one that was kept; a row for each of all.

    Args:
        before: epochs that the network has been trained for; 0 for one that begins anew.
    """
    config, rows = engine.config, []
    if (new.path / STATE).exists():
        fix = f"remove {STATE} to begin again"
        state = load_checkpoint(new.path / STATE, fix=fix)
        check_keys(state, {"field": dict, "optimizer": dict, "rows": list}, new.path / STATE,
                   fix=fix)
        load_weights(engine.model, state, new.path / STATE, fix=fix)
        engine.field.load_state_dict(state["field"])
        engine.load_optimizer(state["optimizer"])
        rows = state["rows"]
    begun, spent = time.perf_counter(), rows[-1]["train_time_s"] if rows else 0.0
    engine.model.train()
    engine.field.train()
    for epoch in tqdm(range(len(rows), settings.epochs), initial=len(rows), total=settings.epochs,
                      desc=new.path.name, unit="epoch", disable=not progress):
        order = epoch_order(data.split.train, seed=config.train.seed, epoch=before + epoch)
        batches = order.to(engine.device).split(config.train.batch_size)
        engine.generator.manual_seed(config.train.seed * 1_000_003 + epoch)
        sums = torch.zeros(len(COLUMNS), device=engine.device)
        for step, indices in enumerate(batches):
            share = learning_rate((epoch + step / len(batches)) / settings.epochs, lr=1.0,
                                  lr_type=config.train.lr_type)
            engine.field_lr.fill_(settings.field_lr * share)
            sums += engine.step(indices, count=len(indices), weight=settings.weight,
                                lr=settings.lr_share * config.train.lr * share)
        means = dict(zip(COLUMNS, (sums.double() / len(order)).tolist(), strict=True))
        if not math.isfinite(means["total_loss"]):
            raise TrainError(f"the loss became NaN or infinite in epoch {epoch + 1}: use a smaller "
                             f"lr_share than {settings.lr_share:g} or λ than {settings.weight:g}")
        rows.append({"epoch": before + epoch + 1, **means,
                     "train_time_s": spent + time.perf_counter() - begun})
        new.write_table("metrics.csv", pd.DataFrame(rows))
        new.save_checkpoint(STATE, {
            "config": config.params(), "model": engine.model.state_dict(), "epoch": epoch + 1,
            "field": engine.field.state_dict(), "optimizer": engine.optimizer.state_dict(),
            "rows": rows})
    return rows
