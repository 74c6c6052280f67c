"""Which runs a study of one setting at a time needs, and one table of what they gave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.config import Config, ConfigError, embed_kind
from hnerv_clip.runs import RunDir

PAPER_EPOCHS = 300  # what warm-ups of 0, 50 and 100 epochs are meant for


def ablation_configs(base: Config, *, lambdas: str = "0 0.1 0.2 0.5 1", warmups: str = "0 50 100",
                     embeds: str = "pe_1.25_80 xyt_1.25_80", epochs: int = 0) -> dict[str, Config]:
    """The base run and its variations, by name; each differs from the base in one setting.

    Args:
        lambdas: values of clip_loss_weight.
        warmups: values of pixel_loss_warmup_epochs for 300 epochs; in proportion for others.
        embeds: coordinate embeddings to set beside the hybrid one.
        epochs: of every run; 0 for the base's.
    Returns:
        `base`, `pixels_only`, then one per value that differs from the base's.
    Raises:
        ConfigError: a value that does not parse, or a base without the CLIP head.
    """
    if not base.model.predict_clip:
        raise ConfigError("the base run has no CLIP head; train it with predict_clip=True")
    epochs = epochs or base.train.epochs

    def scaled(warmup: float) -> int:
        return round(warmup * epochs / PAPER_EPOCHS)

    shorter = epochs / base.train.epochs
    base = base.replace(epochs=epochs, eval_freq=max(1, round(base.train.eval_freq * shorter)),
                        pixel_loss_warmup_epochs=round(
                            base.train.pixel_loss_warmup_epochs * shorter))
    configs = {"base": base, "pixels_only": base.replace(predict_clip=False)}
    for value in _numbers("lambdas", lambdas):
        configs[f"lambda_{value:g}"] = base.replace(clip_loss_weight=value)
    for value in _numbers("warmups", warmups):
        configs[f"warmup_{scaled(value)}"] = base.replace(pixel_loss_warmup_epochs=scaled(value))
    for embed in embeds.split():
        configs[embed] = base.replace(embed=embed)
    return {name: config for name, config in configs.items() if name == "base" or config != base}


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split()]
    except ValueError:
        raise ConfigError(f"{name}={text!r} is no list of numbers; write for example "
                          f"{name}='0 0.5 1'") from None


def ablation_table(run_dirs: Mapping[str, str | Path]) -> pd.DataFrame:
    """What finished runs gave.

    Args:
        run_dirs: run folders by name.
    Returns:
        A row per run: run, kind, clip_loss_weight (0 for pixels_only), warmup_epochs,
        psnr_{seen,unseen}_db, raw_{seen,unseen}, similarity_{seen,unseen} (centred cosine),
        psnr_unseen_encoder_db, rate_bpp, train_time_s. Unseen frames are decoded from interpolated
        embeddings (hybrid) or from coordinates.
    Raises:
        RunError: a run is not finished.
    """
    return pd.DataFrame([{"run": name, **_row(RunDir(path))} for name, path in run_dirs.items()])


def _row(run: RunDir) -> dict[str, Any]:
    config, summary = run.config(), run.summary()
    kind = embed_kind(config.model.embed)
    unseen = "val_interpolated" if kind == "hybrid" else "val"
    with_clip = config.model.predict_clip

    def value(measure: str, part: str) -> float:
        return summary.get(f"eval_{measure}_{part}", float("nan"))

    return {
        "kind": kind, "clip_loss_weight": config.train.clip_loss_weight if with_clip else 0.0,
        "warmup_epochs": config.train.pixel_loss_warmup_epochs if with_clip else None,
        "psnr_seen_db": value("psnr", "train"), "psnr_unseen_db": value("psnr", unseen),
        "psnr_unseen_encoder_db": value("psnr", "val") if kind == "hybrid" else float("nan"),
        "raw_seen": value("clip_similarity", "train"),
        "raw_unseen": value("clip_similarity", unseen),
        "similarity_seen": value("clip_centred", "train"),
        "similarity_unseen": value("clip_centred", unseen),
        "rate_bpp": summary["rate_bpp"], "train_time_s": summary["train_time_s"]}
