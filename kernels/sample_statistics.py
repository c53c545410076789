"""Sums over all classes, for kernels that draw samples and take the classes in blocks.

The sums are about ``3 + 3 * num_samples`` floats per voxel, which is little memory compared with hundreds of classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from calseg.kernels.gaussian import Gaussian, Statistics, noise, statistic_pointers
from calseg.kernels.labels import Labels, class_weights, label_weights, load_labels
from calseg.kernels.launch import Call
from calseg.kernels.noise import load_seed
from calseg.kernels.softmax import INF, LOWEST, exp_any, exp_of, online_top_and_sum
from calseg.kernels.tile import View, classes, load, locate
from torch import Tensor


@triton.jit
def _store_row(statistics, row, voxel, inside, values):
    """Store a row of the statistics, which :func:`calseg.kernels.gaussian.statistic` loads."""
    tl.store(statistic_pointers(statistics, row, voxel), values, mask=inside)


@triton.jit
def _fold(top, total, dot, weighted, nu, a, w, c, C: tl.constexpr):
    """Return the first four arguments after another block of classes of a sample.

    They are the maximum of nu, ``sum exp(nu - max)``, and the sums of these exponentials times ``a`` and times ``w``.
    """
    higher, total = online_top_and_sum(top, total, nu, c, 1.0, C)
    shrink = exp_of(top - higher)
    e = tl.where((c < C)[:, None], exp_of(nu - higher[None, :]), 0.0)
    if a is not None:
        dot = dot * shrink + tl.sum(a * e, 0)
    return higher, total, dot, weighted * shrink + tl.sum(w * e, 0)


@triton.jit
def _store_sample(statistics, k, voxel, inside, top, total, dot, weighted):
    """Store the rows of sample k, given the results of :func:`_fold`, and return ``sum_c w s`` of the sample."""
    _store_row(statistics, 3 + 3 * k, voxel, inside, top)
    _store_row(statistics, 4 + 3 * k, voxel, inside, total)
    _store_row(statistics, 5 + 3 * k, voxel, inside, dot / total)
    return weighted / total


@triton.jit(do_not_specialize=["seed"])
def sample_statistics(
    logits,  # [N, C, S] or None
    mu,  # [N, C, S]
    logvar,  # [N, C, S]
    grad_output,  # [N, C, S] or None
    gaussian,
    seed: tl.int64,
    num_samples,
    labels,  # [N, S] or None
    weight,  # [C] or None
    statistics,  # out
    S,
    smoothing,
    alpha,
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute the rows of the statistics.

    Rows 0 to 2 are written if logits are given: the maximum of the logits, ``sum exp(logits - max)``, and the sum over
    classes of the weighted soft labels.

    Sample k has rows 3 + 3 k to 5 + 3 k: the maximum of nu, ``sum exp(nu - max)``, and the dot product of the softmax
    of nu with ``w log p`` if logits are given, else with ``grad_output``. With an odd ``num_samples``, the sample after
    the last one has rows too.
    """
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    n, first, inside = locate(tl.program_id(0), S, tile)
    voxel = n * S + first + tl.arange(0, tile.TILE)
    counted = None
    if labels.ptr is not None:
        label, ok, _ = load_labels(labels, n, first, inside, C, False, tile)
        counted = ok
    lowest = tl.full([tile.TILE], -INF, tl.float32)
    zero = tl.full([tile.TILE], 0.0, tl.float32)
    top, total = lowest, zero
    weight_sum = zero
    if logits is not None:
        for start in range(0, C, BLOCK_C):
            c = classes(start, tile)
            x = load(logits, n, first, inside, counted, c, C, tile)
            top, total = online_top_and_sum(top, total, x, c, 1.0, C)
            weight_sum += tl.sum(class_weights(weight, c, C), 0)
        _store_row(statistics, 0, voxel, inside, top)
        _store_row(statistics, 1, voxel, inside, total)
    log_total = tl.log(total)

    per_temperature = 1.0 / gaussian.temperature
    k0, k1 = load_seed(seed, gaussian.seed)
    estimated = zero  # sum_k sum_c w s
    for pair in range(0, num_samples, 2):
        plus, minus = (lowest, zero, zero, zero), (lowest, zero, zero, zero)
        for start in range(0, C, BLOCK_C):
            c = classes(start, tile)
            d = tl.reshape(noise(pair, start, voxel, k0, k1, C, tile), [BLOCK_C, tile.TILE])
            d *= exp_any(load(logvar, n, first, inside, counted, c, C, tile) * 0.5) * per_temperature
            mean = load(mu, n, first, inside, counted, c, C, tile) * per_temperature
            w = class_weights(weight, c, C)[:, None]
            a = None
            if logits is not None:
                x = load(logits, n, first, inside, counted, c, C, tile)
                log_p = (x - top[None, :]) - log_total[None, :]
                a = w * tl.where(log_p < LOWEST, LOWEST, log_p)
            elif grad_output is not None:
                a = load(grad_output, n, first, inside, counted, c, C, tile)
            plus = _fold(*plus, mean + d, a, w, c, C)
            minus = _fold(*minus, mean - d, a, w, c, C)
        estimated += _store_sample(statistics, pair, voxel, inside, *plus)
        of_minus = _store_sample(statistics, pair + 1, voxel, inside, *minus)
        estimated += tl.where(pair + 1 < num_samples, of_minus, 0.0)

    if logits is not None:
        on_label = 1.0 if weight is None else label_weights(weight, label, C)
        # A factor of 0 must not meet the infinite weight of a class that does not occur.
        mass = (1.0 - alpha) * on_label + tl.where(alpha == 0.0, 0.0, (alpha / num_samples) * estimated)
        spread = tl.where(smoothing == 0.0, 0.0, smoothing / C * weight_sum)
        _store_row(statistics, 2, voxel, inside, (1.0 - smoothing) * mass + spread)


def launch_sample_statistics(
    call: Call,
    mu: View,
    logvar: View,
    sampling: tuple[Gaussian, int, int],
    labels: Labels,
    *,
    logits: View | None = None,
    grad_output: View | None = None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Statistics | None:
    """Launch the kernel and return the statistics. Return None if one block holds all classes."""
    if call.C <= call.tile.BLOCK_C:
        return None
    voxels, (_, _, num_samples) = call.geometry.N * call.S, sampling
    rows = torch.empty((3 + 3 * (num_samples + num_samples % 2), voxels), dtype=torch.float32, device=call.like.device)
    statistics = Statistics(rows, voxels)
    call.launch(
        sample_statistics, logits, mu, logvar, grad_output, *sampling, labels, weight, statistics, call.S,
        smoothing, alpha, call.C,
    )  # fmt: skip
    return statistics
