"""What the page of rate and quality says, worked by hand."""

import json
import math
from pathlib import Path

import pytest

from hnerv_clip.bench import rate_quality as rate
from hnerv_clip.bench.damaged_files import COUNTS
from hnerv_clip.figures import plot_rate_quality

LINE = [{"rate_bpp": 0.01 * 4**i, "psnr_db": 30.0 + 4 * i} for i in range(3)]


def measured(commit="a" * 40, *, head=True, psnr=36.0):
    run = {"device": "a GPU", "settings": dict.fromkeys(rate.SETTINGS, 1) | {"predict_clip": head},
           "trained": {"eval_psnr_all": psnr, "eval_clip_similarity_all": 0.98}, "points": [
               {"kind": "8 bits", "rate_bpp": 0.1, "psnr_db": psnr, "clip_similarity": 0.979},
               *({"kind": "tuned", "rate": 0.01, "epochs": 5, **point, "history": [
                   {"epoch": e, "psnr_db": 30 + abs(e - 1), "rate_bpp": 0.05, "clip_loss": 0.0}
                   for e in range(6)]} for point in LINE)],
           "decode_frames_per_s": {"fast": 300.0, "network alone": 900.0}}
    return rate.run_of(run, commit=commit, fine_tune_lr=1e-3)


def test_between_points_by_the_logarithm_of_the_rate():
    assert rate.at_rate(LINE[::-1], 0.02) == pytest.approx(32)
    assert rate.at_psnr(LINE[::-1], 36) == pytest.approx(0.08)
    assert math.isnan(rate.at_rate(LINE, 0.009)) and math.isnan(rate.at_psnr(LINE, 38.1))


def test_the_best_of_several_trainings_counts():
    good = [point | {"psnr_db": point["psnr_db"] + 3} for point in LINE[1:]]
    points = [point | {"head": rate.FIELD, "modelsize": 1.5, "commit": name}
              for name, line in (("a", LINE), ("b", good)) for point in line]
    assert rate.reached(points, 0.02) == pytest.approx(32), "the other has no file so small"
    assert rate.reached(points, 0.08) == pytest.approx(39) and rate.needed(points, 36) == 0.04
    assert math.isnan(rate.reached(points, 0.009)) and math.isnan(rate.needed(points, 42))
    assert len(rate.trainings(points)) == 2


def field_run(epochs, best, optimizer="adan"):
    found = measured()
    for point in found["points"][1:]:
        point["psnr_db"] += best
        point["tune_s"] = 7.0
    return {**found, "settings": found["settings"] | {
        "head": "field", "epochs": epochs, "modelsize": 1.2, "optimizer": optimizer}}


def test_trainings_with_a_field_are_compared_at_one_rate():
    runs = [field_run(200, 0), field_run(600, 1), field_run(900, 2, "adam"), measured()]
    assert rate.run_words(runs[0]) == "1.2 M, 200 epochs by Adan, with field"
    rows = rate.tried_rows(runs)
    assert [row["values, epochs"] for row in rows] == [
        "1.2 M, 200 by Adan", "1.2 M, 600 by Adan", "1.2 M, 900 by Adam"]
    assert rows[0]["first fine-tuning"] == "5 epochs, 7 s, learning rate 0.001"
    assert (rows[0]["dB at 0.055"], rows[1]["dB at 0.055"]) == ("34.92", "35.92")
    assert rate.length_words(runs) == (
        "Of 1.2 M values by Adan, 600 epochs and a first fine-tuning of 5 give 35.92 dB and 200 "
        "epochs and a first fine-tuning of 5 give 34.92 dB at 0.055 bits per pixel.")
    assert rate.length_words(runs[:1]) == ""
    runs[0]["points"] = [point for point in runs[0]["points"] if point["rate_bpp"] > 0.1]
    assert rate.tried_rows(runs)[0]["dB at 0.055"] == "–" and rate.length_words(runs) == ""


