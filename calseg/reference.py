"""Every operation in plain PyTorch: the oracle of all backends, and the fallback where no other one runs.

Shapes: logits, mu, logvar and soft labels are ``[N, C, S]``, labels ``[N, S]``, with the spatial axes flattened into S
(:func:`calseg.functional.vls_cross_entropy` and its siblings check the arguments and flatten). Everything is
differentiable by autograd, to any order. Low precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from calseg.checks import probability_tolerance
from calseg.rng import standard_normal
from calseg.tensors import compute_dtype

UNIT = 2**24  # 1 in the fixed-point sums of calibration_bins
MAX_NLL = 2.0**25  # above, a negative log-likelihood is infinite


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """``[N, S]`` labels -> ``[N, C, S]``; a label outside the classes gives a row of zeros."""
    classes = torch.arange(num_classes, device=labels.device)[None, :, None]
    return (labels[:, None] == classes).to(dtype)


def reduce_loss(loss: Tensor, ok: Tensor, divisor: Tensor | None, reduction: str) -> Tensor:
    """Zero where ``ok`` is false; then none, sum, or sum over ``divisor`` (default: the voxels that count)."""
    loss = torch.where(ok, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (ok.sum() if divisor is None else divisor)


def weight_of_labels(weight: Tensor | None, labels: Tensor, ok: Tensor) -> Tensor | None:
    """``sum_ok weight[labels]``, the mean's divisor; None without class weights."""
    return None if weight is None else torch.where(ok, weight[torch.where(ok, labels, 0)], 0.0).sum()


def widen_counted(tensor: Tensor, ok: Tensor) -> Tensor:
    """In the compute dtype, 0 under every ignored voxel: what lies there, NaN included, never counts."""
    return torch.where(ok[:, None], tensor.to(compute_dtype(tensor.dtype)), 0.0)


def voxel_cross_entropy(logits: Tensor, distribution: Tensor, weight: Tensor | None) -> Tensor:
    """``- sum_c w[c] * distribution[c] * log softmax(logits)[c]``: ``[N, S]``."""
    log_p = torch.log_softmax(logits, 1)
    # An impossible class (logit -inf) with no probability mass adds nothing: the limit of t * log t, not NaN.
    log_p = log_p.masked_fill((distribution == 0) & (log_p == -torch.inf), 0.0)
    weighted = distribution if weight is None else distribution * weight[None, :, None]
    return -(weighted * log_p).sum(1)


def voxel_kl(mu: Tensor, logvar: Tensor, prior_mu: float, prior_logvar: float) -> Tensor:
    """``KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))`` summed over classes: ``[N, S]``."""
    prior_var = torch.exp(torch.tensor(prior_logvar, dtype=mu.dtype, device=mu.device))
    return 0.5 * (prior_logvar - logvar + (logvar.exp() + (mu - prior_mu) ** 2) / prior_var - 1).sum(1)


def logit_samples(mu: Tensor, logvar: Tensor, num_samples: int, seed: int | Tensor) -> Callable[[int], Tensor]:
    """``k -> nu_k = mu + exp(logvar / 2) * eps_k``, ``[N, C, S]``."""
    batch, classes, size = mu.shape
    sigma = (logvar / 2).exp()

    def sample(k: int) -> Tensor:
        eps = standard_normal(seed, batch * size, classes, k, device=mu.device)
        return mu + sigma * eps.view(classes, batch, size).transpose(0, 1).to(mu.dtype)

    return sample


def estimate_soft_labels(
    mu: Tensor, logvar: Tensor, num_samples: int, temperature: float, seed: int | Tensor
) -> Tensor:
    """``mean_k softmax(nu_k / temperature)``: ``[N, C, S]``."""
    sample = logit_samples(mu, logvar, num_samples, seed)
    estimate = torch.zeros_like(mu)
    for k in range(num_samples):
        estimate = estimate + torch.softmax(sample(k) / temperature, 1)
    return estimate / num_samples


