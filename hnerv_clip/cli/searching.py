"""The command search: texts and boxes, in a run, an index or a stored video."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hnerv_clip.cli.given import check_run, is_index, load_run
from hnerv_clip.cli.stored import parse_box, stored_notes
from hnerv_clip.config import BUNDLED, ConfigError, TeacherConfig
from hnerv_clip.paths import match_paths, resolve_path

if TYPE_CHECKING:
    import pandas as pd


def search(args: argparse.Namespace) -> None:
    """The command."""
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
    path = resolve_path(args.outf)
    if (path / FIELD).is_file():
        return _search_field(args, queries, box)
    if path.is_file() or args.outf.endswith(".hnerv"):
        return _search_file(args, queries, box)
    if is_index(path):
        if box:
            raise ConfigError(f"--box needs a run or a stored video, and {path} is an index, which "
                              "takes texts")
        return _search_index(args, queries)
    run = RunDir(check_run(path))
    stored = [name for name in stored_notes(path) if Path(name).is_file()]
    if stored and (box or not run.config().model.predict_clip):
        raise ConfigError(f"{path} has no field of its own; search the file that was stored from "
                          f"it: hnerv-clip search {stored[0]}")
    if box:
        raise ConfigError(f"--box needs a field, which {args.outf} has not: "
                          f"hnerv-clip fit-head {args.outf}")
    config = run.config_with_head()
    texts = encode_cached(queries, config.teacher, run.path, device=args.device)
    moved, = match_paths(args.data_path, 1)
    predicted = predict_patches(run.path, cache_dir=args.cache_dir, device=args.device,
                                data_path=moved)
    show = _text_hits(args, config.teacher, run.path,
                      label=f"{predicted.teacher_label}; embeddings: {predicted.source}")
    for query, vector in zip(queries, texts):
        hits = rank_patches(vector, predicted.embeddings, args.top_k, apart=args.apart)
        hits["time_s"] = predicted.times_s[hits.frame]
        for i, side in enumerate(("top", "left", "height", "width")):
            hits[side] = predicted.boxes[hits.patch.to_numpy(), i]
        show(query, vector, hits, predicted.embeddings[hits.frame, hits.patch])


def _search_field(args: argparse.Namespace, queries: list[str],
                  box: tuple[float, float, float, float] | None) -> None:
    import numpy as np

    from hnerv_clip.field.query import load_field
    from hnerv_clip.inference import sources_of
    from hnerv_clip.search.boxes import search_boxes
    from hnerv_clip.search.cache import encode_cached
    from hnerv_clip.stored.checks import check_box, check_time

    run = load_run(args)
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
        _show_hits(f"{_box_words(box, args.time)}  ({label})", hits)
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


def _search_file(args: argparse.Namespace, queries: list[str],
                 box: tuple[float, float, float, float] | None) -> None:
    from hnerv_clip import open as open_video

    video = open_video(resolve_path(args.outf), device=args.device)
    teacher = video.header.config.teacher
    label = video.header.meta["teacher"]["label"] or teacher.teacher
    if box:
        hits = video.search_region(box, args.time, args.top_k, apart=args.apart)
        _show_hits(f"{_box_words(box, args.time)}  ({label})", hits)
    for query in queries:
        _show_text(query, video.search(query, args.top_k, apart=args.apart, weights=args.weights,
                                       match=True), teacher=teacher, label=label)


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
        _show_text(query, hits, teacher=teacher, label=label, where=where)

    return show


def _show_text(query: str, hits: pd.DataFrame, *, teacher: TeacherConfig, label: str,
               where: str = "this video") -> None:
    """Print a text as the teacher takes it, whether it has a match, and its hits.

    Args:
        hits: with their `match`, if it is known; of a text that is not understood it says nothing.
    """
    from hnerv_clip.labels import match_words

    taken, understood = _reading(query, teacher)
    title = f"{query}{taken}  ({label})"
    if not understood:
        hits = hits.drop(columns="match", errors="ignore")
    if "match" in hits:
        title += f"\n{match_words(query, hits.match.max(), where=where)}"
    _show_hits(title, hits)


def _show_hits(title: str, hits: pd.DataFrame) -> None:
    """Print the hits of one search."""
    print(title)
    print(hits.to_string(index=False, float_format="{:.3f}".format), end="\n\n")


def _reading(query: str, teacher: TeacherConfig) -> tuple[str, bool]:
    """What the bundled teacher takes a text for that is no class of ImageNet's, and whether that
    means anything."""
    from hnerv_clip.teachers.imagenet import imagenet_names

    if teacher.teacher != BUNDLED or " ".join(query.lower().split()) in imagenet_names():
        return "", True
    from hnerv_clip.teachers import sentences  # torch, which a name need not load

    try:
        taken = f"taken as {sentences.explain_mixture(query)} by a sentence encoder, not CLIP"
        if sentences.is_understood(query):
            return f"  ({taken})", True
        return ("  (not understood: no class of ImageNet is near it, so the hits mean little; "
                f"{taken})"), False
    except ConfigError:  # it is not installed here: an earlier search kept the text's vector
        return "", True


def _box_words(box: Sequence[float], time_s: float) -> str:
    """What a search for the like of a box is called, above its hits."""
    return f"like box {','.join(f'{value:g}' for value in box)} at {time_s:g} s"
