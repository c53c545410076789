"""Tests of the loss for MONAI against the losses of the installed package."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from cases import FLOATS, assert_accurate, class_weights, evaluate, id_of, labels, scores

import calseg

pytest.importorskip("monai")

from monai.data.meta_tensor import MetaTensor
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss
from monai.utils import set_determinism

from calseg.integrations.monai import OPTIONS, DiceVLSLoss

SHAPES = {"2d": (2, 4, 9, 7), "3d": (2, 3, 6, 5, 7), "two classes": (3, 2, 8, 6)}
LABELS = (torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64)
HARD: dict[str, Any] = {"to_onehot_y": True, "softmax": True}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_it_is_dice_ce_loss(shape, dtype, reduction, weighted):
    logits, target = scores(*shape, dtype=dtype), labels(shape)[:, None]
    weight = class_weights(shape[1]) if weighted else None
    combinations = product(
        (True, False), (True, False), ((1.0, 1.0), (0.7, 1.3)), ((1e-5, 1e-5, 0.0), (0.0, 1e-3, 0.1))
    )
    for number, (include_background, batch, factors, (smooth_nr, smooth_dr, smoothing)) in enumerate(combinations):
        options = {
            **HARD, "include_background": include_background, "batch": batch, "lambda_dice": factors[0],
            "lambda_ce": factors[1], "smooth_nr": smooth_nr, "smooth_dr": smooth_dr, "reduction": reduction,
            "label_smoothing": smoothing, "weight": weight,
        }  # fmt: skip
        label = target.to(LABELS[number % len(LABELS)])
        got = evaluate(partial(DiceVLSLoss(**options), target=label), {"input": logits})
        wanted = evaluate(partial(DiceCELoss(**options), target=target), {"input": logits.double()})
        assert got.value.dtype == dtype
        assert_accurate(got.value, wanted.value, ulps=32, scale=1.0, what=str(options))
        assert_accurate(got.gradients["input"], wanted.gradients["input"], ulps=32, what=str(options))


@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
def test_labels_of_every_dtype(dtype):
    shape = SHAPES["3d"]
    logits, target = scores(*shape), labels(shape)[:, None]
    wanted = DiceCELoss(**HARD)(logits, target)
    assert_accurate(DiceVLSLoss(**HARD)(logits, target.to(dtype)), wanted, ulps=4)
    one_hot = torch.nn.functional.one_hot(target[:, 0], shape[1]).movedim(-1, 1)
    weight = class_weights(shape[1])
    for options in ({}, {"weight": weight, "include_background": False, "batch": True}):
        wanted = DiceCELoss(softmax=True, **options)(logits, one_hot.double())
        assert_accurate(DiceVLSLoss(softmax=True, **options)(logits, one_hot.to(dtype)), wanted, ulps=4)


def test_arguments_have_the_order_and_the_defaults_of_monai():
    theirs = list(inspect.signature(DiceCELoss).parameters.values())
    ours = list(inspect.signature(DiceVLSLoss).parameters.values())[: len(theirs)]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
    assert set(OPTIONS) < set(inspect.signature(calseg.vls_dice_cross_entropy).parameters)


@pytest.mark.skipif("soft_label" not in inspect.signature(DiceLoss).parameters, reason="MONAI before 1.5")
def test_soft_labels_as_target():
    """The Dice term is that of MONAI's ``DiceLoss(soft_label=True)``."""
    shape = SHAPES["3d"]
    logits, soft = scores(*shape), torch.softmax(scores(*shape, seed=1), 1)
    for include_background, batch in product((True, False), (True, False)):
        options = {"include_background": include_background, "batch": batch, "softmax": True}
        wanted = evaluate(
            lambda input, options=options: (
                DiceLoss(soft_label=True, **options)(input, soft) + torch.nn.functional.cross_entropy(input, soft)
            ),
            {"input": logits},
        )
        for to_onehot_y in (False, True):
            loss = DiceVLSLoss(to_onehot_y=to_onehot_y, **options)
            got = evaluate(lambda input, loss=loss: loss(input, soft), {"input": logits})
            assert_accurate(got.value, wanted.value, ulps=16)
            assert_accurate(got.gradients["input"], wanted.gradients["input"], ulps=16)
    at_minimum = DiceVLSLoss(softmax=True, lambda_ce=0.0)(soft.log(), soft)
    beside = DiceVLSLoss(softmax=True, lambda_ce=0.0)(1.1 * soft.log(), soft)
    assert float(at_minimum) < 1e-12 < 1e-3 < float(beside)


