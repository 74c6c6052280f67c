"""The search for a recipe goes on and prunes; the comparison gives equal time."""

import json
from types import SimpleNamespace

import pytest

from hnerv_clip.config import PRESETS
from hnerv_clip.files import RunError
from hnerv_clip.runs.locks import Held, hold
from hnerv_clip.runs.run_dir import RunDir

optuna = pytest.importorskip("optuna")

from hnerv_clip.study import recipe  # noqa: E402

TINY = dict(data_path="bunny", crop_list="640_1280", resize_list="40_80", frame_stride=33,
            enc_strds="5 4 2", dec_strds="5 4 2", modelsize=0.03)


SEGMENTS = {"one": TINY, "two": TINY | {"frame_limit": 2}}


@pytest.fixture
def tiny(monkeypatch):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monkeypatch.setattr(recipe, "LEAST_SIZE", 0.03)
    monkeypatch.setattr(recipe, "PROBE_S", 0.05)


def test_cells_stand_for_strides(tiny):
    video = {name: value for name, value in TINY.items() if not name.endswith("strds")}
    few, many = (recipe.sized_config(video, {"cells": cells}).model for cells in (2, 32))
    assert few.enc_strds == few.dec_strds == (5, 4, 2) and many.enc_strds == (5, 2)


def test_fit_learns_in_its_time_and_reports(tiny):
    reports = []
    config = recipe.sized_config(TINY, {"lr": 5e-3, "device": "cpu"})
    fit = recipe.fit(config, seconds=0.6, report=lambda *report: reports.append(report))
    parts = [part for part, _ in reports]  # a stalled machine may leave some out
    assert len(parts) >= 2 and parts == sorted(set(parts)) and max(parts) < recipe.REPORTS
    assert reports[-1][1] > reports[0][1] and fit.psnr_db > reports[0][1]
    assert 0.6 <= fit.step_s * (fit.steps - recipe.WARM_UP) < 1.5
    assert config.model.modelsize == 0.03


def test_clock_and_evaluation_are_for_one_process_at_a_time(tiny, tmp_path, monkeypatch):
    def report(part, psnr_db):
        with pytest.raises(Held), hold(tmp_path / "lock"):
            pass
        parts.append(part)

    def evaluate(*arguments):
        report("evaluation", 0)
        return evaluate_model(*arguments)
    parts, evaluate_model = [], recipe.evaluate_model
    monkeypatch.setattr(recipe, "evaluate_model", evaluate)
    recipe.fit(recipe.sized_config(TINY, {"device": "cpu"}), seconds=0.2, report=report,
               lock=tmp_path / "lock")
    assert len(parts) > 1 and parts[-1] == "evaluation"
    with hold(tmp_path / "lock"):
        pass


def test_the_search_begins_with_the_preset():
    """Known trials lie in the space, and the first stands for the preset `best`."""
    for known in recipe.KNOWN:
        assert set(known) == set(recipe.SPACE)
        for name, value in known.items():
            values = recipe.SPACE[name]
            assert value in values if isinstance(values, list) else values[0] <= value <= values[1]
    settings = recipe.trial_settings(optuna.trial.FixedTrial(recipe.KNOWN[0]))
    cells = settings.pop("cells")
    found, best = (recipe.sized_config({"data_path": "bunny", "frame_limit": 8}, more | {
        "cells": cells}) for more in (settings, {**PRESETS["best"], "epochs": 300}))
    assert found == best


def test_a_search_tries_what_is_known_first_and_goes_on(tmp_path):
    """In a process of its own; a trial that was stopped before counts as failed."""
    recipe.open_study(tmp_path).ask()
    study = recipe.search(tmp_path, trials=2, seconds=0.1, minutes=1, workers=1, device="cpu",
                          segments=SEGMENTS)
    assert [trial.state.name for trial in study.trials[:3]] == [
        "FAIL", "COMPLETE", "COMPLETE"]
    assert {trial.state.name for trial in study.trials[3:]} == {"WAITING"}
    assert [t.params["batch_size"] for t in study.trials[1:3]] == [1, 2]
    for trial in study.trials[1:3]:
        assert recipe.sized_config(TINY, trial.user_attrs["settings"])
        assert trial.value == pytest.approx(
            sum(trial.user_attrs[name]["psnr_db"] for name in SEGMENTS) / 2)
    kept = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert [trial["value"] for trial in kept] == [trial.value for trial in study.trials]


def test_a_search_whose_processes_all_fail_says_so(tmp_path):
    with pytest.raises(RunError, match="1 of 1 processes of the search failed, exit codes 1"):
        recipe.search(tmp_path, trials=1, seconds=0.1, minutes=1, device="cpu", segments={})


