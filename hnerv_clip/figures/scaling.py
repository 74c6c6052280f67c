"""Figures of scaling over ranks."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hnerv_clip.figures.style import CYCLE, PALETTE, caption, new_figure


def plot_scaling(measured: dict[str, Any]) -> Figure:
    """Speed over ranks, quality over training time, and the loss of one rank beside that of all.

    Args:
        measured: what `scaling.measure_scaling` returns, with the part speed; the last panel needs
            the part correctness too.
    """
    compared = measured["parts"].get("correctness", {}).get("cases")
    figure, (speed, quality, *rest) = new_figure(1, 3 if compared else 2, height=3.1)
    runs = measured["parts"]["speed"]["runs"]
    kept = [run for run in runs if run["learning_rate"] == "kept"]
    ranks = [run["ranks"] for run in kept]
    rates = [run["frames_per_s"] for run in kept]
    speed.plot(ranks, [rates[0] * count for count in ranks], color=PALETTE["reference"],
               linestyle="--", label="ideal")
    speed.errorbar(ranks, rates, yerr=[
        [rate - run["frames_per_s_p10"] for rate, run in zip(rates, kept)],
        [run["frames_per_s_p90"] - rate for rate, run in zip(rates, kept)]], marker="o",
        capsize=3, label="measured")
    for run in kept[1:]:
        speed.annotate(f"{run['efficiency']:.0%}", (run["ranks"], run["frames_per_s"]),
                       xytext=(0, -30), textcoords="offset points", ha="center", fontsize=9)
    speed.set(xlabel="ranks", ylabel="training frames/s", xticks=ranks, ylim=(0, None))
    speed.legend()
    for run, color in zip(runs, CYCLE):
        _, times, psnr_db = zip(*run["curve"])
        quality.plot(times, psnr_db, marker=".", color=color,
                     label=f"{run['ranks']}, lr {run['learning_rate']}")
    quality.axhline(measured["parts"]["speed"]["quality_db"], color=PALETTE["reference"],
                    linewidth=0.9, linestyle=":")
    quality.set(xlabel="training time (s)", ylabel="PSNR, training frames (dB)")
    quality.legend(title="ranks", fontsize=7, title_fontsize=8)
    text = ("Bars: 10th to 90th percentile over epochs. Per cent: efficiency. Dots: evaluations; "
            "dotted: what one rank reaches.")
    if compared:
        _plot_losses(rest[0], compared[-1])
        text += " Right: the same global batches on one rank and on all."
    return caption(figure, text)


def _plot_losses(axes: Axes, case: dict[str, Any]) -> None:
    epochs = range(1, case["epochs"] + 1)
    axes.plot(epochs, case["loss_one"], label="1 rank")
    axes.plot(epochs, case["loss_ranks"], linestyle="--", label=f"{case['ranks']} ranks")
    axes.set(xlabel="epoch", ylabel=f"loss, global batch {case['global_batch']}", yscale="log")
    axes.legend()
