"""A stored video as an object and through the commands: from the file alone."""

import json
import math
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pandas as pd
import pytest
import torch

import hnerv_clip
from hnerv_clip.cli import main
from hnerv_clip.cli.stored import describe_quality, parse_frames
from hnerv_clip.codec import FileError, encode_video
from hnerv_clip.codec.video import About
from hnerv_clip.config import Config, ConfigError, VideoConfig
from hnerv_clip.explore.video import open_video
from hnerv_clip.labels import DISTINGUISHED, match_words
from hnerv_clip.model import build_model
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.search.rank import match_scores
from hnerv_clip.stored.video import StoredVideo
from hnerv_clip.teachers import reference_vectors, sentences
from hnerv_clip.video import load_video

TIMES = [0.0, 0.04, 0.08, 0.16, 0.2, 0.24]  # one frame lasts twice as long
SIZE = (37, 70)  # which the network pads to 40 × 80


def make_file(path, *, field=None, frames=6, scale=1.0, **changes):
    """`scale`: of the last features, which the RGB head takes back."""
    config = Config.from_params(**{
        "data_path": "clip.mp4", "teacher": "efficientnet-lite0", "clip_dim": 1280,
        "enc_strds": "5 4 2",
        "dec_strds": "5 4 2", "enc_dim": "8_4", "modelsize": 0.02, "patch_size": 20, **changes})
    model = build_model(config.model, frame_hw=SIZE, frame_count=frames).eval()
    with torch.no_grad():
        model.rgb_head.weight.mul_(30 / scale)  # pictures that differ
        model.decoder[-1].conv.weight.mul_(scale)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(frames, 4, 1, 2, generator=generator) \
        if model.kind == "hybrid" else None
    times = [*TIMES, *(TIMES[-1] + i / 25 for i in range(1, frames - 5))]
    encode_video(model, embeddings, path, config=config,
                 about=About("<b>clip</b>", times, "bundled", "bundled & small"), field=field)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("stored") / "v.hnerv")


@pytest.fixture(scope="module")
def video(path):
    return hnerv_clip.open(path)


