"""What may feed the CLIP head and how it may learn: each option against its plain definition."""

import pytest
import torch
import torch.nn.functional as F

from hnerv_clip.codec import decode_video
from hnerv_clip.config import Config, ConfigError
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.evaluate import store_video
from hnerv_clip.inference import load_run, predict_embeddings
from hnerv_clip.losses import TEMPERATURE, ClipObjective, contrastive_loss
from hnerv_clip.model import build_model
from hnerv_clip.patches import axis_shares, linear_weights
from hnerv_clip.train import train

HEADS = [{}, {"clip_stage": "1"}, {"clip_stage": "0_2"}, {"clip_stage": "all"},
         {"clip_pool": 0.35}, {"clip_stage": "all", "clip_pool": 0.7}]
EVERY_LOSS = [{}, {"clip_loss_type": "centred"}, {"clip_loss_type": "contrastive"},
              {"clip_jitter": 9}]


def small_model(**params):
    config = Config.from_params(**{
        "enc_strds": "5 4 2", "dec_strds": "5 4 2", "enc_dim": "16_8", "modelsize": 0.05,
        "clip_dim": 32, **params})
    return build_model(config.model, frame_hw=(80, 160), frame_count=10)


def stages_of(model, count=2):
    frames = torch.rand(count, 3, 80, 160, generator=torch.Generator().manual_seed(0))
    return model.stages(model.embed(frames, torch.arange(count).double() / 10))


CENTRES = torch.tensor([[28.0, 28.0], [52.0, 28.0], [28.0, 132.0], [80.0, 160.0], [0.0, 3.0]])


def test_the_default_is_the_last_stage_at_one_pixel():
    model = small_model()
    stages = stages_of(model)
    picked = stages[-1][:, :, [28, 52, 28, 79, 0], [28, 28, 132, 159, 3]]
    expected = F.normalize(model.clip_head(picked[..., None])[..., 0], dim=1).transpose(1, 2)
    assert torch.equal(model.clip_at(stages, CENTRES), expected)


@pytest.mark.parametrize("params", HEADS)
def test_the_dense_map_holds_what_is_picked(params):
    model = small_model(**params)
    stages = stages_of(model)
    dense = model.clip_map(stages, stride=3)
    assert dense.shape == (2, 32, 27, 53)
    rows, cols = torch.arange(1, 80, 3)[[0, 9, 26]], torch.arange(1, 160, 3)[[2, 30, 52]]
    picked = model.clip_at(stages, torch.stack([rows, cols], 1) + 0.5)
    torch.testing.assert_close(picked, dense[:, :, [0, 9, 26], [2, 30, 52]].transpose(1, 2))
    torch.testing.assert_close(picked.norm(dim=2), torch.ones(2, 3))


@pytest.mark.parametrize("params", HEADS)
def test_only_the_stages_that_are_needed(params):
    model = small_model(**params)
    stages = stages_of(model)
    assert [s.shape[1] for s in stages] == model.plan.widths
    assert [tuple(s.shape[2:]) for s in stages] == [model.stage_hw(i) for i in range(len(stages))]
    inputs = sum(model.plan.widths[i] for i in model.clip_stages)
    assert model.part_sizes()["clip_head"] == 2 * inputs * (inputs + 1) + 32 * (2 * inputs + 1)
    needed = stages[:model.clip_stages[-1] + 1]
    assert torch.equal(model.clip_at(needed, CENTRES), model.clip_at(stages, CENTRES))


@pytest.mark.parametrize("params", HEADS)
def test_positions_of_each_frame(params):
    model = small_model(**params)
    stages = stages_of(model)
    both = torch.stack([CENTRES, CENTRES.flip(0)])
    torch.testing.assert_close(model.clip_at(stages, both), torch.stack([
        model.clip_at(stages, CENTRES)[0], model.clip_at(stages, CENTRES.flip(0))[1]]))


def test_pooling_is_the_mean_over_a_square():
    """56 pixels around the centre, 7/10 of the height; what lies outside the frame is left out."""
    model = small_model(clip_pool=0.7)
    stages = stages_of(model)
    boxes = [(slice(0, 56), slice(0, 56)), (slice(24, 80), slice(0, 56)),
             (slice(0, 56), slice(104, 160)), (slice(52, 80), slice(132, 160)),
             (slice(0, 28), slice(0, 31))]
    means = torch.stack([stages[-1][:, :, y, x].mean((2, 3)) for y, x in boxes], 2)
    expected = F.normalize(model.clip_head(means[..., None])[..., 0], dim=1).transpose(1, 2)
    torch.testing.assert_close(model.clip_at(stages, CENTRES), expected)


