"""Fields' results: which rows are whose, and what counts as bytes."""

import json

import pandas as pd
import pytest

from hnerv_clip import figures
from hnerv_clip.book import decoded, hold_outs
from hnerv_clip.book import field as book
from hnerv_clip.book.results import ResultsError


def field_row(any_held, size, **change):
    fit = {key: change.pop(key) for key in ("rounding", "steps") if key in change}
    return {"video": "bunny", "head": f"{size} {change}", "seed": 0, "any_held": any_held,
            "eight_held": 0.6, "bytes": size, "params": size, "own_boxes": any_held, "patches": 0,
            "boxes_a_frame": 320, "change": {**change, "fit": fit or None}}


@pytest.fixture
def folder(tmp_path):
    rows = [field_row(0.7, 50_000, rank=96, steps=8000), field_row(0.8, 400_000),
            field_row(0.9, 10_000, rounding=0.0), field_row(0.75, 60_000, points=5)]
    (tmp_path / book.FILE).write_text(json.dumps({"about": {}, "rows": rows}))
    return tmp_path


def test_bytes_count_of_rounded_fields_alone(folder):
    fields = book.read_fields(folder)["fields"]
    assert book.best_field(fields, "bunny").any_held == 0.8  # 0.9 is of weights never rounded
    assert book.best_field(fields, "bunny", max_kb=60).any_held == 0.75
    assert book.smallest_field(fields, "bunny", any_held=0.72).kb == 60
    assert book.smallest_field(fields, "bunny", any_held=0.85) is None


def test_the_same_field_of_more_and_more_boxes(folder):
    content = json.loads((folder / book.FILE).read_text())
    large = {"rounding": 0.0, "rank": 256}
    content["rows"] += [{**field_row(skill, 900, **large), "head": f"{boxes} {patches}",
                         "boxes_a_frame": boxes, "patches": patches}
                        for boxes, skill, patches in ((320, 0.7, 0), (2000, 0.85, 0),
                                                      (1000, 0.8, 0), (1000, 0.9, 0.125))]
    content["rows"] += [{"video": "bunny", "what": "moved", "pixels": p, "skill": s, "mean_of_4": s}
                        for p, s in ((8, 0.83), (1, 0.97))]
    (folder / book.FILE).write_text(json.dumps(content))
    measured = book.read_fields(folder)
    found = book.by_boxes(measured["fields"])
    assert list(found.boxes_a_frame) == [320, 1000, 2000] and list(found.any_held) == [
        0.7, 0.8, 0.85]
    best = book.best_field(measured["fields"], "bunny", rounded=False)
    assert best.any_held == 0.9
    largest = measured["fields"].query("boxes_a_frame > 320 and patches == 0")
    assert book.largest_words(largest) == (
        "The largest field, from 1,000 to 2,000 boxes and more steps, goes at other boxes from "
        "0.80 to 0.85 on bunny, where it has 0.85 at its own boxes, still better than at others.")
    assert book.largest_words(largest.head(1)) == ""
    assert "already by 8 pixels" in book.moved_words(measured["moved"], best)
    assert "more than 8 pixels" in book.moved_words(measured["moved"], found.iloc[0])


def test_a_change_is_said_in_words_and_sizes_are_of_as_many_boxes(folder):
    fields = book.read_fields(folder)["fields"]
    assert list(fields.change) == ["rank 96, steps 8000", "default field", "default field",
                                   "points 5"]
    fields.loc[3, "boxes_a_frame"] = 2048
    assert list(book.capacity(fields).params) == [10_000, 50_000, 400_000]


def test_pairs_of_networks_tell_what_the_head_changes(folder):
    assert book.compare_pairs(folder) == []
    content = json.loads((folder / book.FILE).read_text())
    content["original"] = {"bunny": {"eight": 0.8, "any": -0.3, "seeds": 2}}
    content["pairs"] = [
        {"video": "bunny", "network": network, "seed": seed, "any_held": 0.7 + 0.01 * seed + gain,
         "psnr_held_db": 31.5 - 10 * gain} for seed in (0, 1)
        for network, gain in (("frozen", 0.0), ("joint", 0.02))]
    (folder / book.FILE).write_text(json.dumps(content))
    assert book.read_original(folder)["bunny"]["any"] == -0.3
    pairs = book.compare_pairs(folder)
    row, = book.pair_rows(pairs)
    assert row["any box, with it less without"].startswith("+0.020")
    assert row["held-out PSNR, with it less without"].startswith("-0.20 dB")
    assert book.pair_answer(pairs) == "Yes on bunny"
    for row, less in zip(content["pairs"], (0.0, 0.05, 0.0, 0.0)):
        row["any_held"] -= less
    (folder / book.FILE).write_text(json.dumps(content))
    assert book.pair_answer(book.compare_pairs(folder)).startswith("No gain in skill")


