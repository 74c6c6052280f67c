"""The stored video: quantised weights and embeddings, range-coded into one file, and back.

Quantisation is HNeRV's (uniform between minimum and maximum, over the tensor or along the axis that
errs least); where its authors sum Huffman code lengths, this writes the bytes and decodes them.
Entropy coding is `constriction`'s range coder, made for learnt compression.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import constriction
import numpy as np
import torch
from torch import Tensor

from hnerv_clip.config import Config
from hnerv_clip.model import HNeRV, build_model
from hnerv_clip.runs import RunError, write_atomic

MAGIC = b"HNCLIP\x00\x01"
EMBEDDINGS = "embeddings"


@dataclass
class Quantised:
    """A tensor as integers: value ≈ minimum + scale · level."""

    levels: np.ndarray  # integers in [0, 2^bits - 1], the tensor's shape
    minimum: np.ndarray  # broadcastable to it
    scale: np.ndarray
    bits: int

    def dequantise(self) -> Tensor:
        """float32, the original shape."""
        minimum, scale = self.minimum.astype(np.float32), self.scale.astype(np.float32)
        return torch.from_numpy(minimum + scale * self.levels.astype(np.float32))


def quantise(tensor: Tensor, *, bits: int) -> Quantised:
    """Quantise uniformly, over the whole tensor or along one axis, whichever errs least.

    Per-axis bounds are kept in float16 and considered where they are under 2 % of the values, as in
    HNeRV's code; constants (minimum = maximum) come back exactly.

    Args:
        tensor: any shape, finite.
        bits: 1 to 16.
    Raises:
        ValueError: the tensor holds NaN or infinity.
    """
    values = tensor.detach().cpu().float().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"a tensor of shape {values.shape} holds NaN or infinity; "
                         "it cannot be quantised: go back to the last good checkpoint")
    top = 2**bits - 1
    axes: list[int | None] = [None] + [i for i in range(values.ndim) if values.shape[i] > 50]
    best, best_error = None, np.inf
    for axis in axes:
        kind = np.float32 if axis is None else np.float16
        low = values.min(axis=axis, keepdims=True).astype(kind)
        scale = ((values.max(axis=axis, keepdims=True) - low.astype(np.float32)) / top).astype(kind)
        step = np.where(scale > 0, scale, 1).astype(np.float32)
        levels = np.clip(np.round((values - low) / step), 0, top).astype(np.uint16)
        candidate = Quantised(levels, low, scale, bits)
        error = np.abs(candidate.dequantise().numpy() - values).mean()
        if error < best_error:
            best, best_error = candidate, error
    return best


def encode_video(model: HNeRV, embeddings: Tensor | None, path: str | Path, *, config: Config
                 ) -> int:
    """Write the video that a model stores.

    Args:
        embeddings: [T, C, h, w] per-frame embeddings of a hybrid model; None for coordinates.
    Returns:
        size_bytes of the file: all that `decode_video` needs.
    """
    train = config.train
    tensors = {n: quantise(t, bits=train.quant_model_bit) for n, t in model.stored_state().items()}
    if embeddings is not None:
        tensors[EMBEDDINGS] = quantise(embeddings, bits=train.quant_embed_bit)
    chunks, table = [], []
    for name, q in tensors.items():
        coded = _encode_levels(q.levels.ravel(), bits=q.bits)
        bounds = q.minimum.tobytes() + q.scale.tobytes()
        table.append([name, list(q.levels.shape), list(q.minimum.shape), q.minimum.dtype.str,
                      q.bits, len(coded)])
        chunks += [bounds, coded]
    header = zlib.compress(json.dumps({
        "config": config.params(), "frame_hw": model.frame_hw, "frame_count": model.frame_count,
        "tensors": table}, separators=(",", ":")).encode(), 9)
    body = struct.pack("<I", len(header)) + header + b"".join(chunks)
    data = MAGIC + struct.pack("<I", zlib.crc32(body)) + body
    write_atomic(Path(path), lambda file: file.write(data))
    return len(data)


def decode_video(path: str | Path) -> tuple[HNeRV, Tensor | None]:
    """Read a stored video.

    Returns:
        The model (a hybrid one without its encoder, which is not stored) and the embeddings
        [T, C, h, w] float32, None for coordinates.
    Raises:
        RunError: not such a file, truncated or altered.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from error
    start = len(MAGIC) + 4
    if data[:len(MAGIC)] != MAGIC or \
            data[len(MAGIC):start] != struct.pack("<I", zlib.crc32(data[start:])):
        raise RunError(f"{path} is not a whole HNeRV-CLIP video: truncated, altered or foreign; "
                       "encode it again from the run's checkpoint")
    header_size, = struct.unpack_from("<I", data, start)
    at = start + 4 + header_size
    header = json.loads(zlib.decompress(data[start + 4:at]))
    state = {}
    for name, shape, bounds_shape, kind, bits, coded_size in header["tensors"]:
        count = int(np.prod(bounds_shape))
        bounds = np.frombuffer(data, kind, 2 * count, at).reshape(2, *bounds_shape)
        at += bounds.nbytes
        levels = _decode_levels(data[at:at + coded_size], int(np.prod(shape)), bits=bits)
        at += coded_size
        state[name] = Quantised(levels.reshape(shape), bounds[0], bounds[1], bits).dequantise()
    embeddings = state.pop(EMBEDDINGS, None)
    model = build_model(Config.from_params(**header["config"]).model,
                        frame_hw=tuple(header["frame_hw"]), frame_count=header["frame_count"])
    if hasattr(model, "encoder"):
        del model.encoder  # not stored
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{path} does not hold the network that its header describes: {error}"
                       ) from error
    return model.eval(), embeddings


def _encode_levels(levels: np.ndarray, *, bits: int) -> bytes:
    """Range-code integers under their own histogram, which travels with them."""
    counts = np.bincount(levels, minlength=2**bits).astype(np.uint32)
    table = zlib.compress(counts.tobytes(), 9)
    if np.count_nonzero(counts) == 1:  # a constant needs no code
        return struct.pack("<I", len(table)) + table
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(levels.astype(np.int32), _histogram_model(counts))
    return struct.pack("<I", len(table)) + table + coder.get_compressed().astype("<u4").tobytes()


def _decode_levels(data: bytes, count: int, *, bits: int) -> np.ndarray:
    table_size, = struct.unpack_from("<I", data)
    counts = np.frombuffer(zlib.decompress(data[4:4 + table_size]), np.uint32)
    if np.count_nonzero(counts) == 1:
        return np.full(count, counts.argmax(), np.uint16)
    coder = constriction.stream.queue.RangeDecoder(
        np.frombuffer(data, "<u4", offset=4 + table_size).astype(np.uint32))
    return coder.decode(_histogram_model(counts), count).astype(np.uint16)


def _histogram_model(counts: np.ndarray) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
