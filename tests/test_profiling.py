"""Kernels are counted to the part that launched them, and every engine's steps have all parts."""

import pytest
import torch

pytest.importorskip("triton")  # made for Linux; without it training is plain

from test_engine import build, tiny  # noqa: F401  (a fixture)

from hnerv_clip.bench.profiling import (
    CLIP,
    DECODER,
    ENCODER,
    PARTS,
    PREFIX,
    REST,
    Marks,
    mark_engine,
    part_times,
    profile_step,
)
from hnerv_clip.engines.fused.engine import FusedEngine
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.engines.select import make_engine
from hnerv_clip.model import build_model


def mark(ts, part):
    return {"cat": "user_annotation", "name": PREFIX + part, "ts": ts, "dur": 1}


def kernel(launch, duration, *, number, launched_by="cuda_driver"):
    return [{"cat": launched_by, "name": "launch", "ts": launch, "args": {"correlation": number}},
            {"cat": "kernel", "name": "k", "ts": launch + 1000, "dur": duration,
             "args": {"correlation": number}}]


def test_kernels_belong_to_the_part_that_launched_them():
    events = [mark(50.0, DECODER), mark(10.0, ENCODER), {"name": "anything"},
              *kernel(20.0, 3000.0, number=1), *kernel(30.0, 500.0, number=2),
              *kernel(60.5, 250.0, number=3, launched_by="cuda_runtime"),
              *kernel(5.0, 1.0, number=4)]
    assert part_times(events, on_gpu=True) == {ENCODER: 3.5, DECODER: 0.25, REST: 0.001}
    with pytest.raises(RuntimeError, match="no launch of the kernel k"):
        part_times([events[0], kernel(60.0, 1.0, number=9)[1]], on_gpu=True)


def test_without_kernels_the_wall_clock_counts():
    events = [mark(10.0, ENCODER), mark(50.0, DECODER), mark(60.0, ENCODER), mark(80.0, REST)]
    assert part_times(events, on_gpu=False) == {ENCODER: 0.06, DECODER: 0.01}


def test_parts_end_with_their_calls(monkeypatch):
    marks, said = Marks(), []
    monkeypatch.setattr(marks, "at", lambda part: said.append(part))

    class Engine:
        def step(self):
            return self.decode() + 1

        def decode(self):
            return 1

    engine = Engine()
    marks.watch(engine, step=ENCODER, decode=DECODER)
    assert engine.step() == 2
    assert said == [ENCODER, DECODER, ENCODER, REST]


@pytest.mark.parametrize("clip_head", [True, False])
def test_a_plain_step_has_every_part_and_stays_the_same(small_config, small_dataset, clip_head):
    config = small_config.replace(predict_clip=clip_head)
    indices, losses = torch.tensor([0, 1]), []
    for marked in (False, True):
        model = build_model(config.model, frame_hw=(80, 160), frame_count=12, seed=0)
        engine = make_engine(config, model, small_dataset, autocast=torch.float32)
        if marked:
            mark_engine(engine, Marks())
        losses.append(torch.stack([engine.step(indices, count=2, lr=1e-3, weight=0.5)
                                   for _ in range(2)]))
    assert torch.equal(*losses)
    engine = make_engine(config, model, small_dataset, autocast=torch.float32)
    assert isinstance(engine, PlainEngine)
    times = profile_step(engine, indices, weight=0.5, repeats=1)
    assert set(times) == {part for part in PARTS if clip_head or part != CLIP}


def test_a_fused_step_has_every_part(tiny):  # noqa: F811
    config, dataset = tiny
    engine = build(FusedEngine, config, dataset)
    times = profile_step(engine, torch.tensor([0, 1]), weight=0.5, repeats=1)
    assert set(times) == set(PARTS)
