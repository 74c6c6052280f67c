"""The bytes of a stored video: a checked header, then parts that can be read one by one.

    8   magic b"HNCLIP\\0\\2"
    4   size of the packed header, little endian
    4   size of the header unpacked
    32  BLAKE2b-256 of the packed header
    …   header: JSON in UTF-8, packed by zlib
    …   the parts, back to back, in the order and sizes of the header's list
    32  BLAKE2b-256 of everything before it

Every part has a BLAKE2b-128 digest in the header, so whatever is read is checked, and nothing else
needs to be read. This module imports neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hnerv_clip.config import Config

MAGIC_1, MAGIC = b"HNCLIP\x00\x01", b"HNCLIP\x00\x02"
START = struct.Struct("<8sII32s")
END_SIZE = 32
HEADER_LIMIT = 2**22  # bytes of the header, unpacked
DEPTH_LIMIT = 8  # of the header's lists and objects
PART_LIMIT = 2**16  # parts
FRAME_LIMIT = 2**20
SIDE_LIMIT = 2**14  # pixels
PIXEL_LIMIT = 2**26
# Settings that a file keeps: what makes the network, what makes its patches and its texts
NETWORK = ("embed", "enc_strds", "enc_dim", "dec_strds", "fc_hw", "pad_list", "ks", "num_blks",
           "reduce", "lower_width", "modelsize", "act", "norm", "conv_type", "out_bias",
           "predict_clip", "clip_dim", "clip_stage", "clip_pool")
TEACHER = ("teacher", "clip_model", "clip_pretrained", "teacher_precision", "patch_grid",
           "patch_size", "patch_stride")


class FileError(RuntimeError):
    """A stored video cannot be read: missing, truncated, altered, foreign, or beyond the limits."""


@dataclass(frozen=True)
class Part:
    """A part of the file: where it lies, and the digest of its bytes."""

    name: str
    at: int
    size: int
    digest: str


@dataclass
class Header:
    """What the header says, checked: types and limits, not yet against the network.

    meta: the JSON object. parts: by name, in the file's order.
    """

    meta: dict[str, Any]
    parts: dict[str, Part]
    size_bytes: int  # of the whole file
    version: int = 2
    config: Config = field(default_factory=Config)

    @property
    def frame_count(self) -> int:
        """T."""
        return self.meta["video"]["frames"]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pictures, in pixels."""
        return tuple(self.meta["video"]["size"])

    def times(self) -> list[float]:
        """When each frame is shown, in seconds."""
        return expand_times(self.meta["video"]["times"])


