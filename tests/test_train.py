"""Training: it learns, it resumes exactly, it stops where it must."""

import errno
import json
import os
import re
import resource
import shutil
import socket
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hnerv_clip import distributed
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.dataset import load_dataset
from hnerv_clip.engines.plain import PlainEngine, SetupError
from hnerv_clip.evaluate import evaluate_model, evaluate_run
from hnerv_clip.inference import load_run
from hnerv_clip.model import build_model
from hnerv_clip.runs.run_dir import RunDir, RunError
from hnerv_clip.train import TrainError, check_run, epoch_order, outputs, train
from hnerv_clip.train import run as run_module
from hnerv_clip.train import trainer as train_module

FORK = torch.multiprocessing.get_context("fork")  # a new process would import torch for seconds
start_ranks = partial(torch.multiprocessing.start_processes, start_method="fork")


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def finished(trained_run, small_config, cache_dir):
    return train(small_config, trained_run, cache_dir=cache_dir, progress=False)


def weights(run_dir, name="model_latest.pth"):
    return RunDir(run_dir).load_checkpoint(name)["model"]


def test_it_learns_and_leaves_the_run_directory(finished):
    metrics, summary = finished.metrics, finished.summary
    assert list(metrics.epoch) == [1, 2, 3, 4]
    assert metrics.pixel_loss.iloc[-1] < 0.8 * metrics.pixel_loss.iloc[0]
    assert list(metrics.clip_weight) == [0, 0, 0.5, 0.5]
    assert metrics.clip_loss.iloc[-1] < metrics.clip_loss.iloc[1] - 0.05
    assert metrics.eval_psnr_all.notna().tolist() == [False, True, False, True]
    assert summary["eval_psnr_val_interpolated"] > 5 and summary["rate_bpp"] > 0
    names = {p.name for p in finished.run_dir.iterdir()}
    assert {"config.json", "provenance.json", "model_best.pth", "model_latest.pth", "rank0.txt",
            "metrics.csv", "clip_similarity_per_frame.csv", "summary.json",
            "video.hnerv"} <= names
    folder, = finished.run_dir.glob("Encoder_*M_Decoder_*M_Total_*M/tensorboard")
    board = EventAccumulator(str(folder)).Reload()
    assert {"train/pixel_loss", "train/clip_loss", "train/total_loss", "eval/psnr_val",
            "eval/clip_similarity_all", "eval/clip_similarity_train",
            "eval/clip_similarity_val"} <= set(board.Tags()["scalars"])
    assert board.Tags()["histograms"] == ["eval/clip_similarity_distribution"]
    frames = pd.read_csv(finished.run_dir / "clip_similarity_per_frame.csv")
    assert {"frame", "split", "clip_similarity"} <= set(frames)


def test_a_finished_run_is_returned_as_it_stands(finished, small_config, cache_dir, monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", None)
    again = train(small_config, finished.run_dir, cache_dir=cache_dir, progress=False)
    assert again.summary == finished.summary


@pytest.mark.parametrize("steps", [4, 10, 19])
def test_interrupted_and_resumed_equals_uninterrupted(steps, finished, small_config, cache_dir,
                                                      tmp_path, monkeypatch):
    """Interrupted in the middle of an epoch, at its end, and more than once."""
    step, taken = PlainEngine.step, 0

    def interrupted(self, *args, **kwargs):
        nonlocal taken
        taken += 1
        if taken > steps:
            taken = 0
            raise Interrupted
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PlainEngine, "step", interrupted)
    for _ in range(30):
        try:
            result = train(small_config, tmp_path / "run", cache_dir=cache_dir, progress=False)
            break
        except Interrupted:
            continue
    for name, value in weights(finished.run_dir).items():
        assert torch.equal(weights(result.run_dir)[name], value), name
    columns = ["epoch", "step", "lr", "pixel_loss", "clip_loss", "psnr_db", "eval_psnr_all",
               "eval_clip_similarity_val"]
    pd.testing.assert_frame_equal(result.metrics[columns], finished.metrics[columns], rtol=1e-6)
    assert weights(result.run_dir, "model_best.pth").keys() == weights(finished.run_dir).keys()


