"""What a learnt prediction must beat: shuffles, means, and neighbours.

Every function answers for some frames as a prediction would: unit vectors [N, P, D]. Baselines see
the teacher's embeddings of the training frames only.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import RidgeCV

from hnerv_clip.metrics import bracket_frames, unit


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
    before, after, _ = bracket_frames(frames, train_frames, exclude_self=True)
    return np.where(np.abs(frames - before) <= np.abs(after - frames), before, after)


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
    before, after, share = bracket_frames(frames, train_frames, exclude_self=True)
    share = share.astype(np.float32)[:, None, None]
    return unit(teacher[before] * (1 - share) + teacher[after] * share)


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
