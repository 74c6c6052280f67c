"""Commands on trained runs: fit-head, evaluate, verify, index, search.

`add_commands` puts them on the command line; nothing heavy is imported before one runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hnerv_clip.cli.stored import box_words, hits_title, parse_box, search_file, show_hits
from hnerv_clip.config import ConfigError, TeacherConfig
from hnerv_clip.files import RunError, check_writable, write_atomic
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
            ("search", _search, "find what answers a text, or is like a box")]:
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


def _load_run(args: argparse.Namespace):
    """The one run that a command names."""
    from hnerv_clip.inference import load_run

    path, = match_paths(args.data_path, 1)
    return load_run(args.outf, cache_dir=args.cache_dir, device=args.device, data_path=path)


def show_summary(table: pd.DataFrame) -> None:
    """Print an evaluation as one line for each variant, source and split."""
    from hnerv_clip.evaluate import summarise

    print(summarise(table).to_string(index=False, na_rep="", float_format="{:.4f}".format))


def _evaluate(args: argparse.Namespace) -> None:
    from hnerv_clip.evaluate import evaluate_run
    show_summary(evaluate_run(_load_run(args)))


def _verify(args: argparse.Namespace) -> None:
    from hnerv_clip.verify.pool import join_runs, study_words
    from hnerv_clip.verify.run import verify_folders

    path = resolve_path(args.table) if args.table not in (None, "-") else None
    if args.replace and path is None:
        raise ConfigError("--replace is for the file of --table: name one, --table FILE.csv")
    if path:
        if path.exists() and not (args.replace or args.force):
            raise RunError(f"{path} exists; choose another name, or add --replace to write it anew "
                           "(runs that are verified are not verified again)")
        check_writable(path.parent)
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

    run = _load_run(args)
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
    from hnerv_clip.search.cache import encode_cached, predict_patches
    from hnerv_clip.search.rank import rank_patches
    from hnerv_clip.teachers.text import parse_queries

    if not args.queries and not args.box:
        raise ConfigError("nothing to search for: give texts, or --box X0,Y0,X1,Y1 --time S")
    if args.time is not None and not args.box:
        raise ConfigError(f"--time {args.time:g} says when --box is; give both, or texts alone")
    box, args.time = parse_box(args.box) if args.box else None, args.time or 0.0
    queries = parse_queries([query for words in args.queries for query in parse_queries(words)]
                            ) if args.queries else []
    if (resolve_path(args.outf) / FIELD).is_file():
        return _search_field(args, queries, box)
    if resolve_path(args.outf).is_file() or args.outf.endswith(".hnerv"):
        return search_file(resolve_path(args.outf), queries, top_k=args.top_k, apart=args.apart,
                           device=args.device, weights=args.weights, box=box, time_s=args.time)
    if box:
        raise ConfigError(f"--box needs a field, which {args.outf} has not: "
                          f"hnerv-clip fit-head {args.outf}")
    if (resolve_path(args.outf) / "videos.json").is_file():
        return _search_index(args, queries)
    run = RunDir(args.outf)
    config = run.config_with_head()
    texts = encode_cached(queries, config.teacher, run.path, device=args.device)
    path, = match_paths(args.data_path, 1)
    predicted = predict_patches(run.path, cache_dir=args.cache_dir, device=args.device,
                                data_path=path)
    show = _text_hits(args, config.teacher, run.path,
                      label=f"{predicted.teacher_label}; embeddings: {predicted.source}")
    for query, vector in zip(queries, texts):
        hits = rank_patches(vector, predicted.embeddings, args.top_k, apart=args.apart)
        hits["time_s"] = predicted.times_s[hits.frame]
        for i, side in enumerate(("top", "left", "height", "width")):
            hits[side] = predicted.boxes[hits.patch.to_numpy(), i]
        show(query, vector, hits, predicted.embeddings[hits.frame, hits.patch])


def _text_hits(args: argparse.Namespace, teacher: TeacherConfig, folder: Path, *, label: str,
               where: str = "this video") -> Callable[..., None]:
    """A function that prints the hits of a text, and whether it has a match.

    It takes text, vector [D], hits and their embeddings [K, D]. Where the teacher is missing, an
    earlier search kept the text's vector at most: then nothing is said of a match.
    """
    from hnerv_clip.search.cache import references_cached
    from hnerv_clip.search.rank import match_scores

    try:
        names = references_cached(teacher, folder, device=args.device)
    except ConfigError:
        names = None

    def show(query, vector, hits, embeddings):
        if names is not None:
            hits["match"] = match_scores(vector, names, embeddings)
        show_hits(hits_title(query, hits, teacher=teacher, label=label, where=where), hits)

    return show


def _search_field(args: argparse.Namespace, queries: list[str],
                  box: tuple[float, float, float, float] | None) -> None:
    import numpy as np

    from hnerv_clip.field.query import load_field
    from hnerv_clip.inference import sources_of
    from hnerv_clip.search.boxes import search_boxes
    from hnerv_clip.search.cache import encode_cached
    from hnerv_clip.stored.checks import check_box, check_time

    run = _load_run(args)
    source = sources_of(run.model)[-1]  # the prediction: no frame asked about is seen
    field, teacher = load_field(run, source=source), run.config.teacher
    label, times = f"{run.dataset.teacher_label}; embeddings: {source}", run.dataset.video.times_s
    top_k, apart, folder = args.top_k, args.apart, run.run_dir.path
    texts = encode_cached(queries, teacher, folder, device=args.device) if queries else []
    if box:
        x0, y0, x1, y1 = check_box(box, run.model.frame_hw)
        check_time(args.time, times)
        near = (float(np.interp(args.time, times, range(len(times)))), (y0, x0, y1 - y0, x1 - x0))
        hits = search_boxes(field, field.embed(*near), top_k, apart=apart, not_near=near)
        hits["time_s"] = times[hits.frame.to_numpy()]
        show_hits(f"{box_words(box, args.time)}  ({label})", hits)
    show = _text_hits(args, teacher, folder, label=label) if queries else None
    for query, vector in zip(queries, texts):
        hits = search_boxes(field, vector, top_k, apart=apart)
        hits["time_s"] = times[hits.frame.to_numpy()]
        show(query, vector, hits, np.stack([
            field.embed(hit.frame, (hit.top, hit.left, hit.height, hit.width)).numpy()
            for hit in hits.itertuples()]))


def _search_index(args: argparse.Namespace, queries: list[str]) -> None:
    from hnerv_clip.search.cache import encode_cached
    from hnerv_clip.search.index import load_index

    index, folder = load_index(args.outf), resolve_path(args.outf)
    teacher, videos = index.teacher_config(), len(index.videos)
    texts = encode_cached(queries, teacher, folder, device=args.device)
    show = _text_hits(args, teacher, folder, label=f"{index.label}; {len(index)} patches",
                      where="this video" if videos == 1 else f"these {videos} videos")
    for query, vector in zip(queries, texts):
        hits = index.search(vector, args.top_k, apart=args.apart)
        hits["time_s"] = index.times_of(hits)
        show(query, vector, hits, index.embeddings(hits))
