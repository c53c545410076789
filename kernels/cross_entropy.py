"""Cross-entropy with one-hot labels or given soft labels, and its gradients, in one pass.

Least memory traffic: one read of the logits and of the soft labels, and one write of each gradient. A tile stays in
registers from the read to the write. If there are too many classes for that, the kernel reads them block by block, and
does so twice.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from calseg.kernels.labels import class_weights, label_weights, load_labels, weighted
from calseg.kernels.launch import HARD, SOFT, WEIGHTED, Call, TileDemands
from calseg.kernels.overlap import (
    one_hot_slope,
    overlap_dot,
    overlap_gradient,
    overlap_slopes,
    store_class_sums,
    store_overlap,
)
from calseg.kernels.reductions import (
    LossArguments,
    finish,
    load_scales,
    load_upstream,
    store_loss,
    store_sum,
    store_sums,
)
from calseg.kernels.softmax import INF, exp_of, fine_reciprocal, online_top_and_sum, reciprocal, top_and_sum
from calseg.kernels.tile import classes, load, locate, num_tiles, store, thread_sums, voxels_inside


@triton.jit
def _log_of_product(total, tile: tl.constexpr):
    """Return numbers with the same sum as ``log(total)``, from fewer logarithms.

    Each number is the logarithm of a product over two, four or eight adjacent voxels of a thread. A total is in [1, C],
    and eight voxels are those of a thread that holds all classes, so the product cannot overflow.
    """
    VEC_S: tl.constexpr = tile.VEC_S
    TILE: tl.constexpr = tile.TILE
    if VEC_S >= 2:
        a, b = tl.split(tl.reshape(total, [TILE // 2, 2]))
        total = a * b
    if VEC_S >= 4:
        a, b = tl.split(tl.reshape(total, [TILE // 4, 2]))
        total = a * b
    if VEC_S >= 8:
        a, b = tl.split(tl.reshape(total, [TILE // 8, 2]))
        total = a * b
    return tl.log(total)


@triton.jit
def _hard_terms(x, c, label, weight, top, SMOOTHED: tl.constexpr, C: tl.constexpr):
    """Return ``d[label]`` and ``sum_c w[c] d[c]`` for a block of classes, where d = x - top."""
    d = x - top[None, :]
    label_d = tl.sum(tl.where(c[:, None] == label[None, :], d, 0.0), 0)
    weighted_d = label_d
    if SMOOTHED:
        weighted_d = tl.sum(class_weights(weight, c, C)[:, None] * d, 0)
    return label_d, weighted_d


@triton.jit
def _hidden(label, number, C: tl.constexpr):
    """Return ``label``, hidden from the compiler: it cannot know that the number of each voxel equals itself.

    Otherwise it keeps the results of the comparisons in _hard_terms() as single bits in registers, and to unpack them
    takes three times as long as to compare again. Those of two classes are few. A number that is NaN gives -1.
    """
    return tl.where(number == number, label, -1) if C > 2 else label


@triton.jit
def _one_hot(c, label):
    """Return the labels as one-hot ``[BLOCK_C, TILE]``."""
    return tl.where(c[:, None] == label[None, :], 1.0, 0.0)


@triton.jit
def _hard_gradient(
    x, c, label, weight, top, scale_e, scale_label, scale_weight, above, below, shift, SMOOTHED: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the logits of a block of classes.

    With an overlap, ``above`` and ``below`` are its slopes, and ``shift`` is what those of all classes have in common.
    """
    label = _hidden(label, scale_e, C)
    g = exp_of(x - top[None, :]) * scale_e[None, :]
    if above is not None:
        g *= one_hot_slope(above, below, label, c) + shift[None, :]
    g = tl.where(c[:, None] == label[None, :], g - scale_label[None, :], g)
    if SMOOTHED:
        g -= class_weights(weight, c, C)[:, None] * scale_weight[None, :]
    return g


@triton.jit
def _blocked_top_and_sum(logits, n, first, inside, counted, C: tl.constexpr, tile: tl.constexpr):
    """Do as :func:`calseg.kernels.softmax.top_and_sum` for more classes than a tile has."""
    top = tl.full([tile.TILE], -INF, tl.float32)
    total = tl.full([tile.TILE], 0.0, tl.float32)
    for start in range(0, C, tile.BLOCK_C):
        c = classes(start, tile)
        x = load(logits, n, first, inside, counted, c, C, tile)
        top, total = online_top_and_sum(top, total, x, c, 1.0, C)
    return top, total


