import json

import pytest
import torch

from hnerv_clip import dataset as dataset_module
from hnerv_clip import figures, metrics
from hnerv_clip.config import Config, ConfigError, TeacherConfig
from hnerv_clip.dataset import load_dataset, prepare_dataset, resolve_config
from hnerv_clip.patches import cut_patches, make_grid
from hnerv_clip.teachers import cache


def test_prepared_then_loaded_without_a_teacher(small_config, small_dataset, cache_dir,
                                                monkeypatch):
    monkeypatch.setattr(cache, "load_teacher", lambda *a: pytest.fail("loaded a teacher"))
    for loaded in (load_dataset(small_config, cache_dir),
                   prepare_dataset(small_config, cache_dir, progress=False)):
        assert torch.equal(loaded.embeddings, small_dataset.embeddings)
        assert torch.equal(loaded.video.frames, small_dataset.video.frames)
        assert loaded.split.labels == small_dataset.split.labels
        assert "not CLIP" in loaded.teacher_label


def test_facts_name_the_teacher_and_the_counts(small_dataset):
    facts = small_dataset.facts()["value"]
    assert "not CLIP" in facts["teacher"] and facts["frames"] == 12
    assert facts["training / held out / skipped"] == "10 / 2 / 0"
    assert facts["embedding values"] == 1280


def test_missing_embeddings_point_to_the_notebook(small_config, tmp_path):
    with pytest.raises(ConfigError, match="01_prepare_data") as caught:
        load_dataset(small_config, tmp_path)
    assert "not CLIP" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_pixel_only_runs_need_no_embeddings(small_config, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "load_teacher", lambda *a: pytest.fail("loaded a teacher"))
    pixels = small_config.replace(predict_clip=False, clip_dim=7)
    for prepare in (prepare_dataset, load_dataset):
        assert prepare(pixels, tmp_path).embeddings is None
        assert prepare(pixels, cache_dir).embeddings.shape == (12, 8, 1280)  # cached: taken along


@pytest.mark.parametrize("changes, fix", [
    (dict(clip_dim=512), "clip_dim=1280"),
    (dict(teacher="clip"), "clip_dim=512"),
    (dict(teacher="clip", clip_model="ViT-L-14-quickgelu"), "clip_dim=768")])
def test_another_dimension_than_the_teachers_is_refused_before_any_work(
        small_config, cache_dir, monkeypatch, changes, fix):
    monkeypatch.setattr(dataset_module, "load_video", lambda *a: pytest.fail("decoded"))
    for prepare in (prepare_dataset, load_dataset):
        with pytest.raises(ConfigError, match=fix):
            prepare(small_config.replace(**changes), cache_dir)


@pytest.mark.parametrize("changes, fix", [
    (dict(clip_model="ViT-B-32"), "clip_model='ViT-B-32-quickgelu'"),
    (dict(clip_pretrained="carried/weights.pt"), "a file that exists"),
    (dict(clip_pretrained="local-dir:nowhere"), "open_clip_config.json")])
def test_clip_weights_that_cannot_be_are_refused_before_any_work(
        small_config, cache_dir, monkeypatch, changes, fix):
    monkeypatch.setattr(dataset_module, "load_video", lambda *a: pytest.fail("decoded"))
    for prepare in (prepare_dataset, load_dataset):
        with pytest.raises(ConfigError, match=fix):
            prepare(small_config.replace(teacher="clip", clip_dim=512, **changes), cache_dir)


def test_bad_patches_are_refused_before_the_teacher_runs(small_config, cache_dir, monkeypatch):
    monkeypatch.setattr(cache, "load_teacher", lambda *a: pytest.fail("loaded a teacher"))
    with pytest.raises(ConfigError, match="patch_size=56"):
        prepare_dataset(small_config.replace(patch_size=100), cache_dir)


def words(figure):
    """All text of a figure that is drawn, which fails where it does not fit together."""
    figure.canvas.draw()
    titles = [panel.get_title(loc) for panel in figure.axes for loc in ("left", "center")]
    return " ".join([text.get_text() for text in figure.texts] + titles)


@pytest.mark.parametrize("config", [TeacherConfig(), TeacherConfig(patch_grid=(1, 1)),
                                    TeacherConfig(patch_grid=None, patch_size=40)])
def test_figures_show_frames_split_and_patches(small_dataset, config):
    video, labels = small_dataset.video, small_dataset.split.labels
    grid = make_grid(config, video.frame_hw)
    assert "Blender" in words(figures.plot_frames(video.frames, labels, credit=video.credit))
    assert "frame 0, training" in words(figures.plot_frames(video.frames[:1], labels))
    legend = figures.plot_split(labels).legends[0]
    assert [text.get_text() for text in legend.texts] == ["training: 10", "held out: 2"]
    assert f"The {len(grid)} patches" in words(figures.plot_patch_grid(video.frames[0], grid))
    patches = cut_patches(video.frames[:1], grid)[0]
    assert "frame 7" in words(figures.plot_patches(patches, grid, frame_index=7))


def test_figures_of_the_teacher_name_it(small_dataset):
    structure = metrics.describe_structure(small_dataset.embeddings)
    label = small_dataset.teacher_label
    for figure in (figures.plot_frame_similarity(structure.raw, structure.centred, label),
                   figures.plot_similarity_by_lag(
                       structure.raw_by_lag, structure.centred_by_lag, fps=2.5,
                       mean_energy=structure.mean_energy, teacher_label=label)):
        assert "not CLIP" in words(figure)


@pytest.mark.parametrize("teacher, dim", [
    (dict(teacher="efficientnet-lite0"), 1280), ({}, 512), (dict(clip_model="ViT-L-14"), 768),
    (dict(clip_pretrained="local-dir:FOLDER"), 640)])
def test_clip_dim_follows_the_teacher(teacher, dim, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {
        "embed_dim": 640, "vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {}}))
    teacher = {name: value.replace("FOLDER", str(tmp_path)) for name, value in teacher.items()}
    config = Config.from_params(**teacher)
    assert config.model.clip_dim == config.params()["clip_dim"] == dim
    assert Config.from_params(**config.params()) == config
    changed = config.replace(teacher="efficientnet-lite0", clip_pretrained="openai")
    assert changed.model.clip_dim == 1280 and config.replace(clip_dim=7).model.clip_dim == 7


def test_a_teacher_that_is_not_known_leaves_clip_dim_open_until_it_is_looked_for(cache_dir):
    config = Config.from_params(clip_model="ViT-B-33", resize_list="168_336")
    assert config.params()["clip_dim"] == "auto"
    with pytest.raises(ConfigError, match="'ViT-B-33' is not an architecture"):
        prepare_dataset(config, cache_dir)
    with pytest.raises(ConfigError, match="'ViT-B-33' is not an architecture"):
        resolve_config(config)


def test_pixel_only_runs_of_another_clip_dim_are_the_same_run():
    """Where it was 512 by default, whatever the teacher."""
    old = Config.from_params(teacher="efficientnet-lite0", clip_dim=512, predict_clip=False)
    new = old.replace(clip_dim="auto")
    assert new.model.clip_dim == 1280 and not old.diff(new)
    assert old.replace(predict_clip=True).diff(new.replace(predict_clip=True))
