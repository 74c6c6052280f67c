"""The tables of «How fast» say what the files hold, and what they do not."""

import copy
import json
from types import SimpleNamespace

import pytest

from hnerv_clip import bench_results
from hnerv_clip.book import speed
from hnerv_clip.config import Config
from hnerv_clip.figures.speed import plot_growth, plot_profile
from hnerv_clip.verify import costs

MADE = {"commit": "0123456789abcdef", "dirty": False, "versions": {"torch": "2.11.0"}, "threads": 8}
REFERENCE = {"source": "Somewhere", "rows": [
    {"what": "the other", "clip_head": True, "frames_per_s": [66, 72],
     "decode_frames_per_s": [530, 600], "note": ""}]}


def spread(name, value):
    return {name: value, f"{name}_min": 0.5 * value, f"{name}_max": 2 * value, "n": 5}


def step(head, ms, **more):
    return {"engine": "fused", "precision": "bf16", "embed": "", "clip_head": head, "batch_size": 2,
            **spread("step_ms", ms), "frames_per_s": 2e3 / ms, "compile_s": 20.0,
            "peak_memory_bytes": 2**30, "compute_share": 0.5, "bandwidth_share": 0.042, **more}


def decode(mode, rate, size=4, decoder="fused"):
    return {"mode": mode, "batch_size": size, "decoder": decoder, **spread("frames_per_s", rate)}


def gpu():
    parts = {
        "train": [step(True, 2.1), step(False, 2.0),
                  step(True, 20.0, engine="plain", precision="fp32", compile_s=None)],
        "decode": [decode("RGB", 5000.0), decode("RGB and embeddings", 4900.0),
                   decode("RGB", 100.0, decoder="plain"),
                   decode("RGB and embeddings", 101.0, decoder="plain")],
        "teacher": [{"teacher": "ViT", "precision": "bf16", "patches": 1056,
                     "cosine_to_fp32_min": 0.99951, **spread("patches_per_s", 12000.0)}],
        "ceilings": [{"what": "product", "precision": "bf16", **spread("tflop_per_s", 700.0)}],
        "fit": [{"run": "seed0", "epochs": 300, "seed": 0, "clip_head": True, "wall_s": 58.2,
                 "import_s": 5.25, "data_s": 3.0, "setup_time_s": 1.5, "compile_s": 9.0,
                 "train_time_s": 40.0, "eval_time_s": 4.0, "stored_time_s": 1.25,
                 "checkpoint_time_s": 0.5, "rest_s": 1.7, "psnr_db": 35.5,
                 "peak_memory_bytes": 3 * 2**30, "commit": "c" * 40, "dirty": False}],
        "scaling": [{"axis": axis, "frame": "640×1280", "pixels": 819200, "modelsize": 1.5,
                     "patches": 8, "frames": 132, **step(True, 2.1)} for axis in speed.AXES]}
    return {"device": "NVIDIA Something", "parts": parts, "made": dict.fromkeys(parts, MADE)}


def test_a_training_table():
    text = speed.training_markdown([gpu()], REFERENCE)
    assert "| fused engine, bf16, from frames | on | 2.10 (1.05–4.20) | **952** | 1.00 | 20.0 |" \
        " 50% | 4.2% |" in text
    assert "changes a step by +5.0% (fused, bf16, from frames)." in text  # 2.1 over 2.0
    assert "| the other | on | 66–72 |" in text and "Not measured" not in text
    assert "Medians of 5 repeats" in text and "commit 0123456789ab." in text
    dirty = gpu()
    dirty["made"]["train"] = {**MADE, "dirty": True}
    assert "commit 0123456789ab with uncommitted changes" in speed.training_markdown([dirty],
                                                                                  REFERENCE)


def test_columns_without_values_go_and_failures_stay():
    cpu = copy.deepcopy(gpu())
    cpu["device"] = "A processor, 2 cores"
    cpu["parts"]["train"] = [step(True, 900.0, peak_memory_bytes=None, compile_s=None),
                             {"engine": "fast", "precision": "bf16", "failed": "no memory left"}]
    text = speed.training_markdown([cpu], REFERENCE)
    assert "memory (GiB)" not in text and "compilation" not in text
    assert "- fast, bf16: failed, no memory left" in text
    assert "Not measured yet: training on a GPU" in text


def test_goals_take_the_best_row_and_say_what_is_missing():
    lines = speed.goals_markdown([gpu()]).splitlines()[2:]
    assert [line.split("|")[3].strip() for line in lines] == [
        "952", "1.00", "1000", "58", "5000", "2.0%", "12000"]
    empty = {"device": "NVIDIA Something", "parts": {}, "made": {}}
    assert speed.goals_markdown([empty]).count("not measured") == len(speed.GOALS)
    assert "Not measured yet" in speed.goals_markdown([{**empty, "device": "x, 2 cores"}])


@pytest.mark.parametrize("value, shown", [(0.1234, "0.12"), (2.1, "2.10"), (41.26, "41.3"),
                                          (352.6, "353"), (3755.4, "3755")])
def test_numbers_have_three_digits(value, shown):
    assert speed._number(value) == shown


