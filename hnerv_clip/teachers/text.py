"""Queries: several texts in one string, and their vectors in a teacher's text space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hnerv_clip.metrics import unit

if TYPE_CHECKING:  # it imports torch, which a kept query does without
    from hnerv_clip.teachers.base import Teacher

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a close-up of a {}.",
             "a picture with a {}.")


def parse_queries(queries: str | Sequence[str]) -> list[str]:
    """Queries from "hare; wood rabbit" or a list of texts, in order.

    Raises:
        ValueError: no query, an empty one, or the same one twice.
    """
    parts = queries.split(";") if isinstance(queries, str) else list(queries)
    if isinstance(queries, str) and parts and not parts[-1].strip() and len(parts) > 1:
        parts = parts[:-1]  # a trailing semicolon
    names = [part.strip() if isinstance(part, str) else part for part in parts]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"queries={queries!r} hold an empty query; "
                             "write for example queries=\"hare; wood rabbit\"")
    if not names:
        raise ValueError("queries is empty; write for example queries=\"hare; wood rabbit\"")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"query {twice[0]!r} is given twice; name each once")
    return names


def encode_queries(names: Sequence[str], teacher: Teacher,
                   templates: Sequence[str] = TEMPLATES) -> np.ndarray:
    """Queries in the teacher's text space: unit vectors [K, D].

    With CLIP each query is the mean over `templates`, which the prompts of its training resemble
    more than a bare word does. A teacher that knows names only gets the names.

    Raises:
        ValueError: a bad query, two that are the same to the teacher (synonyms of an ImageNet
            class; capitals, to CLIP), or a template without {}.
        ConfigError: a name that the teacher does not know; the message suggests others.
    """
    names = parse_queries(names)
    vectors = _encode(names, teacher, templates)
    check_distinct(names, vectors, teacher.label)
    return vectors


def reference_vectors(teacher: Teacher) -> np.ndarray:
    """What a text's score is compared with: names of many things, float32 [N, D] unit vectors.

    They are ImageNet's class names; of CLIP every fifth, as it reads each text.
    """
    from hnerv_clip.teachers.imagenet import descriptions

    names = list(dict.fromkeys(own[0] for own, _ in descriptions()))
    return _encode(names[::5] if teacher.is_clip else names, teacher, TEMPLATES[:1])


def check_distinct(names: Sequence[str], vectors: np.ndarray, label: str) -> None:
    """Raise ValueError where two names have the same vector, [K, D], for the teacher `label`."""
    same = np.argwhere(np.triu(np.abs(vectors[:, None] - vectors).max(axis=-1) < 1e-5, k=1))
    if len(same):
        first, second = (names[index] for index in same[0])
        raise ValueError(f"{first!r} and {second!r} are the same to {label}; name one")


def _encode(names, teacher, templates):
    if not teacher.is_clip:
        return np.asarray(teacher.encode_text(names).cpu())
    bad = [template for template in templates if "{}" not in template]
    if bad or not templates:
        raise ValueError(f"template {bad[0] if bad else ''!r} has no {{}} for the query")
    vectors = [teacher.encode_text([template.replace("{}", name) for name in names]).cpu()
               for template in templates]
    return unit(np.mean(np.stack(vectors), axis=0))
