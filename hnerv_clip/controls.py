"""What a learnt prediction must beat: shuffles, means, neighbours, and what the same bytes can do.

Every function answers for some frames as a prediction would: unit vectors [N, P, D]. Baselines see
the teacher's embeddings of the training frames only.
"""

from __future__ import annotations

import lzma
import struct
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import RidgeCV

from hnerv_clip.measures import check_embeddings, cosine, unit


def conditions(predicted: np.ndarray, teacher: np.ndarray, train_frames: np.ndarray,
               frames: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What each condition answers on some frames.

    Args:
        predicted, teacher: [T, P, D] unit vectors.
        train_frames: the only frames whose teacher embeddings a baseline may use.
        frames: [N] frames asked about.
    Returns:
        {condition: [N, P, D]}: learned; the controls random, shuffled, temporal and (with two or
        more patches) spatial; the baselines mean, position, neighbour and between.
    """
    learned, known = predicted[frames], teacher[train_frames]
    answers = {
        "learned": learned,
        "random": unit(rng.standard_normal(learned.shape, dtype=np.float32)),
        "shuffled": shuffle_pairs(learned, rng),
        "temporal": shuffle_time(learned, rng),
    }
    if learned.shape[1] > 1:
        answers["spatial"] = shuffle_space(learned, rng)
    return answers | {
        "mean": np.broadcast_to(unit(known.mean(axis=(0, 1))), learned.shape),
        "position": np.broadcast_to(unit(known.mean(axis=0)), learned.shape),
        "neighbour": teacher[nearest_training_frame(frames, train_frames)],
        "between": interpolate_teacher(teacher, train_frames, frames),
    }


def nearest_training_frame(frames: np.ndarray, train_frames: np.ndarray) -> np.ndarray:
    """For each frame the nearest training frame other than itself; the earlier one of two.

    Args:
        frames: [N] frame numbers.
        train_frames: [M] frame numbers.
    Returns:
        [N] frame numbers out of `train_frames`.
    Raises:
        ValueError: no training frame is left for some frame.
    """
    frames = np.asarray(frames)
    before, after = _around(frames, train_frames)
    early = np.where(before < 0, np.inf, frames - before)
    late = np.where(after < 0, np.inf, after - frames)
    return np.where(early <= late, before, after)


def interpolate_teacher(teacher: np.ndarray, train_frames: np.ndarray,
                        frames: np.ndarray) -> np.ndarray:
    """The teacher's embeddings interpolated between the training frames on either side.

    A training frame is interpolated from its neighbours, not from itself. At the ends the nearest
    training frame stands alone.

    Args:
        teacher: [T, P, D]; only `train_frames` are read.
        frames: [N] frames asked about.
    Returns:
        [N, P, D] unit vectors.
    """
    frames = np.asarray(frames)
    before, after = _around(frames, train_frames)
    before, after = np.where(before < 0, after, before), np.where(after < 0, before, after)
    share = (frames - before) / np.maximum(after - before, 1)
    share = np.clip(share, 0, 1).astype(np.float32)[:, None, None]
    return unit(teacher[before] * (1 - share) + teacher[after] * share)


def _around(frames, train_frames):
    """The last training frame before and the first after each frame; -1 where there is none."""
    frames, train_frames = np.asarray(frames), np.sort(np.asarray(train_frames))
    padded = np.concatenate([[-1], train_frames, [-1]]).astype(int)
    before = padded[np.searchsorted(train_frames, frames, side="left")]
    after = padded[np.searchsorted(train_frames, frames, side="right") + 1]
    if ((before < 0) & (after < 0)).any():
        raise ValueError(f"{len(train_frames)} training frames leave no other frame to compare "
                         "with: use at least 2 training frames")
    return before, after


def shuffle_pairs(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every (frame, patch) embedding [N, P, D] to another (frame, patch), at random."""
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    return flat[_cycle(len(flat), rng)].reshape(embeddings.shape)


def shuffle_time(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every embedding [N, P, D] to another frame of the same patch position, at random.

    Positions keep their content and lose their time; `shuffle_pairs` loses both.
    """
    moved = [embeddings[_cycle(len(embeddings), rng), patch]
             for patch in range(embeddings.shape[1])]
    return np.stack(moved, axis=1)


def shuffle_space(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every embedding [N, P, D] to another patch position of the same frame, at random.

    Frames keep their content and lose its place.

    Raises:
        ValueError: one patch a frame, which has nowhere to go.
    """
    if embeddings.shape[1] < 2:
        raise ValueError("a spatial shuffle needs at least 2 patches a frame, got 1: "
                         "use another patch_grid")
    return np.stack([frame[_cycle(len(frame), rng)] for frame in embeddings])


def _cycle(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation without fixed points: one cycle through everything (Sattolo 1986)."""
    order = rng.permutation(count)
    moved = np.empty(count, dtype=int)
    moved[order] = np.roll(order, 1)
    return moved


def linear_map(inputs: np.ndarray, teacher: np.ndarray, train_frames: np.ndarray) -> np.ndarray:
    """Teacher embeddings from the network's per-frame embeddings, by ridge regression.

    Says how much of the task is in the per-frame embedding already. The penalty is chosen by
    leave-one-out on the training frames.

    Args:
        inputs: [T, ...] per-frame embeddings, as stored or interpolated.
        teacher: [T, P, D]; only `train_frames` are read.
    Returns:
        [T, P, D] unit vectors.
    Raises:
        ValueError: another number of frames, or NaN.
    """
    inputs = np.asarray(inputs, np.float64).reshape(len(inputs), -1)
    if len(inputs) != len(teacher) or not np.isfinite(inputs).all():
        raise ValueError(f"inputs of {len(inputs)} frames for {len(teacher)} frames of embeddings; "
                         "give one finite row a frame")
    scale = inputs[train_frames].std() + 1e-12
    model = RidgeCV(alphas=np.logspace(-3, 4, 8) * inputs.shape[1])
    model.fit(inputs[train_frames] / scale, teacher[train_frames].reshape(len(train_frames), -1))
    return unit(model.predict(inputs / scale).reshape(teacher.shape)).astype(np.float32)


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
    """A side file of the training frames' embeddings, and what it answers for every frame.

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
    """Store embeddings in at most so many bytes: what the head is worth, without a network.

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
