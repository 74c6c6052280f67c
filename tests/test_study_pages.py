"""The pages of the research questions: by hand, words that follow the numbers, what is missing."""

import numpy as np
import pandas as pd
import pytest

from hnerv_clip.book import study_pages
from hnerv_clip.book.study_pages import Estimate, estimate, paired, undominated
from hnerv_clip.study.plan import ENCODINGS, REMEDIES

KINDS = ("hybrid", "xyt", "pe")


def row(video="bunny", kind="hybrid", variant="base", seed=0, *, psnr=30.0, skill=0.5, over=0.1,
        **more):
    """A row of study.csv; seeds differ by a tenth of a decibel and a hundredth of skill."""
    values = {"run": f"{video}_{kind}_{variant}_s{seed}", "video": video, "kind": kind,
              "variant": variant, "seed": seed, "clip_loss_weight": 0.5, "epochs": 300,
              "pixel_loss_warmup_epochs": 50, "clip_head_values": 70_000,
              "stored_values": 1_570_000, "device": "a GPU", "commit": "0123456789abcdef",
              "dirty": False, "teacher_label": "a teacher (not CLIP)"}
    for part, lower in (("train", 0), ("held_out", 1)):
        values |= {f"psnr_{part}_db": psnr - 2 * lower + seed / 10}
        if variant != "pixels_only":
            scores = {"clip_centred": skill - 0.1 * lower + seed / 100, "skill": skill + seed / 100,
                      "over_neighbour": over, "over_interpolated": -over, "neighbour": 0.7,
                      "interpolated": 0.9, "r1": 0.2, "r1_chance": 0.001,
                      "skill_between": skill / 2 + seed / 50,
                      "skill_anywhere": skill / 4 + seed / 50, "skill_own_places_anywhere": 0.3,
                      "skill_teacher_places_anywhere": 0.4}
            values |= {f"{name}_{part}": value for name, value in scores.items()}
            for name in ("clip_centred", "skill", "over_neighbour", "over_interpolated"):
                values |= {f"{name}_se_{part}": 0.01, f"{name}_freedom_{part}": 9.0}
    return values | more


@pytest.fixture
def table():
    rows = [row(video, kind, seed=seed, skill=0.5 if kind != "pe" else -0.3)
            for video in ("bunny", "bikes") for kind in KINDS for seed in range(3)]
    rows += [row(variant="pixels_only", seed=seed, psnr=33 + seed / 50) for seed in range(3)]
    rows += [row(variant=f"lambda_{w:g}", psnr=30 + p, skill=s, clip_loss_weight=w)
             for w, p, s in [(0.1, 2, 0.49), (0.2, 1, 0.3), (1, -1, 0.55)]]
    rows += [row(variant="warmup_0", psnr=29.5, skill=0.4, pixel_loss_warmup_epochs=0)]
    rows += [row("bunny", "xyt", "pool_0.7", seed, skill=0.6 + seed / 200) for seed in range(3)]
    rows += [row("bunny", "xyt", "stage_1", 0, skill=0.52),
             row("bunny", "xyt", "levels_40", 0, psnr=31, skill=0.58)]
    return pd.DataFrame(rows)


def test_an_estimate_by_hand():
    found = Estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert found.side == "open" and Estimate([1.0, 1.1]).text(1) == "1.1 [0.4, 1.7]"
    alone = Estimate([0.5])
    assert alone.text(2) == "0.50" and alone.side == "open" and Estimate([]).text() == ""
    framed = Estimate([0.5], [0.1], [9.0])
    assert framed.high == pytest.approx(0.5 + 2.262157 * 0.1, rel=1e-5) and framed.side == "above"


def test_an_interval_ends_where_the_measure_does_and_counts_frames_between_positions_too():
    rows = pd.DataFrame({"skill_between_held_out": [0.9], "skill_se_between_held_out": [0.1],
                         "skill_freedom_between_held_out": [9.0]})
    found = estimate(rows, "skill_between_held_out")
    assert found.low == pytest.approx(0.9 - 2.262157 * 0.1, rel=1e-5) and found.high == 1
    assert estimate(rows.rename(columns=lambda name: name.replace("skill", "over_neighbour")),
                    "over_neighbour_between_held_out").high > 1  # a difference may exceed 1


