"""The index over many videos: exact where it should be, fast where it must be, and bad input."""

import json
import time

import numpy as np
import pandas as pd
import pytest

from hnerv_clip import files, inference, metrics
from hnerv_clip.config import Config
from hnerv_clip.files import RunError
from hnerv_clip.search import rank as search

pytest.importorskip("faiss")
from hnerv_clip.search.index import _sample, build_index, index_runs, load_index  # noqa: E402


def drifting(videos, frames, patches, dim, seed=0):
    """Unit vectors that change slowly over the frames of each video: [videos, T, P, D]."""
    rng = np.random.default_rng(seed)
    steps = 0.15 * rng.standard_normal((videos, frames, patches, dim), dtype=np.float32)
    start = rng.standard_normal((videos, 1, patches, dim), dtype=np.float32)
    return metrics.unit(start + np.cumsum(steps, axis=1))


def test_search_over_videos_of_different_shapes_equals_ranking_each():
    first, second = drifting(1, 7, 4, 16)[0], drifting(1, 5, 8, 16, seed=1)[0]
    index = build_index({"bunny": first, "bikes": second}, teacher="t")
    query = np.random.default_rng(2).standard_normal(16)
    found = index.search(query, 1000)
    assert len(found) == len(index) == 7 * 4 + 5 * 8
    for name, embeddings in (("bunny", first), ("bikes", second)):
        own = found[found.video == name].reset_index(drop=True)
        expected = search.rank_patches(query, embeddings)
        assert own[["frame", "patch"]].equals(expected[["frame", "patch"]])
        np.testing.assert_allclose(own.score, expected.score, atol=1e-6)


def test_saved_and_loaded_it_finds_the_same(tmp_path):
    index = build_index({"a": drifting(1, 9, 4, 16)[0]}, teacher="t")
    loaded = load_index(index.save(tmp_path / "index"))
    query = np.ones(16)
    assert loaded.search(query, 5).equals(index.search(query, 5)) and loaded.teacher == "t"


@pytest.mark.parametrize("exact", [True, False])
def test_the_vectors_of_hits_are_given(tmp_path, exact):
    videos = {"first": drifting(1, 40, 8, 32)[0], "other": drifting(1, 30, 5, 32, seed=1)[0]}
    build_index(videos, teacher="t", exact=exact).save(tmp_path)
    index = load_index(tmp_path)
    hits = index.search(videos["other"][3, 2], 5)
    own = [videos[hit.video][hit.frame, hit.patch] for hit in hits.itertuples()]
    np.testing.assert_allclose(index.embeddings(hits), own, atol=1e-6 if exact else 0.02)
    assert hits.video[0] == "other"


def test_cells_find_nearly_all_that_is_near():
    videos = {f"v{number}": video for number, video in enumerate(drifting(40, 50, 8, 32))}
    exact, cells = (build_index(videos, teacher="t", exact=exact) for exact in (True, False))
    shared = []
    for name in list(videos)[:20]:
        query = videos[name][25, 3] + 0.05
        near, found = exact.search(query, 10), cells.search(query, 10)
        shared.append(len(near.merge(found, on=["video", "frame", "patch"])) / 10)
        assert (found.video[0], found.patch[0]) == (near.video[0], near.patch[0])
    assert np.mean(shared) > 0.9


def test_apart_keeps_one_of_a_still_moment():
    videos = dict(zip("ab", drifting(2, 30, 3, 16)))
    index = build_index(videos, teacher="t")
    query = videos["a"][12, 1]
    found = index.search(query, 8, apart=4)
    assert found["rank"].tolist() == list(range(1, 9))
    assert found.loc[0, ["video", "frame", "patch"]].tolist() == ["a", 12, 1]
    for _, hits in found.groupby(["video", "patch"]):
        assert (np.diff(np.sort(hits.frame)) > 4).all()
    # As ranking each video alone, and putting the two together
    alone = pd.concat([search.rank_patches(query, embeddings, apart=4).assign(video=name)
                       for name, embeddings in videos.items()]).sort_values(
                           "score", ascending=False, ignore_index=True)
    assert found[["video", "frame", "patch"]].equals(alone[["video", "frame", "patch"]].head(8))
    assert len(index.search(query, 1000, apart=40)) == 6  # one of each position


