"""Where a training step's time goes, by part: kernel times on a GPU, wall clock on a CPU.

A step runs outside its CUDA graph; the engines mark where its parts begin, see
`engines.profile_marks`. A kernel belongs to the part that was under way when it was launched; it
runs alone or nearly so, since launching takes longer than most kernels. In the graph, kernels run
beside each other, which slows each of them.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hnerv_clip.devices import synchronise
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.engines.profile_marks import BEGIN, PARTS, PREFIX, REST, span

LR = 1e-4  # of the steps that are measured


def profile_step(engine: PlainEngine, indices: Tensor, *, weight: float, repeats: int = 5
                 ) -> dict[str, float]:
    """Milliseconds of each part of a step, the mean of some repeats.

    Args:
        indices: int64 [B] frames, on the device.
        weight: λ of the cosine term.
    """
    settings = dict(count=len(indices), lr=LR, weight=weight)
    engine.step(indices, **settings)  # makes all that is made once
    engine.eager_step(indices, **settings)
    synchronise(engine.device)
    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + on_gpu * [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            with span(REST):
                engine.eager_step(indices, **settings)
                synchronise(engine.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {part: ms / repeats for part, ms in part_times(events, on_gpu=on_gpu).items()}


def part_changes(events: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """(time in µs, the part that is under way from then on), in order, from a trace's marks."""
    moments = []
    for event in events:
        if event.get("cat") != "user_annotation":
            continue
        start, name = event["ts"], event["name"]
        if name.startswith(BEGIN):
            moments.append((start, 1, 0.0, name.removeprefix(BEGIN)))
        elif name.startswith(PREFIX):
            end = start + event["dur"]
            # Of one moment: spans end, then the longest begins first
            moments += [(start, 2, -end, name.removeprefix(PREFIX)), (end, 0, 0.0, "")]
    changes, under_way = [], [REST]
    for time, kind, _, part in sorted(moments):
        if kind == 0:
            under_way.pop()
        elif kind == 1:
            under_way[-1] = part
        else:
            under_way.append(part)
        changes.append((time, under_way[-1]))
    return changes


def part_times(events: list[dict[str, Any]], *, on_gpu: bool) -> dict[str, float]:
    """Milliseconds of `PARTS` in a trace, those that have any.

    Args:
        events: of the profiler's trace, times in µs.
        on_gpu: add up kernels; else the wall clock from change to change.
    Raises:
        RuntimeError: a kernel whose launch is not in the trace.
    """
    changes = part_changes(events)
    sums = dict.fromkeys(PARTS, 0.0)
    if not on_gpu:
        for (start, part), (end, _) in zip(changes, changes[1:]):
            sums[part] += (end - start) / 1e3
        return {part: ms for part, ms in sums.items() if ms}
    launched = {event["args"]["correlation"]: event["ts"] for event in events
                if event.get("cat") in ("cuda_runtime", "cuda_driver")}
    starts = [start for start, _ in changes]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            start = launched.get(event["args"]["correlation"])
            if start is None:
                raise RuntimeError(f"the profiler has no launch of the kernel {event['name']}")
            last = bisect_right(starts, start) - 1
            sums[changes[last][1] if last >= 0 else REST] += event["dur"] / 1e3
    return {part: ms for part, ms in sums.items() if ms}
