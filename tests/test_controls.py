"""Controls, baselines and measures: worked values, references, known answers."""

import numpy as np
import pytest

from hnerv_clip import metrics
from hnerv_clip.verify import baselines, cka, side_file, simulation, time_series
from hnerv_clip.verify.cka import debiased_cka
from hnerv_clip.verify.retrieval import retrieval_ranks, retrieval_summary
from hnerv_clip.verify.zero_shot import label_agreement


def unit_vectors(shape, seed=0):
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_spatial_shuffle_stays_in_the_frame():
    embeddings = np.arange(5 * 4, dtype=np.float32).reshape(5, 4, 1)
    moved = baselines.shuffle_space(embeddings, np.random.default_rng(0))
    assert (moved != embeddings).all()
    np.testing.assert_array_equal(np.sort(moved[..., 0]), embeddings[..., 0])
    with pytest.raises(ValueError, match="at least 2 patches"):
        baselines.shuffle_space(embeddings[:, :1], np.random.default_rng(0))


def test_interpolation_by_hand():
    # One patch, turning by 10 degrees a frame; frames 0, 1, 4 train.
    angles = np.radians([0, 10, 77, 77, 40])
    teacher = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, None].astype(np.float32)
    found = baselines.interpolate_teacher(teacher, [0, 1, 4], [1, 2, 3, 4, 0])[:, 0]
    between = [teacher[0] * 3 / 4 + teacher[4] / 4, teacher[1] * 2 / 3 + teacher[4] / 3,
               teacher[1] / 3 + teacher[4] * 2 / 3, teacher[1], teacher[1]]
    np.testing.assert_allclose(found, metrics.unit(np.array(between))[:, 0], atol=1e-6)


def slow_embeddings(frames=40, patches=4, dim=48):
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.standard_normal((frames, patches, 5)) * 0.2, axis=0)
    vectors = path @ rng.standard_normal((5, dim)) + rng.standard_normal(dim)
    return metrics.unit(vectors).astype(np.float32)


def test_side_file_keeps_its_budget_and_decodes_from_its_bytes_alone():
    embeddings = slow_embeddings()
    quality = []
    for budget in (400, 1000, 4000):
        stored = side_file.write_side_file(embeddings, budget)
        assert stored.size_bytes == len(stored.data) <= budget
        np.testing.assert_array_equal(side_file.read_side_file(stored.data), stored.embeddings)
        quality.append(metrics.cosine(stored.embeddings, embeddings).mean())
    assert quality == sorted(quality) and quality[-1] > 0.999


def test_side_file_of_training_frames_answers_for_all():
    embeddings, train = slow_embeddings(), np.flatnonzero(np.arange(40) % 5 != 4)
    hidden = embeddings.copy()
    hidden[4::5] = np.nan  # held-out frames must not be read
    stored, answers = side_file.store_embeddings(hidden, train, 4000)
    np.testing.assert_array_equal(answers[train], stored.embeddings)
    assert metrics.cosine(answers, embeddings)[4::5].min() > 0.9


def test_side_file_says_what_is_wrong():
    with pytest.raises(ValueError, match="50 bytes does not hold the mean"):
        side_file.write_side_file(slow_embeddings(), 50)
    with pytest.raises(ValueError, match="not a side file"):
        side_file.read_side_file(b"PK\x03\x04 and so on")


def test_retrieval_by_hand():
    # Four frames of one patch at 0, 10, 20 and 90 degrees.
    angles = np.radians([0, 10, 20, 90])
    teacher = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, None].astype(np.float32)
    asked = np.radians([[9], [100]])
    answers = np.stack([np.cos(asked), np.sin(asked)], axis=-1).astype(np.float32)
    found = retrieval_ranks(answers, teacher, np.array([0, 2]), near=1)
    # 9 degrees for frame 0: nearest is frame 1 (near), then 0. 100 for frame 2: 90 (frame 3), 20.
    assert found["rank"].tolist() == [2, 2] and found.rank_near.tolist() == [1, 1]
    assert found.right.tolist() == [2, 3] and found.candidates.tolist() == [4, 4]
    summary = retrieval_summary(found)
    assert (summary["r1"], summary["r5"], summary["median_rank"]) == (0, 1, 2)
    assert summary["r1_chance"] == 1 / 4
    assert summary["r1_near_chance"] == pytest.approx((2 / 4 + 3 / 4) / 2)


def test_retrieval_of_the_truth_and_of_nothing():
    teacher, frames = unit_vectors((30, 4, 16)), np.arange(30)
    assert retrieval_summary(retrieval_ranks(teacher, teacher, frames))["r1"] == 1
    noise = retrieval_summary(retrieval_ranks(unit_vectors((30, 4, 16), 1), teacher, frames))
    assert noise["median_rank"] == pytest.approx(60, abs=20)
    # An answer that likes all candidates alike has the middle rank, not the first.
    flat = retrieval_ranks(np.zeros_like(teacher), teacher, frames)
    assert (flat["rank"] == 60.5).all()


