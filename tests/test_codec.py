"""The stored video: bytes that decode to just what was quantised."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hnerv_clip.codec import FileError, decode_video, encode_video, entropy, quantise, read_header
from hnerv_clip.codec.about import describe_dataset
from hnerv_clip.codec.container import (
    DEPTH_LIMIT,
    FRAME_LIMIT,
    HEADER_LIMIT,
    NETWORK,
    PIXEL_LIMIT,
    SIDE_LIMIT,
    START,
    TEACHER,
    expand_times,
    pack_file,
    pack_times,
    read_part,
)
from hnerv_clip.codec.entropy import pack_arrays
from hnerv_clip.codec.network import ACTIVATION_LIMIT, VALUES_FREE, VALUES_PER_BYTE
from hnerv_clip.codec.video import CHUNK, About, StoredNetwork, _time_unit, open_network
from hnerv_clip.config import Config, ModelConfig, TeacherConfig
from hnerv_clip.evaluate import evaluate_stored, store_video
from hnerv_clip.inference import embed_frames
from hnerv_clip.model import build_model

VERSION_1 = Path(__file__).parent / "data" / "version1.hnerv"


@pytest.fixture(scope="module")
def model(small_config, small_dataset):
    return build_model(small_config.model, frame_hw=small_dataset.video.frame_hw,
                       frame_count=len(small_dataset.video.frames)).eval()


@pytest.fixture(scope="module")
def embeddings(model, small_dataset):
    return embed_frames(model, small_dataset)


def test_quantise_by_hand():
    q = quantise(torch.tensor([0.0, 1.0, 2.0, 3.1]), bits=2)
    assert q.levels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(q.dequantise(), torch.tensor([0, 3.1 / 3, 6.2 / 3, 3.1]))
    constant = torch.full((60, 2), 0.3)
    torch.testing.assert_close(quantise(constant, bits=8).dequantise(), constant)


@pytest.mark.parametrize("bits", [1, 6, 8, 12])
def test_quantisation_error_is_at_most_half_a_step(bits):
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    q = quantise(values, bits=bits)
    assert np.ptp(q.levels) == 2**bits - 1
    assert (q.dequantise() - values).abs().max() <= q.scale.max() / 2 * 1.001


def test_quantise_takes_the_axis_that_errs_least():
    values = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    values *= torch.tensor([1.0, 100.0, 0.01])
    q = quantise(values, bits=8)
    assert q.scale.shape == (1, 3)  # bounds per column, along the axis of 64


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_slices_that_hardly_vary_have_no_negative_step(size):
    torch.manual_seed(0)
    values = size * torch.randn(1, 16, 2, 4) + 1e-6 * torch.randn(132, 16, 2, 4)
    q = quantise(values, bits=6)
    assert q.axis == 0 and (q.scale >= 0).all()
    assert (q.dequantise() - values).abs().max() <= size * 2e-3


def test_quantise_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        quantise(torch.tensor([1.0, float("nan")]), bits=8)


def test_file_holds_the_quantised_model_bit_for_bit(model, embeddings, small_config, tmp_path):
    size_bytes = encode_video(model, embeddings, tmp_path / "v.hnerv", config=small_config)
    assert size_bytes == (tmp_path / "v.hnerv").stat().st_size
    stored, decoded = decode_video(tmp_path / "v.hnerv")
    assert not hasattr(stored, "encoder")
    for name, value in stored.state_dict().items():
        expected = quantise(model.state_dict()[name], bits=8).dequantise()
        assert torch.equal(value, expected), name
    assert torch.equal(decoded, quantise(embeddings, bits=6).dequantise())


def test_rate_is_near_the_entropy_bound(model, embeddings, small_config, tmp_path):
    bits = 0.0
    for bits_of, value in [(8, t) for t in model.stored_state().values()] + [(6, embeddings)]:
        counts = np.unique(quantise(value, bits=bits_of).levels, return_counts=True)[1]
        share = counts[counts > 0] / counts.sum()
        bits -= (share * np.log2(share)).sum() * counts.sum()
    size_bytes = encode_video(model, embeddings, tmp_path / "v.hnerv", config=small_config)
    overhead = size_bytes - bits / 8
    assert 0 < overhead < 9000  # histograms, bounds and header of some twenty tensors


def test_evaluation_of_the_file(model, small_config, small_dataset, tmp_path):
    store_video(model, small_dataset, tmp_path / "v.hnerv", config=small_config)
    table, rate_bpp = evaluate_stored(tmp_path / "v.hnerv", small_dataset,
                                      device=torch.device("cpu"))
    assert set(table.variant) == {"quantised"} and table.psnr_db.notna().all()
    assert rate_bpp == (tmp_path / "v.hnerv").stat().st_size * 8 / (12 * 80 * 160)


def test_damaged_files_are_refused(model, embeddings, small_config, tmp_path):
    path = tmp_path / "v.hnerv"
    encode_video(model, embeddings, path, config=small_config)
    data = bytearray(path.read_bytes())
    for damaged, fix in ((data[:-1], "encode it again"), (data[:20], "encode it again"),
                         (b"", "give a .hnerv"), (b"something else" * 100, "give a .hnerv")):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=fix):
            decode_video(path)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="altered"):
        decode_video(path)
    with pytest.raises(FileError, match="cannot read .*: No such file or directory; give a .hnerv"):
        decode_video(tmp_path / "none.hnerv")


# Version 2: what is checked, and what is read

TINY = {"data_path": "clip.mp4", "enc_strds": "5 2 2", "dec_strds": "5 2 2", "enc_dim": "4_2",
        "modelsize": 0.002, "lower_width": 3, "teacher": "efficientnet-lite0", "clip_dim": 4}


def make_tiny(path, *, frames=20, about=None, steps=None, **changes):
    config = Config.from_params(**{**TINY, **changes})
    model = build_model(config.model, frame_hw=(20, 40), frame_count=frames)
    embeddings = torch.randn(frames, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    encode_video(model, embeddings, path, config=config, about=about, steps=steps)
    return model, embeddings


def reseal(path, change):
    """Change a file's header and parts, and make its checksums right again."""
    data = path.read_bytes()
    _, size, _, _ = START.unpack_from(data)
    at = START.size + size
    meta = json.loads(zlib.decompress(data[START.size:at]))
    parts = {}
    for name, length, _ in meta.pop("parts"):
        parts[name] = data[at:at + length]
        at += length
    change(meta, parts)
    path.write_bytes(pack_file(meta, parts.items()))


