"""What a CPU measures for the page of rate and quality."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hnerv_clip.bench import rate_cpu
from hnerv_clip.bench.video_codecs import available
from hnerv_clip.metrics import unit


def test_a_side_file_gets_better_with_its_size():
    generator = np.random.default_rng(0)
    embeddings = unit(generator.normal(size=(20, 2, 16)).cumsum(0) + 5).astype(np.float32)
    rows = rate_cpu.side_file_curve(embeddings, (10, 300, 1000))
    assert len(rows) == 2, "10 bytes do not hold the mean"
    low, high = rows
    assert low["size_bytes"] <= 300 < high["size_bytes"] <= 1000
    for name in ("clip_similarity", "clip_centred"):
        assert 0.5 < low[name] < high[name] <= 1


@pytest.mark.skipif(not available(), reason="this PyAV has none of the encoders")
def test_what_a_cpu_measures_joins_the_other_results(cache_dir, small_config, tmp_path):
    path = tmp_path / "rate.json"
    codec = available()[0]
    path.write_text(json.dumps({"note": "kept", "codecs": [
        {"codec": codec.label, "crf": crf, "psnr_db": psnr}
        for crf, psnr in ((35, 35), (20, 40))]}))
    rate_cpu.measure_cpu(path, cache_dir=cache_dir, settings=small_config.params())
    kept = json.loads(path.read_text())
    assert kept["note"] == "kept" and "bundled teacher, not CLIP" in kept["side_files"]["teacher"]
    assert [row["crf"] for row in kept["times"]["codecs"]] == [35], "the nearest to the goal"
    own = kept["times"]["own"]
    assert kept["times"]["codecs"][0]["encode_cpu_s"] > 0 < own["decode_cpu_s"]
    assert own["frames"] == rate_cpu.OWN_FRAMES <= kept["times"]["frames"]


@pytest.mark.skipif(not available(), reason="this PyAV has none of the encoders")
def test_points_that_are_missing_are_measured(small_config, tmp_path, monkeypatch):
    path, setting = tmp_path / "rate.json", available()[0]._replace(crfs=(45, 20))
    monkeypatch.setattr(rate_cpu, "available", lambda: [setting])
    known = {"codec": setting.label, "crf": 45, "psnr_db": 1.0}
    path.write_text(json.dumps({"note": "kept", "codecs": [known]}))
    rate_cpu.measure_points(path, settings=small_config.params())
    kept = json.loads(path.read_text())
    assert kept["note"] == "kept" and kept["codecs"][0] == known
    point, = kept["codecs"][1:]
    assert (point["codec"], point["crf"]) == (setting.label, 20) and point["psnr_db"] > 30
    path.unlink()
    assert [point["crf"] for point in rate_cpu.measure_points(
        path, settings=small_config.params())["codecs"]] == [45, 20]


def test_one_codec_more_is_timed_alone(tmp_path, monkeypatch):
    path = tmp_path / "rate.json"
    old = {"codec": "x264", "crf": 30, "encode_cpu_s": 1.0}
    path.write_text(json.dumps({"times": {"codecs": [old], "own": {}}, "codecs": [
        {"codec": name, "crf": 30, "psnr_db": 35.0} for name in ("x264", "x265")]}))
    monkeypatch.setattr(rate_cpu, "load_video", lambda video: SimpleNamespace(frames=None, fps=25))
    monkeypatch.setattr(rate_cpu, "time_codecs", lambda frames, points, **options: [
        {"codec": point["codec"], "encode_cpu_s": 9.0} for point in points])
    for _ in range(2):  # the second takes the place of the first
        rows = rate_cpu.time_more(path, ["x265"])["times"]["codecs"]
    assert rows[0] == old and [row["codec"] for row in rows] == ["x264", "x265"]
    assert rows[1]["encode_cpu_s"] == 9.0 and rows[1]["commit"] and rows[1]["device"]
    with pytest.raises(ValueError, match="no points of"):
        rate_cpu.time_more(path, ["x266"])
