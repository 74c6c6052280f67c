"""Triton kernels of the encoder: patches, channel norms and ConvNeXt blocks, forward and back.

Tensors lie channels-last, as in `decoder_kernels`; here without edges. Partial sums [S, …] are one
row for each program.
"""

import triton
import triton.language as tl

from hnerv_clip.kernels.decoder_kernels import activate, activate_both

# Compiled once for all sizes of image: these kernels wait for memory, not for a division
for_any_image = triton.jit(do_not_specialize=["N", "H", "W", "S"])


@triton.jit
def patch_frames(VIDEO, INDEX, MASK, OUT, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr,
                 KP: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr):
    """Frames VIDEO[INDEX] / 255 as patches [B·H/s·W/s, KP], ordered (colour, row, column)."""
    PATCHES: tl.constexpr = (H // STRIDE) * (W // STRIDE)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    b = tl.program_id(1)
    e = tl.arange(0, KB)
    colour, ky, kx = e // (STRIDE * STRIDE), (e // STRIDE) % STRIDE, e % STRIDE
    y, x = (n // (W // STRIDE)) * STRIDE, (n % (W // STRIDE)) * STRIDE
    frame = tl.load(INDEX + b)
    inside = (n < PATCHES)[:, None] & (e < 3 * STRIDE * STRIDE)[None, :]
    cell = (y[:, None] + ky[None, :]) * W + x[:, None] + kx[None, :]
    v = tl.load(VIDEO + frame * (3 * H * W) + (colour * (H * W))[None, :] + cell, mask=inside,
                other=0).to(tl.float32) / 255
    if MASK is not None:
        v *= tl.load(MASK + cell, mask=inside, other=0.0)
    tl.store(OUT + (b * PATCHES + n)[:, None] * KP + e[None, :], v.to(OUT.dtype.element_ty),
             mask=(n < PATCHES)[:, None] & (e < KP)[None, :])


@triton.jit
def normalise(x, C: tl.constexpr, CB: tl.constexpr):
    """(x − mean)/σ over the first C of CB channels [BM, CB], and 1/σ [BM]; ε = 1e-6."""
    c = tl.arange(0, CB)
    x = tl.where((c < C)[None, :], x, 0.0)
    centred = tl.where((c < C)[None, :], x - (tl.sum(x, 1) / C)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + 1e-6)
    return centred * scale[:, None], scale


@triton.jit
def normalise_gradient(d, xhat, scale, C: tl.constexpr):
    """Gradient before the norm from that after it (already × γ): all [BM, CB], scale [BM]."""
    mean = tl.sum(d, 1) / C
    along = tl.sum(d * xhat, 1) / C
    return (d - mean[:, None] - xhat * along[:, None]) * scale[:, None]


@for_any_image
def norm_forward(X, GAMMA, BETA, OUT, XHAT, SCALE, N, H, W,
                 C: tl.constexpr, CB: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr):
    """Channel norm of x [N, C], written as patches [N/s², s²·C] ordered (row, column, channel)."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CB)
    inside = (pixel < N)[:, None] & (c < C)[None, :]
    own = pixel[:, None] * C + c[None, :]
    xhat, scale = normalise(tl.load(X + own, mask=inside, other=0.0).to(tl.float32), C, CB)
    gamma = tl.load(GAMMA + c, mask=c < C, other=0.0)
    beta = tl.load(BETA + c, mask=c < C, other=0.0)
    tl.store(XHAT + own, xhat.to(XHAT.dtype.element_ty), mask=inside)
    tl.store(SCALE + pixel, scale, mask=pixel < N)
    h, w, b = (pixel // W) % H, pixel % W, pixel // (W * H)
    patch = (b * (H // STRIDE) + h // STRIDE) * (W // STRIDE) + w // STRIDE
    slot = (h % STRIDE) * STRIDE + w % STRIDE
    to = (patch * (STRIDE * STRIDE) + slot)[:, None] * C + c[None, :]
    out = xhat * gamma[None, :] + beta[None, :]
    tl.store(OUT + to, out.to(OUT.dtype.element_ty), mask=inside)


@for_any_image
def norm_backward(D, XHAT, SCALE, GAMMA, DX, PARTIAL, N, H, W,
                  C: tl.constexpr, CB: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr):
    """Back through `norm_forward`; PARTIAL [S, 3, C]: sums for γ, for β, and of dx."""
    c = tl.arange(0, CB)
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (pixel < N)[:, None] & (c < C)[None, :]
    own = pixel[:, None] * C + c[None, :]
    h, w, b = (pixel // W) % H, pixel % W, pixel // (W * H)
    patch = (b * (H // STRIDE) + h // STRIDE) * (W // STRIDE) + w // STRIDE
    slot = (h % STRIDE) * STRIDE + w % STRIDE
    at = (patch * (STRIDE * STRIDE) + slot)[:, None] * C + c[None, :]
    d = tl.load(D + at, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.load(XHAT + own, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + pixel, mask=pixel < N, other=0.0)
    gamma = tl.load(GAMMA + c, mask=c < C, other=0.0)
    dx = tl.where(inside, normalise_gradient(d * gamma[None, :], xhat, scale, C), 0.0)
    tl.store(DX + own, dx.to(DX.dtype.element_ty), mask=inside)
    row = PARTIAL + tl.program_id(0) * (3 * C) + c
    tl.store(row, tl.sum(d * xhat, 0), mask=c < C)
    tl.store(row + C, tl.sum(d, 0), mask=c < C)
    tl.store(row + 2 * C, tl.sum(dx, 0), mask=c < C)


@triton.jit
def load_pixel(X, own, x, W, row, known, J: tl.constexpr, C: tl.constexpr):
    """The pixel J right of x [BM] in its row: [BM, CB] in float32, 0 outside the image."""
    inside = row & (x + J >= 0) & (x + J < W)
    return tl.load(X + own + J * C, mask=inside[:, None] & known, other=0.0).to(tl.float32)


@triton.jit
def load_run(X, own, x, W, row, known, C: tl.constexpr):
    """The 8 pixels from x on, as `load_pixel` gives them."""
    return (load_pixel(X, own, x, W, row, known, 0, C), load_pixel(X, own, x, W, row, known, 1, C),
            load_pixel(X, own, x, W, row, known, 2, C), load_pixel(X, own, x, W, row, known, 3, C),
            load_pixel(X, own, x, W, row, known, 4, C), load_pixel(X, own, x, W, row, known, 5, C),
            load_pixel(X, own, x, W, row, known, 6, C), load_pixel(X, own, x, W, row, known, 7, C))


@triton.jit
def add_product(total, value, others, NTH: tl.constexpr, COUNT: tl.constexpr):
    """total + value·others[NTH], where there is such a one."""
    if NTH >= 0 and NTH < COUNT:
        total += value * others[NTH]
    return total


@for_any_image
def depthwise(X, WEIGHT, BIAS, ADD, OUT, N, H, W, C: tl.constexpr, CB: tl.constexpr,
              BM: tl.constexpr):
    """7×7 depthwise convolution of x [N, C] plus BIAS [C]; or its transpose plus ADD [N, C].

    BM runs of 8 neighbouring pixels at a time: what they see of a row, 14 pixels, is read once.
    """
    runs = tl.cdiv(W, 8)
    run = tl.program_id(0) * BM + tl.arange(0, BM)
    line, x = run // runs, run % runs * 8
    y = line % H
    c = tl.arange(0, CB)[None, :]
    known = c < C
    own = (line * W + x)[:, None] * C + c
    a0 = tl.zeros((BM, CB), tl.float32)
    if BIAS is not None:
        a0 += tl.load(BIAS + c, mask=known, other=0.0)
    a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
    for ky in range(7):
        row = (line < N // W) & (y + ky >= 3) & (y + ky < H + 3)
        if ADD is None:
            tap = WEIGHT + ky * (7 * C) + c
            STEP: tl.constexpr = C
        else:
            tap = WEIGHT + (48 - ky * 7) * C + c
            STEP: tl.constexpr = -C
        taps = (tl.load(tap, mask=known, other=0.0),
                tl.load(tap + STEP, mask=known, other=0.0),
                tl.load(tap + 2 * STEP, mask=known, other=0.0),
                tl.load(tap + 3 * STEP, mask=known, other=0.0),
                tl.load(tap + 4 * STEP, mask=known, other=0.0),
                tl.load(tap + 5 * STEP, mask=known, other=0.0),
                tl.load(tap + 6 * STEP, mask=known, other=0.0))
        for j in tl.static_range(14):
            value = load_pixel(X, own + (ky - 3) * W * C, x, W, row, known, j - 3, C)
            a0 = add_product(a0, value, taps, j, 7)
            a1 = add_product(a1, value, taps, j - 1, 7)
            a2 = add_product(a2, value, taps, j - 2, 7)
            a3 = add_product(a3, value, taps, j - 3, 7)
            a4 = add_product(a4, value, taps, j - 4, 7)
            a5 = add_product(a5, value, taps, j - 5, 7)
            a6 = add_product(a6, value, taps, j - 6, 7)
            a7 = add_product(a7, value, taps, j - 7, 7)
    sums = (a0, a1, a2, a3, a4, a5, a6, a7)
    for i in tl.static_range(8):
        out = sums[i]
        inside = ((line < N // W) & (x + i < W))[:, None] & known
        if ADD is not None:
            out += tl.load(ADD + own + i * C, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + own + i * C, out.to(OUT.dtype.element_ty), mask=inside)


@for_any_image
def depthwise_weight_gradient(X, DY, OUT, N, H, W, C: tl.constexpr, CB: tl.constexpr, S,
                              BM: tl.constexpr):
    """Partial sums [S, 7, 7, C] of the depthwise weights' gradient, by runs of 8 pixels too."""
    ky, s = tl.program_id(0), tl.program_id(1)
    runs = tl.cdiv(W, 8)
    c = tl.arange(0, CB)
    known = (c < C)[None, :]
    g0 = tl.zeros((BM, CB), tl.float32)
    g1, g2, g3, g4, g5, g6 = g0, g0, g0, g0, g0, g0
    for t in range(s, tl.cdiv(N // W * runs, BM), S):
        run = t * BM + tl.arange(0, BM)
        line, x = run // runs, run % runs * 8
        y = line % H + ky - 3
        own = (line * W + x)[:, None] * C + c[None, :]
        row = (line < N // W) & (y >= 0) & (y < H)
        d = load_run(DY, own, x, W, row, known, C)
        for j in tl.static_range(14):
            value = load_pixel(X, own + (ky - 3) * W * C, x, W, row, known, j - 3, C)
            g0 = add_product(g0, value, d, j, 8)
            g1 = add_product(g1, value, d, j - 1, 8)
            g2 = add_product(g2, value, d, j - 2, 8)
            g3 = add_product(g3, value, d, j - 3, 8)
            g4 = add_product(g4, value, d, j - 4, 8)
            g5 = add_product(g5, value, d, j - 5, 8)
            g6 = add_product(g6, value, d, j - 6, 8)
    sums = (g0, g1, g2, g3, g4, g5, g6)
    for kx in tl.static_range(7):
        tl.store(OUT + (s * 49 + ky * 7 + kx) * C + c, tl.sum(sums[kx], 0), mask=c < C)


@for_any_image
def block_forward(X, Y, GAMMA, BETA, EXPAND, EBIAS, CONTRACT, CBIAS, LAYER, OUT, XHAT, SCALE, N,
                  C: tl.constexpr, CB: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr):
    """A ConvNeXt block after its depthwise convolution: OUT [N, C] from Y, and X for the residual.

    XHAT and SCALE are kept for the way back.

    EXPAND is [C, 4·C], CONTRACT [4·C, C]; the hidden layer is worked through HB values at a time.
    """
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CB)
    inside = (pixel < N)[:, None] & (c < C)[None, :]
    own = pixel[:, None] * C + c[None, :]
    xhat, scale = normalise(tl.load(Y + own, mask=inside, other=0.0).to(tl.float32), C, CB)
    tl.store(XHAT + own, xhat.to(XHAT.dtype.element_ty), mask=inside)
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
    x = tl.load(X + own, mask=inside, other=0.0).to(tl.float32)
    out = x + acc * tl.load(LAYER + c, mask=c < C, other=0.0)[None, :]
    tl.store(OUT + own, out.to(OUT.dtype.element_ty), mask=inside)


@for_any_image
def block_backward(DOUT, XHAT, SCALE, GAMMA, BETA, EXPAND, EBIAS, CONTRACT, CBIAS, LAYER, DY,
                   NORMED, HIDDEN, DHIDDEN, D2, PARTIAL, N, C: tl.constexpr,
                   CB: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr):
    """Back through a block's perceptron and norm.

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
    own = pixel[:, None] * C + c[None, :]
    row = PARTIAL + tl.program_id(0) * (9 * C)
    dout = tl.load(DOUT + own, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.load(XHAT + own, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + pixel, mask=pixel < N, other=0.0)
    normed = tl.where(inside, xhat * gamma[None, :] + beta[None, :], 0.0)
    normed = normed.to(NORMED.dtype.element_ty)
    d2 = (dout * layer[None, :]).to(D2.dtype.element_ty)
    tl.store(NORMED + own, normed, mask=inside)
    tl.store(D2 + own, d2, mask=inside)
    out = tl.zeros((BM, CB), tl.float32)
    dnormed = tl.zeros((BM, CB), tl.float32)
    for start in range(0, 4 * C, HB):
        e = start + tl.arange(0, HB)
        expand = tl.load(EXPAND + c[:, None] * (4 * C) + e[None, :],
                         mask=known[:, None] & (e < 4 * C)[None, :], other=0.0)
        contract = tl.load(CONTRACT + e[:, None] * C + c[None, :],
                           mask=(e < 4 * C)[:, None] & known[None, :], other=0.0)
        hidden = tl.dot(normed, expand) + tl.load(EBIAS + e, mask=e < 4 * C, other=0.0)[None, :]
        active, slope = activate_both(hidden, "gelu")
        active = active.to(HIDDEN.dtype.element_ty)
        out = tl.dot(active, contract, out)
        dhidden = tl.dot(d2, tl.trans(contract)) * slope
        small = dhidden.to(DHIDDEN.dtype.element_ty)
        dnormed = tl.dot(small, tl.trans(expand), dnormed)
        at = pixel[:, None] * (4 * C) + e[None, :]
        stored = (pixel < N)[:, None] & (e < 4 * C)[None, :]
        tl.store(HIDDEN + at, active, mask=stored)
        tl.store(DHIDDEN + at, small, mask=stored)
        dhidden = tl.where((pixel < N)[:, None], dhidden, 0.0)
        tl.store(row + 5 * C + e, tl.sum(dhidden, 0), mask=e < 4 * C)
    dy = tl.where(inside, normalise_gradient(dnormed * gamma[None, :], xhat, scale, C), 0.0)
    tl.store(DY + own, dy.to(DY.dtype.element_ty), mask=inside)
    row += c
    tl.store(row, tl.sum(dnormed * xhat, 0), mask=known)
    tl.store(row + C, tl.sum(tl.where(inside, dnormed, 0.0), 0), mask=known)
    tl.store(row + 2 * C, tl.sum(dy, 0), mask=known)
    tl.store(row + 3 * C, tl.sum(dout, 0) * layer, mask=known)
    tl.store(row + 4 * C, tl.sum(dout * (out + cbias[None, :]), 0), mask=known)
