"""Every Triton kernel against plain PyTorch: interpreted on a CPU, compiled on a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")  # made for Linux; without it training is plain
import triton
import triton.language as tl

from hnerv_clip.engines.adan import BETAS, EPS, STATE, Adan
from hnerv_clip.kernels import (
    activations,
    adam,
    conv,
    convnext,
    depthwise_conv,
    pixel_shuffle,
    rgb_head,
)

ACT = {"gelu": F.gelu, "relu": F.relu, "sin": torch.sin, "swish": F.silu}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GUARD = 4096


@pytest.fixture(params=[
    pytest.param(("cpu", torch.float32), id="interpreted-float32"),
    pytest.param(("cpu", torch.float16), id="interpreted-float16"),
    pytest.param(("cuda", torch.bfloat16), id="compiled-bfloat16", marks=pytest.mark.gpu)])
def given(request):
    """Makes random values on a device, rounded to the type that kernels store."""
    device, dtype = request.param
    if device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton's interpreter runs where there is no GPU")
    return Given(torch.device(device), dtype)


class Given:
    def __init__(self, device, dtype):
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype

    def random(self, *shape, scale=1.0):
        """float32, but representable in the type."""
        return (torch.randn(shape) * scale).to(self.dtype).float().to(self.device)

    def zeros(self, *shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def stored(self, values, channels=None, edge=0):
        """[B, C, H, W] channels last with edges and idle channels, zeros before and after."""
        values = F.pad(values, (edge,) * 4).permute(0, 2, 3, 1)
        values = F.pad(values, (0, (channels or values.shape[-1]) - values.shape[-1]))
        return self.rows(values)

    def rows(self, values):
        """Values in the stored type, zeros before and after."""
        flat = self.zeros(values.numel() + 2 * GUARD, dtype=self.dtype)
        flat[GUARD:-GUARD] = values.flatten()
        return flat[GUARD:-GUARD].view(values.shape)

    def close(self, found, expected, factor=1.0):
        scale = max(1.0, float(expected.abs().max()))
        error = float((found.float() - expected.float()).abs().max()) / scale
        assert error < factor * TOLERANCE[self.dtype]
        assert expected.abs().sum() > 0


def shuffled(x, SH, SW):
    """[B, SH·SW·C, H, W], channels ordered (row, column, channel), to [B, C, H·SH, W·SW]."""
    B, C, H, W = x.shape
    C //= SH * SW
    return x.view(B, SH, SW, C, H, W).permute(0, 3, 4, 1, 5, 2).reshape(B, C, H * SH, W * SW)


def kernel_rows(weight):
    """[O, C, K, K] as [K, K·C, O]."""
    out, inner, K, _ = weight.shape
    return weight.permute(2, 3, 1, 0).reshape(K, K * inner, out).contiguous()


def to_nchw(image, blocked, edge, channels):
    """Of either layout with its edges: [B, C, H, W]."""
    image = image.permute(1, 0, 4, 2, 3).flatten(1, 2) if blocked else image.permute(0, 3, 1, 2)
    inner = slice(edge, -edge or None)
    return image[:, :channels, inner, inner]


def assert_rest_is_zero(image, blocked, edge, channels):
    """Edges and idle channels stay as they were."""
    rest = to_nchw(image, blocked, 0, image.shape[0] * 8 if blocked else image.shape[-1]).clone()
    inner = slice(edge, -edge or None)
    rest[:, :channels, inner, inner] = 0
    assert not rest.any()


@triton.jit
def apply_activation(X, OUT, GRAD, ACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i)
    out, grad = activations.activation_and_grad(x, ACT)
    tl.store(GRAD + i, grad)
    tl.store(OUT + i, (out + activations.activate(x, ACT)) / 2)


@pytest.mark.parametrize("act", activations.ACTIVATIONS)
def test_activations_and_their_derivatives(given, act):
    x = torch.linspace(-6, 6, 256, device=given.device).requires_grad_()
    out, grad = given.zeros(256), given.zeros(256)
    apply_activation[(2,)](x.detach(), out, grad, ACT=act, BLOCK=128)
    expected = ACT[act](x)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-4,
                               atol=1e-5)
    assert act not in ("gelu", "swish") or ACT[act](torch.zeros(1)) == 0


@pytest.mark.parametrize("K, CI, CG, SH, SW, edge, blocked, BN2", [
    (1, 24, 8, 1, 1, 0, False, 0), (3, 16, 6, 2, 2, 1, False, 16), (5, 8, 12, 1, 2, 2, True, 0),
    (3, 24, 8, 3, 1, 0, True, 16)])
def test_conv_forward(given, K, CI, CG, SH, SW, edge, blocked, BN2):
    B, H, W, P, CO, CN = 2, 4, 5, K // 2, SH * SW * CG, 8 * -(-CG // 8)
    x, bias = given.random(B, CI, H, W), given.random(CO)
    weight = given.random(CO, CI, K, K, scale=(K * K * CI)**-0.5)
    N = B * (H + 2 * P) * (W + 2 * P)
    shape = (B, H * SH + 2 * edge, W * SW + 2 * edge)
    shape = (CN // 8, *shape, 8) if blocked else (*shape, CN)
    pre, out = given.zeros(N, CO, dtype=given.dtype), given.zeros(*shape, dtype=given.dtype)
    tile = dict(BM=32, BN=16, BN2=BN2, BK=16, STAGES=2)
    grid = (triton.cdiv(N, 32), triton.cdiv(CO, 16 + BN2))
    conv.conv_forward[grid](
        given.stored(x, edge=P), kernel_rows(weight).to(given.dtype), bias, pre, out, N, H=H, W=W,
        CI=CI, CO=CO, K=K, SH=SH, SW=SW, CG=CG, CN=CN, EDGE=edge,
        PLANE=out[0].numel() // 8 if blocked else 0, MODE="shuffle", ACT="gelu", **tile)
    expected = F.conv2d(x, weight, bias, padding=P)
    given.close(to_nchw(pre.view(B, H + 2 * P, W + 2 * P, CO), False, P, CO), expected)
    given.close(to_nchw(out, blocked, edge, CG), F.gelu(shuffled(expected, SH, SW)))
    assert_rest_is_zero(out, blocked, edge, CG)


@pytest.mark.parametrize("K, CI, CO, group, split, BN2", [
    (1, 16, 24, 1, 1, 0), (3, 8, 16, 2, 3, 0), (5, 24, 8, 1, 1, 16), (3, 12, 8, 2, 1, 16)])
def test_conv_input_gradient(given, K, CI, CO, group, split, BN2):
    B, H, W, P = 2, 4, 6, K // 2
    dy = given.random(B, CO, H, W)
    weight = given.random(CO, CI, K, K, scale=(K * K * CO)**-0.5)
    N = B * (H + 2 * P) * (W + 2 * P)
    out = given.zeros(split, B * H * W, CI)
    grid = (triton.cdiv(N // group, 16), triton.cdiv(group * CI, 16 + BN2), split)
    conv.conv_input_gradient[grid](
        given.stored(dy, edge=P), kernel_rows(weight).to(given.dtype), out, N, H=H, W=W, CI=CI,
        CO=CO, K=K, GROUP=group, SPLIT=split, BM=16, BN=16, BN2=BN2, BK=16, STAGES=2)
    found = out.sum(0).view(B, H, W, CI).permute(0, 3, 1, 2)
    given.close(found, F.conv_transpose2d(dy, weight, padding=P))


@pytest.mark.parametrize("K, CI, CO, S, BN2", [
    (1, 16, 24, 1, 0), (3, 8, 40, 3, 16), (5, 12, 8, 2, 0)])
def test_conv_weight_gradient(given, K, CI, CO, S, BN2):
    B, H, W, P = 2, 4, 5, K // 2
    x, dy = given.random(B, CI, H, W), given.random(B, CO, H, W)
    N, columns = B * (H + 2 * P) * (W + 2 * P), triton.cdiv(CO, 16 + BN2)
    out = torch.full((S, K, K * CI, CO), torch.nan, device=given.device)
    conv.conv_weight_gradient[(K, triton.cdiv(K * CI, 32), columns * S)](
        given.stored(x, edge=P), given.stored(dy, edge=P), out, N, W=W, CI=CI, CO=CO, K=K, S=S,
        BM=32, BN=16, BN2=BN2, BK=16, STAGES=2)
    expected = torch.nn.grad.conv2d_weight(x, (CO, CI, K, K), dy, padding=P)
    given.close(out.sum(0), kernel_rows(expected))


SHUFFLES = [(2, 2, 6, 1, 1, False), (1, 3, 8, 0, 2, True), (3, 2, 12, 2, 0, True)]


@pytest.mark.parametrize("SH, SW, CG, P, edge, blocked", SHUFFLES)
def test_pixel_shuffle_forward(given, SH, SW, CG, P, edge, blocked):
    B, H, W, CO, CN = 2, 3, 4, SH * SW * CG, 8 * -(-CG // 8)
    pre = given.random(B, CO, H, W)
    shape = (B, H * SH + 2 * edge, W * SW + 2 * edge)
    out = given.zeros(*((CN // 8, *shape, 8) if blocked else (*shape, CN)), dtype=given.dtype)
    pixel_shuffle.pixel_shuffle_forward[(triton.cdiv(B * H * W, 16), SH)](
        given.stored(pre, edge=P), out, B * H * W, H=H, W=W, P=P, CO=CO, SH=SH, SW=SW, CG=CG,
        CN=CN, EDGE=edge, PLANE=out[0].numel() // 8 if blocked else 0,
        RB=triton.next_power_of_2(SW * CN), ACT="swish", BM=16)
    given.close(to_nchw(out, blocked, edge, CG), F.silu(shuffled(pre, SH, SW)))
    assert_rest_is_zero(out, blocked, edge, CG)


@pytest.mark.parametrize("SH, SW, CG, P, split, blocked", [
    (2, 2, 6, 1, 3, False), (1, 3, 8, 0, 1, True), (3, 2, 12, 2, 2, True)])
@pytest.mark.parametrize("S", [1, 2])
def test_pixel_shuffle_backward(given, SH, SW, CG, P, split, blocked, S):
    B, H, W, CO, CN = 2, 3, 4, SH * SW * CG, 8 * -(-CG // 8)
    pre = given.random(B, CO, H, W).requires_grad_()
    parts = given.random(split, B, CG, H * SH, W * SW)
    dout = torch.stack([given.stored(part, CN) for part in parts.unbind()])
    stored = given.stored(pre.detach(), edge=P)
    dpre = given.zeros(CO // 8, *stored.shape[:3], 8) if blocked else torch.zeros_like(stored)
    dbias = given.zeros(S, CO)
    pixel_shuffle.pixel_shuffle_backward[(S, triton.cdiv(CO, 32))](
        dout, stored, dpre, dbias, B * H * W, H=H, W=W, P=P, CO=CO, SH=SH, SW=SW, CG=CG, CN=CN,
        PLANE=dpre[0].numel() // 8 if blocked else 0, SPLIT=split, ACT="gelu", S=S, BM=16, BN=32)
    expected, = torch.autograd.grad((F.gelu(shuffled(pre, SH, SW)) * parts.sum(0)).sum(), pre)
    given.close(to_nchw(dpre, blocked, P, CO), expected)
    given.close(dbias.sum(0), expected.sum((0, 2, 3)), factor=4)


@pytest.mark.parametrize("SH, SW, CG, P, blocked", [(2, 2, 6, 1, False), (1, 2, 8, 2, True)])
def test_scatter_gradient(given, SH, SW, CG, P, blocked):
    B, H, W, CO, C = 2, 3, 4, SH * SW * CG, 5
    pre = given.random(B, CO, H, W).requires_grad_()
    cells = torch.tensor([0, 7, 7, H * SH * W * SW - 1], device=given.device)  # one of them twice
    gradient = given.random(B, len(cells), C)
    stored = given.stored(pre.detach(), edge=P)
    dpre = given.zeros(CO // 8, *stored.shape[:3], 8) if blocked else torch.zeros_like(stored)
    dbias = given.zeros(B, CO)
    pixel_shuffle.scatter_gradient[(B,)](
        gradient, cells, stored, dpre, dbias, len(cells), H=H, W=W, P=P, CO=CO, SH=SH, SW=SW,
        CG=CG, PLANE=dpre[0].numel() // 8 if blocked else 0, C=C, CB=16, ACT="gelu", num_warps=1)
    features = F.gelu(shuffled(pre, SH, SW)).flatten(2)[:, :C]
    expected, = torch.autograd.grad((features[..., cells] * gradient.transpose(1, 2)).sum(), pre)
    given.close(to_nchw(dpre, blocked, P, CO), expected)
    given.close(dbias, expected.sum((2, 3)))


HEADS = {"tanh": lambda x: torch.tanh(x) / 2 + 0.5, "sigmoid": torch.sigmoid,
         "add": lambda x: x + 0.25}


@pytest.mark.parametrize("mode, head, group, C", [
    ("l2", "tanh", 2, 8), ("l2", "sigmoid", 1, 13), ("l2", "add", 2, 16), ("pred", "tanh", 1, 8),
    ("uint8", "add", 2, 13)])
def test_rgb_forward(given, mode, head, group, C):
    B, H, W, CN, scale = 2, 4, 6, 8 * -(-C // 8), 0.5
    x, bias = given.random(B, C, H, W), given.random(3)
    weight = given.random(3, C, 3, 3, scale=(9 * C)**-0.5)
    BK = triton.next_power_of_2((2 + group) * CN)
    packed = given.zeros(3, BK, 16, dtype=given.dtype)
    for j in range(group):
        for kx in range(3):
            packed[:, (kx + j) * CN:(kx + j) * CN + C, 4 * j:4 * j + 3] = \
                weight[..., kx].permute(2, 1, 0)
    video = torch.randint(0, 256, (5, 3, H, W), dtype=torch.uint8, device=given.device)
    index = torch.tensor([3, 1], device=given.device)
    programs = triton.cdiv((H + 2) * (W + 2), 16 * group)
    pred = given.zeros(B, 3, H, W, dtype=torch.uint8 if mode == "uint8" else torch.float32)
    dout = given.rows(given.zeros(B, H + 2, W + 2, 4))
    error, dbias = given.zeros(B, programs), given.zeros(B, programs, 16)
    rgb_head.rgb_forward[(programs, B)](
        given.stored(x, CN, edge=1), packed, F.pad(bias, (0, 1)), video, index, pred, dout, error,
        dbias, H=H, W=W, CN=CN, GROUP=group, HEAD=head, OFFSET=0.25 if head == "add" else 0.0,
        MODE=mode, SCALE=scale, BM=16, BK=BK)
    value = F.conv2d(x, weight, bias, padding=1).requires_grad_()
    frames = HEADS[head](value)
    if mode == "l2":
        expected = (frames - video[index] / 255).square().flatten(1).sum(1)
        given.close(error.sum(1), expected.detach())
        gradient, = torch.autograd.grad(scale * expected.sum(), value)
        given.close(to_nchw(dout, False, 1, 3), gradient)
        given.close(dbias.view(-1, 4).sum(0)[:3], gradient.sum((0, 2, 3)), factor=4)
    elif mode == "pred":
        given.close(pred, frames.detach())
    else:
        grey = (frames.detach() * 255).clamp(0, 255)
        assert (pred.float() - grey).abs().max() < 0.5 + 255 * TOLERANCE[given.dtype]


@pytest.mark.parametrize("SH, SW, C, CG, P, blocked, extra", [
    (2, 2, 6, 6, 1, False, False), (1, 1, 12, 16, 2, True, True), (3, 4, 8, 8, 0, False, True)])
def test_rgb_backward(given, SH, SW, C, CG, P, blocked, extra):
    """Where a row has idle channels (CG > C), they get no gradient."""
    B, H, W, CO, CN, DC, S = 2, 2, 3, SH * SW * CG, 8 * -(-C // 8), 4, 2
    pre = given.random(B, CO, H, W).requires_grad_()
    drgb = given.random(B, 3, H * SH, W * SW)
    weight = given.random(3, C, 3, 3, scale=1 / 3)
    added = given.random(B, C, H * SH, W * SW) if extra else None
    KB = max(16, triton.next_power_of_2(DC * (SW + 2)))
    RB = max(16, triton.next_power_of_2(SW * CG))
    packed = given.zeros(3, KB, RB, dtype=given.dtype)
    for j in range(SW):
        for ky in range(3):
            for kx in range(3):
                start = (2 + j - kx) * DC
                packed[2 - ky, start:start + 3, j * CG:j * CG + C] = weight[:, :, ky, kx]
    stored = given.stored(pre.detach(), edge=P)
    dpre = given.zeros(CO // 8, *stored.shape[:3], 8) if blocked else torch.zeros_like(stored)
    dbias = given.zeros(S, SH, RB)
    rgb_head.rgb_backward[(S, SH)](
        given.stored(drgb, DC, edge=1), stored, packed,
        None if added is None else given.stored(added, CN), dpre, dbias, B * H, H=H, W=W, P=P,
        CO=CO, SH=SH, SW=SW, CG=CG, CN=CN, PLANE=dpre[0].numel() // 8 if blocked else 0, DC=DC,
        RB=RB, KB=KB, ACT="gelu", S=S, BM=16)
    features = F.gelu(shuffled(pre, SH, SW))[:, :C]
    loss = (F.conv2d(features, weight, padding=1) * drgb).sum()
    loss = loss if added is None else loss + (features * added).sum()
    expected, = torch.autograd.grad(loss, pre)
    given.close(to_nchw(dpre, blocked, P, CO), expected)
    found = dbias.sum(0)[:, :SW * CG].reshape(SH * SW * CG)
    given.close(found, expected.sum((0, 2, 3)), factor=4)


def test_adam_step(given):
    parameter = torch.nn.Parameter(given.random(1500))
    ours, mean, square = parameter.detach().clone(), given.zeros(1500), given.zeros(1500)
    low = given.zeros(1500, dtype=given.dtype)
    optimizer = torch.optim.Adam([parameter], lr=1e-2)
    for step in range(1, 4):
        parameter.grad = given.random(1500)
        optimizer.step()
        adam.adam_step[(2,)](
            ours, parameter.grad, mean, square, low, torch.tensor(1e-2, device=given.device),
            torch.tensor(float(step), device=given.device), 1500, BETA1=0.9, BETA2=0.999, EPS=1e-8,
            BLOCK=1024)
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low, ours.to(given.dtype))
    kept = optimizer.state[parameter]
    torch.testing.assert_close(mean, kept["exp_avg"])
    torch.testing.assert_close(square, kept["exp_avg_sq"])


def test_adan_step(given):
    parameter = torch.nn.Parameter(given.random(1500))
    ours, low = parameter.detach().clone(), given.zeros(1500, dtype=given.dtype)
    state = {name: given.zeros(1500) for name in STATE}
    lr = torch.tensor(1e-2, device=given.device)
    optimizer = Adan([parameter], lr=lr)
    for step in range(1, 4):
        parameter.grad = given.random(1500)
        optimizer.step()
        adam.adan_step[(2,)](
            ours, parameter.grad, *state.values(), low, lr,
            torch.tensor(float(step), device=given.device), 1500, BETA1=BETAS[0], BETA2=BETAS[1],
            BETA3=BETAS[2], EPS=EPS, BLOCK=1024)
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low, ours.to(given.dtype))
    for name in STATE:
        torch.testing.assert_close(state[name], optimizer.state[parameter][name], rtol=1e-4,
                                   atol=1e-6)


@pytest.mark.parametrize("stride, masked", [(2, False), (3, True)])
def test_patchify_frames(given, stride, masked):
    H, W, KP = 6, 12, 32
    video = torch.randint(0, 256, (4, 3, H, W), dtype=torch.uint8, device=given.device)
    index = torch.tensor([2, 0], device=given.device)
    mask = (torch.rand(H, W, device=given.device) > 0.3).float() if masked else None
    count = H // stride * (W // stride)
    out = given.zeros(2 * count, KP, dtype=given.dtype)
    convnext.patchify_frames[(triton.cdiv(count, 16), 2)](
        video, index, mask, out, H=H, W=W, STRIDE=stride, KP=KP, KB=32, BM=16)
    frames = video[index] / 255 * (1 if mask is None else mask)
    expected = F.unfold(frames, stride, stride=stride).transpose(1, 2).reshape(2 * count, -1)
    given.close(out[:, :expected.shape[1]], expected)
    assert not out[:, expected.shape[1]:].any()


@pytest.mark.parametrize("C, stride", [(16, 1), (12, 2)])
def test_layer_norm_forward_and_backward(given, C, stride):
    B, H, W, BM = 2, 4, 6, 16
    N, CB, S = B * H * W, 16, triton.cdiv(B * H * W, BM)
    x = given.random(N, C).requires_grad_()
    gamma, beta = given.random(C).requires_grad_(), given.random(C).requires_grad_()
    out = given.zeros(N // stride**2, stride**2 * C, dtype=given.dtype)
    xhat, scale = given.zeros(N, C, dtype=given.dtype), given.zeros(N)
    sizes = dict(H=H, W=W, C=C, CB=CB, STRIDE=stride, BM=BM)
    convnext.layer_norm_forward[(S,)](x.detach().to(given.dtype), gamma.detach(), beta.detach(),
                                      out, xhat, scale, N, **sizes)
    normed = F.layer_norm(x, (C,), gamma, beta, eps=1e-6).view(
        B, H // stride, stride, W // stride, stride, C)
    expected = normed.permute(0, 1, 3, 2, 4, 5).reshape(out.shape)  # (row, column, channel)
    given.close(out, expected.detach())
    gradient = given.random(*out.shape)
    dx, partial = given.zeros(N, C, dtype=given.dtype), given.zeros(S, 3, C)
    convnext.layer_norm_backward[(S,)](gradient.to(given.dtype), xhat, scale, gamma.detach(), dx,
                                       partial, N, **sizes)
    grads = torch.autograd.grad((expected * gradient).sum(), (x, gamma, beta))
    given.close(dx, grads[0])
    given.close(partial.sum(0)[0], grads[1], factor=2)
    given.close(partial.sum(0)[1], grads[2], factor=2)
    given.close(partial.sum(0)[2], grads[0].sum(0), factor=4)


@pytest.mark.parametrize("C, N", [(16, 40), (12, 33)])
def test_convnext_block_forward_and_backward(given, C, N):
    """The block after its depthwise convolution y: norm, pointwise MLP, layer scale, residual."""
    CB, BM = 16, 16
    S = triton.cdiv(N, BM)
    x, y, dbias = given.random(N, C), given.random(N, C), given.zeros(C)
    gamma, beta, layer = (given.random(C) for _ in range(3))
    expand, contract = given.random(C, 4 * C, scale=C**-0.5), given.random(4 * C, C, scale=0.1)
    ebias, cbias = given.random(4 * C), given.random(C)
    leaves = [t.requires_grad_() for t in (y, dbias, gamma, beta, expand, ebias, contract, cbias,
                                           layer)]
    normed = F.layer_norm(y + dbias, (C,), gamma, beta, eps=1e-6)
    hidden = F.gelu(normed @ expand + ebias)
    expected = x + layer * (hidden @ contract + cbias)
    low = {t: t.detach().to(given.dtype) for t in (x, y, expand, contract)}
    values = [gamma.detach(), beta.detach(), low[expand], ebias.detach(), low[contract],
              cbias.detach(), layer.detach()]
    out, xhat, scale = torch.zeros_like(low[x]), torch.zeros_like(low[x]), given.zeros(N)
    sizes = dict(C=C, CB=CB, HB=16, BM=BM, num_warps=4)
    convnext.block_forward[(S,)](low[x], low[y], *values, out, xhat, scale, N, **sizes)
    given.close(out, expected.detach())
    gradient = given.random(N, C)
    dy, kept_normed, d2 = (torch.zeros_like(low[x]) for _ in range(3))
    kept_hidden, dhidden = (given.zeros(N, 4 * C, dtype=given.dtype) for _ in range(2))
    partial = given.zeros(S, 9 * C)
    convnext.block_backward[(S,)](gradient.to(given.dtype), xhat, scale, *values, dy, kept_normed,
                                  kept_hidden, dhidden, d2, partial, N, **sizes)
    grads = dict(zip(("y", "dbias", "gamma", "beta", "expand", "ebias", "contract", "cbias",
                      "layer"), torch.autograd.grad((expected * gradient).sum(), leaves)))
    given.close(dy, grads["y"])
    given.close(kept_normed.float().T @ dhidden.float(), grads["expand"], factor=2)
    given.close(kept_hidden.float().T @ d2.float(), grads["contract"], factor=2)
    sums = partial.sum(0).split([C] * 5 + [4 * C])
    for name, found in zip(("gamma", "beta", "dbias", "cbias", "layer", "ebias"), sums):
        given.close(found, grads[name], factor=4)


@pytest.mark.parametrize("C, B, H, W", [(16, 2, 2, 9), (12, 1, 5, 16)])
def test_depthwise_conv_forward_and_backward(given, C, B, H, W):
    BM, S = 16, 2
    x, dy, add = (given.random(B, C, H, W) for _ in range(3))
    weight, bias = given.random(C, 1, 7, 7, scale=1 / 7), given.random(C)
    taps = weight.flatten(1).T.contiguous()  # [49, C]
    stored = {t: given.stored(t).view(-1, C) for t in (x, dy, add)}
    N, runs = B * H * W, B * H * triton.cdiv(W, 8)
    sizes = dict(H=H, W=W, C=C, CB=16, BM=BM, num_warps=4)
    grid = (triton.cdiv(runs, BM),)
    out, dx = torch.zeros_like(stored[x]), torch.zeros_like(stored[x])
    depthwise_conv.depthwise_conv[grid](stored[x], taps, bias, None, out, N, **sizes)
    given.close(out.view(B, H, W, C).permute(0, 3, 1, 2),
                F.conv2d(x, weight, bias, padding=3, groups=C))
    depthwise_conv.depthwise_conv[grid](stored[dy], taps, None, stored[add], dx, N, **sizes)
    given.close(dx.view(B, H, W, C).permute(0, 3, 1, 2),
                F.conv_transpose2d(dy, weight, padding=3, groups=C) + add)
    partial = given.zeros(S, 49, C)
    depthwise_conv.depthwise_conv_weight_gradient[(7, S)](stored[x], stored[dy], partial, N,
                                                          S=S, **sizes)
    expected = torch.nn.grad.conv2d_weight(x, (C, 1, 7, 7), dy, padding=3, groups=C)
    given.close(partial.sum(0), expected.flatten(1).T, factor=2)
