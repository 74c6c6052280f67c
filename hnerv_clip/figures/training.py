"""Figures of training and evaluation: curves, pictures beside their decoded selves, trade-offs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hnerv_clip.figures.style import (
    GREY,
    PALETTE,
    WIDTH,
    caption,
    name_rows,
    new_figure,
    picture_axes,
)
from hnerv_clip.labels import FRAME_WORDS, SOURCE_WORDS

DECODED = {"encoder": "decoded, own", "interpolated": "decoded, interpolated",
           "coordinates": "decoded"}


def plot_training(metrics: pd.DataFrame, *, warmup_epochs: int, teacher_label: str) -> Figure:
    """Losses, PSNR and CLIP-head similarity over epochs.

    Args:
        metrics: a run's metrics.csv.
        warmup_epochs: epochs of the warm-up; its end is marked.
        teacher_label: whose embeddings are learned; empty for a run without the head.
    """
    with_clip = metrics.clip_loss.notna().any()
    figure, axes = new_figure(1, 3 if with_clip else 2, height=2.7)
    evaluated = metrics[metrics.eval_psnr_all.notna()]
    axes[0].semilogy(metrics.epoch, metrics.pixel_loss, color=PALETTE["train"], alpha=0.5)
    axes[0].set(title="pixel loss", xlabel="epoch")
    axes[1].plot(metrics.epoch, metrics.psnr_db, color=PALETTE["train"], alpha=0.5,
                 label="while training")
    _plot_parts(axes[1], evaluated, "psnr")
    axes[1].set(title="PSNR (dB)", xlabel="epoch")
    if with_clip:
        axes[2].plot(metrics.epoch, 1 - metrics.clip_loss, color=PALETTE["train"], alpha=0.5)
        _plot_parts(axes[2], evaluated, "clip_similarity")
        axes[2].set(title="cosine to the teacher", xlabel="epoch")
        for panel in axes:
            panel.axvline(warmup_epochs, color=GREY, linestyle=":", linewidth=1.2)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return caption(figure, "Pixels only: this run has no CLIP head." if not with_clip else
                   f"Dotted: the end of the warm-up (pixels only). Teacher: {teacher_label}.")


def _plot_parts(axes, evaluated: pd.DataFrame, measure: str) -> None:
    for part, color, label in [("train", "train", "training frames"),
                               ("val", "val", "held out"),
                               ("val_interpolated", "neighbour", "held out, interpolated")]:
        column = f"eval_{measure}_{part}"
        if column in evaluated:
            axes.plot(evaluated.epoch, evaluated[column], color=PALETTE[color], marker="o",
                      linewidth=1.2, label=label)


def plot_reconstructions(frames: np.ndarray, decoded: Mapping[str, np.ndarray], indices: list[int],
                         labels: list[str], *, gain: int = 5, credit: str = "") -> Figure:
    """Frames beside their decoded selves and the error between them.

    Args:
        frames: uint8 [n, 3, H, W], the originals.
        decoded: by name or source, uint8 [n, 3, H, W].
        indices: frame numbers.
        labels: of each frame, 'train', 'val', or words of the caller's.
        gain: how much the error is enlarged.
    """
    columns = 1 + 2 * len(decoded)
    height, width = frames.shape[-2:]
    cell = WIDTH / columns
    figure, axes = new_figure(len(frames), columns, squeeze=False,
                              height=len(frames) * (cell * height / width + 0.28))
    for row, (frame, index, label) in enumerate(zip(frames, indices, labels)):
        pictures = [(f"frame {index} ({FRAME_WORDS.get(label, label)})", frame)]
        for name, images in decoded.items():
            error = np.abs(images[row].astype(int) - frame.astype(int)).mean(0)
            pictures += [(DECODED.get(name, name), images[row]), (f"error × {gain}", error * gain)]
        for panel, (title, picture) in zip(axes[row], pictures):
            picture_axes(panel)
            panel.set_title(title, fontsize=8)
            if picture.ndim == 3:
                panel.imshow(picture.transpose(1, 2, 0))
            else:
                panel.imshow(picture, cmap="gray", vmin=0, vmax=255)
    return caption(figure, "Original, decoded, and mean absolute error over the color channels, "
                           f"enlarged {gain} times."
                   + (" Own: from the embedding that the encoder computes from the frame "
                      "itself, held-out frames too." if "encoder" in decoded else "")
                   + (" Interpolated: from the embeddings of the neighboring training frames."
                      if "interpolated" in decoded else "") + (f" {credit}." if credit else ""))


def plot_frame_quality(table: pd.DataFrame, *, teacher_label: str) -> Figure:
    """PSNR and similarity of every frame, training and held out.

    Args:
        table: rows of `evaluate_model`, one variant.
    """
    measures = [("psnr_db", "PSNR (dB)")]
    if "clip_similarity" in table:
        measures.append(("clip_similarity", "cosine to the teacher"))
    figure, axes = new_figure(len(measures), 1, height=2.1 * len(measures), sharex=True,
                              squeeze=False)
    for panel, (measure, title) in zip(axes.flat, measures):
        for source, group in table.groupby("source", sort=False):
            if source != "interpolated":
                panel.plot(group.frame, group[measure], color=GREY, linewidth=0.8, zorder=1)
                trained = group[group.split == "train"]
                panel.scatter(trained.frame, trained[measure], s=9, color=PALETTE["train"],
                              label="training frames", zorder=2)
            held_out = group[group.split != "train"]
            color = PALETTE["neighbour" if source == "interpolated" else "val"]
            panel.scatter(held_out.frame, held_out[measure], s=14, color=color,
                          label=f"held out, {SOURCE_WORDS[source]}", zorder=3)
        panel.set_ylabel(title)
    axes.flat[-1].set_xlabel("frame")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return caption(figure, "A dot is a frame; a held-out frame has one for each source of its "
                           f"per-frame embedding. Teacher: {teacher_label}.")


def plot_decoding_speed(speed: pd.DataFrame, *, device: str) -> Figure:
    """Decoded frames per second by what is decoded; whiskers from slowest to fastest pass."""
    figure, axes = new_figure(height=1.9)
    colors = [PALETTE[{"RGB": "rgb", "embeddings only": "clip"}.get(mode, "total")]
              for mode in speed["mode"]]
    whiskers = [speed.frames_per_s - speed.frames_per_s_min,
                speed.frames_per_s_max - speed.frames_per_s]
    axes.barh(speed["mode"], speed.frames_per_s, xerr=whiskers, color=colors, height=0.6)
    axes.invert_yaxis()
    axes.set_xlabel("frames per second")
    return caption(figure, f"Median of {speed.n.iloc[0]} passes, batch {speed.batch_size.iloc[0]}, "
                           f"on {device}.")


def plot_tradeoff(table: pd.DataFrame, *, teacher_label: str) -> Figure:
    """Picture quality against semantic similarity, a point per λ, for training and held-out frames.

    A score far below the others is drawn as an arrow at the lower edge, with its value.

    Args:
        table: columns clip_loss_weight, psnr_{train,held_out}_db, clip_centred_{train,held_out}.
    """
    figure, axes = new_figure(height=3.4)
    rows = table.sort_values("clip_loss_weight")
    scores = rows[["clip_centred_train", "clip_centred_held_out"]]
    edge = _lowest_shown(scores.to_numpy())
    for part, label in [("train", "training frames"), ("held_out", "held out")]:
        x, y, color = f"psnr_{part}_db", f"clip_centred_{part}", PALETTE[part]
        near, far = rows[~(rows[y] < edge)], rows[rows[y] < edge]
        axes.plot(near[x], near[y], marker="o", color=color, label=label)
        up = 1 if part == "train" else -1  # slanted, above or below, as other points are near
        for _, row in near.iterrows():
            axes.annotate(f"λ={row.clip_loss_weight:g}", rotation=40 * up, fontsize=8,
                          xy=(row[x], row[y]), xytext=(2, 3 * up), textcoords="offset points",
                          va="bottom" if up > 0 else "top")
        for _, row in far.iterrows():
            axes.plot(row[x], 0.03, marker="v", color=color, transform=axes.get_xaxis_transform())
            axes.annotate(f"λ={row.clip_loss_weight:g}: {round(row[y], 2) + 0:.2f}", fontsize=8,
                          xy=(row[x], 0.03), xycoords=axes.get_xaxis_transform(), xytext=(-6, 0),
                          textcoords="offset points", ha="right", va="center")
    axes.set(xlabel="PSNR (dB)", ylabel="mean-centered cosine")
    axes.margins(y=0.15)
    is_cut = (scores < edge).any(axis=None)
    if is_cut:
        axes.set_ylim(bottom=edge)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.legend(loc="center left")
    return caption(figure, "Up and right is better; one run each. " + (
        "Arrows: scores below the axis. " if is_cut else "") + f"Teacher: {teacher_label}.")


def _lowest_shown(values: np.ndarray) -> float:
    """Where an axis begins that leaves out values far below the others; -inf to show all.

    Far: the widest gap is over three times the range of the values above it, which are most.
    """
    known = np.sort(values[np.isfinite(values)])
    if len(known) < 3:
        return -np.inf
    gaps = np.diff(known)
    k = int(gaps.argmax())
    span = known[-1] - known[k + 1]
    is_cut = 2 * (k + 1) < len(known) and gaps[k] > 3 * span > 0
    return known[k + 1] - 0.3 * span if is_cut else -np.inf


def plot_ablation(table: pd.DataFrame, *, teacher_label: str) -> Figure:
    """PSNR and mean-centered cosine of each run, training and held-out frames side by side.

    Args:
        table: a row per run: run, and the columns that `plot_tradeoff` takes.
    """
    figure, axes = new_figure(1, 2, height=0.8 + 0.38 * len(table), sharey=True)
    y, is_cut = np.arange(len(table)), False
    for panel, measure, title in [(axes[0], "psnr_{}_db", "PSNR (dB)"),
                                  (axes[1], "clip_centred_{}", "mean-centered cosine")]:
        ends = table[[measure.format("train"), measure.format("held_out")]].to_numpy(float)
        edge = _lowest_shown(ends)
        far = (ends < edge).any(1)
        is_cut = is_cut or far.any()
        for x, part, label in zip(ends.T, ("train", "held_out"), ("training frames", "held out")):
            panel.scatter(x[~far], y[~far], s=34, color=PALETTE[part], label=label, zorder=3)
        panel.hlines(y[~far], *ends[~far].T, color=GREY, linewidth=1)
        for row in np.flatnonzero(far):
            panel.annotate("◂ {:.2f}, {:.2f}".format(*ends[row].round(2) + 0),
                           xy=(0.01, row), xycoords=panel.get_yaxis_transform(), va="center",
                           fontsize=8)
        if far.any():
            panel.set_xlim(left=edge)
        panel.set_xlabel(title)
    name_rows(axes[0], list(table.run))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return caption(figure, "Held out: interpolated embeddings for hybrid runs, coordinates for the "
                           "others; one run each. " + (
        "A score beyond the axis is written (training, held out). " if is_cut else "")
        + f"Teacher: {teacher_label}.")


def plot_fidelity(runs: list[dict], reference: dict) -> Figure:
    """PSNR over epochs of this implementation's runs, and of the authors' code.

    Args:
        runs: each with seed, precision and curve, a list of (epoch, PSNR in dB).
        reference: source and curve of the authors' code.
    """
    figure, axes = new_figure(height=3.0)
    axes.plot(*zip(*reference["curve"]), color=PALETTE["reference"], linestyle="--", marker="s",
              label="authors' code")
    for i, run in enumerate(runs):
        axes.plot(*zip(*run["curve"]), color=PALETTE["learned"], marker="o", alpha=0.5,
                  markersize=4, label="here, each run" if i == 0 else None)
    axes.set(xlabel="epoch", ylabel="PSNR (dB)")
    axes.legend()
    return caption(figure, "PSNR over all frames at each evaluation. The authors' code is drawn "
                           "from the figures that it gave on an H100.")