def test_version_1_stays_readable():
    model, embeddings = decode_video(VERSION_1)
    digest = hashlib.sha256()
    for value in (*model.state_dict().values(), embeddings):
        digest.update(value.contiguous().numpy())
    assert digest.hexdigest() == \
        "83945b1b12187b628be4fddd0ca6ff5696764af75f4987c88fee6177c57e81f4"
    stored = open_network(VERSION_1)
    assert stored.header.version == 1 and stored.header.frame_count == 4
    assert stored.embeddings(1, 3).shape == (2, 2, 1, 2)


def test_header_says_what_went_in(tmp_path):
    times = [0.0, 0.5, 0.75, *np.arange(1, 18) * 1001 / 30000 + 0.75]
    make_tiny(tmp_path / "v.hnerv", about=About("name", times, "t", "label", "w"),
              clip_pretrained="/home/someone/weights.pt")
    header = read_header(tmp_path / "v.hnerv")
    assert header.frame_count == 20 and header.size == (20, 40)
    np.testing.assert_allclose(header.times(), times, atol=1e-6)
    assert "someone" not in str(header.meta)  # no path of this machine
    teacher = header.meta["teacher"]
    assert (teacher["name"], teacher["label"], teacher["weights"]) == ("t", "label", "w")


@pytest.mark.parametrize("rate", [25, 24, 30000 / 1001, 59.94, 12.5, 1])
def test_usual_frame_rates_take_few_bytes(rate):
    times = [i / rate for i in range(2000)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unit = _time_unit(times)
        packed = pack_times([round(t * unit) for t in times], (1, unit))
    np.testing.assert_allclose(expand_times(packed), times, atol=1e-3)
    assert len(packed["steps"]) < 3 or rate == 59.94


def test_a_file_keeps_all_settings_of_network_and_patches():
    """But for those that only fitting a field asks for; a fitted one has its own."""
    fitting = {"head", "field_rank", "field_hidden"}
    assert set(NETWORK) == {f.name for f in dataclasses.fields(ModelConfig)} - fitting
    assert set(TEACHER) == {f.name for f in dataclasses.fields(TeacherConfig)}


def test_times_must_rise():
    with pytest.raises(ValueError, match="do not rise at frame 2"):
        pack_times([0, 5, 5], (1, 25))


def test_times_that_do_not_rise_become_even(small_dataset, small_config):
    video = dataclasses.replace(small_dataset.video, times_s=np.zeros(12))
    with pytest.warns(UserWarning, match="do not rise"):
        about = describe_dataset(dataclasses.replace(small_dataset, video=video), small_config)
    np.testing.assert_allclose(about.times_s, np.arange(12) / video.fps)
    assert about.weights.startswith("sha256:")


def test_some_embeddings_read_some_parts(tmp_path, monkeypatch):
    from hnerv_clip.codec import video

    _, embeddings = make_tiny(tmp_path / "v.hnerv")
    expected = quantise(embeddings, bits=6).dequantise()
    stored, read = StoredNetwork(tmp_path / "v.hnerv"), []
    real = video.read_part
    monkeypatch.setattr(video, "read_part",
                        lambda path, part: read.append(part.name) or real(path, part))
    assert torch.equal(stored.embeddings(9, 11), expected[9:11])
    assert read == ["embeddings", "embeddings/8", "histograms"]
    assert torch.equal(stored.embeddings(7, 17), expected[7:17])
    assert torch.equal(stored.embeddings(), expected)


def test_learned_steps_are_kept(tmp_path):
    steps = {"decoder.1.conv.weight": 0.031, "embeddings": 0.3}
    model, embeddings = make_tiny(tmp_path / "v.hnerv", steps=steps)
    stored, decoded = decode_video(tmp_path / "v.hnerv")
    weight = model.decoder[1].conv.weight.detach()
    found = stored.decoder[1].conv.weight.detach()
    assert (found - weight).abs().max() <= 0.0156 and (decoded - embeddings).abs().max() <= 0.151
    torch.testing.assert_close(found / 0.031, (found / 0.031).round(), atol=1e-4, rtol=0)


def test_classes_pay_where_rows_differ():
    generator = np.random.default_rng(0)
    scale = np.exp2(generator.uniform(0, 6, (64, 1, 1)))
    levels = np.round(generator.laplace(size=(64, 32, 9)) * scale).astype(np.int32)
    chosen = entropy.choose_classes(levels)
    assert chosen.flags == entropy.ROWS
    flat = entropy.Classes(np.full(1, 10, np.int8), np.zeros(1, np.int8))
    sizes = [len(entropy.encode_levels(levels, c, entropy.count_levels([(levels, c)])))
             for c in (chosen, flat)]
    assert sizes[0] < 0.93 * sizes[1]
    histograms = entropy.count_levels([(levels, chosen)])
    coded = entropy.encode_levels(levels, chosen, histograms)
    again = entropy.unpack_histograms(entropy.pack_histograms({"weights": histograms}))
    np.testing.assert_array_equal(
        entropy.decode_levels(coded, levels.shape, chosen, again["weights"]), levels)


@pytest.mark.parametrize("name, change, match", [
    ("missing", lambda meta, parts: parts.pop("embeddings/8"), "parts are not"),
    ("extra", lambda meta, parts: parts.update(more=b"x"), "parts are not"),
    ("shape", lambda meta, parts: meta["tensors"][0][1].append(1), "the network's is"),
    ("order", lambda meta, parts: meta["tensors"].reverse(), "tensors are not"),
    ("frames", lambda meta, parts: meta["video"].update(frames=10**7), "frames"),
    ("size", lambda meta, parts: meta["video"].update(size=[2**14, 2**14]), "pixels"),
    ("padding", lambda meta, parts: meta["network"].update(pad_list="20_20000"), "pad_list"),
    ("auto", lambda meta, parts: meta["network"].update(dec_strds="auto"), "auto"),
    ("network", lambda meta, parts: meta["network"].update(modelsize=900), "values in"),
    ("strides", lambda meta, parts: meta["network"].update(dec_strds="5 " * 40), "limits"),
    ("blocks", lambda meta, parts: meta["network"].update(num_blks="1_10000"), "num_blks"),
    ("levels", lambda meta, parts: meta["network"].update(embed="pe_1.25_1e9"), "levels"),
    ("head", lambda meta, parts: meta["heads"].append({"name": "x", "settings": {}}), "unknown"),
    ("field", lambda meta, parts: meta["heads"].append({"name": "field", "settings": {}}), "field"),
    ("setting", lambda meta, parts: meta["network"].update(more=1), "unknown"),
    ("times", lambda meta, parts: meta["video"]["times"]["steps"][0].__setitem__(1, 3), "times"),
    ("stream", lambda meta, parts: parts.update(
        {"embeddings/0": parts["embeddings/0"] + bytes(8)}), "longer"),
    ("nan", lambda meta, parts: parts.update({"rgb_head.bias": pack_arrays(
        np.float32([np.nan, 1]), np.int8([0, 0]))}), "finite"),
    ("bounds", lambda meta, parts: parts.update({"rgb_head.bias": pack_arrays(
        np.zeros(10**7, np.int8))}), "bounds of"),
])
def test_what_a_header_asks_for_is_checked(tmp_path, name, change, match):
    path = tmp_path / "v.hnerv"
    make_tiny(path)
    reseal(path, change)
    with pytest.raises(FileError, match=match):
        decode_video(path)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    """A network of zeros takes few bytes, so the number of its values is bounded by them."""
    config = Config.from_params(**{**TINY, "modelsize": 1.5})
    model = build_model(config.model, frame_hw=(20, 40), frame_count=20)
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match="at most"):
        encode_video(model, torch.zeros(20, 2, 1, 2), tmp_path / "v.hnerv", config=config)


