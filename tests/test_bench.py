"""What is counted, and that every part measures something; speeds themselves are not tested."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hnerv_clip import cli
from hnerv_clip.bench import context, decoding, flops, harness, measure, replay
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.model import build_model, plan_model
from hnerv_clip.runs.run_dir import RunDir, RunError
from hnerv_clip.verify import simulation


def work(config, frame_hw, frame_count=132, patch_count=8):
    config = config.resolve(frame_hw)
    plan = plan_model(config.model, frame_hw=frame_hw, frame_count=frame_count)
    return {layer.part: layer for layer in flops.count_work(
        config.model, plan, frame_hw=frame_hw, patch_count=patch_count)}


def test_counted_work_of_the_papers_setting():
    """About 30 GMAC a frame, five sixths of it in the last two decoder blocks."""
    layers = work(Config.from_params(), (640, 1280))
    assert sum(layer.macs for layer in layers.values()) == pytest.approx(30e9, rel=0.05)
    last_two = (40 * 33 * 4 * 25 * 160 * 320) + (33 * 28 * 4 * 25 * 320 * 640)
    assert last_two / sum(layer.macs for layer in layers.values()) == pytest.approx(5 / 6, abs=0.03)
    assert layers["clip_head"].macs == 8 * (28 * 56 + 56 * 512)
    assert layers["rgb_head"].macs == 640 * 1280 * 28 * 3 * 9
    assert layers["rgb_head"].values == 640 * 1280 * (28 + 3)


@pytest.mark.parametrize("changes", [
    {}, {"predict_clip": False}, {"embed": "pe_1.25_80"}, {"embed": "xyt_1.25_80"},
    {"num_blks": "2_2"}, {"dec_strds": "5 4 2", "clip_stage": "all"}])
def test_counted_work_is_that_of_the_modules(small_config, changes):
    """PyTorch's own counter, which watches a forward pass, finds the same."""
    config = small_config.replace(fc_hw="1_2", **changes)
    model = build_model(config.model, frame_hw=(80, 160), frame_count=12)
    centres = torch.tensor([[40.0, 40.0], [20.0, 120.0]]) if config.model.predict_clip else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 80, 160), torch.zeros(1, dtype=torch.float64), centres)
    counted = work(config, (80, 160), frame_count=12, patch_count=2)
    assert 2 * sum(layer.macs for layer in counted.values()) == counter.get_total_flops()


def test_every_part_measures(small_config, cache_dir, small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "CLIP_MODEL", "ViT-S-32-alt")  # a small one
    config = small_config.replace(fc_hw="1_2", epochs=2, eval_freq=2)
    out = tmp_path / "bench.json"
    said = []
    results = harness.bench(config, parts=list(harness.PARTS), out=out, cache_dir=cache_dir,
                          outf=tmp_path / "fit", say=said.append)
    assert results == json.loads(out.read_text())
    parts = results["parts"]
    assert set(parts) == set(harness.PARTS) == set(results["made"])
    assert not [row for rows in parts.values() for row in rows if "failed" in row]
    for rows, speed in [("train", "frames_per_s"), ("decode", "frames_per_s"),
                        ("teacher", "patches_per_s"), ("scaling", "frames_per_s")]:
        for row in parts[rows]:
            assert row[speed] > 0 and row["n"] > 1
    for row in parts["train"]:
        assert row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"]
        assert row["frames_per_s"] == pytest.approx(2e3 / row["step_ms"])
        assert 0 < row["compute_share"] < 1
    assert {row["axis"] for row in parts["scaling"]} == {
        "resolution", "modelsize", "batch_size", "patches", "frames"}
    assert all(row["ms"] > 0 and row["engine"] == "plain" for row in parts["profile"])
    assert {row["mode"] for row in parts["decode"]} == {
        "RGB", "RGB and embeddings", "embeddings only"}
    assert results["made"]["train"]["settings"] == config.params()
    summary = RunDir(tmp_path / "fit").summary()
    fit = parts["fit"][0]
    assert fit["psnr_db"] == summary["eval_psnr_all"] and fit["curve"][-1][0] == 2
    assert all(fit[name] > 0 for name in (*context.CLOCKS, "rest_s", "import_s")
               if name != "compile_s")
    assert fit["wall_s"] == pytest.approx(
        fit["rest_s"] + sum(fit[name] for name in context.CLOCKS))
    assert any("frames_per_s" in text for text in said)


