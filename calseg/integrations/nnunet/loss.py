"""The losses of the trainers: nnU-Net's Dice plus cross-entropy over all levels of deep supervision, fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from torch import Tensor, nn

from calseg.functional import vls_dice_cross_entropy, vls_elbo

NO_IGNORE = -100
"""An ``ignore_index`` that no label has."""


class DiceCrossEntropy(nn.Module):
    """nnU-Net's ``DC_and_CE_loss`` in its ``DeepSupervisionWrapper``, computed by calseg's fused operation.

    On hard labels, value and gradient are those of nnU-Net's loss. The weights of the levels of deep supervision cost
    no pass over the gradients. Soft labels are used where there are some; see :meth:`forward`.

    Args:
        loss: the loss that nnU-Net built, whose settings are taken over.

    Raises:
        NotImplementedError: the loss is of another kind, as that for regions is.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.weights: tuple[float, ...] = (1.0,)
        if isinstance(loss, DeepSupervisionWrapper):
            self.weights = tuple(map(float, loss.weight_factors))
            loss = loss.loss
        ce: Any = getattr(loss, "ce", None)
        if type(loss) is not DC_and_CE_loss or type(ce) is not RobustCrossEntropyLoss:
            raise NotImplementedError(
                f"calseg has nnU-Net's Dice plus cross-entropy, for exclusive classes; got {type(loss).__name__}"
            )
        dice, ignore_label = loss.dc, loss.ignore_label
        self.ignore_index = NO_IGNORE if ignore_label is None else int(ignore_label)
        self.over_processes = bool(dice.ddp and dice.batch_dice)
        self.offset = float(loss.weight_dice) * sum(self.weights)
        self.options: dict[str, Any] = {
            "ce_weight": float(loss.weight_ce),
            "dice_weight": float(loss.weight_dice),
            "include_background": bool(dice.do_bg),
            "batch_dice": bool(dice.batch_dice),
            "smooth": float(dice.smooth),
            "label_smoothing": float(ce.label_smoothing),
            "weight": ce.weight,
        }

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the loss of a batch, a 0-d tensor.

        Args:
            output: logits ``[B, C, *S]``, or a list of them, one for each level of deep supervision.
            target: labels ``[B, 1, *S]``, or a list with those of every level, perhaps followed by the soft labels
                ``[B, C, *S]`` of every level.
        """
        outputs = [output] if isinstance(output, Tensor) else list(output)
        targets = [target] if isinstance(target, Tensor) else list(target)
        labels, soft = targets[: len(outputs)], targets[len(outputs) :]
        soft_or_none: list[Tensor | None] = [*soft] or [None] * len(outputs)
        levels = zip(self.weights, outputs, labels, soft_or_none, strict=True)
        losses = [
            self.of_level(logits, label, soft_labels, weight=weight)
            for weight, logits, label, soft_labels in levels
            if weight
        ]
        # nnU-Net's loss has -dice where calseg's has 1 - dice.
        return torch.stack(losses).sum() - self.offset

    def of_level(self, logits: Tensor, label: Tensor, soft_labels: Tensor | None, *, weight: float) -> Tensor:
        """Return ``weight`` times the loss of one level."""
        return self.fused(logits, label, soft_labels=soft_labels, scale=weight)

    def fused(self, logits: Tensor, label: Tensor, **options: Any) -> Tensor:
        """Call the fused operation with nnU-Net's settings."""
        group = torch.distributed.group.WORLD if self.over_processes else None
        return vls_dice_cross_entropy(
            logits, label, ignore_index=self.ignore_index, process_group=group, **self.options, **options
        )


class VLSDiceCrossEntropy(DiceCrossEntropy):
    """The loss of a network with dense heads: Dice plus cross-entropy on soft labels that the heads sample.

    mu and logvar are trained by the evidence lower bound of the labels, and get no gradient from the soft labels. A
    network without its heads, as in validation, gets nnU-Net's loss.

    Args:
        loss: as in :class:`DiceCrossEntropy`.
        classes: number of classes. An output with three times as many channels is logits, mu and logvar.
        alpha: share of the estimate in the soft labels.
        temperature: of the estimate's softmax.
        num_samples: noise samples per voxel.
        beta: factor of the KL term.
    """

    def __init__(
        self, loss: Any, *, classes: int, alpha: float, temperature: float, num_samples: int, beta: float
    ) -> None:
        super().__init__(loss)
        self.classes, self.num_samples, self.beta = classes, num_samples, beta
        self.smoothing = {"alpha": alpha, "temperature": temperature, "num_samples": num_samples, "beta": 0.0}

    def of_level(self, logits: Tensor, label: Tensor, soft_labels: Tensor | None, *, weight: float) -> Tensor:
        """Return ``weight`` times the loss of one level."""
        if logits.shape[1] == self.classes:
            return super().of_level(logits, label, soft_labels, weight=weight)
        logits, mu, logvar = logits.split(self.classes, 1)
        # A sum over a count of at least 1: the mean of a patch without a labelled voxel is not a number.
        elbo = vls_elbo(
            mu, logvar, label, num_samples=self.num_samples, beta=self.beta, ignore_index=self.ignore_index,
            reduction="sum", scale=weight * self.options["ce_weight"] / self._count(label),
        )  # fmt: skip
        return elbo + self.fused(logits, label, mu=mu.detach(), logvar=logvar.detach(), scale=weight, **self.smoothing)

    def _count(self, label: Tensor) -> float | Tensor:
        """Return the number of voxels that count, at least 1."""
        if self.ignore_index == NO_IGNORE:
            return max(label.numel(), 1)
        return (label != self.ignore_index).sum().clamp(min=1)
