"""The whole study as a list of runs.

They differ from one base: in video, embedding and seed; in the weight and the start of the CLIP
loss; and in what might make embeddings better on held-out frames, or between the supervised
positions (`REMEDIES`, `ENCODINGS`). `study.run` trains and measures them, `study.table` gathers
what they gave.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from hnerv_clip.config import Config, ConfigError, profile_params
from hnerv_clip.study.ablations import PAPER_EPOCHS

# bikes is smaller: 272×640, of which a crop is divisible by its strides
VIDEOS: dict[str, dict[str, Any]] = {
    "bunny": {},
    "bikes": {"data_path": "bikes", "crop_list": "256_640", "enc_strds": "4 4 2 2 2",
              "dec_strds": "4 4 2 2 2", "fc_hw": "2_5"},
}
# What the patches are ranked and labelled by: ImageNet names that the bundled teacher often gives
# them, and that describe them to CLIP, too
LABELS = {
    "bunny": "hare; valley; stone wall; worm fence; hay; barn; cliff; lakeside",
    "bikes": "car mirror; steel arch bridge; suit; trolleybus; sports car; moped; seashore; patio",
}
KINDS = {"hybrid": "", "xyt": "xyt_1.25_80", "pe": "pe_1.25_80"}
LAMBDAS = (0.1, 0.05, 1, 0.2, 0.02)  # beside the base's 0.5
WARMUPS = (0, 100)  # beside the base's 50
PHASES = (1, 2, 3, 4)  # beside the base's 0: together they hold out each frame once (`cross_fit`)
# What might help on held-out frames and between the supervised positions
HALF = "half the distance of two supervised positions"
REMEDIES: dict[str, dict[str, Any]] = {
    "dense": {"patch_grid": "3_7"},
    "denser": {"patch_grid": "5_13"},
    "pool_0.35": {"clip_pool": 0.35},
    "denser_pool": {"patch_grid": "5_13", "clip_pool": 0.35},
    "jitter_half": {"clip_jitter": HALF},
    "dense_jitter": {"patch_grid": "3_7", "clip_jitter": HALF},
    "stage_2": {"clip_stage": "2"},
    "denser_stage_2": {"patch_grid": "5_13", "clip_stage": "2"},
    "pool_stage_2": {"clip_pool": 0.35, "clip_stage": "2"},
    "denser_pool_stage_2": {"patch_grid": "5_13", "clip_pool": 0.35, "clip_stage": "2"},
    "denser_jitter_stage_2": {"patch_grid": "5_13", "clip_jitter": HALF, "clip_stage": "2"},
    "pool_0.7": {"clip_pool": 0.7},
    "stage_all": {"clip_stage": "all"},
    "stage_1": {"clip_stage": "1"},
    "stage_3": {"clip_stage": "3"},
    "centred": {"clip_loss_type": "centred"},
    "contrastive": {"clip_loss_type": "contrastive"},
}
# Fewer frequencies of the coordinates: the base's highest are far above one period a frame
ENCODINGS: dict[str, dict[str, dict[str, Any]]] = {
    "xyt": {"levels_40": {"embed": "xyt_1.25_40"}, "levels_24": {"embed": "xyt_1.25_24"}},
    "pe": {"levels_20": {"embed": "pe_1.25_20"}, "levels_12": {"embed": "pe_1.25_12"}},
}


def study_base(profile: str, settings: dict[str, Any]) -> Config:
    """The settings that the study's runs share: a profile's, evaluated at the end alone, and own.

    Args:
        settings: flat parameters that win over the profile's. With `epochs`, the warm-up shortens
            in proportion, unless it is given too.
    """
    own = profile_params(profile)
    params = own | settings
    epochs = Config.from_params(**params).train.epochs
    shorter = {"eval_freq": epochs, "pixel_loss_warmup_epochs": round(
        own["pixel_loss_warmup_epochs"] * epochs / own["epochs"])}
    return Config.from_params(**{**params, **{
        name: value for name, value in shorter.items() if name not in settings}})


def study_configs(base: Config, only: Iterable[str] = ()) -> dict[str, Config]:
    """Every run of the study by name, the most important first.

    Args:
        base: the settings that the runs share, with the CLIP head; its video is the first.
        only: patterns such as `bunny_xyt_*`; a run needs to match one of them, and those of the
            first come first. All by default.
    Returns:
        {VIDEO_KIND_VARIANT_sSEED: config}.
    Raises:
        ConfigError: a base without the CLIP head, with neither crop nor size, or with a single
            position; or a pattern that no run matches.
    """
    if not base.model.predict_clip:
        raise ConfigError("the study's base needs the CLIP head: leave predict_clip=True; the runs "
                          "without it are in the study already")
    configs = {}
    for video, kind, variant, seed in plan_runs():
        first = base.replace(embed=KINDS[kind], seed=seed, **VIDEOS[video])
        configs[f"{video}_{kind}_{variant}_s{seed}"] = first.replace(
            **_changes(kind, variant, first))
    patterns = list(only)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in configs):
            raise ConfigError(f"--only {pattern!r} matches no run; see hnerv-clip study --list")
    return {name: configs[name] for pattern in patterns or ["*"] for name in configs
            if fnmatch(name, pattern)}


def plan_runs() -> list[tuple[str, str, str, int]]:
    """(video, kind, variant, seed) of every run, in order."""
    lambdas = [f"lambda_{value:g}" for value in LAMBDAS]
    warmups = [f"warmup_{value}" for value in WARMUPS]
    later = (1, 2)
    runs = [("bunny", kind, "base", seed) for seed in (0, *later) for kind in KINDS]
    runs += [("bunny", "hybrid", "pixels_only", seed) for seed in (0, *later)]
    runs += [("bikes", kind, "base", 0) for kind in KINDS]
    runs += [(video, "hybrid", f"phase_{phase}", 0) for video in VIDEOS for phase in PHASES]
    runs += [("bunny", "hybrid", variant, 0) for variant in lambdas + warmups]
    runs += [("bunny", kind, variant, 0) for variant in REMEDIES for kind in ("hybrid", "xyt")]
    runs += [("bikes", kind, "base", seed) for seed in later for kind in KINDS]
    runs += [("bikes", kind, "stage_2", seed) for kind in ("hybrid", "xyt")
             for seed in (0, *later)]
    runs += [("bunny", "hybrid", variant, seed) for seed in later
             for variant in ("lambda_0.1", "lambda_0.05")]
    runs += [("bunny", kind, variant, 0) for kind in ENCODINGS for variant in ENCODINGS[kind]]
    runs += [("bikes", "hybrid", "pixels_only", seed) for seed in (0, *later)]
    runs += [("bunny", kind, "pixels_only", seed) for kind in ("xyt", "pe")
             for seed in (0, *later)]
    runs += [("bunny", "hybrid", variant, seed) for seed in later for variant in lambdas + warmups]
    runs += [("bunny", kind, variant, seed) for seed in later for kind in ENCODINGS
             for variant in ENCODINGS[kind]]
    runs += [("bunny", kind, variant, seed) for seed in later for variant in REMEDIES
             for kind in ("hybrid", "xyt")]
    runs += [(video, "hybrid", f"phase_{phase}", seed) for seed in later for video in VIDEOS
             for phase in PHASES]
    return list(dict.fromkeys(runs))


def _changes(kind: str, variant: str, base: Config) -> dict[str, Any]:
    """The settings in which a variant differs from the base; warm-ups count in 300 epochs."""
    if variant == "base":
        return {}
    if variant == "pixels_only":
        return {"predict_clip": False}
    name, _, value = variant.partition("_")
    if name == "lambda":
        return {"clip_loss_weight": float(value)}
    if name == "warmup":
        return {"pixel_loss_warmup_epochs": round(
            int(value) * base.train.epochs / PAPER_EPOCHS)}
    if name == "phase":
        return {"split_phase": int(value)}
    changes = dict(REMEDIES.get(variant) or ENCODINGS[kind][variant])
    if changes.get("clip_jitter") == HALF:
        changes["clip_jitter"] = _half_distance(base.replace(
            patch_grid=changes.get("patch_grid", base.params()["patch_grid"])))
    return changes


def _half_distance(config: Config) -> int:
    """Half the largest distance in pixels of two neighbouring positions, rounded up.

    Raises:
        ConfigError: the frames' size is not among the settings, or there is one position.
    """
    from hnerv_clip.patches import make_grid

    frame_hw = config.video.resize_list or config.video.crop_list
    if frame_hw is None:
        raise ConfigError("crop_list and resize_list are both empty, but the study moves positions "
                          "by pixels of a known frame size; give one, crop_list=640_1280")
    grid = make_grid(config.teacher, frame_hw)
    apart = [b - a for starts in (grid.tops, grid.lefts) for a, b in zip(starts, starts[1:])]
    if not apart:
        raise ConfigError(f"patch_grid={config.params()['patch_grid']!r} is one position a frame, "
                          "but the study moves positions by half their distance; use two or more, "
                          "patch_grid=2_4")
    return -(-max(apart) // 2)


def show_plan(configs: dict[str, Config], base: Config) -> str:
    """The runs as text, a line each, with what differs from the base."""
    lines = []
    for name, config in configs.items():
        changed = ", ".join(f"{key}={new!r}" for key, (_, new) in base.diff(config).items())
        lines.append(f"{name:<32}{changed}")
    return "\n".join(lines) + f"\n{len(configs)} runs"