def test_parts_of_several_calls_meet_in_one_file(small_config, cache_dir, tmp_path, monkeypatch):
    row = {"precision": "", "gb_per_s": 10.0, "gb_per_s_max": 11.0}
    monkeypatch.setitem(harness.MEASURES, "ceilings", lambda bench: iter([row]))
    out = tmp_path / "bench.json"
    first = harness.bench(small_config, parts=["ceilings"], out=out, cache_dir=cache_dir,
                        say=lambda text: None)
    kept = {**first["parts"], "decode": [{"mode": "RGB"}]}
    out.write_text(json.dumps({**first, "parts": kept}))
    again = harness.bench(small_config, parts=["ceilings"], out=out, cache_dir=cache_dir,
                        say=lambda text: None)
    assert again["parts"]["decode"] == [{"mode": "RGB"}]
    assert again["parts"]["ceilings"] == first["parts"]["ceilings"] == [row]
    out.write_text(json.dumps({**again, "device": "a fast one"}))
    with pytest.raises(ConfigError, match="a fast one.*another --out"):
        harness.bench(small_config, parts=["ceilings"], out=out, cache_dir=cache_dir)


def test_a_part_of_other_settings_is_not_replaced(small_config, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(harness.MEASURES, "ceilings", lambda bench: iter([{"precision": ""}]))
    monkeypatch.setitem(harness.MEASURES, "fit", lambda bench: iter([{"run": "fit"}]))
    out, options = tmp_path / "bench.json", {"cache_dir": cache_dir, "say": lambda text: None}
    harness.bench(small_config, parts=["ceilings", "fit"], out=out, **options)
    before = out.read_text()
    other = small_config.replace(epochs=small_config.train.epochs + 1)
    with pytest.raises(ConfigError, match="part ceilings with other epochs, .*another --out"):
        harness.bench(other, parts=["ceilings"], out=out, **options)
    assert out.read_text() == before
    harness.bench(other, parts=["fit"], out=out, outf=tmp_path / "longer", **options)
    content = json.loads(before)
    del content["made"]["ceilings"]["settings"]["checkpoint_s"]
    del content["made"]["ceilings"]["settings"]["clip_jitter"]  # as of a file that is older
    out.write_text(json.dumps(content))
    harness.bench(small_config.replace(checkpoint_s=1.0), parts=["ceilings"], out=out, **options)


@pytest.mark.parametrize("main, arguments", [
    (replay.main, ["--out"]), (decoding.main, ["video.hnerv"]), (simulation.main, ["--out"])])
def test_a_file_of_results_is_not_replaced_unasked(main, arguments, tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begin(*args, **named):
        raise Begun
    for name in ("bench.replay.resolve_config", "bench.decoding.select_device",
                 "verify.simulation.calibrate"):
        monkeypatch.setattr(f"hnerv_clip.{name}", begin)
    out = tmp_path / "published.json"
    with pytest.raises(Begun):
        main([*arguments, str(out)])
    out.write_text("{}")
    with pytest.raises(RunError, match="published.json exists; .*--force"):
        main([*arguments, str(out)])
    with pytest.raises(Begun):
        main([*arguments, str(out), "--force"])


def test_shares_follow_the_ceilings_of_the_file():
    row = {"precision": "bf16", "frames_per_s": 1000.0, "gflop_per_frame": 182.0,
           "gb_per_frame": 0.6}
    results = {"parts": {"train": [dict(row), {"failed": "x"}], "ceilings": [
        {"precision": "bf16", "tflop_per_s": 600.0, "tflop_per_s_max": 728.0},
        {"precision": "", "gb_per_s": 2500.0, "gb_per_s_max": 3000.0}]}}
    measure.fill_shares(results)
    filled = results["parts"]["train"][0]
    assert filled["compute_share"] == pytest.approx(0.25)  # 182 of 728 TFLOP/s
    assert filled["bandwidth_share"] == pytest.approx(0.2)  # 600 of 3000 GB/s
    measure.fill_shares({"parts": {"train": [filled]}})
    assert filled["compute_share"] is None


def test_what_is_measured_already_or_unknown_is_refused(small_config, cache_dir, tmp_path):
    with pytest.raises(ConfigError, match="'speed'.*ceilings, train"):
        harness.bench(small_config, parts=["speed"], out=tmp_path / "bench.json")
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "metrics.csv").touch()
    with pytest.raises(ConfigError, match="a new folder"):
        harness.bench(small_config, parts=["fit"], out=tmp_path / "bench.json",
                    cache_dir=cache_dir, outf=tmp_path / "fit")


def test_a_setting_that_fails_is_a_row(small_config, small_dataset, cache_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(measure, "make_engine", fail)
    own = context.Bench(small_config, torch.device("cpu"), 1, 0.0, {"parts": {}}, cache_dir, "")
    row = measure.time_training(own, small_config, small_dataset)
    assert row["failed"] == "RuntimeError: out of memory"


def test_from_the_command_line(tmp_path, cache_dir, capsys):
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--parts", "ceilings", "--out", str(out), "--device", "cpu",
                     "--cache_dir", str(cache_dir)]) == 0
    assert "tflop_per_s" in capsys.readouterr().out
    assert json.loads(out.read_text())["made"]["ceilings"]["settings"]["device"] == "cpu"
