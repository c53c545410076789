"""Tests of Dice plus cross-entropy: formulas of others, labels that wait in the gradient's memory, processes."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from functools import partial
from pathlib import Path

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import FLOATS, assert_accurate, evaluate, id_of, labels, scores
from torch import Tensor

import calseg
from calseg import checks

SHAPE = (2, 4, 7, 6, 5)


def soft_dice(logits: Tensor, target: Tensor, *, batch_dice: bool, do_bg: bool, smooth: float = 1e-5) -> Tensor:
    """Return nnU-Net's ``MemoryEfficientSoftDiceLoss`` with ``apply_nonlin=softmax``."""
    start = 0 if do_bg else 1
    x = torch.softmax(logits, 1)[:, start:]
    y = F.one_hot(target.long(), logits.shape[1]).movedim(-1, 1)[:, start:]
    axes = tuple(range(2, x.dim()))
    intersect, sum_pred, sum_gt = ((t * 1.0).sum(axes) for t in (x * y, x, y))
    if batch_dice:
        intersect, sum_pred, sum_gt = (t.sum(0) for t in (intersect, sum_pred, sum_gt))
    dc = (2 * intersect + smooth) / torch.clip(sum_gt + sum_pred + smooth, 1e-8)
    return -dc.mean()


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("include_background", [False, True])
def test_on_hard_labels_it_is_the_loss_of_nnunet(backend, batch_dice, include_background):
    """nnU-Net's ``DC_and_CE_loss`` is smaller by the weight of Dice, and has the same gradient."""
    logits, target = scores(*SHAPE), labels(SHAPE, ignore_index=None)
    got = evaluate(
        lambda input: calseg.vls_dice_cross_entropy(
            input, target, batch_dice=batch_dice, include_background=include_background, dice_weight=0.7, ce_weight=1.3,
            backend=backend,
        ),
        {"input": logits},
    )  # fmt: skip
    wanted = evaluate(
        lambda input: (
            1.3 * F.cross_entropy(input, target)
            + 0.7 * soft_dice(input, target, batch_dice=batch_dice, do_bg=include_background)
        ),
        {"input": logits},
    )
    assert_accurate(got.value, wanted.value + 0.7, ulps=64)
    assert_accurate(got.gradients["input"], wanted.gradients["input"], ulps=64)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("include_background", [False, True])
def test_on_hard_labels_it_is_the_loss_of_monai(backend, batch_dice, include_background):
    losses = pytest.importorskip("monai.losses")
    logits, target = scores(*SHAPE), labels(SHAPE, ignore_index=None)
    options = {"include_background": include_background, "to_onehot_y": True, "softmax": True, "batch": batch_dice}
    monai = losses.DiceCELoss(**options, smooth_nr=1e-5, smooth_dr=1e-5, lambda_dice=0.7, lambda_ce=1.3)
    ours = {"batch_dice": batch_dice, "include_background": include_background, "dice_weight": 0.7, "ce_weight": 1.3}
    got = evaluate(
        lambda input: calseg.vls_dice_cross_entropy(input, target, backend=backend, **ours), {"input": logits}
    )
    wanted = evaluate(lambda input: monai(input, target[:, None]), {"input": logits})
    assert_accurate(got.value, wanted.value, ulps=64)
    assert_accurate(got.gradients["input"], wanted.gradients["input"], ulps=64)


def test_soft_labels_are_its_minimum(backend):
    """Where the probabilities are the soft labels, the overlap term is 0, and Dice as such has a slope."""
    probabilities = torch.softmax(scores(*SHAPE), 1)
    target = torch.zeros(2, 7, 6, 5, dtype=torch.uint8)
    options = {"soft_labels": probabilities, "ce_weight": 0.0, "backend": backend}
    at_minimum = calseg.vls_dice_cross_entropy(probabilities.log(), target, **options)
    beside = calseg.vls_dice_cross_entropy(1.1 * probabilities.log(), target, **options)
    assert float(at_minimum) < 1e-12 < 1e-3 < float(beside)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("include_background", [False, True])
