"""The command line, as typed."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

from hnerv_clip import cli
from hnerv_clip.cli.settings import SHORT
from hnerv_clip.config import Config, ConfigError, param_names, settings_table
from hnerv_clip.teachers import efficientnet, sentences
from hnerv_clip.teachers.imagenet import imagenet_classes

# The original description's own command, less what is named differently here
KNOWN = """--data_split 4_5_5 --enc_strds 5 4 4 2 2 --dec_strds 5 4 4 2 2
--conv_type convnext pshuffel --fc_hw 9_16 --enc_dim 64_16
--ks 0_1_5 --reduce 1.2 --lower_width 12 --num_blks 1_1
--modelsize 1.5 --act gelu --epochs 300 -b 2 --lr 0.001 --quant_model_bit 8 --quant_embed_bit 6
--predict_clip --clip_loss_weight 0.5 --pixel_loss_warmup_epochs 50""".split()


def run(*words):
    """Run `hnerv-clip` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "hnerv_clip.cli", *map(str, words)],
                          capture_output=True, text=True)


def test_a_known_command_can_be_typed_over():
    config = Config.from_params(**cli.read_settings(KNOWN))
    assert config == Config.from_params(fc_hw="9_16")


@pytest.mark.parametrize("words, wanted", [
    (["--predict_clip", "False"], {"predict_clip": "False"}),
    (["--reduce", "-1", "--embed", ""], {"reduce": "-1", "embed": ""}),
    (["--lr=1e-2", "-e", "3"], {"lr": "1e-2", "epochs": "3"}),
    (["--enc_strds", "5 4 2 2"], {"enc_strds": "5 4 2 2"}),
])
def test_values_are_read_as_typed(words, wanted):
    assert cli.read_settings(words) == wanted


@pytest.mark.parametrize("words, message", [
    (["--lr"], "--lr needs a value; the default is 0.001"),
    (["3"], "'3' stands without a name"),
    (["--distributed"], "--gpus_per_node"),
    (["--eval_only"], "hnerv-clip evaluate"),
])
def test_what_is_typed_wrongly_is_told(words, message):
    with pytest.raises(ConfigError, match=message):
        cli.read_settings(words)


@pytest.mark.parametrize("given, message", [
    ({"epochs": "eight"}, "epochs='eight': an integer is needed; the default is epochs=300"),
    ({"epochs": True}, "epochs=True: an integer is needed"),
    ({"clip_dim": "x"}, "clip_dim='x': an integer is needed; the default is clip_dim='auto'"),
    ({"lr": "fast"}, "lr='fast': a number is needed; the default is lr=0.001"),
    ({"predict_clip": "maybe"}, "predict_clip='maybe': True or False is needed; the default is "
                                "predict_clip=True"),
    ({"crop_list": "640x1280"}, "crop_list='640x1280': 2 integers are needed; write for example "
                                "crop_list='640_1280'"),
    ({"enc_strds": "5 4.5"}, "enc_strds='5 4.5': one or more integers are needed"),
    ({"enc_dim": "64_wide"}, "enc_dim='64_wide': 2 numbers are needed"),
])
def test_a_setting_of_a_wrong_kind_says_what_is_needed(given, message):
    with pytest.raises(ConfigError) as error:
        Config.from_params(**given)
    assert message in str(error.value)


def test_every_setting_of_a_wrong_kind_is_refused_in_words():
    for name, default in Config().params().items():
        if not isinstance(default, str):
            with pytest.raises(ConfigError, match=f"^{name}='wrong': .* is needed; the default "):
                Config.from_params(**{name: "wrong"})


def test_an_unknown_setting_is_refused_with_the_known_ones(capsys, tmp_path):
    assert cli.main(["train", "--outf", str(tmp_path / "x"), "--epoch", "3"]) == 2
    error = capsys.readouterr().err
    assert error == ("error: unknown parameter 'epoch' (did you mean epochs?): the command "
                     "`hnerv-clip settings` lists all\n")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match=r"'epoch' \(did you mean epochs\?\), 'xyzzy': the"):
        Config().replace(epoch=3, xyzzy=1)


