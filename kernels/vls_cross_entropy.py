"""Cross-entropy with sampled soft labels plus the KL term, and the gradients of logits, mu and logvar, in one pass.

Least memory traffic: one read of each input, and one write of each gradient. Drawing ``num_samples * C`` normals for
each voxel can take longer than that: see benchmarks/notes.md.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from calseg.kernels.gaussian import (
    exists,
    gaussian_gradients,
    kl_terms,
    noise,
    samples_at_once,
    sampling_arguments,
    slope,
    softmax_of_sample,
    statistic,
    store_gradients,
)
from calseg.kernels.labels import class_weights, load_labels, weighted
from calseg.kernels.launch import SAMPLED, Call, TileDemands
from calseg.kernels.noise import load_seed
from calseg.kernels.overlap import store_overlap
from calseg.kernels.reductions import LossArguments, finish, load_scales, load_upstream, store_loss
from calseg.kernels.sample_statistics import launch_sample_statistics
from calseg.kernels.softmax import INF, LN2, LOG2E, LOWEST, exp_any, exp_of, reciprocal, top_and_sum
from calseg.kernels.tile import classes, load, locate, store


@triton.jit
def _block(
    start, logits, mu, logvar, gaussian, k0, k1, num_samples, statistics, label, ok, bad, counted, weight, upstream,
    scales, grad_logits, grad_mu, grad_logvar, soft, overlap, S, n, first, inside, smoothing, alpha,
    SAMPLED: tl.constexpr, WITH_KL: tl.constexpr, C: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Return the terms of a block of classes in the loss and in the KL term, and store the results of the block."""
    GRADIENT: tl.constexpr = grad_mu is not None or grad_logvar is not None
    c = classes(start, tile)
    valid = (c < C)[:, None]
    x = load(logits, n, first, inside, counted, c, C, tile)
    m = load(mu, n, first, inside, counted, c, C, tile)
    v = load(logvar, n, first, inside, counted, c, C, tile)
    voxel = n * S + first + tl.arange(0, tile.TILE)

    if statistics is None:
        top, total = top_and_sum(x, c, 1.0, C)
    else:
        top, total = statistic(statistics, 0, voxel, inside), statistic(statistics, 1, voxel, inside)
    log_p = (x - top[None, :]) - tl.log(tl.where(bad, float("nan"), total))[None, :]
    sigma = exp_any(v * 0.5)
    kl = tl.full([tile.TILE], 0.0, tl.float32)
    if WITH_KL:
        kl = tl.sum(tl.where(valid, kl_terms(gaussian, m, v, sigma), 0.0), 0)
    per_temperature = 1.0 / gaussian.temperature
    mean, deviation = m * (per_temperature * LOG2E), sigma * (per_temperature * LOG2E)

    w = class_weights(weight, c, C)[:, None]
    keep = 1.0 - smoothing
    estimate = tl.full([tile.BLOCK_C, tile.TILE], 0.0, tl.float32)
    to_mu, to_logvar = estimate, estimate
    if SAMPLED:
        # The gradient with respect to the estimate, the mean of the samples, is -(1 - smoothing) alpha w log p. It
        # needs no sample, so it is known before sampling. Keep log p finite here: times a probability of 0, -inf would
        # give NaN.
        log_p = tl.where(log_p < LOWEST, LOWEST, log_p)
        a = log_p if weight is None else w * log_p
        for k in range(0, num_samples, samples_at_once(C)):
            z = noise(k, start, voxel, k0, k1, C, tile)
            for half in range(2):
                _, e, sum_e = softmax_of_sample(mean, deviation, z, c, k + half, statistics, voxel, inside, C)
                s = e * tl.where(exists(k + half, num_samples, C), reciprocal(sum_e)[:, None, :], 0.0)
                estimate = tl.where(valid, estimate + tl.sum(s, 0), 0.0)
                if GRADIENT:
                    g = slope(a, s, k + half, statistics, voxel, inside)
                    to_mu = tl.where(valid, to_mu + tl.sum(g, 0), 0.0)
                    to_logvar = tl.where(valid, to_logvar + tl.sum(g * z, 0), 0.0)
                z = -z
        log_p = tl.where(log_p == LOWEST, -INF, log_p)

    # Load the upstream gradient only now, so that it takes no registers in the loop.
    up, kl_up = load_upstream(upstream, scales, n, first, inside, ok, tile)
    hard = tl.where(c[:, None] == label[None, :], 1.0 - alpha, 0.0)
    blended = hard + estimate * (alpha / num_samples)
    smoothed = keep * blended + smoothing / C
    y = weighted(w, smoothed)
    # Where Y is 0, the term is 0 even if log p is -inf: it is the limit of t log t.
    value = -tl.sum(tl.where((smoothed == 0.0) | (c >= C)[:, None], 0.0, y * log_p), 0)
    if grad_logits is not None:
        mass = tl.sum(y, 0) if statistics is None else statistic(statistics, 2, voxel, inside)
        g = exp_of(log_p) * (up * mass)[None, :] - up[None, :] * y
        store(grad_logits, n, first, inside, c, g, C, tile)
    if GRADIENT:
        per_sample = up * (-keep * alpha * per_temperature / num_samples)
        unscale = gaussian.temperature * LN2
        to_mu, to_logvar = gaussian_gradients(
            gaussian, mean * unscale, deviation * unscale, to_mu, to_logvar, per_sample, kl_up, WITH_KL
        )
        store_gradients(grad_mu, grad_logvar, to_mu, to_logvar, n, first, inside, c, C, tile)
    if soft is not None:
        store(soft, n, first, inside, c, blended, C, tile)
    if overlap is not None:
        store_overlap(overlap, exp_of(log_p), blended, ok, c, C)
    return value, kl


