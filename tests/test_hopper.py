"""What can be said of the Hopper kernels without a GPU; `test_engine` runs them on one."""

import os

import pytest
import torch

pytest.importorskip("triton")

from hnerv_clip import hopper, kernels
from hnerv_clip.tiles import H100_SHARED_BYTES

SHUFFLE = dict(act="gelu", SH=2, SW=2, CG=28, CN=32, EDGE=1, OUT_UNITS=1)
# The paper's last block, and the RGB head
WAYS = {
    "forward": dict(xc=40, yc=112, kernel=5, hw=(324, 644), **SHUFFLE),
    "back": dict(xc=112, yc=40, kernel=5, hw=(324, 644)),
    "weights": dict(xc=40, yc=112, kernel=5, hw=(324, 644)),
    "rgb": dict(xc=32, yc=8, kernel=3, hw=(642, 1282), head="tanh", OFFSET="0.0f", mode="l2"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_source_compiles_and_takes_the_memory_that_python_counts(way):
    """Compilation needs no GPU; the source refuses another count of shared memory."""
    pytest.importorskip("cuda.bindings")
    macros = hopper.choose(way, **WAYS[way])
    try:
        code = hopper.build(macros)
    except RuntimeError as error:
        if "does not compile" in str(error):
            raise
        pytest.skip(f"no compiler library: {error}")
    assert code.startswith(b"\x7fELF")
    assert hopper.shared_bytes(macros) <= H100_SHARED_BYTES


def test_programs_cover_all_pixels_and_all_weights():
    forward, weights = (hopper.choose(way, **WAYS[way]) for way in ("forward", "weights"))
    assert hopper.programs(forward, 100 * forward["BM"] + 1, 132) == 101
    assert hopper.programs(forward, 10**6, 132) == 132
    programs = hopper.programs(weights, 10**6, 132)
    assert programs <= 132
    units = programs // hopper.shares(weights, programs) * weights["BLOCK"]
    assert units * 8 >= weights["K"]**2 * weights["XC"]


@pytest.mark.parametrize("way, changes, why", [
    ("forward", dict(xc=36), "units of 8 channels"), ("back", dict(xc=136), "pairs of units"),
    ("forward", dict(CG=27), "two values a word"), ("forward", dict(yc=512), "sums a thread"),
    ("weights", dict(hw=(4000, 20)), "a copy longer than the edge"),
    ("forward", dict(kernel=11), "pixels beyond the copy")])
def test_what_the_kernels_cannot_do_is_left_to_triton(way, changes, why):
    assert hopper.choose(way, **WAYS[way]) is not None
    assert hopper.choose(way, **WAYS[way] | changes) is None, why


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="runs where there is no GPU")
def test_units_and_channels_last_hold_the_same():
    """`kernels.shuffle_activate` and `kernels.unshuffle_gradient` write either order."""
    B, H, W, P, EDGE, CN, CG = 2, 3, 4, 2, 2, 16, 12
    geometry = dict(H=H, W=W, P=P, CO=48, SH=2, SW=2, CG=CG, CN=CN)
    pre = torch.randn(B, H + 2 * P, W + 2 * P, 48)
    shape = (B, H * 2 + 2 * EDGE, W * 2 + 2 * EDGE)
    last, units = torch.zeros(*shape, CN), torch.zeros(CN // 8, *shape, 8)
    for out, plane in ((last, 0), (units, units[0].numel() // 8)):
        kernels.shuffle_activate[(1, 2)](pre, out, B * H * W, **geometry, EDGE=EDGE, PLANE=plane,
                                         RB=32, ACT="gelu", BM=32)
    assert last.abs().sum() > 0
    torch.testing.assert_close(units.permute(1, 2, 3, 0, 4).flatten(3), last)

    gradient, bias = torch.randn(1, B, H * 2, W * 2, CN), torch.zeros(1, 48)
    last, units = torch.zeros_like(pre), torch.zeros(6, *pre.shape[:3], 8)
    for out, plane in ((last, 0), (units, units[0].numel() // 8)):
        kernels.unshuffle_gradient[(1, 1)](gradient, pre, out, bias, B * H * W, **geometry,
                                           PLANE=plane, SPLIT=1, ACT="gelu", S=1, BM=32, BN=64)
    assert last.abs().sum() > 0
    torch.testing.assert_close(units.permute(1, 2, 3, 0, 4).flatten(3), last)


def test_an_odd_number_of_channels_is_not_known():
    assert hopper.knows(40, 144, 3, (162, 322), CG=36)
    assert not hopper.knows(16, 144, 3, (162, 322), CG=9)
    assert hopper.knows(40, 112, 3, (162, 322), CG=28)
    assert hopper.knows_rgb(32, 8, 3, (642, 1282))
    assert not hopper.knows_rgb(112, 8, 3, (642, 1282))


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="runs where there is no GPU")
def test_idle_channels_get_no_gradient():
    """`kernels.rgb_backward` with more channels in a row (CG) than a pixel has in memory (CN)."""
    H, W, CN, CG = 2, 40, 8, 16
    drgb, pre = torch.zeros(1, H + 2, W + 2, 4), torch.randn(1, H + 2, W + 2, CG)
    extra, dpre, bias = torch.randn(1, H, W, CN), torch.zeros_like(pre), torch.zeros(1, 1, 16)
    kernels.rgb_backward[(1, 1)](drgb, pre, torch.zeros(3, 16, 16), extra, dpre, bias, H, H=H, W=W,
                                 P=1, CO=CG, SH=1, SW=1, CG=CG, CN=CN, PLANE=0, DC=4, RB=16, KB=16,
                                 ACT="gelu", S=1, BM=64)
    assert dpre[..., :CN].abs().sum() > 0 and not dpre[..., CN:].any()


def test_lines_of_the_source_fit_the_page():
    assert max(map(len, hopper.SOURCE.read_text().splitlines())) <= 100
