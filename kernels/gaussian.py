"""Gaussian over the logits on the device: its KL term, its samples, and the softmax of a sample."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from calseg.kernels.noise import normals
from calseg.kernels.softmax import INF, LOG2E
from calseg.kernels.tile import store
from torch import Tensor


class Gaussian(NamedTuple):
    """The options of the sampling and of the KL term. ``seed`` is a 0-d int64 tensor or None."""

    temperature: float
    beta: float
    prior_mu: float
    prior_logvar: float
    prior_precision: float
    seed: Any


def sampling_arguments(sampling: Any, device: torch.device) -> tuple[Gaussian, int, int]:
    """Return ``(gaussian, seed, num_samples)``, the arguments by which kernels receive the sampling of a spec.

    If the seed is a tensor on the device, ``gaussian`` holds it, and ``seed`` is 0. Otherwise ``seed`` is a signed
    number.
    """
    given = sampling.seed
    tensor = given if isinstance(given, Tensor) and given.device == device else None
    seed = 0 if tensor is not None else (int(given) + 2**63) % 2**64 - 2**63
    gaussian = Gaussian(
        sampling.temperature, sampling.beta, sampling.prior_mu, sampling.prior_logvar,
        math.exp(-sampling.prior_logvar), tensor,
    )  # fmt: skip
    return gaussian, seed, sampling.num_samples


# ---- the KL term ----


@triton.jit
def kl_terms(gaussian, mu, logvar, sigma):
    """Return the KL divergence of every class from the prior."""
    gap = mu - gaussian.prior_mu
    return 0.5 * ((gaussian.prior_logvar - logvar) + ((sigma * sigma + gap * gap) * gaussian.prior_precision - 1.0))


@triton.jit
def kl_gradients(gaussian, mu, sigma, up):
    """Return the gradients of the KL term with respect to mu and logvar, times ``up`` ``[TILE]``.

    They are exactly 0 where ``up`` is 0, even if the variance is infinite.
    """
    off = (up == 0.0)[None, :]
    to_mu = up[None, :] * ((mu - gaussian.prior_mu) * gaussian.prior_precision)
    to_logvar = up[None, :] * (0.5 * (sigma * sigma * gaussian.prior_precision - 1.0))
    return tl.where(off, 0.0, to_mu), tl.where(off, 0.0, to_logvar)


# ---- samples ----


@triton.jit
def noise(k, start, voxel, k0, k1, C: tl.constexpr, tile: tl.constexpr):
    """Return normals ``[P, BLOCK_C, TILE]`` for P pairs of samples, and for BLOCK_C classes from ``start`` on.

    The first pair has samples k and k + 1, whose noise is plus and minus the normals. P is 4 / C if C <= 2, else 1.
    """
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    TILE: tl.constexpr = tile.TILE
    if C <= 2:
        z = normals(k0, k1, voxel, tl.arange(0, 1) + k // 2 // (4 // C), True)
        z = tl.reshape(z, [4 // C, C, TILE])
    else:
        quad = k // 2 * ((C + 3) // 4) + start // 4 + tl.arange(0, BLOCK_C // 4)
        z = normals(k0, k1, voxel, quad, tile.LANE_MAJOR)[None, :, :]
    return z


@triton.jit
def samples_at_once(C: tl.constexpr):
    """Return 2 P, the number of samples for which :func:`noise` draws at once."""
    return 2 * (4 // C) if C <= 2 else 2


@triton.jit
def exists(k, num_samples, C: tl.constexpr):
    """Return which of sample k and the P - 1 at distances of 2 from it exist, ``[P, 1, 1]``."""
    P: tl.constexpr = 4 // C if C <= 2 else 1
    return (k + 2 * tl.arange(0, P) < num_samples)[:, None, None]


# ---- the softmax of a sample, over all classes or over a block of them ----


class Statistics(NamedTuple):
    """Sums over all classes, float32 ``[rows, voxels]``, for kernels that take classes in blocks.

    :func:`calseg.kernels.sample_statistics.sample_statistics` describes the rows.
    """

    ptr: Any
    num_voxels: int


@triton.jit
def statistic_pointers(statistics, row, voxel):
    """Return pointers ``[TILE]`` to a row of the statistics for the voxels of the tile."""
    return statistics.ptr + tl.cast(row, tl.int64) * statistics.num_voxels + voxel


@triton.jit
def statistic(statistics, row, voxel, inside):
    """Load a row of the statistics for the voxels of the tile, ``[TILE]``."""
    return tl.load(statistic_pointers(statistics, row, voxel), mask=inside, other=1.0)


@triton.jit
def softmax_of_sample(mean, deviation, z, c, k, statistics, voxel, inside, C: tl.constexpr):
    """Return ``(top, e, total)`` of nu = mean + deviation * z, where mean and deviation are times LOG2E.

    ``top`` is the maximum over classes, ``e`` is 2^(nu - top), and ``total`` is the sum of ``e`` over classes.
    """
    valid = (c < C)[None, :, None]
    nu = tl.where(valid, mean[None, :, :] + deviation[None, :, :] * z, -INF)
    top = tl.max(nu, 1) if statistics is None else statistic(statistics, 3 + 3 * k, voxel, inside)[None, :] * LOG2E
    e = tl.where(valid, tl.exp2(nu - top[:, None, :]), 0.0)
    total = tl.sum(e, 1) if statistics is None else statistic(statistics, 4 + 3 * k, voxel, inside)[None, :]
    return top, e, total


@triton.jit
def slope(a, s, k, statistics, voxel, inside):
    """Return the gradient with respect to nu: ``s * (a - sum_c a s)``, where ``a`` is that with respect to ``s``."""
    if statistics is None:
        dot = tl.sum(a[None, :, :] * s, 1)
    else:
        dot = statistic(statistics, 5 + 3 * k, voxel, inside)[None, :]
    return s * (a[None, :, :] - dot[:, None, :])


# ---- gradients of mu and logvar ----


@triton.jit
def gaussian_gradients(gaussian, mu, sigma, slopes, slopes_times_noise, up, kl_up, WITH_KL: tl.constexpr):
    """Return dLoss/dmu and dLoss/dlogvar, given the sums over the samples of dl/dnu, and of dl/dnu times the noise."""
    to_mu = slopes * up[None, :]
    to_logvar = slopes_times_noise * ((up * 0.5)[None, :] * sigma)
    if WITH_KL:
        kl_mu, kl_logvar = kl_gradients(gaussian, mu, sigma, kl_up * gaussian.beta)
        to_mu += kl_mu
        to_logvar += kl_logvar
    return to_mu, to_logvar


@triton.jit
def store_gradients(
    grad_mu, grad_logvar, to_mu, to_logvar, n, first, inside, c, C: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    """Store the gradients of mu and logvar, of which either may be None."""
    if grad_mu is not None:
        store(grad_mu, n, first, inside, c, to_mu, C, tile)
    if grad_logvar is not None:
        store(grad_logvar, n, first, inside, c, to_logvar, C, tile)
