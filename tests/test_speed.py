"""Files of `hnerv-clip bench`, as the page of speed reads them."""

import copy
import json
from types import SimpleNamespace

import pytest

from hnerv_clip.bench import costs, results
from hnerv_clip.book.markdown import three_digits
from hnerv_clip.config import Config
from hnerv_clip.figures.speed import plot_growth, plot_profile

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
                     "patches": 8, "frames": 132, **step(True, 2.1)} for axis in results.AXES]}
    return {"device": "NVIDIA Something", "parts": parts, "made": dict.fromkeys(parts, MADE)}


def test_rates_stand_beside_other_codes():
    rates = results.training_rates([gpu(), {**gpu(), "device": "x, 2 cores"}], REFERENCE)
    assert list(rates.name) == ["fused engine, bf16", "fused engine, bf16", "plain engine, fp32",
                                "the other"]
    assert list(rates.frames_per_s.round()) == [1000, 952, 100, 69]
    costs_of_head = results.head_costs(gpu()["parts"]["train"])
    assert costs_of_head.share.item() == pytest.approx(0.05)  # 2.1 over 2.0
    assert results.made_words(gpu(), "train").startswith("Medians of 5 repeats")
    assert "commit 0123456789ab." in results.made_words(gpu(), "train")
    dirty = {**gpu(), "made": {"train": {**MADE, "dirty": True}}}
    assert "with uncommitted changes" in results.made_words(dirty, "train")


def test_growth_measured_at_another_commit_says_how_its_step_differs():
    bench = gpu()
    bench["parts"]["scaling"][0]["step_ms"] = 2.86
    assert "another" not in results.made_words(bench, "scaling")
    bench["made"]["scaling"] = {**MADE, "commit": "fedcba9876543210"}
    assert results.made_words(bench, "scaling").endswith(
        "than the table of training, where the step of 2.86 ms takes 2.10 ms.")
    bench["parts"]["scaling"][0]["step_ms"] = 2.2
    assert "another" not in results.made_words(bench, "scaling")


def test_rows_that_failed_are_left_out():
    cpu = copy.deepcopy(gpu())
    cpu["parts"]["train"] = [step(True, 900.0), {"engine": "fast", "failed": "no memory left"}]
    assert len(results.part_rows([cpu], "train")[0][1]) == 1


def test_goals_take_the_best_row_and_leave_out_what_is_missing():
    whole = gpu()  # of a whole training the goal is without the head
    whole["parts"]["fit"].append(whole["parts"]["fit"][0] | {"clip_head": False, "wall_s": 51.6})
    assert list(results.goals([whole]).measured) == [
        "952", "1.00", "1000", "52", "5000", "2.0%", "12000"]
    assert list(results.goals([whole]).met) == ["no", "yes", "no", "yes", "yes", "yes", "yes"]
    assert len(results.goals([gpu()])) == 6
    empty = {"device": "NVIDIA Something", "parts": {}, "made": {}}
    assert not len(results.goals([empty])) and not len(results.goals([{**gpu(),
                                                                       "device": "x, 2 cores"}]))
    losses = results.embedding_losses(gpu()["parts"]["decode"])
    assert losses == pytest.approx({("fused", 4): 0.02, ("plain", 4): -0.01})


@pytest.mark.parametrize("value, shown", [(0.1234, "0.12"), (2.1, "2.10"), (41.26, "41.3"),
                                          (352.6, "353"), (3755.4, "3755")])
def test_numbers_have_three_digits(value, shown):
    assert three_digits(value) == shown


def test_files_are_read_gpus_first_and_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no bench.*hnerv-clip bench"):
        results.load_benches(tmp_path)
    (tmp_path / "bench_a.json").write_text(json.dumps({**gpu(), "device": "x, 2 cores"}))
    (tmp_path / "bench_b.json").write_text(json.dumps(gpu()))
    assert [bench["device"] for bench in results.load_benches(tmp_path)] == [
        "NVIDIA Something", "x, 2 cores"]


def test_a_profile_pairs_the_engines():
    def rows(engine, **parts):
        return [{"engine": engine, "precision": "bf16", "part": part.replace("_", ", "), "ms": ms}
                for part, ms in parts.items()]

    bench = gpu()
    bench["parts"]["profile"] = rows("plain", encoder_back=1.5)
    bench["made"]["profile"] = MADE
    assert results.step_profile([bench]) == ([], "")  # one engine alone
    bench["parts"]["profile"] += rows("fused", encoder_back=0.5, sums=0.25)
    parts, where = results.step_profile([bench])
    assert parts == [{"part": "encoder, backward", "before_ms": 1.5, "after_ms": 0.5},
                     {"part": "sums", "before_ms": 0.0, "after_ms": 0.25}]
    assert where.endswith("by the fused one, commit 0123456789ab")


def test_figures_show_every_device_and_part():
    devices = {name: gpu()["parts"]["scaling"] for name in ("one", "two")}
    figure = plot_growth(devices, {name: axis[:2] for name, axis in results.AXES.items()})
    assert [len(panel.containers) for panel in figure.axes[:5]] == [2] * 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
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
    table, where = results.read_decoding(bench_file, config, batch_size=4)
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
            results.read_decoding(bench_file, config.replace(**change), batch_size=4)
    with pytest.raises(ValueError, match=r"no decoding of 3 frames at once; use one of \[4\]"):
        results.read_decoding(bench_file, config, batch_size=3)
    with pytest.raises(ValueError, match="no speed of CLIP; there are A"):
        results.read_teacher_rates(bench_file, "CLIP")
    with pytest.raises(ValueError, match="does not exist; give a file of hnerv-clip bench"):
        results.read_teacher_rates(bench_file.with_name("none.json"), LABEL)
