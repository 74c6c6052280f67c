"""Held-out frames are estimated from given ones alone, by optical flow, and trained on."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from hnerv_clip.config import ConfigError
from hnerv_clip.metrics import psnr
from hnerv_clip.study import between


@pytest.fixture(scope="module")
def frames():
    """A texture that moves by two pixels a frame: [7, 3, 40, 60] uint8."""
    texture = torch.rand(1, 3, 12, 25, generator=torch.Generator().manual_seed(0))
    wide = F.interpolate(texture, (40, 80), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([(wide[..., 2 * i:2 * i + 60] * 255).round() for i in range(7)]).byte()


def test_an_estimate_follows_motion(frames):
    before, middle, after = (frames[i:i + 1].float() / 255 for i in (2, 3, 4))
    estimate = between.estimate_between(before, after, steps=40)
    assert float(psnr(estimate, middle)) > float(psnr((before + after) / 2, middle)) + 5


def test_held_out_frames_are_not_looked_at(frames, monkeypatch):
    monkeypatch.setattr(between, "SMOOTH", (0.3,))
    made, smooth = between.estimate_held_out(frames)
    hidden = frames.clone()
    hidden[1::2] = 0
    again, same = between.estimate_held_out(hidden)
    assert torch.equal(made, again) and smooth == same
    assert torch.equal(made[::2], frames[::2]) and not torch.equal(made[1], frames[1])
    made, _ = between.estimate_held_out(frames[:6])
    assert torch.equal(made[5], frames[4]), "without a second neighbor"


def test_four_frames_are_too_few(frames, monkeypatch):
    with pytest.raises(ConfigError, match="4 frames is too short: at least 5"):
        between.estimate_held_out(frames[:4])
    monkeypatch.setattr(between, "SMOOTH", (0.3,))
    assert len(between.estimate_held_out(frames[:5])[0]) == 5


def test_another_video_in_the_same_folder_has_frames_of_its_own(frames, tmp_path, monkeypatch):
    longer, digest = between.write_frames(frames, tmp_path)
    shorter, other = between.write_frames(frames[:3], tmp_path)
    assert longer.name == f"frames_{digest}" and digest != other
    assert [len(list(path.glob("*.png"))) for path in (longer, shorter)] == [7, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        (longer.name, shorter.name)), "nothing else is left"
    monkeypatch.setattr(between.Image, "fromarray", lambda _: pytest.fail("written again"))
    assert between.write_frames(frames, tmp_path) == (longer, digest)


def test_frames_appear_when_they_are_complete(frames, tmp_path, monkeypatch):
    def refuse(pixels):
        raise OSError("the disk is full")
    monkeypatch.setattr(between.Image, "fromarray", refuse)
    with pytest.raises(OSError, match="full"):
        between.write_frames(frames, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_is_trained_on_estimates_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(between, "SMOOTH", (0.3,))
    params = {"data_path": "bunny", "resize_list": "40_80", "frame_limit": 9, "epochs": 2,
              "modelsize": 0.05, "device": "cpu", "enc_strds": "5 4 2", "dec_strds": "5 4 2"}
    row = between.run_between(tmp_path, params)
    assert row["smooth"] == 0.3 and row["epochs"] == 2
    assert all(math.isfinite(row[name]) for name in row if name.endswith("_db"))
    assert row["estimate_db"] > row["two_decoded_mean_db"]  # after two epochs
    images, = tmp_path.glob("frames_*")
    digest = images.name.removeprefix("frames_")
    assert json.loads((tmp_path / f"between_{digest}_0.json").read_text()) == row
    assert (tmp_path / f"run_{digest}_0").is_dir() and {"commit", "dirty"} <= row.keys()
