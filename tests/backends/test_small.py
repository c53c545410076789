"""Tests of the most frequent call, which skips the checks in Python, against the checked one, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import LABELS, LAYOUTS, SHAPES, id_of, labels, scores

import calseg
from calseg import native
from calseg.functional import _unchecked_cross_entropy

pytestmark = pytest.mark.skipif(native.extension is None, reason="no native engine")


def unchecked(logits, target, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    return _unchecked_cross_entropy(logits, target, ignore_index, reduction, label_smoothing)


def value_and_gradient(logits, target, **options):
    leaf = logits.detach().requires_grad_()
    loss = calseg.vls_cross_entropy(leaf, target, **options)
    (2.5 * loss).backward()
    return loss.detach(), leaf.grad


def assert_both_ways(logits, target, **options):
    """Check that a call without a backend gives the result of ``backend="cpu"``, which Python checks first."""
    assert unchecked(logits, target, **options) is not None
    value, gradient = value_and_gradient(logits, target, **options)
    wanted, wanted_gradient = value_and_gradient(logits, target, backend="cpu", **options)
    assert value.dtype == wanted.dtype
    assert torch.equal(value, wanted)
    assert gradient.stride() == wanted_gradient.stride()
    assert torch.equal(gradient, wanted_gradient)
    assert torch.equal(calseg.vls_cross_entropy(logits, target, **options), wanted)  # no gradient is needed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_is_the_checked_way(shape, dtype, reduction, label_smoothing):
    logits = scores(*SHAPES[shape](5), dtype=dtype)
    target = labels(logits.shape, ignore_index=3)
    options = {"ignore_index": 3, "reduction": reduction, "label_smoothing": label_smoothing}
    assert_both_ways(logits, target, **options)
    truth = F.cross_entropy(logits.double(), target, **options)
    torch.testing.assert_close(unchecked(logits, target, **options), truth.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    assert_both_ways(LAYOUTS[layout](scores(3, 4, 6, 5, dtype=torch.float32)), labels((3, 4, 6, 5)))


@pytest.mark.parametrize("axis", range(4))
def test_expanded_logits(axis):
    """An axis of stride 0 is not read outside of the tensor."""
    logits = (
        scores(3, 4, 6, 5, dtype=torch.float32)
        .narrow(axis, 0, 1)
        .expand(*(size if i == axis else -1 for i, size in enumerate((3, 4, 6, 5))))
    )
    got, wanted = unchecked(logits, labels((3, 4, 6, 5))), F.cross_entropy(logits, labels((3, 4, 6, 5)))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y: torch.stack([y, y + 9], -1)[..., 0],
        lambda y: torch.cat([y + 9, y], 1)[:, 6:],
        lambda y: torch.cat([y + 9, y], 2)[:, :, 5:],
        lambda y: y[:1].expand(3, -1, -1),
        lambda y: y[:, :1].expand(-1, 6, -1),
        lambda y: y[:, :, :1].expand(-1, -1, 5),
        lambda y: torch._neg_view(-y),
    ],
    ids=[
        "transposed", "every_second", "sliced_batch", "sliced_space", "expanded_batch", "expanded_rows",
        "expanded_columns", "negative_bit",
    ],
)  # fmt: skip
def test_layouts_of_labels(change):
    assert_both_ways(scores(3, 4, 6, 5, dtype=torch.float32), change(labels((3, 4, 6, 5))))


@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
def test_label_types(dtype):
    logits = scores(2, 6, 9, dtype=torch.float32)
    assert_both_ways(logits, labels(logits.shape, dtype=dtype, ignore_index=5), ignore_index=5)


@pytest.mark.parametrize("make", [torch.nn.Parameter, lambda t: t.to_sparse(), lambda t: t.to("meta")])
def test_scores_out_of_the_ordinary_are_checked(make):
    logits = make(scores(2, 3, 8, dtype=torch.float32))
    assert unchecked(logits, labels(logits.shape)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"reduction": "average"}, {"reduction": None}, {"label_smoothing": 0},
        {"label_smoothing": 1.5}, {"label_smoothing": float("nan")}, {"ignore_index": 2**64}, {"ignore_index": True},
        {"ignore_index": 1.0}, {"logits": None}, {"logits": [1.0]}, {"target": "labels"},
        {"target": torch.zeros(2, 8, dtype=torch.complex64)},
        {"target": torch.zeros(2, 3, 8)}, {"target": torch.zeros(2, 1, 8, dtype=torch.int64)},
        {"target": torch.zeros(2, 7, dtype=torch.int64)}, {"target": torch.zeros(2, 8, dtype=torch.bool)},
        {"target": torch.zeros(2, 8, dtype=torch.int64, device="meta")},
        {"logits": torch.zeros(()), "target": torch.zeros(())},
        {"logits": torch.zeros(2, 0, 8)}, {"logits": torch.zeros(2, 3, 8, dtype=torch.int64)},
    ],
    ids=lambda change: ",".join(f"{k}={getattr(v, 'shape', v)}" for k, v in change.items()),
)  # fmt: skip
def test_calls_out_of_the_ordinary_are_checked(change):
    logits = scores(2, 3, 8, dtype=torch.float32)
    assert unchecked(logits, labels(logits.shape)) is not None
    assert unchecked(**{"logits": logits, "target": labels(logits.shape)} | change) is None


def test_a_bad_label():
    logits, target = scores(2, 3, 8, dtype=torch.float32).requires_grad_(), labels((2, 3, 8))
    target[1, 5] = 7
    with pytest.raises(IndexError, match=r"target\[1, 5\] is 7"):
        calseg.vls_cross_entropy(logits, target)


def test_graphs():
    """A kept graph, a freed graph and double backward behave as for the checked call."""
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