@triton.jit
def _hard_factors(weight, label, smoothing, C: tl.constexpr, tile: tl.constexpr):
    """Return the factors of the loss of a voxel, which do not depend on its logits.

    They are that of the label, the sum of those of all classes, what label smoothing gives to each class times its
    weight, and the sum of the weights.
    """
    on_label, mass, spread, weight_sum = 1.0, 1.0, 0.0, 0.0
    if weight is not None:
        on_label = label_weights(weight, label, C)
        mass = on_label
    if smoothing is not None:
        w = class_weights(weight, classes(0, tile), C)
        for start in range(tile.BLOCK_C, C, tile.BLOCK_C):
            w += class_weights(weight, classes(start, tile), C)
        weight_sum = tl.sum(w, 0)
        spread = smoothing / C
        on_label = on_label * (1.0 - smoothing)
        mass = on_label + spread * weight_sum
    return on_label, mass, spread, weight_sum


@triton.jit
def _hard_loss(on_label, spread, weight_sum, total, label_d, weighted_d, ok, SMOOTHED: tl.constexpr):
    """Return the loss of every voxel, given :func:`_hard_factors` and :func:`_hard_terms`. It is 0 if not ``ok``."""
    log_total = tl.log(total)
    value = on_label * (log_total - label_d)
    if SMOOTHED:
        value += spread * (weight_sum * log_total - weighted_d)
    return tl.where(ok, value, 0.0)


