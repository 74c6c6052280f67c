"""What can be said of the Hopper kernels without a GPU; `test_engine` runs them on one."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from hopper_emulator import EmulatedKernel, to_blocked, to_kernel_rows

from hnerv_clip.kernels import hopper, pixel_shuffle, rgb_head
from hnerv_clip.kernels.tiles import H100_SHARED_BYTES

SHUFFLE = dict(act="gelu", SH=2, SW=2, CG=28, CN=32, EDGE=1, OUT_BLOCKED=1)
# The paper's last block, and the RGB head
OPS = {
    "forward": dict(xc=40, yc=112, kernel=5, hw=(324, 644), **SHUFFLE),
    "input_gradient": dict(xc=112, yc=40, kernel=5, hw=(324, 644)),
    "weight_gradient": dict(xc=40, yc=112, kernel=5, hw=(324, 644)),
    "rgb_forward": dict(xc=32, yc=8, kernel=3, hw=(642, 1282), head="tanh", OFFSET="0.0f",
                        mode="l2"),
    "rgb_backward": dict(xc=8, yc=32, kernel=3, hw=(642, 1282), act="gelu", SH=2, SW=2, CG=28,
                         EDGE=2),
}


@pytest.mark.parametrize("op", OPS)
def test_the_source_compiles_and_takes_the_memory_that_python_counts(op):
    """Compilation needs no GPU; the source refuses another count of shared memory."""
    pytest.importorskip("cuda.bindings")
    macros = hopper.choose_macros(op, **OPS[op])
    try:
        code = hopper.build(macros)
    except RuntimeError as error:
        if "does not compile" in str(error):
            raise
        pytest.skip(f"no compiler library: {error}")
    assert code.startswith(b"\x7fELF")
    assert hopper.shared_bytes(macros) <= H100_SHARED_BYTES


def test_thread_blocks_cover_all_pixels_and_all_weights():
    forward, weights = (hopper.choose_macros(op, **OPS[op])
                        for op in ("forward", "weight_gradient"))
    assert hopper.grid_size(forward, 100 * forward["BM"] + 1, 132) == 101
    assert hopper.grid_size(forward, 10**6, 132) == 132
    grid = hopper.grid_size(weights, 10**6, 132)
    assert grid <= 132
    rows8 = grid // hopper.split_k(weights, grid) * weights["ROWS8"]
    assert rows8 * 8 >= weights["K"]**2 * weights["XC"]


@pytest.mark.parametrize("op, changes, why", [
    ("forward", dict(xc=36), "blocks of 8 channels"), ("input_gradient", dict(xc=136), "pairs"),
    ("forward", dict(CG=27), "two values a word"),
    ("forward", dict(yc=512), "accumulators of a thread"),
    ("weight_gradient", dict(hw=(4000, 20)), "a copy longer than the edge"),
    ("forward", dict(kernel=11), "pixels beyond the copy"),
    ("rgb_backward", dict(SH=4), "sums of four lines")])
def test_what_the_kernels_cannot_do_is_left_to_triton(op, changes, why):
    assert hopper.choose_macros(op, **OPS[op]) is not None
    assert hopper.choose_macros(op, **OPS[op] | changes) is None, why


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="runs where there is no GPU")
def test_blocked_and_channels_last_hold_the_same():
    """`pixel_shuffle_forward` and `pixel_shuffle_backward` write either layout."""
    B, H, W, P, EDGE, CN, CG = 2, 3, 4, 2, 2, 16, 12
    geometry = dict(H=H, W=W, P=P, CO=48, SH=2, SW=2, CG=CG, CN=CN)
    pre = torch.randn(B, H + 2 * P, W + 2 * P, 48)
    shape = (B, H * 2 + 2 * EDGE, W * 2 + 2 * EDGE)
    last, blocked = torch.zeros(*shape, CN), torch.zeros(CN // 8, *shape, 8)
    for out, plane in ((last, 0), (blocked, blocked[0].numel() // 8)):
        pixel_shuffle.pixel_shuffle_forward[(1, 2)](
            pre, out, B * H * W, **geometry, EDGE=EDGE, PLANE=plane, RB=32, ACT="gelu", BM=32)
    assert last.abs().sum() > 0
    torch.testing.assert_close(blocked.permute(1, 2, 3, 0, 4).flatten(3), last)

    gradient, bias = torch.randn(1, B, H * 2, W * 2, CN), torch.zeros(1, 48)
    last, blocked = torch.zeros_like(pre), torch.zeros(6, *pre.shape[:3], 8)
    for out, plane in ((last, 0), (blocked, blocked[0].numel() // 8)):
        pixel_shuffle.pixel_shuffle_backward[(1, 1)](
            gradient, pre, out, bias, B * H * W, **geometry, PLANE=plane, SPLIT=1, ACT="gelu", S=1,
            BM=32, BN=64)
    assert last.abs().sum() > 0
    torch.testing.assert_close(blocked.permute(1, 2, 3, 0, 4).flatten(3), last)


def test_an_odd_number_of_channels_is_not_supported():
    assert hopper.supports(40, 144, 3, (162, 322), CG=36)
    assert not hopper.supports(16, 144, 3, (162, 322), CG=9)
    assert hopper.supports(40, 112, 3, (162, 322), CG=28)
    assert hopper.supports_rgb(32, 8, 3, (642, 1282))
    assert not hopper.supports_rgb(112, 8, 3, (642, 1282))


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="runs where there is no GPU")
def test_idle_channels_get_no_gradient():
    """`rgb_head.rgb_backward` with more channels in a row (CG) than a pixel has in memory (CN)."""
    H, W, CN, CG = 2, 40, 8, 16
    drgb, pre = torch.zeros(1, H + 2, W + 2, 4), torch.randn(1, H + 2, W + 2, CG)
    extra, dpre, bias = torch.randn(1, H, W, CN), torch.zeros_like(pre), torch.zeros(1, 1, 16)
    rgb_head.rgb_backward[(1, 1)](drgb, pre, torch.zeros(3, 16, 16), extra, dpre, bias, H, H=H, W=W,
                                 P=1, CO=CG, SH=1, SW=1, CG=CG, CN=CN, PLANE=0, DC=4, RB=16, KB=16,
                                 ACT="gelu", S=1, BM=64)
    assert dpre[..., :CN].abs().sum() > 0 and not dpre[..., CN:].any()


def test_lines_of_the_source_fit_the_page():
    lines = [line for path in hopper.FOLDER.glob("*.cu") for line in path.read_text().splitlines()]
    assert max(map(len, lines)) <= 100


# The emulated GPU: sizes that make several tiles, and an odd number of channel blocks

@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler to emulate the GPU with")
    folder, kernels = tmp_path_factory.mktemp("kernels"), {}

    def build(macros, **changes):
        key = repr((macros, changes))
        if key not in kernels:
            kernels[key] = EmulatedKernel(macros, folder, **changes)
        return kernels[key]

    return build


def _given(xc, yc, kernel, hw, images=2):
    torch.manual_seed(0)
    image = torch.randn(images, xc, *hw).to(torch.bfloat16).float()
    weight = (torch.randn(yc, xc, kernel, kernel) / (kernel * xc**0.5)).to(torch.bfloat16).float()
    padded = (hw[0] + kernel - 1, hw[1] + kernel - 1)
    return image, weight, padded, images * padded[0] * padded[1], 8 * (6 * padded[1] + 1024)


@pytest.mark.parametrize("xc, CG, kernel, blocked", [(16, 8, 5, 1), (24, 12, 3, 0), (40, 8, 5, 1)])
def test_forward_is_a_convolution_with_activation_and_pixel_shuffle(
        emulated, xc, CG, kernel, blocked):
    hw, CN, EDGE = (10, 44), 8 * -(-CG // 8), 1
    image, weight, padded, pixels, guard = _given(xc, 4 * CG, kernel, hw)
    macros = hopper.choose_macros("forward", xc=xc, yc=4 * CG, kernel=kernel, hw=padded, act="gelu",
                                  SH=2, SW=2, CG=CG, CN=CN, EDGE=EDGE, OUT_BLOCKED=blocked)
    bias, pre = torch.randn(4 * CG), torch.zeros(pixels, 4 * CG, dtype=torch.bfloat16)
    shape = (2, 2 * hw[0] + 2 * EDGE, 2 * hw[1] + 2 * EDGE)
    out = torch.zeros(CN // 8, *shape, 8, dtype=torch.bfloat16) if blocked else \
        torch.zeros(*shape, CN, dtype=torch.bfloat16)
    emulated(macros)(3, to_blocked(image, kernel // 2, guard), to_kernel_rows(weight), bias, pre,
                     out, pixels)
    found = F.conv2d(image, weight, bias, padding=kernel // 2)
    inner = slice(kernel // 2, -(kernel // 2))
    torch.testing.assert_close(pre.view(2, *padded, -1)[:, inner, inner].permute(0, 3, 1, 2),
                               found.to(torch.bfloat16), rtol=1e-2, atol=1e-2)
    # Channels are ordered (row, column, channel)
    shuffled = F.pixel_shuffle(found.view(2, 4, CG, *hw).transpose(1, 2).flatten(1, 2), 2)
    out = out.permute(1, 0, 4, 2, 3).flatten(1, 2) if blocked else out.permute(0, 3, 1, 2)
    torch.testing.assert_close(out[:, :CG, EDGE:-EDGE, EDGE:-EDGE].float(), F.gelu(shuffled),
                               rtol=2e-2, atol=2e-2)
    out[:, :CG, EDGE:-EDGE, EDGE:-EDGE] = 0
    assert not out.any(), "edges and idle channels stay as they are"


@pytest.mark.parametrize("xc, yc, kernel", [(16, 24, 5), (144, 16, 3)])
def test_the_gradient_at_the_input(emulated, xc, yc, kernel):
    hw = (9, 50)
    gradient, _, padded, pixels, guard = _given(xc, yc, kernel, hw)
    weight = (torch.randn(xc, yc, kernel, kernel) / 20).to(torch.bfloat16).float()
    macros = hopper.choose_macros("input_gradient", xc=xc, yc=yc, kernel=kernel, hw=padded)
    out = torch.zeros(2, *hw, yc, dtype=torch.bfloat16)
    emulated(macros)(2, to_blocked(gradient, kernel // 2, guard), to_kernel_rows(weight), None,
                     None, out, pixels)
    torch.testing.assert_close(
        out.permute(0, 3, 1, 2).float(),
        F.conv_transpose2d(gradient, weight, padding=kernel // 2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("xc, yc, kernel", [(16, 32, 5), (24, 48, 3), (32, 8, 3), (24, 8, 3)])
def test_the_weight_gradient(emulated, xc, yc, kernel):
    hw = (7, 70)
    image, _, padded, pixels, guard = _given(xc, yc, kernel, hw)
    gradient = torch.randn(2, yc, *hw).to(torch.bfloat16).float()
    macros = hopper.choose_macros("weight_gradient", xc=xc, yc=yc, kernel=kernel, hw=padded)
    assert macros["FOLD"] == (yc == 8)
    split = 2
    grid = hopper.grid_size(macros, pixels, split * hopper.grid_size(macros, pixels, 1))
    out = torch.full((split, kernel, yc // 8, kernel * xc, 8), torch.nan)
    emulated(macros)(grid, to_blocked(image, kernel // 2, guard),
                    to_blocked(gradient, kernel // 2, guard), None, out, None, pixels)
    expected = torch.nn.grad.conv2d_weight(image, (yc, xc, kernel, kernel), gradient,
                                           padding=kernel // 2)
    found = out.sum(0).view(kernel, yc // 8, kernel, xc, 8).permute(1, 4, 3, 0, 2).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("mode, xc, grid", [("l2", 32, 7), ("l2", 24, 2), ("pred", 16, 3),
                                                ("uint8", 32, 1)])
def test_rgb_forward_its_loss_and_its_gradient(emulated, mode, xc, grid):
    hw, images = (11, 300), 2  # two strips, the second not full
    image, weight, padded, pixels, guard = _given(xc, 8, 3, hw, images)
    weight[3:] = 0
    macros = hopper.choose_macros("rgb_forward", xc=xc, yc=8, kernel=3, hw=padded, head="tanh",
                                  OFFSET="0.0f", mode=mode)
    bias, scale = torch.randn(8), 0.01
    video = torch.randint(0, 256, (5, 3, *hw), dtype=torch.uint8)
    index = torch.tensor([3, 1])
    pred = torch.zeros(images, 3, *hw, dtype=torch.uint8 if mode == "uint8" else torch.float32)
    dout = torch.zeros(images, *padded, 8, dtype=torch.bfloat16)
    error, dbias = torch.zeros(images, grid, 16), torch.zeros(images, grid, 16, 4)
    emulated(macros)(grid, to_blocked(image, 1, guard), to_kernel_rows(weight), bias, video, index,
                     pred, dout, error, dbias, scale, pixels)
    value = F.conv2d(image, weight[:3], bias[:3], padding=1).requires_grad_()
    frames = torch.tanh(value) / 2 + 0.5
    if mode == "l2":
        squared_error = (frames - video[index] / 255).square().flatten(1).sum(1)
        torch.testing.assert_close(error.sum((1, 2)), squared_error.detach(), rtol=1e-4, atol=1e-3)
        gradient, = torch.autograd.grad(squared_error.sum() * scale, value)
        found = dout.permute(0, 3, 1, 2)
        torch.testing.assert_close(found[:, :3, 1:-1, 1:-1].float(), gradient, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(dbias.sum((0, 1, 2))[:3], gradient.sum((0, 2, 3)), rtol=1e-3,
                                   atol=1e-3)
        found[:, :3, 1:-1, 1:-1] = 0
        assert not found.any(), "edges and idle channels stay 0"
    elif mode == "pred":
        torch.testing.assert_close(pred, frames.detach(), rtol=1e-4, atol=1e-4)
    else:
        assert (pred.float() - frames.detach() * 255).abs().max() < 0.51


@pytest.mark.parametrize("act, SH, SW, CG, yc", [("gelu", 2, 2, 12, 16), ("sin", 1, 1, 8, 8),
                                                 ("swish", 2, 1, 28, 32), ("relu", 1, 2, 4, 8)])
def test_rgb_backward_through_activation_and_pixel_shuffle(emulated, act, SH, SW, CG,
                                                                        yc):
    hw, EDGE, images, grid = (6, 280), 2, 2, 3  # two strips, the second not full
    padded, low = (hw[0] + 2, hw[1] + 2), (hw[0] // SH, hw[1] // SW)
    macros = hopper.choose_macros("rgb_backward", xc=8, yc=yc, kernel=3, hw=padded, act=act, SH=SH,
                                  SW=SW, CG=CG, EDGE=EDGE)
    torch.manual_seed(0)
    gradient, pre, weight = (t.to(torch.bfloat16).float() for t in (
        torch.randn(images, 8, *hw), torch.randn(images, SH * SW * CG, *low),
        torch.randn(8, yc, 3, 3)))
    CO, size = SH * SW * CG, (low[0] + 2 * EDGE, low[1] + 2 * EDGE)
    last = to_blocked(pre, EDGE, 0).permute(1, 2, 3, 0, 4).reshape(images, *size, CO)
    guard = torch.zeros(last.numel() + 2**16, dtype=torch.bfloat16)
    guard[2**15:-2**15] = last.flatten()
    dpre, bias = torch.zeros(CO // 8, images, *size, 8, dtype=torch.bfloat16), \
        torch.zeros(grid, 16, CO)
    emulated(macros)(grid, to_blocked(gradient, 1, 2**16), to_kernel_rows(weight),
                    guard[2**15:-2**15].view_as(last), dpre, bias, images * padded[0] * padded[1])
    value = pre.requires_grad_()
    active = {"gelu": F.gelu, "sin": torch.sin, "swish": F.silu, "relu": F.relu}[act](value)
    # Channels are ordered (row, column, channel); those beyond a pixel's own have no weights
    features = active.view(images, SH, SW, CG, *low).permute(0, 3, 4, 1, 5, 2).reshape(
        images, CG, *hw)
    frames = F.conv2d(features, weight[:, :CG], padding=1)
    expected, = torch.autograd.grad((frames * gradient).sum(), value)
    found = dpre.permute(1, 0, 4, 2, 3).flatten(1, 2).float()
    torch.testing.assert_close(found[..., EDGE:-EDGE, EDGE:-EDGE], expected, rtol=1e-2, atol=0.05)
    torch.testing.assert_close(bias.sum((0, 1)), expected.sum((0, 2, 3)), rtol=1e-3, atol=0.1)
    found[..., EDGE:-EDGE, EDGE:-EDGE] = 0
    assert not found.any(), "edges stay 0"


@pytest.mark.parametrize("old, new, complaint", [
    ("wgmma_wait_all(sum);\n        pipeline.consumer_release(i);",
     "pipeline.consumer_release(i); wgmma_wait_all(sum);", ""),
    ("pending[ky - 1][n]", "pending[ky][n]", ""),
    ("pipeline.consumer_release(i);", "", "wait for each other"),
    ("wgmma_wait_all(sum);", "", "nothing waited"),
    ("line * WIDTH - P)", "(line + 50) * WIDTH - P)", "outside of the arrays")])
def test_the_emulated_gpu_shows_mistakes(emulated, old, new, complaint):
    """Of a kernel that is right without the change: a wrong result, or a complaint."""
    hw = (30, 40)
    image, weight, padded, pixels, _ = _given(16, 8, 3, hw, images=1)
    macros = hopper.choose_macros("rgb_forward", xc=16, yc=8, kernel=3, hw=padded, head="tanh",
                                  OFFSET="0.0f", mode="pred")
    pred = torch.zeros(1, 3, *hw)

    def error(**change) -> float:
        emulated(macros, **change)(1, to_blocked(image, 1, 8 * 400), to_kernel_rows(weight),
                                   torch.zeros(8), None, None, pred, None, None, None, 0.0, pixels)
        right = torch.tanh(F.conv2d(image, weight[:3], padding=1)) / 2 + 0.5
        return (pred - right).abs().max().item()

    assert error() < 0.01
    if complaint:
        with pytest.raises(RuntimeError, match=complaint):
            error(old=old, new=new)
    else:
        assert not error(old=old, new=new) < 0.1  # or NaN


@pytest.mark.parametrize("op, changes", [
    ("weight_gradient", {}), ("rgb_backward", dict(act="relu", SH=1, SW=1, CG=8, EDGE=2))])
def test_the_emulated_gpu_shows_a_stage_released_before_its_loads(emulated, op, changes):
    """TMA may overwrite it then; wgmma's own reads need no fence."""
    image, weight, padded, pixels, guard = _given(8, 8, 3, (30, 300), images=1)
    macros = hopper.choose_macros(op, xc=8, yc=8, kernel=3, hw=padded, **changes)
    image, low = to_blocked(image, 1, guard), to_blocked(image, 2, guard)
    out = torch.zeros(low.numel())
    values = (image, image, None, out, None) if op == "weight_gradient" else \
        (image, to_kernel_rows(weight), low, out, torch.zeros(16 * 8))
    emulated(macros)(1, *values, pixels)
    with pytest.raises(RuntimeError, match="released before its loads were fenced"):
        emulated(macros, old="pipeline.consumer_release_loads", new="pipeline.consumer_release")(
            1, *values, pixels)
