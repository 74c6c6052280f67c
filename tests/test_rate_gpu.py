"""The programme that a GPU measures for the page of rate and quality, on a CPU and small."""

import json

import pytest
import torch

import hnerv_clip
from hnerv_clip.bench import decoding, rate_gpu, rate_quality
from hnerv_clip.config import ConfigError
from hnerv_clip.evaluate import evaluate_stored
from hnerv_clip.study import decoded


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


def measure_decoded(path, small_config, cache_dir, **changes):
    settings = {name: value for name, value in small_config.params().items()
                if name in ("data_path", "crop_list", "resize_list", "frame_stride", "frame_limit",
                            "data_split")}
    return decoded.measure_file(path, settings | changes, cache_dir=cache_dir, device="cpu")


def test_a_files_field_is_compared_with_the_teacher_on_its_frames(
        folder, small_config, small_dataset, cache_dir, monkeypatch):
    path = folder / "8_bits.hnerv"
    monkeypatch.setattr(decoded, "TEST_BOXES", 4)
    monkeypatch.setattr(decoded, "LEAST_DB", 5)  # hardly trained
    rows = measure_decoded(path, small_config, cache_dir)
    assert [(row["frames"], row["n"], row["asked"]) for row in rows] == [
        (frames, n, asked) for frames, n in (("train", 10), ("held_out", 2))
        for asked in ("any box", "patches")]
    table, rate_bpp = evaluate_stored(path, small_dataset, device=torch.device("cpu"))
    for row in rows:  # held-out frames come from interpolated embeddings
        source = "encoder" if row["frames"] == "train" else "interpolated"
        own = table[(table.source == source) & ((table.split == "train") == (source == "encoder"))]
        assert row["psnr_db"] == pytest.approx(own.psnr_db.mean(), abs=0.02)
        assert row["rate_bpp"] == pytest.approx(rate_bpp, abs=1e-5)
        assert 0 < row["field_bytes"] < row["size_bytes"]
        assert row["teacher"] == small_dataset.teacher_label
        assert row["decoded_skill"] < 0.9 and row["decoded_centered"] < 0.95
    # frames that are decoded without a loss are as good as the video, and the field as it was
    monkeypatch.setattr(decoded, "_decode", lambda _, video, __, chosen: (video.frames[chosen], 99))
    for row, exact in zip(rows, measure_decoded(path, small_config, cache_dir), strict=True):
        assert exact["decoded_skill"] > 0.99 and exact["decoded_centered"] > 0.99
        assert exact["skill"] == row["skill"] and exact["centered"] == row["centered"]


def test_another_video_and_a_file_without_a_field_are_refused(folder, trained_run, small_config,
                                                              cache_dir, monkeypatch):
    with pytest.raises(ConfigError, match="12 frames of 80×160, but bunny as it is read here 6 fr"):
        measure_decoded(folder / "8_bits.hnerv", small_config, cache_dir, frame_limit=6)
    with pytest.raises(ConfigError, match="holds no field"):
        measure_decoded(f"{trained_run}/video.hnerv", small_config, cache_dir)
    with pytest.raises(ConfigError, match="dB against those of bunny .* less than 100: give the d"):
        monkeypatch.setattr(decoded, "LEAST_DB", 100)
        measure_decoded(folder / "8_bits.hnerv", small_config, cache_dir)
    with pytest.raises(ConfigError, match="data_split is missing.* 1_1_1 where"):
        decoded.measure_file(folder / "8_bits.hnerv", {"data_path": "bunny"}, cache_dir=cache_dir)


def test_the_command_measures_a_file_once_and_publishes(folder, tmp_path, monkeypatch, capsys):
    calls = []

    def measure(path, settings, **_):
        calls.append(path.name)
        parts = ("train",) if settings["data_split"] == "1_1_1" else ("train", "held_out")
        return [{"video": "bunny", "digest": decoded.file_digest(path)[:16], "frames": frames,
                 "asked": asked, "teacher": f"teacher of {path.name}"}
                for frames in parts for asked in ("any box", "patches")]
    monkeypatch.setattr(decoded, "measure_file", measure)
    monkeypatch.setattr(decoded, "resolve_path", lambda _: tmp_path)
    names = ["8_bits.hnerv", "4_bpp.hnerv"]

    def published(split, *more, files=names):
        decoded.main([str(tmp_path / "rows.json"), *(str(folder / name) for name in files), "-p",
                      "data_path", "bunny", "-p", "data_split", split, "--publish", *more])
        return json.loads((tmp_path / decoded.FILE).read_text())
    old = {"video": "bikes", "digest": "old", "frames": "train", "asked": "patches"}
    (tmp_path / decoded.FILE).write_text(json.dumps({"about": {"teacher": "A"}, "rows": [old]}))
    for _ in range(2):
        found = published("4_5_5")
    assert calls == names and len(found["rows"]) == 9
    assert found["about"]["teacher"] == "A; teacher of 8_bits.hnerv; teacher of 4_bpp.hnerv"
    assert found["rows"][0] == {**old, "teacher": "A"}, "what an older version wrote"
    found = published("1_1_1", "--force", files=names[:1])  # no row of the other split is left
    assert calls == [*names, names[0]] and len(found["rows"]) == 7
    with pytest.raises(SystemExit):
        decoded.main(["rows.json", str(folder / names[0]), "-p", "data_path", "bunny"])
    assert "-p data_split SPLIT is missing: give 1_1_1 where" in capsys.readouterr().err


def test_a_target_that_the_field_alone_takes_is_refused():
    assert rate_gpu.network_bpp(0.06, 0.02) == pytest.approx(0.04)
    with pytest.raises(ConfigError, match="0.0200 bits per pixel. Name larger ones"):
        rate_gpu.network_bpp(0.02, 0.02)
