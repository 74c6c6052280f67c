"""Commands on trained runs: fit-head, evaluate, verify, index, search.

`add_commands` puts them on the command line; nothing heavy is imported before one runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from hnerv_clip.cli.given import check_run, is_index, load_run
from hnerv_clip.cli.searching import search
from hnerv_clip.config import ConfigError
from hnerv_clip.files import RunError, check_free, check_writable, write_atomic
from hnerv_clip.paths import match_paths, resolve_path

if TYPE_CHECKING:
    import pandas as pd

    from hnerv_clip.field.query import Field
    from hnerv_clip.inference import Run

INDENT = " " * 4  # of evidence, under its answer


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands; `add(name, function, help)` returns a parser."""
    for name, command, words in [
            ("fit-head", _fit_head, "fit a field on a trained run's frozen network: embeddings of "
                                    "any box, at no cost to the picture"),
            ("evaluate", _evaluate, "measure a trained run, as trained and from its file"),
            ("verify", _verify, "compare embeddings with controls and baselines; of several runs, "
                                "also in one table"),
            ("index", _index, "put what runs with the same teacher predict into one index"),
            ("search", search, "find what answers a text, or is like a box")]:
        sub = add(name, command, words)
        if name == "index":
            sub.add_argument("folder", help="folder of the index, for example output/index")
            sub.add_argument("--force", action="store_true", help="replace an index that is there")
        sub.add_argument("outf", nargs="+" if name in ("verify", "index") else None, help=
                         "run folder" + (", that of an index, or a stored video NAME.hnerv"
                                         if name == "search" else ""))
        sub.add_argument("--cache_dir", default="output/cache")
        sub.add_argument("--device", default="auto")
        sub.add_argument("--data_path", nargs="+" if name in ("verify", "index") else 1, default=[],
                         metavar="PATH", help=
                         "where the run's video lies now, if it moved; its frames are compared")
        if name == "search":
            sub.add_argument("--box", metavar="X0,Y0,X1,Y1", help=
                             "search for what is like this box of the picture (pixels) at --time; "
                             "for a run or a stored video with a field")
            sub.add_argument("--time", type=float, metavar="S", help="of --box, in seconds (0)")
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
            sub.add_argument("--patches", type=float, default=0.0, metavar="SHARE", help=
                             "share of the boxes that are the run's patches (0 to 1)")
            sub.add_argument("--together", type=float, metavar="LAMBDA", help=
                             "then go on with network and field together at this lambda (0.002 to "
                             "0.02 is small), as a new run in --to; the run itself stays as it is")
            sub.add_argument("--to", help="folder of that new run")
            sub.add_argument("--epochs", type=int, help="of going on together (30)")
            sub.add_argument("--anew", action="store_true", help=
                             "with --together: train both from the first epoch, with the run's "
                             "settings, rather than go on")
            sub.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True,
                             help="measure it on frames and boxes that it never saw")
        if name == "verify":
            sub.add_argument("--seed", type=int, default=0, help="of shuffles and random vectors")
            sub.add_argument("--near", type=int, default=2, help="frames of tolerance in retrieval")
            sub.add_argument("--labels", default="", help="texts to rank and label patches by, "
                                                          "such as \"hare; barn\"")
            sub.add_argument("--all_sources", action="store_true", help="also what a hybrid model "
                             "answers when its encoder sees the held-out frame")
            sub.add_argument("--force", action="store_true", help=
                             "also where it is done already; and replace the file of --table")
            sub.add_argument("--replace", action="store_true", help=
                             "replace the file of --table; only what is not done yet is verified")
            sub.add_argument("--table", nargs="?", const="-", metavar="CSV",
                             help="join the runs, phases and seeds pooled: measures and answers; "
                                  "written to this file if one is named, which must not exist yet "
                                  "without --replace")
            sub.add_argument("--by", nargs="+", default=[], metavar="NAME",
                             help="parameters that tell settings apart in the table")


def show_summary(table: pd.DataFrame) -> None:
    """Print an evaluation as one line for each variant, source and split."""
    from hnerv_clip.evaluate import summarise

    print(summarise(table).to_string(index=False, na_rep="", float_format="{:.4f}".format))


def _evaluate(args: argparse.Namespace) -> None:
    from hnerv_clip.evaluate import evaluate_run
    show_summary(evaluate_run(load_run(args)))


