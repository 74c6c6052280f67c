"""The 7×7 depthwise convolution of a ConvNeXt block, forward and backward."""

import triton
import triton.language as tl

# Compiled once for all sizes of image: these kernels wait for memory, not for a division
jit_any_size = triton.jit(do_not_specialize=["N", "H", "W", "S"])


@triton.jit
def load_pixel(X, at, x, W, row, known, J: tl.constexpr, C: tl.constexpr):
    """The pixel J right of x [BM] in its row: [BM, CB] in float32, 0 outside the image."""
    inside = row & (x + J >= 0) & (x + J < W)
    return tl.load(X + at + J * C, mask=inside[:, None] & known, other=0.0).to(tl.float32)


@triton.jit
def load_run(X, at, x, W, row, known, C: tl.constexpr):
    """The 8 pixels from x on, as `load_pixel` gives them."""
    return (load_pixel(X, at, x, W, row, known, 0, C), load_pixel(X, at, x, W, row, known, 1, C),
            load_pixel(X, at, x, W, row, known, 2, C), load_pixel(X, at, x, W, row, known, 3, C),
            load_pixel(X, at, x, W, row, known, 4, C), load_pixel(X, at, x, W, row, known, 5, C),
            load_pixel(X, at, x, W, row, known, 6, C), load_pixel(X, at, x, W, row, known, 7, C))


@triton.jit
def add_product(total, value, others, NTH: tl.constexpr, COUNT: tl.constexpr):
    """total + value·others[NTH], where there is such a one."""
    if NTH >= 0 and NTH < COUNT:
        total += value * others[NTH]
    return total


@jit_any_size
def depthwise_conv(X, WEIGHT, BIAS, ADD, OUT, N, H, W, C: tl.constexpr, CB: tl.constexpr,
                   BM: tl.constexpr):
    """7×7 depthwise convolution of x [N, C] plus BIAS [C]; or, with ADD, its backward pass.

    That is the transposed convolution plus ADD [N, C], the gradient of the residual.

    BM runs of 8 neighbouring pixels at a time: what they see of a row, 14 pixels, is read once.
    """
    runs = tl.cdiv(W, 8)
    run = tl.program_id(0) * BM + tl.arange(0, BM)
    line, x = run // runs, run % runs * 8
    y = line % H
    c = tl.arange(0, CB)[None, :]
    known = c < C
    at = (line * W + x)[:, None] * C + c
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
            value = load_pixel(X, at + (ky - 3) * W * C, x, W, row, known, j - 3, C)
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
            out += tl.load(ADD + at + i * C, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + at + i * C, out.to(OUT.dtype.element_ty), mask=inside)


@jit_any_size
def depthwise_conv_weight_gradient(X, DY, OUT, N, H, W, C: tl.constexpr, CB: tl.constexpr, S,
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
        at = (line * W + x)[:, None] * C + c[None, :]
        row = (line < N // W) & (y >= 0) & (y < H)
        d = load_run(DY, at, x, W, row, known, C)
        for j in tl.static_range(14):
            value = load_pixel(X, at + (ky - 3) * W * C, x, W, row, known, j - 3, C)
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
