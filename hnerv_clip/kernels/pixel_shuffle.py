"""Activation and pixel shuffle after a decoder convolution, forward and backward.

Both layouts of memory are known here: channels last, and blocked for the Hopper kernels.
"""

import triton
import triton.language as tl

from hnerv_clip.kernels.activations import activate, activation_and_grad


@triton.jit
def offsets(pixel, c, C: tl.constexpr, PLANE: tl.constexpr):
    """Offsets [BM, BN] of channels c [BN] of pixels [BM], in one of both layouts."""
    if PLANE:
        return (pixel * 8)[:, None] + (c // 8 * (PLANE * 8) + c % 8)[None, :]
    else:
        return (pixel * C)[:, None] + c[None, :]


@triton.jit
def blocked_offsets(c, CG: tl.constexpr, PLANE: tl.constexpr):
    """Offsets of channels c = … mod CG from their pixel's first, in the blocked layout."""
    offset = c // 8 * (PLANE * 8) + c % 8
    if CG % 8 == 0:  # the compiler does not see it
        offset = tl.max_contiguous(tl.multiple_of(offset, 8), 8)
    return offset


@triton.jit
def pixel_shuffle_forward(PRE, OUT, N, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
                     CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, CG: tl.constexpr,
                     CN: tl.constexpr, EDGE: tl.constexpr, PLANE: tl.constexpr,
                     RB: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr):
    """OUT from PRE as `conv.conv_forward` leaves them, for N = B·H·W pixels, in one pass."""
    pixel, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    q = tl.arange(0, RB)
    j, c = q // CN, q % CN
    y, x, b = (pixel // W) % H, pixel % W, pixel // (W * H)
    source = ((b * (H + 2 * P) + y + P) * (W + 2 * P) + x + P) * CO + i * (SW * CG)
    inside = (pixel < N)[:, None] & ((q < SW * CN) & (c < CG))[None, :]
    pre = tl.load(PRE + source[:, None] + (j * CG + c)[None, :], mask=inside, other=0.0)
    row = (b * (H * SH + 2 * EDGE) + y * SH + i + EDGE) * (W * SW + 2 * EDGE) + x * SW + EDGE
    if PLANE:
        target = (row * 8)[:, None] + (j * 8 + blocked_offsets(c, CN, PLANE))[None, :]
    else:
        target = (row * CN)[:, None] + q[None, :]
    tl.store(OUT + target,
             activate(pre.to(tl.float32), ACT).to(OUT.dtype.element_ty),
             mask=(pixel < N)[:, None] & (q < SW * CN)[None, :])


@triton.jit
def pixel_shuffle_backward(DOUT, PRE, DPRE, DBIAS, N, H: tl.constexpr, W: tl.constexpr,
                       P: tl.constexpr, CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                       CG: tl.constexpr, CN: tl.constexpr, PLANE: tl.constexpr,
                       SPLIT: tl.constexpr, ACT: tl.constexpr, S, BM: tl.constexpr,
                       BN: tl.constexpr):
    """Backward pass of activation and pixel shuffle: DPRE like PRE; bias partial sums [S, CO].

    N = B·H·W; PRE and DPRE have edges of P pixels. DOUT is [SPLIT, B, H·SH, W·SW, CN], to be summed
    over SPLIT.
    """
    s = tl.program_id(0)
    co = tl.program_id(1) * BN + tl.arange(0, BN)
    i, j, c = co // (SW * CG), (co // CG) % SW, co % CG
    known = (co < SH * SW * CG) & (c < CN)
    total = tl.zeros((BN,), tl.float32)
    for t in range(s, tl.cdiv(N, BM), S):
        pixel = t * BM + tl.arange(0, BM)
        y, x, b = (pixel // W) % H, pixel % W, pixel // (W * H)
        base = (b * H + y) * (SH * SW * W) + x * SW
        at = (base[:, None] + (i * (W * SW) + j)[None, :]) * CN + c[None, :]
        inside = (pixel < N)[:, None] & known[None, :]
        d = tl.load(DOUT + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, SPLIT):
            d += tl.load(DOUT + part * N * SH * SW * CN + at, mask=inside, other=0.0
                         ).to(tl.float32)
        source = (b * (H + 2 * P) + y + P) * (W + 2 * P) + x + P
        pre = tl.load(PRE + offsets(source, co, CO, 0), mask=inside, other=0.0).to(tl.float32)
        d *= activation_and_grad(pre, ACT)[1]
        tl.store(DPRE + offsets(source, co, CO, PLANE), d.to(DPRE.dtype.element_ty),
                 mask=(pixel < N)[:, None] & (co < CO)[None, :])
        total += tl.sum(d, 0)
    tl.store(DBIAS + s * CO + co, total, mask=co < CO)


@triton.jit
def scatter_gradient(DGATHERED, CELL, PRE, DPRE, DBIAS, COUNT, H: tl.constexpr, W: tl.constexpr,
                     P: tl.constexpr, CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                     CG: tl.constexpr, PLANE: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
                     ACT: tl.constexpr):
    """Add gradients [B, COUNT, C] at cells CELL [COUNT] (row · width + column) of the features.

    To DPRE (edge P), through the activation, and to DBIAS [B, CO], which the caller zeroes.
    """
    b, c = tl.program_id(0), tl.arange(0, CB)
    for p in range(COUNT):
        cell = tl.load(CELL + p)
        y, x = cell // (W * SW), cell % (W * SW)
        slot = ((y % SH) * SW + x % SW) * CG
        row = b * (H + 2 * P) + y // SH + P
        source = row * (W + 2 * P) + x // SW + P
        at = source * CO + slot + c
        pre = tl.load(PRE + at, mask=c < C, other=0.0).to(tl.float32)
        if PLANE:
            at = source * 8 + (slot + c) // 8 * (PLANE * 8) + (slot + c) % 8
        d = tl.load(DGATHERED + (b * COUNT + p) * C + c, mask=c < C, other=0.0) * \
            activation_and_grad(pre, ACT)[1]
        old = tl.load(DPRE + at, mask=c < C, other=0.0).to(tl.float32)
        tl.store(DPRE + at, (old + d).to(DPRE.dtype.element_ty), mask=c < C)
        bias = DBIAS + b * CO + slot + c
        tl.store(bias, tl.load(bias, mask=c < C, other=0.0) + d, mask=c < C)
        tl.debug_barrier()
