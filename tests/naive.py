"""The formulas of the method, written without calseg: for single numbers, and for tensors with autograd."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

M32 = 0xFFFFFFFF


def philox(counter: Sequence[int], key: Sequence[int], rounds: int = 7) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & M32, (p0 >> 32) ^ c3 ^ k1, p0 & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def normal(seed: int, v: int, c: int, k: int, C: int) -> float:
    """Return the noise ``eps(seed, v, c, k)``."""
    Cp = C if C <= 2 else (C + 3) // 4 * 4
    pair, sign = k // 2, -1 if k % 2 else 1
    q, lane = divmod(pair * Cp + c, 4)
    seed %= 2**64
    r = philox((v % 2**32, v // 2**32, q, 0), (seed % 2**32, seed // 2**32))
    a, b = (r[0], r[1]) if lane < 2 else (r[2], r[3])
    u1, u2 = ((a >> 8) + 0.5) * 2**-24, (b >> 8) * 2**-24
    return sign * math.sqrt(-2 * math.log(u1)) * (math.sin if lane % 2 else math.cos)(2 * math.pi * u2)


def softmax(x: Sequence[float]) -> list[float]:
    e = [math.exp(value - max(x)) for value in x]
    return [value / sum(e) for value in e]


class Voxel:
    """Loss, KL term and gradients of one voxel that counts, for an upstream gradient of 1."""

    def __init__(
        self, x, y, mu, logvar, v, *, weight=None, label_smoothing=0.0, alpha=0.1, temperature=1.0, num_samples=4,
        beta=1.0, prior_mu=0.0, prior_logvar=0.0, seed=0,
    ):  # fmt: skip
        C, m, tau, ls = len(mu), num_samples, temperature, label_smoothing
        classes = range(C)
        w = weight or [1.0] * C
        sigma = [math.exp(value / 2) for value in logvar]
        eps = [[normal(seed, v, c, k, C) for c in classes] for k in range(m)]
        nu = [[mu[c] + sigma[c] * eps[k][c] for c in classes] for k in range(m)]
        s = [softmax([value / tau for value in nu[k]]) for k in range(m)]
        self.estimate = [sum(s[k][c] for k in range(m)) / m for c in classes]
        self.soft = [(1 - alpha) * (c == y) + alpha * self.estimate[c] for c in classes]
        Yt = [(1 - ls) * self.soft[c] + ls / C for c in classes]
        p = softmax(x)
        self.loss = -sum(w[c] * Yt[c] * math.log(p[c]) for c in classes)
        plv, pvar = prior_logvar, math.exp(prior_logvar)
        self.kl = 0.5 * sum(
            plv - logvar[c] + (math.exp(logvar[c]) + (mu[c] - prior_mu) ** 2) / pvar - 1 for c in classes
        )
        self.elbo = -sum(w[y] * math.log(softmax(nu[k])[y]) for k in range(m)) / m
        W = sum(w[c] * Yt[c] for c in classes)
        a = [-(1 - ls) * alpha * w[c] * math.log(p[c]) for c in classes]
        dnu = [[s[k][c] / (m * tau) * (a[c] - sum(a[j] * s[k][j] for j in classes)) for c in classes] for k in range(m)]
        self.grad_x = [p[j] * W - w[j] * Yt[j] for j in classes]
        self.grad_mu = [sum(dnu[k][c] for k in range(m)) + beta * (mu[c] - prior_mu) / pvar for c in classes]
        self.grad_logvar = [
            sum(dnu[k][c] * sigma[c] * eps[k][c] / 2 for k in range(m)) + beta * 0.5 * (math.exp(logvar[c]) / pvar - 1)
            for c in classes
        ]


def calibration_sums(probabilities, labels, n_bins, *, class_wise=False, first_class=0, right_closed=False):
    """Return ``[classes][n_bins]`` of [count, sum of confidences, hits], and the sums of NLL and Brier score.

    ``probabilities`` is a list of rows of C numbers, and ``labels`` a list of classes. The edges are real numbers.
    """
    C = len(probabilities[0])
    kinds = range(first_class, C) if class_wise else range(1)
    sums = [[[0, 0.0, 0] for _ in range(n_bins)] for _ in kinds]
    nll = brier = 0.0
    for p, y in zip(probabilities, labels, strict=True):
        for row, c in enumerate(kinds):
            if not class_wise:
                c = p.index(max(p))
            b = math.ceil(p[c] * n_bins) - 1 if right_closed else math.floor(p[c] * n_bins)
            cell = sums[row][min(max(b, 0), n_bins - 1)]
            cell[0] += 1
            cell[1] += p[c]
            cell[2] += c == y
        nll -= math.log(p[y])
        brier += sum((p[c] - (c == y)) ** 2 for c in range(C))
    return sums, nll, brier


def average_calibration_error(
    probabilities, labels, n_bins, *, soft=False, empty_weight=0.01, ignore_empty_classes=True
):  # fmt: skip
    """Return mL1-ACE of one item, per class: Barfoot et al., 2024 (hard bins) and 2025 (soft bins)."""
    errors = []
    for c in range(len(probabilities[0])):
        bins = [[0.0, 0.0, 0.0] for _ in range(n_bins)]
        for row, y in zip(probabilities, labels, strict=True):
            p, hit = row[c], y == c
            if soft:
                centres = [(b + 0.5) / n_bins for b in range(n_bins)]
                shares = [max(0.0, 1 - abs(p - centre) * n_bins) for centre in centres]
                if not centres[0] <= p <= centres[-1]:
                    shares = [float(b == (0 if p < 0.5 else n_bins - 1)) for b in range(n_bins)]
            else:
                shares = [float(b == min(int(p * n_bins), n_bins - 1)) for b in range(n_bins)]
            for sums, share in zip(bins, shares, strict=True):
                sums[0] += share
                sums[1] += share * p
                sums[2] += share * hit
        gaps = [abs(p - hits) / mass for mass, p, hits in bins if mass > 0 and (mass >= empty_weight or not soft)]
        counted = gaps and (c in labels or not ignore_empty_classes)
        errors.append(sum(gaps) / len(gaps) if counted else 0.0)
    return errors


# ---- the same for tensors in float64: the oracle of tests/operations.py ----
# Inside the functions, scores are rows [voxels, C], and voxels are numbered in row-major order over [N, *S].

UNIT = 2**24  # the number 1 in fixed point


@functools.lru_cache(maxsize=256)
def normals(seed: int, voxels: int, C: int, k: int) -> Tensor:
    """Return ``eps(seed, v, c, k)`` of the first ``voxels`` voxels, ``[voxels, C]``."""
    Cp = C if C <= 2 else (C + 3) // 4 * 4
    key, v = (seed % 2**32, seed % 2**64 // 2**32), np.arange(voxels, dtype=np.uint64)
    pair, sign = k // 2, -1 if k % 2 else 1
    words = {q: philox((v & M32, v >> 32, q, 0), key) for q in range(pair * Cp // 4, (pair * Cp + C - 1) // 4 + 1)}
    eps = np.empty((voxels, C))
    for c in range(C):
        q, lane = divmod(pair * Cp + c, 4)
        a, b = words[q][:2] if lane < 2 else words[q][2:]
        u1, u2 = ((a >> 8) + 0.5) * 2**-24, (b >> 8) * 2**-24
        eps[:, c] = sign * np.sqrt(-2 * np.log(u1)) * (np.sin if lane % 2 else np.cos)(2 * np.pi * u2)
    return torch.from_numpy(eps)


def rows(scores: Tensor) -> Tensor:
    """Return scores ``[C]``, ``[N, C]`` or ``[N, C, *S]`` as ``[voxels, C]``."""
    return scores[None] if scores.dim() == 1 else scores.movedim(1, -1).flatten(0, -2)


def from_rows(values: Tensor, like: Tensor) -> Tensor:
    """Return ``[voxels, C]`` in the shape of ``like``."""
    if like.dim() == 1:
        return values[0]
    return values.view(like.shape[:1] + like.shape[2:] + like.shape[1:2]).movedim(-1, 1)


def reduce(per_voxel: Tensor, counted: Tensor, divisor: Tensor, reduction: str, like: Tensor) -> Tensor:
    per_voxel = per_voxel.where(counted, 0.0)
    if reduction == "none":
        return per_voxel.view(like.shape[:1] + like.shape[2:] if like.dim() > 1 else ())
    return per_voxel.sum() / (divisor if reduction == "mean" else 1.0)


def cross_entropy(x: Tensor, soft: Tensor, weight: Tensor, label_smoothing: float) -> Tensor:
    soft = (1 - label_smoothing) * soft + label_smoothing / x.shape[1]
    return -(weight * soft * torch.log_softmax(x, 1)).sum(1)


def estimate(mu: Tensor, logvar: Tensor, num_samples: int, temperature: float, seed: int) -> Tensor:
    sigma = (logvar / 2).exp()
    samples = [(mu + sigma * normals(seed, *mu.shape, k)) / temperature for k in range(num_samples)]
    return torch.stack([torch.softmax(nu, 1) for nu in samples]).mean(0)


def kl_of_rows(mu: Tensor, logvar: Tensor, prior_mu: float, prior_logvar: float) -> Tensor:
    prior = Normal(torch.full_like(mu, prior_mu), torch.full_like(mu, prior_logvar / 2).exp())
    return kl_divergence(Normal(mu, (logvar / 2).exp()), prior).sum(1)


def counted_rows(target: Tensor, ignore_index: int, *scores: Tensor) -> tuple[Tensor, ...]:
    """Return which voxels count, their classes, and the scores as rows, which are 0 where a voxel is ignored."""
    labels = target.long().reshape(-1)
    counted = labels != ignore_index
    return counted, labels.where(counted, 0), *(rows(t).where(counted[:, None], 0.0) for t in scores)


def blended(estimate: Tensor, counted: Tensor, labels: Tensor, alpha: float) -> Tensor:
    hot = F.one_hot(labels, estimate.shape[1]).double()
    return ((1 - alpha) * hot + alpha * estimate).where(counted[:, None], 0.0)


def vls_cross_entropy(
    input, target, weight=None, *, mu=None, logvar=None, soft_labels=None, ignore_index=-100, reduction="mean",
    label_smoothing=0.0, alpha=0.1, temperature=1.0, num_samples=4, beta=1.0, prior_mu=0.0, prior_logvar=0.0, seed=0,
):  # fmt: skip
    """Return the loss with ``mu, logvar`` or ``soft_labels``, one of which must be given."""
    w = input.new_ones(rows(input).shape[1]) if weight is None else weight
    if soft_labels is not None:
        counted, labels, x, soft = counted_rows(target, ignore_index, input, soft_labels)
    else:
        counted, labels, x, m, v = counted_rows(target, ignore_index, input, mu, logvar)
        soft = blended(estimate(m, v, num_samples, temperature, seed), counted, labels, alpha)
    loss = cross_entropy(x, soft, w, label_smoothing)
    loss = reduce(loss, counted, w[labels].where(counted, 0.0).sum(), reduction, input)
    if soft_labels is not None:
        return loss
    kl = kl_of_rows(m, v, prior_mu, prior_logvar)
    return loss + beta * reduce(kl, counted, counted.sum(), reduction, input)


def vls_dice_cross_entropy(
    input, target, weight=None, *, dice_weight=1.0, ce_weight=1.0, include_background=False, batch_dice=False,
    smooth=1e-5, dice_class_weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0, mu=None, logvar=None,
    soft_labels=None, alpha=0.1, temperature=1.0, num_samples=4, seed=0, scale=1.0, **prior,
):  # fmt: skip
    """Return the loss with one-hot labels, class probabilities, or the labels of :func:`vls_cross_entropy`."""
    items, C = input.shape[0] if input.dim() > 2 else 1, rows(input).shape[1]
    if target.is_floating_point():
        counted, soft = torch.ones(len(rows(input)), dtype=torch.bool), rows(target)
        loss = F.cross_entropy(input, target, weight, label_smoothing=label_smoothing, reduction=reduction)
    elif mu is None and soft_labels is None:
        counted, labels = counted_rows(target, ignore_index)
        soft = F.one_hot(labels, C).double()
        loss = F.cross_entropy(
            input, target.long(), weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction,
        )  # fmt: skip
    else:
        sampling = {"alpha": alpha, "temperature": temperature, "num_samples": num_samples, "seed": seed}
        loss = vls_cross_entropy(
            input, target, weight, mu=mu, logvar=logvar, soft_labels=soft_labels, ignore_index=ignore_index,
            label_smoothing=label_smoothing, reduction=reduction, **sampling, **prior,
        )  # fmt: skip
        if soft_labels is None:
            soft_labels = sample_soft_labels(mu, logvar, target, ignore_index=ignore_index, **sampling)
        counted, _, soft = counted_rows(target, ignore_index, soft_labels)
    p = torch.softmax(rows(input), 1)
    if not counted.any():
        return input.sum() * 0.0
    p, soft = (t.where(counted[:, None], 0.0).view(items, -1, C) for t in (p, soft.detach()))
    axes = (0, 1) if batch_dice else 1
    mass, difference = (p + soft).sum(axes), (p - soft).abs().sum(axes)
    numerator, denominator = smooth if isinstance(smooth, tuple) else (smooth, smooth)
    dice = 1 - (mass - difference + numerator) / (mass + denominator)
    if dice_class_weight is not None:
        dice = dice * dice_class_weight
    dice = dice[..., 0 if include_background else 1 :]
    dice = dice.mean() if reduction == "mean" else dice.sum()
    return scale * (dice_weight * dice + (ce_weight * loss if ce_weight else 0.0))


def soft_cross_entropy(input, soft_target, weight=None, *, ignore_mask=None, label_smoothing=0.0, reduction="mean"):
    w = input.new_ones(rows(input).shape[1]) if weight is None else weight
    mask = torch.zeros(len(rows(input)), dtype=torch.int64) if ignore_mask is None else ignore_mask.long()
    counted, _, x, soft = counted_rows(mask, 1, input, soft_target)
    return reduce(cross_entropy(x, soft, w, label_smoothing), counted, counted.sum(), reduction, input)


def vls_elbo(
    mu, logvar, target, weight=None, *, num_samples=4, beta=1.0, prior_mu=0.0, prior_logvar=0.0, ignore_index=-100,
    reduction="mean", seed=0,
):  # fmt: skip
    counted, labels, m, v = counted_rows(target, ignore_index, mu, logvar)
    w = mu.new_ones(m.shape[1]) if weight is None else weight
    sigma, hot = (v / 2).exp(), F.one_hot(labels, m.shape[1]).double()
    samples = [cross_entropy(m + sigma * normals(seed, *m.shape, k), hot, w, 0.0) for k in range(num_samples)]
    loss = reduce(sum(samples) / num_samples, counted, w[labels].where(counted, 0.0).sum(), reduction, mu)
    return loss + beta * reduce(kl_of_rows(m, v, prior_mu, prior_logvar), counted, counted.sum(), reduction, mu)


def gaussian_kl(mu, logvar, prior_mu=0.0, prior_logvar=0.0, reduction="mean"):
    kl = kl_of_rows(rows(mu), rows(logvar), prior_mu, prior_logvar)
    every = torch.ones_like(kl, dtype=torch.bool)
    return reduce(kl, every, every.sum(), reduction, mu)


def sample_soft_labels(
    mu, logvar, target=None, *, num_samples=4, temperature=1.0, alpha=0.1, ignore_index=-100, seed=0
):  # fmt: skip
    if target is None:
        return from_rows(estimate(rows(mu), rows(logvar), num_samples, temperature, seed), mu)
    counted, labels, m, v = counted_rows(target, ignore_index, mu, logvar)
    return from_rows(blended(estimate(m, v, num_samples, temperature, seed), counted, labels, alpha), mu)


def accumulate_soft_labels(maps, target=None, *, temperature=1.0, alpha=0.1, ignore_index=-100):
    if target is None:
        return from_rows(torch.stack([torch.softmax(rows(m) / temperature, 1) for m in maps]).mean(0), maps[0])
    counted, labels, *nu = counted_rows(target, ignore_index, *maps)
    mean = torch.stack([torch.softmax(n / temperature, 1) for n in nu]).mean(0)
    return from_rows(blended(mean, counted, labels, alpha), maps[0])


def ace_loss(
    input, target, weight=None, *, n_bins=20, binning="hard", include_background=True, ignore_empty_classes=True,
    empty_weight=0.01, ignore_index=-100, reduction="mean",
):  # fmt: skip
    """Return :func:`average_calibration_error` of every item, reduced.

    One array holds the share of every voxel in every bin.
    """
    items = input[None] if input.dim() == 1 else input.t()[None] if input.dim() == 2 else input.flatten(2)
    items = items.unsqueeze(-1) if items.dim() == 2 else items
    counted, labels = target != ignore_index, target.long()
    counted, labels = (t.reshape(len(items), 1, items.shape[2]) for t in (counted, labels))
    p = torch.softmax(items.where(counted, 0.0), 1)
    hit = (labels == torch.arange(p.shape[1])[None, :, None]).double()
    if binning == "soft":
        place = (p * n_bins - 0.5).clamp(0, n_bins - 1)
        shares = (1 - (place[..., None] - torch.arange(n_bins)).abs()).clamp(min=0)
    else:
        shares = F.one_hot((p.detach() * n_bins).long().clamp(max=n_bins - 1), n_bins).double()
    shares = shares.where(counted[..., None], 0.0)
    mass, gap = shares.sum(2), (shares * (p - hit)[..., None]).sum(2).abs()
    filled = (mass > 0) & ((mass >= empty_weight) | (binning == "hard"))
    errors = (gap / mass.where(filled, 1.0)).where(filled, 0.0).sum(-1) / filled.sum(-1).clamp(min=1)
    if ignore_empty_classes:
        errors = errors.where(hit.where(counted, 0.0).sum(-1) > 0, 0.0)
    errors = (errors if weight is None else errors * weight)[:, 0 if include_background else 1 :]
    return {"none": errors, "mean": errors.mean(), "sum": errors.sum()}[reduction]


def calibration_bins(
    input, target, *, n_bins=15, from_logits=True, class_wise=False, include_background=True, ignore_index=-100
):  # fmt: skip
    """Return counts, confidences and hits of the bins, then sums of NLL and Brier score, and number of voxels."""
    counted, labels, x = counted_rows(target, ignore_index, input)
    first = 0 if include_background else 1
    if not class_wise:
        counted = counted & (labels >= first)
    p, labels = (torch.softmax(x, 1) if from_logits else x)[counted], labels[counted]
    hot = F.one_hot(labels, p.shape[1]).double()
    confidence, top = p.max(1, keepdim=True)
    hits = hot.gather(1, top)
    if class_wise:
        confidence, hits = p[:, first:], hot[:, first:]
    bins = F.one_hot((confidence * n_bins).long().clamp(max=n_bins - 1), n_bins).double()  # [voxels, kinds, bins]
    sums = [bins.sum(0), (bins * confidence[..., None]).sum(0), (bins * hits[..., None]).sum(0)]
    totals = [-p.gather(1, labels[:, None]).log().sum(), (p - hot).square().sum(), torch.tensor(float(len(p)))]
    return torch.cat([t.reshape(-1).double() for t in (*sums, *totals)])
