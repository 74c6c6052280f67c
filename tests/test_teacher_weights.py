"""Weights given as a file or folder mean what their tag means: preprocessing, tokenizer, cache."""

import json
import warnings

import open_clip
import pytest
import torch
from open_clip import pretrained
from PIL import Image
from test_teachers import error

from hnerv_clip.config import TeacherConfig
from hnerv_clip.patches import make_grid
from hnerv_clip.teachers import cache_path, clip_weights, load_teacher

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
# Small networks built like those that are published, and how their tags prepare pictures
KINDS = {
    "tiny-openai": ({"embed_dim": 24, "quick_gelu": True, "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 64, "patch_size": 16}, "text_cfg": TEXT},
        pretrained._pcfg(hf_hub="some/clip/", quick_gelu=True)),
    "tiny-SigLIP": ({"embed_dim": 192, "custom_text": True, "init_logit_bias": -10, "vision_cfg": {
        "image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg",
        "timm_model_pretrained": False, "timm_proj": "none"}, "text_cfg": TEXT | {
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "no_causal_mask": True, "pool_type": "last"}},
        pretrained._slpcfg(hf_hub="some/siglip/")),
    "tiny-MobileCLIP": ({"embed_dim": 24, "custom_text": True, "vision_cfg": {
        "image_size": 64, "timm_model_name": "fastvit_t8", "timm_model_pretrained": False,
        "timm_pool": "avg", "timm_proj": "linear"}, "text_cfg": TEXT},
        pretrained._mccfg(hf_hub="some/mobileclip/")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """KIND.pt of random weights of each kind, whose architecture and tag open_clip knows."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "models").mkdir()
    for name, (config, _) in KINDS.items():
        (folder / "models" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "models")
    for name, (_, tag) in KINDS.items():
        pretrained._PRETRAINED[name] = {"some": tag}
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(open_clip.create_model(name).state_dict(), folder / f"{name}.pt")
    yield folder
    for name in KINDS:
        del pretrained._PRETRAINED[name]


def of_file(folder, kind):
    return TeacherConfig(clip_model=kind, clip_pretrained=str(folder / f"{kind}.pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_used_as_its_tag_is(folder, kind, monkeypatch, small_dataset):
    """Embeddings by file, by tag, and by open_clip's own transform of the tag."""
    monkeypatch.setattr(clip_weights, "_cached_weights", lambda tag: str(folder / f"{kind}.pt"))
    patches = small_dataset.video.frames[:3, :, :70, :90]
    by_file = load_teacher(of_file(folder, kind), "cpu")
    by_tag = load_teacher(TeacherConfig(clip_model=kind, clip_pretrained="some"), "cpu")
    found = by_file.encode_patches(patches)
    assert torch.equal(found, by_tag.encode_patches(patches))
    tag = KINDS[kind][1]
    assert tuple(by_file.preprocess_cfg["mean"]) == tag["mean"]
    assert by_file.preprocess_cfg["resize_mode"] == tag["resize_mode"]
    transform = open_clip.image_transform(
        by_file.image_size, is_train=False,
        **{name: tag[name] for name in clip_weights.PREPROCESSING})
    images = torch.stack([transform(Image.fromarray(patch.permute(1, 2, 0).numpy()))
                          for patch in patches])
    with torch.inference_mode():
        expected = by_file.model.encode_image(images, normalize=True)
    assert (found * expected).sum(1).min() > 0.9999


def test_the_preprocessing_is_in_the_cache_key(folder, monkeypatch, small_dataset, tmp_path):
    video = small_dataset.video
    grid = make_grid(TeacherConfig(), video.frame_hw)
    keys = {}
    for mean in (0.5, 0.4):
        tag = {**KINDS["tiny-SigLIP"][1], "mean": (mean,) * 3}
        monkeypatch.setitem(pretrained._PRETRAINED, "tiny-SigLIP", {"some": tag})
        keys[mean] = cache_path(video, grid, of_file(folder, "tiny-SigLIP"), tmp_path)
    assert keys[0.5] != keys[0.4]


def test_pictures_need_no_tokenizer_and_texts_say_what_they_need(folder, monkeypatch):
    from huggingface_hub import constants

    teacher = load_teacher(of_file(folder, "tiny-SigLIP"), "cpu")
    assert teacher.encode_patches(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (1, 192)
    find = clip_weights.importlib.util.find_spec
    monkeypatch.setattr(clip_weights.importlib.util, "find_spec",
                        lambda name: None if name == "transformers" else find(name))
    message = error(teacher.encode_text, ["hare"])
    assert "pip install transformers" in message and "timm/ViT-B-16-SigLIP" in message
    monkeypatch.setattr(clip_weights.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = error(teacher.encode_text, ["hare"])
    assert "not on this machine" in message and "local-dir:FOLDER" in message
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda model: 1 / 0)
    assert "ZeroDivisionError" in error(
        load_teacher(of_file(folder, "tiny-openai"), "cpu").encode_text, ["hare"])


def test_a_text_tower_of_a_missing_package_is_named(folder, tmp_path, monkeypatch):
    config = {**KINDS["tiny-SigLIP"][0],
              "text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": config, "preprocess_cfg": {"mean": 0.5, "std": [0.5, 0.5, 0.5]}}))
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    monkeypatch.setattr(clip_weights.importlib.util, "find_spec", lambda name: None)
    message = error(load_teacher, TeacherConfig(clip_pretrained=f"local-dir:{tmp_path}"), "cpu")
    assert "roberta-base" in message and "pip install transformers" in message


def test_where_tags_differ_the_name_or_a_config_beside_decides(tmp_path):
    def ask(name):
        (tmp_path / name).write_bytes(b"x")
        return clip_weights.read_preprocessing(
            TeacherConfig(clip_model="ViT-L-14", clip_pretrained=str(tmp_path / name)))

    assert ask("clip-laion2B-s32B-b82K.bin")["mean"] == [0.5] * 3
    assert ask("ViT-L-14-dfn2b_s39b.pt")["mean"][0] == pytest.approx(0.48145466)
    assert "laion2b_s32b_b82k" in error(ask, "weights.pt")
    model = open_clip.get_model_config("ViT-L-14")
    beside = {"mean": 0.3, "std": 0.2, "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": model, "preprocess_cfg": beside}))
    assert ask("weights.pt") == beside | {"mean": [0.3] * 3, "std": [0.2] * 3}
    with pytest.warns(UserWarning, match="no weights of clip_model='ViT-S-16' were published"):
        found = clip_weights.read_preprocessing(TeacherConfig(
            clip_model="ViT-S-16", clip_pretrained=str(tmp_path / "weights.pt")), warn=True)
    assert found == clip_weights.openai_preprocessing()


