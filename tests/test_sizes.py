"""What `auto` chooses for a frame's size, and when it is chosen."""

import math

import pytest

from hnerv_clip.config import AUTO, Config, ConfigError, profile_params, settings_table
from hnerv_clip.sizes import choose_strides, pad_to
from hnerv_clip.stored.make import encode_settings

PAPER = dict(crop_list="640_1280", enc_strds="5 4 4 2 2", dec_strds="5 4 4 2 2", fc_hw="2_4",
             pad_list="", patch_grid="2_4", patch_size=0)


@pytest.mark.parametrize("hw, strides", [  # of HNeRV's tables, in its order
    ((640, 1280), (5, 4, 4, 2, 2)), ((480, 960), (5, 4, 3, 2, 2)), ((960, 1920), (5, 4, 4, 3, 2))])
def test_the_papers_sizes_have_the_papers_strides(hw, strides):
    assert choose_strides(hw) == strides and pad_to(hw, math.prod(strides)) == hw


@pytest.mark.parametrize("hw", [
    (322, 182), (182, 322), (720, 1280), (1080, 1920), (2160, 3840), (144, 176), (528, 720),
    (481, 641), (100, 4000)])
def test_padding_is_small_and_so_is_the_embedding(hw):
    strides = choose_strides(hw)
    padded = pad_to(hw, math.prod(strides))
    assert math.prod(padded) <= 1.2 * math.prod(hw)
    assert 4 <= math.prod(padded) / math.prod(strides)**2 <= 80
    assert strides[-1] == 2 and list(strides) == sorted(strides, reverse=True)


@pytest.mark.parametrize("cells, strides", [(8, (5, 4, 4, 2, 2)), (32, (5, 4, 4, 2)),
                                            (128, (5, 4, 2, 2))])
def test_strides_leave_about_as_many_cells_as_asked_for(cells, strides):
    assert choose_strides((640, 1280), cells) == strides
    assert 640 * 1280 // math.prod(strides)**2 == cells


def test_one_pixel_has_strides():
    assert choose_strides((1, 1)) == (2,)


def test_built_in_settings_are_the_papers():
    for params in (Config.from_params().params(), profile_params("full"),
                   Config.from_params(preset="paper", data_path="clip.mp4").params()):
        assert PAPER.items() <= params.items()
    quick = profile_params("quick")
    assert {**PAPER, "resize_list": "168_336", "enc_strds": "7 4 3",
            "dec_strds": "7 4 3"}.items() <= quick.items()


def test_any_other_video_is_chosen_for_once_its_size_is_known():
    config = Config.from_params(data_path="clip.mp4")
    assert config.video.crop_list is None and config.model.enc_strds == AUTO
    assert Config.from_params(**config.params()) == config
    upright = config.resolve((322, 182))
    assert upright.diff(config) == {} and config.diff(upright) == {}
    model = upright.model
    assert (model.enc_strds, model.dec_strds) == ((4, 3, 2, 2),) * 2
    assert (model.fc_hw, model.pad_list, upright.teacher.patch_grid) == ((7, 4), (336, 192), (4, 2))
    assert Config.from_params(**upright.params()) == upright
    assert upright.resolve((9, 9)) == upright
    assert config.resolve((640, 1280)).model.pad_list is None


def test_another_size_is_chosen_for_anew():
    bunny = Config.from_params()
    assert bunny.replace(data_path="bikes").video.crop_list is None
    assert bunny.replace(resize_list="240_320").model.enc_strds == (5, 4, 2, 2)
    given = Config.from_params(enc_strds="5 4 4 2 2")
    assert given.model.dec_strds == given.model.enc_strds


def test_coordinates_of_a_given_base_are_resized_and_of_a_chosen_one_padded():
    chosen = Config.from_params(embed="pe_1.25_80", resize_list="100_150", dec_strds="5 2 2")
    assert (chosen.model.fc_hw, chosen.model.pad_list) == ((5, 8), (100, 160))
    assert chosen.replace(fc_hw="2_4").model.pad_list is None


def test_the_best_preset_changes_few_values_and_gives_way_to_what_is_named(tmp_path):
    best, plain = Config.from_params(preset="best"), Config.from_params()
    assert set(plain.diff(best)) == {"optimizer", "batch_size", "lr", "epochs"}
    assert Config.from_params(preset="best", lr=1e-3).train.lr == 1e-3
    encoded = Config.from_params(**encode_settings({"preset": "best"}, tmp_path / "new"))
    assert (encoded.train.epochs, encoded.video.data_split) == (600, (1, 1, 1))


def test_unknown_preset():
    with pytest.raises(ConfigError, match="auto, paper"):
        Config.from_params(preset="papre")


def test_settings_table_says_auto():
    defaults = {name: default for name, default, _, _ in settings_table()}
    assert {name for name in defaults if defaults[name] == AUTO} == {
        "crop_list", "patch_grid", "enc_strds", "dec_strds", "fc_hw", "pad_list", "clip_dim",
        "device", "precision", "engine"}
