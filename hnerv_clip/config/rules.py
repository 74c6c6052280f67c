"""What a value of a setting may be; a message names the value, the rule and the fix."""

from __future__ import annotations

import math

from hnerv_clip.config.packing import pack
from hnerv_clip.config.settings import (
    ACTIVATIONS,
    AUTO,
    CLIP_LOSSES,
    EMBEDS,
    ENGINES,
    HEADS,
    LOSSES,
    NORMS,
    ON_DIVERGENCE,
    OPTIMIZERS,
    PRECISIONS,
    TEACHERS,
    ConfigError,
    ModelConfig,
    Split,
    TeacherConfig,
    TrainConfig,
    VideoConfig,
    defaults,
)
from hnerv_clip.sizes import MOST_STAGES


def embed_kind(embed: str) -> str:
    """``hybrid``, ``pe`` or ``xyt``.

    Raises:
        ConfigError: not one of the three forms.
    """
    if embed == "":
        return "hybrid"
    kind = embed.split("_")[0]
    try:
        base, levels = (float(v) for v in embed.split("_")[1:])
        if kind in EMBEDS and base > 0 and levels == int(levels) and levels >= 1:
            if kind == "xyt" and levels % 4:
                raise ConfigError(f"embed={embed!r}: levels must be divisible by 4 (a quarter for "
                                  f"x, a quarter for y, half for t); write xyt_1.25_80")
            return kind
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
    raise ConfigError(f"embed={embed!r} is unknown; use '' (hybrid), 'pe_1.25_80' (time) or "
                      f"'xyt_1.25_80' (coordinates)")


def clip_stages(model: ModelConfig) -> tuple[int, ...]:
    """The decoder stages whose outputs feed the CLIP head, rising; 0 is the stem.

    Raises:
        ConfigError: no such stage, or one named twice.
    """
    last = MOST_STAGES if model.dec_strds == AUTO else len(model.dec_strds)
    if model.clip_stage in ("last", "all"):
        return (last,) if model.clip_stage == "last" else tuple(range(last + 1))
    parts = model.clip_stage.replace("_", " ").split()
    stages = tuple(int(part) for part in parts if part.isdecimal())
    if not stages or len(stages) != len(parts) or sorted(set(stages)) != list(stages) \
            or stages[-1] > last:
        raise ConfigError(f"clip_stage={model.clip_stage!r} must be last, all, or rising numbers "
                          f"from 0 to {last} (the entries of dec_strds), such as 1_{last}")
    return stages


