"""What is measured of several ranks, on two CPU ranks and in functions."""

import json
import os
from pathlib import Path

import pytest
from conftest import SMALL
from test_launch import CONFIG

from hnerv_clip import cli
from hnerv_clip.bench.multi_gpu import (
    SETTINGS,
    ScalingError,
    measure_scaling,
    rank_counts,
    speed_runs,
    sweep_configs,
    time_to_reach,
)
from hnerv_clip.book.results import ResultsError
from hnerv_clip.book.scaling import (
    collect_scaling,
    correctness_rows,
    evaluation_rows,
    machine_words,
    read_scaling,
    speed_rows,
)
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.figures.scaling import plot_scaling
from hnerv_clip.runs.run_dir import RunDir, RunError, write_json


@pytest.fixture(scope="module")
def outf(tmp_path_factory):
    return tmp_path_factory.mktemp("scaling") / "out"


def scale(outf, cache_dir, *parts):
    """`hnerv-clip scale` on a small setting; returns the file."""
    settings = {**SMALL, "frame_limit": 6, "epochs": 8, "eval_freq": 4, "checkpoint_s": 30}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert cli.main(["scale", "--outf", str(outf), "--cache_dir", str(cache_dir), "--gpus", "2",
                     "--parts", *parts, "--sweep_epochs", "2", "--correctness_epochs", "2",
                     "--run_epochs", "12", *words]) == 0
    return json.loads((outf / "scaling.json").read_text())


@pytest.mark.slow
def test_speed_a_killed_rank_and_checkpoints(outf, cache_dir, capsys):
    measured = scale(outf, cache_dir, "speed", "kill", "checkpoint")
    speed, kill, checkpoint = (measured["parts"][n] for n in ("speed", "kill", "checkpoint"))
    assert [(run["ranks"], run["lr"], run["epochs"], run["steps"]) for run in speed["runs"]] == [
        (1, 5e-3, 8, 24), (2, 5e-3, 8, 16), (2, 1e-2, 8, 16), (2, 1e-2, 16, 32)]
    alone, both = speed["runs"][:2]
    assert [row["ranks"] for row in speed_rows(measured)][:2] == [1, 2]
    assert both["efficiency"] == both["frames_per_s"] / (2 * alone["frames_per_s"])
    assert alone["time_to_quality_s"] == alone["curve"][-1][1] <= alone["train_time_s"]
    assert 0 < alone["train_time_s"] < alone["wall_s"] and alone["engine"] == "plain"
    assert kill["killed_epoch"] >= 4 and kill["resumed_epoch"] <= kill["killed_epoch"] + 1
    assert "rank 1 of 2 died" in kill["message"] and 0 < kill["down_s"] < 60
    assert kill["differs"] == {"identical": True, "largest": 0, "relative": 0}
    assert [run["ranks"] for run in checkpoint["runs"]] == [1, 2]
    assert all(run["checkpoints"] and 0 < run["share"] < 1 for run in checkpoint["runs"])
    assert {"commit", "dirty", "device", "versions"} <= speed.keys()

    printed = capsys.readouterr().out
    assert "not CLIP" in printed and "Not measured" not in printed
    before = (outf / "scaling.json").read_bytes()
    scale(outf, cache_dir, "speed", "kill")  # takes no run
    assert "kill: measured already" in capsys.readouterr().out
    assert (outf / "scaling.json").read_bytes() == before
    with pytest.raises(ScalingError, match="measured with other settings"):
        measure_scaling(Config.from_params(**SMALL), outf, gpus=2, parts=["speed"],
                        correctness_epochs=2, sweep_epochs=2, cache_dir=cache_dir)
    with pytest.raises(ScalingError, match="measured with other run_epochs;"):
        measure_scaling(Config.from_params(**measured["settings"]), outf, gpus=2, parts=["speed"],
                        correctness_epochs=2, sweep_epochs=2, run_epochs=13, cache_dir=cache_dir)