def test_pixel_only_baseline_equals_lambda_zero(small_config, cache_dir, tmp_path):
    """Without λ, the head changes nothing of the picture."""
    alone = train(small_config.replace(predict_clip=False, epochs=1), tmp_path / "alone",
                  cache_dir=cache_dir, progress=False)
    zero = train(small_config.replace(clip_loss_weight=0, epochs=1), tmp_path / "zero",
                 cache_dir=cache_dir, progress=False)
    # up to the order in which gradients are added
    assert alone.metrics.pixel_loss.tolist() == pytest.approx(
        zero.metrics.pixel_loss.tolist(), rel=1e-4)
    assert alone.metrics.clip_loss.isna().all() and zero.metrics.clip_loss.notna().all()
    assert "eval_clip_similarity_all" not in alone.summary


@pytest.mark.parametrize("params", [
    {"embed": "pe_1.25_80", "modelsize": 0.2}, {"embed": "xyt_1.25_80", "modelsize": 0.2},
    {"inpaint_size": 20}, {"loss": "Fusion6"}, {"precision": "bf16"},
    {"data_split": "1_1_1"}])
def test_other_ways_to_train(params, small_config, small_dataset, cache_dir, tmp_path):
    result = train(small_config.replace(epochs=2, pixel_loss_warmup_epochs=1, **params),
                   tmp_path / "run", cache_dir=cache_dir, progress=False)
    assert np.isfinite(result.metrics.total_loss).all()
    summary = result.summary
    assert ("eval_psnr_inside_all" in summary) == ("inpaint_size" in params)
    assert ("eval_psnr_val" in summary) == ("data_split" not in params)
    assert ("eval_psnr_val_interpolated" in summary) == ("embed" not in params and
                                                         "data_split" not in params)


def test_a_fast_engine_that_cannot_be_set_up_gives_way_to_the_plain_one(
        small_config, small_dataset, cache_dir, tmp_path, monkeypatch):
    """The same weights; the run says so, to its reader and in its provenance."""
    config = small_config.replace(epochs=2)

    class Failing(PlainEngine):
        steps = 0

        def step(self, *args, **kwargs):
            self.steps += 1
            if self.steps == 4:
                raise SetupError("RuntimeError: no such kernel")
            return super().step(*args, **kwargs)

    train(config, tmp_path / "plain", cache_dir=cache_dir, progress=False, dataset=small_dataset)
    monkeypatch.setattr(train_module, "make_engine", lambda config, model, dataset, *, autocast:
                        Failing(config, model, dataset, autocast=autocast))
    with pytest.warns(UserWarning, match="plain engine.*no such kernel"):
        train(config, tmp_path / "failing", cache_dir=cache_dir, progress=False,
              dataset=small_dataset)
    facts = RunDir(tmp_path / "failing").provenance()
    assert facts["engine"] == "plain" and "no such kernel" in facts["fallback"]
    assert facts["precision"] == "fp32"
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "failing")[name], value)
    with pytest.raises(TrainError, match="no such kernel.*engine='plain'"):
        train(config.replace(engine="fast"), tmp_path / "fast", cache_dir=cache_dir,
              progress=False, dataset=small_dataset)


def test_every_frame_once_an_epoch_whatever_the_batch():
    frames = np.arange(3, 24, 2)
    order = epoch_order(frames, seed=1, epoch=2)
    assert sorted(order.tolist()) == frames.tolist()
    assert order.tolist() == epoch_order(frames, seed=1, epoch=2).tolist()
    assert order.tolist() != epoch_order(frames, seed=1, epoch=3).tolist()


