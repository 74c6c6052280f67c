"""What is published says nothing of what is missing, and uses one spelling (style: American)."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from hnerv_clip.labels import SOURCE_WORDS, in_words

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md")),
         *sorted((ROOT / "book" / "_generated").glob("*.md")),
         *sorted((ROOT / "book").glob("[12][0-9]_*.ipynb"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MISSING = r"none yet|not (to )?be had|could be had|not yet measured|to be measured"
BRITISH = r"learnt|neighbours?('|\b)|colour|centre\b|labelled|normalis|optimis|behaviour"


def words_of(path):
    """The text of a page, without code: `quantised` and the like are names of settings."""
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
    else:
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join([cell.source for cell in cells if cell.cell_type == "markdown"] + [
            output.data["text/markdown"] for cell in cells for output in cell.get("outputs", [])
            if "text/markdown" in output.get("data", {})])
    return re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<[^>]*>", " ", text, flags=re.S)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_speaks_of_what_there_is(path):
    assert not re.findall(MISSING, words_of(path), re.I)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_one_spelling(path):
    assert [found[0] for found in re.finditer(BRITISH, words_of(path), re.I)] == []


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_one_way_to_write_percent(path):
    """"95%", as Python's own format gives it."""
    assert re.findall(r".{0,20}\d\s%", words_of(path)) == []


def test_a_table_is_shown_in_words():
    table = pd.DataFrame({"psnr_db": [31.256, None], "source": ["encoder", "interpolated"],
                          "n": [3, 4], "band": [None, None]})
    shown = in_words(table, "source", "psnr_db", "band", "n", "ms_ssim")
    assert shown.to_dict("list") == {
        "per-frame embedding": [SOURCE_WORDS["encoder"], SOURCE_WORDS["interpolated"]],
        "PSNR (dB)": ["31.26", ""], "number of frames": [3, 4]}
    with pytest.raises(KeyError):
        in_words(table.assign(nameless=1), "nameless")
