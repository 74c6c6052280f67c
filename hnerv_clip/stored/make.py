"""From a trained run to the file that users take away: fewer bytes where asked, and its field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from hnerv_clip.codec.about import describe_dataset
from hnerv_clip.codec.video import FIELD, bind_embeddings, decode_video, encode_video
from hnerv_clip.field.fit_run import fit_head
from hnerv_clip.field.query import Field, has_field, load_field
from hnerv_clip.inference import embed_frames, load_run
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.stored.fine_tune import fine_tune


def store_run(run_dir: str | Path, out: str | Path, *, rate: float | None = None,
              epochs: int = 60, cache_dir: str | Path = "output/cache", device: str = "auto",
              progress: bool = True) -> int:
    """Write a run's video, with its field where it has one or asks for one.

    Args:
        rate: fine-tune for the file first, see `rate.fine_tune`; None stores the run as it is.
        epochs: of the fine-tuning.
    Returns:
        size_bytes of the file.
    Raises:
        RunError: no run there.
        ConfigError: its embeddings are not cached.
    """
    run = load_run(run_dir, cache_dir=cache_dir, device=device)
    model, dataset, config = run.model, run.dataset, run.config
    steps: dict[str, float] = {}
    with torch.inference_mode():
        embeddings = embed_frames(model, dataset) if model.kind == "hybrid" else None
    if rate is not None:
        tuned = fine_tune(model, dataset, config, rate=rate, epochs=epochs, progress=progress)
        model, embeddings, steps = tuned.model, tuned.embeddings, tuned.steps
    about, field = describe_dataset(dataset, config), None
    if config.model.head == FIELD or has_field(run.run_dir):
        if rate is None and has_field(run.run_dir):
            field = load_field(run)
        else:  # another network needs another field: fitted on what the file will give
            encode_video(model, embeddings, out, config=config, about=about, steps=steps)
            field = _fit_on_file(run, out, cache_dir=cache_dir, device=device, progress=progress)
        steps = steps | {f"{FIELD}.{name}": step for name, step in field.steps.items()}
    return encode_video(model, embeddings, out, config=config, about=about, steps=steps,
                        field=None if field is None else field.head)


def _fit_on_file(run, path: str | Path, *, cache_dir: str | Path, device: str, progress: bool
                 ) -> Field:
    """A field of the network that a file holds; kept in the run's folder, in `stored`."""
    model, embeddings = decode_video(path)
    target = next(run.model.parameters()).device
    embeddings = None if embeddings is None else embeddings.to(target)
    folder = RunDir(run.run_dir.path / "stored")
    folder.path.mkdir(exist_ok=True)
    stored = replace(run, run_dir=folder, model=bind_embeddings(model.to(target), embeddings))
    return fit_head(stored, cache_dir=cache_dir, device=device, progress=progress)