@pytest.mark.usefixtures("small_dataset")  # its embeddings
def test_nan_stops_and_keeps_the_last_good_checkpoint(small_config, cache_dir, tmp_path,
                                                      monkeypatch):
    frame_losses, calls = PlainEngine.frame_losses, 0

    def poisoned(self, indices):
        nonlocal calls
        calls += 1
        return frame_losses(self, indices) * (float("nan") if calls == 8 else 1)

    monkeypatch.setattr(PlainEngine, "frame_losses", poisoned)
    config = small_config.replace(on_divergence="stop")
    with pytest.raises(TrainError, match="at step 8 .*lower lr"):
        train(config, tmp_path / "run", cache_dir=cache_dir, progress=False)
    state = RunDir(tmp_path / "run").load_checkpoint("model_latest.pth")
    assert state["epoch"] * 5 + state["batch"] == 7
    assert all(value.isfinite().all() for value in state["model"].values())
    calls = 0
    with pytest.warns(UserWarning, match="NaN or infinite at step 8 .*back to epoch 0"):
        train(small_config, tmp_path / "other", cache_dir=cache_dir, progress=False)
    assert weights(tmp_path / "other").keys() == state["model"].keys()


@pytest.mark.parametrize("error, message", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nGPU 0 has"),
     r"memory ran out \(CUDA out of memory. Tried 2 GiB.\); lower batch_size=2, .* is intact"),
    (RuntimeError("Failed to find C compiler."), "C compiler such as gcc, or use engine='plain'")])
