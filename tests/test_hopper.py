"""What can be said of the Hopper kernels without a GPU; `test_engine` runs them on one."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from hopper_programs import Program, to_runs, to_units

from hnerv_clip.kernels import decoder_kernels as kernels
from hnerv_clip.kernels import hopper
from hnerv_clip.kernels.tiles import H100_SHARED_BYTES

SHUFFLE = dict(act="gelu", SH=2, SW=2, CG=28, CN=32, EDGE=1, OUT_UNITS=1)
# The paper's last block, and the RGB head
WAYS = {
    "forward": dict(xc=40, yc=112, kernel=5, hw=(324, 644), **SHUFFLE),
    "back": dict(xc=112, yc=40, kernel=5, hw=(324, 644)),
    "weights": dict(xc=40, yc=112, kernel=5, hw=(324, 644)),
    "rgb": dict(xc=32, yc=8, kernel=3, hw=(642, 1282), head="tanh", OFFSET="0.0f", mode="l2"),
    "rgb_back": dict(xc=8, yc=32, kernel=3, hw=(642, 1282), act="gelu", SH=2, SW=2, CG=28, EDGE=2),
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
    ("forward", dict(kernel=11), "pixels beyond the copy"),
    ("rgb_back", dict(SH=4), "sums of four lines")])
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
    lines = [line for path in hopper.FOLDER.glob("*.cu") for line in path.read_text().splitlines()]
    assert max(map(len, lines)) <= 100


# The emulated GPU: sizes that make several tiles, and an odd number of units

@pytest.fixture
def program(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler to emulate the GPU with")
    return lambda macros, **changes: Program(macros, tmp_path, **changes)


def _given(xc, yc, kernel, hw, images=2):
    torch.manual_seed(0)
    image = torch.randn(images, xc, *hw).to(torch.bfloat16).float()
    weight = (torch.randn(yc, xc, kernel, kernel) / (kernel * xc**0.5)).to(torch.bfloat16).float()
    padded = (hw[0] + kernel - 1, hw[1] + kernel - 1)
    return image, weight, padded, images * padded[0] * padded[1], 8 * (6 * padded[1] + 1024)


@pytest.mark.parametrize("xc, CG, kernel, units", [(16, 8, 5, 1), (24, 12, 3, 0), (40, 8, 5, 1)])
def test_the_way_forward_is_a_convolution_with_activation_and_pixel_shuffle(
        program, xc, CG, kernel, units):
    hw, CN, EDGE = (10, 44), 8 * -(-CG // 8), 1
    image, weight, padded, pixels, room = _given(xc, 4 * CG, kernel, hw)
    macros = hopper.choose("forward", xc=xc, yc=4 * CG, kernel=kernel, hw=padded, act="gelu", SH=2,
                           SW=2, CG=CG, CN=CN, EDGE=EDGE, OUT_UNITS=units)
    bias, pre = torch.randn(4 * CG), torch.zeros(pixels, 4 * CG, dtype=torch.bfloat16)
    shape = (2, 2 * hw[0] + 2 * EDGE, 2 * hw[1] + 2 * EDGE)
    out = torch.zeros(CN // 8, *shape, 8, dtype=torch.bfloat16) if units else \
        torch.zeros(*shape, CN, dtype=torch.bfloat16)
    program(macros)(3, to_units(image, kernel // 2, room), to_runs(weight), bias, pre, out, pixels)
    found = F.conv2d(image, weight, bias, padding=kernel // 2)
    inner = slice(kernel // 2, -(kernel // 2))
    torch.testing.assert_close(pre.view(2, *padded, -1)[:, inner, inner].permute(0, 3, 1, 2),
                               found.to(torch.bfloat16), rtol=1e-2, atol=1e-2)
    # Channels are ordered (row, column, channel)
    shuffled = F.pixel_shuffle(found.view(2, 4, CG, *hw).transpose(1, 2).flatten(1, 2), 2)
    out = out.permute(1, 0, 4, 2, 3).flatten(1, 2) if units else out.permute(0, 3, 1, 2)
    torch.testing.assert_close(out[:, :CG, EDGE:-EDGE, EDGE:-EDGE].float(), F.gelu(shuffled),
                               rtol=2e-2, atol=2e-2)
    out[:, :CG, EDGE:-EDGE, EDGE:-EDGE] = 0
    assert not out.any(), "edges and idle channels stay as they are"


@pytest.mark.parametrize("xc, yc, kernel", [(16, 24, 5), (144, 16, 3)])
def test_the_way_back_gives_the_gradient_at_the_input(program, xc, yc, kernel):
    hw = (9, 50)
    gradient, _, padded, pixels, room = _given(xc, yc, kernel, hw)
    weight = (torch.randn(xc, yc, kernel, kernel) / 20).to(torch.bfloat16).float()
    macros = hopper.choose("back", xc=xc, yc=yc, kernel=kernel, hw=padded)
    out = torch.zeros(2, *hw, yc, dtype=torch.bfloat16)
    program(macros)(2, to_units(gradient, kernel // 2, room), to_runs(weight), None, None, out,
                    pixels)
    torch.testing.assert_close(
        out.permute(0, 3, 1, 2).float(),
        F.conv_transpose2d(gradient, weight, padding=kernel // 2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("xc, yc, kernel", [(16, 32, 5), (24, 48, 3), (32, 8, 3), (24, 8, 3)])
def test_weights_get_their_gradient(program, xc, yc, kernel):
    hw = (7, 70)
    image, _, padded, pixels, room = _given(xc, yc, kernel, hw)
    gradient = torch.randn(2, yc, *hw).to(torch.bfloat16).float()
    macros = hopper.choose("weights", xc=xc, yc=yc, kernel=kernel, hw=padded)
    assert macros["FOLD"] == (yc == 8)
    shares = 2
    programs = hopper.programs(macros, pixels, shares * hopper.programs(macros, pixels, 1))
    out = torch.full((shares, kernel, yc // 8, kernel * xc, 8), torch.nan)
    program(macros)(programs, to_units(image, kernel // 2, room),
                    to_units(gradient, kernel // 2, room), None, out, None, pixels)
    expected = torch.nn.grad.conv2d_weight(image, (yc, xc, kernel, kernel), gradient,
                                           padding=kernel // 2)
    found = out.sum(0).view(kernel, yc // 8, kernel, xc, 8).permute(1, 4, 3, 0, 2).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("mode, xc, programs", [("l2", 32, 7), ("l2", 24, 2), ("pred", 16, 3),
                                                ("uint8", 32, 1)])
def test_colours_their_loss_and_its_gradient(program, mode, xc, programs):
    hw, images = (11, 300), 2  # two strips, the second not full
    image, weight, padded, pixels, room = _given(xc, 8, 3, hw, images)
    weight[3:] = 0
    macros = hopper.choose("rgb", xc=xc, yc=8, kernel=3, hw=padded, head="tanh", OFFSET="0.0f",
                           mode=mode)
    bias, scale = torch.randn(8), 0.01
    video = torch.randint(0, 256, (5, 3, *hw), dtype=torch.uint8)
    index = torch.tensor([3, 1])
    pred = torch.zeros(images, 3, *hw, dtype=torch.uint8 if mode == "uint8" else torch.float32)
    dout = torch.zeros(images, *padded, 8, dtype=torch.bfloat16)
    error, dbias = torch.zeros(images, programs, 16), torch.zeros(images, programs, 16, 4)
    program(macros)(programs, to_units(image, 1, room), to_runs(weight), bias, video, index, pred,
                    dout, error, dbias, scale, pixels)
    value = F.conv2d(image, weight[:3], bias[:3], padding=1).requires_grad_()
    colours = torch.tanh(value) / 2 + 0.5
    if mode == "l2":
        wrong = (colours - video[index] / 255).square().flatten(1).sum(1)
        torch.testing.assert_close(error.sum((1, 2)), wrong.detach(), rtol=1e-4, atol=1e-3)
        gradient, = torch.autograd.grad(wrong.sum() * scale, value)
        found = dout.permute(0, 3, 1, 2)
        torch.testing.assert_close(found[:, :3, 1:-1, 1:-1].float(), gradient, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(dbias.sum((0, 1, 2))[:3], gradient.sum((0, 2, 3)), rtol=1e-3,
                                   atol=1e-3)
        found[:, :3, 1:-1, 1:-1] = 0
        assert not found.any(), "edges and idle colours stay 0"
    elif mode == "pred":
        torch.testing.assert_close(pred, colours.detach(), rtol=1e-4, atol=1e-4)
    else:
        assert (pred.float() - colours.detach() * 255).abs().max() < 0.51


@pytest.mark.parametrize("act, SH, SW, CG, yc", [("gelu", 2, 2, 12, 16), ("sin", 1, 1, 8, 8),
                                                 ("swish", 2, 1, 28, 32), ("relu", 1, 2, 4, 8)])
def test_the_way_back_from_colours_through_activation_and_pixel_shuffle(program, act, SH, SW, CG,
                                                                        yc):
    hw, EDGE, images, programs = (6, 280), 2, 2, 3  # two strips, the second not full
    padded, low = (hw[0] + 2, hw[1] + 2), (hw[0] // SH, hw[1] // SW)
    macros = hopper.choose("rgb_back", xc=8, yc=yc, kernel=3, hw=padded, act=act, SH=SH, SW=SW,
                           CG=CG, EDGE=EDGE)
    torch.manual_seed(0)
    gradient, pre, weight = (t.to(torch.bfloat16).float() for t in (
        torch.randn(images, 8, *hw), torch.randn(images, SH * SW * CG, *low),
        torch.randn(8, yc, 3, 3)))
    CO, size = SH * SW * CG, (low[0] + 2 * EDGE, low[1] + 2 * EDGE)
    last = to_units(pre, EDGE, 0).permute(1, 2, 3, 0, 4).reshape(images, *size, CO)
    room = torch.zeros(last.numel() + 2**16, dtype=torch.bfloat16)
    room[2**15:-2**15] = last.flatten()
    dpre, bias = torch.zeros(CO // 8, images, *size, 8, dtype=torch.bfloat16), \
        torch.zeros(programs, 16, CO)
    program(macros)(programs, to_units(gradient, 1, 2**16), to_runs(weight),
                    room[2**15:-2**15].view_as(last), dpre, bias, images * padded[0] * padded[1])
    value = pre.requires_grad_()
    active = {"gelu": F.gelu, "sin": torch.sin, "swish": F.silu, "relu": F.relu}[act](value)
    # Channels are ordered (row, column, channel); those beyond a pixel's own have no weights
    features = active.view(images, SH, SW, CG, *low).permute(0, 3, 4, 1, 5, 2).reshape(
        images, CG, *hw)
    colours = F.conv2d(features, weight[:, :CG], padding=1)
    expected, = torch.autograd.grad((colours * gradient).sum(), value)
    found = dpre.permute(1, 0, 4, 2, 3).flatten(1, 2).float()
    torch.testing.assert_close(found[..., EDGE:-EDGE, EDGE:-EDGE], expected, rtol=1e-2, atol=0.05)
    torch.testing.assert_close(bias.sum((0, 1)), expected.sum((0, 2, 3)), rtol=1e-3, atol=0.1)
    found[..., EDGE:-EDGE, EDGE:-EDGE] = 0
    assert not found.any(), "edges stay 0"


@pytest.mark.parametrize("old, new, complaint", [
    ("finish_products(sum);\n        ring.leave(i);", "ring.leave(i); finish_products(sum);", ""),
    ("open[ky - 1][n]", "open[ky][n]", ""),
    ("ring.leave(i);", "", "wait for each other"), ("finish_products(sum);", "", "nothing waited"),
    ("line * WIDTH - P)", "(line + 50) * WIDTH - P)", "outside of the arrays")])
def test_the_emulated_gpu_shows_mistakes(program, old, new, complaint):
    """Of a kernel that is right without the change: a wrong result, or a complaint."""
    hw = (30, 40)
    image, weight, padded, pixels, _ = _given(16, 8, 3, hw, images=1)
    macros = hopper.choose("rgb", xc=16, yc=8, kernel=3, hw=padded, head="tanh", OFFSET="0.0f",
                           mode="pred")
    pred = torch.zeros(1, 3, *hw)

    def error(**change) -> float:
        program(macros, **change)(1, to_units(image, 1, 8 * 400), to_runs(weight), torch.zeros(8),
                                  None, None, pred, None, None, None, 0.0, pixels)
        right = torch.tanh(F.conv2d(image, weight[:3], padding=1)) / 2 + 0.5
        return (pred - right).abs().max().item()

    assert error() < 0.01
    if complaint:
        with pytest.raises(RuntimeError, match=complaint):
            error(old=old, new=new)
    else:
        assert not error(old=old, new=new) < 0.1  # or NaN
