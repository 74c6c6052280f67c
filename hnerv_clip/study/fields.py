"""Fields on the study's networks: skill and bytes by size, and what joint training changes.

A field is fitted to a network that was trained for the picture alone (`frozen`), or together with
the CLIP head (`joint`), and asked at boxes that it never saw: `eight`, the study's patches;
`square`, squares of a side of 0.35 to 1 frame heights; `any`, boxes of `teachers.boxes`. Skill is
(s − s_const) / (1 − s_const) of the mean cosine s, on training frames and on held-out ones, whose
embeddings are interpolated. What they gave is `book/results/field_h100.json`.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hnerv_clip.codec.about import describe_dataset
from hnerv_clip.codec.video import FIELD, encode_video
from hnerv_clip.field.fit import FitSettings
from hnerv_clip.field.fit_run import CPU_BATCH, fit_head, sampling_of
from hnerv_clip.field.query import Field, make_field
from hnerv_clip.files import write_atomic
from hnerv_clip.heads.field import FieldHead
from hnerv_clip.inference import Run, embed_frames, predict_embeddings, sources_of
from hnerv_clip.metrics import bracket_frames, skill
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.study.side_files import Stored, side_file_curve
from hnerv_clip.teachers import Teacher, load_teacher
from hnerv_clip.teachers.boxes import BoxSampling, draw_boxes, embed_boxes
from hnerv_clip.verify.baselines import nearest_training_frame

Row = dict[str, Any]
NETWORKS = {"frozen": "pixels_only", "joint": "base"}  # kind of network → the study's variant
LARGE = {"hidden": 384, "layers": 3, "mid_channels": 96, "map_channels": 32, "rank": 256}
LONG = {"rounding": 0.8, "steps": 8000}
UNROUNDED = {"rounding": 0.0, "steps": 8000}
LARGEST = {"hidden": 1024, "layers": 4, "mid_channels": 192, "map_channels": 48, "rank": 512,
           "points": 5, "map_rows": 16}
LARGEST_FIT = {"rounding": 0.0, "steps": 15000, "lr": 1.5e-3, "frames": 64, "boxes": 128,
               "patches": 0.125, "bf16": True}
BOXES, MANY = 320, 2048  # of each frame that a field is fitted to
# Size → in what it differs from the default: of `heads.field.FieldConfig`, `map_rows`, `boxes` a
# frame, and `fit`, of `field.fit.FitSettings`
SIZES: dict[str, dict[str, Any]] = {
    "default": {"fit": None},
    "large": {**LARGE, "fit": {"rate_weight": 1e-8}},
    "small": {"rank": 48, "hidden": 96, "fit": {**LONG, "rate_weight": 5e-8}},
    "longer": {"fit": {**LONG, "rate_weight": 1e-7}},
    "middle": {"rank": 128, "hidden": 160, "fit": {**LONG, "rate_weight": 2e-8}},
    "unrounded": {**LARGE, "fit": UNROUNDED},
    "largest": {**LARGEST, "boxes": MANY, "fit": LARGEST_FIT},
    "wide": {**LARGE, "hidden": 768, "rank": 512, "fit": {**UNROUNDED, "lr": 2e-3}},
    "large_many": {**LARGE, "boxes": MANY, "fit": {**LONG, "rate_weight": 1e-8}},
    "middle_many": {"rank": 128, "hidden": 160, "boxes": MANY,
                    "fit": {**LONG, "rate_weight": 2e-8}},
    "small_many": {"rank": 48, "hidden": 96, "boxes": MANY, "fit": {**LONG, "rate_weight": 5e-8}},
    **{f"unrounded_{count}": {**LARGE, "boxes": count, "fit": UNROUNDED}
       for count in (80, 1024, MANY)},
    "largest_long": {**LARGEST, "boxes": 3 * MANY, "fit": {**LARGEST_FIT, "steps": 40000}},
}
TESTS = {"square": BoxSampling(48, 48, (0.35, 1.0), (1.0, 1.0), seed=1001),
         "any": BoxSampling(48, 48, seed=1002)}
SPREAD = 0.03  # by which boxes move and grow for the smoothed teacher, of which `SMOOTHED` are made
SMOOTHED = 8
SHIFTED = 24  # squares of a frame that are moved
SHIFTS = (0.01, 0.02, 0.05, 0.1, 0.2)  # of a box's side
MOVES = (1, 2, 4, 8)  # pixels
BUDGETS = (10_000, 15_000, 20_000, 30_000, 40_000, 60_000, 80_000, 100_000, 150_000, 200_000)
STORED, COMPONENTS = 160, 128  # boxes that a side file may hold, and components of them


def measure_field(run: Run, size: str, *, network: str, seed: int, folder: Path,
                  cache_dir: str | Path, steps: int = 0, boxes: int = 0) -> Row:
    """Fit a field and measure it.

    Args:
        run: trained; its network stays as it is. size: a key of `SIZES`.
        network: a key of `NETWORKS`, what the run is. seed: of the fit and of its boxes.
        folder: where the field goes, and what the teacher says of the test boxes is kept.
        steps, boxes: of the fit, 0 for the size's; fewer only try it.
    Returns:
        video, head (the size), network, seed, boxes_a_frame, patches (share of the boxes that are
        the study's patches); KIND_train, KIND_held and
        KIND_held_centered of `eight`, `square` and `any`; any_held_smooth, against `smoothed`
        targets; own_boxes, at the boxes that it was fitted to; params; bytes, by how much it makes
        the stored video longer (8 bits a weight without rounding); psnr_held_db, the network's on
        held-out frames; fit_s, teacher_s, change; those of `answer_speed`. Of a joint network
        also original_eight and original_any, the skill of its own head, asked at the boxes'
        centers.
    """
    asked = Asked(run, folder, cache_dir)
    change = SIZES[size]
    fit = {**(change["fit"] or {}), **({"steps": steps} if steps else {})}
    parts = {name: value for name, value in change.items() if name not in ("fit", "boxes")}
    boxes = boxes or change.get("boxes", BOXES)
    config = run.config.replace(field_boxes=boxes, seed=seed)
    own = replace(run, config=config, run_dir=RunDir(folder / f"{run.run_dir.path.name}_{size}"))
    own.run_dir.path.mkdir(parents=True, exist_ok=True)
    rounded, on_cpu = fit.get("rounding", 1) > 0, next(run.model.parameters()).device.type == "cpu"
    settings = FitSettings(**{"steps": config.train.field_steps, "seed": seed,
                              "rate_weight": config.train.field_rate_weight, **fit,
                              **(CPU_BATCH if on_cpu else {})})
    field = fit_head(own, cache_dir=cache_dir, device="auto", progress=False, settings=settings,
                     **parts)
    row = {"video": run.dataset.video.name, "head": size, "network": network, "seed": seed,
           "boxes_a_frame": boxes, "patches": settings.patches,
           **asked.skills(lambda kind, frames, source: make_field(
               own, field.head, source=source).embed(frames, asked.boxes[kind][0]))}
    train = asked.train[::8]
    drawn = draw_boxes(sampling_of(own), asked.frame_hw, asked.count)[train]
    teacher = embed_boxes(asked.teacher(), asked.frames[train], drawn).float().cpu()
    row["own_boxes"] = box_skill(make_field(own, field.head, source=sources_of(run.model)[0]).embed(
        train, drawn), teacher, teacher.mean((0, 1)))
    row |= answer_speed(make_field(own, field.head, source=sources_of(run.model)[-1]),
                        asked.frame_hw, asked.held_out, boxes=64 if on_cpu else 4096)
    row |= {"params": field.head.parameter_count(), "bytes": stored_bytes(own, field)
            if rounded else field.head.parameter_count(), "fit_s": field.about["fit_s"],
            "teacher_s": field.about["teacher_s"], "change": change,
            "psnr_held_db": held_out_psnr(run)}
    if run.config.model.predict_clip:
        row |= {f"original_{kind}": value for kind, value in original_skill(run, asked).items()}
    return {name: round(value, 4) if isinstance(value, float) else value
            for name, value in row.items()}


def answer_speed(field: Field, frame_hw: tuple[int, int], frames: np.ndarray, *,
                 boxes: int, repeats: int = 5) -> Row:
    """How many boxes a field answers for in a second, the network's share included.

    Args:
        frames: [N] frame numbers, each asked at so many `boxes`.
        repeats: the median of so many times counts, after one that does not.
    Returns:
        embeddings_per_s, of vectors that reach the CPU; scores_per_s, of cosines with one text.
    """
    drawn = draw_boxes(BoxSampling(boxes, boxes, seed=3), frame_hw, 1)[0]
    query = np.ones((1, field.head.config.dim), np.float32)
    found = {}
    for name, answer in (("embeddings_per_s", lambda: field.embed(frames, drawn)),
                         ("scores_per_s", lambda: field.scores(query, frames, drawn))):
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            answer()  # its result is on the CPU: nothing is under way when it returns
            times.append(time.perf_counter() - began)
        found[name] = round(boxes * len(frames) / statistics.median(times[1:]))
    return found


class Asked:
    """The boxes that fields are asked at, and what the teacher says of them.

    train, held_out: frame numbers. boxes: {kind: [T, P, 4]}, the same in every frame.
    """

    def __init__(self, run: Run, folder: Path, cache_dir: str | Path):
        data = run.dataset
        self.run, self.folder, self.cache_dir = run, folder, cache_dir
        self.frames, self.frame_hw = data.video.frames, data.video.frame_hw
        self.count = len(self.frames)
        self.train = np.asarray(data.split.train)
        self.held_out = np.setdiff1d(np.arange(self.count), self.train)
        boxes = {"eight": torch.as_tensor(data.grid.boxes), **{
            kind: draw_boxes(sampling, self.frame_hw, 1)[0] for kind, sampling in TESTS.items()}}
        self.boxes = {kind: own.expand(self.count, -1, -1) for kind, own in boxes.items()}
        self._teacher = None
        self.truth = self._kept("truth", lambda: {
            kind: embed_boxes(self.teacher(), self.frames, own).cpu()
            for kind, own in self.boxes.items()})
        self.smooth = self._kept("smooth", lambda: {"any": self._smoothed().half()})["any"]

    def teacher(self) -> Teacher:
        """The run's teacher, loaded when it is first asked."""
        if self._teacher is None:
            self._teacher = load_teacher(self.run.config.teacher,
                                         next(self.run.model.parameters()).device)
        return self._teacher

    def _kept(self, name: str, make) -> dict[str, Tensor]:
        """What is made once for these frames and kept in the folder."""
        video = self.run.dataset.video
        split = "_".join(map(str, (len(self.train), self.train[0])))
        path = self.folder / f"{video.name}_{video.digest[:12]}_{split}_{name}.pt"
        if path.is_file():
            return torch.load(path, weights_only=True)
        found = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: torch.save(found, file))
        return found

    def constant(self, kind: str) -> Tensor:
        """[D], the teacher's mean over the training frames."""
        return self.truth[kind][self.train].float().mean((0, 1))

    def skills(self, answer: Callable[[str, np.ndarray, str], Tensor]) -> Row:
        """Skill and mean-centered cosine of answer(kind, frames, source) → [N, P, D]."""
        row: Row = {}
        sources = sources_of(self.run.model)
        for kind in self.boxes:
            constant = self.constant(kind)
            for part, frames, source in (("train", self.train, sources[0]),
                                         ("held", self.held_out, sources[-1])):
                found = answer(kind, frames, source).float().cpu()
                truth = self.truth[kind][frames].float()
                row[f"{kind}_{part}"] = box_skill(found, truth, constant)
                if part == "held":
                    row[f"{kind}_held_centered"] = float(F.cosine_similarity(
                        found - constant, truth - constant, dim=-1).mean())
                    if kind == "any":
                        smooth = self.smooth.float()
                        row["any_held_smooth"] = box_skill(found, smooth, smooth.mean((0, 1)))
        return row

    def _smoothed(self) -> Tensor:
        """The teacher's mean over boxes around each of `any`, in held-out frames."""
        height, width = self.frame_hw
        boxes = self.boxes["any"][self.held_out].double()
        generator, total = torch.Generator().manual_seed(1), torch.zeros(())
        for _ in range(SMOOTHED):
            moved = (torch.rand(boxes.shape[1], 4, generator=generator).double() * 2 - 1) * SPREAD
            tall, wide = ((boxes[..., i] * (1 + moved[:, i])).round().clamp(8, side)
                          for i, side in ((2, height), (3, width)))
            top, left = (torch.minimum((boxes[..., i] + boxes[..., i + 2] * (0.5 + moved[:, i])
                                        - own / 2).round().clamp(min=0), side - own)
                         for i, side, own in ((0, height, tall), (1, width, wide)))
            total = total + embed_boxes(self.teacher(), self.frames[self.held_out], torch.stack(
                [top, left, tall, wide], -1).long()).float().cpu()
        return F.normalize(total, dim=-1)


