"""launch on a real Slurm: a node of eight (pretended) GPUs on this machine; see slurm_cluster."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import slurm_cluster
import submitit
import torch
import torch.distributed as dist
from test_launch import CONFIG, calls, make_run, ranked, sum_of_ranks, wait_for_ever, wait_until

from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.launch import Job, JobFailed, LaunchError, follow, launch
from hnerv_clip.runs.run_dir import RunDir, write_json
from hnerv_clip.train import train

SEED = 20261123

pytestmark = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing())


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster, monkeypatch):
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # jobs unpickle this module's
    return cluster


def launch_slurm(configs, outf, run, **options):
    return launch(configs, outf, **{**dict(cluster="slurm", cpus_per_task=1, timeout_min=5,
                                           run=run), **options})


def counted(seconds):
    """A training of so many steps of a tenth of a second, each of which is a checkpoint."""

    def run(config, run_dir, *, cache_dir, progress):
        folder = RunDir(run_dir).path
        with open(folder / "calls.txt", "a") as file:
            print(os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0"), file=file)
        done = int(Path(folder / "steps").read_text()) if (folder / "steps").exists() else 0
        for step in range(done, int(seconds * 10)):
            time.sleep(0.1)
            write_json(folder / "steps", step + 1)
        write_json(folder / "summary.json", {"started_from": done})

    return run


@pytest.mark.parametrize("gpus", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_task_for_each_gpu_of_a_node(slurm, tmp_path, gpus):
    [job] = launch_slurm(CONFIG, tmp_path / "main", ranked(sum_of_ranks), gpus_per_node=gpus)
    wait_until(lambda: job.state == "running")
    shown = slurm.run("scontrol", "show", "job", job.record["job_id"])
    for fact in (f"NumTasks={gpus}", f"TresPerNode=gres:gpu:{gpus}", "Requeue=1",
                 f"NtasksPerN:B:S:C={gpus}:"):
        assert fact in shown, shown
    assert follow([job], poll_s=0.5)["state"].tolist() == ["finished"], job.log()
    assert json.loads((tmp_path / "main/summary.json").read_text()) == {
        "total": sum(range(1, gpus + 1))}


def intervals(paths):
    return [tuple(float(t) for t in path.read_text().split()) for path in paths]


def timed(config, run_dir, *, cache_dir, progress):
    started = time.time()
    make_run(seconds=1, error="disk full" if fails_first(config, run_dir) else "")(
        config, run_dir, cache_dir=cache_dir, progress=progress)
    (Path(run_dir) / "times.txt").write_text(f"{started} {time.time()}")


def fails_first(config, run_dir):
    return config.train.seed == 2 and not (Path(run_dir) / "calls.txt").exists()


@pytest.mark.slow
def test_many_configs_are_one_array_and_the_failed_one_alone_starts_again(slurm, tmp_path, capsys):
    configs = {f"seed{s}": CONFIG.replace(seed=s) for s in range(5)}
    jobs = launch_slurm(configs, tmp_path, timed, slurm_array_parallelism=2)
    ids = [job.record["job_id"] for job in jobs]
    assert [job_id.split("_")[1] for job_id in ids] == list("01234")
    assert len({job_id.split("_")[0] for job_id in ids}) == 1
    assert {job.state for job in jobs} <= {"waiting", "running"}
    reattached = launch_slurm(configs, tmp_path, timed)
    assert "5 runs: 0 finished, 5 under way, 0 to start" in capsys.readouterr().out
    table = follow(reattached, poll_s=0.5)
    assert table["state"].tolist() == ["finished", "finished", "failed", "finished", "finished"]
    assert table["why"][2] == "ValueError: disk full"

    spans = intervals(tmp_path / name / "times.txt" for name in configs if name != "seed2")
    for start, _ in spans:
        assert sum(a <= start < b for a, b in spans) <= 2
    again = launch_slurm(configs, tmp_path, timed)
    assert "4 finished, 0 under way, 1 to start" in capsys.readouterr().out
    assert follow(again, poll_s=0.5)["state"].tolist() == ["finished"] * 5
    assert [len(calls(tmp_path / name)) for name in configs] == [1, 1, 2, 1, 1]


@pytest.mark.slow
def test_a_waiting_job_says_for_what_and_can_be_cancelled(slurm, tmp_path):
    first, second = (launch_slurm(CONFIG, tmp_path / name, make_run(seconds=60), gpus_per_node=8)[0]
                     for name in ("first", "second"))
    wait_until(lambda: (first.state, second.state) == ("running", "waiting"))
    wait_until(lambda: second.why in ("Resources", "Priority"))
    second.cancel()
    first.cancel()
    wait_until(lambda: second.state == "failed")
    assert "CANCELLED" in second.why
    with pytest.raises(JobFailed, match="CANCELLED"):
        first.result()


@pytest.mark.parametrize("gpus_per_node", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_on_the_signal_a_job_is_requeued_and_goes_on(slurm, tmp_path, gpus_per_node):
    [job] = launch_slurm(CONFIG, tmp_path / "main", rank0_of(counted(4)),
                         gpus_per_node=gpus_per_node)
    wait_until(lambda: (tmp_path / "main/steps").exists())
    slurm.run("scancel", "--signal=USR2", job.record["job_id"])
    wait_until(lambda: job.state == "waiting")
    assert follow([job], poll_s=0.5)["state"].tolist() == ["finished"], job.log()
    job_id = job.record["job_id"]
    assert (tmp_path / "main/calls.txt").read_text() == f"{job_id} 0\n{job_id} 1\n"
    assert RunDir(tmp_path / "main").summary()["started_from"] > 0


def rank0_of(run):
    """The other ranks wait in a collective, as in training."""

    def both(config, run_dir, **rest):
        if not dist.is_initialized() or dist.get_rank() == 0:
            run(config, run_dir, **rest)
        if dist.is_initialized():
            dist.all_reduce(torch.ones(1))

    return both


def weights(run_dir):
    return RunDir(run_dir).load_checkpoint("model_latest.pth")["model"]


def starts(run_dir):
    log = run_dir / "rank0.txt"
    return log.read_text().count("start at epoch") if log.exists() else 0


def wait_for_state(job, state):
    wait_until(lambda: job.state == state)


def interrupt(slurm, job, how, chance, *, start):
    """Interrupt a job a random while after it has begun for the `start`th time."""
    wait_until(lambda: starts(job.run_dir) == start)
    beyond = job.epoch + chance.randint(2, 8)
    wait_until(lambda: job.epoch >= beyond)
    time.sleep(chance.uniform(0, 0.3))
    slurm.run(*{"signal": ["scancel", "--signal=USR2"], "requeue": ["scontrol", "requeue"],
                "kill": ["scancel", "--signal=KILL"]}[how], job.record["job_id"])


def train_slowly(step_s):
    """A real training whose steps take a while longer, so that it can be interrupted in between."""

    def run(config, run_dir, **options):
        step = PlainEngine.step

        def slow(*args, **kwargs):
            time.sleep(step_s)
            return step(*args, **kwargs)

        PlainEngine.step = slow
        return train(config, run_dir, **options)

    return run


@pytest.mark.slow
def test_training_that_is_interrupted_at_random_ends_bit_for_bit_the_same(
        slurm, small_config, small_dataset, cache_dir, tmp_path):
    """Four interruptions: Slurm's signal, a requeue as by preemption, and kills."""
    chance = random.Random(SEED)
    hows = ["signal", "requeue", "kill"] + chance.choices(["signal", "requeue", "kill"], k=1)
    chance.shuffle(hows)
    config = small_config.replace(epochs=120, eval_freq=60, checkpoint_s=0.2)
    train(config, tmp_path / "reference", cache_dir=cache_dir, progress=False)

    def start():
        return launch_slurm(config, tmp_path / "main", train_slowly(0.05), cache_dir=cache_dir)[0]

    job = start()
    for count, how in enumerate(hows, 1):
        interrupt(slurm, job, how, chance, start=count)
        if how == "kill":
            wait_for_state(job, "failed")
            job = start()
    assert follow([job], poll_s=0.5)["state"].tolist() == ["finished"], job.log()
    print(f"seed {SEED}: {', '.join(hows)}")
    assert starts(tmp_path / "main") == 1 + len(hows)
    expected, got = weights(tmp_path / "reference"), weights(tmp_path / "main")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.slow
