"""The plan of the book's GPU results: its steps, tried small, and the files that they end in."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import shrink_teacher_pictures

from hnerv_clip import cli, files
from hnerv_clip.bench import rate_gpu
from hnerv_clip.book import field as book_field
from hnerv_clip.book import judged
from hnerv_clip.book import recipe as book_recipe
from hnerv_clip.dataset import prepare_dataset
from hnerv_clip.runs.provenance import code_version
from hnerv_clip.runs.run_dir import RunDir, write_json
from hnerv_clip.study import book_runs, collect, cross_fit, fields, recipe_parts
from hnerv_clip.study.book_runs import Step
from hnerv_clip.study.folders import make_folders
from hnerv_clip.study.plan import study_base, study_configs
from hnerv_clip.study.recipe_parts import part_folder
from hnerv_clip.study.run import make_run
from hnerv_clip.verify.verdict import QUESTIONS

DONE = ("train bunny_hybrid_base_s0", "train bunny_hybrid_phase_1_s0",
        "train bunny_hybrid_pixels_only_s0", "field bunny frozen default 0",
        "field bunny joint default 0", "teacher bunny", "fidelity 0", "rates head",
        "recipe preset preset best 0", "recipe held_out HNeRV's settings 0",
        "recipe videos preset best: carphone 0")

ALONE = "recipe preset"  # as if nothing else had shared the GPU


@pytest.fixture(scope="module")
def folders(small_config, tmp_path_factory):
    """Eleven steps done on a small video, whose teacher sees pictures of 64×64."""
    folder = tmp_path_factory.mktemp("book")
    own = ("predict_clip", "embed", "seed", "clip_loss_weight", "split_phase", "data_split")
    settings = {name: value for name, value in small_config.params().items() if name not in own}
    folders = make_folders(folder / "runs", folder / "results", folder / "cache", {
        **settings, "epochs": 1, "eval_freq": 1, "pixel_loss_warmup_epochs": 0,
        "field_steps": 12, "field_boxes": 8})
    shutil.copytree(collect.resolve_path(collect.PUBLISHED), folders.out)
    published = json.loads((folders.out / "field_h100.json").read_text())
    published["rows"] = [row for row in published["rows"]  # of the default seed 0 alone
                         if row.get("head") != "default" or row["seed"] == 0]
    write_json(folders.out / "field_h100.json", published)
    steps = {step.name: step for step in book_runs.book_steps(1, folders.outf)}
    with pytest.MonkeyPatch.context() as patch:
        shrink_teacher_pictures(patch)
        patch.setattr(rate_gpu, "TARGETS", (0.5,))
        patch.setattr(fields, "SMOOTHED", 1)
        patch.setattr(fields, "SHIFTED", 2)
        patch.setattr(fields, "TESTS", {kind: dataclasses.replace(sampling, count=4, shapes=4)
                                        for kind, sampling in fields.TESTS.items()})
        prepare_dataset(folders.configs[DONE[0].split()[1]], folders.cache_dir, progress=False)
        for name in DONE:
            book_runs.do_step((name, steps[name].kind, steps[name].arguments), {
                "folders": dataclasses.replace(folders, alone=name.startswith(ALONE))})
    said = []
    collect.collect_results(folders, say=said.append)
    assert not said
    return folders


def test_what_is_done_is_known_and_what_is_missing_is_listed(folders):
    steps = book_runs.book_steps(1, folders.outf)
    assert {step.name for step in steps if book_runs.step_done(step, folders)} == set(DONE)
    listed = book_runs.show_steps(steps, folders)
    assert listed.startswith("train bunny_hybrid_phase_2_s0") and f"{len(DONE)} done" in listed
    assert "scale" in {step.name for step in book_runs.book_steps(2, folders.outf)}


def test_every_step_stands_behind_what_it_needs(folders):
    seen = set()
    for step in book_runs.book_steps(2, folders.outf):
        assert set(step.needs) <= seen
        seen.add(step.name)
    assert all(step.kind in book_runs.DO for step in book_runs.book_steps(2, folders.outf))


def test_steps_begin_in_order_when_they_can():
    steps = [Step("train", ("bunny_a_s0",)), Step("field", ("bunny",), needs=("train bunny_a_s0",)),
             Step("scale", (), alone=True), Step("teacher", ("bikes",))]
    states = dict.fromkeys((step.name for step in steps), "waiting")

    def following(left=60.0, busy=()):
        found = book_runs.next_step(steps, states, left=left, recorded={}, busy=list(busy))
        return found.name if found else None

    assert following() == "train bunny_a_s0"
    states["train bunny_a_s0"] = "stopped"  # under way
    assert following(busy=["train bunny_a_s0"]) is None  # all GPUs for scale next
    states["train bunny_a_s0"] = "finished"
    assert following() == "field bunny"
    assert following(left=0.6) == "scale"  # goes on later; a field would not
    states["scale"] = "finished"
    assert following(left=0.6) == "teacher bikes"
    assert following(left=0.1) is None
    assert book_runs.minutes_of(steps[3], {"teacher bikes": 3.0}) == 3.0
    small, large = (Step("field", ("bunny", "frozen", size, "0")) for size in ("small", "largest"))
    assert book_runs.minutes_of(small, {large.name: 9.0}) < book_runs.minutes_of(large, {}) < 9
    with pytest.raises(ValueError, match="--list"):
        book_runs.chosen_steps(steps, ("flights",))
    assert [s.name for s in book_runs.chosen_steps(steps, ("field",))] == \
        ["train bunny_a_s0", "field bunny"]


def test_a_setting_that_no_field_has_leaves_fields_as_they_are(folders, monkeypatch):
    """Any setting once meant a try: fields of 12 steps, published as measured."""
    asked = []
    monkeypatch.setattr(fields, "measure_field", lambda *_, **options: asked.append(options) or {})
    monkeypatch.setattr(book_runs, "write_json", lambda *_: None)
    run = ("bunny", "frozen", "default", "0")
    book_runs.do_step(("", "field", run), {"folders": dataclasses.replace(
        folders, settings={name: value for name, value in folders.settings.items()
                           if not name.startswith("field_")})})
    book_runs.do_step(("", "field", run), {"folders": folders})
    assert [(one.get("steps"), one.get("boxes")) for one in asked] == [(None, None), (12, 8)]


def test_a_fields_speed_is_a_median_that_leaves_the_first_answer_out(monkeypatch):
    now, took = [0.0], iter([9, 1, 2, 4, 2, 3, 9, 0.5, 0.25, 0.5, 1, 1])

    def answer(*_):
        now[0] += next(took)

    monkeypatch.setattr(fields, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    field = SimpleNamespace(embed=answer, scores=answer,
                            head=SimpleNamespace(config=SimpleNamespace(dim=4)))
    assert fields.answer_speed(field, (80, 160), np.arange(3), boxes=8) == {
        "embeddings_per_s": 3 * 8 / 2, "scores_per_s": 3 * 8 / 0.5}


def test_fields_are_written_as_their_page_reads_them(folders):
    read = book_field.read_fields(folders.out)
    rows = json.loads((folders.out / "field_h100.json").read_text())
    commit = code_version()[0]
    new = [row for row in rows["rows"] if row.get("commit") == commit and "head" in row]
    assert [row["network"] for row in new] == ["frozen"] and new[0]["bytes"] > 1000
    assert new[0]["scores_per_s"] > 1 and new[0]["embeddings_per_s"] > 1
    assert {name: rows["original"][name]["seeds"] for name in ("bunny", "bikes")} == {
        "bunny": 3, "bikes": 3}, "one pair of bunny takes the place of no three"
    assert len(rows["pairs"]) == 12 and commit not in {row["commit"] for row in rows["pairs"]}
    old = read["fields"][read["fields"].commit != commit].iloc[0]
    measured = {key for key, value in old.items() if np.all(pd.notna(value))}
    assert measured - {"is_rounded", "kb"} <= set(new[0])
    latest = [row for row in rows["rows"] if row["commit"] == commit]
    assert {"shift 0.02", "mean of 8 at 0.05"} <= set(
        next(row for row in latest if row.get("what") == "shifts"))
    near = next(row for row in latest if row.get("baseline") == "nearest training frame")
    assert near["any_train"] == pytest.approx(1, abs=1e-3) and near["any_held"] < 1
    keys = [(row["video"], row.get("baseline"), row["pixels"] if row.get("what") == "moved" else 0)
            for row in rows["rows"] if "baseline" in row or row.get("what") == "moved"]
    assert len(keys) == len(set(keys))  # none beside one of an earlier commit


def test_rows_give_way_only_to_as_many():
    def row(video, seed, skill):
        return {"video": video, "seed": seed, "skill": skill}

    old = [row("a", 0, 1), row("a", 1, 1), row("b", 0, 1)]
    new = [row("a", 0, 2), row("b", 0, 2), row("b", 1, 2), row("c", 0, 2)]
    assert collect.merge_rows(old, new, key=("video",), parts=("seed",)) == [*old[:2], *new[1:]]


def test_fields_are_the_same_measure_as_before():
    """Skill 0 for the constant, 1 for the teacher."""
    rng = np.random.default_rng(0)
    truth = fields.torch.nn.functional.normalize(
        fields.torch.tensor(rng.standard_normal((4, 3, 8)) + 1), dim=-1)
    mean = truth.mean((0, 1))
    constant = fields.F.normalize(mean, dim=0).expand_as(truth)
    assert fields.box_skill(truth, truth, mean) == pytest.approx(1)
    assert fields.box_skill(constant, truth, mean) == pytest.approx(0)


def test_cross_fitted_runs_are_judged_together(folders):
    found = cross_fit.cross_fit_results(folders.study)
    assert [row["phase"] for row in found["runs"]] == [0, 1]
    whole = [row for row in found["answers"] if row["phases"] == "all"]
    assert {row["question"] for row in whole} == set(QUESTIONS)
    frames = {row["phases"]: row["frames"] for row in found["answers"]}
    assert frames["all"] == frames["0"] + frames["1"]
    published = judged.read_judged(folders.out)  # five phases of bunny are published: they stay
    assert published.runs[published.runs.video == "bunny"].phase.nunique() == 5
    merged = cross_fit.merge_cross_fit({"runs": [], "answers": [], "means": []}, found)
    assert merged == found
    (folders.outf / "alone").mkdir()
    (folders.outf / "alone" / "verification_cross_fit.json").write_text(json.dumps(merged))
    page = judged.read_judged(folders.outf / "alone")
    assert judged.evidence_rows(page, "bunny") and judged.mean_rows(page) and judged.run_rows(page)
    assert "2 of 5 phases" in judged.limit_words(page)


def test_study_and_fidelity_keep_what_is_published(folders):
    old = pd.read_csv(collect.resolve_path(collect.PUBLISHED) / "study.csv")
    assert set(pd.read_csv(folders.out / "study.csv").run) == set(old.run)
    assert len(pd.read_csv(folders.out / "study_new.csv")) == 3
    new = old[old.run.str.startswith("bikes_pe")].assign(psnr_train_db=99.0)
    merged = collect.merge_study(old, new)
    assert (merged[merged.run.str.startswith("bikes_pe")].psnr_train_db == 99).all()
    assert len(merged) == len(old)
    fidelity = json.loads((folders.out / "fidelity.json").read_text())
    own = [run for run in fidelity["runs"] if run["device"].endswith("cores")]
    assert len(own) == 1 and fidelity["reference"]["paper"]


def test_trainings_of_the_recipe_take_their_rows_places(folders):
    before, after = (json.loads((folder / collect.RECIPE).read_text()) for folder in (
        collect.resolve_path(collect.PUBLISHED), folders.out))
    assert [len(after[name]["rows"]) for name in ("preset", "videos")] == [
        len(before[name]["rows"]) for name in ("preset", "videos")]
    best = after["preset"]["rows"][0]
    summary = RunDir(part_folder(folders.outf, "preset", "preset best", "0")).summary()
    assert best["psnr_db"] == round(summary["eval_psnr_all"], 3)
    assert best["total_s"] > best["train_time_s"] > 0
    held = next(row for row in after["preset"]["held_out"] if row["change"] == recipe_parts.HNERV)
    assert held["psnr_held_interpolated_db"] and held["total_s"] is None
    video, = (row for row in after["videos"]["rows"]
              if (row["video"], row["recipe"]) == ("carphone", recipe_parts.BEST))
    assert video["device"] == best["device"] == held["device"]
    assert video["device"] in after["videos"]["about"]["device"]
    assert before["added"] == after["added"]
    assert book_recipe.read_recipe(folders.out)["preset"].psnr_db[0] == best["psnr_db"]


def test_rows_that_keep_their_place_keep_their_commit(tmp_path):
    measured = {"about": {"commit": "1fab3dd", "device": "a GPU"},
                "rows": [{"change": change, "seed": 0} for change in ("batch 1", "Swish")]}
    new = {"change": "Swish", "seed": 0, "commit": "353ddf2", "device": "another"}
    collect.put_recipe(measured, "rows", new)
    assert measured["rows"] == [{"change": "batch 1", "seed": 0, "commit": "1fab3dd",
                                 "device": "a GPU"}, new]
    assert measured["about"] == {"commit": "1fab3dd, 353ddf2", "device": "a GPU, another"}


@pytest.mark.parametrize("commit, kept", [("353ddf2", 97.0), ("1c9a415", None)])
def test_a_row_without_times_keeps_those_of_the_same_code(commit, kept):
    row = {"change": "Swish", "seed": 0, "commit": "353ddf2", "device": "a GPU", "total_s": 97.0}
    measured = {"about": {}, "rows": [row]}
    collect.put_recipe(measured, "rows", row | {"total_s": None, "commit": commit})
    assert measured["rows"][0]["total_s"] == kept and measured["rows"][0]["commit"] == commit


@pytest.mark.parametrize("dirty, words", [(True, " with changes"), (False, ""), (None, "")])
def test_a_row_of_the_recipe_says_whether_its_code_had_changes(folders, monkeypatch, dirty, words):
    run = RunDir(part_folder(folders.outf, "preset", "preset best", "0"))
    origin = run.provenance() | {"commit": "353ddf2754f5", "dirty": dirty}
    monkeypatch.setattr(RunDir, "provenance", lambda _: origin)
    assert recipe_parts.part_row(run, "preset", "preset best")["commit"] == "353ddf2" + words


def test_a_video_of_the_recipe_may_have_any_name(folders):
    run = RunDir(part_folder(folders.outf, "videos", "preset best: carphone", "0"))
    row = recipe_parts.part_row(run, "videos", "preset best: part 1: tea.mp4")
    assert (row["recipe"], row["video"]) == (recipe_parts.BEST, "part 1: tea.mp4")
    names = ("a b.mp4", "a_b.mp4", "a%5Fb.mp4")
    assert len({part_folder(folders.outf, "videos", f"preset best: {name}", "0")
                for name in names}) == len(names)


def test_what_the_search_found_is_trained_with_the_settings_of_its_best_trial():
    published = collect.resolve_path(collect.PUBLISHED)
    search = json.loads((published / "recipe_search.json").read_text())
    trial, = (one["params"] for one in search["trials"] if one["number"] == search["found"])
    searched = recipe_parts.SEARCHED
    names = {name for name in trial if searched.get(name) is not None}
    assert {name: searched[name] for name in names} == {name: trial[name] for name in names}
    assert {"lr", "reduce", "batch_size"} <= names
    assert searched["lr_type"] == f"cosine_{trial['warm_up']:g}_1_0.1"


def test_the_recipe_has_the_trainings_of_its_page(tmp_path):
    """Each row of the published file is one of the plan's, with the settings that it says."""
    published = json.loads((collect.resolve_path(collect.PUBLISHED) / collect.RECIPE).read_text())
    planned = {part: recipe_parts.part_config(tmp_path, *part)
               for part in recipe_parts.part_names(tmp_path) if part[0] != "videos"}
    groups = {"rows": published["rows"], "added": published["added"]["rows"],
              "preset": published["preset"]["rows"], "held_out": published["preset"]["held_out"]}
    for group, rows in groups.items():
        for row in rows:
            train = planned[group, row["change"], str(row["seed"])].train
            assert {key: getattr(train, key) for key in ("epochs", "batch_size", "lr")} == {
                key: row[key] for key in ("epochs", "batch_size", "lr")}
            assert train.optimizer == row.get("optimizer", "adam")
    assert {config.model.modelsize for (group, *_), config in planned.items()
            if group == "sizes"} == {row["modelsize"] for row in published["preset"]["sizes"]}


