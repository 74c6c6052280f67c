"""A field and its network fitted together: what changes, what does not, and going on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hnerv_clip import cli
from hnerv_clip.config import ConfigError
from hnerv_clip.field.fit_run import fit_head
from hnerv_clip.field.query import has_field, load_field, network_digest
from hnerv_clip.files import RunError, read_json, write_json
from hnerv_clip.inference import Run, load_run
from hnerv_clip.train import together, train
from hnerv_clip.train.together import TogetherSettings, fit_together

SETTINGS = TogetherSettings(weight=0.1, epochs=2, boxes=4)


def make_run(config, folder: Path, cache_dir) -> Run:
    config = config.replace(predict_clip=False, epochs=2, field_boxes=8, field_steps=40,
                            field_rank=8, field_hidden=16)
    train(config, folder, cache_dir=cache_dir, progress=False)
    run = load_run(folder, cache_dir=cache_dir, device="cpu")
    fit_head(run, cache_dir=cache_dir, device="cpu", progress=False)
    return run


@pytest.fixture(scope="module")
def run(small_config, small_dataset, cache_dir, tmp_path_factory) -> Run:
    return make_run(small_config, tmp_path_factory.mktemp("together") / "run", cache_dir)


@pytest.fixture(scope="module")
def by_adan(small_config, small_dataset, cache_dir, tmp_path_factory) -> Run:
    return make_run(small_config.replace(optimizer="adan", lr=5e-3),
                    tmp_path_factory.mktemp("together") / "run", cache_dir)


def go_on(run: Run, folder: Path, cache_dir, settings=SETTINGS):
    return fit_together(run, folder, settings=settings, cache_dir=cache_dir, progress=False)


@pytest.fixture(scope="module")
def joined(run, cache_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "joined"
    go_on(run, folder, cache_dir)
    return folder


def test_a_new_run_holds_the_changed_network_and_its_field(run, joined, cache_dir):
    before = run.run_dir.load_checkpoint()["model"]
    assert all(torch.equal(before[name], t) for name, t in run.model.state_dict().items())
    new = load_run(joined, cache_dir=cache_dir, device="cpu")
    assert network_digest(new.model) != network_digest(run.model)
    assert has_field(new.run_dir) and load_field(new).teacher["name"] == run.dataset.teacher_name
    assert new.config.model.head == "field"
    summary = new.run_dir.summary()
    assert summary["together"] == {"weight": 0.1, "epochs": 2, "lr_share": 0.2, "field_lr": 1e-3,
                                   "boxes": 4, "anew": False}
    assert summary["best_epoch"] == 4 and np.isfinite(summary["quantised_eval_psnr_all"])
    rows = new.run_dir.metrics()
    assert list(rows.epoch) == [3, 4]
    np.testing.assert_allclose(rows.total_loss, rows.pixel_loss + 0.1 * rows.clip_loss, rtol=1e-5)
    assert not (joined / together.STATE).exists()


def test_interrupted_and_resumed_it_ends_alike(run, joined, cache_dir, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        if args[0] >= 0.5:
            raise Stop
        return rate(*args, **kwargs)
    rate = together.learning_rate
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(together, "learning_rate", stop)
        go_on(run, tmp_path / "again", cache_dir)
    assert torch.load(tmp_path / "again" / together.STATE, weights_only=True)["epoch"] == 1
    go_on(run, tmp_path / "again", cache_dir)
    one, two = (load_run(folder, cache_dir=cache_dir, device="cpu").model.state_dict()
                for folder in (joined, tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_by_the_run_s_optimizer_it_resumes_alike(by_adan, cache_dir, tmp_path, monkeypatch):
    go_on(by_adan, tmp_path / "whole", cache_dir)
    test_interrupted_and_resumed_it_ends_alike(by_adan, tmp_path / "whole", cache_dir, tmp_path,
                                               monkeypatch)


def test_a_weight_of_0_goes_on_with_the_picture_alone(run, cache_dir, tmp_path, monkeypatch):
    engines = []

    class Kept(together.TogetherEngine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.before = [p.clone() for p in self.field.parameters()]
            engines.append(self)
    monkeypatch.setattr(together, "TogetherEngine", Kept)
    for weight in (0.0, 0.1):
        go_on(run, tmp_path / f"{weight}", cache_dir,
              TogetherSettings(weight=weight, epochs=1, boxes=4))
    alone, both = engines
    assert all(torch.equal(a, b) for a, b in zip(alone.before, alone.field.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(both.before, both.field.parameters()))
    one, two = (load_run(tmp_path / weight, cache_dir=cache_dir, device="cpu").model
                for weight in ("0.0", "0.1"))
    assert not torch.equal(one.decoder[0].conv.weight, two.decoder[0].conv.weight)


@pytest.mark.parametrize("optimized", ["run", "by_adan"])
def test_from_the_first_epoch_without_a_field_s_weight_is_training_itself(
        optimized, request, cache_dir, tmp_path):
    run = request.getfixturevalue(optimized)
    for weight in (0.0, 0.1):
        go_on(run, tmp_path / f"{weight}", cache_dir,
              TogetherSettings.from_first_epoch(run.config, weight=weight))
    trained = run.run_dir.load_checkpoint()["model"]
    assert all(torch.equal(trained[name], t) for name, t in run.model.state_dict().items())
    alone, both = (load_run(tmp_path / weight, cache_dir=cache_dir, device="cpu")
                   for weight in ("0.0", "0.1"))
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(both.model.decoder[0].conv.weight, trained["decoder.0.conv.weight"])
    rows = both.run_dir.metrics()
    assert list(rows.epoch) == [1, 2] and both.run_dir.summary()["best_epoch"] == 2
    assert rows.clip_loss[1] < rows.clip_loss[0] and has_field(both.run_dir)


def test_a_folder_of_before_there_was_anew_goes_on(run, joined, cache_dir):
    path = joined / together.SETTINGS
    asked = read_json(path, fix="")
    assert asked.pop("anew") is False
    write_json(path, asked)
    assert has_field(joined) and go_on(run, joined, cache_dir) is not None


def test_what_is_refused(run, joined, cache_dir, tmp_path):
    with pytest.raises(RunError, match=r"other settings.*weight: 0.1 there, 0.2 asked"):
        go_on(run, joined, cache_dir, TogetherSettings(weight=0.2, epochs=2, boxes=4))
    with pytest.raises(RunError, match="holds a.* run"):
        go_on(run, run.run_dir.path, cache_dir)
    for bad in ({"weight": -1.0}, {"weight": float("nan")}, {"epochs": 0}):
        with pytest.raises(ConfigError):
            TogetherSettings(**bad)


def test_the_command_line_fits_together(run, joined, cache_dir, tmp_path, capsys):
    outf, rest = str(run.run_dir.path), ["--cache_dir", str(cache_dir), "--device", "cpu"]
    new = tmp_path / "new"
    assert cli.main(["fit-head", outf, "--together", "0.02", "--epochs", "1", "--to", str(new),
                     "--no-measure", *rest]) == 0
    assert "parameters" in capsys.readouterr().out and has_field(new)
    assert read_json(new / together.SETTINGS, fix="")["weight"] == 0.02
    assert cli.main(["fit-head", outf, "--together", "0.02", *rest]) == 2
    assert "--to" in capsys.readouterr().err
    assert cli.main(["fit-head", outf, "--anew", *rest]) == 2
    assert "--together LAMBDA" in capsys.readouterr().err
    assert cli.main(["fit-head", outf, "--together", "0.02", "--anew", "--to", str(tmp_path / "a"),
                     "--no-measure", *rest]) == 0
    asked = read_json(tmp_path / "a" / together.SETTINGS, fix="")
    assert asked["anew"] and asked["lr_share"] == 1 and asked["epochs"] == run.config.train.epochs
