"""What a header tells a reader, without reading more. Imports neither torch nor numpy."""

from __future__ import annotations

import math

from hnerv_clip.codec.container import Header


def header_facts(header: Header) -> dict[str, str]:
    """Names and values, in order, of what a reader wants to know of a stored video."""
    video, teacher, times = header.meta["video"], header.meta["teacher"], header.times()
    height, width = header.size
    values = _by_kind({entry[0]: math.prod(entry[1]) for entry in (
        *header.meta["tensors"], *header.meta["embeddings"][:1])})
    pixels = header.frame_count * height * width
    fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 25.0
    facts = {
        "video": video["name"] or "(no name)",
        "frames": str(header.frame_count),
        "size": f"{height} × {width} (height × width)",
        "duration": f"{times[-1] - times[0] + 1 / fps:.3f} s at {fps:.4g} frames a second",
        "file": f"{header.size_bytes:,} bytes, {8 * header.size_bytes / pixels:.4f} bits a pixel",
        "values": f"{_listed(values)}; "
                  f"{8 * header.size_bytes / max(sum(values.values()), 1):.2f} bits each",
        "search": teacher["label"] or teacher["settings"]["teacher"]
        if header.config.model.predict_clip or header.meta["heads"] else "no head for embeddings",
    }
    if header.parts:
        facts["bytes of parts"] = _listed(_by_kind(
            {name: part.size for name, part in header.parts.items()}))
    if header.meta["heads"]:
        facts["search"] += ", for any box"
    if teacher["weights"]:
        facts["teacher's weights"] = teacher["weights"]
    return facts | {"format": f"version {header.version}, {header.meta['writer']}"}


def _by_kind(counts: dict[str, int]) -> dict[str, int]:
    """Sums of what is counted of tensors or parts: the network, frame embeddings and a field."""
    of = {"network": 0, "embeddings": 0, "field": 0}
    for name, count in counts.items():
        kind = name.replace("/", ".").partition(".")[0]
        of[kind if kind in of else "network"] += count
    return of


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