def test_rates_are_measured_through_the_file_and_kept(folders, monkeypatch):
    monkeypatch.setattr(rate_gpu, "TARGETS", (0.5,))
    path = folders.outf / "rates" / "head" / "rate.json"
    found = json.loads(path.read_text())
    assert [point["kind"] for point in found["points"]] == ["8 bits", "tuned"]
    assert found["decode_frames_per_s"]["network alone"] > 0
    book_runs.do_step(("rates head", "rates", ("head",)), {"folders": folders})
    assert json.loads(path.read_text())["points"] == found["points"]  # not measured again
    rates = json.loads((folders.out / "rate_quality.json").read_text())
    assert found["commit"] in {run["commit"] for run in rates["runs"]} and rates["bd_rate"]


def test_another_machine_goes_on_from_the_state(folders, tmp_path):
    (folders.outf / book_runs.TIMES).write_text('{"fidelity 0": 0.5}')
    book_runs.pack_state(folders, tmp_path / "state.tar.xz")
    other = make_folders(tmp_path / "runs", tmp_path / "out", folders.cache_dir,
                                  folders.settings)
    book_runs.restore_state(other, tmp_path / "state.tar.xz")
    steps = book_runs.book_steps(1, folders.outf)
    assert {step.name for step in steps if book_runs.step_done(step, other)} == set(DONE)
    assert not list(other.outf.rglob("*.pth"))
    assert book_runs._with_weights(other, "bunny_hybrid_pixels_only_s0").is_dir()
    assert (other.study / "bunny_hybrid_pixels_only_s0" / "model_best.pth").is_file()


