"""Formulas drawn as SVG when the book is built, so that it reads without a network.

Sphinx's own renderer loads MathJax from a content delivery network, and MathML looks ragged where
no mathematical font is installed. ziamath draws LaTeX with a font of its own.
"""

from __future__ import annotations

import html
import re

import ziamath
from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)
ziamath.config.svg2 = False  # outlines in place: shared symbols would clash between formulas
SIZE = 17.0  # of the font, in pixels; what is written is relative to the text around
TALLEST = 12.0  # times SIZE; ziamath draws some brackets without end


def visit_inline(translator, node: nodes.math) -> None:
    """`$…$` inside a line."""
    translator.body.append(_draw(node, inline=True))
    raise nodes.SkipNode


def visit_block(translator, node: nodes.math_block) -> None:
    """`$$…$$` on its own."""
    translator.body.append(f'<div class="math-block">{_draw(node, inline=False)}</div>\n')
    raise nodes.SkipNode


def _draw(node: nodes.Node, *, inline: bool) -> str:
    latex = node.astext()
    try:
        svg = ziamath.Latex(latex, size=SIZE, inline=inline, color="currentColor").svg()
        left, top, width, height = map(float, re.search(r'viewBox="([^"]*)"', svg)[1].split())
    except Exception as error:  # whatever the parser meets in a formula that it does not know
        logger.warning("formula %r: %s: %s", latex, type(error).__name__, error, location=node)
        return ""
    if height > TALLEST * SIZE:
        logger.warning("formula %r is drawn %d pixels tall: try \\Big instead of \\left",
                       latex, height, location=node)
    style = f"vertical-align:{-(top + height) / SIZE:.3f}em" if inline else ""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" class="math" role="img" style="{style}" '
            f'aria-label="{html.escape(latex)}" width="{width / SIZE:.3f}em" '
            f'height="{height / SIZE:.3f}em" viewBox="{left} {top} {width} {height}">')
    return head + svg.partition(">")[2]


def setup(app) -> dict:
    """Register the renderer; `html_math_renderer: drawn` chooses it."""
    app.add_html_math_renderer("drawn", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
