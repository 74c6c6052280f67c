"""HNeRV-CLIP: video networks that know what they show."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hnerv_clip.stored.video import StoredVideo


def open(path: str | Path, *, device: str = "auto") -> StoredVideo:
    """Open a stored video: frames, times, embeddings and searches, from the file alone.

    Args:
        path: a `.hnerv` file.
        device: where frames and embeddings are computed; `auto` is the GPU where there is one.
    Raises:
        FileError: (`hnerv_clip.codec`) not such a file, truncated, altered, or beyond the limits.
    """
    from hnerv_clip.stored.video import StoredVideo  # so that `import hnerv_clip` stays light

    return StoredVideo(path, device=device)
