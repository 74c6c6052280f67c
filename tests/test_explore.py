"""The explorer: what a hand does is set, what it shows is read."""

import dataclasses
import io
import re
import shutil
import subprocess

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_player import make_file
from test_player import with_field as with_field  # noqa: PLC0414  a fixture

from hnerv_clip.config import ConfigError
from hnerv_clip.explore import film, page
from hnerv_clip.explore.video import load_original, open_video
from hnerv_clip.explore.widget import FOLDER, Explorer, enlarged_error, explore
from hnerv_clip.runs.run_dir import RunError


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def run_video(trained_run, cache_dir):
    return open_video(trained_run, cache_dir=cache_dir, device="cpu")


@pytest.fixture
def explorer(run_video):
    return ready(Explorer(run_video))


def ready(explorer: Explorer) -> Explorer:
    explorer.get_ready()
    return explorer


def test_frames_are_original_decoded_and_error(explorer, run_video):
    assert explorer.view == "wipe" and explorer.shown == 0
    explorer.frame = 5
    original, decoded = run_video.original(5), run_video.decode(5)
    assert explorer.shown == 5 and explorer.quality.startswith("PSNR ")
    assert np.abs(pixels(explorer.original) - original).mean() < 4  # JPEG
    assert np.abs(pixels(explorer.decoded) - decoded).mean() < 4
    assert np.abs(pixels(explorer.error) - enlarged_error(original, decoded)).mean() < 4


def test_a_text_brings_hits_their_boxes_and_a_heat_map(explorer, run_video):
    explorer.text = "hare"
    expected = run_video.search(run_video.encode("hare"), 6)
    assert [hit["frame"] for hit in explorer.hits] == expected.frame.tolist()
    assert [hit["x0"] for hit in explorer.hits] == expected.x0.tolist()
    assert explorer.frame == explorer.shown == expected.frame[0]
    assert all(hit["picture"].startswith("data:image/jpeg;base64,") for hit in explorer.hits)
    assert Image.open(io.BytesIO(explorer.heat)).mode == "RGBA"
    assert "hare" in explorer.answer and not explorer.problem
    explorer.heat_of = "teacher"
    assert explorer.heat
    explorer.heat_of = "off"
    assert explorer.heat == b""


def test_a_text_without_a_match_says_so_and_has_no_bright_spot(explorer, monkeypatch):
    monkeypatch.setattr(explorer.video, "matches", lambda query, found: np.full(len(found), 0.4))
    monkeypatch.setattr(explorer.video, "heat", lambda *args, **options: np.full((4, 8), 0.4))
    explorer.text = "moped"
    assert "“moped” has no match in this video" in explorer.answer and "0.4" in explorer.answer
    assert (np.asarray(Image.open(io.BytesIO(explorer.heat)))[..., 3] == 0).all()


def test_a_click_asks_for_what_is_like_the_nearest_patch(explorer, run_video):
    explorer.text = "hare"
    left, top, height, width = 0, 0, *run_video.grid.size
    explorer.region = {"frame": 3, "x": 5.0, "y": 4.0}
    assert explorer.asked == {"frame": 3, "x0": left, "y0": top, "x1": width, "y1": height}
    expected = run_video.similar(3, (0, 0, width, height), 6)
    assert [hit["frame"] for hit in explorer.hits] == expected.frame.tolist()
    assert (3, left, top) not in {(h["frame"], h["x0"], h["y0"]) for h in explorer.hits}
    assert "region of frame 3" in explorer.answer and "match" not in explorer.hits[0]
    explorer.text = ""
    explorer.text = "hare"  # the same text once more
    assert explorer.asked == {} and "hare" in explorer.answer


def test_a_run_whose_file_has_the_field_names_the_file(pixel_copy, cache_dir):
    (pixel_copy / "stored").mkdir()
    (pixel_copy / "stored" / "field.pth").touch()
    run = open_video(pixel_copy, cache_dir=cache_dir, device="cpu")
    assert "use that file, or fit one, hnerv-clip fit-head" in run.silent


