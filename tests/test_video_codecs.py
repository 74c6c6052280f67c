"""Other codecs on the same frames, and the mean difference in rate."""

import pytest
import torch

from hnerv_clip.bench.video_codecs import SETTINGS, available, bd_rate, measure_codec


def test_a_codec_is_measured():
    setting = available(SETTINGS[:1])[0]
    frames = (torch.linspace(0, 255, 64).expand(8, 3, 48, 64)).byte()
    low, high = (measure_codec(frames, setting, crf, threads=1) for crf in (40, 10))
    assert low["size_bytes"] < high["size_bytes"] and low["psnr_db"] < high["psnr_db"]
    assert high["rate_bpp"] == 8 * high["size_bytes"] / (8 * 48 * 64) and high["psnr_db"] > 40


def test_bd_rate_by_hand():
    pytest.importorskip("bjontegaard")
    anchor = [{"rate_bpp": 0.01 * 2**i, "psnr_db": 30 + 2.0 * i} for i in range(6)]
    half = [{**point, "rate_bpp": point["rate_bpp"] / 2} for point in anchor]
    assert bd_rate(anchor, half) == pytest.approx(-50, abs=0.1)
    apart = [{**point, "psnr_db": point["psnr_db"] - 40} for point in anchor]
    assert bd_rate(anchor, apart) != bd_rate(anchor, apart)  # NaN
