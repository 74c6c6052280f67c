"""Fit a video: one loop for CPU, one GPU and many ranks, interrupted and resumed exactly.

Phase 1 learns pixels; from epoch `pixel_loss_warmup_epochs` on, the cosine loss joins. What a step
computes depends only on the configuration, the seed and the step's number, so a run that goes on
from its checkpoint does what it would have done.
"""

from __future__ import annotations

import copy
import errno
import math
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from hnerv_clip.config import Config, VideoConfig, parse_lr_type
from hnerv_clip.dataset import Dataset, check_same_video, load_dataset, resolve_config
from hnerv_clip.devices import set_precision, synchronise
from hnerv_clip.distributed import agree, from_rank0, gather_rows, own_device, ranks
from hnerv_clip.divergence import LR_FACTORS, Diverged, check_collapse, measure_baselines
from hnerv_clip.engines.plain import COLUMNS, PlainEngine, SetupError
from hnerv_clip.engines.select import (
    can_fall_back,
    engine_name,
    fall_back,
    make_engine,
    settle,
)
from hnerv_clip.evaluate import (
    bind_video,
    evaluate_model,
    evaluate_stored,
    evaluation_columns,
    store_video,
    summarise,
    warm_up,
)
from hnerv_clip.field.fit_run import fit_head
from hnerv_clip.field.query import has_field
from hnerv_clip.inference import load_run
from hnerv_clip.losses import PIXEL_LOSSES, check_ms_ssim_size, clip_weight, learning_rate
from hnerv_clip.model import build_model, plan_model
from hnerv_clip.patches import make_grid
from hnerv_clip.runs.provenance import commit_words, make_provenance
from hnerv_clip.runs.run_dir import BEST, LATEST, RunDir, RunError, load_weights, write_json
from hnerv_clip.video import NAMED_VIDEOS, find_source, load_video, split_frames

ROOM_TO_WARM_UP = 16 * 2**30  # free bytes of a GPU, for an evaluation beside the engine
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class TrainError(RuntimeError):
    """Training can't go on; the message says where it stopped and what to change."""


@dataclass
class TrainResult:
    """A run that reached its end."""

    run_dir: Path
    summary: dict[str, Any]  # final figures, as in summary.json
    metrics: pd.DataFrame  # a row per epoch


def train(config: Config, run_dir: str | Path, *, cache_dir: str | Path = "output/cache",
          progress: bool = True, dataset: Dataset | None = None) -> TrainResult | None:
    """Train a run to its end, from its last checkpoint where there is one.

    A finished run is returned as it stands. Under `torch.distributed` every rank calls this;
    each takes its share of every batch, and rank 0 alone writes.

    Args:
        run_dir: the run's folder; another configuration's is refused.
        cache_dir: where `prepare_dataset` left the teacher's embeddings.
        progress: show a progress bar.
        dataset: what `prepare_dataset` returned for this configuration, else it is loaded.
    Returns:
        The run's figures; None on ranks above 0, which may not see rank 0's files yet.
    Raises:
        ConfigError: before any long work, see there.
        RunError: likewise; or the disk is full or became read-only, the last checkpoint is intact.
        TrainError: training collapsed, and `on_divergence` or the tries so far forbid another; or
            memory ran out.
    """
    rank, _ = ranks()
    config = resolve_config(config, dataset and dataset.video)
    run = RunDir.create(run_dir, config) if rank == 0 else RunDir(run_dir)
    if not agree(run.finished):
        with run.lock() if rank == 0 else nullcontext():
            dataset = dataset or load_dataset(config, cache_dir)
            check_same_video(run, dataset.video, config.video.data_path)
            if rank == 0:
                run.note_location(config)
            loop = Trainer(config, run, dataset)
            try:
                loop.fit(progress=progress)
            except torch.cuda.OutOfMemoryError as error:
                raise TrainError(
                    f"the GPU's memory ran out ({str(error).splitlines()[0]}); lower batch_size="
                    f"{config.train.batch_size}, modelsize or resize_list. The last checkpoint of "
                    f"{run.path} is intact") from error
            except SetupError as error:
                raise TrainError(f"the fast engine cannot be set up here ({error}); use engine="
                                 f"'plain'. The last checkpoint of {run.path} is intact") from error
            except RuntimeError as error:
                if config.train.engine == "plain" or "C compiler" not in str(error):
                    raise
                raise TrainError(f"the fast engine can't be compiled here ({error}); install a C "
                                 "compiler such as gcc, or use engine='plain'") from error
            except OSError as error:  # of the log or TensorBoard; checkpoints say it themselves
                if error.errno not in UNWRITABLE:
                    raise
                raise RunError(f"cannot write to {run.path}: {error}. Its last checkpoint is "
                               "intact; free space or make the folder writable, then run again "
                               "to resume") from error
    if rank == 0 and config.model.head == "field" and not has_field(run):
        fit_head(load_run(run.path, cache_dir=cache_dir, device=config.train.device),
                 cache_dir=cache_dir, device=config.train.device, progress=progress)
    return None if rank else TrainResult(run.path, run.summary(), run.metrics())