def test_errors_are_told_with_their_fix(explorer, trained_run, pixel_run, cache_dir):
    explorer.text = "hair"
    assert "'hair' is not the name of an ImageNet class" in explorer.problem
    assert "try: hair slide" in explorer.problem
    assert explorer.hits == [] and explorer.answer == ""  # those of another text are gone
    explorer.frame = 3
    assert "try: hair slide" in explorer.problem  # until it is answered
    explorer.text = "hare"
    assert explorer.problem == ""
    silent = ready(Explorer(open_video(pixel_run, cache_dir=cache_dir, device="cpu")))
    assert silent.decoded and "has no head" in silent.problem and "fit-head" in silent.problem
    silent.frame = 2
    silent.region = {"frame": 2, "x": 5.0, "y": 5.0}
    assert "fit-head" in silent.problem and silent.shown == 2
    with pytest.raises(RunError):
        open_video(trained_run / "nothing", cache_dir=cache_dir)


def test_a_file_alone_is_searched_and_says_what_its_error_needs(trained_run, tmp_path):
    path = shutil.copy(trained_run / "video.hnerv", tmp_path / "small.hnerv")
    alone = ready(explore(path, device="cpu", text="hare"))
    assert alone.view == "decoded" and alone.hits and alone.decoded
    alone.view = "error"
    assert "no original" in alone.problem and 'original="VIDEO"' in alone.problem
    assert alone.view == "decoded"
    beside = ready(explore(path, original="bunny", device="cpu"))
    assert beside.view == "wipe" and beside.error and beside.quality


def test_the_original_of_a_file_has_its_shape_size_and_times(run_video):
    frames, credit = load_original("bunny", run_video.size, run_video.times_s)
    assert "Blender" in credit
    difference = (frames.int() - run_video.originals.int()).abs().float().mean()
    assert frames.shape == run_video.originals.shape and difference < 0.01
    with pytest.raises(ConfigError, match="ends at .* the stored video at 99.00 s"):
        load_original("bunny", run_video.size, np.array([0.0, 1.0, 2.0, 99.0]))


def test_a_field_is_asked_about_the_very_square(with_field):
    path, _ = with_field
    explorer = ready(Explorer(open_video(path, device="cpu")))
    assert explorer.facts["sides"]
    height, width = explorer.video.size
    explorer.side = 0.6
    explorer.region = {"frame": 2, "x": width / 2, "y": height / 2}
    asked, side = explorer.asked, 0.6 * height
    assert asked["x1"] - asked["x0"] == pytest.approx(side)
    assert (asked["x0"] + asked["x1"]) / 2 == pytest.approx(width / 2)
    explorer.region = {"frame": 2, "x": 1.0, "y": 1.0}  # shifted into the frame
    assert explorer.asked["x0"] == explorer.asked["y0"] == 0
    assert explorer.hits and explorer.heat
    explorer.side = 0.3  # asks again
    assert explorer.asked["x1"] == pytest.approx(0.3 * height)


def test_the_page_shows_the_same_as_still_pictures(run_video):
    table = page.find_texts(run_video, ["hare", "moped"])
    assert table.match.is_monotonic_decreasing
    words = page.answer_words(table.assign(found=[True, False]))
    assert words.startswith(f"**Of 2 texts the network finds 1: {table.text[0]} (")
    assert f"Not distinguished from other names: {table.text[1]} (" in words
    rows = page.heat_rows(run_video, table)
    assert set(rows["hare"][1]) == {"predicted", "teacher"}
    frame, box, hits = page.similar_rows(run_video, 3, 0.1, 0.1)
    assert frame.shape == (*run_video.size, 3) and len(box) == 4 and len(hits) == 5


