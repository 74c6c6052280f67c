"""Runs that were made twice: what counts as the same."""

import json
import shutil

import pandas as pd
import pytest

from hnerv_clip.book import repeats as book
from hnerv_clip.files import read_table
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.study import repeats
from hnerv_clip.train import train


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_config, small_dataset, cache_dir):
    root = tmp_path_factory.mktemp("repeats")
    config = small_config.replace(predict_clip=False, epochs=3, eval_freq=3)
    for name in ("first", "second"):
        train(config, root / name / "run", cache_dir=cache_dir, progress=False)
    return root


def test_a_run_that_is_made_again_is_the_same(folders):
    row, = repeats.compare_runs(folders / "first", folders / "second")
    assert (row["run"], row["epochs"], row["head"]) == ("run", 3, False)
    assert row["same"] and row["same_epochs"] == 3 and row["psnr_db"][0] == row["psnr_db"][1]


def test_the_first_epoch_that_differs_is_told(folders, tmp_path):
    shutil.copytree(folders / "second", tmp_path / "other")
    path = RunDir(tmp_path / "other" / "run").path / "metrics.csv"
    table = read_table(path, fix="")
    table.loc[1:, "psnr_db"] += 1e-9
    table.to_csv(path, index=False)
    out = tmp_path / "repeats.json"
    repeats.main([str(folders / "first"), str(tmp_path / "other"), "--out", str(out)])
    repeats.main([str(folders / "first"), str(tmp_path / "other"), "--out", str(out)])
    row, = json.loads(out.read_text())["rows"]  # not twice
    assert not row["same"] and row["same_epochs"] == 1
    assert repeats.compare_runs(folders / "first", tmp_path) == []


def test_runs_of_other_settings_are_no_repetition(folders, tmp_path):
    shutil.copytree(folders / "second", tmp_path / "other")
    path = tmp_path / "other" / "run" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"lr": 2 * settings["lr"]}))
    assert repeats.compare_runs(folders / "first", tmp_path / "other") == []


def test_a_page_says_how_many_differ(tmp_path):
    row = {"run": "a", "epochs": 3, "head": True, "compared": "figures", "same": True,
           "psnr_db": [30.0, 30.0], "first": {"commit": "f" * 40, "device": "NVIDIA H100"},
           "second": {"commit": "e" * 40, "device": "NVIDIA H200"}}
    other = {**row, "run": "b", "head": False, "same": False, "psnr_db": [30.0, 30.5]}
    replays = [{"steps": 1500, "buffers": 9, "differing": 0, "device": "an H100",
                "commit": "d" * 40}]
    (tmp_path / book.FILE).write_text(json.dumps({"rows": [row, other], "replays": replays}))
    measured = book.read_repeats(tmp_path)
    words = book.repeat_words(measured)
    assert words.startswith("1 of 2 runs ended alike, to the last digit; not b (30.00 and 30.50 "
                            "dB). Of the 1 pairs with a head none differ, of the 1 without one 1. ")
    assert words.endswith("1,500 further steps, beside other work on the same GPU, gave the same "
                          "bits in every buffer (9 buffers; an H100, commit ddddddd)")
    assert [r["run"] for r in book.repeat_rows(measured)] == ["b", "a"]
    assert book.repeat_rows(measured)[0]["second"] == "H200, eeeeeee"
    assert "nor from which step on" in book.cause_words(measured)
    assert book.across_commits_words(measured) == \
        "Of the 2 pairs that were trained at two commits 1 ended alike."
    alike = pd.DataFrame([row] * 19 + [other])
    assert book.across_commits_words({"rows": alike}).startswith(
        "Of the 20 pairs that were trained at two commits 19 ended alike: results of pages")
    assert book.across_commits_words({"rows": alike[:19]}).endswith("19 ended alike.")
    assert book.across_commits_words({"rows": alike[2:]}).endswith("17 ended alike.")
    parted = {**measured, "rows": measured["rows"].assign(same_epochs=[10, 7], fence=[
        [False, True], None])}
    words = book.cause_words(parted)
    assert "only that they part after epoch 7 or later" in words
    assert "1 of 1 pairs, one run without that fence and one with it, ended alike" in words
    assert book.cause_words({**measured, "rows": measured["rows"][:1]}) == ""
    measured["replays"].append(measured["replays"][0] | {"steps": 500, "fence": True})
    assert "2,000 further steps, 500 of them with the fence named below, beside" in \
        book.repeat_words(measured)
    assert book.repeat_words({**measured, "rows": measured["rows"][:1], "replays": []}) == \
        "1 of 1 runs ended alike, to the last digit"


@pytest.mark.parametrize(("run", "words"), [
    ("bunny_hybrid_pixels_only_s1", "bunny, hybrid, pixels only, seed 1"),
    ("bikes_pe_base_s0", "bikes, time only, default head, seed 0"),
    ("bunny_xyt_levels_40_s0", "bunny, position and time, 40 frequencies, seed 0"),
    ("bunny_hybrid_warmup_100_s0", "bunny, hybrid, warm-up of 33 epochs, seed 0"),
    ("bunny_hybrid_lambda_0.05_s2", "bunny, hybrid, λ = 0.05, seed 2"),
    ("fidelity, seed 2", "fidelity, seed 2")])
def test_a_run_of_the_study_has_the_words_of_other_pages(run, words):
    where = {"commit": "f" * 40, "device": "NVIDIA H100"}
    rows = pd.DataFrame([{"run": run, "epochs": 100, "same": True, "compared": "figures",
                          "psnr_db": [30.0, 30.0], "first": where, "second": where}])
    assert [row["run"] for row in book.repeat_rows({"rows": rows})] == [words]


def test_no_raw_name_of_a_run_is_published():
    names = [row["run"] for row in book.repeat_rows(book.read_repeats("book/results"))]
    assert len(names) > 100 and [name for name in names if "_" in name] == []


def test_seeds_of_the_default_setting_are_compared_with_pixels_only():
    rows = pd.DataFrame([
        {"run": f"bunny_hybrid_{variant}_s{seed}", "epochs": 300, "psnr_db": [psnr + seed, 0]}
        for variant, psnr in [("base", 30.0), ("pixels_only", 32.5)] for seed in range(2)])
    assert book.seed_words({"rows": rows}, "bunny", 300).endswith(
        "on training frames they reach 30.00 and 31.00 dB, 2.50 and 2.50 dB less than with pixels "
        "only.")
    assert book.seed_words({"rows": rows[1:]}, "bunny", 300) == ""
    assert book.seed_words({"rows": rows}, "bunny", 100) == ""