def test_class_weights_of_dice(backend, reduction, include_background):
    """They are factors of the dice of the classes, whatever the weights of the cross-entropy, and divide nothing."""
    logits, target = scores(*SHAPE), labels(SHAPE)
    factors = torch.tensor([0.5, 7.0, 0.0, 7.0, 2.0, 7.0, 3.0, 7.0])[::2]
    options = {
        "dice_class_weight": factors, "weight": torch.tensor([1.0, 2.0, 0.25, 1.0]).double(),
        "reduction": reduction, "include_background": include_background, "smooth": (0.5, 0.25), "ignore_index": -100,
    }  # fmt: skip
    got = evaluate(
        lambda input: calseg.vls_dice_cross_entropy(input, target, backend=backend, **options), {"input": logits}
    )
    wanted = evaluate(lambda input: naive.vls_dice_cross_entropy(input, target, **options), {"input": logits})
    assert_accurate(got.value, wanted.value, ulps=16, scale=1.0)
    assert_accurate(got.gradients["input"], wanted.gradients["input"], ulps=32)


def test_where_nothing_counts_the_loss_is_0(backend):
    target = torch.full((2, 7, 6, 5), -100)
    tensors = {"input": scores(*SHAPE), "mu": scores(*SHAPE, seed=1), "logvar": scores(*SHAPE, seed=2)}
    for names, smooth in itertools.product((("input",), ("input", "mu", "logvar")), (1e-5, (0.0, 1e-5))):
        got = evaluate(
            partial(calseg.vls_dice_cross_entropy, target=target, seed=1, smooth=smooth, backend=backend),
            {name: tensors[name] for name in names},
        )
        assert float(got.value) == 0.0
        assert all(torch.count_nonzero(gradient) == 0 for gradient in got.gradients.values())


@pytest.mark.parametrize("batch_dice", [False, True])
def test_many_items(backend, batch_dice):
    """More ratios than a step of a kernel takes, with a scale that a tensor holds, and expanded class weights."""
    shape = (700, 3, 5)
    target, options = labels(shape), {"batch_dice": batch_dice, "dice_class_weight": torch.tensor([0.5]).expand(3)}
    got = evaluate(
        lambda input: calseg.vls_dice_cross_entropy(
            input, target, scale=torch.tensor(0.25), backend=backend, **options
        ),
        {"input": scores(*shape)},
    )  # fmt: skip
    wanted = evaluate(
        lambda input: 0.25 * naive.vls_dice_cross_entropy(input, target, **options), {"input": scores(*shape)}
    )
    assert_accurate(got.value, wanted.value, ulps=16)
    assert_accurate(got.gradients["input"], wanted.gradients["input"], ulps=32)


def test_a_class_that_nobody_has_adds_nothing(backend):
    """Neither labels nor probabilities have class 2. With smooth=0 its ratio would be 0 / 0."""
    logits = scores(1, 3, 50)
    logits[:, 2] = -torch.inf
    target = torch.arange(50)[None] % 2
    got = calseg.vls_dice_cross_entropy(logits, target, smooth=0.0, ce_weight=0.0, backend=backend)
    two = calseg.vls_dice_cross_entropy(logits[:, :2], target, smooth=0.0, ce_weight=0.0, backend=backend)
    assert math.isclose(float(got), float(two) / 2, rel_tol=1e-12)


