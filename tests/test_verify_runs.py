"""Trained runs put to the verification: one, and several joined."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_verify import HELD_OUT, slow_video, unit_vectors

from hnerv_clip import figures, inference, metrics
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.model import build_model
from hnerv_clip.runs.run_dir import RunDir, RunError
from hnerv_clip.teachers import sentences
from hnerv_clip.verify import pool as verify_pool
from hnerv_clip.verify import positions, side_file, time_series, verdict
from hnerv_clip.verify import run as verifying
from hnerv_clip.verify import scores as verify_scores


@pytest.fixture(scope="module")
def small_run(trained_run, cache_dir, tmp_path_factory):
    folder = shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "main")
    return inference.load_run(folder, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def studies(small_run):
    return verifying.verify_run(small_run, all_sources=True)


def test_a_run_is_verified_against_all_baselines(small_run, studies):
    assert list(studies) == ["encoder", "interpolated"]
    study = studies["interpolated"]
    wanted = set(verdict.CONDITIONS)
    conditions = study.table.groupby("split").condition.agg(set)
    assert conditions["train"] == wanted - {"decoded"} and conditions["held_out"] == wanted
    assert [answer.question for answer in study.answers] == list(verdict.QUESTIONS)
    own = inference.predict_embeddings(small_run.model, small_run.dataset, source="interpolated")
    np.testing.assert_allclose(study.predicted, own, atol=1e-6)
    # Held-out frames are all that did not train, skipped ones too.
    split = small_run.dataset.split
    assert verifying.held_out_frames(small_run).tolist() == split.val.tolist()
    skipping = dataclasses.replace(split, train=split.train[1:])
    cut = dataclasses.replace(small_run, dataset=dataclasses.replace(
        small_run.dataset, split=skipping))
    assert verifying.held_out_frames(cut)[0] == split.train[0]


def test_the_prediction_alone_by_default(small_run, studies):
    (source, study), = verifying.verify_run(small_run).items()
    assert source == "interpolated"
    pd.testing.assert_frame_equal(study.table, studies[source].table)
    verifying.write_verification(small_run, {source: study})
    assert verifying.is_verified(small_run.run_dir.path)
    assert not verifying.is_verified(small_run.run_dir.path, all_sources=True)


def test_files_are_written_whole_and_known_by_their_checkpoint(small_run, studies, monkeypatch):
    folder = small_run.run_dir.path
    paths = verifying.write_verification(small_run, studies)
    assert {path.name for path in paths} == {f"verification.{x}" for x in ("csv", "json", "txt")}
    assert not list(folder.glob(".verification*"))
    table = pd.read_csv(paths[0])
    assert set(table.source) == set(studies) and set(table.kind) == {"hybrid"}
    text = paths[1].read_text()
    assert text.count("CLIP LEARNING VERIFICATION RESULTS") == 2 and "not CLIP" in text
    assert verifying.find_verified(folder.parent) == [folder]
    assert verifying.is_verified(folder) and not verifying.is_verified(folder, seed=1)
    assert not verifying.is_verified(folder, labels="hare; barn")
    monkeypatch.setattr(verifying, "checkpoint_digest", lambda folder: "other")
    assert not verifying.is_verified(folder)


def test_labels_are_kept_with_what_they_gave(small_run, studies, monkeypatch):
    monkeypatch.setattr(sentences, "_folder", lambda: None)  # whether it is installed or not
    labels = "hare; barn; valley"
    found = verifying.verify_run(small_run, labels=labels, all_sources=True)
    words = ["text_rank", "text_top20", "label_top1"]
    for source, study in found.items():
        rows = study.measures.set_index(["split", "condition", "measure"]).value
        assert rows["held_out", "learned"][words].between(-1, 1).all()
        assert rows["held_out", "decoded"][words].between(-1, 1).all()
        rest = study.measures[~study.measures.measure.isin(words)].reset_index(drop=True)
        pd.testing.assert_frame_equal(rest, studies[source].measures)
    verifying.write_verification(small_run, found, labels=labels)
    folder = small_run.run_dir.path
    assert verifying.is_verified(folder, labels=["hare", "barn", "valley"])
    assert verifying.is_verified(folder) and not verifying.is_verified(folder, labels="hare")
    joined = verify_pool.join_runs([folder])
    assert "label_top1" in joined.table and len(joined.table) == 2
    for bad, error, message in [("hare; hare", ValueError, "twice"),
                                ("hare; ; barn", ValueError, "empty"),
                                ("hare; quux", ConfigError, "quux")]:
        with pytest.raises(error, match=message):
            verifying.verify_run(small_run, labels=bad)


def test_a_run_without_head_is_refused(small_config, small_run):
    config = small_config.replace(predict_clip=False)
    model = build_model(config.model, frame_hw=small_run.model.frame_hw,
                                 frame_count=small_run.model.frame_count)
    blind = dataclasses.replace(small_run, config=config, model=model.eval())
    for ask in (verifying.verify_run, positions.position_scores):  # as search does
        with pytest.raises(ConfigError, match="no CLIP head"):
            ask(blind)


def made_run(folder, *, video="bunny", seed=0, offset=None, **params):
    """A stand-in for a run of 60 frames: its prediction is the teacher's with noise."""
    config = Config.from_params(clip_dim=1280, teacher="efficientnet-lite0", seed=seed, **params)
    RunDir.create(folder, config)
    teacher = slow_video(seed=sum(map(ord, video)))
    held_out = np.roll(HELD_OUT, config.video.split_phase)
    noise = unit_vectors(teacher.shape, seed=100 + seed)
    predicted = metrics.unit(teacher + (0.3 if offset is None else offset) * noise)
    study = verify_scores.verify_embeddings(predicted, teacher, ~held_out, held_out,
                                            source="coordinates", teacher_label="A (not CLIP)")
    run = SimpleNamespace(run_dir=RunDir(folder), config=config, dataset=SimpleNamespace(
        video=SimpleNamespace(name=video), teacher_name="a"))
    verifying.write_verification(run, {"coordinates": study})
    return study


