"""Every operation in plain PyTorch: the oracle of all backends, and the fallback where no other one runs.

The formulas come first. Their tensors are ``[N, C, S]``, labels ``[N, S]``, with the spatial axes flattened into S. The
functions of specs and tensors follow, which every backend has. Everything is differentiable by autograd, to any order.
Low precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calseg.backends.choice import is_transformed
from calseg.backends.rng import standard_normal
from calseg.checks import check_classes, probability_error
from calseg.operations import (
    UNIT,
    AccumulateSpec,
    AceSpec,
    BinsSpec,
    BlendSpec,
    GaussianTensors,
    Labels,
    LossSpec,
    LossTensors,
    SampleSpec,
    Sampling,
)
from calseg.tensors import compute_dtype, flat, flat_voxels, unflat, voxel_shape

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


def nan_where_no_class(loss: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """NaN for a voxel whose label is no class; one that is ignored is taken out later."""
    return loss.masked_fill((labels < 0) | (labels >= num_classes), torch.nan)


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


def voxel_kl(mu: Tensor, logvar: Tensor, sampling: Sampling) -> Tensor:
    """``KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))`` summed over classes: ``[N, S]``."""
    prior_mu, prior_logvar = sampling.prior_mu, sampling.prior_logvar
    prior_var = torch.exp(torch.tensor(prior_logvar, dtype=mu.dtype, device=mu.device))
    return 0.5 * (prior_logvar - logvar + (logvar.exp() + (mu - prior_mu) ** 2) / prior_var - 1).sum(1)


def logit_samples(mu: Tensor, logvar: Tensor, seed: int | Tensor) -> Callable[[int], Tensor]:
    """``k -> nu_k = mu + exp(logvar / 2) * eps_k``, ``[N, C, S]``."""
    batch, classes, size = mu.shape
    sigma = (logvar / 2).exp()

    def sample(k: int) -> Tensor:
        eps = standard_normal(seed, batch * size, classes, k, device=mu.device)
        return mu + sigma * eps.view(classes, batch, size).transpose(0, 1).to(mu.dtype)

    return sample


def estimate_soft_labels(mu: Tensor, logvar: Tensor, sampling: Sampling) -> Tensor:
    """``mean_k softmax(nu_k / temperature)``: ``[N, C, S]``."""
    sample = logit_samples(mu, logvar, sampling.seed)
    estimate = torch.zeros_like(mu)
    for k in range(sampling.num_samples):
        estimate = estimate + torch.softmax(sample(k) / sampling.temperature, 1)
    return estimate / sampling.num_samples


def blend(estimate: Tensor, labels: Tensor, alpha: float, ignore_index: int) -> Tensor:
    """``(1 - alpha) * onehot(labels) + alpha * estimate``; zeros where the label is ignored."""
    blended = (1 - alpha) * one_hot(labels, estimate.shape[1], estimate.dtype) + alpha * estimate
    return torch.where((labels != ignore_index)[:, None], blended, 0.0)


def smooth_labels(distribution: Tensor, label_smoothing: float) -> Tensor:
    """``(1 - label_smoothing) * distribution + label_smoothing / C``."""
    return (1 - label_smoothing) * distribution + label_smoothing / distribution.shape[1]


# ---- the functions that every backend has; losses ----


def loss(spec: LossSpec, tensors: LossTensors) -> Tensor:
    """The loss; autograd has its gradients, to any order."""
    flattened = LossTensors(*(None if t is None else flat(t) for t in tensors))
    like = tensors.like()
    weight = None if spec.weight is None else spec.weight.to(compute_dtype(like.dtype))
    labels = None if spec.labels is None else _flat_labels(spec.labels, like)
    value = LOSSES[spec.operation](spec._replace(weight=weight), flattened, labels).to(spec.dtype)
    return value.view(voxel_shape(like)) if spec.reduction == "none" else value


def cross_entropy(spec: LossSpec, tensors: LossTensors, labels: Tensor | None) -> Tensor:
    """Cross-entropy on one-hot labels, or on the given soft labels."""
    assert tensors.logits is not None
    ok = _counted(spec.labels, labels, tensors.logits)
    logits = widen_counted(tensors.logits, ok)
    if tensors.soft_labels is not None:
        distribution = widen_counted(tensors.soft_labels, ok).to(logits.dtype)
    else:
        assert labels is not None
        distribution = one_hot(labels, logits.shape[1], logits.dtype)
    value = voxel_cross_entropy(logits, smooth_labels(distribution, spec.label_smoothing), spec.weight)
    if labels is None or spec.labels is None or spec.labels.is_mask:
        return reduce_loss(value, ok, None, spec.reduction)
    value = nan_where_no_class(value, labels, logits.shape[1])
    return reduce_loss(value, ok, weight_of_labels(spec.weight, labels, ok), spec.reduction)


def vls_cross_entropy(spec: LossSpec, tensors: LossTensors, labels: Tensor | None) -> Tensor:
    """Cross-entropy on sampled soft labels, plus ``beta`` times the KL term."""
    (mu, logvar), logits = tensors.gaussian(), tensors.like()
    assert labels is not None
    assert spec.labels is not None
    ok = _counted(spec.labels, labels, logits)
    logits = widen_counted(logits, ok)
    mu, logvar = widen_counted(mu, ok).to(logits.dtype), widen_counted(logvar, ok).to(logits.dtype)
    estimate = estimate_soft_labels(mu, logvar, spec.sampling) if spec.alpha else torch.zeros_like(mu)
    distribution = blend(estimate, labels, spec.alpha, spec.labels.ignore_index)
    value = voxel_cross_entropy(logits, smooth_labels(distribution, spec.label_smoothing), spec.weight)
    value = nan_where_no_class(value, labels, logits.shape[1])
    result = reduce_loss(value, ok, weight_of_labels(spec.weight, labels, ok), spec.reduction)
    return _plus_kl(result, mu, logvar, ok, spec)


def vls_elbo(spec: LossSpec, tensors: LossTensors, labels: Tensor | None) -> Tensor:
    """``-(1/m) sum_k w[y] * log softmax(nu_k)[y] + beta * KL``."""
    mu, logvar = tensors.gaussian()
    assert labels is not None
    ok = _counted(spec.labels, labels, mu)
    mu = widen_counted(mu, ok)
    logvar = widen_counted(logvar, ok).to(mu.dtype)
    target = one_hot(labels, mu.shape[1], mu.dtype)
    sample = logit_samples(mu, logvar, spec.sampling.seed)
    value = torch.zeros_like(mu[:, 0])
    for k in range(spec.sampling.num_samples):
        value = value + voxel_cross_entropy(sample(k), target, spec.weight) / spec.sampling.num_samples
    value = nan_where_no_class(value, labels, mu.shape[1])
    result = reduce_loss(value, ok, weight_of_labels(spec.weight, labels, ok), spec.reduction)
    return _plus_kl(result, mu, logvar, ok, spec)


def gaussian_kl(spec: LossSpec, tensors: LossTensors, labels: Tensor | None) -> Tensor:
    """``KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))`` summed over classes."""
    mu, logvar = tensors.gaussian()
    ok = _counted(None, labels, mu)
    mu = widen_counted(mu, ok)
    return reduce_loss(voxel_kl(mu, widen_counted(logvar, ok).to(mu.dtype), spec.sampling), ok, None, spec.reduction)


LOSSES = {each.__name__: each for each in (cross_entropy, vls_cross_entropy, vls_elbo, gaussian_kl)}


def _plus_kl(result: Tensor, mu: Tensor, logvar: Tensor, ok: Tensor, spec: LossSpec) -> Tensor:
    if not spec.sampling.beta:
        return result
    return result + spec.sampling.beta * reduce_loss(voxel_kl(mu, logvar, spec.sampling), ok, None, spec.reduction)


def _flat_labels(labels: Labels, scores: Tensor) -> Tensor:
    """``[N, S]`` in int64. A label that is no class is an error, which names its place in the caller's shape.

    Inside a transform, whose values cannot be looked at, the loss of such a voxel is NaN instead.
    """
    wide = labels.tensor.long()
    if not labels.is_mask and not is_transformed():
        check_classes(wide, scores.shape[1 if scores.dim() > 1 else 0], labels.ignore_index)
    return flat_voxels(wide)


def _counted(labels: Labels | None, flattened: Tensor | None, scores: Tensor) -> Tensor:
    """Which voxels are not ignored, ``[N, S]``."""
    if labels is None or flattened is None:
        return torch.ones_like(scores[:, 0], dtype=torch.bool)
    return flattened != labels.ignore_index


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    """The gradients of a function of these inputs with respect to those that need one."""
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)
        ]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
        found = iter(torch.autograd.grad(function(*leaves), wanted, grad_output))
    return [next(found) if need and leaf is not None else None for leaf, need in zip(leaves, needed, strict=True)]


# ---- soft labels ----


def sample_soft_labels(spec: SampleSpec, tensors: GaussianTensors) -> Tensor:
    """The estimate ``mean_k softmax(nu_k / temperature)``, blended with the labels where they are given."""
    mu, logvar = tensors.both()
    wide = flat(mu)
    labels = None if spec.labels is None else _flat_labels(spec.labels, mu)
    ok = _counted(spec.labels, labels, wide)
    wide = widen_counted(wide, ok)
    estimate = estimate_soft_labels(wide, widen_counted(flat(logvar), ok).to(wide.dtype), spec.sampling)
    if labels is not None and spec.labels is not None:
        estimate = blend(estimate, labels, spec.alpha, spec.labels.ignore_index)
    return unflat(estimate.to(mu.dtype), mu)


def accumulate_softmax(spec: AccumulateSpec, total: Tensor, logits: Tensor) -> Tensor:
    """The total plus ``softmax(logits / temperature)``; a new tensor, and nothing of an ignored voxel counts."""
    axis = 1 if logits.dim() > 1 else 0
    logits = logits.to(total.dtype)
    if spec.labels is not None:  # NaN included
        logits = logits.masked_fill(spec.labels.ignored().unsqueeze(axis), 0.0)
    return total + torch.softmax(logits / spec.temperature, axis)


def blend_soft_labels(spec: BlendSpec, total: Tensor) -> Tensor:
    """``(1 - alpha) * onehot(labels) + alpha * total / num_maps``, 0 where ignored."""
    estimate = total / spec.num_maps
    if spec.labels is None:
        return estimate
    labels = _flat_labels(spec.labels, total)
    return unflat(blend(flat(estimate), labels, spec.alpha, spec.labels.ignore_index), total)


# ---- calibration ----


def confidence_bins(confidence: Tensor, n_bins: int, *, right_closed: bool = False) -> Tensor:
    """The bin of confidences in [0, 1]: ``[b / n_bins, (b + 1) / n_bins)``, 1 in the last; or the other way round."""
    edges = (torch.arange(1, n_bins, dtype=confidence.dtype, device="cpu") / n_bins).to(confidence.device)
    return torch.bucketize(confidence.contiguous(), edges, right=not right_closed)


def calibration_bins(spec: BinsSpec, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Counts, confidences and hits ``[items, kinds, n_bins, 3]``; whole nats, their rest, Brier score, voxels that
    count, those with NaN and those with infinite NLL ``[items, 6]``. int64, on the CPU.
    """
    labels, ignore_index = spec.labels.tensor.long(), spec.labels.ignore_index
    if spec.mask is not None:
        labels = torch.where(spec.mask.bool(), labels, ignore_index)
    flattened = _flat_labels(spec.labels._replace(tensor=labels), scores)
    counted = flattened != ignore_index
    if spec.skip_background:
        counted = counted & (flattened != 0)
    sums, totals, bad = _bins(flat(scores), flattened, counted, spec)
    if bad is not None:
        raise probability_error(*bad, voxel_shape(scores))
    if not spec.per_item:
        sums, totals = sums.sum(0, keepdim=True), totals.sum(0, keepdim=True)
    return sums.cpu(), totals.cpu()


