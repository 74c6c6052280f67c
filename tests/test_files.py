"""Whatever is wrong with a file or folder ends in one line that names it and the fix."""

import ast
import errno
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from hnerv_clip import cli, dataset, files
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.files import (
    RunError,
    check_writable,
    explain,
    open_own,
    read_json,
    read_table,
    remove_stale,
    write_atomic,
)
from hnerv_clip.launch.jobs import Job
from hnerv_clip.launch.ranks import Task
from hnerv_clip.runs.locks import hold
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.study.table import read_study
from hnerv_clip.verify.run import is_verified, read_verification

CONFIG = Config.from_params(epochs=3)
DAMAGED_JSON = [b"", b"null", b"[]", b"3", b'"text"', b"{", b"\xff\xfe", b"[" * 100_000]


def refused(capsys, *words, code=1):
    """The error that a command prints in place of a traceback."""
    assert cli.main([str(word) for word in words]) == code
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Traceback" not in told
    return told


@pytest.fixture
def no_teacher(monkeypatch):
    """Fails where a dataset would be loaded, which is before any teacher runs."""
    monkeypatch.setattr(dataset, "_without_embeddings", lambda *_: pytest.fail("too late"))


@pytest.mark.parametrize("number", [
    errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EMFILE, errno.EIO, errno.EDQUOT])
def test_each_refusal_of_the_system_names_file_and_fix(number):
    told = explain(OSError(number, os.strerror(number), "out/run"))
    assert told.startswith(f"out/run: {os.strerror(number)}; ") and files.FIXES[number] in told
    assert explain(OSError("no number")) == "no number"


@pytest.mark.parametrize("content", DAMAGED_JSON)
def test_json_that_is_no_object_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match="config.json is damaged.*put it back"):
        read_json(path, fix="put it back")


@pytest.mark.parametrize("content, message", [
    ({}, "lacks pid"), ({"pid": None}, "its pid is 'None'"), ({"pid": True}, "its pid is 'True'"),
    ({"pid": "7"}, "its pid is '7'")])
def test_json_without_what_it_must_hold_is_refused(tmp_path, content, message):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match=message):
        read_json(path, keys={"pid": int}, fix="remove it")
    path.write_text('{"pid": 7}', encoding="utf-8")
    assert read_json(path, keys={"pid": (int, type(None))}, fix="") == {"pid": 7}


@pytest.mark.parametrize("content", [b"", b"\n", b"a,b\n1,2\n", b"epoch\n\xff\n",
                                     b"epoch\n1,2,3\n1,2,3,4\n\"\n"])
def test_tables_that_are_no_such_tables_are_refused(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(RunError, match="metrics.csv is damaged.*train again"):
        read_table(path, ["epoch"], fix="train again")


def test_what_cannot_be_written_is_known_before_and_nothing_is_left(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "in", tmp_path / ("n" * 300)):
        with pytest.raises(RunError, match="cannot write to .*; .*cho"):
            check_writable(folder)
    with pytest.raises(RunError, match="cannot write to /proc/none"):
        check_writable(Path("/proc/none/run"))


def test_writing_over_a_folder_is_refused(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(RunError, match="cannot write .*x.json"):
        write_atomic(tmp_path / "x.json", lambda file: file.write(b"x"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_killed_processes_left_is_removed(tmp_path):
    code = ("import os, sys; from pathlib import Path; from hnerv_clip.files import write_atomic\n"
            "write_atomic(Path(sys.argv[1]), lambda file: os.kill(os.getpid(), 9))")
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "metrics.csv")])
    assert killed.returncode == -9 and len(list(tmp_path.glob(".metrics.csv.*.tmp"))) == 1
    other = tmp_path / ".job.json.another-machine.1.tmp"  # may be at work there
    own = tmp_path / f".summary.json.{files.platform.node()}.{os.getpid()}-1.tmp"
    for path in (other, own):
        path.write_text("", encoding="utf-8")
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {other, own}
    os.utime(other, (0, 0))
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {own}


def test_links_are_not_followed_out_of_the_folder(tmp_path):
    run, secret = RunDir.create(tmp_path / "run", CONFIG), tmp_path / "secret.txt"
    secret.write_text("mine", encoding="utf-8")
    for name in (".lock", ".launch", "rank0.txt"):
        (run.path / name).symlink_to(secret)
    with pytest.raises(OSError, match="symbolic link"):
        run.log("line")
    for enter in (run.lock, lambda: hold(run.path / ".launch", wait=True)):
        with pytest.raises(OSError, match="symbolic link") as caught:
            with enter():
                pass
        assert "remove it" in explain(caught.value)
    run.save_checkpoint("model_best.pth", {"w": 1})
    (run.path / "model_latest.pth").symlink_to(secret)
    run.save_checkpoint("model_latest.pth", {"w": 1})  # takes the link's place
    assert secret.read_text(encoding="utf-8") == "mine"


def test_files_are_utf8_in_every_locale(tmp_path):
    """A run whose video has a name of its own is read where the locale is Latin-1 or C."""
    run = RunDir.create(tmp_path / "run", CONFIG.replace(data_path="вело.mp4"))
    code = ("import sys; from hnerv_clip.runs.run_dir import RunDir; run = RunDir(sys.argv[1]);"
            "run.log('\\xe9'); assert run.config().video.data_path == sys.argv[2].encode().decode("
            "'unicode_escape')")
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, str(run.path),
         "вело.mp4".encode("unicode_escape").decode()], capture_output=True, text=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr
    assert (run.path / "rank0.txt").read_text(encoding="utf-8").endswith("é\n")
    with open_own(run.path / "rank0.txt", "a") as file:
        assert file.encoding == "utf-8"