@pytest.mark.slow
def test_correctness_and_sweep(outf, cache_dir):
    measured = scale(outf, cache_dir, "correctness", "sweep")
    [case] = measured["parts"]["correctness"]["cases"]
    assert case["repeat_differs"]["identical"] and case["ranks_differ"]["largest"] < 1e-5
    assert case["loss_ranks"] == pytest.approx(case["loss_one"], rel=1e-5)
    sweep = measured["parts"]["sweep"]
    assert sweep["at_once_psnr_db"] == pytest.approx(sweep["in_sequence_psnr_db"], abs=1e-3)
    assert sweep["speed_up"] == sweep["in_sequence_s"] / sweep["at_once_s"] > 0
    assert sweep["runs"] == 2 and correctness_rows(measured)[0]["ranks"] == 2
    assert "(bundled teacher, not CLIP); over gloo" in machine_words(measured)


def test_a_whole_run_becomes_a_page(outf, cache_dir, tmp_path):
    """Measured on a CPU's ranks, and then drawn as if the ranks were GPUs."""
    measured = scale(outf, cache_dir, "run")
    run = RunDir(outf / "run")
    assert (run.config().train.epochs, run.config().train.pixel_loss_warmup_epochs) == (12, 2)
    assert measured["parts"]["run"]["psnr_db"] == run.summary()["eval_psnr_train"]
    with pytest.raises(RunError, match="measure first"):
        collect_scaling(tmp_path, tmp_path)
    collect_scaling(tmp_path, outf)
    assert [path.name for path in tmp_path.iterdir()] == ["scaling_cpu.json"]

    write_json(outf / "scaling.json", {**measured, "backend": "nccl"})
    write_json(run.path / "summary.json", {**run.summary(), "peak_memory_bytes": 2**30})
    os.utime(run.path / "job.json", (0, 0))  # as a copy may
    collect_scaling(tmp_path, outf)
    write_json(outf / "scaling.json", measured)
    copied = RunDir(tmp_path / "scaling_run")
    rows = evaluation_rows(copied)
    assert rows[0]["PSNR (dB)"] == f"{run.summary()['eval_psnr_train']:.2f}"
    assert copied.config().train.epochs == 12 and copied.finished

    newer = tmp_path / "newer"
    newer.mkdir()
    later = {**measured, "backend": "nccl", "gpus": 4, "parts": {"checkpoint": {
        **measured["parts"]["run"], "gpus": 4, "commit": "f" * 40}}}
    write_json(newer / "scaling.json", later)
    collect_scaling(tmp_path, newer)  # the older whole run stays, and its part says of what it is
    both = read_scaling(tmp_path, "scaling.json", ["run", "checkpoint"])
    assert [both["parts"][name]["gpus"] for name in ("run", "checkpoint")] == [2, 4]
    assert both["gpus"] == 2  # of the part `speed`, which is not measured anew
    assert (tmp_path / "scaling_run").exists()
    assert "complete run: 2 × " in machine_words(both)
    assert "checkpoints: 4 × " in machine_words(both)
    write_json(newer / "scaling.json", {**later, "settings": {**later["settings"], "epochs": 3}})
    collect_scaling(tmp_path, newer)  # of other settings: nothing older fits
    alone = read_scaling(tmp_path, "scaling.json", [])
    assert list(alone["parts"]) == ["checkpoint"]
    assert not (tmp_path / "scaling_run").exists()
    with pytest.raises(ResultsError, match="scaling.json has no run, kill.*hnerv-clip scale"):
        read_scaling(tmp_path, "scaling.json", ["run", "kill"])
    with pytest.raises(ResultsError, match="does not exist.*hnerv-clip scale"):
        read_scaling(tmp_path, "nowhere.json", [])


