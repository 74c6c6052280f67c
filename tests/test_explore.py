"""The explorer: what a hand does is set, what it shows is read."""

import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_player import make_file
from test_player import with_field as with_field  # noqa: PLC0414  a fixture

from hnerv_clip.codec import FileError
from hnerv_clip.config import ConfigError
from hnerv_clip.explore import film, page, widget
from hnerv_clip.explore.video import (
    CELLS,
    HEAT_SIDES,
    TEACHER_CELLS,
    load_original,
    open_video,
    shape_warning,
)
from hnerv_clip.explore.widget import FOLDER, Explorer, enlarged_error, explore
from hnerv_clip.runs.run_dir import RunError
from hnerv_clip.search.boxes import around_positions
from hnerv_clip.search.rank import match_scores
from hnerv_clip.teachers import boxes as boxes_module
from hnerv_clip.teachers import sentences
from hnerv_clip.teachers.boxes import embed_boxes


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


def wait_until(condition, *, limit_s=120):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def held(video, event, **changes):
    """The video as if it had just been opened, which loads the rest after an event."""
    def load():
        assert event.wait(120)
        return video.loaded

    return dataclasses.replace(video, load=load, **changes)


def test_the_first_frame_is_seen_before_the_rest_is_loaded(run_video):
    event = threading.Event()
    explorer = Explorer(held(run_video, event))
    wait_until(lambda: explorer.progress.startswith("Loading all frames"))
    assert explorer.view == "wipe" and explorer.shown == 0 and explorer.quality
    explorer.text = "hare"  # answered later, without waiting here
    assert explorer.original and explorer.decoded and explorer.error and not explorer.hits
    event.set()
    assert explorer.get_ready() is explorer.video and explorer.progress == ""
    expected = run_video.search(run_video.encode("hare"), 6)
    assert [hit["frame"] for hit in explorer.hits] == expected.frame.tolist()
    assert explorer.shown == expected.frame[0] and explorer.heat
    # a frame and a place that are asked for meanwhile
    event.clear()
    later = Explorer(held(run_video, event), text="hare")
    later.frame = 7
    later.region = {"frame": 3, "x": 5.0, "y": 4.0}
    event.set()
    later.get_ready()
    assert later.asked["frame"] == 3 and later.shown == 7 and "region of frame 3" in later.answer


def test_the_original_is_seen_before_a_frame_is_decoded(run_video):
    event = threading.Event()
    event.set()
    decoding = threading.Event()

    def decode():
        assert decoding.wait(120)
        return run_video.first[1]()

    explorer = Explorer(held(run_video, event, first=(run_video.first[0], decode)))
    wait_until(lambda: explorer.original)
    assert explorer.facts and explorer.view == "wipe" and not explorer.decoded
    decoding.set()
    explorer.get_ready()
    assert explorer.decoded and explorer.error and explorer.quality and not explorer.problem


def test_the_first_frame_has_the_bits_of_the_others(trained_run, cache_dir, run_video):
    again = open_video(trained_run, cache_dir=cache_dir, device="cpu")
    file = open_video(trained_run / "video.hnerv", original="bunny", device="cpu")
    for video in (again, file):
        original, decoded = video.original(0), video.decode(0)
        assert "_loaded" not in video.__dict__
        assert (original == video.originals[0].permute(1, 2, 0).numpy()).all()
        assert (decoded == video.loaded.decode(0)).all()
    np.testing.assert_allclose(again.times_s, run_video.times_s)


def test_a_run_without_its_stored_video_is_loaded_whole(trained_copy, cache_dir, run_video):
    (trained_copy / "video.hnerv").unlink()
    explorer = ready(explore(trained_copy, cache_dir=cache_dir, device="cpu"))
    assert explorer.video.first is None and explorer.shown == 0 and not explorer.problem
    assert explorer.facts == ready(Explorer(run_video)).facts


