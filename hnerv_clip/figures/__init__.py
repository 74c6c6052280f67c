"""Every figure of the book: one style, `plot_x(table) -> Figure`. Nothing is computed here."""

from hnerv_clip.figures.data import (
    plot_frame_similarity,
    plot_frames,
    plot_patch_grid,
    plot_patches,
    plot_similarity_by_lag,
    plot_split,
)
from hnerv_clip.figures.field import (
    plot_decoded,
    plot_field_boxes,
    plot_field_limit,
    plot_field_rate,
    plot_hold_outs,
)
from hnerv_clip.figures.heat import blend_heat, heat_image, lay_heat, plot_heat_maps
from hnerv_clip.figures.rate import plot_rate_quality
from hnerv_clip.figures.recipe import plot_recipe
from hnerv_clip.figures.scaling import plot_scaling
from hnerv_clip.figures.search import (
    plot_box_hits,
    plot_embedding_map,
    plot_index_hits,
    plot_query_agreement,
    plot_ranked_patches,
    plot_similar,
    plot_strips,
)
from hnerv_clip.figures.speed import plot_growth, plot_profile, plot_rates
from hnerv_clip.figures.study import plot_differences, plot_learning, plot_pareto
from hnerv_clip.figures.style import PALETTE, use_style
from hnerv_clip.figures.training import (
    plot_ablation,
    plot_decoding_speed,
    plot_fidelity,
    plot_frame_quality,
    plot_reconstructions,
    plot_tradeoff,
    plot_training,
)
from hnerv_clip.figures.verification import (
    plot_answers,
    plot_calibration,
    plot_conditions,
    plot_judged,
    plot_positions,
    plot_retrieval,
    plot_side_files,
    plot_similarity_over_time,
    plot_study,
)

__all__ = ["PALETTE", "blend_heat", "heat_image", "lay_heat", "plot_ablation", "plot_answers",
           "plot_box_hits", "plot_calibration", "plot_conditions", "plot_decoded",
           "plot_decoding_speed", "plot_differences", "plot_embedding_map", "plot_fidelity",
           "plot_field_boxes", "plot_field_limit", "plot_field_rate", "plot_frame_quality",
           "plot_frame_similarity", "plot_frames", "plot_growth", "plot_heat_maps",
           "plot_hold_outs", "plot_index_hits",
           "plot_judged", "plot_learning", "plot_pareto", "plot_patch_grid", "plot_patches",
           "plot_positions", "plot_profile", "plot_query_agreement", "plot_ranked_patches",
           "plot_rate_quality", "plot_rates", "plot_recipe", "plot_reconstructions",
           "plot_retrieval", "plot_scaling", "plot_side_files", "plot_similar",
           "plot_similarity_by_lag", "plot_similarity_over_time", "plot_split", "plot_strips",
           "plot_study", "plot_tradeoff", "plot_training", "use_style"]
