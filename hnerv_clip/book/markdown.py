"""Markdown for pages and README: escaping, tables, intervals in words.

Whatever comes from outside (names of videos and folders, texts, labels) goes through `escape`;
`Markup` marks what is Markdown already.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

FOLD = 8  # rows of a table that a page shows at once
PLAIN_TAGS = ("details", "summary", "br", "sub", "sup")  # HTML that a page may hold


class Markup(str):
    """Text that is Markdown already, such as `**bold**`, and is not escaped again."""


def escape(text: Any) -> Markup:
    """Text as it stands, in Markdown and in HTML: nothing in it is markup or a tag."""
    if isinstance(text, Markup):
        return text
    text = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]{}|$~])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return Markup(re.sub(r"[^\S\u00a0]+", " ", text).strip())  # one line; no-break spaces stay


def without_html(text: str) -> str:
    """Markdown whose HTML is shown as text, but for `PLAIN_TAGS` without attributes.

    Code, inline or in a fence, shows its characters anyway and stays as it is.
    """
    tags = "|".join(PLAIN_TAGS)
    code = re.compile(r"(^(`{3,}).*?^\2`*[ \t]*$|(?<!`)(`+)(?!`).+?(?<!`)\3(?!`))", re.S | re.M)
    parts, end = [], 0
    for found in code.finditer(text):
        parts += [(text[end:found.start()], False), (found[0], True)]
        end = found.end()
    parts.append((text[end:], False))
    return "".join(part if is_code else re.sub(rf"<(?!/?(?:{tags})>)(?=[a-zA-Z/!?])", "&lt;", part)
                   for part, is_code in parts)


def table(rows: pd.DataFrame | Iterable[dict[str, Any]], *, fold: str = "") -> Markup:
    """A Markdown table, a column for each key; columns without any value are left out.

    Args:
        rows: cells are shown as they are, None and NaN as nothing; numbers come as text.
        fold: the title; a table of more than `FOLD` rows is folded away under it.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    kept = [i for i in range(frame.shape[1]) if any(row[i] for row in cells)]
    lines = [[escape(frame.columns[i]) for i in kept], ["---"] * len(kept),
             *([row[i] for i in kept] for row in cells)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if fold and len(cells) > FOLD:
        return folded(fold, text)
    return Markup(f"{escape(fold)}:\n\n{text}" if fold else text)


def upright(rows: Iterable[dict[str, Any]], key: str) -> pd.DataFrame:
    """Few wide rows as columns, headed by what they have at `key`: so they fit on a phone."""
    return pd.DataFrame(list(rows)).set_index(key).T.reset_index(names="")


def _cell(value: Any) -> Markup:
    missing = value is None or (isinstance(value, float) and np.isnan(value))
    return Markup("") if missing else escape(value)


def folded(summary: str, text: str) -> Markup:
    """Markdown under a summary that is clicked to open it."""
    return Markup(f"<details>\n<summary>{html.escape(summary)}</summary>\n\n{text}\n\n</details>")


def join_words(words: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def interval(mean: float, low: float = np.nan, high: float = np.nan, *, digits: int = 2,
             sign: bool = False, unit: str = "") -> Markup:
    """`0.512 dB [0.490, 0.534]`; without brackets where there is no interval, empty for NaN."""
    if np.isnan(mean):
        return Markup("")
    shape, unit = f"{'+' if sign else ''}.{digits}f", f" {unit}" if unit else ""
    known = np.isfinite([low, high]).all()
    return Markup(f"{mean:{shape}}{unit}" + (f" [{low:{shape}}, {high:{shape}}]" if known else ""))


def spread(row: dict[str, Any], measure: str) -> str:
    """`2.05 (2.04–2.06)`: the median and, from `MEASURE_min` and `_max`, the range of repeats."""
    middle, low, high = (three_digits(row[measure + end]) for end in ("", "_min", "_max"))
    return f"{middle} ({low}–{high})"


def three_digits(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"