def _bins(
    scores: Tensor, labels: Tensor, counted: Tensor, spec: BinsSpec
) -> tuple[Tensor, Tensor, tuple[float, float, int] | None]:
    """The sums of every item, and the first voxel whose scores are no probabilities, if any, as (sum, smallest,
    position).
    """
    batch, classes, n_bins = scores.shape[0], scores.shape[1], spec.n_bins
    x = widen_counted(scores, counted)
    p = torch.softmax(x, 1) if spec.from_logits else x
    is_nan = p.sum(1).isnan()
    ok = counted & ~is_nan
    if not spec.from_logits:
        total, least, tolerance = p.sum(1), p.amin(1), spec.tolerance
        bad = ok & (((total - 1).abs() > tolerance) | (least < -tolerance))
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            return total, least, (float(total.flatten()[at]), float(least.flatten()[at]), at)

    truth = torch.where(ok, labels, 0)[:, None]
    if not spec.class_wise:
        top = x.argmax(1, keepdim=True)  # the first maximum
        confidence, hit = p.gather(1, top), top == truth
    else:
        confidence = p[:, spec.first_class :]
        hit = truth == torch.arange(spec.first_class, classes, device=p.device)[None, :, None]
    confidence = confidence.clamp(0, 1).contiguous()
    bin = confidence_bins(confidence, n_bins, right_closed=spec.right_closed)

    kinds = confidence.shape[1]
    row = torch.arange(batch * kinds, device=p.device).view(batch, kinds, 1)
    inside = ok[:, None].expand_as(bin)
    index = (row * n_bins + bin)[inside]
    sums = torch.zeros(batch * kinds * n_bins, 3, dtype=torch.int64, device=p.device)
    for column, values in enumerate((torch.ones_like(bin), (confidence * UNIT).round(), hit)):
        sums[:, column].index_add_(0, index, values[inside].long())

    log_p = torch.log_softmax(x, 1) if spec.from_logits else x.clamp(min=0).log()
    nll = -torch.where(ok, log_p.gather(1, truth)[:, 0], 0.0)
    infinite = nll > MAX_NLL
    nll = nll.clamp(min=0).masked_fill(infinite, 0.0)
    brier = torch.where(ok, (p - one_hot(truth[:, 0], classes, p.dtype)).square().sum(1), 0.0)
    whole, rest = nll.floor(), (nll - nll.floor()) * UNIT
    totals = (whole, rest.round(), (brier * UNIT).round(), counted, counted & is_nan, infinite)
    return sums.view(batch, kinds, n_bins, 3), torch.stack([each.long().sum(1) for each in totals], 1), None


def ace_bins(spec: AceSpec, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, confidences and hits of every bin, each ``[N, kinds, n_bins]``.

    Hard bins hold the voxels whose confidence lies in them. Soft ones share a voxel between the two bins whose centres
    are nearest, in proportion to the distance. Outside of the outermost centres there is one.
    """
    n_bins = spec.n_bins
    labels = _flat_labels(spec.labels, logits)
    ok = labels != spec.labels.ignore_index
    scores = flat(logits)
    p = torch.softmax(widen_counted(scores, ok), 1)[:, spec.first_class :]
    hit = one_hot(labels, scores.shape[1], p.dtype)[:, spec.first_class :]
    if spec.soft:
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
