"""Look for similar patches by clicking, in JupyterLab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
from IPython.display import display

from hnerv_clip.figures.data import plot_patch_grid
from hnerv_clip.figures.search import plot_ranked_patches
from hnerv_clip.metrics import check_pair
from hnerv_clip.patches import PatchGrid
from hnerv_clip.search.rank import similar_patches


def browse_patches(frames: Any, grid: PatchGrid, predicted: Any, teacher: Any, teacher_label: str,
                   *, top_k: int = 6, apart: int = 0, frame: int = 0,
                   show: Callable = display) -> widgets.VBox:
    """A slider for the frame and a button for each patch, laid out as on the frame.

    A click looks the patch up among the predicted embeddings and among the teacher's.

    Args:
        frames: uint8 [T, 3, H, W].
        predicted, teacher: [T, P, D] unit vectors.
        top_k, apart: as in `search.similar_patches`.
        frame: shown first.
        show: displays a figure.
    Raises:
        ValueError: no such frame, or embeddings of another shape or teacher.
    """
    predicted, teacher = check_pair(predicted, teacher)
    if not 0 <= frame < len(frames):
        raise ValueError(f"frame={frame} must lie between 0 and {len(frames) - 1}")
    slider = widgets.IntSlider(value=frame, max=len(frames) - 1, description="frame",
                               continuous_update=False, layout={"width": "100%"})
    picture, found = widgets.Output(), widgets.Output()

    def show_frame(change=None):
        with picture:
            picture.clear_output(wait=True)
            show(plot_patch_grid(frames[slider.value], grid))

    def look_up(button):
        patch = int(button.description)
        rankings = [similar_patches(slider.value, patch, embeddings, top_k, apart=apart)
                    for embeddings in (predicted, teacher)]
        with found:
            found.clear_output(wait=True)
            show(plot_ranked_patches(np.asarray(frames), grid.boxes.numpy(), *rankings,
                                     f"like frame {slider.value}, patch {patch}", teacher_label))

    buttons = [widgets.Button(description=str(patch), tooltip=f"patches like patch {patch}",
                              layout={"width": "auto"}) for patch in range(len(grid))]
    for button in buttons:
        button.on_click(look_up)
    slider.observe(show_frame, names="value")
    show_frame()
    layout = {"grid_template_columns": f"repeat({grid.cols}, 1fr)"}
    return widgets.VBox([slider, picture, widgets.GridBox(buttons, layout=layout), found])
