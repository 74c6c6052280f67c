"""Odd files: what is read is right, and what cannot be read right is refused."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from hnerv_clip import readers
from hnerv_clip.config import ConfigError, VideoConfig
from hnerv_clip.video import load_video

WHOLE = dict(crop_list=None)


def level_frame(level, hw=(48, 64)):
    frame = av.VideoFrame.from_ndarray(np.full((*hw, 3), level, np.uint8), format="rgb24")
    return frame.reformat(format="yuv420p")


def write_levels(path, ticks, *, base=Fraction(1, 25), codec="libx264", options=None):
    """A video of one grey level a frame, 10·i, shown at `ticks` of `base` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = base
        for i, tick in enumerate(ticks):
            frame = level_frame(10 * i)
            frame.pts, frame.time_base = tick, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels_of(video):
    return (video.frames.float().mean((1, 2, 3)) / 10).round().int().tolist()


def message_of(path):
    with pytest.raises(ConfigError) as caught:
        load_video(VideoConfig(str(path), **WHOLE))
    return str(caught.value)


def test_times_are_the_frames_own(tmp_path):
    ticks = [0, 1, 2, 3, 4, 5, 20, 30, 31, 50]
    path = write_levels(tmp_path / "vfr.mp4", ticks)
    video = load_video(VideoConfig(str(path), **WHOLE))
    assert video.times_s == pytest.approx(np.array(ticks) / 25)
    assert video.fps == pytest.approx(9 / 2)  # on average
    every_other = load_video(VideoConfig(str(path), frame_stride=2, **WHOLE))
    assert every_other.times_s == pytest.approx(np.array(ticks[::2]) / 25)
    assert levels_of(every_other) == [0, 2, 4, 6, 8]


def test_times_of_an_even_video_count_from_its_first_frame(tmp_path):
    path = write_levels(tmp_path / "late.mkv", range(50, 60))
    video = load_video(VideoConfig(str(path), frame_stride=3, **WHOLE))
    assert video.times_s == pytest.approx([0, 0.12, 0.24, 0.36])
    assert video.fps == pytest.approx(25 / 3)


@pytest.mark.parametrize("aspect, width", [((4, 3), 80), ((8, 9), 53), ((1, 1), 60)])
def test_pixels_that_are_not_square_are_shown_square(tmp_path, aspect, width):
    """A disc of 40 by 40 on the screen, whatever the pixels of the file are."""
    path, across = tmp_path / "anamorphic.mp4", 40 * aspect[1] / aspect[0]
    y, x = np.mgrid[:48, :60]
    disc = ((x - 29.5) / across) ** 2 + ((y - 23.5) / 40) ** 2 < 0.25
    write_aspect(path, np.repeat(255 * disc[..., None].astype(np.uint8), 3, 2), Fraction(*aspect))
    shown = load_video(VideoConfig(data_path=str(path), crop_list=None)).frames[0, 0].numpy()
    assert shown.shape == (48, width)
    inside = shown > 127
    assert abs(inside.any(0).sum() - 40) <= 2 and abs(inside.any(1).sum() - 40) <= 2


def test_pixels_that_no_camera_writes_are_refused(tmp_path):
    path = tmp_path / "needles.mp4"
    write_aspect(path, np.zeros((48, 60, 3), np.uint8), Fraction(1, 20))
    assert "1:20" in message_of(path) and "setsar=1" in message_of(path)


def write_aspect(path, image, aspect):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_frames_come_in_the_order_of_their_times():
    class Frame:
        def __init__(self, pts):
            self.pts = pts

    order = [0, 3, 1, 2, None, 7, 4, 5, 6]
    given = [frame.pts for frame, _ in readers._in_order((Frame(p), None) for p in order)]
    assert given == [0, 1, 2, None, 3, 4, 5, 6, 7]


def test_what_was_decoded_before_an_error_is_given_before_it_is_raised():
    def broken():
        for pts in range(5):
            yield type("Frame", (), {"pts": pts})(), 0.0
        raise av.error.InvalidDataError(0, "damage")

    frames = readers._in_order(broken())
    assert [next(frames)[0].pts for _ in range(5)] == list(range(5))
    with pytest.raises(av.error.InvalidDataError):
        next(frames)


