"""Quality against training time and against size, beside what others published."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hnerv_clip.figures.style import BLACK, GREY, PALETTE, VERMILLION, caption, new_figure

COLORS = {"NeRV": "#BDBDBD", "E-NeRV": GREY, "HNeRV": VERMILLION, "HNeRV-Boost": PALETTE["clip"]}


def plot_recipe(rows: pd.DataFrame, *, preset: pd.DataFrame, sizes: pd.DataFrame,
                published: pd.DataFrame, goals: pd.DataFrame) -> Figure:
    """PSNR over seconds of a whole run of 1.5 M values, and over millions of values.

    Args:
        rows: change, psnr_db, total_s of runs here.
        preset, sizes: modelsize, psnr_db, total_s (NaN where it was not measured) of the preset
            `best`, with 1.5 M values and others.
        published: method, modelsize, psnr_db, train_time_s (or NaN).
        goals: modelsize, seconds, psnr_db.
    """
    figure, (by_time, by_size) = new_figure(1, 2, height=3.8, sharey=True)
    is_paper = rows.change == "paper"
    for chosen, style, words in ((is_paper, "o", "HNeRV's settings here"),
                                 (~is_paper, "s", "other settings here, one seed")):
        by_time.plot(rows[chosen].total_s, rows[chosen].psnr_db, style, label=words,
                     color=PALETTE["learned"], markerfacecolor="none" if style == "s" else None)
        by_size.plot([1.5] * chosen.sum(), rows[chosen].psnr_db, style, color=PALETTE["learned"],
                     markerfacecolor="none" if style == "s" else None)
    best = pd.concat([sizes, preset]).sort_values("modelsize")
    by_size.plot(best.modelsize, best.psnr_db, "^", color=PALETTE["learned"])
    by_time.plot(preset.total_s, preset.psnr_db, "^", color=PALETTE["learned"],
                 label="preset best here")
    for method, own in published.groupby("method", sort=False):
        color = COLORS[method.split(",")[0]]
        timed = own[own.train_time_s.notna()]
        by_time.plot(timed.train_time_s, timed.psnr_db, "D-", color=color)
        if method in COLORS:
            sized = own if own.modelsize.nunique() > 1 else own[own.epochs == 300]
            by_size.plot(sized.modelsize, sized.psnr_db, "D-", color=color, label=method)
    for axes, column in ((by_time, "seconds"), (by_size, "modelsize")):
        shown = goals if axes is by_size else goals[goals.modelsize == 1.5]
        axes.plot(shown[column], shown.psnr_db, "*", color=BLACK, markersize=11,
                  label="goal" if axes is by_size else None)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    by_time.set_xticks([30, 60, 180, 600, 3600, 10800],
                       ["30 s", "1 min", "3 min", "10 min", "1 h", "3 h"])
    by_size.set_xticks([0.35, 0.75, 1.5, 3], ["0.35", "0.75", "1.5", "3"])
    by_time.set(xlabel="time of the whole training, 1.5 M values", ylabel="PSNR (dB)",
                ylim=(29, 41.5))
    by_size.set(xlabel="stored values (millions)")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return caption(figure, "Up and left is better. Stars are goals, not measurements. Diamonds are "
                           "published, HNeRV-Boost's read off a figure, for frames of 720×1280 and "
                           "on another GPU; the diamond at 11 minutes is the code of HNeRV's "
                           "authors on this one.")
