import struct

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from hnerv_clip.config import Config, ConfigError, Split, VideoConfig
from hnerv_clip.paths import find_checkout
from hnerv_clip.video import (
    NAMED_VIDEOS,
    find_source,
    frames_digest,
    label_video,
    load_video,
    resize,
    split_frames,
    write_video,
)

WHOLE = dict(crop_list=None)


@pytest.fixture
def clip(tmp_path):
    """24 frames of 48×64 as a video file; frame i has the grey level 10·i, and a red left half."""
    frames = torch.arange(24).mul(10).to(torch.uint8)[:, None, None, None].repeat(1, 3, 48, 64)
    frames[:, 0, :, :32] = 250
    return write_video(tmp_path / "clip.mp4", frames, 12, crf=1), frames


def save_images(folder, sizes, suffix="png"):
    folder.mkdir()
    for number, (height, width) in enumerate(sizes, 1):
        pixels = np.full((height, width, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return folder


def test_bunny_is_132_frames_of_720p():
    with av.open(str(find_source("bunny")[0])) as container:
        frames = [(frame.height, frame.width) for frame in container.decode(video=0)]
    assert frames == [(720, 1280)] * 132


def test_bunny_is_big_buck_bunny(small_dataset):
    video = small_dataset.video
    assert video.frames.shape == (12, 3, 80, 160) and video.frames.dtype == torch.uint8
    assert video.fps == 2.5 and video.source_index.tolist() == list(range(0, 120, 10))
    assert "Blender Foundation" in video.credit
    red, green, blue = video.frames.float().mean((0, 2, 3)).tolist()
    assert green > blue and green > red  # a meadow; blue first would be swapped channels


@pytest.mark.parametrize("name, hw, count, fps", [
    ("bikes", (272, 640), 250, 25), ("carphone", (144, 176), 120, 29.97)])
def test_named_videos(name, hw, count, fps):
    assert set(NAMED_VIDEOS) == {"bunny", "bikes", "carphone"}
    video = load_video(VideoConfig(data_path=name, crop_list=None))
    assert video.frames.shape == (count, 3, *hw)
    assert video.fps == pytest.approx(fps, abs=0.01) and video.name == name


def test_stride_then_limit(clip):
    path, frames = clip
    video = load_video(VideoConfig(str(path), frame_stride=5, frame_limit=3, **WHOLE))
    assert video.source_index.tolist() == [0, 5, 10] and video.fps == pytest.approx(12 / 5)
    assert (video.frames.float() - frames[[0, 5, 10]].float())[..., 40:].abs().max() <= 3
    everything = load_video(VideoConfig(str(path), frame_limit=1000, **WHOLE))
    assert len(everything.frames) == 24
    assert len(load_video(VideoConfig(str(path), frame_stride=99, **WHOLE)).frames) == 1


def test_crop_is_central_and_resize_is_antialiased(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "1.png")
    video = load_video(VideoConfig(str(folder), crop_list=(40, 60), resize_list=None))
    assert torch.equal(video.frames[0].permute(1, 2, 0), torch.from_numpy(pixels[5:45, 5:65]))

    small = load_video(VideoConfig(str(folder), crop_list=(40, 60), resize_list=(20, 30)))
    by_pillow = Image.fromarray(pixels[5:45, 5:65]).resize((30, 20), Image.Resampling.BICUBIC)
    difference = np.abs(small.frames[0].permute(1, 2, 0).numpy().astype(int) - np.array(by_pillow))
    assert difference.max() <= 4  # Pillow rounds between its two passes
    plain = interpolate(video.frames.float(), (20, 30), mode="bicubic")[0]
    assert (plain - small.frames[0]).abs().max() > 40  # what antialiasing is for
    assert resize(video.frames[0], (40, 60)).shape == (3, 40, 60)


def test_images_come_in_natural_order(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    levels = {"2.png": 2, "10.png": 10, "1.png": 1, "a10.PNG": 30, "a9.jpg": 20}
    for name, level in levels.items():
        Image.new("RGB", (8, 6), (level,) * 3).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="no images and are left out .notes.txt"):
        video = load_video(VideoConfig(str(folder), **WHOLE))
    assert video.frames[:, 0, 0, 0].tolist() == [1, 2, 10, 20, 30]
    assert video.name == "images" and video.fps == 25


def test_grey_palette_and_alpha_images_become_rgb(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, mode in enumerate(["L", "P", "RGBA", "1", "LA"]):
        Image.new("RGB", (8, 6), "white").convert(mode).save(folder / f"{number}.png")
    assert (load_video(VideoConfig(str(folder), **WHOLE)).frames == 255).all()


def test_orientation_of_a_photo_is_applied(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))  # left half white
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to show
    image.save(folder / "1.jpg", exif=exif, quality=95)
    frame = load_video(VideoConfig(str(folder), **WHOLE)).frames[0]
    assert frame.shape == (3, 32, 16)
    assert frame[:, :12].min() > 200 and frame[:, 20:].max() < 50  # left became top


def with_matrix(path, turned, a, b, c, d):
    """A copy whose track header asks for x' = a·x + c·y, y' = b·x + d·y."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes
    values = (int(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0, 1 << 14))
    content[at:at + 36] = struct.pack(">9i", *values)
    turned.write_bytes(content)
    return turned


@pytest.mark.parametrize("matrix, shown", [
    ((0, 1, -1, 0), lambda x: torch.rot90(x, -1, (2, 3))),
    ((-1, 0, 0, -1), lambda x: torch.rot90(x, 2, (2, 3))),
    ((0, -1, 1, 0), lambda x: torch.rot90(x, 1, (2, 3))),
    ((-1, 0, 0, 1), lambda x: x.flip(3)),
    ((1, 0, 0, -1), lambda x: x.flip(2)),
    ((0, 1, 1, 0), lambda x: x.transpose(2, 3)),
    ((0, -1, -1, 0), lambda x: torch.rot90(x, 2, (2, 3)).transpose(2, 3))])
def test_turns_and_flips_of_a_phone_video_are_applied(clip, tmp_path, matrix, shown):
    straight = load_video(VideoConfig(str(clip[0]), **WHOLE)).frames
    straight[0, :, :5] += 90  # unlike under every flip
    turned = with_matrix(clip[0], tmp_path / "turned.mp4", *matrix)
    frames = load_video(VideoConfig(str(turned), **WHOLE)).frames
    assert torch.equal(frames[1:], shown(straight)[1:])


def test_any_other_turn_is_refused(clip, tmp_path):
    turned = with_matrix(clip[0], tmp_path / "turned.mp4", 0.8, 0.6, -0.6, 0.8)
    assert "no quarter turn" in error(VideoConfig(str(turned), **WHOLE))


def test_odd_sizes_and_uprights_survive_writing(tmp_path):
    frames = torch.randint(0, 256, (1, 3, 51, 33), dtype=torch.uint8).repeat(4, 1, 1, 1)
    path = write_video(tmp_path / "new" / "odd.mp4", frames, 29.97, crf=1)
    video = load_video(VideoConfig(str(path), **WHOLE))
    assert video.frames.shape == (4, 3, 52, 34) and video.fps == pytest.approx(29.97, abs=0.01)
    cropped = load_video(VideoConfig(str(path), crop_list=(51, 33)))
    assert cropped.frames.shape == (4, 3, 51, 33)


def test_writing_refuses_floats(tmp_path):
    with pytest.raises(ValueError, match="float32"):
        write_video(tmp_path / "x.mp4", torch.rand(2, 3, 8, 8), 25)


def test_digest_sees_every_pixel_and_the_shape():
    frames = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    changed = frames.clone()
    changed[1, 2, 3, 5] = 1
    digests = {frames_digest(f) for f in (frames, changed, frames.view(2, 3, 6, 4))}
    assert len(digests) == 3
    strided = frames.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert frames_digest(frames) == frames_digest(strided)


def test_relative_path_starts_at_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "_toc.yml").touch()
    save_images(tmp_path / "data", [(8, 8)])
    save_images(tmp_path / "other", [(16, 8)])
    (tmp_path / "other" / "data").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "other" / "data" / "1.png")
    for folder, size in [("", 8), ("other", 4), ("notebooks", 8), ("book", 8)]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)  # a notebook and its copy in book mean the same file
        assert load_video(VideoConfig("data", **WHOLE)).frames.shape == (1, 3, size, size)
        assert find_checkout() == tmp_path


# Bad input: the message names the value and the fix.

def error(config):
    with pytest.raises(ConfigError) as caught:
        load_video(config)
    return str(caught.value)


def test_a_label_is_that_of_the_file_however_its_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.mp4").symlink_to("clip.mp4")
    label = label_video("clip.mp4")
    assert label.startswith("clip-") and len(label) == len("clip-") + 8
    for path in ("./clip.mp4", "a/../clip.mp4", str(tmp_path / "clip.mp4"), "link.mp4"):
        assert label_video(path) == label
    others = ["a/clip.mp4", "b/clip.mp4", "clip.mkv", "clip", "a/clip", "./bunny"]
    assert len({label, *map(label_video, others)}) == 1 + len(others)
    assert label_video("./clip") == label_video("clip")
    assert [label_video(name) for name in NAMED_VIDEOS] == list(NAMED_VIDEOS)
    assert label_video("./bunny") != "bunny"  # a file or folder of that name


def test_missing_video():
    message = error(VideoConfig(data_path="no/such.mp4"))
    assert "no/such.mp4" in message and "bunny, bikes, carphone" in message


@pytest.mark.parametrize("content", [b"", b"this is not a video" * 100])
def test_unreadable_video(tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    assert "broken.mp4" in error(VideoConfig(str(path)))


def test_damaged_video(tmp_path):
    noise = torch.randint(0, 256, (24, 3, 48, 64), dtype=torch.uint8)
    content = bytearray(write_video(tmp_path / "clip.mp4", noise, 12).read_bytes())
    content[len(content) // 2:len(content) * 3 // 4] = bytes(len(content) * 3 // 4
                                                             - len(content) // 2)
    (tmp_path / "clip.mp4").write_bytes(content)
    assert "does not decode after frame" in error(VideoConfig(str(tmp_path / "clip.mp4"), **WHOLE))


def test_video_cut_between_frames_warns(clip, tmp_path):
    with av.open(str(clip[0])) as container:
        at = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[20]
    (tmp_path / "cut.mp4").write_bytes(clip[0].read_bytes()[:at])
    with pytest.warns(UserWarning, match="of the 24 frames"):
        video = load_video(VideoConfig(str(tmp_path / "cut.mp4"), **WHOLE))
    assert len(video.frames) == 20


def test_video_cut_within_a_frame_is_refused_up_to_there(clip, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip[0].read_bytes()[:-200])  # the last frames are small
    assert "marks as corrupt" in error(VideoConfig(str(path), **WHOLE))
    assert len(load_video(VideoConfig(str(path), frame_limit=4, **WHOLE)).frames) == 4


def test_audio_only(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no video stream" in error(VideoConfig(str(path)))


def test_folder_of_different_sizes(tmp_path):
    folder = save_images(tmp_path / "images", [(8, 8), (8, 8), (8, 10)])
    message = error(VideoConfig(str(folder), **WHOLE))
    assert "3.png is 8×10" in message and "1.png is 8×8" in message


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert "no images" in error(VideoConfig(str(tmp_path)))


def test_broken_image(tmp_path):
    folder = save_images(tmp_path / "images", [(64, 64), (64, 64)])
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:60])
    assert "2.png" in error(VideoConfig(str(folder), **WHOLE))
    (folder / "2.png").write_bytes(b"nothing")
    assert "2.png" in error(VideoConfig(str(folder), **WHOLE))


def test_sixteen_bit_image(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "images" / "1.png")
    assert "8 bits" in error(VideoConfig(str(tmp_path / "images"), **WHOLE))


@pytest.mark.parametrize("name, fix", [("bikes", "256_640"), ("carphone", "144_176")])
def test_crop_larger_than_the_frame(name, fix):
    message = error(VideoConfig(data_path=name, crop_list=(640, 1280)))
    assert f'crop_list="{fix}"' in message and "640×1280" in message and name in message
    crop = Config.from_params(data_path=name, crop_list=fix, frame_limit=2).video
    assert len(load_video(crop).frames) == 2  # the fix works


def test_crop_of_an_upright_video(tmp_path):
    folder = save_images(tmp_path / "upright", [(1280, 720)])
    message = error(VideoConfig(str(folder), crop_list=(640, 1280)))
    assert 'crop_list="640_704"' in message


@pytest.mark.parametrize("bad", [dict(frame_stride=0), dict(frame_stride=-2), dict(frame_limit=-1)])
def test_stride_and_limit(bad):
    assert next(iter(bad)) in error(VideoConfig(**bad))
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Config.from_params(**bad)


# The split.

@pytest.mark.parametrize("split, labels", [
    ("4_5_5", "ttttvttttv"),  # 80/20: read literally it would validate on nothing
    ("9_10_10", "tttttttttvttt"),  # 90/10
    ("7_10_10", "tttttttvvvttt"),  # 70/30
    ("1_1_1", "ttttt"),  # all train
    ("5_5_5", "tttttt"),
    ("2_4_6", "ttssvvttssv"),  # as the rule reads
    ("2_2_4", "ttvvttvv"),
    ("1_3_4", "tssvtssvt"),
    ("4_5_5", "tt"),  # shorter than a block
])
def test_split(split, labels):
    names = {"t": "train", "v": "val", "s": "skip"}
    expected = [names[c] for c in labels]
    result = split_frames(len(labels), Config.from_params(data_split=split).video.data_split)
    assert result.labels == expected
    assert result.train.tolist() == [i for i, c in enumerate(labels) if c == "t"]
    assert result.val.tolist() == [i for i, c in enumerate(labels) if c == "v"]


def test_phases_hold_every_frame_out_once():
    splits = [split_frames(132, Split(4, 5, 5), phase) for phase in range(5)]
    assert sorted(np.concatenate([split.val for split in splits])) == list(range(132))
    assert [split.val[0] for split in splits] == [4, 0, 1, 2, 3]
    assert Config.from_params(split_phase=4).video.split_phase == 4
    for phase in (5, -1):
        with pytest.raises(ConfigError, match=f"split_phase={phase}"):
            Config.from_params(split_phase=phase)
    with pytest.raises(ConfigError, match="no training frame among 1"):
        split_frames(1, Split(1, 2, 3), 2)


def test_split_prints_its_counts():
    assert str(split_frames(132, Split(4, 5, 5))) == \
        "132 frames: 106 train, 26 held out"


@pytest.mark.parametrize("split", [(0, 1, 5), (4, 3, 5), (4, 6, 5), (-1, 1, 1)])
def test_split_without_training_frames_or_out_of_order(split):
    with pytest.raises(ConfigError, match="X <= Y <= Z"):
        split_frames(10, Split(*split))


def test_split_of_nothing():
    with pytest.raises(ConfigError, match="0 frames"):
        split_frames(0, Split(4, 5, 5))
