"""The programme that a GPU measures for the page of rate and quality, on a CPU and small."""

import json

import pytest

import hnerv_clip
from hnerv_clip.bench import decoding, rate_gpu, rate_quality


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache_dir, small_config):
    folder = tmp_path_factory.mktemp("rate")
    settings = {**small_config.replace(epochs=2).params(), "preset": "auto", "head": "field",
                "predict_clip": False, "field_boxes": 4, "field_steps": 8, "field_rank": 4,
                "field_hidden": 8}
    flags = [word for name, value in settings.items() for word in ("-p", name, str(value))]
    rate_gpu.main([str(folder / "before"), *flags, "--compile_only", "--device", "cpu",
                   "--cache_dir", str(cache_dir)])
    assert not (folder / "before" / "run").exists()
    for minutes in (0, 10):  # stopped, and gone on
        rate_gpu.measure_gpu(folder, settings=settings, targets=(4.0, 5.0), epochs=4,
                             more_epochs=2, minutes=minutes, cache_dir=cache_dir, device="cpu")
        if minutes == 0:
            stopped = json.loads((folder / "rate.json").read_text())
            assert [point["kind"] for point in stopped["points"]] == ["8 bits"]
    return folder


def test_it_measures_files_films_and_devices(folder):
    measured = json.loads((folder / "rate.json").read_text())
    kinds = [(point["kind"], point.get("target_bpp")) for point in measured["points"]]
    assert kinds == [("8 bits", None), ("tuned", 5.0), ("tuned", 4.0)]
    for point in measured["points"]:
        assert point["psnr_db"] > 5 and -1 <= point["clip_similarity"] <= 1
        assert 0 < point["field_bytes"] < point["size_bytes"]
    assert [point["epochs"] for point in measured["points"][1:]] == [4, 2]
    assert measured["points"][2]["goes_on"] and measured["trained"]["eval_clip_similarity_all"]
    assert measured["gpu_cpu_largest_level"] == 0, "the same device twice"
    assert set(measured["decode_frames_per_s"]) == {*decoding.FILMS, decoding.NETWORK,
                                                    decoding.FETCHED}
    assert measured["picture_precision"] == "fp32" and measured["open_s"] > 0
    assert (folder / "4_bpp.hnerv").stat().st_size == measured["points"][2]["size_bytes"]
    assert len(hnerv_clip.open(folder / "8_bits.hnerv")) == 12


def test_the_books_results_take_it(folder):
    measured = json.loads((folder / "rate.json").read_text())
    kept = rate_quality.run_of(measured, commit=measured["commit"],
                               fine_tune_lr=measured["fine_tune_lr"])
    assert kept["points"][2]["history"][0].keys() == {"epoch", "psnr_db", "rate_bpp"}
    assert rate_quality.head_of(kept) == rate_quality.FIELD
    assert rate_quality.fine_tuning_words(kept["points"][2])