def test_seeds_are_paired(table):
    found = paired(table, "psnr_train_db", video="bunny", kind="hybrid", variant="base",
                   against="pixels_only")
    assert found.values == pytest.approx([-3, -3.02, -3.04]) and found.side == "below"
    assert paired(table, "skill_held_out", video="bunny", kind="xyt", variant="stage_1").n == 1
    assert paired(table, "nothing", video="bunny", kind="xyt", variant="stage_1").n == 0
    several = estimate(table[(table.video == "bunny") & (table.kind == "xyt")
                             & (table.variant == "base")], "skill_held_out")
    assert several.mean == pytest.approx(0.51) and several.low < 0.49  # frames and seeds


def test_settings_that_none_beats():
    rows = pd.DataFrame({"a": [1, 2, 3, 2], "b": [3, 2, 1, 1]})
    assert undominated(rows, "a", "b").index.tolist() == [0, 1, 2]


def test_learning_page_follows_the_numbers(table):
    text, figure = study_pages.learning_page(table)
    assert "**bunny, from place and time**: held-out skill 0.510" in text
    assert "It **knows more than a constant**; by centred cosine it is ahead of repeating the " \
        "teacher's embedding of the nearest training frame, and behind interpolating" in text
    assert "**bikes, from time alone**: held-out skill -0.290" in text
    assert "It knows **less than a constant**" in text
    assert "With 40 levels of frequencies for place and time on bunny" in text
    assert "20.0% (0.1%)" in text and "not CLIP" in text and len(figure.axes) == 2
    behind = study_pages.learning_page(table.assign(over_neighbour_held_out=-0.1))[0]
    assert "it is behind repeating the teacher's embedding of the nearest training frame and " \
        "interpolating" in behind
    unknown = study_pages.learning_page(table.assign(over_neighbour_held_out=0.0,
                                                     over_interpolated_held_out=0.0))[0]
    assert "not told apart from repeating the teacher's embedding of the nearest training frame " \
        "or interpolating" in unknown
    unsure = table.assign(skill_se_held_out=1.0)
    assert "**stays open**" in study_pages.learning_page(unsure)[0]


def test_cost_page_follows_the_numbers(table):
    text, figure = study_pages.cost_page(table)
    assert "the second task costs 3.02 [2.97, 3.07] dB on training frames" in text
    assert "-3.02 [-3.07, -2.97]" in text and "4.5%" in text and len(figure.axes) == 2
    better = table.copy()
    better.loc[better.variant == "pixels_only", "psnr_train_db"] -= 6
    text, _ = study_pages.cost_page(better)
    assert "gains 2.98 [2.93, 3.03] dB on training frames and costs" in text
    one = table[table.seed == 0]
    text, _ = study_pages.cost_page(one)
    assert "changes PSNR by -3.00 dB on training frames, of one seed" in text


def test_trade_off_page_follows_the_numbers(table):
    text, figure = study_pages.trade_off_page(table)
    assert "from picture's worst to best: λ = 1, λ = 0.5, λ = 0.1." in text
    assert "has λ = 1: 29.00 dB, 4.12 dB below pixels alone" in text
    assert len(figure.axes[0].texts) == 5


