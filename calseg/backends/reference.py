"""The reference backend: every operation in plain PyTorch.

Tests compare the other backends with it, and it is used where no other backend can run. The formulas come first. Their
tensors are ``[N, C, S]`` and labels ``[N, S]``, with the spatial axes flattened into S. The functions of specs and
tensors follow, which every backend has. Everything is differentiable by autograd, to any order. bfloat16 and float16
are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calseg.backends.choice import is_transformed
from calseg.backends.rng import standard_normal
from calseg.checks import check_classes, check_probabilities, probability_error
from calseg.dice import DiceOptions, dice_cross_entropy, over_processes
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
from calseg.tensors import as_fractions, as_integers, compute_dtype, flat, flat_voxels, unflat, voxel_shape

MAX_NLL = 2.0**25  # a negative log-likelihood above this number counts as infinite


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return labels ``[N, S]`` as one-hot ``[N, C, S]``. A label outside the classes is 0 in every class."""
    classes = torch.arange(num_classes, device=labels.device)[None, :, None]
    return (labels[:, None] == classes).to(dtype)


def reduce_loss(loss: Tensor, ok: Tensor, divisor: Tensor | None, reduction: str) -> Tensor:
    """Reduce a loss over the voxels where ``ok`` is true. A mean is divided by ``divisor``, by default their number."""
    loss = torch.where(ok, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (ok.sum() if divisor is None else divisor)


def weight_of_labels(weight: Tensor | None, labels: Tensor, ok: Tensor) -> Tensor | None:
    """Return ``sum_ok weight[labels]``, the divisor of the mean, or None without class weights."""
    return None if weight is None else torch.where(ok, weight[torch.where(ok, labels, 0)], 0.0).sum()


def nan_where_no_class(loss: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Set the loss to NaN where the label is not a class. Ignored voxels are removed later."""
    return loss.masked_fill((labels < 0) | (labels >= num_classes), torch.nan)


def widen_counted(tensor: Tensor, ok: Tensor) -> Tensor:
    """Convert to the compute dtype, and set ignored voxels to 0, even if they are NaN.

    Integers are fractions of their largest value.
    """
    return torch.where(ok[:, None], as_fractions(tensor), 0.0)


def voxel_cross_entropy(logits: Tensor, distribution: Tensor, weight: Tensor | None) -> Tensor:
    """Return ``- sum_c w[c] * distribution[c] * log softmax(logits)[c]``, ``[N, S]``."""
    log_p = torch.log_softmax(logits, 1)
    # Where the probability is 0 and the logit is -inf, the term is 0, the limit of t * log t, and not NaN.
    log_p = log_p.masked_fill((distribution == 0) & (log_p == -torch.inf), 0.0)
    if weight is None:
        return -(distribution * log_p).sum(1)
    # A class without mass does not count, even if its weight is infinite or NaN (1 / bincount).
    weight = weight[None, :, None]
    weighted = distribution * torch.where((distribution == 0) & ~weight.isfinite(), 0.0, weight)
    return -(weighted * log_p).sum(1)


def voxel_kl(mu: Tensor, logvar: Tensor, sampling: Sampling) -> Tensor:
    """Return ``KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))`` summed over classes, ``[N, S]``."""
    prior_mu, prior_logvar = sampling.prior_mu, sampling.prior_logvar
    prior_var = torch.exp(torch.tensor(prior_logvar, dtype=mu.dtype, device=mu.device))
    return 0.5 * (prior_logvar - logvar + (logvar.exp() + (mu - prior_mu) ** 2) / prior_var - 1).sum(1)


def logit_samples(mu: Tensor, logvar: Tensor, seed: int | Tensor) -> Callable[[int], Tensor]:
    """Return a function of k that returns ``nu_k = mu + exp(logvar / 2) * eps_k``, ``[N, C, S]``."""
    batch, classes, size = mu.shape
    sigma = (logvar / 2).exp()

    def sample(k: int) -> Tensor:
        eps = standard_normal(seed, batch * size, classes, k, device=mu.device)
        return mu + sigma * eps.view(classes, batch, size).transpose(0, 1).to(mu.dtype)

    return sample


def estimate_soft_labels(mu: Tensor, logvar: Tensor, sampling: Sampling) -> Tensor:
    """Return ``mean_k softmax(nu_k / temperature)``, ``[N, C, S]``."""
    sample = logit_samples(mu, logvar, sampling.seed)
    estimate = torch.zeros_like(mu)
    for k in range(sampling.num_samples):
        estimate = estimate + torch.softmax(sample(k) / sampling.temperature, 1)
    return estimate / sampling.num_samples


def blend(estimate: Tensor, labels: Tensor, alpha: float, ignore_index: int) -> Tensor:
    """Return ``(1 - alpha) * onehot(labels) + alpha * estimate``, and 0 where the label is ignored."""
    blended = (1 - alpha) * one_hot(labels, estimate.shape[1], estimate.dtype) + alpha * estimate
    return torch.where((labels != ignore_index)[:, None], blended, 0.0)


def smooth_labels(distribution: Tensor, label_smoothing: float) -> Tensor:
    """Return ``(1 - label_smoothing) * distribution + label_smoothing / C``."""
    num_classes = int(distribution.shape[1])  # torch.jit.trace makes sizes tensors, whose quotients are float32
    return (1 - label_smoothing) * distribution + label_smoothing / num_classes


# ---- the functions that every backend has: losses ----


def loss(spec: LossSpec, tensors: LossTensors) -> Tensor:
    """Return the loss. Autograd can compute its gradients, to any order."""
    flattened = LossTensors(*(None if t is None else flat(t) for t in tensors))
    like = tensors.like()
    weight = None if spec.weight is None else spec.weight.to(compute_dtype(like.dtype))
    labels = None if spec.labels is None else _flat_labels(spec.labels, like)
    value = spec.scale * LOSSES[spec.operation](spec._replace(weight=weight), flattened, labels)
    return (value.view(voxel_shape(like)) if spec.reduction == "none" else value).to(spec.dtype)


def loss_and_overlap(spec: LossSpec, tensors: LossTensors) -> tuple[Tensor, Tensor]:
    """Return the loss, and the sums over voxels ``sum (p + Y)`` and ``sum |p - Y|``, float64 ``[N, C, 2]``.

    ``p`` is the softmax of the logits, and ``Y`` the labels, through which the sums have no gradient.
    """
    like = tensors.like()
    tensors = tensors._replace(logits=like.to(compute_dtype(like.dtype)))  # so that its gradients are added unrounded
    logits, *rest = (None if t is None else flat(t) for t in tensors)
    assert logits is not None
    labels = None if spec.labels is None else _flat_labels(spec.labels, like)
    ok = _counted(spec.labels, labels, logits)
    wide = widen_counted(logits, ok)
    with torch.no_grad():
        distribution = label_distribution(spec, LossTensors(wide, *rest), labels, ok)
    distribution = distribution.detach()  # for forward mode and traced graphs, which do not know no_grad
    p = torch.where(ok[:, None], torch.softmax(wide, 1), 0.0)
    sums = torch.stack([(p + distribution).sum(2, dtype=torch.float64),
                        (p - distribution).abs().sum(2, dtype=torch.float64)], 2)  # fmt: skip
    return loss(spec, tensors), sums


def dice_loss(spec: LossSpec, options: DiceOptions, tensors: LossTensors) -> Tensor:
    """Return Dice plus cross-entropy. Autograd can compute its gradients, to any order."""
    value, sums = loss_and_overlap(spec, tensors)
    return dice_cross_entropy(options, value, sums, over_processes(options, sums))


def label_distribution(spec: LossSpec, tensors: LossTensors, labels: Tensor | None, ok: Tensor) -> Tensor:
    """Return the labels Y: given soft labels, sampled ones, or one-hot ones, and 0 where ignored."""
    logits = tensors.like()
    if tensors.soft_labels is not None:
        return widen_counted(tensors.soft_labels, ok).to(logits.dtype)
    assert labels is not None
    if spec.operation == "cross_entropy":
        return one_hot(torch.where(ok, labels, -1), logits.shape[1], logits.dtype)
    assert spec.labels is not None
    mu, logvar = (widen_counted(t, ok).to(logits.dtype) for t in tensors.gaussian())
    estimate = estimate_soft_labels(mu, logvar, spec.sampling) if spec.alpha else torch.zeros_like(mu)
    return blend(estimate, labels, spec.alpha, spec.labels.ignore_index)


def cross_entropy(spec: LossSpec, tensors: LossTensors, labels: Tensor | None) -> Tensor:
    """Return the cross-entropy with one-hot labels, or with soft labels if they are given."""
    assert tensors.logits is not None
    ok = _counted(spec.labels, labels, tensors.logits)
    logits = widen_counted(tensors.logits, ok)
    distribution = label_distribution(spec, tensors._replace(logits=logits), labels, ok)
    value = voxel_cross_entropy(logits, smooth_labels(distribution, spec.label_smoothing), spec.weight)
    if labels is None or spec.labels is None or spec.labels.is_mask:
        return reduce_loss(value, ok, None, spec.reduction)
    value = nan_where_no_class(value, labels, logits.shape[1])
    return reduce_loss(value, ok, weight_of_labels(spec.weight, labels, ok), spec.reduction)


def vls_cross_entropy(spec: LossSpec, tensors: LossTensors, labels: Tensor | None) -> Tensor:
    """Return the cross-entropy with sampled soft labels, plus ``beta`` times the KL term."""
    (mu, logvar), logits = tensors.gaussian(), tensors.like()
    assert labels is not None
    assert spec.labels is not None
    ok = _counted(spec.labels, labels, logits)
    logits = widen_counted(logits, ok)
    mu, logvar = widen_counted(mu, ok).to(logits.dtype), widen_counted(logvar, ok).to(logits.dtype)
    distribution = label_distribution(spec, LossTensors(logits, None, mu, logvar), labels, ok)
    value = voxel_cross_entropy(logits, smooth_labels(distribution, spec.label_smoothing), spec.weight)
    value = nan_where_no_class(value, labels, logits.shape[1])
    result = reduce_loss(value, ok, weight_of_labels(spec.weight, labels, ok), spec.reduction)
    return _plus_kl(result, mu, logvar, ok, spec)


def vls_elbo(spec: LossSpec, tensors: LossTensors, labels: Tensor | None) -> Tensor:
    """Return ``-(1/m) sum_k w[y] * log softmax(nu_k)[y] + beta * KL``."""
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
    """Return ``KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))`` summed over classes."""
    mu, logvar = tensors.gaussian()
    ok = _counted(None, labels, mu)
    mu = widen_counted(mu, ok)
    return reduce_loss(voxel_kl(mu, widen_counted(logvar, ok).to(mu.dtype), spec.sampling), ok, None, spec.reduction)


LOSSES = {each.__name__: each for each in (cross_entropy, vls_cross_entropy, vls_elbo, gaussian_kl)}


def _plus_kl(result: Tensor, mu: Tensor, logvar: Tensor, ok: Tensor, spec: LossSpec) -> Tensor:
    """Return ``result`` plus ``beta`` times the reduced KL term."""
    if not spec.sampling.beta:
        return result
    return result + spec.sampling.beta * reduce_loss(voxel_kl(mu, logvar, spec.sampling), ok, None, spec.reduction)


def _flat_labels(labels: Labels, scores: Tensor) -> Tensor:
    """Return labels as int64 ``[N, S]``. Raise IndexError if a label is not a class; the error names its index.

    Inside a transform, values cannot be read. The loss of such a voxel is then NaN.
    """
    if not labels.is_mask and not is_transformed():
        check_classes(labels, scores.shape[1 if scores.dim() > 1 else 0])
    return flat_voxels(as_integers(labels.tensor))


def _counted(labels: Labels | None, flattened: Tensor | None, scores: Tensor) -> Tensor:
    """Return which voxels are not ignored, ``[N, S]``."""
    if labels is None or flattened is None:
        return torch.ones_like(scores[:, 0], dtype=torch.bool)
    return flattened != labels.ignore_index


def gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad_output: Any
) -> list[Tensor | None]:
    """Return the gradients of a function with respect to the inputs that need one, and None for the others."""
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)
        ]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
        found = iter(torch.autograd.grad(function(*leaves), wanted, grad_output))
    return [next(found) if need and leaf is not None else None for leaf, need in zip(leaves, needed, strict=True)]


# ---- soft labels ----


def sample_soft_labels(spec: SampleSpec, tensors: GaussianTensors) -> Tensor:
    """Return ``mean_k softmax(nu_k / temperature)``. Labels, if given, are blended in."""
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
    """Return ``total + softmax(logits / temperature)``, a new tensor. Ignored voxels get no gradient."""
    axis = 1 if logits.dim() > 1 else 0
    logits = logits.to(total.dtype)
    if spec.labels is not None:  # an ignored voxel may be NaN
        logits = logits.masked_fill(spec.labels.ignored().unsqueeze(axis), 0.0)
    return total + torch.softmax(logits / spec.temperature, axis)


def blend_soft_labels(spec: BlendSpec, total: Tensor) -> Tensor:
    """Return ``(1 - alpha) * onehot(labels) + alpha * total / num_maps``, and 0 where ignored."""
    estimate = total / spec.num_maps
    if spec.labels is None:
        return estimate
    labels = _flat_labels(spec.labels, total)
    return unflat(blend(flat(estimate), labels, spec.alpha, spec.labels.ignore_index), total)


# ---- calibration ----


def confidence_bins(confidence: Tensor, n_bins: int, *, right_closed: bool = False) -> Tensor:
    """Return the bins of confidences in [0, 1].

    Bin b is ``[b / n_bins, (b + 1) / n_bins)``, and 1 falls into the last bin. With ``right_closed``, bin b is
    ``(b / n_bins, (b + 1) / n_bins]``, and 0 falls into the first bin.
    """
    edges = (torch.arange(1, n_bins, dtype=confidence.dtype, device="cpu") / n_bins).to(confidence.device)
    return torch.bucketize(confidence.contiguous(), edges, right=not right_closed)


def calibration_bins(spec: BinsSpec, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums per bin and the totals, int64 ``[items, kinds, n_bins, 3]`` and ``[items, 6]`` on the CPU.

    The sums of a bin are count, confidence and hits. The totals are the NLL in whole nats, its rest, the Brier score,
    and the numbers of voxels that count, that have NaN, and that have infinite NLL.
    """
    return soft_calibration_bins(spec, scores, None)


