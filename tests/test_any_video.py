"""Videos of any size, from the command line to the decoded frames; and videos that moved."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from hnerv_clip.cli import main
from hnerv_clip.config import Config
from hnerv_clip.dataset import prepare_dataset
from hnerv_clip.inference import decode_frames, load_run, predict_embeddings
from hnerv_clip.launch import launch
from hnerv_clip.paths import match_paths
from hnerv_clip.readers import VideoFile
from hnerv_clip.runs.run_dir import RunDir, RunError
from hnerv_clip.train import check_run, train
from hnerv_clip.video import write_video

QUICK = ("--teacher efficientnet-lite0 --modelsize 0.05 --enc_dim 16_4 --epochs 2 "
         "--pixel_loss_warmup_epochs 1 --eval_freq 2 --device cpu").split()


def make_clip(path, hw=(92, 52), count=6, shift=0):
    """A moving ramp; sizes whose auto strides pad both sides."""
    y, x = torch.meshgrid(*map(torch.arange, hw), indexing="ij")
    frames = torch.stack([torch.stack([2 * y + 9 * t + shift, 3 * x, x + y]) % 256
                          for t in range(count)]).to(torch.uint8)
    return write_video(path, frames, 24, crf=10)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, cache_dir):
    """(folder, clip, decodes): a run of an upright clip, trained by the command, no size named."""
    folder, decodes = tmp_path_factory.mktemp("any"), []
    clip = make_clip(folder / "clip.mp4")
    read = VideoFile.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoFile, "read", lambda self, *args: decodes.append(self.path) or
                      read(self, *args))
        assert main(["train", "--data_path", str(clip), "--outf", str(folder / "out"), *QUICK,
                     "--cache_dir", str(cache_dir)]) == 0
    return folder / "out", clip, decodes


@pytest.fixture
def run(trained_once):
    """(folder, clip)."""
    return trained_once[:2]


def test_an_inline_training_decodes_its_video_once(trained_once):
    _, clip, decodes = trained_once
    assert decodes == [clip]


def test_config_json_says_which_clip_dim_was_chosen(run):
    params = json.loads((run[0] / "config.json").read_text())
    assert params.get("params", params)["clip_dim"] == 1280


def test_a_clip_of_any_size_trains_without_a_size_named(run, cache_dir):
    folder, clip = run
    config = RunDir(folder).config()
    assert config.resolved and config.model.pad_list == (108, 54) and config.video.crop_list is None
    assert config.teacher.patch_grid == (4, 2) and config.video.data_path == str(clip)
    loaded = load_run(folder, cache_dir=cache_dir, device="cpu")
    assert loaded.model.plan.padded_hw == (108, 54)
    assert decode_frames(loaded.model, loaded.dataset, [0, 3]).shape == (2, 3, 92, 52)
    assert predict_embeddings(loaded.model, loaded.dataset).shape == (6, 8, 1280)
    table = pd.read_csv(folder / "evaluation.csv")
    assert np.isfinite(table.psnr_db).all() and (table.variant == "quantised").any()


def test_padding_counts_in_no_measure(run, cache_dir):
    loaded = load_run(run[0], cache_dir=cache_dir, device="cpu")
    frames = loaded.dataset.video.frames[:1]
    pred = decode_frames(loaded.model, loaded.dataset, [0])
    error = (pred.float() - frames.float()).square().mean() / 255**2
    table = pd.read_csv(run[0] / "evaluation.csv")
    row = table[(table.variant == "trained") & (table.frame == 0)].iloc[0]
    assert row.psnr_db == pytest.approx(-10 * torch.log10(error).item(), abs=0.02)


def test_a_stored_padded_video_gives_frames_of_the_original_size(run):
    from hnerv_clip.codec import decode_video

    model, embeddings = decode_video(run[0] / "video.hnerv")
    assert model.rgb(model.features(embeddings[:1])).shape == (1, 3, 92, 52)


def test_a_finished_run_is_the_same_with_auto_settings_again(run, cache_dir, capsys):
    assert main(["train", "--data_path", str(run[1]), "--outf", str(run[0]), *QUICK,
                 "--cache_dir", str(cache_dir)]) == 0


def test_a_run_whose_video_moved_goes_on_from_the_new_place(run, cache_dir, tmp_path, capsys):
    folder, clip = shutil.copytree(run[0], tmp_path / "run"), tmp_path / "elsewhere" / "moved.mp4"
    clip.parent.mkdir()
    shutil.copy(run[1], clip)
    facts = json.loads((folder / "config.json").read_text()) | {"data_path": "/gone/clip.mp4"}
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match="/gone/clip.mp4, is not there any more.*--data_path"):
        load_run(folder, cache_dir=cache_dir, device="cpu")
    command = ["evaluate", str(folder), "--cache_dir", str(cache_dir), "--device", "cpu"]
    assert main([*command, "--data_path", str(clip)]) == 0
    (folder / "summary.json").unlink()  # as if it had not ended
    config = RunDir(folder).config().replace(data_path=str(clip))
    train(config, folder, cache_dir=cache_dir, progress=False)
    assert RunDir(folder).config().video.data_path == str(clip)
    assert main(command) == 0  # the new place is kept


@pytest.mark.parametrize("preset", ["paper", "best", "auto"])
def test_encode_refuses_a_preset_of_other_settings_at_once(preset, run, cache_dir, tmp_path, capsys,
                                                           monkeypatch):
    words = ["encode", str(run[1]), str(tmp_path / "v.hnerv"), "--work", str(run[0]), "--preset",
             preset, "--cache_dir", str(cache_dir), "--rate_epochs", "0"]
    if preset == "auto":  # whose every setting is the run's
        assert main([*words, *QUICK]) == 0
    monkeypatch.setattr(VideoFile, "read", None)
    assert main([*words, "--force"]) == 1
    told, differs = capsys.readouterr().err, {"paper": "crop_list", "best": "optimizer",
                                              "auto": "epochs"}[preset]
    assert re.search(rf"other settings than preset {preset} \(.*{differs}.*--work", told)


def test_encode_refuses_another_video_and_finds_one_that_moved(run, cache_dir, tmp_path, capsys,
                                                               monkeypatch):
    folder, moved = shutil.copytree(run[0], tmp_path / "run"), tmp_path / "moved.mp4"
    other = make_clip(tmp_path / "other.mp4", shift=1)
    shutil.copy(run[1], moved)
    out = str(tmp_path / "v.hnerv")
    words = [out, "--work", str(folder), "--cache_dir", str(cache_dir), "--device", "cpu",
             "--rate_epochs", "0"]
    assert main(["encode", str(other), *words]) == 1  # also where the training is complete
    told = capsys.readouterr().err
    assert f"{other} shows other frames" in told and "--work FOLDER" in told
    for given in (words, words, words[:-2]):  # written, then there, also with what it has
        assert main(["encode", str(moved), *given]) == 0
    assert re.findall("is there and complete|PSNR(?=.* over all)", capsys.readouterr().out)[1:] == [
        "is there and complete", "PSNR"] * 2
    with monkeypatch.context() as patch:  # before the video is decoded
        patch.setattr(VideoFile, "read", None)
        for other in (["--rate", "0.01", "--rate_epochs", "1"], ["--rate_epochs", "2"]):
            assert main(["encode", str(moved), *words[:-2], *other]) == 1
            assert "stored with no --rate: give the same" in capsys.readouterr().err
        assert main(["encode", out, str(tmp_path / "again.hnerv")]) == 1
        assert "is a stored video already" in capsys.readouterr().err
    for wrong in (["--rate", "7"], ["--rate", "nan"], ["--rate_epochs", "-3"]):
        assert main(["encode", str(moved), *words[:-2], *wrong]) == 2
        assert f"{wrong[0]} {wrong[1]}: " in capsys.readouterr().err


def test_a_finished_run_is_returned_whose_video_moved(run, cache_dir, tmp_path, monkeypatch):
    moved, config = tmp_path / "moved.mp4", RunDir(run[0]).config()
    shutil.copy(run[1], moved)
    found = train(config.replace(data_path=str(moved)), run[0], cache_dir=cache_dir)
    assert found.summary == RunDir(run[0]).summary()
    monkeypatch.setattr("hnerv_clip.dataset.load_video", None)  # where its path is the run's
    assert train(config, run[0], cache_dir=cache_dir).summary == found.summary


def test_another_video_is_refused(run, cache_dir, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(run[0], tmp_path / "run")
    other = make_clip(tmp_path / "other.mp4", shift=1)
    command = ["evaluate", str(folder), "--cache_dir", str(cache_dir), "--device", "cpu",
               "--data_path", str(other)]
    assert main(command) == 1  # not that its embeddings are missing
    message = capsys.readouterr().err
    assert str(other) in message and str(run[1]) in message and "sha256" in message
    prepared = RunDir(folder).config().replace(data_path=str(other))
    prepare_dataset(prepared, cache_dir, device="cpu", progress=False)
    for how in ("finished", "begun"):
        if how == "begun":
            (folder / "summary.json").unlink()
        with pytest.raises(RunError, match="shows other frames"):
            train(prepared, folder, cache_dir=cache_dir, progress=False)
        with pytest.raises(RunError, match="shows other frames"):
            launch(prepared, folder, cache_dir=cache_dir)
        monkeypatch.setattr("hnerv_clip.dataset.teacher_embeddings", None)  # before the teacher
        assert main(["train", "--data_path", str(other), "--outf", str(folder), *QUICK,
                     "--cache_dir", str(cache_dir)]) == 1
        assert f"{other} shows other frames" in capsys.readouterr().err
    shutil.copy(other, tmp_path / "same.mp4")
    assert RunDir(folder).config().video.data_path == str(run[1])


def test_a_video_changed_in_its_place_is_refused(run, cache_dir, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    facts = json.loads((folder / "provenance.json").read_text()) | {"data_digest": "0" * 64}
    (folder / "provenance.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match="shows other frames"):
        load_run(folder, cache_dir=cache_dir, device="cpu")


def test_one_path_for_all_runs_or_one_for_each():
    assert match_paths([], 2) == ["", ""] and match_paths(["a"], 2) == ["a", "a"]
    assert match_paths(["a", "b"], 2) == ["a", "b"]
    with pytest.raises(ValueError, match="3 videos for 2 runs"):
        match_paths(["a", "b", "c"], 2)


def test_check_run_chooses_sizes_and_makes_the_path_absolute(tmp_path, monkeypatch):
    make_clip(tmp_path / "clip.mp4", count=2)
    monkeypatch.chdir(tmp_path)
    config = check_run(Config.from_params(data_path="clip.mp4", data_split="1_1_1"))
    assert config.resolved and config.video.data_path == str(tmp_path / "clip.mp4")
