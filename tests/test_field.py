"""The semantic field: its parts against plain computations, its fit, its questions, bad input."""

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import shrink_teacher_pictures

from hnerv_clip import cli
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.field import fit_run
from hnerv_clip.field.fit import FitSettings, fit_field
from hnerv_clip.field.query import FIELD, Field, field_config, has_field, load_field, make_field
from hnerv_clip.files import read_json, write_json
from hnerv_clip.heads.field import (
    FieldConfig,
    FieldHead,
    check_boxes,
    encode_boxes,
    sample_boxes,
)
from hnerv_clip.inference import Run, load_run
from hnerv_clip.runs.run_dir import RunError
from hnerv_clip.search import boxes as search_boxes
from hnerv_clip.study import labels
from hnerv_clip.teachers import boxes as box_targets
from hnerv_clip.teachers import cached_embeddings
from hnerv_clip.teachers.boxes import BoxSampling, draw_boxes, embed_boxes
from hnerv_clip.train import train
from hnerv_clip.verify import run as verifying

CONFIG = FieldConfig(dim=24, frame_hw=(40, 80), frame_count=9, source_channels=6, up=2,
                     mid_channels=8, map_channels=4, map_hw=(4, 8), hidden=32, rank=8,
                     keyframes=3, latent_channels=2)
BOXES = torch.tensor([[0.0, 0, 40, 40], [4.5, 20, 20, 30], [20, 60, 20, 20]])


def small_field(**changes):
    torch.manual_seed(0)
    head = FieldHead(FieldConfig.from_dict({**CONFIG.to_dict(), **changes})).eval()
    return head, torch.randn(9, 6, 2, 4)


def test_the_configuration_survives_a_files_header():
    assert FieldConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert all(isinstance(v, (int, float, str)) for v in CONFIG.to_dict().values())
    with pytest.raises(ConfigError, match="does not know: update"):
        FieldConfig.from_dict({**CONFIG.to_dict(), "newer": 1})
    with pytest.raises(ConfigError, match="needs keyframes"):
        FieldConfig(dim=4, frame_hw=(8, 8), frame_count=2)


@pytest.mark.parametrize("output", ["linear", "relu"])
def test_embeddings_are_unit_vectors_and_scores_their_products(output):
    head, features = small_field(output=output)
    times = torch.tensor([0, 3.5, 8])
    found = head(features[:3], times, BOXES)
    assert found.shape == (3, 3, 24)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 3))
    queries = F.normalize(torch.randn(5, 24), dim=1)
    scores = head.scorer(queries)(head.codes(head.maps(features[:3], times), BOXES))
    torch.testing.assert_close(scores, found @ queries.T, atol=1e-5, rtol=1e-4)


def test_latent_maps_are_interpolated_between_keyframes():
    head, _ = small_field(source_channels=0)
    at = head.maps(None, torch.tensor([0.0, 2, 4, 8]))
    torch.testing.assert_close(at[0], head.latents[0])
    torch.testing.assert_close(at[1], (head.latents[0] + head.latents[1]) / 2)
    torch.testing.assert_close(at[2:], head.latents[1:])


def test_a_map_is_sampled_inside_the_box():
    # A map that holds its own coordinates gives back those of the sampled points.
    y, x = torch.meshgrid((torch.arange(8) + 0.5) * 5, (torch.arange(16) + 0.5) * 5, indexing="ij")
    found = sample_boxes(torch.stack([y, x])[None], torch.tensor([[[10.0, 20, 12, 24]]]),
                         frame_hw=(40, 80), points=3).view(2, 3, 3)
    torch.testing.assert_close(found[0], torch.tensor([12.0, 16, 20])[:, None].expand(3, 3))
    torch.testing.assert_close(found[1], torch.tensor([24.0, 32, 40]).expand(3, 3))


def test_a_box_is_encoded_by_center_and_size():
    found = encode_boxes(torch.tensor([10.0, 20, 20, 40]), frame_hw=(40, 80), frequencies=1)
    plain = torch.tensor([0.0, 0, float(np.log(0.5)), 0])  # the middle of the frame
    torch.testing.assert_close(found[:4], plain)
    torch.testing.assert_close(found[4:8], torch.sin(plain * np.pi / 2))


