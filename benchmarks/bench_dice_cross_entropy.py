"""Benchmark of Dice plus cross-entropy, forward and backward, with class indices and with soft labels.

The peers are the losses that segmentation is trained with: the formula of nnU-Net's ``DC_and_CE_loss``, and that loss
itself and MONAI's ``DiceCELoss`` if the packages are installed. The sums of Dice need the probabilities of all voxels
before the first gradient, so the logits are read twice. Byte model: two reads of the logits, of the labels and of the
soft labels if there are any, and one write of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import eager as peers
import pytest
import torch
from harness import Case, Loss, Problem, on_gpu, sized_gpu_cases
from torch import Tensor

import calseg

HARD = {"copy": 2.2, "eager": 20, "nnunet": 20, "monai": 20, "memory": 5}
SOFT = {"copy": 3.5, "memory": 5}
CPU_CASES = [
    *(
        Case("dice_cross_entropy", classes, edge, batch=2, labels=labels, compiled=labels == "int64", memory=True,
             targets=HARD)
        for classes, edge in ((2, 128), (3, 128), (4, 128), (14, 96)) for labels in ("int64", "uint8")
    ),
    *(Case("dice_cross_entropy", classes, 16, batch=2, targets={"eager": 1, "nnunet": 1, "monai": 1})
      for classes in (3, 14)),
    *(Case("soft_dice_cross_entropy", classes, edge, batch=2, memory=True, targets=SOFT)
      for classes, edge in ((3, 128), (4, 128), (14, 96))),
]  # fmt: skip
GPU_CASES = sized_gpu_cases("dice_cross_entropy", {"copy_share": 0.85, "eager": 5, "compile": 2}, batch=2)
CASES = GPU_CASES if on_gpu() else CPU_CASES


def build(case: Case) -> Problem:
    """Return the problem of a case. The peers take int64 labels only, so these are converted outside of their time."""
    logits, target = case.scores(), case.target()
    wide = target.long()
    soft = torch.softmax(case.scores(), 1) if case.operation.startswith("soft") else None

    def ours(logits: Tensor) -> Tensor:
        return calseg.vls_dice_cross_entropy(logits, target, soft_labels=soft)

    def eager(logits: Tensor) -> Tensor:
        return peers.dice_cross_entropy(logits, wide) if soft is None else peers.soft_dice_cross_entropy(logits, soft)

    rivals: dict[str, tuple[Loss, tuple[Tensor, ...]]] = {}
    if soft is None and find_spec("monai"):
        from monai.losses import DiceCELoss

        monai_loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
        rivals["monai"] = (lambda logits: monai_loss(logits, wide[:, None])), (logits,)
    if soft is None and find_spec("nnunetv2"):
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        dice = {"batch_dice": False, "do_bg": False, "smooth": 1e-5, "ddp": False}
        nnunet_loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        rivals["nnunet"] = (lambda logits: 1 + nnunet_loss(logits, wide[:, None])), (logits,)
    return Problem(ours, eager, (logits,), case.traffic(3 if soft is None else 5, 2), rivals=rivals)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dice_cross_entropy(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
