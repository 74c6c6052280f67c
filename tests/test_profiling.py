"""Kernels are counted to the part that launched them, and every engine's steps have all parts."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")  # made for Linux; without it training is plain

from test_engine import build, tiny  # noqa: F401  (a fixture)

from hnerv_clip.bench.profiling import part_changes, part_times, profile_step
from hnerv_clip.engines.fused.engine import FusedEngine
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.engines.profile_marks import (
    BEGIN,
    CLIP,
    DECODER,
    ENCODER,
    PARTS,
    PREFIX,
    REST,
    begin_backward,
    span,
)
from hnerv_clip.engines.select import make_engine
from hnerv_clip.model import build_model


def mark(start, end, part, prefix=PREFIX):
    return {"cat": "user_annotation", "name": prefix + part, "ts": start, "dur": end - start}


def kernel(launch, duration, *, number, launched_by="cuda_driver"):
    return [{"cat": launched_by, "name": "launch", "ts": launch, "args": {"correlation": number}},
            {"cat": "kernel", "name": "k", "ts": launch + 1000, "dur": duration,
             "args": {"correlation": number}}]


def test_kernels_belong_to_the_part_that_launched_them():
    events = [mark(50.0, 70.0, DECODER), mark(10.0, 40.0, ENCODER), {"name": "anything"},
              *kernel(20.0, 3000.0, number=1), *kernel(30.0, 500.0, number=2),
              *kernel(60.5, 250.0, number=3, launched_by="cuda_runtime"),
              *kernel(5.0, 1.0, number=4), *kernel(45.0, 2.0, number=5)]
    assert part_times(events, on_gpu=True) == {ENCODER: 3.5, DECODER: 0.25, REST: 0.003}
    with pytest.raises(RuntimeError, match="no launch of the kernel k"):
        part_times([events[0], kernel(60.0, 1.0, number=9)[1]], on_gpu=True)


def test_without_kernels_the_wall_clock_counts():
    events = [mark(10.0, 90.0, REST), mark(10.0, 40.0, ENCODER), mark(50.0, 80.0, DECODER),
              mark(55.0, 60.0, CLIP)]
    assert part_times(events, on_gpu=False) == {
        ENCODER: 0.03, DECODER: 0.025, CLIP: 0.005, REST: 0.02}


def test_spans_go_on_after_those_inside_and_parts_begin_within_them():
    events = [mark(0.0, 100.0, ENCODER), mark(10.0, 20.0, DECODER), mark(30.0, 30.1, CLIP, BEGIN)]
    assert part_changes(events) == [(0.0, ENCODER), (10.0, DECODER), (20.0, ENCODER), (30.0, CLIP),
                                    (100.0, REST)]


def test_nothing_is_marked_without_a_profiler():
    x = torch.ones(1, requires_grad=True)
    begin_backward(x, CLIP)
    assert not x._backward_hooks
    with torch.profiler.profile() as profiler:
        with span(DECODER):
            pass
        begin_backward(x, CLIP)
        x.sum().backward()
    with span(ENCODER):
        pass
    named = {event.key for event in profiler.key_averages()}
    assert {PREFIX + DECODER, BEGIN + CLIP} <= named and PREFIX + ENCODER not in named


@pytest.mark.parametrize("clip_head", [True, False])
def test_a_plain_step_has_every_part_and_stays_the_same(small_config, small_dataset, clip_head):
    config = small_config.replace(predict_clip=clip_head)
    indices, losses = torch.tensor([0, 1]), []
    for profiled in (False, True):
        model = build_model(config.model, frame_hw=(80, 160), frame_count=12, seed=0)
        engine = make_engine(config, model, small_dataset, autocast=torch.float32)
        assert isinstance(engine, PlainEngine)
        with torch.profiler.profile() if profiled else nullcontext():
            losses.append(torch.stack([engine.step(indices, count=2, lr=1e-3, weight=0.5)
                                       for _ in range(2)]))
    assert torch.equal(*losses)
    times = profile_step(engine, indices, weight=0.5, repeats=1)
    assert set(times) == {part for part in PARTS if clip_head or part != CLIP}


def test_a_fused_step_has_every_part(tiny):  # noqa: F811
    config, dataset = tiny
    engine = build(FusedEngine, config, dataset)
    times = profile_step(engine, torch.tensor([0, 1]), weight=0.5, repeats=1)
    assert set(times) == set(PARTS)