def digest(data: bytes, *, size: int = 16) -> str:
    """BLAKE2b, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def pack_file(meta: dict[str, Any], parts: Iterable[tuple[str, bytes]]) -> bytes:
    """A whole file.

    Args:
        meta: the header without its list of parts.
        parts: (name, bytes) in order.
    """
    parts = list(parts)
    listed = [[name, len(data), digest(data)] for name, data in parts]
    text = json.dumps({**meta, "parts": listed}, separators=(",", ":"),
                      ensure_ascii=False).encode()
    packed = zlib.compress(text, 9)
    start = START.pack(MAGIC, len(packed), len(text),
                       hashlib.blake2b(packed, digest_size=32).digest())
    body = b"".join([start, packed, *(data for _, data in parts)])
    return body + hashlib.blake2b(body, digest_size=END_SIZE).digest()


def read_header(path: str | Path) -> Header:
    """Read and check the header of a stored video of version 2; nothing else is read.

    Raises:
        FileError: see there.
    """
    try:
        size_bytes = Path(path).stat().st_size
        with open(path, "rb") as file:
            start = file.read(START.size)
            if start[:8] == MAGIC_1:
                raise FileError(f"{path} is of version 1: open it with codec.decode_video")
            if len(start) < START.size and start[:8] == MAGIC:
                raise _broken(path, "it ends in its first bytes")
            if start[:8] != MAGIC:
                raise _foreign(path)
            _, packed_size, text_size, wanted = START.unpack(start)
            if not 0 < packed_size <= size_bytes - START.size - END_SIZE or \
                    not 0 < text_size <= HEADER_LIMIT:
                raise _broken(path, f"a header of {packed_size} bytes in {size_bytes}")
            packed = file.read(packed_size)
    except OSError as error:
        raise unreadable(path, error) from error
    if hashlib.blake2b(packed, digest_size=32).digest() != wanted:
        raise _broken(path, "its header's digest is wrong")
    try:
        meta = parse_json(unpack(packed, text_size))
        check_meta(meta)
        parts, at = {}, START.size + packed_size
        for name, size, part_digest in meta["parts"]:
            parts[name] = Part(name, at, size, part_digest)
            at += size
        if at + END_SIZE != size_bytes:
            raise FileError(f"{size_bytes} bytes, where its header tells of {at + END_SIZE}")
        config = Config.from_params(data_path=meta["video"]["name"] or "video", crop_list="",
                                    **meta["network"], **meta["teacher"]["settings"])
    except (FileError, ValueError, TypeError, ArithmeticError) as error:  # ConfigError is one
        raise _broken(path, str(error)) from error
    return Header(meta, parts, size_bytes, config=config)


def read_part(path: str | Path, part: Part) -> bytes:
    """The bytes of one part, checked.

    Raises:
        FileError: the file is gone, truncated or altered.
    """
    try:
        with open(path, "rb") as file:
            file.seek(part.at)
            data = file.read(part.size)
    except OSError as error:
        raise unreadable(path, error) from error
    if digest(data) != part.digest:
        raise _broken(path, f"the digest of its part {part.name!r} is wrong")
    return data


def verify_file(path: str | Path) -> None:
    """Check the digest of the whole file.

    Raises:
        FileError: it is wrong.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if hashlib.blake2b(data[:-END_SIZE], digest_size=END_SIZE).digest() != data[-END_SIZE:]:
        raise _broken(path, "the digest of the whole is wrong")


def unreadable(path: str | Path, error: OSError) -> FileError:
    """The error of a stored file that the system does not read."""
    fix = "; give a .hnerv file that hnerv-clip encode wrote" * isinstance(
        error, FileNotFoundError)
    return FileError(f"cannot read {path}: {error.strerror or error}{fix}")


