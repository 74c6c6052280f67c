"""Where training runs: in this process, in local processes, or as Slurm jobs. All submitit code.

`launch` starts runs, or finds those that are finished or under way, and returns a `Job` for each;
`follow` shows them until all have ended. One task drives one GPU. Each run folder holds

    job.json       which job trains this run, and where: written when it is submitted
    outcome.json   how that job ended: written by the job itself
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hnerv_clip.config import Config
from hnerv_clip.launch import slurm
from hnerv_clip.launch.errors import JobFailed, LaunchError
from hnerv_clip.launch.jobs import ENDING, Job, follow
from hnerv_clip.launch.local import LocalQueue
from hnerv_clip.launch.ranks import Task
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.locks import hold
from hnerv_clip.runs.run_dir import RunDir

if TYPE_CHECKING:  # submitting loads no torch
    from hnerv_clip.dataset import Dataset

__all__ = ["CLUSTERS", "Job", "JobFailed", "LaunchError", "follow", "launch"]

CLUSTERS = ("inline", "local", "slurm")


def launch(
    configs: Config | Mapping[str, Config],
    outf: str | Path,
    *,
    cluster: str = "inline",
    cache_dir: str | Path = "output/cache",
    nodes: int = 1,
    gpus_per_node: int = 1,
    timeout_min: int = 240,
    slurm_partition: str = "",
    slurm_account: str = "",
    slurm_array_parallelism: int = 8,
    slurm_extra: Mapping[str, Any] | None = None,
    slurm_setup: Sequence[str] = (),
    cpus_per_task: int = 4,
    signal_delay_s: int = 90,
    run: Callable[..., Any] | None = None,
    dataset: Dataset | None = None,
) -> list[Job]:
    """Train one configuration, or many; safe to call again.

    A finished run is reused, one that is under way is followed, and one that failed or died resumes
    from its last checkpoint. Nothing is submitted twice.

    Args:
        configs: one Config, trained in `outf`, or {name: Config}, each trained in `outf`/name.
        cluster: "inline" (here and now, one run after the other), "local" (processes on this
            machine that outlive this one) or "slurm" (many configs become one job array).
        cache_dir: where notebook 01 left the teacher's embeddings.
        nodes, gpus_per_node: of each run; one task a GPU. Without GPUs on the machine, local
            tasks and the Slurm tasks run on the CPU; 0 asks for no GPU and one task.
        timeout_min: Slurm's time limit; a run that reaches it is requeued and resumes.
        slurm_array_parallelism: how many of the runs go at once; in local processes too, where
            the GPUs or else the CPU cores also bound it.
        slurm_extra: more sbatch options, as {"qos": "high", "mem": "64G", "exclusive": True}.
        slurm_setup: shell lines to run before the tasks, as ["module load cuda"].
        signal_delay_s: seconds between Slurm's signal and the time limit.
        run: what trains; `hnerv_clip.train.train` by default.
        dataset: of a single configuration, if it is already loaded: an inline run then decodes
            no video.
    Returns:
        Jobs in the order of `configs`. Inline, they have ended; a single config's error is
        raised, among many it is kept in `Job.why`.
    Raises:
        LaunchError: the settings don't fit this machine.
        RunError: a run folder holds another configuration, or another video's run.
    """
    if cluster not in CLUSTERS:
        raise LaunchError(f"cluster={cluster!r} is unknown; use one of {', '.join(CLUSTERS)}")
    for name, value, low in [("nodes", nodes, 1), ("gpus_per_node", gpus_per_node, 0),
                             ("timeout_min", timeout_min, 1), ("cpus_per_task", cpus_per_task, 1),
                             ("slurm_array_parallelism", slurm_array_parallelism, 1)]:
        if value < low:
            raise LaunchError(f"{name}={value} must be at least {low}")
    if cluster == "slurm":
        slurm.check(timeout_min, signal_delay_s)
    if cluster == "local" and nodes > 1:
        raise LaunchError(f'nodes={nodes}: cluster="local" has one node; use cluster="slurm"')
    outf, single = resolve_path(outf), isinstance(configs, Config)
    if not configs:
        raise LaunchError("configs is empty; give a Config or a dict of them")
    named = {outf.name: configs} if single else dict(configs)
    if run is None:
        from hnerv_clip.dataset import check_given_video
        from hnerv_clip.train import check_run

        video = dataset.video if dataset and single else None
        named = {name: check_run(config, video) for name, config in named.items()}
    folders = {name: outf if single else outf / name for name in named}
    for name, config in named.items():  # every folder is checked before any is touched
        found = RunDir.check(folders[name], config)
        if run is None:  # a run that is finished or under way is not trained, which would check it
            check_given_video(found, config, video)
    jobs = [Job(name, RunDir.create(folders[name], config).path, config=config,
                task=Task(config.params(), str(folders[name]), str(resolve_path(cache_dir)), run))
            for name, config in named.items()]
    with hold(outf / ".launch", wait=True):  # one launcher at a time looks and submits
        while any(job.why == ENDING for job in jobs):  # whether it is to start again shows soon
            time.sleep(0.5)
        idle = [job for job in jobs if job.state in ("new", "failed")]
        _print_plan(jobs, idle, cluster)
        if cluster == "local" and idle:
            LocalQueue(idle, outf / "submitit", gpus_per_node, slurm_array_parallelism)
        elif cluster == "slurm" and idle:
            slurm.submit(idle, outf / "submitit", parallelism=slurm_array_parallelism, parameters={
                "nodes": nodes, "tasks_per_node": max(1, gpus_per_node),
                "gpus_per_node": gpus_per_node or None, "timeout_min": timeout_min,
                "cpus_per_task": cpus_per_task, "slurm_partition": slurm_partition or None,
                "slurm_account": slurm_account or None, "slurm_signal_delay_s": signal_delay_s,
                "slurm_setup": [f"export OMP_NUM_THREADS={cpus_per_task}", *slurm_setup],
                # from 22.05 on, srun no longer inherits --cpus-per-task from the batch script
                "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}"],
                "slurm_additional_parameters": {"requeue": True, **(slurm_extra or {})}})
    for job in idle if cluster == "inline" else ():
        job.run_inline(keep_error=not single, dataset=dataset if single else None)
    return jobs


def _print_plan(jobs: Sequence[Job], idle: Sequence[Job], cluster: str) -> None:
    finished = sum(job.state == "finished" for job in jobs)
    where = {"inline": "in this process", "local": "in processes of this machine",
             "slurm": "on Slurm"}[cluster]
    print(f"{len(jobs)} run{'s' if len(jobs) != 1 else ''}: {finished} finished, "
          f"{len(jobs) - finished - len(idle)} under way, {len(idle)} to start {where}")
