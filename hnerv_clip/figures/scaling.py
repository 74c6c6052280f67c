"""Figures of scaling over ranks."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hnerv_clip.figures.style import PALETTE, SHADES, caption, new_figure

LINES = ("-", "--", ":")  # the learning rate: kept, scaled, scaled with as many steps


def plot_scaling(measured: dict[str, Any]) -> Figure:
    """Speed over ranks, quality over training time, and the loss of one rank beside that of all.

    A color is a number of ranks, the same in every panel; a kind of line is a learning rate.

    Args:
        measured: what `scaling.measure_scaling` returns, with the part speed; the last panel needs
            the part correctness too.
    """
    compared = measured["parts"].get("correctness", {}).get("cases")
    figure, (speed, quality, *rest) = new_figure(1, 3 if compared else 2, height=3.9)
    runs = measured["parts"]["speed"]["runs"]
    word = "GPU" if measured["backend"] == "nccl" else "rank"
    kept = [run for run in runs if run["learning_rate"] == "kept"]
    ranks = [run["ranks"] for run in kept]
    rates = [run["frames_per_s"] for run in kept]
    speed.plot(ranks, [rates[0] * count for count in ranks], color=PALETTE["reference"],
               linestyle="--", label="ideal")
    speed.errorbar(ranks, rates, yerr=[
        [rate - run["frames_per_s_p10"] for rate, run in zip(rates, kept)],
        [run["frames_per_s_p90"] - rate for rate, run in zip(rates, kept)]], marker="o",
        capsize=3, color=PALETTE["learned"], label="measured")
    for run in kept[1:]:
        speed.annotate(f"{run['efficiency']:.0%}", (run["ranks"], run["frames_per_s"]),
                       xytext=(0, -30), textcoords="offset points", ha="center", fontsize=9)
    speed.set(xlabel=f"{word}s", ylabel="training frames/s", xticks=ranks, ylim=(0, None),
              xlim=(None, 1.1 * ranks[-1]))
    speed.legend()
    for run in runs:
        _, times, psnr_db = zip(*run["curve"])
        rate = run["learning_rate"]
        line = LINES[0 if rate == "kept" else 1 + ("steps" in rate)]
        quality.plot(times, psnr_db, marker=".", color=_color(run["ranks"], ranks), linestyle=line,
                     label=f"{run['ranks']} {word}{'s' * (run['ranks'] > 1)}, learning rate {rate}")
    quality.axhline(measured["parts"]["speed"]["quality_db"], color=PALETTE["reference"],
                    linewidth=0.9, linestyle=":")
    quality.set(xlabel="training time (s)", ylabel="PSNR, training frames (dB)")
    figure.legend(*quality.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    text = ("Bars: 10th to 90th percentile over epochs. Percentages: efficiency. Dots: "
            f"evaluations; thin and dotted: what one {word} reaches.")
    if compared:
        _plot_losses(rest[0], compared[-1], word)
        text += f" Right: the same global batches on one {word} and on all."
    return caption(figure, text)


def _color(count: int, counts: list[int]) -> str:
    """Of so many ranks: gray for one, black for the most."""
    return SHADES[0 if count == counts[0] else 2 if count == counts[-1] else 1]


def _plot_losses(axes: Axes, case: dict[str, Any], word: str) -> None:
    epochs = range(1, case["epochs"] + 1)
    axes.plot(epochs, case["loss_one"], color=SHADES[0], linewidth=3, label=f"1 {word}")
    axes.plot(epochs, case["loss_ranks"], color=SHADES[2], linewidth=1.2,
              label=f"{case['ranks']} {word}s")
    axes.set(xlabel="epoch", ylabel=f"loss, global batch {case['global_batch']}", yscale="log")
    axes.legend()
