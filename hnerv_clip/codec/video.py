"""A network as a file, and back: what is planned is compared with what is there before any of it
takes memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnerv_clip.codec import entropy
from hnerv_clip.codec.container import (
    FRAME_LIMIT,
    NETWORK,
    SIDE_LIMIT,
    TEACHER,
    FileError,
    Header,
    check_meta,
    pack_file,
    pack_times,
    read_header,
    read_part,
)
from hnerv_clip.codec.levels import Quantised, bounds_shape, quantise, quantise_by_step
from hnerv_clip.codec.network import EMBEDDINGS, VALUES_FREE, VALUES_PER_BYTE, plan_network
from hnerv_clip.config import Config, resolve_patch_grid
from hnerv_clip.heads.field import FieldConfig, FieldHead
from hnerv_clip.model import HNeRV
from hnerv_clip.runs.run_dir import write_atomic

WRITER = "hnerv-clip 0.1.0"
TABLES, FIELD = "histograms", "field"
CHUNK = 8  # frames whose embeddings are coded together
# Limits of the field that a file may ask for; see `network.LIMITS`
FIELD_LIMITS = {"dim": 2**14, "frame_hw": SIDE_LIMIT, "frame_count": FRAME_LIMIT,
                "source_channels": 4096, "source_stage": 12, "up": 64, "mid_channels": 1024,
                "map_channels": 1024, "map_hw": 512, "keyframes": 4096, "latent_channels": 1024,
                "points": 16, "hidden": 4096, "layers": 16, "rank": 4096, "frequencies": 32}


@dataclass
class About:
    """What a file says of a video beside its network.

    times_s: when each frame is shown; None counts at 25 a second. weights: digest of the teacher's
    weights.
    """

    name: str = ""
    times_s: list[float] | None = None
    teacher_name: str = ""
    teacher_label: str = ""
    weights: str = ""
    preprocess: int = 1


def encode_video(model: HNeRV, embeddings: Tensor | None, path: str | Path, *, config: Config,
                 about: About | None = None, steps: dict[str, float | Tensor] | None = None,
                 field: FieldHead | None = None) -> int:
    """Write the video that a model stores.

    Args:
        embeddings: [T, C, h, w] per-frame embeddings of a hybrid model; None for coordinates.
        steps: quantisation steps by tensor, as `fine_tune` learns them, `embeddings` among them,
            and those of the field as `field.NAME`; what is not named is quantised to
            `quant_model_bit` and `quant_embed_bit` by HNeRV's rule.
        field: a head that was fitted on this network.
    Returns:
        size_bytes of the file: all that is needed to play and search it.
    Raises:
        ValueError: NaN or infinity, times that do not rise, or sizes that do not fit.
    """
    about, steps, train = about or About(), steps or {}, config.train
    if (embeddings is None) != (model.kind != "hybrid"):
        raise ValueError(f"a {model.kind} network is stored with embeddings only if it is hybrid")

    def levels_of(name: str, tensor: Tensor, bits: int) -> tuple[Quantised, entropy.Classes]:
        q = quantise_by_step(tensor, steps[name]) if name in steps else quantise(tensor, bits=bits)
        if name != EMBEDDINGS:
            return q, entropy.choose_classes(q.levels)
        spread = np.abs(q.levels).mean(axis=(0, 2, 3)) + 2.0**-5  # a chunk knows no other's rows
        return q, entropy.Classes(np.zeros(1, np.int8), entropy._half_octaves(spread, 8))

    weights = {name: levels_of(name, tensor, train.quant_model_bit)
               for name, tensor in (*model.stored_state().items(), *_field_state(field).items())}
    histograms = {"weights": entropy.count_levels([(q.levels, c) for q, c in weights.values()])}
    parts = [(name, _bounds(q, c) + entropy.encode_levels(q.levels, c, histograms["weights"]))
             for name, (q, c) in weights.items()]
    entries = [_entry(name, q, c) for name, (q, c) in weights.items()]
    embedded: list[Any] = []
    if embeddings is not None:
        q, c = levels_of(EMBEDDINGS, embeddings, train.quant_embed_bit)
        histograms["embeddings"] = entropy.count_levels([(q.levels, c)])
        parts.append((EMBEDDINGS, _bounds(q, c)))
        parts += [(f"{EMBEDDINGS}/{start}", entropy.encode_levels(
            q.levels[start:start + CHUNK], c, histograms["embeddings"]))
            for start in range(0, len(q.levels), CHUNK)]
        embedded = [_entry(EMBEDDINGS, q, c), CHUNK]
    parts.insert(0, (TABLES, entropy.pack_histograms(histograms)))
    config = dataclasses.replace(config, model=model.config, teacher=dataclasses.replace(
        config.teacher, patch_grid=resolve_patch_grid(config.teacher, model.frame_hw)))
    params = config.params()  # nothing of it is `auto` any more
    meta = {"format": 2, "writer": WRITER, "video": _video_meta(model, about),
            "network": {name: params[name] for name in NETWORK},
            "teacher": {"name": about.teacher_name[:200], "label": about.teacher_label[:200],
                        "weights": about.weights, "preprocess": about.preprocess,
                        "settings": {name: params[name] for name in TEACHER} | {
                            "clip_pretrained": _without_folders(params["clip_pretrained"])}},
            "heads": [] if field is None else [{"name": FIELD, "settings": field.config.to_dict()}],
            "tensors": entries, "embeddings": embedded}
    data = pack_file(meta, parts)
    try:
        check_meta({**meta, "parts": []})
        plan_network(config.model, frame_hw=model.frame_hw, frame_count=model.frame_count,
                     size_bytes=len(data))
    except FileError as error:
        raise ValueError(f"this network is beyond what a file holds: {error}") from error
    write_atomic(Path(path), lambda file: file.write(data))
    return len(data)


def _without_folders(weights: str) -> str:
    """A teacher's weights without the folders of this machine, which are nobody's business."""
    start = "local-dir:" if weights.startswith("local-dir:") else ""
    return start + (Path(weights.removeprefix(start)).name or weights)


def _field_state(field: FieldHead | None) -> dict[str, Tensor]:
    return {} if field is None else {
        f"{FIELD}.{name}": tensor for name, tensor in field.state_dict().items()}


def _video_meta(model: HNeRV, about: About) -> dict[str, Any]:
    times = about.times_s or [i / 25 for i in range(model.frame_count)]
    if len(times) != model.frame_count:
        raise ValueError(f"{len(times)} times for {model.frame_count} frames; give one each")
    denominator = _time_unit(times)
    return {"name": about.name[:200], "frames": model.frame_count,
            "size": list(model.frame_hw),
            "times": pack_times([round(t * denominator) for t in times], (1, denominator))}


def _time_unit(times: list[float]) -> int:
    """Ticks a second in which the times are whole: a frame rate's numerator, else 1 000 000."""
    gaps = {Fraction(b - a).limit_denominator(120_000) for a, b in zip(times[:2], times[1:])}
    for unit in (*(gap.denominator for gap in gaps), 1000, 24_000, 30_000, 60_000, 90_000):
        if all(abs(t * unit - round(t * unit)) < 1e-3 for t in times):
            return unit
    return 1_000_000


