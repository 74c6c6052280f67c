"""Figures of the search: ranked crops, agreement, heat maps, strips, and a map of the space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle

from hnerv_clip.figures.overlay import HEAT, TEXT_RANGE
from hnerv_clip.figures.style import (
    PALETTE,
    WIDTH,
    caption,
    new_figure,
    picture_axes,
    text_color,
)


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
        panels[0].set_ylabel(name, color=text_color(name), fontsize=10)
    figure.suptitle(f"“{query}”", fontsize=11, x=0.01, ha="left")
    return caption(figure, f"Best patches for “{query}”: above by the network's predicted "
                           "embedding, below by the teacher's own; frame, center of the patch in "
                           "pixels, cosine. Framed in green: also in the row below. "
                           f"Teacher: {teacher_label}.")


def plot_box_hits(frames: np.ndarray, hits: dict[str, pd.DataFrame], teacher_label: str) -> Figure:
    """The best frames and boxes for each query, a row for each: whole frames, the boxes drawn.

    Args:
        frames: uint8 [T, 3, H, W].
        hits: {query: frame, x0, y0, x1, y1, score}, as `explore.video.ExploredVideo.search` gives
            them.
        teacher_label: the teacher in words, for the caption.
    """
    columns = max(map(len, hits.values()))
    height, width = frames.shape[2:]
    figure, axes = new_figure(len(hits), columns, squeeze=False,
                              height=len(hits) * (WIDTH / columns * height / width + 0.3) + 0.2)
    for panels, (query, found) in zip(axes, hits.items(), strict=True):
        for panel in panels:
            picture_axes(panel)
        for panel, hit in zip(panels, found.itertuples(), strict=False):
            panel.imshow(np.moveaxis(np.asarray(frames[int(hit.frame)]), 0, -1))
            for color, line in (("white", 2.5), (PALETTE["asked"], 1.4)):
                panel.add_patch(Rectangle((hit.x0, hit.y0), hit.x1 - hit.x0, hit.y1 - hit.y0,
                                          fill=False, edgecolor=color, linewidth=line))
            panel.set_title(f"frame {hit.frame}, {hit.score:.3f}", fontsize=8, loc="center")
        panels[0].set_ylabel(query, fontsize=9)
    return caption(figure, "The frames and boxes that answer each query best by the run's field, "
                           "best first, with their cosine; of boxes that overlap in neighboring "
                           f"frames the best. Teacher: {teacher_label}.")


def plot_index_hits(hits: dict[str, pd.DataFrame], pictures: dict, teacher_label: str) -> Figure:
    """The best patches of many videos, a row for each query.

    Args:
        hits: {query: ranking}, as `index.PatchIndex.search` gives them.
        pictures: {video: (frames, boxes)}, both as for `plot_ranked_patches`.
        teacher_label: the teacher in words, for the caption.
    """
    columns = max(map(len, hits.values()))
    figure, axes = new_figure(len(hits), columns, squeeze=False,
                              height=len(hits) * (WIDTH / columns + 0.45) + 0.5)
    for panels, (query, ranking) in zip(axes, hits.items(), strict=True):
        for panel in panels:
            picture_axes(panel)
        for panel, hit in zip(panels, ranking.itertuples(), strict=False):
            frames, boxes = pictures[hit.video]
            panel.imshow(cut(np.asarray(frames[hit.frame]), boxes[hit.patch]))
            panel.set_title(f"{hit.video}\nframe {hit.frame}, patch {hit.patch}\n{hit.score:.3f}",
                            fontsize=8, loc="center")
        panels[0].set_ylabel(query, fontsize=10)
    return caption(figure, "Best patches of all videos by their networks' predicted embeddings; "
                           f"video, frame, patch, cosine. Teacher: {teacher_label}.")


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
                xlim=(min(0, agreement.spearman.min()) - 0.02, 1), xticks=[0, 0.5, 1])
    axes[0].set_yticklabels(agreement["query"])
    axes[0].invert_yaxis()
    axes[1].barh(places, agreement.overlap, color=PALETTE["learned"], height=0.6)
    axes[1].axvline(agreement.chance.iloc[0], color=PALETTE["random"], linestyle="--",
                    label="random ranking")
    axes[1].set(xlabel=f"share of the teacher's top {top_k} found", xlim=(0, 1),
                xticks=[0, 0.5, 1])
    figure.legend(loc="outside upper left")
    return caption(figure, f"Agreement of two rankings of all {agreement.patches.iloc[0]:,} "
                           "patches, by the predicted embeddings and by the teacher's own. Right "
                           f"is better. Teacher: {teacher_label}.")


def cut(frame: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """The pixels [h, w, 3] of one patch of a frame [3, H, W]."""
    top, left, height, width = (int(value) for value in box)
    return np.moveaxis(frame[:, top:top + height, left:left + width], 0, -1)


def frame_panel(panel: Any, color: str) -> None:
    """Draw a colored border around a picture."""
    for spine in panel.spines.values():
        spine.set(visible=True, color=color, linewidth=2.5)


def plot_strips(scores: dict, teacher_label: str, *, reference: dict | None = None,
                what: str = "Standard score", span: tuple[float, float] = TEXT_RANGE) -> Figure:
    """When each query is answered, and where: a strip a query, frames across, positions down.

    Args:
        scores: {query: [T, P]}, as `search.rank.match_scores` gives them from predicted embeddings.
        teacher_label: the teacher in words, for the caption.
        reference: the same from the teacher's own embeddings, shown at the right.
        what: the kind of score, for the caption.
        span: the scores that are clear and brightest, for all queries.
    """
    columns = [("predicted", scores), ("teacher", reference)][:1 if reference is None else 2]
    figure, axes = new_figure(len(scores), len(columns), height=0.95 * len(scores) + 0.9,
                              sharex=True, squeeze=False)
    for row, query in enumerate(scores):
        for column, (kind, source) in enumerate(columns):
            panel = axes[row, column]
            panel.set_facecolor("#80808033")
            shade = panel.imshow(source[query].T, aspect="auto", vmin=span[0], vmax=span[1],
                                 cmap=HEAT.with_extremes(under="none"), interpolation="nearest")
            panel.grid(False)
            panel.set_yticks([])
            if row == 0:
                panel.set_title(kind, color=text_color(kind))
        axes[row, 0].set_ylabel(query, rotation=0, ha="right", va="center")
    for panel in axes[-1]:
        panel.set_xlabel("frame")
    figure.colorbar(shade, ax=list(axes.flat), pad=0.01, shrink=0.8,
                    ticks=np.linspace(*span, 3))
    return caption(figure, f"{what} of each query at every patch: frames across, patch positions "
                           f"down, row by row of the frame; below {span[0]:g} blank. One scale for "
                           "all. "
                           f"Teacher: {teacher_label}.")


def plot_embedding_map(places: pd.DataFrame, frames: np.ndarray, boxes: np.ndarray,
                       teacher_label: str, *, thumbnails: int = 14) -> Figure:
    """The embedding space laid flat, with thumbnails: predicted beside teacher.

    Args:
        places: as `search.map_embeddings` gives them.
        frames: uint8 [T, 3, H, W].
        boxes: int [P, 4], as for `plot_ranked_patches`.
        teacher_label: the teacher in words, for the caption.
        thumbnails: patches shown on each map; the same ones on both.
    """
    frames, boxes = np.asarray(frames), np.asarray(boxes)
    figure, axes = new_figure(1, 2, height=4.2, sharex=True, sharey=True)
    kinds = dict(list(places.groupby("kind", sort=False)))
    chosen = _spread_out(kinds["teacher"][["x", "y"]].to_numpy(), thumbnails)
    for panel, (kind, points) in zip(axes, kinds.items()):
        shade = panel.scatter(points.x, points.y, c=points.frame, s=16, linewidths=0)
        for point in points.iloc[chosen].itertuples():
            picture = cut(frames[point.frame], boxes[point.patch])
            box = OffsetImage(picture, zoom=20 / picture.shape[0])
            panel.add_artist(AnnotationBbox(box, (point.x, point.y), pad=0.1,
                                            bboxprops={"linewidth": 0.5}))
        panel.set(xticks=[], yticks=[])
        panel.set_title(kind, color=text_color(kind))
        panel.grid(False)
    figure.colorbar(shade, ax=list(axes), label="frame", shrink=0.8)
    return caption(figure, "Every dot is a patch; neighbors on the map are neighbors among the "
                           "embeddings (t-SNE of both sets together). The same patches are shown "
                           f"on both sides. Teacher: {teacher_label}.")


def _spread_out(points, count):
    """Indices of points far from each other: each next one is the farthest from those chosen."""
    chosen = [int(np.argmin(points[:, 0]))]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return chosen


def plot_similar(frame: np.ndarray, box: Sequence[float], hits: Sequence[tuple[np.ndarray, str]],
                 teacher_label: str) -> Figure:
    """A place in a frame, and what is like it.

    Args:
        frame: uint8 [H, W, 3].
        box: x0, y0, x1, y1 in pixels, the place.
        hits: (picture uint8 [h, w, 3], words) of each.
        teacher_label: the teacher in words, for the caption.
    """
    height, width = frame.shape[:2]
    figure, axes = new_figure(1, 1 + len(hits), height=1.9,
                              width_ratios=[1.7, *[1] * len(hits)])
    for panel in axes:
        panel.set_anchor("N")
    picture_axes(axes[0]).imshow(frame)
    axes[0].set_title("asked about\n", fontsize=8)
    x0, y0, x1, y1 = box
    for color, line in (("white", 3.5), (PALETTE["asked"], 1.8)):
        axes[0].add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color,
                                    linewidth=line))
    for panel, (picture, words) in zip(axes[1:], hits, strict=True):
        picture_axes(panel).imshow(picture)
        panel.set_title(words, fontsize=8)
    return caption(figure, "Left, the place that is asked about; then what is most like it by the "
                           f"network's embeddings, best first. Teacher: {teacher_label}.")
