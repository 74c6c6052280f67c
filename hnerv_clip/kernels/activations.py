"""The decoder's activations and their derivatives, inside Triton kernels."""

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "relu", "sin", "swish")  # with act(0) = 0, so that padding stays 0


@triton.jit
def normal_cdf(x):
    """Φ(x) and exp(−x²/2), by one exponential; Φ within 1e-7 (Abramowitz & Stegun 7.1.26)."""
    density = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.2316418882663604 * tl.abs(x))  # 0.3275911/√2
    tail = 0.5 * density * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (
        -1.453152027 + t * 1.061405429))))
    return tl.where(x > 0, 1 - tail, tail), density


@triton.jit
def activate(x, ACT: tl.constexpr):
    """One of `ACTIVATIONS`, of any shape in float32."""
    if ACT == "gelu":
        cdf, _ = normal_cdf(x)
        return x * cdf
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "sin":
        return tl.sin(x)
    else:
        return x * tl.sigmoid(x)


@triton.jit
def activation_and_grad(x, ACT: tl.constexpr):
    """The activation and its derivative."""
    if ACT == "gelu":
        cdf, density = normal_cdf(x)
        return x * cdf, cdf + x * density * 0.3989422804014327
    elif ACT == "relu":
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    elif ACT == "sin":
        return tl.sin(x), tl.cos(x)
    else:
        s = tl.sigmoid(x)
        return x * s, s + x * s * (1 - s)
