"""Integers as bytes: a range coder under histograms that the whole file shares.

How wide levels spread differs between a network's tensors, and between the rows and columns of one.
So each entry belongs to a class, the sum of a number of its row (axis 0) and one of its column
(axis 1), in half octaves of the mean absolute level; the entries of one class in the whole file
share one histogram. This is the dual-axis model of NVRC (arXiv 2409.07414) with measured in place
of normal distributions. Histograms hold integers and the coder is `constriction`'s (24 bits
precision), so no result depends on how a machine rounds.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import constriction
import numpy as np

from hnerv_clip.codec.container import FileError, unpack

CLASSES = 40  # class k: a mean absolute level of about 2^((k - 8) / 2)
GROUPS = ("weights", "embeddings")  # classes of the two do not mix
LEVEL_LIMIT = 2**17
SHARE = 2**16 - 1  # histograms are scaled so that the largest entry fits 16 bits
ROWS, COLUMNS = 1, 2  # bits of an entry's `classes`


@dataclass
class Classes:
    """Which class each entry of a tensor belongs to: row[i] + column[j], of [rows, columns, …]."""

    row: np.ndarray  # int8 [rows], or [1] for all
    column: np.ndarray  # int8 [columns], or [1], 0

    @property
    def flags(self) -> int:
        """ROWS where rows differ, COLUMNS where columns do."""
        return ROWS * (len(self.row) > 1) + COLUMNS * (len(self.column) > 1)

    def of(self, shape: tuple[int, ...]) -> np.ndarray:
        """The class of every entry, flat: uint8."""
        grid = np.clip(self.row[:, None].astype(np.int16) + self.column, 0, CLASSES - 1)
        rows, columns, rest = matrix_shape(shape)
        grid = np.broadcast_to(grid.astype(np.uint8), (rows, columns))
        return np.repeat(grid.ravel(), rest)


@dataclass
class Histogram:
    """How often each level from `low` on occurs, scaled."""

    low: int
    counts: np.ndarray  # int64 [n]

    def model(self) -> constriction.stream.model.Categorical:
        """The coder's model."""
        return constriction.stream.model.Categorical(
            self.counts / self.counts.sum(), perfect=False)


def matrix_shape(shape: tuple[int, ...] | list[int]) -> tuple[int, int, int]:
    """(rows, columns, entries of each) of a tensor; one row and column below two dimensions."""
    if len(shape) < 2:
        return 1, 1, int(np.prod(shape, dtype=np.int64))
    return shape[0], shape[1], int(np.prod(shape[2:], dtype=np.int64))


def choose_classes(levels: np.ndarray) -> Classes:
    """The classes under which a tensor's levels take the fewest bytes, by a Laplace estimate."""
    rows, columns, _ = matrix_shape(levels.shape)
    spread = np.abs(levels).reshape(rows, columns, -1).mean(-1) + 2.0**-5  # [rows, columns]
    best, best_bits = None, np.inf
    for flags in range(4):
        row, column = np.full(1, spread.mean()), np.ones(1)
        if flags & ROWS:
            row = spread.mean(1)
        for _ in range(4 if flags == ROWS | COLUMNS else 1):
            if flags & COLUMNS:
                column = (spread / row[:, None]).mean(0)
            if flags & ROWS:
                row = (spread / column).mean(1)
        candidate = Classes(_half_octaves(row, 8), _half_octaves(column, 0))
        width = np.exp2((candidate.row[:, None] + candidate.column - 8) / 2) + np.zeros_like(spread)
        bits = (np.log2(1 + 2 * width) + 1.44 * spread / (width + 0.3)).sum() \
            * (levels.size / spread.size) + 3 * sum(len(a) for a in (row, column) if len(a) > 1)
        if bits < best_bits:
            best, best_bits = candidate, bits
    return best


def _half_octaves(spread: np.ndarray, offset: int) -> np.ndarray:
    return np.clip(np.round(2 * np.log2(spread)) + offset, -CLASSES, CLASSES).astype(np.int8)


def count_levels(tensors: list[tuple[np.ndarray, Classes]]) -> dict[int, Histogram]:
    """The histogram of each class over some tensors' levels."""
    flat = np.concatenate([levels.ravel() for levels, _ in tensors])
    classes = np.concatenate([c.of(levels.shape) for levels, c in tensors])
    histograms = {}
    for number in np.unique(classes):
        own = flat[classes == number]
        counts = np.bincount(own - own.min())
        scaled = np.maximum(np.round(counts * (SHARE / counts.max())), counts > 0)
        histograms[int(number)] = Histogram(int(own.min()), scaled.astype(np.int64))
    return histograms


def pack_histograms(groups: dict[str, dict[int, Histogram]]) -> bytes:
    """Histograms as bytes: u32 size unpacked, then zlib of the list of them and their counts."""
    listed = [(GROUPS.index(group) * CLASSES + number, histogram)
              for group, histograms in groups.items() for number, histogram in histograms.items()]
    table = b"".join(struct.pack("<HiI", key, h.low, len(h.counts)) for key, h in listed)
    counts = np.concatenate([h.counts for _, h in listed]).astype(np.uint16)
    text = struct.pack("<H", len(listed)) + table + \
        (counts >> 8).astype(np.uint8).tobytes() + (counts & 255).astype(np.uint8).tobytes()
    return struct.pack("<I", len(text)) + zlib.compress(text, 9)


