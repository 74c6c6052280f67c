"""Shared by the parts of a benchmark: data, engines, repeated timing, a run's record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hnerv_clip.config import Config
from hnerv_clip.dataset import Dataset, load_dataset
from hnerv_clip.devices import synchronise
from hnerv_clip.runs.rows import run_row
from hnerv_clip.runs.run_dir import RunDir

# Parts of a whole training's wall clock; what is left is `rest_s`
CLOCKS = ("data_s", "setup_time_s", "compile_s", "train_time_s", "eval_time_s", "stored_time_s",
          "checkpoint_time_s")


@dataclass
class Bench:
    """Data, engines and timing that the parts of a benchmark share."""

    config: Config
    device: torch.device
    repeats: int
    repeat_s: float  # a repeat calls as often as fills this time, once at least
    results: dict[str, Any]  # what the JSON file holds
    cache_dir: str | Path
    outf: str | Path
    import_s: float = 0.0  # from the process's start to that of the first part

    @property
    def on_gpu(self) -> bool:
        """Whether there is room and time for the whole programme."""
        return self.device.type == "cuda"

    def dataset(self, config: Config | None = None) -> Dataset:
        """The video, with random unit vectors as embeddings."""
        dataset = self._loaded
        return replace(dataset, embeddings=random_embeddings(dataset, config or self.config))

    @cached_property
    def _loaded(self) -> Dataset:
        return load_dataset(self.config.replace(predict_clip=False), self.cache_dir)

    def clock(self, call: Callable[[], Any], *, warm_up: int = 1, repeats: int = 0,
              repeat_s: float = 0.0) -> list[float]:
        """Seconds of a call, a value for each repeat, the device synchronised around each.

        Args:
            repeats, repeat_s: at least so many and so long.
        """
        once = math.inf
        for _ in range(warm_up):
            once = self._seconds(call, 1)
        calls = max(1, min(2000, round(max(repeat_s, self.repeat_s) / once)))
        return [self._seconds(call, calls) for _ in range(max(repeats, self.repeats))]

    def _seconds(self, call: Callable[[], Any], calls: int) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronise(self.device)
        return (time.perf_counter() - start) / calls


def random_embeddings(dataset: Dataset, config: Config) -> Tensor | None:
    """Unit vectors [T, P, D] in place of a teacher's; speed does not depend on them."""
    if not config.model.predict_clip:
        return None
    shape = (len(dataset.video.frames), len(dataset.grid), config.model.clip_dim)
    return normalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def run_record(run: RunDir) -> dict[str, Any]:
    """A finished run in one row of plain values, for `book/results`.

    Returns:
        settings and provenance, the figures of summary.json in short names, and `curve`: (epoch,
        PSNR over all frames in dB) at each evaluation.
    Raises:
        RunError: the run is not finished.
    """
    config, facts, summary = run.config(), run.provenance(), run.summary()
    row, metrics = run_row(run, parts=("all",)), run.metrics()
    measured = metrics[metrics.eval_psnr_all.notna()]
    return {
        **{name: row[name] for name in ("seed", "engine", "precision", "device", "clip_head",
                                        "epochs", "commit", "dirty")},
        "versions": facts["versions"], "data_digest": facts["data_digest"],
        "config": config.params(), "psnr_db": row["psnr_all_db"],
        "ms_ssim": summary.get("eval_ms_ssim_all"),
        "clip_centred": summary.get("eval_clip_centred_all"),
        "quantised_psnr_db": summary["quantised_eval_psnr_all"],
        **{name: row[name] for name in ("rate_bpp", "size_bytes", *CLOCKS[1:],
                                        "train_frames_per_s", "peak_memory_bytes")},
        "curve": [[int(epoch), psnr] for epoch, psnr in
                  zip(measured.epoch, measured.eval_psnr_all)]}
