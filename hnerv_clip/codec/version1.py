"""Files of version 1: still read, no longer written.

Their header trusts a CRC32 alone, so all of it is checked here before it is believed; times,
original size and teacher's identity are not in them.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hnerv_clip.codec.container import (
    FRAME_LIMIT,
    HEADER_LIMIT,
    MAGIC_1,
    NETWORK,
    PIXEL_LIMIT,
    SIDE_LIMIT,
    TEACHER,
    FileError,
    Header,
    parse_json,
    unpack,
    unreadable,
)
from hnerv_clip.config import Config, param_names

if TYPE_CHECKING:  # what reads the header alone need not wait for these
    import numpy as np
    from torch import Tensor

    from hnerv_clip.model import HNeRV

START = len(MAGIC_1) + 4
KINDS = ("<f4", "<f2")
EMBEDDINGS = "embeddings"


def is_version1(path: str | Path) -> bool:
    """Whether a file begins as version 1 does."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC_1)) == MAGIC_1
    except OSError as error:
        raise unreadable(path, error) from error


def read_config(path: str | Path) -> tuple[Config, dict[str, Any], bytes]:
    """(settings, header, what follows it) of a whole file of version 1.

    Raises:
        FileError: damaged, or beyond the limits.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        if data[len(MAGIC_1):START] != struct.pack("<I", zlib.crc32(data[START:])) or \
                len(data) < START + 4:
            raise FileError("its checksum is wrong")
        size, = struct.unpack_from("<I", data, START)
        if size > len(data) - START - 4:
            raise FileError(f"a header of {size} bytes in {len(data)}")
        packed = data[START + 4:START + 4 + size]
        header = parse_json(_unpack_any(packed, HEADER_LIMIT))
        _check_header(header)
        params = header["config"]
        if set(params) - set(param_names()):
            raise FileError(f"unknown settings {sorted(set(params) - set(param_names()))[:4]}")
        config = Config.from_params(**params).resolve(tuple(header["frame_hw"]))
        return config, header, data[START + 4 + size:]
    except (FileError, ValueError, TypeError, ArithmeticError) as error:
        raise FileError(f"{path} is not a whole HNeRV-CLIP video: truncated, altered or foreign "
                        f"({str(error)[:300]}); encode it again from the run's checkpoint"
                        ) from error


def read_header(path: str | Path) -> Header:
    """The facts of a file of version 1, in the form of today's; times count at 25 a second.

    Raises:
        FileError: damaged, or beyond the limits.
    """
    config, header, _ = read_config(path)
    params, hw = config.params(), header["frame_hw"]
    tensors = [[name, shape, -1, 0] for name, shape, *_ in header["tensors"]]
    meta = {
        "format": 1, "writer": "hnerv-clip",
        "video": {"name": "", "frames": header["frame_count"], "size": hw,
                  "times": {"unit": [1, 25], "first": 0, "steps": [[1, header["frame_count"]]]}},
        "network": {name: params[name] for name in NETWORK},
        "teacher": {"name": "", "label": "", "weights": "", "preprocess": 1,
                    "settings": {name: params[name] for name in TEACHER}},
        "heads": [], "tensors": [t for t in tensors if t[0] != EMBEDDINGS],
        "embeddings": [x for t in tensors if t[0] == EMBEDDINGS for x in (t, 1)], "parts": []}
    return Header(meta, {}, Path(path).stat().st_size, version=1, config=config)


class StoredVersion1:
    """A file of version 1 with the face of `codec.video.StoredNetwork`; read whole at once."""

    def __init__(self, path: str | Path):
        self.path, self.header = Path(path), read_header(path)
        self.config = self.header.config
        self.model, self._embeddings = decode_video(path)
        self.field = None
        self.chunk = 0 if self._embeddings is None else 1

    def load(self, prefixes: tuple[str, ...] = ("",)) -> HNeRV:
        """The network; everything is there already."""
        return self.model

    def embeddings(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredNetwork.embeddings`."""
        return self._embeddings[start:stop]


def decode_video(path: str | Path) -> tuple[HNeRV, Tensor | None]:
    """See `codec.video.decode_video`."""
    config, header, body = read_config(path)
    try:
        return _decode(config, header, body)
    except FileError as error:
        raise FileError(f"{path} does not hold the network that its header describes: {error}; "
                        "encode it again from the run's checkpoint") from error


