import pytest
import torch

from hnerv_clip import dataset as dataset_module
from hnerv_clip import teachers
from hnerv_clip.config import ConfigError
from hnerv_clip.dataset import load_dataset, prepare_dataset


def test_prepared_then_loaded_without_a_teacher(small_config, small_dataset, cache_dir,
                                                monkeypatch):
    monkeypatch.setattr(teachers, "load_teacher", lambda *a: pytest.fail("loaded a teacher"))
    for loaded in (load_dataset(small_config, cache_dir),
                   prepare_dataset(small_config, cache_dir, progress=False)):
        assert torch.equal(loaded.embeddings, small_dataset.embeddings)
        assert torch.equal(loaded.video.frames, small_dataset.video.frames)
        assert loaded.split.labels == small_dataset.split.labels
        assert "not CLIP" in loaded.teacher_label


def test_facts_name_the_teacher_and_the_counts(small_dataset):
    facts = small_dataset.facts()["value"]
    assert "not CLIP" in facts["teacher"] and facts["frames"] == 12
    assert facts["training / validation / skipped"] == "10 / 2 / 0"
    assert facts["embedding values"] == 1280


def test_missing_embeddings_point_to_the_notebook(small_config, tmp_path):
    with pytest.raises(ConfigError, match="01_prepare_data") as caught:
        load_dataset(small_config, tmp_path)
    assert "not CLIP" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_pixel_only_runs_need_no_embeddings(small_config, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "load_teacher", lambda *a: pytest.fail("loaded a teacher"))
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


def test_bad_patches_are_refused_before_the_teacher_runs(small_config, cache_dir, monkeypatch):
    monkeypatch.setattr(teachers, "load_teacher", lambda *a: pytest.fail("loaded a teacher"))
    with pytest.raises(ConfigError, match="patch_size=56"):
        prepare_dataset(small_config.replace(patch_size=100), cache_dir)
