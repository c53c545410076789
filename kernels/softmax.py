"""Exponentials and softmax sums on the device."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950216293335)  # in float32, so that products have the same factor everywhere
LOG2E_LOW = tl.constexpr(1.92596298909109e-08)  # LOG2E and this are log2(e)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def exp_of(x):
    """Return exp(x) for x <= 0 in two instructions. ``tl.exp`` takes six.

    The relative error is below 2^-24 |x|, so it is large only where the result is small.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def exp_any(x):
    """Return exp(x) for any x, with an error of up to 4 ulp."""
    high = x * LOG2E
    # The rest of the product. It is NaN if x is infinite, and then the minimum, which skips NaN, is 1.
    low = tl.minimum(tl.fma(x, LOG2E_LOW, tl.fma(x, LOG2E, -high)), 1.0)
    return tl.exp2(high) * (1.0 + low * LN2)


@triton.jit
def reciprocal(x):
    """Return 1 / x with an error of up to 3 ulp, for x >= 1 such as the sum of a softmax.

    A division would take three times as many instructions.
    """
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def fine_reciprocal(x):
    """Do as :func:`reciprocal` with an error of up to 1 ulp, by one step of Newton's method."""
    y = reciprocal(x)
    return y + y * (1.0 - x * y)


@triton.jit
def top_and_sum(x, c, scale, C: tl.constexpr):
    """Return the maximum of x over classes, and ``sum exp(scale * (x - max))``. If a class is NaN, the sum is NaN."""
    top = tl.max(tl.where((c < C)[:, None], x, -INF), 0)
    return top, tl.sum(tl.where((c < C)[:, None], exp_of((x - top[None, :]) * scale), 0.0), 0)


@triton.jit
def softmax(x, top, total, scale):
    """Return the softmax of ``scale * x`` for a block of classes, given :func:`top_and_sum` of all classes."""
    return exp_of((x - top[None, :]) * scale) * fine_reciprocal(total)[None, :]


@triton.jit
def online_top_and_sum(top, total, x, c, scale, C: tl.constexpr):
    """Return ``top`` and ``total`` after another block of classes.

    Starting from (-inf, 0), the blocks of all classes give the results of :func:`top_and_sum`.
    """
    x = tl.where((c < C)[:, None], x, -INF)
    higher = tl.maximum(top, tl.max(x, 0))
    shift = tl.where(higher == -INF, 0.0, higher)  # avoids -inf - -inf, which is NaN
    return higher, total * exp_of((top - shift) * scale) + tl.sum(exp_of((x - shift[None, :]) * scale), 0)
