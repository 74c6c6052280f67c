"""One look for every figure: readable at book width, safe for color-blind readers.

Two kinds: drawings, as SVG on white; and figures of pictures, as WebP at twice the page's
sharpness, transparent, with text that is read on light and on dark pages and the caption below.

The colors are those of Okabe and Ito (jfly.uni-koeln.de/color), assigned by meaning, so that the
same thing has the same color in every figure. Lines are drawn as SVG with real text; an image
inside a figure stays a bitmap.
"""

from __future__ import annotations

import base64
import html
import io
import re
import textwrap
from typing import Any

import matplotlib as mpl
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"

# Colors by meaning.
PALETTE = {
    # frames
    "train": BLUE, "val": ORANGE, "held_out": ORANGE, "skip": "#C8C8C8",
    # whose embedding
    "predicted": BLUE, "teacher": VERMILLION,
    # a place that is asked about
    "asked": PURPLE,
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
SHADES = [GREY, BLUE, BLACK]  # from few to many of the same thing; on dark pages, too
CYCLE = [BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK, GREY]

SEQUENTIAL = "viridis"  # values from low to high
DIVERGING = "RdBu_r"  # values around zero
WIDTH = 8.0  # inches: the text width of a book page
ROW_NAME = 26  # characters of a line of a row's name
MIDDLE = "#7A7A7A"  # a gray that is read on white (4.3 : 1) and on the book's dark pages (4.1 : 1)
MIDDLE_BLUE = "#3C87C9"  # a blue that is (3.8 : 1, 4.9 : 1)
SHARP_DPI = 200  # two pixels of a figure for one of the page
# At an alpha_quality of 100 method 6 tries every filter for the transparency: 2 to 5 s a figure,
# where this takes 0.3 s and 0 to 3 % more bytes
WEBP = {"quality": 82, "method": 6, "alpha_quality": 99}


def use_style(image_format: str = "svg") -> None:
    """Set the look of every figure and table shown after this call.

    Args:
        image_format: what a notebook shows: "svg" for lines, "webp" for pictures, or "png".
    """
    pictures = image_format == "webp"
    ink = MIDDLE if pictures else "black"
    mpl.rcParams.update({
        "figure.figsize": (WIDTH, 3.2), "figure.dpi": 110, "figure.constrained_layout.use": True,
        "figure.facecolor": "none" if pictures else "white",
        "axes.facecolor": "none" if pictures else "white",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color",
                         "ytick.color"), ink), "savefig.dpi": 150, "savefig.bbox": "tight",
        "svg.fonttype": "none", "svg.hashsalt": "hnerv-clip",
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
        "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
        "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "axes.prop_cycle": cycler(color=CYCLE), "lines.linewidth": 1.8, "lines.markersize": 5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": MIDDLE if pictures else "#E4E4E4",
        "grid.alpha": 0.25 if pictures else 1.0, "grid.linewidth": 0.7,
        "legend.frameon": False, "image.cmap": SEQUENTIAL,
    })
    pd.set_option("display.max_colwidth", None)  # a table shows whole sentences, such as "not CLIP"
    CaptionedFigure.as_html = pictures
    _set_notebook_format(image_format)


def _set_notebook_format(image_format: str) -> None:
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:  # no notebook installed
        return
    try:
        # none of matplotlib's own for WebP: `CaptionedFigure._repr_html_` shows it
        set_matplotlib_formats(*[image_format][:image_format != "webp"])
    except (AttributeError, TypeError):  # not inside IPython
        return


class CaptionedFigure(Figure):
    """A figure that is its caption in words, which a page takes as alternative text."""

    caption = ""
    as_html = False  # a picture with its caption as text below; else what the notebook makes of it

    def _repr_html_(self) -> str | None:
        if not self.as_html:
            return None
        file = io.BytesIO()
        self.savefig(file, format="webp", dpi=SHARP_DPI, bbox_inches="tight",
                     facecolor=self.get_facecolor(),
                     pil_kwargs=WEBP)
        words, data = html.escape(self.caption), base64.b64encode(file.getvalue()).decode()
        # "dark-light" and "picture": the book leaves it as it is on dark pages
        return (f'<figure style="margin:0;text-align:left"><img class="dark-light picture" '
                f'style="width:100%" alt="{words}" src="data:image/webp;base64,{data}">'
                f'<figcaption style="text-align:left"><p>{words}</p></figcaption></figure>')

    def __repr__(self) -> str:
        return self.caption or super().__repr__()


def text_color(name: str) -> str:
    """The color in which a name of `PALETTE` is written, where any page may lie behind it."""
    color = PALETTE.get(name, mpl.rcParams["text.color"])
    return MIDDLE_BLUE if color == BLUE and CaptionedFigure.as_html else color


def picture_axes(axes: Axes) -> Axes:
    """Turn axes into a bare frame for a picture: no ticks, no grid, no spines."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def name_lines(name: str) -> list[str]:
    """A row's name in lines so short that the data beside it fit on a phone; a last number stays
    with the word before it."""
    joined = re.sub(r" (?=\d\S*$)", "\N{NO-BREAK SPACE}", name)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in textwrap.wrap(joined, ROW_NAME)]


def name_rows(panel: Axes, names: list[str]) -> None:
    """Names of rows at 0, 1, …"""
    panel.set_yticks(range(len(names)), ["\n".join(name_lines(name)) for name in names], fontsize=8)


def row_height(names: list[str], least: float) -> float:
    """Inches of a row, so that no name of `name_rows` runs into the next."""
    return max(least, 0.15 * max(len(name_lines(name)) for name in names))


def new_figure(rows: int = 1, columns: int = 1, *, height: float = 3.2, **options: Any
               ) -> tuple:
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
    if getattr(figure, "as_html", False):  # below the picture
        return figure
    figure.text(0.01, -0.01, text, ha="left", va="top", fontsize=9, color="#404040", wrap=True,
                parse_math=False)  # names of videos and folders may hold a $
    return figure