def test_what_the_machine_lacks_is_said_with_the_setting_to_change(
        error, message, small_config, small_dataset, cache_dir, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(PlainEngine, "step", fail)
    with pytest.raises(TrainError, match=message):
        train(small_config, tmp_path / "run", cache_dir=cache_dir, progress=False)


def test_errors_come_before_any_long_work(small_config, finished, cache_dir, tmp_path):
    with pytest.raises(RunError, match="another configuration"):
        train(small_config.replace(lr=0.5), finished.run_dir, cache_dir=cache_dir)
    with pytest.raises(ConfigError, match="01_prepare_data"):
        train(small_config, tmp_path / "a", cache_dir=tmp_path / "empty")
    with pytest.raises(ConfigError, match="device='auto'"):
        train(small_config.replace(device="cuda:99"), tmp_path / "b", cache_dir=cache_dir)
    shutil.copytree(finished.run_dir, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    latest = tmp_path / "cut" / "model_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-100])
    with pytest.raises(RunError, match="remove model_latest.pth from"):
        train(small_config, tmp_path / "cut", cache_dir=cache_dir, progress=False)


def _train_until_unwritable(how, params, run_dir, cache_dir, answer):
    """Trains seven steps, then nothing can be written any more; answers with the error."""
    torch.set_num_threads(1)
    step, taken = PlainEngine.step, 0

    def until(self, *args, **kwargs):
        nonlocal taken
        taken += 1
        if taken == 8 and how == "limit":  # of a file's size: a real error in the middle of writing
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        if taken == 8 and how == "full":
            torch.save = half_saved
        if taken == 8 and how == "read-only":
            os.chmod(run_dir, 0o555)
            if os.geteuid() == 0:  # whom permissions do not stop
                os.seteuid(65534)
        return step(self, *args, **kwargs)

    def half_saved(state, file):
        file.write(b"x" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    PlainEngine.step = until
    try:
        train(Config.from_params(**params), run_dir, cache_dir=cache_dir, progress=False)
    except RunError as error:
        answer.send((taken, str(error)))


@pytest.mark.parametrize("how, words", [("limit", "File too large"), ("full", "No space left"),
                                        ("read-only", "Permission denied")])
def test_an_unwritable_disk_stops_training_and_leaves_the_last_checkpoint(
        how, words, finished, small_config, cache_dir):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        run_dir = Path(folder) / "run"
        mine, other = FORK.Pipe()
        process = FORK.Process(
            target=_train_until_unwritable,
            args=(how, small_config.params(), str(run_dir), str(cache_dir), other))
        process.start()
        assert mine.poll(120), "no error was raised"
        taken, message = mine.recv()
        process.join()
        assert taken == 8 and words in message
        assert "intact" in message and "run again to resume" in message
        state = RunDir(run_dir).load_checkpoint("model_latest.pth")
        assert state["epoch"] * 5 + state["batch"] == 7
        os.chmod(run_dir, 0o755)
        train(small_config, run_dir, cache_dir=cache_dir, progress=False)
        for name, value in weights(finished.run_dir).items():
            assert torch.equal(weights(run_dir)[name], value), name


def interrupt_after(count, method):
    calls = []

    def interrupted(self):
        if len(calls) == count:
            raise Interrupted
        calls.append(1)
        return method(self)

    return interrupted


def remove_as_told(run_dir, message):
    """What the error says to remove is removed."""
    told = re.search(r"remove (.+?) from (\S+) and train again", message)
    assert told and told[2] == str(run_dir), message
    for name in told[1].split(" and "):
        (run_dir / name).unlink()


@pytest.mark.parametrize("how", ["finished", "trained", "begun", "no latest"])
def test_what_is_advised_about_a_lost_best_model_is_true(how, trained_copy, finished, small_config,
                                                         cache_dir):
    """By following it: the run finishes, and is evaluated."""
    run, path = RunDir(trained_copy), trained_copy / "model_best.pth"
    if how != "finished":
        (trained_copy / "summary.json").unlink()
    if how == "begun":  # its best model so far is that of epoch 2
        shutil.rmtree(trained_copy)
        with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module.Trainer, "_finish_epoch", interrupt_after(
                3, train_module.Trainer._finish_epoch))
            train(small_config, trained_copy, cache_dir=cache_dir, progress=False)
    if how == "no latest":
        (trained_copy / "model_latest.pth").unlink()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="train again with the same parameters") as caught:
        load_run(trained_copy, cache_dir=cache_dir)
    remove_as_told(trained_copy, str(caught.value))
    again = train(small_config, trained_copy, cache_dir=cache_dir, progress=False)
    assert run.finished and again.summary["best_epoch"] == 4
    for name, value in weights(finished.run_dir).items():  # its last epoch is the best, too
        assert torch.equal(weights(trained_copy, "model_best.pth")[name], value), name
    assert len(evaluate_run(load_run(trained_copy, cache_dir=cache_dir))) == len(
        pd.read_csv(trained_copy / "evaluation.csv"))


@pytest.mark.parametrize("name", ["summary.json", "provenance.json", "metrics.csv",
                                  "evaluation.csv"])
def test_what_is_advised_about_a_lost_file_is_true(name, trained_copy, finished, small_config,
                                                   cache_dir):
    run = RunDir(trained_copy)
    read = {"summary.json": run.summary, "provenance.json": run.provenance,
            "metrics.csv": run.metrics, "evaluation.csv": run.evaluation}[name]
    expected = read()
    (trained_copy / name).write_bytes(b"null")
    with pytest.raises(RunError, match=f"{name} is damaged") as caught:
        read()
    remove_as_told(trained_copy, str(caught.value))
    train(small_config, trained_copy, cache_dir=cache_dir, progress=False)
    assert list(read()) == list(expected) and len(read()) == len(expected)


def test_no_model_of_the_pixel_phase_is_the_best_one(small_config, cache_dir, tmp_path,
                                                     monkeypatch):
    """Its head is random; a run that lost picture with the cosine term kept such a head."""
    real, scores = train_module.evaluation_columns, iter([30.0, 20.0, 25.0, 24.0])
    monkeypatch.setattr(train_module, "evaluation_columns", lambda table: {
        **real(table), "eval_psnr_train": next(scores)})
    config = small_config.replace(epochs=4, eval_freq=1, pixel_loss_warmup_epochs=1)
    train(config, tmp_path / "run", cache_dir=cache_dir, progress=False)
    assert RunDir(tmp_path / "run").summary()["best_epoch"] == 3


def test_a_damaged_best_model_does_not_stop_training(trained_copy, small_config, cache_dir):
    (trained_copy / "summary.json").unlink()
    (trained_copy / "model_best.pth").write_bytes(b"")
    train(small_config, trained_copy, cache_dir=cache_dir, progress=False)
    assert "chosen anew, from epoch 5" in (trained_copy / "rank0.txt").read_text(encoding="utf-8")
    load_run(trained_copy, cache_dir=cache_dir)


@pytest.mark.parametrize("damage", [
    {"epoch": -1}, {"epoch": 5}, {"batch": 99}, {"history": []}, {"optimizer": {}},
    {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}}, {"world_size": "two"},
    {"epoch": 3, "batch": 2, "history": [{}] * 3, "losses": torch.zeros(2)}])
