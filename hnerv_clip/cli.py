"""`hnerv-clip`: thin calls of the library, with the parameters of the original command line."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hnerv_clip.config import PROFILES, Config, ConfigError, param_names, settings_table
from hnerv_clip.files import check_writable, explain, write_atomic
from hnerv_clip.paths import match_paths, resolve_path
from hnerv_clip.stored.commands import add_commands, search_file

SHORT = {"b": "batch_size", "batchSize": "batch_size", "e": "epochs", "d": "distributed"}
# Options of the original scripts that are something else here
INSTEAD = {
    "distributed": "add --gpus_per_node N, and --cluster local or slurm",
    "eval_only": "use `hnerv-clip evaluate OUTF`",
    "resume": "a run in the same --outf goes on by itself",
    "weight": "a run in the same --outf goes on by itself",
    "vid": "--outf names the run, --data_path the video",
}
LAUNCH = {"cluster": "inline", "nodes": 1, "gpus_per_node": 1, "timeout_min": 240,
          "slurm_partition": "", "slurm_account": "", "slurm_array_parallelism": 8}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the process's exit code, 0 where it succeeded."""
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    if words and not args.takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    try:
        if args.takes_settings:
            args.settings = read_settings(words)
            args.config = Config.from_params(**args.settings)
        args.command(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hnerv-clip settings | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError, MemoryError, ImportError) as error:
        message = error_message(error)
        if message is None:  # from PyTorch, where the traceback says more
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def error_message(error: Exception) -> str | None:
    """What a user is told of an error in place of a traceback; None where that says more."""
    if isinstance(error, OSError):
        return explain(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in (
            "can't allocate memory", "not enough memory", "out of memory")):
        return (f"memory ran out ({' '.join(str(error).split())[:200]}); lower batch_size, "
                "resize_list, frame_limit or modelsize")
    if isinstance(error, ImportError):  # of a package that is optional here
        return str(error) if "pip install" in str(error) else None
    ours = isinstance(error, ValueError) or type(error).__module__.startswith("hnerv_clip")
    return str(error) if ours else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hnerv-clip", allow_abbrev=False, description=
                                     "Video networks that know what they show.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        sub.set_defaults(command=command, takes_settings=False)
        return sub

    book = add("book", _book, "execute the notebooks and build the book")
    book.add_argument("--profile", choices=list(PROFILES), default="quick")
    book.add_argument("-p", "--parameter", nargs=2, action="append", default=[],
                      metavar=("NAME", "VALUE"), help="set a parameter of the notebooks")
    book.add_argument("--only", nargs="+", default=[], metavar="NN",
                      help="execute only these notebooks, for example 03 04")
    book.add_argument("--outf", help="run folder; executed notebooks, site and html go beside it "
                                     "(output/PROFILE/main)")
    book.add_argument("--publish", action=argparse.BooleanOptionalAction, default=None,
                      help="copy the executed pages into book/ (by default for an unchanged full "
                           "profile)")

    train = add("train", _train, "fit a video; takes every setting as --name value, see settings")
    train.add_argument("--outf", required=True, help="run folder")
    for name, default in LAUNCH.items():
        train.add_argument(f"--{name}", type=type(default), default=default)
    prepare = add("prepare", _prepare, "run the teacher once and cache its embeddings; settings as "
                  "for train")
    bench = add("bench", _bench, "measure how fast it is on this machine; settings as for train")
    bench.add_argument("--parts", nargs="+", metavar="PART", help=
                       "any of ceilings train profile scaling decode teacher fit (all but fit)")
    bench.add_argument("--out", default="output/bench.json", help="JSON file that collects parts")
    bench.add_argument("--outf", default="output/bench/fit", help="new run folder, for fit")
    study = add("study", _study, "train and measure the runs of the whole study; settings as for "
                "train change the base of all of them")
    study.add_argument("--profile", choices=list(PROFILES), default="full")
    study.add_argument("--outf", default="output/study", help="folder of the runs")
    study.add_argument("--only", nargs="+", default=[], metavar="PATTERN",
                       help="only runs whose name matches, for example 'bunny_xyt_*'")
    study.add_argument("--list", action="store_true", help="print the runs and stop")
    study.add_argument("--workers", type=int, default=0, help="processes, spread over the GPUs (0: "
                                                              "one on each, or one on the CPU)")
    study.add_argument("--minutes", type=float, default=float("inf"), help=
                       "stop after so many, the next call goes on; 0 only gathers what is there")
    study.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True,
                       help="put every run to the verification, too")
    study.add_argument("--csv", help="write the table of results here")
    study.add_argument("--pack", help="write all but the checkpoints here, a .tar.xz")
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
    encode = add_commands(add)
    for sub in (train, prepare, bench, study, scale, encode):
        sub.add_argument("--cache_dir", default="output/cache")
        sub.set_defaults(takes_settings=True)

    for name, command, words in [
            ("fit-head", _fit_head, "fit a field on a trained run's frozen network: embeddings of "
                                    "any box, at no cost to the picture"),
            ("evaluate", _evaluate, "measure a trained run, as trained and from its file"),
            ("verify", _verify, "compare embeddings with controls and baselines; of several runs, "
                                "also in one table"),
            ("index", _index, "put what runs with the same teacher predict into one index"),
            ("search", _search, "rank patches by a text")]:
        sub = add(name, command, words)
        if name == "index":
            sub.add_argument("folder", help="folder of the index, for example output/index")
        sub.add_argument("outf", nargs="+" if name in ("verify", "index") else None, help=
                         "run folder" + (", that of an index, or a stored video NAME.hnerv"
                                         if name == "search" else ""))
        sub.add_argument("--cache_dir", default="output/cache")
        sub.add_argument("--device", default="auto")
        sub.add_argument("--data_path", nargs="+" if name in ("verify", "index") else 1, default=[],
                         metavar="PATH", help=
                         "where the run's video lies now, if it moved; its frames are compared")
        if name == "search":
            sub.add_argument("--region", metavar="FRAME,TOP,LEFT,HEIGHT,WIDTH", help=
                             "search for what is like this box of a frame; for a run or a "
                             "stored video with a field")
            sub.add_argument("queries", nargs="*", help="texts; ImageNet class names for a run "
                                                        "with the bundled teacher")
            sub.add_argument("--top_k", type=int, default=5)
            sub.add_argument("--weights", help="of a stored video's teacher: a file, or "
                                               "local-dir:FOLDER")
            sub.add_argument("--apart", type=int, default=4, help=
                             "frames between two hits of one position (4); 0 allows neighbours")
        if name == "fit-head":
            for option, kind, words in (("boxes", int, "random boxes a frame"),
                                        ("steps", int, "steps of the fit"),
                                        ("rank", int, "values that the output basis combines"),
                                        ("hidden", int, "width of the perceptron"),
                                        ("rate_weight", float, "weight of the field's bits")):
                sub.add_argument(f"--{option}", type=kind,
                                 help=f"{words} (the run's field_{option})")
            sub.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True,
                             help="measure it on frames and boxes that it never saw")
        if name == "verify":
            sub.add_argument("--seed", type=int, default=0, help="of shuffles and random vectors")
            sub.add_argument("--near", type=int, default=2, help="frames of tolerance in retrieval")
            sub.add_argument("--labels", default="", help="texts to rank and label patches by, "
                                                          "such as \"hare; barn\"")
            sub.add_argument("--all_sources", action="store_true", help="also what a hybrid model "
                             "answers when its encoder sees the held-out frame")
            sub.add_argument("--force", action="store_true", help="also where it is done already")
            sub.add_argument("--table", nargs="?", const="-", metavar="CSV",
                             help="join the runs, phases and seeds pooled: measures and answers")
            sub.add_argument("--by", nargs="+", default=[], metavar="NAME",
                             help="parameters that tell settings apart in the table")

    made = add("pages", _pages, "make anew what README and book take from book/results")
    made.add_argument("--execute", action=argparse.BooleanOptionalAction, default=True,
                      help="execute the notebooks over book/results (10 to 19), too")
    made.add_argument("--fidelity", nargs="+", metavar="RUN", help=
                      "first collect book/results/fidelity.json from these finished runs")
    made.add_argument("--quick", metavar="FOLDER", help=
                      "first collect book/results/quick.json from a quick study's folder")
    made.add_argument("--scaling", metavar="FOLDER", help=
                      "first collect book/results/scaling.json from a folder of hnerv-clip scale")
    add("settings", _settings, "print every setting, its default and its meaning")
    return parser