def test_variational_labels_at_the_call():
    shape = SHAPES["3d"]
    logits, mu, logvar = (scores(*shape, seed=seed) for seed in range(3))
    target = labels(shape)[:, None].float()
    options = {"alpha": 0.4, "temperature": 2.0, "num_samples": 3, "beta": 0.1, "seed": 5}
    loss = DiceVLSLoss(**HARD, lambda_dice=0.5, **options)
    got = loss(logits, target, mu=mu, logvar=logvar)
    wanted = calseg.vls_dice_cross_entropy(
        logits, target, mu=mu, logvar=logvar, dice_weight=0.5, include_background=True, **options
    )
    assert torch.equal(got, wanted)
    soft = torch.softmax(mu, 1)
    got = loss(logits, target, soft_labels=soft)
    wanted = calseg.vls_dice_cross_entropy(logits, target, soft_labels=soft, dice_weight=0.5, include_background=True)
    assert torch.equal(got, wanted)
    ignoring = DiceVLSLoss(**HARD, ignore_index=1)
    assert_accurate(
        ignoring(logits, target),
        calseg.vls_dice_cross_entropy(logits, target, ignore_index=1, include_background=True), ulps=1,
    )  # fmt: skip


def test_deep_supervision():
    """MONAI shrinks the target by nearest neighbours, which needs floats, and casts the outputs to float32."""
    sizes = ((16, 12, 20), (8, 6, 10), (4, 3, 5))
    levels = {f"level{n}": scores(2, 3, *size, seed=n, dtype=torch.bfloat16) for n, size in enumerate(sizes)}
    target = MetaTensor(labels((2, 3, *sizes[0]))[:, None].float())
    results = [
        evaluate(lambda loss=loss, **outputs: DeepSupervisionLoss(loss(**HARD))(list(outputs.values()), target), levels)
        for loss in (DiceVLSLoss, DiceCELoss)
    ]
    torch.testing.assert_close(results[0].value, torch.Tensor(results[1].value))
    for name in levels:
        torch.testing.assert_close(*(each.gradients[name] for each in results))


def test_meta_tensors():
    """Labels as a data set gives them, logits as a network makes them of such images, and class weights."""
    net, label = torch.nn.Conv3d(1, 3, 3, padding=1), labels((2, 3, 8, 9, 10))[:, None].float()
    image, gradients = torch.randn(2, 1, 8, 9, 10), []
    loss = DiceVLSLoss(**HARD, weight=MetaTensor(torch.tensor([1.0, 2.0, 3.0])))
    assert type(loss.weight) is torch.Tensor
    for kind in (torch.Tensor, MetaTensor):
        value = loss(net(image.as_subclass(kind)), label.as_subclass(kind))
        assert type(value) is torch.Tensor
        value.backward()
        gradients.append(net.weight.grad.clone())
        net.zero_grad()
    assert torch.equal(*gradients)


def test_as_a_module():
    """Class weights move with the module, and are not in its state, as in the other losses of calseg."""
    loss = DiceVLSLoss(**HARD, weight=[1, 2, 3], alpha=0.3)
    assert loss.weight.dtype == torch.float32
    assert not loss.state_dict()
    logits, target = scores(1, 3, 6, 7), labels((1, 3, 6, 7))[:, None]
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), loss.double()):
        assert torch.equal(other(logits, target), loss(logits, target))
    assert "alpha=0.3" in repr(loss)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))


def test_low_precision():
    """Under autocast the loss is float32, and everything is summed in float32, as in ``DiceCELoss``."""
    logits, target = scores(1, 3, 12, 10, dtype=torch.bfloat16), labels((1, 3, 12, 10))[:, None].float()
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = DiceVLSLoss(**HARD)(logits, target), DiceCELoss(**HARD)(logits.float(), target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted)


