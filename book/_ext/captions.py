"""Captions of drawings become text below them.

A notebook's drawing holds its caption, so that it is seen in JupyterLab, too. On a page it would be
as small as the drawing and scroll with it on a phone: it is taken out and said below.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

COLOR = "#404040"  # of captions alone, see hnerv_clip.figures.style
TEXT = re.compile(rf'<text style="[^"]*fill: {COLOR}"[^>]*>([^<]*)</text>')
# A group of the figure itself, of such lines alone; their place is in x, y or in a translation
CAPTION = re.compile(rf'\n  <g id="text_\d+">\s*((?:{TEXT.pattern}\s*)+)</g>')
TOP = re.compile(r'(?: y="|translate\([\d.]+ )([\d.]+)')
SIZE = re.compile(r'height="([\d.]+)pt" viewBox="0 0 ([\d.]+) [\d.]+"')
LINE = 11.0  # points from the base of the first line to what is above it


def split_caption(svg: str) -> tuple[str, str]:
    """A drawing of Matplotlib's without its caption and without the room for it, and the caption.

    The drawing as it is and "" where it has none.
    """
    found = CAPTION.search(svg)
    if not found:
        return svg, ""
    words = " ".join(html.unescape(line) for line in TEXT.findall(found[1]))
    height = float(TOP.search(found[1])[1]) - LINE
    svg = svg[:found.start()] + svg[found.end():]
    return SIZE.sub(rf'height="{height:g}pt" viewBox="0 0 \2 {height:g}"', svg, count=1), words


class Captions(SphinxPostTransform):
    """Says a drawing's caption below it, where it is not a figure's own."""

    default_priority = 910  # behind page_facts, which gives alternative texts

    def run(self, **kwargs) -> None:
        for node in list(self.document.findall(nodes.image)):
            path = Path(self.app.srcdir) / node["uri"]
            if path.suffix != ".svg" or isinstance(node.parent, nodes.figure):
                continue
            words = path.is_file() and split_caption(path.read_text(encoding="utf-8"))[1]
            if words:  # the alternative text says it to those who do not see it
                text = f'<p class="drawing-caption" aria-hidden="true">{html.escape(words)}</p>'
                node.parent.insert(node.parent.index(node) + 1,
                                   nodes.raw("", text, format="html"))


def take_out(app, exception) -> None:
    """Remove the captions from the built book's drawings."""
    folder = Path(app.outdir) / "_images"
    for path in folder.glob("*.svg") if not exception else []:
        drawing, words = split_caption(path.read_text(encoding="utf-8"))
        if words:
            path.write_text(drawing, encoding="utf-8")


def setup(app) -> dict:
    """Register both."""
    app.add_post_transform(Captions)
    app.connect("build-finished", take_out, priority=100)  # before dark files are made of them
    return {"parallel_read_safe": True, "parallel_write_safe": True}
