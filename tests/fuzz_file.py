"""Damaged files of every kind, to be refused with the one documented error.

    python tests/fuzz_file.py --count 100000 --seed 1

Half of the files have their checksums made right again, so that what lies behind them is reached.
Each is read under a memory limit of 2 GB and 2 s of the processor; an abort or a hang ends the
process, which the caller sees.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import torch

from hnerv_clip.codec import FileError, decode_video, encode_video, network
from hnerv_clip.codec.container import END_SIZE, START, pack_file
from hnerv_clip.codec.video import About, StoredNetwork
from hnerv_clip.config import Config
from hnerv_clip.heads.field import FieldConfig, FieldHead
from hnerv_clip.model import build_model

VERSION_1 = Path(__file__).parent / "data" / "version1.hnerv"
MEMORY_BYTES, TIME_S = 2 * 2**30, 2
TINY = dict(data_path="clip.mp4", frame_limit=4,
            enc_strds="5 2 2", dec_strds="5 2 2", enc_dim="4_2", modelsize=0.002, lower_width=3,
            teacher="efficientnet-lite0", clip_dim=4)
ODD = [0, 1, -1, 2, 3, 7, 51, 255, 256, 65535, 65536, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**53,
       2**63, -2**31, -2**63, 10**30, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), True,
       False, None, "", "a", "1_2", "5 2 2", "pe_1.25_80", "xyt_1.25_8", "9999999999", "1e400",
       "nan", "../../etc/passwd", "\x00", "é" * 50, "9" * 400, "[" * 50, [], [1], [[]], {},
       {"a": 1}, [1, 2, 3, 4], [2**31, 2**31], "in", "bn", "last", "all", "0_1_2", 1e18, 4096]


def make_seeds() -> list[bytes]:
    """Tiny whole files: hybrid networks without and with a field, two of coordinates, version 1."""
    files = []
    head = FieldHead(FieldConfig(dim=4, frame_hw=(18, 37), frame_count=4, source_channels=2, up=2,
                                 mid_channels=2, map_channels=1, map_hw=(2, 4), points=2, hidden=4,
                                 rank=2, frequencies=1))
    for changes in ({}, {"predict_clip": False, "modelsize": 0.0021},
                    {"embed": "pe_1.25_4", "fc_hw": "1_2"},
                    {"embed": "xyt_1.25_4", "fc_hw": "1_2", "enc_dim": "3_2", "norm": "bn",
                     "predict_clip": False}):
        config = Config.from_params(**{**TINY, **changes})
        model = build_model(config.model, frame_hw=(18, 37), frame_count=4)
        embeddings = torch.randn(4, 2, 1, 2, generator=torch.Generator().manual_seed(0)) \
            if model.kind == "hybrid" else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "v.hnerv"
            encode_video(model, embeddings, path, config=config,
                         about=About("a", [0.0, 0.04, 0.08, 0.2]),
                         field=head if changes.get("modelsize") else None)
            files.append(path.read_bytes())
    return [*files, VERSION_1.read_bytes()]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A file with something wrong, in half of the cases with right checksums."""
    version = data[7]
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    if version == 1:
        return _mutate_version1(data, rng)
    return _mutate_version2(data, rng)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, left out, put in or moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if data else 0
        length = min(rng.choice((1, 1, 2, 4, 8, 64)), len(data) - at)
        kind = rng.randrange(7)
        if kind < 2 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at + length] = rng.randbytes(length)
        elif kind == 3:
            del data[at:at + length]
        elif kind == 4:
            data[at:at] = rng.randbytes(length)
        elif kind == 5:
            data = data[:at] if rng.random() < 0.5 else data + data[at:at + length]
        else:
            data[at:at + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * length
    return bytes(data)


def _mutate_json(value, rng: random.Random) -> None:
    """Change one thing somewhere within lists and objects."""
    places = []

    def walk(node) -> None:
        for key in (node if isinstance(node, dict) else range(len(node))):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind < 4:
        node[key] = copy.deepcopy(rng.choice(ODD))  # lists in it are changed later
    elif kind == 4 and type(node[key]) in (int, float):
        node[key] = node[key] * rng.choice((0, 2, -1, 100)) + rng.choice((0, 1, -1))
    elif kind == 5:
        del node[key]
    elif kind == 6:
        other, other_key = rng.choice(places)
        if isinstance(other, type(node)):
            node[key] = json.loads(json.dumps(other[other_key]))
    elif isinstance(node, list):
        node.insert(key, json.loads(json.dumps(node[key])))
    else:
        node[str(rng.choice(ODD))[:40]] = copy.deepcopy(rng.choice(ODD))


def _mutate_packed(data: bytes, at: int, size: int, rng: random.Random) -> bytes:
    """Change what zlib packed at a place of a part, and pack it again."""
    try:
        text = zlib.decompress(data[at:at + size])
    except zlib.error:
        return mutate_bytes(data, rng)
    return mutate_bytes(text, rng)


def _mutate_version2(data: bytes, rng: random.Random) -> bytes:
    _, packed_size, _, _ = START.unpack_from(data)
    at = START.size + packed_size
    meta = json.loads(zlib.decompress(data[START.size:at]))
    parts = []
    for name, size, _ in meta.pop("parts"):
        parts.append((name, data[at:at + size]))
        at += size
    kind = rng.randrange(6)
    if kind < 2:
        for _ in range(rng.choice((1, 1, 2, 3))):
            _mutate_json(meta, rng)
    elif kind == 2:
        i = rng.randrange(len(parts))
        parts[i] = (parts[i][0], mutate_bytes(parts[i][1], rng))
    elif kind == 3:  # inside the packed bounds or histograms
        i = rng.randrange(len(parts))
        name, part = parts[i]
        if name == "histograms":
            text = _mutate_packed(part, 4, len(part), rng)
            part = struct.pack("<I", len(text)) + zlib.compress(text)
        elif "/" not in name:
            size, = struct.unpack_from("<I", part, 4)
            text = _mutate_packed(part, 8, size, rng)
            if rng.random() < 0.5:  # of the right length
                wanted, = struct.unpack_from("<I", part)
                text = text[:wanted].ljust(wanted, b"\x7c")
            again = zlib.compress(text)
            part = struct.pack("<II", len(text), len(again)) + again + part[8 + size:]
        parts[i] = (name, part)
    elif kind == 4:  # parts missing, repeated, moved, renamed
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        change = rng.randrange(4)
        if change == 0:
            del parts[i]
        elif change == 1:
            parts.insert(i, parts[j])
        elif change == 2:
            parts[i], parts[j] = parts[j], parts[i]
        else:
            parts[i] = (parts[i][0], parts[j][1])
    else:  # the header's text or its packed form, digests made right
        text = json.dumps({**meta, "parts": [[n, len(d), hashlib.blake2b(
            d, digest_size=16).hexdigest()] for n, d in parts]}).encode()
        text = mutate_bytes(text, rng)
        packed = zlib.compress(text)
        if rng.random() < 0.3:
            packed = mutate_bytes(packed, rng)
        size = len(text) if rng.random() < 0.8 else rng.choice((0, 1, 2**31, 2**32 - 1))
        body = START.pack(data[:8], len(packed), size,
                          hashlib.blake2b(packed, digest_size=32).digest())
        body += packed + b"".join(d for _, d in parts)
        return body + hashlib.blake2b(body, digest_size=END_SIZE).digest()
    try:
        return pack_file(meta, parts)
    except (ValueError, RecursionError):  # a lone surrogate, say
        return data[:-1]


def _mutate_version1(data: bytes, rng: random.Random) -> bytes:
    size, = struct.unpack_from("<I", data, 12)
    header, body = json.loads(zlib.decompress(data[16:16 + size])), data[16 + size:]
    kind = rng.randrange(4)
    if kind < 2:
        for _ in range(rng.choice((1, 1, 2, 3))):
            _mutate_json(header, rng)
    elif kind == 2:
        body = mutate_bytes(body, rng)
    else:  # a histogram
        at = 0
        chosen = rng.randrange(len(header["tensors"]))
        for i, (_, _, bounds, dtype, _, coded) in enumerate(header["tensors"]):
            count = 1
            for n in bounds:
                count *= n
            at += 2 * count * (4 if dtype == "<f4" else 2)
            if i == chosen:
                table, = struct.unpack_from("<I", body, at)
                text = _mutate_packed(body, at + 4, table, rng)
                if rng.random() < 0.5:
                    text = text[:1024].ljust(1024, b"\x01")
                again = zlib.compress(text)
                header["tensors"][i][5] = coded - table + len(again)
                body = body[:at] + struct.pack("<I", len(again)) + again + body[at + 4 + table:]
                break
            at += coded
    packed = zlib.compress(json.dumps(header).encode())
    rest = struct.pack("<I", len(packed)) + packed + body
    return data[:8] + struct.pack("<I", zlib.crc32(rest)) + rest


def read(path: Path, rng: random.Random) -> str:
    """Read a file in one of the ways there are: what came of it, `refused` or `read`.

    Any other exception than the documented one goes through.
    """
    try:
        if rng.random() < 0.7:
            decode_video(path)
        else:
            stored = StoredNetwork(path)
            if stored.chunk:
                stored.embeddings(rng.randrange(4), rng.randrange(1, 6))
            stored.load(("decoder.", "clip_head."))
            if stored.field is not None:
                stored.load_field()
            stored.header.times()
    except FileError:
        return "refused"
    return "read"


def fuzz(count: int, *, seed: int) -> Counter:
    """Read so many damaged files; counts of outcomes."""
    seeds, outcomes = make_seeds(), Counter()
    build = functools.lru_cache(64)(network._without_memory)  # the same network again and again
    network._without_memory = lambda *args: copy.deepcopy(build(*args))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    try:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            path = Path(own) / "v.hnerv"
            for number in range(count):
                rng = random.Random(seed * 2**32 + number)
                path.write_bytes(mutate(rng.choice(seeds), rng))
                signal.setitimer(signal.ITIMER_PROF, TIME_S)  # its signal ends the process
                try:
                    outcomes[read(path, rng)] += 1
                except Exception as error:
                    error.add_note(f"file {number} of seed {seed}")
                    raise
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        network._without_memory = build.__wrapped__
        resource.setrlimit(resource.RLIMIT_AS, before)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.count} files of seed {args.seed}: {dict(fuzz(args.count, seed=args.seed))}")


if __name__ == "__main__":
    sys.exit(main())
