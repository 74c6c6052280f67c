"""What turns patches and texts into unit embeddings of one space, and the cache of the results.

Two teachers: CLIP through open_clip, and a bundled EfficientNet-Lite0, which is not CLIP. A teacher
runs once per video; training reads its embeddings from the cache and never loads it.
"""

import importlib
from typing import Any

# Imported when they are asked for: torch and safetensors take seconds, which what only splits
# queries need not wait for
_HOMES = {
    "Teacher": "base", "TeacherFacts": "base", "describe_teacher": "base", "preprocess": "base",
    "teacher_dim": "base", "cache_path": "cache", "cached_embeddings": "cache",
    "teacher_embeddings": "cache", "load_teacher": "load", "run_teacher": "load",
    "encode_queries": "text", "parse_queries": "text", "reference_vectors": "text"}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