def test_settings_lists_every_parameter(capsys):
    assert cli.main(["settings"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in param_names())
    assert all(meaning in printed for *_, meaning in settings_table())


def test_help_and_settings_load_no_torch():
    code = ("import sys; from hnerv_clip import cli; cli._parser(); "
            "sys.exit(bool({'torch', 'papermill', 'matplotlib'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_run_is_an_error_without_a_traceback(tmp_path):
    done = run("evaluate", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_warning_for_users_is_one_plain_line():
    with cli.plain_warnings():
        assert warnings.formatwarning(UserWarning("a box"), UserWarning, "query.py", 89) == (
            "warning: a box\n")
        assert "timm.py:3" in warnings.formatwarning("old", FutureWarning, "timm.py", 3)
    assert "query.py:89" in warnings.formatwarning("a box", UserWarning, "query.py", 89)


def test_train_evaluate_verify_search(small_config, small_dataset, cache_dir, tmp_path, capsys,
                                      monkeypatch):
    outf, cache = str(tmp_path / "main"), ["--cache_dir", str(cache_dir)]
    settings = [word for name, value in small_config.params().items()
                for word in (f"--{name}", str(value))]
    assert cli.main(["train", "--outf", outf, *cache, *settings]) == 0
    trained = capsys.readouterr().out
    assert "interpolated held_out" in " ".join(trained.split())
    assert cli.main(["evaluate", outf, *cache]) == 0
    assert capsys.readouterr().out.strip() in trained
    assert cli.main(["verify", outf, *cache]) == 0
    told = capsys.readouterr().out
    assert "Temporal Shuffle" in told and "Teacher on Decoded Frame" in told
    again, table = (tmp_path / "main/verification.json").stat(), str(tmp_path / "tables/study.csv")
    assert cli.main(["verify", outf, *cache, "--table", table]) == 0
    assert (tmp_path / "main/verification.json").stat().st_mtime_ns == again.st_mtime_ns
    told = capsys.readouterr().out
    assert max(map(len, told.partition("\nvideo ")[2].splitlines())) <= max(80, len(table))
    assert "video bunny, kind hybrid, source interpolated, runs 1\n" in told
    assert re.search(r"\nIs it better than the nearest training frame\? +CANNOT TELL\n    its "
                     r"error is .*; net wins: too few\s+frames for a\s+test \(2 frames\)\n", told)
    assert "nan" not in told
    assert pd.read_csv(table).when.tolist() == ["cannot tell"]  # of 2 held-out frames
    Path(table).write_text("of another")
    assert cli.main(["verify", outf, *cache, "--table", table]) == 1
    assert f"{table} exists; " in (told := capsys.readouterr().err) and "--replace" in told
    assert Path(table).read_text() == "of another"
    assert cli.main(["verify", outf, *cache, "--table", table, "--replace"]) == 0
    assert pd.read_csv(table).when.tolist() == ["cannot tell"]
    assert (tmp_path / "main/verification.json").stat().st_mtime_ns == again.st_mtime_ns
    assert cli.main(["verify", outf, *cache, "--table", "--replace"]) == 2
    assert "name one, --table FILE.csv" in capsys.readouterr().err
    Path(table).write_text("of another")
    assert cli.main(["verify", outf, *cache, "--table", table, "--force"]) == 0
    assert pd.read_csv(table).when.tolist() == ["cannot tell"]
    assert (tmp_path / "main/verification.json").stat().st_mtime_ns > again.st_mtime_ns
    capsys.readouterr()
    assert cli.main(["search", outf, "hare", "wood rabbit", "--top_k", "2", *cache]) == 0
    found = capsys.readouterr().out
    assert found.count("not CLIP); embeddings: interpolated") == 2 and "wood rabbit" in found
    judged = r"^“(hare|wood rabbit)”(: best match| has no match in this video: its best place has)"
    assert len(re.findall(judged, found, re.M)) == 2
    index = str(tmp_path / "index")
    assert cli.main(["index", index, outf, *cache]) == 0
    assert "bunny" in (told := capsys.readouterr().out) and "96 patches" in told
    assert cli.main(["search", index, "hare;wood rabbit", "--top_k", "2"]) == 0
    inside = capsys.readouterr().out
    assert inside.count("not CLIP); 96 patches") == 2 and inside.count("bunny") == 4
    assert re.findall(r"^“.*", inside, re.M) == re.findall(r"^“.*", found, re.M)
    assert cli.main(["search", index, "hare", ""]) == 1
    assert "empty query" in capsys.readouterr().err
    monkeypatch.setattr(sentences, "_folder", lambda: None)  # whether it is installed or not
    assert cli.main(["search", outf, "a rabbit in love", *cache]) == 2
    assert "ImageNet class" in capsys.readouterr().err
    monkeypatch.setattr(efficientnet, "has_sentences", lambda: True)
    monkeypatch.setattr(efficientnet, "class_mixture", lambda _: (
        torch.eye(1000)[imagenet_classes("hare")], torch.ones(1)))
    monkeypatch.setattr(sentences, "explain_mixture", lambda text: "hare 0.50")
    monkeypatch.setattr(sentences, "is_understood", lambda text: True)
    for where in (outf, index):
        assert cli.main(["search", where, "a rabbit in love", "suit", "--top_k", "2", *cache]) == 0
        told = capsys.readouterr().out
        assert "a rabbit in love  (taken as hare 0.50 by a sentence encoder, not CLIP)  (" in told
        assert told.count("taken as") == 1
    assert cli.main(["train", "--outf", outf, *cache, *settings, "--epochs", "9"]) == 1
    assert "epochs: 4 there, 9 asked" in capsys.readouterr().err


def documented():
    """(page, command, option) of every `hnerv-clip` in code of the README and the book."""
    root = Path(__file__).resolve().parent.parent
    for page in [root / "README.md", *sorted((root / "book").glob("*.md"))]:
        for block in re.findall(r"```.*?```|`[^`]+`", page.read_text(encoding="utf-8"), re.S):
            text = block.replace("\\\n", " ")
            lines = text.splitlines() if text.startswith("```") else [" ".join(text.split())]
            for name, words in re.findall(r"\bhnerv-clip ([a-z][a-z-]*)([^\n`|&#]*)",
                                          "\n".join(lines)):
                yield from ((page.name, name, option) for option in (
                    "", *re.findall(r"\s(--?[A-Za-z]\w*)", re.sub(r'"[^"]*"', "", words))))


def test_every_documented_command_has_its_options():
    commands, = (action.choices for action in cli._parser()._actions if action.choices)
    settings = {f"--{name}" for name in param_names()} | {f"-{name}" for name in SHORT}
    unknown = []
    for page, name, option in documented():
        parser = commands.get(name)
        if parser is None or option and option not in parser._option_string_actions and not (
                parser.get_default("takes_settings") and option in settings):
            unknown.append((page, name, option))
    assert unknown == []
    assert {name for _, name, _ in documented()} >= {"book", "pages", "study", "encode", "scale"}


def test_what_a_path_is_is_told_where_another_is_needed(trained_copy, tmp_path, cache_dir, capsys):
    file, index, film = tmp_path / "v.hnerv", tmp_path / "index", tmp_path / "film.mp4"
    cache = ["--cache_dir", str(cache_dir)]
    assert cli.main(["store", str(trained_copy), str(file), *cache]) == 0
    assert cli.main(["index", str(index), str(trained_copy), *cache]) == 0
    film.write_bytes(b"a film")
    for words, told in [
            (["verify", str(file)], "is a file, not a run"),
            (["evaluate", str(file)], "is a file, not a run"),
            (["store", str(index), str(tmp_path / "w.hnerv")], "is an index, not a run"),
            (["info", str(trained_copy)], "is a folder, not a stored video"),
            (["decode", str(trained_copy), str(tmp_path / "out.mp4")], "hnerv-clip store"),
            (["search", str(index), "--box", "0,0,9,9"], "is an index, which takes texts"),
            (["search", str(trained_copy), "--box", "0,0,9,9"], f"hnerv-clip search {file}"),
            (["index", str(trained_copy), str(trained_copy)], "holds a run: name a folder"),
            (["index", str(index), str(trained_copy)], "add --force"),
            (["verify", str(trained_copy), "--table", str(film), "--replace"], "must end in .csv")]:
        assert cli.main([*words, *(cache if words[0] not in ("info", "decode") else [])]) > 0
        assert told in capsys.readouterr().err
    assert film.read_bytes() == b"a film" and not (trained_copy / "videos.json").exists()
    (index / "videos.json").unlink()  # as where it was killed before it wrote that
    assert cli.main(["index", str(index), str(trained_copy), *cache]) == 0
    assert cli.main(["index", str(index), str(trained_copy), "--force", *cache]) == 0


def test_a_run_that_is_not_finished_is_told(trained_copy, cache_dir):
    (trained_copy / "summary.json").unlink()
    with pytest.warns(UserWarning, match=r"is not finished: \d+ of \d+ epochs"):
        assert cli.main(["search", str(trained_copy), "hare", "--cache_dir", str(cache_dir)]) == 0
