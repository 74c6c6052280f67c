"""The words for splits, sources and scores, in one place."""

from __future__ import annotations

import numpy as np

# The bands of the project's description: (lowest value, name, meaning).
SIMILARITY_BANDS = (
    (0.9, "Excellent", "strong semantic preservation"),
    (0.7, "Good", "captures most semantic features"),
    (0.4, "Moderate", "some semantic information preserved"),
    (-np.inf, "Poor", "limited semantic learning"),
)
GAP_BANDS = (
    (0.15, "Large gap", "overfitting to the training frames"),
    (0.05, "Medium gap", "acceptable, some overfitting"),
    (-np.inf, "Small gap", "good generalization"),
)


def similarity_band(similarity: float) -> tuple[str, str]:
    """(name, meaning) of a mean raw cosine, by the original description's bands."""
    return _band(similarity, SIMILARITY_BANDS, "similarity")


def gap_band(gap: float) -> tuple[str, str]:
    """(name, meaning) of training minus held-out cosine, by the original description's bands."""
    return _band(gap, GAP_BANDS, "gap")


def _band(value, bands, name):
    if np.isnan(value):
        raise ValueError(f"{name} is NaN, so it lies in no band: look for empty or NaN embeddings")
    # The table's limits: the first band lies above its limit, the next include theirs.
    if value > bands[0][0]:
        return bands[0][1:]
    return next(band[1:] for band in bands[1:] if value >= band[0])
SOURCE_WORDS = {"encoder": "encoded from the frame itself",
                "interpolated": "predicted from their neighbors' embeddings",
                "coordinates": "predicted from coordinates"}
