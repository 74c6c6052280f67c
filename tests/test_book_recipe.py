"""Results of the recipe's search: gains are over their own base, and time is of whole runs."""

import json

import pandas as pd
import pytest

from hnerv_clip.book import recipe as book
from hnerv_clip.book.results import ResultsError


def row(change, psnr_db, *, lr=2e-3, epochs=300, total_s=50):
    return {"change": change, "psnr_db": psnr_db, "lr": lr, "epochs": epochs, "total_s": total_s,
            "lr_after_collapse": None}


@pytest.fixture
def folder(tmp_path):
    rows = [row("paper", 35.0, lr=1e-3), row(book.BASE, 36.0), row("L1 loss", 35.5),
            row("batch 1", 36.5, total_s=70),
            row("batch 1, 600 epochs", 37.0, epochs=600, total_s=100)]
    preset = [{"change": change, "psnr_db": psnr_db, "total_s": total_s, "train_time_s": total_s,
               "device": "GPU", "epochs": epochs, "stored": 1000, "commit": "abc"}
              for change, psnr_db, total_s, epochs in (
                  (book.BEST, 37.0, 110, 601), (book.BEST, 37.4, None, 601),
                  ("Adam", 36.8, 90, 601), ("300 epochs", 36.2, None, 301),
                  (book.FOUND, 37.5, None, 601))]
    held_out = [{"change": book.BEST, "psnr_held_interpolated_db": 32.5},
                {"change": "HNeRV's settings", "psnr_held_interpolated_db": 31.0}]
    videos = [{"video": video, "recipe": recipe, "psnr_db": psnr_db, "epochs": 601,
               "stored": 1100 if (video, recipe) == ("b", book.FOUND) else 1000,
               "commit": "def" if recipe == book.FOUND else "abc", "device": "GPU"}
              for video, *psnrs in (("a", 30, 33, 33.3), ("b", 30, 31.5, 31.4),
                                    ("c", 28.75, 31, 31.1))
              for recipe, psnr_db in zip((book.HNERV, book.BEST, book.FOUND), psnrs)]
    heads = [{"change": book.BEST, "any_held": 0.73}, {"change": "HNeRV's settings",
                                                       "any_held": 0.74}]
    goals = [{"modelsize": 1.5, "seconds": 180, "psnr_db": 37}, {"modelsize": 3, "seconds": 180,
                                                                 "psnr_db": 41}]
    decoders = [{"decoder": name, "optimizer": optimizer, "psnr_db": psnr_db, "epochs": epochs,
                 "step_ms": step_ms, "seconds": 28.0} for name, optimizer, psnr_db, epochs, step_ms
                in ((book.BLOCKS, "Adam", 35.0, 180, 1.2), ("other", "Muon", 34.0, 30, 7.0),
                    ("other", "Adam", 29.0, 30, 6.5))]
    muon = [{"optimizer": optimizer, "share": share, "epochs": epochs, "psnr_db": psnr_db}
            for optimizer, share, epochs, psnr_db in (
                ("Adam", None, 700, 37.0), ("Muon", 4, 100, 33.0), ("Muon", 2, 100, 34.0),
                ("Muon", 2, 600, 36.0))]
    about = {"runs": "some", "setting": "one"}
    longer = [{"psnr_db": 35.2, "epochs": 195, "seconds": 170.0}]
    added = [{"change": "600 epochs", "psnr_db": psnr_db, "total_s": None, "device": "GPU"}
             for psnr_db in (36.0, 36.2)]
    between = [{"interpolated_db": psnr_db, "estimated_embedding_db": 33.2, "two_mean_db": 34.4,
                "estimate_db": 36.5} for psnr_db in (32.8, 33.2)]
    control = [{"psnr_db": psnr_db, "steps_s": steps_s, "epochs": epochs, "values": 1.5e6,
                "step_ms": 40} for psnr_db, steps_s, epochs in ((30.0, 60, 10), (33.0, 150, 25))]
    early = [{"change": change, "psnr_db": psnr_db, "worst_frame_db": worst_db, "epochs": 40}
             for change, psnr_db, worst_db in ((book.BLOCKS, 31.5, 28.0), ("shift", 31.75, 27.5))]
    (tmp_path / book.GPU).write_text(json.dumps({
        "about": about, "rows": rows, "goals": goals, "published": [],
        "preset": {"about": about, "rows": preset, "held_out": held_out,
                   "sizes": [{"modelsize": 3, "psnr_db": 39.7}]},
        "videos": {"about": about, "rows": videos}, "heads": {"about": about, "rows": heads},
        "decoders": {"about": about, "rows": decoders, "longer": longer},
        "added": {"about": about, "rows": added}, "between": {"about": about, "rows": between},
        "control": {"about": about, "rows": control}, "early": {"about": about, "rows": early},
        "muon": {"about": about, "rows": muon}, "optimizers": {"about": about, "rows": []}}))
    preset, new = {"lr": 0.0035, "ks": "0_1_5"}, {"lr": 0.005, "ks": "0_1_5"}
    trials = [{"number": number, "state": state, "value": value, "params": params,
               "psnr_db": {"bunny": value}} for number, state, value, params in (
                   (0, "COMPLETE", 30.0, preset), (1, "PRUNED", None, new),
                   (2, "COMPLETE", 31.0, new), (3, "COMPLETE", 30.5, new | {"ks": "0_3_5"}),
                   (4, "STOPPED", None, new))]
    (tmp_path / book.SEARCH).write_text(json.dumps({
        "about": about | {"minutes": 8.0, "device": "GPU"}, "found": 2, "trials": trials}))
    (tmp_path / book.FIDELITY).write_text(json.dumps({"runs": [
        {"engine": "fused", "psnr_db": 35.0}, {"engine": "plain", "psnr_db": 34.0}]}))
    rows = [{"group": group, "change": change, "psnr_db": psnr, "base": change == "none"}
            for group, change, psnr in (("a", "none", 20.0), ("a", "x", 21.0), ("b", "none", 25.0),
                                        ("b", "x", 24.0))]
    (tmp_path / book.CPU).write_text(json.dumps({"about": {}, "rows": rows}))
    return tmp_path