def test_a_search_of_another_space_does_not_stand_in_the_way(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(recipe, "STUDY", "recipe")
        recipe.open_study(tmp_path).ask({"cells": optuna.distributions.CategoricalDistribution(
            [1, 2])})
    trial = recipe.open_study(tmp_path).ask()
    assert trial.number == 0 and recipe.trial_settings(trial)["cells"] in recipe.SPACE["cells"]


def test_settings_that_fit_no_network_are_pruned(tiny, monkeypatch):
    monkeypatch.setattr(recipe, "LEAST_SIZE", 1e-4)
    study = optuna.create_study()
    study.optimize(lambda trial: recipe.objective(
        trial, segments=SEGMENTS, seconds=0.1, device="cpu"), n_trials=1)
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
    assert "too small" in study.trials[0].user_attrs["error"]


def test_comparison_gives_each_recipe_the_same_time_and_goes_on(tiny, tmp_path, monkeypatch):
    recipes = {"hnerv": recipe.FAITHFUL | TINY, "best": {**PRESETS["best"], **TINY}}
    options = dict(videos=["bunny"], seeds=[0], seconds=[0.3], device="cpu")
    assert recipe.compare(tmp_path, recipes, minutes=0, **options) == []
    rows = recipe.compare(tmp_path, recipes, **options)
    assert [row["recipe"] for row in rows] == ["hnerv", "best"]
    for row in rows:
        assert row["epochs"] == max(1, int(0.3 / (row["step_s"] * (2 if row["recipe"] == "hnerv"
                                                                   else 4))))
        assert RunDir(tmp_path / f"bunny_{row['recipe']}_0.3s_seed0").finished
    monkeypatch.setattr(recipe, "fit", None)  # all is there
    assert recipe.compare(tmp_path, recipes, minutes=0, **options) == rows
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == rows
    assert recipe.compare(tmp_path, {"best": recipes["best"]}, minutes=0, **options) == rows[1:]
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == rows, "both are kept"


@pytest.mark.parametrize("row, told", [
    ({"recipe": "best", "video": "bunny", "seconds": 60}, "lacks seed"),
    ({"recipe": "best", "video": "bunny", "seed": "0", "seconds": 60}, "its seed is '0'"),
    ({"recipe": [], "video": "bunny", "seed": 0, "seconds": 60}, r"its recipe is '\[\]'"),
    ("best", "a row is 'best'")])
def test_a_strange_comparison_is_an_error_with_its_fix(tmp_path, row, told):
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(RunError, match=f"comparison.json is damaged: .*{told}; remove it, or move"):
        recipe.compare(tmp_path, {}, videos=[], seeds=[], seconds=[])


def test_a_strange_plan_is_an_error_with_its_fix(tmp_path):
    (tmp_path / "bunny_best_60s_seed0.json").write_text('{"recipe": "best", "settings": {}}')
    with pytest.raises(RunError, match="seed0.json is damaged: it lacks params; remove it"):
        recipe.compare(tmp_path, {"best": {}}, videos=["bunny"], seeds=[0], seconds=[60])


def test_videos_with_dots_and_seeds_have_plans_of_their_own(tiny, tmp_path, monkeypatch):
    trained = []

    def note(config, path, **_):
        trained.append((config.video.data_path, config.train.seed))
        raise InterruptedError
    monkeypatch.setattr(recipe, "sized_config", lambda video, settings: recipe.Config.from_params(
        **recipe.BASE | TINY | video | settings))
    monkeypatch.setattr(recipe, "load_dataset", lambda config: SimpleNamespace(
        split=SimpleNamespace(train=range(4))))
    monkeypatch.setattr(recipe, "fit", lambda *_, **__: recipe.Fit(30.0, 4, 0.01, 1))
    monkeypatch.setattr(recipe, "train", note)
    videos = ("a/clip.1080p.mp4", "a/clip.720p.mp4", "b/clip.720p.mp4", "a/clip.720p.mkv", "clip",
              "bunny")
    for video in videos:
        for seed in (0, 1):
            with pytest.raises(InterruptedError):
                recipe.compare(tmp_path, {"best": {"lr": 2e-3}}, videos=[video], seeds=[seed],
                               seconds=[1], device="cpu")
    assert trained == [(video, seed) for video in videos for seed in (0, 1)]
    assert (tmp_path / "bunny_best_1s_seed0.json").exists()
    with pytest.raises(InterruptedError):  # it has its plan
        recipe.compare(tmp_path, {"best": {"lr": 2e-3}}, videos=["./clip"], seeds=[0], seconds=[1])
    assert trained[-1] == ("clip", 0)


def test_one_name_does_not_stand_for_two_recipes(tmp_path, monkeypatch):
    """Also for a seed that was not planned before."""
    plan = {"recipe": "found", "settings": {"lr": 2e-3}}
    (tmp_path / "a.b_found_60s_seed0.json").write_text(json.dumps(plan))
    options = dict(videos=["bunny"], seeds=[1], seconds=[60], minutes=0)
    assert recipe.compare(tmp_path, {"found": {"lr": 2e-3}}, **options) == []
    with pytest.raises(RunError, match=r'a.b_found_60s_seed0.json was planned with recipe "found" '
                                       r"as {'lr': 0.002}, which is now {'lr': 0.003}"):
        recipe.compare(tmp_path, {"found": {"lr": 3e-3}}, **options)
    (tmp_path / "a.b_found_60s_seed0.json").write_text('{"step_s": 1}')
    with pytest.raises(RunError, match="another --outf"):
        recipe.compare(tmp_path, {"found": {"lr": 3e-3}}, **options)


@pytest.mark.gpu
def test_a_search_shares_a_gpu(tmp_path):
    study = recipe.search(tmp_path, seconds=2, minutes=3, workers=2, trials=1)
    states = [trial.state.name for trial in study.trials]
    assert len(states) == len(recipe.KNOWN) and states.count("WAITING") == len(states) - 2
    assert "COMPLETE" in states, [trial.user_attrs for trial in study.trials]