@pytest.mark.parametrize("tall", [False, True])
def test_a_film_shows_original_reconstruction_and_heat(run_video, tmp_path, tall):
    frames = film.join_panels(film.film_panels(run_video, "hare"), width=64, tall=tall)
    assert frames.shape == (12, *((32 * 3 + 8, 64, 3) if tall else (32, 64 * 3 + 8, 3)))
    heats = np.arange(4, dtype=float)[:, None, None]
    np.testing.assert_allclose(film.smooth(heats)[:, 0, 0], [0.5, 1, 2, 2.5])
    path = film.write_frames(tmp_path / "film.mp4", frames, 10)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 12


def test_a_file_without_a_head_shows_its_frames(tmp_path):
    torch.manual_seed(0)
    silent = ready(Explorer(open_video(make_file(tmp_path / "v.hnerv", predict_clip=False),
                                       device="cpu")))
    assert silent.decoded and "holds no head" in silent.problem


def test_the_landing_pages_film_is_made_from_a_run(trained_run, cache_dir, tmp_path, monkeypatch):
    from hnerv_clip.book import film as landing

    def find(match):
        return lambda video, texts: pd.DataFrame(
            [{"text": texts[0], "match": match, "found": match > 2, "frame": 3}])

    monkeypatch.setattr(landing, "PANELS", {False: 64, True: 64})
    monkeypatch.setattr(landing, "find_texts", find(3.0))
    written = landing.make_film(tmp_path, trained_run, text="hare", cache_dir=cache_dir)
    assert {path.name for path in written} == {
        "film.mp4", "film_tall.mp4", "film_poster.webp", "film_tall_poster.webp", "film.webp",
        "film.md"}
    assert max(path.stat().st_size for path in written) <= landing.LIMIT_BYTES
    assert Image.open(tmp_path / "_static" / "film.webp").n_frames == 12
    text = (tmp_path / "_generated" / "film.md").read_text(encoding="utf-8")
    assert "not CLIP" in text and "Reduced setting: one frame in 10, resized to 80×160" in text
    assert "Blender" in text and "dB PSNR" in text and "where the network finds “hare”" in text
    # it moves only where that is wanted, and can be stopped
    assert "prefers-reduced-motion" in text and "controls" in text and "autoplay" not in text
    assert "\n\n" not in text  # one block of HTML
    monkeypatch.setattr(landing, "find_texts", find(0.4))
    with pytest.raises(ConfigError, match="'moped' has no match in bunny .0.4.*--film_text"):
        landing.make_film(tmp_path, trained_run, text="moped", cache_dir=cache_dir)
    # a book's own film goes without a heat map instead
    landing.make_film(tmp_path, trained_run, cache_dir=cache_dir, moving=False)
    text = (tmp_path / "_generated" / "film.md").read_text(encoding="utf-8")
    assert "where the network finds" not in text
    monkeypatch.setattr(landing, "LIMIT_BYTES", 10)
    with pytest.raises(ConfigError, match="more than 10: make it of a shorter video"):
        landing.write_small(tmp_path / "x.mp4", np.zeros((2, 16, 16, 3), np.uint8), 5)


def test_the_film_tells_how_its_field_was_fitted(run_video):
    from hnerv_clip.book.film import made_words
    from hnerv_clip.field.query import Field

    assert "field" not in made_words(run_video, "hare")  # the original head answers
    fitted = Field(None, None, None, about={"boxes": 32, "settings": {"steps": 2000}})
    asked = dataclasses.replace(
        run_video, load=lambda: dataclasses.replace(run_video.loaded, head=fitted))
    assert "to 32 boxes in each training frame in 2,000 steps" in made_words(asked, "hare")
    assert "boxes" not in made_words(asked, "")


def test_enter_searches_in_jupyterlab_too(tmp_path):
    """JupyterLab submits no form on Enter, and takes keys for its own shortcuts."""
    script = FOLDER / "widget.js"
    code = script.read_text(encoding="utf-8")
    assert re.search(r'text\.addEventListener\("keydown".*\n.*"Enter".*searchText\(event\)', code)
    assert "dataset.lmSuppressShortcuts" in code
    if node := shutil.which("node"):
        module = tmp_path / "widget.mjs"
        module.write_text(code, encoding="utf-8")
        subprocess.run([node, "--check", module], check=True)
