"""Training that collapses is noticed, and goes on with a lower learning rate or stops; never
quietly."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from hnerv_clip.dataset import inpainting_mask, load_dataset
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.losses import pixel_loss
from hnerv_clip.model import build_model
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.train import TrainError, train
from hnerv_clip.train import trainer as train_module
from hnerv_clip.train.divergence import Baselines, Diverged, check_collapse, measure_baselines

# PSNR of epochs of the network below, at several learning rates; a single color has 12.54 dB
MEASURED = {
    5.0: [7.163, 6.014, 6.014, 6.014, 6.014, 6.014, 6.014, 6.014, 6.014, 6.014],
    0.5: [8.361, 6.041, 6.09, 5.965, 5.908, 5.844, 5.81, 5.799, 5.789, 5.784],
    0.05: [12.094, 12.51, 13.802, 12.885, 12.567, 14.191, 15.019, 15.221, 15.589, 16.635],
    0.005: [11.842, 12.247, 13.305, 14.236, 15.039, 16.205, 17.085, 17.854, 18.064, 18.515],
    0.0002: [11.809, 11.816, 11.83, 11.85, 11.875, 11.906, 11.95, 12.01, 12.098, 12.223],
    1e-6: [11.808, 11.808, 11.808, 11.808, 11.808, 11.809, 11.809, 11.809, 11.809, 11.809],
}
TINY = dict(resize_list="40_80", enc_strds="5 4 2", dec_strds="5 4 2", modelsize=0.03,
            predict_clip=False, epochs=14, eval_freq=3, checkpoint_s=1000)


def rows(psnr_db, *, clip=None):
    """A history of epochs with these PSNRs, and from `clip` on with a cosine term of 0.1."""
    losses = [10 ** (-db / 10) for db in psnr_db]
    return [{"epoch": i, "pixel_loss": loss, "clip_weight": 0.5 * (clip is not None and i >= clip),
             "total_loss": loss + 0.1 * (clip is not None and i >= clip)}
            for i, loss in enumerate(losses, 1)]


def found(history, *, final=False, warm_up=0.0):
    """(epoch in which a collapse is noticed, epoch that first shows it), or None."""
    for count in range(1, len(history) + 1):
        try:
            check_collapse(history[:count], Baselines(10 ** -1.254, 10 ** -1.181),
                           warm_up=warm_up, final=final and count == len(history))
        except Diverged as error:
            return count, error.fell_at
    return None


@pytest.mark.parametrize("lr", MEASURED)
def test_dead_networks_are_told_from_slow_ones(lr):
    assert found(rows(MEASURED[lr])) == ((5, 1) if lr >= 0.5 else None)
    assert found(rows(MEASURED[lr]), final=True) == ((5, 1) if lr >= 0.5 else None)
    assert found(rows(MEASURED[lr]), warm_up=3) == ((8, 1) if lr >= 0.5 else None)


def test_a_fall_in_the_middle_is_noticed_and_a_dip_is_not():
    climb = [20.0, 25.0, 28.0, 29.0, 30.0]
    assert found(rows(climb + 5 * [12.28])) == (10, 6)  # as at lr=0.004, batch 2, on bunny
    assert found(rows(climb + 5 * [24.0])) == (10, 6)  # above a single color, and no way back
    assert found(rows(climb + [12.28, 20.0, 22.0, 24.0, 25.0, 26.0, 28.0])) is None
    assert found(rows(climb + [27.5] * 20)) is None  # what the CLIP head may cost
    assert found(rows(climb + [12.28]), final=True) == (6, 6)


def test_the_phases_of_training_are_judged_apart():
    assert found(rows([20.0, 25.0, 28.0, 29.0] + 12 * [30.0], clip=6)) is None
    assert found(rows([25.0, 30.0] + 12 * [12.28], clip=5)) == (7, 3)


def test_a_network_that_dies_before_it_has_learned_is_noticed():
    """As on a video that begins in black: it fell to black pictures, better than initial ones."""
    baselines = Baselines(color=0.0301, untrained=0.121)
    losses = [0.1208, 0.04655213] + 6 * [0.04655214]
    history = [dict(row, pixel_loss=loss, total_loss=loss)
               for row, loss in zip(rows([10.0] * len(losses)), losses)]
    check_collapse(history[:5], baselines, warm_up=0.8, final=False)
    with pytest.raises(Diverged, match="single color") as error:
        check_collapse(history[:6], baselines, warm_up=0.8, final=False)
    assert error.value.fell_at == 2
    # neither pictures that are better than one color, nor those of a video of one color
    check_collapse(history, baselines._replace(color=0.06), warm_up=0.8, final=True)
    gray = [dict(row, pixel_loss=2e-6, total_loss=2e-6) for row in history]
    check_collapse(gray, Baselines(color=1e-6, untrained=0.1), warm_up=0.8, final=True)


def test_short_and_slow_runs_are_none():
    """An untrained network may be worse than gray, and a few steps may not change that."""
    baselines = Baselines(color=0.01, untrained=0.3)
    for losses in ([0.31], [0.29, 0.31], 8 * [0.3], [0.3 - 1e-5 * epoch for epoch in range(20)]):
        history = [dict(row, pixel_loss=loss, total_loss=loss)
                   for row, loss in zip(rows([10.0] * len(losses)), losses)]
        check_collapse(history, baselines, warm_up=0, final=True)
    with pytest.raises(Diverged, match="single color"):
        check_collapse([dict(rows([10.0])[0], pixel_loss=0.8, total_loss=0.8)], baselines,
                       warm_up=0, final=True)


@pytest.mark.parametrize("params", [{}, {"loss": "L1", "inpaint_size": 10}, {"norm": "bn"}])
def test_baselines_by_hand(small_config, small_dataset, params):
    config = small_config.replace(**params)
    dataset = replace(small_dataset, mask=inpainting_mask((80, 160), config.train.inpaint_size))
    model = build_model(config.model, frame_hw=(80, 160), frame_count=12)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    engine = PlainEngine(config, model, dataset, autocast=torch.float32)
    color, untrained = measure_baselines(engine, dataset.split.train)
    known = dataset.video.frames[dataset.split.train].float() / 255
    picture = known.mean((0, 2, 3)).view(1, 3, 1, 1).expand_as(known)
    expected = pixel_loss(picture, known, loss=config.train.loss, mask=dataset.mask).mean().item()
    assert color == pytest.approx(expected, rel=1e-4)
    model.eval()
    with torch.no_grad():
        losses = [engine.frame_losses(torch.tensor([i]))[0].item() for i in dataset.split.train]
    assert untrained == pytest.approx(sum(losses) / len(losses), rel=0.15)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def tiny(small_config, cache_dir):
    config = small_config.replace(**TINY, lr=0.5)
    return config, load_dataset(config, cache_dir)


@pytest.fixture(scope="module")
def recovered(tiny, tmp_path_factory):
    config, dataset = tiny
    with pytest.warns(UserWarning, match="training collapsed: .*single color.*back to epoch 0"):
        return train(config, tmp_path_factory.mktemp("recovered") / "run", progress=False,
                     dataset=dataset)


def test_a_collapsed_run_recovers_with_a_lower_learning_rate(recovered):
    run, metrics = RunDir(recovered.run_dir), recovered.metrics
    notes = run.provenance()["recoveries"]
    assert [note["lr"] for note in notes] == [0.25, 0.0625, 0.0078125][:len(notes)]
    assert notes[0]["epoch"] == 6 and notes[0]["back_to_epoch"] == 0
    assert list(metrics.epoch) == list(range(1, 15)) and metrics.lr.max() <= notes[-1]["lr"]
    assert metrics.psnr_db.iloc[-1] > 12.6 and recovered.summary["eval_psnr_train"] > 12.6
    assert "training collapsed" in (run.path / "rank0.txt").read_text(encoding="utf-8")
    assert run.load_checkpoint("model_latest.pth")["recoveries"] == notes


@pytest.mark.parametrize("written", [False, True])
def test_a_kill_during_recovery_changes_nothing(tiny, recovered, tmp_path, monkeypatch, written):
    """Interrupted just before, or just after the file that holds the recovered state."""
    config, dataset = tiny
    save, left = RunDir.save_checkpoint, 2

    def interrupted(self, name, state):
        nonlocal left
        due = name == "model_latest.pth" and state["recoveries"] and not state["batch"] and left
        left -= bool(due)
        if not due or written:
            save(self, name, state)
        if due:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "save_checkpoint", interrupted)
    with pytest.warns(UserWarning, match="training collapsed"):
        for _ in range(3):
            try:
                result = train(config, tmp_path / "run", progress=False, dataset=dataset)
            except KeyboardInterrupt:
                continue
    assert left == 0
    for name, value in RunDir(recovered.run_dir).load_checkpoint()["model"].items():
        assert torch.equal(RunDir(result.run_dir).load_checkpoint()["model"][name], value), name
    columns = ["epoch", "step", "lr", "pixel_loss", "psnr_db", "eval_psnr_all"]
    pd.testing.assert_frame_equal(result.metrics[columns], recovered.metrics[columns], rtol=1e-6)


def test_or_it_stops_with_an_error_and_can_still_recover(tiny, tmp_path, monkeypatch):
    config, dataset = tiny
    for _ in range(2):  # also when it is asked to go on
        with pytest.raises(TrainError, match="no better than a single color.*lower lr than 0.5 in "
                                             "another outf, or again in this one with "
                                             "on_divergence='recover'"):
            train(config.replace(on_divergence="stop"), tmp_path / "run", progress=False,
                  dataset=dataset)
    monkeypatch.setattr(train_module, "LR_FACTORS", (0.9, 0.8))
    with pytest.warns(UserWarning), pytest.raises(TrainError, match="lr than 0.5, 0.45, 0.4 in"):
        train(config, tmp_path / "run", progress=False, dataset=dataset)


def test_a_run_goes_back_to_its_best_model(tiny, tmp_path, monkeypatch):
    """Weights are ruined after the evaluation of epoch 3: it goes on from there."""
    config, dataset = tiny
    step, taken = PlainEngine.step, 0

    def ruined(self, *args, **settings):
        nonlocal taken
        taken += 1
        if taken == 4 * 5 + 1:
            with torch.no_grad():
                self.model.rgb_head.bias += 100
        return step(self, *args, **settings)

    monkeypatch.setattr(PlainEngine, "step", ruined)
    with pytest.warns(UserWarning, match="back to epoch 3 with lr=0.0025"):
        result = train(config.replace(lr=0.005), tmp_path / "run", progress=False, dataset=dataset)
    assert list(result.metrics.epoch) == list(range(1, 15))
    assert result.metrics.psnr_db.iloc[-1] > result.metrics.psnr_db.iloc[2] > 12.6
