"""A run asked between its patches and anywhere: where that is, and three answers by hand."""

import numpy as np
import pytest
from test_verify import slow_video

from hnerv_clip import figures, inference, metrics
from hnerv_clip.config import Config
from hnerv_clip.patches import PatchGrid, make_grid
from hnerv_clip.verify import positions, time_series

GRID = PatchGrid(frame=(640, 1280), size=(448, 448), tops=(0, 192), lefts=(0, 277, 555, 832))


def test_halfway_grid_holds_the_given_one():
    dense = positions.halfway_grid(GRID)
    assert dense.tops == (0, 96, 192) and dense.lefts == (0, 139, 277, 416, 555, 693, 832)
    three = Config.from_params(patch_grid="3_7", teacher="efficientnet-lite0", clip_dim=1280)
    assert dense == make_grid(three.teacher, GRID.frame)
    one = PatchGrid(frame=(64, 64), size=(64, 64), tops=(0,), lefts=(0,))
    assert positions.halfway_grid(one) == one and positions.anywhere_grid(one) == one
    uneven = PatchGrid(frame=(64, 64), size=(20, 20), tops=(4,), lefts=(0, 10, 44))
    assert positions.halfway_grid(uneven).lefts == (0, 5, 10, 27, 44)


def test_anywhere_covers_evenly_and_meets_no_grid_of_the_study():
    grid = positions.anywhere_grid(GRID)
    assert len(grid) == 32 and set(np.diff(grid.tops)) == {48} and grid.tops[0] == 24
    assert set(np.diff(grid.lefts)) == {104} and grid.lefts[0] == 52
    for _ in range(3):
        grids = (GRID, positions.halfway_grid(GRID),
                 positions.halfway_grid(positions.halfway_grid(GRID)))
        assert not any({*grid.tops} & {*g.tops} or {*grid.lefts} & {*g.lefts} for g in grids)


def test_places_are_interpolated_by_hand():
    taught = PatchGrid(frame=(8, 24), size=(4, 4), tops=(0, 4), lefts=(0, 8, 20))
    wanted = PatchGrid(frame=(8, 24), size=(4, 4), tops=(1,), lefts=(8, 11))
    own = slow_video(5, 6)
    found = positions.interpolate_positions(own, taught, wanted)
    left = 0.75 * own[:, 1] + 0.25 * own[:, 4]
    right = 0.75 * own[:, 2] + 0.25 * own[:, 5]
    np.testing.assert_allclose(found[:, 0], metrics.unit(left), atol=1e-6)
    np.testing.assert_allclose(found[:, 1], metrics.unit(0.75 * left + 0.25 * right),
                               atol=1e-6)


def test_positions_by_hand():
    """One row of two patches and the one between: three answers, their means and intervals."""
    taught = PatchGrid(frame=(8, 24), size=(8, 8), tops=(0,), lefts=(0, 16))
    grids = positions.position_grids(taught)
    dense, anywhere = grids["between"][0], grids["anywhere"][0]
    teacher, predicted = slow_video(20, 3), slow_video(20, 3, seed=1)
    other = slow_video(20, len(anywhere), seed=2)
    places = positions.join_positions({dense: (predicted, teacher), anywhere: (other, other)},
                                   grids, taught)
    scores = positions.score_positions(places, np.arange(15))
    assert len(scores) == 3 * 20 * (3 + len(anywhere))
    between = scores[scores["where"] == "between"]
    assert set(between.x) == {12} and set(between.y) == {4}
    for answer, expected in [
            ("network", predicted[:, 1]),
            ("own_places", metrics.unit(predicted[:, 0] + predicted[:, 2])),
            ("teacher_places", metrics.unit(teacher[:, 0] + teacher[:, 2]))]:
        found = between[between.answer == answer].clip_similarity
        np.testing.assert_allclose(found, (expected * teacher[:, 1]).sum(-1), atol=1e-6)
    centre = teacher[:15][:, [0, 2]].mean((0, 1))
    expected = metrics.centred_cosine(predicted[:, 1], teacher[:, 1], centre)
    np.testing.assert_allclose(between[between.answer == "network"].clip_centred, expected,
                               rtol=1e-5)
    means = scores.groupby(["where", "answer"]).clip_similarity.mean()
    assert means["supervised", "network"] == pytest.approx(means["supervised", "own_places"])
    assert means["supervised", "teacher_places"] == pytest.approx(1)
    assert means["anywhere", "network"] == pytest.approx(1) != means["anywhere", "own_places"]

    table = positions.summarise_positions(scores.assign(source="coordinates"))
    row = table.set_index(["split", "where", "answer"]).loc[("train", "between", "network")]
    series = between[(between.answer == "network") & (between.split == "train")].clip_centred
    found = time_series.mean_interval(series.to_numpy())
    assert (row.clip_centred, row.low, row.high) == pytest.approx(
        (found.mean, found.low, found.high))
    assert (row.frames, row.positions) == (15, 1)
    short = table.set_index(["split", "where", "answer"]).loc[("held_out", "between", "network")]
    assert np.isnan(short.low) and short.frames == 5


def test_a_run_is_asked_between_its_patches(trained_run, cache_dir):
    run = inference.load_run(trained_run, cache_dir=cache_dir)
    scores = positions.position_scores(run, cache_dir=cache_dir, device="cpu", progress=False)
    assert set(scores.source) == {"interpolated"} and len(scores) == 3 * 12 * (21 + 32)
    own = inference.predict_embeddings(run.model, run.dataset, source="interpolated")
    there = scores[(scores["where"] == "supervised") & (scores.answer == "network")]
    expected = metrics.cosine(own, run.dataset.embeddings)
    np.testing.assert_allclose(there.clip_similarity.to_numpy().reshape(12, 8), expected,
                               atol=2e-5)
    table = positions.summarise_positions(scores)
    assert len(table) == 2 * 3 * 3
    figure = figures.plot_positions(scores, "A (not CLIP)", "interpolated")
    assert any("A (not CLIP)" in text.get_text() for text in figure.texts)