def test_without_a_collapse_none_is_said(folder):
    rows = book.read_recipe(folder)["rows"]  # of all, `lr_after_collapse` is null
    assert rows.lr_after_collapse.isna().all()
    assert book.collapsed_in_words(rows) == ""


def test_gains_are_over_the_base_at_equal_epochs(folder):
    changes = book.changes(book.read_recipe(folder)["rows"])
    assert dict(zip(changes.change, changes.gain_db)) == {
        "batch 1": 0.5, book.BASE: 0.0, "L1 loss": -0.5}
    assert book.read_ranking(folder)["rows"].gain_db.tolist() == [0, 1, 0, -1]


def test_a_collapsed_training_is_said_and_has_no_row(folder):
    """It is a training of the learning rate that it was begun again with."""
    rows = book.read_recipe(folder)["rows"]
    rows.loc[len(rows)] = row("lr 4e-3", 36.0, lr=4e-3) | {"lr_after_collapse": 2e-3}
    assert "lr 4e-3" not in book.changes(rows).change.tolist()
    assert book.collapsed_in_words(rows).startswith(
        "With lr 4e-3 the training collapsed, and the trainer began it again at a learning rate of "
        "0.002: ")


def test_what_is_reached_counts_the_whole_run(folder):
    rows = book.read_recipe(folder)["rows"]
    assert book.reached(rows, seconds=10) is None
    assert [book.reached(rows, seconds=limit) for limit in (60, 80, 180)] == [36.0, 36.5, 37.0]
    assert book.one(rows, "batch 1, 600 epochs").epochs == 600


def test_missing_results_are_named(tmp_path):
    with pytest.raises(ResultsError, match="recipe_h100.json does not exist"):
        book.read_recipe(tmp_path)


def test_sentences_name_the_best_of_each(folder):
    measured = book.read_recipe(folder)
    assert "35.00 dB, the best of 2 trainings of other decoders 34.00 dB (other; Muon)" in \
        book.decoders_in_words(measured["decoders"], measured["longer"])
    assert "In 170 s of steps, 195 epochs, one of them reaches 35.20 dB." in \
        book.decoders_in_words(measured["decoders"], measured["longer"])
    words = book.muon_in_words(measured["muon"])
    assert words.startswith("Muon gives 36.00 dB after 600 epochs, Adam 37.00 dB after 700.")
    assert "34.00 dB with steps of 2 times Adam's size and 33.00 dB with steps of 4" in words