def test_a_damaged_latest_model_is_told_and_the_advice_is_true(damage, trained_copy, small_config,
                                                               cache_dir):
    (trained_copy / "summary.json").unlink()
    state = torch.load(trained_copy / "model_latest.pth", weights_only=True)
    torch.save({**state, **damage}, trained_copy / "model_latest.pth")
    with pytest.raises(RunError, match="model_latest.pth is damaged.*first epoch") as caught:
        train(small_config, trained_copy, cache_dir=cache_dir, progress=False)
    remove_as_told(trained_copy, str(caught.value))


def test_evaluation_measures_the_checkpoint_not_a_stale_file(trained_copy, cache_dir):
    run = RunDir(trained_copy)
    before = evaluate_run(load_run(trained_copy, cache_dir=cache_dir))
    written = (trained_copy / "video.hnerv").stat().st_mtime_ns
    evaluate_run(load_run(trained_copy, cache_dir=cache_dir))
    assert (trained_copy / "video.hnerv").stat().st_mtime_ns == written  # it is this checkpoint's
    state = run.load_checkpoint()
    for tensor in state["model"].values():
        if tensor.is_floating_point():
            tensor.mul_(1.5)
    run.save_checkpoint("model_best.pth", state)
    after = evaluate_run(load_run(trained_copy, cache_dir=cache_dir))
    for variant in ("trained", "quantised"):
        own, old = (table[table.variant == variant].psnr_db.mean() for table in (after, before))
        assert own < old - 1
    (trained_copy / "video.json").write_text("null", encoding="utf-8")
    assert len(evaluate_run(load_run(trained_copy, cache_dir=cache_dir))) == len(after)


def _train_as_rank(rank, world, port, params, run_dir, cache_dir):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=world)
    train(Config.from_params(**params), run_dir, cache_dir=cache_dir, progress=False)
    torch.distributed.destroy_process_group()


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _evaluate_as_rank(rank, world, port, params, cache_dir, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=world)
    table = distributed.gather_rows(_evaluate(Config.from_params(**params), cache_dir,
                                           share=(rank, world)))
    if rank == 0:
        table.to_pickle(path)
    torch.distributed.destroy_process_group()


def _evaluate(config, cache_dir, **options):
    dataset = load_dataset(config, cache_dir)
    model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                        frame_count=len(dataset.video.frames), seed=0)
    return evaluate_model(model, dataset, **options)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_evaluation_and_rank_0_has_the_table_of_one(world, small_config, cache_dir,
                                                                    small_dataset, tmp_path):
    """3 batches of all frames and 1 of held-out ones: of 4 ranks, one has nothing to do."""
    start_ranks(_evaluate_as_rank, nprocs=world, args=(
        world, _free_port(), small_config.params(), str(cache_dir), str(tmp_path / "table")))
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "table"),
                                  _evaluate(small_config, cache_dir), check_exact=True)


def test_under_nccl_a_rank_keeps_to_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in ("auto", "cuda", "cuda:1"):
        assert distributed.own_device(device) == torch.device("cuda:3")
    with pytest.raises(ConfigError, match="device='cpu' does not go with NCCL"):
        distributed.own_device("cpu")


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4,
                                   pytest.param(8, marks=pytest.mark.slow)])
