"""Convolutions of the decoder and linear layers of the encoder, forward and backward.

A convolution of kernel size K reads, for each kernel row, a run of K·C neighbouring values, which
channels-last memory holds side by side: its weights are [K, K·C, O]. A linear layer has K = 1.
`hopper` computes the same for large images on a Hopper GPU.
"""

import triton
import triton.language as tl

from hnerv_clip.kernels.activations import activate
from hnerv_clip.kernels.async_fence import with_async_fence
from hnerv_clip.kernels.pixel_shuffle import blocked_offsets


@with_async_fence
@triton.jit
def conv_forward(X, WEIGHT, BIAS, PRE, OUT, N, H: tl.constexpr, W: tl.constexpr,
                 CI: tl.constexpr, CO: tl.constexpr, K: tl.constexpr, SH: tl.constexpr,
                 SW: tl.constexpr, CG: tl.constexpr, CN: tl.constexpr, EDGE: tl.constexpr,
                 PLANE: tl.constexpr, MODE: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, BN2: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """Convolution of x [N, CI] with same padding, as an implicit matrix product.

    N counts the pixels with their edges. MODE "shuffle": OUT [B, H·SH, W·SW, CN], EDGE pixels wider
    all around, is the activation of x∗w + b, pixel-shuffled; the output channels are ordered (row,
    column, channel), CG channels each; PRE [N, CO], where not None, is x∗w + b. MODE "bias": PRE
    alone. A program does BN channels, or BN and BN2 more.
    """
    RUN: tl.constexpr = K * CI
    CHUNKS: tl.constexpr = (RUN + BK - 1) // BK
    P: tl.constexpr = K // 2
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    co = tl.program_id(1) * (BN + BN2) + tl.arange(0, BN)
    co2 = tl.program_id(1) * (BN + BN2) + BN + tl.arange(0, BN2 if BN2 else 16)
    k = tl.arange(0, BK)
    source = X + (pixel * CI)[:, None] + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN2 if BN2 else 16), tl.float32)
    for t in tl.range(0, K * CHUNKS, num_stages=STAGES):
        ky = t // CHUNKS
        n = (t % CHUNKS) * BK + k
        # No bounds but the run's end: edges are zeros
        x = tl.load(source + (((ky - P) * (W + 2 * P) - P) * CI + (t % CHUNKS) * BK),
                    mask=(n < RUN)[None, :], other=0.0)
        at = WEIGHT + ((ky * RUN + n) * CO)[:, None]
        acc = tl.dot(x, tl.load(at + co[None, :], mask=(n < RUN)[:, None] & (co < CO)[None, :],
                                other=0.0), acc)
        if BN2:
            acc2 = tl.dot(x, tl.load(at + co2[None, :], other=0.0,
                                     mask=(n < RUN)[:, None] & (co2 < CO)[None, :]), acc2)
    store_output(acc, co, pixel, BIAS, PRE, OUT, N, H, W, CO, P, SH, SW, CG, CN, EDGE, PLANE,
                 MODE, ACT)
    if BN2:
        store_output(acc2, co2, pixel, BIAS, PRE, OUT, N, H, W, CO, P, SH, SW, CG, CN, EDGE, PLANE,
                     MODE, ACT)


@triton.jit
def store_output(acc, co, pixel, BIAS, PRE, OUT, N, H: tl.constexpr, W: tl.constexpr,
                 CO: tl.constexpr, P: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                 CG: tl.constexpr, CN: tl.constexpr, EDGE: tl.constexpr, PLANE: tl.constexpr,
                 MODE: tl.constexpr, ACT: tl.constexpr):
    """Write sums [pixels, channels] as `conv_forward` says; edges of OUT stay untouched."""
    acc += tl.load(BIAS + co, mask=co < CO, other=0.0)[None, :]
    if PRE is not None:
        tl.store(PRE + pixel[:, None] * CO + co[None, :], acc.to(PRE.dtype.element_ty),
                 mask=(pixel < N)[:, None] & (co < CO)[None, :])
    if MODE == "shuffle":
        y = (pixel // (W + 2 * P)) % (H + 2 * P) - P
        x = pixel % (W + 2 * P) - P
        b = pixel // ((W + 2 * P) * (H + 2 * P))
        inner = (pixel < N) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        i, j, c = co // (SW * CG), (co // CG) % SW, co % CG
        ROW: tl.constexpr = W * SW + 2 * EDGE
        base = (b * (H * SH + 2 * EDGE) + y * SH + EDGE) * ROW + x * SW + EDGE
        to = base[:, None] + (i * ROW + j)[None, :]
        if PLANE:
            to = to * 8 + blocked_offsets(c, CG, PLANE)[None, :]
        else:
            to = to * CN + c[None, :]
        pre = acc.to(OUT.dtype.element_ty).to(tl.float32)
        tl.store(OUT + to, activate(pre, ACT).to(OUT.dtype.element_ty),
                 mask=inner[:, None] & ((co < SH * SW * CG) & (c < CN))[None, :])


@with_async_fence
@triton.jit
def conv_input_gradient(DY, WEIGHT, OUT, N, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr,
                        CO: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                        SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                        BN2: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """Gradient OUT [SPLIT, B·H·W, CI] at a convolution's input from dy [N, CO].

    A row of the product is GROUP neighbouring pixels: their runs overlap, so that less is read and
    GROUP·CI columns fill the tiles better; weights that do not reach a pixel count as 0. The
    kernel's rows are split over SPLIT = K programs (split-K), or all in one.
    """
    RUN: tl.constexpr = (K - 1 + GROUP) * CO
    CHUNKS: tl.constexpr = (RUN + BK - 1) // BK
    ROWS: tl.constexpr = K // SPLIT
    P: tl.constexpr = K // 2
    pixel = (tl.program_id(0) * BM + tl.arange(0, BM)) * GROUP
    q = tl.program_id(1) * (BN + BN2) + tl.arange(0, BN)
    q2 = tl.program_id(1) * (BN + BN2) + BN + tl.arange(0, BN2 if BN2 else 16)
    part = tl.program_id(2)
    k = tl.arange(0, BK)
    source = DY + (pixel * CO)[:, None] + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN2 if BN2 else 16), tl.float32)
    for t in tl.range(0, ROWS * CHUNKS, num_stages=STAGES):
        ky = part * ROWS + t // CHUNKS
        n = (t % CHUNKS) * BK + k
        dy = tl.load(source + (((ky - P) * (W + 2 * P) - P) * CO + (t % CHUNKS) * BK),
                     mask=(n < RUN)[None, :], other=0.0)
        acc = tl.dot(dy, load_transposed_weights(WEIGHT, ky, n, q, CI, CO, K, GROUP), acc)
        if BN2:
            acc2 = tl.dot(dy, load_transposed_weights(WEIGHT, ky, n, q2, CI, CO, K, GROUP), acc2)
    store_input_gradient(acc, q, pixel, part, OUT, N, H, W, CI, P, GROUP)
    if BN2:
        store_input_gradient(acc2, q2, pixel, part, OUT, N, H, W, CI, P, GROUP)


