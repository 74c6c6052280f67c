"""Run directories keep what they hold: atomic, checked, never overwritten."""

import errno
import json
import os
import pickle
import platform
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from hnerv_clip.config import Config
from hnerv_clip.runs import locks, provenance, run_dir
from hnerv_clip.runs.provenance import make_provenance
from hnerv_clip.runs.run_dir import RunDir, RunError, load_checkpoint, write_atomic

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


def test_a_thousand_damaged_checkpoints_are_refused_or_load_equal(tmp_path):
    """Truncated, bits flipped, bytes overwritten or moved: never another state, nor a crash."""
    seed = 20261123
    rng, path = np.random.default_rng(seed), tmp_path / "c.pth"
    state = STATE | {"model": {"w": torch.arange(64.0)}, "history": [{"epoch": 1, "psnr_db": 20.5}]}
    torch.save(state, path)
    whole, equal = path.read_bytes(), 0

    def truncate(data):
        return data[:rng.integers(len(data))]

    def flip(data):
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        return data

    def overwrite(data):
        at, count = rng.integers(len(data) - 16), rng.integers(1, 16)
        data[at:at + count] = rng.bytes(count)
        return data

    def move(data):
        at, count = rng.integers(len(data) - 64), rng.integers(1, 64)
        return data[:at] + data[at + count:] + data[at:at + count]

    for number in range(1200):
        path.write_bytes((truncate, flip, flip, overwrite, move)[number % 5](bytearray(whole)))
        try:
            loaded = load_checkpoint(path)
        except RunError as error:
            assert "train the run again" in str(error)
            continue
        equal += 1  # padding, or a time of the archive
        assert torch.equal(loaded["model"]["w"], state["model"]["w"])
        assert {k: v for k, v in loaded.items() if k != "model"} == {
            k: v for k, v in state.items() if k != "model"}
    print(f"seed {seed}: 1200 mutations, {equal} loaded equal, {1200 - equal} refused")
    assert 0 < equal < 600


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
    code = ("from hnerv_clip.runs.run_dir import RunDir, RunError\nimport sys\n"
            "try:\n    with RunDir(sys.argv[1]).lock(): print('got it')\n"
            "except RunError as error: print(error)")

    def other():
        return subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True,
                              text=True).stdout
    with run.lock():
        assert f"another process (process {os.getpid()}" in other()
    assert "got it" in other()


@pytest.fixture
def no_flock(monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)


def test_one_process_at_a_time_where_the_disk_has_no_locks(run, no_flock):
    held = run.path / ".lock.held"
    with run.lock():
        assert json.loads(held.read_text())["pid"] == os.getpid()
        with pytest.raises(RunError, match=f"another process .process {os.getpid()} on"):
            with run.lock():
                pass
        assert held.exists()
    assert not held.exists()
    with run.lock():
        pass


def test_what_a_dead_process_held_is_taken_over(run, no_flock):
    dead = subprocess.Popen(["true"])
    dead.wait()
    held = run.path / ".lock.held"
    held.write_text(json.dumps({"pid": dead.pid, "start": 1.0, "host": platform.node()}))
    with run.lock():
        assert json.loads(held.read_text())["pid"] == os.getpid()
    held.write_text(json.dumps({"pid": os.getpid(), "start": 1.0, "host": platform.node()}))
    with run.lock():  # this process's id, but an earlier process
        pass
    assert not held.exists()


def test_a_process_of_another_machine_holds_it_until_the_run_is_silent(run, no_flock):
    held = run.path / ".lock.held"
    held.write_text(json.dumps({"pid": 1, "start": 1.0, "host": "node7"}))
    with pytest.raises(RunError, match="process 1 on node7"):
        with run.lock():
            pass
    long_ago = time.time() - locks.SILENT_S - 60
    for file in run.path.iterdir():
        os.utime(file, (long_ago, long_ago))
    with run.lock():
        assert json.loads(held.read_text())["pid"] == os.getpid()


def test_of_many_processes_one_takes_over(run):
    """Four processes find a dead one's file; whoever gets it says so, alone."""
    held = run.path / ".lock.held"
    held.write_text(json.dumps({"pid": 2**22 + 1, "start": 1.0, "host": platform.node()}))
    code = ("import sys, time\nfrom hnerv_clip.runs import locks, run_dir\n"
            "locks.fcntl = None\nrun = run_dir.RunDir(sys.argv[1])\n"
            "print('ready', flush=True)\nsys.stdin.readline()\n"
            "try:\n    with run.lock():\n        print('got it', flush=True)\n"
            "        sys.stdin.readline()\nexcept run_dir.RunError as e: print(e, flush=True)")
    others = [subprocess.Popen([sys.executable, "-c", code, str(run.path)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for other in others:
        assert other.stdout.readline() == "ready\n"
    for other in others:
        other.stdin.write("\n")
        other.stdin.flush()
    said = [other.stdout.readline() for other in others]
    for other in others:
        other.communicate("\n")
    assert said.count("got it\n") == 1 and sum("another process" in line for line in said) == 3
    assert not held.exists()


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
    run_dir.write_json(run.path / "provenance.json", facts)
    table = provenance.provenance_table(run.path)
    assert table.loc["data"].iloc[0].startswith("bunny") and table.loc["seed"].iloc[0] == 0


def test_runs_of_one_name_stand_beside_each_other(tmp_path):
    folders = [tmp_path / "a" / "main", tmp_path / "b" / "main", tmp_path / "b" / "other"]
    for seed, folder in enumerate(folders):
        own = RunDir.create(folder, CONFIG.replace(seed=seed))
        run_dir.write_json(own.path / "provenance.json", make_provenance(
            own.config(), device=torch.device("cpu"), data_digest="abc", teacher=None))
    table = provenance.provenance_table(*folders)
    assert table.loc["seed"].to_dict() == {"a/main": 0, "b/main": 1, "b/other": 2}
    with pytest.raises(ValueError, match="given twice"):
        provenance.provenance_table(folders[0], folders[0])


def test_a_copy_without_its_checkout_does_not_claim_to_be_unchanged(tmp_path, monkeypatch):
    package = tmp_path / "hnerv_clip"
    (package / "runs").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "runs" / "provenance.py"))
    monkeypatch.setenv("HNERV_CLIP_COMMIT", "abc1234")
    assert provenance.code_version() == ("abc1234", None)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # someone else's
    assert provenance.code_version() == ("abc1234", None)
    monkeypatch.delenv("HNERV_CLIP_COMMIT")
    assert provenance.code_version()[0].startswith("package ")


@pytest.mark.parametrize("dirty, words", [(True, "abc with uncommitted changes"), (False, "abc"),
                                          (None, "abc (changes unknown)")])
def test_a_commit_in_words(dirty, words):
    assert provenance.commit_words({"commit": "abc", "dirty": dirty}) == words