def test_parts_of_the_preset_are_means_over_seeds(folder):
    best, adam, *_ = book.parts(book.read_recipe(folder)["preset"]).itertuples()
    assert (best.psnr_db, best.seeds, best.total_s) == (pytest.approx(37.2), 2, 110)
    assert best.sd_db == pytest.approx(0.2 * 2**0.5) and best.gain_db == 0
    assert (adam.change, adam.seeds) == ("Adam", 1) and adam.gain_db == pytest.approx(-0.4)


def test_goals_are_judged_by_what_was_measured(folder):
    goals = book.goal_rows(book.read_recipe(folder))
    assert [(row["measured"], row["met"]) for row in goals] == [
        ("37.00 dB", "yes"), ("39.70 dB", "no"),
        ("33.00 dB; 32.50 dB without estimates", "no"),
        ("2.25 dB, +1.5 to +3.0", "yes")]
    assert "mean of 2 seeds; the mean of the two neighbors, without a network, has 34.40 dB" in \
        goals[2]["what"]
    assert book.goals_in_words(goals) == \
        "of the 4 goals that this project set itself, 2 are met"
    gains = book.video_gains(book.read_recipe(folder)["videos"])
    assert gains.video.tolist() == ["a", "c", "b"] and gains.gain_db.tolist() == [3.0, 2.25, 1.5]
    worse = book.read_recipe(folder)
    worse["videos"].loc[worse["videos"].psnr_db == 31.5, "psnr_db"] = 29
    worse["videos"].loc[worse["videos"].psnr_db == 33, "psnr_db"] = 50
    assert book.goal_rows(worse)[-1]["met"] == "no", "below on one video, above on average"


def test_a_goal_met_with_estimated_frames_is_not_counted_silently(folder):
    measured = book.read_recipe(folder)
    measured["between"].interpolated_db += 1.1  # 33.9 and 34.3: the best would meet it too
    goals = book.goal_rows(measured)
    assert (goals[2]["measured"], goals[2]["met"]) == (
        "34.10 dB; 32.50 dB without estimates", book.ESTIMATED)
    assert book.goals_in_words(goals).endswith(
        "3 are met, 1 of these only by training on frames estimated by motion")
    measured["between"].interpolated_db -= 0.15
    assert book.goal_rows(measured)[2]["met"] == "no", "one of two seeds is above"
    measured["between"] = measured["between"][:0]
    measured["held_out"].psnr_held_interpolated_db += 2
    assert book.goal_rows(measured)[2] == {
        "what": "every other frame held out, embeddings interpolated", "goal": "34 dB",
        "measured": "34.50 dB", "met": "yes"}


def test_reasons_name_the_epochs_that_were_trained(folder):
    measured = book.read_recipe(folder)
    measured["published"] = pd.DataFrame([{"method": "HNeRV-Boost", "train_time_s": 600,
                                           "epochs": 300, "psnr_db": 38}])
    words = book.reasons_in_words(measured)
    assert "601 epochs instead of 301 add 1.00 dB to the preset's PSNR, and 600 instead of" in words


def test_the_head_is_compared_by_recipe(folder):
    words = book.head_in_words(book.read_recipe(folder)["heads"])
    assert "0.730 on the preset's network and on one of HNeRV's settings 0.740 (one seed)" in words


def test_small_trainings_are_compared_at_the_best_step_of_each():
    rows = pd.DataFrame([{"group": "a", "change": f"{book.BLOCKS}, {name}", "psnr_db": psnr_db}
                         for name, psnr_db in (("Adam", 30.0), ("Adam, lr 1e-2", 33.0),
                                               ("Muon", 34.5), ("Muon, steps twice", 34.0))]
                        + [{"group": "a", "change": "two blocks, Muon", "psnr_db": 34.2}])
    words = book.small_in_words(rows)
    assert "+1.50 dB (a; sizes of steps tried: 2 by Muon, 2 by Adam)" in words
    assert "Of 1 other networks and settings trained by Muon there, 1 stay below" in words


