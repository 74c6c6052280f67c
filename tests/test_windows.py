"""Embeddings at positions from windows alone: those of the whole frame."""

import pytest
import torch

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.model import build_model
from hnerv_clip.stored.windows import clip_at


@pytest.mark.parametrize("changes", [
    {}, {"num_blks": "1_2"}, {"clip_stage": "all"}, {"clip_stage": "1_2"}, {"norm": "bn"},
    {"act": "softplus", "ks": "0_3_7"}, {"clip_pool": 0.3}, {"embed": "pe_1.25_8", "fc_hw": "2_4"}])
def test_windows_give_what_the_whole_frame_gives(changes):
    config = Config.from_params(**{"data_path": "clip.mp4",
        "enc_strds": "5 4 2 2", "dec_strds": "5 4 2 2", "enc_dim": "8_4", "modelsize": 0.03,
        "clip_dim": 16, **changes}).model
    model = build_model(config, frame_hw=(160, 320), frame_count=3).eval()
    for parameter in model.parameters():  # features that differ, edges that matter
        parameter.data += 0.05 * torch.randn(parameter.shape,
                                             generator=torch.Generator().manual_seed(1))
    embeddings = model.embed(torch.rand(3, 3, 160, 320), torch.arange(3).double() / 3).detach()
    centres = torch.tensor([[0.0, 0.0], [160, 320], [80.5, 3], [33.3, 190.1], [159, 1], [79, 160]])
    expected = model.clip_at(model.stages(embeddings), centres)
    torch.testing.assert_close(clip_at(model, embeddings, centres), expected, atol=2e-6, rtol=1e-4)


def test_windows_need_a_head_and_a_position_in_the_frame():
    config = Config.from_params(data_path="clip.mp4", enc_strds="5 2", dec_strds="5 2",
                                enc_dim="8_4", modelsize=0.03)
    model = build_model(config.model, frame_hw=(20, 40), frame_count=2)
    embeddings = torch.zeros(1, 4, 2, 4)
    with pytest.raises(ValueError, match="must lie within the frame"):
        clip_at(model, embeddings, torch.tensor([[21.0, 3.0]]))
    model = build_model(config.replace(predict_clip=False).model, frame_hw=(20, 40), frame_count=2)
    with pytest.raises(ConfigError, match="no CLIP head"):
        clip_at(model, embeddings, torch.zeros(1, 2))
