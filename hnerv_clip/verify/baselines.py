"""Controls and baselines for a learned prediction: shuffles, means, and neighbours.

Every function returns, like a prediction, unit vectors [N, P, D] for some frames. Baselines see the
teacher's embeddings of the training frames only.
"""

from __future__ import annotations

import numpy as np

from hnerv_clip.metrics import bracket_frames, unit

GRAM_ROWS = 4000  # embeddings up to which all products are made at once


def conditions(predicted: np.ndarray, teacher: np.ndarray, train_frames: np.ndarray,
               frames: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The embeddings of each condition on some frames.

    Args:
        predicted, teacher: [T, P, D] unit vectors.
        train_frames: the only frames whose teacher embeddings a baseline may use.
        frames: [N] frame numbers.
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
        frames: [N] frame numbers.
    Returns:
        [N, P, D] unit vectors.
    """
    before, after, share = bracket_frames(frames, train_frames, exclude_self=True)
    share = share.astype(np.float32)[:, None, None]
    return unit(teacher[before] * (1 - share) + teacher[after] * share)


def shuffle_pairs(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every (frame, patch) embedding [N, P, D] to another (frame, patch), at random."""
    return _reorder(embeddings, "shuffled", rng)


def shuffle_time(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every embedding [N, P, D] to another frame of the same patch position, at random.

    Positions keep their content, frames do not; `shuffle_pairs` keeps neither.
    """
    return _reorder(embeddings, "temporal", rng)


def shuffle_space(embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every embedding [N, P, D] to another patch position of the same frame, at random.

    Frames keep their content, positions do not.

    Raises:
        ValueError: one patch a frame, which has no other position.
    """
    if embeddings.shape[1] < 2:
        raise ValueError("a spatial shuffle needs at least 2 patches a frame, got 1: "
                         "use another patch_grid")
    return _reorder(embeddings, "spatial", rng)


def _reorder(embeddings, control, rng):
    frames, patches, size = embeddings.shape
    return embeddings.reshape(-1, size)[_order(control, frames, patches, rng)].reshape(
        embeddings.shape)


def _order(control, frames, patches, rng):
    """[frames·patches] which of all embeddings a control puts at each (frame, patch)."""
    if control == "shuffled":
        return _cycle(frames * patches, rng)
    indices = np.arange(frames * patches).reshape(frames, patches)
    if control == "temporal":
        return np.stack([indices[_cycle(frames, rng), patch] for patch in range(patches)],
                        axis=1).ravel()
    return np.concatenate([row[_cycle(patches, rng)] for row in indices])


def control_cosines(learned: np.ndarray, target: np.ndarray, rng: np.random.Generator,
                    draws: int = 200) -> dict[str, np.ndarray]:
    """Raw cosines of the controls with the teacher, drawn many times.

    Random embeddings of D values have cosine 2B - 1 with any vector, where B has the Beta
    distribution of (D - 1) / 2 twice, so that none needs to be drawn in full.

    Args:
        learned, target: [N, P, D] unit vectors of the same frames.
    Returns:
        {random, shuffled, temporal and, with two or more patches, spatial: [draws, N, P] float32}.
    """
    frames, patches, size = learned.shape
    half = (size - 1) / 2
    found = {"random": (2 * rng.beta(half, half, (draws, frames, patches)) - 1).astype(np.float32)
             if size > 1 else rng.choice(np.float32([-1, 1]), (draws, frames, patches))}
    own, right = (x.reshape(-1, size) for x in (learned, target))
    gram = own @ right.T if len(own) <= GRAM_ROWS else None
    columns = np.arange(len(own))
    for control in ("shuffled", "temporal", "spatial") if patches > 1 else ("shuffled", "temporal"):
        orders = [_order(control, frames, patches, rng) for _ in range(draws)]
        rows = [np.einsum("nd,nd->n", own[order], right) if gram is None else gram[order, columns]
                for order in orders]
        found[control] = np.stack(rows).reshape(draws, frames, patches)
    return found


def _cycle(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation without fixed points: one cycle through everything (Sattolo 1986)."""
    order = rng.permutation(count)
    moved = np.empty(count, dtype=int)
    moved[order] = np.roll(order, 1)
    return moved
