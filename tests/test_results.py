"""The result notebooks: numbers by hand, escaping, what is missing, pages that are not stale."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from hnerv_clip.book import (
    BookError,
    build,
    clean,
    judged,
    markdown,
    pages,
    results,
    scaling,
    trade_off,
)
from hnerv_clip.figures.scaling import plot_scaling
from hnerv_clip.study.plan import ENCODINGS, REMEDIES
from hnerv_clip.verify.paired import compare_paired
from hnerv_clip.verify.simulation import RHOS, worst_cases
from hnerv_clip.verify.verdict import QUESTIONS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [path for path in build.list_notebooks(ROOT) if path.match(pages.RESULTS)]
EVIL = "<svg onload=alert(1)>"


def row(variant="base", seed=0, *, psnr=30.0, skill=0.5, kind="hybrid", **more):
    """A row of study.csv; seeds differ by a tenth of a decibel and a hundredth of skill."""
    values = {"run": f"bunny_{kind}_{variant}_s{seed}", "video": "bunny", "kind": kind,
              "variant": variant, "seed": seed, "clip_loss_weight": 0.5, "epochs": 300,
              "pixel_loss_warmup_epochs": 50, "clip_head_values": 70_000,
              "stored_values": 1_570_000, "device": "a GPU", "commit": "0123456789abcdef",
              "dirty": False, "teacher_label": "a teacher (not CLIP)"}
    for part, lower in (("train", 0), ("held_out", 1)):
        values[f"psnr_{part}_db"] = psnr - 2 * lower + seed / 10
        if variant != "pixels_only":
            values |= {f"clip_centred_{part}": skill + seed / 100,
                       f"skill_{part}": skill + seed / 100, f"over_neighbour_{part}": -0.1}
    return values | more


@pytest.fixture
def runs():
    rows = [row(seed=seed) for seed in range(3)]
    rows += [row("pixels_only", seed, psnr=33 + seed / 50) for seed in range(3)]
    rows += [row(f"lambda_{w:g}", psnr=30 + p, skill=s, clip_loss_weight=w)
             for w, p, s in [(0.1, 2, 0.49), (0.2, 1, 0.3), (1, -1, 0.55)]]
    return pd.DataFrame(rows)


def test_a_mean_over_seeds_by_hand():
    found = results.mean_over_seeds([1.0, 2.0, 3.0, np.nan])
    assert found.mean == 2 and found.high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert found.outcome == "open" and results.mean_over_seeds([1.0, 1.1]).text(1) == \
        "1.1 [0.4, 1.7]"
    alone = results.mean_over_seeds([0.5])
    assert alone.text(2) == "0.50" and alone.outcome == "open"
    assert results.mean_over_seeds([]).text() == ""
    assert results.mean_over_seeds([0.9, 1.0]).high > 1  # never cut at a measure's limit


def test_seeds_are_paired(runs):
    found = results.paired_difference(runs, "psnr_train_db", "base", "pixels_only")
    assert list(found.values) == pytest.approx([-3, -3.02, -3.04])
    assert results.paired_text(found) == "-3.02 [-3.07, -2.97]"
    assert results.paired_difference(runs, "psnr_train_db", "stage_1", "base") is None
    assert results.paired_difference(runs, "nothing", "base", "pixels_only") is None


def test_a_single_seed_is_compared_with_the_run_of_that_seed_alone(runs):
    """Not with the mean over three."""
    rows = results.trade_off(runs, "bunny").set_index("setting")
    assert rows.cost_train["λ = 0.1"].n == 1
    assert rows.cost_train["λ = 0.1"].difference == pytest.approx(32 - 33)
    assert rows.cost_train["λ = 0.5"].n == 3


def test_the_weight_near_the_best_is_named_once(runs):
    """Of those within the margin that of the highest PSNR, and whether smaller ones were tried."""
    rows = trade_off.read_trade_off(runs, "bunny")
    longer = rows.assign(epochs=600)
    assert trade_off.near_best([rows, longer]) == (
        "**At λ = 1, the mean-centered cosine is within 0.01 of the best after 300 epochs (PSNR "
        "-4.00 dB, 1 paired seed) and after 600 epochs (PSNR -4.00 dB, 1 paired seed).** It is "
        "0.550 (best 0.550) and 0.550 (best 0.550).")
    alike = longer.assign(clip_centred_held_out=0.5)
    text = trade_off.near_best([rows, alike])
    assert "1 paired seed); at λ = 0.1, the smallest tried, after 600 epochs (PSNR -1.00" in text
    assert "other settings" not in text
    assert trade_off.near_best([alike]).endswith("All other settings are within 0.01, too.")


def test_the_spread_of_seeds_stands_beside_that_of_settings(runs):
    rows = trade_off.read_trade_off(runs, "bunny")
    text = trade_off.seeds_words(rows)
    assert text.startswith("3 of 4 settings have one seed. The 3 seeds of λ = 0.5 differ by up to "
                           "0.020 in cosine and 0.20 dB in PSNR on held-out frames, all λ of this "
                           "warm-up by up to 0.250 and 3.00 dB. ")
    assert text.endswith("that λ = 0.5 costs PSNR is not: its interval excludes 0.")
    rows["cost_held_out"] = None
    assert trade_off.seeds_words(rows).endswith("than seeds do may be chance.")
    assert trade_off.seeds_words(rows[rows.n == 1]).startswith("Each setting has one seed, so ")


def test_settings_that_none_beats():
    rows = pd.DataFrame({"a": [1, 2, 3, 2], "b": [3, 2, 1, 1]})
    assert results.pareto_optimal(rows, "a", "b").index.tolist() == [0, 1, 2]


def test_the_best_heads_are_named_with_the_interval_of_their_cost():
    def paired(*values):
        return compare_paired(pd.Series(values), pd.Series([0.0] * len(values)))
    rows = pd.DataFrame([
        {"change": "a", "skill": paired(0.1, 0.11, 0.12), "anywhere": None,
         "psnr": paired(1.0, 1.1, 1.2)},
        {"change": "b", "skill": paired(0.9, -0.9, 0.9), "anywhere": paired(0.5, 0.6, 0.7),
         "psnr": paired(1.0, -2.0, 0.0)}])
    assert results.best_heads(rows).startswith(
        "**At the supervised positions it is “a” (PSNR +1.10 dB [+0.85, +1.35] against "
        "the default head), anywhere in the frame “b” (PSNR -0.33 dB [-4.13, +3.46]).** Against "
        "the default head, at the supervised positions “a” changes skill by +0.110 [")
    assert "frame the default head, which none beats significantly.**" in \
        results.best_heads(rows.head(1))
    only_second = rows.assign(skill=[paired(-0.1, 0.1, 0.0)] * 2)
    assert "“b” (PSNR -0.33 dB [-4.13, +3.46] against the default head).**" in \
        results.best_heads(only_second), "the baseline is named with the first gain that is given"


def test_every_change_has_words():
    words = [results.change_words(kind, variant) for kind in ENCODINGS
             for variant in ["base", *REMEDIES, *ENCODINGS[kind]]]
    assert "65 patches a frame, mean over 0.35 of the height" in words and all(words)
    assert "read at decoder stage 2" in words and "40 frequencies" in words


def test_missing_and_wrong_results_are_said(tmp_path, runs):
    with pytest.raises(results.ResultsError, match="study.csv does not exist.*hnerv-clip study"):
        results.read_runs(tmp_path)
    runs.drop(columns="skill_held_out").assign(embed="", patch_grid="").to_csv(
        tmp_path / "study.csv", index=False)
    with pytest.raises(results.ResultsError, match="has no skill_held_out.*hnerv-clip study"):
        results.read_runs(tmp_path, needs=["skill_held_out"])
    with pytest.raises(results.ResultsError, match="no pair of one seed against pixels_only"):
        results.comparisons(runs[runs.variant != "pixels_only"], {"x": "psnr_train_db"},
                            against="pixels_only", variants=["base"])
    with pytest.raises(results.ResultsError, match="one weight λ only"):
        results.trade_off(runs[runs.variant == "base"], "bunny")
    with pytest.raises(results.ResultsError, match="x.json does not exist; write it with this"):
        results.read_json(tmp_path, "x.json", fix="this")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(results.ResultsError, match="x.json is damaged: it is no JSON.*this"):
        results.read_json(tmp_path, "x.json", fix="this")


@pytest.fixture
def cross_fit(tmp_path):
    """The committed answers, and how to read them changed."""
    content = json.loads((ROOT / "book/results/verification_cross_fit.json").read_text())

    def read(change=lambda content: None):
        change(content)
        (tmp_path / "verification_cross_fit.json").write_text(json.dumps(content))
        return judged.read_judged(tmp_path)
    return read


def test_the_verdict_follows_from_the_answers(cross_fit):
    """Decoded frames first; what two videos answer differently is said of each."""
    text = judged.answer_sentences(cross_fit())
    assert text.startswith("**In part: on held-out frames of bunny and bikes the head beats the "
                           "teacher on the decoded frame, but is no better than the nearest "
                           "training frame (yes to 4 of 7 questions).** It beats the teacher on")
    assert "is no better than the nearest training frame or interpolating the teacher" in text
    assert "a side file of equal bytes? On bunny no, on bikes these frames cannot tell." in text

    def change(content):
        for row in content["answers"]:
            if row["phases"] == "all":
                row["answer"] = "no" if (row["video"], row["question"]) == ("bikes", "when") else \
                    "cannot tell" if row["question"] == "where" else "yes"
    assert judged.answer_sentences(cross_fit(change)) == (
        "**In part: on held-out frames of bunny and bikes the head beats the teacher on the "
        "decoded frame and the nearest training frame (yes to 5 of 7 questions).** It beats the "
        "teacher on the decoded frame, beats a constant, beats the nearest training frame, "
        "beats interpolating the teacher and beats a side file of equal bytes. Does it know when? "
        "On bunny yes, on bikes no. These frames cannot tell: Does it know where?")


def test_the_same_settings_on_page_5_are_compared(tmp_path):
    swept = pd.DataFrame({"clip_loss_weight": [0.1, 1.0, 0.5], "setting": ["a", "b", "c"],
                          "pixel_loss_warmup_epochs": [50, 50, 50],
                          "psnr_held_out_db": [31.0, 29.5, 30.0]})
    assert results.repeated_words(swept, tmp_path) == ""
    again = pd.DataFrame({"run": ["x", "y", "z"], "kind": ["hybrid", "hybrid", "pe"],
                          "clip_loss_weight": [0.1, 1.0, 0.5], "warmup_epochs": [50.0, 50.0, 50.0],
                          "psnr_held_out_db": [31.1, 28.5, 20.0]})
    again.to_csv(tmp_path / "ablations.csv", index=False)
    words = results.repeated_words(swept, tmp_path)
    assert "trained 2 of these" in words and "most for b, 28.50 dB there and 29.50 dB here" in words
    assert "at most 0.10 dB for the others" in words
    assert trade_off.repeated_words(swept, tmp_path) == f"{words} Its smallest λ above 0 is 0.1."
    again["psnr_held_out_db"] = [31.0, 29.5, 20.0]
    again.to_csv(tmp_path / "ablations.csv", index=False)
    assert "has 2 of these settings: equal figures." in results.repeated_words(swept, tmp_path)
    again.head(1).to_csv(tmp_path / "ablations.csv", index=False)
    assert results.repeated_words(swept, tmp_path) == ""


def test_several_gpus_are_summed_up():
    def row(ranks, rate, speed, reached, epochs=40):
        return {"ranks": ranks, "learning_rate": rate, "frames_per_s": speed, "epochs": epochs,
                "time_to_quality_s": reached, "psnr_db": 25.0}
    runs = [row(1, "kept", 100, 8.0), row(2, "kept", 190, None), row(4, "kept", 360, None),
            row(4, "×4", 350, None)]
    said, quality = scaling.answer_words({"parts": {"speed": {"runs": runs}}})
    assert said.startswith("On 4 GPUs training runs 3.60 times as fast as on one (1.90 times on 2)")
    assert quality.endswith("is reached by none of these.") and said.endswith("by +0.00 dB.")
    assert quality.startswith("PSNR changes by +0.00 dB with the learning rate ×4. ")
    runs[0]["cosine_centred"], runs[-1]["cosine_centred"] = 0.9, 0.0
    why = "run ranks4 failed: rank 0 of 4: FileError: /tmp/a/video.hnerv: embeddings: not finite"
    failed = {"run": "ranks4", "ranks": 4, "learning_rate": "×4", "why": why}
    part = {"runs": runs, "failed": [failed],
            "gpus": 4, "device": "GPU", "commit": "abc", "dirty": False}
    quality = scaling.answer_words({"parts": {"speed": part}})[1]
    assert "and the mean-centered cosine falls from 0.90 to 0.00. The PSNR" in quality
    assert quality.endswith("The run on 4 with the learning rate ×4 has no result (rank 0 of 4: "
                            "FileError: video.hnerv: embeddings: not finite).")
    other = {**failed, "why": "KeyError: 'run' / rank 1 of 2: 5 /s"}  # nothing of it is cut
    assert "no result (KeyError: 'run' / rank 1 of 2: 5 /s)." in scaling.failed_words(
        {**part, "failed": [other]})
    assert scaling.failed_words({**part, "failed": []}) == ""
    runs.append(row(4, "×4, as many steps", 360, 2.0, 160))
    assert ("after 8.0 s of steps is reached in 2.0 s with the learning rate ×4, as many steps (4 "
            "times the epochs); one GPU was not run with that rate."
            ) in scaling.answer_words({"parts": {"speed": {"runs": runs}}})[1]
    runs[-1]["curve"] = [[8, 1.0, 25.0], [56, 1.5, 13.0], [64, 2.0, 19.0]]
    runs[-1]["psnr_db"] = 19.0
    measured = {"parts": {"speed": {**part, "quality_db": 25.0, "complete": True}}, "gpus": 4,
                "settings": {"predict_clip": True, "pixel_loss_warmup_epochs": 10, "epochs": 40},
                "backend": "nccl"}
    quality = scaling.answer_words(measured)[1]
    assert ("-6.00 dB with the learning rate ×4, as many steps (4 times the epochs): it fell from "
            "25.00 dB in the warm-up to 13.00 dB when the cosine term joined, and had "
            "19.00 dB at its last evaluation.") in quality
    assert "is reached by none of these." in quality
    plain = {**measured, "settings": {**measured["settings"], "predict_clip": False}}
    assert "warm-up" not in scaling.answer_words(plain)[1], "without a head there is one task"
    figure = plot_scaling({"backend": "nccl", "parts": {"speed": {"quality_db": 25.0, "runs": [
        {**run, "curve": [[1, 1.0, 20.0]], "frames_per_s_p10": 1, "frames_per_s_p90": 999,
         "efficiency": 0.9} for run in runs]}}})
    lines = figure.axes[1].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)


def test_more_epochs_are_not_hidden_in_a_comparison():
    """PSNR of as many steps is of twice the epochs, and the sentence says so."""
    alone = {"psnr_db": 25.0, "epochs": 40}
    others = [{"psnr_db": 24.0, "epochs": 40, "learning_rate": "kept"},
              {"psnr_db": 27.0, "epochs": 80, "learning_rate": "×2, as many steps"}]
    assert scaling.quality_words(alone, others) == (
        "-1.00 dB with the learning rate kept and +2.00 dB with the learning rate ×2, as many "
        "steps (2 times the epochs)")


def test_answers_that_are_missing_are_said(cross_fit):
    def change(content):
        content["answers"] = [row for row in content["answers"]
                              if (row["video"], row["question"]) != ("bikes", "decoded")]
    with pytest.raises(results.ResultsError, match="no answer of bikes to decoded; .*git checkout"):
        cross_fit(change)


def test_tables_of_the_simulated_data_name_their_columns():
    made = json.loads((ROOT / "book/results/verification_calibration.json").read_text())
    rows = judged.question_error_rows(worst_cases(pd.DataFrame(made["planted"])))
    assert {row["question"] for row in rows} == {words for words, _ in QUESTIONS.values()}
    covered = judged.coverage_rows(pd.DataFrame(made["intervals"]))
    heads = {head.replace("\u00ad", "") for row in [*rows, *covered] for head in row}
    assert heads == {"size", "question", "wrong yes", "p ≤ 5%, uncorrected", "power", "mean of",
                     "frames", *(f"autocorrelation {rho:g}" for rho in (0, *RHOS))}


def test_limits_come_from_the_runs(cross_fit):
    assert judged.limit_words(cross_fit()) == "one seed a phase; 2 videos"

    def without_one(content):
        content["runs"] = [row for row in content["runs"]
                           if (row["video"], row["phase"]) != ("bikes", 4)]
    assert "4 of 5 phases on bikes, so that one frame in 5" in \
        judged.limit_words(cross_fit(without_one))

    def change(content):
        own = [row for row in content["runs"] if row["video"] == "bunny"]
        content["runs"] = [row | {"seed": seed} for row in own for seed in (0, 1)]
    assert judged.limit_words(cross_fit(change)).startswith("2 seeds a phase")


def test_the_worst_made_data_are_named():
    cell = {"planted": "equal", "design": "quick", "rho": 0.9, "question": "decoded", "no": 0,
            "estimate": 0, "datasets": 10}
    planted = pd.DataFrame([
        cell | {"kind": "null", "yes": 0.02, "rejected": 0.08},
        cell | {"kind": "null", "yes": 0.04, "rejected": 0.01, "question": "when"},
        cell | {"kind": "truth", "yes": 0.9, "rejected": 1, "planted": "perfect"},
        cell | {"kind": "between", "yes": 0.5, "rejected": 1, "estimate": 0.3}])
    text = judged.error_sentences(planted)
    assert "a wrong yes in at most 4.0% of 10 data sets" in text and "at least 90.0%" in text
    assert "up to 8.0% (as good as the teacher on the decoded frame; autocorrelation 0.9;" in text
    assert "in 1 of the 2 cases" in text
    weak, = judged.weak_rows(planted)
    assert (weak["value"], weak["answered yes"]) == ("0.30", "50.0%")
    intervals = pd.DataFrame({"covered": [0.94, 0.97], "datasets": 7})
    assert "up to 1.0 points too seldom and up to 2.0 points too often" in \
        judged.coverage_words(intervals)
    assert "97.0%: up to 2.0 points too often" in judged.coverage_words(intervals[1:])
    assert "94.0%: up to 1.0 points too seldom." in judged.coverage_words(intervals[:1])


def test_text_is_escaped_once():
    assert markdown.escape(EVIL) == "&lt;svg onload=alert(1)&gt;"
    assert markdown.escape("a|b *c* [d](e) `f` $g$") == \
        r"a\|b \*c\* \[d\](e) \`f\` \$g\$"
    assert markdown.escape("clip_pool _x_") == r"clip_pool \_x\_"
    assert markdown.escape("≥\u00a01000 a\n b\u2028") == "≥\u00a01000 a b"
    assert markdown.escape(markdown.escape("<b>")) == "&lt;b&gt;"
    text = markdown.table([{"video": EVIL, "x": markdown.Markup("**1**"), "none": None}])
    assert text == "| video | x |\n| --- | --- |\n| &lt;svg onload=alert(1)&gt; | **1** |"


def test_html_in_markdown_becomes_text():
    text = f"<details>\n<summary>s</summary>\n\n{EVIL} a < b <details open> <DETAILS>\n</details>"
    assert markdown.without_html(text) == (
        "<details>\n<summary>s</summary>\n\n&lt;svg onload=alert(1)> a < b &lt;details open> "
        "&lt;DETAILS>\n</details>")
    assert markdown.without_html("`<b>` ``<i>`` <u>\n```\n<svg>\n```\n<s>") == \
        "`<b>` ``<i>`` &lt;u>\n```\n<svg>\n```\n&lt;s>"


def test_long_tables_fold():
    rows = [{"a": str(i)} for i in range(9)]
    assert markdown.table(rows, fold="All <9>").startswith(
        "<details>\n<summary>All &lt;9&gt;</summary>\n\n| a |")
    short = markdown.table(rows[:8], fold="All <9>")
    assert short.startswith("All &lt;9&gt;:\n\n| ") and "<details>" not in short
    assert markdown.table(rows).startswith("| ")


@pytest.fixture(scope="module")
def shown():
    """{notebook: its Markdown as it is now}, executed in this process: kernels take seconds."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell, made = InteractiveShell(), {}
    for path in NOTEBOOKS:
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        made[path.name] = []
        for cell in cells:
            with capture_output() as captured:
                done = shell.run_cell(cell.source)
            done.raise_error()
            outputs = [output.data["text/markdown"] for output in captured.outputs
                       if "text/markdown" in output.data]
            result = getattr(done.result, "data", None)  # shown, too, where a hook captures it
            if isinstance(result, str) and result not in outputs[-1:]:
                outputs.append(result)
            made[path.name] += map(clean.clean_markdown, outputs)
        shell.reset(new_session=False)
    return made


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_result_page_is_not_stale(path, shown):
    """Executed on the committed results, a notebook says what its committed page says."""
    page = nbformat.read(ROOT / "book" / path.name, as_version=4)
    texts = [output.data["text/markdown"] for cell in page.cells for output in
             cell.get("outputs", []) if "text/markdown" in output.get("data", {})]
    assert texts == shown[path.name], "stale: hnerv-clip pages"
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert [cell.source for cell in page.cells] == sources, "stale: hnerv-clip pages"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_result_page_answers_first_and_names_its_figures(path):
    page = nbformat.read(ROOT / "book" / path.name, as_version=4)
    outputs = [(cell, output) for cell in page.cells for output in cell.get("outputs", [])]
    assert page.cells[0].source.endswith("?") and len(page.cells[0].source.splitlines()) == 1
    assert outputs[0][1].data["text/markdown"].startswith("**")
    assert "image/svg+xml" in outputs[1][1].data, "one figure follows the answer"
    assert not any(re.search(r"\bnan\b|None", str(output.get("data", {}).get("text/markdown")))
                   for _, output in outputs if "text/markdown" in output.get("data", {}))
    for cell, output in outputs:
        if "image/svg+xml" in output.get("data", {}):
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 30
        for table in re.findall(r"(?:^\|.*\n?)+", output.get("data", {}).get("text/markdown", ""),
                                re.M):
            folded = "<details>" in output.data["text/markdown"]
            assert folded or len(table.splitlines()) <= 2 + markdown.FOLD, table