def test_seeds_are_joined(tmp_path):
    made = {(video, embed, seed): made_run(
        tmp_path / f"{video}{embed[:2]}{seed}", video=video, embed=embed, seed=seed)
        for video in ("bunny", "bikes") for embed in ("pe_1.25_80", "xyt_1.25_80")
        for seed in range(3)}
    assert len(verifying.find_verified(tmp_path, "b*xy?")) == 6
    study = verify_pool.join_runs(verifying.find_verified(tmp_path))
    assert len(study.runs) == 12 and len(study.table) == 4
    assert set(study.runs.epochs) == {300} and set(study.table.runs) == {3}
    assert study.teacher_label == "A (not CLIP)"
    own = [made["bunny", "xyt_1.25_80", seed] for seed in range(3)]
    found = pd.DataFrame([one.measures.set_index(["split", "condition", "measure"]).loc[
        ("held_out", "learned", "clip_centred")] for one in own])
    pooled = time_series.pool_intervals(found.value, found.standard_error, found.freedom)
    row = study.measures.set_index(["video", "kind", "split", "condition", "measure"]).loc[
        ("bunny", "xyt", "held_out", "learned", "clip_centred")]
    assert (row["mean"], row.sd, row.low, row.high) == pytest.approx(
        (found.value.mean(), found.value.std(), pooled.low, pooled.high))
    answers = study.answers.set_index(["video", "kind", "question"]).answer
    assert answers["bunny", "xyt", "constant"] == answers["bunny", "xyt", "when"] == "yes"
    # Answers of a group do not depend on which other runs are joined
    alone = verify_pool.join_runs(verifying.find_verified(tmp_path, "bunnyxy?"))
    both = study.answers[(study.answers.video == "bunny") & (study.answers.kind == "xyt")]
    pd.testing.assert_frame_equal(alone.answers, both.reset_index(drop=True))
    # A prediction that is mostly noise beats no one, and the table says so.
    for seed in range(3):
        made_run(tmp_path / f"noise{seed}", video="noise", embed="pe_1.25_80", seed=seed,
                 offset=9)
    noise = verify_pool.join_runs(tmp_path / f"noise{seed}" for seed in range(3)).table
    assert noise["between"][0] == noise["where"][0] == "no"

    words = verify_pool.study_words(study)
    assert words.evidence.str.contains(r"[\d.-]+ \[[\d.-]+, [\d.-]+\], p ").all()
    figure = figures.plot_study(study)
    assert any("A (not CLIP)" in text.get_text() for text in figure.texts)


def test_phases_are_pooled_over_all_frames(tmp_path):
    for phase in range(5):
        made_run(tmp_path / str(phase), embed="pe_1.25_80", split_phase=phase)
    study = verify_pool.join_runs(verifying.find_verified(tmp_path))
    assert set(study.answers.frames) == {60} and set(study.answers.runs) == {5}
    assert sorted(study.runs.phase) == [0, 1, 2, 3, 4]
    assert study.answers.set_index("question").answer["constant"] == "yes"


