"""Look over a built book: links and images resolve, pages are light, pictures have words.

`python .ci/check_pages.py HTML_FOLDER` prints what is wrong and exits with 1 where anything is.
Links to other sites are not followed: the book is read without a network.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

LIMIT_BYTES = 5 * 10**6  # of a page with its pictures, films, styles and scripts
LOADED = ("img, video:not([preload=metadata]), :not(video[preload=metadata]) > source, script, "
          "link[rel=stylesheet], link[rel=preload]")
OBJECT = re.compile(r"<[\w.]+( object\b.*| size .*)>$")
FILE_NAME = re.compile(r"\S+\.(png|svg|jpe?g|webp|gif)$", re.I)


def check_book(folder: Path) -> list[str]:
    """Every fault of the pages in a folder, as `page: what`.

    Raises:
        ValueError: the folder holds no page.
    """
    pages = {path: BeautifulSoup(path.read_bytes(), "html.parser")
             for path in sorted(folder.resolve().rglob("*.html"))
             if "_static" not in path.relative_to(folder.resolve()).parts}
    if not pages:
        raise ValueError(f"{folder} holds no .html; build the book there first")
    names = {path: {tag[key] for tag in page.find_all(True) for key in ("id", "name")
                    if tag.get(key)} for path, page in pages.items()}
    return [f"{path.relative_to(folder.resolve())}: {fault}" for path, page in pages.items()
            for fault in [*check_links(path, page, folder.resolve(), names), *check_icon(page),
                          *check_pictures(page), *check_outputs(page), *check_weight(path, page)]]


def check_links(path: Path, page, folder: Path, names: dict[Path, set[str]]) -> list[str]:
    """Links and files that lead nowhere, or out of the folder, and scripts of other sites."""
    faults = []
    for tag in page.find_all(True):
        for key in ("href", "src", "poster"):
            if not tag.get(key) or tag[key].startswith("data:"):
                continue
            link = urlsplit(tag[key])
            if link.scheme or link.netloc:
                if tag.name != "a" and tag.get("rel") != ["canonical"]:
                    faults.append(f"<{tag.name}> needs the network: {tag[key]}")
                continue
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            if link.path.startswith("/") or not target.is_relative_to(folder):
                faults.append(f"{tag[key]} leaves the book, which may lie under a sub-path")
            elif not target.exists():
                faults.append(f"{tag[key]} does not exist")
            elif link.fragment and target in names and unquote(
                    link.fragment) not in names[target]:
                faults.append(f"{tag[key]}: {target.name} has no #{link.fragment}")
    return faults


def check_icon(page) -> list[str]:
    """A page without an icon, for which browsers ask the server: an error in their console."""
    forwards = page.select("meta[http-equiv=Refresh], meta[http-equiv=refresh]")
    return [] if page.select("link[rel~=icon]") or forwards else ["has no icon"]


def check_pictures(page) -> list[str]:
    """Pictures whose alternative text is missing or the name of a file."""
    return [f"alt={picture.get('alt')!r} says nothing of {picture.get('src', '')[:60]}"
            for picture in page.find_all("img")
            if len((picture.get("alt") or "").strip()) < 4 or FILE_NAME.match(picture["alt"])]


def check_outputs(page) -> list[str]:
    """Outputs of cells that show Python's name of an object in place of it."""
    return [f"an output reads {output.get_text(strip=True)[:60]!r}"
            for output in page.select("div.output")
            if OBJECT.match(output.get_text(strip=True))]


def check_weight(path: Path, page) -> list[str]:
    """A page that is too heavy with all that it loads at once."""
    links = (urlsplit(tag.get("src") or tag.get("href") or "") for tag in page.select(LOADED))
    files = {path} | {(path.parent / unquote(link.path)).resolve()
                      for link in links if link.path and not link.scheme}
    size = sum(file.stat().st_size for file in files if file.is_file())
    return [f"{size / 1e6:.1f} MB, more than {LIMIT_BYTES / 1e6:.0f}"] if size > LIMIT_BYTES else []


if __name__ == "__main__":
    found = check_book(Path(sys.argv[1]))
    print("\n".join(found) or "links, pictures and weight of all pages are well")
    sys.exit(bool(found))
