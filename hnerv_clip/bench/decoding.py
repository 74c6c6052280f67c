"""Decoding speed, from stored embeddings to frames on the device."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hnerv_clip.dataset import Dataset
from hnerv_clip.devices import no_bfloat16, no_kernels, synchronise
from hnerv_clip.inference import BATCH, embed_frames
from hnerv_clip.model import HNeRV

try:
    from hnerv_clip.engines.fused import network as fused
    from hnerv_clip.engines.fused.decoding import Decoder
except ImportError:  # no Triton: it is made for Linux
    fused = None

PASS_S = 2.0  # a pass of `measure_decoding` is shorter, or one batch


def decoders(model: HNeRV) -> tuple[str, ...]:
    """How frames can be decoded here: plain, and fused where a GPU runs our kernels."""
    device = next(model.parameters()).device
    known = not (no_kernels(device) or no_bfloat16(device) or fused.unsupported(model))
    return ("plain", "fused") if known else ("plain",)


@torch.inference_mode()
def measure_decoding(model: HNeRV, dataset: Dataset, *, batch_size: int = BATCH, repeats: int = 5,
                     decoder: str | None = None) -> pd.DataFrame:
    """Decoding speed from stored embeddings to frames on the device: RGB, both heads, CLIP alone.

    A pass is 8 batches; where those take more than `PASS_S`, fewer, at least one.

    Args:
        decoder: one of `decoders`, the last by default.
    Returns:
        A row per mode: frames_per_s (median over passes), frames_per_s_min, frames_per_s_max,
        n passes, batch_size, decoder.
    """
    embeddings = embed_frames(model, dataset, np.arange(min(model.frame_count, 8 * batch_size)))
    embeddings = embeddings.repeat(-(-8 * batch_size // len(embeddings)), 1, 1, 1)[:8 * batch_size]
    decoder = decoder or decoders(model)[-1]
    centres = dataset.grid.centres.to(embeddings.device)
    with_clip = model.config.predict_clip
    if decoder == "fused":
        decode = Decoder(model, batch=batch_size, centres=centres if with_clip else None)
    else:
        def decode(chunk: Tensor, *, rgb: bool, clip: bool) -> None:
            stages = model.stages(chunk, last=None if rgb else model.clip_stages[-1])
            if rgb:
                model.rgb(stages[-1])
            if clip:
                model.clip_at(stages, centres)

    modes = {"RGB": (True, False)}
    if with_clip:
        modes |= {"RGB and embeddings": (True, True), "embeddings only": (False, True)}
    rows = []
    for name, (rgb, clip) in modes.items():
        def seconds(chunks: tuple[Tensor, ...], rgb: bool = rgb, clip: bool = clip) -> float:
            synchronise(embeddings.device)
            start = time.perf_counter()
            for chunk in chunks:
                decode(chunk, rgb=rgb, clip=clip)
            synchronise(embeddings.device)
            return time.perf_counter() - start

        chunks = embeddings.split(batch_size)
        seconds(chunks[:1])  # warm-up
        chunks = chunks[:max(1, int(PASS_S / seconds(chunks[:1])))]
        rates = [sum(map(len, chunks)) / seconds(chunks) for _ in range(repeats)]
        rows.append({"mode": name, "frames_per_s": float(np.median(rates)),
                     "frames_per_s_min": min(rates), "frames_per_s_max": max(rates),
                     "n": repeats, "batch_size": batch_size, "decoder": decoder})
    return pd.DataFrame(rows)