def test_training_together_is_paired_with_the_picture_alone(folder):
    assert book.read_together(folder).empty
    gains = [("frozen", None, -0.01), ("together", 0.0, 0.0), ("together", 0.005, 0.01),
             ("together", 0.02, 0.03), ("first", 0.005, -0.02)]
    rows = [{"video": "bunny", "frames": 9, "size": "40×80", "device": "a CPU",
             "network": network, "weight": weight, "seed": seed,
             "any_held": 0.7 + seed / 100 + gain + gain * seed / 10,
             "psnr_held_db": 31 - 10 * gain, "bytes": 50_000}
            for network, weight, gain in gains for seed in (0, 1)]
    (folder / book.TOGETHER).write_text(json.dumps({"about": {}, "rows": rows}))
    together = book.read_together(folder)
    table = book.together_rows(together)
    assert [row["network"] for row in table] == [
        "frozen", "going on, λ = 0", "going on, λ = 0.005", "going on, λ = 0.02",
        "from the first epoch, λ = 0.005"]
    less = [row["any box, less the picture alone"] for row in table]
    assert less[:2] == [None, None] and less[3].startswith("+0.032 [")
    assert less[4].startswith("-0.011 [")  # less the frozen one, which is trained as long
    best, first = book.best_together_rows(together)
    assert best["measured on"] == "bunny, 9 frames of 40×80, a CPU" and best["pairs"] == "2"
    assert best["learned together"] == "going on, λ = 0.02"
    assert best["skill at any box"].startswith("+0.032 [") and best["from, to"] == "+0.030, +0.033"
    assert best["held-out PSNR"].startswith("-0.300 dB")
    assert first["learned together"] == "from the first epoch, λ = 0.005"
    assert book.together_verdict(together, first=False) == "yes"
    assert book.together_verdict(together, first=True) == "no"
    assert book.together_verdict(together[together.weight != 0], first=False) == ""
    alone = together[together.seed == 0]  # no interval
    assert book.together_verdict(alone, first=False).endswith("2 of 2 pairs of networks gained "
                                                              "0.005 or more")
    assert book.together_verdict(alone, first=True) == (
        "not significantly; none of 1 pair of networks gained 0.005 or more")
    alike = together.copy()  # gains that do not differ between seeds
    alike["any_held"] = 0.7 + alike.weight.fillna(0) / 10 + 1e-6 * alike.seed
    assert book.together_verdict(alike, first=False) == "no"
    both = pd.concat([together, alike.assign(where="elsewhere")])
    assert book.together_verdict(both, first=False).startswith("not significantly")


def test_hold_outs_are_averaged_over_videos_that_have_all_of_them(tmp_path):
    assert hold_outs.read_hold_outs(tmp_path)[0].empty
    rows = [{"video": video, "size": "8×8", "frames": 40, "held": 8, "hold_out": name, "seed": seed,
             "changes": changes, "any_train": train, "any_held": held, "interpolated_held": 0.9,
             "eight_held": 0.4, "psnr_held_db": 25.0, "device": "a CPU", "commit": "0123456789abcd"}
            for name, video, seed, changes, train, held in (
                ("blocks of 2 s", "bunny", 0, {}, 0.5, 0.25),
                ("one frame in 5", "bunny", 0, {}, 0.6, 0.6),
                ("one frame in 5", "bunny", 1, {}, 0.8, 0.6),
                ("one frame in 5", "cup", 0, {}, 0.1, 0.1),
                ("one frame in 5", "bikes", 0, {}, -0.4, -0.5),
                ("one frame in 5", "bikes", 0, {"optimizer": "adan"}, 0.3, 0.2),
                ("blocks of 2 s", "bikes", 0, {"optimizer": "adan"}, 0.4, 0.25))]
    (tmp_path / hold_outs.FILE).write_text(json.dumps({"about": {"epochs": 30}, "rows": rows}))
    found, nothing, about = hold_outs.read_hold_outs(tmp_path)
    assert about == {"epochs": 30} and list(nothing.name) == ["bikes"]
    assert list(found.hold_out) == ["one frame in 5"] * 4 + ["blocks of 2 s"] * 2
    words = hold_outs.hold_out_words(found)  # of bunny and bikes by Adan
    assert "from 0.50 to 0.40 with one frame in 5 held out (0.10 to 0.10 lost)" in words
    assert "from 0.45 to 0.25 with blocks of 2 s held out (0.15 to 0.25 lost)" in words
    assert "over 2 videos" in words and "have 0.90 and 0.90 there" in words
    assert "bikes (25.0 to 25.0 dB)" in hold_outs.nothing_learned_words(nothing)
    assert hold_outs.nothing_learned_words(nothing[:0]) == ""
    assert hold_outs.origin_words(found) == "a CPU, commit 0123456789ab"
    row = hold_outs.hold_out_rows(found)[0]
    assert (row["video"], row["seeds"]) == ("bunny", "2")
    assert row["held out"] == "one frame in 5 (8 of 40)"
    assert row["any box, training frames"] == "0.70" and row["any box, held out"] == "0.60"


