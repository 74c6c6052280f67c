"""The RGB head, a 3×3 convolution: forward with its loss, and backward."""

import triton
import triton.language as tl

from hnerv_clip.kernels.activations import activation_and_grad
from hnerv_clip.kernels.async_fence import with_async_fence
from hnerv_clip.kernels.pixel_shuffle import offsets


@with_async_fence
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
    channel = q % 4
    acc = tl.zeros((BM, 16), tl.float32)
    for ky in tl.static_range(3):
        features = tl.load(X + (pixel * CN)[:, None] + (((ky - 1) * (W + 2) - 1) * CN + k)[None, :],
                           mask=(k < (2 + GROUP) * CN)[None, :], other=0.0)
        acc = tl.dot(features, tl.load(WEIGHT + (ky * BK + k)[:, None] * 16 + q[None, :]), acc)
    acc += tl.load(BIAS + channel)[None, :]
    if HEAD == "tanh":
        pred = tl.sigmoid(2 * acc)  # = tanh(x)/2 + 1/2
        derivative = 2 * pred * (1 - pred)
    elif HEAD == "sigmoid":
        pred = tl.sigmoid(acc)
        derivative = pred * (1 - pred)
    else:
        pred = acc + OFFSET
        derivative = tl.full((BM, 16), 1.0, tl.float32)
    y = (cell // (W + 2) - 1)[:, None]
    x = (cell % (W + 2) - 1)[:, None] + (q // 4)[None, :]
    inner = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (q < 4 * GROUP)[None, :]
    rgb = inner & (channel < 3)[None, :]
    at = channel[None, :] * (H * W) + y * W + x
    if MODE == "l2":
        frame = tl.load(INDEX + b)
        target = tl.load(VIDEO + frame * (3 * H * W) + at, mask=rgb, other=0).to(tl.float32) / 255
        error = tl.where(rgb, pred - target, 0.0)
        program = b * tl.num_programs(0) + tile
        tl.store(ERROR + program, tl.sum(error * error))
        gradient = 2 * SCALE * error * derivative
        tl.store(DBIAS + program * 16 + q, tl.sum(gradient, 0))
        tl.store(DOUT + (pixel * 4)[:, None] + q[None, :], gradient.to(DOUT.dtype.element_ty),
                 mask=inner)
    elif MODE == "pred":
        tl.store(PRED + b * (3 * H * W) + at, pred, mask=rgb)
    else:
        level = tl.minimum(tl.maximum(pred * 255, 0.0), 255.0)
        tl.store(PRED + b * (3 * H * W) + at, tl.floor(level + 0.5).to(tl.uint8), mask=rgb)


@with_async_fence
@triton.jit
def rgb_backward(DRGB, PRE, WEIGHT, EXTRA, DPRE, DBIAS, ROWS, H: tl.constexpr, W: tl.constexpr,
                 P: tl.constexpr, CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                 CG: tl.constexpr, CN: tl.constexpr, PLANE: tl.constexpr, DC: tl.constexpr,
                 RB: tl.constexpr, KB: tl.constexpr, ACT: tl.constexpr, S, BM: tl.constexpr):
    """Backward pass of the RGB head, the last activation and pixel shuffle, in one pass.

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
        DPRE like PRE, or channel-blocked; DBIAS [S, SH, RB] of the last convolution.
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
        source = (b * (H + 2 * P) + y + P) * (W + 2 * P) + x + P
        pre = tl.load(PRE + offsets(source, i * SW * CG + c, CO, 0), mask=shown, other=0.0
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
            cell = (((b * H + y) * SH + i) * (SW * W) + x * SW)[:, None] + (c // CG)[None, :]
            d += tl.load(EXTRA + cell * CN + (c % CG)[None, :], other=0.0,
                         mask=shown & (c % CG < CN)[None, :]).to(tl.float32)
        d = tl.where(shown, d * activation_and_grad(pre, ACT)[1], 0.0)
        tl.store(DPRE + offsets(source, i * SW * CG + c, CO, PLANE), d.to(DPRE.dtype.element_ty),
                 mask=shown)
        total += tl.sum(d, 0)
    tl.store(DBIAS + (s * SH + i) * RB + c, total)