def box_skill(found: Tensor, truth: Tensor, constant: Tensor) -> float:
    """Skill of answers [N, P, D] against that of a constant answer [D]."""
    own = (found * truth).sum(-1).mean()
    base = (truth @ F.normalize(constant, dim=0)).mean()
    return float(skill(float(own), float(base)))


def stored_bytes(run: Run, field: Field) -> int:
    """By how many bytes a field makes the stored video longer."""
    with torch.inference_mode():
        embeddings = embed_frames(run.model, run.dataset) if run.model.kind == "hybrid" else None
    config = run.config.replace(head="field")
    about = describe_dataset(run.dataset, config)

    def size(steps: dict[str, float], head: FieldHead | None) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return encode_video(run.model, embeddings, Path(folder) / "video.hnerv", config=config,
                                about=about, steps=steps, field=head)
    return size({f"{FIELD}.{name}": step for name, step in field.steps.items()}, field.head) \
        - size({}, None)


def held_out_psnr(run: Run) -> float:
    """PSNR in dB on held-out frames, predicted where the network can be made to."""
    summary = run.run_dir.summary()
    return float(summary.get("eval_psnr_val_interpolated", summary["eval_psnr_val"]))


def original_skill(run: Run, asked: Asked) -> dict[str, float]:
    """Skill of the original head at the centers of the boxes, in held-out frames."""
    found = {}
    for kind in ("eight", "any"):
        boxes = asked.boxes[kind][0].float()
        own = predict_embeddings(run.model, run.dataset, source=sources_of(run.model)[-1],
                                 centres=boxes[:, :2] + boxes[:, 2:] / 2)[asked.held_out]
        truth = asked.truth[kind][asked.held_out].float()
        found[kind] = box_skill(own, truth, asked.constant(kind))
    return found


