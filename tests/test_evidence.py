"""What held-out frames say, and what follows: by hand, and its errors on simulated data."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hnerv_clip.config import Split
from hnerv_clip.metrics import unit
from hnerv_clip.verify import evidence, simulation, verdict
from hnerv_clip.video import split_frames


def test_net_wins_by_hand():
    own, other = np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([[0.2, 0.1, 0.3, 0.9]])
    assert evidence.net_wins(own, other).tolist() == [0.25]  # two won, one lost, one equal
    assert evidence.net_wins(other, own).tolist() == [-0.25]


def moving(frames=40, patches=3, size=8, seed=0):
    return np.random.default_rng(seed).standard_normal((frames, patches, size)).cumsum(axis=0)


def test_changes_are_blind_to_constants_and_trends():
    series = moving()
    time = np.linspace(0, 1, 40)[:, None, None]
    rng = np.random.default_rng(1)
    constant, line, curve = rng.standard_normal((3, 3, 8))
    plain = evidence.change_matrices(series, series)
    moved = evidence.change_matrices(series + 5 * constant + 9 * line * time
                                     + 9 * curve * time ** 2, series)
    for one, other in zip(plain, moved):
        np.testing.assert_allclose(one, other, atol=1e-9)
    assert np.diag(plain[0]) == pytest.approx(1)


def test_where_is_when_less_the_other_places_by_hand():
    own, right = moving(), moving(seed=2)
    when, where = evidence.change_matrices(own, right)
    u, v = (evidence._unit_changes(x) for x in (own, right))
    products = np.einsum("kid,ljd->klij", u, v)
    same = np.einsum("klii->kl", products)
    np.testing.assert_allclose(when, same)
    np.testing.assert_allclose(where, same - (products.sum((2, 3)) - same) / 2)
    assert not evidence.change_matrices(own[:, :1], right[:, :1])[1].any()


def test_the_diagonal_is_compared_with_other_diagonals():
    matrix = np.random.default_rng(0).standard_normal((30, 30))
    aligned = evidence.diagonal_test(matrix + 2 * np.eye(30))
    assert aligned.estimate == pytest.approx(2, abs=0.5) and aligned.t > 5 and aligned.freedom == 28
    assert abs(evidence.diagonal_test(matrix).t) < 3
    # Sums along diagonals of a matrix that is smooth along them vary more
    smooth = sum(np.roll(matrix, (k, k), (0, 1)) for k in range(4)) / 2
    assert evidence.diagonal_test(smooth).standard_error \
        > 1.4 * evidence.diagonal_test(matrix).standard_error


def one_run(phase, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    teacher = unit(moving(60, 4, 16) + 5)
    split = split_frames(60, Split(4, 5, 5), phase)
    answers = {"learned": unit(teacher + noise * rng.standard_normal(teacher.shape))[split.val],
               "mean": np.broadcast_to(unit(teacher[split.train].mean((0, 1))),
                                       teacher[split.val].shape)}
    return evidence.collect_evidence(answers, teacher[split.val], split.val)


def test_phases_are_pooled_to_the_whole_video_and_seeds_to_their_mean():
    pooled = evidence.pool_evidence([one_run(phase) for phase in range(5)])
    assert pooled.frames.frame.tolist() == list(range(60)) and len(pooled.knows) == 10
    (when,) = [x for x in verdict.judge(pooled) if x.question == "when"]
    assert when.answer == "yes" and when.frames == 60
    runs = [one_run(0, seed=seed, noise=0.1) for seed in (1, 2)]
    both = evidence.pool_evidence(runs)
    expected = (runs[0].frames.error_learned + runs[1].frames.error_learned) / 2
    assert both.frames.error_learned.tolist() == pytest.approx(expected.tolist())
    # The standard error of dependent runs is not lowered by their number
    twice = verdict.judge(evidence.pool_evidence([runs[0], runs[0]]))
    assert [x.p for x in twice] == pytest.approx([x.p for x in verdict.judge(runs[0])])
    with pytest.raises(ValueError, match="different baselines"):
        evidence.pool_evidence([runs[0], evidence.Evidence(
            runs[0].frames.drop(columns="wins_mean"), runs[0].knows)])
    with pytest.raises(ValueError, match="no run"):
        evidence.pool_evidence([])


def made(wins, **errors):
    frames = pd.DataFrame({"frame": range(len(wins)), "error_learned": 0.1, "error_mean": 0.2,
                           "wins_mean": wins} | errors)
    return evidence.Evidence(frames, pd.DataFrame(columns=["test"]))


def test_three_answers():
    rng = np.random.default_rng(0)

    def answer(*args, **errors):
        return verdict.judge(made(*args, **errors))[0]

    assert answer(np.ones(26)).answer == "yes"
    assert answer(np.zeros(26)).answer == "no"
    assert answer(rng.choice([-0.05, 0.05], 400)).equivalent
    assert answer(rng.choice([-1.0, 1.0], 12)).answer == "cannot tell"
    assert answer(np.ones(26), error_mean=0.05).answer == "no" \
        or answer(np.ones(26), error_mean=0.05).answer == "cannot tell"
    few = answer(np.ones(7))
    assert few.answer == "cannot tell" and np.isnan(few.p)
    # All won, but of few: one more might have been lost
    assert 0 < answer(np.ones(8)).p < 0.05 and answer(np.ones(26)).p < answer(np.ones(8)).p


@pytest.mark.parametrize("planted", ["perfect", "noise 0.25"])
@pytest.mark.parametrize("design", simulation.DESIGNS)
def test_planted_truths_are_accepted(planted, design):
    found = simulation.simulate_planted(planted, design, datasets=20)
    truths = found[found.kind == "truth"]
    assert {"constant", "when", "where"} <= set(truths.question)
    assert (truths.yes >= 0.9).all(), truths


@pytest.mark.parametrize("planted", [name for name in simulation.PLANTED
                                     if name not in simulation.TRUTHS])
def test_planted_nulls_are_not(planted):
    found = simulation.simulate_planted(planted, "one run", datasets=40)
    nulls = found[found.kind == "null"]
    assert len(nulls) and (nulls.rejected <= 0.2).all() and (nulls.yes <= 0.1).all(), nulls


@pytest.mark.parametrize("planted, rho", [("equal", 0.97), ("equal", 0.9), ("noise 0.25", 0.9)])
def test_a_small_change_of_the_predictions_changes_no_answer(planted, rho):
    """Noise of a thousandth: one answer in 350 may stand where it turns."""
    rng, changes = np.random.default_rng(0), np.random.default_rng(1)
    design = simulation.DESIGNS["quick"]
    split = split_frames(design.frames, design.split, 0)
    predicted, teacher, decoded = simulation.plant(rng, planted, frames=design.frames, datasets=50,
                                                   rho=rho)
    noise = changes.standard_normal(predicted.shape) / predicted.shape[-1] ** 0.5
    answers = [[answer for found in simulation.made_evidence(
        x, teacher, decoded, split.train, split.val, np.random.default_rng(2))
        for answer in verdict.judge(found)] for x in (predicted, unit(predicted + 1e-3 * noise))]
    pairs = list(zip(*answers))
    assert sum(one.answer != other.answer for one, other in pairs) <= 1
    assert max(abs(one.p - other.p) for one, other in pairs) < 0.08


def test_parts_of_a_simulation_join_to_their_mean():
    parts = [simulation.simulate_planted("equal", "quick", datasets=n, seed=n) for n in (2, 6)]
    joined = simulation.join_parts(parts)
    assert list(joined) == list(parts[0]) and (joined.datasets == 8).all()
    assert joined.yes.tolist() == pytest.approx(
        ((parts[0].yes * 2 + parts[1].yes * 6) / 8).tolist())
    intervals = simulation.join_parts([simulation.simulate_interval(
        datasets=10, designs=("quick",), rhos=(0.5,), seed=seed) for seed in (0, 1)])
    assert intervals.datasets.tolist() == [20, 20]


def test_calibration_is_written_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "PLANTED", {"perfect": "", "equal": ""})
    monkeypatch.setattr(simulation, "DESIGNS", {"quick": simulation.DESIGNS["quick"]})
    path = tmp_path / "found.json"
    simulation.calibrate(str(path), datasets=3, part=2, processes=1)
    tables = simulation.read_calibration(str(path))
    assert tables["planted"].datasets.unique().tolist() == [3]
    assert tables["intervals"].datasets.unique().tolist() == [6]
    assert tables["intervals"].series.tolist() == ["autoregression"] * 4 + ["net wins"] * 4
    assert tables["made"].datasets.tolist() == [3]
    path.unlink()
    simulation.calibrate(str(path), datasets=3, part=2, processes=1, limit_s=-1)
    assert not path.exists()


def by_chance(share, datasets, cells):
    """The share that so many data sets give at most, in one of so many cells once in a thousand."""
    return stats.binom.isf(1e-3 / cells, datasets, share) / datasets


@pytest.mark.slow
def test_errors_are_as_promised():
    """A tenth of the published table's data sets, with the tolerance that chance asks for."""
    found = simulation.simulate_all(datasets=100)
    nulls, truths = found[found.kind == "null"], found[found.kind == "truth"]
    assert (nulls.yes <= by_chance(0.05, 100, len(nulls))).all() and nulls.yes.mean() < 0.02
    assert (nulls.rejected <= by_chance(0.05, 100, len(nulls))).all()
    assert nulls.rejected.mean() < 0.04
    assert (1 - truths.yes <= by_chance(0.05, 100, len(truths))).all() and truths.yes.mean() > 0.98


@pytest.mark.slow
def test_intervals_cover():
    found = simulation.simulate_interval(datasets=600)
    assert (1 - found.covered <= by_chance(0.05, 600, len(found))).all()


def test_made_data_are_drawn_anew_and_alike_by_seed():
    rng = [np.random.default_rng(0) for _ in range(2)]
    first, second = (simulation.plant(x, "rolled", frames=20, datasets=2, rho=0.5) for x in rng)
    for one, other in zip(first, second):
        np.testing.assert_array_equal(one, other)
        assert np.linalg.norm(one, axis=-1) == pytest.approx(1)
