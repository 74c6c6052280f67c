"""The fast engine computes what the plain one does; needs a GPU."""

import pytest
import torch

from hnerv_clip.config import ConfigError
from hnerv_clip.engine import FastEngine, PlainEngine, make_engine
from hnerv_clip.model import build_model


def engine(kind, config, dataset, device):
    model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                        frame_count=len(dataset.video.frames))
    model.to(device, memory_format=torch.channels_last)
    return kind(config, model, dataset, autocast=torch.bfloat16)


@pytest.mark.gpu
def test_fast_and_plain_agree(small_config, small_dataset):
    """Both in bf16: losses of 12 steps, among them short batches and both phases, within 2 %."""
    losses = {}
    for kind in (PlainEngine, FastEngine):
        own = engine(kind, small_config, small_dataset, "cuda")
        indices = torch.arange(11, device="cuda")
        losses[kind] = torch.stack([
            own.step(indices[:1] if step % 5 == 4 else indices[step % 10:step % 10 + 2],
                     count=1 if step % 5 == 4 else 2, lr=1e-3, weight=0.5 * (step >= 8)).clone()
            for step in range(12)])[:, :3]
    torch.testing.assert_close(losses[FastEngine], losses[PlainEngine], rtol=0.02, atol=1e-3)


def test_the_fast_engine_is_refused_without_a_gpu(small_config, small_dataset):
    config = small_config.replace(engine="fast")
    model = build_model(config.model, frame_hw=small_dataset.video.frame_hw,
                        frame_count=len(small_dataset.video.frames))
    with pytest.raises(ConfigError, match="engine='auto'"):
        make_engine(config, model, small_dataset, autocast=torch.float32)