def measure_teacher(run: Run, *, folder: Path, cache_dir: str | Path) -> list[Row]:
    """What needs no network, and how steady the teacher is, of one video.

    Returns:
        Rows with `baseline`: the nearest training frame, the interpolated teacher and, of the
        teacher's principal components, so many; one with what="shifts", the teacher's skill for its
        own embedding of a square of half the height that moves by a share of its side; one of the
        smoothed teacher, the mean over boxes around; what="moved", its skill for a test box that
        moves by so many `pixels`, and `mean_of_4`, of the mean over four such moves; and
        what="side file", the best of each budget (`study.side_files`), where ("eight", "any").
    """
    asked = Asked(run, folder, cache_dir)
    video, truth = run.dataset.video.name, {k: v.float() for k, v in asked.truth.items()}
    near = nearest_training_frame(np.arange(asked.count), asked.train)
    near[asked.train] = asked.train
    before, after, share = bracket_frames(np.arange(asked.count), asked.train)
    share = torch.as_tensor(share, dtype=torch.float32)[:, None, None]
    rows = [{"baseline": "nearest training frame", **asked.skills(
        lambda kind, frames, _: truth[kind][near[frames]])}]
    rows.append({"baseline": "interpolated teacher", **asked.skills(lambda kind, frames, _: (
        F.normalize(torch.lerp(truth[kind][before], truth[kind][after], share), dim=-1)[frames]))})
    flat = truth["any"][asked.train].flatten(0, 1)
    mean = flat.mean(0)
    axes = torch.linalg.svd(flat[::3] - mean, full_matrices=False)[2]
    for rank in (32, 64, 128, 256):
        if rank < len(axes):
            rows.append({"baseline": f"PCA {rank} of the teacher", **asked.skills(
                lambda kind, frames, _, r=rank: F.normalize(
                    (truth[kind][frames] - mean) @ axes[:r].T @ axes[:r] + mean, dim=-1))})
    rows.append({"what": "shifts", **_shifts(asked)})
    rows.append({"what": f"smoothed teacher (mean of {SMOOTHED} boxes within {SPREAD:.0%}) against "
                         "the teacher", "any_held": box_skill(
        asked.smooth.float(), truth["any"][asked.held_out], asked.constant("any"))})
    rows += [{"what": "moved", **row} for row in _moved(asked)]
    rows += [{"what": "side file", "where": kind, **row} for kind in ("eight", "any")
             for row in side_file_curve(_stored_boxes(asked, kind), BUDGETS)]
    return [{"video": video, **{name: round(value, 4) if isinstance(value, float) else value
                                for name, value in row.items()}} for row in rows]


