"""Commands that train, and that measure how fast: train, prepare, bench, study, scale.

`add_commands` puts them on the command line; nothing heavy is imported before one runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hnerv_clip.cli.runs import show_summary
from hnerv_clip.config import PROFILES, Config, ConfigError
from hnerv_clip.files import check_writable
from hnerv_clip.paths import resolve_path

LAUNCH = {"cluster": "inline", "nodes": 1, "gpus_per_node": 1, "timeout_min": 240,
          "slurm_partition": "", "slurm_account": "", "slurm_array_parallelism": 8}


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """Add the commands; `add(name, function, help)` returns a parser.

    Returns:
        Their parsers; all of them take settings.
    """
    train = add("train", _train, "fit a video; takes every setting as --name value, see settings")
    train.add_argument("--outf", required=True, help="run folder")
    for name, default in LAUNCH.items():
        train.add_argument(f"--{name}", type=type(default), default=default)
    prepare = add("prepare", _prepare, "run the teacher once and cache its embeddings; settings as "
                  "for train")
    bench = add("bench", _bench, "measure how fast it is on this machine; settings as for train")
    bench.add_argument("--parts", nargs="+", metavar="PART", help=
                       "any of ceilings train profile scaling decode teacher fit (all but fit)")
    bench.add_argument("--out", default="output/bench.json", help="JSON file that collects "
                       "parts; a part of the same settings and device takes its rows' place")
    bench.add_argument("--outf", default="output/bench/fit", help="new run folder, for fit")
    study = add("study", _study, "train and measure the runs of the whole study; settings as for "
                "train change the base of all of them")
    study.add_argument("--plan", choices=["study", "book"], default="study", help=
                       "book: all GPU results of the book, the most valuable first")
    study.add_argument("--profile", choices=list(PROFILES), default="full")
    study.add_argument("--outf", help="folder of the runs (output/study, or output/book_runs)")
    study.add_argument("--only", nargs="+", default=[], metavar="PATTERN",
                       help="only runs whose name matches, for example 'bunny_xyt_*'; of the book, "
                            "steps whose name begins so, for example 'field bunny'")
    study.add_argument("--list", action="store_true",
                       help="print the runs and stop; of the book, what is missing and its minutes")
    study.add_argument("--workers", type=int, default=0, help="processes, spread over the GPUs (0: "
                                                              "one on each, or one on the CPU)")
    study.add_argument("--minutes", type=float, default=float("inf"), help=
                       "stop after so many; the next call resumes; 0 only gathers existing results")
    study.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True,
                       help="also verify every run")
    study.add_argument("--csv", help="write the table of results here; one that is there is "
                                     "replaced only if it loses no run")
    study.add_argument("--pack", help="write all but the checkpoints here, a .tar.xz; one that is "
                                      "there is replaced only if it loses no run. The book's plan "
                                      "resumes from it on another machine")
    study.add_argument("--force", action="store_true", help="replace the files of --csv and "
                       "--pack whatever they hold, without resuming from the pack")
    study.add_argument("--out", default="book/results", help="folder of the book's results")
    scale = add("scale", _scale, "measure what several GPUs give on this machine; settings as for "
                "train, by default the paper's network with the bundled teacher, 40 epochs")
    scale.add_argument("--outf", default="output/scaling", help="folder of the runs and of "
                                                                "scaling.json")
    scale.add_argument("--gpus", type=int, default=0, help="0 for all; on a CPU, ranks (0 for 2)")
    scale.add_argument("--parts", nargs="+", default=[], metavar="PART",
                       help="any of speed correctness checkpoint kill sweep run (all)")
    scale.add_argument("--correctness_epochs", type=int, default=4)
    scale.add_argument("--sweep_epochs", type=int, default=0, help="0 for a third of epochs")
    scale.add_argument("--run_epochs", type=int, default=300, help="of the whole run")
    return [train, prepare, bench, study, scale]


def _train(args: argparse.Namespace) -> None:
    from hnerv_clip.dataset import check_given_video
    from hnerv_clip.launch import follow, launch
    from hnerv_clip.runs.run_dir import RunDir
    from hnerv_clip.train import prepare_run
    from hnerv_clip.video import load_video

    run = RunDir.check(args.outf, args.config)  # before the teacher runs
    check_writable(resolve_path(args.cache_dir))
    video = load_video(args.config.video)
    check_given_video(run, args.config, video)
    config, dataset = prepare_run(args.config, args.cache_dir, video)
    jobs = launch(config, args.outf, cache_dir=args.cache_dir, dataset=dataset,
                  **{name: getattr(args, name) for name in LAUNCH})
    follow(jobs)
    failed = [job for job in jobs if job.state == "failed"]
    if failed:
        raise SystemExit(f"error: {failed[0].why}")
    print(jobs[0].run_dir)
    show_summary(RunDir(jobs[0].run_dir).evaluation())


def _prepare(args: argparse.Namespace) -> None:
    from hnerv_clip.train import prepare_run

    _, dataset = prepare_run(args.config, args.cache_dir)
    print(dataset.facts().to_string(header=False))


def _bench(args: argparse.Namespace) -> None:
    from hnerv_clip.bench.harness import DEFAULT_PARTS, bench

    for path in (resolve_path(args.out).parent, resolve_path(args.outf)):
        check_writable(path)
    bench(args.config, parts=args.parts or list(DEFAULT_PARTS), out=args.out, outf=args.outf,
          cache_dir=args.cache_dir)


def _study(args: argparse.Namespace) -> None:
    if args.plan == "book":
        return _study_book(args)
    args.outf = args.outf or "output/study"
    import pandas as pd

    from hnerv_clip.study import plan as study_plan
    from hnerv_clip.study import run as study_run
    from hnerv_clip.study import table as study_table

    base = study_plan.study_base(args.profile, args.settings)
    configs = study_plan.study_configs(base, args.only)
    if args.list:
        print(study_plan.show_plan(configs, base))
        return
    for folder in (resolve_path(args.outf), *(resolve_path(path).parent for path in (
            args.csv, args.pack) if path)):
        check_writable(folder)
    if args.pack and not args.force:
        study_table.check_pack(args.outf, args.pack)
    if args.csv and not args.force:
        study_table.check_replaced(args.csv, pd.DataFrame({"run": sorted({*configs, *(
            path.parent.name for path in resolve_path(args.outf).glob("*/study.json"))})}))
    states = study_run.run_study(
        configs, args.outf, base=base, cache_dir=args.cache_dir, workers=args.workers,
        minutes=args.minutes, with_verify=args.verify)
    print(study_run.count_states(states))
    if args.csv:
        print(study_table.write_study(args.outf, args.csv, force=args.force).reindex(
            columns=["run", *study_table.SHOWN]).dropna(axis=1, how="all").to_string(
            index=False, na_rep="", float_format="{:.3f}".format))
    if args.pack:
        print(f"{args.pack}: {study_table.pack_study(args.outf, args.pack, force=args.force):,}"
              " bytes")
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed; see NAME.error.txt in {args.outf}")


def _study_book(args: argparse.Namespace) -> None:
    from hnerv_clip.devices import visible_gpus
    from hnerv_clip.study import book_runs
    from hnerv_clip.study.collect import PUBLISHED
    from hnerv_clip.study.folders import make_folders
    from hnerv_clip.study.run import count_states
    from hnerv_clip.study.table import check_pack

    changed = sorted(set(args.settings) - {"device"})
    if changed and resolve_path(args.out) == resolve_path(PUBLISHED):
        raise ConfigError(f"{', '.join(changed)} given: such runs are not the book's, whose "
                          f"results are in --out {args.out}; give another --out for theirs")
    folders = make_folders(args.outf or "output/book_runs", args.out, args.cache_dir, args.settings)
    if args.pack and not args.force:
        book_runs.restore_state(folders, args.pack)
    if args.list:
        steps = book_runs.book_steps(len(visible_gpus()), folders.outf)
        print(book_runs.show_steps(book_runs.chosen_steps(steps, tuple(args.only)), folders))
        return
    for folder in (folders.outf, folders.out, *(
            [resolve_path(args.pack).parent] if args.pack else [])):
        check_writable(folder)
    if args.pack and not args.force:
        check_pack(folders.outf, args.pack)
    try:
        states = book_runs.run_book(folders, minutes=args.minutes, only=tuple(args.only),
                                    workers=args.workers)
    finally:
        if args.pack:
            book_runs.pack_state(folders, args.pack, force=args.force)
    print(count_states(states))
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed; see NAME.error.txt in {folders.outf}")


def _scale(args: argparse.Namespace) -> None:
    import pandas as pd

    from hnerv_clip.bench.multi_gpu import SETTINGS, measure_scaling
    from hnerv_clip.book.scaling import correctness_rows, failed_words, machine_words, speed_rows

    check_writable(resolve_path(args.outf))
    measured = measure_scaling(
        Config.from_params(**{**SETTINGS, **args.settings}), args.outf, gpus=args.gpus,
        parts=args.parts, correctness_epochs=args.correctness_epochs,
        sweep_epochs=args.sweep_epochs, run_epochs=args.run_epochs, cache_dir=args.cache_dir)
    for rows in (speed_rows(measured), correctness_rows(measured)):
        if rows:
            print(pd.DataFrame(rows).to_string(index=False, na_rep=""), end="\n\n")
    if failed := failed_words(measured["parts"].get("speed", {})):
        print(failed)
    print(machine_words(measured))
