"""The study's list of runs, its runner on a few small ones, and the table of what they gave."""

import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pandas as pd
import pytest
from conftest import shrink_teacher_pictures

from hnerv_clip import cli
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.files import unpack
from hnerv_clip.inference import load_run, predict_embeddings
from hnerv_clip.runs.run_dir import RunDir, load_checkpoint
from hnerv_clip.study import plan as study_plan
from hnerv_clip.study import run as study_run
from hnerv_clip.study import table as study_table
from hnerv_clip.study.plan import study_base, study_configs
from hnerv_clip.study.run import run_study
from hnerv_clip.study.table import StudyError
from hnerv_clip.teachers import encode_queries, load_teacher, parse_queries
from hnerv_clip.train import check_run
from hnerv_clip.verify.run import read_verification
from hnerv_clip.video import load_video

FULL = study_base("full", {"teacher": "efficientnet-lite0", "clip_dim": 1280})


def test_every_run_can_run():
    configs = study_configs(FULL)
    assert list(configs)[0] == "bunny_hybrid_base_s0" and configs["bunny_hybrid_base_s0"] == FULL
    assert len(set(configs.values())) == len(configs)
    videos = {}  # decoded once: only its size matters, not which frames are held out
    for config in configs.values():
        name = config.video.data_path
        videos[name] = videos.get(name) or load_video(config.video)
        check_run(config, videos[name])
    for video in study_plan.VIDEOS:
        for kind in study_plan.KINDS:
            assert {f"{video}_{kind}_base_s{seed}" for seed in range(3)} <= set(configs)
    weights = {c.train.clip_loss_weight for n, c in configs.items() if "bunny_hybrid_" in n}
    assert weights == {0.5, *study_plan.LAMBDAS}


def test_the_bundled_teacher_knows_the_labels_of_every_video():
    teacher = load_teacher(FULL.teacher, "cpu")
    assert set(study_plan.LABELS) == set(study_plan.VIDEOS)
    for labels in study_plan.LABELS.values():
        assert encode_queries(parse_queries(labels), teacher).shape == (8, 1280)


def test_the_study_is_evaluated_at_the_end_unless_asked():
    assert study_base("full", {"epochs": "7"}).train.eval_freq == 7
    assert study_base("full", {"epochs": "7", "eval_freq": "2"}).train.eval_freq == 2


def test_patterns_choose_runs():
    chosen = study_configs(FULL, ["bikes_*_s1", "bunny_pe_base_s0"])
    assert list(chosen) == ["bikes_hybrid_base_s1", "bikes_xyt_base_s1", "bikes_pe_base_s1",
                            "bikes_hybrid_stage_2_s1", "bikes_xyt_stage_2_s1",
                            "bikes_hybrid_pixels_only_s1",
                            *(f"bikes_hybrid_phase_{phase}_s1" for phase in study_plan.PHASES),
                            "bunny_pe_base_s0"]
    with pytest.raises(ConfigError, match="--list"):
        study_configs(FULL, ["bunnies_*"])
    with pytest.raises(ConfigError, match="CLIP head"):
        study_configs(FULL.replace(predict_clip=False))


def test_positions_are_jittered_by_half_their_distance():
    configs = study_configs(FULL)
    jitters = {name: configs[f"bunny_xyt_{name}_s0"].train.clip_jitter
               for name in ("base", "jitter_half", "dense_jitter")}
    assert jitters == {"base": 0, "jitter_half": 139, "dense_jitter": 70}
    for settings, fix in [({"patch_grid": "1_1"}, "patch_grid=2_4"),
                          ({"crop_list": ""}, "crop_list=640_1280")]:
        with pytest.raises(ConfigError, match=fix):
            study_configs(FULL.replace(**settings))


