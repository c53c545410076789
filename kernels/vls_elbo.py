"""Objective of stage 1: expected cross-entropy of the sampled logits plus the KL term, and its gradients, in one pass.

Least memory traffic: one read of mu and of logvar, and one write of each gradient. Drawing ``num_samples * C`` normals
for each voxel can take longer than that.
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
    softmax_of_sample,
    store_gradients,
)
from calseg.kernels.labels import label_weights, load_labels
from calseg.kernels.launch import SAMPLED, Call, TileDemands
from calseg.kernels.noise import load_seed
from calseg.kernels.reductions import LossArguments, finish, load_scales, load_upstream, store_loss
from calseg.kernels.sample_statistics import launch_sample_statistics
from calseg.kernels.softmax import LN2, LOG2E, exp_any, reciprocal
from calseg.kernels.tile import classes, load, locate


@triton.jit
def _block(
    start, mu, logvar, gaussian, k0, k1, num_samples, statistics, label, counted, up, kl_up, grad_mu, grad_logvar, S, n,
    first, inside, WITH_KL: tl.constexpr, C: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Return the terms of a block of classes in the loss and in the KL term, and store the gradients of the block.

    The loss is ``- sum_k log softmax(nu_k)[y]``. The first block of classes adds the logarithms of the sums over all
    classes.
    """
    GRADIENT: tl.constexpr = grad_mu is not None or grad_logvar is not None
    c = classes(start, tile)
    valid = (c < C)[:, None]
    mean = load(mu, n, first, inside, counted, c, C, tile)
    v = load(logvar, n, first, inside, counted, c, C, tile)
    sigma = exp_any(v * 0.5)
    kl = tl.full([tile.TILE], 0.0, tl.float32)
    if WITH_KL:
        kl = tl.sum(tl.where(valid, kl_terms(gaussian, mean, v, sigma), 0.0), 0)
    mean, sigma = mean * LOG2E, sigma * LOG2E

    value = tl.full([tile.TILE], 0.0, tl.float32)
    to_mu = tl.full([tile.BLOCK_C, tile.TILE], 0.0, tl.float32)
    to_logvar = to_mu
    # Get mean and deviation of the label's class once, so that every sample needs only the noise of that class.
    hit = c[:, None] == label[None, :]
    here = (label >= start) & (label < start + tile.BLOCK_C)
    label_mean, label_sigma = tl.sum(tl.where(hit, mean, 0.0), 0), tl.sum(tl.where(hit, sigma, 0.0), 0)
    label_noise = value
    voxel = n * S + first + tl.arange(0, tile.TILE)
    for k in range(0, num_samples, samples_at_once(C)):
        z = noise(k, start, voxel, k0, k1, C, tile)
        for half in range(2):
            top, e, total = softmax_of_sample(mean, sigma, z, c, k + half, statistics, voxel, inside, C)
            there = exists(k + half, num_samples, C)
            label_z = tl.sum(tl.where(hit[None, :, :], z, 0.0), 1)
            label_d = ((label_mean[None, :] + label_sigma[None, :] * label_z) - top) * LN2
            terms = tl.where(start == 0, tl.log(total), 0.0) - tl.where(here[None, :], label_d, 0.0)
            value += tl.reshape(tl.sum(tl.where(there, terms[:, None, :], 0.0), 0), [tile.TILE])
            if GRADIENT:
                s = e * tl.where(there, reciprocal(total)[:, None, :], 0.0)
                to_mu = tl.where(valid, to_mu + tl.sum(s, 0), 0.0)
                to_logvar = tl.where(valid, to_logvar + tl.sum(s * z, 0), 0.0)
                label_noise += tl.reshape(tl.sum(tl.where(there, label_z[:, None, :], 0.0), 0), [tile.TILE])
            z = -z
    to_mu -= tl.where(hit, 1.0, 0.0) * num_samples
    to_logvar -= tl.where(hit, label_noise[None, :], 0.0)

    if GRADIENT:
        to_mu, to_logvar = gaussian_gradients(gaussian, mean * LN2, sigma * LN2, to_mu, to_logvar, up, kl_up, WITH_KL)
        store_gradients(grad_mu, grad_logvar, to_mu, to_logvar, n, first, inside, c, C, tile)
    return value, kl


@triton.jit(do_not_specialize=["seed"])
def vls_elbo(
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
    grad_mu,  # out [N, C, S] or None
    grad_logvar,  # out [N, C, S] or None
    S,
    WITH_KL: tl.constexpr,  # beta is not 0
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute ``- (1/m) sum_k w[y] log softmax(nu_k)[y]`` and the KL term, and their gradients."""
    n, first, inside = locate(tl.program_id(0), S, tile)
    scales = load_scales(upstream, NUM_SUMS)
    label, ok, bad = load_labels(labels, n, first, inside, C, False, tile)
    counted = None if labels.ignore is None else ok
    per_sample = tl.where(bad, float("nan"), 1.0 / num_samples)
    if weight is not None:
        per_sample *= label_weights(weight, label, C)
    up, kl_up = load_upstream(upstream, scales, n, first, inside, ok, tile)
    up *= per_sample
    k0, k1 = load_seed(seed, gaussian.seed)
    value = tl.full([tile.TILE], 0.0, tl.float32)
    kl = value
    for start in range(0, C, tile.BLOCK_C):
        block_value, block_kl = _block(
            start, mu, logvar, gaussian, k0, k1, num_samples, statistics, label, counted, up, kl_up, grad_mu,
            grad_logvar, S, n, first, inside, WITH_KL, C, tile,
        )  # fmt: skip
        value += block_value
        kl += block_kl

    value, kl = tl.where(ok, value * per_sample, 0.0), tl.where(ok, kl, 0.0)
    store_loss(loss, partials, upstream, value, kl if WITH_KL else None, gaussian.beta, ok, n, first, inside, tile)
    finish(partials, upstream, gaussian.beta, WITH_KL, NUM_SUMS)


def tile_demands(spec: Any, tensors: Any) -> TileDemands:
    """Return the demands of the kernel on its tiles."""
    return SAMPLED


def launch(call: Call, spec: Any, given: LossArguments) -> None:
    """Launch the kernel. If classes are taken in blocks, the kernel of the statistics comes first."""
    mu, logvar, gradients = given.tensors.mu, given.tensors.logvar, given.gradients
    sampling = sampling_arguments(spec.sampling, call.like.device)
    statistics = launch_sample_statistics(call, mu, logvar, sampling, given.labels, weight=spec.weight)
    call.launch(
        vls_elbo, mu, logvar, *sampling, statistics, given.labels, spec.weight, given.upstream, given.loss,
        given.partials, gradients.mu, gradients.logvar, call.S, given.with_kl, call.C, given.num_sums,
    )  # fmt: skip