def smooth_targets(times, boxes):
    """Unit vectors that change smoothly with time and box, as a teacher's do."""
    at = torch.cat([boxes / 40, times[:, None, None].expand(-1, boxes.shape[1], 1) / 9], dim=-1)
    mix = torch.linspace(-1, 1, 5 * 24).view(5, 24)
    return F.normalize(1 + torch.sin(at @ mix * 2) + 0.5 * torch.cos(at @ mix.flip(0) * 3), dim=-1)


def test_a_fit_answers_for_boxes_and_times_it_never_saw():
    sampling = BoxSampling(count=48, shapes=16)
    boxes = draw_boxes(sampling, (40, 80), 9)[::2].float()
    times = torch.arange(0, 9, 2).float()
    config = FieldConfig.from_dict({**CONFIG.to_dict(), "source_channels": 0, "latent_channels": 4})
    head, steps = fit_field(config, None, times, boxes, smooth_targets(times, boxes),
                            settings=FitSettings(steps=200, frames=4, boxes=32, lr=1e-2))
    new = draw_boxes(BoxSampling(count=16, shapes=16, seed=5), (40, 80), 9)[1::2].float()
    unseen = torch.arange(1, 9, 2).float()
    target = smooth_targets(unseen, new)
    with torch.no_grad():
        agreement = (head(None, unseen, new) * target).sum(-1).mean()
    constant = (target @ F.normalize(target.mean((0, 1)), dim=0)).mean()
    assert (agreement - constant) / (1 - constant) > 0.5
    for name, weight in head.named_parameters():  # whole multiples of the learned steps
        levels = weight.detach() / steps[name]
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)


def test_a_fit_depends_on_its_seed_alone():
    boxes = draw_boxes(BoxSampling(count=4, shapes=4), (40, 80), 3)
    fit = [fit_field(CONFIG, torch.ones(3, 6, 2, 4), torch.arange(3), boxes,
                     F.normalize(torch.arange(288.0).view(3, 4, 24).sin(), dim=-1),
                     settings=FitSettings(steps=2, frames=2, boxes=2))[0]
           for _ in (torch.manual_seed(1), torch.manual_seed(2))]
    one, two = (head.state_dict() for head in fit)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_share_of_the_steps_sees_frames_as_their_neighbors_show_them():
    # Features that say nothing, but half-way between neighbors all: only `between` can learn
    config = FieldConfig.from_dict({**CONFIG.to_dict(), "keyframes": 0, "latent_channels": 0})
    times, boxes = torch.arange(6.0), draw_boxes(BoxSampling(12, 12), (40, 80), 6).float()
    target = smooth_targets(times, boxes)
    features, between = torch.zeros(6, 6, 2, 4), torch.randn(6, 6, 2, 4) * 3
    errors = []
    for share in (0.0, 1.0):
        head, _ = fit_field(config, features, times, boxes, target, between=between, settings=
                            FitSettings(steps=80, frames=4, boxes=8, rounding=0.0, between=share))
        with torch.no_grad():
            errors.append(float(1 - (head(between, times, boxes) * target).sum(-1).mean()))
    assert errors[1] < 0.5 * errors[0]


def test_patches_are_drawn_with_their_share():
    times, boxes = torch.arange(4.0), draw_boxes(BoxSampling(20, 20), (40, 80), 4).float()
    boxes = torch.cat([boxes, torch.tensor([0.0, 0, 40, 40]).expand(4, 1, 4)], 1)
    target = smooth_targets(times, boxes)
    target[:, -1] = F.normalize(torch.eye(24)[0], dim=0)  # what no other box says
    config = FieldConfig.from_dict({**CONFIG.to_dict(), "source_channels": 0, "latent_channels": 4})
    known = []
    for share in (0.0, 0.5):
        head, _ = fit_field(config, None, times, boxes, target, patches=1, settings=FitSettings(
            steps=100, frames=4, boxes=16, rounding=0.0, patches=share, lr=1e-2))
        with torch.no_grad():
            known.append(float((head(None, times, boxes[:, -1:]) * target[:, -1:]).sum(-1).mean()))
    assert known[1] > known[0] + 0.2
    with pytest.raises(ConfigError, match="patches=2 is a share"):
        FitSettings(patches=2)


