"""Do heat maps point at what is there? A field and its teacher against boxes drawn by hand.

    python -m hnerv_clip.study.labels output/bunny output/bikes output/carphone --publish

The boxes, `book/results/labels.csv`, are of held-out frames of the built-in videos, each with the
name of an ImageNet class, which both teachers know, and a text in other words, which the bundled
teacher reads as a mixture of classes (`teachers.sentences`). Of such a frame square boxes of
several sides around evenly spaced positions are scored for the name. The command asks the fields of
runs (`hnerv-clip fit-head`) in held-out frames; `--publish` replaces
`book/results/field_labels.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from hnerv_clip.config import ConfigError
from hnerv_clip.field.fit_run import summarise_field
from hnerv_clip.field.query import Field, load_field
from hnerv_clip.files import RunError, write_json
from hnerv_clip.inference import Run, load_run, sources_of
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import code_version, commit_words, device_name
from hnerv_clip.search.boxes import SIDES, around_positions, overlap
from hnerv_clip.teachers import load_teacher
from hnerv_clip.teachers.boxes import embed_boxes
from hnerv_clip.teachers.sentences import PACKAGE, has_sentences

FILE, RESULTS = "labels.csv", "field_labels.json"
COLUMNS = ["video", "crop", "frame", "query", "text", "top", "left", "height", "width"]
POSITIONS = 8  # of a heat map, in the height of a frame
Scorer = Callable[[int, npt.NDArray, str], npt.NDArray]  # frame, boxes [P, 4], query → [P]


def read_labels(folder: str | Path = "book/results") -> pd.DataFrame:
    """The boxes drawn by hand: `COLUMNS`; crop is HEIGHT_WIDTH of the frame that they lie in."""
    path = resolve_path(folder) / FILE
    labels = pd.read_csv(path)
    if list(labels.columns) != COLUMNS:
        raise ConfigError(f"{path} has columns {', '.join(labels.columns)}, not "
                           f"{', '.join(COLUMNS)}: git checkout {folder}")
    return labels


def measure_labels(run: Run, field: Field, labels: pd.DataFrame, *, in_words: bool = False
                   ) -> pd.DataFrame:
    """Rows of `score_labels` for a run's teacher, which sees the frame, and for its field.

    Args:
        field: of the run, with the embeddings that are to answer (`make_field`).
        labels: of `read_labels`; those of the run's video are taken.
        in_words: also ask for the texts.
    Returns:
        video, who ("teacher", "field", or these with ", in words"), and the columns of
        `score_labels`.
    Raises:
        ConfigError: no label is of this video, or it is cropped otherwise.
    """
    frames, name = run.dataset.video.frames, run.dataset.video.name
    crop = "_".join(map(str, frames.shape[2:]))
    own = labels[labels.video.isin([name.split()[0]]) & (labels.crop == crop)]
    if own.empty:
        raise ConfigError(f"no label is of {name} in {crop}: labels are of " + ", ".join(
            f"{row.video} in {row.crop}" for row in labels.drop_duplicates("video").itertuples()))
    teacher = load_teacher(run.config.teacher, next(run.model.parameters()).device)
    asked = [*own["query"].unique(), *(own["text"].unique() if in_words else ())]
    texts = {text: teacher.encode_text([text]).float().cpu() for text in asked}
    seen: dict[int, torch.Tensor] = {}

    def ask_teacher(frame: int, boxes: npt.NDArray, query: str) -> npt.NDArray:
        if frame not in seen:
            whole = torch.from_numpy(np.round(boxes)).long()[None]
            seen[frame] = embed_boxes(teacher, frames[[frame]], whole)[0].float().cpu()
        return (seen[frame] @ texts[query][0]).numpy()

    def ask_field(frame: int, boxes: npt.NDArray, query: str) -> npt.NDArray:
        return field.scores(texts[query], frame, boxes)[0, 0].numpy()

    rows, hw = [], (frames.shape[2], frames.shape[3])
    for who, scorer in (("teacher", ask_teacher), ("field", ask_field)):
        rows.append(score_labels(own, scorer, frame_hw=hw).assign(who=who))
        if in_words:
            found = score_labels(own.assign(query=own["text"]), scorer, frame_hw=hw)
            rows.append(found.assign(who=f"{who}, in words", query=own["query"].to_numpy()))
    return pd.concat(rows).assign(video=name)


def score_labels(labels: pd.DataFrame, scorer: Scorer, *, frame_hw: tuple[int, int],
                 sides: tuple[float, ...] = SIDES) -> pd.DataFrame:
    """How well scores of boxes find what is labelled.

    Args:
        labels: of one video, as `read_labels` gives them.
        scorer: scores of boxes for a query, higher where it fits better.
    Returns:
        A row for each label: frame, query; hit, whether the middle of the best box lies in the
        label; chance, the label's share of the frame; box_iou, intersection over union of the best
        box and the label; map_iou, the same of the heat map (the mean over sides) where it is above
        the middle between its least and largest value; middle, whether the frame's middle would be
        a hit.
    """
    height, width = frame_hw
    boxes, hw = around_positions(frame_hw, sides, stride=max(1, height // POSITIONS))
    stride, rows = max(1, height // POSITIONS), []
    for label in labels.itertuples():
        target = np.array([label.top, label.left, label.height, label.width], float)
        scores = np.asarray(scorer(label.frame, boxes, label.query), float)
        best = boxes[scores.argmax()]
        heat = scores.reshape(len(sides), *hw).mean(0)
        bright = heat >= (heat.min() + heat.max()) / 2
        inside = np.outer(*(
            (at >= low) & (at < low + length) for at, low, length in zip(
                (np.arange(n) * stride + stride // 2 + 0.5 for n in hw), target[:2], target[2:])))
        rows.append({"frame": label.frame, "query": label.query,
                     "hit": _holds(target, best[:2] + best[2:] / 2),
                     "middle": _holds(target, np.array([height, width]) / 2),
                     "chance": target[2] * target[3] / (height * width),
                     "box_iou": float(overlap(target, best[None])[0]),
                     "map_iou": float((bright & inside).sum() / max(1, (bright | inside).sum()))})
    return pd.DataFrame(rows)


def _holds(box: npt.NDArray, point: npt.NDArray) -> bool:
    return bool(((point >= box[:2]) & (point < box[:2] + box[2:])).all())


def describe_field(run: Run, field: Field, labels: pd.DataFrame) -> dict[str, Any]:
    """What is asked: video, size, boxes (a frame that it was fitted to), any_held (skill at any
    box of held-out frames, from `field_evaluation.csv`), device and commit of the training.

    Raises:
        RunError: the run has no evaluation of its field.
        ConfigError: a frame with labels was trained on.
    """
    name, trained = run.dataset.video.name, run.dataset.split.train
    own = labels.frame[labels.video == name.split()[0]]
    if seen := sorted(set(own) & set(map(int, trained))):
        raise ConfigError(f"{run.run_dir.path} was trained on frame {seen[0]} of {name}, which has "
                          "labels: train with --data_split 4_5_5, which holds it out")
    path = run.run_dir.path / "field_evaluation.csv"
    if not path.is_file():
        raise RunError(f"{path} does not exist: hnerv-clip fit-head {run.run_dir.path}")
    table = summarise_field(pd.read_csv(path)).set_index(["where", "split", "source"])
    height, width = run.model.frame_hw
    facts = run.run_dir.provenance()
    return {"video": name, "size": f"{height}×{width}", "boxes": field.about["boxes"],
            "any_held": round(float(table.skill["any box", "held_out", sources_of(run.model)[-1]]),
                              4), "device": facts["device"], "commit": facts["commit"]}


def main(argv: Sequence[str] | None = None) -> None:
    """The command in this module's first lines; prints hits and overlaps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs with fields, one a video")
    parser.add_argument("--cache_dir", default="output/cache")
    parser.add_argument("--publish", action="store_true",
                        help=f"put the rows into book/results/{RESULTS}, for those that are there")
    args = parser.parse_args(argv)
    labels, in_words, fields, rows = read_labels(), has_sentences(), [], []
    runs, path = [load_run(folder, cache_dir=args.cache_dir) for folder in args.runs], None
    if args.publish:
        path = resolve_path("book/results") / RESULTS
        lost = {row["video"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
                } - {run.dataset.video.name for run in runs} if path.is_file() else set()
        if lost:
            raise ConfigError(f"{path} has rows of {', '.join(sorted(lost))}, of which no run is "
                              "given: name a run of each, or remove the file")
    about = {"made by": "hnerv_clip.study.labels.measure_labels",
             "commit": commit_words(dict(zip(("commit", "dirty"), code_version())))}
    for run in runs:
        field = load_field(run, source=sources_of(run.model)[-1])
        fields.append(describe_field(run, field, labels))
        rows.append(measure_labels(run, field, labels, in_words=in_words))
        print(rows[-1].groupby("who", sort=False)[["hit", "box_iou", "map_iou"]].mean(), flush=True)
        about |= {"teacher": run.dataset.teacher_label,
                  "device": device_name(next(run.model.parameters()).device)}
    if in_words:
        about["words"] = f"{PACKAGE} {metadata.version(PACKAGE)} (sentence encoder)"
    if path:
        table = pd.concat(rows).round(4)
        write_json(path, {
            "about": {**about, "fields": fields},
            "rows": table[["video", "who", *table.columns.drop(["video", "who"])]].to_dict(
                "records")})


if __name__ == "__main__":
    main()