def test_missing_fields_are_said(tmp_path):
    with pytest.raises(ResultsError, match="field_h100.json does not exist"):
        book.read_fields(tmp_path)
    (tmp_path / book.FILE).write_text('{"about": {}, "rows": []}')
    with pytest.raises(ResultsError, match="has no field"):
        book.read_fields(tmp_path)


def test_a_side_file_is_set_against_the_field_of_its_size(folder):
    content = json.loads((folder / book.FILE).read_text())
    content["rows"] += [{"video": "bunny", "what": "side file", "where": "any", "budget": kb * 1000,
                         "size_bytes": kb * 1000, "skill": skill, "boxes": 16, "every": 1,
                         "rank": 4, "bits": 4} for kb, skill in ((20, 0.4), (90, 0.72))]
    (folder / book.FILE).write_text(json.dumps(content))
    measured = book.read_fields(folder)
    assert book.side_file_words(measured["fields"], measured["side_files"], "bunny") == (
        "on bunny 0.40 in 20 kB, where a field has 0.75 in 60 kB, and 0.72 in 90 kB, for which a "
        "field needs 60 kB")


def test_bytes_and_decibels_are_exchanged_along_fine_tuned_files(folder):
    run = {"commit": "a", "device": "b", "settings": {"modelsize": 1.5, "predict_clip": False},
           "points": [{"kind": "tuned", "size_bytes": size, "rate_bpp": size / 1e6,
                       "psnr_db": psnr} for size, psnr in ((100_000, 30.0), (271_828, 33.0))]}
    (folder / book.RATES).write_text(json.dumps({"runs": [run]}))
    exchange = book.read_exchange(folder)
    assert exchange.decibels(171.828) == pytest.approx(3, abs=1e-3)
    (folder / book.RATES).write_text(json.dumps({"runs": []}))
    assert book.read_exchange(folder) is None


def test_boxes_drawn_by_hand_are_counted_for_field_and_teacher(folder):
    assert book.read_labelled(folder)[0].empty
    rows = [{"video": "bunny", "query": "hare", "who": who, "frame": frame, "hit": hit,
             "middle": False, "chance": 0.25, "box_iou": 0.4, "map_iou": 0.5}
            for who, hits in (("teacher", (True, True)), ("field", (True, False)))
            for frame, hit in enumerate(hits)]
    rows.append({**rows[0], "video": "bikes"})  # no field was asked there
    asked = {"fields": [{"video": video, "boxes": 320, "any_held": skill}
                        for video, skill in (("bunny", 0.734), ("bikes", 0.7))]}
    (folder / book.LABELLED).write_text(json.dumps({"about": asked, "rows": rows}))
    labelled, about = book.read_labelled(folder)
    assert about == asked
    assert "were fitted to 320 boxes of each training frame" in book.asked_words(about)
    assert book.asked_words(about).endswith("their skill is 0.73 on bunny and 0.70 on bikes.")
    assert [row["hits"] for row in book.labelled_rows(labelled)] == ["2 of 2", "1 of 2", "1 of 1"]
    words = book.labelled_words(labelled)
    assert words.startswith("of 2 boxes drawn by hand in held-out frames of bunny, ")
    assert "1 hold the middle of the box that a field finds best, and 2 that of" in words
    assert book.in_words(labelled) == ""
    asked = labelled[labelled.video == "bunny"].assign(
        who=lambda table: table.who + ", in words", map_iou=0.25, hit=[True, False, True, True])
    labelled = pd.concat([labelled, asked])
    assert book.in_words(labelled).endswith(
        "the field finds 2 of 2 boxes (1 by name), with overlaps of 0.25 (0.50) and the teacher "
        "finds 1 of 2 boxes (2 by name), with overlaps of 0.25 (0.50).")
    assert [row["who"] for row in book.labelled_rows(labelled)][:4] == [
        "teacher", "teacher, in words", "field", "field, in words"]