def _book(args: argparse.Namespace) -> None:
    from hnerv_clip.book import make_book

    overrides = dict(args.parameter) | ({"outf": args.outf} if args.outf else {})
    make_book(args.profile, overrides=overrides, only=args.only, publish_pages=args.publish)


def read_settings(words: list[str]) -> dict[str, Any]:
    """`--enc_strds 5 4 4 2 2 --predict_clip -b 2` as flat parameters.

    A flag without a value is True; several values are joined by spaces.

    Raises:
        ConfigError: an unknown name, a value without a name, or a name without a value.
    """
    given: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("-") and not _is_number(word):
            name, equals, value = word.lstrip("-").partition("=")
            name = SHORT.get(name, name)
            if name in INSTEAD:
                raise ConfigError(f"{word} is not needed here: {INSTEAD[name]}")
            given[name] = [value] if equals else []
        elif name is None:
            raise ConfigError(f"{word!r} stands without a name; write --name value")
        else:
            given[name].append(word)
    defaults = Config().params()
    for name, values in given.items():
        if not values and not isinstance(defaults.get(name, ""), bool) and name in defaults:
            raise ConfigError(f"--{name} needs a value; the default is {defaults[name]!r}")
    return {name: " ".join(values) if values else "True" for name, values in given.items()}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _train(args: argparse.Namespace) -> None:

    from hnerv_clip.dataset import prepare_dataset
    from hnerv_clip.launch import follow, launch
    from hnerv_clip.runs.run_dir import RunDir
    from hnerv_clip.train import check_run

    RunDir.check(args.outf, args.config)  # before the teacher runs
    check_writable(resolve_path(args.cache_dir))
    config = check_run(args.config)
    prepare_dataset(config, args.cache_dir, device=config.train.device)
    jobs = launch(config, args.outf, cache_dir=args.cache_dir,
                  **{name: getattr(args, name) for name in LAUNCH})
    follow(jobs)
    failed = [job for job in jobs if job.state == "failed"]
    if failed:
        raise SystemExit(f"error: {failed[0].why}")
    print(jobs[0].run_dir)
    _show_summary(RunDir(jobs[0].run_dir).evaluation())