def test_ranks_with_the_same_global_batches_give_the_same_weights(world, small_config, cache_dir,
                                                                  small_dataset, tmp_path):
    """10 training frames, 8 a step: the last batch is short, and some ranks have none."""
    config = small_config.replace(batch_size=8, epochs=2, pixel_loss_warmup_epochs=1)
    alone = train(config, tmp_path / "alone", cache_dir=cache_dir, progress=False)
    shared = config.replace(batch_size=8 // world)
    start_ranks(_train_as_rank, nprocs=world, args=(
        world, _free_port(), shared.params(), str(tmp_path / "ranks"), str(cache_dir)))
    for name, value in weights(alone.run_dir).items():
        torch.testing.assert_close(weights(tmp_path / "ranks")[name], value, atol=2e-5, rtol=1e-4)
    metrics = RunDir(tmp_path / "ranks").metrics()
    assert metrics.pixel_loss.tolist() == pytest.approx(alone.metrics.pixel_loss.tolist(), 1e-5)
    shared, single = (pd.read_csv(path / "evaluation.csv")
                      for path in (tmp_path / "ranks", alone.run_dir))
    keys = ["variant", "source", "frame", "split"]
    pd.testing.assert_frame_equal(shared[keys], single[keys])
    np.testing.assert_allclose(shared.psnr_db, single.psnr_db, atol=0.05)


def _train_and_note(rank, world, port, params, run_dir, cache_dir):
    """Writes the frames and the number of all-reduces of every step of a rank."""
    step, reduce, notes, reduced = PlainEngine.step, torch.distributed.all_reduce, [], 0

    def counted(*args, **kwargs):
        nonlocal reduced
        reduced += 1
        return reduce(*args, **kwargs)

    def noted(self, indices, **kwargs):
        before = reduced
        sums = step(self, indices, **kwargs)
        notes.append((indices.tolist(), reduced - before))
        return sums

    torch.distributed.all_reduce, PlainEngine.step = counted, noted
    _train_as_rank(rank, world, port, params, run_dir, cache_dir)
    Path(f"{run_dir}.{rank}.json").write_text(json.dumps(notes))


def test_ranks_share_every_frame_of_an_epoch_and_one_all_reduce_a_step(
        small_config, cache_dir, small_dataset, tmp_path):
    """10 training frames on 3 ranks of 2: two steps an epoch, the second of 2, 1 and 1 frames."""
    start_ranks(_train_and_note, nprocs=3, args=(
        3, _free_port(), small_config.replace(epochs=2).params(), str(tmp_path / "run"),
        str(cache_dir)))
    ranks = [json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(3)]
    assert [[len(frames) for frames, _ in notes] for notes in ranks] == [
        [2, 2, 2, 2], [2, 1, 2, 1], [2, 1, 2, 1]]
    assert {reduced for notes in ranks for _, reduced in notes} == {1}
    for epoch in (0, 1):
        seen = [frame for notes in ranks for frames, _ in notes[2 * epoch:2 * epoch + 2]
                for frame in frames]
        assert sorted(seen) == small_dataset.split.train.tolist()


def _train_once_all_are_there(barrier, answers, params, run_dir, cache_dir):
    torch.set_num_threads(1)
    fit = train_module.Trainer.fit

    def fit_slowly(self, **options):
        time.sleep(3)  # the other has time to try
        return fit(self, **options)

    train_module.Trainer.fit = fit_slowly
    barrier.wait()
    try:
        train(Config.from_params(**params), run_dir, cache_dir=cache_dir, progress=False)
        answers.put("finished")
    except RunError as error:
        answers.put(str(error))


def test_of_two_processes_that_start_one_run_one_says_so_and_stops(
        small_config, small_dataset, cache_dir, finished, tmp_path):
    barrier, answers = FORK.Barrier(2), FORK.Queue()
    both = [FORK.Process(target=_train_once_all_are_there, args=(
        barrier, answers, small_config.params(), str(tmp_path / "run"), str(cache_dir)))
        for _ in range(2)]
    for process in both:
        process.start()
    said = sorted(answers.get(timeout=120) for _ in both)
    for process in both:
        process.join()
    assert "is being trained by another process (process" in said[0] and said[1] == "finished"
    for name, value in weights(finished.run_dir).items():
        assert torch.equal(weights(tmp_path / "run")[name], value), name


def test_the_clock_counts_training_only(small_config, small_dataset, cache_dir, tmp_path,
                                        monkeypatch):
    evaluate = train_module.evaluate_model

    def slow(*args, **kwargs):
        time.sleep(1.5)
        return evaluate(*args, **kwargs)

    for module in (train_module, outputs):
        monkeypatch.setattr(module, "evaluate_model", slow)
    step = PlainEngine.step

    def compiling(self, *args, **kwargs):
        time.sleep(0.2)
        self.compile_s += 0.2
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PlainEngine, "step", compiling)
    prepare = PlainEngine.__init__

    def compiling_first(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        self.compile_s = 3.0  # as an engine that compiles before its first step

    monkeypatch.setattr(PlainEngine, "__init__", compiling_first)
    result = train(small_config.replace(epochs=2), tmp_path / "run", cache_dir=cache_dir,
                   progress=False)
    assert 0 < result.summary["train_time_s"] < 1.5
    assert result.summary["compile_s"] == pytest.approx(3 + 10 * 0.2)
    assert result.summary["eval_time_s"] > 1.5
    assert result.summary["checkpoints"] >= 10 and result.summary["checkpoint_time_s"] > 0


def test_the_best_model_is_measured_once(small_config, small_dataset, cache_dir, tmp_path,
                                         monkeypatch):
    scores, columns = iter((3.0, 2.0, 1.0)), train_module.evaluation_columns
    monkeypatch.setattr(train_module, "evaluation_columns",
                        lambda table: columns(table) | {"eval_psnr_train": next(scores)})
    monkeypatch.setattr(outputs, "evaluate_model", None)  # a second evaluation fails
    train(small_config.replace(epochs=3, eval_freq=1, predict_clip=False), tmp_path / "run",
          cache_dir=cache_dir, progress=False, dataset=small_dataset)
    run = load_run(tmp_path / "run", cache_dir=cache_dir, device="cpu")
    assert RunDir(tmp_path / "run").summary()["best_epoch"] == 1  # not the last
    own = pd.read_csv(tmp_path / "run" / "evaluation.csv").query("variant == 'trained'")
    again = evaluate_model(run.model, run.dataset)
    assert own.psnr_db.tolist() == pytest.approx(again.psnr_db.tolist(), abs=1e-4)


def test_a_wrong_setting_does_not_occupy_the_folder(small_config, cache_dir, tmp_path):
    with pytest.raises(ConfigError, match="modelsize"):
        train(small_config.replace(modelsize=1e-4), tmp_path / "run", cache_dir=cache_dir)
    RunDir.create(tmp_path / "run", small_config)
    assert RunDir(tmp_path / "run").config() == small_config


def test_what_would_stop_a_run_is_said_before_it(small_config):
    for params, words in [({"modelsize": 1e-4}, "at least"), ({"loss": "Fusion10"}, "161 pixels"),
                          ({"enc_strds": "7 7 4"}, "pads the frame"),
                          ({"patch_size": 500}, "patch_size")]:
        with pytest.raises(ConfigError, match=words):
            check_run(small_config.replace(**params))
    check_run(small_config)


def test_going_on_with_another_number_of_ranks(small_config, small_dataset, cache_dir, tmp_path,
                                               monkeypatch):
    """Between epochs any number of ranks may take over."""
    step, taken = PlainEngine.step, 0

    def interrupted(self, *args, **kwargs):
        nonlocal taken
        taken += 1
        if taken > 5:
            raise Interrupted
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PlainEngine, "step", interrupted)
    with pytest.raises(Interrupted):  # after the first epoch's five steps
        train(small_config.replace(eval_freq=1, checkpoint_s=1000), tmp_path / "run",
              cache_dir=cache_dir, progress=False)
    monkeypatch.undo()
    start_ranks(_train_as_rank, nprocs=2, args=(
        2, _free_port(), small_config.replace(eval_freq=1).params(), str(tmp_path / "run"),
        str(cache_dir)))
    assert RunDir(tmp_path / "run").finished