def test_at_the_time_limit_training_is_requeued_and_ends_bit_for_bit_the_same(
        slurm, small_config, small_dataset, cache_dir, tmp_path):
    config = small_config.replace(epochs=48, eval_freq=24, checkpoint_s=1)  # 240 steps
    train(config, tmp_path / "reference", cache_dir=cache_dir, progress=False)
    [job] = launch_slurm(config, tmp_path / "main", train_slowly(0.25), cache_dir=cache_dir,
                         timeout_min=1, signal_delay_s=10)
    assert follow([job], poll_s=1)["state"].tolist() == ["finished"], job.log()
    assert starts(tmp_path / "main") >= 2
    expected, got = weights(tmp_path / "reference"), weights(tmp_path / "main")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_rank_takes_the_job_down_within_a_minute(slurm, tmp_path, victim):
    [job] = launch_slurm(CONFIG, tmp_path / "main", ranked(wait_for_ever), gpus_per_node=3)
    files = [tmp_path / f"main/rank{rank}.pid" for rank in range(3)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    time.sleep(0.5)
    started = time.monotonic()
    os.kill(int(files[victim].read_text()), signal.SIGKILL)
    assert follow([job], poll_s=0.2)["state"].tolist() == ["failed"]
    assert time.monotonic() - started < 60
    assert f"rank {victim} of 3 died" in job.why or "exit code 0:9" in job.why, job.why
    wait_until(lambda: not any(psutil.pid_exists(int(file.read_text())) for file in files))
    [again] = launch_slurm(CONFIG, tmp_path / "main", ranked(sum_of_ranks), gpus_per_node=3)
    assert follow([again], poll_s=0.5)["state"].tolist() == ["finished"], again.log()


def test_a_job_submitted_from_within_a_job_is_a_job_of_its_own(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "7")  # what papermill in an sbatch script would pass on
    monkeypatch.setenv("SLURM_JOB_ID", "999")
    [job] = launch_slurm(CONFIG, tmp_path / "main", make_run())
    assert follow([job], poll_s=0.5)["state"].tolist() == ["finished"], job.log()


def test_what_slurm_refuses_is_said_and_nothing_is_left_behind(slurm, tmp_path):
    with pytest.raises(LaunchError, match="invalid partition"):
        launch_slurm(CONFIG, tmp_path / "main", make_run(), slurm_partition="nowhere")
    with pytest.raises(LaunchError, match="signal_delay_s=90 must be shorter"):
        launch_slurm(CONFIG, tmp_path / "main", make_run(), timeout_min=1)
    [job] = launch_slurm(CONFIG, tmp_path / "main", make_run())
    assert follow([job], poll_s=0.5)["state"].tolist() == ["finished"], job.log()


@pytest.mark.parametrize("count", [1, 3])
def test_a_launcher_that_dies_once_slurm_has_its_jobs_leaves_none_to_submit_again(
        slurm, tmp_path, monkeypatch, capsys, count):
    configs = {f"seed{s}": CONFIG.replace(seed=s) for s in range(count)}
    write_record = Job.write_record

    def die(job, cluster, **facts):
        if facts["job_id"]:  # sbatch has answered
            raise KeyboardInterrupt
        return write_record(job, cluster, **facts)

    with monkeypatch.context() as broken:
        broken.setattr(Job, "write_record", die)
        with pytest.raises(KeyboardInterrupt):
            launch_slurm(configs, tmp_path, make_run(seconds=5))
    jobs = launch_slurm(configs, tmp_path, make_run())
    assert f"{count} under way, 0 to start" in capsys.readouterr().out
    assert len({job.record["job_id"] for job in jobs}) == count
    assert follow(jobs, poll_s=0.5)["state"].tolist() == ["finished"] * count
    assert [len(calls(tmp_path / name)) for name in configs] == [1] * count


def test_a_launcher_that_dies_before_slurm_has_its_job_is_started_anew(slurm, tmp_path, monkeypatch,
                                                                      capsys):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(submitit.AutoExecutor, "submit_array", die)
        with pytest.raises(KeyboardInterrupt):
            launch_slurm(CONFIG, tmp_path / "main", make_run())
    [job] = launch_slurm(CONFIG, tmp_path / "main", make_run())
    assert "0 under way, 1 to start" in capsys.readouterr().out
    assert follow([job], poll_s=0.5)["state"].tolist() == ["finished"], job.log()


@pytest.mark.slow
def test_slurm_that_does_not_answer_is_no_reason_to_submit_again(slurm, tmp_path, monkeypatch,
                                                                 capsys):
    [job] = launch_slurm(CONFIG, tmp_path / "main", make_run(seconds=20))
    wait_until(lambda: (tmp_path / "main/calls.txt").exists())
    silent = tmp_path / "slurm.conf"  # nothing listens at that port
    silent.write_text(Path(slurm.environ["SLURM_CONF"]).read_text().replace(
        "SlurmctldPort=", "SlurmctldPort=1 #"))
    with monkeypatch.context() as broken:
        broken.setenv("SLURM_CONF", str(silent))
        broken.setattr(subprocess, "run", quick(subprocess.run))
        wait_until(lambda: job.why == "Slurm does not answer")
        launch_slurm(CONFIG, tmp_path / "main", make_run())
        assert "1 under way, 0 to start" in capsys.readouterr().out.splitlines()[-1]
    assert follow([job], poll_s=0.5)["state"].tolist() == ["finished"]
    assert len(calls(tmp_path / "main")) == 1


def quick(run):
    def run_briefly(*args, timeout=None, **options):
        return run(*args, timeout=3, **options)

    return run_briefly
