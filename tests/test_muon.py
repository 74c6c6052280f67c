"""Muon: PyTorch's own within rounding, and resumed exactly."""

import copy

import pytest
import torch

from hnerv_clip.config import ConfigError
from hnerv_clip.engines import muon
from hnerv_clip.engines.muon import MuonAdam, matrices, orthogonalise
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.model import build_model


@pytest.fixture
def model(small_config):
    return build_model(small_config.model, frame_hw=small_config.video.resize_list, frame_count=12)


def set_gradients(model, *, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_steps(model, *, count=3):
    optimizer = MuonAdam(model, lr=torch.tensor(1e-3))
    for seed in range(count):
        set_gradients(model, seed=seed)
        optimizer.step()
    return optimizer


def test_singular_values_are_about_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 20, 60)))
    assert 0.6 < values.min() and values.max() < 1.3


def test_it_knows_the_decoders_weights_alone(model):
    names = set(matrices(model))
    assert "decoder.1.conv.weight" in names
    assert all(name.startswith("decoder.") and name.endswith("weight") for name in names)


def test_steps_are_those_of_pytorch(model, monkeypatch):
    """Ours in float32 against PyTorch's, whose products are bfloat16; the rest is Adam's."""
    monkeypatch.setattr(muon, "SHARE", 1.0)
    before = copy.deepcopy(model)
    other = copy.deepcopy(model)
    take_steps(model)
    names = matrices(other)
    flat = {name: p.detach().flatten(1).clone().requires_grad_() for name, p in names.items()}
    optimizers = (
        torch.optim.Muon(flat.values(), lr=1e-3, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam([p for n, p in other.named_parameters() if n not in names], lr=1e-3))
    for seed in range(3):
        set_gradients(other, seed=seed)
        for name, parameter in flat.items():
            parameter.grad = names[name].grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in model.named_parameters():
        expected = flat[name].view(parameter.shape) if name in names else \
            other.get_parameter(name)
        change = (expected - before.get_parameter(name)).norm()
        assert (parameter - expected).norm() < (0.03 if name in names else 1e-5) * change, name


def test_a_loaded_state_goes_on_as_the_saved_one(model, small_dataset, small_config):
    """Through `load_optimizer`, as a resumed run has it."""
    config = small_config.replace(optimizer="muon", predict_clip=False)
    engines = []
    for source in (model, copy.deepcopy(model)):
        source.to(memory_format=torch.channels_last)
        engines.append(PlainEngine(config, source, small_dataset, autocast=torch.float32))
    first, second = engines
    indices = torch.tensor([1, 2])
    first.step(indices, count=2, lr=1e-3, weight=0.0)
    second.model.load_state_dict(first.model.state_dict())
    second.load_optimizer(copy.deepcopy(first.optimizer.state_dict()))
    for engine in engines:
        for _ in range(2):
            engine.step(indices, count=2, lr=1e-3, weight=0.0)
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_an_unknown_optimizer_is_an_error(small_config):
    with pytest.raises(ConfigError, match="optimizer='sgd' is unknown; use one of adam, muon"):
        small_config.replace(optimizer="sgd")