def _verify(args: argparse.Namespace) -> None:
    from hnerv_clip.verify.pool import join_runs, study_words
    from hnerv_clip.verify.run import verify_folders

    path = resolve_path(args.table) if args.table not in (None, "-") else None
    if args.replace and path is None:
        raise ConfigError("--replace is for the file of --table: name one, --table FILE.csv")
    if path:
        if path.suffix != ".csv":
            raise ConfigError(f"--table {args.table}: the name must end in .csv, so that no other "
                              "file is replaced")
        if path.exists() and not (args.replace or args.force):
            raise RunError(f"{path} exists; choose another name, or add --replace to write it anew "
                           "(runs that are verified are not verified again)")
        check_writable(path.parent)
    for outf in args.outf:
        check_run(outf)
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
        _show_answers(study_words(study))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda file: file.write(study.table.to_csv(index=False).encode()))
            print(args.table)


def _show_answers(table: pd.DataFrame) -> None:
    """Print `pool.study_words`: of each group of runs a line for each question, evidence below."""
    if table.empty:
        print("no answers: no run holds frames out")
        return
    from hnerv_clip.verify.report import WIDTH

    keys = list(table.columns[:table.columns.get_loc("question")])
    column = table.question.str.len().max() + 2
    for values, rows in table.groupby(keys, sort=False, dropna=False):
        print("\n" + ", ".join(f"{key} {value}" for key, value in zip(keys, values)))
        for row in rows.itertuples():
            print(f"{row.question:<{column}}{row.answer.upper()}")
            print(textwrap.indent(textwrap.fill(f"{row.evidence} ({row.frames} frames)",
                                                WIDTH - len(INDENT)), INDENT))


def _fit_head(args: argparse.Namespace) -> None:
    from hnerv_clip.field.fit_run import evaluate_field, fit_head, summarise_field

    run = load_run(args)
    names = ("boxes", "steps", "rank", "hidden", "rate_weight")
    given = {f"field_{name}": getattr(args, name) for name in names
             if getattr(args, name) is not None}
    run.config = run.config.replace(**given)
    if args.anew and args.together is None:
        raise ConfigError("--anew trains network and field together: give λ with --together LAMBDA")
    if args.together is not None:
        run, field = _fit_together(args, run)
    else:
        field = fit_head(run, cache_dir=args.cache_dir, device=args.device, patches=args.patches)
    print(f"{field.head.parameter_count():,} parameters, teacher {field.about['teacher_s']} s, "
          f"fit {field.about['fit_s']} s")
    if args.measure:
        table = evaluate_field(run, field, cache_dir=args.cache_dir, device=args.device)
        table.to_csv(run.run_dir.path / "field_evaluation.csv", index=False)
        print(summarise_field(table).to_string(index=False, float_format="{:.4f}".format))


def _fit_together(args: argparse.Namespace, run: Run) -> tuple[Run, Field]:
    """The new run of `--together`, and its field."""
    from hnerv_clip.inference import load_run
    from hnerv_clip.train.together import TogetherSettings, fit_together

    if not args.to:
        raise ConfigError("--together makes a new run: name its folder with --to FOLDER")
    settings = TogetherSettings.from_first_epoch(run.config, weight=args.together) if args.anew \
        else TogetherSettings(weight=args.together)
    if args.epochs is not None:
        settings = dataclasses.replace(settings, epochs=args.epochs)
    field = fit_together(run, args.to, cache_dir=args.cache_dir, settings=settings)
    return load_run(args.to, cache_dir=args.cache_dir, device=args.device, dataset=run.dataset
                    ), field


def _index(args: argparse.Namespace) -> None:
    from hnerv_clip.field.query import has_field
    from hnerv_clip.runs.run_dir import RunDir

    folder = resolve_path(args.folder)
    check_writable(folder)
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds a run: name a folder for the index, and after it those "
                          "of the runs")
    check_free(folder, force=args.force or not is_index(folder))
    for outf in args.outf:
        check_run(outf)
        if not has_field(resolve_path(outf)):
            RunDir(outf).config_with_head()
    from hnerv_clip.inference import load_run
    from hnerv_clip.search.index import index_runs

    paths = match_paths(args.data_path, len(args.outf))
    index = index_runs(load_run(outf, cache_dir=args.cache_dir, device=args.device, data_path=path)
                       for outf, path in zip(args.outf, paths, strict=True))
    print(index.videos.to_string(index=False, float_format="{:g}".format))
    print(f"{index.save(args.folder)}: {len(index)} patches")