def test_a_learning_rate_that_diverges_is_a_result(tmp_path, cache_dir, monkeypatch):
    def train(scaling, name, config, ranks):
        if config.train.lr > 1e-2:
            raise ScalingError("run ranks4_scaled failed: the loss became NaN\nlog")
        return name

    def figures(run_dir):
        speed = {"ranks1": 10.0, "ranks2": 18.0, "ranks4": 30.0}[run_dir.split("_")[0]]
        return {"frames_per_s": speed, "engine": "plain", "epochs": 4,
                "curve": [[1, 0.5, 22.0], [4, 1.0, 20.0]],
                "frames_per_s_p10": speed, "frames_per_s_p90": speed, "psnr_db": 20.0,
                "wall_s": None, "batch_size": 2, "train_time_s": 1.0}

    monkeypatch.setattr("hnerv_clip.bench.multi_gpu._Scaling.train", train)
    monkeypatch.setattr("hnerv_clip.bench.multi_gpu.run_figures", figures)
    config = Config.from_params(**SMALL)
    measured = measure_scaling(config, tmp_path, gpus=4, parts=["speed"], cache_dir=cache_dir)
    assert [run["run"] for run in measured["parts"]["speed"]["runs"]] == [
        "ranks1", "ranks2", "ranks4"]
    assert [run["efficiency"] for run in measured["parts"]["speed"]["runs"]] == [1, 0.9, 0.75]
    assert [run["time_to_quality_s"] for run in measured["parts"]["speed"]["runs"]] == [
        1.0, 1.0, 1.0]  # not what the warm-up alone reached
    rows = speed_rows(measured)
    assert rows[-1]["frames/s"] == "failed"
    assert rows[0]["whole run (s)"] == "resumed" and rows[0]["training (s)"] == "1.0"


def test_which_runs_there_are():
    assert [rank_counts(n) for n in (2, 3, 4, 8)] == [[1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8]]
    assert [name for name, _, _ in speed_runs(CONFIG, 1, largest=False)] == ["ranks1"]
    kept, scaled, steps = (config.train for _, _, config in speed_runs(CONFIG, 4, largest=True))
    assert (kept.lr, scaled.lr, steps.lr) == (1e-3, 4e-3, 4e-3)
    assert (kept.epochs, scaled.epochs, steps.epochs) == (3, 3, 12)
    assert (steps.pixel_loss_warmup_epochs, steps.eval_freq) == (200, 120)
    runs = sweep_configs(CONFIG, 8, epochs=3)
    assert len(runs) == 8 and len({(c.train.clip_loss_weight, c.train.seed)
                                   for c in runs.values()}) == 8
    assert Config.from_params(**SETTINGS).teacher.teacher == "efficientnet-lite0"


@pytest.mark.parametrize("psnr_db, time_s", [(20, 10), (25, 15), (30, 20), (31, 40), (33, None)])
def test_time_to_a_quality(psnr_db, time_s):
    """Between evaluations linearly; a later dip does not count."""
    curve = [(1, 10.0, 20.0), (2, 20.0, 30.0), (3, 30.0, 29.0), (4, 50.0, 33.0 - 1e-9)]
    if psnr_db == 31:
        time_s = 30 + 20 * (31 - 29) / (33 - 29)
    reached = time_to_reach(curve, psnr_db)
    assert reached is None if time_s is None else reached == pytest.approx(time_s)


def test_what_can_not_be_measured_is_refused(tmp_path):
    config = Config.from_params(**SMALL)
    for options, error, message in [
            ({"parts": ["sped"]}, ConfigError, "use any of speed correctness"),
            ({"gpus": 1}, ScalingError, "two ranks or more"),
            ({}, ConfigError, "epochs=3 must be at least 4")]:
        with pytest.raises(error, match=message):
            measure_scaling(config.replace(epochs=3), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_figure_shows_every_run(outf):
    if not (outf / "scaling.json").exists():
        pytest.skip("needs the measurement of the first test")
    figure = plot_scaling(json.loads(Path(outf / "scaling.json").read_text()))
    speed, quality = figure.axes[:2]
    assert [text.get_text()[-1] for text in speed.texts] == ["%"]
    assert len(figure.legends[0].get_texts()) == len(quality.get_lines()) - 1 == 4
