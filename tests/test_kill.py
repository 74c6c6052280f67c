"""Training killed at random moments goes on as if nothing had been.

Run as a program, this file is the killer: it forks trainings, kills them, and prints what it saw.
Forking saves importing torch and decoding the video fifty times.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hnerv_clip.config import Config
from hnerv_clip.dataset import load_dataset
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.runs.run_dir import LATEST, RunDir
from hnerv_clip.train import run as train_module
from hnerv_clip.train import train

KILLS, SEED, PER_RUN = 50, 20261123, 10


@pytest.mark.slow
def test_fifty_kills_lose_no_more_than_the_interval_and_change_no_bit(
        small_config, small_dataset, cache_dir, tmp_path):
    config = small_config.replace(epochs=5)  # checkpoint_s=0: after every step
    reference = train(config, tmp_path / "reference", cache_dir=cache_dir, progress=False)
    (tmp_path / "params.json").write_text(json.dumps(config.params()))
    done = subprocess.run([sys.executable, __file__, str(tmp_path), str(cache_dir)], text=True,
                          capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    print(f"seed {SEED}: {seen}")
    assert seen["SIGKILL"] + seen["SIGTERM"] >= KILLS and seen["while writing"] >= 3
    assert seen["most steps lost"] <= 1  # the interval is one step
    expected = weights(tmp_path / "reference")
    for name in seen["runs"]:
        assert RunDir(tmp_path / name).finished
        got = weights(tmp_path / name)
        assert all(torch.equal(expected[key], got[key]) for key in expected), name
        summary = RunDir(tmp_path / name).summary()
        assert summary["eval_psnr_all"] == reference.summary["eval_psnr_all"]


def weights(run_dir):
    return RunDir(run_dir).load_checkpoint(LATEST)["model"]


def position(run_dir, steps_per_epoch):
    """Steps that the last checkpoint holds."""
    if not (run_dir / LATEST).exists():
        return 0
    state = RunDir(run_dir).load_checkpoint(LATEST)
    return state["epoch"] * steps_per_epoch + state["batch"]


def train_and_count(config, run_dir, cache_dir):
    """The training of a forked process: a byte in `steps` for every step done."""
    step = PlainEngine.step
    counter = os.open(run_dir / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def counted(*args, **options):
        sums = step(*args, **options)
        os.write(counter, b".")
        return sums

    PlainEngine.step = counted
    train(config, run_dir, cache_dir=cache_dir, progress=False)


def kill_until_finished(config, run_dir, cache_dir, chance, seen):
    """Fork trainings of one run and kill `PER_RUN` of them; the last may finish."""
    run = RunDir.create(run_dir, config)
    steps_per_epoch = -(-10 // config.train.batch_size)  # 10 of the 12 frames train
    kills = 0
    while not run.finished:
        before = position(run_dir, steps_per_epoch)
        (run_dir / "steps").write_bytes(b"")
        gc.collect()  # as tests/conftest.py does
        pid = os.fork()
        if pid == 0:
            try:
                train_and_count(config, run_dir, cache_dir)
                os._exit(0)
            finally:
                os._exit(1)
        how = chance.choice([signal.SIGKILL, signal.SIGTERM])
        if kills < PER_RUN:
            started, wait_for = time.monotonic(), chance.randrange(3)
            while (run_dir / "steps").stat().st_size <= wait_for and running(pid):
                time.sleep(0.002)  # at least so many steps, so that it gets somewhere
            time.sleep(chance.uniform(0, 0.1))
            if running(pid) and time.monotonic() - started < 60:
                os.kill(pid, how)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            seen[signal.Signals(how).name] += 1
            seen["while writing"] += any(run_dir.glob(f".{LATEST}.*.tmp"))
            for file in run_dir.glob(f".{LATEST}.*.tmp"):
                file.unlink()
            trained = len((run_dir / "steps").read_bytes())
            lost = before + trained - position(run_dir, steps_per_epoch)
            seen["most steps lost"] = max(seen["most steps lost"], lost)
        elif os.waitstatus_to_exitcode(status):
            raise SystemExit(f"a training ended with {os.waitstatus_to_exitcode(status)}")


def running(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main(folder, cache_dir):
    torch.set_num_threads(1)
    config = Config.from_params(**json.loads((folder / "params.json").read_text()))
    dataset = load_dataset(config, cache_dir)
    train_module.load_dataset = lambda *_: dataset
    chance = random.Random(SEED)
    seen = {"SIGKILL": 0, "SIGTERM": 0, "while writing": 0, "most steps lost": 0, "runs": []}
    while seen["SIGKILL"] + seen["SIGTERM"] < KILLS:
        seen["runs"].append(f"killed{len(seen['runs'])}")
        kill_until_finished(config, folder / seen["runs"][-1], cache_dir, chance, seen)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