def _entry(name: str, q: Quantised, classes: entropy.Classes) -> list[Any]:
    return [name, list(q.levels.shape), q.axis, classes.flags]


def _bounds(q: Quantised, classes: entropy.Classes) -> bytes:
    return entropy.pack_arrays(q.shift, q.scale, classes.row, classes.column)


def plan_field(header: Header) -> FieldHead | None:
    """The field that a file describes, without memory for its values; None where it has none.

    Raises:
        FileError: no such field, or one beyond the limits.
    """
    heads = header.meta["heads"]
    if not heads:
        return None
    if len(heads) > 1 or heads[0]["name"] != FIELD:
        raise FileError(f"heads {[head['name'] for head in heads][:3]} are unknown here: update "
                        "hnerv-clip")
    try:
        config = FieldConfig.from_dict(heads[0]["settings"])
        for name, limit in FIELD_LIMITS.items():
            value = getattr(config, name)
            if not all(type(v) is int and -1 <= v <= limit
                       for v in (value if isinstance(value, tuple) else (value,))):
                raise FileError(f"the field's {name} {value} is not between 0 and {limit}")
        if config.frame_hw != header.size or config.frame_count != header.frame_count or \
                config.dim != header.config.model.clip_dim:
            raise FileError("the field is for another video, or another teacher")
        with torch.device("meta"):
            field = FieldHead(config)
    except (ValueError, RuntimeError, ArithmeticError, TypeError, MemoryError) as error:
        raise FileError(f"its field's settings describe none: {error}") from error
    values = sum(t.numel() for t in field.state_dict().values())
    allowed = VALUES_FREE + VALUES_PER_BYTE * header.size_bytes
    if values > allowed:
        raise FileError(f"a field of {values} values in {header.size_bytes} bytes, at most "
                        f"{allowed}")
    return field.eval()


