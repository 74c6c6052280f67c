"""The network that a file describes, planned before anything of it takes memory."""

from __future__ import annotations

import dataclasses
import math
import warnings

import torch

from hnerv_clip.codec.container import PIXEL_LIMIT, SIDE_LIMIT, FileError
from hnerv_clip.config import AUTO, ModelConfig
from hnerv_clip.model import HNeRV

EMBEDDINGS = "embeddings"  # the name of the per-frame embeddings among a file's tensors
# Limits of what a file may ask for; far beyond any use
LIMITS = {"strides": (12, 64), "width": 4096, "levels": 4096, "fc_hw": 512, "kernel": 31,
          "blocks": 16, "clip_dim": 16384, "modelsize": 1000}
VALUES_PER_BYTE = 64  # a file unpacks to at most so many values a byte of it…
VALUES_FREE = 2**18  # … and these
ACTIVATION_LIMIT = 2**28  # values of one frame's features


def plan_network(config: ModelConfig, *, frame_hw: tuple[int, int], frame_count: int,
                 size_bytes: int) -> HNeRV:
    """The network that a file describes, without memory for its values (on the `meta` device).

    Raises:
        FileError: no such network, or one beyond the limits of a file of so many bytes.
    """
    _check_limits(config)
    try:
        model = _without_memory(config, frame_hw, frame_count)
    except (ValueError, RuntimeError, ArithmeticError, TypeError, MemoryError) as error:
        raise FileError(f"its settings describe no network: {error}") from error
    values = sum(t.numel() for t in model.state_dict().values()) + model.plan.embed_values
    allowed = VALUES_FREE + VALUES_PER_BYTE * size_bytes
    if values > allowed:
        raise FileError(f"a network of {values} values in {size_bytes} bytes, at most {allowed}")
    stages = [math.prod(model.stage_hw(i)) * width for i, width in enumerate(model.plan.widths)]
    widest = max(stages + [math.prod(frame_hw) * 3])
    if widest > ACTIVATION_LIMIT:
        raise FileError(f"features of {widest} values a frame, at most {ACTIVATION_LIMIT}")
    return model.eval()


def _without_memory(config: ModelConfig, frame_hw: tuple[int, int], frame_count: int) -> HNeRV:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a frame size that the decoder is resized to
        model = HNeRV(config, frame_hw=frame_hw, frame_count=frame_count)
    if hasattr(model, "encoder"):
        del model.encoder  # not stored
    return model.eval()


def _check_limits(config: ModelConfig) -> None:
    if AUTO in dataclasses.astuple(config):
        raise FileError("a setting is auto, where a file holds what was chosen")
    padded = config.pad_list or (1, 1)
    if max(padded) > SIDE_LIMIT or math.prod(padded) > PIXEL_LIMIT:
        raise FileError(f"pad_list {padded} is beyond the limits")
    longest, largest = LIMITS["strides"]
    for name in ("enc_strds", "dec_strds"):
        strides = getattr(config, name)
        if len(strides) > longest or max(strides) > largest or math.prod(strides) > 2**14:
            raise FileError(f"{name} {str(strides)[:80]} is beyond the limits")
    kind, *numbers = (config.embed or "_").split("_")
    levels = float(numbers[-1] or 0)
    base = float(numbers[0] or 1) if kind else 1
    unknown = math.inf if config.predict_clip else 0  # of a teacher that is not known
    dim = unknown if config.clip_dim == AUTO else config.clip_dim
    for name, value, limit in (
            ("enc_dim", max(config.enc_dim), LIMITS["width"]), ("levels", levels, LIMITS["levels"]),
            ("base", base, 100), ("fc_hw", max(config.fc_hw), LIMITS["fc_hw"]),
            ("ks", max(config.ks), LIMITS["kernel"]),
            ("num_blks", max(config.num_blks), LIMITS["blocks"]),
            ("lower_width", config.lower_width, LIMITS["width"]),
            ("clip_dim", dim, LIMITS["clip_dim"]),
            ("modelsize", config.modelsize, LIMITS["modelsize"])):
        if not value <= limit:
            raise FileError(f"{name} {value} is above {limit}")
    if config.reduce != -1 and not 0.1 <= config.reduce <= 64:
        raise FileError(f"reduce {config.reduce} is not between 0.1 and 64")