@triton.jit
def load_transposed_weights(WEIGHT, ky, n, q, CI: tl.constexpr, CO: tl.constexpr,
                            K: tl.constexpr, GROUP: tl.constexpr):
    """Weights from run positions n to columns q = pixel of the group · CI + channel."""
    kx = (n // CO)[:, None] - (q // CI)[None, :]
    at = (((K - 1 - ky) * K + K - 1 - kx) * CI + (q % CI)[None, :]) * CO + (n % CO)[:, None]
    return tl.load(WEIGHT + at, mask=(kx >= 0) & (kx < K) & (q < GROUP * CI)[None, :], other=0.0)


@triton.jit
def store_input_gradient(acc, q, pixel, part, OUT, N, H: tl.constexpr, W: tl.constexpr,
                         CI: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr):
    """Write sums [groups, GROUP·CI] into OUT [SPLIT, B·H·W, CI], edges left out."""
    y = (pixel // (W + 2 * P)) % (H + 2 * P) - P
    x = pixel % (W + 2 * P) - P
    b = pixel // ((W + 2 * P) * (H + 2 * P))
    column = x[:, None] + (q // CI)[None, :]
    inner = ((pixel < N) & (y >= 0) & (y < H))[:, None] & (column >= 0) & (column < W)
    at = ((part * (N // ((W + 2 * P) * (H + 2 * P))) + b) * H + y) * W + x
    tl.store(OUT + at[:, None] * CI + q[None, :], acc.to(OUT.dtype.element_ty),
             mask=inner & (q < GROUP * CI)[None, :])


@with_async_fence
@triton.jit
def conv_weight_gradient(X, DY, OUT, N, W: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
                         K: tl.constexpr, S, BM: tl.constexpr, BN: tl.constexpr,
                         BN2: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """Partial sums [S, K, K·CI, CO] of the weight gradient from x [N, CI] and dy [N, CO].

    Both with their edges; dy's are zeros, so that every pixel counts as it comes.
    """
    RUN: tl.constexpr = K * CI
    NT: tl.constexpr = (CO + BN + BN2 - 1) // (BN + BN2)
    P: tl.constexpr = K // 2
    ky = tl.program_id(0)
    n = tl.program_id(1) * BM + tl.arange(0, BM)
    first = (tl.program_id(2) % NT) * (BN + BN2)
    co = first + tl.arange(0, BN)
    co2 = first + BN + tl.arange(0, BN2 if BN2 else 16)
    s = tl.program_id(2) // NT
    tiles = tl.cdiv(N, BK)
    per = tl.cdiv(tiles, S)
    k = tl.arange(0, BK)
    source = X + ((ky - P) * (W + 2 * P) - P + k)[:, None] * CI + n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN2 if BN2 else 16), tl.float32)
    for t in tl.range(s * per, tl.minimum(s * per + per, tiles), num_stages=STAGES):
        x = tl.trans(tl.load(source + t * (BK * CI), mask=(n < RUN)[None, :], other=0.0))
        at = DY + (t * BK + k)[:, None] * CO
        acc = tl.dot(x, tl.load(at + co[None, :], mask=(co < CO)[None, :], other=0.0), acc)
        if BN2:
            acc2 = tl.dot(x, tl.load(at + co2[None, :], mask=(co2 < CO)[None, :], other=0.0), acc2)
    to = OUT + ((s * K + ky) * RUN + n[:, None]) * CO
    tl.store(to + co[None, :], acc, mask=(n < RUN)[:, None] & (co < CO)[None, :])
    if BN2:
        tl.store(to + co2[None, :], acc2, mask=(n < RUN)[:, None] & (co2 < CO)[None, :])
