"""Search: worked rankings, comparison with scipy, heat maps, and bad input."""

import numpy as np
import pytest
import scipy.stats
import torch

from hnerv_clip import metrics, teachers
from hnerv_clip.inference import embed_frames, load_run
from hnerv_clip.model import build_model
from hnerv_clip.patches import PatchGrid
from hnerv_clip.search import maps
from hnerv_clip.search import rank as search


def unit_vectors(shape, seed=0):
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_ranking_by_hand():
    # Two frames of two patches in the plane, at 0, 30, 90 and 60 degrees from the query.
    angles = np.radians([[0, 30], [90, 60]])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    ranking = search.rank_patches(np.array([2, 0]), embeddings)
    assert ranking["rank"].tolist() == [1, 2, 3, 4]
    assert list(zip(ranking.frame, ranking.patch, strict=True)) == [(0, 0), (0, 1), (1, 1), (1, 0)]
    np.testing.assert_allclose(ranking.score, [1, 3 ** 0.5 / 2, 0.5, 0], atol=1e-6)
    assert len(search.rank_patches(np.array([2, 0]), embeddings, 3)) == 3


def test_own_embedding_is_found_first():
    embeddings = unit_vectors((9, 4, 16))
    best = search.rank_patches(embeddings[5, 2], embeddings, 1).iloc[0]
    assert (best.frame, best.patch) == (5, 2) and best.score == pytest.approx(1)


def test_apart_leaves_out_the_neighbours_of_a_hit():
    embeddings = np.zeros((10, 1, 2), np.float32)
    angles = np.radians([40, 30, 20, 5, 0, 6, 21, 31, 41, 50])
    embeddings[:, 0] = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    ranking = search.rank_patches(np.array([1, 0]), embeddings, 3, apart=2)
    assert ranking.frame.tolist() == [4, 1, 7]


def test_rank_correlation_equals_scipy_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 8, 30), rng.integers(0, 8, 30)
        assert metrics.rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b)[0])


def test_agreement_is_full_with_itself_and_by_chance_with_noise():
    teacher, queries = unit_vectors((50, 8, 64)), unit_vectors((40, 64), seed=1)
    names = [f"query {number}" for number in range(40)]
    same = search.compare_rankings(names, queries, teacher, teacher)
    assert same.spearman.to_numpy() == pytest.approx(1) and (same.overlap == 1).all()
    noise = search.compare_rankings(names, queries, unit_vectors((50, 8, 64), seed=2), teacher)
    assert abs(noise.spearman.mean()) < 0.05
    assert noise.overlap.mean() == pytest.approx(20 / 400, abs=0.03)
    assert noise.chance.iloc[0] == 20 / 400
    assert search.answer_words(same).startswith("**Yes: of the 20 patches that the teacher")
    assert search.answer_words(noise).startswith("**No: ")
    assert search.answer_words(noise.assign(overlap=0.3)).startswith("**In part: ")
    few = noise.assign(overlap=0.6)  # of few patches, chance finds many
    for chance, said in ((0.29, "Yes"), (0.3, "No"), (0.5, "No")):
        assert search.answer_words(few.assign(chance=chance)).startswith(f"**{said}: ")


