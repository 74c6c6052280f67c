"""What a machine lacks is said, and what needs it gives way."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from hnerv_clip import devices
from hnerv_clip.bench import decoding
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.engines.select import make_engine, settle
from hnerv_clip.model import build_model


def model_of(config):
    return build_model(config.model, frame_hw=(80, 160), frame_count=12)


@pytest.mark.parametrize("lack, capability, compiler", [
    ("Tesla T4 has no bfloat16", (7, 5), "/usr/bin/gcc"), ("install gcc", (9, 0), None)])
def test_decoding_is_plain_where_kernels_cannot_run(small_config, monkeypatch, lack, capability,
                                                    compiler):
    model = model_of(small_config)
    gpu = torch.device("cuda")
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=gpu)]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: compiler)
    assert lack in (devices.no_kernels(gpu) or devices.no_bfloat16(gpu))
    assert decoding.decoders(model) == ("plain",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/gcc")
    assert decoding.decoders(model) == ("plain", "fused")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said_once(small_config, small_dataset):
    config = small_config.replace(device="auto", precision="bf16")
    with pytest.warns(UserWarning, match="no GPU here") as said:
        made = make_engine(config, model_of(config), small_dataset, autocast=torch.bfloat16)
    assert type(made) is PlainEngine and len(said) == 1
    for quiet in (config.replace(device="cpu"), config.replace(engine="plain")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_engine(quiet, model_of(quiet), small_dataset, autocast=torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU made up; its capability can be set."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda")


def test_auto_is_bfloat16_by_the_fastest_engine_where_a_gpu_has_it(small_config, gpu, monkeypatch):
    train = small_config.train
    choice = settle(train, gpu)
    assert choice[:2] == ("bf16", "auto") and "NVIDIA H100 computes in bfloat16" in choice.reason
    assert devices.set_precision("auto", gpu) == torch.bfloat16
    assert devices.set_precision("auto", torch.device("cpu")) == torch.float32  # and switches back
    assert settle(train, torch.device("cpu"))[:2] == ("fp32", "auto")
    assert settle(small_config.replace(precision="tf32").train, gpu)[:2] == ("tf32", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    choice = settle(train, gpu)
    assert choice[:2] == ("tf32", "auto") and "NVIDIA H100 has no bfloat16" in choice.reason


@pytest.mark.parametrize("before, precision, engine", [
    ({}, "tf32", "plain"),  # of a time when nothing was noted
    ({"precision": "tf32", "engine": "plain", "device": "NVIDIA H100"}, "tf32", "plain"),
    ({"precision": "tf32", "engine": "plain", "device": "NVIDIA A100"}, "tf32", "auto"),
    ({"precision": "bf16", "engine": "fused", "device": "NVIDIA H100"}, "bf16", "auto"),
    ({"precision": "fp32", "engine": "plain", "device": "a CPU"}, "bf16", "auto"),
    ({"precision": "bf16", "engine": "plain", "device": "NVIDIA H100", "fallback": "no memory"},
     "bf16", "auto")])
def test_a_run_goes_on_in_what_it_began_with(small_config, gpu, before, precision, engine):
    choice = settle(small_config.train, gpu, before)
    assert choice[:2] == (precision, engine)
    assert ("as this run began" in choice.reason) == ((precision, engine) != ("bf16", "auto"))
    named = small_config.replace(precision="bf16", engine="fast").train
    assert settle(named, gpu, before)[:2] == ("bf16", "fast")


def test_cores_are_counted_where_a_system_knows_no_affinity(monkeypatch):
    """As macOS."""
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert devices.usable_cores() == 2
    monkeypatch.delattr(devices.os, "sched_getaffinity")
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 8)
    assert devices.usable_cores() == 8