def test_a_tag_in_a_files_name_is_held_to_its_activation(tmp_path):
    (tmp_path / "ViT-B-32-openai.pt").write_bytes(b"x")
    config = TeacherConfig(clip_model="ViT-B-32",
                           clip_pretrained=str(tmp_path / "ViT-B-32-openai.pt"))
    assert "ViT-B-32-quickgelu" in error(clip_weights.read_architecture, config)


@pytest.mark.parametrize("name", ["hf-hub:timm/ViT-B-16-SigLIP", "ViT-B-16-Siglip"])
def test_an_unknown_architecture_names_those_like_it(tmp_path, name):
    (tmp_path / "weights.pt").write_bytes(b"x")
    config = TeacherConfig(clip_model=name, clip_pretrained=str(tmp_path / "weights.pt"))
    assert "ViT-B-16-SigLIP" in error(load_teacher, config, "cpu").split("; use")[1]


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"model_cfg": []}',
                                     '{"model_cfg": {"embed_dim": 8, "vision_cfg": {}}}'])
def test_a_folder_that_describes_no_network_is_refused(tmp_path, content):
    (tmp_path / "open_clip_config.json").write_text(content)
    config = TeacherConfig(clip_pretrained=f"local-dir:{tmp_path}")
    assert "does not read as an open_clip configuration" in error(load_teacher, config, "cpu")
