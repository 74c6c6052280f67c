"""Run directories keep what they hold: atomic, checked, never overwritten."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from hnerv_clip import runs
from hnerv_clip.config import Config
from hnerv_clip.runs import RunDir, RunError, load_checkpoint, make_provenance, write_atomic

CONFIG = Config.from_params(epochs=3)
STATE = {"config": CONFIG.params(), "model": {"w": torch.arange(5000.0)}, "epoch": 2}


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "run", CONFIG)


def test_config_round_trip_and_reopening(run):
    assert run.config() == CONFIG
    assert RunDir.create(run.path, CONFIG.replace(device="cpu")).config() == CONFIG


def test_another_configuration_is_refused(run):
    run.save_checkpoint("model_latest.pth", STATE)
    with pytest.raises(RunError, match=r"epochs: 3 there, 4 asked.*another outf"):
        RunDir.create(run.path, CONFIG.replace(epochs=4))
    assert run.config() == CONFIG


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="no run of this project"):
        RunDir.create(tmp_path, CONFIG)


def test_checkpoint_round_trip(run):
    run.save_checkpoint("model_best.pth", STATE)
    loaded = run.load_checkpoint()
    assert torch.equal(loaded["model"]["w"], STATE["model"]["w"]) and loaded["epoch"] == 2
    assert [p.name for p in run.path.iterdir() if p.name.endswith(".tmp")] == []


def test_checkpoint_of_another_configuration_is_refused(run):
    run.save_checkpoint("model_best.pth", STATE | {"config": CONFIG.replace(lr=0.5).params()})
    with pytest.raises(RunError, match=r"another configuration \(differs in lr\)"):
        run.load_checkpoint()


def test_damaged_checkpoints_are_refused(run):
    run.save_checkpoint("c.pth", STATE)
    path, rng = run.path / "c.pth", np.random.default_rng(0)
    whole = path.read_bytes()
    for cut in rng.integers(0, len(whole), 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(RunError, match="remove it"):
            load_checkpoint(path)
    weights = whole.index(torch.arange(5000.0).numpy().tobytes())
    for at in rng.integers(weights, weights + 20000, 30):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(RunError):
            load_checkpoint(path)


def test_nothing_in_a_checkpoint_is_executed(run):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(run.path / "exploded"),))
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save(STATE | {"bomb": Bomb()}, run.path / "c.pth")
        with pytest.raises(RunError, match="not a readable checkpoint"):
            load_checkpoint(run.path / "c.pth")
        assert not (run.path / "exploded").exists()


def test_other_files_are_no_checkpoints(run):
    torch.save({"weights": 1}, run.path / "c.pth")
    with pytest.raises(RunError, match="lacks config, model or epoch"):
        load_checkpoint(run.path / "c.pth")
    with pytest.raises(RunError, match="does not exist"):
        load_checkpoint(run.path / "none.pth")


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")
    with pytest.raises(RunError, match="No space left.*intact"):
        write_atomic(path, half)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_one_process_at_a_time(run):
    code = ("from hnerv_clip.runs import RunDir, RunError\nimport sys\n"
            "try:\n    with RunDir(sys.argv[1]).lock(): print('got it')\n"
            "except RunError as error: print(error)")

    def other():
        return subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True,
                              text=True).stdout
    with run.lock():
        assert f"another process (process {os.getpid()}" in other()
    assert "got it" in other()


def test_what_a_killed_process_left_half_written_is_removed(run):
    (run.path / ".model_latest.pth.123.tmp").write_bytes(b"half")
    run.save_checkpoint("model_latest.pth", STATE)
    with run.lock():
        assert sorted(p.name for p in run.path.iterdir()) == [
            ".lock", "config.json", "model_latest.pth"]


def test_errors_of_missing_things(tmp_path, run):
    with pytest.raises(RunError, match="02_train"):
        RunDir(tmp_path / "none").config()
    with pytest.raises(RunError, match="not finished"):
        run.summary()
    (run.path / "config.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        run.config()


def test_provenance(run):
    facts = make_provenance(CONFIG, device=torch.device("cpu"), data_digest="abc", teacher=None)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or \
        torch.__version__.startswith(facts["versions"]["torch"])
    runs.write_json(run.path / "provenance.json", facts)
    table = runs.provenance_table(run.path)
    assert table.loc["data"].iloc[0].startswith("bunny") and table.loc["seed"].iloc[0] == 0