def _show_summary(table) -> None:
    from hnerv_clip.evaluate import summarise

    print(summarise(table).to_string(index=False, na_rep="", float_format="{:.4f}".format))


def _prepare(args: argparse.Namespace) -> None:
    from hnerv_clip.dataset import prepare_dataset
    from hnerv_clip.train import check_run

    check_writable(resolve_path(args.cache_dir))
    config = check_run(args.config)
    dataset = prepare_dataset(config, args.cache_dir, device=config.train.device)
    print(dataset.facts().to_string(header=False))


def _bench(args: argparse.Namespace) -> None:
    from hnerv_clip.bench.harness import DEFAULT_PARTS, bench

    for path in (resolve_path(args.out).parent, resolve_path(args.outf)):
        check_writable(path)
    bench(args.config, parts=args.parts or list(DEFAULT_PARTS), out=args.out, outf=args.outf,
          cache_dir=args.cache_dir)


def _study(args: argparse.Namespace) -> None:
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
    states = study_run.run_study(
        configs, args.outf, base=base, cache_dir=args.cache_dir, workers=args.workers,
        minutes=args.minutes, with_verify=args.verify)
    print(study_run.count_states(states))
    if args.csv:
        print(study_table.write_study(args.outf, args.csv).reindex(
            columns=["run", *study_table.SHOWN]).dropna(axis=1, how="all").to_string(
            index=False, na_rep="", float_format="{:.3f}".format))
    if args.pack:
        print(f"{args.pack}: {study_table.pack_study(args.outf, args.pack):,} bytes")
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed; see NAME.error.txt in {args.outf}")


