"""launch, follow and reattach: in process and in local processes, with tiny stand-ins for training.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from hnerv_clip.config import Config
from hnerv_clip.devices import visible_gpus
from hnerv_clip.launch import JobFailed, LaunchError, follow, launch
from hnerv_clip.runs.run_dir import RunDir, RunError, write_json

CONFIG = Config.from_params(epochs=3)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # jobs unpickle this module's


def make_run(*, seconds=0.0, error="", work=None):
    """What stands for train(): counts its calls in the run folder, then finishes the run."""

    def run(config, run_dir, *, cache_dir, progress):
        folder = RunDir.create(run_dir, config)
        if folder.finished:
            return folder.summary()
        with open(Path(run_dir) / "calls.txt", "a") as file:
            print(os.getpid(), file=file)
        (Path(run_dir) / "metrics.csv").write_text("epoch\n1\n2\n")
        time.sleep(seconds)
        if error:
            raise ValueError(error)
        summary = {"rank0": work() if work else 0}
        write_json(folder.path / "summary.json", summary)
        return summary

    return run


def calls(run_dir):
    return (run_dir / "calls.txt").read_text().split()


def wait_until(condition, *, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_inline_runs_at_once_and_a_second_launch_picks_it_up(tmp_path):
    run = make_run()
    [job] = launch(CONFIG, tmp_path / "main", run=run)
    assert job.state == "finished" and job.result() == {"rank0": 0}
    [again] = launch(CONFIG, tmp_path / "main", run=run)
    assert again.state == "finished" and len(calls(tmp_path / "main")) == 1
    assert json.loads((tmp_path / "main/job.json").read_text())["cluster"] == "inline"


def test_inline_goes_on_when_one_fails_and_says_why(tmp_path, capsys):
    def run(config, run_dir, **rest):
        error = "loss is NaN at step 7" if config.train.seed == 1 else ""
        return make_run(error=error)(config, run_dir, **rest)

    jobs = launch({f"seed{s}": CONFIG.replace(seed=s) for s in range(3)}, tmp_path, run=run)
    table = follow(jobs)
    assert table["state"].tolist() == ["finished", "failed", "finished"]
    assert table["why"][1] == "ValueError: loss is NaN at step 7"
    assert table["epoch"].tolist() == [2, 2, 2]
    assert "seed1 failed: ValueError: loss is NaN" in capsys.readouterr().out
    with pytest.raises(JobFailed, match="NaN at step 7"):
        jobs[1].result()


def test_inline_single_config_raises_its_own_error(tmp_path):
    with pytest.raises(ValueError, match="no such video"):
        launch(CONFIG, tmp_path / "main", run=make_run(error="no such video"))


def test_local_processes_wait_for_a_slot_fail_alone_and_are_launched_again(tmp_path):
    configs = {f"seed{s}": CONFIG.replace(seed=s) for s in range(3)}

    def run(config, run_dir, **rest):
        bad = config.train.seed == 1 and not (Path(run_dir) / "calls.txt").exists()
        return make_run(seconds=1, error="disk full" if bad else "")(config, run_dir, **rest)

    options = dict(cluster="local", gpus_per_node=0, slurm_array_parallelism=1, run=run)
    jobs = launch(configs, tmp_path, **options)
    assert [job.state for job in jobs] == ["running", "waiting", "waiting"]
    table = follow(jobs, poll_s=0.2)
    assert table["state"].tolist() == ["finished", "failed", "finished"]
    assert "disk full" in table["why"][1] and "disk full" in jobs[1].log()
    assert jobs[0].result() == {"rank0": 0} and len(calls(tmp_path / "seed0")) == 1

    again = launch(configs, tmp_path, **options)  # only the failed one starts
    assert follow(again, poll_s=0.2)["state"].tolist() == ["finished"] * 3
    assert [len(calls(tmp_path / name)) for name in configs] == [1, 2, 1]


LAUNCHER = """
from test_launch import CONFIG, launch, make_run
jobs = launch(CONFIG, {outf!r}, cluster="local", gpus_per_node=0, run=make_run(seconds=4))
print(jobs[0].state, flush=True)
"""


def test_a_local_run_outlives_its_launcher_and_is_followed_not_doubled(tmp_path, capsys):
    outf = tmp_path / "main"
    script = LAUNCHER.format(outf=str(outf))
    first = subprocess.Popen([sys.executable, "-c", script], start_new_session=True,
                             stdout=subprocess.PIPE, text=True)
    assert "1 to start" in first.stdout.readline()
    wait_until(lambda: (outf / "calls.txt").exists())
    os.killpg(first.pid, signal.SIGKILL)  # what Jupyter does to a kernel's group, and worse
    first.wait()
    [job] = launch(CONFIG, outf, cluster="local", gpus_per_node=0, run=make_run())
    assert job.state == "running" and "1 under way, 0 to start" in capsys.readouterr().out
    assert follow([job], poll_s=0.2)["state"].tolist() == ["finished"]
    assert len(calls(outf)) == 1


def test_a_killed_local_run_is_seen_and_launched_again(tmp_path):
    options = dict(cluster="local", gpus_per_node=0)
    [job] = launch(CONFIG, tmp_path / "main", run=make_run(seconds=60), **options)
    wait_until(lambda: (tmp_path / "main/calls.txt").exists())
    job.cancel()
    wait_until(lambda: job.state == "failed")
    assert "ended without a word" in job.why
    [again] = launch(CONFIG, tmp_path / "main", run=make_run(), **options)
    assert again.result() == {"rank0": 0} and len(calls(tmp_path / "main")) == 2


def sum_of_ranks():
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    return int(total)


def wait_for_ever():  # as a collective of NCCL does when a rank is gone; gloo would notice
    time.sleep(3600)


def ranked(work, *, dies=None):
    """A training of many ranks, of which one may die by SIGKILL or by an error."""

    def run(config, run_dir, *, cache_dir, progress):
        rank = dist.get_rank()
        (RunDir(run_dir).path / f"rank{rank}.pid").write_text(str(os.getpid()))
        dist.all_reduce(torch.ones(1))
        if rank == 2 and dies == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 2 and dies == "error":
            raise ValueError("bad frame 12")
        total = work()
        if rank == 0:
            write_json(RunDir(run_dir).path / "summary.json", {"total": total})

    return run


def test_local_ranks_share_torch_distributed(tmp_path):
    [job] = launch(CONFIG, tmp_path / "main", cluster="local", gpus_per_node=3,
                   run=ranked(sum_of_ranks))
    assert follow([job], poll_s=0.2)["state"].tolist() == ["finished"]
    assert json.loads((tmp_path / "main/summary.json").read_text()) == {"total": 6}


@pytest.mark.parametrize("dies, why", [("killed", "rank 2 of 3 died"),
                                       ("error", "rank 2 of 3: ValueError: bad frame 12")])
def test_a_rank_that_dies_takes_the_job_down_and_says_so(tmp_path, dies, why):
    [job] = launch(CONFIG, tmp_path / "main", cluster="local", gpus_per_node=3,
                   run=ranked(wait_for_ever, dies=dies))
    wait_until(lambda: len(list((tmp_path / "main").glob("rank*.pid"))) == 3)
    started = time.monotonic()
    assert follow([job], poll_s=0.2)["state"].tolist() == ["failed"]
    assert time.monotonic() - started < 20
    assert why in job.why
    pids = [int(file.read_text()) for file in (tmp_path / "main").glob("rank*.pid")]
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("options, message", [
    (dict(cluster="cloud"), "cluster='cloud' is unknown; use one of inline, local, slurm"),
    (dict(gpus_per_node=-1), "gpus_per_node=-1 must be at least 0"),
    (dict(cluster="local", nodes=2), 'cluster="local" has one node'),
])
def test_settings_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(LaunchError, match=message):
        launch(CONFIG, tmp_path / "main", run=make_run(), **options)


def test_slurm_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match="needs sbatch, which this machine lacks"):
        launch(CONFIG, tmp_path / "main", cluster="slurm", run=make_run())


def test_another_configuration_in_the_folder_is_refused_before_any_run_starts(tmp_path):
    launch(CONFIG, tmp_path / "b", run=make_run())
    with pytest.raises(RunError, match="another configuration"):
        launch({"a": CONFIG, "b": CONFIG.replace(lr=0.5)}, tmp_path, run=make_run())
    assert not (tmp_path / "a/calls.txt").exists()


@pytest.mark.parametrize("named, gpus", [
    (None, ["0", "1", "2"]), ("5, 3,1", ["5", "3", "1"]),
    ("GPU-8f2a,MIG-77", ["GPU-8f2a", "MIG-77"]), ("4,5,6,7", ["4", "5", "6"])])
def test_which_gpus_this_process_may_use(monkeypatch, named, gpus):
    """PyTorch counts those that it finds, here three; a scheduler may name them by identifier."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus


def test_local_jobs_share_out_the_gpus_by_their_names(tmp_path, monkeypatch):
    """Two jobs at once on three GPUs that are pretended, each with its own."""
    monkeypatch.setattr("hnerv_clip.launch.local.visible_gpus", lambda: ["GPU-a", "GPU-b", "GPU-c"])

    def run(config, run_dir, **rest):
        make_run(seconds=1)(config, run_dir, **rest)
        (Path(run_dir) / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])

    configs = {f"seed{s}": CONFIG.replace(seed=s) for s in range(2)}
    follow(launch(configs, tmp_path, cluster="local", slurm_array_parallelism=2, run=run),
           poll_s=0.2)
    assert [(tmp_path / name / "gpu").read_text() for name in configs] == ["GPU-a", "GPU-b"]
    with pytest.raises(LaunchError, match="gpus_per_node=4, but this machine shows 3"):
        launch(CONFIG, tmp_path / "four", cluster="local", gpus_per_node=4, run=run)
