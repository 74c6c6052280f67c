"""Where a training step's time goes, by part: kernel times on a GPU, wall clock on a CPU.

A step runs outside its CUDA graph, with marks where its parts begin. A kernel belongs to the part
that was under way when it was launched; it runs alone or nearly so, since launching takes longer
than most kernels. In the graph, kernels run beside each other, which slows each of them.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from hnerv_clip.devices import synchronise
from hnerv_clip.engines.plain import PlainEngine

PREFIX = "part of a step: "
PARTS = ENCODER, DECODER, RGB, CLIP, BACK, ENCODER_BACK, OPTIMIZER, REST = (
    "encoder, forward", "decoder, forward", "RGB head and loss", "CLIP head, both ways",
    "decoder and RGB head, back", "encoder, back", "optimizer", "the rest")


LR = 1e-4  # of the steps that are measured


class Marks:
    """Says which part of a step is under way."""

    def __init__(self):
        self.open = [REST]

    def at(self, part: str) -> None:
        """The part begins, and lasts until the next mark."""
        self.open[-1] = part
        with record_function(PREFIX + part):
            pass

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """The part lasts as long as this context; then the one around it goes on."""
        self.open.append(part)
        self.at(part)
        try:
            yield
        finally:
            self.open.pop()
            self.at(self.open[-1])

    def watch(self, owner: Any, **parts: str) -> None:
        """Let calls of methods be parts: method=part."""
        for name, part in parts.items():
            setattr(owner, name, self.inside(part)(getattr(owner, name)))

    def before(self, owner: Any, method: str, part: str) -> None:
        """Let a part begin with the gradient at what a method returned."""
        call = getattr(owner, method)

        def watched(*args, **kwargs) -> Tensor:
            result = call(*args, **kwargs)
            if result.requires_grad:
                result.register_hook(lambda gradient: self.at(part))
            return result
        setattr(owner, method, watched)


def mark_engine(engine: PlainEngine, marks: Marks) -> None:
    """Mark the parts of an engine's steps; it serves for nothing else afterwards."""
    if engine.decodes:
        network = engine.networks[engine.part]
        marks.watch(engine, _embed=ENCODER, _clip_gradients=CLIP, _pixel_gradients=RGB)
        marks.watch(network, decode=DECODER, backward=BACK, _encoder_backward=ENCODER_BACK)
        marks.watch(engine.parameters, update=OPTIMIZER)
        return
    marks.watch(engine.model, embed=ENCODER, stages=DECODER)
    marks.before(engine.model, "embed", ENCODER_BACK)
    marks.before(engine.model, "rgb", BACK)
    if engine.config.model.predict_clip:
        marks.watch(engine, clip=CLIP)
    marks.watch(engine, frame_losses=RGB)  # what is in no part of its own
    marks.watch(engine.optimizer, step=OPTIMIZER)
    losses = engine.frame_losses

    def and_back(indices: Tensor) -> Tensor:
        columns = losses(indices)
        marks.at(CLIP if engine.config.model.predict_clip else RGB)  # the way back begins there
        return columns
    engine.frame_losses = and_back


def profile_step(engine: PlainEngine, indices: Tensor, *, weight: float, repeats: int = 5
                 ) -> dict[str, float]:
    """Milliseconds of each part of a step, the mean of some repeats.

    Args:
        indices: int64 [B] frames, on the device.
        weight: λ of the cosine term.
    """
    marks, count = Marks(), len(indices)

    def step() -> None:
        marks.at(REST)
        if engine.decodes:
            engine._update((count, count))  # not the graph
        else:
            engine.step(indices, count=count, lr=LR, weight=weight)

    engine.step(indices, count=count, lr=LR, weight=weight)  # also makes all that is made once
    mark_engine(engine, marks)
    step()
    synchronise(engine.device)
    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + on_gpu * [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
            synchronise(engine.device)
        marks.at(REST)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {part: ms / repeats for part, ms in part_times(events, on_gpu=on_gpu).items()}


def part_times(events: list[dict[str, Any]], *, on_gpu: bool) -> dict[str, float]:
    """Milliseconds of `PARTS` in a trace, those that have any.

    Args:
        events: of the profiler's trace, times in µs.
        on_gpu: add up kernels; else the wall clock from mark to mark.
    Raises:
        RuntimeError: a kernel whose launch is not in the trace.
    """
    marks = sorted((event["ts"], event["name"].removeprefix(PREFIX)) for event in events
                   if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX))
    sums = dict.fromkeys(PARTS, 0.0)
    if not on_gpu:
        for (start, part), (end, _) in zip(marks, marks[1:]):
            sums[part] += (end - start) / 1e3
        return {part: ms for part, ms in sums.items() if ms}
    launched = {event["args"]["correlation"]: event["ts"] for event in events
                if event.get("cat") in ("cuda_runtime", "cuda_driver")}
    starts = [start for start, _ in marks]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            start = launched.get(event["args"]["correlation"])
            if start is None:
                raise RuntimeError(f"the profiler has no launch of the kernel {event['name']}")
            place = bisect_right(starts, start) - 1
            sums[marks[place][1] if place >= 0 else REST] += event["dur"] / 1e3
    return {part: ms for part, ms in sums.items() if ms}
