"""The first frame of a video that was explored before, kept for the next time.

It is seen while PyTorch is imported, and drawn anew once the video is open.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.run_dir import BEST, FIELD, VIDEO
from hnerv_clip.search.cache import make_key, read_arrays, write_arrays

FORMAT = 1  # raise it when what is kept changes
PICTURES = ("original", "decoded", "error")  # JPEG, b"" for none
PARTS = ("config.json", BEST, FIELD, VIDEO)  # of a run, what its first frame is made of


class KeptFrame:
    """Traits of an explorer that shows frame 0, in a cache folder that is there already."""

    def __init__(self, path: str | Path, cache_dir: str | Path, *options: str):
        """
        Args:
            path: of the video, a run's folder or NAME.hnerv.
            options: what the frame depends on beside it.
        """
        path = resolve_path(path)
        name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        self.path = resolve_path(cache_dir) / f"explored-{name}.npz"
        files = [path] if path.is_file() else [path / part for part in PARTS]
        self.key = make_key(FORMAT, list(map(str, options)), [
            (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None
            for file in files])

    def read(self) -> dict[str, Any]:
        """Values by trait; {} where nothing is kept, or the video has changed since."""
        arrays, about = read_arrays(self.path, self.key)
        return about | {name: array.tobytes() for name, array in arrays.items()}

    def write(self, traits: dict[str, Any]) -> None:
        """Keep values by trait; a folder that can't be written keeps nothing."""
        write_arrays(self.path, self.key, {
            name: value for name, value in traits.items() if name not in PICTURES},
            **{name: np.frombuffer(traits[name], np.uint8) for name in PICTURES})
