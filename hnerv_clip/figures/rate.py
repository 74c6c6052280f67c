"""The figure of rate and quality: bits per pixel against PSNR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hnerv_clip.figures.style import (
    BLACK,
    GREEN,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILLION,
    caption,
    new_figure,
)

CODEC_COLORS = {"x264": ORANGE, "x265": VERMILLION, "SVT-AV1": PURPLE}
HEAD_COLORS = {"with head": PALETTE["learned"], "with field": GREEN, "no head": SKY}


def plot_rate_quality(codecs: dict[str, Sequence[dict[str, Any]]], plain: Sequence[dict[str, Any]],
                      tuned: Sequence[Sequence[dict[str, Any]]], *, hnerv: dict[str, float],
                      goal: dict[str, float], source: str) -> Figure:
    """PSNR over the rate, a line per codec and preset, and this codec's plain and tuned files.

    Args:
        codecs: by name, points with rate_bpp and psnr_db, the slower of two presets dashed.
        plain: points of files as trained, each with head.
        tuned: those of fine-tuned files, a list for each training by rate, each point with head
            and modelsize (millions).
        hnerv, goal: one point each.
        source: what the frames are, for the caption.
    """
    figure, axes = new_figure(height=5.6)
    for name, points in codecs.items():
        slow = name.endswith(("veryslow", "preset 4"))
        points = sorted(points, key=lambda point: point["rate_bpp"])
        axes.plot([p["rate_bpp"] for p in points], [p["psnr_db"] for p in points], marker=".",
                  color=CODEC_COLORS[name.split()[0]], linestyle="--" if slow else "-",
                  linewidth=1.2, label=name)
    series = [(head, "as trained", "s", [p for p in plain if p["head"] == head])
              for head in dict.fromkeys(p["head"] for p in plain)]
    for points in tuned:
        axes.plot([p["rate_bpp"] for p in points], [p["psnr_db"] for p in points],
                  color=HEAD_COLORS[points[0]["head"]], linewidth=1.2)
    files = [point for points in tuned for point in points]
    sizes = sorted({p["modelsize"] for p in files}, reverse=True)
    for head, size in dict.fromkeys((p["head"], p["modelsize"]) for p in files):
        series.append((head, f"fine-tuned, {size:g} M", "o^vP"[sizes.index(size) % 4],
                       [p for p in files if (p["head"], p["modelsize"]) == (head, size)]))
    for head, kind, marker, points in series:
        axes.plot([p["rate_bpp"] for p in points], [p["psnr_db"] for p in points], linestyle="none",
                  color=HEAD_COLORS[head], marker=marker, label=f"here, {kind}, {head}",
                  markerfacecolor="white" if marker == "s" else HEAD_COLORS[head])
    axes.plot(hnerv["rate_bpp"], hnerv["psnr_db"], "D", color=PALETTE["reference"],
              label="HNeRV (no file)")
    axes.plot(goal["rate_bpp"], goal["psnr_db"], "*", color=BLACK, markersize=11, label="goal")
    axes.set(xscale="log", xlabel="bits per pixel", ylabel="PSNR (dB)")
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return caption(figure, f"Left and up is better; logarithmic rate. {source} Filled: fine-tuned "
                           "for the file, those of one training joined; hollow: as trained. Heads "
                           "are fitted to the bundled teacher, not CLIP. Dashed: the slower "
                           "preset.")