def test_every_part_and_the_whole_are_checked(tmp_path):
    path = tmp_path / "v.hnerv"
    make_tiny(path)
    data, header = path.read_bytes(), read_header(path)
    for part in header.parts.values():
        damaged = bytearray(data)
        damaged[part.at + part.size // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=f"digest of its part '{part.name}'"):
            read_part(path, part)
        with pytest.raises(FileError, match="digest of the whole"):
            decode_video(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FileError, match="digest of the whole"):
        decode_video(path)
    path.write_bytes(data + b"x")
    with pytest.raises(FileError, match="bytes, where its header"):
        decode_video(path)


def test_the_books_page_gives_the_limits_of_the_code():
    page = (Path(__file__).parents[1] / "book" / "file_format.md").read_text(encoding="utf-8")
    for limit in (HEADER_LIMIT, SIDE_LIMIT, PIXEL_LIMIT, FRAME_LIMIT, VALUES_FREE,
                  ACTIVATION_LIMIT):
        assert f"{limit:,}" in page, limit
    assert f"beyond {DEPTH_LIMIT} levels" in page and f"0…{entropy.CLASSES - 1}" in page
    assert f"plus {entropy.CLASSES} for" in page and f"more than {VALUES_PER_BYTE} values" in page
    assert f"(`chunk`, {CHUNK} here" in page


def test_fuzzing_finds_only_the_documented_error():
    """In a process of its own: an abort or a hang ends it."""
    fuzz(FUZZED, seed=0)


@pytest.mark.slow
def test_fuzzing_for_minutes():
    fuzz(20_000, seed=1)


FUZZED = 400


def fuzz(count, *, seed):
    script = Path(__file__).parent / "fuzz_file.py"
    done = subprocess.run([sys.executable, str(script), "--count", str(count), "--seed", str(seed)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'refused'" in done.stdout