def test_lines_join_the_files_of_one_training():
    points = [point | {"head": rate.FIELD, "modelsize": 1.2, "commit": name}
              for name in "ab" for point in LINE]
    figure = plot_rate_quality({}, [], rate.trainings(points), source="", hnerv=LINE[0],
                               goal=LINE[1])
    lines = figure.axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines if line.get_linestyle() == "-"] == [3, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "here, fine-tuned, 1.2 M, with field", "HNeRV (no file)", "goal"]


def test_a_better_file_just_above_a_rate_is_named():
    pairs = [(0.05, 34.0), (0.0556, 35.0), (0.056, 36.0), (0.06, 37.0)]
    points = [{"rate_bpp": bpp, "psnr_db": psnr, "head": rate.FIELD, "modelsize": size,
               "commit": "a"} for size, (bpp, psnr) in enumerate(pairs)]
    assert rate.next_above(points, 0.055) == ", 35.00 dB at 0.0556"
    assert rate.next_above(points[:1] + points[3:], 0.055) == "", "too far"
    assert rate.next_above([{**points[0], "psnr_db": 38.0}, *points], 0.055) == "", "none is better"
    assert "is missed: 34.00 dB there, 1.50 dB short, 35.00 dB at 0.0556." in rate.goal_words(
        "rate_bpp", 34.0, rate.next_above(points, 0.055))


def test_damaged_files_are_counted_once_by_seed():
    log = ("60 files of seed 1: {'refused': 50, 'read': 10}\nrc 0\nRecursionError: deep\nrc 1\n"
           "60 files of seed 3: {'refused': 60}\nrc 0\n")
    whole = f"{log}=== again\na traceback\n{log}"
    assert rate.count_damaged(whole) == {
        "files": 120, "refused": 110, "read": 10, "seeds": [1, 3], "failed": 1}
    assert rate.count_damaged("nothing") == {
        "files": 0, "refused": 0, "read": 0, "seeds": [], "failed": 0}


def test_runs_are_put_beside_the_codecs(tmp_path):
    pytest.importorskip("bjontegaard")
    path = tmp_path / "rate_quality.json"
    codecs = [{"codec": name, "rate_bpp": 0.005 * 2**i, "psnr_db": low + 2.0 * i}
              for name, low in (("x264", 30), ("far", 80)) for i in range(6)]
    path.write_text(json.dumps({"codecs": codecs, "hnerv_clip": {}}))
    counted = {"files": 7, "refused": 5, "read": 2, "failed": 0, "seeds": [1]}
    rate.collect(path, [measured(), measured("b" * 40, head=False)], {"c": counted})
    rate.collect(path, [measured("b" * 40, head=False, psnr=37.0)])
    kept = json.loads(path.read_text())
    assert [run["trained_psnr_db"] for run in kept["runs"]] == [36, 37]
    assert kept["damaged"][0]["files"] == 7 and "hnerv_clip" not in kept
    assert "clip_loss" not in kept["runs"][0]["points"][1]["history"][0]
    assert {row["anchor"] for row in rate.bd_rates(codecs, LINE + [
        {"rate_bpp": 0.32, "psnr_db": 40.0}])} == {"x264"}, "no PSNR is shared with the other"
    barely = [{**point, "psnr_db": point["psnr_db"] - codecs[0]["psnr_db"] + 39.8}
              for point in codecs[:6]]
    assert not rate.bd_rates(barely, LINE + [{"rate_bpp": 0.32, "psnr_db": 40.0}])


def test_goals_are_met_or_missed():
    rows = rate.goals({"runs": [measured()], "damaged": [
        dict.fromkeys(COUNTS, 0) | {"files": 10**6, "seeds": [1]}]})
    assert [row["met"] for row in rows] == ["no", "no", "yes", "no", "yes"]
    assert rows[0]["measured"] == "34.92 dB there; 35.5 dB at 0.0673"
    plain = rate.goals({"runs": [measured(), measured("b" * 40, head=False, psnr=60.0)]})
    assert plain[0] == rows[0], "what has no head does not count"
    assert rows[1]["measured"] == "35.17 dB there"
    assert rows[3]["measured"] == "300 frames/s"
    point = measured()["points"][1]
    assert rate.fine_tuning_words(point) == (
        "Fine-tuning begins at 31.00 dB. It is lowest at epoch 1, 30.00 dB, while the learning "
        "rate is high. After 5 epochs the rounded network is at 34.00 dB, and the file's decoded "
        f"frames are at {point['psnr_db']:.2f} dB.")
    assert "lowest" not in rate.fine_tuning_words(point | {"history": point["history"][1:2]})
    assert "goes on, from a larger" in rate.fine_tuning_words(point | {"goes_on": True})
    assert rate.writing_words(measured()["points"][1:]) == "-4.00 to +4.00 dB"
    assert rate.writing_words(measured()["points"][1:2]) == "-4.00 dB"


