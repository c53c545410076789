"""Tests of ``scale``, the factor of every loss: a number or a tensor, in eager and in compiled code."""

from __future__ import annotations

import pytest
import torch
from cases import labels, scores
from internals import needs_native
from operations import OPERATIONS
from test_operations import bound, leaves_of, weighted_sum

import calseg

LOSSES = {name: o for name, o in OPERATIONS.items() if o.result in ("loss", "items", "total")}
SHAPE = (2, 3, 5, 4)


@pytest.mark.parametrize("operation", LOSSES.values(), ids=LOSSES)
def test_scale_multiplies_loss_and_gradients(backend, operation):
    for reduction in operation.reductions:
        options = {"reduction": reduction} if len(operation.reductions) > 1 else {}
        tensors = operation.inputs(SHAPE)
        results = []
        for scale in (1.0, -0.375, torch.tensor(-0.375, dtype=torch.float64)):
            leaves = leaves_of(tensors)
            value = bound(operation, backend, SHAPE, **options, scale=scale)(**leaves)
            results.append([value.detach(), *torch.autograd.grad(weighted_sum(value), list(leaves.values()))])
        for plain, number, tensor in zip(*results, strict=True):
            torch.testing.assert_close(number, -0.375 * plain, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(tensor, number, rtol=0, atol=0)


@needs_native
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, on some Python versions
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_compiled(scale):
    logits, target = scores(*SHAPE), labels(SHAPE)
    call = lambda logits, scale: calseg.vls_cross_entropy(logits, target, scale=scale)  # noqa: E731
    quick = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    quick(leaf, scale).backward()
    other = logits.clone().requires_grad_()
    call(other, 1.0).backward()
    torch.testing.assert_close(leaf.grad, 0.25 * other.grad)