def test_remedies_page_follows_the_numbers(table):
    text, figure = study_pages.remedies_page(table)
    first, second = text.split("**Held-out skill anywhere")
    assert "- It helped, by an interval over seeds: “mean over 0.7 of the height” (bunny, place " \
        "and time) +0.105 [" in first
    assert "- Without proof (one seed, or an interval around 0): 2 ahead, 0 behind" in first
    assert "- It harmed, by an interval over seeds: none." in first
    assert "**is beaten** where it is taught, by “mean over 0.7" in first and "300 epochs" in first
    assert "interpolated, have a skill of 0.300 [0.300, 0.300] anywhere, where its head asked " \
        "there has 0.145 [" in second and "interpolated, have 0.400." in second
    assert "Of 3 remedies' heads asked there, ahead of the first: none." in second
    ahead = table.assign(skill_own_places_anywhere_held_out=0.14)
    assert "ahead of the first: “mean over 0.7 of the height” (+0.031" in \
        study_pages.remedies_page(ahead)[0]
    assert "What answers anywhere cost" in second and "place and time): with “mean over 0.7" in \
        second and "skill at the supervised positions changes by +0.105" in second
    assert "pixels alone" not in second  # of place and time there are no such runs here
    more = [row(kind="xyt", variant="pixels_only", seed=seed, psnr=33) for seed in range(3)]
    assert "with pixels alone 31.10 [30.85, 31.35], from which it differs by -3.00 [-3.00, " \
        "-3.00] dB." in study_pages.remedies_page(pd.concat([table, pd.DataFrame(more)]))[0]
    nowhere = table.copy()
    nowhere.loc[nowhere.variant != "base", "skill_anywhere_held_out"] = np.nan
    assert "heads asked there, ahead" not in study_pages.remedies_page(nowhere)[0]
    assert "answers anywhere cost" not in study_pages.remedies_page(nowhere)[0]
    assert "stays the default" not in text and "stays the default" in study_pages.remedies_page(
        table[table.variant != "pool_0.7"])[0]
    assert len(figure.axes) == 3 and "| the base |" in text


def test_every_change_has_words():
    words = [study_pages.change_words(kind, variant) for kind in ENCODINGS
             for variant in [*REMEDIES, *ENCODINGS[kind]]]
    assert "65 patches a frame, mean over 0.35 of the height" in words and all(words)


@pytest.mark.parametrize("name, kept", [
    ("learn", "pixels_only"), ("cost", "base"), ("trade_off", "pixels_only"), ("remedies", "base")])
def test_what_is_missing_is_said(name, kept, table, tmp_path):
    text, figure = study_pages.PAGES[name](table[table.variant == kept])
    assert figure is None and "Not published yet" in text and "nan" not in text


def test_pages_are_written_from_the_table(table, tmp_path):
    (tmp_path / "out").mkdir()
    study_pages.write_study_pages(tmp_path / "out", tmp_path)
    assert "hnerv-clip study" in (tmp_path / "out" / "study_learn.md").read_text()
    table.assign(embed="", patch_grid="2_4").to_csv(tmp_path / "study.csv", index=False)
    study_pages.write_study_pages(tmp_path / "out", tmp_path)
    for name in study_pages.PAGES:
        text = (tmp_path / "out" / f"study_{name}.md").read_text()
        assert f"_generated/study_{name}.svg" in text and "nan" not in text
        assert (tmp_path / "out" / f"study_{name}.svg").stat().st_size > 1000
    empty = [c for c in table if c.endswith("held_out") or "held_out_" in c]
    table.assign(**{c: np.nan for c in empty}).assign(embed="", patch_grid="").to_csv(
        tmp_path / "study.csv", index=False)  # a split without held-out frames
    study_pages.write_study_pages(tmp_path / "out", tmp_path)
    assert not any("nan" in (tmp_path / "out" / f"study_{name}.md").read_text()
                   for name in study_pages.PAGES)


def test_a_page_may_show_other_runs_too(table, tmp_path):
    (tmp_path / "out").mkdir()
    table.to_csv(tmp_path / "study_trade_off.csv", index=False)
    study_pages.write_study_pages(tmp_path / "out", tmp_path)
    others = (tmp_path / "out/study_trade_off_others.md").read_text()
    assert "λ = 0.1" in others and "study_trade_off_others.svg" in others
    assert (tmp_path / "out/study_trade_off_others.svg").exists()
    for name in ("learn", "trade_off"):
        assert "Not published yet" in (tmp_path / f"out/study_{name}.md").read_text()
