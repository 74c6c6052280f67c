"""One look for every figure: readable at book width, safe for colour-blind readers.

The colours are Okabe and Ito's (jfly.uni-koeln.de/color), given out by meaning, so that the same
thing has the same colour in every figure. Lines are drawn as SVG with real text; an image inside a
figure stays a bitmap.
"""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"

# Colours by meaning.
PALETTE = {
    # frames
    "train": BLUE, "val": ORANGE, "held_out": ORANGE, "skip": "#C8C8C8",
    # whose embedding
    "predicted": BLUE, "teacher": VERMILLION,
    # which head, which loss
    "rgb": GREEN, "clip": PURPLE, "total": BLACK,
    # parts of the network
    "encoder": SKY, "embedding": YELLOW, "decoder": BLUE,
    # the verification's conditions and baselines
    "learned": BLUE, "random": GREY, "shuffled": VERMILLION, "temporal": PURPLE,
    "mean": BLACK, "neighbour": GREEN,
    # kinds of model
    "hybrid": BLUE, "pe": ORANGE, "xyt": GREEN, "pixel-only": GREY,
    # marks
    "reference": GREY, "good": GREEN,
}
CYCLE = [BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK, GREY]

SEQUENTIAL = "viridis"  # values from low to high
DIVERGING = "RdBu_r"  # values around zero
WIDTH = 8.0  # inches: the text width of a book page


def use_style(image_format: str = "svg") -> None:
    """Set the look of every figure and table shown after this call.

    Args:
        image_format: what a notebook shows: "svg" for lines, "png" or "jpeg" for pictures.
    """
    mpl.rcParams.update({
        "figure.figsize": (WIDTH, 3.2), "figure.dpi": 110, "figure.constrained_layout.use": True,
        "figure.facecolor": "white", "savefig.dpi": 150, "savefig.bbox": "tight",
        "svg.fonttype": "none", "svg.hashsalt": "hnerv-clip",
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
        "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
        "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "axes.prop_cycle": cycler(color=CYCLE), "lines.linewidth": 1.8, "lines.markersize": 5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.7,
        "legend.frameon": False, "image.cmap": SEQUENTIAL,
    })
    pd.set_option("display.max_colwidth", None)  # a table shows whole sentences, such as "not CLIP"
    _set_notebook_format(image_format)


def _set_notebook_format(image_format: str) -> None:
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:  # no notebook installed
        return
    try:
        set_matplotlib_formats(image_format)
    except (AttributeError, TypeError):  # not inside IPython
        return


class CaptionedFigure(Figure):
    """A figure that is its caption in words, which a page takes as alternative text."""

    caption = ""

    def __repr__(self) -> str:
        return self.caption or super().__repr__()


def picture_axes(axes: Axes) -> Axes:
    """Turn axes into a bare frame for a picture: no ticks, no grid, no spines."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def new_figure(rows: int = 1, columns: int = 1, *, height: float = 3.2, **options) -> tuple:
    """A figure of book width with its axes, kept out of pyplot so a notebook shows it once.

    Args:
        height: inches.
        options: passed to `Figure.subplots`, for example `sharex`, `width_ratios`, `squeeze`.
    Returns:
        (Figure, Axes or array of Axes), as from `pyplot.subplots`.
    """
    figure = CaptionedFigure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, **options)


def caption(figure: Figure, text: str) -> Figure:
    """Write a caption under the figure: what to see, and whose numbers these are."""
    figure.caption = text
    figure.text(0.01, -0.01, text, ha="left", va="top", fontsize=9, color="#404040", wrap=True,
                parse_math=False)  # names of videos and folders may hold a $
    return figure
