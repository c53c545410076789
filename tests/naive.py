"""The method's formulas, one voxel and one number at a time, with nothing of calseg in them: the oracle's oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    """``eps(seed, v, c, k)``, section 6."""
    Cp = C if C <= 2 else (C + 3) // 4 * 4
    q, lane = divmod(k * Cp + c, 4)
    seed %= 2**64
    r = philox((v % 2**32, v // 2**32, q, 0), (seed % 2**32, seed // 2**32))
    a, b = (r[0], r[1]) if lane < 2 else (r[2], r[3])
    u1, u2 = ((a >> 8) + 0.5) * 2**-24, (b >> 8) * 2**-24
    return math.sqrt(-2 * math.log(u1)) * (math.sin if lane % 2 else math.cos)(2 * math.pi * u2)


def softmax(x: Sequence[float]) -> list[float]:
    e = [math.exp(value - max(x)) for value in x]
    return [value / sum(e) for value in e]


class Voxel:
    """Loss, KL and gradients of one voxel that counts: sections 2 to 4 (upstream gradients 1)."""

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
    """Section 7, voxel by voxel: ``[classes][n_bins]`` of [count, sum of confidences, hits], and NLL and Brier sums.

    ``probabilities`` is a list of rows of C, ``labels`` of classes. The edges are real numbers.
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
    """mL1-ACE of one item, per class: Barfoot et al., 2024 (hard bins) and 2025 (soft bins)."""
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