def test_another_videos_file_in_a_runs_folder_does_not_give_its_times(
        trained_copy, cache_dir, pixel_run, run_video):
    shutil.copy(pixel_run / "video.hnerv", trained_copy / "video.hnerv")
    times = open_video(trained_copy, cache_dir=cache_dir, device="cpu")
    assert times.first is None, "only the whole run tells its times"
    assert times.times_s.tolist() == run_video.times_s.tolist()


def test_two_threads_load_a_video_once(run_video):
    calls, both = [], threading.Barrier(2)

    def load():
        calls.append(1)
        time.sleep(0.3)  # in which the other one asks, too
        return run_video.loaded

    video = dataclasses.replace(run_video, load=load)
    threads = [threading.Thread(target=lambda: both.wait() and None or video.head)
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


def test_two_explorers_leave_the_garbage_collector_on(monkeypatch):
    """The second one asks while the first has it off, and turns it off when the first is done."""
    asked, done = threading.Event(), threading.Event()
    second = threading.Thread(target=widget._import_torch)

    class Collector:
        on = True

        def isenabled(self):
            if threading.current_thread() is second:
                asked.set()
            return self.on

        def disable(self):
            if threading.current_thread() is second:
                done.wait(60)
            self.on = False
            if threading.current_thread() is not second:
                second.start()
                asked.wait(0.3)

        def enable(self):
            self.on = True
            done.set()

    monkeypatch.setattr(widget, "gc", collector := Collector())
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    widget._import_torch()
    second.join()
    assert collector.on and "OMP_WAIT_POLICY" not in os.environ


def test_what_goes_wrong_in_the_background_is_shown(run_video, tmp_path):
    lost = explore(tmp_path / "lost.hnerv")
    with pytest.raises(FileError, match="lost.hnerv"):
        lost.get_ready()
    assert "lost.hnerv" in lost.problem and not lost.progress and not lost.facts
    lost.text = "hare"  # nothing to search: says so still
    assert "lost.hnerv" in lost.problem

    def fail(error):
        def load():
            raise error
        return load

    for error, words in ((RunError("it shows other frames"), "It shows other frames"),
                         (KeyError("odd"), "'odd'"), (AssertionError(), "AssertionError")):
        broken = Explorer(dataclasses.replace(run_video, load=fail(error)), text="hare")
        with pytest.raises(type(error)):
            broken.get_ready()
        assert broken.shown == 0 and broken.decoded and words in broken.problem
        assert not broken.hits and not broken.progress


def test_a_wrong_answer_of_the_thread_is_shown(run_video, monkeypatch):
    def search(*args):
        raise KeyError("odd")

    video = held(run_video, threading.Event())
    video.load = lambda: run_video.loaded
    monkeypatch.setattr(video, "search", search, raising=False)
    explorer = ready(Explorer(video, text="hare"))
    assert "'odd'" in explorer.problem and not explorer.hits and not explorer.progress
    with pytest.raises(KeyError):
        explorer.text = "moped"  # here there is a traceback


def test_an_interrupted_wait_loses_nothing(run_video):
    event = threading.Event()
    explorer = Explorer(held(run_video, event), text="hare")
    main = threading.get_ident()

    def interrupt():  # once it waits, however long that takes to begin
        try:
            wait_until(lambda: any(frame.f_code is Explorer.get_ready.__code__ for frame, _ in
                                   traceback.walk_stack(sys._current_frames()[main])))
        finally:
            signal.pthread_kill(main, signal.SIGINT)

    # a shell starts what runs in its background with this signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt).start()
            explorer.get_ready()
    finally:
        signal.signal(signal.SIGINT, before)
    assert explorer.progress and not explorer.hits
    event.set()
    assert ready(explorer).hits and not explorer.problem


def test_an_interrupt_at_any_moment_of_a_wait_leaves_nothing_locked():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for trial in range(400):
            waiting = SimpleNamespace(_done=threading.Event(), _failed=None, video=None)
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + trial % 100))
                Explorer.get_ready(waiting)
            end = threading.Thread(target=waiting._done.set, daemon=True)
            end.start()
            end.join(30)
            assert not end.is_alive(), f"locked by the interrupt of trial {trial}"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_interrupted_answer_is_told_and_asked_again(explorer, run_video, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    for name in ("search", "heat"):  # before and after the frame of the hits
        explorer.text = ""
        with monkeypatch.context() as patch:
            patch.setattr(run_video, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                explorer.text = "hare"
        assert "ask again" in explorer.problem
        explorer.text = ""
        explorer.text = "hare"
        assert explorer.hits and explorer.heat and not explorer.problem
        explorer.frame = 2
        assert explorer.shown == 2


def test_the_first_frame_is_kept_for_the_next_time(trained_run, tmp_path, monkeypatch):
    path = tmp_path / "small.hnerv"
    shutil.copy(trained_run / "video.hnerv", path)
    options = {"original": "bunny", "device": "cpu", "cache_dir": tmp_path / "cache"}
    ready(explore(path, **options))
    assert not (tmp_path / "cache").exists()  # kept only where a cache is
    (tmp_path / "cache").mkdir()
    before = ready(explore(path, **options))
    event, opened = threading.Event(), open_video
    monkeypatch.setattr("hnerv_clip.explore.video.open_video",
                        lambda *args, **named: event.wait(120) and opened(*args, **named))
    again = explore(path, **options)
    assert again.shown == 0 and again.view == "wipe" and again.facts == before.facts
    assert (again.original, again.decoded, again.error, again.quality) == (
        before.original, before.decoded, before.error, before.quality)
    other = explore(path, device="cpu", cache_dir=tmp_path / "cache")  # without its original
    assert other.shown == -1 and not other.facts
    event.set()
    ready(again), ready(other)
    assert not again.problem and other.view == "decoded"
    event.clear()
    shutil.copy(trained_run / "video.hnerv", path)
    os.utime(path, ns=(0, 0))  # written anew
    assert explore(path, **options).shown == -1
    event.set()


def test_a_first_frame_without_its_decoded_picture_is_not_kept(explorer, run_video):
    for view, count in (("original", 0), ("wipe", 1)):
        written, known = [], {"facts": explorer.facts, "view": view}
        kept = SimpleNamespace(read=known.copy, write=written.append)
        assert ready(Explorer(run_video, kept=kept)).shown == 0 and len(written) == count


def test_a_click_is_answered_though_a_text_takes_it_away(explorer, monkeypatch):
    answer = explorer._try

    def wait(act, what):
        explorer.region = {}  # as another thread does that answers a text
        answer(act, what)

    monkeypatch.setattr(explorer, "_try", wait)
    explorer.region = {"frame": 3, "x": 5.0, "y": 4.0}
    assert explorer.asked["frame"] == 3 and not explorer.problem


def test_what_somebody_waits_for_is_timed(trained_run, tmp_path):
    told = subprocess.run([sys.executable, "-m", "hnerv_clip.explore.timing",
                           trained_run / "video.hnerv", "--original", "bunny", "--device", "cpu",
                           "--cache_dir", tmp_path], check=True, capture_output=True, text=True)
    times = re.findall(r"^(\w+ ?\w+) +([\d.]+) s$", told.stdout, re.MULTILINE)
    assert [name for name, _ in times] == ["first picture", "first frame", "first text", "click",
                                           "text", "frame"]
    assert 0.2 < float(times[0][1]) < 120  # with the import of PyTorch


def test_the_widget_and_a_search_import_little():
    """Each takes a quarter of a second to two seconds, of which a first frame needs PyTorch's."""
    heavy = {"pandas", "matplotlib", "sklearn", "scipy", "open_clip", "timm", "torchvision"}
    for module, without in (("widget", {"torch", *heavy}), ("video", heavy)):
        code = (f"import sys, hnerv_clip.explore.{module}\n"
                "print(*{name.split('.')[0] for name in sys.modules})")
        loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                                text=True).stdout.split()
        assert not without & set(loaded)


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


def test_errors_are_told_with_their_fix(explorer, trained_run, pixel_run, cache_dir, monkeypatch):
    monkeypatch.setattr(sentences, "_folder", lambda: None)  # whether it is installed or not
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


def test_a_film_is_told_how_to_become_what_is_explored(tmp_path):
    film = tmp_path / "kitchen.mp4"
    film.write_bytes(b"\0\0\0 ftypisom")
    said = rf"{film} is a video, not a run .* hnerv-clip encode {film} kitchen\.hnerv"
    with pytest.raises(FileError, match=said):
        open_video(film)
    with pytest.raises(FileError, match=said):
        explore(film, cache_dir=tmp_path).get_ready()
    with pytest.raises(FileError, match="cannot read .*gone.mp4: No such file"):
        open_video(tmp_path / "gone.mp4")


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


def test_an_original_of_another_shape_is_warned_of(trained_run, tmp_path, run_video):
    path = shutil.copy(trained_run / "video.hnerv", tmp_path / "small.hnerv")  # of 80×160
    other = ready(explore(path, original="carphone", device="cpu"))
    said = "The original 'carphone' has frames of 144×176, another shape than the stored video's 80"
    assert said in other.problem and "crop_list" in other.problem and other.error
    other.view, other.frame = "error", 1
    assert said in other.problem  # as long as it is compared
    assert not ready(explore(path, original="bunny", device="cpu")).problem  # as `encode` crops it
    for size in ((720, 1280), (90, 160), (640, 1280), (41, 80)):  # whole, smaller, cropped, rounded
        assert not shape_warning("bunny", size)
    for size in ((720, 1200), (640, 640), (160, 80)):
        assert "720×1280" in shape_warning("bunny", size)


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
    asked = run_video.with_head(fitted)
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


class Colors:
    """A teacher that sees the mean color of a patch."""

    device, dim, name = torch.device("cpu"), 3, "colors"

    def encode_patches(self, patches):
        return torch.nn.functional.normalize(patches.float().mean((2, 3)), dim=1)


def test_a_heat_map_asks_about_each_square_once(with_field, monkeypatch):
    video = open_video(with_field[0], device="cpu")
    height, width = video.size
    video.loaded.originals = torch.randint(0, 256, (6, 3, height, width), dtype=torch.uint8,
                                           generator=torch.Generator().manual_seed(0))
    by_field = video.head.embed

    def by_teacher(_, boxes):
        whole = torch.from_numpy(boxes).round().long()[None]
        return embed_boxes(Colors(), video.originals[2:3], whole)[0].float()

    def check(heat, embed, names, cells):
        (asked,) = (np.asarray(call[-1]).reshape(-1, 4) for call in calls)
        boxes, hw = around_positions(video.size, HEAT_SIDES, stride=max(1, round(height / cells)))
        assert len(np.unique(asked, axis=0)) == len(asked) < len(boxes)
        scores = match_scores(names[0], names, embed(2, boxes).numpy())
        np.testing.assert_allclose(heat, scores.reshape(-1, *hw).mean(axis=0), atol=1e-3)
        calls.clear()

    calls, names = [], video.names
    monkeypatch.setattr(video.head, "embed", lambda *args: calls.append(args) or by_field(*args))
    check(video.heat(names[0], 2), by_field, names, CELLS)
    monkeypatch.setattr(boxes_module, "embed_boxes",
                        lambda *args: calls.append(args) or embed_boxes(*args))
    video.load_teacher, video.names = Colors, np.eye(3, dtype=np.float32)
    check(video.teacher_heat(video.names[0], 2), by_teacher, video.names, TEACHER_CELLS)


def test_another_head_takes_the_place_of_the_loaded_one(run_video):
    head = np.zeros_like(run_video.head)
    other = run_video.with_head(head)
    assert other.head is head and run_video.head is not head
    assert other.name == run_video.name and len(other.originals) == len(run_video.originals)
