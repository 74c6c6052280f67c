"""What a run predicts is cached with it: the next search loads no network and no teacher."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from hnerv_clip import cli, inference, teachers
from hnerv_clip.config import ConfigError
from hnerv_clip.inference import load_run, predict_embeddings
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.search import cache
from hnerv_clip.search.cache import encode_cached, predict_patches, references_cached


def test_predictions_are_cached_and_bound_to_the_checkpoint(trained_copy, cache_dir, monkeypatch):
    run = load_run(trained_copy, cache_dir=cache_dir, device="cpu")
    own = predict_embeddings(run.model, run.dataset, source="interpolated").numpy()
    first = predict_patches(trained_copy, cache_dir=cache_dir, device="cpu")
    np.testing.assert_array_equal(first.embeddings, own)
    with monkeypatch.context() as patch:
        for module, name in ((inference, "load_run"), (teachers, "load_teacher")):
            patch.setattr(module, name, lambda *args, **options: pytest.fail("loaded again"))
        again = predict_patches(trained_copy, cache_dir=cache_dir, device="cpu")
    np.testing.assert_array_equal(again.embeddings, own)
    np.testing.assert_array_equal(again.boxes, run.dataset.grid.boxes)
    assert (again.source, again.teacher_label) == ("interpolated", run.dataset.teacher_label)
    assert again.times_s.tolist() == pytest.approx([i / run.dataset.video.fps for i in range(12)])

    state = RunDir(trained_copy).load_checkpoint()
    for name, tensor in state["model"].items():
        if name.startswith("clip_head"):
            tensor.mul_(-1)
    RunDir(trained_copy).save_checkpoint("model_best.pth", state)
    other = predict_patches(trained_copy, cache_dir=cache_dir, device="cpu").embeddings
    assert np.abs(other - own).max() > 0.01  # stale ones are not read


@pytest.mark.parametrize("name", ["embeddings.npz", "queries.npz", "references.npz"])
def test_a_damaged_file_is_made_anew(trained_copy, cache_dir, name):
    def ask():
        config = RunDir(trained_copy).config()
        return [predict_patches(trained_copy, cache_dir=cache_dir, device="cpu").embeddings,
                encode_cached(["hare"], config.teacher, trained_copy, device="cpu"),
                references_cached(config.teacher, trained_copy, device="cpu")]

    expected, path = ask(), trained_copy / name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for content in (b"", whole[:-9], bytes(flipped)):
        path.write_bytes(content)
        for own, right in zip(ask(), expected):
            np.testing.assert_array_equal(own, right)
    np.savez(path, about=np.array([{"key": 1}], dtype=object))  # a pickle, which is not loaded
    for own, right in zip(ask(), expected):
        np.testing.assert_array_equal(own, right)


def test_a_repeated_query_loads_nothing(trained_copy, cache_dir, capsys):
    words = ["search", str(trained_copy), "hare", "barn", "--cache_dir", str(cache_dir)]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    code = ("import sys; from hnerv_clip import cli; cli.main(sys.argv[1:]); print([name for name "
            "in ('torch', 'timm', 'scipy', 'sklearn', 'av') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout == first + "[]\n", done.stderr


def test_a_cached_query_needs_no_teacher(trained_copy, cache_dir, capsys, monkeypatch):
    words = ["search", str(trained_copy), "hare", "--cache_dir", str(cache_dir)]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    (trained_copy / "references.npz").unlink()

    def refuse(*args):
        raise ConfigError("no weights here")

    monkeypatch.setattr(teachers, "load_teacher", refuse)
    assert cli.main(words) == 0
    without = capsys.readouterr().out
    assert "standard score" in told and "match" not in without
    assert without.splitlines()[0] == told.splitlines()[0]


def test_two_texts_of_one_meaning_are_refused_when_cached_too(trained_copy):
    teacher = RunDir(trained_copy).config().teacher
    encode_cached(["hare", "barn"], teacher, trained_copy, device="cpu")
    arrays = dict(np.load(trained_copy / "queries.npz"))
    arrays["vectors"][1] = arrays["vectors"][0]
    np.savez(trained_copy / "queries.npz", **arrays)
    assert json.loads(arrays["about"].tobytes())["texts"] == ["hare", "barn"]
    with pytest.raises(ValueError, match="'hare' and 'barn' are the same"):
        encode_cached(["hare", "barn"], teacher, trained_copy, device="cpu")


def test_a_warning_is_given_each_time(trained_copy, monkeypatch):
    """Of a text that the teacher can do little with."""
    teacher = RunDir(trained_copy).config().teacher

    def encode(queries, _):
        for query in queries:
            warnings.warn(f"no class near {query!r}", stacklevel=2)
        return np.eye(1280, dtype=np.float32)[:len(queries)]

    monkeypatch.setattr(teachers, "load_teacher", lambda *args: None)
    monkeypatch.setattr(teachers, "encode_queries", encode)
    for _ in range(2):
        with pytest.warns(UserWarning, match="no class near 'love'"):
            encode_cached(["love"], teacher, trained_copy)
        monkeypatch.setattr(teachers, "encode_queries", None)  # the second is cached


def test_bundled_texts_depend_on_what_is_installed():
    from hnerv_clip.teachers import efficientnet, sentences

    assert cache.TEXT_PACKAGES == (efficientnet.BUNDLED_PACKAGE, sentences.PACKAGE)


@pytest.mark.parametrize("command", [["search"], ["verify"], ["index", "INDEX"]])
def test_a_run_without_head_is_told_before_any_weights_are_looked_for(
        pixel_copy, cache_dir, capsys, monkeypatch, command):
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    words = [str(pixel_copy.parent / "index") if word == "INDEX" else word for word in command]
    assert cli.main([*words, str(pixel_copy), *["hare"] * (command == ["search"]),
                     "--cache_dir", str(cache_dir)]) in (1, 2)
    assert "has no CLIP head (predict_clip=False)" in capsys.readouterr().err
