"""Fine-tuning for the file: smaller at the same quality, and the file is what was trained."""

import numpy as np
import pytest
import torch

from hnerv_clip.codec import decode_video, entropy
from hnerv_clip.evaluate import evaluate_stored, store_video
from hnerv_clip.inference import load_run
from hnerv_clip.stored.fine_tune import Tuner, estimate_bits, fine_tune


@pytest.fixture(scope="module")
def run(trained_run, cache_dir):
    return load_run(trained_run, cache_dir=cache_dir, device="cpu")


def test_the_estimate_is_near_what_the_coder_takes():
    generator = np.random.default_rng(0)
    scale = np.exp2(generator.uniform(-2, 3, (48, 1, 1)) + generator.uniform(-1, 1, (1, 64, 1)))
    levels = np.round(generator.laplace(size=(48, 64, 9)) * scale).astype(np.int32)
    classes = entropy.choose_classes(levels)
    coded = entropy.encode_levels(levels, classes, entropy.count_levels([(levels, classes)]))
    estimate = float(estimate_bits(torch.from_numpy(levels).float()))
    assert 8 * len(coded) == pytest.approx(estimate, rel=0.04)


def test_the_estimate_falls_with_the_levels():
    levels = (20 * torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))).round()
    levels.requires_grad_()
    estimate_bits(levels).backward()
    assert (levels.grad * levels.detach().sign() >= 0).all()  # a smaller level is cheaper
    assert float(estimate_bits(torch.zeros(7))) < 1


def test_fine_tuning_gives_fewer_bytes_and_keeps_quality(run, tmp_path):
    plain = store_video(run.model, run.dataset, tmp_path / "plain.hnerv", config=run.config)
    before = evaluate_stored(tmp_path / "plain.hnerv", run.dataset, device=torch.device("cpu"))[0]
    sizes = []
    for rate in (0.0002, 0.02):
        tuned = fine_tune(run.model, run.dataset, run.config, rate=rate, epochs=8, lr=2e-3,
                          progress=False)
        sizes.append(tuned.store(tmp_path / "tuned.hnerv", run.dataset, run.config))
        if rate == 0.02:
            assert tuned.history[-1]["rate_bpp"] < tuned.history[0]["rate_bpp"]
        else:
            stored, embeddings = decode_video(tmp_path / "tuned.hnerv")
            step = tuned.steps["decoder.1.conv.weight"]
            wanted = (tuned.model.decoder[1].conv.weight / step).round() * step
            torch.testing.assert_close(stored.decoder[1].conv.weight, wanted)
            after = evaluate_stored(tmp_path / "tuned.hnerv", run.dataset,
                                    device=torch.device("cpu"))[0]
            own = [t[(t.source == "encoder") & (t.split == "train")].psnr_db.mean()
                   for t in (before, after)]
            assert own[1] > own[0] - 0.2
            assert step.shape == (1, wanted.shape[1], 1, 1) and len(step.unique()) > 1
    assert sizes[1] < sizes[0] < plain


def test_a_target_is_reached_and_an_earlier_result_goes_on(run, tmp_path):
    options = {"rate": 0.001, "lr": 2e-3, "progress": False}
    first = fine_tune(run.model, run.dataset, run.config, epochs=30, target_bpp=2.6, **options)
    assert first.history[-1]["rate_bpp"] == pytest.approx(2.6, rel=0.03)
    size = first.store(tmp_path / "first.hnerv", run.dataset, run.config)
    assert 8 * size / (12 * 80 * 160) == pytest.approx(2.6, rel=0.1)
    on = fine_tune(run.model, run.dataset, run.config, epochs=1, start=first, **options)
    assert on.history[0]["pixel_loss"] < first.history[3]["pixel_loss"]
    with pytest.raises(ValueError, match="must be above 0"):
        fine_tune(None, None, None, rate=0.0, target_bpp=0.1)


def test_the_file_holds_the_network_that_was_fine_tuned(run, tmp_path):
    tuner = Tuner(run.model, run.dataset, run.config)
    tuned = fine_tune(run.model, run.dataset, run.config, rate=0.01, epochs=20, lr=2e-3,
                      progress=False, tuner=tuner)
    frames = torch.from_numpy(run.dataset.split.train)
    last = sum(tuner.step(batch, rate=0.0, lr=0.0, step_lr=0.0) for batch in
               frames.split(run.config.train.batch_size))[2] / len(frames)
    tuned.store(tmp_path / "tuned.hnerv", run.dataset, run.config)
    table = evaluate_stored(tmp_path / "tuned.hnerv", run.dataset, device=torch.device("cpu"))[0]
    own = table[(table.source == "encoder") & (table.split == "train")].psnr_db.mean()
    assert own == pytest.approx(float(last), abs=2e-3), "another network than in training"


def test_held_out_frames_are_not_fitted(run):
    from hnerv_clip.inference import embed_frames

    tuned = fine_tune(run.model, run.dataset, run.config, rate=0.001, epochs=1, progress=False)
    with torch.inference_mode():
        own = embed_frames(run.model, run.dataset)
    held_out = np.setdiff1d(np.arange(12), run.dataset.split.train)
    assert torch.equal(tuned.embeddings[held_out], own[held_out])
    assert not torch.equal(tuned.embeddings, own)


def test_rate_must_be_a_number():
    with pytest.raises(ValueError, match="0.002 is a good start"):
        fine_tune(None, None, None, rate=-1)


def test_a_compiled_step_rounds_steps_as_the_file_does():
    """A compiler leaves out a conversion to float16 and back; the file does not."""
    from hnerv_clip.codec.levels import stored_step
    from hnerv_clip.stored.fine_tune import as_stored

    generator = torch.Generator().manual_seed(0)
    steps = torch.empty(1, 500).uniform_(-14, 2, generator=generator).exp2()
    in_range = torch.cat([steps, torch.tensor([[1.0, 1 + 2**-11, 1 + 3 * 2**-11, 2.0**15]])], 1)
    torch.testing.assert_close(stored_step(in_range), in_range.half().float(), rtol=0, atol=0)
    outside = stored_step(torch.tensor([1e-9, 1e9]))
    assert outside.tolist() == [2.0**-14, 2.0**15]
    compiled = torch.compile(lambda log_steps: as_stored(log_steps.exp()))(steps.log())
    torch.testing.assert_close(compiled, compiled.half().float(), rtol=0, atol=0)
    torch.compiler.reset()