def test_what_does_not_belong_together_is_not_joined(tmp_path):
    made_run(tmp_path / "a", embed="pe_1.25_80", seed=0)
    made_run(tmp_path / "b", embed="pe_1.25_80", seed=1, lr=2e-3)
    made_run(tmp_path / "c", embed="pe_1.25_80", seed=0, lr=3e-3)
    a, b, c = (tmp_path / name for name in "abc")
    with pytest.raises(ValueError, match="differ in lr.*name it in `by`"):
        verify_pool.join_runs([a, b])
    with pytest.raises(ValueError, match="same seed and phase"):
        verify_pool.join_runs([a, c])
    by_rate = verify_pool.join_runs([a, b, c], by=("lr",))
    assert by_rate.table.lr.nunique() == 3
    labels = [label.get_text() for label in figures.plot_study(by_rate).axes[0].get_yticklabels()]
    assert labels == [f"bunny pe {rate} (1 runs)" for rate in (0.001, 0.002, 0.003)]
    with pytest.raises(ValueError, match="'colour' is no parameter"):
        verify_pool.join_runs([a], by=("colour",))
    for folder, labels in ((a, ["hare", "barn"]), (b, ["hare", "hay"])):
        path = folder / "verification.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    verify_pool.join_runs([a, b], by=("lr",))  # other settings may have other labels
    shutil.copytree(a, tmp_path / "d")
    path = tmp_path / "d" / "verification.json"
    path.write_text(json.dumps(json.loads(path.read_text())
                               | {"seed": 5, "labels": ["hay", "barn"]}))
    with pytest.raises(ValueError, match="different labels.*'barn'.*'hay'"):
        verify_pool.join_runs([a, tmp_path / "d"])
    with pytest.raises(ValueError, match="no run to join"):
        verify_pool.join_runs([])
    with pytest.raises(RunError, match="no run named"):
        verifying.find_verified(tmp_path / "nothing")
    with pytest.raises(RunError, match="holds no verification.json"):
        verify_pool.join_runs([tmp_path])
    path = b / "verification.json"
    content = json.loads(path.read_text())
    for change, error, message in [
            ({"teacher": "b"}, ValueError, "different teachers do not compare: a, b"),
            ({"format": 0}, RunError, "format 0"), (None, RunError, "damaged")]:
        path.write_text("{" if change is None else json.dumps(content | change))
        with pytest.raises(error, match=message):
            verify_pool.join_runs([a, b], by=("lr",))
    content["sources"]["coordinates"]["measures"][0]["value"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="raw cosine of learned has no value"):
        verify_pool.join_runs([b])


def test_costs_are_medians_with_their_spread(small_run, monkeypatch):
    from hnerv_clip.bench import costs
    from hnerv_clip.teachers import load_teacher
    table = costs.measure_costs(small_run, load_teacher(small_run.config.teacher, "cpu"),
                                frames=2, repeats=3).set_index("way")
    assert (table["min"] <= table.embeddings_per_s).all() and set(table.n) == {3}
    assert (table.embeddings_per_s <= table["max"]).all()
    both, alone = table.loc[["frame decoded, then the teacher", "teacher, frame at hand"],
                            "embeddings_per_s"]
    assert 0 < both < alone


def test_side_file_has_the_heads_bytes(small_run):
    size = verifying.head_bytes(small_run)
    assert size == small_run.model.part_sizes()["clip_head"]  # 8 bits a weight
    stored, _ = side_file.store_embeddings(small_run.dataset.embeddings.numpy(),
                                          small_run.dataset.split.train, size)
    assert stored.size_bytes <= size


def test_folders_are_verified_once_and_failures_are_named(tmp_path, small_run, studies, cache_dir,
                                                         monkeypatch):
    verifying.write_verification(small_run, studies)
    made_run(tmp_path / "brought", embed="pe_1.25_80")  # its checkpoint stayed elsewhere
    monkeypatch.setattr(verifying, "verify_run", lambda *a, **o: pytest.fail("verified again"))
    folders = [small_run.run_dir.path, tmp_path / "brought"]
    assert verifying.verify_folders(folders, cache_dir=cache_dir) == folders
    asked = []
    monkeypatch.setattr(verifying, "verify_run",
                        lambda run, **options: asked.append(run.run_dir.path) or studies)
    with pytest.raises(RunError, match="nothing: .*holds no run"):
        verifying.verify_folders([tmp_path / "nothing", folders[0]], cache_dir=cache_dir,
                                   force=True)
    assert asked == [folders[0]]  # one that fails keeps no other from being verified
