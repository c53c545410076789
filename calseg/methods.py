"""The methods that CALSeg is compared with, and :data:`METHODS`, the table of all methods that ``calseg train`` knows.

Each comparison method is a soft target for the fused cross-entropy, or a penalty that is added to it. Uniform label
smoothing has no function of its own: it is ``calseg.vls_cross_entropy(..., label_smoothing=0.1)``.

In every public function, ``input`` is logits ``[N, C, *S]``. ``target`` is class indices ``[N, *S]`` of any integer
dtype, and ``ignore_index`` where a voxel does not count. ``reduction`` is ``"mean"`` (over the voxels that count),
``"sum"`` or ``"none"``, which gives ``[N, *S]``. The defaults are the published settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calseg import checks as check
from calseg.functional import ace_loss, vls_cross_entropy, vls_dice_cross_entropy, vls_elbo
from calseg.regions import NEAR_RADIUS, check_region, region_mask
from calseg.tensors import compute_dtype


def svls_labels(target: Tensor, num_classes: int, *, sigma: float = 1.0, ignore_index: int = -100) -> Tensor:
    """Return the soft labels of spatially varying label smoothing.

    They are the one-hot map, filtered by a Gaussian with a side of 3 voxels. The centre weighs as much as all
    neighbours together. So a voxel whose neighbours have the same class keeps its hard label, and the class of a voxel
    has a share of at least 0.5 everywhere. Beyond the border the nearest voxel is repeated. The weight of ignored
    neighbours goes to the others. The soft label of an ignored voxel is 0 in every class.

    Args:
        target: class indices ``[N, *S]``.
        num_classes: ``C``.
        sigma: standard deviation of the Gaussian in voxels. Default 1.
        ignore_index: label of voxels that do not count. Default -100.

    Returns:
        Probabilities float32 ``[N, C, *S]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
        IndexError: a label that is neither a class nor ``ignore_index``.

    Example:
        >>> import torch
        >>> from calseg.methods import svls_labels
        >>> svls_labels(torch.tensor([[[0, 0, 0], [0, 1, 0], [0, 0, 0]]]), 2)[0, 1]
        tensor([[0.0472, 0.0778, 0.0472],
                [0.0778, 0.5000, 0.0778],
                [0.0472, 0.0778, 0.0472]])

    Source: Islam and Glocker, *Spatially Varying Label Smoothing*, IPMI 2021.
    """
    check.check_number("sigma", sigma, 0.0, math.inf, "above 0", open_low=True)
    onehot = _onehot(target, num_classes, ignore_index)
    side = math.exp(-0.5 / sigma**2)
    centre = (1 / (1 + 2 * side)) ** (target.dim() - 1)  # weight of the centre in the normalised Gaussian
    if centre == 1.0:  # sigma is so small that neighbours have no weight
        return onehot
    neighbours = (_filter(onehot, side / (1 + 2 * side), 1 / (1 + 2 * side)) - centre * onehot) / (1 - centre)
    return _renormalise(0.5 * (onehot + neighbours).clamp(min=0)) * onehot.sum(1, keepdim=True)


def svls_cross_entropy(
    input: Tensor, target: Tensor, *, sigma: float = 1.0, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Return the cross-entropy with the soft labels of :func:`svls_labels`.

    Args:
        input: logits ``[N, C, *S]``.
        target: class indices ``[N, *S]``.
        sigma: standard deviation of the Gaussian in voxels. Default 1.
        ignore_index: label of voxels that do not count. Default -100.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default ``"mean"``.

    Returns:
        A 0-d tensor, or ``[N, *S]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`calseg.vls_cross_entropy`.

    Example:
        >>> import torch
        >>> from calseg.methods import svls_cross_entropy
        >>> svls_cross_entropy(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.uint8))
        tensor(0.6931)
    """
    check.check_scores("input", input)
    target = check.check_labels("target", target, input, ignore_index).tensor
    soft = svls_labels(target, input.shape[1], sigma=sigma, ignore_index=ignore_index)
    return vls_cross_entropy(input, target, soft_labels=soft, ignore_index=ignore_index, reduction=reduction)


