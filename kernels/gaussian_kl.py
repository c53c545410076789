"""KL(N(mu, exp(logvar)) || prior) summed over classes, and its gradients, in one pass.

Least memory traffic: one read of mu and of logvar, and one write of each gradient.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from calseg.kernels.gaussian import kl_gradients, kl_terms, sampling_arguments, store_gradients
from calseg.kernels.launch import SOFT, Call, TileDemands
from calseg.kernels.reductions import LossArguments, finish, load_scales, load_upstream, store_loss
from calseg.kernels.softmax import exp_any
from calseg.kernels.tile import classes, load, locate


@triton.jit
def gaussian_kl(
    mu,  # [N, C, S]
    logvar,  # [N, C, S]
    gaussian,
    upstream,
    loss,  # out [N, S] or None
    partials,
    grad_mu,  # out [N, C, S] or None
    grad_logvar,  # out [N, C, S] or None
    S,
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute the KL divergence of every voxel, and its gradients."""
    n, first, inside = locate(tl.program_id(0), S, tile)
    _, up = load_upstream(upstream, load_scales(upstream, 1), n, first, inside, inside, tile)
    value = tl.full([tile.TILE], 0.0, tl.float32)
    for start in range(0, C, tile.BLOCK_C):
        c = classes(start, tile)
        mean = load(mu, n, first, inside, None, c, C, tile)
        log_variance = load(logvar, n, first, inside, None, c, C, tile)
        sigma = exp_any(log_variance * 0.5)
        value += tl.sum(tl.where((c < C)[:, None], kl_terms(gaussian, mean, log_variance, sigma), 0.0), 0)
        to_mu, to_logvar = kl_gradients(gaussian, mean, sigma, up)
        store_gradients(grad_mu, grad_logvar, to_mu, to_logvar, n, first, inside, c, C, tile)
    value = tl.where(inside, value, 0.0)
    store_loss(loss, partials, upstream, value, None, None, inside, n, first, inside, tile)
    finish(partials, upstream, 0.0, False, 1)


def tile_demands(spec: Any, tensors: Any) -> TileDemands:
    """Return the demands of the kernel on its tiles."""
    return SOFT


def launch(call: Call, spec: Any, given: LossArguments) -> None:
    """Launch the kernel."""
    gaussian, _, _ = sampling_arguments(spec.sampling, call.like.device)
    call.launch(
        gaussian_kl, given.tensors.mu, given.tensors.logvar, gaussian, given.upstream, given.loss,
        given.partials, given.gradients.mu, given.gradients.logvar, call.S, call.C,
    )  # fmt: skip