def test_pages_stand_with_files_and_without(tmp_path):
    (tmp_path / "reference_speed.json").write_text(json.dumps(REFERENCE))
    bare = speed.speed_pages(tmp_path)
    assert all("easured yet" in text or "recorded yet" in text for text in bare.values())
    (tmp_path / "bench_a.json").write_text(json.dumps({**gpu(), "device": "x, 2 cores"}))
    (tmp_path / "bench_b.json").write_text(json.dumps(gpu()))
    rows = [{"part": "encoder", "before_ms": 1.25, "after_ms": 0.5},
            {"part": "decoder", "before_ms": 3.0, "after_ms": 1.25}]
    (tmp_path / "profile_h100.json").write_text(json.dumps({"device": "H", "rows": rows}))
    (tmp_path / "tried.json").write_text(json.dumps({"rows": [
        {"change": "fusing", "expected_ms": 0.6, "measured_ms": None, "kept": False, "why": "slow",
         "device": "H"}]}))
    pages = speed.speed_pages(tmp_path)
    assert pages.keys() == bare.keys()
    assert not [name for name, text in pages.items() if "yet" in text]
    assert "| **sum** | **4.25** | **1.75** |" in pages["speed_profile"]
    assert "| fusing | 0.60 | no | slow | H |" in pages["speed_tried"]  # nothing was measured
    assert "`seed0` | 300 | 0 | on | **58** | 3.0 | 1.5 | 9.0 | 40.0 | 4.0 | 1.2 | 0.5 | 1.7 | " \
        "35.50 | 3.00 |" in pages["speed_fit"] and "clock: 5.2 s from" in pages["speed_fit"]
    assert [bench["device"] for bench in bench_results.load_benches(tmp_path)] == [
        "NVIDIA Something", "x, 2 cores"]
    assert "Embeddings take 2.0% (fused, 4 at once) and -1.0% (plain, 4 at once)" in \
        pages["speed_decode"]


def test_a_profile_pairs_the_engines(tmp_path):
    def rows(engine, **parts):
        return [{"engine": engine, "precision": "bf16", "part": part, "ms": ms}
                for part, ms in parts.items()]

    bench = gpu()
    bench["parts"]["profile"] = rows("plain", encoder=1.5)
    bench["made"]["profile"] = MADE
    (tmp_path / "bench_a.json").write_text(json.dumps(bench))
    assert speed.step_profile(tmp_path) is None  # one engine alone
    bench["parts"]["profile"] += rows("fused", encoder=0.5, sums=0.25)
    (tmp_path / "bench_a.json").write_text(json.dumps(bench))
    profile = speed.step_profile(tmp_path)
    assert profile["rows"] == [{"part": "encoder", "before_ms": 1.5, "after_ms": 0.5},
                               {"part": "sums", "before_ms": 0.0, "after_ms": 0.25}]
    assert profile["device"].endswith("by the fused one, commit 0123456789ab")


def test_figures_show_every_device_and_part():
    devices = {name: gpu()["parts"]["scaling"] for name in ("one", "two")}
    figure = plot_growth(devices, {name: axis[:2] for name, axis in speed.AXES.items()})
    assert [len(panel.containers) for panel in figure.axes[:5]] == [2] * 5
    assert [text.get_text() for text in figure.axes[5].get_legend().get_texts()] == ["one", "two"]
    rows = [{"part": "encoder", "before_ms": 1.25, "after_ms": 0.5}]
    widths = [bar.get_width() for bar in plot_profile(rows, device="H").axes[0].patches]
    assert widths == [1.25, 0.5]


LABEL = "A (not CLIP)"


@pytest.fixture
def bench_file(tmp_path):
    """A bench file of the default network, whose fused decoder stands last."""
    rows = [decode(mode, rate, decoder=decoder) for decoder, factor in (("plain", 1), ("fused", 10))
            for mode, rate in (("RGB", 100 * factor), ("embeddings only", 200 * factor))]
    teacher = {"teacher": LABEL, "precision": "fp32", **spread("patches_per_s", 80.0)}
    path = tmp_path / "bench_gpu.json"
    path.write_text(json.dumps({
        "device": "a GPU", "made": {"decode": MADE | {"settings": Config.from_params().params()}},
        "parts": {"decode": rows, "teacher": [teacher]}}))
    return path


def test_speeds_of_another_machine_are_read_for_the_same_network(bench_file):
    config = Config.from_params()
    table, where = bench_results.read_decoding(bench_file, config, batch_size=4)
    assert table["mode"].tolist() == ["RGB", "embeddings only"]
    assert table.frames_per_s.tolist() == [1000, 2000]  # of the fused decoder
    assert where == "a GPU, measured apart, commit 0123456789ab"
    run = SimpleNamespace(config=config, dataset=SimpleNamespace(grid=range(8),
                                                                 teacher_label=LABEL))
    table, said = costs.read_costs(bench_file, run)
    assert said == where and table.embeddings_per_s.tolist() == pytest.approx(
        [8 * 2000, 8 / (1 / 1000 + 1 / 10), 80])
    assert table["min"].tolist() == pytest.approx([8 * 1000, 8 / (1 / 500 + 1 / 5), 40])
    for change, message in [({"modelsize": 3}, "another network: modelsize=1.5, the run has 3.0"),
                            ({"patch_grid": "8_16"}, "another network: patch_grid="),
                            ({"resize_list": "320_640"}, "another network: resize_list=''")]:
        with pytest.raises(ValueError, match=message):
            bench_results.read_decoding(bench_file, config.replace(**change), batch_size=4)
    with pytest.raises(ValueError, match=r"no decoding of 3 frames at once; use one of \[4\]"):
        bench_results.read_decoding(bench_file, config, batch_size=3)
    with pytest.raises(ValueError, match="no speed of CLIP; there are A"):
        bench_results.read_teacher_rates(bench_file, "CLIP")
    with pytest.raises(ValueError, match="does not exist; give a file of hnerv-clip bench"):
        bench_results.read_teacher_rates(bench_file.with_name("none.json"), LABEL)