def test_a_file_whose_start_is_cut_by_an_edit_list_warns_of_nothing(tmp_path, recwarn):
    source = write_levels(tmp_path / "long.mp4", range(24), options={"crf": "1", "bf": "0"})
    with av.open(str(source)) as original, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = original.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        for packet in original.demux(stream):
            if packet.size:  # the first ten lie before zero: hidden, and still in the file
                shift = int(10 / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                cut.mux(packet)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        promised = container.streams.video[0].frames
    video = load_video(VideoConfig(str(tmp_path / "cut.mp4"), **WHOLE))
    if promised > len(video.frames):  # the writer made an edit list
        assert levels_of(video) == list(range(10, 24)) and promised == 24
    assert not [w for w in recwarn if "missing" in str(w.message)]


def test_an_avi_with_repeated_frames_warns_of_nothing(tmp_path, recwarn):
    path = write_levels(tmp_path / "gaps.avi", [0, 1, 5, 6, 20], codec="mpeg4", options={"q": "2"})
    video = load_video(VideoConfig(str(path), **WHOLE))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > len(video.frames) == 5
    assert not recwarn.list
    assert video.times_s[-1] == pytest.approx(0.8)


@pytest.mark.parametrize("codec, suffix", [("libx264", "mp4"), ("mpeg4", "avi")])
def test_frames_that_the_decoder_marks_as_damaged_are_refused(tmp_path, codec, suffix):
    path = tmp_path / f"noise.{suffix}"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(30):
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    assert len(load_video(VideoConfig(str(path), **WHOLE)).frames) == 30
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    at, size = packets[20]
    for offset in range(at + size // 3, at + size // 3 + 40):
        content[offset] ^= 0x5A
    path.write_bytes(content)
    assert "frame_limit below the damage" in message_of(path)
    assert len(load_video(VideoConfig(str(path), frame_limit=3, **WHOLE)).frames) == 3


def test_music_with_a_cover_is_no_video_of_one_frame(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "rgb24"
        cover.disposition = readers.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        packets = cover.encode(picture) + cover.encode()
        container.mux(packets)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert "no video stream but a cover picture" in message_of(path)


def test_text_is_no_video(tmp_path):
    (tmp_path / "readme.txt").write_text("hello\n" * 400)
    assert "no video stream" in message_of(tmp_path / "readme.txt")


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "is a pipe" in message_of(tmp_path / "pipe.mp4")
    assert "is a pipe" in message_of("/dev/zero")
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "1.png")
    assert "1.png" in message_of(tmp_path / "images")


# Folders

def make_folder(folder, *names, size=(8, 6)):
    folder.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", size, (10 * i,) * 3).save(folder / name)
    return folder


def test_every_kind_of_image_that_pillow_reads_is_a_frame(tmp_path):
    names = ["1.png", "2.gif", "3.ppm", "4.jp2", "5.avif", "6.webp", "7.tga", "8.bmp", "9.tiff"]
    folder = make_folder(tmp_path / "images", *names, size=(32, 32))
    assert levels_of(load_video(VideoConfig(str(folder), **WHOLE))) == list(range(9))


@pytest.mark.parametrize("name", ["x.heic", "x.jxl", "x.exr"])
def test_an_image_that_pillow_does_not_read_leaves_no_gap(tmp_path, name):
    folder = make_folder(tmp_path / "images", "1.png")
    (folder / name).touch()
    assert name in message_of(folder)


def test_an_animation_among_images_is_refused_and_alone_is_read(tmp_path):
    folder = make_folder(tmp_path / "images", "1.png")
    pictures = [Image.new("RGB", (8, 6), (10 * i,) * 3) for i in range(4)]
    path = folder / "2.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100, 200, 300, 400],
                     lossless=True)
    assert "holds 4 pictures" in message_of(folder)
    video = load_video(VideoConfig(str(path), **WHOLE))
    assert levels_of(video) == [0, 1, 2, 3]
    assert video.times_s == pytest.approx([0, 0.1, 0.3, 0.6])
    two = load_video(VideoConfig(str(path), frame_stride=2, frame_limit=2, **WHOLE))
    assert levels_of(two) == [0, 2]


def test_names_with_other_digits_sort(tmp_path):
    folder = make_folder(tmp_path / "images", "1²2.png", "٣.png", "10.png", "9.png")
    assert len(load_video(VideoConfig(str(folder), **WHOLE)).frames) == 4


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "images", "1.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "1.png" in message_of(folder)


def test_no_header_beyond_the_limit_is_opened(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "images", "1.png", "2.png", "3.png")
    for number in range(4, 50):
        (folder / f"{number}.png").touch()  # would not open
    opened = []
    read = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a: opened.append(path.name) or read(path, *a))
    video = load_video(VideoConfig(str(folder), frame_limit=2, frame_stride=2, **WHOLE))
    assert levels_of(video) == [0, 2] and set(opened) == {"1.png", "3.png"}


def test_a_folder_of_videos_says_one_run_for_each(tmp_path):
    folder = make_folder(tmp_path / "images", "cover.png")
    (folder / "a.mp4").touch()
    message = message_of(folder)
    assert "one run for each" in message and "hnerv-clip index" in message


def test_a_folder_or_broken_link_among_images_is_named(tmp_path):
    folder = make_folder(tmp_path / "images", "1.png")
    (folder / "2.png").symlink_to(tmp_path / "nothing")
    assert "2.png" in message_of(folder) and "broken link" in message_of(folder)


def test_a_file_that_is_no_video_is_called_so(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"hello")
    assert "a.mp4 is no video, or damaged from its beginning (Invalid data" in message_of(
        tmp_path / "a.mp4")
