"""Tests of more than 2^31 elements and 2^32 voxels, which need 64-bit indices.

`pytest -m large` runs them in 20 GiB.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import calseg
from calseg.backends import rng
from calseg.tensors import compute_dtype

pytestmark = [pytest.mark.large, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Disable the fixture of all tests, because filling 4 GiB with NaN takes too long."""


def pieces(size: int) -> list[slice]:
    """Return the slices to check: both ends and, in the second channel, both sides of 2^31 elements."""
    return [slice(max(0, at - 500), min(size, at + 500)) for at in (0, 2**20, 2**31 - size, size)]


def test_cross_entropy_with_gradient():
    """bfloat16 logits [1, 2, 2^30 + 2^16]: 4 GiB, as much for their gradient, and 1 GiB of labels."""
    size = 2**30 + 2**16
    x = torch.empty(1, 2, size, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 0.0, 1.0
    target = torch.zeros(1, size, dtype=torch.uint8)
    spots = pieces(size)
    for k, spot in enumerate(spots):
        x[..., spot] = torch.randn(x[..., spot].shape, generator=torch.Generator().manual_seed(k)).bfloat16()
        target[..., spot] = torch.arange(target[..., spot].shape[1]).remainder(3).to(torch.uint8)[None]
    x.requires_grad_()
    loss = calseg.vls_cross_entropy(x, target, ignore_index=2, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    for spot in spots:
        part = x[..., spot].detach().double().requires_grad_()
        F.cross_entropy(part, target[..., spot].long(), ignore_index=2, reduction="sum").backward()
        torch.testing.assert_close(gradient[..., spot].double(), part.grad, rtol=2**-8, atol=1e-6)
    rest = size - sum(spot.stop - spot.start for spot in spots)
    wanted = rest * float(F.cross_entropy(torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([0])))
    wanted += sum(
        float(F.cross_entropy(x[..., s].detach().double(), target[..., s].long(), ignore_index=2, reduction="sum"))
        for s in spots
    )
    assert abs(float(loss.detach()) / wanted - 1) < 2**-8


def test_dice_of_a_hundred_million_voxels():
    """Dice agrees with float64 to 1e-6, with one-hot and with soft labels: 1.5 GiB, in one item."""
    size, step = 10**8, 10**7
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, size, generator=generator)
    x[:, 1] -= 6.0  # most voxels add little
    target = (torch.rand(1, size, generator=generator) < 0.001).to(torch.uint8)
    soft = torch.empty(1, 2, size)
    soft[:, 1] = torch.rand(1, size, generator=generator).square_().mul_(0.01)
    soft[:, 0] = 1 - soft[:, 1]
    sums = torch.zeros(2, 2, dtype=torch.float64)  # of p + y and |p - y|, one-hot and soft
    for start in range(0, size, step):
        part = slice(start, start + step)
        p = torch.sigmoid(x[0, 1, part].double() - x[0, 0, part].double())
        for row, y in zip(sums, (target[0, part].double(), soft[0, 1, part].double()), strict=True):
            row += torch.stack([(p + y).sum(), (p - y).abs().sum()])
    for labels, (mass, difference) in zip((None, soft), sums.tolist(), strict=True):
        got = calseg.vls_dice_cross_entropy(x, target, soft_labels=labels, ce_weight=0.0)
        assert abs(float(got) - difference / (mass + 1e-5)) < 1e-6


def test_a_label_out_of_range_is_found_at_the_far_end():
    size = 2**31 + 100
    target = torch.zeros(1, size, dtype=torch.uint8)
    target[0, size - 3] = 9
    x = torch.zeros(1, 2, 1, dtype=torch.bfloat16).expand(1, 2, size)
    with pytest.raises(IndexError, match=rf"target\[0, {size - 3}\] is 9"):
        calseg.vls_cross_entropy(x, target)


def test_sampling_past_two_to_the_32_voxels():
    """Voxels beyond 2^32 use the second word of the counter. Only voxels around 2^32 and at the end count."""
    size = 2**32 + 3001
    mu, logvar = (torch.tensor([a, b]).view(1, 2, 1).expand(1, 2, size) for a, b in ((0.3, -0.2), (0.5, 0.1)))
    target = torch.full((1, size), 255, dtype=torch.uint8)
    spots = [slice(2**32 - 700, 2**32 + 800), slice(size - 300, size)]
    for spot in spots:
        target[:, spot] = 1
    got = calseg.vls_elbo(mu, logvar, target, ignore_index=255, num_samples=3, beta=0.0, seed=99, reduction="sum")
    wanted = 0.0
    for spot in spots:
        count = spot.stop - spot.start
        for k in range(3):
            eps = rng.standard_normal(99, count, 2, k, first_voxel=spot.start, device=torch.device("cpu"))
            nu = mu[0, :, :1].double() + (logvar[0, :, :1].double() / 2).exp() * eps
            wanted -= float(torch.log_softmax(nu, 0)[1].sum()) / 3
    assert abs(float(got) / wanted - 1) < 1e-6


def test_vls_with_the_gradients_of_all_three_inputs():
    """Three gradients of more than 2^31 bfloat16 elements, 13 GiB; the inputs are one voxel, expanded."""
    size = 2**30 + 2**16
    values = ((0.5, -1.0), (0.3, -0.2), (0.5, 0.1))
    inputs = [torch.tensor(v).bfloat16().view(1, 2, 1).expand(1, 2, size).requires_grad_() for v in values]
    target = torch.full((1, size), 2, dtype=torch.uint8)
    spots = pieces(size)
    for spot in spots:
        target[:, spot] = torch.arange(spot.stop - spot.start).remainder(3).to(torch.uint8)
    x, mu, logvar = inputs
    settings = {"num_samples": 2, "temperature": 1.5, "alpha": 0.4, "beta": 0.3}
    loss = calseg.vls_cross_entropy(
        x, target, mu=mu, logvar=logvar, ignore_index=2, reduction="sum", seed=11, **settings
    )
    gradients = torch.autograd.grad(loss, inputs)
    wanted = 0.0
    for spot in spots:
        count = spot.stop - spot.start
        parts = [tensor[..., spot].detach().double().requires_grad_() for tensor in inputs]
        nu = [
            parts[1]
            + (parts[2] / 2).exp()
            * rng.standard_normal(11, count, 2, k, first_voxel=spot.start, device=torch.device("cpu"))
            for k in range(2)
        ]
        labels = target[:, spot].long()
        valid = labels != 2
        soft = 0.6 * F.one_hot(labels.clamp(max=1), 2).movedim(-1, 1) + 0.2 * sum((n / 1.5).softmax(1) for n in nu)
        entropy = -(soft * parts[0].log_softmax(1)).sum(1)
        part = (entropy + 0.3 * 0.5 * (parts[1] ** 2 + parts[2].exp() - parts[2] - 1).sum(1))[valid].sum()
        wanted += float(part.detach())
        for got, want in zip(gradients, torch.autograd.grad(part, parts), strict=True):
            torch.testing.assert_close(got[..., spot].double(), want, rtol=2**-8, atol=1e-6)
    assert abs(float(loss.detach()) / wanted - 1) < 2**-8


def test_soft_labels_of_more_than_two_to_the_31_elements():
    """Output [2, 3, 2^29 / 3 ...]: the gradient-free sampler writes 4 GiB of bfloat16."""
    size = 2**31 // 6 + 1001
    mu = torch.tensor([0.3, -0.2, 0.1], dtype=torch.bfloat16).view(1, 3, 1).expand(2, 3, size)
    logvar = torch.tensor([0.5, 0.1, -0.3], dtype=torch.bfloat16).view(1, 3, 1).expand(2, 3, size)
    soft = calseg.sample_soft_labels(mu, logvar, num_samples=2, seed=5)
    assert soft.numel() > 2**31
    for n, start in ((0, 0), (0, size - 1000), (1, 0), (1, size - 1000)):
        eps = torch.stack(
            [
                rng.standard_normal(5, 1000, 3, k, first_voxel=n * size + start, device=torch.device("cpu"))
                for k in (0, 1)
            ]
        )
        nu = mu[0, :, :1].double() + (logvar[0, :, :1].double() / 2).exp() * eps
        wanted = torch.softmax(nu, 1).mean(0)
        torch.testing.assert_close(soft[n, :, start : start + 1000].double(), wanted, rtol=2**-8, atol=1e-6)
    assert compute_dtype(soft.dtype) == torch.float32


def test_calibration_bins_past_two_to_the_31_elements():
    """bfloat16 logits [1, 2, 2^30 + 2^16], 4 GiB: every sum is the exact multiple of that of one voxel."""
    size = 2**30 + 2**16
    x = torch.empty(1, 2, size, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 0.0, 1.0
    target = torch.ones(1, size, dtype=torch.uint8)
    x[..., size - 5 :] = torch.tensor([3.0, 0.0], dtype=torch.bfloat16)[:, None]  # rare, and all at the far end
    target[:, size - 5 :] = 0
    for class_wise in (False, True):
        bins = calseg.calibration_bins(x, target, class_wise=class_wise)
        often, rarely = (
            calseg.calibration_bins(x[..., i : i + 1], target[..., i : i + 1], class_wise=class_wise)
            for i in (0, size - 1)
        )
        for got, one, other in zip(bins, often, rarely, strict=True):
            assert torch.equal(got, one * (size - 5) + other * 5)
        assert int(bins.num_voxels) == size


def test_ace_loss_past_two_to_the_31_elements():
    """The same volume forward and backward: value and gradient of two voxels, weighted by their numbers."""
    size = 2**30 + 2**16
    x = torch.empty(1, 2, size, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 0.0, 1.0
    target = torch.ones(1, size, dtype=torch.uint8)
    x[..., size - 5 :] = torch.tensor([3.0, 0.0], dtype=torch.bfloat16)[:, None]
    target[:, size - 5 :] = 0
    x.requires_grad_()
    loss = calseg.ace_loss(x, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    often, rarely = torch.softmax(torch.tensor([0.0, 1.0]), 0), torch.softmax(torch.tensor([3.0, 0.0]), 0)
    # the mean over two bins of each class, each bin with voxels of one kind
    wanted = (often[0] + 1 - often[1] + 1 - rarely[0] + rarely[1]) / 2
    assert abs(float(loss.detach()) / float(wanted) - 1) < 2**-8
    for at, p, number, sign in ((0, often, size - 5, 1.0), (2**30, often, size - 5, 1.0), (size - 1, rarely, 5, -1.0)):
        slope = sign / (2 * number) * torch.tensor([1.0, -1.0])
        exact = p * (slope - (p * slope).sum())
        torch.testing.assert_close(gradient[0, :, at].float(), exact, rtol=2**-7, atol=0)
