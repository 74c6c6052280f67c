"""Adan: its first steps by hand, and resumed exactly."""

import copy
import math

import pytest
import torch

from hnerv_clip.config import ConfigError
from hnerv_clip.engines.adan import Adan
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.model import build_model


def test_two_steps_by_hand():
    """Equations 2 and 3 of the paper with its code's bias corrections; the first has no difference.
    """
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Adan([parameter], lr=torch.tensor(0.1, dtype=torch.float64))
    parameter.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    assert parameter.item() == pytest.approx(0.9, abs=1e-7)  # mean 2, size 2
    parameter.grad = torch.tensor([3.0], dtype=torch.float64)
    optimizer.step()
    mean = (0.98 * 0.02 * 2 + 0.02 * 3) / (1 - 0.98**2)
    difference = 0.08 * 1 / (1 - 0.92**2)
    square = (0.99 * 0.01 * 2**2 + 0.01 * (3 + 0.92 * 1)**2) / (1 - 0.99**2)
    assert parameter.item() == pytest.approx(
        0.9 - 0.1 * (mean + 0.92 * difference) / math.sqrt(square), abs=1e-7)


def test_a_group_s_own_rate_and_none_without_gradients():
    first, second, still = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = Adan([{"params": [first]}, {"params": [second], "lr": torch.tensor(0.2)},
                      {"params": [still]}], lr=torch.tensor(0.1))
    first.grad = second.grad = torch.tensor([2.0])
    optimizer.step()
    assert [p.item() for p in (first, second, still)] == pytest.approx([0.9, 0.8, 1], abs=1e-6)


def test_a_loaded_state_goes_on_as_the_saved_one(small_dataset, small_config):
    """Through `load_optimizer`, as a resumed run has it: the last gradient counts, too."""
    config = small_config.replace(optimizer="adan", predict_clip=False)
    model = build_model(small_config.model, frame_hw=small_config.video.resize_list, frame_count=12)
    first, second = (PlainEngine(config, source.to(memory_format=torch.channels_last),
                                 small_dataset, autocast=torch.float32)
                     for source in (model, copy.deepcopy(model)))
    indices = torch.tensor([1, 2])
    first.step(indices, count=2, lr=1e-3, weight=0.0)
    second.model.load_state_dict(first.model.state_dict())
    second.load_optimizer(copy.deepcopy(first.optimizer.state_dict()))
    for engine in (first, second):
        for _ in range(2):
            engine.step(indices, count=2, lr=1e-3, weight=0.0)
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_an_unknown_optimizer_is_an_error(small_config):
    with pytest.raises(ConfigError, match="optimizer='sgd' is unknown; use one of adam, adan"):
        small_config.replace(optimizer="sgd")