def test_films_are_kept_by_commit_and_device(tmp_path):
    pytest.importorskip("bjontegaard")
    path = tmp_path / "rate_quality.json"
    path.write_text(json.dumps({"codecs": [], "runs": [measured()]}))
    for speed in (400.0, 600.0):
        film = tmp_path / "films.json"
        film.write_text(json.dumps({"commit": "b", "device": "a GPU", "decode_frames_per_s": {
            "ultrafast": speed, rate.NETWORK: 5000.0, rate.FETCHED: 4000.0}}))
        rate.main([str(path), "--films", str(film)])
    kept = json.loads(path.read_text())
    assert [row["commit"][0] for row in rate.films_of(kept)] == ["a", "b"]
    assert rate.film_rates(rate.films_of(kept)[-1]) == {"ultrafast": 600.0}
    row = rate.goals(kept | {"damaged": []})[3]
    assert (row["measured"], row["met"]) == ("600 frames/s", "yes")


def test_a_file_from_another_device_says_nothing_of_speed(tmp_path):
    pytest.importorskip("bjontegaard")
    path, moved = tmp_path / "kept.json", tmp_path / "moved.json"
    path.write_text(json.dumps({"codecs": [], "runs": [measured()]}))
    before = rate.films_of(json.loads(path.read_text()))
    moved.write_text(json.dumps({
        "commit": "a", "device": "GPU", "decode_frames_per_s": {"ultrafast": 9e9},
        "gpu_cpu_largest_level": 1, "gpu_cpu_share_different": 0.1, "gpu_cpu_frames": 8}))
    rate.main([str(path), "--moved", str(moved)])
    kept = json.loads(path.read_text())
    assert kept["written_on_cpu"] == {
        "commit": "a", "device": "GPU", "gpu_cpu_largest_level": 1,
        "gpu_cpu_share_different": 0.1, "gpu_cpu_frames": 8}
    assert rate.films_of(kept) == before
    assert "differs by at most 1 level, in 10.0% of the values of 8" in rate.moved_words(kept)
    assert rate.moved_words({}) == ""


def test_small_runs_that_split_their_epochs(tmp_path):
    pytest.importorskip("bjontegaard")
    path, files = tmp_path / "rate_quality.json", []
    path.write_text(json.dumps({"codecs": [], "runs": [measured()]}))
    for i, (epochs, tuned, lr, psnr) in enumerate(((500, 120, 1e-3, 28.8), (150, 470, 4e-3, 30.0))):
        small = {"commit": "a", "dirty": False, "device": "a CPU", "fine_tune_lr": lr,
                 "settings": {"data_path": "bunny", "resize_list": "160_320", "frame_limit": 6,
                              "modelsize": 0.04, "epochs": epochs, "lr": 2e-3, "batch_size": 1},
                 "trained": {"eval_psnr_all": 31.0}, "points": [{}, {
                     "epochs": tuned, "target_bpp": 0.4, "rate_bpp": 0.45, "psnr_db": psnr}]}
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(small))
    rate.main([str(path), "--splits", *map(str, files)])
    assert rate.split_words(json.loads(path.read_text())["splits"]) == (
        "6 frames of 160×320 in 0.04 M values, 620 epochs in all: 150 of training and 470 of "
        "fine-tuning at a learning rate of 0.004 end 1.2 dB above 500 and 120 at 0.001")