def soft_calibration_bins(spec: BinsSpec, scores: Tensor, soft_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Do as :func:`calibration_bins` for soft labels, which no other backend takes.

    With them, a bin has a fourth sum, that of the shares below 1, and ``spec.labels`` only says what is counted.
    """
    labels, ignore_index = spec.labels.tensor, spec.labels.ignore_index
    if spec.mask is not None:
        labels = labels if labels.is_floating_point() else as_integers(labels)  # which hold any ignore_index
        labels = torch.where(spec.mask.bool(), labels, ignore_index)
    flattened = _flat_labels(spec.labels._replace(tensor=labels), scores)
    counted = flattened != ignore_index
    if spec.skip_background:
        counted = counted & (flattened != 0)
    if soft_labels is not None:
        check_probabilities("target", soft_labels, counted)
    sums, totals, bad = _bins(
        flat(scores), flattened, None if soft_labels is None else flat(soft_labels), counted, spec
    )
    if bad is not None:
        raise probability_error(*bad, voxel_shape(scores))
    if not spec.per_item:
        sums, totals = sums.sum(0, keepdim=True), totals.sum(0, keepdim=True)
    return sums.cpu(), totals.cpu()


def _bins(
    scores: Tensor, labels: Tensor, soft_labels: Tensor | None, counted: Tensor, spec: BinsSpec
) -> tuple[Tensor, Tensor, tuple[float, float, int] | None]:
    """Return the sums and the totals of every item, and the first voxel whose scores are no probabilities.

    That voxel is described by (sum, smallest, position), and the first two results are then not valid. It is None if
    there is no such voxel.
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

    if soft_labels is None:
        truth = one_hot(torch.where(ok, labels, 0), classes, p.dtype)
    else:
        truth = widen_counted(soft_labels, ok).to(p.dtype).clamp(0, 1)
    if not spec.class_wise:
        top = x.argmax(1, keepdim=True)  # the first class with the largest score
        confidence, hit = p.gather(1, top), truth.gather(1, top)
    else:
        confidence, hit = p[:, spec.first_class :], truth[:, spec.first_class :]
    confidence = confidence.clamp(0, 1).contiguous()
    bin = confidence_bins(confidence, n_bins, right_closed=spec.right_closed)

    kinds = confidence.shape[1]
    row = torch.arange(batch * kinds, device=p.device).view(batch, kinds, 1)
    inside = ok[:, None].expand_as(bin)
    index = (row * n_bins + bin)[inside]
    columns = [torch.ones_like(bin), (confidence * UNIT).round(), hit == 1]
    if soft_labels is not None:
        columns.append((torch.where(hit < 1, hit, 0.0) * UNIT).round())
    sums = torch.zeros(batch * kinds * n_bins, len(columns), dtype=torch.int64, device=p.device)
    for column, values in enumerate(columns):
        sums[:, column].index_add_(0, index, values[inside].long())

    log_p = torch.log_softmax(x, 1) if spec.from_logits else x.clamp(min=0).log()
    nll = -torch.where(truth > 0, truth * log_p, 0.0).sum(1).masked_fill(~ok, 0.0)
    infinite = nll > MAX_NLL
    nll = nll.clamp(min=0).masked_fill(infinite, 0.0)
    brier = torch.where(ok, (p - truth).square().sum(1), 0.0)
    whole, rest = nll.floor(), (nll - nll.floor()) * UNIT
    totals = (whole, rest.round(), (brier * UNIT).round(), counted, counted & is_nan, infinite)
    return sums.view(batch, kinds, n_bins, len(columns)), torch.stack([each.long().sum(1) for each in totals], 1), None


def ace_bins(spec: AceSpec, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mass, confidences and hits of every bin, each ``[N, kinds, n_bins]``.

    With hard bins, a voxel belongs to the bin that contains its confidence. With soft bins, a voxel is divided between
    the two bins whose centres are nearest. Its share in a bin grows linearly with the distance from the other centre.
    Beyond the outermost centres, a voxel belongs to a single bin.
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