def test_frames_are_those_of_the_whole_network(video):
    from hnerv_clip.codec import decode_video

    model, embeddings = decode_video(video.path)
    with torch.inference_mode():
        whole = model.rgb(model.features(embeddings))
    expected = (whole * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert len(video) == 6 and video.size == SIZE
    assert np.abs(video[:].astype(int) - expected).max() <= 1
    np.testing.assert_allclose(video[4], video[:][4], atol=1)  # sums differ with the batch
    np.testing.assert_array_equal(video[-1], video[5])
    np.testing.assert_allclose(video[1:6:2], video[:][1:6:2], atol=1)
    assert video[3:3].shape == (0, *SIZE, 3)
    assert sum(1 for _ in video) == 6
    with pytest.raises(IndexError, match="6 frames"):
        video[6]


def test_times_are_those_that_went_in(video):
    np.testing.assert_allclose(video.times_s, TIMES)
    assert [video.frame_at(t) for t in (0, 0.039, 0.04, 0.1, 0.159, 0.16, 0.27)] == \
        [0, 0, 1, 2, 2, 3, 5]
    with pytest.raises(ValueError, match="outside the video"):
        video.frame_at(0.5)


def test_embedding_of_a_box(video):
    from hnerv_clip.codec import decode_video

    model, embeddings = decode_video(video.path)
    centre = torch.tensor([[15.0, 35.0]])
    with torch.inference_mode():
        expected = model.clip_at(model.stages(embeddings[2:3]), centre)[0, 0].numpy()
    np.testing.assert_allclose(video.embed((30, 10, 40, 20), 0.1), expected, atol=1e-5)
    for box in ((30, 10, 20, 20), (-1, 0, 9, 9), (0, 0, 71, 9)):
        with pytest.raises(ValueError, match="x0 < x1"):
            video.embed(box, 0)


@pytest.mark.parametrize("box", [(1, 2, 3), None, 7, "1234", (0, 0, "a", 9), ((0, 0), (9, 9)),
                                 (0, None, 9, 9)])
def test_what_is_no_box_is_refused_with_the_rule(video, with_field, box):
    asked = (video.embed, hnerv_clip.open(with_field[0]).search_region,
             lambda box, time_s: open_video(with_field[0]).similar(0, box))
    for ask in asked:
        with pytest.raises(ConfigError, match="must be four numbers x0, y0, x1, y1 in pixels"):
            ask(box, 0)


def test_a_box_and_a_frame_may_be_numbers_of_numpy(video):
    box = np.array([30, 10, 50, 30])
    np.testing.assert_array_equal(video.embed(box, np.float32(0.1)),
                                  video.embed((30, 10, 50, 30), float(np.float32(0.1))))
    for kind in (np.int64, np.uint8):
        np.testing.assert_array_equal(video[kind(2)], video[2])
    np.testing.assert_array_equal(video[np.int64(-1)], video[5])


@pytest.mark.parametrize("index", [1.5, "a", None, (1, 2)])
def test_what_is_no_frame_is_refused_with_the_rule(video, index):
    with pytest.raises(TypeError, match=r"a frame's number is an integer; write video\[10\]"):
        video[index]


def test_a_time_is_a_number(video):
    for time_s in (None, "1"):
        with pytest.raises(ConfigError, match=f"time {time_s!r} must be a number of seconds"):
            video.embed((30, 10, 50, 30), time_s)


def test_psnr_takes_frames_in_both_layouts(video):
    frames = video[:].copy()
    frames[2] += 1 - 2 * (frames[2] > 127).astype(np.uint8)  # one level away from each
    first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    frames.flags.writeable = False
    wanted = video.psnr(torch.from_numpy(first))
    assert (wanted[[0, 1, 3, 4, 5]] > 99).all()
    assert wanted[2] == pytest.approx(20 * np.log10(255), abs=1e-3)
    flipped = np.ascontiguousarray(frames[:, :, ::-1])[:, :, ::-1]  # of negative strides
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (frames, flipped, first, torch.from_numpy(frames.copy())):
            torch.testing.assert_close(video.psnr(given), wanted)
    for given, said in ((frames / 255, "ndarray of float64"), (list(frames), "frames are a list"),
                        (torch.from_numpy(first).float(), "Tensor of torch.float32")):
        with pytest.raises(TypeError, match=f"{said}; give a uint8 tensor or array"):
            video.psnr(given)
    with pytest.raises(ValueError, match=r"\(5, 37, 70, 3\) are not the \(6, 3, 37, 70\) or "):
        video.psnr(frames[:5])


def test_a_box_unlike_the_patches_of_the_original_head_is_a_guess(video, with_field):
    with pytest.warns(UserWarning, match="box 10, 30, 10, 10 .*like none of them.*--head field"):
        video.embed((30, 10, 40, 20), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video.embed(tuple(video.boxes()[0]), 0.1)
        hnerv_clip.open(with_field[0]).embed((30, 10, 50, 30), 0.1)


def test_a_text_that_is_no_class_is_told_as_what_it_was_taken(path, monkeypatch, capsys):
    monkeypatch.setattr(sentences, "explain_mixture", lambda text: "hare 0.50, Angora 0.04")
    monkeypatch.setattr(sentences, "is_understood", lambda text: True)
    monkeypatch.setattr(StoredVideo, "search", lambda *a, **k: pd.DataFrame({
        "rank": [1], "match": [2.5]}))
    assert main(["search", str(path), "a grey bunny", "Hare"]) == 0
    told = capsys.readouterr().out
    assert "a grey bunny  (taken as hare 0.50, Angora 0.04 by a sentence encoder, not CLIP)" in told
    assert told.count("taken as") == 1
    monkeypatch.setattr(sentences, "is_understood", lambda text: False)
    assert main(["search", str(path), "xqzt blorp"]) == 0
    told = capsys.readouterr().out
    assert "xqzt blorp  (not understood: no class of ImageNet is near it, so the hits mean " \
           "little; taken as hare 0.50" in told
    assert "match" not in told


def test_a_frame_reads_only_what_it_needs(path, monkeypatch):
    from hnerv_clip.codec import video as codec

    read, real = [], codec.read_part
    monkeypatch.setattr(codec, "read_part", lambda p, part: read.append(part.name) or real(p, part))
    opened = hnerv_clip.open(path)
    assert read == []
    opened[0]
    assert not any("clip_head" in name for name in read) and "embeddings/0" in read
    read.clear()
    opened.embed((0, 0, 20, 20), 0)
    assert all(name.startswith(("clip_head", "embeddings/")) for name in read)


@pytest.mark.parametrize("embed", ["pe_1.25_8", "xyt_1.25_8"])
def test_networks_of_coordinates_play(tmp_path, embed):
    video = hnerv_clip.open(make_file(tmp_path / "v.hnerv", embed=embed, fc_hw="1_2"))
    assert video[2:4].shape == (2, *SIZE, 3)
    assert np.linalg.norm(video.embed((0, 0, 20, 20), 0.2)) == pytest.approx(1, abs=1e-5)


def test_search_ranks_patches_by_the_teachers_text(video):
    found = video.search("hare", 3, apart=0)
    assert list(found) == ["rank", "frame", "time_s", "x0", "y0", "x1", "y1", "score"]
    vector = video.teacher().encode_text(["hare"])[0].numpy()
    scores = video.patch_embeddings @ vector
    assert found.score[0] == pytest.approx(scores.max(), abs=1e-5)
    assert (found.time_s == video.times_s[found.frame]).all()
    boxes = found[["x0", "y0", "x1", "y1"]].to_numpy()
    assert (boxes >= 0).all() and (boxes <= [70, 37, 70, 37]).all()
    names = reference_vectors(video.teacher())
    found = video.search("hare", 3, apart=0, match=True)
    frame, patch = np.unravel_index(scores.argmax(), scores.shape)
    assert found.match[0] == pytest.approx(
        match_scores(vector, names, video.patch_embeddings[frame, patch]), abs=1e-3)
    for text, said in ((["teapot"], r"text=\['teapot'\] is no str: .*one text"),
                       (7, "text=7 is no str"), (" ", "empty query")):
        with pytest.raises(ValueError, match=said):
            video.search(text)
    start = time.perf_counter()
    video.search("moped")
    assert time.perf_counter() - start < 0.5


def test_the_first_search_imports_no_teachers_network(path):
    """Which takes seconds; a text needs only its classes."""
    code = f"import sys, hnerv_clip; hnerv_clip.open({str(path)!r}).search('hare'); " \
           "assert not {'timm', 'open_clip', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def with_field(tmp_path_factory):
    from hnerv_clip.heads.field import FieldConfig, FieldHead

    torch.manual_seed(0)
    field = FieldHead(FieldConfig(dim=1280, frame_hw=SIZE, frame_count=6, source_channels=4, rank=8,
                                  hidden=16, map_hw=(4, 8)))
    path = tmp_path_factory.mktemp("field") / "v.hnerv"
    return make_file(path, field=field, predict_clip=False), field.eval()


def test_a_field_in_the_file_answers_for_the_very_box(with_field):
    path, head = with_field
    video = hnerv_clip.open(path)
    assert video.has_head and video.facts()["search"].endswith("for any box")
    box, times = (10, 5, 30, 30), (0.08, 0.12, 0.16)  # a frame, half-way, the next
    found = [video.embed(box, time) for time in times]
    stored = video.stored.load_field()
    z = video.frame_embeddings(range(6))
    inputs = torch.stack([z[2], (z[2] + z[3]) / 2, z[3]]), torch.tensor([2, 2.5, 3])
    with torch.inference_mode():
        wanted = stored(*inputs, torch.tensor([[5.0, 10, 25, 20]]))[:, 0]
        original = head(*inputs, torch.tensor([[5.0, 10, 25, 20]]))[:, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (wanted * original).sum(1).min() > 0.99  # rounded to 8 bits
    hits = video.search("hare", 2, match=True)
    best, names = hits.iloc[0], reference_vectors(video.teacher())
    assert best.match == pytest.approx(match_scores(
        video.teacher().encode_text(["hare"])[0].numpy(), names,
        video.embed(best[["x0", "y0", "x1", "y1"]], best.time_s)), abs=1e-3)
    assert len(hits) == 2 and (hits[["x1", "y1"]].to_numpy() <= [70, 37]).all()
    assert video.patch_embeddings.shape == (6, len(video.grid), 1280)


def test_a_frame_and_an_embedding_read_few_bytes(tmp_path, monkeypatch):
    """Counted where the file is read: the parts named by the format, and one chunk of many."""
    import builtins

    path = make_file(tmp_path / "v.hnerv", frames=400, modelsize=0.03)
    real, read = builtins.open, []

    def counted(name, *args, **options):
        file = real(name, *args, **options)
        if str(name) == str(path):
            own = file.read
            file = type("File", (), {
                "__enter__": lambda self: self, "__exit__": lambda self, *_: own.__self__.close(),
                "seek": own.__self__.seek,
                "read": lambda self, *size: read.append(len(data := own(*size))) or data})()
        return file

    monkeypatch.setattr(builtins, "open", counted)
    video = hnerv_clip.open(path)
    parts, whole = video.header.parts, path.stat().st_size
    header = whole - 32 - sum(part.size for part in parts.values())
    assert sum(read) == 8 + header  # the magic, to know the version, and all of it
    read.clear()
    video[399]
    shared = sum(parts[name].size for name in parts if name.startswith(
        ("decoder.", "rgb_head.", "histograms")) or name in ("embeddings", "embeddings/392"))
    assert sum(read) == shared < whole - header - sum(
        part.size for name, part in parts.items() if name.startswith("clip_head."))
    read.clear()
    video.embed((0, 0, 20, 20), video.times_s[8])
    assert sum(read) == parts["embeddings/8"].size + sum(
        part.size for name, part in parts.items() if name.startswith("clip_head."))


def test_a_field_reads_no_picture(with_field, monkeypatch):
    from hnerv_clip.codec import video as codec

    read, real = [], codec.read_part
    monkeypatch.setattr(codec, "read_part", lambda p, part: read.append(part.name) or real(p, part))
    hnerv_clip.open(with_field[0]).embed((10, 5, 30, 30), 0)
    assert not any(name.startswith("rgb_head") for name in read)


def test_a_file_with_a_field_is_searched_by_region(with_field, tmp_path, capsys, monkeypatch):
    """From the command line to the table, without the teacher."""
    monkeypatch.setattr("hnerv_clip.teachers.load_teacher", None)
    path, video = str(with_field[0]), hnerv_clip.open(with_field[0])
    found = video.search_region((0, 0, 20, 20), TIMES[1], 3, apart=1)
    assert len(found) == 3 and list(found["rank"]) == [1, 2, 3]
    hit = found.iloc[0]  # its score is the cosine of the two boxes' embeddings
    own = video.embed((hit.x0, hit.y0, hit.x1, hit.y1), hit.time_s)
    assert hit.score == pytest.approx(own @ video.embed((0, 0, 20, 20), TIMES[1]), abs=1e-5)
    search = ["search", path, "--device", "cpu", "--time"]
    assert main([*search, str(TIMES[1]), "--box", "0,0,20,20", "--top_k", "3", "--apart", "1"]) == 0
    said = capsys.readouterr().out
    assert f"like box 0,0,20,20 at {TIMES[1]:g} s" in said and f"{hit.score:.3f}" in said
    for time_s, box, words in (("9", "0,0,20,20", "outside the video"), ("0", "1,0", "is not x0"),
                               ("0", "0,0,20,400", "within the picture of 70×37: x0 < x1")):
        assert main([*search, time_s, "--box", box]) == 2
        assert words in capsys.readouterr().err
    assert main([*search, "0", "hare"]) == 2
    assert "says when --box is" in capsys.readouterr().err
    plain = make_file(tmp_path / "v.hnerv")
    assert main(["search", str(plain), "--device", "cpu", "--box", "0,0,20,20"]) == 2
    assert "holds no field" in capsys.readouterr().err


def test_search_refuses_another_teachers_weights(tmp_path):
    video = hnerv_clip.open(make_file(tmp_path / "v.hnerv"))
    video.header.meta["teacher"]["weights"] = "sha256:0"
    with pytest.raises(ValueError, match="was made with"):
        video.search("hare")


def test_a_file_without_a_head_says_so(tmp_path):
    video = hnerv_clip.open(make_file(tmp_path / "v.hnerv", predict_clip=False))
    assert video.facts()["search"] == "no head for embeddings"
    for ask in (lambda: video.embed((0, 0, 20, 20), 0), lambda: video.search("hare")):
        with pytest.raises(ConfigError, match="no head"):
            ask()


def test_notebook_shows_pictures_and_escaped_facts(video):
    shown = video._repr_html_()
    assert shown.count("<img") == 6 and "&lt;b&gt;clip" in shown and "<b>clip" not in shown
    assert "bundled &amp; small" in shown and "frame 3 at 0.16 s" in shown
    assert "6 frames of 70×37" in repr(video)


# Commands

def test_info_reads_the_header_alone(path, capsys):
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "37 × 70 (height × width)" in shown and "bits a pixel" in shown
    version_1 = Path(__file__).parent / "data" / "version1.hnerv"
    for file in (path, version_1):
        code = f"import sys; from hnerv_clip.cli import main; main(['info', {str(file)!r}]); " \
               "assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_decode_writes_a_film_with_the_same_times(path, video, tmp_path, name):
    out = tmp_path / name
    assert main(["decode", str(path), str(out), "--crf", "1"]) == 0
    with av.open(str(out)) as container:
        frames = list(container.decode(video=0))
    np.testing.assert_allclose([float(f.pts * f.time_base) for f in frames], TIMES, atol=1e-3)
    pictures = np.stack([f.to_ndarray(format="rgb24") for f in frames])
    assert pictures.shape == (6, *SIZE, 3)
    assert np.abs(pictures.astype(int) - video[:]).mean() < 4
    assert main(["decode", str(path), str(out)]) == 1  # no silent replacement
    assert main(["decode", str(path), str(out), "--force", "--frames", "2:4"]) == 0
    with av.open(str(out)) as container:
        assert len(list(container.decode(video=0))) == 2
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing half written is left


def test_segments_that_are_encoded_at_the_same_time_make_one_film(tmp_path, monkeypatch):
    from fractions import Fraction

    from hnerv_clip.stored import film

    monkeypatch.setattr(film, "SEGMENT", (8, 8))
    ticks = [0, *np.cumsum(np.random.default_rng(0).integers(1, 4, 29)).tolist()]  # uneven
    frames = torch.arange(48 * 64).view(1, 1, 48, 64) + 8 * torch.arange(30).view(-1, 1, 1, 1)
    planes = film.to_planes((frames % 256).byte().expand(-1, 3, -1, -1), True).numpy()
    for name, preset in (("f.mp4", "medium"), ("f.mkv", "ultrafast")):  # with B-frames, and without
        shared = film._Film((48, 64), Fraction(1, 25), Fraction(25), crf=10, preset=preset)
        film.encode_film(tmp_path / name, shared, planes.__getitem__, ticks, workers=3)
        with av.open(str(tmp_path / name)) as container:
            order = [packet.dts for packet in container.demux(video=0) if packet.size]
        with av.open(str(tmp_path / name)) as container:
            shown = list(container.decode(video=0))
            last = ticks[-1] + ticks[-1] - ticks[-2]  # it is shown as long as the one before
            assert container.duration / av.time_base == pytest.approx(last / 25, abs=2e-3)
        assert len(order) == 30 and order == sorted(set(order))
        np.testing.assert_allclose([f.time for f in shown], np.array(ticks) / 25, atol=1e-3)
        assert sum(f.key_frame for f in shown) == 4
        errors = np.stack([f.to_ndarray() for f in shown]).astype(int) - planes
        assert np.abs(errors).mean() < 2


def test_segments_leave_no_core_idle_and_fit_memory():
    from hnerv_clip.stored.film import SEGMENT, WAITING_BYTES, plan_segments

    for frames, size, workers in ((1, (37, 70), 2), (30, (640, 1280), 2), (132, (640, 1280), 2),
                                  (132, (640, 1280), 16), (5000, (640, 1280), 16),
                                  (5000, (2160, 3840), 16), (300, (4320, 7680), 8)):
        encoders, length = plan_segments(frames, size, workers=workers)
        assert 1 <= encoders <= workers and 1 <= length <= SEGMENT[1]
        assert encoders * length * 2 * size[0] * size[1] <= WAITING_BYTES
        if frames >= workers * SEGMENT[0] and size[0] < 1000:
            assert encoders == workers
    assert plan_segments(132, (640, 1280), workers=16) == (5, 27), "each on three threads"


def test_encoders_are_given_frames_in_turns():
    from hnerv_clip.stored.film import RUN, encoding_order

    order = encoding_order(132, encoders=5, length=27)
    assert sorted(order) == list(range(132))
    assert order[:5 * RUN:RUN] == [0, 27, 54, 81, 108], "each encoder has frames soon"
    ends = [order.index(last) for last in (26, 53, 80, 107, 131)]
    assert max(ends) - min(ends) < 2 * RUN, "all end together"
    order = encoding_order(1000, encoders=2, length=64)
    assert sorted(order) == list(range(1000))
    assert max(order[:128]) == 127, "the next segments wait for those before"


def test_what_stops_an_encoder_stops_the_film(tmp_path, monkeypatch):
    """Also where more frames wait for it than it has room for."""
    from fractions import Fraction

    from hnerv_clip.stored import film

    def fail(*_):
        raise av.error.InvalidDataError(1, "no encoder")

    monkeypatch.setattr(film._Film, "encode", fail)
    shared = film._Film((48, 64), Fraction(1, 25), Fraction(25), crf=0, preset="medium")
    planes = np.zeros((100, 72, 64), np.uint8)
    with pytest.raises(av.error.InvalidDataError):
        film.encode_film(tmp_path / "f.mp4", shared, planes.__getitem__, range(100), workers=2)


def test_several_threads_of_an_encoder_give_the_same_times(tmp_path):
    from fractions import Fraction

    from hnerv_clip.stored import film

    ticks = [0, 1, 3, 4, 6, 7, 8, 10, 11, 12]
    planes = torch.randint(0, 256, (10, 72, 64), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0)).numpy()
    shared = film._Film((48, 64), Fraction(1, 25), Fraction(25), crf=0, preset="medium")
    film.encode_film(tmp_path / "f.mp4", shared, planes.__getitem__, ticks,
                     workers=4)  # one segment
    with av.open(str(tmp_path / "f.mp4")) as container:
        shown = list(container.decode(video=0))
    np.testing.assert_allclose([f.time for f in shown], np.array(ticks) / 25, atol=1e-3)
    np.testing.assert_array_equal(np.stack([f.to_ndarray() for f in shown]), planes)


def test_what_stops_decoding_stops_the_film(path, tmp_path, monkeypatch):
    from hnerv_clip.stored import film

    def fail(*_):
        raise RuntimeError("no more")

    monkeypatch.setattr(film, "to_planes", fail)
    with pytest.raises(RuntimeError, match="no more"):
        film.write_film(tmp_path / "f.mp4", hnerv_clip.open(path), range(6), progress=False)


def test_pictures_of_padded_channels_are_the_same(path):
    """As a GPU computes them; embeddings of the same network do not change either."""
    plain, padded = hnerv_clip.open(path), hnerv_clip.open(path)
    padded._model(("decoder.",)).pad_channels(8)
    assert np.abs(padded[:].astype(int) - plain[:]).max() <= 1
    for video in (plain, padded):
        video.vector = video.embed((30, 10, 40, 20), 0.1)
    np.testing.assert_allclose(padded.vector, plain.vector, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_writes_the_same_film(path, tmp_path):
    """Padded channels, and frames copied while the next are computed.

    Without loss: what a level more or less changes in a lossy film is far larger than a level.
    """
    from hnerv_clip.stored.film import write_film

    here, there = (hnerv_clip.open(path, device=name) for name in ("cpu", "cuda"))
    assert there.half and np.abs(here[:].astype(int) - there[:]).max() <= 1
    films = []
    for name, video in (("a.mp4", here), ("b.mp4", there)):
        write_film(tmp_path / name, video, range(6), crf=0, progress=False)
        with av.open(str(tmp_path / name)) as container:
            films.append(np.stack([f.to_ndarray() for f in container.decode(video=0)]).astype(int))
    assert np.abs(films[0] - films[1]).max() <= 3
    np.testing.assert_allclose(there.embed((30, 10, 40, 20), 0.1),
                               here.embed((30, 10, 40, 20), 0.1), atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_keeps_to_fp32_where_fp16_would_show(tmp_path):
    """Features beyond fp16's largest value, 65504, on every frame."""
    path = make_file(tmp_path / "v.hnerv", act="relu", scale=1e7)
    here, there = (hnerv_clip.open(path, device=name) for name in ("cpu", "cuda"))
    assert not there.half and np.abs(here[:].astype(int) - there[:]).max() <= 1


@pytest.mark.parametrize("changes", [{}, {"num_blks": "1_2"}, {"act": "sin", "embed": "pe_1.25_8",
                                                              "fc_hw": "1_2"}])
def test_the_players_decoder_gives_the_networks_features(tmp_path, changes):
    from hnerv_clip.stored.half import HalfDecoder

    video = hnerv_clip.open(make_file(tmp_path / "v.hnerv", **changes), device="cpu")
    model, embeddings = video._model(("coordinate_encoder.", "decoder.")), \
        video.frame_embeddings(range(3))
    with torch.inference_mode():
        wanted = model.features(embeddings)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 5e-3)):
            found = HalfDecoder(model, dtype).features(embeddings)
            assert found.dtype == dtype and found.shape[1] % 8 == 0
            assert found.is_contiguous(memory_format=torch.channels_last)
            width = wanted.shape[1]
            assert not found[:, width:].any() and wanted.std() > 0.01
            np.testing.assert_allclose(found[:, :width].float(), wanted, atol=tolerance)
    assert HalfDecoder.suits(model)


def test_fp16_is_taken_where_it_changes_at_most_a_level(path, monkeypatch):
    """The rule, with the drawing of a GPU replaced."""
    video = hnerv_clip.open(path)
    assert not video.half, "a CPU computes in fp32"
    for change, taken in ((0, True), (1, True), (2, False)):
        other = hnerv_clip.open(path)
        other.device = torch.device("cuda")
        drawn = []

        def draw(chosen, *, half, change=change, drawn=drawn):
            drawn.append((list(chosen), half))
            return torch.full((len(chosen), 3, 4, 4), 100 + half * change, dtype=torch.uint8)

        monkeypatch.setattr(other, "_draw", draw)
        assert other.half is taken
        assert [frames for frames, _ in drawn] == [[0, 2, 3, 5]] * 2
        assert {half for _, half in drawn} == {True, False}


def test_what_a_killed_process_left_is_removed(path, tmp_path):
    import platform

    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    for name in ("v.mp4", "w.mp4"):
        (tmp_path / f".{name}-{platform.node()}-{done.pid}-abc").mkdir()
    assert main(["decode", str(path), str(tmp_path / "v.mp4"), "--frames", "0:1"]) == 0
    assert sorted(file.name[:6] for file in tmp_path.iterdir()) == [".w.mp4", "v.mp4"]


def test_decode_writes_pictures(path, video, tmp_path):
    from PIL import Image

    assert main(["decode", str(path), str(tmp_path / "frames"), "--frames", "1:3"]) == 0
    files = sorted((tmp_path / "frames").iterdir())
    assert [f.name for f in files] == ["00001.png", "00002.png"]
    assert np.abs(np.array(Image.open(files[1])).astype(int) - video[2]).max() <= 1


def test_embed_prints_the_vector(path, video, capsys):
    assert main(["embed", str(path), "--box", "30,10,40,20", "--time", "0.1"]) == 0
    np.testing.assert_allclose(json.loads(capsys.readouterr().out),
                               video.embed((30, 10, 40, 20), 0.1), atol=1e-6)
    assert main(["embed", str(path), "--box", "30,10", "--time", "0.1"]) == 2


def test_search_takes_a_file(path, capsys):
    assert main(["search", str(path), "hare; moped", "--top_k", "2"]) == 0
    shown = capsys.readouterr().out
    assert "hare  (bundled & small)" in shown and "moped" in shown and "time_s" in shown
    assert len(re.findall(r"^“(hare|moped)”(: best match with| has no match in this video: its "
                          r"best place has) a standard score of -?\d\.\d", shown,
                          re.MULTILINE)) == 2
    assert main(["search", str(path), "--top_k", "2", "hare", "moped"]) == 0
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit):
        main(["search", str(path), "hare", "--top", "2"])
    assert "unrecognized arguments: --top 2" in capsys.readouterr().err


def test_a_text_without_a_match_is_called_so():
    assert match_words("hare", DISTINGUISHED) == "“hare”: best match with a standard score of 2.0"
    assert match_words("teapot", 1.4).startswith(
        "“teapot” has no match in this video: its best place has a standard score of 1.4, and only "
        "from 2 on")


def test_commands_refuse_what_is_no_file(tmp_path, capsys):
    (tmp_path / "no.hnerv").write_bytes(b"HNCLIP\0\2 and nothing")
    for command in (["info"], ["embed", "--box", "0,0,1,1", "--time", "0"]):
        assert main([command[0], str(tmp_path / "no.hnerv"), *command[1:]]) == 1
        assert "encode it again" in capsys.readouterr().err
    film = tmp_path / "kitchen.MP4"
    film.write_bytes(b"\0\0\0 ftypisom")
    for command in (["info"], ["search", "hare"], ["decode", str(tmp_path / "frames")]):
        assert main([command[0], str(film), *command[1:]]) == 1
        assert f"{film} is a video, not a run or a stored one: store it first, hnerv-clip encode " \
               f"{film} kitchen.hnerv" in capsys.readouterr().err
    for command in (["info"], ["search", "hare"]):
        assert main([command[0], str(tmp_path / "none.hnerv"), *command[1:]]) == 1
        assert "cannot read" in capsys.readouterr().err
    with pytest.raises(FileError, match="cannot read"):
        hnerv_clip.open(tmp_path / "none.hnerv")


def test_ranges_of_frames():
    assert list(parse_frames("2:4", 10)) == [2, 3] and len(parse_frames("", 10)) == 10
    assert list(parse_frames("-2:", 10)) == [8, 9] and list(parse_frames("3", 10)) == [3]
    for words in ("a:b", "5:5", "20:30"):
        with pytest.raises(ConfigError, match="write for example"):
            parse_frames(words, 10)


def test_export_computes_what_pytorch_does(path, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from hnerv_clip.stored.export import export_onnx

    difference = export_onnx(path, tmp_path / "d.onnx")
    assert set(difference) == {"frames", "embeddings"} and max(difference.values()) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "d.onnx"))
    frames, vectors = session.run(None, {
        "frame": np.arange(6), "centres": np.float32([[10, 10], [20, 30], [37, 70]])})
    assert frames.shape == (6, 3, 37, 70) and vectors.shape == (6, 3, 1280)
    pictures = frames.transpose(0, 2, 3, 1) * 255
    assert np.abs(pictures - hnerv_clip.open(path)[:]).max() <= 1.01
    assert main(["export", str(path), str(tmp_path / "d.onnx")]) == 1  # no silent replacement