@pytest.mark.parametrize("settings", [{}, {"clip_stage": "1_3", "clip_pool": 0.2}])
def test_a_score_map_is_that_of_the_dense_map_at_any_stride(
        small_config, small_dataset, settings, monkeypatch):
    model = build_model(small_config.replace(**settings).model, frame_hw=(80, 160), frame_count=12)
    vectors = unit_vectors((3, 1280), seed=1)
    with torch.inference_mode():
        frames = small_dataset.video.frames[:2].float() / 255
        stages = model.stages(model.embed(frames, torch.zeros(2)))
        dense = model.clip_map(stages).numpy()  # [B, D, H, W]
    everywhere = np.einsum("bdyx,kd->bkyx", dense, vectors)
    for stride, rows_at_once in ((1, 7), (8, 3), (80, 1)):
        kept = everywhere[:, :, stride // 2::stride, stride // 2::stride]
        monkeypatch.setattr(maps, "MAP_VALUES", rows_at_once * 2 * kept.shape[3] * 1280)
        found = maps.score_map(model, stages, 3 * vectors, stride=stride)
        assert found.dtype == np.float32 and found.shape == kept.shape
        np.testing.assert_allclose(found, kept, atol=1e-5)
    for stride in (0, 81):
        with pytest.raises(ValueError, match=f"stride={stride} must lie between 1 and .* 80"):
            maps.score_map(model, stages, vectors, stride=stride)
    with pytest.raises(ValueError, match=r"\(16,\).*1280 values"):
        maps.score_map(model, stages, np.ones((1, 16)))
    with torch.no_grad():
        model.clip_head[2].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        maps.score_map(model, stages, vectors)


def test_queries_are_parsed():
    assert teachers.parse_queries(" hare; wood rabbit;") == ["hare", "wood rabbit"]
    assert teachers.parse_queries(["hare"]) == ["hare"]


@pytest.mark.parametrize("queries, message", [
    ("", "empty"), ([], "empty"), ("hare;;fox", "empty"), ("  ", "empty"), ("hare; hare", "twice"),
    ([None], "empty")])
def test_bad_queries_are_refused(queries, message):
    with pytest.raises(ValueError, match=message):
        teachers.parse_queries(queries)


@pytest.mark.parametrize("query, options, message", [
    (None, {}, "empty"), (np.array([]), {}, "empty"), (np.ones(8), {}, r"\(8,\).*16 values"),
    (np.zeros(16), {}, "length 0"), (np.full(16, np.nan), {}, "length nan"),
    (np.ones(16), {"top_k": 0}, "top_k=0")])
def test_bad_query_vectors_are_refused(query, options, message):
    with pytest.raises(ValueError, match=message):
        search.rank_patches(query, unit_vectors((4, 2, 16)), **options)


def test_bad_embeddings_and_maps_are_refused():
    embeddings = unit_vectors((4, 2, 16))
    with pytest.raises(ValueError, match="predict_clip=True"):
        search.rank_patches(np.ones(16), None)
    for top_k in (0, 8, 20):
        with pytest.raises(ValueError, match=f"top_k={top_k} must lie between 1 and 7"):
            search.compare_rankings("a", np.ones((1, 16)), embeddings, embeddings, top_k)
    with pytest.raises(ValueError, match="2 queries come with 1"):
        search.compare_rankings("a; b", np.ones((1, 16)), embeddings, embeddings, 4)
    for few in (embeddings[:1, :1], embeddings[:1], embeddings[:2, :1]):  # at most 2 patches
        with pytest.raises(ValueError, match="cannot be compared, at least 3"):
            search.compare_rankings("a", np.ones((1, 16)), few, few, 1)


def test_scores_are_spread_by_hand():
    grid = PatchGrid(frame=(8, 24), size=(8, 8), tops=(0,), lefts=(0, 16))  # centres at 4 and 20
    found = maps.spread_scores([[0.0, 1.0], [2.0, 2.0]], grid, stride=4)
    assert found.shape == (2, 2, 6)  # columns at 2.5, 6.5 … 22.5
    np.testing.assert_allclose(found[0], [[0, 2.5 / 16, 6.5 / 16, 10.5 / 16, 14.5 / 16, 1]] * 2)
    np.testing.assert_allclose(found[1], 2)
    with pytest.raises(ValueError, match="one for each patch"):
        maps.spread_scores([[0.0, 1.0, 2.0]], grid)
    with pytest.raises(ValueError, match="stride=0 must lie between 1 and the frame's 8"):
        maps.spread_scores([[0.0, 1.0]], grid, stride=0)


def test_figures_name_query_and_teacher():
    from hnerv_clip.figures import search as figures
    frames = np.random.default_rng(0).integers(0, 255, (4, 3, 32, 64), dtype=np.uint8)
    boxes = np.array([[0, 0, 24, 24], [8, 40, 24, 24]])
    embeddings = unit_vectors((4, 2, 16))
    ranking = search.rank_patches(np.ones(16), embeddings, 3)
    agreement = search.compare_rankings("hare", np.ones((1, 16)), embeddings, embeddings, 4)
    found = {"hare": ranking.assign(video="bikes"), "fox": ranking.head(1).assign(video="bikes")}
    for figure in (
            figures.plot_index_hits(found, {"bikes": (frames, boxes)}, "A (not CLIP)"),
            figures.plot_ranked_patches(frames, boxes, ranking, ranking, "hare", "A (not CLIP)"),
            figures.plot_query_agreement(agreement, "A (not CLIP)")):
        assert any("A (not CLIP)" in text.get_text() for text in figure.texts)


def test_cut_takes_the_box():
    from hnerv_clip.figures.search import cut
    frame = np.arange(3 * 6 * 8).reshape(3, 6, 8)
    np.testing.assert_array_equal(cut(frame, (1, 2, 3, 4)), frame[:, 1:4, 2:6].transpose(1, 2, 0))


def test_similar_patches_leave_out_the_patch_itself():
    embeddings = unit_vectors((9, 4, 16))
    found = search.similar_patches(5, 2, embeddings)
    assert len(found) == 35 and found["rank"].tolist() == list(range(1, 36))
    assert not ((found.frame == 5) & (found.patch == 2)).any()
    ranking = search.rank_patches(embeddings[5, 2], embeddings)
    assert found.score.tolist() == ranking.score[1:].tolist()
    apart = search.similar_patches(5, 2, embeddings, 3, apart=2)
    assert not ((apart.frame - 5).abs().le(2) & (apart.patch == 2)).any()
    other = search.similar_patches(5, 2, embeddings, 1, within=embeddings[::-1])
    assert (other.frame[0], other.patch[0]) == (3, 2)
    with pytest.raises(ValueError, match="frame=9 must lie between 0 and 8"):
        search.similar_patches(9, 0, embeddings)


def test_relevancy_by_hand():
    embeddings = np.array([[[1.0, 0], [0, 1]]])
    found = search.relevancy([1, 0], [[0, 1]], embeddings, scale=2)
    expected = np.exp(2) / (np.exp(2) + 1)
    np.testing.assert_allclose(found, [[expected, 1 - expected]], rtol=1e-6)
    # Of several phrases, the one that the patch answers best counts.
    both = search.relevancy([1, 0], [[0, 1], [1, 0]], embeddings, scale=2)
    np.testing.assert_allclose(both, [[0.5, 1 - expected]], rtol=1e-6)
    with pytest.raises(ValueError, match="neutral phrase"):
        search.relevancy([1, 0], [], embeddings)


def test_relevancy_is_compared():
    # Two patches along the axes: the network mistakes the second for the first.
    axes = np.eye(2, dtype=np.float32)
    teacher, predicted = axes[None], np.stack([axes[0], axes[0]])[None]
    neutral = np.array([[0.8, 0.6]])  # cosine 0.8 with the first patch, 0.6 with the second
    found = search.compare_relevancy("first; second", axes, neutral, predicted, teacher)
    assert found.teacher.tolist() == [0.5, 0.5] and found.predicted.tolist() == [1, 0]
    assert found.both.tolist() == [0.5, 0] and found.agreement.tolist() == [0.5, 0.5]
    assert found.best_teacher[0] == pytest.approx(1 / (1 + np.exp(10 * (0.8 - 1))))


class Words:
    """A teacher of texts: the length of each, as an angle."""

    def __init__(self, is_clip):
        self.is_clip, self.label, self.heard = is_clip, "Words", []

    def encode_text(self, texts):
        self.heard += texts
        angles = torch.tensor([len(text) / 100 for text in texts])
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_only_clip_gets_prompts():
    clip, names = Words(True), Words(False)
    found = teachers.encode_queries("hare; fox", clip, templates=("a {}", "one {} here"))
    assert clip.heard == ["a hare", "a fox", "one hare here", "one fox here"]
    assert found[0] == pytest.approx([np.cos(0.095), np.sin(0.095)])  # the mean of 6 and 13
    teachers.encode_queries("hare; fox", names)
    assert names.heard == ["hare", "fox"]
    with pytest.raises(ValueError, match="no {} for the query"):
        teachers.encode_queries("hare", clip, templates=("a photo",))
    # To this teacher, words of one length are the same: a label set with a duplicate
    for teacher in (clip, names):
        with pytest.raises(ValueError, match="'fox' and 'cat' are the same to Words; name one"):
            teachers.encode_queries("hare; fox; cat", teacher)


def test_map_keeps_neighbours_together():
    rng = np.random.default_rng(0)
    centres = 5 * rng.standard_normal((4, 16))
    teacher = metrics.unit(centres + rng.standard_normal((40, 4, 16))).astype(np.float32)
    places = maps.map_embeddings(teacher, teacher, points=80, perplexity=10)
    own = places[places.kind == "teacher"]
    assert len(own) == 80 and set(own.frame) == set(range(0, 40, 2))
    middles = own.groupby("patch")[["x", "y"]].mean().to_numpy()
    nearest = np.linalg.norm(own[["x", "y"]].to_numpy()[:, None] - middles, axis=-1).argmin(1)
    assert (nearest == own.patch).mean() > 0.95
    with pytest.raises(ValueError, match="at least 4 patches"):
        maps.map_embeddings(teacher[:1, :2], teacher[:1, :2])


def test_a_match_is_a_standard_score_among_names():
    names, embeddings = unit_vectors((50, 16)), unit_vectors((3, 2, 16), 1)
    others = embeddings @ names.T
    found = search.match_scores(5 * names[7], names, embeddings)
    expected = (others[..., 7] - others.mean(-1)) / others.std(-1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        search.match_scores(names[7], names[:1], embeddings)


def test_a_map_of_matches_is_that_of_the_dense_embeddings(trained_run, cache_dir):
    run = load_run(trained_run, cache_dir=cache_dir, device="cpu")
    with torch.inference_mode():
        stages = run.model.stages(embed_frames(run.model, run.dataset, np.array([3, 5])))
        dense = run.model.clip_map(stages, stride=16).permute(0, 2, 3, 1).numpy()
    query, names = unit_vectors((1280,), 3), unit_vectors((40, 1280), 4)
    found = maps.match_map(run.model, stages, query, names, stride=16)
    np.testing.assert_allclose(found, search.match_scores(query, names, dense), atol=1e-3)


def test_strips_and_map_name_the_teacher():
    from hnerv_clip.figures import search as figures
    embeddings = unit_vectors((8, 2, 16))
    frames = np.zeros((8, 3, 16, 32), np.uint8)
    strips = {"hare": search.score_patches(np.ones(16), embeddings)}
    places = maps.map_embeddings(embeddings, embeddings)
    boxes = np.array([[0, 0, 12, 12], [4, 20, 12, 12]])
    for figure in (figures.plot_strips(strips, "A (not CLIP)", reference=strips),
                   figures.plot_strips(strips, "A (not CLIP)"),
                   figures.plot_embedding_map(places, frames, boxes, "A (not CLIP)")):
        assert any("A (not CLIP)" in text.get_text() for text in figure.texts)