def _scale(args: argparse.Namespace) -> None:
    import pandas as pd

    from hnerv_clip.bench.multi_gpu import SETTINGS, measure_scaling
    from hnerv_clip.book.scaling import correctness_rows, machine_words, speed_rows

    check_writable(resolve_path(args.outf))
    measured = measure_scaling(
        Config.from_params(**{**SETTINGS, **args.settings}), args.outf, gpus=args.gpus,
        parts=args.parts, correctness_epochs=args.correctness_epochs,
        sweep_epochs=args.sweep_epochs, run_epochs=args.run_epochs, cache_dir=args.cache_dir)
    for rows in (speed_rows(measured), correctness_rows(measured)):
        if rows:
            print(pd.DataFrame(rows).to_string(index=False, na_rep=""), end="\n\n")
    print(machine_words(measured))


def _load_run(args: argparse.Namespace):
    """The one run that a command names."""
    from hnerv_clip.inference import load_run

    path, = match_paths(args.data_path, 1)
    return load_run(args.outf, cache_dir=args.cache_dir, device=args.device, data_path=path)


def _evaluate(args: argparse.Namespace) -> None:
    from hnerv_clip.evaluate import evaluate_run
    _show_summary(evaluate_run(_load_run(args)))


def _verify(args: argparse.Namespace) -> None:
    from hnerv_clip.verify.pool import join_runs, study_words
    from hnerv_clip.verify.run import verify_folders

    if args.table not in (None, "-"):
        check_writable(Path(args.table).absolute().parent)
    verified = verify_folders(args.outf, cache_dir=args.cache_dir, device=args.device,
                              seed=args.seed, near=args.near, labels=args.labels,
                              all_sources=args.all_sources, force=args.force,
                              data_paths=args.data_path)
    for folder in verified:
        print((folder / "verification.txt").read_text(encoding="utf-8"))
        print(folder / "verification.json")
    if args.table:
        study = join_runs(verified, by=tuple(args.by))
        print(f"\n{study.teacher_label}")
        print(study_words(study).T.to_string(header=False))
        if args.table != "-":
            write_atomic(Path(args.table),
                         lambda file: file.write(study.table.to_csv(index=False).encode()))
            print(args.table)


def _fit_head(args: argparse.Namespace) -> None:
    from hnerv_clip.field.fit_run import evaluate_field, fit_head, summarise_field

    run = _load_run(args)
    names = ("boxes", "steps", "rank", "hidden", "rate_weight")
    given = {f"field_{name}": getattr(args, name) for name in names
             if getattr(args, name) is not None}
    run.config = run.config.replace(**given)
    field = fit_head(run, cache_dir=args.cache_dir, device=args.device)
    print(f"{field.head.parameter_count():,} parameters, teacher {field.about['teacher_s']} s, "
          f"fit {field.about['fit_s']} s")
    if args.measure:
        table = evaluate_field(run, field, cache_dir=args.cache_dir, device=args.device)
        table.to_csv(run.run_dir.path / "field_evaluation.csv", index=False)
        print(summarise_field(table).to_string(index=False, float_format="{:.4f}".format))


def _index(args: argparse.Namespace) -> None:
    from hnerv_clip.field.query import has_field
    from hnerv_clip.runs.run_dir import RunDir

    check_writable(resolve_path(args.folder))
    for outf in args.outf:
        if not has_field(resolve_path(outf)):
            RunDir(outf).config_with_head()
    from hnerv_clip.inference import load_run
    from hnerv_clip.search.index import index_runs

    paths = match_paths(args.data_path, len(args.outf))
    index = index_runs(load_run(outf, cache_dir=args.cache_dir, device=args.device, data_path=path)
                       for outf, path in zip(args.outf, paths, strict=True))
    print(index.videos.to_string(index=False, float_format="{:g}".format))
    print(f"{index.save(args.folder)}: {len(index)} patches")


