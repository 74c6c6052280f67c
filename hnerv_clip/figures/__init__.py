"""Every figure of the book: one style, `plot_x(table) -> Figure`. Nothing is computed here."""

import importlib
from typing import Any

# Imported when they are asked for: Matplotlib takes most of a second, which the explorer's first
# picture need not wait for
_NAMES = {
    "data": ("plot_frame_similarity plot_frames plot_patch_grid plot_patches "
             "plot_similarity_by_lag plot_split"),
    "field": "plot_decoded plot_field_boxes plot_field_limit plot_field_rate plot_hold_outs",
    "heat": "plot_heat_maps",
    "overlay": "blend_heat heat_image lay_heat",
    "rate": "plot_rate_quality",
    "recipe": "plot_recipe",
    "scaling": "plot_scaling",
    "search": ("plot_box_hits plot_embedding_map plot_index_hits plot_query_agreement "
               "plot_ranked_patches plot_similar plot_strips"),
    "speed": "plot_growth plot_profile plot_rates",
    "study": "plot_differences plot_learning plot_pareto",
    "style": "PALETTE use_style",
    "training": ("plot_ablation plot_decoding_speed plot_fidelity plot_frame_quality "
                 "plot_reconstructions plot_tradeoff plot_training"),
    "verification": ("plot_answers plot_calibration plot_conditions plot_judged plot_positions "
                     "plot_retrieval plot_side_files plot_similarity_over_time plot_study"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