def test_export_holds_the_field(with_field, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from hnerv_clip.stored.export import export_onnx

    path, video = with_field[0], hnerv_clip.open(with_field[0])
    difference = export_onnx(path, tmp_path / "d.onnx")
    assert set(difference) == {"frames", "embeddings"} and max(difference.values()) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "d.onnx"))
    boxes = np.float32([[5, 10, 25, 20], [0, 0, 37, 70], [1, 2, 9.5, 30]])
    _, vectors = session.run(None, {"frame": np.arange(1, 5), "boxes": boxes})
    np.testing.assert_allclose(vectors, video.field.embed(range(1, 5), boxes), atol=1e-4)


def test_encode_needs_no_setting(tmp_path, cache_dir, capsys, monkeypatch):
    """No weights of CLIP: the bundled teacher, which is said; and the same command goes on."""
    from hnerv_clip.stored import effort, make
    from hnerv_clip.teachers.clip_weights import NoWeights

    prepare = make.prepare_run

    def no_clip(config, *args, **options):
        if config.teacher.teacher == "clip":
            raise NoWeights("not on this machine")
        return prepare(config, *args, **options)

    monkeypatch.setattr(make, "prepare_run", no_clip)
    monkeypatch.setattr(effort, "MOST_BOXES", 8)
    small = {"data_path": "bunny", "frame_limit": 4, "resize_list": "80_160", "modelsize": 0.02,
             "epochs": 1, "device": "cpu"}
    config, _ = make.prepare_encoding(small, tmp_path / "work", cache_dir=cache_dir)
    assert (config.model.head, config.model.predict_clip) == ("field", False)
    assert (config.train.field_boxes, config.train.field_steps) == (8, effort.LEAST_STEPS)
    said = capsys.readouterr().out
    assert "bundled teacher, not CLIP" in said and said.count("\n") == 2  # no list of ways out
    assert "\nThe teacher first embeds" in said and "of each frame" in said
    assert (config.teacher.teacher, config.model.clip_dim) == ("efficientnet-lite0", 1280)
    assert config.params().items() >= (make.ENCODE | effort.CPU_SETTINGS).items()
    assert (config.model.modelsize, config.train.epochs) == (0.02, 1)
    with pytest.raises(ConfigError, match="not on this machine"):
        make.prepare_encoding({**small, "teacher": "clip"}, tmp_path / "work", cache_dir=cache_dir)
    named = make.encode_settings({**small, "teacher": "efficientnet-lite0"}, tmp_path / "work")
    assert Config.from_params(**named).model.clip_dim == 1280


