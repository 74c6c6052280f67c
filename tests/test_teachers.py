import dataclasses
import json
import os
import threading
import time
import warnings

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from hnerv_clip.config import Config, ConfigError, TeacherConfig
from hnerv_clip.files import RunError
from hnerv_clip.metrics import mean_energy
from hnerv_clip.patches import cut_patches, make_grid
from hnerv_clip.teachers import (
    cache,
    cache_path,
    cached_embeddings,
    clip_weights,
    describe_teacher,
    efficientnet,
    load_teacher,
    preprocess,
    run_teacher,
    teacher_dim,
    teacher_embeddings,
)
from hnerv_clip.teachers.imagenet import imagenet_classes

BUNDLED = TeacherConfig(teacher="efficientnet-lite0")
TINY = {"embed_dim": 24, "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 2}}
# What open_clip writes beside weights; other mean and size than its defaults, so that they count.
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic",
              "resize_mode": "shortest"}


@pytest.fixture(scope="session")
def bundled():
    return load_teacher(BUNDLED, "cpu")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a small real CLIP of random weights, known to open_clip as `tiny-quickgelu`."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "models").mkdir()
    (folder / "models" / "tiny-quickgelu.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "models")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model("tiny-quickgelu")
    torch.save(model.state_dict(), folder / "tiny.pt")
    local = folder / "local"
    local.mkdir()
    (local / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPROCESS}))
    torch.save(model.state_dict(), local / "open_clip_pytorch_model.bin")
    return folder


def tiny_file(folder, **changes):
    return TeacherConfig(**{"clip_model": "tiny-quickgelu",
                            "clip_pretrained": str(folder / "tiny.pt"), **changes})


def tiny_dir(folder):
    return TeacherConfig(clip_pretrained=f"local-dir:{folder / 'local'}")