def test_oddities():
    loss, monai = DiceVLSLoss(**HARD), DiceCELoss(**HARD)
    x = scores(2, 3, 6, 5, 4)
    background = torch.zeros(2, 1, 6, 5, 4)
    assert_accurate(loss(x, background), monai(x, background), ulps=8)
    last = x.to(memory_format=torch.channels_last_3d)
    assert_accurate(loss(last, background), monai(x, background), ulps=8)
    assert float(loss(x[:0], background[:0])) == 0.0
    leaf = background.clone().requires_grad_()
    assert not loss(x, leaf).requires_grad
    soft = torch.softmax(scores(2, 3, 6, 5, 4, seed=1), 1).requires_grad_()
    loss(x, soft).backward()  # that of the cross-entropy: the Dice term holds its labels fixed
    assert_accurate(soft.grad, -torch.log_softmax(x, 1) / 240, ulps=8)
    assert float(DiceVLSLoss(**HARD, ignore_index=0, smooth_nr=0.0)(x, background)) == 0.0
    assert math.isnan(float(loss(x * torch.nan, background)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax": False}, "softmax: got False, wanted True: the input is logits"),
        ({"sigmoid": True}, "sigmoid: got True, wanted False"),
        ({"other_act": torch.tanh}, "other_act: got .*tanh.*, wanted None"),
        ({"squared_pred": True}, "squared_pred: got True"),
        ({"jaccard": True}, "jaccard: got True"),
        ({"reduction": "none"}, "reduction: got 'none', wanted 'mean' or 'sum'"),
        ({"batch": 1}, "batch: got 1"),
        ({"lambda_dice": -1.0}, "lambda_dice: got -1.0, wanted a number of at least 0"),
        ({"smooth_dr": -1e-5}, "smooth_dr: got -1e-05"),
        ({"label_smoothing": 2.0}, "label_smoothing: got 2.0"),
        ({"weight": [1.0, -1.0]}, r"weight: got \[1.0, -1.0\], wanted a number of at least 0"),
        ({"weight": 2.0}, "weight: got 2.0"),
        ({"weight": "12"}, "weight: got '12'"),
        ({"alfa": 0.2}, "unknown option 'alfa', wanted some of ignore_index, alpha"),
    ],
)
def test_arguments_that_cannot_be_honoured(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DiceVLSLoss(**{**HARD, **options})


X, Y = scores(2, 3, 4, 5), torch.zeros(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("input", "target", "message"),
    [
        ([X, X], Y, r"input: got a list of 2, .*DeepSupervisionLoss\(DiceVLSLoss"),
        (X[:, :1], Y, "input: got a float64 tensor .*at least 2 classes: for a single channel, give the background"),
        (X[0, 0, 0], Y, "input: got .*at least 2 classes"),
        (X, Y[:, 0], r"target: got .*wanted class indices \[B, 1, \*S\] or floating-point soft labels \[B, 3, \*S\]"),
        (X, Y[:1], "target: got a float32 tensor of shape .1, 1, 4, 5. on cpu, wanted shape .2, 4, 5."),
        (X, Y[..., :4], "target: got"),
        (X, Y.repeat(1, 3, 1, 1).long(), "target: got a int64 tensor"),
        (X, [Y], "target: got .*list.*, wanted a tensor"),
        (X, None, "target: got None"),
        (X.long(), Y, "input: got a int64 tensor"),
        (X, Y + 0.5, r"target\[0, 0, 0, 0\] is 0.5: wanted a class"),
        (X, Y + 3, r"target\[0, 0, 0, 0\] is 3.0: wanted a class in \[0, 3\)"),
    ],
    ids=str,
)
def test_bad_tensors(input, target, message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        DiceVLSLoss(**HARD)(input, target)


def test_class_indices_need_to_onehot_y():
    with pytest.raises(ValueError, match=r"wanted one-hot labels .*for class indices, to_onehot_y=True"):
        DiceVLSLoss(softmax=True)(X, Y)
    with pytest.raises(ValueError, match="weight: got"):
        DiceVLSLoss(**HARD, weight=[1.0, 2.0])(X, Y)


def test_noise_is_that_of_the_seed_of_monai():
    mu = scores(1, 3, 8, 8)
    values = []
    for _ in range(2):
        set_determinism(3)
        values.append(DiceVLSLoss(**HARD, alpha=0.5)(mu, torch.zeros(1, 1, 8, 8), mu=mu, logvar=mu))
    set_determinism(None)
    assert torch.equal(*values)
