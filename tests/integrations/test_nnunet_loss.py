"""Tests of the losses of nnU-Net's trainers: they equal those of the package, in value and gradient."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("nnunetv2")

from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from calseg.integrations.nnunet.loss import DiceCrossEntropy, VLSDiceCrossEntropy

CLASSES, IGNORE = 3, 3
WEIGHTS = (4 / 7, 2 / 7, 1 / 7, 0.0)
VLS = {"classes": CLASSES, "alpha": 0.3, "temperature": 1.0, "num_samples": 4, "beta": 0.001}


def nnunet_loss(*, batch_dice: bool = False, ignore: bool = False, ddp: bool = False, deep: bool = True) -> Any:
    """The loss as ``nnUNetTrainer._build_loss`` makes it."""
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": ddp}
    loss = DC_and_CE_loss(
        dice, {}, weight_ce=1, weight_dice=1, ignore_label=IGNORE if ignore else None,
        dice_class=MemoryEfficientSoftDiceLoss,
    )  # fmt: skip
    return DeepSupervisionWrapper(loss, WEIGHTS) if deep else loss


def batch(dims: int, *, ignore: bool = False, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and labels of four levels, int16 ``[B, 1, *S]`` as nnU-Net's loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [[side // 2**level for side in (16, 24, 32)[:dims]] for level in range(4)]
    logits = [3 * torch.randn(2, CLASSES, *shape, generator=generator) for shape in shapes]
    target = [torch.randint(0, CLASSES + ignore, (2, 1, *shape), generator=generator) for shape in shapes]
    return logits, [label.to(torch.int16) for label in target]


def value_and_gradients(loss: Any, logits: list[Tensor], *targets: Any) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [level.clone().requires_grad_() for level in logits]
    value = loss(leaves, *targets)
    return value.detach(), list(torch.autograd.grad(value, leaves, allow_unused=True))


@pytest.mark.parametrize(
    ("dims", "batch_dice", "ignore"), list(itertools.product((2, 3), (False, True), (False, True))), ids=str
)
def test_equals_the_loss_of_nnunet(dims: int, batch_dice: bool, ignore: bool) -> None:
    """The value too: nnU-Net's users compare it with earlier runs. A level of weight 0 is not computed."""
    theirs = nnunet_loss(batch_dice=batch_dice, ignore=ignore)
    ours = DiceCrossEntropy(theirs)
    logits, target = batch(dims, ignore=ignore)
    value, gradients = value_and_gradients(ours, logits, target)
    wanted, wanted_gradients = value_and_gradients(theirs, logits, target)
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
    for gradient, other in zip(gradients[:3], wanted_gradients[:3], strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
    assert gradients[3] is wanted_gradients[3] is None


def test_without_deep_supervision() -> None:
    theirs = nnunet_loss(deep=False)
    logits, target = batch(3)
    torch.testing.assert_close(DiceCrossEntropy(theirs)(logits[0], target[0]), theirs(logits[0], target[0]))


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("kind", ["plain", "vls", "vls in training"])
def test_a_batch_without_labels_is_finite_and_has_no_gradient(kind: str, batch_dice: bool) -> None:
    theirs = nnunet_loss(batch_dice=batch_dice, ignore=True)
    ours = DiceCrossEntropy(theirs) if kind == "plain" else VLSDiceCrossEntropy(theirs, **VLS)
    logits, target = batch(3)
    target = [torch.full_like(label, IGNORE) for label in target]
    if kind == "vls in training":
        logits = [level.repeat(1, 3, 1, 1, 1) for level in logits]
    value, gradients = value_and_gradients(ours, logits, target)
    assert float(value) == pytest.approx(-1)  # as nnU-Net's
    assert all(not gradient.any() for gradient in gradients[:3])


def test_vls_without_its_heads_equals_the_loss_of_nnunet() -> None:
    theirs, (logits, target) = nnunet_loss(), batch(2)
    torch.testing.assert_close(VLSDiceCrossEntropy(theirs, **VLS)(logits, target), theirs(logits, target))


def test_vls_trains_all_heads_and_samples() -> None:
    """The labels have their share of the gradients: with alpha 0, that of the logits is nnU-Net's."""
    theirs, (logits, target) = nnunet_loss(), batch(3)
    wide = [torch.cat([level, level, torch.full_like(level, -1.4)], 1) for level in logits]
    gradients = {}
    for alpha in (0.0, 0.3):
        torch.manual_seed(0)
        value, found = value_and_gradients(VLSDiceCrossEntropy(theirs, **{**VLS, "alpha": alpha}), wide, target)
        assert value.isfinite()
        assert all(part.any() for level in found[:3] for part in level.split(CLASSES, 1))
        gradients[alpha] = found[0][:, :CLASSES]
    wanted = value_and_gradients(theirs, logits, target)[1][0]
    torch.testing.assert_close(gradients[0.0], wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
    assert not torch.allclose(gradients[0.3], wanted, rtol=1e-2)


def test_soft_labels_that_are_onehot_give_the_loss_of_the_labels() -> None:
    theirs, (logits, target) = nnunet_loss(ignore=True), batch(3, ignore=True)
    ours = DiceCrossEntropy(theirs)
    soft = [(label == torch.arange(CLASSES).view(-1, 1, 1, 1)) for label in target]
    soft = [(65535 * level.int()).to(torch.uint16) for level in soft]
    value, gradients = value_and_gradients(ours, logits, [*target, *soft])
    wanted, wanted_gradients = value_and_gradients(ours, logits, target)
    torch.testing.assert_close(value, wanted)
    for gradient, other in zip(gradients[:3], wanted_gradients[:3], strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-8)


def test_float16_logits_are_reduced_in_float32() -> None:
    """A volume of 2^17 voxels would overflow float16."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, CLASSES, 32, 64, 64, generator=generator).half()
    target = torch.randint(0, CLASSES, (1, 1, 32, 64, 64), generator=generator).to(torch.int16)
    loss = DiceCrossEntropy(nnunet_loss(deep=False))
    with torch.autocast("cpu", torch.float16):
        value = loss(logits, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.float(), target), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does
def test_compiles_without_a_break() -> None:
    logits, target = batch(3, ignore=True)
    loss = DiceCrossEntropy(nnunet_loss(ignore=True, batch_dice=True))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, gradients = value_and_gradients(compiled, logits, target)
    wanted, wanted_gradients = value_and_gradients(loss, logits, target)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradients[0], wanted_gradients[0])


@pytest.mark.parametrize(
    "loss", [DC_and_BCE_loss({}, {"do_bg": True}, dice_class=MemoryEfficientSoftDiceLoss), torch.nn.MSELoss()]
)
def test_other_losses_are_refused(loss: torch.nn.Module) -> None:
    with pytest.raises(NotImplementedError, match=type(loss).__name__):
        DiceCrossEntropy(DeepSupervisionWrapper(loss, WEIGHTS))


def _rank(rank: int, store: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    try:
        theirs = nnunet_loss(batch_dice=True, ddp=True)
        logits, target = batch(3, seed=rank)
        torch.save(
            [value_and_gradients(loss, logits, target) for loss in (DiceCrossEntropy(theirs), theirs)], out + str(rank)
        )
        torch.distributed.barrier()  # a rank that leaves breaks the connections of the other
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """nnU-Net sums Dice over the ranks where it trains with ``batch_dice``."""
    places = str(tmp_path / "store"), str(tmp_path / "rank")
    other = torch.multiprocessing.get_context("spawn").Process(target=_rank, args=(1, *places), daemon=True)
    other.start()
    _rank(0, *places)
    other.join()
    assert other.exitcode == 0
    for rank in range(2):
        (value, gradients), (wanted, wanted_gradients) = torch.load(tmp_path / f"rank{rank}")
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
        for gradient, other in zip(gradients[:3], wanted_gradients[:3], strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
