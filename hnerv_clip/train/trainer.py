"""The loop that fits a video, interrupted and resumed exactly.

Phase 1 learns pixels; from epoch `pixel_loss_warmup_epochs` on, the cosine loss joins. What a step
computes depends only on the configuration, the seed and the step's number, so a run that goes on
from its checkpoint does what it would have done.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from hnerv_clip.config import Config, parse_lr_type
from hnerv_clip.dataset import Dataset
from hnerv_clip.devices import set_precision, synchronise
from hnerv_clip.distributed import agree, from_rank0, gather_rows, own_device, ranks
from hnerv_clip.engines.plain import COLUMNS, PlainEngine, SetupError
from hnerv_clip.engines.select import (
    can_fall_back,
    engine_name,
    fall_back,
    make_engine,
    settle,
)
from hnerv_clip.evaluate import evaluate_model, evaluation_columns, warm_up
from hnerv_clip.losses import clip_weight, learning_rate
from hnerv_clip.model import build_model
from hnerv_clip.runs.provenance import commit_words, make_provenance
from hnerv_clip.runs.run_dir import BEST, LATEST, RunDir, RunError, load_weights, write_json
from hnerv_clip.train.divergence import LR_FACTORS, Diverged, check_collapse, measure_baselines
from hnerv_clip.train.outputs import Recorder, final_figures

ROOM_TO_WARM_UP = 16 * 2**30  # free bytes of a GPU, for an evaluation beside the engine
class TrainError(RuntimeError):
    """Training can't go on; the message says where it stopped and what to change."""


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
        self.recorder = Recorder(run, self.model, has_head=config.model.predict_clip)
        self.best_psnr_db = float("-inf")
        self.best_table: pd.DataFrame | None = None  # of the best model, by this process
        self.recoveries: list[dict[str, Any]] = []  # from collapses
        self.baselines = measure_baselines(self.engine, dataset.split.train)
        self.train_time_s, self._clock = 0.0, None  # the clock stands still outside training steps
        # Of this process
        self.setup_time_s = self.eval_time_s = self.checkpoint_time_s = 0.0
        self.checkpoints = 0
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
        with bar, self.recorder.open_board(self.epoch):
            while self.epoch < train.epochs:
                try:
                    row = self._run_epoch(bar)
                except Diverged as error:
                    self._recover(error)
                    bar.reset()
                    bar.update(self.epoch * self.frame_count)
                    continue
                shown = {"loss": f"{row['total_loss']:.4f}", "PSNR": f"{row['psnr_db']:.2f} dB"}
                if self.config.model.predict_clip:
                    shown["similarity"] = f"{1 - row['clip_loss']:.3f}"
                bar.set_postfix(shown, refresh=False)
            if agree(self.best_psnr_db) == -math.inf:  # went on after its last epoch, its best lost
                self._evaluate()
        self._finish()

    def _run_epoch(self, bar: tqdm) -> dict[str, Any]:
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
            row |= self._evaluate()
        self.recorder.add(row)
        check_collapse(self.recorder.history, self.baselines, final=final,
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
        weight = self._clip_weight(self.epoch)
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
               "clip_weight": self._clip_weight(self.epoch),
               **dict(zip(COLUMNS, means)), "train_time_s": self.train_time_s}
        if not self.config.model.predict_clip:
            row["clip_loss"] = float("nan")
        self.epoch, self.batch, self.losses = self.epoch + 1, 0, self._no_losses()
        return row

    def _check_finite(self) -> None:
        bad = (~self.losses[:, 2].isfinite()).nonzero()
        if len(bad):
            self.recorder.write_metrics()
            step = self.epoch * self.steps + int(bad[0]) + 1
            raise Diverged(f"the loss became NaN or infinite at step {step} (epoch "
                           f"{self.epoch + 1})", self.epoch + 1)

    def _recover(self, error: Diverged) -> None:
        """Go back to the best model from before a collapse, else to the start, with a lower lr.

        All of it is in one file, written at once: a run that is interrupted here finds either the
        state before, in which it collapses again, or the state after.
        """
        train, message = self.config.train, f"training collapsed: {error}"
        if train.on_divergence == "stop" or len(self.recoveries) == len(LR_FACTORS):
            self.recorder.write_metrics()
            tried = "".join(f", {note['lr']:g}" for note in self.recoveries)
            ways = "another outf" if self.recoveries else \
                "another outf, or again in this one with on_divergence='recover'"
            raise TrainError(f"{message}. Train with a lower lr than {train.lr:g}{tried} in "
                             f"{ways}. {self.run.path} keeps its checkpoints")
        best = from_rank0(self._best_before(error.fell_at) if self.rank == 0 else None)
        weights = best["model"] if best else build_model(
            self.config.model, frame_hw=self.dataset.video.frame_hw,
            frame_count=len(self.dataset.video.frames), seed=train.seed).state_dict()
        note = {"epoch": self.epoch, "reason": str(error),
                "back_to_epoch": best["epoch"] if best else 0,
                "lr": LR_FACTORS[len(self.recoveries)] * train.lr}
        self.recoveries.append(note)
        message += f"; back to epoch {note['back_to_epoch']} with lr={note['lr']:g}"
        if self.rank == 0:
            self.run.log(message)
            warnings.warn(message, stacklevel=3)
        self.epoch, self.batch = note["back_to_epoch"], 0
        self.recorder.history = [row for row in self.recorder.history
                                 if row["epoch"] <= self.epoch]
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

    def _evaluate(self) -> dict[str, float]:
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
        self.recorder.add_similarity(table, self.epoch)
        # Chosen by the frames that train: nothing of the held-out ones leaks into the choice
        # nor of pixels that a mask hides
        score = columns[f"eval_psnr{'' if self.dataset.mask is None else '_outside'}_train"]
        if score > self.best_psnr_db or self._head_joined and math.isfinite(score):
            self.best_psnr_db = score
            # An engine that decodes does so in its own way, and other ranks have no such table
            self.best_table = table if engine is None and self.world == 1 else None
            self.run.save_checkpoint(BEST, {
                "config": self.config.params(), "model": self.model.state_dict(),
                "epoch": self.epoch, **columns})
        return columns

    @property
    def _head_joined(self) -> bool:
        """Whether this is the first evaluation after the warm-up: no model from before, whose
        head is random, stays the best one, however good its picture."""
        before = (self.epoch - 1) // self.config.train.eval_freq * self.config.train.eval_freq
        return self.config.model.predict_clip and \
            self._clip_weight(self.epoch - 1) > self._clip_weight(before - 1)

    def _clip_weight(self, epoch: int) -> float:
        """λ of an epoch, counted from 0."""
        train = self.config.train
        return clip_weight(epoch, clip_loss_weight=train.clip_loss_weight,
                           pixel_loss_warmup_epochs=train.pixel_loss_warmup_epochs)

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
        """Write the figures of the best model and the times of the run; that closes it."""
        self.recorder.write_metrics()
        table, figures = final_figures(self.model, self.dataset, self.run, config=self.config,
                                       device=self.device, trained=self.best_table)
        if self.rank:
            return
        self.recorder.write_similarity(table)
        figures["eval_time_s"] += self.eval_time_s
        frames = self.frame_count * self.config.train.epochs
        write_json(self.run.path / "summary.json", {
            **figures, "train_time_s": self.train_time_s,
            "train_frames_per_s": frames / self.train_time_s, "setup_time_s": self.setup_time_s,
            "compile_s": self.engine.compile_s, "checkpoint_time_s": self.checkpoint_time_s,
            "checkpoints": self.checkpoints,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda" else None})

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
        self.recorder.write_metrics()
        if self.rank == 0:
            self.run.save_checkpoint(LATEST, {
                "config": self.config.params(), "model": self.model.state_dict(),
                "optimizer": self.engine.optimizer.state_dict(), "epoch": self.epoch,
                "batch": self.batch, "losses": self.losses.cpu(), "history": self.recorder.history,
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
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.recorder.history = state["history"]
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
