"""How large a network and a field `encode` fits and for how long, where nobody says: as suits the
video and the device. A CPU's epochs, and the boxes that its teacher embeds, fit a few minutes where
the video is short, and end at a least number."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hnerv_clip.config import PRESETS, Config
from hnerv_clip.dataset import Dataset
from hnerv_clip.devices import select_device, set_precision
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.field.fit_run import CPU_BATCH, measure_fit
from hnerv_clip.inference import Run
from hnerv_clip.model import HNeRV, build_model
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.sizes import choose_modelsize
from hnerv_clip.stored.fine_tune import Tuner
from hnerv_clip.teachers.boxes import BoxSampling, draw_boxes, embed_boxes
from hnerv_clip.teachers.load import load_teacher
from hnerv_clip.video import Video

# Floating-point operations of a CPU's training and fine-tuning: some two minutes of two cores
CPU_TRAINING, CPU_TUNING = 6e12, 3e12
CPU_TEACHER_S = 45.0  # of the teacher over a field's boxes
LEAST_BOXES, MOST_BOXES = 8, 256  # of a frame
CPU_PASSES = 100  # of the fit over all boxes of the video, within these steps
LEAST_STEPS, MOST_STEPS = 1000, 4000
SMALL_NETWORK = 0.25  # million values; the usual field would take more than a third of its file
SMALL_FIELD = {"field_hidden": 64, "field_rank": 32, "field_rate_weight": 1e-6}
TIMED_BOXES = 16
TIMED_STEPS, TIMED_S = 5, 2.0  # that a forecast measures of each, at most, but for two steps
EVALUATION = 1  # the evaluations at a training's end, in epochs of it
BACKWARD = 3  # a training step's operations in forward passes
EPOCHS, TUNING = 300, 60  # on a GPU, and at most
LEAST_EPOCHS, LEAST_TUNING = 40, 15
CPU_SETTINGS = {"batch_size": 1, "lr": 3e-3}  # more and larger steps in few epochs
GPU_SETTINGS = {name: PRESETS["best"][name] for name in ("optimizer", "batch_size", "lr")}
WARM_UP = 50 / 300  # share of the epochs before the head's loss joins, as in the paper's setting


def choose_settings(config: Config, video: Video, given: dict[str, Any]) -> dict[str, Any]:
    """Settings that nobody gave: as many values for each pixel as the paper's; on a CPU few epochs.

    Args:
        config: all settings, given or not.
        given: flat parameters by name; they are not chosen.
    Returns:
        Flat parameters: modelsize, epochs, batch_size, lr, on a CPU pixel_loss_warmup_epochs, on
        a GPU optimizer, and those of `SMALL_FIELD` where the network is small.
    """
    chosen: dict[str, Any] = {"modelsize": choose_modelsize(video.frame_hw, len(video.frames)),
                              "epochs": EPOCHS}
    if _on_cpu(config):
        config = config.replace(**{"modelsize": chosen["modelsize"], **_only(given, "modelsize")})
        chosen["epochs"] = _epochs(config, video, CPU_TRAINING, least=LEAST_EPOCHS, most=EPOCHS)
        epochs = int(given.get("epochs", chosen["epochs"]))
        chosen |= CPU_SETTINGS | {"pixel_loss_warmup_epochs": round(WARM_UP * epochs)}
    elif "optimizer" not in given:  # whose learning rate is another
        chosen |= GPU_SETTINGS
    if float(given.get("modelsize", chosen["modelsize"])) < SMALL_NETWORK:
        chosen |= SMALL_FIELD
    return _without(chosen, given)


def choose_boxes(config: Config, video: Video, given: dict[str, Any]
                 ) -> tuple[dict[str, int], float | None]:
    """Boxes and steps of a field that nobody gave, and about how many minutes the teacher takes.

    On a CPU as many boxes of a frame as it embeds in `CPU_TEACHER_S`, a power of 2; on a GPU those
    of the settings, and None.

    Raises:
        ConfigError: see `load_teacher`.
    """
    if not _on_cpu(config):
        return {}, None
    frames, second = len(video.frames), _seconds_of_box(config, video)
    most = max(1, int(CPU_TEACHER_S / (second * frames)))
    chosen = {"field_boxes": max(LEAST_BOXES, min(MOST_BOXES, 2 ** (most.bit_length() - 1)))}
    boxes = frames * int(given.get("field_boxes", chosen["field_boxes"]))
    steps = CPU_PASSES * boxes // math.prod(CPU_BATCH.values())
    chosen["field_steps"] = max(LEAST_STEPS, min(MOST_STEPS, steps))
    return _without(chosen, given), second * boxes / 60


def _seconds_of_box(config: Config, video: Video) -> float:
    """Of the teacher, by a few boxes of a frame."""
    teacher = load_teacher(config.teacher, config.train.device)
    boxes = draw_boxes(BoxSampling(count=TIMED_BOXES, shapes=2), video.frame_hw, frames=1)
    return _seconds(lambda: embed_boxes(teacher, video.frames[:1], boxes)) / TIMED_BOXES


def choose_tuning(config: Config, video: Video) -> int:
    """Epochs of fine-tuning for the file, likewise."""
    if not _on_cpu(config):
        return TUNING
    return _epochs(config, video, CPU_TUNING, least=LEAST_TUNING, most=TUNING)


def measure_minutes(config: Config, dataset: Dataset, *, tuning: int, done: int = 0
                    ) -> float | None:
    """About how long training, so many epochs of fine-tuning and the fit of a field take on this
    CPU, by a few steps of each on a network that is thrown away; None on a GPU.

    Args:
        done: epochs of the training that a run which goes on has behind it.
    """
    if not _on_cpu(config):
        return None
    model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                        frame_count=len(dataset.video.frames)).to(
        memory_format=torch.channels_last)
    frames, size = torch.from_numpy(dataset.split.train), config.train.batch_size
    indices, steps = frames[:size], -(-len(frames) // size)
    autocast = set_precision(config.train.precision, torch.device("cpu"))
    engine = PlainEngine(config, model, dataset, autocast=autocast)
    seconds = steps * (config.train.epochs - done + EVALUATION) * _seconds(
        lambda: engine.step(indices, count=len(indices), lr=0.0, weight=0.0))
    if config.model.head == "field":
        seconds += measure_fit(Run(RunDir(""), config, model, dataset))
    if tuning:
        tuner = Tuner(model, dataset, config, compiled=False)
        tuner.reset(model)
        seconds += steps * tuning * _seconds(
            lambda: tuner.step(indices, rate=0.0, lr=0.0, step_lr=0.0))
    return seconds / 60


def _seconds(step: Callable[[], object]) -> float:
    """Of a step, the median of a few after a first one."""
    took: list[float] = []
    while len(took) < 1 + TIMED_STEPS and (len(took) < 2 or sum(took) < TIMED_S):
        start = time.perf_counter()
        step()
        took.append(time.perf_counter() - start)
    return float(np.median(took[1:]))


def _on_cpu(config: Config) -> bool:
    return select_device(config.train.device).type == "cpu"


def in_minutes(minutes: float) -> str:
    """Such as `2 minutes`, 1 at least."""
    count = max(1, round(minutes))
    return f"{count:,} minute{'s' if count > 1 else ''}"


def _without(chosen: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if name not in given}


def _only(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: given[name]} if name in given else {}


def _epochs(config: Config, video: Video, work: float, *, least: int, most: int) -> int:
    return max(least, min(most, round(work / _operations(config, video))))


def _operations(config: Config, video: Video) -> int:
    """Of an epoch."""
    frames = len(video.frames)
    return BACKWARD * frames * count_operations(config, frame_hw=video.frame_hw, frames=frames)


def count_operations(config: Config, *, frame_hw: tuple[int, int], frames: int) -> int:
    """Floating-point operations of a frame's forward pass, encoder, decoder and RGB head."""
    config = config.replace(predict_clip=False).resolve(frame_hw)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a frame size that the decoder is resized to
        model = HNeRV(config.model, frame_hw=frame_hw, frame_count=frames)
        with FlopCounterMode(display=False) as counter:
            model.rgb(model.features(model.embed(torch.empty(1, 3, *frame_hw), torch.zeros(
                1, dtype=torch.float64))))
    return counter.get_total_flops()