def _search(args: argparse.Namespace) -> None:
    from hnerv_clip.runs.run_dir import FIELD, RunDir
    from hnerv_clip.search.kept import encode_kept, predict_patches
    from hnerv_clip.search.rank import rank_patches
    from hnerv_clip.teachers.text import parse_queries

    if not args.queries and not args.region:
        raise ConfigError("nothing to search for: give texts, or --region of a run with a field")
    queries = parse_queries([query for words in args.queries for query in parse_queries(words)]
                            ) if args.queries else []
    if (resolve_path(args.outf) / FIELD).is_file():
        return _search_field(args, queries)
    if resolve_path(args.outf).is_file():
        return search_file(resolve_path(args.outf), queries, top_k=args.top_k, apart=args.apart,
                           device=args.device, weights=args.weights,
                           region=_parse_region(args.region) if args.region else None)
    if args.region:
        raise ConfigError(f"--region needs a field, which {args.outf} has not: "
                          f"hnerv-clip fit-head {args.outf}")
    if (resolve_path(args.outf) / "videos.json").is_file():
        return _search_index(args, queries)
    run = RunDir(args.outf)
    config = run.config_with_head()
    texts = encode_kept(queries, config.teacher, run.path, device=args.device)
    path, = match_paths(args.data_path, 1)
    kept = predict_patches(run.path, cache_dir=args.cache_dir, device=args.device, data_path=path)
    for query, vector in zip(queries, texts):
        found = rank_patches(vector, kept.embeddings, args.top_k, apart=args.apart)
        found["time_s"] = kept.times_s[found.frame]
        for i, side in enumerate(("top", "left", "height", "width")):
            found[side] = kept.boxes[found.patch.to_numpy(), i]
        _show_found(f"{query}  ({kept.teacher_label}; embeddings: {kept.source})", found)


def _search_field(args: argparse.Namespace, queries: list[str]) -> None:
    from hnerv_clip.field.query import load_field
    from hnerv_clip.inference import sources_of
    from hnerv_clip.search.boxes import search_boxes
    from hnerv_clip.search.kept import encode_kept

    run = _load_run(args)
    source = sources_of(run.model)[-1]  # the prediction: no frame asked about is seen
    field = load_field(run, source=source)
    asked: list = []
    if args.region:
        frame, *box = _parse_region(args.region)
        asked.append((f"like box {tuple(box)} of frame {frame:g}", field.embed(frame, box),
                      (frame, box)))
    if queries:
        texts = encode_kept(queries, run.config.teacher, run.run_dir.path, device=args.device)
        asked += [(query, vector, None) for query, vector in zip(queries, texts)]
    for words, vector, near in asked:
        found = search_boxes(field, vector, args.top_k, apart=args.apart, not_near=near)
        found["time_s"] = run.dataset.video.times_s[found.frame.to_numpy()]
        _show_found(f"{words}  ({run.dataset.teacher_label}; embeddings: {source})", found)


def _parse_region(words: str) -> list[float]:
    try:
        values = [float(value) for value in words.split(",")]
        if len(values) == 5:
            return values
    except ValueError:
        pass
    raise ConfigError(f"--region {words} is not FRAME,TOP,LEFT,HEIGHT,WIDTH; write for example "
                      "0,0,0,448,448")


def _search_index(args: argparse.Namespace, queries: list[str]) -> None:
    from hnerv_clip.search.index import load_index
    from hnerv_clip.search.kept import encode_kept

    index = load_index(args.outf)
    texts = encode_kept(queries, index.teacher_config(), resolve_path(args.outf),
                        device=args.device)
    for query, vector in zip(queries, texts):
        found = index.search(vector, args.top_k, apart=args.apart)
        found["time_s"] = index.times_of(found)
        _show_found(f"{query}  ({index.label}; {len(index)} patches)", found)


def _show_found(title: str, found) -> None:
    print(title)
    print(found.to_string(index=False, float_format="{:.3f}".format), end="\n\n")


def _pages(args: argparse.Namespace) -> None:
    from hnerv_clip.book import build, pages, repository_root

    root = repository_root()
    if args.fidelity:
        pages.collect_fidelity(root / "book" / "results", args.fidelity)
    if args.quick:
        pages.collect_quick(root / "book" / "results", resolve_path(args.quick))
    if args.scaling:
        from hnerv_clip.book.scaling import collect_scaling

        collect_scaling(root / "book" / "results", resolve_path(args.scaling))
    if args.execute:
        build.execute_results(root)
    pages.refresh(root)


def _settings(args: argparse.Namespace) -> None:
    width = max(map(len, param_names())) + 2
    group = None
    for name, default, own_group, meaning in settings_table():
        if own_group != group:
            group = own_group
            print(f"\n{group}")
        print(f"  --{name:<{width}}{default or '(empty)':<20}{meaning}")


if __name__ == "__main__":
    sys.exit(main())
