"""Softmax of a map of logits, added to a running total, and the gradient of the logits.

Least memory traffic, in both directions: two reads and one write of a tensor of the logits' size.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from calseg.kernels.launch import Call
from calseg.kernels.softmax import INF, online_top_and_sum, softmax, top_and_sum
from calseg.kernels.tile import View, classes, load, locate, store


@triton.jit
def accumulate_softmax(
    logits,  # [N, C, S]
    other,  # [N, C, S]: the running total, or the upstream gradient
    out,  # out [N, C, S]: the running total, or the gradient of the logits
    S,
    per_temperature,
    BACKWARD: tl.constexpr,
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute ``out = other + softmax(logits * per_temperature)`` or, if BACKWARD, the gradient of the logits."""
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    n, first, inside = locate(tl.program_id(0), S, tile)
    c = classes(0, tile)
    if C <= BLOCK_C:
        x = load(logits, n, first, inside, None, c, C, tile)
        y = load(other, n, first, inside, None, c, C, tile)
        top, total = top_and_sum(x, c, per_temperature, C)
        p = softmax(x, top, total, per_temperature)
        if BACKWARD:
            dot = tl.sum(tl.where((c < C)[:, None], p * y, 0.0), 0)
            store(out, n, first, inside, c, p * per_temperature * (y - dot[None, :]), C, tile)
        else:
            store(out, n, first, inside, c, y + p, C, tile)
    else:
        top = tl.full([tile.TILE], -INF, tl.float32)
        total = tl.full([tile.TILE], 0.0, tl.float32)
        dot = total
        for start in range(0, C, BLOCK_C):
            x = load(logits, n, first, inside, None, start + c, C, tile)
            top, total = online_top_and_sum(top, total, x, start + c, per_temperature, C)
        if BACKWARD:
            for start in range(0, C, BLOCK_C):
                x = load(logits, n, first, inside, None, start + c, C, tile)
                y = load(other, n, first, inside, None, start + c, C, tile)
                dot += tl.sum(tl.where((start + c < C)[:, None], softmax(x, top, total, per_temperature) * y, 0.0), 0)
        for start in range(0, C, BLOCK_C):
            x = load(logits, n, first, inside, None, start + c, C, tile)
            y = load(other, n, first, inside, None, start + c, C, tile)
            p = softmax(x, top, total, per_temperature)
            value = p * per_temperature * (y - dot[None, :]) if BACKWARD else y + p
            store(out, n, first, inside, start + c, value, C, tile)


def launch(call: Call, spec: Any, logits: View, other: View, out: View, *, backward: bool) -> None:
    """Launch the kernel."""
    call.launch(accumulate_softmax, logits, other, out, call.S, 1.0 / spec.temperature, backward, call.C)
