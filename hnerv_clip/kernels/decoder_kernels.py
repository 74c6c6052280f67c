"""Triton kernels of the decoder, the RGB head and Adam; `fused` puts them together.

The encoder's are in `encoder_kernels`.

Tensors lie channels-last: [B, H, W, C], written [N, C] where N = B·H·W. Activations are bfloat16
(float32 in Triton's interpreter, which has no bfloat16 products), sums and weight gradients
float32. A convolution of kernel size K reads, for each kernel row, a run of K·C neighbouring
values, which channels-last memory holds side by side: its weights are [K, K·C, O]. Inputs carry an
edge of K//2 zeros on each side, so that no load asks where the image ends, and lie with room
around them. Sums over pixels are written as partial sums [S, …], one per program, and added in a
fixed order. A linear layer is a convolution of K = 1. Where `hopper` does the convolution, its
input and the gradient at its output lie in units of 8 channels, [C / 8, PLANE, 8] with PLANE
pixels; PLANE is 0 for channels last.
"""

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "relu", "sin", "swish")  # with act(0) = 0, so that padding stays 0


@triton.jit
def offsets(pixel, c, C: tl.constexpr, PLANE: tl.constexpr):
    """Where channels [.., BN] of pixels [BM] lie, in one of both orders: [BM, BN]."""
    if PLANE:
        return (pixel * 8)[:, None] + (c // 8 * (PLANE * 8) + c % 8)[None, :]
    else:
        return (pixel * C)[:, None] + c[None, :]


@triton.jit
def unit_offsets(c, CG: tl.constexpr, PLANE: tl.constexpr):
    """Where channels c = … mod CG lie in units, from the place of their pixel's first."""
    offset = c // 8 * (PLANE * 8) + c % 8
    if CG % 8 == 0:  # the compiler does not see it
        offset = tl.max_contiguous(tl.multiple_of(offset, 8), 8)
    return offset


@triton.jit
def normal(x):
    """Φ(x) and exp(−x²/2), by one exponential; Φ within 1e-7 (Abramowitz & Stegun 7.1.26)."""
    bell = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.2316418882663604 * tl.abs(x))  # 0.3275911/√2
    tail = 0.5 * bell * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (
        -1.453152027 + t * 1.061405429))))
    return tl.where(x > 0, 1 - tail, tail), bell


@triton.jit
def activate(x, ACT: tl.constexpr):
    """One of `ACTIVATIONS`, of any shape in float32."""
    if ACT == "gelu":
        share, _ = normal(x)
        return x * share
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "sin":
        return tl.sin(x)
    else:
        return x * tl.sigmoid(x)


@triton.jit
def activate_both(x, ACT: tl.constexpr):
    """The activation and its slope."""
    if ACT == "gelu":
        share, bell = normal(x)
        return x * share, share + x * bell * 0.3989422804014327
    elif ACT == "relu":
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    elif ACT == "sin":
        return tl.sin(x), tl.cos(x)
    else:
        s = tl.sigmoid(x)
        return x * s, s + x * s * (1 - s)