@triton.jit(do_not_specialize=["seed"])
def vls_cross_entropy(
    logits,  # [N, C, S]
    mu,  # [N, C, S]
    logvar,  # [N, C, S]
    gaussian,
    seed: tl.int64,
    num_samples,
    statistics,  # if classes are taken in blocks, else None
    labels,  # [N, S]
    weight,  # [C] or None
    upstream,
    loss,  # out [N, S] or None
    partials,
    grad_logits,  # out [N, C, S] or None
    grad_mu,  # out [N, C, S] or None
    grad_logvar,  # out [N, C, S] or None
    soft,  # out [N, C, S] or None: the sampled labels
    overlap,  # out [programs, C, 2] or None
    S,
    smoothing,
    alpha,
    SAMPLED: tl.constexpr,  # alpha is not 0
    WITH_KL: tl.constexpr,  # beta is not 0
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute the loss and the KL term of every voxel, and their gradients."""
    n, first, inside = locate(tl.program_id(0), S, tile)
    scales = load_scales(upstream, NUM_SUMS)
    label, ok, bad = load_labels(labels, n, first, inside, C, False, tile)
    counted = None if labels.ignore is None else ok
    k0, k1 = load_seed(seed, gaussian.seed)
    value = tl.full([tile.TILE], 0.0, tl.float32)
    kl = value
    for start in range(0, C, tile.BLOCK_C):
        block_value, block_kl = _block(
            start, logits, mu, logvar, gaussian, k0, k1, num_samples, statistics, label, ok, bad, counted, weight,
            upstream, scales, grad_logits, grad_mu, grad_logvar, soft, overlap, S, n, first, inside, smoothing, alpha,
            SAMPLED, WITH_KL, C, tile,
        )  # fmt: skip
        value += block_value
        kl += block_kl

    value, kl = tl.where(ok, value, 0.0), tl.where(ok, kl, 0.0)
    store_loss(loss, partials, upstream, value, kl if WITH_KL else None, gaussian.beta, ok, n, first, inside, tile)
    finish(partials, upstream, gaussian.beta, WITH_KL, NUM_SUMS)


def tile_demands(spec: Any, tensors: Any) -> TileDemands:
    """Return the demands of the kernel on its tiles."""
    return SAMPLED


def launch(call: Call, spec: Any, given: LossArguments) -> None:
    """Launch the kernel. If classes are taken in blocks, the kernel of the statistics comes first.

    With the overlap, the labels are stored in place of the gradient of the logits.
    """
    logits, mu, logvar, gradients = given.tensors.logits, given.tensors.mu, given.tensors.logvar, given.gradients
    grad_logits, soft = gradients.logits, None
    if given.overlap is not None:
        grad_logits, soft = soft, grad_logits
    sampling = sampling_arguments(spec.sampling, call.like.device)
    smoothing, alpha = spec.label_smoothing, spec.alpha
    statistics = launch_sample_statistics(
        call, mu, logvar, sampling, given.labels, logits=logits, weight=spec.weight, smoothing=smoothing, alpha=alpha
    )
    call.launch(
        vls_cross_entropy, logits, mu, logvar, *sampling, statistics, given.labels, spec.weight, given.upstream,
        given.loss, given.partials, grad_logits, gradients.mu, gradients.logvar, soft, given.overlap, call.S, smoothing,
        alpha, alpha != 0, given.with_kl, call.C, given.num_sums,
    )  # fmt: skip
