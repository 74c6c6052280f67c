"""A side file: teacher embeddings stored in a given number of bytes, the head's alternative."""

from __future__ import annotations

import lzma
import struct
from dataclasses import dataclass

import numpy as np

from hnerv_clip.metrics import check_embeddings, cosine, unit
from hnerv_clip.verify.baselines import interpolate_teacher


@dataclass(frozen=True)
class SideFile:
    """Embeddings stored in bytes: `data` decodes to `embeddings` (see `read_side_file`)."""

    data: bytes
    embeddings: np.ndarray
    components: int
    bits: int

    @property
    def size_bytes(self) -> int:
        """Length of the file, everything included."""
        return len(self.data)


def store_embeddings(teacher: np.ndarray, train_frames: np.ndarray, budget_bytes: int
                     ) -> tuple[SideFile, np.ndarray]:
    """A side file of the training frames' embeddings, and what it decodes to for every frame.

    Args:
        teacher: [T, P, D]; only `train_frames` are read.
        budget_bytes: for the file, see `write_side_file`.
    Returns:
        The file, and [T, P, D] unit vectors: decoded for training frames, interpolated in time
        for the others.
    """
    train_frames = np.sort(np.asarray(train_frames))
    stored = write_side_file(teacher[train_frames], budget_bytes)
    answers = np.zeros_like(teacher)
    answers[train_frames] = stored.embeddings
    others = np.setdiff1d(np.arange(len(teacher)), train_frames)
    answers[others] = interpolate_teacher(answers, train_frames, others)
    return stored, answers


HEADER = struct.Struct("<4sIIIIB")  # magic, N, P, D, components, bits
MAGIC = b"PCA1"


def write_side_file(embeddings: np.ndarray, budget_bytes: int) -> SideFile:
    """Store embeddings in at most `budget_bytes`.

    Principal components, uniform quantisation, differences in time, LZMA. The number of components
    and the bits of their values are those that decode best within the budget.

    Args:
        embeddings: [N, P, D] unit vectors of frames in order of time.
        budget_bytes: for the whole file.
    Raises:
        ValueError: the budget does not even hold the mean.
    """
    embeddings = check_embeddings(embeddings)
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    mean = flat.mean(axis=0).astype(np.float16)
    left, spread, basis = np.linalg.svd(flat - mean.astype(np.float32), full_matrices=False)
    best, most = None, int((spread > 1e-6 * max(spread[0], 1e-12)).sum())
    for bits in (4, 6, 8):
        def pack(count, bits=bits):
            return _pack(mean, left[:, :count] * spread[:count], basis[:count], bits,
                         embeddings.shape)
        low, high = 0, most
        while low < high:  # the largest number of components that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(pack(middle)) <= budget_bytes else (low, middle - 1)
        data = pack(low)
        if len(data) > budget_bytes:
            raise ValueError(f"a budget of {budget_bytes} bytes does not hold the mean embedding, "
                             f"which takes {len(data)} bytes: give more")
        decoded = read_side_file(data)
        quality = cosine(decoded, embeddings).mean()
        if best is None or quality > best[0]:
            best = quality, SideFile(data, decoded, low, bits)
    return best[1]


def read_side_file(data: bytes) -> np.ndarray:
    """Decode what `write_side_file` stored: [N, P, D] float32 unit vectors.

    Raises:
        ValueError: not such a file.
    """
    if data[:4] != MAGIC or len(data) < HEADER.size:
        raise ValueError(f"not a side file: it starts with {data[:4]!r}, not {MAGIC!r}")
    _, frames, patches, size, count, bits = HEADER.unpack_from(data)
    body = data[HEADER.size:]
    mean = np.frombuffer(body, np.float16, size).astype(np.float32)
    scales = np.frombuffer(body, np.float32, 2 * count, offset=2 * size)
    steps = np.frombuffer(lzma.decompress(body[2 * size + 8 * count:], **_LZMA), np.int8)
    values, basis = np.split(steps, [frames * patches * count])
    values = np.cumsum(values.reshape(count, patches, frames), axis=-1, dtype=np.int8)
    values = values.transpose(2, 1, 0).reshape(-1, count) * scales[:count]
    decoded = values @ (basis.reshape(count, size) * scales[count:, None]) + mean
    return unit(decoded).reshape(frames, patches, size).astype(np.float32)


_LZMA = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 6}]}


def _pack(mean, values, basis, bits, shape):
    frames, patches, size = shape
    values, value_scales = _quantise(values.T, bits)
    basis, basis_scales = _quantise(basis, bits)
    # Differences in time wrap around in 8 bits and are undone exactly.
    values = np.diff(values.reshape(-1, frames, patches).transpose(0, 2, 1), axis=-1, prepend=0)
    steps = values.astype(np.int8).tobytes() + basis.astype(np.int8).tobytes()
    head = HEADER.pack(MAGIC, frames, patches, size, len(basis), bits)
    scales = np.concatenate([value_scales, basis_scales]).astype(np.float32)
    return head + mean.tobytes() + scales.tobytes() + lzma.compress(steps, **_LZMA)


def _quantise(rows, bits):
    """Rows as integers of `bits` bits with a scale each."""
    scales = np.maximum(np.abs(rows).max(axis=1, initial=0), 1e-12) / (2 ** (bits - 1) - 1)
    scales = scales.astype(np.float32)
    return np.round(rows / scales[:, None]).astype(int), scales
