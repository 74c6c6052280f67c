"""The verification: worked values, known answers, and bad input."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hnerv_clip import labels, metrics
from hnerv_clip.verify import baselines, cka, retrieval, simulation, time_series, verdict, zero_shot
from hnerv_clip.verify import report as verify_report
from hnerv_clip.verify import scores as verify_scores


def unit_vectors(shape, seed=0):
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def slow_video(frames=60, patches=4, dim=32, seed=0, rho=0.5):
    """Teacher embeddings with a common part, a part per position and one that comes and goes."""
    rng = np.random.default_rng(seed)
    moving = simulation.autoregression(rng, (frames, patches, dim), rho)
    vectors = moving + rng.standard_normal((patches, dim)) + 2 * rng.standard_normal(dim)
    return metrics.unit(vectors).astype(np.float32)


HELD_OUT = np.arange(60) % 5 == 4


def study(predicted, teacher, **options):
    return verify_scores.verify_embeddings(predicted, teacher, ~HELD_OUT, HELD_OUT, **options)


def answers_of(result):
    return {answer.question: answer.answer for answer in result.answers}


def mean_of(result, split, condition, column="clip_centred_mean"):
    return result.table.set_index(["split", "condition"]).loc[(split, condition), column]


def test_cosine_against_values_by_hand():
    assert metrics.cosine([3, 4], [4, 3]) == pytest.approx(24 / 25)
    assert metrics.cosine([1, 0], [0, 0]) == 0
    # (2, 1) - (1, 1) = (1, 0) and (2, 2) - (1, 1) = (1, 1): cosine 1 / sqrt(2).
    assert metrics.centred_cosine(np.array([2, 1]), np.array([2, 2]), np.array([1, 1])) \
        == pytest.approx(2 ** -0.5)


@pytest.mark.parametrize("similarity, band", [
    (0.95, "Excellent"), (0.9, "Good"), (0.7, "Good"), (0.69, "Moderate"), (0.4, "Moderate"),
    (0.39, "Poor"), (-0.1, "Poor")])
def test_similarity_bands_are_the_users(similarity, band):
    assert labels.similarity_band(similarity)[0] == band


@pytest.mark.parametrize("gap, band", [
    (0.2, "Large gap"), (0.15, "Medium gap"), (0.05, "Medium gap"), (0.04, "Small gap"),
    (-1, "Small gap")])
def test_gap_bands_are_the_users(gap, band):
    assert labels.gap_band(gap)[0] == band


def test_skill_by_hand():
    assert metrics.skill(0.95, 0.9) == pytest.approx(0.5)
    assert metrics.skill(0.85, 0.9) == pytest.approx(-0.5)


def test_nearest_training_frame_is_another_one_and_the_earlier_of_two():
    train = np.array([0, 1, 2, 3, 5, 6])
    near = baselines.nearest_training_frame(np.array([0, 2, 4, 5, 9]), train)
    assert near.tolist() == [1, 1, 3, 6, 6]


def test_shuffles_move_everything_and_differ():
    embeddings = np.arange(7 * 3, dtype=np.float32).reshape(7, 3, 1)
    pairs = baselines.shuffle_pairs(embeddings, np.random.default_rng(0))
    time = baselines.shuffle_time(embeddings, np.random.default_rng(0))
    for moved in (pairs, time):
        assert sorted(moved.ravel()) == sorted(embeddings.ravel())
        assert (moved != embeddings).all()
    # In time, an embedding stays at its patch position; as a pair, it need not.
    assert (time[..., 0] % 3 == np.arange(3)).all()
    assert (pairs[..., 0] % 3 != np.arange(3)).any()


def test_table_holds_the_mean_and_std_over_frames_and_patches():
    teacher, predicted = slow_video(), unit_vectors((60, 4, 32), seed=1)
    result = study(predicted, teacher)
    dots = (predicted * teacher).sum(-1)[HELD_OUT]
    row = result.table.set_index(["split", "condition"]).loc[("held_out", "learned")]
    assert row.clip_similarity_mean == pytest.approx(dots.mean(), abs=1e-6)
    assert row.clip_similarity_std == pytest.approx(dots.std(ddof=1), abs=1e-6)
    assert row.n == HELD_OUT.sum() * 4
    centre = teacher[~HELD_OUT].mean((0, 1))
    a, b = predicted[HELD_OUT] - centre, teacher[HELD_OUT] - centre
    by_hand = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert row.clip_centred_mean == pytest.approx(by_hand.mean(), abs=1e-6)


def test_baselines_see_training_frames_only():
    teacher = slow_video()
    changed = teacher.copy()
    changed[HELD_OUT] = unit_vectors(changed[HELD_OUT].shape, seed=5)
    for name, answer in baselines.conditions(
            teacher, changed, np.flatnonzero(~HELD_OUT), np.flatnonzero(HELD_OUT),
            np.random.default_rng(0)).items():
        if name not in ("learned", *verdict.CONTROLS):
            same = baselines.conditions(teacher, teacher, np.flatnonzero(~HELD_OUT),
                                     np.flatnonzero(HELD_OUT), np.random.default_rng(0))[name]
            np.testing.assert_array_equal(answer, same)


def test_perfect_prediction_passes_and_the_constant_fails():
    teacher = slow_video()
    perfect = study(teacher, teacher)
    assert set(answers_of(perfect).values()) == {"yes"} and len(perfect.answers) == 5
    said = verify_report.summary(perfect)
    assert said["quality"] == "Excellent" and said["skill_held_out"] == pytest.approx(1, abs=1e-5)
    constant = metrics.unit(teacher[~HELD_OUT].mean((0, 1)))
    flat = study(np.broadcast_to(constant, teacher.shape), teacher)
    assert "yes" not in answers_of(flat).values()
    said = verify_report.summary(flat)
    assert said["skill_held_out"] == pytest.approx(0, abs=1e-5)
    assert abs(mean_of(flat, "held_out", "learned")) < 0.1
    # The band of the raw cosine is what the constant deceives.
    assert said["quality"] in ("Good", "Moderate")


def test_time_blind_prediction_beats_the_constant_and_nothing_else():
    teacher = slow_video()
    by_position = np.broadcast_to(metrics.unit(teacher[~HELD_OUT].mean(0)), teacher.shape)
    result = study(by_position, teacher, source="interpolated")
    answers = answers_of(result)
    assert answers.pop("constant") == "yes" and "yes" not in answers.values()
    assert "beats a constant." in verify_report.verdict_sentence(result.answers)
    of_field = verify_report.verdict_words(dataclasses.replace(result, predictor="the field"))
    assert "network" not in of_field and "On held-out frames the field beats" in of_field
    assert "frames the field beats a constant." in " ".join(verify_report.report_text(
        dataclasses.replace(result, predictor="the field")).split())


def test_the_short_verdict_has_one_sentence_for_any_answers():
    start = "on held-out frames the network"
    for answers in itertools.product(("yes", "no", "cannot tell"), repeat=2):
        asked = dict(zip(("decoded", "neighbour"), answers))
        given = dict.fromkeys(verdict.QUESTIONS, "yes") | asked
        words = verify_report.short_verdict(given, start)
        assert len(words.split()) <= 35 and words.count(". ") == 0 and words.endswith(".")
    given = dict.fromkeys(verdict.QUESTIONS, "no")
    assert verify_report.short_verdict(given, start) == (
        "That is not shown: on held-out frames the network is no better than the teacher on the "
        "decoded frame or the nearest training frame (yes to 0 of 7 questions).")
    assert verify_report.short_verdict(given | {"decoded": "yes", "neighbour": "cannot tell"},
                                       start) == (
        "In part: on held-out frames the network beats the teacher on the decoded frame, but is "
        "not shown to beat the nearest training frame (yes to 1 of 7 questions).")
    assert "is not shown to beat the teacher on the decoded frame or the nearest training frame (" \
        in verify_report.short_verdict(dict.fromkeys(given, "cannot tell"), start)


def test_evidence_gives_the_error_beside_the_baselines():
    answer = verdict.Answer("constant", "yes", "mean", 0.61, 0.55, 0.67, 1e-5, 1e-5, False, 0.159,
                            27, 20.0)
    assert verify_report.answer_words(answer) == (
        "its error is 0.16 times the baseline's; net wins 0.61 [0.55, 0.67], p < 0.0001")
    score = dataclasses.replace(answer, test="when", error_ratio=np.nan)
    assert verify_report.answer_words(score).startswith("correlation of changes 0.61 [")


def test_every_question_is_claimed_and_denied():
    for question in verdict.QUESTIONS:
        assert verify_report.join_claims([question]).startswith(("beats ", "knows "))
    assert verify_report.join_denials(["constant", "when", "decoded"]) == (
        "does not know when things happen and is no better than a constant or the teacher on the "
        "decoded frame")


def test_random_is_near_zero_and_controls_fall_below_learned():
    teacher = slow_video(dim=512)
    result = study(teacher, teacher)
    assert abs(mean_of(result, "train", "random", "clip_similarity_mean")) < 0.02
    raw = {name: mean_of(result, "train", name, "clip_similarity_mean")
           for name in ("learned", *verdict.CONTROLS)}
    assert max(raw[name] for name in verdict.CONTROLS) < raw["learned"] - 0.1
    # A shuffle in time keeps the position, so it keeps more than a shuffle of pairs.
    assert raw["temporal"] > raw["shuffled"]


def test_controls_are_drawn_as_their_shuffles():
    teacher = slow_video(frames=12, patches=3)
    drawn = baselines.control_cosines(teacher, teacher, np.random.default_rng(0), 400)
    assert {x.shape for x in drawn.values()} == {(400, 12, 3)}
    similar = np.einsum("npd,mqd->npmq", teacher, teacher)
    apart = [similar[n, p, m, p] for n in range(12) for m in range(12) if n != m for p in range(3)]
    assert drawn["temporal"].mean() == pytest.approx(np.mean(apart), abs=0.01)
    assert drawn["random"].std() == pytest.approx(32 ** -0.5, rel=0.05)


def test_answers_do_not_depend_on_the_seed():
    teacher, predicted = slow_video(), metrics.unit(slow_video(seed=1) + slow_video())
    first, second = (study(predicted, teacher, seed=seed) for seed in (0, 1))
    pd.testing.assert_frame_equal(*(verdict.answer_table(x.answers) for x in (first, second)))
    np.testing.assert_allclose(first.improvements.p, second.improvements.p, atol=0.01)


def test_same_seed_same_numbers():
    teacher, predicted = slow_video(), unit_vectors((60, 4, 32), seed=1)
    pd.testing.assert_frame_equal(study(predicted, teacher, seed=3).table,
                                  study(predicted, teacher, seed=3).table)
    assert not study(predicted, teacher, seed=3).table.equals(study(predicted, teacher).table)


def test_report_names_what_was_measured():
    result = study(slow_video(seed=2), slow_video(), source="encoder", teacher_label="A (not CLIP)")
    text = verify_report.report_text(result)
    for words in ("Teacher: A (not CLIP)", "the model sees the frame", "Learned (Your Model)",
                  "shown but not trained on", "IMPROVEMENT ANALYSIS", "Improvement over random:",
                  "Overall Quality:", "gap"):
        assert words in text
    lines = text.splitlines()
    assert len(lines) <= 60 and any(line.startswith("On frames") for line in lines[:7])


def test_no_held_out_frames_gives_no_verdict():
    teacher = slow_video()
    result = verify_scores.verify_embeddings(teacher, teacher, np.arange(60), [])
    assert result.answers == [] and result.evidence is None
    assert set(result.table.split) == {"train"}
    assert "No verdict" in verify_report.report_text(result)


def bad_inputs():
    good = slow_video()
    nan = good.copy()
    nan[3, 1, 0] = np.nan
    yield "shapes", unit_vectors((59, 4, 32)), good, r"\(59, 4, 32\).*\(60, 4, 32\)"
    yield "teacher", unit_vectors((60, 4, 16)), good, r"16 values.*32.*different teachers"
    yield "nan", nan, good, "frame 3, patch 1"
    yield "no head", None, good, "predict_clip=True"
    yield "not unit", 2 * good, good, "length 2"
    yield "axes", good[0], good, r"\(4, 32\)"


@pytest.mark.parametrize("_, predicted, teacher, message", list(bad_inputs()))
def test_bad_arrays_are_refused(_, predicted, teacher, message):
    with pytest.raises(ValueError, match=message):
        study(predicted, teacher)


@pytest.mark.parametrize("train, held_out, message", [
    ([0], [1, 2], "1 training frames"),
    ([0, 1], [2], "1 held-out frames"),
    ([0, 1, 2], [2, 3], "frame 2 is in the training and the held-out part"),
    ([0, 1], [60, 61], "frames 0 to 59"),
    (np.ones(7, bool), [2, 3], r"shape \(7,\)"),
    ([0, 0, 1], [2, 3], "twice"),
    ([], [2, 3], "0 training frames"),
])
def test_bad_frames_are_refused(train, held_out, message):
    with pytest.raises(ValueError, match=message):
        verify_scores.verify_embeddings(slow_video(), slow_video(), train, held_out)


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match="interpolated"):
        study(slow_video(), slow_video(), source="magic")


def test_figures_name_the_teacher_and_the_source():
    from hnerv_clip.figures import verification as figures
    result = study(slow_video(seed=2), slow_video(), source="interpolated")
    for plot in (figures.plot_conditions, figures.plot_similarity_over_time):
        figure = plot(result.scores, "A (not CLIP)", result.source)
        words = " ".join(text.get_text() for text in figure.texts)
        assert "A (not CLIP)" in words and "interpolated" in words
    only_train = verify_scores.verify_embeddings(slow_video(), slow_video(), np.arange(60), [])
    figures.plot_conditions(only_train.scores, "A")
    figures.plot_similarity_over_time(only_train.scores, "A")


def test_a_table_with_nan_is_not_drawn():
    from hnerv_clip.figures import verification as figures
    broken = study(slow_video(), slow_video()).scores.copy()
    broken.loc[3, "clip_centred"] = np.nan
    for plot in (figures.plot_conditions, figures.plot_similarity_over_time):
        with pytest.raises(ValueError, match="clip_centred is NaN, first in the row .*'frame': 0"):
            plot(broken, "A (not CLIP)")


def test_other_baselines_join_the_study():
    teacher, predicted = slow_video(), slow_video(seed=3)
    held_out = np.flatnonzero(HELD_OUT)
    result = study(predicted, teacher, others={
        "Oracle": teacher, "Held-Out Only": (held_out, teacher[held_out])})
    assert mean_of(result, "held_out", "Oracle") == pytest.approx(1, abs=1e-5)
    assert (result.evidence.frames["wins_Oracle"] == -1).all()
    assert "Held-Out Only" not in set(result.table.condition[result.table.split == "train"])
    with pytest.raises(ValueError, match="choose another name"):
        study(predicted, teacher, others={"mean": teacher})
    with pytest.raises(ValueError, match=r"\(59, 4, 32\)"):
        study(predicted, teacher, others={"Short": teacher[1:]})


def test_holms_family_is_the_questions():
    teacher, predicted = slow_video(), metrics.unit(slow_video(seed=1) + slow_video())
    result = study(predicted, teacher, others={"Oracle": teacher})  # which no question asks about
    assert [x.p_holm for x in result.answers] == pytest.approx(
        list(time_series.holm([x.p for x in result.answers])))
    assert answers_of(result) == answers_of(study(predicted, teacher))
    assert set(answers_of(result)) == set(verdict.QUESTIONS) - {"side_file", "decoded"}


def test_improvements_by_hand():
    teacher, predicted = slow_video(), unit_vectors((60, 4, 32), seed=1)
    result = study(predicted, teacher)
    row = result.improvements.set_index(["split", "over"]).loc[("train", "position")]
    frames = result.scores[result.scores.split == "train"].pivot_table(
        index="frame", columns="condition", values="clip_similarity")
    found = time_series.mean_interval((frames.learned - frames.position).to_numpy())
    assert (row.clip_similarity, row.low, row.p) == pytest.approx(
        (found.mean, found.low, found.p), abs=1e-6)


def test_measures_carry_the_intervals_of_their_series():
    teacher, predicted = slow_video(), slow_video(seed=1)
    predicted = metrics.unit(predicted + teacher)
    result = study(predicted, teacher)
    rows = result.measures[result.measures.split == "train"].set_index(["condition", "measure"])
    frames = np.flatnonzero(~HELD_OUT)
    ranks = retrieval.retrieval_ranks(predicted[frames], teacher, frames)
    hits = (ranks["rank"].to_numpy().reshape(48, 4) <= 1).mean(1)
    expected = {"r1": time_series.mean_interval(hits), "median_rank": time_series.median_interval(
        ranks["rank"].to_numpy().reshape(48, 4)),
        "cka": time_series.smooth_interval(*cka.cka_without_frames(
            predicted[frames], teacher[frames]))}
    for measure, found in expected.items():
        row = rows.loc[("learned", measure)]
        assert (row.value, row.low, row.high) == pytest.approx((found.mean, found.low, found.high))
    constant = baselines.conditions(predicted, teacher, frames, frames,
                                   np.random.default_rng(0))["mean"]
    away, reference = (1 - metrics.cosine(x, teacher[frames]).mean(1)
                       for x in (predicted[frames], constant))
    found = time_series.smooth_interval(1 - away.sum() / reference.sum(), 1 - (
        away.sum() - away) / (reference.sum() - reference))
    row = rows.loc[("learned", "skill")]
    assert (row.value, row.low, row.high) == pytest.approx((found.mean, found.low, found.high))
    assert verify_report.summary(result)["skill_train"] == pytest.approx(found.mean)
    assert rows.chance["learned", "r1"] == 1 / 240


def test_words_are_ranked_and_given_as_scipy_and_labels_say():
    teacher, texts = slow_video(), unit_vectors((3, 32), seed=5)
    predicted = metrics.unit(slow_video(seed=1) + teacher)
    rows = study(predicted, teacher, texts=texts).measures.set_index(
        ["split", "condition", "measure"])
    frames, centre = np.flatnonzero(HELD_OUT), teacher[~HELD_OUT].mean((0, 1))
    own, right = (np.round(x[frames] @ texts.T, 5) for x in (predicted, teacher))  # [N, P, K]

    def correlation(keep):
        return np.mean([stats.spearmanr(own[keep, :, k], right[keep, :, k], axis=None)[0]
                        for k in range(3)])

    everything = np.arange(len(frames))
    found = time_series.smooth_interval(correlation(everything), np.array(
        [correlation(np.delete(everything, i)) for i in everything]))
    row = rows.loc["held_out", "learned", "text_rank"]
    assert (row.value, row.low, row.high) == pytest.approx(
        (found.mean, found.low, found.high), abs=1e-5)
    heads = [np.argsort(-x.reshape(-1, 3), axis=0)[:20] for x in (own, right)]
    row = rows.loc["held_out", "learned", "text_top20"]
    assert row.value == pytest.approx(np.mean([len(np.intersect1d(heads[0][:, k], heads[1][:, k]))
                                               / 20 for k in range(3)]))
    assert row.chance == 20 / 48 and np.isnan(row.low)
    labels = zero_shot.label_agreement(list("abc"), texts, predicted[frames], teacher[frames],
                                      centre=centre)
    row = rows.loc["held_out", "learned", "label_top1"]
    assert (row.value, row.chance) == pytest.approx((labels["agreement"], labels["chance"]))
    assert row.low < row.value < row.high and row.frames == 12


def test_words_of_the_teacher_itself_and_of_a_constant():
    teacher, texts = slow_video(), unit_vectors((3, 32), seed=5)
    rows = study(teacher, teacher, texts=texts).measures.set_index(
        ["split", "condition", "measure"])
    for split in ("train", "held_out"):
        assert rows.value[split, "learned"][["text_rank", "text_top20", "label_top1"]].tolist() \
            == pytest.approx([1, 1, 1])
        assert np.isnan(rows.value[split, "mean", "text_rank"])  # a constant ranks nothing,
        # and where all patches tie, as many as by chance are among the first
        assert rows.value[split, "mean", "text_top20"] == pytest.approx(
            rows.chance[split, "mean", "text_top20"])
    one = study(teacher, teacher, texts=texts[:1]).measures.set_index(
        ["split", "condition", "measure"])
    assert np.isnan(one.value["train", "learned", "label_top1"])  # one label tells nothing apart
    with pytest.raises(ValueError, match="32 values: encode them with the run's teacher"):
        study(teacher, teacher, texts=texts[:, :16])


def test_no_interval_where_frames_agree_or_are_few():
    teacher = slow_video()
    result = study(teacher, teacher)
    rows = result.measures.set_index(["split", "condition", "measure"])
    assert rows.value["train", "learned", "r1"] == 1
    assert np.isnan(rows.low["train", "learned", "r1"])
    assert np.isnan(rows.value["train", "mean", "cka"])  # a constant has no structure
    few = verify_scores.verify_embeddings(
        teacher, teacher, np.arange(50), np.arange(50, 55)).measures
    held_out = few[few.split == "held_out"]
    assert held_out.low.isna().all() and held_out[held_out.measure != "cka"].value.notna().all()
    table = verify_report.measure_table(result.measures, ("clip_centred", "r1"))
    assert list(table) == ["frames", "embeddings", "centred cosine", "R@1"]
    assert set(table.frames) == {"training frames", "held-out frames"}
    assert table["R@1"][0] == "1" and "[" in table["centred cosine"][3]
    many = result.measures.assign(value=1049.6, low=999.7, high=12.34)
    assert verify_report.measure_table(many, ["r1"])["R@1"][0] == "1050 [1000, 12.3]"


def test_few_held_out_frames_give_no_p_and_say_so():
    teacher = slow_video()
    result = verify_scores.verify_embeddings(teacher, teacher, np.arange(50), np.arange(50, 55))
    assert set(answers_of(result).values()) == {"cannot tell"}
    assert all(np.isnan(answer.p) for answer in result.answers)
    text = verify_report.report_text(result)
    assert "5 frames cannot tell" in text and "too few frames for a test" in text


def test_one_patch_has_no_spatial_shuffle():
    teacher = slow_video(patches=1)
    assert "spatial" not in set(study(teacher, teacher).table.condition)


def test_study_figures_draw_every_table():
    from hnerv_clip.figures import verification as figures
    result = study(slow_video(seed=2), slow_video(), source="coordinates",
                   others={"Held-Out Only": (np.flatnonzero(HELD_OUT), slow_video()[HELD_OUT])})
    drawn = [figures.plot_answers(verdict.answer_table(result.answers), "A (not CLIP)",
                                  result.source),
             figures.plot_retrieval(result.measures, "A (not CLIP)", result.source,
                                    candidates=result.candidates, near=result.near),
             figures.plot_side_files([{"size_bytes": 9000, "clip_centred": 0.5}], 8000, 0.4,
                                     "A (not CLIP)")]
    for figure in drawn:
        assert "A (not CLIP)" in " ".join(text.get_text() for text in figure.texts)


def test_no_p_depends_on_the_seed():
    """Answers rest on nothing drawn; those of the summary's controls on 200 draws."""
    teacher = slow_video()
    predicted = metrics.unit(teacher + 0.5 * slow_video(seed=1))
    first, *others = (study(predicted, teacher, seed=seed) for seed in range(4))
    for other in others:
        assert [answer.p for answer in other.answers] == [answer.p for answer in first.answers]
        assert np.abs(other.improvements.p - first.improvements.p).max() < 0.01


def test_frames_worth_fewer_than_two_get_no_interval():
    steady = np.linspace(0, 1, 12)
    values = steady[:, None] + 0.001 * np.random.default_rng(0).standard_normal((12, 2))
    row = verify_scores._measured("skill", 0.5, values, lambda: time_series.mean_interval(steady))
    assert np.isnan([row["low"], row["high"], row["standard_error"]]).all() and row["value"] == 0.5
    rng = np.random.default_rng(1)
    row = verify_scores._measured("skill", 0.5, values, lambda: time_series.mean_interval(
        rng.standard_normal(12)))
    assert row["low"] < row["high"]