def error(call, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# Preprocessing.

@pytest.mark.parametrize("hw", [(448, 448), (112, 112), (190, 190), (300, 200), (201, 333),
                                (224, 224)])
def test_preprocessing_is_that_of_open_clip(small_dataset, hw):
    frames = small_dataset.video.frames[:2]
    patches = torch.nn.functional.interpolate(frames.float(), hw, mode="bilinear").to(torch.uint8)
    patches[0] = torch.randint(0, 256, (3, *hw), dtype=torch.uint8)  # the hardest case
    transform = open_clip.image_transform(224, is_train=False)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = torch.stack([transform(Image.fromarray(patch.permute(1, 2, 0).numpy()))
                            for patch in patches])
    ours = preprocess(patches, (224, 224), mean=mean, std=std)
    grey_levels = (ours - expected) * torch.tensor(std).view(3, 1, 1) * 255
    assert ours.shape == (2, 3, 224, 224) and ours.dtype == torch.float32
    assert grey_levels[1].abs().max() < 1.01  # the video
    assert grey_levels[0].abs().max() < 2.01  # noise, where a tie in the first pass may add up
    assert (grey_levels.abs() > 0.01).float().mean() < 0.002


def test_bf16_agrees_with_fp32(tiny_clip, small_dataset):
    """As documented: cosines above 0.999, and unit length; the bundled teacher refuses it."""
    frames, grid = small_dataset.video.frames, small_dataset.grid
    exact, fast = (run_teacher(load_teacher(tiny_file(tiny_clip, teacher_precision=name), "cpu"),
                               frames, grid, progress=False) for name in ("fp32", "bf16"))
    assert fast.dtype == torch.float32 and not torch.equal(fast, exact)
    assert (fast * exact).sum(-1).min() > 0.999
    assert torch.allclose(fast.norm(dim=-1), torch.ones(fast.shape[:2]))
    with pytest.raises(ConfigError, match="CLIP alone.*fp32"):
        Config.from_params(teacher="efficientnet-lite0", teacher_precision="bf16")


def test_squash_is_that_of_open_clip():
    patches = torch.randint(0, 256, (1, 3, 100, 150), dtype=torch.uint8)
    transform = open_clip.image_transform(64, is_train=False, mean=0.5, std=0.5,
                                          resize_mode="squash")
    expected = transform(Image.fromarray(patches[0].permute(1, 2, 0).numpy()))
    ours = preprocess(patches, (64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
    assert (ours[0] - expected).abs().max() < 1.01 / 127.5
    with pytest.raises(ConfigError, match="longest"):
        preprocess(patches, (64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="longest")


# The bundled teacher.

def test_bundled_embeddings(small_dataset):
    embeddings = small_dataset.embeddings
    assert embeddings.shape == (12, 8, 1280) and embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(12, 8), atol=1e-5)
    assert not embeddings.requires_grad
    assert 0.4 < mean_energy(embeddings) < 0.8  # measured: 0.59 on the whole video


def test_bundled_weights_are_in_their_places(bundled, small_dataset):
    """A network with permuted weights could not classify: these patches show a rabbit's meadow."""
    patches = cut_patches(small_dataset.video.frames[:1], make_grid(BUNDLED, (80, 160)))[0]
    assert bundled.dim == 1280 and not bundled.is_clip and "not CLIP" in bundled.label
    pixels = preprocess(patches, (224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.inference_mode():
        logits = bundled.model(pixels)
    encoded = bundled.encode_patches(patches)
    by_head = encoded @ bundled.model.classifier.weight.T
    assert torch.equal(by_head.argmax(1), logits.argmax(1))
    assert logits.softmax(1).max() > 0.15  # random or misplaced weights give about 0.001


def test_bundled_text_space(bundled):
    rows = bundled.model.classifier.weight.detach()
    text = bundled.encode_text(["hare", "Motor  Scooter", "crane"])
    assert text.shape == (3, 1280) and torch.allclose(text.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(text[0], normalize(rows[331] - rows.mean(0), dim=0), atol=1e-6)
    assert torch.allclose(text[1], normalize(rows[670] - rows.mean(0), dim=0), atol=1e-6)
    crane = rows[[134, 517]].mean(0) - rows.mean(0)  # the bird and the machine
    assert torch.allclose(text[2], normalize(crane, dim=0), atol=1e-6)


def test_text_finds_its_patches_across_videos(bundled, small_dataset):
    """A bicycle or a moped ranks patches of `bikes` above those of `bunny`, a hare the reverse."""
    from hnerv_clip.config import VideoConfig
    from hnerv_clip.video import load_video

    video = load_video(VideoConfig("bikes", crop_list=None, frame_stride=60, frame_limit=3))
    bikes = run_teacher(bundled, video.frames, make_grid(BUNDLED, (272, 640)), progress=False)
    moped, hare = bundled.encode_text(["moped", "hare"])
    bunny = small_dataset.embeddings
    assert (bikes @ moped).max() > (bunny @ moped).max()
    assert (bunny @ hare).max() > (bikes @ hare).max()


@pytest.mark.parametrize("text, hint", [
    ("rabit", "wood rabbit"), ("car", "race car"), ("a photo of a hare", "try: hare"), ("", "hare"),
    ("rodent", "beaver"), ("Mountain ", "alp"), ("a grass", "hay")])  # by their definitions
def test_unknown_class_name_suggests_others(text, hint):
    message = error(imagenet_classes, text)
    assert repr(text) in message and hint in message


def test_weights_in_another_order_are_refused():
    weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
    renamed = efficientnet._by_position(weights, {"x": torch.ones(2), "y": torch.ones(3)})
    assert {name: len(tensor) for name, tensor in renamed.items()} == {"x": 2, "y": 3}
    swapped = {"x": torch.ones(3), "y": torch.ones(2)}
    assert "timm" in error(efficientnet._by_position, weights, swapped)


# CLIP, for real: small, randomly initialised, saved and loaded again.

def test_clip_from_a_file(tiny_clip):
    teacher = load_teacher(tiny_file(tiny_clip), "cpu")
    assert (teacher.dim, teacher.is_clip, teacher.image_size) == (24, True, (64, 64))
    assert teacher.label == "CLIP tiny-quickgelu (tiny.pt)" and teacher.name
    model = open_clip.create_model("tiny-quickgelu", pretrained=str(tiny_clip / "tiny.pt")).eval()
    assert any("QuickGELU" in type(part).__name__ for part in teacher.model.modules())
    expected = model.state_dict()  # loaded without drawing random weights first
    assert all(torch.equal(value, expected[name])
               for name, value in teacher.model.state_dict().items())
    assert torch.nn.init.zeros_(torch.ones(2)).sum() == 0, "init is as it was"

    patches = torch.randint(0, 256, (3, 3, 90, 90), dtype=torch.uint8)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    images = torch.stack([transform(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in patches])
    with torch.inference_mode():
        expected = model.encode_image(images, normalize=True)
        words = model.encode_text(open_clip.get_tokenizer("tiny-quickgelu")(["a hare"]),
                                  normalize=True)
    encoded = teacher.encode_patches(patches)
    assert encoded.dtype == torch.float32 and encoded.shape == (3, 24)
    assert (encoded * expected).sum(1).min() > 0.9999
    assert torch.allclose(teacher.encode_text(["a hare"]), words, atol=1e-6)
    assert teacher.encode_text(["a hare", "a suit on a man"]).norm(dim=1).allclose(torch.ones(2))


def test_clip_from_a_folder_takes_its_preprocessing(tiny_clip):
    teacher = load_teacher(tiny_dir(tiny_clip), "cpu")
    assert list(teacher.preprocess_cfg["mean"]) == PREPROCESS["mean"] and teacher.dim == 24
    patches = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        mean, std = (torch.tensor(PREPROCESS[k]).view(3, 1, 1) for k in ("mean", "std"))
        expected = teacher.model.encode_image((patches / 255 - mean) / std, normalize=True)
    assert torch.allclose(teacher.encode_patches(patches), expected, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_clip_dim_is_known_without_weights():
    assert teacher_dim(TeacherConfig()) == 512 and teacher_dim(BUNDLED) == 1280
    assert describe_teacher(TeacherConfig()) == (
        "clip-ViT-B-32-quickgelu-openai", "CLIP ViT-B-32-quickgelu (openai)", True)
    name, label, is_clip = describe_teacher(BUNDLED)
    assert (name, is_clip) == ("efficientnet-lite0", False) and "not CLIP" in label


@pytest.mark.parametrize("model, tag, fix", [
    ("ViT-B-32", "openai", "clip_model='ViT-B-32-quickgelu'"),
    ("ViT-L-14", "openai", "clip_model='ViT-L-14-quickgelu'"),
    ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "one of openai"),
    ("ViT-B-32", "nonsense", "laion2b_s34b_b79k"),
    ("ViT-B-33", "openai", "ViT-B-32"),
    ("ViT-B-32", "missing/weights.pt", "a file that exists")])
def test_wrong_architecture_or_tag_names_the_fix(model, tag, fix):
    assert fix in error(load_teacher, TeacherConfig(clip_model=model, clip_pretrained=tag), "cpu")


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_fails_at_once_with_the_ways_out(monkeypatch, tmp_path, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses
    monkeypatch.setattr(clip_weights, "_cached_weights", lambda tag: None)
    started = time.monotonic()
    message = error(load_teacher, TeacherConfig(), "cpu")
    assert time.monotonic() - started < 6
    for way in ("network", "clip_pretrained=FILE", "local-dir:FOLDER", "efficientnet-lite0",
                "not CLIP"):
        assert way in message


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(1)
        raise OSError

    monkeypatch.setattr(clip_weights.urllib.request, "urlopen", slow)
    started = time.monotonic()
    assert not clip_weights._answers("http://example.invalid", timeout_s=0.2)
    assert time.monotonic() - started < 0.9


def test_weights_of_a_tag_are_used_from_the_cache_without_asking(monkeypatch, tiny_clip, tmp_path):
    """As after a download: the file lies in the hub's cache, and there is no network."""
    import huggingface_hub
    from open_clip import pretrained

    snapshot = tmp_path / "models--some--clip" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--clip" / "refs").mkdir()
    (tmp_path / "models--some--clip" / "refs" / "main").write_text("abc")
    os.symlink(tiny_clip / "tiny.pt", snapshot / "open_clip_pytorch_model.bin")
    found = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache",
                        lambda repo, file: found(repo, file, cache_dir=tmp_path))
    tag = {"hf_hub": "some/clip/", "mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3, "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-quickgelu", {"some": tag})
    monkeypatch.setattr(clip_weights, "_answers", lambda url: pytest.fail("asked the network"))
    teacher = load_teacher(tiny_file(tiny_clip, clip_pretrained="some"), "cpu")
    assert tuple(teacher.preprocess_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert teacher.label == "CLIP tiny-quickgelu (some)"


def test_a_checkpoint_of_another_architecture_is_refused(tiny_clip):
    config = tiny_file(tiny_clip, clip_model="ViT-S-32-alt")
    message = error(load_teacher, config, "cpu")
    assert "tiny.pt" in message and "ViT-S-32-alt" in message and "clip_model" in message


def test_a_truncated_or_foreign_checkpoint_is_refused(tiny_clip, tmp_path):
    content = (tiny_clip / "tiny.pt").read_bytes()
    for bad in (content[:len(content) // 2], b"", b"text"):
        (tmp_path / "bad.pt").write_bytes(bad)
        config = tiny_file(tiny_clip, clip_pretrained=str(tmp_path / "bad.pt"))
        assert "bad.pt" in error(load_teacher, config, "cpu")


def test_a_checkpoint_that_would_run_code_is_refused(tiny_clip, tmp_path):
    torch.save({"state_dict": Harmful(tmp_path / "ran")}, tmp_path / "bad.pt")
    error(load_teacher, tiny_file(tiny_clip, clip_pretrained=str(tmp_path / "bad.pt")), "cpu")
    assert not (tmp_path / "ran").exists()


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_folder_without_weights_is_no_teacher(tiny_clip, tmp_path):
    config = TeacherConfig(clip_pretrained=f"local-dir:{tmp_path}")
    assert "open_clip_config.json" in error(load_teacher, config, "cpu")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    assert "holds no weights" in error(load_teacher, config, "cpu")


@pytest.mark.gpu
def test_gpu_and_cpu_agree(bundled, tiny_clip, small_dataset):
    patches = small_dataset.video.frames[:4, :, :64, :64]
    for config in (BUNDLED, tiny_file(tiny_clip)):
        on_gpu, on_cpu = load_teacher(config, "cuda"), load_teacher(config, "cpu")
        embeddings = on_gpu.encode_patches(patches)
        assert embeddings.is_cuda
        assert (embeddings.cpu() * on_cpu.encode_patches(patches)).sum(1).min() > 0.999
        assert (on_gpu.encode_text(["hare"]).cpu() * on_cpu.encode_text(["hare"])).sum() > 0.999


def test_unavailable_device():
    for device in ("cuda:99", "abacus"):
        message = error(load_teacher, BUNDLED, device)
        assert device in message and "'cpu'" in message


# The cache.

@pytest.fixture
def tiny_video(small_dataset):
    video = small_dataset.video
    return video, make_grid(TeacherConfig(), video.frame_hw)


def test_cache_returns_what_was_computed(tiny_clip, tiny_video, tmp_path, monkeypatch):
    config = tiny_file(tiny_clip)
    assert cached_embeddings(*tiny_video, config, tmp_path) is None
    first = teacher_embeddings(*tiny_video, config, cache_dir=tmp_path, device="cpu",
                               progress=False)
    assert first.shape == (12, 8, 24)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr(cache, "load_teacher", lambda *a: pytest.fail("ran again"))
    again = teacher_embeddings(*tiny_video, config, cache_dir=tmp_path, progress=False)
    assert torch.equal(first, again)
    assert torch.equal(first, cached_embeddings(*tiny_video, config, tmp_path))


def test_batching_does_not_matter(tiny_clip, tiny_video):
    video, grid = tiny_video
    teacher = load_teacher(tiny_file(tiny_clip), "cpu")
    one_by_one = torch.stack([teacher.encode_patches(cut_patches(frame[None], grid)[0])
                              for frame in video.frames])
    assert torch.allclose(run_teacher(teacher, video.frames, grid, progress=False), one_by_one,
                          atol=1e-5)
    many = make_grid(TeacherConfig(patch_grid=(4, 6), patch_size=20), video.frame_hw)
    assert run_teacher(teacher, video.frames, many, progress=False).shape == (12, 24, 24)


@pytest.mark.parametrize("fits", [5, 1])
def test_fewer_patches_at_a_time_where_the_gpu_is_small(tiny_clip, tiny_video, monkeypatch, fits):
    video, grid = tiny_video
    teacher = load_teacher(tiny_file(tiny_clip), "cpu")
    whole, encode, seen = run_teacher(teacher, video.frames, grid, progress=False), \
        teacher.encode_patches, []

    def small(patches):
        if len(patches) > fits:
            raise torch.cuda.OutOfMemoryError("too much")
        seen.append(len(patches))
        return encode(patches)

    monkeypatch.setattr(teacher, "encode_patches", small)
    with pytest.warns(UserWarning, match="16 patches for CLIP tiny.*same result"):
        found = run_teacher(teacher, video.frames, grid, progress=False)
    assert torch.allclose(found, whole, atol=1e-5) and max(seen) == min(fits, 4)
    fits = 0
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="device='cpu'"):
        run_teacher(teacher, video.frames, grid, progress=False)


@pytest.mark.filterwarnings("ignore:the GPU's memory holds no")
@pytest.mark.parametrize("config", [BUNDLED, "tiny"])
def test_a_teacher_beyond_the_gpus_memory_says_so(tiny_clip, tiny_video, monkeypatch, config):
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("too much")

    for library in ("timm", "open_clip"):
        monkeypatch.setattr(f"{library}.create_model", full)
    config = tiny_file(tiny_clip) if config == "tiny" else config
    video, grid = tiny_video  # the bundled network is made for its first patches
    message = error(lambda: run_teacher(load_teacher(config, "cpu"), video.frames, grid,
                                        progress=False))
    assert "GPU's memory is too small" in message and "device='cpu'" in message


def test_cache_key_covers_all_that_embeddings_depend_on(tiny_clip, tiny_video, tmp_path,
                                                        monkeypatch):
    video, grid = tiny_video
    changed = dataclasses.replace(video, digest="another")
    other_grid = make_grid(TeacherConfig(patch_grid=(1, 2)), video.frame_hw)
    weights = torch.load(tiny_clip / "tiny.pt", weights_only=True)
    torch.save({name: value + 1e-6 for name, value in weights.items()}, tmp_path / "tiny.pt")
    paths = [
        cache_path(video, grid, BUNDLED, tmp_path),
        cache_path(changed, grid, BUNDLED, tmp_path),
        cache_path(video, other_grid, BUNDLED, tmp_path),
        cache_path(video, grid, TeacherConfig(), tmp_path),
        cache_path(video, grid, TeacherConfig(clip_model="ViT-B-16-quickgelu"), tmp_path),
        cache_path(video, grid, TeacherConfig(clip_pretrained="metaclip_400m"), tmp_path),
        cache_path(video, grid, tiny_file(tiny_clip), tmp_path),
        cache_path(video, grid, tiny_file(tiny_clip, teacher_precision="bf16"), tmp_path),
        cache_path(video, grid, tiny_file(tmp_path), tmp_path),  # same name, other weights
        cache_path(video, grid, tiny_dir(tiny_clip), tmp_path),
    ]
    monkeypatch.setattr(cache, "PREPROCESS_VERSION", 2)
    paths.append(cache_path(video, grid, BUNDLED, tmp_path))
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit flip", "other tensor"])
def test_a_damaged_cache_file_says_so_and_is_written_anew(tiny_clip, tiny_video, tmp_path, damage):
    config = tiny_file(tiny_clip)
    first = teacher_embeddings(*tiny_video, config, cache_dir=tmp_path, progress=False)
    path = cache_path(*tiny_video, config, tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "other tensor":
        cache.write_cache(path, first[:5], {})
    else:
        content[-3] ^= 1
        path.write_bytes({"truncated": content[:-50], "empty": b"", "bit flip": content}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        again = teacher_embeddings(*tiny_video, config, cache_dir=tmp_path, progress=False)
    assert torch.equal(first, again)
    assert torch.equal(first, cached_embeddings(*tiny_video, config, tmp_path))


def test_many_writers_and_readers_never_see_half_a_file(tiny_clip, tiny_video, tmp_path):
    config, path = tiny_file(tiny_clip), cache_path(*tiny_video, tiny_file(tiny_clip), tmp_path)
    embeddings = normalize(torch.randn(12, 8, 24), dim=-1)
    seen, stop = [], threading.Event()

    def write():
        while not stop.is_set():
            cache.write_cache(path, embeddings, {})

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while len(seen) < 50:
            found = cached_embeddings(*tiny_video, config, tmp_path)
            if found is not None:
                seen.append(torch.equal(found, embeddings))
    stop.set()
    for writer in writers:
        writer.join()
    assert all(seen) and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(RunError, match="cannot write .*full"):
        cache.write_cache(tmp_path / "x.safetensors", torch.ones(1, 1, 1), {})
    assert list(tmp_path.iterdir()) == []