def focal_cross_entropy(
    input: Tensor, target: Tensor, *, gamma: float = 3.0, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Return the focal loss ``(1 - p_y)^gamma * -log p_y``, in which well-classified voxels count less.

    Args:
        input: logits ``[N, C, *S]``.
        target: class indices ``[N, *S]``.
        gamma: exponent, 0 (plain cross-entropy) or at least 1. Default 3.
        ignore_index: label of voxels that do not count. Default -100.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default ``"mean"``.

    Returns:
        A 0-d tensor, or ``[N, *S]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`calseg.vls_cross_entropy`.

    Example:
        >>> import torch
        >>> from calseg.methods import focal_cross_entropy
        >>> focal_cross_entropy(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.uint8), gamma=1.0)
        tensor(0.3466)

    Source: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017; for calibration: Mukhoti et al., NeurIPS
    2020.
    """
    if gamma != 0:  # for gamma between 0 and 1, the gradient is unbounded where p_y is 1
        check.check_number("gamma", gamma, 1.0, math.inf, "that is 0 or at least 1")
    nll = vls_cross_entropy(input, target, ignore_index=ignore_index, reduction="none")
    return _reduce((-torch.expm1(-nll)).clamp(min=0) ** gamma * nll, target, ignore_index, reduction)


def mbls_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    margin: float = 5.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return the loss of margin-based label smoothing: cross-entropy plus ``alpha`` times a penalty.

    The penalty of a voxel is ``mean_c relu(max_j x_j - x_c - margin)``. It is above 0 if a logit is more than
    ``margin`` below the largest one.

    Args:
        input: logits ``[N, C, *S]``.
        target: class indices ``[N, *S]``.
        alpha: weight of the penalty. Default 0.1.
        margin: distance from the largest logit up to which there is no penalty. Default 5.
        ignore_index: label of voxels that do not count. Default -100.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default ``"mean"``.

    Returns:
        A 0-d tensor, or ``[N, *S]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`calseg.vls_cross_entropy`.

    Example:
        >>> import torch
        >>> from calseg.methods import mbls_cross_entropy
        >>> logits = torch.tensor([[0.0, 7.0]])[..., None]
        >>> mbls_cross_entropy(logits, torch.tensor([[1]]), alpha=1.0)
        tensor(1.0009)

    Source: Liu et al., *The Devil is in the Margin*, CVPR 2022.
    """
    check.check_number("alpha", alpha, 0.0, math.inf, "of at least 0")
    check.check_number("margin", margin, 0.0, math.inf, "of at least 0")
    nll = vls_cross_entropy(input, target, ignore_index=ignore_index, reduction="none")
    penalty = F.relu(input.amax(1, keepdim=True) - input - margin).mean(1)
    return _reduce(nll + alpha * penalty, target, ignore_index, reduction)


