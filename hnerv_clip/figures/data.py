"""Figures of the data: frames and their split, patches, and what the teacher makes of them."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hnerv_clip.figures.style import DIVERGING, PALETTE, WIDTH, caption, new_figure, picture_axes
from hnerv_clip.patches import PatchGrid

SPLIT_NAMES = {"train": "training", "val": "held out", "skip": "skipped"}


def plot_frames(frames: np.ndarray, labels: list[str], *, credit: str = "", count: int = 8,
                columns: int = 4) -> Figure:
    """Frames from beginning to end, bordered in the color of their split.

    Args:
        frames: uint8 [T, 3, H, W].
        labels: of each frame, 'train', 'val' or 'skip'.
        credit: whose pictures these are, for the caption.
        count: how many frames to show, evenly spread.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    rows = -(-len(chosen) // columns)
    height, width = frames.shape[-2:]
    cell = WIDTH / columns
    figure, axes = new_figure(rows, columns, height=rows * (cell * height / width + 0.3),
                              squeeze=False)
    for panel in axes.flat:
        picture_axes(panel)
    for panel, index in zip(axes.flat, chosen, strict=False):
        panel.imshow(_picture(frames[index]))
        panel.set_title(f"frame {index}, {SPLIT_NAMES[labels[index]]}", fontsize=8)
        _border(panel, PALETTE[labels[index]])
    return caption(figure, f"{len(chosen)} of {len(frames)} frames, in order; the border is the "
                           "color of the split." + (f" {credit}." if credit else ""))


def plot_split(labels: list[str]) -> Figure:
    """Which frame trains and which validates, a cell per frame.

    Args:
        labels: of each frame, 'train', 'val' or 'skip'.
    """
    names = list(SPLIT_NAMES)
    codes = np.array([[names.index(label) for label in labels]])
    figure, axes = new_figure(height=1.1)
    axes.pcolormesh(np.arange(len(labels) + 1) - 0.5, [0, 1], codes, vmin=0, vmax=len(names) - 1,
                    cmap=ListedColormap([PALETTE[name] for name in names]),
                    edgecolors="white", linewidth=0.4 if len(labels) < 300 else 0)
    axes.set(xlabel="frame", yticks=[])
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    counts = {name: labels.count(name) for name in names}
    handles = [Patch(color=PALETTE[name], label=f"{SPLIT_NAMES[name]}: {counts[name]}")
               for name in names if counts[name]]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return caption(figure, "The network is trained on the training frames, and evaluated on the "
                           "held-out ones.")


def plot_patch_grid(frame: np.ndarray, grid: PatchGrid) -> Figure:
    """Where each patch lies: the frame once for every patch, bright where the patch is.

    Args:
        frame: uint8 [3, H, W].
    """
    height, width = grid.frame
    cell = WIDTH / grid.cols
    figure, axes = new_figure(grid.rows, grid.cols, squeeze=False,
                              height=grid.rows * (cell * height / width + 0.3))
    bright = _picture(frame)
    dim = (bright * 0.3 + 255 * 0.45).astype(np.uint8)
    boxes, centres = grid.boxes.tolist(), grid.centres.tolist()
    for index, (panel, (top, left, h, w), (y, x)) in enumerate(zip(axes.flat, boxes, centres,
                                                                   strict=True)):
        shown = dim.copy()
        shown[top:top + h, left:left + w] = bright[top:top + h, left:left + w]
        picture_axes(panel).imshow(shown)
        panel.plot(x, y, "o", color=PALETTE["predicted"], markeredgecolor="white")
        place = f": top {top}, left {left}" if grid.cols <= 4 else ""  # no room for more
        panel.set_title(f"patch {index}{place}", fontsize=8)
    seen = grid.coverage()
    return caption(figure, f"The {len(grid)} patches of {grid.size[0]}×{grid.size[1]} pixels on a "
                           f"frame of {height}×{width}; every pixel lies in {seen.min()} to "
                           f"{seen.max()} of them. The dot is the center, where the network "
                           "predicts the patch's embedding.")


def plot_patches(patches: np.ndarray, grid: PatchGrid, *, frame_index: int) -> Figure:
    """The patches of one frame, in their rows and columns.

    Args:
        patches: uint8 [P, 3, h, w].
    """
    cell = WIDTH / grid.cols
    figure, axes = new_figure(grid.rows, grid.cols, height=grid.rows * (cell + 0.2), squeeze=False)
    for index, (panel, patch) in enumerate(zip(axes.flat, patches, strict=True)):
        picture_axes(panel).imshow(_picture(patch))
        panel.set_title(f"patch {index}", fontsize=9)
    return caption(figure, f"What the teacher is shown of frame {frame_index}: each of these "
                           "becomes one embedding.")


def plot_frame_similarity(raw: np.ndarray, centred: np.ndarray, teacher_label: str) -> Figure:
    """Cosine between any two frames' embeddings by the teacher, raw and mean-centered.

    Args:
        raw, centred: [T, T] cosine between frames, mean over patch positions.
        teacher_label: the teacher in words, for the caption.
    """
    figure, axes = new_figure(1, 2, height=3.9)
    panels = [(np.asarray(raw), "raw cosine", 0, 1, None),
              (np.asarray(centred), "mean-centered cosine", -1, 1, DIVERGING)]
    for panel, (values, title, low, high, colours) in zip(axes, panels, strict=True):
        shown = panel.imshow(values, vmin=low, vmax=high, cmap=colours)
        panel.set(title=title, xlabel="frame", ylabel="frame")
        panel.grid(False)
        figure.colorbar(shown, ax=panel, shrink=0.75)
    return caption(figure, "Left, all frames look similar, since all embeddings share a "
                           "large component. Right, without it: blocks are scenes, whose "
                           f"frames have similar embeddings. Teacher: {teacher_label}.")


def plot_similarity_by_lag(raw: np.ndarray, centred: np.ndarray, *, mean_energy: float, fps: float,
                           teacher_label: str) -> Figure:
    """How fast the teacher's view of a place changes, beside what a constant would score.

    Args:
        raw, centred: [L] mean cosine of frames that lie 0, 1, … L-1 frames apart.
        mean_energy: squared length of the mean, of unit embeddings.
        fps: frames per second.
        teacher_label: the teacher in words, for the caption.
    """
    raw, centred = np.asarray(raw), np.asarray(centred)
    time_s = np.arange(len(raw)) / fps
    constant = mean_energy ** 0.5  # cosine of a unit vector with the mean's direction, on average
    figure, axes = new_figure(height=3.0)
    axes.plot(time_s, raw, color=PALETTE["teacher"], label="raw cosine")
    axes.plot(time_s, centred, color=PALETTE["teacher"], linestyle="--",
              label="mean-centered cosine")
    axes.axhline(constant, color=PALETTE["mean"], linestyle=":",
                 label="raw cosine of the constant mean")
    axes.set(xlabel="time between frames (s)", ylabel="cosine at the same position", xlim=(0, None),
             ylim=(min(0, centred.min()) - 0.05, 1.02))
    figure.legend(loc="outside upper left", ncols=3)
    return caption(figure, f"The mean embedding has {mean_energy:.0%} of the mean squared length "
                           f"of the embeddings, so a constant has a cosine of {constant:.2f} with "
                           "nothing learned: results are therefore also given as mean-centered "
                           f"cosine. Teacher: {teacher_label}.")


def _picture(image: np.ndarray) -> np.ndarray:
    """[3, H, W] as matplotlib takes it."""
    return np.moveaxis(np.asarray(image), 0, -1)


def _border(panel, colour: str) -> None:
    for spine in panel.spines.values():
        spine.set(visible=True, edgecolor=to_rgb(colour), linewidth=2.5)
