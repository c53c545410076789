"""Soft labels: sampled from the dense Gaussian, accumulated from logit maps, blended with labels; their gradients."""

from __future__ import annotations

import triton
import triton.language as tl
from calseg.kernels.common import (
    INF,
    classes,
    exp_any,
    exp_of,
    load,
    load_labels,
    locate,
    online_top_and_sum,
    reciprocal,
    store,
    top_and_sum,
)
from calseg.kernels.gaussian import exists, noise, samples_at_once, slope, softmax_of_sample
from calseg.kernels.noise import load_seed


@triton.jit
def _labels_or_none(labels, n, first, inside, C: tl.constexpr, tile: tl.constexpr):
    if labels.ptr is None:
        label, ok, bad = tl.full([tile.TILE], -1, tl.int32), inside, inside & False
    else:
        label, ok, bad = load_labels(labels, n, first, inside, C, False, tile)
    return label, ok, bad


@triton.jit
def _blend(estimate, scale, label, ok, bad, alpha, c):
    """``(1 - alpha) * onehot(label) + scale * estimate``; 0 where ignored."""
    hard = tl.where(c[:, None] == label[None, :], 1.0 - alpha, 0.0)
    blended = tl.where(ok[None, :], hard + scale * estimate, 0.0)
    return tl.where(bad[None, :], float("nan"), blended)


# ---- sampled. Floor: two reads, one write (backward: three, two); num_samples * C normals a voxel. ----


@triton.jit
def _sampled_block(
    start, mu, logvar, gaussian, k0, k1, num_samples, statistics, label, ok, bad, counted, soft, grad_output, grad_mu,
    grad_logvar, S, n, first, inside, alpha, C: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    BACKWARD: tl.constexpr = grad_output is not None
    c = classes(start, tile)
    valid = (c < C)[:, None]
    per_temperature = 1.0 / gaussian.temperature
    mean = load(mu, n, first, inside, counted, c, C, tile) * per_temperature
    deviation = exp_any(load(logvar, n, first, inside, counted, c, C, tile) * 0.5) * per_temperature
    estimate = tl.full([tile.BLOCK_C, tile.TILE], 0.0, tl.float32)
    to_mu, to_logvar = estimate, estimate
    if BACKWARD:
        a = load(grad_output, n, first, inside, counted, c, C, tile)
    voxel = n * S + first + tl.arange(0, tile.TILE)
    for k in range(0, num_samples, samples_at_once(C)):
        z = noise(k, start, voxel, k0, k1, C, tile)
        _, e, total = softmax_of_sample(mean, deviation, z, c, k, statistics, voxel, inside, C)
        s = e * tl.where(exists(k, num_samples, C), reciprocal(total)[:, None, :], 0.0)
        if BACKWARD:
            g = slope(a, s, k, statistics, voxel, inside)
            to_mu = tl.where(valid, to_mu + tl.sum(g, 0), 0.0)
            to_logvar = tl.where(valid, to_logvar + tl.sum(g * z, 0), 0.0)
        else:
            estimate = tl.where(valid, estimate + tl.sum(s, 0), 0.0)
    if BACKWARD:
        scale = alpha * per_temperature / num_samples
        if grad_mu is not None:
            store(grad_mu, n, first, inside, c, to_mu * scale, C, tile)
        if grad_logvar is not None:
            to_logvar *= (0.5 * scale * gaussian.temperature) * deviation
            store(grad_logvar, n, first, inside, c, to_logvar, C, tile)
    else:
        blended = _blend(estimate, alpha / num_samples, label, ok, bad, alpha, c)
        store(soft, n, first, inside, c, blended, C, tile)


@triton.jit(do_not_specialize=["seed"])
def sample_soft_labels(
    mu,  # [N, C, S]
    logvar,  # [N, C, S]
    gaussian,
    seed: tl.int64,
    num_samples,
    statistics,  # where classes are taken in blocks, else None
    labels,  # [N, S] or None
    soft,  # out [N, C, S], or None
    grad_output,  # [N, C, S], or None
    grad_mu,  # out [N, C, S] or None
    grad_logvar,  # out [N, C, S] or None
    S,
    alpha,  # 1 without labels
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """The soft labels, or, given ``grad_output``, the gradients of mu and logvar."""
    n, first, inside = locate(tl.program_id(0), S, tile)
    label, ok, bad = _labels_or_none(labels, n, first, inside, C, tile)
    counted = None if labels.ptr is None else ok
    k0, k1 = load_seed(seed, gaussian.seed)
    _sampled_block(
        0, mu, logvar, gaussian, k0, k1, num_samples, statistics, label, ok, bad, counted, soft, grad_output, grad_mu,
        grad_logvar, S, n, first, inside, alpha, C, tile,
    )  # fmt: skip
    for start in range(tile.BLOCK_C, C, tile.BLOCK_C):
        _sampled_block(
            start, mu, logvar, gaussian, k0, k1, num_samples, statistics, label, ok, bad, counted, soft, grad_output,
            grad_mu, grad_logvar, S, n, first, inside, alpha, C, tile,
        )  # fmt: skip


# ---- accumulated. Floor: two reads, one write. ----


@triton.jit
def _softmax(x, top, total, per_temperature):
    return exp_of((x - top[None, :]) * per_temperature) * reciprocal(total)[None, :]


@triton.jit
def accumulate_softmax(
    logits,  # [N, C, S]
    other,  # [N, C, S]: the running total, or the gradient that comes in
    out,  # out [N, C, S]: the total, or the gradient of the logits
    S,
    per_temperature,
    BACKWARD: tl.constexpr,
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """``out = other + softmax(logits * per_temperature)``, or its gradient."""
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    n, first, inside = locate(tl.program_id(0), S, tile)
    c = classes(0, tile)
    if C <= BLOCK_C:
        x = load(logits, n, first, inside, None, c, C, tile)
        y = load(other, n, first, inside, None, c, C, tile)
        top, total = top_and_sum(x, c, per_temperature, C)
        p = _softmax(x, top, total, per_temperature)
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
                dot += tl.sum(tl.where((start + c < C)[:, None], _softmax(x, top, total, per_temperature) * y, 0.0), 0)
        for start in range(0, C, BLOCK_C):
            x = load(logits, n, first, inside, None, start + c, C, tile)
            y = load(other, n, first, inside, None, start + c, C, tile)
            p = _softmax(x, top, total, per_temperature)
            value = p * per_temperature * (y - dot[None, :]) if BACKWARD else y + p
            store(out, n, first, inside, start + c, value, C, tile)


# ---- blended. Floor: one read, one write. ----


@triton.jit
def blend_soft_labels(
    estimate,  # in and out [N, C, S]
    labels,  # [N, S] or None
    S,
    alpha,  # 1 without labels
    scale,
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """``estimate = (1 - alpha) * onehot(labels) + scale * estimate``, 0 where ignored."""
    n, first, inside = locate(tl.program_id(0), S, tile)
    label, ok, bad = _labels_or_none(labels, n, first, inside, C, tile)
    for start in range(0, C, tile.BLOCK_C):
        c = classes(start, tile)
        x = load(estimate, n, first, inside, None, c, C, tile)
        store(estimate, n, first, inside, c, _blend(x, scale, label, ok, bad, alpha, c), C, tile)
