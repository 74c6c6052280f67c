"""What looks over built pages in continuous integration finds what is wrong with them."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("check_pages", ROOT / ".ci" / "check_pages.py")
check_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_pages)
ICON = '<link rel="icon" href="a.png">'
GOOD = ('<a href="other.html#there">a</a> <a href="https://example.org">b</a> <a href="#here">c</a>'
        '<h1 id="here">d</h1> <img src="a.png" alt="A curve that rises">')


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "a.png").write_bytes(b"x")
    (tmp_path / "book" / "other.html").write_text(ICON + '<p id="there">')
    return tmp_path


def faults(book, html, icon=ICON):
    (book / "book" / "page.html").write_text(icon + html)
    return check_pages.check_book(book)


def test_a_good_page_has_no_faults(book):
    assert faults(book, GOOD) == []
    assert faults(book, GOOD, icon="") == ["book/page.html: has no icon"]
    forward = '<meta http-equiv="Refresh" content="0; url=other.html">'
    assert faults(book, forward, icon="") == []
    (book / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .html"):
        check_pages.check_book(book / "empty")


@pytest.mark.parametrize("html, words", [
    ('<a href="missing.html">', "missing.html does not exist"),
    ('<a href="other.html#nowhere">', "other.html has no #nowhere"),
    ('<a href="#nowhere">', "page.html has no #nowhere"),
    ('<a href="/book/other.html">', "sub-path"),
    ('<a href="../../out.html">', "leaves the book"),
    ('<script src="https://cdn.example.org/x.js">', "needs the network"),
    ('<img src="b.png" alt="A curve">', "b.png does not exist"),
    ('<img src="a.png">', "alt=None"),
    ('<div class="output">&lt;IPython.core.display.Markdown object&gt;</div>', "IPython"),
    ('<div class="output">&lt;Figure size 880x506 with 2 Axes&gt;</div>', "Figure size"),
    ('<img src="a.png" alt="../_images/2756da98.svg">', "says nothing of a.png")])
def test_faults_are_found(book, html, words):
    found = faults(book, GOOD + html)
    assert len(found) == 1 and found[0].startswith("book/page.html: ") and words in found[0]


def test_a_page_weighs_what_it_loads_at_once(book):
    (book / "book" / "film.mp4").write_bytes(bytes(6 * 10**6))
    assert "6.0 MB" in faults(book, '<video src="film.mp4"></video>')[0]
    assert "6.0 MB" in faults(book, '<video><source src="film.mp4"></video>')[0]
    assert not faults(book, '<video preload="metadata" src="film.mp4"></video>')
    assert not faults(book, '<video preload="metadata"><source src="film.mp4"></video>')