def nacl_cross_entropy(
    input: Tensor, target: Tensor, *, alpha: float = 0.1, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Return the loss of neighbour-aware calibration: cross-entropy plus ``alpha`` times a penalty.

    The penalty of a voxel is ``mean_c |t_c - x_c|``, where ``t_c`` is the share of class c among the labelled voxels of
    the neighbourhood. The neighbourhood has a side of 3 voxels. Beyond the border the nearest voxel is repeated.

    Args:
        input: logits ``[N, C, *S]``.
        target: class indices ``[N, *S]``.
        alpha: weight of the penalty. Default 0.1.
        ignore_index: label of voxels that do not count. Default -100.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default ``"mean"``.

    Returns:
        A 0-d tensor, or ``[N, *S]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`calseg.vls_cross_entropy`.

    Example:
        >>> import torch
        >>> from calseg.methods import nacl_cross_entropy
        >>> nacl_cross_entropy(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.uint8), alpha=1.0)
        tensor(1.1931)

    Source: Murugesan et al., *Trust your neighbours*, MICCAI 2023 (MONAI's ``NACLLoss``).
    """
    check.check_number("alpha", alpha, 0.0, math.inf, "of at least 0")
    nll = vls_cross_entropy(input, target, ignore_index=ignore_index, reduction="none")
    target = check.check_labels("target", target, input, ignore_index).tensor
    shares = _renormalise(_filter(_onehot(target, input.shape[1], ignore_index), 1 / 3, 1 / 3))
    return _reduce(nll + alpha * (shares - input).abs().mean(1), target, ignore_index, reduction)


def fit_temperature(
    logits: Sequence[Tensor], targets: Sequence[Tensor], *, ignore_index: int = -100, region: str = "all"
) -> float:
    """Return the temperature ``T`` for which ``softmax(logits / T)`` has the least negative log-likelihood.

    Fitted after training, on cases that training did not see. The temperature lies in [0.01, 100].

    Args:
        logits: one tensor ``[C, *S]`` per case; shapes may differ.
        targets: class indices ``[*S]`` per case.
        ignore_index: label of voxels that do not count. Default -100.
        region: the voxels to fit: ``"all"``, those within 3 voxels of the foreground (``"near"``), or those of the
            ``"foreground"``. Most of a volume is background that is beyond doubt. ``"near"`` fits the voxels that are
            in doubt. It calibrates these better, and the volume as a whole a little worse. Default ``"all"``.

    Returns:
        The temperature. It is above 1 if the logits are over-confident.

    Raises:
        ValueError: there is no case, the numbers of logits and targets differ, no voxel counts, or the region is
            unknown.

    Example:
        >>> import torch
        >>> from calseg.methods import fit_temperature
        >>> logits = torch.tensor([[0.0] * 4, [9.0] * 4])  # sure of class 1, which is right three times in four
        >>> round(9.0 / fit_temperature([logits], [torch.tensor([1, 1, 1, 0])]), 4)  # log 3
        1.0986

    Source: Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017.
    """
    if not logits or len(logits) != len(targets):
        raise ValueError(f"logits: got {len(logits)} cases and {len(targets)} targets, wanted pairs, at least one")
    fit = TemperatureFit(ignore_index, region)
    for scores, target in zip(logits, targets, strict=True):
        fit.add(scores, target)
    if not fit.voxels:
        outside = "" if region == "all" else f" or outside the region {region!r}"
        raise ValueError(f"targets: every voxel is {ignore_index} (ignored){outside}, wanted some that count")
    return fit.temperature()


class TemperatureFit:
    """The temperature of :func:`fit_temperature` from cases that are given one at a time and not kept.

    The likelihood is convex in ``1 / T``, so its derivative by ``1 / T`` has one zero. What is kept of a case is its
    part of the derivative at 214 fixed temperatures, between which the derivative is interpolated by a polynomial of
    degree 11. As a function of ``log T`` it is so smooth that the zero is exact to 9 digits or more.

    Args:
        ignore_index: label of voxels that do not count. Default -100.
        region: the voxels to fit, as in :func:`fit_temperature`. Default ``"all"``.
    """

    STEPS = 16
    """Temperatures per factor of 2."""

    def __init__(self, ignore_index: int = -100, region: str = "all") -> None:
        check_region(region, NEAR_RADIUS, None)
        self.ignore_index, self.region = ignore_index, region
        self.voxels = 0
        """The voxels that counted."""
        count = 1 + math.ceil(self.STEPS * math.log2(1e4))
        self._inverse = 0.01 * 2 ** (torch.arange(count, dtype=torch.float64) / self.STEPS)  # 1 / T
        self._slope = torch.zeros(count, dtype=torch.float64)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Add the case with ``logits[C, *S]`` and class indices ``target[*S]``."""
        valid = target != self.ignore_index
        inside = region_mask(self.region, target[None], NEAR_RADIUS, None, self.ignore_index)
        if inside is not None:
            valid &= inside[0]
        flat, labels = logits[:, valid], target[valid].long()
        self.voxels += len(labels)
        for start in range(0, len(labels), block := max(1, (1 << 18) // len(logits))):
            part = flat[:, start : start + block].double()
            part = part - part.amax(0)
            own = part.gather(0, labels[None, start : start + block]).sum()
            self._slope += self._expected(part) - own.to(self._slope)

    def _expected(self, part: Tensor) -> Tensor:
        """The sum over the voxels of the mean logit under the softmax, at every temperature.

        ``exp(2 x) = exp(x) ** 2``: only the first temperatures up to a factor of 2 need an exponential.
        """
        result = torch.empty_like(self._slope)
        for first in range(self.STEPS):
            weights = (part * float(self._inverse[first])).exp_()
            for index in range(first, len(result), self.STEPS):
                result[index] = ((weights * part).sum(0) / weights.sum(0)).sum()
                weights.square_()
        return result

    def temperature(self) -> float:
        """Return the temperature that fits the cases added so far, or 1 if none of their voxels counts."""
        if not self.voxels:
            return 1.0
        slope, places = self._slope.tolist(), self._inverse.log().tolist()
        if slope[0] > 0:  # even the highest temperature is too low
            return 100.0
        if slope[-1] <= 0:
            return 0.01
        last = next(index for index, value in enumerate(slope) if value > 0) - 1
        nearest = range(max(0, min(last - 5, len(slope) - 12)), len(slope))[:12]

        def interpolated(place: float) -> float:
            factors = (
                math.prod((place - places[j]) / (places[i] - places[j]) for j in nearest if j != i) for i in nearest
            )
            return math.fsum(slope[i] * factor for i, factor in zip(nearest, factors, strict=True))

        low, high = places[last], min(places[last + 1], math.log(100))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if interpolated(middle) > 0 else (middle, high)
        return math.exp(-(low + high) / 2)


def _onehot(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return the one-hot map, float32 ``[N, C, *S]``, which is 0 in every class where a voxel is ignored."""
    check.check_integer("num_classes", num_classes, 1)
    if target.dim() < 2:
        raise ValueError(f"target: got {check.describe(target)}, wanted [N, *S] with at least one spatial axis")
    valid = target != ignore_index
    label = torch.where(valid, target, 0).long()
    outside = (label < 0) | (label >= num_classes)
    if outside.any():
        raise IndexError(f"target: got the label {int(label[outside][0])}, wanted 0 to {num_classes - 1}")
    zeros = torch.zeros(target.shape[0], num_classes, *target.shape[1:], device=target.device)
    return zeros.scatter_(1, label[:, None], valid[:, None].float())


def _filter(maps: Tensor, side: float, centre: float) -> Tensor:
    """Filter maps ``[N, C, *S]`` by ``(side, centre, side)`` along every spatial axis, with repeated borders."""
    for axis in range(2, maps.dim()):
        last = maps.shape[axis] - 1
        padded = torch.cat([maps.narrow(axis, 0, 1), maps, maps.narrow(axis, last, 1)], axis)
        maps = centre * maps + side * (padded.narrow(axis, 0, last + 1) + padded.narrow(axis, 2, last + 1))
    return maps


def _renormalise(shares: Tensor) -> Tensor:
    """Divide shares by their sum over classes. Where the sum is 0, they stay 0."""
    total = shares.sum(1, keepdim=True)
    return shares / torch.where(total > 0, total, 1)


def _reduce(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Reduce ``loss[N, *S]`` over the voxels that count. Other voxels count as 0.

    Sums have the compute dtype: in float16, that of a patch is beyond the largest number.
    """
    check.check_reduction(reduction)
    valid = target.reshape(loss.shape) != ignore_index
    loss = torch.where(valid, loss, 0)
    if reduction == "none":
        return loss
    total = loss.sum(dtype=compute_dtype(loss.dtype))
    return (total if reduction == "sum" else total / valid.sum()).to(loss.dtype)


# ------------------------------------------------------------------------------------- the table of methods


class Output(NamedTuple):
    """The output of a network, float ``[N, C, *S]`` each. Without a dense head, ``mu`` and ``logvar`` are None."""

    logits: Tensor
    mu: Tensor | None
    logvar: Tensor | None


class Target(NamedTuple):
    """The target that a network is trained on.

    Args:
        label: class indices ``[N, *S]``, and -100 where a voxel does not count.
        soft_labels: probabilities ``[N, C, *S]`` if the method trains on soft labels, else None.
        seeds: two seeds of noise for this update, which a method may use.
    """

    label: Tensor
    soft_labels: Tensor | None = None
    seeds: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Method:
    """One training method: an entry of :data:`METHODS`.

    Attributes:
        title: Name for readers, as tables and help texts show it.
        loss: Function that is called as ``loss(output, target, dice_weight, **settings)`` with an :class:`Output` and a
            :class:`Target`. It returns the mean over the voxels that count, plus ``dice_weight`` times the Dice loss, a
            0-d tensor. The mean is 0 if no voxel counts.
        settings: The settings of :class:`calseg.training.TrainConfig` that the method takes, with their published
            defaults. A default of None means that the setting is fitted during training.
        dice_weight: The default of ``dice_weight``, a setting that every method takes.
        dense_head: Whether the network gets a head for ``mu`` and ``logvar``.
        soft_labels: Whether a first stage estimates soft labels, on which the network is then trained.
    """

    title: str
    loss: Callable[..., Tensor]
    settings: Mapping[str, Any]
    dice_weight: float = 0.0
    dense_head: bool = False
    soft_labels: bool = False


def mean_over_voxels(total: Tensor, label: Tensor, ignore_index: int = -100) -> Tensor:
    """Divide a sum over voxels by the number of voxels that count. Where none counts, a sum of 0 stays 0."""
    return total / (label != ignore_index).sum().clamp(min=1)


def cross_entropy_and_dice(logits: Tensor, label: Tensor, dice_weight: float, **labels: Any) -> Tensor:
    """Return the cross-entropy plus ``dice_weight`` times the Dice loss over the batch, both with the same labels.

    Args:
        logits: float ``[N, C, *S]``.
        label: class indices ``[N, *S]``, and -100 where a voxel does not count.
        dice_weight: weight of the Dice loss. If it is 0, the Dice loss is not computed.
        labels: arguments of :func:`calseg.vls_cross_entropy` that make soft labels.
    """
    if dice_weight:
        return vls_dice_cross_entropy(logits, label, dice_weight=dice_weight, batch_dice=True, **labels)
    return mean_over_voxels(vls_cross_entropy(logits, label, reduction="sum", **labels), label)


def _of_logits(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a :attr:`Method.loss` of ``function``, a loss of logits and labels, and of the Dice loss of the labels."""

    def loss(output: Output, target: Target, dice_weight: float, **settings: float) -> Tensor:
        value = mean_over_voxels(function(output.logits, target.label, reduction="sum", **settings), target.label)
        return value + _dice_of_label(output, target, dice_weight)

    return loss


def _dice_of_label(output: Output, target: Target, dice_weight: float) -> Tensor | float:
    """Return ``dice_weight`` times the Dice loss of the labels over the batch. If the weight is 0, return 0."""
    if not dice_weight:
        return 0.0
    return vls_dice_cross_entropy(output.logits, target.label, ce_weight=0.0, dice_weight=dice_weight, batch_dice=True)


def _ace(binning: str) -> Callable[..., Tensor]:
    """Return a :attr:`Method.loss` that adds ``alpha`` times the ACE loss with this binning to the cross-entropy."""

    def loss(output: Output, target: Target, dice_weight: float, *, alpha: float) -> Tensor:
        value = cross_entropy_and_dice(output.logits, target.label, dice_weight)
        return value + ace_loss(output.logits, target.label, binning=binning, scale=alpha)

    return loss


def _cross_entropy_loss(output: Output, target: Target, dice_weight: float) -> Tensor:
    """Return the loss of the labels."""
    return cross_entropy_and_dice(output.logits, target.label, dice_weight)


def _label_smoothing_loss(output: Output, target: Target, dice_weight: float, *, alpha: float) -> Tensor:
    """Return the cross-entropy with uniform label smoothing, and the Dice loss of the labels."""
    return cross_entropy_and_dice(output.logits, target.label, dice_weight, label_smoothing=alpha)


def _vls_loss(
    output: Output, target: Target, dice_weight: float, *,
    alpha: float, temperature: float, num_samples: int, beta: float,
) -> Tensor:  # fmt: skip
    """Return the ELBO of mu and logvar, plus the loss of soft labels that are sampled from them.

    The loss of the soft labels has no gradient with respect to mu and logvar.
    """
    mu, logvar = output.mu, output.logvar
    assert mu is not None
    assert logvar is not None
    elbo = vls_elbo(mu, logvar, target.label, num_samples=num_samples, beta=beta, reduction="sum", seed=target.seeds[0])
    return mean_over_voxels(elbo, target.label) + cross_entropy_and_dice(
        output.logits, target.label, dice_weight, mu=mu.detach(), logvar=logvar.detach(),
        alpha=alpha, temperature=temperature, num_samples=num_samples, beta=0.0, seed=target.seeds[1],
    )  # fmt: skip


def _calseg_loss(output: Output, target: Target, dice_weight: float, *, dice_labels: str, **settings: Any) -> Tensor:
    """Return the loss of the soft labels of the first stage, which alone uses the other ``settings``."""
    of_soft = dice_weight if dice_labels == "soft" else 0.0
    value = cross_entropy_and_dice(output.logits, target.label, of_soft, soft_labels=target.soft_labels)
    return value + _dice_of_label(output, target, dice_weight - of_soft)


ESTIMATORS = {
    "posterior": "codes of image and label",
    "prior": "codes that know nothing of the label",
    "network": "a plain network without a code",
}
"""The sources of the soft labels of "calseg", each with a few words for help texts."""

METHODS: dict[str, Method] = {
    "cross_entropy": Method("cross-entropy", _cross_entropy_loss, {}),
    "dice_cross_entropy": Method("Dice plus cross-entropy, as in nnU-Net", _cross_entropy_loss, {}, dice_weight=1.0),
    "label_smoothing": Method("label smoothing", _label_smoothing_loss, {"alpha": 0.1}),
    "svls": Method("spatially varying label smoothing", _of_logits(svls_cross_entropy), {"sigma": 1.0}),
    "focal": Method("focal loss", _of_logits(focal_cross_entropy), {"gamma": 3.0}),
    "mbls": Method("margin-based label smoothing", _of_logits(mbls_cross_entropy), {"alpha": 0.1, "margin": 5.0}),
    "nacl": Method("neighbour-aware calibration", _of_logits(nacl_cross_entropy), {"alpha": 0.1}),
    "ace_hard": Method("average calibration error in hard bins", _ace("hard"), {"alpha": 1.0}),
    "ace_soft": Method("average calibration error in soft bins", _ace("soft"), {"alpha": 1.0}),
    "vls": Method(
        "variational label smoothing of every voxel",
        _vls_loss,
        {"alpha": 0.1, "temperature": 1.0, "num_samples": 4, "beta": 0.001},
        dense_head=True,
    ),
    "calseg": Method(
        "CALSeg, in two stages",
        _calseg_loss,
        {"alpha": 0.4, "temperature": None, "num_samples": 8, "beta": 0.001,
         "latent_size": 4, "reconstruction": 0.1, "folds": 2, "first_stage_share": 0.5,
         "estimator": "posterior", "dice_labels": "soft"},
        dice_weight=0.5,
        soft_labels=True,
    ),
}  # fmt: skip
"""Every method of ``calseg train`` by its name.

To add a comparison method, write its loss and add an entry here. If it has a setting with a new name, also add a field
to :class:`calseg.training.TrainConfig`.

The defaults of "vls" and "calseg" come from the experiment of benchmarks/README.md, "Does it calibrate?", which shows
their scores beside those of other methods. The numbers here are for its tuning cases:

- "calseg", ``alpha``: with half of the updates in the first stage, Dice and ECE near the foreground on hippocampus are
  .863 and .0153 with 0.4, and .862 and .0095 with 0.5.
- "calseg", ``dice_weight``: with 1, the ECE is .0124 instead of .0095 (at ``alpha`` 0.5), at the same Dice.
- "calseg", ``folds``: with 4 instead of 2, Dice is .865 instead of .864, and the ECE the same, for 3 instead of 2 times
  the updates.
- "calseg", ``first_stage_share``: with 1 and 4 folds, Dice is .865 and the ECE .0200, for 5 instead of 3 times the
  updates.
- "calseg", ``num_samples``: the foreground probabilities vary by .01 to .04 over the latent codes that are drawn, so 8
  are enough.
- "ace_hard", "ace_soft", ``alpha``: the authors give the terms equal weights.
- "vls": ``alpha`` 0.3 with temperature 2 had a lower foreground ECE than the defaults, and a higher NLL.
"""
