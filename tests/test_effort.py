"""What `encode` chooses where nobody says: a size for the video, epochs for the device."""

from types import SimpleNamespace

import pytest
import torch

from hnerv_clip.config import Config
from hnerv_clip.sizes import choose_modelsize
from hnerv_clip.stored import effort

CLIP = SimpleNamespace(frame_hw=(182, 322), frames=range(13))
BUNNY = SimpleNamespace(frame_hw=(640, 1280), frames=range(132))
CPU = Config.from_params(crop_list="", device="cpu")


def test_the_size_follows_pixels_and_frames():
    assert choose_modelsize((640, 1280), 132) == 1.5, "the paper's"
    assert choose_modelsize((640, 1280), 264) == 3.0
    assert choose_modelsize((182, 322), 13) == 0.1 and choose_modelsize((2160, 3840), 9000) == 12


def test_a_cpu_gets_fewer_epochs_and_no_setting_that_was_given_is_chosen(monkeypatch):
    chosen = effort.choose_settings(CPU, CLIP, {})
    assert effort.LEAST_EPOCHS < chosen["epochs"] < effort.EPOCHS and chosen["batch_size"] == 1
    assert chosen["pixel_loss_warmup_epochs"] == round(chosen["epochs"] / 6)
    larger = effort.choose_settings(CPU, CLIP, {"modelsize": 1.0, "lr": "1e-3"})
    assert larger["epochs"] < chosen["epochs"] and not {"modelsize", "lr"} & set(larger)
    assert effort.choose_settings(CPU, CLIP, {"epochs": "12"})["pixel_loss_warmup_epochs"] == 2
    assert effort.choose_settings(CPU, BUNNY, {})["epochs"] == effort.LEAST_EPOCHS
    assert effort.LEAST_TUNING <= effort.choose_tuning(CPU, CLIP) <= effort.TUNING
    monkeypatch.setattr(effort, "select_device", lambda name: torch.device("cuda"))
    assert effort.choose_settings(CPU, BUNNY, {}) == {
        "modelsize": 1.5, "epochs": effort.EPOCHS, "optimizer": "adan", "batch_size": 1,
        "lr": 3.5e-3}
    assert effort.choose_settings(CPU, BUNNY, {"optimizer": "adam"}) == {
        "modelsize": 1.5, "epochs": effort.EPOCHS}, "a learning rate suits one optimizer"
    assert effort.choose_tuning(CPU, BUNNY) == effort.TUNING
    assert effort.measure_minutes(CPU, None, tuning=1) is None


def test_a_fields_boxes_and_steps_follow_the_video_and_the_teachers_speed(monkeypatch):
    monkeypatch.setattr(effort, "_seconds_of_box", lambda config, video: 0.01)
    chosen, minutes = effort.choose_boxes(CPU, CLIP, {})
    assert chosen == {"field_boxes": 256, "field_steps": 1300}
    assert minutes == pytest.approx(13 * 256 * 0.01 / 60)
    assert effort.choose_boxes(CPU, BUNNY, {})[0] == {"field_boxes": 32, "field_steps": 1650}
    long = SimpleNamespace(frame_hw=(640, 1280), frames=range(9000))
    chosen, minutes = effort.choose_boxes(CPU, long, {})
    assert chosen == {"field_boxes": effort.LEAST_BOXES, "field_steps": effort.MOST_STEPS}
    assert minutes == pytest.approx(12)
    chosen, minutes = effort.choose_boxes(CPU, CLIP, {"field_boxes": "2"})
    assert chosen == {"field_steps": effort.LEAST_STEPS} and minutes == pytest.approx(0.26 / 60)
    assert effort.choose_boxes(CPU, CLIP, {"field_boxes": 2, "field_steps": 5})[0] == {}
    monkeypatch.setattr(effort, "_seconds_of_box", lambda config, video: 0.1)  # a larger teacher
    assert effort.choose_boxes(CPU, CLIP, {})[0]["field_boxes"] == 32
    monkeypatch.setattr(effort, "select_device", lambda name: torch.device("cuda"))
    assert effort.choose_boxes(CPU, CLIP, {}) == ({}, None), "the settings' own on a GPU"


def test_a_small_network_gets_a_small_field():
    chosen = effort.choose_settings(CPU, CLIP, {"field_rank": 7})
    assert "field_rank" not in chosen
    assert chosen.items() >= {"field_hidden": effort.SMALL_FIELD["field_hidden"]}.items()
    assert not effort.SMALL_FIELD.keys() & effort.choose_settings(CPU, BUNNY, {})
    assert effort.SMALL_FIELD.keys() <= effort.choose_settings(
        CPU, BUNNY, {"modelsize": "0.2"}).keys()


def test_a_forecast_counts_what_was_timed(small_config, cache_dir, monkeypatch):
    """Every step of training and fine-tuning once, at the speed of those that were run."""
    from hnerv_clip.train import prepare_run

    config, dataset = prepare_run(small_config.replace(device="cpu", batch_size=2, epochs=10),
                                  cache_dir)
    forecast = effort.measure_minutes(config, dataset, tuning=4)
    assert 0 < forecast < 1
    steps, timed = -(-len(dataset.split.train) // 2), []
    monkeypatch.setattr(effort, "_seconds", lambda step: timed.append(step()) or 3.0 ** len(timed))
    minutes = effort.measure_minutes(config, dataset, tuning=4)
    assert minutes == pytest.approx(steps * ((10 + effort.EVALUATION) * 3 + 4 * 9) / 60)
    timed.clear()
    rest = effort.measure_minutes(config, dataset, tuning=4, done=10)
    assert rest == pytest.approx(steps * (effort.EVALUATION * 3 + 4 * 9) / 60)
    with_field = config.replace(head="field", predict_clip=False)
    monkeypatch.setattr(effort, "measure_fit", lambda run: 100.0)
    timed.clear()
    assert effort.measure_minutes(with_field, dataset, tuning=4) - minutes == \
        pytest.approx(100 / 60)
    timed.clear()
    assert effort.measure_minutes(config, dataset, tuning=0) == \
        pytest.approx(steps * (10 + effort.EVALUATION) * 3 / 60)


def test_operations_are_those_of_the_convolutions():
    forward = effort.count_operations(CPU, frame_hw=(640, 1280), frames=132)
    assert forward == pytest.approx(2 * 30.4e9, rel=0.01)  # 30 GMAC a frame
