"""The short way of small inputs (csrc/small_cross_entropy.h): bit for bit the general one, or none at all."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import LABELS, LAYOUTS, SHAPES, id_of, labels, scores

import calseg
from calseg import ops

pytestmark = pytest.mark.skipif(ops.small_cross_entropy is None, reason="no native engine")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """The gradient's memory is taken in C++, which the fixture of this name for all tests does not see."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def short(logits, target, ignore_index=-100, reduction="mean", label_smoothing=0.0, needs_gradient=True):
    return ops.small_cross_entropy(logits, target, ignore_index, reduction, label_smoothing, needs_gradient, 2)


def value_and_gradient(logits, target, **options):
    leaf = logits.detach().requires_grad_()
    loss = calseg.vls_cross_entropy(leaf, target, **options)
    (2.5 * loss).backward()
    return loss.detach(), leaf.grad


def assert_both_ways(logits, target, **options):
    """What a call without a backend gives is what ``backend="cpu"`` gives, which takes the general way."""
    value, gradient = value_and_gradient(logits, target, **options)
    wanted, wanted_gradient = value_and_gradient(logits, target, backend="cpu", **options)
    assert value.dtype == wanted.dtype
    assert torch.equal(value, wanted)
    assert gradient.stride() == wanted_gradient.stride()
    assert torch.equal(gradient, wanted_gradient)
    assert torch.equal(calseg.vls_cross_entropy(logits, target, **options), wanted)  # no gradient is needed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_is_the_general_way(shape, dtype, reduction, label_smoothing):
    logits = scores(*SHAPES[shape](5), dtype=dtype)
    target = labels(logits.shape, ignore_index=3)
    taken = short(logits.requires_grad_(), target, 3, reduction, label_smoothing)
    assert taken is not None
    assert taken[1].shape == logits.shape
    assert_both_ways(logits, target, ignore_index=3, reduction=reduction, label_smoothing=label_smoothing)
    truth = F.cross_entropy(logits, target, ignore_index=3, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(torch.tensor(taken[0], dtype=dtype), truth.detach())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    logits, target = LAYOUTS[layout](scores(3, 4, 6, 5, dtype=torch.float32)), labels((3, 4, 6, 5))
    assert (short(logits, target) is not None) == (ops.is_walked_in_place(logits) and not logits.is_neg())
    assert_both_ways(logits, target)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda y: y.transpose(1, 2).contiguous().transpose(1, 2), False),
        (lambda y: torch.stack([y, y + 9], -1)[..., 0], True),
        (lambda y: torch.cat([y + 9, y], 1)[:, 6:], True),
        (lambda y: torch.cat([y + 9, y], 2)[:, :, 5:], False),
        (lambda y: y[:1].expand(3, -1, -1), True),
        (lambda y: torch._neg_view(-y), False),
    ],
    ids=["transposed", "every_second", "sliced_batch", "sliced_space", "expanded", "negative_bit"],
)
def test_layouts_of_labels(change, taken):
    logits, target = scores(3, 4, 6, 5, dtype=torch.float32), change(labels((3, 4, 6, 5)))
    assert (short(logits, target) is not None) == taken
    assert_both_ways(logits, target)


@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
def test_label_types(dtype):
    logits = scores(2, 6, 9, dtype=torch.float32)
    assert short(logits, labels(logits.shape, dtype=dtype)) is not None
    assert_both_ways(logits, labels(logits.shape, dtype=dtype, ignore_index=5), ignore_index=5)


@pytest.mark.parametrize("make", [torch.nn.Parameter, lambda t: t.to(torch.bfloat16), lambda t: t.to_sparse()])
def test_scores_out_of_the_ordinary_are_left_to_the_general_way(make):
    logits = make(scores(2, 3, 8, dtype=torch.float32))
    assert short(logits, labels(logits.shape)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"reduction": "none"}, {"reduction": "average"}, {"reduction": None}, {"label_smoothing": 0},
        {"label_smoothing": 1.5}, {"label_smoothing": float("nan")}, {"ignore_index": 2**64}, {"ignore_index": True},
        {"ignore_index": 1.0}, {"logits": None}, {"logits": [1.0]}, {"target": "labels"}, {"target": torch.zeros(2, 8)},
        {"target": torch.zeros(2, 3, 8)}, {"target": torch.zeros(2, 1, 8, dtype=torch.int64)},
        {"target": torch.zeros(2, 7, dtype=torch.int64)}, {"target": torch.zeros(2, 8, dtype=torch.bool)},
        {"target": torch.full((2, 8), 3)}, {"logits": torch.zeros(()), "target": torch.zeros(())},
        {"logits": torch.zeros(0, 3, 8), "target": torch.zeros(0, 8, dtype=torch.int64)},
        {"logits": torch.zeros(2, 0, 8)}, {"logits": torch.zeros(2, 3, 8, device="meta")},
        {"logits": torch.zeros(2, 3, *[1] * 7, 8)}, {"logits": torch.zeros(2, 3, 8, dtype=torch.int64)},
        {"logits": torch.zeros(1, 2, 2**19), "target": torch.zeros(1, 2**19, dtype=torch.int64)},
    ],
    ids=lambda change: ",".join(f"{k}={getattr(v, 'shape', v)}" for k, v in change.items()),
)  # fmt: skip
def test_calls_out_of_the_ordinary_are_left_to_the_general_way(change):
    logits = scores(2, 3, 8, dtype=torch.float32)
    assert short(logits, labels(logits.shape)) is not None
    assert short(**{"logits": logits, "target": labels(logits.shape)} | change) is None


def test_a_bad_label_is_the_general_way_s_error():
    logits, target = scores(2, 3, 8, dtype=torch.float32).requires_grad_(), labels((2, 3, 8))
    target[1, 5] = 7
    with pytest.raises(IndexError, match=r"target\[1, 5\] is 7"):
        calseg.vls_cross_entropy(logits, target)


def test_graphs():
    """Kept, freed and differentiated twice: as by the general way."""
    logits, target = scores(4, 3, dtype=torch.float64).requires_grad_(), labels((4, 3))
    loss = calseg.vls_cross_entropy(logits, target)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, logits)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)
    assert torch.autograd.gradcheck(functools.partial(calseg.vls_cross_entropy, target=target), logits)
    gradient = torch.autograd.grad(calseg.vls_cross_entropy(logits, target), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_the_gradient_is_handed_over_not_copied():
    logits = scores(4, 3, dtype=torch.float32).requires_grad_()
    seen = []
    hook = lambda gradient: seen.append(gradient.data_ptr())  # noqa: E731
    logits.register_hook(hook)
    calseg.vls_cross_entropy(logits, labels((4, 3))).backward()
    assert logits.grad.data_ptr() == seen[0]
