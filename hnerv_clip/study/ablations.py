"""Which runs a study of one setting at a time needs, and one table of what they gave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.runs.rows import run_row
from hnerv_clip.runs.run_dir import RunDir

NEAR_BEST = 0.01  # of a mean-centered cosine
PARTS = {"train": "training frames", "held_out": "held-out frames"}
PAPER_EPOCHS = 300  # what warm-ups of 0, 50 and 100 epochs are meant for


def ablation_configs(base: Config, *, lambdas: str = "0 0.1 0.2 0.5 1", warmups: str = "0 50 100",
                     embeds: str = "pe_1.25_80 xyt_1.25_80", epochs: int = 0) -> dict[str, Config]:
    """The base run and its variations, by name; each differs from the base in one setting.

    Args:
        lambdas: values of clip_loss_weight.
        warmups: values of pixel_loss_warmup_epochs for 300 epochs; in proportion for others.
        embeds: coordinate embeddings to set beside the hybrid one.
        epochs: of every run; 0 for the base's. Runs of another length are evaluated at their end
            alone.
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

    if epochs != base.train.epochs:  # else the base is the run that is there, in every setting
        base = base.replace(epochs=epochs, eval_freq=epochs, pixel_loss_warmup_epochs=round(
            base.train.pixel_loss_warmup_epochs * epochs / base.train.epochs))
    configs = {"base": base, "pixels_only": base.replace(predict_clip=False)}
    for value in _numbers("lambdas", lambdas):
        configs[f"lambda_{value:g}"] = base.replace(clip_loss_weight=value)
    for value in _numbers("warmups", warmups):
        configs[f"warmup_{scaled(value)}"] = base.replace(pixel_loss_warmup_epochs=scaled(value))
    for embed in embeds.split():
        configs[embed] = base.replace(embed=embed)
    return {name: config for name, config in configs.items() if name == "base" or config != base}


def run_words(name: str) -> str:
    """What a run of `ablation_configs` is, in words: "λ = 0.5" for `lambda_0.5`."""
    start, _, value = name.partition("_")
    count = f"({value.rpartition('_')[2]} frequencies)"
    return {"base": "base", "pixels": "pixels only", "lambda": f"λ = {value}",
            "warmup": f"warm-up of {value} epochs", "pe": f"from time alone {count}",
            "xyt": f"from position and time {count}"}.get(start, name)


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
        psnr_{train,held_out}_db, clip_similarity_{train,held_out}, clip_centred_{train,held_out},
        psnr_held_out_encoder_db, rate_bpp, train_time_s; empty where a run has none. Held-out
        frames are decoded from interpolated embeddings (hybrid) or from coordinates.
    Raises:
        RunError: a run is not finished.
    """
    return pd.DataFrame([{"run": name, **_row(RunDir(path))} for name, path in run_dirs.items()])


def _row(run: RunDir) -> dict[str, Any]:
    config, row = run.config(), run_row(run)
    with_clip = config.model.predict_clip
    return {
        "kind": row["kind"],
        "clip_loss_weight": config.train.clip_loss_weight if with_clip else 0.0,
        "warmup_epochs": config.train.pixel_loss_warmup_epochs if with_clip else None,
        **{name: row.get(name, float("nan")) for name in (
            "psnr_train_db", "psnr_held_out_db", "psnr_held_out_encoder_db",
            "clip_similarity_train", "clip_similarity_held_out", "clip_centred_train",
            "clip_centred_held_out", "rate_bpp", "train_time_s")}}


def ablation_answer(table: pd.DataFrame) -> list[str]:
    """What the table says, a sentence each, and what it cannot say.

    Args:
        table: as from `ablation_table`; runs may be missing.
    """
    rows = table.set_index("run")
    said = []
    missing = [name for name in ("base", "pixels_only") if name not in rows.index]
    if missing:
        said.append("**What the second task costs is not known:** "
                    f"“{'” and “'.join(map(run_words, missing))}” did not finish.")
    else:
        base, alone = rows.loc["base"], rows.loc["pixels_only"]
        costs = [f"{abs(cost):.2f} dB {'lower' if cost > 0 else 'higher'} on {words}"
                 for part, words in PARTS.items()
                 if (cost := alone[f"psnr_{part}_db"] - base[f"psnr_{part}_db"]) == cost]
        said.append(f"**With λ = {base.clip_loss_weight:g}, PSNR with both tasks is "
                    f"{' and '.join(costs)} than with pixels only.** One run each.")
    for name, row in rows[rows.clip_centred_train.notna()].iterrows():
        if name == "base" or row.kind != "hybrid":
            who = "The base run" if name == "base" else f"A network {run_words(name)}"
            scores = [f"{row[f'clip_centred_{part}']:.3f} on {words}"
                      for part, words in PARTS.items() if pd.notna(row[f"clip_centred_{part}"])]
            picture = (f", and a PSNR of {row.psnr_held_out_db:.2f} dB there"
                       if pd.notna(row.psnr_held_out_db) else "")
            said.append(f"{who} reaches a mean-centered cosine of {' and '.join(scores)}{picture}.")
    return said + _smallest_weight(rows)


def _smallest_weight(rows: pd.DataFrame) -> list[str]:
    """The smallest λ that costs next to no cosine, where several were tried and frames held out."""
    tried = rows[(rows.kind == "hybrid") & (rows.clip_loss_weight > 0)
                 & rows.clip_centred_held_out.notna()]
    tried = tried[tried.index.str.startswith(("base", "lambda"))]
    if tried.clip_loss_weight.nunique() < 2:
        return []
    best = tried.clip_centred_held_out.max()
    row = tried[tried.clip_centred_held_out >= best - NEAR_BEST].nsmallest(
        1, "clip_loss_weight").iloc[0]
    words = (f"Of those tried here, the smallest λ within {NEAR_BEST:g} of the best mean-centered "
             f"cosine on held-out frames is {row.clip_loss_weight:g}, with a PSNR of "
             f"{row.psnr_held_out_db:.2f} dB")
    if "pixels_only" in rows.index:
        words += f" against {rows.psnr_held_out_db['pixels_only']:.2f} dB with pixels only"
    return [words + "."]