def validate(video: VideoConfig, teacher: TeacherConfig, model: ModelConfig, train: TrainConfig
             ) -> None:
    """Check every setting.

    Raises:
        ConfigError: a value breaks a rule, alone or beside others.
    """
    values = {name: value for group in (video, teacher, model, train)
              for name, value in vars(group).items()}
    embed_kind(model.embed)
    one_of("act", model.act, ACTIVATIONS)
    one_of("norm", model.norm, NORMS)
    one_of("loss", train.loss, LOSSES)
    one_of("optimizer", train.optimizer, OPTIMIZERS)
    one_of("teacher", teacher.teacher, TEACHERS)
    one_of("teacher_precision", teacher.teacher_precision, ("fp32", "bf16"))
    if teacher.teacher != "clip" and teacher.teacher_precision != "fp32":
        raise ConfigError(f"teacher_precision={teacher.teacher_precision!r} is for CLIP alone: "
                          f"{teacher.teacher} loses too much in it; use teacher_precision='fp32'")
    one_of("precision", train.precision, PRECISIONS)
    one_of("engine", train.engine, ENGINES)
    one_of("on_divergence", train.on_divergence, ON_DIVERGENCE)
    one_of("head", model.head, HEADS)
    one_of("clip_loss_type", train.clip_loss_type, CLIP_LOSSES)
    clip_stages(model)
    if not 0 <= model.clip_pool <= 2:
        raise ConfigError(f"clip_pool={model.clip_pool} must lie between 0 (one pixel) and 2 frame "
                          "heights; 0.7 is the whole default patch")
    if model.conv_type != ("convnext", "pshuffel"):
        raise ConfigError(f"conv_type={pack('conv_type', model.conv_type)!r} is not built; "
                          "use conv_type='convnext pshuffel', the one that HNeRV publishes")
    if model.out_bias not in ("tanh", "sigmoid"):
        _at_least("out_bias", _parse_number("out_bias", model.out_bias), -math.inf)
    for name, low in [("frame_limit", 0), ("frame_stride", 1), ("split_phase", 0),
                      ("patch_size", 0),
                      ("patch_stride", 0), ("lower_width", 1), ("epochs", 1),
                      ("batch_size", 1), ("clip_loss_weight", 0), ("pixel_loss_warmup_epochs", 0),
                      ("inpaint_size", 0), ("field_rank", 1), ("field_hidden", 1),
                      ("field_boxes", 1), ("field_steps", 1), ("field_rate_weight", 0),
                      ("clip_jitter", 0), ("eval_freq", 1), ("seed", 0),
                      ("checkpoint_s", 0)]:
        _at_least(name, values[name], low)
    if model.clip_dim != AUTO:
        _at_least("clip_dim", model.clip_dim, 1)
    for name, value in values.items():
        if isinstance(value, int):
            _at_most(name, value, 2**42 if name == "seed" else 2**31 - 1)  # seed · 10⁶ fits a word
    for name in ("crop_list", "resize_list", "pad_list", "patch_grid", "enc_strds", "dec_strds",
                 "fc_hw", "num_blks"):
        for value in () if values[name] in (None, AUTO) else values[name]:
            _at_least(name, value, 1)
            _at_most(name, value, 2**31 - 1)
    if not 1 <= model.ks[1] <= model.ks[2] or model.ks[1] % 2 == 0 or model.ks[2] % 2 == 0:
        raise ConfigError(f"ks='{pack('ks', model.ks)}' must hold odd decoder kernels, the first "
                          "no larger than the last, after its unused first value; use 0_1_5")
    if model.enc_dim[0] < 1 or model.enc_dim[0] != int(model.enc_dim[0]) or model.enc_dim[1] <= 0:
        raise ConfigError(f"enc_dim='{pack('enc_dim', model.enc_dim)}' must be a whole width and "
                          "channels above 0 (below 1: a share of the size); use 64_16")
    if not math.isfinite(train.checkpoint_s):
        raise ConfigError(f"checkpoint_s={train.checkpoint_s} must be finite; the default is 30")
    for name in ("lr", "modelsize"):
        value = values[name]
        if not value > 0 or not math.isfinite(value):
            raise ConfigError(f"{name}={value} must be above 0; "
                              f"the default is {defaults()[name]}")
    if model.reduce != -1 and not model.reduce > 0:
        raise ConfigError(f"reduce={model.reduce} must be above 0, or -1 for the square root of "
                          "the stride; the default is 1.2")
    for name in ("quant_model_bit", "quant_embed_bit"):
        value = getattr(train, name)
        if not 1 <= value <= 16:
            raise ConfigError(f"{name}={value} must lie between 1 and 16; the default is "
                              f"{defaults()[name]}")
    if not math.isfinite(train.field_rate_weight):
        raise ConfigError(f"field_rate_weight={train.field_rate_weight} must be finite; the "
                          f"default is {defaults()['field_rate_weight']}")
    if not math.isfinite(train.clip_loss_weight):
        raise ConfigError(f"clip_loss_weight={train.clip_loss_weight} must be finite")
    parse_lr_type(train.lr_type)
    check_split(video.data_split, video.split_phase)


def _parse_number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} must be tanh, sigmoid or a number") from None


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless a value is one of those known."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{name}={value} must be at least {low}; "
                          f"the default is {pack(name, defaults()[name])!r}")


def _at_most(name: str, value: float, high: float) -> None:
    if value > high:
        raise ConfigError(f"{name}={value} must be at most {high}; "
                          f"the default is {pack(name, defaults()[name])!r}")


def check_split(split: Split, phase: int = 0) -> None:
    """Raise ConfigError unless 1 <= X <= Y <= Z and 0 <= phase < Z."""
    x, y, z = split
    if not 1 <= x <= y <= z:
        raise ConfigError(f"data_split='{x}_{y}_{z}' must satisfy 1 <= X <= Y <= Z, so that at "
                          "least one frame trains; use 4_5_5 for 80/20 or 1_1_1 to train on all")
    if not 0 <= phase < z:
        raise ConfigError(f"split_phase={phase} must lie between 0 and Z-1 of data_split="
                          f"'{x}_{y}_{z}', so at most {z - 1}; later ones repeat these")


def parse_lr_type(lr_type: str) -> tuple[float, float, float]:
    """``cosine_0.1_1_0.1`` → (warm-up share, power, start factor)."""
    kind, *numbers = lr_type.split("_")
    try:
        share, power, start = (float(n) for n in numbers)
        if kind == "cosine" and 0 <= share < 1 and power > 0 and 0 <= start <= 1:
            return share, power, start
    except ValueError:
        pass
    raise ConfigError(f"lr_type={lr_type!r} is not cosine_SHARE_POWER_START with "
                      "0 <= SHARE < 1, POWER > 0 and 0 <= START <= 1; use cosine_0.1_1_0.1")