@pytest.fixture(scope="module")
def done_cache(tmp_path_factory):
    """Of `done` alone: embeddings of smaller pictures."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def done(small_config, done_cache, tmp_path_factory):
    """Two runs that end and one whose loss becomes NaN between them; the teacher sees 64×64."""
    folder = tmp_path_factory.mktemp("study")
    configs = study_configs(small_config, ["bunny_hybrid_base_s0", "bunny_xyt_stage_all_s1"])
    xyt = configs["bunny_xyt_stage_all_s1"].replace(modelsize=0.2, device="cpu:0")
    configs = {"bunny_hybrid_base_s0": configs["bunny_hybrid_base_s0"],
               "bunny_hybrid_lambda_1_s0": small_config.replace(lr=1e30),
               "bunny_xyt_stage_all_s1": xyt}
    said = []
    with pytest.MonkeyPatch.context() as patch:
        shrink_teacher_pictures(patch)
        states = run_study(configs, folder, base=small_config, cache_dir=done_cache,
                           say=said.append)
    return folder, configs, states, said


def test_a_run_that_fails_is_reported_and_the_others_go_on(done, small_config, done_cache):
    folder, configs, states, said = done
    assert states == {"bunny_hybrid_base_s0": "finished", "bunny_hybrid_lambda_1_s0": "failed",
                      "bunny_xyt_stage_all_s1": "finished"}
    assert any("bunny_hybrid_lambda_1_s0 failed" in line and "lower lr" in line for line in said)
    assert "TrainError" in (folder / "bunny_hybrid_lambda_1_s0.error.txt").read_text()
    verified = read_verification(folder / "bunny_hybrid_base_s0")
    assert verified["labels"] == study_plan.LABELS["bunny"].split("; ")
    again = run_study(configs, folder, base=small_config, cache_dir=done_cache, minutes=0)
    assert again == states | {"bunny_hybrid_lambda_1_s0": "waiting"}


def test_a_run_of_another_process_is_left_alone(done, small_config, done_cache):
    folder, configs, *_ = done
    name = "bunny_hybrid_lambda_1_s0"
    with RunDir(folder / name).lock():
        states = run_study({name: configs[name]}, folder, base=small_config, cache_dir=done_cache)
    assert states == {name: "busy"}


@pytest.mark.slow
def test_stopped_in_the_middle_the_next_call_goes_on(small_config, small_dataset, cache_dir,
                                                     tmp_path):
    """Twice SIGTERM in a run of many epochs: the worker ends too, and its checkpoint is there."""
    name = "bunny_hybrid_base_s0"
    words = [word for key, value in small_config.replace(epochs=100_000).params().items()
             if value != "" for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "hnerv_clip.cli", "study", "--outf", str(tmp_path), "--only",
               name, "--cache_dir", str(cache_dir), "--no-verify", *words]
    epoch = 0
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while _epoch(tmp_path / name) <= epoch:
                assert process.poll() is None, "it ended by itself"
                time.sleep(0.2)
            process.terminate()
            assert process.wait(timeout=60) == 143
        finally:
            process.kill()
        with RunDir(tmp_path / name).lock():  # no worker is left that trains it
            epoch = _epoch(tmp_path / name)
    assert not RunDir(tmp_path / name).finished


def _epoch(run_dir):
    latest = run_dir / "model_latest.pth"
    return load_checkpoint(latest)["epoch"] if latest.exists() else 0


def test_no_run_is_begun_that_would_not_end_in_time(tmp_path):
    now = time.monotonic()
    assert study_run._next_run(["a"], {}, tmp_path, now + 60, []) == "a"
    assert study_run._next_run(["a"], {}, tmp_path, now + 60, [10, 20, 90]) == "a"
    assert study_run._next_run(["a"], {}, tmp_path, now + 60, [10, 70, 90]) is None
    assert study_run._next_run(["a"], {}, tmp_path, now - 1, []) is None


def test_the_table_is_what_the_runs_gave(done, done_cache, tmp_path):
    folder, configs, *_ = done
    table = study_table.write_study(folder, tmp_path / "study.csv").set_index("run")
    assert table.index.tolist() == ["bunny_hybrid_base_s0", "bunny_xyt_stage_all_s1"]
    assert table.variant.tolist() == ["base", "stage_all"] and table.seed.tolist() == [0, 1]
    assert table.kind.tolist() == ["hybrid", "xyt"]
    assert table.columns.is_unique and "cpu" not in table.device.tolist()  # a model's name
    summary = RunDir(folder / "bunny_hybrid_base_s0").summary()
    row = table.loc["bunny_hybrid_base_s0"]
    assert row.psnr_held_out_db == summary["eval_psnr_val_interpolated"]
    assert row.psnr_held_out_encoder_db == summary["eval_psnr_val"]
    for part, name in [("train", "train"), ("held_out", "val_interpolated")]:
        for measure in ("clip_similarity", "clip_centred"):
            assert row[f"{measure}_{part}"] == pytest.approx(summary[f"eval_{measure}_{name}"],
                                                             abs=1e-5)
    run = load_run(folder / "bunny_xyt_stage_all_s1", cache_dir=done_cache, device="cpu")
    own = predict_embeddings(run.model, run.dataset).numpy()
    right, split = run.dataset.embeddings.numpy(), run.dataset.split
    mean = right[split.train].mean((0, 1))
    constant = (right[split.val] @ (mean / np.linalg.norm(mean))).mean()
    raw = (own[split.val] * right[split.val]).sum(-1).mean()
    row = table.loc["bunny_xyt_stage_all_s1"]
    assert row.skill_held_out == pytest.approx((raw - constant) / (1 - constant), abs=1e-4)
    first = (own[split.val] @ right.reshape(-1, 1280).T).argmax(-1)
    exact = first == split.val[:, None] * 8 + np.arange(8)
    assert row.r1_held_out == pytest.approx(exact.mean())
    assert np.isfinite(row[["clip_centred_between_held_out", "over_own_places_anywhere_train",
                            "skill_teacher_places_anywhere_held_out"]].astype(float)).all()
    pd.testing.assert_frame_equal(study_table.read_study(tmp_path / "study.csv").set_index("run"),
                                  table, check_dtype=False, rtol=1e-4)
    with pytest.raises(StudyError, match="--csv"):
        study_table.read_study(tmp_path / "nothing.csv")
    broken = pd.read_csv(tmp_path / "study.csv")
    broken.loc[1, "clip_centred_train"] = np.nan
    broken.to_csv(tmp_path / "broken.csv")
    with pytest.raises(StudyError, match="xyt_stage_all_s1 has no clip_centred_train"):
        study_table.read_study(tmp_path / "broken.csv")


def test_a_pack_holds_all_but_the_checkpoints(done, tmp_path):
    folder, configs, *_ = done
    RunDir.create(folder / "bunny_pe_base_s0", configs["bunny_hybrid_base_s0"])  # only begun
    size_bytes = study_table.pack_study(folder, tmp_path / "study.tar.xz")
    assert size_bytes == (tmp_path / "study.tar.xz").stat().st_size < 200_000
    unpack(tmp_path / "study.tar.xz", tmp_path / "there")
    names = [path.name for path in (tmp_path / "there").rglob("*")]
    assert names and not any(name.endswith((".pth", ".hnerv")) for name in names)
    assert not any(name.startswith("bunny_pe") for name in names)
    pd.testing.assert_frame_equal(study_table.study_table(tmp_path / "there"),
                                  study_table.study_table(folder))
    with pytest.raises(StudyError, match="first"):
        study_table.study_table(tmp_path / "nowhere")
    with pytest.raises(StudyError, match="no runs"):
        study_table.pack_study(tmp_path / "nowhere", tmp_path / "x.tar.xz")


def test_the_command_lists_and_gathers(done, tmp_path, capsys):
    folder, configs, *_ = done
    words = [w for n, v in Config.from_params(**configs["bunny_hybrid_base_s0"].params())
             .params().items() if v != "" for w in (f"--{n}", str(v))]
    assert cli.main(["study", "--list", "--only", "bikes_pe_*", *words]) == 0
    assert "bikes_pe_base_s2" in capsys.readouterr().out
    assert cli.main(["study", "--outf", str(folder), "--only", "bunny_hybrid_base_s0", *words,
                     "--minutes", "0", "--csv", str(tmp_path / "a.csv"),
                     "--pack", str(tmp_path / "a.tar.xz")]) == 0
    assert "1 finished" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "a.csv")
    assert len(table) == 2 and (tmp_path / "a.tar.xz").exists()
    command = ["study", "--outf", str(folder), "--only", "bunny_hybrid_base_s0", *words,
               "--minutes", "0", "--csv", str(tmp_path / "a.csv")]
    assert cli.main(command) == 0, "it loses nothing"
    for published, told in (
            (pd.concat([table, table.head(1).assign(run="bikes_pe_base_s2")]),
             "such as bikes_pe_base_s2, and would lose 1 of 3: give another --csv"),
            (table.assign(epochs=300), "with another epochs: give another --csv")):
        published.to_csv(tmp_path / "a.csv", index=False)
        before = (tmp_path / "a.csv").read_text()
        capsys.readouterr()
        assert cli.main(command) == 1 and told in capsys.readouterr().err
        assert (tmp_path / "a.csv").read_text() == before
    assert cli.main([*command, "--force"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), table)


def test_a_pack_is_replaced_only_where_it_loses_nothing(done, tmp_path, capsys):
    folder, configs, *_ = done
    settings = [w for n, v in configs["bunny_hybrid_base_s0"].params().items() if v != ""
                for w in (f"--{n}", str(v))]
    pack = tmp_path / "a.tar.xz"
    command = ["study", "--only", "bunny_hybrid_base_s0", *settings, "--minutes", "0",
               "--pack", str(pack), "--outf"]
    assert cli.main([*command, str(folder)]) == 0
    assert cli.main([*command, str(folder)]) == 0, "of the same runs"
    capsys.readouterr()
    packed = pack.read_bytes()
    names = sorted(path.parent.name for path in folder.glob("*/summary.json"))
    assert len(names) == 2
    other = tmp_path / "other"
    shutil.copytree(folder / names[0], other / names[0])
    assert cli.main([*command, str(other)]) == 1
    told = capsys.readouterr().err
    assert f"such as {names[1]}, and would lose 1 of 2: choose another --pack, or add --force" \
        in told and pack.read_bytes() == packed
    assert cli.main([*command, str(other), "--force"]) == 0
    study_table.check_pack(other, pack)
    for content in (b"notes", packed[:len(packed) // 2]):
        pack.write_bytes(content)
        assert cli.main([*command, str(other)]) == 1
        assert "is no pack: choose another --pack" in capsys.readouterr().err
        assert pack.read_bytes() == content


def test_a_pack_may_be_replaced_while_a_run_of_it_is_trained_again(tmp_path):
    run = tmp_path / "runs" / "study" / "bunny_hybrid_base_s0"
    run.mkdir(parents=True)
    rows = tmp_path / "runs" / "fields" / "row.json"
    rows.parent.mkdir()
    told = tmp_path / "runs" / "bikes.error.txt"
    files = [run / "config.json", run / "summary.json", rows, told]
    for file in files:
        file.write_text("{}")
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        for file in files:
            archive.add(file, str(file.relative_to(tmp_path / "runs")))
    (run / "summary.json").unlink()
    told.unlink()
    study_table.check_pack(tmp_path / "runs", tmp_path / "a.tar.xz")
    study_table.write_pack(tmp_path / "a.tar.xz", tmp_path / "runs", [rows])
    with tarfile.open(tmp_path / "a.tar.xz") as archive:  # as it was until it is finished again
        assert sorted(archive.getnames()) == ["fields/row.json", *(
            f"study/{run.name}/{name}.json" for name in ("config", "summary"))]
    (tmp_path / "runs" / "study" / run.name / "summary.json").write_text("new")
    study_table.write_pack(tmp_path / "a.tar.xz", tmp_path / "runs", [*files[:2]])
    with tarfile.open(tmp_path / "a.tar.xz") as archive:
        assert archive.extractfile(f"study/{run.name}/summary.json").read() == b"new"
        assert len(archive.getnames()) == 3
    study_table.write_pack(tmp_path / "a.tar.xz", tmp_path / "runs", [*files[:2]], force=True)
    with tarfile.open(tmp_path / "a.tar.xz") as archive:
        assert len(archive.getnames()) == 2
    study_table.write_pack(tmp_path / "a.tar.xz", tmp_path / "runs", [*files[:3]])
    rows.unlink()
    with pytest.raises(StudyError, match="such as fields/row.json, and would lose 1 of 2"):
        study_table.check_pack(tmp_path / "runs", tmp_path / "a.tar.xz")
