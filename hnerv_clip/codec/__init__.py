"""The stored video: one file that plays and can be searched, and how it is read and written.

`container` knows the bytes (no torch, no numpy), `levels` tensors as integers, `entropy` integers
as bytes, `video` a network as a file and back, `version1` the first format, which stays readable.
The format is described in the book's page «The file».
"""

from importlib import import_module
from typing import Any

_WHERE = {"quantise": "levels", "Quantised": "levels", "FileError": "container",
          "read_header": "container", "encode_video": "video", "decode_video": "video",
          "StoredNetwork": "video", "About": "video"}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:  # so that reading a header loads no torch
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