def test_the_command_resumes_from_a_pack_and_replaces_none_that_holds_more(
        tmp_path, monkeypatch, capsys):
    def run_book(folders, **_):
        times = folders.outf / book_runs.TIMES
        done = json.loads(times.read_text()) if times.is_file() else {}
        folders.outf.mkdir(exist_ok=True)
        (folders.outf / f"step {len(done)}.json").write_text("{}")
        times.write_text(json.dumps({**done, f"step {len(done)}": 1.0}))
        return {}

    def resume(name, *more):
        capsys.readouterr()
        return cli.main(["study", "--plan", "book", "--outf", str(tmp_path / name), "--out",
                         str(tmp_path / "out"), "--pack", str(pack), *more])

    def packed():
        with files.open_archive(pack) as archive:
            return sorted(archive.getnames())

    monkeypatch.setattr(book_runs, "run_book", run_book)
    pack = tmp_path / "packs" / "state.tar.xz"
    assert resume("first") == resume("first") == 0
    assert packed() == ["step 0.json", "step 1.json", "times.json"]
    assert resume("second") == 0, "another machine, or an empty folder"
    assert packed() == ["step 0.json", "step 1.json", "step 2.json", "times.json"]
    assert resume("first") == 1, "it would lose the step of the second"
    assert "such as step 2.json, and would lose 1 of 4: choose another --pack, or add --force" in \
        capsys.readouterr().err
    assert not (tmp_path / "first" / "step 2.json").exists(), "refused before anything runs"
    assert resume("third", "--force") == 0 and packed() == ["step 0.json", "times.json"]
    pack.write_text("notes")
    for name in ("fourth", "third"):  # to read it, and to replace it
        assert resume(name) == 1 and "state.tar.xz" in (told := capsys.readouterr().err)
        assert "choose another" in told and pack.read_text() == "notes"