def check_run(config: Config) -> Config:
    """Raise what would stop a run later, before the teacher or any training takes time.

    Returns:
        The configuration with all that was `auto` chosen for the video's size.
    Raises:
        ConfigError: see `load_video`, `make_grid`, `plan_model` and the MS-SSIM losses.
    """
    if config.video.data_path not in NAMED_VIDEOS:  # a job may start in another folder
        config = config.replace(data_path=str(find_source(config.video.data_path)[0]))
    frame_hw, frame_count = _video_size(config.video)
    config = config.resolve(frame_hw)
    split_frames(frame_count, config.video.data_split, config.video.split_phase)
    make_grid(config.teacher, frame_hw)
    plan_model(config.model, frame_hw=frame_hw, frame_count=frame_count)
    if "ms_ssim" in PIXEL_LOSSES[config.train.loss]:
        check_ms_ssim_size(frame_hw)
    return config


@lru_cache
def _video_size(config: VideoConfig) -> tuple[tuple[int, int], int]:
    """((H, W), T) of a video, decoded once for many runs."""
    video = load_video(config)
    return video.frame_hw, len(video.frames)


def epoch_order(train_frames: np.ndarray, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the training frames: int64, the same on every rank."""
    shuffle = torch.randperm(len(train_frames),
                             generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return torch.from_numpy(np.asarray(train_frames, dtype=np.int64))[shuffle]


class Trainer:
    """The state of a training run: model, optimizer, position, history."""

    def __init__(self, config: Config, run: RunDir, dataset: Dataset):
        self.born = time.perf_counter()
        self.config, self.run = config, run
        self.rank, self.world = ranks()
        self.device = own_device(config.train.device)
        self.choice = settle(config.train, self.device, from_rank0(self._noted()))
        self.autocast = set_precision(self.choice.precision, self.device)
        self.model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                                 frame_count=len(dataset.video.frames), seed=config.train.seed)
        self.model.to(self.device, memory_format=torch.channels_last)
        with ThreadPoolExecutor(1) as beside:  # while kernels compile
            if self.device.type == "cuda" and self.autocast == torch.bfloat16 and \
                    torch.cuda.mem_get_info(self.device)[0] > ROOM_TO_WARM_UP:
                beside.submit(warm_up, copy.deepcopy(self.model).eval(), dataset)
            self.engine = self._make_engine(dataset)
        # The video stays on the device as uint8
        self.dataset = replace(dataset, video=replace(dataset.video, frames=self.engine.frames))
        self.frames_per_step = config.train.batch_size * self.world
        self.frame_count = len(dataset.split.train)
        self.steps = -(-self.frame_count // self.frames_per_step)  # the last may be short
        self.epoch = self.batch = 0  # position: finished epochs, and finished steps of the next
        self.losses = self._no_losses()
        self.history: list[dict[str, Any]] = []
        self.best_psnr_db = float("-inf")
        self.recoveries: list[dict[str, Any]] = []  # from collapses
        self.baselines = measure_baselines(self.engine, dataset.split.train)
        self.train_time_s, self._clock = 0.0, None  # the clock stands still outside training steps
        # Of this process
        self.setup_time_s = self.stored_time_s = 0.0
        self.eval_time_s, self.checkpoint_time_s, self.checkpoints = 0.0, 0.0, 0
        self.written_at = -math.inf  # metrics.csv
        self.unsaved_steps, self.save_steps = 0, math.inf  # ranks save together, so by steps

    def _noted(self) -> dict[str, Any] | None:
        """On rank 0, what an interrupted run noted of itself; None for a new one."""
        if self.rank or not (self.run.path / LATEST).exists():
            return None
        try:
            return self.run.provenance()
        except RunError:  # lost or damaged: it is written anew
            return {}

    def _make_engine(self, dataset: Dataset) -> PlainEngine:
        return make_engine(self.config.replace(engine=self.choice.engine), self.model, dataset,
                           autocast=self.autocast)

    def _no_losses(self) -> Tensor:
        return torch.zeros(self.steps, len(COLUMNS), device=self.device)

    # The loop

    def fit(self, *, progress: bool) -> None:
        """Train from the last checkpoint to the end, and write the final figures."""
        train = self.config.train
        self._resume()
        self._describe()
        if progress and not self.rank:
            tqdm.write(self.computed)
        self.setup_time_s = time.perf_counter() - self.born - self.engine.compile_s
        bar = tqdm(total=train.epochs * self.frame_count, unit="frame", desc=self.run.path.name,
                   initial=self.epoch * self.frame_count + self.batch * self.frames_per_step,
                   disable=not progress or self.rank > 0, mininterval=1, dynamic_ncols=True)
        with bar, self._tensorboard() as board:
            while self.epoch < train.epochs:
                try:
                    row = self._run_epoch(bar, board)
                except Diverged as error:
                    self._recover(error)
                    bar.reset()
                    bar.update(self.epoch * self.frame_count)
                    continue
                shown = {"loss": f"{row['total_loss']:.4f}", "PSNR": f"{row['psnr_db']:.2f} dB"}
                if self.config.model.predict_clip:
                    shown["CLIP"] = f"{1 - row['clip_loss']:.3f}"
                bar.set_postfix(shown, refresh=False)
            if agree(self.best_psnr_db) == -math.inf:  # went on after its last epoch, its best lost
                self._evaluate(board)
        self._finish()

    def _run_epoch(self, bar: tqdm, board: SummaryWriter | nullcontext) -> dict[str, Any]:
        """What is left of an epoch: train, measure where it is time, record, save.

        Raises:
            Diverged: training has collapsed.
        """
        train = self.config.train
        self._train_epoch(bar)
        row = self._finish_epoch()
        final = self.epoch == train.epochs
        measured = self.epoch % train.eval_freq == 0 or final
        if measured:
            row |= self._evaluate(board)
        self._record(row, board)
        check_collapse(self.history, self.baselines, final=final,
                       warm_up=parse_lr_type(train.lr_type)[0] * train.epochs)
        if measured or self._save_is_due():
            self._save_latest()
        return row

    def _learning_rate(self, progress: float) -> float:
        factor = LR_FACTORS[len(self.recoveries) - 1] if self.recoveries else 1
        return learning_rate(progress, lr=factor * self.config.train.lr,
                             lr_type=self.config.train.lr_type)

    def _train_epoch(self, bar: tqdm) -> None:
        """The steps that are left of this epoch."""
        train = self.config.train
        order = epoch_order(self.dataset.split.train, seed=train.seed, epoch=self.epoch)
        batches = order.to(self.device).split(self.frames_per_step)
        weight = clip_weight(self.epoch, clip_loss_weight=train.clip_loss_weight,
                             pixel_loss_warmup_epochs=train.pixel_loss_warmup_epochs)
        self.model.train()
        self._start_clock()
        while self.batch < len(batches):
            indices = batches[self.batch]
            lr = self._learning_rate((self.epoch + self.batch / self.steps) / train.epochs)
            self.losses[self.batch] = self._step(
                indices[self.rank::self.world], count=len(indices), lr=lr, weight=weight)
            self.batch += 1
            bar.update(len(indices))
            self.unsaved_steps += 1
            if self._save_is_due():
                self._save_latest()
        self._stop_clock()
        self.save_steps = agree(max(1, round(train.checkpoint_s * (
            self.epoch * self.steps + self.batch) / self.train_time_s)))

    def _step(self, indices: Tensor, **settings: Any) -> Tensor:
        """A step of the engine, by the plain one from where `auto` cannot set up its fast one."""
        try:
            return self.engine.step(indices, **settings)
        except (SetupError, torch.cuda.OutOfMemoryError) as error:
            if not can_fall_back(self.engine):
                raise
            self.fallback = str(error).strip().splitlines()[0]
        self.engine = fall_back(self.engine, self.dataset, self.fallback)
        if self.rank == 0:
            facts = self.run.provenance() | {"engine": "plain", "fallback": self.fallback}
            write_json(self.run.path / "provenance.json", facts)
            self.run.log(f"goes on by the plain engine: {self.fallback}")
        return self.engine.step(indices, **settings)

    def _save_is_due(self) -> bool:
        if self.world > 1:
            return self.unsaved_steps >= self.save_steps
        return time.monotonic() - self.saved_at > self.config.train.checkpoint_s

    def _finish_epoch(self) -> dict[str, Any]:
        """Close the epoch: its row of metrics, and the position moved on."""
        if self.world > 1:
            dist.all_reduce(self.losses)
        self._check_finite()
        means = (self.losses.double().sum(0) / self.frame_count).tolist()
        train = self.config.train
        row = {"epoch": self.epoch + 1, "step": (self.epoch + 1) * self.steps,
               "lr": self._learning_rate((self.epoch + (self.steps - 1) / self.steps)
                                         / train.epochs),
               "clip_weight": clip_weight(
                   self.epoch, clip_loss_weight=train.clip_loss_weight,
                   pixel_loss_warmup_epochs=train.pixel_loss_warmup_epochs),
               **dict(zip(COLUMNS, means)), "train_time_s": self.train_time_s}
        if not self.config.model.predict_clip:
            row["clip_loss"] = float("nan")
        self.epoch, self.batch, self.losses = self.epoch + 1, 0, self._no_losses()
        return row

    def _check_finite(self) -> None:
        bad = (~self.losses[:, 2].isfinite()).nonzero()
        if len(bad):
            self._write_metrics()
            step = self.epoch * self.steps + int(bad[0]) + 1
            raise Diverged(f"the loss became NaN or infinite at step {step} (epoch "
                           f"{self.epoch + 1})", self.epoch + 1)

    def _recover(self, error: Diverged) -> None:
        """Go back to the best model from before a collapse, else to the start, with a lower lr.

        All of it is in one file, written at once: a run that is interrupted here finds either the
        state before, in which it collapses again, or the state after.
        """
        train, told = self.config.train, f"training collapsed: {error}"
        if train.on_divergence == "stop" or len(self.recoveries) == len(LR_FACTORS):
            self._write_metrics()
            tried = "".join(f", {note['lr']:g}" for note in self.recoveries)
            ways = "another outf" if self.recoveries else \
                "another outf, or again in this one with on_divergence='recover'"
            raise TrainError(f"{told}. Train with a lower lr than {train.lr:g}{tried} in {ways}. "
                             f"{self.run.path} keeps its checkpoints")
        best = from_rank0(self._best_before(error.fell_at) if self.rank == 0 else None)
        weights = best["model"] if best else build_model(
            self.config.model, frame_hw=self.dataset.video.frame_hw,
            frame_count=len(self.dataset.video.frames), seed=train.seed).state_dict()
        note = {"epoch": self.epoch, "reason": str(error),
                "back_to_epoch": best["epoch"] if best else 0,
                "lr": LR_FACTORS[len(self.recoveries)] * train.lr}
        self.recoveries.append(note)
        told += f"; back to epoch {note['back_to_epoch']} with lr={note['lr']:g}"
        if self.rank == 0:
            self.run.log(told)
            warnings.warn(told, stacklevel=3)
        self.epoch, self.batch = note["back_to_epoch"], 0
        self.history = [row for row in self.history if row["epoch"] <= self.epoch]
        if not best:
            self.best_psnr_db = -math.inf
        self.losses = self._no_losses()
        compile_s, self.engine = self.engine.compile_s, None  # free its memory for the next
        self.model.load_state_dict(weights)
        self.engine = self._make_engine(self.dataset)
        self.engine.compile_s += compile_s
        self._save_latest()
        self._describe()

    def _best_before(self, fell_at: int) -> dict[str, Any] | None:
        """The best checkpoint, if it is from before an epoch (counted from 1)."""
        if self.best_psnr_db == -math.inf:  # none yet, or one that an earlier recovery gave up
            return None
        best = self.run.load_checkpoint(BEST)
        return best if best["epoch"] < fell_at else None

    # What is measured and written

    def _evaluate(self, board: SummaryWriter | nullcontext) -> dict[str, float]:
        """Evaluate; keep the best model. Returns the epoch's evaluation columns."""
        started = time.perf_counter()
        engine = self.engine if self.engine.decodes else None
        table = gather_rows(evaluate_model(self.model, self.dataset, share=(self.rank, self.world),
                                       engine=engine))
        self.engine.sync()
        self.eval_time_s += time.perf_counter() - started
        if self.rank:
            return {}
        columns = evaluation_columns(table)
        self._write_similarity(table)
        if self.config.model.predict_clip:
            own = table[table.source != "interpolated"]
            board.add_histogram("eval/clip_similarity_distribution",
                                own.clip_similarity.to_numpy(), self.epoch)
        # Chosen by the frames that train: nothing of the held-out ones leaks into the choice
        # nor of pixels that a mask hides
        score = columns[f"eval_psnr{'' if self.dataset.mask is None else '_outside'}_train"]
        if score > self.best_psnr_db:
            self.best_psnr_db = score
            self.run.save_checkpoint(BEST, {
                "config": self.config.params(), "model": self.model.state_dict(),
                "epoch": self.epoch, **columns})
        return columns

    def _write_similarity(self, table: pd.DataFrame) -> None:
        if self.config.model.predict_clip:
            names = ["variant", "source", "frame", "split", "clip_similarity", "clip_centred"]
            self.run.write_table("clip_similarity_per_frame.csv", table[names])

    def _record(self, row: dict[str, Any], board: SummaryWriter | nullcontext) -> None:
        """Put an epoch's row into metrics.csv, TensorBoard and the log."""
        self.history.append(row)
        if self.rank:
            return
        # All rows again each time: after short epochs, that would take longer than training
        if time.monotonic() - self.written_at > 5:
            self._write_metrics()
        for name, value in row.items():
            if name.startswith("eval_"):
                board.add_scalar(f"eval/{name[5:]}", value, self.epoch)
            elif name not in ("epoch", "step") and value == value:
                board.add_scalar(f"train/{name}", value, self.epoch)
        shown = {k: float(f"{v:.5g}") for k, v in row.items() if v == v}
        self.run.log(" ".join(f"{k}={v:g}" for k, v in shown.items()))

    def _write_metrics(self) -> None:
        if self.rank == 0 and self.history:
            self.run.write_table("metrics.csv", pd.DataFrame(self.history))
            self.written_at = time.monotonic()

    def _tensorboard(self) -> SummaryWriter | nullcontext:
        if self.rank:
            return nullcontext()
        sizes = self.model.part_sizes()
        shown = (sizes["encoder"], sizes["decoder"] + sizes["rgb_head"] + sizes["clip_head"] +
                 sizes["coordinate_encoder"], sizes["stored"])
        name = "Encoder_{:.2f}M_Decoder_{:.2f}M_Total_{:.2f}M".format(*(n / 1e6 for n in shown))
        return SummaryWriter(str(self.run.path / name / "tensorboard"), purge_step=self.epoch + 1)

    @property
    def computed(self) -> str:
        """What is computed in, by what, and why."""
        return f"{self.choice.precision} by the {engine_name(self.engine)} engine " \
               f"({self.choice.reason})"

    def _describe(self) -> None:
        """Write what is about to run, before the first step of this process."""
        if self.rank:
            return
        facts = make_provenance(
            self.config, device=self.device, world_size=self.world,
            data_digest=self.dataset.video.digest,
            teacher=self.dataset.teacher_name if self.config.model.predict_clip else None)
        facts["engine"], facts["precision"] = engine_name(self.engine), self.choice.precision
        if self.recoveries:
            facts["recoveries"] = self.recoveries
        facts["part_sizes"] = self.model.part_sizes()
        facts["resumed_at_epoch"] = self.epoch
        write_json(self.run.path / "provenance.json", facts)
        self.run.log(f"start at epoch {self.epoch}: {facts['device']}, commit "
                     f"{commit_words(facts)}; {self.computed}; {self.dataset.split}; "
                     f"values {facts['part_sizes']}")

    def _finish(self) -> None:
        """Evaluate the best model as trained and as stored, by the plain model; close the run."""
        self._write_metrics()
        started = time.perf_counter()
        best = from_rank0(self.run.load_checkpoint(BEST) if self.rank == 0 else None)
        load_weights(self.model, best, self.run.path / BEST, fix=self.run.checkpoint_fix(BEST))
        share = (self.rank, self.world)
        trained = gather_rows(evaluate_model(self.model, self.dataset, share=share))
        self.eval_time_s += time.perf_counter() - started
        started = time.perf_counter()
        video = self.run.path / "video.hnerv"
        if self.rank == 0:
            store_video(self.model, self.dataset, video, config=self.config)
            bind_video(self.run)
        content = from_rank0(video.read_bytes() if self.rank == 0 else None)
        with tempfile.TemporaryDirectory() as folder:  # a shared disk may show the file late
            own = Path(folder) / video.name
            own.write_bytes(content)
            stored, rate_bpp = evaluate_stored(own, self.dataset, device=self.device, share=share)
        stored = gather_rows(stored)
        self.stored_time_s = time.perf_counter() - started
        if self.rank:
            return
        table = pd.concat([trained, stored], ignore_index=True)
        self.run.write_table("evaluation.csv", table)
        self._write_similarity(table)
        frames = self.frame_count * self.config.train.epochs
        write_json(self.run.path / "summary.json", {
            "best_epoch": best["epoch"], **evaluation_columns(trained),
            **{f"quantised_{k}": v for k, v in evaluation_columns(stored).items()},
            "rate_bpp": rate_bpp, "size_bytes": len(content),
            "part_sizes": self.model.part_sizes(), "train_time_s": self.train_time_s,
            "train_frames_per_s": frames / self.train_time_s,
            "setup_time_s": self.setup_time_s, "compile_s": self.engine.compile_s,
            "eval_time_s": self.eval_time_s, "stored_time_s": self.stored_time_s,
            "checkpoint_time_s": self.checkpoint_time_s, "checkpoints": self.checkpoints,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda" else None})
        for row in summarise(table).to_dict("records"):
            self.run.log(f"final: {row}")

    # Interruption

    def _save_latest(self) -> None:
        """Write all that is needed to go on from here."""
        self._stop_clock()
        started = time.perf_counter()
        if self.world > 1:  # each rank knows its own part of an unfinished epoch
            dist.all_reduce(self.losses)
        self._check_finite()
        self.engine.sync()
        if self.rank:
            self.losses.zero_()
        self._write_metrics()
        if self.rank == 0:
            self.run.save_checkpoint(LATEST, {
                "config": self.config.params(), "model": self.model.state_dict(),
                "optimizer": self.engine.optimizer.state_dict(), "epoch": self.epoch,
                "batch": self.batch, "losses": self.losses.cpu(), "history": self.history,
                "best_psnr_db": self.best_psnr_db, "train_time_s": self.train_time_s,
                "world_size": self.world, "recoveries": self.recoveries})
        self.checkpoint_time_s += time.perf_counter() - started
        self.checkpoints += 1
        self.saved_at, self.unsaved_steps = time.monotonic(), 0
        self._start_clock()

    def _resume(self) -> None:
        """Go on from model_latest.pth, where there is one."""
        self.saved_at = time.monotonic()
        if not agree((self.run.path / LATEST).exists()):
            return
        state = self.run.load_checkpoint(LATEST)
        position = state["epoch"] * self.steps + state["batch"]
        if position != agree(position):
            raise RunError(f"{self.run.path / LATEST} is not the same file for every rank; is the "
                           "folder shared by all nodes? Launch it again in a minute")
        if state["world_size"] != self.world and state["batch"]:
            raise RunError(f"{self.run.path} was interrupted within an epoch on "
                           f"{state['world_size']} ranks; go on with as many, not {self.world}")
        path, fix = self.run.path / LATEST, self.run.checkpoint_fix(LATEST)
        fits = 0 <= state["epoch"] <= self.config.train.epochs and 0 <= state["batch"] <= self.steps
        if not fits or len(state["history"]) != state["epoch"] or state["batch"] and \
                getattr(state["losses"], "shape", None) != self.losses.shape:
            raise RunError(f"{path} is damaged: its position is epoch {state['epoch']}, step "
                           f"{state['batch']}, after {len(state['history'])} epochs; {fix}")
        load_weights(self.model, state, path, fix=fix)
        try:
            self.engine.load_optimizer(state["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise RunError(f"{path} is damaged: its optimizer's state does not fit ({error}); {fix}"
                           ) from error
        self.epoch, self.batch, self.history = state["epoch"], state["batch"], state["history"]
        self.best_psnr_db, self.train_time_s = state["best_psnr_db"], state["train_time_s"]
        self.recoveries = state.get("recoveries", [])
        if self.rank == 0 and self.batch:
            self.losses.copy_(state["losses"])
        if self.rank == 0 and self.best_psnr_db > -math.inf:
            try:
                self.run.load_checkpoint(BEST)
            except RunError as error:
                self.best_psnr_db = -math.inf
                self.run.log(f"the best model is chosen anew, from epoch {self.epoch + 1}: {error}")

    # Small things

    def _start_clock(self) -> None:
        synchronise(self.device)
        self._clock = time.perf_counter() - self.engine.compile_s

    def _stop_clock(self) -> None:
        if self._clock is not None:
            synchronise(self.device)
            self.train_time_s += time.perf_counter() - self.engine.compile_s - self._clock
            self._clock = None