def test_every_text_file_is_opened_as_utf8():
    """In every module: `open` and `read_text` otherwise take the locale's encoding."""
    found = []
    for path in Path(files.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and takes_locale(node):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "name encoding=\"utf-8\" in:\n" + "\n".join(found)


def takes_locale(call):
    """Whether a call opens text in the locale's encoding."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    named = any(keyword.arg in ("encoding", None) for keyword in call.keywords)
    if named or name not in ("read_text", "write_text", "open"):
        return False
    if name == "open":  # the function, not what a container or an image has of that name
        mode = call.args[1] if len(call.args) > 1 else ast.Constant("r")
        return isinstance(call.func, ast.Name) and "b" not in str(getattr(mode, "value", "b"))
    return len(call.args) <= (name == "write_text")


@pytest.mark.parametrize("name, value", [
    ("batch_size", 9223372036854775807), ("epochs", 1e30), ("seed", 2**63),
    ("crop_list", "640_99999999999"), ("clip_dim", 2**40)])
def test_numbers_beyond_all_use_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*must be at most"):
        Config.from_params(**{name: value})


# The command line


@pytest.mark.parametrize("outf", ["file", "file/in", "n" * 300, "/proc/none/run"])
def test_a_bad_run_folder_is_told_before_the_teacher_runs(tmp_path, capsys, no_teacher, outf):
    (tmp_path / "file").write_text("", encoding="utf-8")
    path = tmp_path / outf
    told = refused(capsys, "train", "--outf", path, "--cache_dir", tmp_path / "cache")
    assert str(path) in told and "cannot write to" in told
    told = refused(capsys, "prepare", "--cache_dir", path)
    assert str(path) in told and "cannot write to" in told


def test_another_run_in_the_folder_is_told_before_the_teacher_runs(tmp_path, capsys, no_teacher):
    run = RunDir.create(tmp_path / "run", CONFIG)
    (run.path / "metrics.csv").write_text("epoch\n1\n", encoding="utf-8")
    assert "epochs: 3 there, 4 asked" in refused(capsys, "train", "--outf", run.path,
                                                 "--epochs", "4")


def test_a_relative_path_is_the_runs_own_also_where_its_provenance_is_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir.create(tmp_path / "run", CONFIG.replace(data_path=str(tmp_path / "clip.mp4")))
    (run.path / "metrics.csv").write_text("epoch\n1\n", encoding="utf-8")
    (run.path / "provenance.json").write_text("null", encoding="utf-8")
    RunDir.check(run.path, CONFIG.replace(data_path="clip.mp4"))
    with pytest.raises(RunError, match="data_path"):
        RunDir.check(run.path, CONFIG.replace(data_path="other.mp4"))


@pytest.mark.parametrize("command", [["evaluate"], ["search"], ["verify"], ["index", "INDEX"]])
@pytest.mark.parametrize("content", [b"null", b"[]", b"", b'{"epochs": "\xc3\xa9"}', None])
def test_a_damaged_config_is_told(tmp_path, capsys, no_teacher, command, content):
    run = RunDir.create(tmp_path / "run", CONFIG)
    if content is None:
        (run.path / "config.json").unlink()
        (run.path / "config.json").mkdir()
    else:
        (run.path / "config.json").write_bytes(content)
    words = [str(tmp_path / "index") if word == "INDEX" else word for word in command]
    told = refused(capsys, *words, run.path, *["hare"] * (command == ["search"]))
    assert "config.json" in told and ("in another outf" in told or "folder" in told)


@pytest.mark.parametrize("content", DAMAGED_JSON[:4] + [
    b'{"cluster": "moon", "token": "1", "host": "h"}',
    b'{"cluster": "local", "token": "1", "host": "h", "pid": "1"}',
    b'{"cluster": "slurm", "token": "1", "host": "h", "job_id": "", "folder": "",'
    b' "slurm_cluster": ""}'])
def test_a_damaged_job_record_is_told(tmp_path, content):
    run = RunDir.create(tmp_path / "run", CONFIG)
    job = Job("run", run.path, CONFIG, Task(CONFIG.params(), str(run.path), "", None))
    (run.path / "job.json").write_bytes(content)
    with pytest.raises(RunError, match="job.json is damaged.*launch the run again"):
        _ = job.state
    (run.path / "metrics.csv").write_bytes(b"epoch,psnr_db\nx\xff,1\n")
    assert job.epoch == 0 and job.figures() == ""  # only shown


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"format": 3}', b'{"format": "2"}'])
def test_a_damaged_verification_is_told(tmp_path, content):
    (tmp_path / "verification.json").write_bytes(content)
    with pytest.raises(RunError, match="verification.json is damaged.*verify again"):
        read_verification(tmp_path)
    assert not is_verified(tmp_path)  # so `hnerv-clip verify` makes it anew


@pytest.mark.parametrize("content", [b"", b"null", b"a,b\n1,2\n"])
def test_a_damaged_table_of_a_run_is_told(tmp_path, content):
    run = RunDir.create(tmp_path / "run", CONFIG)
    for name, read in (("evaluation.csv", run.evaluation), ("metrics.csv", run.metrics)):
        (run.path / name).write_bytes(content)
        with pytest.raises(RunError, match=f"{name} is damaged.*again with the same parameters"):
            read()
    (tmp_path / "study.csv").write_bytes(content)
    with pytest.raises(RunError, match="study.csv is damaged.*hnerv-clip study --csv"):
        read_study(tmp_path / "study.csv")


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"parts": {}}'])
def test_a_foreign_bench_file_is_told_before_anything_is_measured(tmp_path, content, capsys):
    path = tmp_path / "bench.json"
    path.write_bytes(content)
    told = refused(capsys, "bench", "--parts", "decode", "--out", path, "--outf", tmp_path / "fit",
                   "--device", "cpu")
    assert "bench.json is damaged" in told and "another --out" in told


def damage_keys(state):
    del state["model"]


def damage_shape(state):
    name = next(iter(state["model"]))
    state["model"][name] = torch.zeros(3, 3)


def damage_nan(state):
    name = next(iter(state["model"]))
    state["model"][name] = state["model"][name] * float("nan")


def damage_config(state):
    state["config"] = {"epochs": None}


def damage_kind(state):
    state["model"] = [1, 2]


@pytest.mark.parametrize("damage", [damage_keys, damage_shape, damage_nan, damage_config,
                                    damage_kind, b"", b"null", None])
def test_a_damaged_checkpoint_is_told_with_what_to_do(trained_copy, cache_dir, capsys, damage):
    path = trained_copy / "model_best.pth"
    if damage is None:
        path.unlink()
        path.mkdir()
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        state = torch.load(path, weights_only=True)
        damage(state)
        torch.save(state, path)
    told = refused(capsys, "evaluate", trained_copy, "--cache_dir", cache_dir)
    assert "model_best.pth" in told
    if damage is not None:
        assert "remove model_best.pth and summary.json" in told and "train again" in told


@pytest.mark.parametrize("name, kind, said", [
    ("../outside.txt", tarfile.REGTYPE, "outside"), ("/outside.txt", tarfile.REGTYPE, "outside"),
    ("link", tarfile.SYMTYPE, "no plain file")])
@pytest.mark.parametrize("old", [False, True])
def test_an_archive_unpacks_only_plain_files_within_its_folder(tmp_path, monkeypatch, name, kind,
                                                               said, old):
    """Also by a Python without the filter of 3.11.4."""
    if old:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
        monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: [
            self.extract(member, path) for member in self])
    for file, names in (("good.tar", ["a/b.txt"]), ("bad.tar", ["a.txt", name])):
        with tarfile.open(tmp_path / file, "w") as archive:
            for own in names:
                member = tarfile.TarInfo(own)
                member.type, member.linkname = kind if own == name else tarfile.REGTYPE, "/etc"
                archive.addfile(member)
    files.unpack(tmp_path / "good.tar", tmp_path / "there")
    assert (tmp_path / "there" / "a" / "b.txt").is_file()
    with pytest.raises(RunError, match=said):
        files.unpack(tmp_path / "bad.tar", tmp_path / "there")
    assert not (tmp_path / "there" / "a.txt").exists() and not Path("/outside.txt").exists()