def test_counts_of_damaged_files_add_up_once():
    counted = {"files": 7, "refused": 5, "read": 2, "failed": 0, "seeds": [1, 2]}
    rows = rate.add_damaged([], counted | {"failed": 1}, commit="a")
    rows = rate.add_damaged(rows, counted | {"seeds": [3]}, commit="a")
    assert rows == [{"commit": "a", "files": 14, "refused": 10, "read": 4, "failed": 1,
                     "seeds": [1, 2, 3]}]
    rows = rate.add_damaged(rows, counted, commit="b")
    assert [row["commit"] for row in rows] == ["a", "b"] and rate.all_damaged(rows) == {
        "files": 21, "refused": 15, "read": 6, "failed": 1, "processes": 5}
    with pytest.raises(ValueError, match="counted already"):
        rate.add_damaged(rows, counted, commit="a")


def test_damaged_files_are_told_by_their_counts():
    counted = {"files": 70, "refused": 50, "read": 20, "failed": 0, "seeds": [1, 2]}
    said = rate.damaged_words(rate.add_damaged([], counted, commit="a"))
    assert said.startswith("Of 70 damaged files, half of them with right checksums, 50 ended in")
    assert said.endswith("in the 2 processes that are counted, each file under 2 GiB and 2 s.")
    rows = rate.add_damaged([], counted | {"failed": 2}, commit="a" * 40)
    goal = rate.goals({"runs": [measured()], "damaged": rows})[-1]
    assert goal["measured"] == "70 files, stopped processes: 2" and goal["met"] == "no"
    assert "At commit aaaaaaaaaaaa, 2 processes more did not come to the end; " in \
        rate.damaged_words(rows)
    enough = [rows[0] | {"files": 10**6, "failed": 0}]
    assert rate.goals({"runs": [measured()], "damaged": enough})[-1]["met"] == "yes"


def test_the_limits_of_damaged_files_are_those_of_the_fuzzer():
    script = (Path(__file__).parent / "fuzz_file.py").read_text()
    assert "\nMEMORY_BYTES, TIME_S = 2 * 2**30, 2\n" in script
    assert (rate.FUZZ_MEMORY_BYTES, rate.FUZZ_TIME_S) == (2 * 2**30, 2)


def test_a_side_file_makes_every_file_searchable():
    rows = [{"size_bytes": size, "clip_similarity": 0.97 + size / 1e4, "clip_centred": 0.9}
            for size in (50, 100, 200)]
    run = measured() | {"train_s": 30.0}
    run["points"][0]["clip_centred"] = 0.8  # and clip_similarity 0.979
    everything = {"runs": [run], "side_files": {"points": rows}, "frames": 2, "height": 10,
                  "width": 20, "times": {"frames": 2, "own": {
                      "open_cpu_s": 1.0, "decode_cpu_s": 6.0, "frames": 3}, "codecs": [
                          {"codec": "x", "psnr_db": 35, "rate_bpp": 0.1, "encode_cpu_s": 3,
                           "decode_cpu_s": 1}]}}
    assert rate.side_file(everything)["size_bytes"] == 100, "there is no field: the original head's"
    field = json.loads(json.dumps(run))
    field["settings"]["head"] = "field"
    field["points"][0] |= {"clip_similarity": 0.9, "clip_centred": 0.7}
    both = everything | {"runs": [run, field]}
    assert rate.side_file(both)["size_bytes"] == 50, "as near as a field, with which it is compared"
    assert rate.side_file(both, rate.ORIGINAL)["size_bytes"] == 100
    plain, headed = rate.searchable([{"size_bytes": 60}, {"size_bytes": 60, "head": True}],
                                    everything)
    assert plain == {"size_bytes": 160, "rate_bpp": 8 * 160 / 400} and headed["size_bytes"] == 60
    run["points"][1]["tune_s"] = run["points"][2]["tune_s"] = run["points"][3]["tune_s"] = 5.0
    codec, own = rate.time_rows(everything)
    assert (codec["encode_s"], own["encode_s"], own["decode_s"]) == (3, 35.0, 1 + 2 * 2)
    run["points"][2]["goes_on"] = True
    assert [row["encode_s"] for row in rate.time_rows(everything)][1] == 40.0, "of both"
