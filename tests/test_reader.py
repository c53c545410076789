"""Tests of the reader of tensors: it reads tensors of any type with memory, and rejects others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import labels, scores

import calseg
from calseg import native
from calseg.operations import Labels, LossSpec, LossTensors
from calseg.tensors import is_walkable, one_stride

pytestmark = pytest.mark.skipif(native.extension is None, reason="no native engine")
SHAPE = (2, 3, 4, 5)


class Kept(torch.Tensor):
    """A subclass with memory of its own, such as MONAI's MetaTensor."""


class Wrapper(torch.Tensor):
    """A subclass without memory, such as DTensor. Only its operations know where its numbers are."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"Wrapper has no {func}")


def test_a_subclass_with_memory():
    x, y = scores(*SHAPE).as_subclass(Kept), labels(SHAPE).as_subclass(Kept)
    torch.testing.assert_close(float(calseg.vls_cross_entropy(x, y)), float(F.cross_entropy(x, y)))
    leaf = x.detach().clone().requires_grad_()
    calseg.vls_cross_entropy(leaf, y).backward()
    plain = scores(*SHAPE).requires_grad_()
    F.cross_entropy(plain, labels(SHAPE)).backward()
    torch.testing.assert_close(torch.Tensor(leaf.grad), plain.grad)


LOSSES = {
    "cross_entropy": lambda x, y, soft: calseg.vls_cross_entropy(x, y),
    "given": lambda x, y, soft: calseg.vls_cross_entropy(x, y, soft_labels=soft, reduction="none"),
    "sampled": lambda x, y, soft: calseg.vls_cross_entropy(x, y, mu=x, logvar=soft, seed=1),
    "dice": lambda x, y, soft: calseg.vls_dice_cross_entropy(x, y[:, None].float()),
    "soft": lambda x, y, soft: calseg.soft_cross_entropy(x, soft, ignore_mask=y == 1),
    "elbo": lambda x, y, soft: calseg.vls_elbo(x, soft, y, seed=1),
    "kl": lambda x, y, soft: calseg.gaussian_kl(x, soft),
    "ace": lambda x, y, soft: calseg.ace_loss(x, y),
    "error": lambda x, y, soft: calseg.calibration_error(x, y, mask=y != 1),
    "soft error": lambda x, y, soft: calseg.calibration_error(x, soft),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_subclass_costs_nothing_and_changes_nothing(name, monkeypatch):
    """It is read as a plain tensor once, so that its class does not see every access to an attribute."""
    plain = (scores(*SHAPE), labels(SHAPE), torch.softmax(scores(*SHAPE, seed=1), 1))
    given = [t.clone().as_subclass(Kept) for t in plain]
    wanted = LOSSES[name](plain[0].requires_grad_(), *plain[1:])
    seen = []
    monkeypatch.setattr(
        Kept,
        "__torch_function__",
        classmethod(lambda cls, *a: seen.append(a[0]) or torch._C._disabled_torch_function_impl(*a)),
    )
    given[0].requires_grad_()
    seen.clear()
    got = LOSSES[name](*given)
    assert type(got) is torch.Tensor
    assert torch.equal(got, wanted)
    assert len(seen) <= 2  # what the call itself does with its arguments, as in y == 1
    if wanted.requires_grad:
        got.sum().backward()
        wanted.sum().backward()
        assert torch.equal(torch.Tensor(given[0].grad), plain[0].grad)


def test_the_memory_of_a_subclass_is_reused():
    """The result of an operation on a subclass is a view of all of a plain tensor, which nobody else has."""
    net, y = torch.nn.Conv1d(2, 3, 1).double(), labels((2, 3, 20))
    x = scores(2, 2, 20)
    gradients = []
    for kind, reuse in ((torch.Tensor, False), (Kept, True)):
        logits = net(x.as_subclass(kind))
        before = logits.detach().clone()
        calseg.vls_cross_entropy(logits, y, reuse_logits=reuse).backward()
        assert torch.equal(logits, before) != reuse
        gradients.append(net.weight.grad.clone())
        net.zero_grad()
    assert torch.equal(*gradients)
    for bad in (net(x.as_subclass(Kept))[:, :, :9], net(x.as_subclass(Kept)).as_subclass(torch.Tensor)):
        with pytest.raises(ValueError, match="shares its storage with another tensor"):
            calseg.vls_cross_entropy(bad, y[:, : bad.shape[2]], reuse_logits=True)
    with pytest.raises(ValueError, match="input is a leaf"):
        calseg.vls_cross_entropy(scores(*SHAPE).as_subclass(Kept).requires_grad_(), labels(SHAPE), reuse_logits=True)


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_wrapper_is_stopped(backend):
    """A wrapper is rejected, also if the engine is called directly."""
    x, y = scores(*SHAPE), labels(SHAPE)
    for logits, target in ((Wrapper(x), y), (x, Wrapper(y))):
        with pytest.raises((NotImplementedError, ValueError)):
            calseg.vls_cross_entropy(logits, target, backend=backend)
        spec = LossSpec("cross_entropy", Labels(target, -100), None, "mean", x.dtype)
        with pytest.raises(native.Unreadable, match=r"(logits|tensor): got a tensor"):
            native.extension.cross_entropy(LossTensors(logits), spec, LossTensors(), None, None)


def test_freed_memory_is_stopped():
    x, y = scores(*SHAPE), labels(SHAPE)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="logits: got a tensor whose memory is not there"):
        calseg.vls_cross_entropy(x, y)


def test_a_view_of_freed_memory_is_stopped():
    """Its address is that of no memory plus the view's place in it."""
    for base, place in ((torch.zeros(2, *SHAPE), 1), (torch.zeros(2**12, *SHAPE), 2**12 - 1)):
        x = base[place]
        base.untyped_storage().resize_(0)
        assert x.data_ptr() > 0
        with pytest.raises(ValueError, match="logits: got a tensor whose memory is not there"):
            calseg.vls_cross_entropy(x, labels(SHAPE))