def test_shares_of_cells_by_hand():
    shares = axis_shares(torch.tensor([10.0, 0.0]), 10.0, 40, 4)  # 5…15 of cells of 10 pixels
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]))


@pytest.mark.parametrize("params", HEADS)
def test_padding_channels_changes_nothing(params):
    model = small_model(**params)
    plain = model.clip_at(stages_of(model), CENTRES)
    model.pad_channels(8)
    torch.testing.assert_close(model.clip_at(stages_of(model), CENTRES), plain, atol=1e-5,
                               rtol=1e-4)


@pytest.mark.parametrize("params, fix", [
    ({"clip_stage": "4"}, "0 to 3"), ({"clip_stage": "2_1"}, "rising"), ({"clip_stage": ""}, "all"),
    ({"clip_stage": "-1"}, "last"), ({"clip_stage": "first"}, "all"),
    ({"clip_pool": -0.1}, "0.7 is the whole"), ({"clip_pool": "nan"}, "one pixel"),
    ({"clip_loss_type": "mse"}, "centred"), ({"clip_jitter": -1}, "at least 0")])
def test_bad_settings_say_the_fix(params, fix):
    with pytest.raises(ConfigError, match=fix):
        small_model(**params)


def objective(small_config, small_dataset, **params):
    config = small_config.replace(**params)
    model = build_model(config.model, frame_hw=small_dataset.video.frame_hw, frame_count=12)
    return model, ClipObjective(config, model, targets=small_dataset.embeddings,
                                centres=small_dataset.grid.centres,
                                train=small_dataset.split.train)


@pytest.mark.parametrize("params", EVERY_LOSS)
def test_losses_are_least_at_the_target(params, small_config, small_dataset, monkeypatch):
    model, clip = objective(small_config, small_dataset, **params)
    indices = torch.tensor([3, 5])
    right = small_dataset.embeddings[indices]
    terms = []
    if params.get("clip_jitter"):  # one place for every patch, so that its target is known
        moved = small_dataset.grid.centres.mean(0)
        monkeypatch.setattr(clip, "_moves", lambda *_: (moved - clip.centres).expand(2, -1, -1))
        right = F.normalize((right[:, [1, 5]] + right[:, [2, 6]]).sum(1), dim=-1)
        right = right[:, None].expand(-1, 8, -1)
    for pred in (right, F.normalize(right + 0.01 * torch.randn(right.shape), dim=-1),
                 small_dataset.embeddings[indices].flip(1)):
        monkeypatch.setattr(model.clip_head, "at_cells", lambda stages, cells, pred=pred: pred)
        cosine, term = clip(None, indices, torch.tensor(1e-3))
        torch.testing.assert_close(cosine, 1 - (pred * right).sum(-1).mean(-1))
        terms.append(term)
    assert (terms[0] < terms[1]).all() and (terms[1] < terms[2]).all()


def test_centred_loss_by_hand(small_config, small_dataset, monkeypatch):
    model, clip = objective(small_config, small_dataset, clip_loss_type="centred")
    pred = small_dataset.embeddings[[7]].flip(1)
    monkeypatch.setattr(model.clip_head, "at_cells", lambda stages, cells: pred)
    centre = small_dataset.embeddings[small_dataset.split.train].mean((0, 1))
    expected = 1 - torch.cosine_similarity(pred - centre, small_dataset.embeddings[[7]] - centre,
                                           dim=-1).mean()
    torch.testing.assert_close(clip(None, torch.tensor([7]), torch.tensor(0.1))[1][0], expected)


def test_contrastive_loss_by_hand():
    pred, target = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.6, 0.8]]])
    bank = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    chance = F.cross_entropy(torch.tensor([[0.6, 0.0]]) / TEMPERATURE, torch.tensor([0]))
    torch.testing.assert_close(contrastive_loss(pred, target, bank), TEMPERATURE * chance[None])


