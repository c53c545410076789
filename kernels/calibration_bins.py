"""Calibration bins: sums per bin of confidence, and sums of the negative log-likelihood and the Brier score.

For each voxel the kernel computes the softmax, the class with the largest probability, the bin of that probability, the
negative log-likelihood and the Brier score, all in one pass.

Least memory traffic: one read of the logits or probabilities, and one of the labels.

All sums are integers, as in csrc/voxel/calibration.h: confidences, Brier scores and fractions of a nat are in fixed
point, in units of 2^-24. So the result does not depend on the order of the atomic additions.

Each voxel is one word ``[count | hits | confidence]``. If there are few bins, a program adds up the words of its tile
bin by bin, and adds each sum to memory once. If there are many bins, it does so for the highest and the lowest bin of
the tile only, which hold most voxels of a segmentation. It adds the words of the other voxels one by one.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from calseg.kernels.labels import Labels, load_labels
from calseg.kernels.launch import Call
from calseg.kernels.softmax import INF, exp_of
from calseg.kernels.tile import View, classes, load, locate, voxel_pointers
from torch import Tensor

BINS_AT_ONCE = 16  # for the top label; class-wise it is 1, because a thread then holds the sums of many classes
MOST_BINS = 64  # with more bins, voxels are added one by one

UNIT = tl.constexpr(16777216.0)  # the number 1 in fixed point
HALF_UNIT = tl.constexpr(8388608.0)  # every float32 from here on is an integer
MAX_NLL = tl.constexpr(33554432.0)  # a negative log-likelihood that is not below this number counts as infinite
# A word holds up to 2^12 voxels: 13 bits of count, 13 of hits and 37 of confidence.
HIT_SHIFT, COUNT_SHIFT = tl.constexpr(37), tl.constexpr(50)
ONE, ONE_HIT = tl.constexpr(1 << 50), tl.constexpr(1 << 37)
CONFIDENCE_BITS, HIT_BITS = tl.constexpr((1 << 37) - 1), tl.constexpr((1 << 13) - 1)
NO_FAULT = tl.constexpr(2**63 - 1)


@triton.jit
def to_units(x):
    """Return ``x``, which is in [0, 2^7), in units of 2^-24, rounded to the nearest, ties to even."""
    x = x * UNIT
    return tl.where(x < HALF_UNIT, (x + HALF_UNIT) - HALF_UNIT, x).to(tl.int32)


@triton.jit
def bin_of(confidence, n_bins, RIGHT_CLOSED: tl.constexpr):
    """Return the bin of a confidence in [0, 1].

    Edge k of the bins is the rounded number k / n_bins. The product confidence * n_bins is rounded too, so it can lie
    on the wrong side of the edge nearest to it, but of no other edge. The function compares the confidence with that
    edge.
    """
    bins = n_bins.to(tl.float32)
    nearest = tl.floor(confidence * bins + 0.5)
    edge = tl.div_rn(nearest, bins)
    if RIGHT_CLOSED:
        bin = tl.maximum(tl.where(edge < confidence, nearest, nearest - 1.0), 0.0)
    else:
        bin = tl.minimum(tl.where(confidence < edge, nearest - 1.0, nearest), bins - 1.0)
    return bin.to(tl.int32)


@triton.jit
def add_words(sums, kind, bin, n_bins, word):
    """Add words to their bins ``[kinds, n_bins, 3]``. A word that is 0 writes nothing."""
    to = sums + (kind.to(tl.int64) * n_bins + bin) * 3
    some = word != 0
    tl.atomic_add(to, word >> COUNT_SHIFT, mask=some, sem="relaxed")
    tl.atomic_add(to + 1, word & CONFIDENCE_BITS, mask=some, sem="relaxed")
    tl.atomic_add(to + 2, (word >> HIT_SHIFT) & HIT_BITS, mask=some, sem="relaxed")


@triton.jit
def add_to_bins(
    sums, kind, confidence, hit, counted, n_bins,
    RIGHT_CLOSED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add rows of confidences ``[R, TILE]`` to the sets of bins with the numbers ``kind`` ``[R]``.

    Only voxels that are ``counted`` are added. AT_ONCE bins are summed at a time. If it is 0, voxels are added one by
    one.
    """
    confidence = tl.where(counted, tl.minimum(tl.maximum(confidence, 0.0), 1.0), 0.0)
    bin = bin_of(confidence, n_bins, RIGHT_CLOSED)
    word = hit.to(tl.int64) * ONE_HIT + ONE + to_units(confidence).to(tl.int64)
    word = tl.where(counted, word, 0)
    if AT_ONCE > 0:
        for start in range(0, n_bins, AT_ONCE):
            here = start + tl.arange(0, AT_ONCE)
            here_only = bin[:, None, :] == here[None, :, None]
            add_words(sums, kind[:, None], here[None, :], n_bins, tl.sum(tl.where(here_only, word[:, None, :], 0), 2))
    else:
        highest = tl.max(bin, 1)
        add_words(sums, kind, highest, n_bins, tl.sum(tl.where(bin == highest[:, None], word, 0), 1))
        word = tl.where(bin == highest[:, None], 0, word)
        lowest = tl.min(bin, 1)
        add_words(sums, kind, lowest, n_bins, tl.sum(tl.where(bin == lowest[:, None], word, 0), 1))
        word = tl.where(bin == lowest[:, None], 0, word)
        # Flatten to one axis: of two axes, neither contiguous, Triton 3.6 spreads the classes over a warp.
        add_words(sums, tl.ravel(tl.broadcast_to(kind[:, None], bin.shape)), tl.ravel(bin), n_bins, tl.ravel(word))