def test_a_fit_refuses_what_does_not_belong_together():
    boxes = draw_boxes(BoxSampling(count=4, shapes=4), (40, 80), 3)
    with pytest.raises(ConfigError, match="do not belong together"):
        fit_field(CONFIG, torch.randn(3, 6, 2, 4), torch.arange(3), boxes, torch.randn(3, 4, 10))


def test_drawn_boxes_lie_in_the_frame_and_fill_the_range():
    sampling = BoxSampling(count=64, shapes=64)
    boxes = draw_boxes(sampling, (40, 80), 5)
    assert boxes.shape == (5, 64, 4) and torch.equal(boxes, draw_boxes(sampling, (40, 80), 5))
    check_boxes(boxes, (40, 80))
    assert torch.equal(boxes[0, :, 2:], boxes[4, :, 2:])
    assert not torch.equal(boxes[0], boxes[4])
    side = (boxes[..., 2] * boxes[..., 3]).double().sqrt() / 40
    assert side.min() < 0.36 and side.max() > 0.85
    aspect = boxes[..., 3] / boxes[..., 2]
    assert aspect.min() < 0.65 and aspect.max() > 1.6
    with pytest.raises(ConfigError, match="size_range"):
        BoxSampling(size_range=(0.5, 0.2))


class MeanColor:
    """A teacher whose embedding is the mean color of what it is given."""

    name, label, dim, is_clip, device = "mean-color", "mean color", 3, False, torch.device("cpu")
    image_size = (8, 8)

    def encode_patches(self, patches):
        assert patches.dtype == torch.uint8 and patches.shape[1:] == (3, 8, 8)
        return F.normalize(patches.float().mean((2, 3)) + 1, dim=1)


def test_the_teacher_sees_the_whole_of_each_box():
    frames = torch.randint(0, 255, (3, 3, 40, 80), dtype=torch.uint8)
    boxes = draw_boxes(BoxSampling(count=6, shapes=3), (40, 80), 3)
    found = embed_boxes(MeanColor(), frames, boxes)
    assert found.shape == (3, 6, 3)
    for t in range(3):
        for p, (top, left, tall, wide) in enumerate(boxes[t].tolist()):
            cut = frames[t, :, top:top + tall, left:left + wide].float().mean((1, 2)) + 1
            torch.testing.assert_close(found[t, p].float(), F.normalize(cut, dim=0), atol=2e-2,
                                       rtol=0)


@pytest.mark.parametrize("box, message", [
    ((0, 0, 0, 10), "is empty"), ((30, 0, 20, 10), "reaches outside the frame 40×80"),
    ((-3, 0, 10, 10), "reaches outside"), ((0, 0, float("nan"), 10), "is not finite")])
def test_boxes_that_cannot_be_asked_about(box, message):
    with pytest.raises(ConfigError, match=message):
        check_boxes(torch.tensor(box), (40, 80))