def test_a_setting_of_the_original_head_means_that_head(tmp_path):
    from hnerv_clip.stored.make import encode_settings

    for given, head in (({}, "field"), ({"head": "original"}, "original"),
                        ({"clip_loss_weight": "0.1"}, "original"), ({"head": "field"}, "field"),
                        ({"clip_jitter": 4}, "original")):
        config = Config.from_params(data_path="bunny", **encode_settings(given, tmp_path / "new"))
        assert (config.model.head, config.model.predict_clip) == (head, head == "original"), given
    pixels = Config.from_params(**encode_settings({"predict_clip": False}, tmp_path / "new"))
    assert not pixels.embeds


def test_encode_stores_a_field_that_is_fitted_once(tmp_path, cache_dir, capsys, monkeypatch):
    from hnerv_clip.field.query import has_field

    out = tmp_path / "b.hnerv"
    words = ["encode", "bunny", str(out), "--work", str(tmp_path / "work"), "--epochs", "2",
             "--frame_limit", "4", "--resize_list", "80_160", "--modelsize", "0.02", "--device",
             "cpu", "--teacher", "efficientnet-lite0", "--field_boxes", "4", "--field_steps", "20",
             "--rate_epochs", "1", "--cache_dir", str(cache_dir)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "20 steps of fitting a field" in said and "about 1 minute" in said
    assert "for any box" in said and re.search(r"bytes of parts .*field \d", said)
    assert has_field(tmp_path / "work" / "stored") and not has_field(tmp_path / "work")
    video = hnerv_clip.open(out)
    sizes = {name: part.size for name, part in video.header.parts.items()}
    told = re.search(r"field ([\d,]+)", video.facts()["bytes of parts"])[1].replace(",", "")
    assert int(told) == sum(size for name, size in sizes.items() if name.startswith("field."))
    assert video.has_field and video.embed((11, 7, 60, 71), 0.05).shape == (1280,)
    assert main(words) == 0  # as after an interrupt while it measured the file
    assert f"{out} is there and complete" in capsys.readouterr().out
    assert main([*words, "--rate_epochs", "2"]) == 1 and main([*words, "--epochs", "3"]) == 2
    assert main(["encode", "bunny", str(tmp_path / "c.hnerv"), *words[3:]]) == 0  # goes on
    said = capsys.readouterr().out
    assert "2 of 2 epochs of training are done and fine-tuning starts anew; about 1 minute" in said
    values = sum(math.prod(entry[1]) for entry in
                 (*video.header.meta["tensors"], *video.header.meta["embeddings"][:1]))
    told = re.search(r"^values +network (.*), embeddings (.*), field (.*);", said, re.MULTILINE)
    assert sum(int(count.replace(",", "")) for count in told.groups()) == values


def test_encode_asks_the_teacher_for_a_fields_boxes_before_it_trains(tmp_path, monkeypatch):
    from hnerv_clip.field.fit_run import box_sampling
    from hnerv_clip.stored import make
    from hnerv_clip.teachers import boxes
    from hnerv_clip.teachers.clip_weights import NoWeights

    load = boxes.load_teacher

    def no_clip(config, device):
        if config.teacher == "clip":
            raise NoWeights("not on this machine")
        return load(config, device)
    monkeypatch.setattr(boxes, "load_teacher", no_clip)
    config, dataset = make.prepare_encoding(
        {"data_path": "bunny", "frame_limit": 4, "resize_list": "80_160", "modelsize": 0.02,
         "epochs": 1, "device": "cpu", "head": "field", "field_boxes": 2}, tmp_path / "work",
        cache_dir=tmp_path)
    assert (config.teacher.teacher, config.model.head) == ("efficientnet-lite0", "field")
    monkeypatch.setattr(boxes, "load_teacher", None)  # they are in the cache
    _, targets = boxes.box_targets(dataset.video, dataset.split.train, config.teacher,
                                   box_sampling(config), cache_dir=tmp_path)
    assert targets.shape == (4, 2, 1280)


def test_encode_goes_on_with_the_runs_own_settings(trained_run):
    from hnerv_clip.stored.make import encode_settings, prepare_encoding

    own = RunDir(trained_run).config().params()
    assert encode_settings({"data_path": "bunny"}, trained_run) == own
    assert encode_settings({"epochs": 99}, trained_run) == {**own, "epochs": 99}
    with pytest.raises(ConfigError, match=(  # before a video is looked for
            r"training that has begun.*\(resize_list='70_150', of the training '80_160'; "
            r"epochs=99, of the training \d+\)\. Leave them out.*--work FOLDER")):
        prepare_encoding({"epochs": 99, "resize_list": "70_150", "data_path": "moved.mp4"},
                         trained_run, cache_dir="none")
    with pytest.raises(ConfigError, match="^data_path='moved.mp4' is not one of"):
        prepare_encoding({"data_path": "moved.mp4"}, trained_run, cache_dir="none")


def test_a_file_larger_than_the_given_one_is_called_so(path, with_field, tmp_path, monkeypatch):
    stored = hnerv_clip.open(path)
    frames = torch.zeros((len(stored), 3, *stored.size), dtype=torch.uint8)
    monkeypatch.setattr("hnerv_clip.video.load_video", lambda _: SimpleNamespace(frames=frames))
    given = tmp_path / "given.mp4"
    for size, larger in ((10, True), (path.stat().st_size, False)):
        given.write_bytes(b"0" * size)
        told = describe_quality(path, VideoConfig(data_path=str(given)), device="cpu")
        assert ("larger than given.mp4 (10 bytes)" in told) == larger and "PSNR" in told
    given.write_bytes(b"0" * 10)
    monkeypatch.setattr(StoredVideo, "psnr", lambda *_: torch.ones(2))
    told = describe_quality(with_field[0], VideoConfig(data_path=str(given)), device="cpu")
    assert re.search(r"its field alone has [\d,]+ bytes", told)


def test_an_encode_stopped_while_it_measures_its_file_is_finished(trained_copy, tmp_path, cache_dir,
                                                                  capsys, monkeypatch):
    out, new = tmp_path / "b.hnerv", tmp_path / "new.hnerv"
    words = ["store", str(trained_copy), str(out), "--device", "cpu", "--cache_dir", str(cache_dir)]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoredVideo, "psnr", stop)
        assert main(words) == 130
    content, written = out.read_bytes(), out.stat().st_mtime_ns
    capsys.readouterr()
    assert main(words) == 0
    told = capsys.readouterr().out
    assert f"{out} is there and complete" in told and "PSNR" in told
    assert out.stat().st_mtime_ns == written
    assert main([*words, "--rate", "0.002", "--rate_epochs", "1"]) == 1  # stored in another way
    assert "stored with no --rate: give the same" in capsys.readouterr().err
    out.write_bytes(content + b"x")  # another file
    assert main(words) == 1 and out.read_bytes() == content + b"x"
    assert main([*words, "--force"]) == 0 and out.read_bytes() == content
    assert main(words[:2] + [str(tmp_path / "c.hnerv")] + words[3:]) == 0
    assert main(words) == 0, "of two files of a run the first is still known"
    with monkeypatch.context() as patch:  # before any training, after which the file is another
        patch.setattr(RunDir, "finished", False)
        assert main(words) == 1 and out.read_bytes() == content
    (trained_copy / "stored.json").write_text("{")
    assert main(words) == 1 and main(words[:2] + [str(new)] + words[3:]) == 0
    (trained_copy / "model_best.pth").write_bytes((trained_copy / "model_latest.pth").read_bytes())
    assert main(words[:2] + [str(new)] + words[3:]) == 1  # from another checkpoint


