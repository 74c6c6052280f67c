"""Every figure of the book: one style, `plot_x(table) -> Figure`. Nothing is computed here."""

from hnerv_clip.figures.data import (
    plot_frame_similarity,
    plot_frames,
    plot_patch_grid,
    plot_patches,
    plot_similarity_by_lag,
    plot_split,
)
from hnerv_clip.figures.search import plot_heat_map, plot_query_agreement, plot_ranked_patches
from hnerv_clip.figures.style import PALETTE, use_style
from hnerv_clip.figures.verification import plot_conditions, plot_similarity_over_time

__all__ = ["PALETTE", "plot_conditions", "plot_frame_similarity", "plot_frames", "plot_heat_map",
           "plot_patch_grid", "plot_patches", "plot_query_agreement", "plot_ranked_patches",
           "plot_similarity_by_lag", "plot_similarity_over_time", "plot_split", "use_style"]
