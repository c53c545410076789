"""Random calls of every operation: the result is that of the reference backend, or the call raises a clear error.

``pytest -m fuzz tests/test_fuzz.py`` makes 4000 calls; ``CALSEG_FUZZ`` sets another number, ``CALSEG_FUZZ_SEED`` where
the seeds begin. A failure names the seed of its call.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LABELS
from operations import OPERATIONS, Operation, Tolerance, assert_result, run
from torch import Tensor

CALLS, FIRST = int(os.environ.get("CALSEG_FUZZ", 4000)), int(os.environ.get("CALSEG_FUZZ_SEED", 0))
CHUNK = 100
ERRORS = (TypeError, ValueError, IndexError, RuntimeError)
LONGEST = 500
"""Bound of the length of a message, in characters."""

SIZES = (0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
CLASSES = (1, 2, 2, 3, 3, 4, 5, 8, 14, 17)
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 0.5, -0.5, 2.5, float("nan"), float("inf"), 1e30, 10**30, -(2**63), "mean", "none",
    "x" * 9999, b"mean", [], {}, object(), [torch.zeros(999)] * 99, range(9**9), torch.tensor(0.5), torch.zeros(3),
    torch.zeros(0), torch.int64, torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3).to_sparse(),
    torch.zeros(2, 3, device="meta"),
)  # fmt: skip


def shape_of_scores(rng: random.Random) -> tuple[int, ...]:
    """``[C]``, ``[N, C]`` or ``[N, C, *S]`` with up to four spatial axes and a few thousand voxels."""
    classes = rng.choice(CLASSES)
    if rng.random() < 0.1:
        return (classes,)
    sizes = [rng.choice(SIZES) for _ in range(rng.randint(0, 4))]
    while math.prod(sizes) > 3000:
        sizes[sizes.index(max(sizes))] //= 2
    if sizes and rng.random() < 0.1:
        sizes[-1] = rng.randint(100, 3000) // math.prod([1, *sizes[:-1]] if all(sizes[:-1]) else [1])
    return (rng.choice((0, 1, 1, 2, 3)), classes, *sizes)


def expanded(tensor: Tensor, rng: random.Random, kept: tuple[int, ...] = ()) -> Tensor:
    """The tensor with one value along some axes, whose stride is 0."""
    for axis in range(tensor.dim()):
        if axis not in kept and tensor.shape[axis] and rng.random() < 0.15:
            tensor = tensor.narrow(axis, rng.randrange(tensor.shape[axis]), 1).expand(tensor.shape)
    return tensor


def restrided(tensor: Tensor, rng: random.Random) -> Tensor:
    """The same values with other strides, at an odd offset, between elements that must not be read."""
    if tensor.is_floating_point() and 0 in tensor.stride() and rng.random() < 0.7:
        return tensor
    order = list(range(tensor.dim()))
    rng.shuffle(order)
    steps = [rng.choice((1, 1, 1, 2, 3)) for _ in order]
    starts = [rng.choice((0, 0, 1)) for _ in order]
    sizes = [start + size * step for start, size, step in zip(starts, tensor.shape, steps, strict=True)]
    filling = float("nan") if tensor.is_floating_point() else 77
    storage = torch.full([sizes[axis] for axis in order], filling).to(tensor.dtype)
    view = storage.permute([order.index(axis) for axis in range(tensor.dim())])
    for axis, (start, step) in enumerate(zip(starts, steps, strict=True)):
        view = view[(slice(None),) * axis + (slice(start, None, step),)]
    return view.copy_(tensor)


class Call:
    """One random call: its tensors, its other arguments, and the same with contiguous tensors."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.operation: Operation = rng.choice(list(OPERATIONS.values()))
        operation = self.operation
        edges = operation.result in ("bins", "items")  # where rounding decides between two bins
        self.shape = shape_of_scores(rng)
        self.dtype = rng.choice((torch.float64,) if edges else operation.dtypes_of_values)
        classes = (1 if len(self.shape) > 1 else 0,)
        self.tensors = {
            name: restrided(expanded(tensor, rng, classes if edges else ()), rng)
            for name, tensor in operation.inputs(self.shape, self.dtype).items()
        }
        options = dict(rng.choice(operation.options), reduction=rng.choice(operation.reductions))
        if operation.result in ("map", "bins"):
            del options["reduction"]
        self.arguments = operation.arguments(
            self.shape, self.dtype, ignore_index=rng.choice(operation.ignored_values), **options
        )
        labels = self.arguments.get(operation.labels or "")
        if labels is not None:
            self.arguments[operation.labels or ""] = restrided(expanded(self.relabelled(labels), rng), rng)
        if self.arguments.get("weight") is not None:
            self.arguments["weight"] = restrided(expanded(self.arguments["weight"], rng), rng)
        if rng.random() < 0.25:
            self.spoil()

    def relabelled(self, labels: Tensor) -> Tensor:
        """The labels in another dtype that holds them, at times with a label that is wrong."""
        if labels.dtype == torch.bool:
            return labels
        if self.rng.random() < 0.1 and labels.numel():
            labels = labels.clone()
            labels.view(-1)[self.rng.randrange(labels.numel())] = self.rng.choice((-1, 99, -128, 127, 2**40))
        holding = [kind for kind in LABELS if torch.equal(labels.to(kind).double(), labels.double())]
        return labels.to(self.rng.choice(holding))

    def spoil(self) -> None:
        """Put nonsense into an argument, or give a tensor another shape or dtype."""
        rng = self.rng
        names = [*self.tensors, *self.arguments, "weight", "label_smoothing", "ignore_index", "seed", "backend"]
        name = rng.choice(names)
        tensor = self.tensors.get(name)
        if tensor is not None:
            other = (tensor[:0], tensor[None], tensor.flatten(), tensor.int(), tensor.movedim(0, -1))
            self.tensors[name] = rng.choice(other if tensor.dim() else other[1:4])
        else:
            self.arguments[name] = rng.choice(JUNK)

    def make(self, backend: str | None, *, wide: bool = False) -> Any:
        """The result and its gradients, or the error; with ``wide`` of the same numbers in float64."""
        tensors, arguments = dict(self.tensors), {"backend": backend, **self.arguments}
        if backend is not None:
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if wide:
            tensors = {name: tensor.double() for name, tensor in tensors.items()}
            if isinstance(arguments.get("weight"), Tensor):
                arguments["weight"] = arguments["weight"].double()
        function: Callable[..., Tensor] = lambda **tensors: self.operation.function(**tensors, **arguments)  # noqa: E731
        torch.manual_seed(0)  # of seeds that are drawn
        try:
            return run(self.operation, function, tensors)
        except Exception as error:
            return error

    def __repr__(self) -> str:
        tensors = {name: (list(t.shape), t.stride(), t.dtype) for name, t in self.tensors.items()}
        shown = {name: str(value)[:80] for name, value in self.arguments.items()}
        return f"{self.operation.name} {tensors} {shown}"