def test_cells_are_learned_from_all_videos():
    videos = [drifting(1, frames, patches, 8)[0] for frames, patches in ((5, 2), (7, 4), (1, 1))]
    flat = np.concatenate([video.reshape(-1, 8) for video in videos])
    for count in (3, 20, 1000):
        chosen = np.sort(np.random.default_rng(0).permutation(len(flat))[:count])
        np.testing.assert_array_equal(_sample(videos, count), flat[chosen])


@pytest.mark.slow
@pytest.mark.parametrize("kind, least", [("patch", 0.95), ("text", 0.8)])
def test_a_million_patches_are_searched_fast_and_well(million, kind, least):
    """Texts are not of the patches' kind, but as far from all of them as a random direction."""
    vectors, index, exact = million
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((100, 64), dtype=np.float32)
    picks = rng.integers(0, (2500, 50, 8), (100, 3)).T
    queries = noise if kind == "text" else vectors[tuple(picks)] + 0.05 * noise
    start = time.perf_counter()
    found = [index.search(query, 10) for query in queries]
    per_query_s = (time.perf_counter() - start) / len(queries)
    shared = [len(exact.search(query, 10).merge(own, on=["video", "frame", "patch"])) / 10
              for query, own in zip(queries, found)]
    print(f"{len(index)} vectors, {kind} queries: {1e3 * per_query_s:.1f} ms each, recall "
          f"{np.mean(shared):.3f}")
    assert len(index) == 1_000_000 and per_query_s < 0.05 and np.mean(shared) > least


@pytest.fixture(scope="module")
def million():
    vectors = drifting(2500, 50, 8, 64)
    vectors = metrics.unit(vectors + vectors[0, 0, 0])  # a part that all share, as CLIP has
    videos = {f"v{number}": video for number, video in enumerate(vectors)}
    return vectors, *(build_index(videos, teacher="t", exact=exact) for exact in (None, True))


def test_bad_input_is_refused(tmp_path):
    good = drifting(1, 4, 2, 16)[0]
    with pytest.raises(ValueError, match="no videos"):
        build_index({}, teacher="t")
    with pytest.raises(ValueError, match="different teachers"):
        build_index({"a": good, "b": drifting(1, 4, 2, 8)[0]}, teacher="t")
    with pytest.raises(ValueError, match="predict_clip=True"):
        build_index({"a": None}, teacher="t")
    index = build_index({"a": good}, teacher="t")
    with pytest.raises(ValueError, match=r"\(8,\).*16 values"):
        index.search(np.ones(8))
    with pytest.raises(ValueError, match="top_k=0"):
        index.search(np.ones(16), 0)
    with pytest.raises(FileNotFoundError, match="no index"):
        load_index(tmp_path)
    index.save(tmp_path)
    text = (tmp_path / "videos.json").read_text().replace('"frames": 4', '"frames": 5')
    (tmp_path / "videos.json").write_text(text)
    with pytest.raises(RunError, match="videos.json does not match its checksum.*build it again"):
        load_index(tmp_path)


def test_no_flipped_bit_is_read_in_silence(tmp_path):
    build_index({"a": drifting(1, 4, 2, 16)[0]}, teacher="t").save(tmp_path)
    rng = np.random.default_rng(5)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            with pytest.raises((RunError, FileNotFoundError)):
                load_index(tmp_path)
        for cut in (0, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:cut])
            with pytest.raises(RunError, match="damaged"):
                load_index(tmp_path)
        path.write_bytes(whole)
    assert len(load_index(tmp_path)) == 8


@pytest.mark.parametrize("content", [b"null", b"[]", b"", b'{"format": 2}', b'{"format": 9, "dim": '
                                     b'1, "teacher": "t", "videos": []}'])
def test_what_is_no_index_is_refused(tmp_path, content):
    build_index({"a": drifting(1, 4, 2, 16)[0]}, teacher="t").save(tmp_path)
    (tmp_path / "videos.json").write_bytes(content)
    with pytest.raises(RunError, match="hnerv-clip index FOLDER RUN"):
        load_index(tmp_path)