OLD_TORCH = """
import torch
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__  # before calseg looks for it
import calseg
from calseg.operations import Labels, LossSpec, LossTensors
torch.manual_seed(0)
F = torch.nn.functional
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for label_dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16):
        x = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        y = torch.randint(0, 3, (2, 4, 5)).to(label_dtype)
        calseg.vls_cross_entropy(x, y).backward()
        wanted = x.detach().double().requires_grad_()
        F.cross_entropy(wanted, y.long()).backward()
        torch.testing.assert_close(x.grad.double(), wanted.grad, rtol=0.01, atol=0.001)
freed = torch.zeros(2, 2, 3, 4, 5)
view = freed[1]
freed.untyped_storage().resize_(0)
for wrong in (view, torch.zeros(2, 3, 4, 5, device="meta"), torch.zeros(2, 3, 4, 5).to_sparse()):
    spec = LossSpec("cross_entropy", Labels(y, -100), None, "mean", torch.float32)
    try:
        calseg.native.extension.cross_entropy(LossTensors(wrong), spec, LossTensors(), None, None)
    except calseg.native.Unreadable as error:
        print(error)
"""


def test_a_torch_without_the_c_functions_of_dlpack():
    """PyTorch before 2.10: tensors are read by their attributes."""
    done = subprocess.run([sys.executable, "-c", OLD_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "logits: got a tensor whose memory is not there (fake, freed, or of a wrapper)",
        "logits: wanted a tensor on the CPU",
        "logits: got a tensor without memory of its own (fake, or of a wrapper)",
    ]


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_zero_tensors_are_no_crash(backend):
    """PyTorch's tensors of zeros without memory are valid gradients and arguments."""
    zeros = torch._efficientzerotensor(SHAPE, dtype=torch.float64)
    with pytest.raises(ValueError, match="memory is not there"):
        calseg.vls_cross_entropy(zeros, labels(SHAPE), backend=backend)


def test_empty_tensors_are_read():
    x, y = torch.zeros(0, 3, 4), torch.zeros(0, 4, dtype=torch.int64)
    assert calseg.vls_cross_entropy(x, y).isnan()
    assert calseg.vls_cross_entropy(x, y, reduction="sum") == 0


@pytest.mark.parametrize("axes", [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 3, 1, 2, 4), (2, 0, 1, 3, 4), (0, 1, 4, 3, 2)])
@pytest.mark.parametrize("expanded", [None, 2, 3, 4])
def test_python_and_cpp_walk_alike(axes, expanded):
    """Python and C++ agree on which tensors must be copied."""
    x = scores(2, 3, 4, 5, 6).permute(axes)
    if expanded is not None:
        x = x.narrow(expanded, 0, 1).expand(*(7 if axis == expanded else -1 for axis in range(5)))
    if is_walkable(x):
        n, c, s, (strides,), _ = native.extension.geometry([x], [])
        assert n * c * s == x.numel()
        assert strides[2] in (one_stride(x.shape[2:], x.stride()[2:]), x.stride(0))
    else:
        with pytest.raises(native.Unreadable, match="cannot be written in place"):
            native.extension.geometry([x], [])


def test_merged_items():
    """Batch items that follow one another in memory are merged.

    Without spatial axes, the stride of items becomes that of voxels.
    """
    x, y = scores(2, 3, 4, 5), labels((2, 3, 4, 5))
    assert native.extension.geometry([x], [y]) == (2, 3, 20, [(60, 20, 1)], [(20, 0, 1)])
    last = x.to(memory_format=torch.channels_last)
    assert native.extension.geometry([last], [y]) == (1, 3, 40, [(0, 1, 3)], [(0, 0, 1)])
    assert native.extension.geometry([scores(7, 3, 1)], [labels((7, 3, 1))]) == (1, 3, 7, [(0, 1, 3)], [(0, 0, 1)])
    assert native.extension.geometry([scores(7, 3)], []) == (1, 3, 7, [(0, 1, 3)], [])
    assert native.extension.geometry([last, x], [y])[:3] == (2, 3, 20)  # where all agree
    assert native.extension.geometry([scores(1, 3, 7)[:, :, ::2]], []) == (1, 3, 4, [(0, 7, 2)], [])
    assert native.extension.geometry([scores(3)], []) == (1, 3, 1, [(0, 1, 0)], [])