def blend_soft_labels(estimate: Tensor, labels: Tensor, alpha: float, ignore_index: int) -> Tensor:
    """``(1 - alpha) * onehot(labels) + alpha * estimate``; zeros where the label is ignored."""
    blended = (1 - alpha) * one_hot(labels, estimate.shape[1], estimate.dtype) + alpha * estimate
    return torch.where((labels != ignore_index)[:, None], blended, 0.0)


def smooth_labels(distribution: Tensor, label_smoothing: float) -> Tensor:
    """``(1 - label_smoothing) * distribution + label_smoothing / C``."""
    return (1 - label_smoothing) * distribution + label_smoothing / distribution.shape[1]


def soft_cross_entropy(
    logits: Tensor,
    soft_target: Tensor,
    ignored: Tensor | None,
    weight: Tensor | None,
    *,
    label_smoothing: float,
    reduction: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Cross-entropy against probabilities; the mean is over the voxels that are not ``ignored``."""
    ok = torch.ones_like(logits[:, 0], dtype=torch.bool) if ignored is None else ~ignored
    logits = widen_counted(logits, ok)
    distribution = smooth_labels(widen_counted(soft_target, ok).to(logits.dtype), label_smoothing)
    weight = None if weight is None else weight.to(logits.dtype)
    return reduce_loss(voxel_cross_entropy(logits, distribution, weight), ok, None, reduction).to(out_dtype)


def vls_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    soft_labels: Tensor | None,
    weight: Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    alpha: float,
    temperature: float,
    num_samples: int,
    beta: float,
    prior_mu: float,
    prior_logvar: float,
    seed: int | Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Cross-entropy on hard, given or sampled soft labels, plus ``beta`` times the KL term."""
    labels = labels.long()
    ok = labels != ignore_index
    logits = widen_counted(logits, ok)
    weight = None if weight is None else weight.to(logits.dtype)
    kl = None
    if mu is not None and logvar is not None:
        mu, logvar = widen_counted(mu, ok).to(logits.dtype), widen_counted(logvar, ok).to(logits.dtype)
        estimate = estimate_soft_labels(mu, logvar, num_samples, temperature, seed) if alpha else mu.new_zeros(())
        distribution = blend_soft_labels(estimate.expand_as(mu), labels, alpha, ignore_index)
        kl = voxel_kl(mu, logvar, prior_mu, prior_logvar) if beta else None
    elif soft_labels is not None:
        distribution = widen_counted(soft_labels, ok).to(logits.dtype)
    else:
        distribution = one_hot(labels, logits.shape[1], logits.dtype)
    loss = voxel_cross_entropy(logits, smooth_labels(distribution, label_smoothing), weight)
    result = reduce_loss(loss, ok, weight_of_labels(weight, labels, ok), reduction)
    if kl is not None:
        result = result + beta * reduce_loss(kl, ok, None, reduction)
    return result.to(out_dtype)


def vls_elbo(
    mu: Tensor,
    logvar: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    *,
    num_samples: int,
    beta: float,
    prior_mu: float,
    prior_logvar: float,
    ignore_index: int,
    reduction: str,
    seed: int | Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """``-(1/m) sum_k w[y] * log softmax(nu_k)[y] + beta * KL``."""
    labels = labels.long()
    ok = labels != ignore_index
    mu = widen_counted(mu, ok)
    logvar = widen_counted(logvar, ok).to(mu.dtype)
    weight = None if weight is None else weight.to(mu.dtype)
    target = one_hot(labels, mu.shape[1], mu.dtype)
    sample = logit_samples(mu, logvar, num_samples, seed)
    loss = torch.zeros_like(mu[:, 0])
    for k in range(num_samples):
        loss = loss + voxel_cross_entropy(sample(k), target, weight) / num_samples
    result = reduce_loss(loss, ok, weight_of_labels(weight, labels, ok), reduction)
    if beta:
        result = result + beta * reduce_loss(voxel_kl(mu, logvar, prior_mu, prior_logvar), ok, None, reduction)
    return result.to(out_dtype)


def sample_soft_labels(
    mu: Tensor,
    logvar: Tensor,
    labels: Tensor | None,
    *,
    num_samples: int,
    temperature: float,
    alpha: float,
    ignore_index: int,
    seed: int | Tensor,
) -> Tensor:
    """The estimate ``mean_k softmax(nu_k / temperature)``, blended with ``labels`` where they are given."""
    ok = torch.ones_like(mu[:, 0], dtype=torch.bool)
    if labels is not None:
        labels = labels.long()
        ok = labels != ignore_index
    wide = widen_counted(mu, ok)
    estimate = estimate_soft_labels(wide, widen_counted(logvar, ok).to(wide.dtype), num_samples, temperature, seed)
    if labels is not None:
        estimate = blend_soft_labels(estimate, labels, alpha, ignore_index)
    return estimate.to(mu.dtype)


def accumulate_soft_labels(
    logit_maps: Iterable[Tensor], labels: Tensor | None, *, temperature: float, alpha: float, ignore_index: int
) -> Tensor:
    """The mean over the maps of ``softmax(nu_k / temperature)``, blended with ``labels`` where they are given."""
    total, count = torch.zeros((), device="cpu"), 0
    labels = None if labels is None else labels.long()
    for count, logits in enumerate(logit_maps, 1):
        ok = torch.ones_like(logits[:, 0], dtype=torch.bool) if labels is None else labels != ignore_index
        total = total + torch.softmax(widen_counted(logits, ok) / temperature, 1)
    if labels is None:
        return total / count
    return blend_soft_labels(total / count, labels, alpha, ignore_index)


def gaussian_kl(
    mu: Tensor, logvar: Tensor, *, prior_mu: float, prior_logvar: float, reduction: str, out_dtype: torch.dtype
) -> Tensor:
    """``KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))`` summed over classes."""
    ok = torch.ones_like(mu[:, 0], dtype=torch.bool)
    mu = widen_counted(mu, ok)
    kl = voxel_kl(mu, widen_counted(logvar, ok).to(mu.dtype), prior_mu, prior_logvar)
    return reduce_loss(kl, ok, None, reduction).to(out_dtype)


def confidence_bins(confidence: Tensor, n_bins: int, *, right_closed: bool = False) -> Tensor:
    """The bin of confidences in [0, 1]: ``[b / n_bins, (b + 1) / n_bins)``, 1 in the last; or the other way round."""
    edges = (torch.arange(1, n_bins, dtype=confidence.dtype, device="cpu") / n_bins).to(confidence.device)
    return torch.bucketize(confidence.contiguous(), edges, right=not right_closed)


def calibration_bins(
    scores: Tensor,
    labels: Tensor,
    counted: Tensor,
    *,
    n_bins: int,
    from_logits: bool,
    first_class: int | None,
    right_closed: bool,
) -> tuple[Tensor, Tensor, tuple[float, float, int] | None]:
    """Counts, confidences and hits ``[N, kinds, n_bins, 3]``; whole nats, their rest, Brier score, voxels that count,
    those with NaN and those with infinite NLL ``[N, 6]``; and the first voxel whose scores are no probabilities, if
    any, as (sum, smallest, position).

    ``counted`` is ``[N, S]``; ``first_class`` the first class with bins of its own, None for top-label bins.
    """
    batch, classes, _ = scores.shape
    x = widen_counted(scores, counted)
    p = torch.softmax(x, 1) if from_logits else x
    is_nan = p.sum(1).isnan()
    ok = counted & ~is_nan
    if not from_logits:
        total, least, tolerance = p.sum(1), p.amin(1), probability_tolerance(scores.dtype)
        bad = ok & (((total - 1).abs() > tolerance) | (least < -tolerance))
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            return total, least, (float(total.flatten()[at]), float(least.flatten()[at]), at)

    truth = torch.where(ok, labels, 0)[:, None]
    if first_class is None:
        top = x.argmax(1, keepdim=True)  # the first maximum
        confidence, hit = p.gather(1, top), top == truth
    else:
        confidence = p[:, first_class:]
        hit = truth == torch.arange(first_class, classes, device=p.device)[None, :, None]
    confidence = confidence.clamp(0, 1).contiguous()
    bin = confidence_bins(confidence, n_bins, right_closed=right_closed)

    kinds = confidence.shape[1]
    row = torch.arange(batch * kinds, device=p.device).view(batch, kinds, 1)
    inside = ok[:, None].expand_as(bin)
    index = (row * n_bins + bin)[inside]
    sums = torch.zeros(batch * kinds * n_bins, 3, dtype=torch.int64, device=p.device)
    for column, values in enumerate((torch.ones_like(bin), (confidence * UNIT).round(), hit)):
        sums[:, column].index_add_(0, index, values[inside].long())

    log_p = torch.log_softmax(x, 1) if from_logits else x.clamp(min=0).log()
    nll = -torch.where(ok, log_p.gather(1, truth)[:, 0], 0.0)
    infinite = nll > MAX_NLL
    nll = nll.clamp(min=0).masked_fill(infinite, 0.0)
    brier = torch.where(ok, (p - one_hot(truth[:, 0], classes, p.dtype)).square().sum(1), 0.0)
    whole, rest = nll.floor(), (nll - nll.floor()) * UNIT
    totals = (whole, rest.round(), (brier * UNIT).round(), counted, counted & is_nan, infinite)
    return sums.view(batch, kinds, n_bins, 3), torch.stack([each.long().sum(1) for each in totals], 1), None


def ace_bins(
    logits: Tensor, labels: Tensor, *, n_bins: int, soft: bool, first_class: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, confidences and hits of every bin, each ``[N, kinds, n_bins]``.

    Hard bins hold the voxels whose confidence lies in them; soft ones share a voxel between the two bins whose centres
    are nearest, in proportion to the distance (outside of the outermost centres there is one).
    """
    labels = labels.long()
    ok = labels != ignore_index
    p = torch.softmax(widen_counted(logits, ok), 1)[:, first_class:]
    hit = one_hot(labels, logits.shape[1], p.dtype)[:, first_class:]
    if soft:
        place = (p * n_bins - 0.5).clamp(0, n_bins - 1).nan_to_num(0.0)  # a NaN reaches the loss through p
        lower = place.detach().floor().long()
        upper = (lower + 1).clamp(max=n_bins - 1)
        shares = [(lower, 1 - (place - lower)), (upper, place - lower)]
    else:
        shares = [(confidence_bins(p.detach(), n_bins), torch.ones_like(p))]
    empty = p.new_zeros(*p.shape[:2], n_bins)
    mass = confidence = hits = empty
    for bin, share in shares:
        share = share * ok[:, None]
        mass = mass.scatter_add(2, bin, share)
        confidence = confidence.scatter_add(2, bin, share * p)
        hits = hits.scatter_add(2, bin, share * hit)
    return mass, confidence, hits


def ace_from_bins(
    mass: Tensor,
    confidence: Tensor,
    hits: Tensor,
    weight: Tensor | None,
    *,
    empty_weight: float,
    ignore_empty_classes: bool,
    reduction: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Per item and class the mean of |confidence - accuracy| over the bins that are not empty, ``[N, kinds]``; reduced.

    A bin is empty below a mass of ``empty_weight``. A class that no label has counts 0 if ``ignore_empty_classes``.
    """
    filled = ~((mass == 0) | (mass < empty_weight))  # a NaN is not empty: it reaches the loss
    gap = torch.where(filled, (confidence - hits).abs() / torch.where(filled, mass, 1.0), 0.0)
    error = gap.sum(-1) / filled.sum(-1).clamp(min=1)
    if ignore_empty_classes:
        error = torch.where(hits.sum(-1) > 0, error, 0.0)
    if weight is not None:
        error = error * weight.to(error.dtype)[-error.shape[1] :]
    return {"none": error, "mean": error.mean(), "sum": error.sum()}[reduction].to(out_dtype)
