"""The loss of a run, its noise seeds and its learning rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from boxes import TINY, config

from calseg.functional import ace_loss, sample_soft_labels, vls_cross_entropy, vls_elbo
from calseg.methods import METHODS, Output
from calseg.training.config import TrainConfig
from calseg.training.estimator import estimator_loss
from calseg.training.loop import Patches, learning_rate, noise_seed
from calseg.training.nets import build_net, build_stage_one
from calseg.training.stage_two import objective
from calseg.volumes.datasets import IGNORE_INDEX


def random_output(classes: int = 3) -> tuple[Output, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, mu, logvar = torch.randn(3, 2, classes, 4, 5, 6, generator=generator).unbind()
    label = torch.randint(0, classes, (2, 4, 5, 6), generator=generator, dtype=torch.int16)
    label[0, :2] = IGNORE_INDEX
    return Output(logits.requires_grad_(), mu.requires_grad_(), logvar.requires_grad_()), label


def test_cross_entropy_objective_is_pytorchs() -> None:
    output, label = random_output()
    loss = objective(Output(output.logits, None, None), label, TINY, 0)
    expected = F.cross_entropy(output.logits, label.long(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, output.logits), torch.autograd.grad(expected, output.logits))


def test_vls_objective_is_elbo_plus_soft_cross_entropy() -> None:
    output, label = random_output()
    assert output.mu is not None
    assert output.logvar is not None
    settings = config(method="vls", alpha=0.3, beta=0.2, temperature=1.5, num_samples=3, seed=5)
    loss = objective(output, label, settings, 7)
    elbo = vls_elbo(
        output.mu,
        output.logvar,
        label,
        num_samples=3,
        beta=0.2,
        ignore_index=IGNORE_INDEX,
        seed=noise_seed(5, 7, 0),
    )
    soft = vls_cross_entropy(
        output.logits,
        label,
        mu=output.mu.detach(),
        logvar=output.logvar.detach(),
        alpha=0.3,
        temperature=1.5,
        num_samples=3,
        beta=0.0,
        ignore_index=IGNORE_INDEX,
        seed=noise_seed(5, 7, 1),
    )
    torch.testing.assert_close(loss, elbo + soft)
    # Each term has its own parameters: the soft labels are held fixed.
    gradients = torch.autograd.grad(loss, list(output))
    torch.testing.assert_close(gradients[:1], torch.autograd.grad(soft, [output.logits]))
    torch.testing.assert_close(gradients[1:], torch.autograd.grad(elbo, [output.mu, output.logvar]))


def dice(p: torch.Tensor, y: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """``1 - sum(p + y - |p - y|) / sum(p + y)`` over the batch, averaged over the foreground classes."""
    counts = (label != IGNORE_INDEX)[:, None]
    axes = (0, 2, 3, 4)
    mass, difference = ((p + y) * counts).sum(axes), ((p - y).abs() * counts).sum(axes)
    return (1 - (mass - difference) / mass)[1:].mean()


def test_dice_cross_entropy_is_the_sum_of_both() -> None:
    output, label = random_output()
    loss = objective(output, label, TrainConfig(method="dice_cross_entropy"), 0)
    onehot = F.one_hot(label.long().clamp(min=0), 3).movedim(-1, 1).float()
    expected = F.cross_entropy(output.logits, label.long(), ignore_index=IGNORE_INDEX)
    expected = expected + dice(output.logits.softmax(1), onehot, label)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, output.logits), torch.autograd.grad(expected, output.logits))


@pytest.mark.parametrize("binning", ["hard", "soft"])
def test_ace_objective_adds_the_error_of_every_item_and_class(binning: str) -> None:
    """The error of 20 bins of one class of one item, summed voxel by voxel."""
    output, label = random_output()
    without = objective(output, label, TINY, 0)
    loss = objective(output, label, config(method=f"ace_{binning}", alpha=0.3), 0)
    errors = []
    for p, y in zip(output.logits.softmax(1).detach().double(), label, strict=True):
        for number in range(3):
            gaps, mass = torch.zeros(20), torch.zeros(20)
            for probability, hit in zip(p[number][y >= 0], y[y >= 0] == number, strict=True):
                place = float(probability) * 20 - 0.5  # in units of bins, from the centre of the first
                low = min(max(math.floor(place), 0), 19)
                share = min(max(place - low, 0.0), 1.0) if low < 19 else 0.0
                shares = {min(int(float(probability) * 20), 19): 1.0}
                if binning == "soft":
                    shares = {low: 1 - share, min(low + 1, 19): share} if share else {low: 1.0}
                for bin, part in shares.items():
                    gaps[bin] += part * (probability - float(hit))
                    mass[bin] += part
            kept = mass >= 0.01
            errors.append(float((gaps[kept].abs() / mass[kept]).mean()))
    assert float((loss - without).detach()) == pytest.approx(0.3 * np.mean(errors), rel=1e-4)
    added = 0.3 * ace_loss(output.logits, label, binning=binning)
    torch.testing.assert_close(
        *torch.autograd.grad(loss - without, output.logits), *torch.autograd.grad(added, output.logits)
    )


def test_hard_dice_beside_soft_labels() -> None:
    output, label = random_output()
    soft = torch.softmax(torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(1)), 1)
    settings = config(method="calseg", dice_weight=0.7, dice_labels="hard")
    loss = objective(output, label, settings, 0, soft)
    onehot = F.one_hot(label.long().clamp(min=0), 3).movedim(-1, 1).float()
    counts = label != IGNORE_INDEX
    expected = -(soft * output.logits.log_softmax(1)).sum(1)[counts].mean()
    torch.testing.assert_close(loss, expected + 0.7 * dice(output.logits.softmax(1), onehot, label))


@pytest.mark.parametrize("method", METHODS)
def test_dice_weight_adds_the_dice_loss_of_the_labels_of_the_method(method: str) -> None:
    output, label = random_output()
    settings = config(method=method, dice_weight=0.7, seed=5)
    soft = torch.softmax(torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(1)), 1)
    without = objective(output, label, config(method=method, dice_weight=0.0, seed=5), 7, soft)
    loss = objective(output, label, settings, 7, soft)
    labels = F.one_hot(label.long().clamp(min=0), 3).movedim(-1, 1).float()
    if method == "vls":
        labels = sample_soft_labels(
            output.mu.detach(), output.logvar.detach(), label, alpha=settings.alpha, temperature=settings.temperature,
            num_samples=settings.num_samples, ignore_index=IGNORE_INDEX, seed=noise_seed(5, 7, 1),
        )  # fmt: skip
    elif method == "calseg":
        labels = soft
    added = 0.7 * dice(output.logits.softmax(1), labels, label)
    torch.testing.assert_close(loss, without + added)
    torch.testing.assert_close(
        *torch.autograd.grad(loss - without, output.logits), *torch.autograd.grad(added, output.logits)
    )


def test_dice_weight_reaches_the_first_stage() -> None:
    settings = config(method="calseg", dice_weight=0.7)
    net = build_stage_one(1, 3, latent_size=settings.latent_size, seed=0)
    generator = torch.Generator().manual_seed(0)
    patches = Patches(torch.randn(2, 1, 16, 16, 16, generator=generator), torch.randint(0, 3, (2, 16, 16, 16)), None)
    with_dice, without = (estimator_loss(net, each)(patches, 3) for each in (settings, config(method="calseg")))
    logits = net(
        *patches[:2], torch.randn(2, net.latent_size, generator=torch.Generator().manual_seed(noise_seed(0, 3, 0)))
    )[0]
    onehot = F.one_hot(patches.label, 3).movedim(-1, 1).float()
    torch.testing.assert_close(with_dice - without, 0.7 * dice(logits.softmax(1), onehot, patches.label))


@pytest.mark.parametrize("dice_weight", [0.0, 0.7])
def test_plain_networks_of_the_first_stage_learn_the_labels(dice_weight: float) -> None:
    settings = config(method="calseg", estimator="network", dice_weight=dice_weight)
    net = build_net(1, 3, seed=0)
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (2, 16, 16, 16), generator=generator)
    label[0, :2] = IGNORE_INDEX
    patches = Patches(torch.randn(2, 1, 16, 16, 16, generator=generator), label, None)
    logits = net(patches.image).logits
    onehot = F.one_hot(label.clamp(min=0), 3).movedim(-1, 1).float()
    expected = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX)
    expected = expected + dice_weight * dice(logits.softmax(1), onehot, label)
    torch.testing.assert_close(estimator_loss(net, settings)(patches, 3), expected)


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_objective_without_a_labelled_voxel_is_zero(dice_weight: float) -> None:
    output, label = random_output()
    label.fill_(IGNORE_INDEX)
    plain = Output(output.logits, None, None)
    for method, each in (("vls", output), ("cross_entropy", plain), ("ace_hard", plain), ("ace_soft", plain)):
        loss = objective(each, label, config(method=method, dice_weight=dice_weight), 0)
        assert loss.item() == 0
        loss.backward()
    assert output.logits.grad is not None
    assert not output.logits.grad.any()


def test_noise_seeds_and_learning_rate() -> None:
    seeds = {noise_seed(s, i, k) for s in range(3) for i in range(20) for k in range(2)}
    assert len(seeds) == 120
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(1, 2, 0) == noise_seed(1, 2, 0)
    settings = config(iterations=100, learning_rate=1.0)
    rates = [learning_rate(settings, iteration) for iteration in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert int(np.argmax(rates)) == 4
    assert rates[50] == pytest.approx(0.5**0.9)
    assert 0 < rates[-1] < 0.02
