"""What fields are measured against: side files, boxes drawn by hand, other hold-outs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.files import read_json, write_json
from hnerv_clip.study import hold_outs, labels, side_files, together
from hnerv_clip.teachers.boxes import BoxSampling, draw_boxes
from hnerv_clip.video import split_frames

HW = (64, 128)


def stored(count=40, frames=24, dim=32):
    """Embeddings that change smoothly with box and time."""
    rng = np.random.default_rng(0)
    boxes, asked = (draw_boxes(BoxSampling(n, n, seed=seed), HW, 1)[0].numpy().astype(float)
                    for n, seed in ((count, 1), (12, 2)))
    mix = rng.normal(size=(5, dim))

    def embed(times, own):
        time = np.broadcast_to(times[:, None, None] / frames, (len(times), len(own), 1))
        place = np.concatenate([np.broadcast_to(own / 64, (len(times), *own.shape)), time], -1)
        vectors = 2 + np.sin(place @ mix)
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    train = np.array([t for t in range(frames) if t % 5 != 4])
    held = np.setdiff1d(np.arange(frames), train)
    flat = embed(train, boxes)
    return side_files.Stored(
        boxes=boxes, train=train, mean=np.zeros(dim), axes=np.eye(dim), values=flat, asked=asked,
        frames=held, truth=embed(held, asked), constant=embed(train, asked).mean((0, 1)),
        frame_height=HW[0])


def test_a_side_file_knows_more_the_more_bytes_it_has():
    rows = side_files.side_file_curve(stored(), (900, 2000, 100_000))
    assert [row["budget"] for row in rows] == [900, 2000, 100_000]
    assert all(row["size_bytes"] <= row["budget"] for row in rows)
    assert rows[0]["skill"] < rows[1]["skill"] <= rows[2]["skill"]
    assert 0.6 < rows[2]["skill"] < 1


def test_interpolation_between_boxes_gives_back_those_that_are_stored():
    given = stored()
    weights = side_files.kriging_weights(given.boxes, given.boxes, given.values,
                                         frame_height=HW[0])
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights.argmax(1) == np.arange(len(given.boxes))).all()


def test_rounded_values_cost_what_their_entropy_says():
    values, size = side_files._rounded(np.tile([[[-1.0], [1.0]]], (1, 32, 1)), 3)
    np.testing.assert_allclose(values[0, :2, 0], [-1, 1])
    assert size == 64 / 8 + 2 * 2  # a bit each, and a table of two values


def test_labels_lie_in_held_out_frames_of_their_videos():
    table = labels.read_labels()
    assert len(table) >= 40 and set(table.video) == {"bunny", "bikes", "carphone"}
    assert (table.frame % 5 == 4).all()
    for row in table.itertuples():
        height, width = map(int, row.crop.split("_"))
        assert row.top + row.height <= height and row.left + row.width <= width


def test_a_map_that_is_bright_in_the_label_points_at_it(tmp_path):
    table = labels.read_labels().query("video == 'bunny'")[:2]
    hw = (640, 1280)
    label = table.iloc[0][["top", "left", "height", "width"]].to_numpy(float)

    def near(_, boxes, __, sign=1.0):
        middle = label[:2] + label[2:] / 2
        return -sign * np.linalg.norm(boxes[:, :2] + boxes[:, 2:] / 2 - middle, axis=1)

    good = labels.score_labels(table[:1], near, frame_hw=hw).iloc[0]
    bad = labels.score_labels(table[:1], lambda *a: near(*a, sign=-1.0), frame_hw=hw).iloc[0]
    assert good.hit and not bad.hit
    assert good.box_iou > 0.3 > bad.box_iou and good.map_iou > bad.map_iou
    assert good.chance == pytest.approx(label[2] * label[3] / (640 * 1280))
    (tmp_path / labels.FILE).write_text("video,frame\nbunny,4\n")
    with pytest.raises(ConfigError, match="has columns video, frame"):
        labels.read_labels(tmp_path)


def test_hold_outs_alternate_blocks_of_two_seconds():
    splits = hold_outs.hold_out_splits(8.0)
    found = {name: split_frames(40, Config.from_params(data_split=split).video.data_split)
             for name, split in splits.items()}
    assert list(found["blocks of 2 s"].val) == [*range(16, 32)]
    assert list(found["one frame in 16"].val) == [15, 31]
    assert len(found["one frame in 5"].val) == 8


def test_time_alone_is_the_teacher_interpolated_at_the_very_box(monkeypatch):
    """Embeddings turn by 0.3 a frame, boxes turn them further; frames 1 and 2 lie between 0, 3."""
    def teach(frames, boxes):
        angle = 0.3 * frames[:, None] + boxes[..., 0].double()
        return torch.stack([angle.cos(), angle.sin()], -1)
    boxes = torch.tensor([[0.0], [0.5]]).expand(4, 2, 1)
    truth = teach(torch.arange(4), boxes)
    monkeypatch.setattr(hold_outs, "box_targets", lambda *a, **k: (boxes, truth))
    monkeypatch.setattr(hold_outs, "load_teacher", lambda *a: None)
    monkeypatch.setattr(hold_outs, "embed_boxes", lambda _, frames, own: teach(frames, own))
    video = SimpleNamespace(frames=torch.arange(4))
    run = SimpleNamespace(
        dataset=SimpleNamespace(video=video, split=SimpleNamespace(train=[0, 3])),
        config=SimpleNamespace(teacher=None), model=torch.nn.Linear(1, 1))
    # a third of the way along a chord of 0.9 is off the arc's third by this angle
    off = 0.3 - np.arctan2(np.sin(0.9) / 3, 2 / 3 + np.cos(0.9) / 3)
    constant = np.mean([np.cos(a + b - 0.7) for a in (0.3, 0.6) for b in (0, 0.5)])
    assert hold_outs.interpolated_skill(run, cache_dir="") == pytest.approx(
        (np.cos(off) - constant) / (1 - constant), abs=1e-5)


def test_rows_of_hold_outs_are_completed_and_published(monkeypatch, tmp_path):
    monkeypatch.setattr(hold_outs, "load_run", lambda path, **_: SimpleNamespace(
        run_dir=path))
    monkeypatch.setattr(hold_outs, "interpolated_skill", lambda run, **_: 0.87654)
    old = {"video": "bunny", "size": "8×8", "device": "a CPU", "hold_out": "one frame in 5",
           "between": 0.5, "seed": 0, "any_held": 0.5}
    write_json(tmp_path / "bunny.json", [old])
    row, = hold_outs.read_rows(tmp_path / "bunny.json", cache_dir="")
    assert row == {**old, "changes": {}, "interpolated_held": 0.8765}
    monkeypatch.delattr(hold_outs, "interpolated_skill")  # it is kept
    assert hold_outs.read_rows(tmp_path / "bunny.json", cache_dir="") == [row]
    monkeypatch.setattr(hold_outs, "resolve_path", lambda _: tmp_path / "results")
    (tmp_path / "results").mkdir()
    hold_outs.collect_hold_outs([{**row, "any_held": 0.1}, {**row, "seed": 1},
                                 {**row, "changes": {"lr": "1e-3"}}], tmp_path / "results")
    hold_outs.main([str(tmp_path), "--publish"])
    found = read_json(tmp_path / "results" / hold_outs.FILE, fix="")
    assert found["rows"] == [row, {**row, "seed": 1}, {**row, "changes": {"lr": "1e-3"}}]
    assert found["about"]["epochs"] == 30 and "not CLIP" in found["about"]["teacher"]


def test_pairs_of_training_together_replace_their_like(tmp_path):
    row = {"video": "bunny", "size": "8×8", "device": "a CPU", "network": "first", "weight": 0.005,
           "epochs": 2, "seed": 0, "any_held": 0.5}
    together.collect_together([row, {**row, "network": "together"}], tmp_path)
    together.collect_together([{**row, "any_held": 0.6}], tmp_path)
    kept = read_json(tmp_path / together.FILE, fix="")["rows"]
    assert [row["any_held"] for row in kept] == [0.6, 0.5]
