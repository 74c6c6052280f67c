"""Evaluation: interpolation by hand, tables of every source, and the summary."""

import numpy as np
import pandas as pd
import pytest
import torch

from hnerv_clip.bench.decoding import measure_decoding
from hnerv_clip.config import ConfigError
from hnerv_clip.evaluate import evaluate_model, evaluate_run, summarise
from hnerv_clip.inference import (
    decode_frames,
    frame_embeddings,
    interpolate_embeddings,
    load_run,
    predict_embeddings,
    sources_of,
)


@pytest.fixture(scope="module")
def run(trained_run, cache_dir):
    return load_run(trained_run, cache_dir=cache_dir, device="cpu")


def test_interpolation_by_hand():
    embeddings = torch.arange(6.0).view(6, 1, 1, 1) ** 2
    between = interpolate_embeddings(embeddings, np.array([1, 2, 5])).flatten()
    assert between.tolist() == pytest.approx([1, 1, 4, 4 + 7, 4 + 14, 25])
    embeddings[[0, 3, 4]] = float("nan")  # frames that did not train are not read
    assert torch.equal(interpolate_embeddings(embeddings, np.array([1, 2, 5])).flatten(), between)


def test_a_row_per_frame_and_source(run):
    table = evaluate_model(run.model, run.dataset)
    assert len(table) == 12 + len(run.dataset.split.val)
    interpolated = table[table.source == "interpolated"]
    assert interpolated.frame.tolist() == run.dataset.split.val.tolist()
    assert set(interpolated.split) == {"val"}
    assert table.ms_ssim.isna().all()  # 80 pixels are too few for its five scales
    assert table.clip_similarity.between(-1, 1).all()


def test_the_table_is_what_the_pictures_give(run):
    table = evaluate_model(run.model, run.dataset)
    frames = run.dataset.split.val.tolist()
    for source in ("encoder", "interpolated"):
        decoded = decode_frames(run.model, run.dataset, frames, source=source).float()
        error = (decoded - run.dataset.video.frames[frames].float()) / 255
        psnr = -10 * torch.log10(error.square().mean((1, 2, 3)))
        rows = table[(table.source == source) & table.frame.isin(frames)]
        assert rows.psnr_db.tolist() == pytest.approx(psnr.tolist(), abs=0.05)  # 8-bit pictures


def test_predicted_embeddings_give_the_tables_similarities(run):
    table = evaluate_model(run.model, run.dataset)
    predicted, target = predict_embeddings(run.model, run.dataset), run.dataset.embeddings
    own = table[table.source == "encoder"]
    assert own.clip_similarity.tolist() == pytest.approx(
        (predicted * target).sum(-1).mean(-1).tolist(), abs=1e-5)
    centre = target[run.dataset.split.train].mean((0, 1))
    centred = torch.cosine_similarity(predicted - centre, target - centre, dim=-1).mean(-1)
    assert own.clip_centred.tolist() == pytest.approx(centred.tolist(), abs=1e-5)
    with pytest.raises(ConfigError, match="encoder or interpolated"):
        predict_embeddings(run.model, run.dataset, source="coordinates")


def test_standalone_evaluation_repeats_the_runs_own(run):
    again = evaluate_run(run)
    own = pd.read_csv(run.run_dir.path / "evaluation.csv")
    pd.testing.assert_frame_equal(again, own, check_dtype=False, rtol=1e-4)


def test_embedding_frames_keeps_nothing_for_gradients(run):
    """Else every frame's activations stay in memory: 19 GB for bunny in full size."""
    for source in sources_of(run.model):
        assert not frame_embeddings(run.model, run.dataset, source).requires_grad


def test_some_frames_are_embedded_as_among_all(run):
    chosen = [0, 4, 9, 11]
    for source in sources_of(run.model):
        whole = frame_embeddings(run.model, run.dataset, source)
        torch.testing.assert_close(
            frame_embeddings(run.model, run.dataset, source, np.array(chosen)), whole[chosen])


def test_summary_by_hand():
    table = pd.DataFrame({
        "variant": "trained", "source": ["encoder"] * 3 + ["interpolated"], "frame": [0, 1, 2, 2],
        "split": ["train", "train", "val", "val"], "psnr_db": [30.0, 32.0, 20.0, 18.0]})
    summary = summarise(table).set_index(["source", "frames"])
    assert summary.psnr_db["encoder", "train"] == 31 and summary.n["encoder", "train"] == 2
    assert summary.psnr_db["encoder", "all"] == pytest.approx(82 / 3)
    assert summary.psnr_db["interpolated", "held_out"] == 18
    assert ("interpolated", "all") not in summary.index


def test_decoding_speed_has_every_mode(run):
    speed = measure_decoding(run.model, run.dataset, repeats=3)
    assert speed["mode"].tolist() == ["RGB", "RGB and embeddings", "embeddings only"]
    assert (speed.frames_per_s_min <= speed.frames_per_s).all()
    assert (speed.frames_per_s <= speed.frames_per_s_max).all()


def test_a_slow_machine_decodes_one_batch_a_pass(run, monkeypatch):
    decoded = []
    stages = type(run.model).stages
    monkeypatch.setattr(type(run.model), "stages", lambda model, chunk, **options: (
        decoded.append(len(chunk)), stages(model, chunk, **options))[1])
    for pass_s, batches in ((1e9, 8), (0, 1)):
        monkeypatch.setattr("hnerv_clip.bench.decoding.PASS_S", pass_s)
        decoded.clear()
        speed = measure_decoding(run.model, run.dataset, batch_size=2, repeats=3)
        assert set(decoded) == {2} and len(decoded) == 3 * (2 + 3 * batches)
        assert set(speed.n) == {3}
