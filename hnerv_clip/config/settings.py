"""The settings of a run, in four groups of typed fields, each with its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

# Chosen for the frame's size, or as the teacher asks, where it is the value of one of these
AUTO = "auto"
AUTO_NAMES = ("crop_list", "patch_grid", "enc_strds", "dec_strds", "fc_hw", "pad_list", "clip_dim")
Auto = Literal["auto"]
EMBEDS = ("", "pe", "xyt")
ACTIVATIONS = ("relu", "leaky", "leaky01", "relu6", "gelu", "sin", "swish", "softplus", "hardswish")
NORMS = ("none", "bn", "in")
OPTIMIZERS = ("adam", "adan")
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
        None, "center crop, height_width; auto: the whole frame, except for bunny")
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
    enc_strds: tuple[int, ...] | Auto = setting(
        AUTO, "encoder strides; auto: chosen for the frame size")
    enc_dim: tuple[int, float] = setting(
        (64, 16), "encoder width, embedding channels (<1: share of size)")
    dec_strds: tuple[int, ...] | Auto = setting(
        AUTO, "decoder upsampling factors; auto: same as enc_strds")
    fc_hw: tuple[int, int] | Auto = setting(AUTO, "base resolution of coordinate embeddings")
    pad_list: tuple[int, int] | Auto | None = setting(
        AUTO, "padded size (edges repeated); auto: what the strides divide")
    ks: tuple[int, int, int] = setting(
        (0, 1, 5), "kernel sizes: unused, first and largest decoder kernel")
    num_blks: tuple[int, int] = setting((1, 1), "ConvNeXt blocks and decoder blocks per stage")
    reduce: float = setting(1.2, "width divisor per stage; -1 means the square root of the stride")
    lower_width: int = setting(12, "smallest width")
    modelsize: float = setting(
        1.5, "millions of stored values: decoder, heads, per-frame embeddings")
    act: str = setting("gelu", "activation of the decoder")
    norm: str = setting("none", "norm of the decoder: none, bn or in")
    conv_type: tuple[str, str] = setting(
        ("convnext", "pshuffel"), "blocks of encoder and decoder; no others are built")
    out_bias: str = setting("tanh", "output function: tanh, sigmoid, or a constant that is added")
    predict_clip: bool = setting(True, "False is the pixel-only baseline")
    clip_dim: int | Auto = setting(AUTO, "values of an embedding; auto: as many as the teacher's")
    clip_stage: str = setting(
        "last", "what feeds the CLIP head: last, all, or stages as 1_3 (0: the stem)")
    clip_pool: float = setting(
        0.0, "side of the square that the head averages over, in frame heights; 0: a pixel")
    head: str = setting(
        "original", "original (at patch centers, with lambda), or field (any box, frozen)")
    field_rank: int = setting(
        96, "rank of a field's output basis; higher is better and larger")
    field_hidden: int = setting(128, "width of a field's perceptron")


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained and evaluated."""

    epochs: int = setting(300, "passes over the training frames")
    batch_size: int = setting(2, "frames per step and rank")
    lr: float = setting(1e-3, "largest learning rate")
    lr_type: str = setting("cosine_0.1_1_0.1", "cosine_WARMUP-SHARE_POWER_START-FACTOR")
    optimizer: str = setting(
        "adam", "adam, or adan, which stays stable at larger learning rates such as 5e-3")
    loss: str = setting("L2", "pixel loss: L2, L1, SSIM, Fusion1 … Fusion12")
    clip_loss_weight: float = setting(0.5, "λ, the weight of the cosine term")
    pixel_loss_warmup_epochs: int = setting(50, "epochs before the cosine term joins")
    clip_loss_type: str = setting(
        "cosine", "cosine, centred (training mean subtracted), or contrastive")
    clip_jitter: int = setting(
        0, "pixels by which training moves each position and its target, at most")
    field_boxes: int = setting(256, "random boxes per frame that a field is fitted to")
    field_steps: int = setting(4000, "steps of that fit; on a GPU, of 32 frames × 64 boxes each")
    field_rate_weight: float = setting(
        1e-7, "weight of its estimated bits in its loss; larger: a smaller file")
    inpaint_size: int = setting(0, "side of the five boxes that the loss leaves out; 0 for none")
    eval_freq: int = setting(30, "epochs between evaluations")
    checkpoint_s: float = setting(30.0, "seconds between writes of model_latest.pth")
    on_divergence: str = setting("recover", "recover (go back and lower lr), or stop with an error")
    quant_model_bit: int = setting(8, "bits of a weight, for the quantized evaluation")
    quant_embed_bit: int = setting(6, "bits of an embedding value, for the quantized evaluation")
    seed: int = setting(0, "random seed of the initial weights and the order of frames")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = setting(
        "auto", "auto (bf16 on a GPU that has it, fp32 on a CPU), fp32, tf32, bf16")
    engine: str = setting(
        "auto", "auto (fused for bf16 on a GPU), plain, or fast: fused, else compiled")


GROUPS = {"video": VideoConfig, "teacher": TeacherConfig, "model": ModelConfig,
           "train": TrainConfig}


def param_names() -> list[str]:
    """Every parameter that a run knows, in the order of the settings table."""
    return [f.name for group_type in GROUPS.values() for f in fields(group_type)]


def defaults() -> dict[str, Any]:
    """The value of every parameter where none is given, typed."""
    return {f.name: f.default for group_type in GROUPS.values() for f in fields(group_type)}