@triton.jit
def convolve(X, WEIGHT, BIAS, PRE, OUT, N, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr,
             CO: tl.constexpr, K: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
             CG: tl.constexpr, CN: tl.constexpr, EDGE: tl.constexpr, PLANE: tl.constexpr,
             MODE: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BN2: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """Convolution of x [N, CI] with same padding, as a matrix product.

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
    finish_convolution(acc, co, pixel, BIAS, PRE, OUT, N, H, W, CO, P, SH, SW, CG, CN, EDGE, PLANE,
                       MODE, ACT)
    if BN2:
        finish_convolution(acc2, co2, pixel, BIAS, PRE, OUT, N, H, W, CO, P, SH, SW, CG, CN, EDGE,
                           PLANE, MODE, ACT)


@triton.jit
def finish_convolution(acc, co, pixel, BIAS, PRE, OUT, N, H: tl.constexpr, W: tl.constexpr,
                       CO: tl.constexpr, P: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                       CG: tl.constexpr, CN: tl.constexpr, EDGE: tl.constexpr,
                       PLANE: tl.constexpr, MODE: tl.constexpr, ACT: tl.constexpr):
    """Write sums [pixels, channels] as `convolve` says; edges of OUT stay untouched."""
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
            to = to * 8 + unit_offsets(c, CG, PLANE)[None, :]
        else:
            to = to * CN + c[None, :]
        pre = acc.to(OUT.dtype.element_ty).to(tl.float32)
        tl.store(OUT + to, activate(pre, ACT).to(OUT.dtype.element_ty),
                 mask=inner[:, None] & ((co < SH * SW * CG) & (c < CN))[None, :])


@triton.jit
def shuffle_activate(PRE, OUT, N, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
                     CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, CG: tl.constexpr,
                     CN: tl.constexpr, EDGE: tl.constexpr, PLANE: tl.constexpr,
                     RB: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr):
    """OUT from PRE as `convolve` leaves them, for N = B·H·W pixels: in one pass over memory."""
    pixel, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    q = tl.arange(0, RB)
    j, c = q // CN, q % CN
    y, x, b = (pixel // W) % H, pixel % W, pixel // (W * H)
    own = ((b * (H + 2 * P) + y + P) * (W + 2 * P) + x + P) * CO + i * (SW * CG)
    inside = (pixel < N)[:, None] & ((q < SW * CN) & (c < CG))[None, :]
    pre = tl.load(PRE + own[:, None] + (j * CG + c)[None, :], mask=inside, other=0.0)
    row = (b * (H * SH + 2 * EDGE) + y * SH + i + EDGE) * (W * SW + 2 * EDGE) + x * SW + EDGE
    if PLANE:
        to = (row * 8)[:, None] + (j * 8 + unit_offsets(c, CN, PLANE))[None, :]
    else:
        to = (row * CN)[:, None] + q[None, :]
    tl.store(OUT + to,
             activate(pre.to(tl.float32), ACT).to(OUT.dtype.element_ty),
             mask=(pixel < N)[:, None] & (q < SW * CN)[None, :])


@triton.jit
def convolve_back(DY, WEIGHT, OUT, N, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr,
                  CO: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr, BK: tl.constexpr,
                  STAGES: tl.constexpr):
    """Gradient OUT [SPLIT, B·H·W, CI] at a convolution's input from dy [N, CO], by its weights.

    A row of the product is GROUP neighbouring pixels: their runs overlap, so that less is read and
    GROUP·CI columns fill the tiles better; weights that do not reach a pixel count as 0. The
    kernel's rows are shared among SPLIT = K programs, or all in one.
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
        acc = tl.dot(dy, back_weights(WEIGHT, ky, n, q, CI, CO, K, GROUP), acc)
        if BN2:
            acc2 = tl.dot(dy, back_weights(WEIGHT, ky, n, q2, CI, CO, K, GROUP), acc2)
    store_gradient(acc, q, pixel, part, OUT, N, H, W, CI, P, GROUP)
    if BN2:
        store_gradient(acc2, q2, pixel, part, OUT, N, H, W, CI, P, GROUP)


@triton.jit
def back_weights(WEIGHT, ky, n, q, CI: tl.constexpr, CO: tl.constexpr, K: tl.constexpr,
                 GROUP: tl.constexpr):
    """Weights from run positions n to columns q = pixel of the group · CI + channel."""
    kx = (n // CO)[:, None] - (q // CI)[None, :]
    at = (((K - 1 - ky) * K + K - 1 - kx) * CI + (q % CI)[None, :]) * CO + (n % CO)[:, None]
    return tl.load(WEIGHT + at, mask=(kx >= 0) & (kx < K) & (q < GROUP * CI)[None, :], other=0.0)


@triton.jit
def store_gradient(acc, q, pixel, part, OUT, N, H: tl.constexpr, W: tl.constexpr,
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


@triton.jit
def convolve_weight_gradient(X, DY, OUT, N, W: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
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


@triton.jit
def unshuffle_gradient(DOUT, PRE, DPRE, DBIAS, N, H: tl.constexpr, W: tl.constexpr,
                       P: tl.constexpr, CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                       CG: tl.constexpr, CN: tl.constexpr, PLANE: tl.constexpr,
                       SPLIT: tl.constexpr, ACT: tl.constexpr, S, BM: tl.constexpr,
                       BN: tl.constexpr):
    """Back through pixel shuffle and activation: dpre like pre, and bias partial sums [S, CO].

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
        own = (b * (H + 2 * P) + y + P) * (W + 2 * P) + x + P
        pre = tl.load(PRE + offsets(own, co, CO, 0), mask=inside, other=0.0).to(tl.float32)
        d *= activate_both(pre, ACT)[1]
        tl.store(DPRE + offsets(own, co, CO, PLANE), d.to(DPRE.dtype.element_ty),
                 mask=(pixel < N)[:, None] & (co < CO)[None, :])
        total += tl.sum(d, 0)
    tl.store(DBIAS + s * CO + co, total, mask=co < CO)


@triton.jit
def rgb_forward(X, WEIGHT, BIAS, VIDEO, INDEX, PRED, DOUT, ERROR, DBIAS, H: tl.constexpr,
                W: tl.constexpr, CN: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr,
                OFFSET: tl.constexpr, MODE: tl.constexpr, SCALE, BM: tl.constexpr,
                BK: tl.constexpr):
    """3×3 convolution of x [B, H, W, CN] (edge 1) to RGB, and what follows it.

    A row of the product is GROUP neighbouring pixels, four columns each, the fourth idle.
    HEAD: tanh (x/2 + 1/2 of it), sigmoid or add (x + OFFSET). MODE "l2": the frames VIDEO[INDEX]
    (uint8 [T, 3, H, W]) give ERROR [B, programs], sums of squared differences, DOUT [B, H, W, 4]
    (edge 1), their gradient × SCALE at the convolution's output, and DBIAS [B, programs, 16], its
    sums. MODE "pred": PRED [B, 3, H, W] float32. MODE "uint8": PRED likewise in 0…255. WEIGHT is
    [3, BK, 16], BK at least (2 + GROUP)·CN; BIAS [4].
    """
    b, tile = tl.program_id(1), tl.program_id(0)
    cell = (tile * BM + tl.arange(0, BM)) * GROUP
    pixel = b * ((H + 2) * (W + 2)) + cell
    q, k = tl.arange(0, 16), tl.arange(0, BK)
    colour = q % 4
    acc = tl.zeros((BM, 16), tl.float32)
    for ky in tl.static_range(3):
        features = tl.load(X + (pixel * CN)[:, None] + (((ky - 1) * (W + 2) - 1) * CN + k)[None, :],
                           mask=(k < (2 + GROUP) * CN)[None, :], other=0.0)
        acc = tl.dot(features, tl.load(WEIGHT + (ky * BK + k)[:, None] * 16 + q[None, :]), acc)
    acc += tl.load(BIAS + colour)[None, :]
    if HEAD == "tanh":
        pred = tl.sigmoid(2 * acc)  # = tanh(x)/2 + 1/2
        slope = 2 * pred * (1 - pred)
    elif HEAD == "sigmoid":
        pred = tl.sigmoid(acc)
        slope = pred * (1 - pred)
    else:
        pred = acc + OFFSET
        slope = tl.full((BM, 16), 1.0, tl.float32)
    y = (cell // (W + 2) - 1)[:, None]
    x = (cell % (W + 2) - 1)[:, None] + (q // 4)[None, :]
    inner = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (q < 4 * GROUP)[None, :]
    rgb = inner & (colour < 3)[None, :]
    at = colour[None, :] * (H * W) + y * W + x
    if MODE == "l2":
        frame = tl.load(INDEX + b)
        target = tl.load(VIDEO + frame * (3 * H * W) + at, mask=rgb, other=0).to(tl.float32) / 255
        error = tl.where(rgb, pred - target, 0.0)
        program = b * tl.num_programs(0) + tile
        tl.store(ERROR + program, tl.sum(error * error))
        gradient = 2 * SCALE * error * slope
        tl.store(DBIAS + program * 16 + q, tl.sum(gradient, 0))
        tl.store(DOUT + (pixel * 4)[:, None] + q[None, :], gradient.to(DOUT.dtype.element_ty),
                 mask=inner)
    elif MODE == "pred":
        tl.store(PRED + b * (3 * H * W) + at, pred, mask=rgb)
    else:
        grey = tl.minimum(tl.maximum(pred * 255, 0.0), 255.0)
        tl.store(PRED + b * (3 * H * W) + at, tl.floor(grey + 0.5).to(tl.uint8), mask=rgb)


@triton.jit
def rgb_backward(DRGB, PRE, WEIGHT, EXTRA, DPRE, DBIAS, ROWS, H: tl.constexpr, W: tl.constexpr,
                 P: tl.constexpr, CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                 CG: tl.constexpr, CN: tl.constexpr, PLANE: tl.constexpr, DC: tl.constexpr,
                 RB: tl.constexpr, KB: tl.constexpr, ACT: tl.constexpr, S, BM: tl.constexpr):
    """Back through the RGB head, the last activation and the last pixel shuffle, in one pass.

    A row of the last convolution's output holds SW·CG channels of one row of pixels, side by side;
    the gradient there comes from SW + 2 neighbouring pixels of each of three rows of DRGB, which
    are a run of DC·(SW + 2) values.

    Args:
        DRGB: [B, SH·H, SW·W, DC] (edge 1), the gradient at the head's output.
        PRE: [B, H, W, CO] (edge P).
        WEIGHT: [3, KB, RB], from those values to the row's channels.
        EXTRA: None, or a gradient [B, SH·H, SW·W, CN] to add to the features'.
        ROWS: B·H.
    Writes:
        DPRE like PRE, or in units; DBIAS [S, SH, RB] of the last convolution.
    """
    s, i = tl.program_id(0), tl.program_id(1)
    c, k = tl.arange(0, RB), tl.arange(0, KB)
    LINE: tl.constexpr = SW * W + 2
    TILES: tl.constexpr = (W + BM - 1) // BM
    total = tl.zeros((RB,), tl.float32)
    for t in range(s, ROWS * TILES, S):
        row = t // TILES
        b, y = row // H, row % H
        x = (t % TILES) * BM + tl.arange(0, BM)
        shown = (x < W)[:, None] & (c < SW * CG)[None, :]
        own = (b * (H + 2 * P) + y + P) * (W + 2 * P) + x + P
        pre = tl.load(PRE + offsets(own, i * SW * CG + c, CO, 0), mask=shown, other=0.0
                      ).to(tl.float32)
        # From pixel x·SW − 1 of row y·SH + i − 1, in memory with its edge
        run = ((b * (SH * H + 2) + y * SH + i) * LINE + x * SW) * DC
        known = (x < W)[:, None] & (k < DC * (SW + 2))[None, :]
        d = tl.zeros((BM, RB), tl.float32)
        for ky in tl.static_range(3):
            at = (run + ky * (LINE * DC))[:, None] + k[None, :]
            g = tl.load(DRGB + at, mask=known, other=0.0)
            d = tl.dot(g, tl.load(WEIGHT + (ky * KB + k)[:, None] * RB + c[None, :]), d)
        if EXTRA is not None:
            place = (((b * H + y) * SH + i) * (SW * W) + x * SW)[:, None] + (c // CG)[None, :]
            d += tl.load(EXTRA + place * CN + (c % CG)[None, :], other=0.0,
                         mask=shown & (c % CG < CN)[None, :]).to(tl.float32)
        d = tl.where(shown, d * activate_both(pre, ACT)[1], 0.0)
        tl.store(DPRE + offsets(own, i * SW * CG + c, CO, PLANE), d.to(DPRE.dtype.element_ty),
                 mask=shown)
        total += tl.sum(d, 0)
    tl.store(DBIAS + (s * SH + i) * RB + c, total)


@triton.jit
def scatter_gradient(DPICK, PLACE, PRE, DPRE, DBIAS, COUNT, H: tl.constexpr, W: tl.constexpr,
                     P: tl.constexpr, CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                     CG: tl.constexpr, PLANE: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
                     ACT: tl.constexpr):
    """Add gradients [B, COUNT, C] at cells PLACE [COUNT] (row · width + column) of the features.

    To DPRE (edge P), through the activation, and to DBIAS [B, CO], which the caller zeroes.
    """
    b, c = tl.program_id(0), tl.arange(0, CB)
    for p in range(COUNT):
        place = tl.load(PLACE + p)
        y, x = place // (W * SW), place % (W * SW)
        slot = ((y % SH) * SW + x % SW) * CG
        row = b * (H + 2 * P) + y // SH + P
        own = row * (W + 2 * P) + x // SW + P
        at = own * CO + slot + c
        pre = tl.load(PRE + at, mask=c < C, other=0.0).to(tl.float32)
        if PLANE:
            at = own * 8 + (slot + c) // 8 * (PLANE * 8) + (slot + c) % 8
        d = tl.load(DPICK + (b * COUNT + p) * C + c, mask=c < C, other=0.0) * \
            activate_both(pre, ACT)[1]
        old = tl.load(DPRE + at, mask=c < C, other=0.0).to(tl.float32)
        tl.store(DPRE + at, (old + d).to(DPRE.dtype.element_ty), mask=c < C)
        bias = DBIAS + b * CO + slot + c
        tl.store(bias, tl.load(bias, mask=c < C, other=0.0) + d, mask=c < C)
        tl.debug_barrier()


@triton.jit
def adam(PARAM, GRAD, MEAN, SQUARE, SMALL, LR, STEP, SIZE,
         BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """One step of Adam (Kingma & Ba 2015, as PyTorch computes it) on flat float32 [SIZE] arrays.

    Also writes SMALL, the copy that the matrix products read. STEP counts this step, from 1.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    step, lr = tl.load(STEP), tl.load(LR)
    grad = tl.load(GRAD + i, mask=inside, other=0.0)
    mean = BETA1 * tl.load(MEAN + i, mask=inside, other=0.0) + (1 - BETA1) * grad
    square = BETA2 * tl.load(SQUARE + i, mask=inside, other=0.0) + (1 - BETA2) * grad * grad
    correction1 = 1 - tl.exp(step * tl.log(BETA1 + step * 0))
    correction2 = 1 - tl.exp(step * tl.log(BETA2 + step * 0))
    param = tl.load(PARAM + i, mask=inside, other=0.0)
    param -= lr / correction1 * mean / (tl.sqrt(square) / tl.sqrt(correction2) + EPS)
    tl.store(PARAM + i, param, mask=inside)
    tl.store(MEAN + i, mean, mask=inside)
    tl.store(SQUARE + i, square, mask=inside)
    tl.store(SMALL + i, param.to(SMALL.dtype.element_ty), mask=inside)
