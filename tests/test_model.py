"""The network against the paper's figures, and its fast ways against its slow ones."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.layers import sinusoids
from hnerv_clip.model import build_model, from_hnerv_state

PAPER = Config.from_params()  # 640×1280, 1.5 M, as in HNeRV's table for Bunny


def small_model(**params):
    config = Config.from_params(**{
        "enc_strds": "5 4 2", "dec_strds": "5 4 2", "enc_dim": "16_8", "modelsize": 0.05,
        "clip_dim": 32, "fc_hw": "2_4", **params})
    return build_model(config.model, frame_hw=(80, 160), frame_count=10)


def inputs(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 80, 160, generator=generator), torch.arange(count).double() / 10


def test_paper_widths_and_counts():
    model = build_model(PAPER.model, frame_hw=(640, 1280), frame_count=132)
    assert model.plan.widths == [68, 57, 48, 40, 33, 28]
    assert model.plan.kernels == [1, 3, 5, 5, 5]
    sizes = model.part_sizes()
    assert (sizes["decoder"], sizes["rgb_head"], sizes["embeddings"]) == (1_487_517, 759, 16_896)
    assert round(sizes["encoder"] / 1e6, 2) == 0.31
    assert sizes["clip_head"] == 28 * 56 + 56 + 56 * 512 + 512
    assert sizes["stored"] == sum(sizes[k] for k in ("decoder", "rgb_head", "embeddings",
                                                     "clip_head"))
    frames = torch.zeros(1, 3, 640, 1280)
    assert model.embed(frames, None).shape == (1, 16, 2, 4)


@pytest.mark.parametrize("embed", ["", "pe_1.25_80", "xyt_1.25_80"])
def test_stored_size_lands_near_modelsize(embed):
    config = PAPER.replace(embed=embed)
    sizes = build_model(config.model, frame_hw=(640, 1280), frame_count=132).part_sizes()
    assert sizes["stored"] - sizes["clip_head"] == pytest.approx(1.5e6, rel=0.05)


def test_hybrid_forward_is_the_papers():
    """The forward pass written out from the paper's description, with nothing of the library."""
    model = small_model()
    frames, times = inputs()
    rgb, _ = model(frames, times)
    state = list(model.state_dict().values())
    x, at = frames, 0

    def take(count):
        nonlocal at
        at += count
        return state[at - count:at]

    def channel_norm(x, weight, bias):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]

    for i, stride in enumerate([5, 4, 2]):
        if i == 0:
            weight, bias, norm_weight, norm_bias = take(4)
            x = channel_norm(F.conv2d(x, weight, bias, stride), norm_weight, norm_bias)
        else:
            norm_weight, norm_bias, weight, bias = take(4)
            x = F.conv2d(channel_norm(x, norm_weight, norm_bias), weight, bias, stride)
        scale, depth_w, depth_b, norm_w, norm_b, w1, b1, w2, b2 = take(9)
        y = F.conv2d(x, depth_w, depth_b, padding=3, groups=x.shape[1])
        y = channel_norm(y, norm_w, norm_b)
        y = F.conv2d(F.gelu(F.conv2d(y, w1[..., None, None], b1)), w2[..., None, None], b2)
        x = x + scale[:, None, None] * y
    weight, bias = take(2)
    x = F.gelu(F.conv2d(x, weight, bias))
    for stride, kernel in zip([5, 4, 2], [1, 3, 5]):
        weight, bias = take(2)
        assert weight.shape[-1] == kernel
        x = F.gelu(F.pixel_shuffle(F.conv2d(x, weight, bias, padding=kernel // 2), stride))
    weight, bias = take(2)
    expected = torch.tanh(F.conv2d(x, weight, bias, padding=1)) / 2 + 0.5
    torch.testing.assert_close(rgb, expected, atol=1e-5, rtol=1e-4)


def test_weights_of_the_original_implementation_load_by_name():
    """Names as its state dict has them, in its order: downsampling of all stages first."""
    model = small_model(predict_clip=False)
    own = model.state_dict()
    names = {"encoder.downsample_layers.0.0": "encoder.stages.0.0",
             "encoder.downsample_layers.0.1": "encoder.stages.0.1",
             "encoder.downsample_layers.1.0": "encoder.stages.1.0",
             "encoder.downsample_layers.1.1": "encoder.stages.1.1",
             "encoder.downsample_layers.2.0": "encoder.stages.2.0",
             "encoder.downsample_layers.2.1": "encoder.stages.2.1"}
    for i in range(3):
        for theirs, ours in [("dwconv", "depthwise"), ("norm", "norm"), ("pwconv1", "expand"),
                             ("pwconv2", "contract")]:
            names[f"encoder.stages.{i}.0.{theirs}"] = f"encoder.stages.{i}.2.{ours}"
    names |= {"decoder.0.conv.downconv": "decoder.0.conv", "head_layer": "rgb_head"}
    names |= {f"decoder.{i}.conv.upconv.0": f"decoder.{i}.conv" for i in (1, 2, 3)}
    original = {f"{theirs}.{part}": own[f"{ours}.{part}"] for theirs, ours in names.items()
                for part in ("weight", "bias")}
    original |= {f"encoder.stages.{i}.0.gamma": own[f"encoder.stages.{i}.2.scale"]
                 for i in range(3)}
    converted = from_hnerv_state(original)
    assert converted.keys() == own.keys()
    assert all(converted[name] is own[name] for name in own)


def test_initial_weights():
    encoder = small_model().encoder
    weight = encoder.stages[1][2].expand.weight.detach()
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (encoder.stages[0][2].scale == 1e-6).all()
    assert not encoder.stages[0][0].bias.any()
    torch.testing.assert_close(small_model().decoder[1].conv.weight,
                               small_model().decoder[1].conv.weight)  # same seed, same weights


def test_sinusoids_by_hand():
    encoded = sinusoids(torch.tensor([0.3], dtype=torch.float64), base=1.25, levels=3)[0]
    angles = [math.pi * 1.25**i * 0.3 for i in range(3)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(encoded, torch.tensor(expected))


def test_coordinates_do_not_see_the_frame_and_hybrid_does():
    frames, times = inputs()
    for embed, fc_hw in (("pe_1.25_80", "2_4"), ("xyt_1.25_80", "2_4")):
        model = small_model(embed=embed, fc_hw=fc_hw, modelsize=0.2)
        torch.testing.assert_close(model(None, times)[0], model(frames, times)[0])
        assert not torch.allclose(model.embed(None, times)[0], model.embed(None, times)[1])
    model = small_model()
    assert not torch.allclose(model(frames, times)[0], model(1 - frames, times)[0])


def test_xyt_embedding_knows_its_place():
    model = small_model(embed="xyt_1.25_80", modelsize=0.2)
    embedding = model.embed(None, torch.tensor([0.5], dtype=torch.float64))
    assert embedding.shape == (1, 16, 2, 4)
    flat = embedding.flatten(2)[0].T
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize("stride", [1, 3])
def test_clip_at_equals_the_dense_map(stride):
    model = small_model()
    frames, times = inputs()
    stages = model.stages(model.embed(frames, times))
    dense = model.clip_map(stages, stride=stride)
    start = stride // 2
    rows = torch.arange(start, 80, stride)[:3]
    cols = torch.arange(start, 160, stride)[4:7]
    picked = model.clip_at(stages, torch.stack([rows, cols], 1) + 0.5)
    torch.testing.assert_close(picked, dense[:, :, range(3), range(4, 7)].transpose(1, 2),
                               atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dense.norm(dim=1), torch.ones_like(dense[:, 0]))


def test_padding_channels_changes_nothing():
    model = small_model()
    frames, times = inputs()
    centres = torch.tensor([[3.0, 5.0], [79.0, 150.0]])
    plain = model(frames, times, centres)
    grads = torch.autograd.grad(plain[0].sum() + plain[1].sum(), model.parameters())
    model.pad_channels(8)
    padded = model(frames, times, centres)
    padded_grads = torch.autograd.grad(padded[0].sum() + padded[1].sum(), model.parameters())
    for a, b in zip((*plain, *grads), (*padded, *padded_grads)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert model.features(model.embed(frames, times)).shape[1] % 8 == 0


def test_output_of_another_size_is_resized_with_one_warning():
    with pytest.warns(UserWarning, match="resized bilinearly") as caught:
        model = small_model(embed="pe_1.25_80", fc_hw="3_4", modelsize=0.3)
        model(None, inputs()[1])
    assert len(caught) == 1
    assert model(None, inputs()[1])[0].shape == (2, 3, 80, 160)


def test_a_padded_model_is_the_padded_frames_model_cut_to_the_frame():
    config = Config.from_params(
        data_path="clip.mp4", enc_strds="5 4 2", dec_strds="5 4 2", enc_dim="16_8", modelsize=0.05,
        clip_dim=32, clip_stage="all", clip_pool=0.3).model
    model = build_model(config, frame_hw=(75, 149), frame_count=10)
    assert (model.plan.padded_hw, model.plan.shown_hw) == ((80, 160), (75, 149))
    whole = build_model(config, frame_hw=(80, 160), frame_count=10)
    frames, times = inputs()
    frames = frames[..., :75, :149]
    padded = F.pad(frames, (0, 11, 0, 5), mode="replicate")
    centres = torch.tensor([[30.0, 60.0], [75.0, 149.0]])
    pred, vectors = model(frames, times, centres)
    expected, all_vectors = whole(padded, times, centres)
    assert torch.equal(pred, expected[..., :75, :149])
    # Both average over 0.3 frame heights; the frame's, not the padded one's, and no repeated edge
    assert not torch.allclose(vectors[:, 1], all_vectors[:, 1])
    model.clip_head.clip_pool = whole.clip_head.clip_pool = 0.0
    stages = model.stages(model.embed(frames, times))
    assert torch.equal(model.clip_at(stages, centres), whole.clip_at(stages, centres))
    dense = model.clip_map(stages)
    assert dense.shape == (2, 32, 75, 149)
    cell = torch.tensor([[30.5, 60.5]])
    assert torch.allclose(dense[..., 30, 60], model.clip_at(stages, cell)[:, 0], atol=1e-6)


@pytest.mark.parametrize("embed", ["pe_1.25_80", "xyt_1.25_80"])
def test_coordinate_models_of_any_size_are_padded_not_resized(embed):
    config = Config.from_params(data_path="clip.mp4", embed=embed, modelsize=0.2).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_model(config, frame_hw=(33, 75), frame_count=10)
    assert model.plan.output_hw == model.plan.padded_hw != (33, 75)
    assert model(None, torch.zeros(1).double())[0].shape == (1, 3, 33, 75)


@pytest.mark.parametrize("params, fix", [
    ({"enc_strds": "7 4 2"}, "larger resize_list"),
    ({"enc_strds": "7 4 2", "pad_list": ""}, "pad_list='auto'"),
    ({"pad_list": "80_120"}, "smaller than the frame 80×160"),
    ({"modelsize": 0.0001}, "at least"),
    ({"enc_dim": "16_0.000001"}, "enc_dim"),
    ({"dec_strds": "5 4 4"}, "make them equal"),
])
def test_bad_settings_say_the_fix(params, fix):
    with pytest.raises(ConfigError, match=fix):
        small_model(**params)


def test_enc_dim_as_a_share_of_the_size():
    model = build_model(PAPER.replace(enc_dim="64_0.1").model, frame_hw=(640, 1280),
                        frame_count=132)
    assert model.plan.embed_channels == int(0.1 * 1.5e6 / 132 / 8)


def test_without_clip_head():
    model = small_model(predict_clip=False)
    with pytest.raises(ConfigError, match="predict_clip=True"):
        model.clip_map(model.stages(model.embed(*inputs())))
    assert model.part_sizes()["clip_head"] == 0


@pytest.mark.parametrize("act", ["relu", "leaky", "leaky01", "relu6", "gelu", "sin", "swish",
                                 "softplus", "hardswish"])
@pytest.mark.parametrize("norm", ["none", "bn", "in"])
def test_every_activation_and_norm_runs(act, norm):
    model = small_model(act=act, norm=norm)
    frames, times = inputs()
    assert model(frames, times)[0].isfinite().all()