@triton.jit
def hard_cross_entropy(
    logits,  # [N, C, S]
    labels,  # [N, S]
    weight,  # [C] or None
    upstream,
    loss,  # out [N, S] or None
    partials,
    grad,  # out [N, C, S] or None
    grad_overlap,  # [N, C, 2] or None
    S,
    smoothing,  # None if there is no label smoothing
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute ``-log softmax(x)[label]`` with class weights and label smoothing, and the gradient of x."""
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    SMOOTHED: tl.constexpr = smoothing is not None
    n, first, inside = locate(tl.program_id(0), S, tile)
    scales = load_scales(upstream, NUM_SUMS)
    label, ok, bad = load_labels(labels, n, first, inside, C, False, tile)
    counted = None if labels.ignore is None else ok
    c = classes(0, tile)
    if C <= BLOCK_C:
        above, below = overlap_slopes(grad_overlap, n, c, C)
        x = load(logits, n, first, inside, counted, c, C, tile)
        top, total = top_and_sum(x, c, 1.0, C)
    else:
        top, total = _blocked_top_and_sum(logits, n, first, inside, counted, C, tile)
    total = tl.where(bad, float("nan"), total)
    on_label, mass, spread, weight_sum = _hard_factors(weight, label, smoothing, C, tile)
    scale_e = total
    scale_label = total
    scale_weight = total
    if grad is not None:
        up, _ = load_upstream(upstream, scales, n, first, inside, ok, tile)
        scale_label = up * on_label
        scale_weight = up * spread
        if grad_overlap is None:
            scale_e = up * mass * reciprocal(total)
    # The probabilities of the overlap are 0 where a voxel does not count.
    if grad_overlap is not None:
        per_total = tl.where(ok, fine_reciprocal(total), 0.0)
    shift = total
    if C <= BLOCK_C:
        label_d, weighted_d = _hard_terms(x, c, label, weight, top, SMOOTHED, C)
        if grad_overlap is not None:
            p = exp_of(x - top[None, :]) * per_total[None, :]
            dot = tl.sum(p * one_hot_slope(above, below, label, c), 0)
    else:
        if grad_overlap is not None:
            dot = tl.full([tile.TILE], 0.0, tl.float32)
            for start in range(0, C, BLOCK_C):
                x = load(logits, n, first, inside, counted, start + c, C, tile)
                p = exp_of(x - top[None, :]) * per_total[None, :]
                rise, fall = overlap_slopes(grad_overlap, n, start + c, C)
                dot += tl.sum(p * one_hot_slope(rise, fall, label, start + c), 0)
    if grad_overlap is not None:
        # One factor for both gradients, which may cancel each other.
        scale_e = per_total
        shift = up * mass - dot
    if C > BLOCK_C:
        label_d = tl.full([tile.TILE], 0.0, tl.float32)
        weighted_d = label_d
        for start in range(0, C, BLOCK_C):
            x = load(logits, n, first, inside, counted, start + c, C, tile)
            a, b = _hard_terms(x, start + c, label, weight, top, SMOOTHED, C)
            label_d += a
            weighted_d += b
            if grad is not None:
                rise, fall = overlap_slopes(grad_overlap, n, start + c, C)
                g = _hard_gradient(
                    x, start + c, label, weight, top, scale_e, scale_label, scale_weight, rise, fall, shift, SMOOTHED, C
                )  # fmt: skip
                store(grad, n, first, inside, start + c, g, C, tile)

    if loss is None and weight is None and not SMOOTHED:
        if partials.ptr is not None:
            log_total = tl.sum(_log_of_product(tl.where(ok, total, 1.0), tile), 0)
            store_sums(partials, log_total - tl.sum(label_d, 0), None, ok)
    else:
        value = _hard_loss(on_label, spread, weight_sum, total, label_d, weighted_d, ok, SMOOTHED)
        store_loss(loss, partials, upstream, value, None, None, ok, n, first, inside, tile)

    if C <= BLOCK_C and grad is not None:
        g = _hard_gradient(
            x, c, label, weight, top, scale_e, scale_label, scale_weight, above, below, shift, SMOOTHED, C
        )
        store(grad, n, first, inside, c, g, C, tile)
    finish(partials, upstream, 0.0, False, NUM_SUMS)


@triton.jit(do_not_specialize=["per_item"])
def hard_overlap(
    logits,  # [N, C, S]
    labels,  # [N, S]
    weight,  # [C] or None
    partials,
    overlap,  # out [programs, C, 2]
    S,
    per_item,  # programs of a batch item
    smoothing,  # None if there is no label smoothing
    C: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute the sum of the losses of :func:`hard_cross_entropy`, and the sums of the overlap.

    A program takes several tiles of an item, one after the other. Each thread adds up what it has of them, and only the
    sums of all are added over threads. If there are more classes than a tile has, a program takes one tile.
    """
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    TILE: tl.constexpr = tile.TILE
    SUMS: tl.constexpr = TILE // (tile.VEC_S * tile.GROUPS)
    SMOOTHED: tl.constexpr = smoothing is not None
    per_item = tl.cast(per_item, tl.int32)
    n = (tl.program_id(0) // per_item).to(tl.int64)
    c = classes(0, tile)
    losses = tl.full([SUMS], 0.0, tl.float32)
    counts = tl.full([SUMS], 0, tl.int32)
    both = tl.full([BLOCK_C, SUMS], 0.0, tl.float32)
    apart = both
    for step in range(tl.program_id(0) % per_item, num_tiles(S, tile), per_item):
        first = tl.cast(step, tl.int64) * TILE
        inside = voxels_inside(first, S, tile)
        if C <= BLOCK_C:  # before the labels, which may go through shared memory
            x = load(logits, n, first, inside, None, c, C, tile)
        label, ok, bad = load_labels(labels, n, first, inside, C, False, tile)
        counted = None if labels.ignore is None else ok
        if C <= BLOCK_C:
            if labels.ignore is not None:
                x = tl.where(ok[None, :], x, 0.0)
            top, total = top_and_sum(x, c, 1.0, C)
        else:
            top, total = _blocked_top_and_sum(logits, n, first, inside, counted, C, tile)
        total = tl.where(bad, float("nan"), total)
        per_total = tl.where(ok, fine_reciprocal(total), 0.0)  # so the probabilities are 0 where a voxel does not count
        if C <= BLOCK_C:
            label_d, weighted_d = _hard_terms(x, c, label, weight, top, SMOOTHED, C)
            p = exp_of(x - top[None, :]) * per_total[None, :]
            y = _one_hot(c, _hidden(label, total, C))
            # The compiler drops the classes that only pad the tile.
            both += tl.where((c < C)[:, None], thread_sums(p + y, tile), 0.0)
            apart += tl.where((c < C)[:, None], thread_sums(tl.abs(p - y), tile), 0.0)
        else:
            label_d = tl.full([TILE], 0.0, tl.float32)
            weighted_d = label_d
            for start in range(0, C, BLOCK_C):
                x = load(logits, n, first, inside, counted, start + c, C, tile)
                a, b = _hard_terms(x, start + c, label, weight, top, SMOOTHED, C)
                label_d += a
                weighted_d += b
                p = exp_of(x - top[None, :]) * per_total[None, :]
                store_overlap(overlap, p, _one_hot(start + c, label), None, start + c, C)
        if weight is None and not SMOOTHED:
            log_total = tl.reshape(_log_of_product(tl.where(ok, total, 1.0), tile), [tile.GROUPS, SUMS])
            losses += tl.sum(log_total, 0) - thread_sums(label_d, tile)
        else:
            on_label, _, spread, weight_sum = _hard_factors(weight, label, smoothing, C, tile)
            value = _hard_loss(on_label, spread, weight_sum, total, label_d, weighted_d, ok, SMOOTHED)
            losses += thread_sums(value, tile)
        if partials.voxels is not None:
            counts += thread_sums(tl.where(per_total == 0.0, 0, 1), tile)
    store_sum(partials, 0, tl.sum(losses, 0))
    if partials.voxels is not None:
        store_sum(partials, 1, tl.sum(counts, 0).to(tl.float32))
    if C <= BLOCK_C:
        store_class_sums(overlap, both, apart, c, C)


@triton.jit
def _log_softmax(x, top, log_total):
    """Return the logarithm of the softmax of a block of classes."""
    return (x - top[None, :]) - log_total[None, :]


@triton.jit
def _soft_block(
    x, y, c, weight, top, log_total, scale_p, up, keep, spread, grad, grad_soft, overlap, grad_overlap, dot, ok, n,
    first, inside, C: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Return ``- sum_c w[c] Y[c] log p[c]`` over a block of classes, and store the results of the block."""
    log_p = _log_softmax(x, top, log_total)
    if overlap is not None:
        store_overlap(overlap, exp_of(log_p), y, ok, c, C)
    w = class_weights(weight, c, C)[:, None]
    smoothed = keep * y + spread
    share = weighted(w, smoothed)
    # Where Y is 0, the term is 0 even if log p is -inf: it is the limit of t log t.
    value = -tl.sum(tl.where((smoothed == 0.0) | (c >= C)[:, None], 0.0, share * log_p), 0)
    if grad is not None:
        g = exp_of(log_p) * scale_p[None, :] - up[None, :] * share
        if grad_overlap is not None:
            g += overlap_gradient(grad_overlap, exp_of(log_p), y, ok, dot, n, c, C)
        store(grad, n, first, inside, c, g, C, tile)
    if grad_soft is not None:
        # Where Y is 0 and log p is -inf, the term of the loss is 0, and so is its gradient.
        finite = tl.where((log_p == -INF) & (y == 0.0), 0.0, log_p)
        g = tl.where((up == 0.0)[None, :], 0.0, -(keep * up)[None, :] * w * finite)
        store(grad_soft, n, first, inside, c, g, C, tile)
    return value


@triton.jit
def soft_cross_entropy(
    logits,  # [N, C, S]
    soft,  # [N, C, S]
    labels,  # [N, S] or none: a mask, or class indices of which only the ignored ones matter
    weight,  # [C] or None
    upstream,
    loss,  # out [N, S] or None
    partials,
    grad,  # out [N, C, S] or None
    grad_soft,  # out [N, C, S] or None
    overlap,  # out [programs, C, 2] or None
    grad_overlap,  # [N, C, 2] or None
    S,
    smoothing,
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    IS_MASK: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute ``- sum_c w[c] Y[c] log softmax(x)[c]``, and the gradients of x and Y.

    ``grad`` may be the memory of ``soft``: an element of the labels is read before that of the gradient is written.
    """
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    n, first, inside = locate(tl.program_id(0), S, tile)
    scales = load_scales(upstream, NUM_SUMS)
    if labels.ptr is None:
        ok = inside
        bad = inside & False
        counted = None
    else:
        _, ok, bad = load_labels(labels, n, first, inside, C, IS_MASK, tile)
        counted = None if labels.ignore is None else ok
    keep = 1.0 - smoothing
    spread = smoothing / C
    c = classes(0, tile)
    if C <= BLOCK_C:
        x = load(logits, n, first, inside, counted, c, C, tile)
        y = load(soft, n, first, inside, counted, c, C, tile)
        top, total = top_and_sum(x, c, 1.0, C)
        mass = tl.sum(weighted(class_weights(weight, c, C)[:, None], keep * y + spread), 0)
    else:
        top = tl.full([tile.TILE], -INF, tl.float32)
        total = tl.full([tile.TILE], 0.0, tl.float32)
        mass = total
        for start in range(0, C, BLOCK_C):
            x = load(logits, n, first, inside, counted, start + c, C, tile)
            y = load(soft, n, first, inside, counted, start + c, C, tile)
            top, total = online_top_and_sum(top, total, x, start + c, 1.0, C)
            mass += tl.sum(weighted(class_weights(weight, start + c, C)[:, None], keep * y + spread), 0)
    log_total = tl.log(tl.where(bad, float("nan"), total))
    up, _ = load_upstream(upstream, scales, n, first, inside, ok, tile)
    scale_p = up * mass

    dot = tl.full([tile.TILE], 0.0, tl.float32)
    if C <= BLOCK_C:
        if grad_overlap is not None:
            dot = overlap_dot(grad_overlap, exp_of(_log_softmax(x, top, log_total)), y, n, c, C)
        value = _soft_block(
            x, y, c, weight, top, log_total, scale_p, up, keep, spread, grad, grad_soft, overlap, grad_overlap, dot, ok,
            n, first, inside, C, tile,
        )  # fmt: skip
    else:
        if grad_overlap is not None:
            for start in range(0, C, BLOCK_C):
                x = load(logits, n, first, inside, counted, start + c, C, tile)
                y = load(soft, n, first, inside, counted, start + c, C, tile)
                dot += overlap_dot(grad_overlap, exp_of(_log_softmax(x, top, log_total)), y, n, start + c, C)
        value = tl.full([tile.TILE], 0.0, tl.float32)
        for start in range(0, C, BLOCK_C):
            x = load(logits, n, first, inside, counted, start + c, C, tile)
            y = load(soft, n, first, inside, counted, start + c, C, tile)
            value += _soft_block(
                x, y, start + c, weight, top, log_total, scale_p, up, keep, spread, grad, grad_soft, overlap,
                grad_overlap, dot, ok, n, first, inside, C, tile,
            )  # fmt: skip
    value = tl.where(ok, value, 0.0)
    store_loss(loss, partials, upstream, value, None, None, ok, n, first, inside, tile)
    finish(partials, upstream, 0.0, False, NUM_SUMS)


def tile_demands(spec: Any, tensors: Any) -> TileDemands:
    """Return the demands of the kernel on its tiles."""
    if tensors.soft_labels is not None:
        return SOFT
    return WEIGHTED if spec.weight is not None and spec.label_smoothing else HARD


def launch(call: Call, spec: Any, given: LossArguments) -> None:
    """Launch the kernel for soft labels if they are among the tensors, else one of those for one-hot labels."""
    tensors, gradients = given.tensors, given.gradients
    outputs = given.upstream, given.loss, given.partials
    if tensors.soft_labels is None and given.overlap is not None:
        call.launch(
            hard_overlap, tensors.logits, given.labels, spec.weight, given.partials, given.overlap, call.S,
            call.programs // call.geometry.N, spec.label_smoothing or None, call.C,
        )  # fmt: skip
    elif tensors.soft_labels is None:
        call.launch(
            hard_cross_entropy, tensors.logits, given.labels, spec.weight, *outputs, gradients.logits,
            given.grad_overlap, call.S, spec.label_smoothing or None, call.C, given.num_sums,
        )  # fmt: skip
    else:
        is_mask = spec.labels is not None and spec.labels.is_mask
        call.launch(
            soft_cross_entropy, tensors.logits, tensors.soft_labels, given.labels, spec.weight, *outputs,
            gradients.logits, gradients.soft_labels, given.overlap, given.grad_overlap, call.S, spec.label_smoothing,
            call.C, given.num_sums, is_mask,
        )  # fmt: skip