def test_papermill_makes_a_page_from_other_results(tmp_path, monkeypatch):
    """Through `execute_results`, in a checkout of its own; without results it says what to do."""
    root = tmp_path / "repo"
    for name in ("notebooks", "book"):
        (root / name).mkdir(parents=True)
    for name in ("_toc.yml", "_config.yml", "pyproject.toml", "notebooks/14_check_fidelity.ipynb"):
        shutil.copy(ROOT / name, root / name)
    monkeypatch.chdir(root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(BookError, match="fidelity.json does not exist; write it with hnerv-clip"):
        build.execute_results(root, say=lambda text: None)
    assert not list((root / "book").iterdir())
    measured = json.loads((ROOT / "book" / "results" / "fidelity.json").read_text())
    measured["runs"][0]["device"] = f"a GPU {EVIL}"
    (root / "book" / "results").mkdir()
    (root / "book" / "results" / "fidelity.json").write_text(json.dumps(measured))
    shutil.copy(ROOT / "book" / "results" / "repeats.json", root / "book" / "results")
    made, = build.execute_results(root, say=lambda text: None)
    text = made.read_text()
    assert EVIL not in text and "a GPU &lt;svg onload=alert(1)" in text
    assert str(root) not in text and "papermill" not in text


def test_every_file_of_results_is_said_to_come_from_somewhere():
    said = (ROOT / "book" / "reproduce.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted((ROOT / "book" / "results").iterdir())
            if f"`{path.name}`" not in said] == []