def test_parts_are_added_to_the_settings_of_hnerv(folder):
    hnerv, epochs = book.added(book.read_recipe(folder)).itertuples()
    assert (hnerv.change, hnerv.psnr_db, hnerv.seeds) == (book.HNERV, 35.0, 1)
    assert epochs.gain_db == pytest.approx(1.1) and epochs.seeds == 2


def test_the_search_is_judged_by_whole_trainings(folder):
    search = book.read_search(folder)
    words = book.search_in_words(search)
    assert "5 trials began: 3 ended, 1 were given up (behind the median of those before, no " \
        "network can have these settings, or out of memory), 1 were stopped before" in words
    assert "The best (learning rate 0.005) changes PSNR by +1.00 dB against the preset" in words
    assert "This gain holds in part in whole trainings of 3 videos that the search did not see: " \
        "+0.10 dB on average, -0.10 to +0.30 dB. On videos of which it saw the first frames: " \
        "+0.30 dB on bunny." in words
    assert "epochs (601), but not equal time, and one seed, except on bunny; stored values " \
        "differ by up to 10.0%. Commits and GPUs: abc on GPU and def on GPU." in words
    rows = book.compared_rows(search)
    assert [(row["video"], row["gain (dB)"], row["stored values"], row["seeds"]) for row in rows] \
        == [("bunny, seen in part by the search", "+0.30", "+0.0%", "2 and 1"),
            ("a", "+0.30", "+0.0%", "1 and 1"), ("b", "-0.10", "+10.0%", "1 and 1"),
            ("c", "+0.10", "+0.0%", "1 and 1")]
    rows = book.trial_rows(search["trials"], count=1)
    assert [row["settings"] for row in rows] == ["learning rate 0.005", book.BEST]
    search["compared"] = search["compared"][:0]
    assert book.compared_rows(search) == [] and "holds" not in \
        book.search_in_words(search)


def test_what_was_not_measured_is_not_told(folder):
    measured = book.read_recipe(folder)
    preset = measured["preset"]
    assert book.time_in_words(preset) == ("The preset's whole run takes 110 s on one GPU, "
                                          "with set-up, compilation and the stored file.")
    assert book.time_in_words(preset, seconds=100).endswith(
        "Of its variants whose whole run ends within 100 s the best gives 36.80 dB.")
    untimed = preset.assign(total_s=float("nan"), train_time_s=float("nan"))
    assert book.time_in_words(untimed) == ""
    assert "preset" not in book.control_in_words(measured["control"], untimed)
    assert "33.00 dB in 150 s of training steps, 25.0 of the 300 epochs" in book.control_in_words(
        measured["control"], measured["preset"])
    rows = book.read_ranking(folder)["rows"]
    assert "PSNR is 31.50 dB; a shift changes that by +0.25 dB (the worst frame by -0.50 dB)." in \
        book.early_in_words(measured["early"], rows)
    rows["group"] = [f"{book.EARLY}: two", f"{book.EARLY}: two", "another", "another"]
    assert f"In small trainings the same changes give {rows.gain_db[1]:+.2f} dB (two)." in \
        book.early_in_words(measured["early"], rows)
    assert "33.00 dB from interpolated" in book.between_in_words(measured["between"])
    rows = book.read_ranking(folder)["rows"]
    assert book.held_out_in_words(rows) == ""
    rows["group"] = "held-out frames, small"
    rows["change"], rows["train_db"] = ["none", "an estimate", "none", "noise"], [25, 24, 0, 25.5]
    rows.loc[2, "group"] = "another"
    words = book.held_out_in_words(rows)
    assert "adds 1.00 to 1.00 dB on held-out frames, and 1 other changes" in words
    assert "best, noise, gives +0.50 dB on them but -1.00 dB on held-out frames" in words
    assert book.control_in_words(pd.DataFrame(), measured["preset"]) == book.between_in_words(
        pd.DataFrame()) == book.early_in_words(
            pd.DataFrame(), rows) == ""