def sampled(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "input": scores(*SHAPE, dtype=dtype),
        "mu": scores(*SHAPE, dtype=dtype, seed=1),
        "logvar": scores(*SHAPE, dtype=dtype, seed=2, scale=0.5),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_sampled_labels_are_held_fixed(backend, dtype):
    """The gradient of the logits is that of the same labels, given; mu and logvar have that of the cross-entropy."""
    tensors, target = sampled(dtype), labels(SHAPE)
    options = {"alpha": 0.6, "seed": 5, "num_samples": 3}
    loss = lambda **given: calseg.vls_dice_cross_entropy(target=target, backend=backend, **options, **given)  # noqa: E731
    got = evaluate(loss, tensors)
    wide = {name: t.double() for name, t in tensors.items()}
    soft = calseg.sample_soft_labels(wide["mu"], wide["logvar"], target, backend="reference", **options)
    given = evaluate(
        lambda input: calseg.vls_dice_cross_entropy(input, target, soft_labels=soft, backend="reference"),
        {"input": wide["input"]},
    )
    ulps = 64 if dtype in (torch.float32, torch.float64) else 512  # labels of 16 bits wait as multiples of 1 / 65535
    assert_accurate(got.gradients["input"], given.gradients["input"], ulps=ulps)
    alone = evaluate(
        lambda **given: calseg.vls_cross_entropy(target=target, backend="reference", **options, **given), wide
    )
    for name in ("mu", "logvar"):
        assert_accurate(got.gradients[name], alone.gradients[name], ulps=64)


def test_a_graph_that_is_kept_gives_its_gradients_again(backend):
    tensors = {name: t.requires_grad_() for name, t in sampled(torch.float32).items()}
    loss = calseg.vls_dice_cross_entropy(target=labels(SHAPE), seed=5, backend=backend, **tensors)
    first = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    again = torch.autograd.grad(3 * loss, list(tensors.values()))
    for before, after, gradient in zip(kept, again, first, strict=True):
        assert torch.equal(before, gradient)
        torch.testing.assert_close(after, 3 * before)
    with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
        torch.autograd.grad(loss, list(tensors.values()))


@pytest.mark.parametrize("kind", ["hard", "given", "sampled"])
def test_same_bits_for_any_number_of_threads(cpu, set_threads, kind):
    shape = (2, 5, 40, 40, 23)
    tensors = {"input": scores(*shape, dtype=torch.float32)}
    if kind == "given":
        tensors["soft_labels"] = torch.softmax(scores(*shape, seed=3), 1).float()
    if kind == "sampled":
        tensors |= {name: scores(*shape, dtype=torch.float32, seed=s) for s, name in enumerate(("mu", "logvar"), 1)}
    function = lambda **given: calseg.vls_dice_cross_entropy(target=labels(shape), seed=1, backend=cpu, **given)  # noqa: E731
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(evaluate(function, tensors))
    for other in results[1:]:
        assert torch.equal(other.value, results[0].value)
        assert all(torch.equal(other.gradients[name], g) for name, g in results[0].gradients.items())


def test_sums_of_many_voxels(cpu):
    """Sums over 8 million voxels, of which most add a little, agree with float64 to 1e-6 of Dice."""
    shape = (1, 2, 128, 256, 256)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    logits[:, 1] -= 6.0
    target = (torch.rand(shape[0], *shape[2:], generator=generator) < 0.001).to(torch.uint8)
    got = calseg.vls_dice_cross_entropy(logits, target, ce_weight=0.0, backend=cpu)
    p = torch.sigmoid(logits[:, 1].double() - logits[:, 0].double())
    wanted = 1 - (2 * (p * target).sum() + 1e-5) / (p.sum() + target.sum() + 1e-5)
    assert abs(float(got) - float(wanted)) < 1e-6


def _rank(rank: int, store: str, out: str) -> None:
    warnings.simplefilter("error", FutureWarning)  # of PyTorch, which would reach the user
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    target = labels((4, 3, 9, 8), ignore_index=None)[2 * rank : 2 * rank + 2]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return calseg.vls_dice_cross_entropy(
            logits, target, batch_dice=True, process_group=torch.distributed.group.WORLD, ce_weight=0.0
        )

    for name, call in (("eager", loss), ("compiled", torch.compile(loss, backend="aot_eager"))):
        logits = scores(4, 3, 9, 8)[2 * rank : 2 * rank + 2].requires_grad_()
        value = call(logits)
        value.backward()
        torch.save((value.detach(), logits.grad), f"{out}/{name}-{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_batch(tmp_path: Path) -> None:
    """Both ranks have the loss of the whole batch. Each has the gradient of the sum of both losses."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    logits = scores(4, 3, 9, 8).requires_grad_()
    loss = calseg.vls_dice_cross_entropy(
        logits, labels((4, 3, 9, 8), ignore_index=None), batch_dice=True, ce_weight=0.0
    )
    loss.backward()
    for name in ("eager", "compiled"):
        parts = [torch.load(tmp_path / f"{name}-{rank}") for rank in (0, 1)]
        for value, _ in parts:
            torch.testing.assert_close(value, loss.detach(), rtol=1e-14, atol=0)
        gradient = torch.cat([gradient for _, gradient in parts])
        torch.testing.assert_close(gradient, 2 * logits.grad, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smooth": -1.0}, "smooth: got -1.0"),
        ({"smooth": (1.0, math.inf)}, "smooth: got inf"),
        ({"smooth": (1.0, 1.0, 1.0)}, "smooth: got .1.0, 1.0, 1.0."),
        ({"reduction": "none"}, "reduction: got 'none' .*, wanted 'mean' or 'sum'"),
        ({"dice_class_weight": torch.ones(3)}, "dice_class_weight: got a float32 tensor of shape .3."),
        ({"dice_class_weight": [1.0] * 4}, "dice_class_weight: got .*list"),
        ({"dice_weight": math.nan}, "dice_weight: got nan"),
        ({"batch_dice": 1}, "batch_dice: got 1"),
        ({"process_group": object()}, "process_group: got one without batch_dice"),
        ({"scale": math.inf}, "scale: got inf"),
        ({"scale": torch.ones(2)}, "scale: got a float32 tensor"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        calseg.vls_dice_cross_entropy(scores(*SHAPE), labels(SHAPE), **options)


def test_one_class_has_no_foreground():
    with pytest.raises(ValueError, match="include_background: got False for one class"):
        calseg.vls_dice_cross_entropy(scores(1, 1, 8), torch.zeros(1, 8, dtype=torch.uint8))


def test_regions_that_overlap_are_refused():
    """Targets of the shape of the scores are one-hot or regions, which exclude each other in a softmax."""
    regions = torch.ones(SHAPE, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one-hot or like regions that overlap"):
        calseg.vls_dice_cross_entropy(scores(*SHAPE), regions)


def test_soft_labels_that_do_not_sum_to_1_are_refused(cpu, monkeypatch):
    """With CALSEG_CHECK_LABELS=1, regions that overlap are found where floats hold them."""
    monkeypatch.setattr(checks, "CHECK_LABELS", True)
    logits, target = scores(*SHAPE), labels(SHAPE)
    regions = torch.ones(SHAPE)
    with pytest.raises(ValueError, match=r"soft_labels\[0, :, 0, 0, 0\] sums to 4, .*regions that overlap"):
        calseg.vls_dice_cross_entropy(logits, target, soft_labels=regions, backend=cpu)
    with pytest.raises(ValueError, match=r"target\[0, :, 0, 0, 0\] sums to 4, .*regions that overlap"):
        calseg.vls_dice_cross_entropy(logits, regions, backend=cpu)


def test_import_of_the_module_needs_no_process_group():
    assert "RANK" not in os.environ
    loss = calseg.VLSDiceCrossEntropyLoss(batch_dice=True, smooth=1.0)
    logits, target = scores(*SHAPE), labels(SHAPE)
    assert torch.equal(loss(logits, target), calseg.vls_dice_cross_entropy(logits, target, batch_dice=True, smooth=1.0))