def test_cka_equals_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((12, 5)), rng.standard_normal((12, 7))
    a[:, 0] += b[:, 0]

    def hsic(x, y):
        n = len(x)
        k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        one = np.ones(n)
        return (np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
                - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    expected = hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))
    assert debiased_cka(a, b) == pytest.approx(expected)


def test_cka_is_blind_to_rotation_and_unbiased_for_unrelated_sets():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((30, 40))
    rotation = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    assert debiased_cka(a, 3 * a @ rotation + 1) == pytest.approx(1)
    unrelated = [debiased_cka(*rng.standard_normal((2, 30, 40))) for _ in range(200)]
    assert abs(np.mean(unrelated)) < 0.03
    with pytest.raises(ValueError, match="at least 4"):
        debiased_cka(a[:3], a[:3])
    with pytest.raises(ValueError, match="does not vary"):
        debiased_cka(np.ones((9, 3)), a[:9])


def test_cka_without_frames_equals_leaving_them_out():
    a, b = unit_vectors((9, 3, 6)), unit_vectors((9, 3, 6), seed=1)
    b = metrics.unit(a + b)
    value, without = cka.cka_without_frames(a, b)
    assert value == pytest.approx(debiased_cka(a.reshape(27, 6), b.reshape(27, 6)))
    for frame in range(9):
        left = [np.delete(x, frame, axis=0).reshape(24, 6) for x in (a, b)]
        assert without[frame] == pytest.approx(debiased_cka(*left))


def test_cka_without_the_only_frame_that_varies_is_undefined():
    a = np.repeat(unit_vectors((1, 3, 6)), 9, axis=0)
    a[:, 1:] = a[:, :1]
    a[4] = unit_vectors((3, 6), seed=2)
    value, without = cka.cka_without_frames(a, unit_vectors((9, 3, 6), seed=1))
    assert np.isfinite(value) and np.flatnonzero(np.isnan(without)).tolist() == [4]
    with pytest.raises(ValueError, match="does not vary"):
        cka.cka_without_frames(np.ones((9, 3, 6)), a)


def test_interval_of_cka_covers_it():
    """Against the CKA of far more data of the same kind."""
    rng = np.random.default_rng(0)

    def made(frames):
        common, own = np.moveaxis(simulation.autoregression(rng, (frames, 2, 24), 0.5), 1, 0)
        return [x.reshape(frames, 3, 8) for x in (common, common + 0.7 * own)]

    truth = debiased_cka(*(x.reshape(-1, 8) for x in made(20000)))
    found = [time_series.smooth_interval(*cka.cka_without_frames(*made(60)))
             for _ in range(100)]
    assert 0.88 < np.mean([x.low <= truth <= x.high for x in found]) <= 0.99


def test_labels_by_hand():
    # Two labels along the axes; the teacher says a, a, b and the network a, b, b.
    a, b = [1.0, 0.0], [0.0, 1.0]
    found = label_agreement(["a", "b"], np.array([a, b]), np.array([[a], [b], [b]]),
                            np.array([[a], [a], [b]]))
    assert found["agreement"] == pytest.approx(2 / 3)
    assert found["chance"] == pytest.approx(2 / 3 * 1 / 3 + 1 / 3 * 2 / 3)
    assert found["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    assert found["table"].found.tolist() == [0.5, 1]


@pytest.mark.parametrize("labels, message", [
    (["a", "a"], "twice"), (["a"], "at least 2"), (["a", " "], "none of them empty"),
    (["a", "b", "c"], "3 labels of 2 values")])
def test_bad_label_sets_are_refused(labels, message):
    ones = np.ones((2, 1, 2)) / 2 ** 0.5
    with pytest.raises(ValueError, match=message):
        label_agreement(labels, np.eye(2), ones, ones)


def test_mean_energy_and_frame_similarity_by_hand():
    embeddings = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # 2 frames, 1 patch, orthogonal
    assert metrics.mean_energy(embeddings) == pytest.approx(0.5)
    np.testing.assert_allclose(metrics.frame_similarity(embeddings), np.eye(2))
    np.testing.assert_allclose(metrics.frame_similarity(embeddings, centred=True),
                               [[1, -1], [-1, 1]])


def test_similarity_by_lag_by_hand():
    similarity = np.array([[1.0, 0.5, 0.1, 0.0], [0.5, 1.0, 0.7, 0.2],
                           [0.1, 0.7, 1.0, 0.9], [0.0, 0.2, 0.9, 1.0]])
    np.testing.assert_allclose(metrics.similarity_by_lag(similarity), [1.0, 0.7])
    assert metrics.similarity_by_lag(np.ones((1, 1))).tolist() == [1.0]


def test_structure_says_what_a_constant_and_a_neighbour_score(small_dataset):
    embeddings = small_dataset.embeddings.numpy()
    structure = metrics.describe_structure(small_dataset.embeddings)
    constant = metrics.unit(embeddings.mean((0, 1)))
    assert structure.constant_cosine == pytest.approx((embeddings @ constant).mean(), abs=1e-5)
    neighbours = (embeddings[1:] * embeddings[:-1]).sum(-1).mean()
    assert structure.neighbour_cosine == pytest.approx(neighbours, abs=1e-5)
    assert structure.centred_by_lag[1] < structure.raw_by_lag[1] < 1