class StoredNetwork:
    """A file's network, read part by part as it is needed."""

    def __init__(self, path: str | Path, header: Header | None = None):
        """Check the whole header against the network that it plans; reads nothing else.

        Raises:
            FileError: see there.
        """
        self.path = Path(path)
        self.header = header or read_header(path)
        self.config = self.header.config
        self.model = plan_network(
            self.config.model, frame_hw=self.header.size, frame_count=self.header.frame_count,
            size_bytes=self.header.size_bytes)
        self.field = plan_field(self.header)
        self.entries = {entry[0]: entry for entry in self.header.meta["tensors"]}
        self._histograms: dict[str, dict[int, entropy.Histogram]] | None = None
        self._bounds: tuple[np.ndarray, np.ndarray, entropy.Classes] | None = None
        self._loaded: set[str] = set()
        self._check_tables()

    def _check_tables(self) -> None:
        planned = {name: list(t.shape) for name, t in (
            *self.model.state_dict().items(), *_field_state(self.field).items())}
        stored = {entry[0]: entry[1] for entry in self.header.meta["tensors"]}
        if len(stored) != len(self.header.meta["tensors"]) or list(stored) != list(planned):
            odd = sorted(set(stored) ^ set(planned))[:4]
            raise self._error(f"its tensors are not the network's: {odd}")
        for name, shape in planned.items():
            if stored[name] != shape:
                raise self._error(f"{name} is {stored[name]}, the network's is {shape}")
        parts = [TABLES, *planned]
        self.chunk = 0
        if self.model.kind == "hybrid":
            plan, embedded = self.model.plan, self.header.meta["embeddings"]
            shape = [self.model.frame_count, plan.embed_channels]
            if not embedded or embedded[0][0] != EMBEDDINGS or embedded[0][1][:2] != shape or \
                    math.prod(embedded[0][1]) != plan.embed_values or \
                    embedded[0][1][2] != plan.padded_hw[0] // math.prod(
                        self.model.config.enc_strds):
                raise self._error("its embeddings are not the network's")
            self.chunk = embedded[1]
            parts += [EMBEDDINGS, *(f"{EMBEDDINGS}/{start}" for start in
                                    range(0, self.model.frame_count, self.chunk))]
        elif self.header.meta["embeddings"]:
            raise self._error("embeddings in a network of coordinates")
        if list(self.header.parts) != parts:
            odd = sorted(set(self.header.parts) ^ set(parts))[:4]
            raise self._error(f"its parts are not the network's: {odd}")

    def _error(self, why: str) -> FileError:
        return FileError(f"{self.path} does not hold the network that its header describes: {why}")

    def load(self, prefixes: tuple[str, ...] = ("",)) -> HNeRV:
        """The network with the tensors whose names begin so; what is loaded already stays.

        Raises:
            FileError: a part is damaged.
        """
        wanted = [name for name in self.entries
                  if name.startswith(prefixes) and name not in self._loaded
                  and not name.startswith(f"{FIELD}.")]
        state = {name: self.tensor(name) for name in wanted}
        self.model.load_state_dict(state, strict=False, assign=True)
        self._loaded.update(wanted)
        return self.model

    def load_field(self) -> FieldHead:
        """The field's head.

        Raises:
            FileError: a part is damaged.
            ValueError: the file has no field.
        """
        if self.field is None:
            raise ValueError(f"{self.path} has no field")
        names = _field_state(self.field)
        self.field.load_state_dict(
            {name.removeprefix(f"{FIELD}."): self.tensor(name) for name in names}, assign=True)
        return self.field

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantised.

        Raises:
            FileError: its part, or the histograms, are damaged.
        """
        _, shape, axis, flags = self.entries[name]
        data = read_part(self.path, self.header.parts[name])
        try:
            (shift, scale, classes), rest = _read_bounds(data, shape, axis, flags)
            levels = entropy.decode_levels(rest, tuple(shape), classes,
                                           self.histograms()["weights"])
            value = self._dequantise(levels, shift, scale)
            whole = name.endswith("num_batches_tracked")  # of a batch norm
            return value.long() if whole else value
        except FileError as error:
            raise FileError(f"{self.path}: {name}: {error}") from error

    @staticmethod
    def _dequantise(levels: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> Tensor:
        with np.errstate(over="ignore"):
            value = Quantised(levels, shift, scale).dequantise()
        if not value.isfinite().all():
            raise FileError("values that are not finite")
        return value

    def histograms(self) -> dict[str, dict[int, entropy.Histogram]]:
        """The file's histograms, by group and class."""
        if self._histograms is None:
            self._histograms = entropy.unpack_histograms(
                read_part(self.path, self.header.parts[TABLES]))
        return self._histograms

    def embeddings(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Per-frame embeddings of frames start…stop−1, [n, C, h, w] float32.

        Raises:
            FileError: a part is damaged.
            ValueError: a network of coordinates has none.
        """
        if not self.chunk:
            raise ValueError("a network of coordinates stores no embeddings")
        (_, shape, axis, flags), _ = self.header.meta["embeddings"]
        count = self.model.frame_count
        stop = count if stop is None else min(stop, count)
        try:
            if self._bounds is None:
                data = read_part(self.path, self.header.parts[EMBEDDINGS])
                self._bounds, rest = _read_bounds(data, shape, axis, flags)
                if rest:
                    raise FileError(f"{len(rest)} bytes too many")
            shift, scale, classes = self._bounds
            pieces = []
            for first in range(start // self.chunk * self.chunk, stop, self.chunk):
                frames = slice(first, min(first + self.chunk, count))
                levels = entropy.decode_levels(
                    read_part(self.path, self.header.parts[f"{EMBEDDINGS}/{first}"]),
                    (frames.stop - first, *shape[1:]), classes, self.histograms()["embeddings"])
                pieces.append(self._dequantise(
                    levels, *(a if len(a) == 1 else a[frames] for a in (shift, scale))))
        except FileError as error:
            raise FileError(f"{self.path}: {EMBEDDINGS}: {error}") from error
        return torch.cat(pieces)[start % self.chunk:][:stop - start]


def _read_bounds(data: bytes, shape: list[int], axis: int, flags: int
                 ) -> tuple[tuple[np.ndarray, np.ndarray, entropy.Classes], bytes]:
    """((shift, scale, classes), what follows) of a tensor's part."""
    bounds = bounds_shape(shape, axis)
    number, kind = math.prod(bounds), np.dtype("<f4" if axis < 0 else "<f2")
    rows, columns, _ = entropy.matrix_shape(shape)
    rows, columns = (n if flags & flag else 1
                     for n, flag in ((rows, entropy.ROWS), (columns, entropy.COLUMNS)))
    text, rest = entropy.split_arrays(data, 2 * number * kind.itemsize + rows + columns)
    shift, scale = np.frombuffer(text, kind, 2 * number).reshape(2, *bounds)
    if not (np.isfinite(shift).all() and np.isfinite(scale).all() and (scale >= 0).all()):
        raise FileError("bounds that are not finite, or a negative scale")
    numbers = np.frombuffer(text, np.int8, rows + columns, 2 * number * kind.itemsize)
    return (shift, scale, entropy.Classes(numbers[:rows], numbers[rows:])), rest


def open_network(path: str | Path) -> StoredNetwork:
    """The network of a file of either version; a file of version 1 is read whole.

    Raises:
        FileError: see there.
    """
    from hnerv_clip.codec import version1

    return version1.StoredVersion1(path) if version1.is_version1(path) else StoredNetwork(path)


def bind_embeddings(model: HNeRV, embeddings: Tensor | None) -> HNeRV:
    """Let a model without its encoder take the embedding of a frame by its time."""
    if embeddings is not None:
        model.embed = lambda frames, times: embeddings[
            (times * model.frame_count).round().long().to(embeddings.device)]
    return model


def decode_video(path: str | Path) -> tuple[HNeRV, Tensor | None]:
    """Read a whole stored video, of either version.

    Returns:
        The model (a hybrid one without its encoder, which is not stored) and the embeddings
        [T, C, h, w] float32, None for coordinates.
    Raises:
        FileError: not such a file, truncated or altered.
    """
    from hnerv_clip.codec import version1
    from hnerv_clip.codec.container import verify_file

    if version1.is_version1(path):
        return version1.decode_video(path)
    stored = StoredNetwork(path)
    verify_file(path)
    return stored.load(), stored.embeddings() if stored.chunk else None