@triton.jit
def report_first(fault, positions, bad):
    """Lower ``fault``, which all programs share, to the first position that is bad."""
    first = tl.min(tl.where(bad, positions, NO_FAULT), 0)
    if first != NO_FAULT:
        tl.atomic_min(fault, first, sem="relaxed")


@triton.jit
def fold_logits(top, top_class, total, squares, on_label, x, c, label, C: tl.constexpr):
    """Return the first five arguments after another block of logits.

    They are the largest logit, the first class that has it, ``sum exp(x - top)``, the sum of the squares of these
    exponentials, and the logit of the label.
    """
    x = tl.where((c < C)[:, None], x, -INF)
    block_top = tl.max(x, 0)
    block_class = tl.min(tl.where((x == block_top[None, :]) & (c < C)[:, None], c[:, None], C), 0)
    top_class = tl.where(block_top > top, block_class, top_class)
    higher = tl.maximum(top, block_top)
    shift = tl.where(higher == -INF, 0.0, higher)
    before = exp_of(top - shift)
    e = exp_of(x - shift[None, :])
    total = total * before + tl.sum(e, 0)
    squares = squares * (before * before) + tl.sum(e * e, 0)
    on_label += tl.sum(tl.where(c[:, None] == label[None, :], x, 0.0), 0)
    return higher, top_class, total, squares, on_label


@triton.jit
def fold_probabilities(top, top_class, total, squares, on_label, least, p, c, label, C: tl.constexpr):
    """Return the first six arguments after another block of probabilities.

    They are the largest probability, the first class that has it, the sum of the probabilities, the sum of squared
    errors, the probability of the label, and the smallest probability.
    """
    valid = (c < C)[:, None]
    p = tl.where(valid, p, 0.0)
    block_top = tl.max(p, 0)
    block_class = tl.min(tl.where((p == block_top[None, :]) & valid, c[:, None], C), 0)
    top_class = tl.where(block_top > top, block_class, top_class)
    is_label = c[:, None] == label[None, :]
    miss = tl.where(is_label, 1.0 - p, p)
    total += tl.sum(p, 0)
    squares += tl.sum(miss * miss, 0)
    on_label += tl.sum(tl.where(is_label, p, 0.0), 0)
    return tl.maximum(top, block_top), top_class, total, squares, on_label, tl.minimum(least, tl.min(p, 0))


@triton.jit
def class_confidences(x, top, per_total, FROM_LOGITS: tl.constexpr):
    """Return the probabilities of a block of classes."""
    return exp_of(x - top[None, :]) * per_total[None, :] if FROM_LOGITS else x


