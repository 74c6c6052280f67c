"""What a run is: typed, frozen, validated settings, and the two profiles. Imports no torch.

Field names are those of the original HNeRV command line. Packed strings such as ``64_16`` are
parsed here, once; the rest of the library sees tuples and numbers. `settings` lists every field
with its meaning, `packing` parses, `rules` checks, `presets` names sets of values, and `run_config`
holds `Config`, which puts them together and chooses what depends on the frame's size.
"""

from hnerv_clip.config.presets import PRESETS, PROFILES
from hnerv_clip.config.rules import check_split, clip_stages, embed_kind, parse_lr_type
from hnerv_clip.config.run_config import (
    Config,
    profile_params,
    resolve_model,
    resolve_patch_grid,
    settings_table,
)
from hnerv_clip.config.settings import (
    AUTO,
    BUNDLED,
    BUNDLED_DIM,
    LOSSES,
    RUNTIME_PARAMS,
    ConfigError,
    ModelConfig,
    Split,
    TeacherConfig,
    TrainConfig,
    VideoConfig,
    param_names,
)

__all__ = [
    "AUTO", "BUNDLED", "BUNDLED_DIM", "Config", "ConfigError", "LOSSES", "ModelConfig", "PRESETS",
    "PROFILES", "RUNTIME_PARAMS", "Split", "TeacherConfig", "TrainConfig", "VideoConfig",
    "check_split", "clip_stages", "embed_kind", "param_names", "parse_lr_type", "profile_params",
    "resolve_model", "resolve_patch_grid", "settings_table",
]
