"""The optimizers' steps."""

import triton
import triton.language as tl


@triton.jit
def adam_step(PARAM, GRAD, MEAN, SQUARE, PARAM_BF16, LR, STEP, SIZE, BETA1: tl.constexpr,
              BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """One step of Adam (Kingma & Ba 2015, as PyTorch computes it) on flat float32 [SIZE] arrays.

    Also writes PARAM_BF16, the copy that the matrix products read. STEP counts this step, from 1.
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
    tl.store(PARAM_BF16 + i, param.to(PARAM_BF16.dtype.element_ty), mask=inside)


@triton.jit
def adan_step(PARAM, GRAD, MEAN, SQUARE, DIFF, PREVIOUS, PARAM_BF16, LR, STEP, SIZE,
              BETA1: tl.constexpr, BETA2: tl.constexpr, BETA3: tl.constexpr, EPS: tl.constexpr,
              BLOCK: tl.constexpr):
    """One step of Adan, as `engines.adan` computes it, on flat float32 [SIZE] arrays.

    DIFF is the mean of the gradient's differences, PREVIOUS the last step's gradient. Also writes
    PARAM_BF16, the copy that the matrix products read. STEP counts this step, from 1.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    step, lr = tl.load(STEP), tl.load(LR)
    grad = tl.load(GRAD + i, mask=inside, other=0.0)
    change = grad - tl.load(PREVIOUS + i, mask=inside, other=0.0)
    change = tl.where(step > 1, change, 0.0)
    ahead = grad + BETA2 * change
    mean = BETA1 * tl.load(MEAN + i, mask=inside, other=0.0) + (1 - BETA1) * grad
    diff = BETA2 * tl.load(DIFF + i, mask=inside, other=0.0) + (1 - BETA2) * change
    square = BETA3 * tl.load(SQUARE + i, mask=inside, other=0.0) + (1 - BETA3) * ahead * ahead
    correction1 = 1 - tl.exp(step * tl.log(BETA1 + step * 0))
    correction2 = 1 - tl.exp(step * tl.log(BETA2 + step * 0))
    correction3 = 1 - tl.exp(step * tl.log(BETA3 + step * 0))
    param = tl.load(PARAM + i, mask=inside, other=0.0)
    update = mean / correction1 + BETA2 * diff / correction2
    param -= lr * update / (tl.sqrt(square) / tl.sqrt(correction3) + EPS)
    tl.store(PARAM + i, param, mask=inside)
    tl.store(MEAN + i, mean, mask=inside)
    tl.store(SQUARE + i, square, mask=inside)
    tl.store(DIFF + i, diff, mask=inside)
    tl.store(PREVIOUS + i, grad, mask=inside)
    tl.store(PARAM_BF16 + i, param.to(PARAM_BF16.dtype.element_ty), mask=inside)