@triton.jit(do_not_specialize=["n_bins", "first_class"])
def calibration_bins(
    scores,  # [N, C, S]
    labels,  # [N, S]
    mask,  # [N, S]: 0 where a voxel does not count; or None
    sums,  # in and out [kinds, n_bins, 3]: count, confidence, hits
    totals,  # in and out [6]: whole nats, parts of a nat, Brier scores, voxels that count, with NaN, with infinite NLL
    faults,  # in and out [2]: the first voxel whose label is not a class, the first whose scores are not probabilities
    S,
    n_bins,
    first_class,  # the first class that has bins, if CLASS_WISE
    tolerance,  # the sum of probabilities may differ from 1, and a probability may lie below 0, by so much
    FROM_LOGITS: tl.constexpr,
    CLASS_WISE: tl.constexpr,
    SKIP_BACKGROUND: tl.constexpr,
    RIGHT_CLOSED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # number of bins that are summed at once, 0 if there are too many
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """Add the voxels of a tile to the sums per bin and to the totals."""
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    n, first, inside = locate(tl.program_id(0), S, tile)
    if mask is not None:
        inside = inside & (tl.load(voxel_pointers(mask, n, first, tile), mask=inside, other=0) != 0)
    label, ok, bad = load_labels(labels, n, first, inside, C, False, tile)
    position = n * S + first + tl.arange(0, tile.TILE)
    report_first(faults, position, bad)
    ok = ok & (label != 0) if SKIP_BACKGROUND else ok

    nothing = tl.full([tile.TILE], 0.0, tl.float32)
    top_class = tl.full([tile.TILE], 0, tl.int32)
    total, squares, on_label = nothing, nothing, nothing
    top = nothing - INF
    least = nothing
    c = classes(0, tile)
    x = load(scores, n, first, inside, ok, c, C, tile)
    if FROM_LOGITS:
        top, top_class, total, squares, on_label = fold_logits(
            top, top_class, total, squares, on_label, x, c, label, C
        )  # fmt: skip
        for start in range(BLOCK_C, C, BLOCK_C):
            x = load(scores, n, first, inside, ok, start + c, C, tile)
            top, top_class, total, squares, on_label = fold_logits(
                top, top_class, total, squares, on_label, x, start + c, label, C
            )  # fmt: skip
        total = tl.where(top == -INF, float("nan"), total)  # all logits are -inf, which is no distribution
    else:
        top, top_class, total, squares, on_label, least = fold_probabilities(
            top, top_class, total, squares, on_label, least, x, c, label, C
        )  # fmt: skip
        for start in range(BLOCK_C, C, BLOCK_C):
            x = load(scores, n, first, inside, ok, start + c, C, tile)
            top, top_class, total, squares, on_label, least = fold_probabilities(
                top, top_class, total, squares, on_label, least, x, start + c, label, C
            )  # fmt: skip
    binned = ok & (total == total)

    if FROM_LOGITS:
        per_total = tl.div_rn(nothing + 1.0, total)
        nll = tl.log(total) - (on_label - top)
        label_e = exp_of(on_label - top)
        others = total - label_e
        brier = ((squares - label_e * label_e) + others * others) * (per_total * per_total)
    else:
        per_total = nothing
        nll = -tl.log(tl.maximum(on_label, 0.0))
        brier = squares
        off = (tl.abs(total - 1.0) > tolerance) | (least < -tolerance)
        report_first(faults + 1, position, binned & off)
    finite = binned & (nll < MAX_NLL)
    nll = tl.where(finite, tl.maximum(nll, 0.0), 0.0)
    whole = tl.floor(nll)
    brier = tl.where(binned, tl.minimum(tl.maximum(brier, 0.0), 64.0), 0.0)
    tl.atomic_add(totals, tl.sum(whole.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(totals + 1, tl.sum(to_units(nll - whole).to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(totals + 2, tl.sum(to_units(brier).to(tl.int64), 0), sem="relaxed")
    # Count three kinds of voxels in one sum, with 20 bits for each.
    counts = ok.to(tl.int64) + ((ok & (total != total)).to(tl.int64) << 20)
    counts = tl.sum(counts + ((binned & (finite == 0)).to(tl.int64) << 40), 0)
    tl.atomic_add(totals + 3, counts & 0xFFFFF, sem="relaxed")
    if counts >> 20 != 0:
        tl.atomic_add(totals + 4, (counts >> 20) & 0xFFFFF, sem="relaxed")
        tl.atomic_add(totals + 5, counts >> 40, sem="relaxed")

    if CLASS_WISE:
        for start in range(0, C, BLOCK_C):
            if C > BLOCK_C:
                x = load(scores, n, first, inside, ok, start + c, C, tile)
            own = start + c
            counted = ((own >= first_class) & (own < C))[:, None] & binned[None, :]
            p = class_confidences(x, top, per_total, FROM_LOGITS)
            add_to_bins(
                sums, own - first_class, p, own[:, None] == label[None, :], counted, n_bins, RIGHT_CLOSED, AT_ONCE
            )  # fmt: skip
    else:
        p = per_total if FROM_LOGITS else top
        add_to_bins(
            sums, tl.arange(0, 1), p[None, :], (label == top_class)[None, :], binned[None, :], n_bins, RIGHT_CLOSED,
            AT_ONCE,
        )  # fmt: skip


def launch(
    call: Call, spec: Any, scores: View, labels: Labels, mask: View | None, sums: Tensor, totals: Tensor, faults: Tensor
) -> None:
    """Launch the kernel."""
    at_once = 1 if spec.class_wise else BINS_AT_ONCE
    if spec.n_bins > MOST_BINS:
        at_once = 0
    call.launch(
        calibration_bins, scores, labels, mask, sums, totals, faults, call.S, spec.n_bins, spec.first_class,
        spec.tolerance, spec.from_logits, spec.class_wise, spec.skip_background, spec.right_closed, at_once, call.C,
    )  # fmt: skip
