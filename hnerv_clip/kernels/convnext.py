"""The encoder's ConvNeXt stages, forward and backward: patches, layer norms, pointwise MLPs.

Images have no edges here. Partial sums [S, …] are one row for each program. `depthwise_conv` holds
the block's other part.
"""

import triton
import triton.language as tl

from hnerv_clip.kernels.activations import activate, activation_and_grad
from hnerv_clip.kernels.async_fence import with_async_fence
from hnerv_clip.kernels.depthwise_conv import jit_any_size


@triton.jit
def patchify_frames(VIDEO, INDEX, MASK, OUT, H: tl.constexpr, W: tl.constexpr,
                    STRIDE: tl.constexpr, KP: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr):
    """Frames VIDEO[INDEX] / 255 as patches [B·H/s·W/s, KP], ordered (channel, row, column)."""
    PATCHES: tl.constexpr = (H // STRIDE) * (W // STRIDE)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    b = tl.program_id(1)
    e = tl.arange(0, KB)
    channel, ky, kx = e // (STRIDE * STRIDE), (e // STRIDE) % STRIDE, e % STRIDE
    y, x = (n // (W // STRIDE)) * STRIDE, (n % (W // STRIDE)) * STRIDE
    frame = tl.load(INDEX + b)
    inside = (n < PATCHES)[:, None] & (e < 3 * STRIDE * STRIDE)[None, :]
    cell = (y[:, None] + ky[None, :]) * W + x[:, None] + kx[None, :]
    v = tl.load(VIDEO + frame * (3 * H * W) + (channel * (H * W))[None, :] + cell, mask=inside,
                other=0).to(tl.float32) / 255
    if MASK is not None:
        v *= tl.load(MASK + cell, mask=inside, other=0.0)
    tl.store(OUT + (b * PATCHES + n)[:, None] * KP + e[None, :], v.to(OUT.dtype.element_ty),
             mask=(n < PATCHES)[:, None] & (e < KP)[None, :])


@triton.jit
def layer_norm(x, C: tl.constexpr, CB: tl.constexpr):
    """(x − mean)/σ over the first C of CB channels [BM, CB], and 1/σ [BM]; ε = 1e-6."""
    c = tl.arange(0, CB)
    x = tl.where((c < C)[None, :], x, 0.0)
    centered = tl.where((c < C)[None, :], x - (tl.sum(x, 1) / C)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centered * centered, 1) / C + 1e-6)
    return centered * scale[:, None], scale


@triton.jit
def layer_norm_gradient(d, xhat, scale, C: tl.constexpr):
    """Gradient before the norm from that after it (already × γ): all [BM, CB], scale [BM]."""
    mean = tl.sum(d, 1) / C
    along = tl.sum(d * xhat, 1) / C
    return (d - mean[:, None] - xhat * along[:, None]) * scale[:, None]


@jit_any_size
def layer_norm_forward(X, GAMMA, BETA, OUT, XHAT, SCALE, N, H, W, C: tl.constexpr,
                       CB: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr):
    """Layer norm of x [N, C] over C, written as patches [N/s², s²·C]: (row, column, channel)."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CB)
    inside = (pixel < N)[:, None] & (c < C)[None, :]
    source = pixel[:, None] * C + c[None, :]
    xhat, scale = layer_norm(tl.load(X + source, mask=inside, other=0.0).to(tl.float32), C, CB)
    gamma = tl.load(GAMMA + c, mask=c < C, other=0.0)
    beta = tl.load(BETA + c, mask=c < C, other=0.0)
    tl.store(XHAT + source, xhat.to(XHAT.dtype.element_ty), mask=inside)
    tl.store(SCALE + pixel, scale, mask=pixel < N)
    h, w, b = (pixel // W) % H, pixel % W, pixel // (W * H)
    patch = (b * (H // STRIDE) + h // STRIDE) * (W // STRIDE) + w // STRIDE
    slot = (h % STRIDE) * STRIDE + w % STRIDE
    to = (patch * (STRIDE * STRIDE) + slot)[:, None] * C + c[None, :]
    out = xhat * gamma[None, :] + beta[None, :]
    tl.store(OUT + to, out.to(OUT.dtype.element_ty), mask=inside)


@jit_any_size
def layer_norm_backward(D, XHAT, SCALE, GAMMA, DX, PARTIAL, N, H, W, C: tl.constexpr,
                        CB: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr):
    """Backward pass of `layer_norm_forward`; PARTIAL [S, 3, C]: sums for γ, for β, and of dx."""
    c = tl.arange(0, CB)
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (pixel < N)[:, None] & (c < C)[None, :]
    source = pixel[:, None] * C + c[None, :]
    h, w, b = (pixel // W) % H, pixel % W, pixel // (W * H)
    patch = (b * (H // STRIDE) + h // STRIDE) * (W // STRIDE) + w // STRIDE
    slot = (h % STRIDE) * STRIDE + w % STRIDE
    at = (patch * (STRIDE * STRIDE) + slot)[:, None] * C + c[None, :]
    d = tl.load(D + at, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.load(XHAT + source, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + pixel, mask=pixel < N, other=0.0)
    gamma = tl.load(GAMMA + c, mask=c < C, other=0.0)
    dx = tl.where(inside, layer_norm_gradient(d * gamma[None, :], xhat, scale, C), 0.0)
    tl.store(DX + source, dx.to(DX.dtype.element_ty), mask=inside)
    row = PARTIAL + tl.program_id(0) * (3 * C) + c
    tl.store(row, tl.sum(d * xhat, 0), mask=c < C)
    tl.store(row + C, tl.sum(d, 0), mask=c < C)
    tl.store(row + 2 * C, tl.sum(dx, 0), mask=c < C)


@with_async_fence
@jit_any_size
def block_forward(X, Y, GAMMA, BETA, EXPAND, EBIAS, CONTRACT, CBIAS, LAYER, OUT, XHAT, SCALE, N,
                  C: tl.constexpr, CB: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr):
    """A ConvNeXt block after its depthwise convolution: OUT [N, C] from Y, and X for the residual.

    XHAT [N, C] and SCALE [N] are kept for the backward pass. EXPAND is [C, 4·C],
    CONTRACT [4·C, C]; the hidden layer is worked through HB values at a time.
    """
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CB)
    inside = (pixel < N)[:, None] & (c < C)[None, :]
    source = pixel[:, None] * C + c[None, :]
    xhat, scale = layer_norm(tl.load(Y + source, mask=inside, other=0.0).to(tl.float32), C, CB)
    tl.store(XHAT + source, xhat.to(XHAT.dtype.element_ty), mask=inside)
    tl.store(SCALE + pixel, scale, mask=pixel < N)
    gamma = tl.load(GAMMA + c, mask=c < C, other=0.0)
    beta = tl.load(BETA + c, mask=c < C, other=0.0)
    normed = (xhat * gamma[None, :] + beta[None, :]).to(OUT.dtype.element_ty)
    acc = tl.zeros((BM, CB), tl.float32)
    for start in range(0, 4 * C, HB):
        e = start + tl.arange(0, HB)
        expand = tl.load(EXPAND + c[:, None] * (4 * C) + e[None, :],
                         mask=(c < C)[:, None] & (e < 4 * C)[None, :], other=0.0)
        hidden = tl.dot(normed, expand) + tl.load(EBIAS + e, mask=e < 4 * C, other=0.0)[None, :]
        contract = tl.load(CONTRACT + e[:, None] * C + c[None, :],
                           mask=(e < 4 * C)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(activate(hidden, "gelu").to(OUT.dtype.element_ty), contract, acc)
    acc += tl.load(CBIAS + c, mask=c < C, other=0.0)[None, :]
    x = tl.load(X + source, mask=inside, other=0.0).to(tl.float32)
    out = x + acc * tl.load(LAYER + c, mask=c < C, other=0.0)[None, :]
    tl.store(OUT + source, out.to(OUT.dtype.element_ty), mask=inside)


@with_async_fence
@jit_any_size
def block_backward(DOUT, XHAT, SCALE, GAMMA, BETA, EXPAND, EBIAS, CONTRACT, CBIAS, LAYER, DY,
                   NORMED, HIDDEN, DHIDDEN, D2, PARTIAL, N, C: tl.constexpr,
                   CB: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr):
    """Backward pass of a block's pointwise MLP and norm.

    Writes:
        DY [N, C] at the depthwise convolution's output; for the weight gradients NORMED [N, C],
        HIDDEN and DHIDDEN [N, 4·C], D2 [N, C]; PARTIAL [S, 9·C]: sums for γ, β, the depthwise
        and the second bias, the layer scale, and 4·C for the first bias. The hidden layer is worked
        through HB values at a time.
    """
    c = tl.arange(0, CB)
    known = c < C
    gamma = tl.load(GAMMA + c, mask=known, other=0.0)
    beta = tl.load(BETA + c, mask=known, other=0.0)
    layer = tl.load(LAYER + c, mask=known, other=0.0)
    cbias = tl.load(CBIAS + c, mask=known, other=0.0)
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (pixel < N)[:, None] & known[None, :]
    source = pixel[:, None] * C + c[None, :]
    row = PARTIAL + tl.program_id(0) * (9 * C)
    dout = tl.load(DOUT + source, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.load(XHAT + source, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + pixel, mask=pixel < N, other=0.0)
    normed = tl.where(inside, xhat * gamma[None, :] + beta[None, :], 0.0)
    normed = normed.to(NORMED.dtype.element_ty)
    d2 = (dout * layer[None, :]).to(D2.dtype.element_ty)
    tl.store(NORMED + source, normed, mask=inside)
    tl.store(D2 + source, d2, mask=inside)
    out = tl.zeros((BM, CB), tl.float32)
    dnormed = tl.zeros((BM, CB), tl.float32)
    for start in range(0, 4 * C, HB):
        e = start + tl.arange(0, HB)
        expand = tl.load(EXPAND + c[:, None] * (4 * C) + e[None, :],
                         mask=known[:, None] & (e < 4 * C)[None, :], other=0.0)
        contract = tl.load(CONTRACT + e[:, None] * C + c[None, :],
                           mask=(e < 4 * C)[:, None] & known[None, :], other=0.0)
        hidden = tl.dot(normed, expand) + tl.load(EBIAS + e, mask=e < 4 * C, other=0.0)[None, :]
        active, derivative = activation_and_grad(hidden, "gelu")
        active = active.to(HIDDEN.dtype.element_ty)
        out = tl.dot(active, contract, out)
        dhidden = tl.dot(d2, tl.trans(contract)) * derivative
        dhidden_low = dhidden.to(DHIDDEN.dtype.element_ty)
        dnormed = tl.dot(dhidden_low, tl.trans(expand), dnormed)
        at = pixel[:, None] * (4 * C) + e[None, :]
        stored = (pixel < N)[:, None] & (e < 4 * C)[None, :]
        tl.store(HIDDEN + at, active, mask=stored)
        tl.store(DHIDDEN + at, dhidden_low, mask=stored)
        dhidden = tl.where((pixel < N)[:, None], dhidden, 0.0)
        tl.store(row + 5 * C + e, tl.sum(dhidden, 0), mask=e < 4 * C)
    dy = tl.where(inside, layer_norm_gradient(dnormed * gamma[None, :], xhat, scale, C), 0.0)
    tl.store(DY + source, dy.to(DY.dtype.element_ty), mask=inside)
    row += c
    tl.store(row, tl.sum(dnormed * xhat, 0), mask=known)
    tl.store(row + C, tl.sum(tl.where(inside, dnormed, 0.0), 0), mask=known)
    tl.store(row + 2 * C, tl.sum(dy, 0), mask=known)
    tl.store(row + 3 * C, tl.sum(dout, 0) * layer, mask=known)
    tl.store(row + 4 * C, tl.sum(dout * (out + cbias[None, :]), 0), mask=known)
