"""The noise contract, which defines the noise that all backends draw, in plain PyTorch.

The noise ``eps`` is a pure function of ``(seed, voxel, class, sample)``. Samples come in antithetic pairs: the noise of
sample 2p + 1 is minus that of sample 2p. The estimate from a pair stays unbiased, and the linear part of its error
cancels. Philox4x32 with 7 rounds (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011) makes random
words, and the Box-Muller transform turns them into normals. So a backward pass can draw the noise of the forward pass
again, and results do not depend on tiles or threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

PHILOX_ROUNDS = 7
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
RANK_STEP = 0x9E3779B97F4A7C15
"""Distance, modulo 2^64, between the seeds that two neighbouring ranks make of the same draw."""


def _mul_hi_lo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of a product of two 32-bit words."""
    # int64 wraps around, so the 64 bits are those of the unsigned product. The mask removes the sign bits that >>
    # shifts in.
    product = a * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox4x32-7 for a 128-bit counter and a 64-bit key.

    Every word is held in an int64 tensor.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _M0)
        hi1, lo1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def _box_muller(word_a: Tensor, word_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two normals, float64, from two 32-bit words."""
    u1 = ((word_a >> 8).double() + 0.5) * 2.0**-24
    u2 = (word_b >> 8).double() * 2.0**-24
    radius, angle = torch.sqrt(-2.0 * torch.log(u1)), 2.0 * math.pi * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _signed(word: int) -> int:
    """Return a 64-bit word as the signed number that an int64 tensor can hold."""
    return (word + 2**63) % 2**64 - 2**63


def standard_normal(
    seed: int | Tensor, num_voxels: int, num_classes: int, sample: int, *, first_voxel: int = 0, device: torch.device
) -> Tensor:
    """Return the noise of one sample, which is minus that of the sample before if ``sample`` is odd.

    Args:
        seed: 64-bit seed, an int or a 0-d int64 tensor. A negative number stands for its two's complement.
        num_voxels: number of voxels.
        num_classes: number of classes C.
        sample: index k of the sample.
        first_voxel: linear index of the first voxel over ``[N, *S]`` in row-major order.
        device: device on which the noise is made.

    Returns:
        float64 ``[C, num_voxels]``.
    """
    padded = num_classes if num_classes <= 2 else -(-num_classes // 4) * 4
    first_lane = sample // 2 * padded
    lanes = torch.arange(first_lane, first_lane + num_classes, device=device)
    first_quad, last_quad = first_lane // 4, (first_lane + num_classes - 1) // 4
    quad = torch.arange(first_quad, last_quad + 1, device=device)[:, None]
    voxel = torch.arange(first_voxel, first_voxel + num_voxels, device=device)[None, :]
    if isinstance(seed, int):
        seed = torch.tensor(_signed(seed), dtype=torch.int64, device=device)
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    r0, r1, r2, r3 = philox4x32((voxel & _MASK32, voxel >> 32, quad, zero), key)
    normals = torch.stack([*_box_muller(r0, r1), *_box_muller(r2, r3)], dim=1)  # [quads, 4, voxels]
    of_pair = normals.flatten(0, 1)[lanes - 4 * first_quad]
    return -of_pair if sample % 2 else of_pair


def is_captured(device: torch.device) -> bool:
    """Return whether work on a device is now being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def draw_seed(device: torch.device) -> Tensor:
    """Draw a 64-bit seed from the default generator of a device, as a 0-d int64 tensor on it.

    ``torch.manual_seed`` seeds the generators of all devices. On a GPU that captures a graph, every replay draws again.

    In a process of rank r of ``torch.distributed``, the seed is the drawn number plus r times :data:`RANK_STEP`. So
    processes whose generators have the same state get different seeds, and rank 0 gets that of a single process.
    """
    seed = torch.empty((), dtype=torch.int64, device=device).random_(-(2**63), None)
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return seed.add_(_signed(rank * RANK_STEP)) if rank else seed