def _foreign(path: str | Path) -> FileError:
    """The error of a file that is none of ours; of a film, with the command that stores it."""
    from hnerv_clip.readers import VIDEO_SUFFIXES  # with PyAV, which a stored video does without

    path = Path(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        stored = shlex.join(["hnerv-clip", "encode", str(path), f"{path.stem}.hnerv"])
        return FileError(f"{path} is a video, not a run or a stored one: store it first, {stored}, "
                         "then give the .hnerv file")
    return FileError(f"{path} is no HNeRV-CLIP video: it does not begin as one does; give a .hnerv "
                     "file that hnerv-clip encode wrote")


def _broken(path: str | Path, why: str) -> FileError:
    return FileError(f"{path} is not a whole HNeRV-CLIP video: truncated, altered or foreign "
                     f"({why[:300]}); encode it again from the run's checkpoint")


def unpack(data: bytes, size: int) -> bytes:
    """Undo zlib, to just so many bytes; never more are made.

    Raises:
        FileError: damaged, or of another size.
    """
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise FileError(f"packed data is damaged: {error}") from error
    if len(text) != size or not unpacker.eof or unpacker.unused_data:
        raise FileError(f"packed data does not unpack to {size} bytes")
    return text


def parse_json(text: bytes) -> Any:
    """JSON without NaN, repeated names, deep nesting or numbers of many digits.

    Raises:
        FileError: not such JSON.
    """
    depth = deepest = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == 0x5C:
                escaped = True
            elif char == 0x22:
                in_string = False
        elif char == 0x22:
            in_string = True
        elif char in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in b"]}":
            depth -= 1
    if deepest > DEPTH_LIMIT:
        raise FileError(f"the header nests {deepest} deep, at most {DEPTH_LIMIT}")

    def number(digits: str) -> int:
        if len(digits) > 18:
            raise FileError(f"the header holds a number of {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise FileError(f"the header holds the number {digits[:40]}")
        return value

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in items}) != len(items):
            raise FileError("the header names something twice")
        return dict(items)

    def constant(name: str) -> None:
        raise FileError(f"the header holds {name}")

    try:
        return json.loads(text.decode(), parse_int=number, parse_float=real,
                          parse_constant=constant, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise FileError(f"the header is no JSON: {error}") from error


# The header's schema

def check_meta(meta: Any) -> None:
    """Check names, types and limits of the header.

    Raises:
        FileError: what breaks which rule.
    """
    _fields(meta, "header", {"format": int, "writer": str, "video": dict, "network": dict,
                             "teacher": dict, "heads": list, "tensors": list, "embeddings": list,
                             "parts": list})
    _need(meta["format"] == 2, f"format {meta['format']} is not 2")
    _need(len(meta["writer"]) <= 100, "writer is too long")
    _check_video(meta["video"])
    _settings(meta["network"], NETWORK)
    _check_teacher(meta["teacher"])
    for head in meta["heads"]:
        _fields(head, "head", {"name": str, "settings": dict})
        _need(len(head["name"]) <= 40 and len(head["settings"]) <= 64, "a head is too long")
        for name, value in head["settings"].items():
            _scalar(name, value)
    _check_parts(meta["parts"])
    _need(len(meta["tensors"]) <= PART_LIMIT, "too many tensors")
    for entry in meta["tensors"]:
        check_tensor_entry(entry)
    _need(len(meta["embeddings"]) in (0, 2), "embeddings must be [] or [entry, frames of a chunk]")
    if meta["embeddings"]:
        entry, chunk = meta["embeddings"]
        check_tensor_entry(entry)
        _need(_is_int(chunk, 1, FRAME_LIMIT), f"a chunk of {chunk} frames")
        _need(len(entry[1]) == 4 and entry[1][0] == meta["video"]["frames"],
              f"embeddings of shape {entry[1]} for {meta['video']['frames']} frames")


def _check_video(video: dict) -> None:
    _fields(video, "video", {"name": str, "frames": int, "size": list, "times": dict})
    _need(len(video["name"]) <= 200, "the video's name is too long")
    frames = video["frames"]
    _need(_is_int(frames, 1, FRAME_LIMIT), f"{frames} frames, not 1 to {FRAME_LIMIT}")
    _need(len(video["size"]) == 2 and all(_is_int(v, 1, SIDE_LIMIT) for v in video["size"]),
          f"size {str(video['size'])[:80]} is no pair of pixels up to {SIDE_LIMIT}")
    _need(math.prod(video["size"]) <= PIXEL_LIMIT, f"a frame above {PIXEL_LIMIT} pixels")
    times = video["times"]
    _fields(times, "times", {"unit": list, "first": int, "steps": list})
    _need(len(times["unit"]) == 2 and all(_is_int(v, 1, 10**9) for v in times["unit"]),
          "the unit of times is no fraction")
    _need(_is_int(times["first"], -10**15, 10**15), "the first time is out of bounds")
    counted = 0
    for run in times["steps"]:
        _need(isinstance(run, list) and len(run) == 2 and _is_int(run[0], 1, 10**12)
              and _is_int(run[1], 1, FRAME_LIMIT), "a step of times is no [ticks, count]")
        counted += run[1]
    _need(counted == frames, f"times of {counted} frames for {frames}")


def _check_teacher(teacher: dict) -> None:
    _fields(teacher, "teacher", {"name": str, "label": str, "weights": str, "preprocess": int,
                                 "settings": dict})
    for name in ("name", "label", "weights"):
        _need(len(teacher[name]) <= 200, f"the teacher's {name} is too long")
    _settings(teacher["settings"], TEACHER)


def _check_parts(parts: list) -> None:
    _need(len(parts) <= PART_LIMIT, "too many parts")
    for part in parts:
        _need(isinstance(part, list) and len(part) == 3 and isinstance(part[0], str)
              and len(part[0]) <= 100 and _is_int(part[1], 0, 2**40)
              and isinstance(part[2], str) and len(part[2]) == 32,
              "a part is not [name, size, digest]")
    _need(len({part[0] for part in parts}) == len(parts), "a part is named twice")


def check_tensor_entry(entry: Any) -> None:
    """[name, shape, axis of bounds or −1, whether rows and columns have classes (0…3)]."""
    _need(isinstance(entry, list) and len(entry) == 4 and isinstance(entry[0], str)
          and len(entry[0]) <= 100 and isinstance(entry[1], list) and len(entry[1]) <= 8
          and all(_is_int(v, 1, 2**31) for v in entry[1])
          and _is_int(entry[2], -1, len(entry[1]) - 1) and _is_int(entry[3], 0, 3),
          f"a tensor's entry {str(entry)[:80]} is not [name, shape, axis, classes]")


def _settings(settings: dict, known: tuple[str, ...]) -> None:
    _need(set(settings) == set(known), f"the settings {sorted(set(settings) ^ set(known))[:5]} "
                                       "are missing, or unknown here")
    for name, value in settings.items():
        _scalar(name, value)


def _scalar(name: str, value: Any) -> None:
    _need(isinstance(name, str) and len(name) <= 40, "a setting's name is too long")
    _need(isinstance(value, (str, int, float)) and len(str(value)) <= 200,
          f"the setting {name} is {str(value)[:80]}")


def _fields(value: Any, name: str, kinds: dict[str, type]) -> None:
    _need(isinstance(value, dict), f"{name} is no object")
    _need(set(value) == set(kinds), f"{name} has the fields {sorted(value)[:12]}, "
                                    f"not {sorted(kinds)}")
    for key, kind in kinds.items():
        _need(type(value[key]) is kind, f"{key} of {name} is no {kind.__name__}")


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _need(held: bool, broken: str) -> None:
    if not held:
        raise FileError(broken)


# Times

def pack_times(ticks: list[int], unit: tuple[int, int]) -> dict[str, Any]:
    """Rising times as a first one and runs of equal steps.

    Args:
        ticks: when each frame is shown, in units.
        unit: seconds of a unit, as a fraction.
    Returns:
        {"unit", "first", "steps": [[ticks, count], …]}; counts add up to the frames, and the last
        step is how long the last frame lasts, as long as the one before.
    Raises:
        ValueError: times that do not rise.
    """
    gaps = [after - before for before, after in zip(ticks, ticks[1:])]
    gaps.append(gaps[-1] if gaps else 1)
    if min(gaps) < 1:
        raise ValueError(f"times do not rise at frame {gaps.index(min(gaps)) + 1}: a video's "
                         "frames follow one another; sort them, or leave out the repeated one")
    steps: list[list[int]] = []
    for gap in gaps:
        if steps and steps[-1][0] == gap:
            steps[-1][1] += 1
        else:
            steps.append([gap, 1])
    return {"unit": list(unit), "first": ticks[0], "steps": steps}


def expand_ticks(times: dict[str, Any]) -> list[int]:
    """What `pack_times` was given."""
    ticks, at = [], times["first"]
    for step, count in times["steps"]:
        ticks += range(at, at + step * count, step)
        at += step * count
    return ticks


def expand_times(times: dict[str, Any]) -> list[float]:
    """When each frame is shown, in seconds."""
    numerator, denominator = times["unit"]
    return [tick * numerator / denominator for tick in expand_ticks(times)]
