"""Soft labels sampled from the Gaussian over the logits, and the gradients of mu and logvar.

Least memory traffic: two reads and one write forward, three reads and two writes backward. Drawing ``num_samples * C``
normals for each voxel can take longer than that.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from calseg.kernels.gaussian import (
    exists,
    noise,
    samples_at_once,
    sampling_arguments,
    slope,
    softmax_of_sample,
    store_gradients,
)
from calseg.kernels.labels import Labels, blend_with_labels, load_labels_or_none
from calseg.kernels.launch import Call
from calseg.kernels.noise import load_seed
from calseg.kernels.sample_statistics import launch_sample_statistics
from calseg.kernels.softmax import LN2, LOG2E, exp_any, reciprocal
from calseg.kernels.tile import View, classes, load, locate, store


@triton.jit
def _sampled_block(
    start, mu, logvar, gaussian, k0, k1, num_samples, statistics, label, ok, bad, counted, soft, grad_output, grad_mu,
    grad_logvar, S, n, first, inside, alpha, C: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Store the soft labels of a block of classes or, given ``grad_output``, the gradients of mu and logvar."""
    BACKWARD: tl.constexpr = grad_output is not None
    c = classes(start, tile)
    valid = (c < C)[:, None]
    per_temperature = 1.0 / gaussian.temperature
    mean = load(mu, n, first, inside, counted, c, C, tile) * (per_temperature * LOG2E)
    deviation = exp_any(load(logvar, n, first, inside, counted, c, C, tile) * 0.5) * (per_temperature * LOG2E)
    estimate = tl.full([tile.BLOCK_C, tile.TILE], 0.0, tl.float32)
    to_mu, to_logvar = estimate, estimate
    if BACKWARD:
        a = load(grad_output, n, first, inside, counted, c, C, tile)
    voxel = n * S + first + tl.arange(0, tile.TILE)
    for k in range(0, num_samples, samples_at_once(C)):
        z = noise(k, start, voxel, k0, k1, C, tile)
        for half in range(2):
            _, e, total = softmax_of_sample(mean, deviation, z, c, k + half, statistics, voxel, inside, C)
            s = e * tl.where(exists(k + half, num_samples, C), reciprocal(total)[:, None, :], 0.0)
            if BACKWARD:
                g = slope(a, s, k + half, statistics, voxel, inside)
                to_mu = tl.where(valid, to_mu + tl.sum(g, 0), 0.0)
                to_logvar = tl.where(valid, to_logvar + tl.sum(g * z, 0), 0.0)
            else:
                estimate = tl.where(valid, estimate + tl.sum(s, 0), 0.0)
            z = -z
    if BACKWARD:
        scale = alpha * per_temperature / num_samples
        to_logvar *= (0.5 * scale * gaussian.temperature * LN2) * deviation
        store_gradients(grad_mu, grad_logvar, to_mu * scale, to_logvar, n, first, inside, c, C, tile)
    else:
        blended = blend_with_labels(estimate, alpha / num_samples, label, ok, bad, alpha, c)
        store(soft, n, first, inside, c, blended, C, tile)


@triton.jit(do_not_specialize=["seed"])
def sample_soft_labels(
    mu,  # [N, C, S]
    logvar,  # [N, C, S]
    gaussian,
    seed: tl.int64,
    num_samples,
    statistics,  # if classes are taken in blocks, else None
    labels,  # [N, S] or none
    soft,  # out [N, C, S] or None
    grad_output,  # [N, C, S] or None
    grad_mu,  # out [N, C, S] or None
    grad_logvar,  # out [N, C, S] or None
    S,
    alpha,  # 1 if there are no labels
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute the soft labels or, given ``grad_output``, the gradients of mu and logvar."""
    n, first, inside = locate(tl.program_id(0), S, tile)
    label, ok, bad = load_labels_or_none(labels, n, first, inside, C, tile)
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


def launch(
    call: Call,
    spec: Any,
    labels: Labels,
    tensors: Any,
    gradients: Any,
    *,
    soft_labels: View | None = None,
    grad_output: View | None = None,
) -> None:
    """Launch the kernel. If classes are taken in blocks, the kernel of the statistics comes first.

    Either ``soft_labels`` is given and written, or ``grad_output`` is given and the gradients are written.
    """
    sampling = sampling_arguments(spec.sampling, call.like.device)
    statistics = launch_sample_statistics(
        call, tensors.mu, tensors.logvar, sampling, labels, grad_output=grad_output, alpha=spec.alpha
    )
    alpha = 1.0 if spec.labels is None else spec.alpha
    call.launch(
        sample_soft_labels, tensors.mu, tensors.logvar, *sampling, statistics, labels, soft_labels, grad_output,
        gradients.mu, gradients.logvar, call.S, alpha, call.C,
    )  # fmt: skip