def _shifts(asked: Asked) -> Row:
    height, width = asked.frame_hw
    side, frames = round(0.5 * height), asked.train[::8]
    edge, generator = side // 4, torch.Generator().manual_seed(0)
    corners = torch.stack([torch.randint(edge, limit - side - edge, (len(frames), SHIFTED),
                                         generator=generator) for limit in (height, width)], -1)

    def embed(down: float, right: float) -> Tensor:
        moved = corners + torch.tensor([round(down * side), round(right * side)])
        sides = torch.full((*moved.shape[:2], 2), side)
        return embed_boxes(asked.teacher(), asked.frames[frames],
                           torch.cat([moved, sides], -1)).float().cpu()

    own = embed(0, 0)
    mean = own.mean((0, 1))
    row = {f"shift {share:g}": box_skill(embed(0, max(share, 1 / side)), own, mean)
           for share in SHIFTS}
    both = F.normalize(embed(0, -0.05) + embed(0, 0.05), dim=-1)
    row["mean of ±0.05"] = box_skill(both, own, mean)
    for spread in (0.02, 0.05):
        around = sum(embed(spread * math.sin(angle), spread * math.cos(angle))
                     for angle in 2 * np.pi * np.arange(8) / 8)
        row[f"mean of 8 at {spread:g}"] = box_skill(F.normalize(around, dim=-1), own, mean)
    return row