def test_a_box_smaller_than_was_fitted_warns():
    with pytest.warns(UserWarning, match="smaller than any that the field was fitted to"):
        check_boxes(torch.tensor([0.0, 0, 5, 5]), (40, 80), size_range=(0.3, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_boxes(BOXES, (40, 80), size_range=(0.3, 1.0))


@pytest.fixture(scope="module")
def run(small_config, small_dataset, cache_dir, tmp_path_factory) -> Run:
    config = small_config.replace(head="field", predict_clip=False, epochs=2, field_boxes=8,
                                  field_steps=40, field_rank=8, field_hidden=16)
    folder = tmp_path_factory.mktemp("field") / "run"
    train(config, folder, cache_dir=cache_dir, progress=False)
    return load_run(folder, cache_dir=cache_dir, device="cpu")


@pytest.fixture(scope="module")
def field(run, cache_dir) -> Field:
    if not has_field(run.run_dir):
        fit_run.fit_head(run, cache_dir=cache_dir, device="cpu", progress=False)
    return load_field(run)


def test_head_field_needs_no_head_of_the_network():
    assert not Config.from_params(head="field").model.predict_clip
    assert Config.from_params(head="field", predict_clip=True).model.predict_clip
    with pytest.raises(ConfigError, match="head='fild' is unknown"):
        Config.from_params(head="fild")


def test_a_fitted_field_is_saved_beside_an_unchanged_network(run, field):
    stored = run.run_dir.load_checkpoint("model_best.pth")["model"]
    assert all(torch.equal(stored[n], t) for n, t in field.model.state_dict().items())
    assert not any(name.startswith(("field", "clip_head")) for name in stored)
    assert (run.run_dir.path / FIELD).is_file()
    assert field.teacher["name"] == run.dataset.teacher_name
    assert field.head.config.rank == 8 and field.about["boxes"] == 8


def test_a_hybrid_networks_frames_are_interpolated_from_their_neighbors(run):
    frames = np.asarray(run.dataset.split.train)
    _, features, between = fit_run._source(run, frames, fit_run.sampling_of(run), {})
    assert between.shape == features.shape
    k = next(k for k in range(1, len(frames) - 1) if frames[k + 1] - frames[k - 1] == 2)
    torch.testing.assert_close(between[k], (features[k - 1] + features[k + 1]) / 2)
    _, _, between = fit_run._source(run, frames[:1], fit_run.sampling_of(run), {})
    assert between is None


def test_questions_about_time_and_box(run, field):
    boxes = torch.tensor([[0.0, 0, 40, 40], [20, 60, 40, 60]])
    found = field.embed([0, 2.5, 11], boxes)
    assert found.shape == (3, 2, 1280) and found.dtype == torch.float32
    one = field.embed(2.5, boxes[1])
    torch.testing.assert_close(one, found[1, 1])
    torch.testing.assert_close(field.scores(one[None], [0, 2.5, 11], boxes)[0],
                               found @ one, atol=1e-5, rtol=1e-4)
    own = field.embed([0, 1], boxes.expand(2, -1, -1))
    torch.testing.assert_close(own[0], found[0])
    # half-way between two frames it takes the mean of their embeddings
    z = (field.embeddings[2] + field.embeddings[3]) / 2
    direct = field.head(z[None], torch.tensor([2.5]), boxes)[0]
    torch.testing.assert_close(direct, found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("time, box, message", [
    (12, (0, 0, 40, 40), "time 12 is outside the video: give frames from 0 to 11"),
    (-0.5, (0, 0, 40, 40), "outside the video"), (float("nan"), (0, 0, 40, 40), "outside"),
    ([], (0, 0, 40, 40), "empty list of times"), (0, (60, 0, 40, 40), "reaches outside"),
    ([0, 1], np.ones((3, 1, 4)), "for 2 times")])
def test_questions_that_are_refused(field, time, box, message):
    with pytest.raises(ConfigError, match=message):
        field.embed(time, box)


def test_a_query_of_another_teacher_is_refused(field):
    with pytest.raises(ConfigError, match="encode texts with its teacher"):
        field.scores(np.ones((1, 512)), 0, BOXES[0])


def test_a_field_of_another_network_is_refused(run, field):
    bias = run.model.rgb_head.bias
    kept = bias.detach().clone()
    try:
        bias.data += 1
        with pytest.raises(RunError, match="fitted to another network.*fit-head"):
            load_field(run)
    finally:
        bias.data.copy_(kept)
    content = torch.load(run.run_dir.path / FIELD, weights_only=True)
    path = run.run_dir.path / FIELD
    whole = path.read_bytes()
    try:
        torch.save({**content, "teacher": {"name": "clip", "label": "CLIP"}}, path)
        with pytest.raises(RunError, match="answers for CLIP"):
            load_field(run)
        path.write_bytes(whole[:100])
        with pytest.raises(RunError, match="is damaged"):
            load_field(run)
        path.unlink()
        with pytest.raises(RunError, match="has no field"):
            load_field(run)
    finally:
        path.write_bytes(whole)


def test_evaluation_tells_patches_from_any_box(run, field, cache_dir, monkeypatch):
    monkeypatch.setattr(fit_run, "TEST_BOXES", 4)
    table = fit_run.evaluate_field(run, field, cache_dir=cache_dir, device="cpu", progress=False)
    means = fit_run.summarise_field(table)
    keys = set(zip(means.source, means["where"], means.split))
    assert ("interpolated", "any box", "held_out") in keys
    assert ("interpolated", "any box", "train") not in keys
    assert np.isfinite(means.skill).all() and (means.skill <= 1).all()
    # a field that answers with the mean of the teacher has no skill
    constant = make_field(run, FieldHead(field_config(run, rank=1)))
    truth = box_targets.box_targets(
        run.dataset.video, np.arange(12), run.config.teacher, BoxSampling(
            count=fit_run.TEST_BOXES, shapes=fit_run.TEST_BOXES, seed=fit_run.TEST_SEED),
        cache_dir=cache_dir, device="cpu", progress=False)[1].float()
    with torch.no_grad():
        constant.head.basis.weight.zero_()
        constant.head.basis.bias.copy_(truth[run.dataset.split.train].mean((0, 1)))
    means = fit_run.summarise_field(fit_run.evaluate_field(
        run, constant, cache_dir=cache_dir, device="cpu", progress=False))
    assert np.abs(means.skill[means["where"] == "any box"]).max() < 1e-3


def test_a_run_with_a_field_alone_is_verified(run, field, cache_dir):
    (source, study), = verifying.verify_run(run).items()
    assert source == "interpolated" and np.isfinite(study.improvements.select_dtypes(float)).any(
        axis=None)
    own = load_field(run, source=source).embed(np.arange(12), run.dataset.grid.boxes)
    np.testing.assert_allclose(study.predicted, own, atol=1e-6)
    rounded = verifying.head_bytes(run)
    assert 0 < rounded < field.head.parameter_count()  # less than 8 bits a weight
    verifying.write_verification(run, {source: study})
    folder = run.run_dir.path
    assert verifying.is_verified(folder)
    assert verifying.verify_folders([folder], cache_dir=cache_dir, device="cpu") == [folder]
    whole = (folder / FIELD).read_bytes()
    (folder / FIELD).write_bytes(whole + b"0")  # another field is another answer
    assert not verifying.is_verified(folder)
    (folder / FIELD).write_bytes(whole)


def test_what_a_verification_asks_of_the_teacher_is_kept(run, monkeypatch, tmp_path):
    answers = torch.nn.functional.normalize(torch.rand(12, len(run.dataset.grid), 1280), dim=-1)
    monkeypatch.setattr(verifying, "run_teacher", lambda *args, **_: answers)
    asked = replace(run, dataset=replace(run.dataset, embeddings=None))
    verifying.reference_embeddings(asked, SimpleNamespace(label="a teacher"), cache_dir=tmp_path)
    kept = cached_embeddings(run.dataset.video, run.dataset.grid, run.config.teacher, tmp_path)
    torch.testing.assert_close(kept, answers)
    monkeypatch.setattr(verifying, "run_teacher", lambda *args, **_: pytest.fail("it ran"))
    (tmp_path / "file").touch()  # said before the teacher runs
    with pytest.raises(RunError, match="cannot write to"):
        verifying.reference_embeddings(asked, None, cache_dir=tmp_path / "file")


def test_a_field_is_verified_beside_a_clip_head_where_it_is_asked_for(run, field, monkeypatch):
    alone, = verifying.verify_run(run).values()
    size = verifying.head_bytes(run)
    monkeypatch.setattr(verifying, "predicts_by_field", lambda run: False)
    with pytest.raises(ConfigError, match="predict_clip"):
        verifying.verify_run(run)  # the network of these tests has no head
    beside, = verifying.verify_run(run, by_field=True).values()
    np.testing.assert_array_equal(beside.predicted, alone.predicted)
    assert verifying.head_bytes(run, by_field=True) == size


def test_labels_are_asked_of_the_teacher_and_the_field(run, field, monkeypatch):
    shrink_teacher_pictures(monkeypatch)
    frames = run.dataset.video.frames
    table = pd.DataFrame([{"video": run.dataset.video.name, "crop": "_".join(map(
        str, frames.shape[2:])), "frame": 3, "query": "hare", "text": "wood rabbit", "top": 10,
        "left": 20, "height": 30, "width": 40}])
    found = labels.measure_labels(run, field, table, in_words=True)
    assert list(found.who) == ["teacher", "teacher, in words", "field", "field, in words"]
    assert set(found["query"]) == {"hare"} and found.box_iou.between(0, 1).all()
    with pytest.raises(ConfigError, match="no label is of .*: labels are of bunny in 1_2"):
        labels.measure_labels(run, field, table.assign(video="bunny", crop="1_2"))


def test_labels_of_a_run_are_published_with_what_was_asked(run, field, cache_dir, monkeypatch,
                                                           tmp_path):
    shrink_teacher_pictures(monkeypatch)
    name, crop = run.dataset.video.name, "_".join(map(str, run.dataset.video.frames.shape[2:]))
    row = {"video": name.split()[0], "crop": crop, "frame": int(run.dataset.split.val[0]),
           "query": "hare", "text": "a hare", "top": 10, "left": 20, "height": 30, "width": 40}
    table = pd.DataFrame([row])
    monkeypatch.setattr(labels, "read_labels", lambda: table)
    monkeypatch.setattr(labels, "has_sentences", lambda: False)
    monkeypatch.setattr(labels, "resolve_path", lambda _: tmp_path)
    folder = str(run.run_dir.path)
    with pytest.raises(RunError, match="field_evaluation.csv does not exist: hnerv-clip fit-head"):
        labels.main([folder, "--cache_dir", str(cache_dir)])
    evaluated = fit_run.evaluate_field(run, field, cache_dir=tmp_path / "cache", device="cpu",
                                       progress=False)
    evaluated.to_csv(run.run_dir.path / "field_evaluation.csv", index=False)
    labels.main([folder, "--cache_dir", str(cache_dir), "--publish"])
    found = read_json(tmp_path / labels.RESULTS, fix="")
    assert [r["who"] for r in found["rows"]] == ["teacher", "field"]
    about, = found["about"]["fields"]
    skill = fit_run.summarise_field(evaluated).query(
        "source == 'interpolated' and where == 'any box' and split == 'held_out'").skill.item()
    assert about["any_held"] == pytest.approx(skill, abs=1e-4) and about["boxes"] == 8
    assert about["commit"] == run.run_dir.provenance()["commit"]
    assert "not CLIP" in found["about"]["teacher"] and "words" not in found["about"]
    found["rows"].append(found["rows"][0] | {"video": "another"})
    write_json(tmp_path / labels.RESULTS, found)
    monkeypatch.setattr(labels, "measure_labels", None)  # it is said before anything is measured
    with pytest.raises(ConfigError, match="has rows of another, of which no run is given"):
        labels.main([folder, "--cache_dir", str(cache_dir), "--publish"])
    assert read_json(tmp_path / labels.RESULTS, fix="") == found
    with pytest.raises(ConfigError, match="was trained on frame .* --data_split 4_5_5"):
        labels.describe_field(run, field, table.assign(frame=int(run.dataset.split.train[0])))


def test_the_cache_of_boxes_spares_the_teacher(run, cache_dir, monkeypatch):
    frames, sampling = np.array([0, 3]), BoxSampling(count=3, shapes=3)
    arguments = dict(cache_dir=cache_dir, device="cpu", progress=False)
    boxes, first = box_targets.box_targets(run.dataset.video, frames, run.config.teacher, sampling,
                                           **arguments)
    monkeypatch.setattr(box_targets, "load_teacher", None)  # would raise TypeError
    again = box_targets.box_targets(run.dataset.video, frames, run.config.teacher, sampling,
                                    **arguments)
    assert torch.equal(first, again[1]) and torch.equal(boxes, again[0])
    with pytest.raises(TypeError):
        box_targets.box_targets(run.dataset.video, frames, run.config.teacher,
                                BoxSampling(count=3, shapes=3, seed=1), **arguments)


class Spot:
    """Stands for a field: the score of a box is its overlap with a spot that moves."""

    frame_count = 6

    class head:
        config = FieldConfig(dim=2, frame_hw=(80, 160), frame_count=6, source_channels=1)

    def where(self, time):
        return [20, 10 + 20 * float(time), 34, 34]

    def scores(self, queries, times, boxes):
        return torch.tensor(np.stack([[search_boxes.overlap(self.where(t), np.asarray(boxes))
                                       for t in times]] * len(queries)), dtype=torch.float32)


def test_search_finds_the_moment_and_the_box():
    found = search_boxes.search_boxes(Spot(), np.ones(2), 3, apart=0)
    assert found["rank"].tolist() == [1, 2, 3]
    for _, hit in found.iterrows():
        own = search_boxes.overlap(Spot().where(hit.frame), hit[["top", "left", "height", "width"]]
                                   .to_numpy()[None].astype(float))[0]
        assert own == pytest.approx(hit.score, abs=1e-5) and own > 0.5
    assert found.frame.nunique() == 3
    without = search_boxes.search_boxes(Spot(), np.ones(2), 1, apart=5,
                                        not_near=(0, Spot().where(0)))
    assert search_boxes.overlap(Spot().where(0), without[["top", "left", "height", "width"]]
                                .to_numpy())[0] <= 0.3
    with pytest.raises(ConfigError, match="top_k=0"):
        search_boxes.search_boxes(Spot(), np.ones(2), 0)


def test_a_track_follows_the_spot():
    path = search_boxes.track(Spot(), np.ones(2))
    centers = path.left + path.width / 2
    assert np.abs(centers - (27 + 20 * path.frame)).max() < 10
    assert (path.score > 0.4).all()


def test_heat_maps_at_several_scales_peak_at_the_spot():
    maps = search_boxes.heat_maps(Spot(), np.ones((2, 2)), [0, 3], sides=(0.3, 0.42), stride=8)
    assert maps.shape == (2, 2, 2, 10, 20)
    y, x = np.unravel_index(maps[1, 0, 1].argmax(), maps.shape[-2:])
    assert abs(y * 8 + 4.5 - 37) <= 8 and abs(x * 8 + 4.5 - 87) <= 8
    with pytest.raises(ConfigError, match="stride=0"):
        search_boxes.heat_maps(Spot(), np.ones((1, 2)), 0, stride=0)


def test_square_boxes_cover_the_frame_at_every_size():
    boxes = search_boxes.square_boxes((40, 80), (0.5, 1.0), step=0.25)
    check_boxes(boxes, (40, 80))
    small = boxes[boxes[:, 2] == 20]
    assert small[:, 0].min() == 0 and (small[:, 0] + 20).max() == 40
    assert (small[:, 1] + 20).max() == 80 and len(small) == 5 * 13
    with pytest.raises(ConfigError, match="sides is empty"):
        search_boxes.square_boxes((40, 80), ())


def test_the_command_line_fits_and_searches(run, field, cache_dir, capsys, monkeypatch):
    monkeypatch.setattr(fit_run, "TEST_BOXES", 4)
    outf, rest = str(run.run_dir.path), ["--cache_dir", str(cache_dir), "--device", "cpu"]
    assert cli.main(["fit-head", outf, "--steps", "20", "--rank", "4", *rest]) == 0
    assert "any box" in capsys.readouterr().out
    assert load_field(run).head.config.rank == 4
    assert cli.main(["search", outf, "hare", "--top_k", "2", *rest]) == 0
    told = capsys.readouterr().out
    assert "time_s" in told and re.search("^“hare”(: best| has no) match.* -?[0-9]", told, re.M)
    box = ["--box", "0,0,40,40", "--time"]
    assert cli.main(["search", outf, *box, "0.12", *rest]) == 0
    assert "like box 0,0,40,40 at 0.12 s" in capsys.readouterr().out
    assert cli.main(["search", outf, *box, "0.47", *rest]) == 0  # the last frame is still shown
    assert "at 0.47 s" in capsys.readouterr().out
    assert cli.main(["search", outf, *rest]) == 2
    assert "nothing to search for" in capsys.readouterr().err
    assert cli.main(["search", outf, "--box", "0,0,40,400", *rest]) == 2
    assert "box 0,0,40,400 is not within the picture of" in capsys.readouterr().err
    assert cli.main(["search", outf, *box, "99", *rest]) == 2
    assert "time 99 s is outside the video" in capsys.readouterr().err


def test_an_index_holds_a_fields_boxes(run, field, tmp_path):
    index = pytest.importorskip("hnerv_clip.search.index")
    pytest.importorskip("faiss")
    built = index.index_runs([run])
    boxes = search_boxes.square_boxes((80, 160), step=0.5)
    assert len(built) == 12 * len(boxes)
    loaded = index.load_index(built.save(tmp_path / "index"))
    asked = load_field(run, source="interpolated").embed(3, boxes[20])
    found = loaded.search(asked.numpy(), 3, apart=2)
    best = found.iloc[0]
    assert best.score == pytest.approx(1, abs=1e-4)
    assert [best.top, best.left, best.height, best.width] == boxes[best.patch].tolist()
    other = found.iloc[1]
    assert abs(other.frame - best.frame) > 2 or search_boxes.overlap(
        boxes[best.patch], [[other.top, other.left, other.height, other.width]])[0] <= 0.3
