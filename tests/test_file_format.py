"""A reader that is written from the book's page «The file» alone: it draws the same pictures."""

import hashlib
import json
import struct
import zlib

import constriction
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hnerv_clip
from hnerv_clip.inference import load_run
from hnerv_clip.stored.fine_tune import fine_tune


def read_parts(data):
    packed_size, size = struct.unpack_from("<II", data, 8)
    packed = data[48:48 + packed_size]
    assert data[:8] == b"HNCLIP\0\2"
    assert hashlib.blake2b(packed, digest_size=32).digest() == data[16:48]
    assert hashlib.blake2b(data[:-32], digest_size=32).digest() == data[-32:]
    text = zlib.decompress(packed)
    assert len(text) == size
    header, parts, at = json.loads(text), {}, 48 + packed_size
    for name, length, digest in header["parts"]:
        parts[name] = data[at:at + length]
        assert hashlib.blake2b(parts[name], digest_size=16).hexdigest() == digest
        at += length
    assert at == len(data) - 32
    return header, parts


def read_histograms(part):
    text = zlib.decompress(part[4:])
    count, = struct.unpack_from("<H", text)
    table = list(struct.iter_unpack("<HiI", text[2:2 + 10 * count]))
    high, low = np.frombuffer(text[2 + 10 * count:], np.uint8).reshape(2, -1).astype(int)
    counts, found, at = 256 * high + low, {}, 0
    for key, first, length in table:
        found[key] = first, counts[at:at + length]
        at += length
    return found


def read_bounds(part, shape, axis, flags):
    size, packed = struct.unpack_from("<II", part)
    text = zlib.decompress(part[8:8 + packed])
    assert len(text) == size
    bounds = [1 if axis in (-1, i) else n for i, n in enumerate(shape)]
    kind, number = np.dtype("<f4" if axis < 0 else "<f2"), int(np.prod(bounds))
    shift, scale = np.frombuffer(text, kind, 2 * number).reshape(2, *bounds).astype(np.float32)
    numbers = np.frombuffer(text[2 * number * kind.itemsize:], np.int8)
    rows = shape[0] if len(shape) > 1 and flags & 1 else 1
    return shift, scale, numbers[:rows], numbers[rows:], part[8 + packed:]


def read_levels(words, shape, rows, columns, histograms, first_key):
    matrix = list(shape) if len(shape) > 1 else [1, 1, *shape]
    classes = np.clip(rows[:, None].astype(int) + columns, 0, 39)
    classes = np.broadcast_to(classes.reshape(*classes.shape, *[1] * (len(matrix) - 2)),
                              matrix).ravel()
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    levels = np.empty(len(classes), np.float32)
    for number in np.unique(classes):
        low, counts = histograms[first_key + number]
        where = np.flatnonzero(classes == number)
        levels[where] = low if len(counts) == 1 else low + coder.decode(
            constriction.stream.model.Categorical(counts / counts.sum(), perfect=False), len(where))
    return levels.reshape(shape)


def read_tensors(path):
    header, parts = read_parts(path.read_bytes())
    histograms, tensors = read_histograms(parts["histograms"]), {}
    for name, shape, axis, flags in header["tensors"]:
        shift, scale, rows, columns, words = read_bounds(parts[name], shape, axis, flags)
        tensors[name] = torch.from_numpy(
            shift + scale * read_levels(words, shape, rows, columns, histograms, 0))
    (name, shape, axis, flags), chunk = header["embeddings"]
    shift, scale, rows, columns, rest = read_bounds(parts[name], shape, axis, flags)
    assert not rest
    levels = [read_levels(parts[f"{name}/{i}"], [min(chunk, shape[0] - i), *shape[1:]], rows,
                          columns, histograms, 40) for i in range(0, shape[0], chunk)]
    return header, tensors, torch.from_numpy(shift + scale * np.concatenate(levels))


def draw(header, tensors, embedding):
    x, network = embedding[None], header["network"]
    for i, stride in enumerate([1, *map(int, network["dec_strds"].split())]):
        weight = tensors[f"decoder.{i}.conv.weight"]
        x = F.conv2d(x, weight, tensors[f"decoder.{i}.conv.bias"], padding=weight.shape[2] // 2)
        x = F.gelu(F.pixel_shuffle(x, stride))
    x = torch.tanh(F.conv2d(x, tensors["rgb_head.weight"], tensors["rgb_head.bias"], padding=1))
    height, width = header["video"]["size"]
    return (255 * (x / 2 + 0.5)).round().clamp(0, 255)[0, :, :height, :width]


@pytest.mark.parametrize("tuned", [False, True])
def test_a_reader_from_the_page_draws_the_same_pictures(trained_run, cache_dir, tmp_path, tuned):
    path = trained_run / "video.hnerv"
    if tuned:
        run, path = load_run(trained_run, cache_dir=cache_dir, device="cpu"), tmp_path / "v.hnerv"
        fine_tune(run.model, run.dataset, run.config, rate=0.001, epochs=1, progress=False).store(
            path, run.dataset, run.config)
    header, tensors, embeddings = read_tensors(path)
    if tuned:  # a step for each input channel
        assert {axis for name, _, axis, _ in header["tensors"] if name.endswith("weight")} == {0}
    video = hnerv_clip.open(path, device="cpu")
    for frame in (0, 11):
        wanted = torch.from_numpy(video[frame].astype(np.float32)).permute(2, 0, 1)
        found = draw(header, tensors, embeddings[frame])
        assert (found - wanted).abs().max() <= 1 and (found == wanted).float().mean() > 0.99
