"""Triton kernels as they were compiled for a GPU, in an interpreter of its assembly.

They show what Triton's interpreter cannot: what the compiler makes of hints and layouts. ``pytest -m ptx`` runs them,
and those of test_triton.py too. The ordinary run has a choice of both, in test_ptx_cases.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Result, assert_accurate, labels, scores, upstream_of
from operations import OPERATIONS, Operation, assert_result
from torch import Tensor

import calseg
from calseg.backends import choice

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(choice.TRITON_ERROR is not None, reason=str(choice.TRITON_ERROR)),
    pytest.mark.timeout(300),
]

if choice.TRITON_ERROR is None:
    import triton
    import triton.language as tl
    from calseg.kernels import reductions
    from calseg.kernels.launch import launch_kernel
    from ptx import launch
    from ptx.parser import PtxError

    @triton.jit
    def copy(x, stride, out, size, HINT: tl.constexpr, MASKED: tl.constexpr):
        """Copy numbers of any stride. Claim that HINT of them are adjacent."""
        i = tl.arange(0, 128)
        pointers = tl.max_contiguous(tl.multiple_of(x + i.to(tl.int64) * stride, [16]), [HINT])
        mask = i < size if MASKED else None
        tl.store(out + i, tl.load(pointers, mask=mask), mask=i < size)


STRIDES = (0, 1, 2, 3, 16)


# ---- tensors of any stride ----


def strided(t: Tensor, stride: int) -> Tensor:
    """Return the tensor with this stride between voxels. A stride of 0 repeats the first voxel of each item."""
    if stride == 0:
        return t[(slice(None), *[slice(1)] * (t.dim() - 1))].clone().expand_as(t)
    poison = torch.nan if t.is_floating_point() else False if t.dtype == torch.bool else 100
    return torch.stack([t, *[torch.full_like(t, poison)] * (stride - 1)], -1)[..., 0]


def evaluate(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], upstream: Callable[[Tensor], Tensor]
) -> Result:
    """Return the value, and its gradients for an upstream gradient that is made of the value."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    value = function(**leaves)
    gradients = torch.autograd.grad(
        value, list(leaves.values()), upstream(value), allow_unused=True, materialize_grads=True
    )
    return Result(value.detach(), dict(zip(leaves, gradients, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_stride(operation: Operation, dtype: torch.dtype):
    """Labels, masks and upstream gradients may have any stride. Nothing past their elements is read."""
    if operation.name.startswith("ace") or dtype not in (*operation.dtypes_of_values, torch.float32):
        pytest.skip("no GPU backend has it, or its values cannot be compared")
    if operation.result == "bins" and dtype != torch.float32:
        pytest.skip("its values cannot be compared")
    shape = (2, 4, 8, 16)
    tensors = operation.inputs(shape, dtype)
    wide = {name: t.double() for name, t in tensors.items()}
    for stride in STRIDES:
        options = dict(operation.typical)
        if operation.labels is not None:
            options[operation.labels] = strided(operation.target(shape), stride)
        arguments = operation.arguments(shape, dtype, **options)
        what = f"stride {stride}:"
        if not operation.differentiable:
            got = calibration_sums(operation, arguments, tensors)
            assert torch.equal(got, calibration_sums(operation, arguments, tensors, backend="reference")), what
            continue
        upstream = lambda value, stride=stride: strided(upstream_of(value), stride) if value.dim() else None  # noqa: E731
        got = evaluate(operation.bind("triton", arguments), tensors, upstream)
        wanted = evaluate(operation.bind_oracle(arguments), wide, upstream)
        assert_result(operation, got, wanted, what=what)


def calibration_sums(
    operation: Operation, arguments: dict[str, Any], tensors: dict[str, Tensor], backend: str = "triton"
):
    """Return the numbers of voxels and hits, which do not depend on the rounding of a logit."""
    (name,) = tensors
    bins = calseg.calibration_bins(tensors[name], backend=backend, **{**arguments, "n_bins": 1})
    return torch.stack([bins.count.sum(-1), bins.hits.sum(-1)])


@pytest.mark.parametrize("stride", STRIDES)
def test_the_mask_of_calibration_may_have_any_stride(stride):
    shape = (2, 4, 8, 16)
    p, target = torch.softmax(scores(*shape, seed=3), 1).float(), labels(shape)
    mask = strided(labels(shape, seed=4) > 1, stride)
    got, wanted = (calseg.calibration_bins(p, target, from_logits=False, mask=mask, backend=backend)
                   for backend in ("triton", "reference"))  # fmt: skip
    assert torch.equal(got.count, wanted.count)
    assert torch.equal(got.hits, wanted.hits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("reuse_logits", [False, True])
def test_a_scalar_upstream_gradient(dtype, reuse_logits):
    """The gradient of a mean is a single number, beside which nothing is read."""
    shape = (1, 4, 4096)
    x, target = scores(*shape, dtype=dtype).requires_grad_(), labels(shape, dtype=torch.uint8)
    logits = x * 1.0
    loss = calseg.vls_cross_entropy(logits, target, ignore_index=255, reuse_logits=reuse_logits, backend="triton")
    (got,) = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=loss.dtype))
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(3 * torch.nn.functional.cross_entropy(wide, target.long()), wide)
    assert_accurate(got, wanted, ulps=16)


# ---- the functions of the hardware ----


@pytest.mark.parametrize("name", ["cross_entropy", "vls_cross_entropy", "dice", "gaussian_kl", "sample_soft_labels"])
def test_the_error_of_the_hardware(name, monkeypatch):
    """With the largest error that the manual allows its functions, results keep their tolerance."""
    monkeypatch.setattr(launch, "error", 1.0)
    operation, shape = OPERATIONS[name], (2, 5, 67)
    arguments = operation.arguments(shape, torch.float32, **operation.typical)
    tensors = operation.inputs(shape, torch.float32)
    wide = {name: t.double() for name, t in tensors.items()}
    got = evaluate(operation.bind("triton", arguments), tensors, upstream_of)
    assert_result(operation, got, evaluate(operation.bind_oracle(arguments), wide, upstream_of))


# ---- planted faults ----


def copied(x: Tensor, hint: int = 1, masked: bool = True) -> Tensor:
    out = torch.full(x.shape, torch.nan)
    launch_kernel(copy, 1, x, (x, x.stride(0), out, len(x), hint, masked), 1)
    return out


def test_a_hint_that_is_too_wide():
    """A claim of adjacent numbers is believed: it reads the neighbours of a stride of 16, and past a stride of 0."""
    rows, single = torch.arange(128 * 16).float().view(128, 16), torch.tensor([7.0]).expand(128)
    assert torch.equal(copied(rows[:, 0]), rows[:, 0])
    assert torch.equal(copied(single), single)
    assert not torch.equal(copied(rows[:, 0], hint=4), rows[:, 0])
    with pytest.raises(PtxError, match="16 bytes, 12 of them past the end of a tensor of 4 bytes"):
        copied(single, hint=4)


def test_a_mask_that_is_missing():
    x = torch.arange(112).float()
    assert torch.equal(copied(x), x)
    with pytest.raises(PtxError, match="past the end of a tensor of 448 bytes"):
        copied(x, masked=False)


MUTATIONS = {
    "without barriers": (r"bar\.sync\s+0;", "", "race in shared memory"),
    "without masks": (r"@%p\d+ (ld\.global)", r"\1", "past the end of a tensor|before all tensors"),
    "one word further": (r"(st\.global\S* \[ %rd\d+ \+ )0", r"\g<1>4", "past the end of a tensor|misaligned"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_in_our_kernels(name, monkeypatch):
    """Each change of the compiled kernels of a loss is found."""
    pattern, replacement, message = MUTATIONS[name]
    changed, run = [], launch.run

    def run_mutant(text: str, *arguments: Any, **options: Any) -> None:
        mutant = re.sub(pattern, replacement, text)
        changed.append(mutant != text)
        run(mutant, *arguments, **options)

    shape = (2, 3, 211)
    x, target = scores(*shape, dtype=torch.float32), labels(shape, ignore_index=-100)
    calseg.vls_cross_entropy(x, target, backend="triton")
    monkeypatch.setattr(launch, "run", run_mutant)
    # A launch that ends with an error leaves the counter of programs where it is.
    monkeypatch.setattr(reductions, "_counters", {})
    with pytest.raises(PtxError, match=message):
        calseg.vls_cross_entropy(x, target, backend="triton")
    assert any(changed)