@pytest.mark.parametrize("writes", [0, 1])
def test_an_index_that_is_killed_while_it_is_written_leaves_the_old_one(tmp_path, monkeypatch,
                                                                        writes):
    old, new = (drifting(1, 4, 2, 16, seed=seed)[0] for seed in (0, 1))
    build_index({"old": old}, teacher="t").save(tmp_path)
    replace, done = files.os.replace, []

    def killed(*paths):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index({"new": new}, teacher="t").save(tmp_path)
    found = load_index(tmp_path).search(old[0, 0], 1).iloc[0]
    assert found.video == "old" and found.score == pytest.approx(1, abs=1e-5)
    monkeypatch.undo()
    build_index({"new": new}, teacher="t").save(tmp_path)
    assert load_index(tmp_path).search(new[0, 0], 1).iloc[0].video == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_index_of_the_first_format_is_still_read(tmp_path):
    built = build_index({"a": drifting(1, 4, 2, 16)[0]}, teacher="t")
    built.save(tmp_path)
    about = json.loads((tmp_path / "videos.json").read_text(encoding="utf-8"))
    (tmp_path / about["vectors"]).rename(tmp_path / "vectors.faiss")
    (tmp_path / "videos.json").write_text(json.dumps(
        {"format": 1} | {name: about[name] for name in ("dim", "teacher", "settings", "videos")}),
        encoding="utf-8")
    assert len(load_index(tmp_path)) == 8


def test_runs_of_different_teachers_share_no_index(tmp_path, monkeypatch):
    from types import SimpleNamespace as Space

    def run(folder, video, teacher="t"):
        return Space(run_dir=Space(path=tmp_path / folder), model=None, dataset=Space(
            teacher_name=teacher, teacher_label=teacher.upper(),
            video=Space(name=video, frame_hw=(80, 160), fps=25.0,
                        times_s=[0.0, 0.1, 0.5, 0.6])),
            config=Config.from_params(epochs=7, modelsize=0.3))

    asked = []
    monkeypatch.setattr(inference, "sources_of", lambda model: ("encoder", "interpolated"))
    monkeypatch.setattr(inference, "predict_embeddings", lambda model, dataset, *, source: (
        asked.append(source), drifting(1, 4, 2, 16)[0])[1])
    built = index_runs([run("a", "bunny"), run("b", "bunny"), run("c", "bikes")])
    assert list(built.videos.video) == ["bunny (a)", "bunny (b)", "bikes"]
    assert built.videos.iloc[2, 3:].to_dict() == {"run": "c", "source": "interpolated", "epochs": 7,
                                                  "modelsize": 0.3, "height": 80, "width": 160,
                                                  "fps": 25.0}
    same = index_runs([run("x/main", "bunny"), run("y/main", "bunny")]).videos
    assert list(same.video) == ["bunny (x/main)", "bunny (y/main)"]
    assert set(asked) == {"interpolated"}  # the prediction, in which no frame asked about is seen
    with pytest.raises(ValueError, match="different teachers cannot share"):
        index_runs([run("a/main", "bunny"), run("b/main", "bikes", "other")])
    with pytest.raises(ValueError, match="given twice"):
        index_runs([run("a", "bunny"), run("a", "bunny")])
    with pytest.raises(ValueError, match="no videos"):
        index_runs([])
    built.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index", teacher="t")
    assert loaded.teacher == "t" and loaded.videos.equals(built.videos)
    hits = pd.DataFrame({"video": ["bikes", "bunny (a)"], "frame": [2, 3]})
    assert loaded.times_of(hits) == [0.5, 0.6]  # as the source shows them, not by its rate
    assert loaded.teacher_config() == Config.from_params().teacher  # which encodes its queries
    with pytest.raises(ValueError, match="hnerv-clip index"):
        build_index({"a": drifting(1, 4, 2, 16)[0]}, teacher="t").teacher_config()
    with pytest.raises(ValueError, match="of the teacher t, but queries are encoded by other"):
        load_index(tmp_path / "index", teacher="other")