def test_encode_makes_a_file_of_a_video(tmp_path, capsys):
    words = ["encode", "bunny", str(tmp_path / "b.hnerv"), "--work", str(tmp_path / "work"),
             "--cache_dir", str(tmp_path / "cache"), "--predict_clip", "False",
             "--epochs", "20", "--lr", "5e-3", "--frame_limit", "5", "--resize_list", "80_160",
             "--enc_strds", "5 4 2 2", "--dec_strds", "5 4 2 2", "--modelsize", "0.02",
             "--device", "cpu", "--rate_epochs", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    video = hnerv_clip.open(tmp_path / "b.hnerv")
    assert video[:].shape == (5, 80, 160, 3) and video.name == "bunny"
    assert video.fps == pytest.approx(25)
    given = load_video(RunDir(tmp_path / "work").config().video).frames.permute(0, 2, 3, 1)
    error = video[:] / 255 - given.numpy() / 255
    db = -10 * np.log10((error ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(video.psnr(given.permute(0, 3, 1, 2)), db, rtol=1e-4)
    assert f"PSNR {db.mean():.2f} dB over all 5 frames (lowest {db.min():.2f} dB)\n" in said
    with pytest.raises(ValueError, match=r"\(4, 3, 80, 160\) are not the \(5, 3, 80, 160\)"):
        video.psnr(given[:4].permute(0, 3, 1, 2))
    assert main([*words, "--force"]) == 0  # at once: the run is finished
    size = (tmp_path / "b.hnerv").stat().st_size
    assert main(["store", str(tmp_path / "work"), str(tmp_path / "c.hnerv"), "--rate", "0.002",
                 "--rate_epochs", "1", "--cache_dir", str(tmp_path / "cache")]) == 0
    assert (tmp_path / "c.hnerv").stat().st_size < size
