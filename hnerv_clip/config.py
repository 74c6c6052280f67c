"""What a run is: typed, frozen, validated settings, and the two profiles.

Field names are those of the original HNeRV command line. Packed strings such as ``64_16`` are
parsed here, once; the rest of the library sees tuples and numbers. What depends on the frame's
size is ``auto`` until that is known, see `Config.resolve`. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from hnerv_clip.sizes import (
    MOST_STAGES,
    choose_patch_grid,
    choose_patch_size,
    choose_strides,
    pad_to,
)

AUTO = "auto"  # chosen for the frame's size
Auto = Literal["auto"]
EMBEDS = ("", "pe", "xyt")
ACTIVATIONS = ("relu", "leaky", "leaky01", "relu6", "gelu", "sin", "swish", "softplus", "hardswish")
NORMS = ("none", "bn", "in")
BUNDLED, BUNDLED_DIM = "efficientnet-lite0", 1280  # the teacher that needs no download; not CLIP
TEACHERS = ("clip", BUNDLED)
ENGINES = ("auto", "plain", "fast")
PRECISIONS = ("auto", "fp32", "tf32", "bf16")
HEADS = ("original", "field")
CLIP_LOSSES = ("cosine", "centred", "contrastive")
RUNTIME_PARAMS = ("device", "checkpoint_s", "on_divergence")  # where and how safely, not what
ON_DIVERGENCE = ("recover", "stop")
LOSSES = ("L2", "L1", "SSIM", *(f"Fusion{i}" for i in range(1, 13)))


class ConfigError(ValueError):
    """A setting breaks a rule; the message names the value, the rule and the fix."""


def setting(default: Any, meaning: str) -> Any:
    """A field of a settings class, with the sentence that README, book and help show for it."""
    return field(default=default, metadata={"meaning": meaning})


class Split(NamedTuple):
    """``X_Y_Z``: in every block of ``period`` frames the first ``train`` train; see `video`."""

    train: int
    skip_until: int
    period: int


@dataclass(frozen=True)
class VideoConfig:
    """Which frames a run sees."""

    data_path: str = setting("bunny", "bunny, bikes, carphone, a video file, or a folder of images")
    crop_list: tuple[int, int] | None = setting(
        None, "centre crop, height_width; auto: whole, but bunny")
    resize_list: tuple[int, int] | None = setting(
        None, 'antialiased resize after the crop; "" for none')
    frame_limit: int = setting(0, "use the first so many frames after striding; 0 for all")
    frame_stride: int = setting(1, "take every n-th frame")
    data_split: Split = setting(
        Split(4, 5, 5), "X_Y_Z: of every Z frames X train, those from Y validate")
    split_phase: int = setting(
        0, "frames by which data_split's blocks shift; 0 to Z-1 for cross-fitting")


@dataclass(frozen=True)
class TeacherConfig:
    """What gives the patches their target embeddings, and where the patches are."""

    teacher: str = setting("clip", "clip, or the bundled efficientnet-lite0 (not CLIP)")
    clip_model: str = setting("ViT-B-32-quickgelu", "open_clip architecture")
    clip_pretrained: str = setting(
        "openai", "open_clip tag, a checkpoint file, or local-dir:FOLDER")
    teacher_precision: str = setting(
        "fp32", "fp32, or for CLIP bf16: faster, cosine to fp32 above 0.999")
    patch_grid: tuple[int, int] | Auto | None = setting(
        AUTO, "rows_columns, evenly from edge to edge")
    patch_size: int = setting(
        0, "pixels; 0 means 448 where the shorter side is 640, and in proportion")
    patch_stride: int = setting(0, 'pixels; used when patch_grid is "", 0 means half the patch')


@dataclass(frozen=True)
class ModelConfig:
    """The network. The width is solved from `modelsize`."""

    embed: str = setting("", '"" hybrid, pe_BASE_LEVELS (time), xyt_BASE_LEVELS (coordinates)')
    enc_strds: tuple[int, ...] | Auto = setting(AUTO, "encoder strides; auto: for the frame's size")
    enc_dim: tuple[int, float] = setting(
        (64, 16), "encoder width, embedding channels (<1: share of size)")
    dec_strds: tuple[int, ...] | Auto = setting(
        AUTO, "decoder upsampling factors; auto: as enc_strds")
    fc_hw: tuple[int, int] | Auto = setting(AUTO, "base resolution of coordinate embeddings")
    pad_list: tuple[int, int] | Auto | None = setting(
        AUTO, "frame with repeated edges, as the strides ask")
    ks: tuple[int, int, int] = setting(
        (0, 1, 5), "kernel sizes: unused, first and largest decoder kernel")
    num_blks: tuple[int, int] = setting((1, 1), "ConvNeXt blocks and decoder blocks per stage")
    reduce: float = setting(1.2, "width divisor per stage; -1 means the square root of the stride")
    lower_width: int = setting(12, "smallest width")
    modelsize: float = setting(
        1.5, "millions of stored values: decoder, heads, per-frame embeddings")
    act: str = setting("gelu", "activation of the decoder")
    norm: str = setting("none", "norm of the decoder: none, bn or in")
    conv_type: tuple[str, str] = setting(("convnext", "pshuffel"), "encoder and decoder blocks")
    out_bias: str = setting("tanh", "tanh, sigmoid, or a number that is added")
    predict_clip: bool = setting(True, "False is the pixel-only baseline")
    clip_dim: int = setting(512, "the teacher's: 512 for ViT-B-32, 1280 for efficientnet-lite0")
    clip_stage: str = setting(
        "last", "what feeds the CLIP head: last, all, or stages as 1_3 (0: the stem)")
    clip_pool: float = setting(
        0.0, "side of the square it averages, in frame heights; 0 for one pixel")
    head: str = setting(
        "original", "original (at patch centers, with lambda), or field (any box, frozen)")
    field_rank: int = setting(
        96, "values that a field's output basis combines; more is better and larger")
    field_hidden: int = setting(128, "width of a field's perceptron")


@dataclass(frozen=True)
class TrainConfig:
    """How it is fitted, and how it is measured."""

    epochs: int = setting(300, "passes over the training frames")
    batch_size: int = setting(2, "frames per step and rank")
    lr: float = setting(1e-3, "largest learning rate of Adam")
    lr_type: str = setting("cosine_0.1_1_0.1", "cosine_WARMUP-SHARE_POWER_START-FACTOR")
    loss: str = setting("L2", "pixel loss, a row of losses.PIXEL_LOSSES")
    clip_loss_weight: float = setting(0.5, "lambda of the cosine term")
    pixel_loss_warmup_epochs: int = setting(50, "epochs before the cosine term joins")
    clip_loss_type: str = setting(
        "cosine", "cosine, centred (less the training mean), or contrastive")
    clip_jitter: int = setting(
        0, "training moves each position and its target by up to so many pixels")
    field_boxes: int = setting(256, "random boxes a frame that a field is fitted to")
    field_steps: int = setting(4000, "steps of its fit, on a GPU of 32 frames × 64 boxes")
    field_rate_weight: float = setting(1e-7, "of its estimated bits in its loss; more is smaller")
    inpaint_size: int = setting(0, "side of the five boxes that the loss leaves out; 0 for none")
    eval_freq: int = setting(30, "epochs between evaluations")
    checkpoint_s: float = setting(30.0, "seconds between writes of model_latest.pth")
    on_divergence: str = setting("recover", "recover (go back, lower lr), or stop with an error")
    quant_model_bit: int = setting(8, "bits of a weight, for the quantised evaluation")
    quant_embed_bit: int = setting(6, "bits of an embedding value, likewise")
    seed: int = setting(0, "of weights and frame order")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = setting(
        "auto", "auto (bf16 on a GPU that has it, fp32 on a CPU), fp32, tf32, bf16")
    engine: str = setting(
        "auto", "auto (fused for bf16 on a GPU), plain, or fast: fused, else compiled")


@dataclass(frozen=True)
class Config:
    """All settings of one run. Build it with `Config.from_params`."""

    video: VideoConfig = field(default_factory=VideoConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    # Names that were left to `auto`: `replace` chooses them anew
    chosen: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @classmethod
    def from_params(cls, *, preset: str = AUTO, **params: Any) -> Config:
        """Parse flat parameters, as typed on a command line or set in a notebook.

        What is `auto` is chosen here where crop_list or resize_list tell the frame's size.

        Args:
            preset: a row of `PRESETS`: `paper` for the values of HNeRV's paper, where `params` name
                no others.
            params: any of `param_names()`; packed strings or typed values. A name that is left
                out keeps its default.
        Raises:
            ConfigError: an unknown name, or a value that breaks a rule.
        """
        _one_of("preset", preset, tuple(PRESETS))
        params = {**PRESETS[preset], **params}
        unknown = sorted(set(params) - set(param_names()))
        if unknown:
            near = difflib.get_close_matches(unknown[0], param_names(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"unknown parameter {', '.join(map(repr, unknown))}.{hint} "
                f"Known ones: {', '.join(param_names())}"
            )
        chosen = frozenset(name for name in _AUTO if params.get(name, AUTO) in (AUTO, (AUTO,)))
        if "crop_list" in chosen:
            bunny = params.get("data_path", VideoConfig.data_path) == "bunny"
            params["crop_list"] = PRESETS["paper"]["crop_list"] if bunny else ""
        if params.get("head") == "field":  # then the network has no head of its own
            params.setdefault("predict_clip", False)
        groups = {}
        for group, group_type in _GROUPS.items():
            own = {f.name: _parse(f.name, params[f.name]) for f in fields(group_type)
                   if f.name in params}
            groups[group] = group_type(**own)
        config = cls(**groups, chosen=chosen)
        _validate(config)
        frame_hw = config.video.resize_list or config.video.crop_list
        return config.resolve(frame_hw) if frame_hw else config

    @property
    def resolved(self) -> bool:
        """Whether nothing waits for the frame's size."""
        model = self.model
        return AUTO not in (self.teacher.patch_grid, model.enc_strds, model.dec_strds, model.fc_hw,
                            model.pad_list)

    def resolve(self, frame_hw: tuple[int, int]) -> Config:
        """What is `auto`, chosen for frames of height and width `frame_hw`; the rest as it is."""
        if self.resolved:
            return self
        config = dataclasses.replace(
            self, teacher=dataclasses.replace(
                self.teacher, patch_grid=resolve_patch_grid(self.teacher, frame_hw)),
            model=resolve_model(self.model, frame_hw))
        _validate(config)
        return config

    def params(self) -> dict[str, Any]:
        """The flat, packed form: `Config.from_params(**config.params()) == config`."""
        return {f.name: _pack(f.name, getattr(getattr(self, group), f.name))
                for group, group_type in _GROUPS.items() for f in fields(group_type)}

    def replace(self, **params: Any) -> Config:
        """A copy with some flat parameters changed; those left to `auto` are chosen anew."""
        left = dict.fromkeys(self.chosen, AUTO)
        return Config.from_params(**{**self.params(), **left, **params})

    def diff(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Parameters that differ and that change a result, as {name: (own, other's)}.

        What is still `auto` on one side differs from nothing.
        """
        own, others = self.params(), other.params()
        return {name: (own[name], others[name]) for name in own
                if own[name] != others[name] and name not in RUNTIME_PARAMS
                and not (name in _AUTO and AUTO in (own[name], others[name]))}


def resolve_patch_grid(teacher: TeacherConfig, frame_hw: tuple[int, int]
                       ) -> tuple[int, int] | None:
    """(rows, columns) of patches of frames of height and width `frame_hw`; None for a sweep."""
    if teacher.patch_grid != AUTO:
        return teacher.patch_grid
    return choose_patch_grid(frame_hw, teacher.patch_size or choose_patch_size(frame_hw))


def resolve_model(model: ModelConfig, frame_hw: tuple[int, int]) -> ModelConfig:
    """What of strides, base resolution and padding is `auto`, for frames of `frame_hw` (H, W).

    A coordinate model whose `fc_hw` is given is not padded, but resized to the frame.
    """
    given = [strides for strides in (model.enc_strds, model.dec_strds) if strides != AUTO]
    strides = given[0] if given else choose_strides(frame_hw)
    enc_strds = strides if model.enc_strds == AUTO else model.enc_strds
    dec_strds = strides if model.dec_strds == AUTO else model.dec_strds
    hybrid = embed_kind(model.embed) == "hybrid"
    product = math.prod(enc_strds if hybrid else dec_strds)
    padded, pad_list = pad_to(frame_hw, product), model.pad_list
    if pad_list == AUTO:
        pads = (hybrid or model.fc_hw == AUTO) and padded != tuple(frame_hw)
        pad_list = padded if pads else None
    up = math.prod(dec_strds)
    fc_hw = tuple(-(-side // up) for side in frame_hw) if model.fc_hw == AUTO else model.fc_hw
    return dataclasses.replace(model, enc_strds=enc_strds, dec_strds=dec_strds, fc_hw=fc_hw,
                               pad_list=pad_list)


_GROUPS = {"video": VideoConfig, "teacher": TeacherConfig, "model": ModelConfig,
           "train": TrainConfig}


def param_names() -> list[str]:
    """Every parameter that a run knows, in the order of the settings table."""
    return [f.name for group_type in _GROUPS.values() for f in fields(group_type)]


def _defaults() -> dict[str, Any]:
    return {f.name: f.default for group_type in _GROUPS.values() for f in fields(group_type)}


# The shape of each packed parameter: how many values, of which type, and an example.
_PACKED: dict[str, tuple[int | None, type, str]] = {
    "crop_list": (2, int, "640_1280"),
    "resize_list": (2, int, "320_640"),
    "data_split": (3, int, "4_5_5"),
    "pad_list": (2, int, "672_1280"),
    "patch_grid": (2, int, "2_4"),
    "enc_strds": (None, int, "5 4 4 2 2"),
    "dec_strds": (None, int, "5 4 4 2 2"),
    "enc_dim": (2, float, "64_16"),
    "fc_hw": (2, int, "2_4"),
    "ks": (3, int, "0_1_5"),
    "num_blks": (2, int, "1_1"),
    "conv_type": (2, str, "convnext pshuffel"),
}
_OPTIONAL = {"crop_list", "resize_list", "pad_list", "patch_grid"}
_AUTO = ("crop_list", "patch_grid", "enc_strds", "dec_strds", "fc_hw", "pad_list")


def _parse(name: str, value: Any) -> Any:
    if name in _PACKED:
        return _unpack(name, value)
    wanted = type(_defaults()[name])
    try:
        if wanted is bool:
            return _to_bool(value)
        if wanted is int and isinstance(value, bool):
            raise ValueError
        if wanted is int and float(value) != int(float(value)):
            raise ValueError
        return wanted(float(value)) if wanted is int else wanted(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}={value!r} is not a {wanted.__name__}; "
                          f"the default is {name}={_defaults()[name]!r}") from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if value in (True, False):
        return bool(value)
    raise ValueError


def _unpack(name: str, value: Any) -> tuple | None:
    count, kind, example = _PACKED[name]
    if value == AUTO and name in _AUTO:
        return AUTO
    if value is None or value in ("", "-1", -1):
        if name in _OPTIONAL:
            return None
        raise ConfigError(f"{name} is empty; write for example {name}={example!r}")
    parts = value.replace("_", " ").replace(",", " ").split() if isinstance(value, str) \
        else list(value) if isinstance(value, (tuple, list)) else [value]
    try:
        if kind is str:
            parsed = tuple(str(part) for part in parts)
        else:
            numbers = [float(part) for part in parts]
            if kind is int and any(n != int(n) for n in numbers):
                raise ValueError
            # enc_dim is the one float pair: its first value, and a second of 1 or more, are counts
            parsed = tuple(int(n) if n == int(n) else n for n in numbers)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}={value!r} does not parse; "
                          f"write for example {name}={example!r}") from None
    if count is not None and len(parsed) != count or not parsed:
        hint = f" (papermill -p reads {example} as one number; pass it with -r)" \
            if isinstance(value, int) else ""
        raise ConfigError(f"{name}={value!r} has {len(parsed)} values, not {count or 'one or more'}"
                          f"; write for example {name}={example!r}{hint}")
    return Split(*parsed) if name == "data_split" else parsed


def _pack(name: str, value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return (" " if name in ("enc_strds", "dec_strds", "conv_type") else "_").join(
            map(str, value))
    return value


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


def _validate(config: Config) -> None:
    video, teacher, model, train = config.video, config.teacher, config.model, config.train
    embed_kind(model.embed)
    _one_of("act", model.act, ACTIVATIONS)
    _one_of("norm", model.norm, NORMS)
    _one_of("loss", train.loss, LOSSES)
    _one_of("teacher", teacher.teacher, TEACHERS)
    _one_of("teacher_precision", teacher.teacher_precision, ("fp32", "bf16"))
    if teacher.teacher != "clip" and teacher.teacher_precision != "fp32":
        raise ConfigError(f"teacher_precision={teacher.teacher_precision!r} is for CLIP alone: "
                          f"{teacher.teacher} loses too much in it; use teacher_precision='fp32'")
    _one_of("precision", train.precision, PRECISIONS)
    _one_of("engine", train.engine, ENGINES)
    _one_of("on_divergence", train.on_divergence, ON_DIVERGENCE)
    _one_of("head", model.head, HEADS)
    _one_of("clip_loss_type", train.clip_loss_type, CLIP_LOSSES)
    clip_stages(model)
    if not 0 <= model.clip_pool <= 2:
        raise ConfigError(f"clip_pool={model.clip_pool} must lie between 0 (one pixel) and 2 frame "
                          "heights; 0.7 is the whole default patch")
    if model.conv_type != ("convnext", "pshuffel"):
        raise ConfigError(f"conv_type={_pack('conv_type', model.conv_type)!r} is not built; "
                          "use conv_type='convnext pshuffel', the one that HNeRV publishes")
    if model.out_bias not in ("tanh", "sigmoid"):
        _at_least("out_bias", _parse_number("out_bias", model.out_bias), -math.inf)
    for name, low in [("frame_limit", 0), ("frame_stride", 1), ("split_phase", 0),
                      ("patch_size", 0),
                      ("patch_stride", 0), ("lower_width", 1), ("clip_dim", 1), ("epochs", 1),
                      ("batch_size", 1), ("clip_loss_weight", 0), ("pixel_loss_warmup_epochs", 0),
                      ("inpaint_size", 0), ("field_rank", 1), ("field_hidden", 1),
                      ("field_boxes", 1), ("field_steps", 1), ("field_rate_weight", 0),
                      ("clip_jitter", 0), ("eval_freq", 1), ("seed", 0),
                      ("checkpoint_s", 0)]:
        _at_least(name, config.params()[name], low)
    for name, value in config.params().items():
        if isinstance(value, int):
            _at_most(name, value, 2**42 if name == "seed" else 2**31 - 1)  # seed · 10⁶ fits a word
    for name in ("crop_list", "resize_list", "pad_list", "patch_grid", "enc_strds", "dec_strds",
                 "fc_hw", "num_blks"):
        values = _unpack(name, config.params()[name])
        for value in () if values in (None, AUTO) else values:
            _at_least(name, value, 1)
            _at_most(name, value, 2**31 - 1)
    if not 1 <= model.ks[1] <= model.ks[2] or model.ks[1] % 2 == 0 or model.ks[2] % 2 == 0:
        raise ConfigError(f"ks='{_pack('ks', model.ks)}' must hold odd decoder kernels, the first "
                          "no larger than the last, after its unused first value; use 0_1_5")
    if model.enc_dim[0] < 1 or model.enc_dim[0] != int(model.enc_dim[0]) or model.enc_dim[1] <= 0:
        raise ConfigError(f"enc_dim='{_pack('enc_dim', model.enc_dim)}' must be a whole width and "
                          "channels above 0 (below 1: a share of the size); use 64_16")
    if not math.isfinite(train.checkpoint_s):
        raise ConfigError(f"checkpoint_s={train.checkpoint_s} must be finite; the default is 30")
    for name in ("lr", "modelsize"):
        value = config.params()[name]
        if not value > 0 or not math.isfinite(value):
            raise ConfigError(f"{name}={value} must be above 0; "
                              f"the default is {_defaults()[name]}")
    if model.reduce != -1 and not model.reduce > 0:
        raise ConfigError(f"reduce={model.reduce} must be above 0, or -1 for the square root of "
                          "the stride; the default is 1.2")
    for name in ("quant_model_bit", "quant_embed_bit"):
        value = getattr(train, name)
        if not 1 <= value <= 16:
            raise ConfigError(f"{name}={value} must lie between 1 and 16; the default is "
                              f"{_defaults()[name]}")
    if not math.isfinite(train.field_rate_weight):
        raise ConfigError(f"field_rate_weight={train.field_rate_weight} must be finite; the "
                          f"default is {_defaults()['field_rate_weight']}")
    if not math.isfinite(train.clip_loss_weight):
        raise ConfigError(f"clip_loss_weight={train.clip_loss_weight} must be finite")
    parse_lr_type(train.lr_type)
    check_split(video.data_split, video.split_phase)


def _parse_number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} must be tanh, sigmoid or a number") from None


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{name}={value} must be at least {low}; "
                          f"the default is {_pack(name, _defaults()[name])!r}")


def _at_most(name: str, value: float, high: float) -> None:
    if value > high:
        raise ConfigError(f"{name}={value} must be at most {high}; "
                          f"the default is {_pack(name, _defaults()[name])!r}")


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


# What takes the place of defaults. `paper`: HNeRV's setting for Big Buck Bunny, 640×1280
PRESETS: dict[str, dict[str, Any]] = {
    AUTO: {},
    "paper": {"crop_list": "640_1280", "enc_strds": "5 4 4 2 2", "dec_strds": "5 4 4 2 2",
              "fc_hw": "2_4", "pad_list": "", "patch_grid": "2_4"},
}

# Values that differ from the defaults above, which are the paper's. `quick` fits two CPU cores and
# minutes, and names the bundled teacher, which is not CLIP, because a fresh machine has no CLIP
# weights. `full` is for a GPU, by the fused engine.
PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "resize_list": "168_336",
        "frame_stride": 3,
        "data_split": "1_2_2",  # 22 of 44 frames held out, enough for the verification to answer
        "teacher": "efficientnet-lite0",
        "clip_dim": 1280,
        "enc_strds": "7 4 3",
        "dec_strds": "7 4 3",
        "modelsize": 0.25,
        "epochs": 30,
        "batch_size": 1,
        "lr": 5e-3,
        "clip_loss_weight": 0.1,
        "pixel_loss_warmup_epochs": 5,
        "field_boxes": 32,
        "field_steps": 2000,
        "eval_freq": 10,
    },
    "full": {
        "precision": "bf16",
    },
}


def profile_params(profile: str, **overrides: Any) -> dict[str, Any]:
    """Every parameter of a profile, flat and packed.

    Args:
        overrides: values that win over the profile's; what is `auto` is chosen for them.
    Raises:
        ConfigError: unknown profile.
    """
    _one_of("profile", profile, tuple(PROFILES))
    return Config.from_params(**PROFILES[profile] | overrides).params()


def settings_table() -> list[tuple[str, str, str, str]]:
    """(name, packed default, group, meaning) of every parameter, for README, book and help.

    The meaning is that of the field above.
    """
    return [(f.name, AUTO if f.name in _AUTO else str(_pack(f.name, f.default)), group,
             f.metadata["meaning"])
            for group, group_type in _GROUPS.items() for f in dataclasses.fields(group_type)]
