"""The stored video: bytes that decode to just what was quantised."""

import numpy as np
import pytest
import torch

from hnerv_clip.codec import FileError, decode_video, encode_video, quantise
from hnerv_clip.evaluate import embed_frames, evaluate_stored, store_video
from hnerv_clip.model import build_model


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
    for damaged in (data[:-1], data[:20], b"", b"something else" * 100):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="encode it again"):
            decode_video(path)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="altered"):
        decode_video(path)
    with pytest.raises(FileError, match="cannot read"):
        decode_video(tmp_path / "none.hnerv")
