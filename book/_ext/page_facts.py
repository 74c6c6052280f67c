"""What pages say of themselves, decided when the book is built.

- commit and date of each page, in its footer;
- a notice where notebook or library changed since a page was executed;
- in a book at a reduced setting, a notice on its own pages (`book/_generated/reduced.md`);
- an alternative text for each figure that has none of its own;
- docstrings in the reference are plain text, signatures short;
- films inside a page are files beside it, loaded when they are played;
- buttons for Binder and Colab where `repository: url` in `_config.yml` names the repository.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

LAUNCH = {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com",
          "notebook_interface": "jupyterlab"}
# Of the library, what a notebook uses only where it imports it
APART = ("explore", "bench", "study", "book", "cli")
EXECUTED = re.compile(r"executed at .*\bcommit\s+([0-9a-f]{7,40})\b", re.S)


@cache
def git(root: str, *words: str) -> str | None:
    """What git says, or None where there is no repository, commit or git."""
    try:
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def checkout(folder: str) -> str:
    """The repository around a folder of sources, else the folder."""
    return git(folder, "rev-parse", "--show-toplevel") or folder


def page_version(app, docname: str) -> str:
    """`2026-11-25, commit 1fab3ddde053` of the page as it is committed, else of the checkout."""
    root = checkout(app.srcdir)
    of_page = ["--", os.path.relpath(app.env.doc2path(docname), root)] \
        if Path(root).resolve() == Path(app.srcdir).resolve() else []
    found = git(root, "log", "-1", "--format=%cs, commit %h", "--abbrev=12", *of_page)
    return found or os.environ.get("HNERV_CLIP_COMMIT", "")[:12]


def changed_since(page: Path, notebook: Path, root: str) -> str:
    """A sentence where an executed page is older than its notebook or the library; else empty."""
    cells = nbformat.read(page, as_version=4).cells
    executed = EXECUTED.search(cells[-1].source) if cells else None
    if not executed or not notebook.exists():
        return ""
    own, sources = ([cell.source for cell in these if cell.cell_type == "code"
                     and "injected-parameters" not in cell.metadata.get("tags", [])]
                    for these in (cells, nbformat.read(notebook, as_version=4).cells))
    used = (["hnerv_clip", *(f":(exclude)hnerv_clip/{part}" for part in APART)],
            imported(sources, root))
    differ = {name for paths in filter(None, used) for name in  # not what was changed and restored
              (git(root, "diff", "--name-only", executed[1], "HEAD", "--", *paths) or "").split()}
    commits = (git(root, "rev-list", f"{executed[1]}..HEAD", "--", *sorted(differ)) or ""
               ).split() if differ else []
    what = ["the notebook's code changed"] if own != sources else []
    what += [f"the library changed in {len(commits)} commit{'s' * (len(commits) > 1)}"] \
        if commits else []
    return f"Executed at commit {executed[1]}. Since then {' and '.join(what)}." if what else ""


def imported(codes: list[str], root: str) -> list[str]:
    """Files of `APART` that cells import, and those that these import in turn."""
    found, codes = set(), list(codes)
    for code in codes:  # grows
        for part, words in re.findall(rf"hnerv_clip\.({'|'.join(APART)})\b(.*)", code):
            for name in re.findall(r"\w+", words):
                path = f"hnerv_clip/{part}/{name}.py"
                if path not in found and (Path(root) / path).is_file():
                    found.add(path)
                    codes.append((Path(root) / path).read_text(encoding="utf-8"))
    return sorted(found)


def add_notices(app, doctree: nodes.document) -> None:
    """Put notices behind the first paragraph, which is the answer."""
    page = Path(app.env.doc2path(app.env.docname))
    root = checkout(app.srcdir)
    reduced = Path(app.srcdir) / "book" / "_generated" / "reduced.md"
    notices = []
    if page.suffix == ".ipynb":
        notices.append(changed_since(page, Path(root) / "notebooks" / page.name, root))
    if reduced.exists() and not re.match(r"[12]\d_", page.name):
        notices.append(reduced.read_text(encoding="utf-8").strip())
    section = next(doctree.findall(nodes.section), None)
    for words in filter(None, notices):
        notice = nodes.container("", nodes.paragraph(words, words), classes=["page-notice"])
        at = next((i for i, node in enumerate(section) if isinstance(node, nodes.paragraph)), 0)
        section.insert(at + 1, notice)


class Figures(SphinxPostTransform):
    """Alternative texts, and the class `picture`, whose files `book.js` exchanges in dark mode."""

    default_priority = 900

    def run(self, **kwargs) -> None:
        for node in self.document.findall(nodes.image):
            if not node.get("alt"):
                node["alt"] = self.words(node)
            node["classes"].append("picture")

    def words(self, node: nodes.image) -> str:
        """The heading above a figure and the text before it."""
        section = node.parent
        while section is not None and not isinstance(section, nodes.section):
            section = section.parent
        if section is None:
            return "Figure"
        title = section.next_node(nodes.title).astext()
        before = [p.astext() for p in section.findall(nodes.paragraph)
                  if p.line is not None and not isinstance(p.parent, nodes.container)]
        return " ".join(f"Figure under “{title}”. {before[0] if before else ''}".split())[:300]


def finish_page(app, pagename, templatename, context, doctree) -> None:
    """Date and commit in the footer; without the scripts of Thebe, which this book does not use."""
    if doctree is not None:
        context["last_updated"] = page_version(app, pagename)
    if "citation-list" in context.get("body", ""):  # a list needs list items, which it has not
        context["body"] = context["body"].replace('<div role="list" class="citation-list">',
                                                  '<div class="citation-list">')
    if "data:video/mp4;base64," in context.get("body", ""):
        context["body"] = films_as_files(app, pagename, context["body"])
    context["script_files"] = [
        script for script in context.get("script_files", [])
        if "thebe" not in f"{script} {getattr(script, 'attributes', '')}".lower()]


def films_as_files(app, pagename: str, body: str) -> str:
    """Films inside a page become files beside it, which are loaded when they are played."""
    def move(found: re.Match) -> str:
        film = base64.b64decode(found[1])
        name = f"{hashlib.sha256(film).hexdigest()[:16]}.mp4"
        folder = Path(app.outdir) / "_static" / "films"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(film)
        return f'src="{"../" * pagename.count("/")}_static/films/{name}"'

    body = re.sub(r'<video(?=[^>]*>\s*<source src="data:|[^>]* src="data:)',
                  '<video preload="metadata"', body)
    return re.sub(r'src="data:video/mp4;base64,([^"]*)"', move, body)


def plain_docstring(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text: stars, bars and underscores in them mark nothing up."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(part if part.startswith("`") else
                           re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts)
        if what == "module" and line.startswith("    "):  # a list of names: a line each
            lines[i] = "    | " + lines[i].lstrip()


def short_signature(app, what, name, obj, options, signature, returns) -> tuple | None:
    """`...` for `<factory>`, with which Sphinx does not shorten the names of types."""
    return (signature.replace("<factory>", "..."), returns) if signature else None


def skip_nameless(app, what, name, obj, skip, options) -> bool | None:
    """Named tuples: fields of which Python says only "Alias for field number 0" are left out."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field") else None


def offer_launch(app, config) -> None:
    """Buttons that open a notebook elsewhere, once the repository's address is known."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options["launch_buttons"] = LAUNCH | {k: v for k, v in options.get(
            "launch_buttons", {}).items() if v}


def setup(app) -> dict:
    """Register all of it."""
    app.connect("config-inited", offer_launch, priority=900)
    app.connect("doctree-read", add_notices)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", short_signature)
    app.connect("autodoc-skip-member", skip_nameless)
    app.connect("html-page-context", finish_page, priority=900)
    app.add_post_transform(Figures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