@pytest.mark.fuzz
@pytest.mark.parametrize("first", range(FIRST, FIRST + CALLS, CHUNK))
@pytest.mark.filterwarnings("ignore")
def test_random_calls(first: int) -> None:
    for seed in range(first, first + CHUNK):
        call = Call(seed)
        got, wanted = call.make(None), call.make("reference")
        what = f"seed {seed}: {call!r}"
        if isinstance(got, Exception):
            assert isinstance(got, ERRORS), f"{what}: {got!r}"
            assert type(got) is type(wanted), f"{what}: {got!r}, the reference {wanted!r}"
            assert 0 < len(str(got)) < LONGEST, f"{what}: {got}"
            continue
        assert not isinstance(wanted, Exception), f"{what}: a result, the reference {wanted!r}"
        assert_result(call.operation, got, call.make("reference", wide=True), tolerance_of(call), what=what)


def tolerance_of(call: Call) -> Tolerance:
    """That of the table, where a unit is no smaller than that of the largest term of a sum, which is at most 8.

    A gradient is a difference of such terms: an upstream gradient of at most 2 times a weight of at most 2.25 times a
    probability.
    """
    sizes = call.operation.sizes
    classes = call.shape[1 if len(call.shape) > 1 else 0]
    ulps, scale, grad_ulps, grad_scale = call.operation.tolerance if sizes is None else sizes.tolerance(classes)
    return Tolerance(ulps, max(scale, 8.0), grad_ulps, max(grad_scale, 8.0))
