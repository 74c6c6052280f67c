"""What the fused engine measures and saves is what the plain model and PyTorch's Adam give."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")  # made for Linux; without it training is plain

from test_engine import VARIANTS, build, tiny  # noqa: F401  (a fixture)

from hnerv_clip.engines.fused.engine import FusedEngine
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.evaluate import evaluate_model, warm_up
from hnerv_clip.train import outputs, train
from hnerv_clip.train import trainer as train_module
from hnerv_clip.video import split_frames

STEP = dict(count=2, lr=1e-3, weight=0.5)


def first_frames(dataset, count, split):
    """The dataset cut to some frames."""
    video = replace(dataset.video, frames=dataset.video.frames[:count],
                    times_s=dataset.video.times_s[:count])
    return replace(dataset, video=video, embeddings=dataset.embeddings[:count],
                   split=split_frames(count, split))


@pytest.mark.parametrize("changes", [
    pytest.param(VARIANTS["loss and boxes"], marks=pytest.mark.slow), VARIANTS["xyt"],
    VARIANTS["pe"] | VARIANTS["pooled"], pytest.param(VARIANTS["padded"], marks=pytest.mark.slow)],
    ids=["hybrid with boxes", "xyt", "pe, pooled", "padded"])
def test_an_evaluation_by_the_engine_is_the_plain_models(tiny, changes):  # noqa: F811
    """Every source, between steps, of more frames than a batch has."""
    config, dataset = tiny
    config = config.replace(data_split="2_3_3", **changes)
    dataset = first_frames(dataset, 3, config.video.data_split)
    engine = build(FusedEngine, config, dataset)
    if config.train.inpaint_size:
        dataset = replace(dataset, mask=engine.mask)
    for _ in range(2):
        engine.step(torch.tensor([0, 1]), **STEP | {"lr": 1e-2})
        got = evaluate_model(engine.model, dataset, engine=engine)
        engine.sync()
        expected = evaluate_model(engine.model, dataset)
        assert got.columns.tolist() == expected.columns.tolist() and len(got) == len(expected)
        assert (got.psnr_db - expected.psnr_db).abs().max() < 0.001
        for name in {"clip_similarity", "clip_centred"} & set(got):
            assert (got[name] - expected[name]).abs().max() < 1e-4


@pytest.mark.gpu
def test_an_evaluation_in_bfloat16_is_near_the_plain_models(small_config, small_dataset):
    engine = build(FusedEngine, small_config, small_dataset, device="cuda",
                   autocast=torch.bfloat16)
    for step in range(40):
        engine.step(torch.arange(2, device="cuda") + step % 10, count=2, lr=5e-3, weight=0.5)
    got = evaluate_model(engine.model, small_dataset, engine=engine)
    engine.sync()
    expected = evaluate_model(engine.model, small_dataset)
    assert abs(got.psnr_db.mean() - expected.psnr_db.mean()) < 0.01
    assert (got.clip_similarity - expected.clip_similarity).abs().max() < 0.01


def test_the_optimizers_state_serves_both_engines(tiny):  # noqa: F811
    """Two steps by one engine, a third by the other that took over its state: as by one alone."""
    config, dataset = tiny
    batches = [torch.tensor(batch) for batch in ([0, 1], [2, 3], [4, 5])]
    alone = build(PlainEngine, config, dataset)
    for indices in batches:
        alone.step(indices, **STEP)
    for kinds in ((PlainEngine, PlainEngine), (PlainEngine, FusedEngine),
                  (FusedEngine, PlainEngine)):
        first, second = (build(kind, config, dataset) for kind in kinds)
        for indices in batches[:2]:
            first.step(indices, **STEP)
        first.sync()
        second.model.load_state_dict(first.model.state_dict())
        second.load_optimizer(first.optimizer.state_dict())
        second.step(batches[2], **STEP)
        second.sync()
        for (name, value), other in zip(alone.model.named_parameters(),
                                        second.model.parameters()):
            assert (other - value).norm() < 0.01 * value.norm() + 1e-3, (kinds, name)


def test_a_run_is_measured_by_its_engine_and_in_the_end_by_the_plain_model(
        tiny, tmp_path, monkeypatch):  # noqa: F811
    config, dataset = tiny
    config = config.replace(epochs=2, eval_freq=1, embed="pe_1.25_8", predict_clip=False)
    dataset = first_frames(dataset, 3, config.video.data_split)
    monkeypatch.setattr(train_module, "make_engine", FusedEngine)
    said = []
    evaluate = train_module.evaluate_model

    def listen(*args, engine=None, **kwargs):
        said.append(engine is not None)
        return evaluate(*args, engine=engine, **kwargs)

    for module in (train_module, outputs):
        monkeypatch.setattr(module, "evaluate_model", listen)
    result = train(config, tmp_path / "run", dataset=dataset, progress=False)
    assert said == [True, True, False]
    best = result.metrics.set_index("epoch").loc[result.summary["best_epoch"]]
    assert best.eval_psnr_all == pytest.approx(result.summary["eval_psnr_all"], abs=0.001)


def test_warming_up_leaves_the_model_as_it_is(tiny):  # noqa: F811
    config, dataset = tiny
    model = build(PlainEngine, config, dataset).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    warm_up(model, dataset)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_fused_engine_does_without_pytorchs_compiler():
    """Which takes seconds to import, and comes with every optimizer of PyTorch's."""
    script = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
from hnerv_clip import train
from hnerv_clip.engines.fused import engine
before = "torch._dynamo" in sys.modules
optimizer = engine.KernelOptimizer(torch.nn.Linear(2, 2))
optimizer.load_state_dict(optimizer.state_dict())
assert not before and "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
