"""Where the book's GPU results are made, and the settings of their runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnerv_clip.config import Config
from hnerv_clip.paths import resolve_path
from hnerv_clip.study.plan import study_base, study_configs

BUNDLED = {"teacher": "efficientnet-lite0", "clip_dim": 1280}


@dataclass(frozen=True)
class Folders:
    """The folders of one study, and what its runs are set to."""

    outf: Path  # runs, and what is needed to resume
    out: Path  # results
    cache_dir: Path  # teacher embeddings
    settings: dict[str, Any]  # flat parameters that win over every run's; for a try on a CPU
    alone: bool = False  # one run at a time on each GPU, so that its time counts

    @property
    def study(self) -> Path:
        return self.outf / "study"

    @functools.cached_property
    def base(self) -> Config:
        return study_base("full", {**BUNDLED, **self.settings})

    @functools.cached_property
    def configs(self) -> dict[str, Config]:
        """Of the study's runs, by name."""
        return {name: config.replace(**self.settings)
                for name, config in study_configs(self.base).items()}

    def fidelity(self, seed: str) -> Config:
        """HNeRV's own setting: pixels alone, every frame."""
        return Config.from_params(**{
            "preset": "paper", "data_path": "bunny", "data_split": "1_1_1", "precision": "bf16",
            "predict_clip": False, "eval_freq": 30, **BUNDLED, "seed": int(seed), **self.settings})

    def field_row(self, arguments: tuple[str, ...]) -> Path:
        return self.outf / "fields" / f"{'_'.join(arguments)}.json"


def make_folders(outf: str | Path, out: str | Path, cache_dir: str | Path,
                 settings: dict[str, Any]) -> Folders:
    """`Folders` from what a command names."""
    return Folders(resolve_path(outf), resolve_path(out), resolve_path(cache_dir), settings)