def _decode(config: Config, header: dict[str, Any], body: bytes) -> tuple[HNeRV, Tensor | None]:
    import numpy as np

    from hnerv_clip.codec.levels import Quantised
    from hnerv_clip.codec.network import plan_network

    model = plan_network(config.model, frame_hw=tuple(header["frame_hw"]),
                         frame_count=header["frame_count"], size_bytes=len(body))
    planned = {name: list(t.shape) for name, t in model.state_dict().items()}
    if model.kind == "hybrid":
        down = math.prod(model.config.enc_strds)
        planned[EMBEDDINGS] = [model.frame_count, model.plan.embed_channels,
                               *(side // down for side in model.plan.padded_hw)]
    stored = {entry[0]: entry[1] for entry in header["tensors"]}
    if EMBEDDINGS not in stored:  # a hybrid network may be stored without
        planned.pop(EMBEDDINGS, None)
    if stored != planned or len(stored) != len(header["tensors"]):
        raise FileError("its tensors are not the network's")
    state, at = {}, 0
    for name, shape, bounds_shape, kind, bits, coded_size in header["tensors"]:
        number = math.prod(bounds_shape)
        size = 2 * number * np.dtype(kind).itemsize
        if at + size + coded_size > len(body):
            raise FileError(f"{name} goes beyond the file's end")
        bounds = np.frombuffer(body, kind, 2 * number, at).reshape(2, *bounds_shape)
        if not np.isfinite(bounds).all():
            raise FileError(f"{name} has bounds that are not finite")
        at += size
        levels = _decode_levels(body[at:at + coded_size], math.prod(shape), bits=bits)
        at += coded_size
        with np.errstate(over="ignore"):
            value = Quantised(levels.reshape(shape), bounds[0], bounds[1]).dequantise()
        if not value.isfinite().all():
            raise FileError(f"{name} has values that are not finite")
        state[name] = value
    if at != len(body):
        raise FileError(f"{len(body) - at} bytes follow the last tensor")
    embeddings = state.pop(EMBEDDINGS, None)
    own = model.state_dict()
    model.load_state_dict({n: t.to(own[n].dtype) for n, t in state.items()}, assign=True)
    return model.eval(), embeddings


def _check_header(header: Any) -> None:
    def need(held: bool, broken: str) -> None:
        if not held:
            raise FileError(broken)

    def is_int(value: Any, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    need(isinstance(header, dict) and
         set(header) == {"config", "frame_hw", "frame_count", "tensors"}, "an unknown header")
    config, hw = header["config"], header["frame_hw"]
    need(isinstance(config, dict) and all(
        isinstance(v, (str, int, float)) and len(str(v)) <= 4096 for v in config.values()),
        "settings that are no plain values")
    need(isinstance(hw, list) and len(hw) == 2 and all(is_int(v, 1, SIDE_LIMIT) for v in hw)
         and math.prod(hw) <= PIXEL_LIMIT, "an impossible frame size")
    need(is_int(header["frame_count"], 1, FRAME_LIMIT), "an impossible number of frames")
    need(isinstance(header["tensors"], list) and len(header["tensors"]) <= 2**16, "no tensors")
    for entry in header["tensors"]:
        need(isinstance(entry, list) and len(entry) == 6, "a tensor's entry of other length")
        name, shape, bounds, kind, bits, size = entry
        need(isinstance(name, str) and isinstance(shape, list) and isinstance(bounds, list)
             and len(shape) <= 8 and all(is_int(n, 1, 2**31) for n in shape)
             and len(bounds) == len(shape)
             and all(b in (1, n) and type(b) is int for b, n in zip(bounds, shape))
             and kind in KINDS and is_int(bits, 1, 16) and is_int(size, 0, 2**40),
             f"a tensor's entry {str(entry)[:80]} breaks a rule")


def _decode_levels(data: bytes, count: int, *, bits: int) -> np.ndarray:
    import constriction
    import numpy as np

    if len(data) < 4:
        raise FileError("a stream without its histogram")
    size, = struct.unpack_from("<I", data)
    if size > len(data) - 4 or (len(data) - 4 - size) % 4:
        raise FileError("a histogram beyond its stream")
    table = _unpack_any(data[4:4 + size], 4 * 2**bits)
    counts = np.frombuffer(table[:len(table) // 4 * 4], "<u4")
    if len(table) % 4 or not 1 <= len(counts) <= 2**bits or counts.sum(dtype=np.int64) != count:
        raise FileError(f"a histogram of other levels than {count} of {bits} bits")
    words = np.frombuffer(data, "<u4", offset=4 + size).astype(np.uint32)
    if np.count_nonzero(counts) == 1:
        if len(words):
            raise FileError("a stream of a constant is not empty")
        return np.full(count, counts.argmax(), np.int32)
    coder = constriction.stream.queue.RangeDecoder(words)
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
    try:
        levels = coder.decode(model, count)
    except (AssertionError, ValueError) as error:
        raise FileError(f"a stream does not decode: {error}") from error
    if not coder.maybe_exhausted():
        raise FileError("a stream is longer than its levels")
    return levels.astype(np.int32)


def _unpack_any(data: bytes, limit: int) -> bytes:
    """Undo zlib, to at most `limit` bytes."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise FileError(f"packed data is damaged: {error}") from error
    if len(text) > limit:
        raise FileError(f"packed data unpacks to more than {limit} bytes")
    return unpack(data, len(text))