def test_jitter_stays_in_bounds_and_repeats(small_config, small_dataset):
    _, clip = objective(small_config, small_dataset, clip_jitter=9)
    indices = torch.arange(12)
    moves = torch.stack([clip._moves(indices, torch.tensor(1e-3 * k)) for k in range(1, 41)])
    assert moves.shape == (40, 12, 8, 2) and moves.abs().max() <= 9
    assert moves.mean().abs() < 0.3 and moves.std() == pytest.approx(9 / 3**0.5, rel=0.03)
    for axis in range(4):  # no two steps, frames, patches or axes move alike
        assert (moves.std(axis) > 0).all()
    assert torch.equal(moves[0], clip._moves(indices, torch.tensor(1e-3)))
    assert torch.equal(moves[0][[4, 7]], clip._moves(torch.tensor([4, 7]), torch.tensor(1e-3)))
    _, other = objective(small_config, small_dataset, clip_jitter=9, seed=1)
    assert not torch.equal(moves[0], other._moves(indices, torch.tensor(1e-3)))


@pytest.mark.parametrize("params", EVERY_LOSS + HEADS[1:])
def test_a_step_is_one_graph(params, small_config, small_dataset):
    """Traced whole: no value leaves the device, and no shape depends on one."""
    model, clip = objective(small_config, small_dataset, **params)
    embedding = torch.rand(2, model.plan.embed_channels, 1, 2)
    compiled = torch.compile(lambda *args: clip(model.stages(args[0]), *args[1:]),
                             backend="aot_eager", fullgraph=True, dynamic=False)
    for lr in (1e-3, 2e-3):
        inputs = (embedding, torch.tensor([2, 9]), torch.tensor(lr))
        torch.testing.assert_close(compiled(*inputs), clip(model.stages(embedding), *inputs[1:]))
    torch.compiler.reset()


def test_a_moved_positions_target_is_interpolated(small_config, small_dataset):
    """A quarter of the way between two columns, at a row; at a patch itself; beyond the last."""
    _, clip = objective(small_config, small_dataset, clip_jitter=9)
    own, grid = small_dataset.embeddings[[4]], small_dataset.grid.centres
    between = 0.75 * grid[1] + 0.25 * grid[2]
    places = torch.stack([between, grid[6], (grid[0] + grid[4]) / 2])
    found = clip._target_at(own, places[None].expand(1, -1, -1))
    expected = torch.stack([0.75 * own[0, 1] + 0.25 * own[0, 2], own[0, 6], own[0, 0] + own[0, 4]])
    torch.testing.assert_close(found[0], F.normalize(expected, dim=1))
    alone = torch.stack([torch.full((3,), 5.0), torch.tensor([1.0, 5.0, 9.0])], 1)
    assert torch.equal(linear_weights(alone[:, 1], torch.tensor([5.0])), torch.ones(3, 1))
    limits = []
    clip.model.clip_head.at_cells = lambda stages, cells: own.expand(12, -1, -1)
    clip.model.clip_head.cells = limits.append
    clip.jitter = 1000
    clip(None, torch.arange(12), torch.tensor(1e-3))
    low, high = limits[0].amin((0, 1)), limits[0].amax((0, 1))
    assert torch.equal(low, grid[0]) and torch.equal(high, grid[-1])


class Interrupted(Exception):
    pass


def test_every_option_trains_resumes_and_is_stored(small_config, small_dataset, cache_dir,
                                                   tmp_path, monkeypatch):
    config = small_config.replace(clip_stage="1_4", clip_pool=0.35, clip_loss_type="contrastive",
                                  clip_jitter=7, epochs=3, pixel_loss_warmup_epochs=1)
    whole = train(config, tmp_path / "whole", cache_dir=cache_dir, progress=False)
    assert whole.metrics.clip_loss.iloc[-1] < whole.metrics.clip_loss.iloc[0]
    step, taken = PlainEngine.step, 0

    def interrupted(self, *args, **kwargs):
        nonlocal taken
        taken += 1
        if taken == 9:
            raise Interrupted
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PlainEngine, "step", interrupted)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", cache_dir=cache_dir, progress=False)
    train(config, tmp_path / "cut", cache_dir=cache_dir, progress=False)
    runs = [load_run(tmp_path / name, cache_dir=cache_dir, device="cpu",
                     checkpoint="model_latest.pth") for name in ("whole", "cut")]
    for name, value in runs[0].model.state_dict().items():
        assert torch.equal(runs[1].model.state_dict()[name], value), name
    store_video(runs[0].model, small_dataset, tmp_path / "video", config=config)
    stored, embeddings = decode_video(tmp_path / "video")
    with torch.inference_mode():
        decoded = stored.clip_at(stored.stages(embeddings), small_dataset.grid.centres)
    assert (decoded * predict_embeddings(runs[0].model, small_dataset)).sum(-1).min() > 0.95