def test_runs_of_other_settings_are_no_results_of_the_book(capsys, tmp_path):
    assert cli.main(["study", "--plan", "book", "--minutes", "0", "--outf", str(tmp_path),
                     "--epochs", "3"]) == 2
    assert "epochs given: such runs are not the book's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_what_is_begun_in_time_is_prepared(folders):
    steps = book_runs.book_steps(1, folders.outf)
    first = book_runs.first_steps(steps, 3, {})
    assert 3 < sum(book_runs.minutes_of(step, {}) for step in first) < 5
    assert first == steps[:len(first)]


def test_whole_trainings_stand_beside_those_of_other_folders(folders):
    bench = {"device": "NVIDIA H100 80GB HBM3", "made": {"fit": {}, "train": {}},
             "parts": {"fit": [{"run": "new"}], "train": [{"engine": "x"}]}}
    (folders.outf / "bench").mkdir()
    (folders.outf / "bench" / "fit.json").write_text(json.dumps(bench))
    before = json.loads((folders.out / "bench_h100.json").read_text())["parts"]
    collect.collect_bench(folders)
    after = json.loads((folders.out / "bench_h100.json").read_text())["parts"]
    assert after["fit"] == [*before["fit"], {"run": "new"}] and after["train"] == [{"engine": "x"}]
    assert after["decode"] == before["decode"]


def test_bench_parts_join_those_of_their_device():
    assert collect.device_word("NVIDIA H100 80GB HBM3") == "h100"
    assert collect.device_word("AMD EPYC, 2 cores") == "cpu_here"


def test_phases_are_runs_of_the_study():
    base = study_base("full", {"teacher": "efficientnet-lite0", "clip_dim": 1280})
    names = cross_fit.cross_fit_names("bikes", (1,))
    configs = study_configs(base, names)
    assert [configs[name].video.split_phase for name in names] == [0, 1, 2, 3, 4]
    assert callable(make_run)


def test_the_command_lists_what_is_missing(tmp_path, capsys):
    assert cli.main(["study", "--plan", "book", "--list", "--outf", str(tmp_path / "runs"),
                     "--only", "fidelity"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("fidelity 0") and "9 steps missing" in said
