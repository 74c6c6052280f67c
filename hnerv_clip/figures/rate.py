"""The figure of rate and quality: bits per pixel against PSNR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hnerv_clip.figures.style import GREEN, ORANGE, PALETTE, PURPLE, VERMILLION, caption, new_figure

CODEC_COLORS = {"x264": ORANGE, "x265": VERMILLION, "SVT-AV1": PURPLE}


def plot_rate_quality(codecs: dict[str, Sequence[dict[str, Any]]], runs: Sequence[dict[str, Any]],
                      tuned: Sequence[dict[str, Any]], *, hnerv: dict[str, float],
                      goal: dict[str, float], source: str) -> Figure:
    """PSNR over the rate, a line per codec and preset, and this codec's plain and tuned files.

    Args:
        codecs: by name, points with rate_bpp and psnr_db, the slower of two presets dashed.
        runs: each with points of kinds other than `tuned`, and settings.predict_clip.
        tuned: the fine-tuned points of all runs by rate, each with head.
        hnerv, goal: one point each.
        source: what the frames are, for the caption.
    """
    figure, axes = new_figure(height=4.6)
    for name, points in codecs.items():
        slow = name.endswith(("veryslow", "preset 4"))
        points = sorted(points, key=lambda point: point["rate_bpp"])
        axes.plot([p["rate_bpp"] for p in points], [p["psnr_db"] for p in points], marker=".",
                  color=CODEC_COLORS[name.split()[0]], linestyle="--" if slow else "-",
                  linewidth=1.2, label=name)
    axes.plot([p["rate_bpp"] for p in tuned], [p["psnr_db"] for p in tuned],
              color=PALETTE["learned"], linewidth=1.2)
    for head, face in ((True, PALETTE["learned"]), (False, "white")):
        words, style = "with head" if head else "no head", dict(
            color=PALETTE["learned"], markerfacecolor=face, linestyle="none")
        for marker, kind, points in (
                ("o", "fine-tuned", [p for p in tuned if p["head"] == head]),
                ("s", "plain, 8 and 6 bits", [p for run in runs for p in run["points"]
                                              if p["kind"] != "tuned"
                                              and run["settings"]["predict_clip"] == head])):
            if points:
                axes.plot([p["rate_bpp"] for p in points], [p["psnr_db"] for p in points],
                          marker=marker, label=f"here, {kind}, {words}", **style)
    axes.plot(hnerv["rate_bpp"], hnerv["psnr_db"], "D", color=PALETTE["reference"],
              label="HNeRV (no file)")
    axes.plot(goal["rate_bpp"], goal["psnr_db"], "*", color=GREEN, markersize=11, label="goal")
    axes.set(xscale="log", xlabel="bits per pixel", ylabel="PSNR (dB)")
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(loc="outside right upper", fontsize=8)
    return caption(figure, f"Left and up is better; logarithmic rate. {source} Filled: with the "
                           "CLIP head in file and training (teacher bundled, not CLIP); hollow: "
                           "without. Dashed: the slower preset.")
