"""Figures of the search: ranked crops, agreement with the teacher, heat maps."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hnerv_clip.figures.style import PALETTE, WIDTH, caption, new_figure, picture_axes


def plot_ranked_patches(frames: np.ndarray, boxes: np.ndarray, predicted: pd.DataFrame,
                        teacher: pd.DataFrame, query: str, teacher_label: str) -> Figure:
    """The best patches by predicted embedding above those by the teacher's own.

    Args:
        frames: uint8 [T, 3, H, W].
        boxes: int [P, 4], top, left, height, width of each patch position in pixels.
        predicted, teacher: rankings as `search.rank_patches` gives them; equally many rows.
        query: the text.
        teacher_label: the teacher in words, for the caption.
    """
    frames, boxes = np.asarray(frames), np.asarray(boxes)
    columns = max(len(predicted), len(teacher))
    figure, axes = new_figure(2, columns, height=2.7 * WIDTH / columns + 0.5, squeeze=False)
    found = set(zip(teacher.frame, teacher.patch, strict=True))
    rows = {"predicted": predicted, "teacher": teacher}
    for panels, (name, ranking) in zip(axes, rows.items(), strict=True):
        for panel in panels:
            picture_axes(panel)
        for panel, hit in zip(panels, ranking.itertuples(), strict=False):
            panel.imshow(cut(frames[hit.frame], boxes[hit.patch]))
            top, left, height, width = boxes[hit.patch]
            panel.set_title(f"frame {hit.frame}\ny {top + height // 2}, x {left + width // 2}\n"
                            f"{hit.score:.3f}", fontsize=8, loc="center")
            if name == "predicted" and (hit.frame, hit.patch) in found:
                frame_panel(panel, PALETTE["good"])
        panels[0].set_ylabel(name, color=PALETTE[name], fontsize=10)
    figure.suptitle(f"“{query}”", fontsize=11, x=0.01, ha="left")
    return caption(figure, f"Best patches for “{query}”: above by the network's predicted "
                           "embedding, below by the teacher's own; frame, centre of the patch in "
                           "pixels, cosine. Green: among the teacher's shown. "
                           f"Teacher: {teacher_label}.")


def plot_query_agreement(agreement: pd.DataFrame, teacher_label: str) -> Figure:
    """Rank correlation and top-k overlap with the teacher, a row per query.

    Args:
        agreement: as `search.compare_rankings` gives it.
        teacher_label: the teacher in words, for the caption.
    """
    figure, axes = new_figure(1, 2, height=0.36 * len(agreement) + 1.3, sharey=True)
    top_k = agreement.top_k.iloc[0]
    places = np.arange(len(agreement))
    axes[0].barh(places, agreement.spearman, color=PALETTE["learned"], height=0.6)
    axes[0].set(xlabel="rank correlation (Spearman)", yticks=places,
                xlim=(min(0, agreement.spearman.min()) - 0.02, 1))
    axes[0].set_yticklabels(agreement["query"])
    axes[0].invert_yaxis()
    axes[1].barh(places, agreement.overlap, color=PALETTE["learned"], height=0.6)
    axes[1].axvline(agreement.chance.iloc[0], color=PALETTE["random"], linestyle="--",
                    label="random ranking")
    axes[1].set(xlabel=f"share of the teacher's top {top_k} found", xlim=(0, 1))
    figure.legend(loc="outside upper right")
    return caption(figure, f"How far the predicted embeddings rank all {agreement.patches.iloc[0]}"
                           f" patches as the teacher's own do. Teacher: {teacher_label}.")


def plot_heat_map(frame: np.ndarray, heat: np.ndarray, query: str, teacher_label: str) -> Figure:
    """A frame, and where on it the predicted embeddings answer the query.

    Args:
        frame: uint8 [3, H, W].
        heat: [h, w], as `search.heat_map` gives it.
        query: the text.
        teacher_label: the teacher in words, for the caption.
    """
    height, width = frame.shape[-2:]
    figure, axes = new_figure(1, 2, height=WIDTH / 2 * height / width + 0.6)
    picture = np.moveaxis(np.asarray(frame), 0, -1)
    for panel in axes:
        picture_axes(panel).imshow(picture)
    shade = axes[1].imshow(heat, extent=(0, width, height, 0), alpha=0.6, interpolation="bilinear")
    figure.colorbar(shade, ax=axes, label="cosine", shrink=0.8)
    axes[1].set_title(f"“{query}”")
    return caption(figure, f"Where the frame answers “{query}” by predicted embedding. "
                           f"Teacher: {teacher_label}.")


def cut(frame: np.ndarray, box) -> np.ndarray:
    """The pixels [h, w, 3] of one patch of a frame [3, H, W]."""
    top, left, height, width = (int(value) for value in box)
    return np.moveaxis(frame[:, top:top + height, left:left + width], 0, -1)


def frame_panel(panel, colour):
    """Draw a coloured border around a picture."""
    for spine in panel.spines.values():
        spine.set(visible=True, color=colour, linewidth=2.5)