def _moved(asked: Asked) -> list[Row]:
    """The teacher's skill for test boxes that move, where they have room, and for the mean over
    a move up, down, left and right."""
    frames, boxes = asked.frames[asked.train[::16]], asked.boxes["any"][0][:24]
    rows, limit = [], torch.tensor(asked.frame_hw)

    def embed(own: Tensor) -> Tensor:
        return embed_boxes(asked.teacher(), frames, own.expand(len(frames), -1, -1)).float().cpu()

    own = embed(boxes)
    mean = own.mean((0, 1))
    for pixels in MOVES:
        free = ((boxes[:, :2] >= pixels) & (boxes[:, :2] + boxes[:, 2:] + pixels <= limit)).all(1)
        if not free.any():
            continue
        found = [embed(boxes[free] + torch.tensor([down * pixels, right * pixels, 0, 0]))
                 for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        skills = [box_skill(one, own[:, free], mean) for one in found]
        rows.append({"pixels": pixels, "boxes": int(free.sum()) * len(frames),
                     "skill": sum(skills) / len(skills), "mean_of_4": box_skill(
                         F.normalize(sum(found), dim=-1), own[:, free], mean)})
    return rows


def _stored_boxes(asked: Asked, kind: str) -> Stored:
    """What a side file could hold: boxes of all training frames, in principal components."""
    sampling = BoxSampling(STORED, STORED, seed=77)
    boxes = draw_boxes(sampling, asked.frame_hw, 1)[0]
    found = asked._kept("stored", lambda: {"any": embed_boxes(
        asked.teacher(), asked.frames[asked.train],
        boxes.expand(len(asked.train), -1, -1)).cpu()})["any"].float()
    flat = found.flatten(0, 1)
    mean = flat.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        axes = torch.pca_lowrank(flat - mean, q=min(COMPONENTS, *flat.shape), center=False,
                                 niter=3)[2]
    return Stored(boxes=boxes.numpy().astype(float), train=asked.train, mean=mean.numpy(),
                  axes=axes.numpy(), values=((found - mean) @ axes).numpy(),
                  asked=asked.boxes[kind][0].numpy().astype(float), frames=asked.held_out,
                  truth=asked.truth[kind][asked.held_out].float().numpy(),
                  constant=asked.constant(kind).numpy(), frame_height=asked.frame_hw[0])