def unpack_histograms(data: bytes) -> dict[str, dict[int, Histogram]]:
    """What `pack_histograms` was given.

    Raises:
        FileError: damaged, or beyond the limits.
    """
    text = _unpack_sized(data, 2**23)
    number, = struct.unpack_from("<H", _need(text, 2))
    if number > len(GROUPS) * CLASSES:
        raise FileError(f"{number} histograms, at most {len(GROUPS) * CLASSES}")
    entry = struct.Struct("<HiI")
    table = [entry.unpack_from(_need(text, 2 + (i + 1) * entry.size), 2 + i * entry.size)
             for i in range(number)]
    total = sum(length for _, _, length in table)
    start = 2 + number * entry.size
    if len(text) != start + 2 * total or any(n < 1 for _, _, n in table):
        raise FileError(f"histograms of {total} counts in {len(text)} bytes")
    high, low = np.frombuffer(text, np.uint8, 2 * total, start).reshape(2, -1).astype(np.int64)
    counts = high * 256 + low
    groups: dict[str, dict[int, Histogram]] = {group: {} for group in GROUPS}
    at = 0
    for key, first, length in table:
        own = counts[at:at + length]
        at += length
        group, number = GROUPS[min(key // CLASSES, len(GROUPS) - 1)], key % CLASSES
        if key >= len(GROUPS) * CLASSES or number in groups[group]:
            raise FileError(f"histogram {key} is unknown, or there twice")
        if not -LEVEL_LIMIT <= first <= LEVEL_LIMIT - length or length > 1 and not own.any() or \
                length == 1 and own[0] == 0:
            raise FileError(f"histogram {key} is empty or out of bounds")
        groups[group][number] = Histogram(first, own)
    return groups


def encode_levels(levels: np.ndarray, classes: Classes, histograms: dict[int, Histogram]) -> bytes:
    """Range-code levels, class after class, in whole 32-bit words, little endian."""
    coder = constriction.stream.queue.RangeEncoder()
    for _, histogram, places in _by_class(classes.of(levels.shape), histograms):
        if len(histogram.counts) > 1:  # a single level needs no code
            coder.encode((levels.ravel()[places] - histogram.low).astype(np.int32),
                         histogram.model())
    return coder.get_compressed().astype("<u4").tobytes()


def decode_levels(data: bytes, shape: tuple[int, ...], classes: Classes,
                  histograms: dict[int, Histogram]) -> np.ndarray:
    """int32 levels of a shape that was checked against the network.

    Raises:
        FileError: no histogram for a class, or words that do not decode, or too many.
    """
    if len(data) % 4:
        raise FileError(f"a stream of {len(data)} bytes is no number of 32-bit words")
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
    of_entry = classes.of(shape)
    levels = np.empty(len(of_entry), np.int32)
    for number, histogram, places in _by_class(of_entry, histograms):
        if histogram is None:
            raise FileError(f"no histogram for class {number}")
        if len(histogram.counts) == 1:
            levels[places] = histogram.low
            continue
        try:
            levels[places] = coder.decode(histogram.model(), len(places))
        except (AssertionError, ValueError) as error:
            raise FileError(f"a stream does not decode: {error}") from error
        levels[places] += histogram.low
    if not coder.maybe_exhausted():
        raise FileError("a stream is longer than its levels")
    return levels.reshape(shape)


def _by_class(of_entry: np.ndarray, histograms: dict[int, Histogram]):
    """(class, its histogram or None, where its entries are), rising."""
    order = np.argsort(of_entry, kind="stable")
    counts = np.bincount(of_entry, minlength=CLASSES)
    at = 0
    for number in np.flatnonzero(counts):
        yield int(number), histograms.get(int(number)), order[at:at + counts[number]]
        at += counts[number]


def pack_arrays(*arrays: np.ndarray) -> bytes:
    """u32 size unpacked, u32 size packed, then zlib of the arrays' bytes."""
    text = b"".join(array.tobytes() for array in arrays)
    packed = zlib.compress(text, 9)
    return struct.pack("<II", len(text), len(packed)) + packed


def split_arrays(data: bytes, size: int) -> tuple[bytes, bytes]:
    """What `pack_arrays` packed, `size` bytes, and what follows it.

    Raises:
        FileError: damaged, or of another size.
    """
    text_size, packed_size = struct.unpack_from("<II", _need(data, 8))
    if text_size != size or packed_size > len(data) - 8:
        raise FileError(f"bounds of {text_size} bytes, where {size} belong")
    return unpack(data[8:8 + packed_size], size), data[8 + packed_size:]


def _unpack_sized(data: bytes, limit: int) -> bytes:
    size, = struct.unpack_from("<I", _need(data, 4))
    if size > limit:
        raise FileError(f"packed data of {size} bytes, at most {limit}")
    return unpack(data[4:], size)


def _need(data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise FileError(f"{len(data)} bytes, where at least {size} belong")
    return data