def test_a_design_of_several_seeds_counts_by_its_mean(folder):
    content = json.loads((folder / book.FILE).read_text())
    content["rows"] += [field_row(skill, 400_000 + 1000 * seed, rank=128) | {
        "seed": seed, "head": "middle"} for seed, skill in enumerate((0.78, 0.86, 0.82))]
    (folder / book.FILE).write_text(json.dumps(content))
    fields = book.read_fields(folder)["fields"]
    best = book.best_field(fields, "bunny")
    assert (best.any_held, best.kb, best.seeds) == (pytest.approx(0.82), 401, 3)
    alone = book.best_field(fields, "bunny", max_kb=70)
    assert alone.any_held == 0.75
    assert book.seed_words([best, alone]) == "bunny ± 0.040 (3 seeds) and bunny one seed"
    assert book.speed_words([best, alone]) == ""  # not measured
    timed = alone.copy()
    timed["embeddings_per_s"], timed["scores_per_s"], timed["device"] = 187_594, 19_858_065, "H100"
    assert book.speed_words([best, timed]) == (
        "In a second a stored field gives the embeddings of 0.19 million (bunny) boxes, copied to "
        "the CPU, or compares 20 million (bunny) boxes with a text (one H100; many boxes of a "
        "frame asked at once).")
    with pytest.raises(ResultsError, match="no field of bunny of at most 1 kB; take it back"):
        book.best_field(fields, "bunny", max_kb=1)
    assert book.smallest_field(fields, "bunny", any_held=0.84) is None  # one seed alone has it


def decoded_file(digest, rate, field, teacher, *, held=0, psnr=35.0):
    parts = [("train", 10, 0.0)] + ([("held_out", held, 0.1)] if held else [])
    return [{"video": "bunny", "digest": digest, "size_bytes": int(1e5 * rate), "rate_bpp": rate,
             "modelsize": 1.2, "frames": frames, "n": n, "asked": asked, "psnr_db": psnr,
             "skill": field, "centered": field, "decoded_skill": teacher - less,
             "decoded_centered": teacher - less}
            for frames, n, less in parts for asked in (decoded.ANY, decoded.PATCHES)]


def test_a_field_is_named_and_its_setting_told(folder):
    content = json.loads((folder / book.FILE).read_text())
    content["rows"][0] |= {"boxes_a_frame": 2048, "patches": 0.125}
    content["rows"].append(content["rows"][0] | {"seed": 1})
    (folder / book.FILE).write_text(json.dumps(content))
    fields = book.read_fields(folder)["fields"]
    names = [book.field_words(row, fields) for row in fields.itertuples()]
    assert names[0] == "bunny, 2,048 boxes: rank 96, steps 8000, seed 0"
    assert names[1] == "bunny, 320 boxes: default field"
    assert "which 2 of 5 fields had among their boxes" in book.setting_words(fields)


def test_a_files_field_stands_beside_the_teacher_on_its_frames(tmp_path):
    assert decoded.read_decoded(tmp_path)[0].empty
    rows = [*decoded_file("a", 0.05, 0.8, 0.85, held=2), *decoded_file("b", 0.03, 0.8, 0.7, held=2),
            *decoded_file("c", 0.09, 0.8, 0.9)]
    (tmp_path / decoded.FILE).write_text(json.dumps({"about": {"teacher": "T"}, "rows": rows}))
    found, about = decoded.read_decoded(tmp_path)
    assert about == {"teacher": "T"}
    assert list(found.curve.unique()) == ["bunny, 1.2 M", "bunny, all frames, 1.2 M"]
    assert decoded.decoded_answer(found) == (
        "The field is closer to the teacher on the video in 2 of 2 files in held-out frames (at "
        "the eight patches in 2) and in 1 of 3 files in training frames (at the eight patches in "
        "1). The files of one training share its network, one seed each: this counts, and does not "
        "test.")
    assert "bunny, held-out frames: 0.80 against 0.60 at 0.030 bpp (35.0 dB), 0.80 against 0.75 " \
        "at 0.050" in decoded.decoded_words(found)
    assert decoded.crossing_words(found) == (
        "From file to file of a training the field's cosine moves by at most 0.000, while the "
        "teacher's on the decoded frames follows the picture; in training frames of bunny it is "
        "closer in 2 of 3 files.")  # a third of 35.0 dB is not
    apart = found.assign(psnr_db=found.psnr_db.mask(found.digest == "b", 34.9))
    assert "training frames of bunny it is closer in files of 35.0 dB and more." in \
        decoded.crossing_words(apart)
    table = decoded.decoded_rows(found)
    assert len(table) == 5 and table[0]["file"] == "bunny, 1.2 M: 0.0300 bpp, 35.0 dB, training"
    assert table[1] == {"file": "bunny, 1.2 M: 0.0300 bpp, 35.0 dB, held-out",
                        "any box, field": "0.800 (0.80)", "decoded": "0.600 (0.60)",
                        "patches, field": "0.800 (0.80)", "patches, decoded": "0.600 (0.60)"}
    figure = figures.plot_decoded(found[found.asked == decoded.ANY], teacher_label="T")
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2, 2, 2, 2, 1, 1]
