"""A notebook as papermill left it, made a page for readers."""

from __future__ import annotations

import ast
import base64
import io
import os
import re
from typing import Any

import nbformat

from hnerv_clip.book.markdown import FOLD, without_html
from hnerv_clip.runs.provenance import commit_words

LARGE_PICTURE = 200_000  # characters of base64, from where a picture is stored as JPEG
WIDGET = "application/vnd.jupyter.widget-view+json"

EXECUTED = """*This page was executed at {at} in {seconds} s, on {device}, with PyTorch {torch}, at
commit {words}. Runs that it shows may have been trained elsewhere: see the table above.*
"""


def execution_note(facts: dict[str, Any]) -> str:
    """When and where a page was executed, which is not when and where its runs were trained."""
    return EXECUTED.format(words=commit_words(facts), **facts).strip()


def clean_page(notebook: nbformat.NotebookNode, folders: dict[str, str]) -> nbformat.NotebookNode:
    """A copy for the reader: no progress bars, no widgets, no machine's paths, no timing noise.

    The answer comes first. Markdown without words is left out. Figures get their captions as
    alternative texts, and large pictures are JPEG; HTML inside Markdown is shown as text, but for
    `markdown.PLAIN_TAGS`. Parameters, code that only imports or formats, and tables of more than
    `markdown.FOLD` rows are folded; a line that is printed again says how often. The last lines
    say when and where the page was executed. A clean page stays as it is.

    Args:
        folders: {absolute path: what the page says instead}, the longest first.
    """
    page = nbformat.from_dict(notebook)
    facts = page.metadata.get("hnerv_clip")
    page.metadata = nbformat.from_dict({k: v for k, v in page.metadata.items()
                                        if k in ("kernelspec", "language_info")})
    for cell in page.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items()
                                            if k == "tags"})
        tags = list(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and not {"hide-input", "remove-input"} & set(tags) and (
                _only_formats(cell.source) or {"parameters", "injected-parameters"} & set(tags)):
            cell.metadata["tags"] = [*tags, "hide-input"]
        if words := _prompt(cell):
            cell.metadata["mystnb"] = {"code_prompt_show": f"Show {words}",
                                       "code_prompt_hide": f"Hide {words}"}
        if "injected-parameters" in tags:
            cell.source = _hide_folders(cell.source, folders)
        if cell.cell_type == "code":
            cell.outputs = [_clean_output(output, folders)
                            for output in _count_repeated(cell.outputs)
                            if output.get("name") != "stderr"
                            and WIDGET not in output.get("data", {})
                            and output.get("data", {}).get("text/markdown", "words").strip()]
            if alt := _alternative_text(cell.outputs):
                cell.metadata["mystnb"] = {**cell.metadata.get("mystnb", {}), "image": {"alt": alt}}
    if facts:
        page.cells.append(nbformat.v4.new_markdown_cell(execution_note(facts), id="executed"))
    _put_answer_first(page)
    return page


def _count_repeated(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs of which each that prints what the one before printed is a number behind that one."""
    kept: list[tuple[nbformat.NotebookNode, int]] = []
    for output in outputs:
        before, times = kept[-1] if kept else (None, 0)
        if before and output.get("text", "").strip() and before.get("text") == output.text:
            kept[-1] = before, times + 1
        else:
            kept.append((output, 1))
    for output, times in kept:
        if times > 1:
            output.text = f"{output.text.rstrip()} ({times} times)\n"
    return [output for output, _ in kept]


def _prompt(cell: nbformat.NotebookNode) -> str:
    """What a folded cell holds, where it is no code that a reader follows; else nothing."""
    tags, source = set(cell.metadata.get("tags", [])), cell.source
    if "hide-input" not in tags:
        return ""
    if "injected-parameters" in tags:
        return "parameters of this page"
    if "parameters" in tags:
        return "default parameters"
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return ""
    only = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in statements)
    return "imports" if only and statements else ""


def _only_formats(source: str) -> bool:
    """Whether a cell is imports, a table of where things come from, or prose made from results."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return False
    called = [ast.unparse(node) for node in statements if isinstance(node, ast.Expr)]
    imports = sum(isinstance(node, (ast.Import, ast.ImportFrom)) for node in statements)
    set_up = sum(call.startswith("figures.use_style(") for call in called)
    return len(statements) == imports + set_up or any(re.match(
        r"(display\()?(Markdown|provenance_table|labels\.in_words)\(", call) for call in called)


def _put_answer_first(page: nbformat.NotebookNode) -> None:
    """Repeat below the title what the page answers: the prose under "## Answer", else the first
    prose in bold, else the last before that heading."""
    cells = page.cells
    if not cells or not cells[0].source.startswith("# ") or any(
            cell.get("id") == "answer" for cell in cells):
        return

    def prose(these):
        return [output.data["text/markdown"] for cell in these for output in
                cell.get("outputs", []) if "text/markdown" in output.get("data", {})]

    at = next((i for i, cell in enumerate(cells) if cell.source.startswith("## Answer")), None)
    teacher = re.search(r"\*\*Teacher: .*?\*\*", "\n".join(prose(cells)))
    if at is not None:
        end = next((i for i in range(at + 1, len(cells)) if cells[i].cell_type == "markdown"),
                   len(cells))
        said = prose(cells[at:end]) or [text for text in prose(cells[:at])
                                        if not text.startswith(("**Teacher", "|"))][-1:]
    else:
        bold = (re.match(r"(?!\*\*Teacher)\*\*.+?\*\*", text, re.S) for text in prose(cells))
        said = [found[0] for found in bold if found][:1]
        first = next((i for i, cell in enumerate(cells) if prose([cell])), len(cells))
        if all("remove-input" in cell.metadata.get("tags", []) for cell in cells[1:first + 1]):
            return  # it is first already: nothing before it is shown
    if said:
        said += [teacher[0]] if teacher and "**Teacher" not in " ".join(said) else []
        title, _, rest = cells[0].source.partition("\n")
        cells[0].source = title
        cells.insert(1, nbformat.v4.new_markdown_cell(" ".join(said), id="answer"))
        if rest.strip():
            cells.insert(2, nbformat.v4.new_markdown_cell(rest.strip(), id="introduction"))


def _alternative_text(outputs: list[nbformat.NotebookNode]) -> str:
    """The captions of the figures among outputs, see `figures.style.CaptionedFigure`."""
    texts = [output.data.get("text/plain", "") for output in outputs
             if any(kind.startswith("image/") for kind in output.get("data", {}))]
    return " ".join(" ".join(text.split()) for text in texts if not text.startswith("<"))


def _clean_output(output: nbformat.NotebookNode, folders: dict[str, str]) -> nbformat.NotebookNode:
    if "text" in output:  # of a line that was rewritten in place, what remained
        output.text = _unsigned_zero(
            re.sub(r"[^\n]*\r(?!\n)", "", _hide_folders(output.text, folders)), sign=" ")
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and (kind.startswith("text/") or kind == "image/svg+xml"):
            output.data[kind] = _hide_folders(value, folders)
    if "image/svg+xml" in output.get("data", {}):  # the same figure gives the same page
        output.data["image/svg+xml"] = re.sub(r"\s*<dc:date>[^<]*</dc:date>", "",
                                              output.data["image/svg+xml"])
    if "text/markdown" in output.get("data", {}):
        output.data["text/markdown"] = clean_markdown(output.data["text/markdown"])
    if 'class="dataframe"' in output.get("data", {}).get("text/html", ""):
        output.data["text/html"] = _fold_table(_plain_table(_unsigned_zero(
            output.data["text/html"])))
    if len(output.get("data", {}).get("image/png", "")) > LARGE_PICTURE:
        _make_jpeg(output.data)
    return output


def clean_markdown(text: str) -> str:
    """Markdown of a notebook as its page shows it."""
    return _unsigned_zero(without_html(text))


def _unsigned_zero(text: str, *, sign: str = "") -> str:
    """Text in which what rounds to zero has no sign: 0.00, not -0.00; `sign` takes its place."""
    return re.sub(r"(?<![\w.])[-−+](0\.0+)(?!\d)", rf"{sign}\1", text)


def _plain_table(html: str) -> str:
    """A data frame, not folded, without numbers of rows that only count and rows that say None."""
    html = re.sub(r"^<details><summary>.*?</summary>\n(.*)\n</details>$", r"\1", html, flags=re.S)
    html = re.sub(r"\s*<tr>\s*<th>[^<]*</th>(\s*<td>(?:None|NaN)</td>)+\s*</tr>", "", html)
    head, _, body = html.partition("</thead>")
    numbers = re.findall(r"<tr>\s*<th>([^<]*)</th>", body)
    if head.count("<tr") > 1 or numbers not in ([""] * len(numbers),
                                                [str(i) for i in range(len(numbers))]):
        return html  # rows have names
    return re.sub(r"(<tr[^>]*>)\s*<th></th>", r"\1", head, count=1) + "</thead>" + re.sub(
        r"(<tr>)\s*<th>[^<]*</th>", r"\1", body)


def _fold_table(html: str) -> str:
    """A data frame of more than `FOLD` rows, under a line that is clicked to open it."""
    rows = html.count("<tr") - 1
    return html if rows <= FOLD else (
        f"<details><summary>Table of {rows} rows</summary>\n{html}\n</details>")


def _make_jpeg(data: dict[str, Any]) -> None:
    """A large picture as JPEG, at the same size, where that takes less than half."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    packed = io.BytesIO()
    picture.convert("RGB").save(packed, "JPEG", quality=88, subsampling=0)
    text = base64.b64encode(packed.getvalue()).decode()
    if 2 * len(text) < len(data["image/png"]):
        del data["image/png"]
        data["image/jpeg"] = text


def _hide_folders(text: str, folders: dict[str, str]) -> str:
    for folder, name in folders.items():
        text = text.replace(folder + os.sep, name + "/" if name else "").replace(folder, name)
    return text
