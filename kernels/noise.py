"""Random normals on the device: the generator Philox4x32-7 and the Box-Muller transform.

calseg/backends/rng.py defines the numbers. The random words are the same on all backends. The normals agree to 5e-6 on
an NVIDIA GPU, and to a few ulp elsewhere.

One call of Philox makes the four words of one quad for one voxel. They become the normals of four classes of one
pair of samples, or of 4 / C pairs if there are C <= 2 classes. Values that depend on the voxel alone keep the shape
``[1, TILE]`` as long as possible, and values that depend on the quad alone ``[Q, 1]``. So the compiler can move them
out of the loop over samples. A quad then costs 11 products instead of 14.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda

M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(7)


@triton.jit
def load_seed(seed, seed_tensor):
    """Return the two words of the key from a number, or from a 0-d int64 tensor if one is given.

    A captured CUDA graph reads the tensor again at every replay.
    """
    if seed_tensor is not None:
        seed = tl.load(seed_tensor)
    seed = seed.to(tl.int64)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Return four random words. The counters may have any shapes that broadcast."""
    for _ in tl.static_range(ROUNDS):
        p0, p1 = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1  # each is one multiplication with a 64-bit result
        c0, c1, c2, c3 = (
            (p1 >> 32).to(tl.uint32) ^ k0 ^ c1,
            p1.to(tl.uint32),
            (p0 >> 32).to(tl.uint32) ^ k1 ^ c3,
            p0.to(tl.uint32),
        )
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1, c2, c3


@triton.constexpr_function
def has_fast_functions():
    """Return whether kernels are compiled for an NVIDIA GPU, which has instructions for logarithm, sine and cosine."""
    return is_cuda() and not triton.knobs.runtime.interpret


@triton.jit
def box_muller(a, b):
    """Return the two normals of two words: ``sqrt(-2 ln u1)`` times cosine and sine of ``2 pi u2``.

    Here u1 = ((a >> 8) + 0.5) / 2^24 and u2 = (b >> 8) / 2^24.
    """
    if has_fast_functions():
        z0, z1 = _fast_box_muller(a, b)
    else:
        z0, z1 = _box_muller(a, b)
    return z0, z1


@triton.jit
def _fast_box_muller(a, b):
    """Do as :func:`box_muller` to 5e-6, by the instructions of an NVIDIA GPU, whose absolute errors are about 2^-21."""
    n = (a >> 8).to(tl.int32).to(tl.float32)
    # Near u1 = 1 the logarithm is too small for that error. There, -2 ln(1 - w) is 2 w + w^2.
    below = 16777215.0 - n
    w = below * 5.9604644775390625e-08 + 2.98023223876953125e-08
    far = libdevice.fast_log2f(n * 5.9604644775390625e-08 + 2.98023223876953125e-08) * -1.3862943611198906
    square = tl.where(below < 65536.0, w * (w + 2.0), far)
    radius = square * tl.rsqrt(square)
    angle = (b & 0xFFFFFF00).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    return radius * libdevice.fast_cosf(angle), radius * libdevice.fast_sinf(angle)


@triton.jit
def _box_muller(a, b):
    """Do as :func:`box_muller` to a few ulp, by polynomials, as in csrc/cpu/vector_math.h.

    The functions of Triton have a slow path through local memory.
    """
    # With u1 = (1 + f) 2^e, -2 ln(u1) is -2 ln(2) e - 2 f + f^2 (1 - 2 f P(f)) for a polynomial P.
    n = (a >> 8).to(tl.int32).to(tl.float32)
    u = n + 0.5
    bits = u.to(tl.int32, bitcast=True) - 0x4B3504F3  # the bits of 2^24 sqrt(1/2)
    e = (bits >> 23).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    # From 2^23 on, n + 0.5 is rounded. Add the lost bit to f: near u1 = 1 the logarithm depends on it.
    f += ((n - u) + 0.5) * 5.9604644775390625e-08
    p = f * -1.740071989e-1 + 2.853495264e-1
    p = p * f - 2.982957404e-1
    p = p * f + 3.315517202e-1
    p = p * f - 3.992612458e-1
    p = p * f + 5.000267404e-1
    p = p * f - 6.666782154e-1
    p = p * f + 1.0
    radius = tl.sqrt(p * (f * f) + (f * -2.0 + e * -1.38629436))

    # The upper 24 bits of b are u2, in turns. Its two uppermost bits, rounded, are the number of the quadrant. The
    # other bits, read as a signed number, are the exact angle within the quadrant, in [-1/8, 1/8] of a turn.
    t = ((b << 2) & 0xFFFFFC00).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198e-10  # (pi / 2) / 2^32
    turns = b + 0x20000000
    z = t * t
    sine = z * -1.9515295891e-4 + 8.3321608736e-3
    sine = sine * z - 1.6666654611e-1
    sine = sine * z * t + t
    cosine = z * 2.443315711809948e-5 - 1.388731625493765e-3
    cosine = cosine * z + 4.166664568298827e-2
    cosine = cosine * z - 0.5
    cosine = cosine * z + 1.0
    even = (turns & 0x40000000) == 0
    c, s = tl.where(even, cosine, sine), tl.where(even, sine, cosine)
    c = tl.where(((turns + 0x40000000) & 0x80000000) != 0, -c, c)
    s = tl.where((turns & 0x80000000) != 0, -s, s)
    return radius * c, radius * s


@triton.jit
def normals(k0, k1, voxel, quad, LANE_MAJOR: tl.constexpr):
    """Return the normals ``[4 * Q, TILE]`` of the quads ``[Q]`` for the voxels ``[TILE]``.

    The normal of quad q and lane l is in row ``l * Q + q`` if LANE_MAJOR, else in row ``4 * q + l``.
    """
    voxel, quad = voxel[None, :], quad.to(tl.uint32)[:, None]
    r0, r1, r2, r3 = philox4x32(
        voxel.to(tl.uint32), (voxel >> 32).to(tl.uint32), quad, tl.full([1, 1], 0, tl.uint32), k0, k1
    )
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    z = tl.join(tl.join(z0, z1), tl.join(z2, z3))  # [Q, TILE, lane % 2, lane // 2]
    z = tl.permute(z, (3, 2, 0, 1)) if LANE_MAJOR else tl.permute(z, (0, 3, 2, 1))
    return tl.reshape(z, [4 * quad.shape[0], voxel.shape[1]])
