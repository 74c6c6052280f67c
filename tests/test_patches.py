import numpy as np
import pytest
import torch

from hnerv_clip.config import ConfigError, TeacherConfig
from hnerv_clip.patches import (
    axis_shares,
    cut_patches,
    feature_index,
    linear_weights,
    make_grid,
)


def test_settled_geometry():
    grid = make_grid(TeacherConfig(), (640, 1280))
    assert (grid.size, grid.tops, grid.lefts) == ((448, 448), (0, 192), (0, 277, 555, 832))
    assert (len(grid), grid.rows, grid.cols) == (8, 2, 4)
    assert grid.boxes.shape == (8, 4) and grid.boxes[5].tolist() == [192, 277, 448, 448]
    assert grid.centres.shape == (8, 2) and grid.centres[5].tolist() == [416, 501]


@pytest.mark.parametrize("hw, size", [((160, 320), 112), ((80, 160), 56), ((720, 1280), 504),
                                      ((481, 999), 337), ((272, 640), 190)])
def test_patches_are_in_proportion_at_other_heights(hw, size):
    grid = make_grid(TeacherConfig(), hw)
    assert grid.size == (size, size)
    assert grid.tops[-1] + size == hw[0] and grid.lefts[-1] + size == hw[1]


@pytest.mark.parametrize("config", [
    TeacherConfig(), TeacherConfig(patch_grid=None), TeacherConfig(patch_grid=(1, 1)),
    TeacherConfig(patch_grid=None, patch_size=100, patch_stride=70),
    TeacherConfig(patch_grid=None, patch_size=64, patch_stride=64),
    TeacherConfig(patch_grid=(3, 5), patch_size=333)])
@pytest.mark.parametrize("hw", [(640, 1280), (355, 641)])
def test_patches_lie_within_the_frame_and_reach_its_edges(config, hw):
    grid = make_grid(config, hw)
    for top, left, height, width in grid.boxes.tolist():
        assert 0 <= top <= hw[0] - height and 0 <= left <= hw[1] - width
    assert grid.coverage().sum() == len(grid) * grid.size[0] * grid.size[1]
    assert len({tuple(box) for box in grid.boxes.tolist()}) == len(grid)
    if config.patch_grid != (1, 1):
        assert grid.coverage().min() >= 1


def test_sweep_ends_flush_with_the_edge():
    sweep = TeacherConfig(patch_grid=None, patch_size=448, patch_stride=224)
    grid = make_grid(sweep, (640, 1280))
    assert grid.tops == (0, 192) and grid.lefts == (0, 224, 448, 672, 832)
    exact = make_grid(sweep, (672, 896))
    assert exact.tops == (0, 224) and exact.lefts == (0, 224, 448)  # no patch twice
    assert make_grid(sweep, (448, 448)).boxes.tolist() == [[0, 0, 448, 448]]


def test_an_upright_frame_has_the_grid_turned():
    grid, turned = (make_grid(TeacherConfig(), hw) for hw in [(640, 1280), (1280, 640)])
    assert turned.size == grid.size and (turned.tops, turned.lefts) == (grid.lefts, grid.tops)


@pytest.mark.parametrize("hw, counts", [
    ((1080, 1920), (2, 4)), ((480, 640), (2, 3)), ((322, 182), (4, 2)), ((500, 500), (2, 2)),
    ((1, 1), (1, 1)), ((3, 5), (2, 4)), ((1, 9), (1, 9))])
def test_patches_of_any_shape_cover_the_frame(hw, counts):
    grid = make_grid(TeacherConfig(), hw)
    assert (grid.rows, grid.cols) == counts and grid.coverage().min() >= 1


def test_one_row_lies_in_the_middle():
    assert make_grid(TeacherConfig(patch_grid=(1, 4)), (640, 1280)).tops == (96,)


@pytest.mark.parametrize("config, hw, fix", [
    (TeacherConfig(patch_size=448), (272, 640), "patch_size=190"),
    (TeacherConfig(patch_size=700), (640, 1280), "patch_size=448"),
    (TeacherConfig(patch_grid=None, patch_stride=500), (640, 1280), "patch_stride=224"),
    (TeacherConfig(patch_grid=(500, 4)), (640, 1280), "at most 193"),
])
def test_bad_geometry_names_the_fix(config, hw, fix):
    with pytest.raises(ConfigError, match=fix):
        make_grid(config, hw)


def test_shares_leave_out_what_lies_beyond_the_frame():
    positions = torch.tensor([2.0, 9.0])
    shares = axis_shares(positions, 4, 16, 8, frame=11)  # cells of 2 pixels, the last 2.5 are edge
    assert torch.allclose(shares, torch.tensor([[.5, .5, 0, 0, 0, 0, 0, 0],
                                                [0, 0, 0, .25, .5, .25, 0, 0]]))


def test_feature_index():
    grid = make_grid(TeacherConfig(), (640, 1280))
    rows, cols = feature_index(grid.centres, (640, 1280), (2, 4))
    assert rows.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and cols.tolist() == [0, 1, 2, 3] * 2
    rows, cols = feature_index(grid.centres, (640, 1280), (640, 1280))
    assert torch.stack([rows, cols], 1).tolist() == grid.centres.floor().tolist()
    corners = torch.tensor([[0.0, 0.0], [640.0, 1280.0], [639.9, 0.1]])
    rows, cols = feature_index(corners, (640, 1280), (80, 160))
    assert rows.tolist() == [0, 79, 79] and cols.tolist() == [0, 159, 0]
    with pytest.raises(ValueError, match="within the frame"):
        feature_index(torch.tensor([[0.0, 1281.0]]), (640, 1280), (80, 160))


def test_cut_patches():
    grid = make_grid(TeacherConfig(), (160, 320))
    frames = torch.randint(0, 256, (3, 3, 160, 320), dtype=torch.uint8)
    patches = cut_patches(frames, grid)
    assert patches.shape == (3, 8, 3, 112, 112) and patches.dtype == torch.uint8
    for index, (top, left, height, width) in enumerate(grid.boxes.tolist()):
        assert torch.equal(patches[:, index], frames[..., top:top + height, left:left + width])
    with pytest.raises(ValueError, match="160×320"):
        cut_patches(frames[..., :-1], grid)


def test_linear_weights_are_those_of_interpolation():
    """Between, at and beyond the known coordinates, against NumPy's interpolation."""
    wanted = torch.tensor([-3.0, 0, 1, 4.5, 7, 9], dtype=torch.float64)
    known = torch.tensor([0, 2, 7])
    expected = np.stack([np.interp(wanted, known, one) for one in np.eye(3)], axis=1)
    assert np.allclose(linear_weights(wanted, known).numpy(), expected)
    assert linear_weights(wanted, known[:1]).shape == (6, 1)
