"""Linear centered kernel alignment with the unbiased estimator, and without each frame."""

from __future__ import annotations

import numpy as np


def debiased_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of vectors, with the unbiased HSIC estimator.

    1: equal up to rotation and scale; about 0 for unrelated sets, where the plain estimate rises
    with the dimension. Kornblith et al. 2019 (arXiv 1905.00414); the estimator is that of Song et
    al. 2012, eq. 5. Computed from D×D products, so that N may be large.

    Args:
        a, b: [N, D1] and [N, D2], row by row of the same things.
    Raises:
        ValueError: other numbers of rows, fewer than 4, or a set without any variation.
    """
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA needs the same rows of both, at least 4; got {len(a)} and {len(b)}")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    own, other = _unbiased_hsic(a, a), _unbiased_hsic(b, b)
    if own <= 1e-18 or other <= 1e-18:
        raise ValueError("CKA is undefined: one set of vectors does not vary")
    return float(_unbiased_hsic(a, b) / np.sqrt(own * other))


def _unbiased_hsic(a, b):
    # With Gram matrices K = aaᵀ and L = bbᵀ whose diagonals are set to 0:
    # [tr(KL) + (1ᵀK1)(1ᵀL1) / ((n-1)(n-2)) - 2/(n-2) 1ᵀKL1] / (n (n-3))
    n = len(a)
    diagonals = (a ** 2).sum(axis=1), (b ** 2).sum(axis=1)
    trace = ((a.T @ b) ** 2).sum() - diagonals[0] @ diagonals[1]
    rows = [x @ x.sum(axis=0) - diagonal for x, diagonal in zip((a, b), diagonals)]
    total = rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2))
    return (trace + total - 2 / (n - 2) * (rows[0] @ rows[1])) / (n * (n - 3))


def cka_without_frames(predicted: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
    """`debiased_cka` of all patches, and without the patches of each frame, for its interval.

    Computed from Gram matrices of all patches, so for some thousands of them.

    Args:
        predicted, teacher: [N, P, D] of the same frames, at least 3 beyond the one left out.
    Returns:
        (CKA, [N] CKA without each frame, NaN where the rest does not vary).
    Raises:
        ValueError: a set without any variation.
    """
    frames, patches, _ = teacher.shape
    grams = [_gram(x) for x in (predicted, teacher)]
    left_out = np.kron(np.eye(frames, frames + 1), np.ones((patches, 1)))  # the last: none
    both, own, other = (_hsic_without(grams[i], grams[j], left_out)
                        for i, j in ((0, 1), (0, 0), (1, 1)))
    varies = np.minimum(own, other) > 1e-18
    if not varies[-1]:
        raise ValueError("CKA is undefined: one set of vectors does not vary")
    cka = np.where(varies, both / np.sqrt(np.where(varies, own * other, 1)), np.nan)
    return float(cka[-1]), cka[:-1]


def _gram(vectors):
    flat = np.asarray(vectors, np.float64).reshape(-1, vectors.shape[-1])
    flat = flat - flat.mean(axis=0)
    gram = flat @ flat.T
    np.fill_diagonal(gram, 0)
    return gram


def _hsic_without(k, m, left_out):
    # The estimator of `_unbiased_hsic` without the rows that each column of `left_out` marks.
    kept = 1 - left_out
    n, products = kept.sum(axis=0), k * m
    trace = products.sum() - 2 * products.sum(axis=1) @ left_out \
        + (left_out * (products @ left_out)).sum(axis=0)
    rows = [kept * (x.sum(axis=1)[:, None] - x @ left_out) for x in (k, m)]
    total = rows[0].sum(axis=0) * rows[1].sum(axis=0) / ((n - 1) * (n - 2))
    return (trace + total - 2 / (n - 2) * (rows[0] * rows[1]).sum(axis=0)) / (n * (n - 3))
