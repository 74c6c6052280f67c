"""What a run writes beside its checkpoints: metrics, TensorBoard's events, the final figures."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.tensorboard import SummaryWriter

from hnerv_clip.config import Config
from hnerv_clip.dataset import Dataset
from hnerv_clip.distributed import from_rank0, gather_rows, ranks
from hnerv_clip.evaluate import (
    evaluate_model,
    evaluate_stored,
    evaluation_columns,
    store_video,
    summarise,
)
from hnerv_clip.model import HNeRV
from hnerv_clip.runs.run_dir import BEST, VIDEO, RunDir, load_weights

WRITE_S = 5  # seconds between two times that metrics.csv is written


class Recorder:
    """What one rank writes of its run as it trains; all ranks keep the rows, rank 0 writes them."""

    def __init__(self, run: RunDir, model: HNeRV, *, has_head: bool):
        self.run, self.model, self.has_head = run, model, has_head
        self.rank, _ = ranks()
        self.history: list[dict[str, Any]] = []  # a row per epoch
        self.board: SummaryWriter | None = None
        self.written_at = -math.inf  # metrics.csv

    def open_board(self, epoch: int) -> SummaryWriter | nullcontext:
        """TensorBoard's writer, to be closed by `with`; events after `epoch` are replaced."""
        if self.rank:
            return nullcontext()
        sizes = self.model.part_sizes()
        shown = (sizes["encoder"], sizes["decoder"] + sizes["rgb_head"] + sizes["clip_head"] +
                 sizes["coordinate_encoder"], sizes["stored"])
        name = "Encoder_{:.2f}M_Decoder_{:.2f}M_Total_{:.2f}M".format(*(n / 1e6 for n in shown))
        self.board = SummaryWriter(str(self.run.path / name / "tensorboard"), purge_step=epoch + 1)
        return self.board

    def add(self, row: dict[str, Any]) -> None:
        """Put an epoch's row into metrics.csv, TensorBoard and the log."""
        self.history.append(row)
        if self.rank:
            return
        # All rows again each time: after short epochs, that would take longer than training
        if time.monotonic() - self.written_at > WRITE_S:
            self.write_metrics()
        for name, value in row.items():
            if name.startswith("eval_"):
                self.board.add_scalar(f"eval/{name[5:]}", value, row["epoch"])
            elif name not in ("epoch", "step") and value == value:
                self.board.add_scalar(f"train/{name}", value, row["epoch"])
        shown = {k: float(f"{v:.5g}") for k, v in row.items() if v == v}
        self.run.log(" ".join(f"{k}={v:g}" for k, v in shown.items()))

    def add_similarity(self, table: pd.DataFrame, epoch: int) -> None:
        """Write an evaluation's similarity per frame, on rank 0, as a table and a histogram."""
        self.write_similarity(table)
        if self.has_head:
            shown = table[table.source != "interpolated"]
            self.board.add_histogram("eval/clip_similarity_distribution",
                                     shown.clip_similarity.to_numpy(), epoch)

    def write_similarity(self, table: pd.DataFrame) -> None:
        """Write an evaluation's similarity per frame, on rank 0."""
        if self.has_head:
            names = ["variant", "source", "frame", "split", "clip_similarity", "clip_centred"]
            self.run.write_table("clip_similarity_per_frame.csv", table[names])

    def write_metrics(self) -> None:
        """Write metrics.csv anew."""
        if self.rank == 0 and self.history:
            self.run.write_table("metrics.csv", pd.DataFrame(self.history))
            self.written_at = time.monotonic()


def final_figures(model: HNeRV, dataset: Dataset, run: RunDir, *, config: Config,
                  device: torch.device, trained: pd.DataFrame | None = None
                  ) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Evaluate a run's best model as trained and as stored, by the plain model, which is loaded.

    Writes video.hnerv and, on rank 0, evaluation.csv.

    Args:
        model: takes the weights of the best model.
        device: where the stored video is decoded.
        trained: what `evaluate_model` gave for the best model, where that is known.
    Returns:
        The table of a row per frame, and on rank 0 what summary.json says of it.
    """
    share = ranks()
    rank, _ = share
    started = time.perf_counter()
    best = from_rank0(run.load_checkpoint(BEST) if rank == 0 else None)
    load_weights(model, best, run.path / BEST, fix=run.checkpoint_fix(BEST))
    if trained is None:
        trained = gather_rows(evaluate_model(model, dataset, share=share))
    eval_time_s = time.perf_counter() - started
    started = time.perf_counter()
    video = run.path / VIDEO
    if rank == 0:
        store_video(model, dataset, video, config=config)
        run.bind_video()
    content = from_rank0(video.read_bytes() if rank == 0 else None)
    with tempfile.TemporaryDirectory() as folder:  # a shared disk may show the file late
        copy = Path(folder) / video.name
        copy.write_bytes(content)
        stored, rate_bpp = evaluate_stored(copy, dataset, device=device, share=share)
    stored = gather_rows(stored)
    stored_time_s = time.perf_counter() - started
    if rank:
        return pd.DataFrame(), {}
    table = pd.concat([trained, stored], ignore_index=True)
    run.write_table("evaluation.csv", table)
    for row in summarise(table).to_dict("records"):
        run.log(f"final: {row}")
    return table, {
        "best_epoch": best["epoch"], **evaluation_columns(trained),
        **{f"quantised_{k}": v for k, v in evaluation_columns(stored).items()},
        "rate_bpp": rate_bpp, "size_bytes": len(content), "part_sizes": model.part_sizes(),
        "eval_time_s": eval_time_s, "stored_time_s": stored_time_s}
