"""From a trained run to the file that users take away: fewer bytes where asked, and its field."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hnerv_clip.codec.about import describe_dataset
from hnerv_clip.codec.video import FIELD, bind_embeddings, decode_video, encode_video
from hnerv_clip.config import AUTO, BUNDLED, PRESETS, Config, ConfigError, TeacherConfig
from hnerv_clip.dataset import Dataset
from hnerv_clip.field.fit_run import fit_head
from hnerv_clip.field.query import STORED, Field, has_field, load_field
from hnerv_clip.inference import Run, embed_frames, load_run
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.stored.effort import choose_boxes, choose_settings, in_minutes
from hnerv_clip.stored.fine_tune import fine_tune
from hnerv_clip.teachers.base import describe_teacher
from hnerv_clip.teachers.clip_weights import NoWeights
from hnerv_clip.train import prepare_run
from hnerv_clip.video import Video, load_video

# What `encode` takes where nothing else is named; the rate–quality page measures files made so
ENCODE = {"data_split": "1_1_1", "lr": 2e-3, "clip_loss_weight": 0.02, "head": FIELD}
# Who names one of these means the original head, or none
OF_ORIGINAL_HEAD = ("predict_clip", "clip_loss_weight", "clip_loss_type", "clip_stage", "clip_pool",
                    "clip_jitter")


def encode_settings(given: dict[str, Any], work: str | Path) -> dict[str, Any]:
    """Settings of a training for the file, from the few that were named.

    A run that has begun in the folder `work` goes on with its own; else `ENCODE` replaces the
    defaults, unless a preset other than `best` is named. Its field gives way to the original head
    where a setting of that head is named, and to none with predict_clip=False.

    Args:
        given: flat parameters.
    Raises:
        RunError: the folder holds a damaged run.
        ConfigError: see `Config.from_params`.
    """
    run, settings = RunDir(work), {**ENCODE, **given}
    if "head" not in given and any(name in given for name in OF_ORIGINAL_HEAD):
        del settings["head"]
    if given.get("preset") == "best":  # its values win over these
        settings = {name: value for name, value in settings.items()
                    if name in given or name not in PRESETS["best"]}
    if given.get("preset", "best") != "best":
        settings = dict(given)
    elif run.begun:
        settings = {**run.config().params(), **given}
    if "teacher" in given or "clip_model" in given or "clip_pretrained" in given:
        settings["clip_dim"] = given.get("clip_dim", AUTO)
    return settings


def prepare_encoding(given: dict[str, Any], work: str | Path, *, cache_dir: str | Path
                     ) -> tuple[Config, Dataset]:
    """Choose all settings, and run the teacher over the video where that was not done before.

    Size, epochs, and a field's boxes and steps follow the video and the device, see `effort`,
    unless a run has begun. Where no teacher is named and CLIP's weights are not to be had, it is
    the bundled one, and that is said.

    Args:
        given: see `encode_settings`; with data_path.
    Returns:
        What `train` takes.
    Raises:
        ConfigError: see `prepare_run`; or a run that has begun does not go with what is given.
    """
    with _of_begun_run(work):
        config = Config.from_params(**encode_settings(given, work))
        _check_same(config, given, work)
    video = load_video(config.video)
    free = not RunDir(work).begun and given.get("preset", "best") == "best"
    if free:
        preset = PRESETS["best"] if "preset" in given else {}
        given = choose_settings(config, video, {**preset, **given}) | given
    with _of_begun_run(work):
        try:
            return _run_teacher(given, work, video, cache_dir, choose=free)
        except NoWeights:
            if any(name.startswith(("teacher", "clip_")) for name in given):
                raise
        label = describe_teacher(TeacherConfig(teacher=BUNDLED)).label
        print("CLIP's weights are not on this machine and cannot be downloaded, so this teacher is "
              f"taken: {label}. Texts to search for are then names of ImageNet classes. With "
              "--teacher clip this command says how to get the weights.")
        return _run_teacher({**given, "teacher": BUNDLED}, work, video, cache_dir, choose=free)


def _check_same(config: Config, given: dict[str, Any], work: str | Path) -> None:
    """Say which of the given settings a run that has begun does not have, before anything loads.

    Raises:
        ConfigError: one of them differs.
    """
    run = RunDir(work)
    others = config.diff(run.config()) if run.begun else {}
    if listed := "; ".join(f"{name}={new!r}, of the training {old!r}" for name, (new, old) in
                           others.items() if name in given and name != "data_path"):
        raise ConfigError(listed)


def _run_teacher(given: dict[str, Any], work: str | Path, video: Video, cache_dir: str | Path, *,
                 choose: bool) -> tuple[Config, Dataset]:
    """What `prepare_encoding` returns; the teacher's speed on a CPU decides on a field's boxes."""
    config = Config.from_params(**encode_settings(given, work))
    if choose and config.model.head == FIELD:
        chosen, minutes = choose_boxes(config, video, given)
        config = config.replace(**chosen)
        if minutes is not None:
            print(f"The teacher first embeds {config.train.field_boxes} boxes of each frame "
                  f"(--field_boxes), which takes about {in_minutes(minutes)}")
    return prepare_run(config, cache_dir, video)


@contextlib.contextmanager
def _of_begun_run(work: str | Path) -> Iterator[None]:
    """Say that settings do not go together with those of a run that has begun, where that is so."""
    try:
        yield
    except NoWeights:
        raise
    except ConfigError as error:
        if not RunDir(work).begun:
            raise
        raise ConfigError(f"{work} holds a training that has begun, with whose settings these do "
                          f"not go together ({error}). Leave them out to go on with it, or name a "
                          "new folder, --work FOLDER") from None


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
    steps: dict[str, float | torch.Tensor] = {}
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
            field = fit_on_file(run, out, cache_dir=cache_dir, device=device, progress=progress)
        steps = steps | {f"{FIELD}.{name}": step for name, step in field.steps.items()}
    return encode_video(model, embeddings, out, config=config, about=about, steps=steps,
                        field=None if field is None else field.head)


def fit_on_file(run: Run, path: str | Path, *, cache_dir: str | Path = "output/cache",
                device: str = "auto", progress: bool = True) -> Field:
    """A field of the network that a file holds; kept in the run's folder, in `STORED`."""
    model, embeddings = decode_video(path)
    target = next(run.model.parameters()).device
    embeddings = None if embeddings is None else embeddings.to(target)
    folder = RunDir(run.run_dir.path / STORED)
    folder.path.mkdir(exist_ok=True)
    stored = replace(run, run_dir=folder, model=bind_embeddings(model.to(target), embeddings))
    return fit_head(stored, cache_dir=cache_dir, device=device, progress=progress)
