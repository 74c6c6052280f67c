"""Which runs the ablations need, and what their table lets one say."""

import pandas as pd
import pytest

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.figures import plot_ablation, plot_tradeoff
from hnerv_clip.figures.style import name_lines
from hnerv_clip.study.ablations import ablation_answer, ablation_configs, run_words


def test_each_run_differs_from_the_base_in_one_setting():
    base = Config.from_params(epochs=30, pixel_loss_warmup_epochs=5, eval_freq=10)
    configs = ablation_configs(base)
    assert configs["base"] == base
    assert list(configs) == ["base", "pixels_only", "lambda_0", "lambda_0.1", "lambda_0.2",
                             "lambda_1", "warmup_0", "warmup_10", "pe_1.25_80", "xyt_1.25_80"]
    assert all(len(base.diff(config)) == 1 for name, config in configs.items() if name != "base")
    half = ablation_configs(base, epochs=15)["base"].train
    assert (half.epochs, half.pixel_loss_warmup_epochs, half.eval_freq) == (15, 2, 15)
    with pytest.raises(ConfigError, match="predict_clip=True"):
        ablation_configs(base.replace(predict_clip=False))
    with pytest.raises(ConfigError, match="lambdas"):
        ablation_configs(base, lambdas="half")


def table(*names, held_out=True):
    nan = float("nan")
    rows = {"base": ("hybrid", 0.5, 30.0, 28.0, 0.9, 0.8),
            "pixels_only": ("hybrid", 0.0, 32.5, 27.5, nan, nan),
            "xyt_1.25_80": ("xyt", 0.5, 29.0, 25.0, 0.7, 0.6)}
    frame = pd.DataFrame([{"run": n, **dict(zip((
        "kind", "clip_loss_weight", "psnr_train_db", "psnr_held_out_db", "clip_centred_train",
        "clip_centred_held_out"), rows[n]))} for n in names])
    if not held_out:
        frame[["psnr_held_out_db", "clip_centred_held_out"]] = nan
    return frame


def test_the_answer_says_what_the_runs_gave():
    said = ablation_answer(table("base", "pixels_only", "xyt_1.25_80"))
    assert "2.50 dB lower on training frames and 0.50 dB higher on held-out frames" in said[0]
    assert said[0].startswith("**") and said[0].endswith(".** One run each.")
    assert "0.900 on training frames and 0.800 on held-out frames" in said[1]
    assert len(said) == 3 and "(80 frequencies) reaches a mean-centered cosine of 0.700" in said[2]
    assert said[2].endswith("and 0.600 on held-out frames, and a PSNR of 25.00 dB there.")


def test_the_answer_names_the_smallest_weight_that_costs_next_to_no_cosine():
    runs = table("base", "pixels_only")
    for weight, psnr, cosine in ((0.0, 27.4, 0.1), (0.1, 27.9, 0.795), (0.02, 27.8, 0.78)):
        runs.loc[len(runs)] = [f"lambda_{weight:g}", "hybrid", weight, 31.0, psnr, 0.9, cosine]
    assert ablation_answer(runs)[-1] == (
        "Of those tried here, the smallest λ within 0.01 of the best mean-centered cosine on "
        "held-out frames is 0.1, with a PSNR of 27.90 dB against 27.50 dB with pixels only.")


def test_the_answer_says_what_is_missing():
    for there, missing in [("base", "pixels_only"), ("pixels_only", "base")]:
        said = ablation_answer(table(there))
        assert "is not known" in said[0] and f"“{run_words(missing)}” did not finish" in said[0]
    said = " ".join(ablation_answer(table("base", "pixels_only", "xyt_1.25_80", held_out=False)))
    assert "nan" not in said and "held-out" not in said and "2.50 dB lower" in said


def test_runs_have_words():
    names = ("base", "lambda_0.5", "warmup_50", "pe_1.25_80", "own")
    assert [run_words(name) for name in names] == [
        "base", "λ = 0.5", "warm-up of 50 epochs", "from time alone (80 frequencies)", "own"]


def test_figures_draw_the_table():
    rows = table("base", "pixels_only", "xyt_1.25_80")
    assert len(plot_ablation(rows, teacher_label="A").axes) == 2
    labels = [text.get_text() for text in plot_tradeoff(rows, teacher_label="A").axes[0].texts]
    assert labels.count("λ=0.5") == 4


def test_a_score_far_below_the_others_leaves_the_axis_to_them():
    rows = pd.DataFrame({
        "run": list("abcd"), "clip_loss_weight": [0, 0.1, 0.5, 1],
        "psnr_train_db": [35.0, 34, 33, 30], "psnr_held_out_db": [32.0, 31, 30, 29],
        "clip_centred_train": [-0.002, 0.96, 0.96, 0.95],
        "clip_centred_held_out": [0.003, 0.95, 0.95, 0.94]})
    panel = plot_tradeoff(rows, teacher_label="A").axes[0]
    assert 0.9 < panel.get_ylim()[0] < 0.94
    assert [text.get_text() for text in panel.texts].count("λ=0: 0.00") == 2
    figure = plot_ablation(rows, teacher_label="A")
    panel = figure.axes[1]
    assert 0.9 < panel.get_xlim()[0] < 0.94 and "0.00, 0.00" in panel.texts[0].get_text()
    assert "A score beyond the axis is written" in figure.caption
    assert "beyond the axis" not in plot_ablation(rows.tail(3), teacher_label="A").caption
    panel = plot_tradeoff(rows.tail(3), teacher_label="A").axes[0]
    assert not any(": " in text.get_text() for text in panel.texts)


def test_long_names_of_rows_do_not_run_into_each_other():
    import pandas as pd

    from hnerv_clip.figures import plot_differences

    name = "hybrid: 65 patches a frame, mean over 0.35 of the height, decoder stage 2"
    figure = plot_differences(pd.DataFrame([{"name": f"{name} {i}", "color": "hybrid", "x": [1.0],
                                             "x_low": 0.0, "x_high": 2.0} for i in range(6)]),
                              panels={"x": "x"}, teacher_label="a teacher", words="")
    figure.draw_without_rendering()
    boxes = sorted((label.get_window_extent() for label in figure.axes[0].get_yticklabels()),
                   key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:]))


def test_a_last_number_stays_with_the_word_before_it():
    assert name_lines("mean over a third, decoder stage 2") == [
        "mean over a third, decoder", "stage 2"]
    assert name_lines("λ = 1") == ["λ = 1"]
