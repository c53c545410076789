"""Tests of the comparison methods against their formulas voxel by voxel, and against MONAI if it has the method."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import labels, scores
from torch import Tensor

from calseg import methods
from calseg.methods import (
    TemperatureFit,
    fit_temperature,
    focal_cross_entropy,
    mbls_cross_entropy,
    nacl_cross_entropy,
    svls_cross_entropy,
    svls_labels,
)

LOSSES: dict[str, Callable[..., Tensor]] = {
    "svls": svls_cross_entropy,
    "focal": focal_cross_entropy,
    "mbls": mbls_cross_entropy,
    "nacl": nacl_cross_entropy,
}
SHAPES = {"1d": (2, 3, 9), "2d": (2, 4, 5, 6), "3d": (2, 3, 4, 3, 5)}


def neighbours(label: Tensor, place: tuple[int, ...]) -> list[tuple[float, int]]:
    """Return (squared distance, label) of the voxels around ``place``, with repeated borders."""
    found = []
    for step in itertools.product((-1, 0, 1), repeat=label.dim()):
        at = tuple(min(max(p + s, 0), size - 1) for p, s, size in zip(place, step, label.shape, strict=True))
        found.append((float(sum(s * s for s in step)), int(label[at])))
    return found


def shares(label: Tensor, classes: int, weight: Callable[[float], float]) -> Tensor:
    """Return the weighted class shares of the labelled neighbours of every voxel, ``[C, *S]``, by loops."""
    result = torch.zeros(classes, *label.shape, dtype=torch.float64)
    for place in itertools.product(*map(range, label.shape)):
        near = [(weight(d), y) for d, y in neighbours(label, place) if y >= 0]
        for w, y in near:
            result[(y, *place)] += w / sum(w for w, _ in near)
    return result


def svls_by_loops(label: Tensor, classes: int, sigma: float) -> Tensor:
    distances = [sum(s * s for s in step) for step in itertools.product((-1, 0, 1), repeat=label.dim())]
    around = sum(math.exp(-d / (2 * sigma**2)) for d in distances if d)
    soft = shares(label, classes, lambda d: math.exp(-d / (2 * sigma**2)) if d else around)
    return soft * (label >= 0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sigma", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("ignored", [False, True])
def test_svls_labels_are_the_filtered_one_hot(shape: tuple[int, ...], sigma: float, ignored: bool) -> None:
    target = labels(shape, dtype=torch.int16, ignore_index=-7 if ignored else None)
    soft = svls_labels(target, shape[1], sigma=sigma, ignore_index=-7)
    expected = torch.stack([svls_by_loops(each, shape[1], sigma) for each in target])
    torch.testing.assert_close(soft.double(), expected, atol=2e-6, rtol=0)
    valid = target != -7
    torch.testing.assert_close(soft.sum(1), valid.float())
    own = soft.gather(1, target.long().clamp(min=0)[:, None])[:, 0]
    assert bool((own[valid] >= 0.5 - 1e-6).all())


def test_svls_published_weights() -> None:
    """Compare the weights with those of the authors' kernel of size 3 and sigma 1, in 2-D and 3-D."""
    for dims, weights in ((2, (0.5, 0.0778, 0.0472)), (3, (0.5, 0.0308, 0.0187, 0.0113))):
        target = torch.zeros(1, *(3,) * dims, dtype=torch.uint8)
        target[(0, *(1,) * dims)] = 1
        soft = svls_labels(target, 2)[0, 1]
        for distance, weight in enumerate(weights):
            place = (0,) * distance + (1,) * (dims - distance)
            assert float(soft[place]) == pytest.approx(weight, abs=5e-5)


def test_a_tiny_sigma_leaves_hard_labels() -> None:
    target = labels((1, 3, 4, 4))
    torch.testing.assert_close(svls_labels(target, 3, sigma=0.02), F.one_hot(target, 3).movedim(-1, 1).float())


def by_formula(name: str, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the loss of every voxel, by plain PyTorch and loops. It is 0 where ignored."""
    classes = logits.shape[1]
    valid = target != ignore_index
    known = torch.where(valid, target, 0).long()
    hidden = torch.where(valid, target.long(), -1)
    log_p = torch.log_softmax(logits, 1)
    nll = -log_p.gather(1, known[:, None])[:, 0]
    if name == "svls":
        soft = torch.stack([svls_by_loops(each, classes, 1.0) for each in hidden])
        loss = -(soft * log_p).sum(1)
    elif name == "focal":
        loss = (1 - (-nll).exp()) ** 3 * nll
    elif name == "mbls":
        loss = nll + 0.1 * F.relu(logits.max(1, keepdim=True).values - logits - 5).mean(1)
    else:
        near = torch.stack([shares(each, classes, lambda d: 1.0) for each in hidden])
        loss = nll + 0.1 * (near - logits).abs().mean(1)
    return loss * valid


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_the_formulas(name: str, shape: tuple[int, ...]) -> None:
    target = labels(shape, dtype=torch.uint8, ignore_index=255)
    logits = scores(*shape, scale=4.0).requires_grad_()
    expected = by_formula(name, logits, target, 255)
    count = (target != 255).sum()
    for reduction, wanted in (("none", expected), ("sum", expected.sum()), ("mean", expected.sum() / count)):
        loss = LOSSES[name](logits, target, ignore_index=255, reduction=reduction)
        torch.testing.assert_close(loss, wanted, atol=2e-6, rtol=2e-6)
        ours, theirs = (torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (loss, wanted))
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)
        assert not ours.movedim(1, -1)[target == 255].any()


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 3, 4, 3, 5)], ids=["2d", "3d"])
def test_nacl_and_focal_are_monais(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monai = pytest.importorskip("monai.losses")
    logits, target = scores(*shape, dtype=torch.float32), labels(shape)
    focal = monai.FocalLoss(gamma=2.0, use_softmax=True, to_onehot_y=True, reduction="none")
    torch.testing.assert_close(
        focal_cross_entropy(logits, target, gamma=2.0, reduction="none"), focal(logits, target[:, None]).sum(1)
    )
    peer = monai.NACLLoss(classes=shape[1], dim=len(shape) - 2, alpha=0.3)
    inside = (..., *(slice(1, -1),) * (len(shape) - 2))
    ours = methods._renormalise(methods._filter(methods._onehot(target, shape[1], -100), 1 / 3, 1 / 3))
    # MONAI pads with voxels of no class, so its shares fall short of 1 along the border.
    torch.testing.assert_close(ours[inside], peer.get_constr_target(target)[inside])
    monkeypatch.setattr(peer, "get_constr_target", lambda mask: ours)
    torch.testing.assert_close(nacl_cross_entropy(logits, target, alpha=0.3), peer(logits, target))


@pytest.mark.parametrize("name", LOSSES)
def test_settings_at_zero_give_cross_entropy(name: str) -> None:
    shape = (2, 3, 4, 5)
    logits, target = scores(*shape), labels(shape)
    off = {"svls": {"sigma": 0.02}, "focal": {"gamma": 0}, "mbls": {"alpha": 0}, "nacl": {"alpha": 0}}[name]
    torch.testing.assert_close(LOSSES[name](logits, target, **off), F.cross_entropy(logits, target))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_sure_and_of_ignored_voxels_are_finite(name: str) -> None:
    logits = torch.tensor([[60.0, -60.0, 0.0, 3.0], [-60.0, 60.0, 0.0, 3.0]])[None].requires_grad_()
    target = torch.tensor([[0, 0, -100, 1]])
    LOSSES[name](logits, target).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    nothing = LOSSES[name](logits, torch.full((1, 4), -100), reduction="sum")
    assert nothing.item() == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 6, 7), (1, 2, 400, 500)], ids=["small", "sum beyond float16"])
def test_low_precision_is_close_to_float64(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, target = scores(*shape, dtype=dtype), labels(shape)
    truth = LOSSES[name](logits.double(), target)
    assert float(LOSSES[name](logits, target)) == pytest.approx(float(truth), rel=4 * torch.finfo(dtype).eps)


def test_mistakes_are_named() -> None:
    logits, target = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    for call, error, message in (
        (lambda: svls_cross_entropy(logits, target, sigma=0), ValueError, "sigma: got 0"),
        (lambda: svls_cross_entropy(logits, target[:, :2]), ValueError, "target: got"),
        (lambda: svls_labels(target + 2, 2), IndexError, "target: got the label 2, wanted 0 to 1"),
        (lambda: svls_labels(torch.tensor(1), 2), ValueError, "at least one spatial axis"),
        (lambda: focal_cross_entropy(logits, target, gamma=0.5), ValueError, "gamma: got 0.5"),
        (lambda: mbls_cross_entropy(logits, target, margin=-1), ValueError, "margin: got -1"),
        (lambda: nacl_cross_entropy(logits, target, alpha=math.nan), ValueError, "alpha: got nan"),
        (lambda: nacl_cross_entropy(logits, target, reduction="median"), ValueError, "reduction: got 'median'"),
        (lambda: fit_temperature([], []), ValueError, "logits: got 0 cases"),
        (
            lambda: fit_temperature([logits[0]], [target[0] - 100]),
            ValueError,
            r"every voxel is -100 \(ignored\), wanted",
        ),
        (
            lambda: fit_temperature([logits[0]], [0 * target[0]], region="near"),
            ValueError,
            r"every voxel is -100 \(ignored\) or outside the region 'near'",
        ),
        (lambda: fit_temperature([logits[0]], [target[0]], region="border"), ValueError, "region: got 'border'"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_temperature_minimises_the_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(3, 40, 50, generator=generator)
    target = torch.multinomial(torch.softmax(true.flatten(1), 0).T, 1, generator=generator).view(40, 50)
    target[:3] = -100
    logits = 2.5 * true  # over-confident by that factor
    cases = [logits[:, :15], logits[:, 15:]], [target[:15], target[15:]]
    best = fit_temperature(*cases)
    assert best == pytest.approx(2.5, rel=0.1)

    def nll(temperature: float) -> float:
        return float(F.cross_entropy(logits[None].double() / temperature, target[None]))

    assert nll(best) < min(nll(best * 1.001), nll(best / 1.001))
    # Without an error the likelihood has no optimum: the sharpest temperature allowed.
    assert fit_temperature([torch.tensor([[1.0, 0.0], [0.0, 1.0]])], [torch.tensor([0, 1])]) == pytest.approx(0.01)


@pytest.mark.parametrize("seed", range(12))
def test_temperature_from_cases_that_are_not_kept(seed: int) -> None:
    """It is the zero of the derivative of the likelihood of all voxels together, in whatever parts they come."""
    generator = torch.Generator().manual_seed(seed)
    classes, count = (2, 3, 14, 40)[seed % 4], (20, 500, 4000)[seed // 4]
    true = 3 * torch.randn(classes, count, generator=generator)
    target = torch.multinomial(torch.softmax(true, 0).T, 1, generator=generator)[:, 0]
    target[::7] = 255
    logits = 10 ** (seed / 6 - 1) * true

    def slope(inverse: float) -> float:
        x, y = logits[:, target != 255].double(), target[target != 255]
        x = x - x.amax(0)
        return float((torch.softmax(inverse * x, 0) * x).sum() - x.gather(0, y[None]).sum())

    low, high = math.log(0.01), math.log(100)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    fit = TemperatureFit(ignore_index=255)
    for start in range(0, count, 97):
        fit.add(logits[:, start : start + 97], target[start : start + 97])
    assert fit.temperature() == pytest.approx(math.exp(-(low + high) / 2), rel=1e-9)
    assert fit.voxels == int((target != 255).sum())
    assert sum(value.numel() for value in vars(fit).values() if isinstance(value, torch.Tensor)) < 500
    assert fit_temperature([logits], [target], ignore_index=255) == pytest.approx(fit.temperature(), rel=1e-12)


@pytest.mark.parametrize("region", ["near", "foreground"])
def test_temperature_of_a_region(region: str) -> None:
    """It is that of the voxels of the region alone, here of those up to 3 steps from the foreground in a row."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 400, generator=generator)
    target = torch.zeros(400, dtype=torch.long)
    target[100:150] = torch.randint(1, 3, (50,), generator=generator)
    target[98:105] = 255
    inside = torch.zeros(400, dtype=torch.bool)
    inside[105:150] = True
    if region == "near":
        inside[150:153] = True
    fit = TemperatureFit(255, region)
    fit.add(logits, target)
    assert fit.voxels == int(inside.sum())
    alone = fit_temperature([logits[:, inside]], [target[inside]])
    assert fit.temperature() == alone
    assert fit_temperature([logits], [target], ignore_index=255, region=region) == alone
    assert fit_temperature([logits], [target], ignore_index=255) != pytest.approx(alone, rel=0.01)


def test_temperature_without_a_voxel_changes_nothing() -> None:
    fit = TemperatureFit(region="near")
    fit.add(torch.randn(2, 4, 4), torch.zeros(4, 4, dtype=torch.long))
    assert fit.temperature() == 1.0


def test_temperature_stays_within_bounds() -> None:
    right, wrong = torch.tensor([[5.0], [0.0]]), torch.tensor([[0.0], [5.0]])
    assert fit_temperature([right], [torch.tensor([0])]) == pytest.approx(0.01)
    assert fit_temperature([wrong], [torch.tensor([0])]) == pytest.approx(100)
    assert fit_temperature([1e-6 * right] * 99 + [1e-6 * wrong], [torch.tensor([0])] * 100) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "name", [name for name in vars(methods) if name.endswith(("_entropy", "_labels", "_temperature"))]
)
def test_docstring_examples(name: str) -> None:
    if getattr(methods, name).__module__ != methods.__name__:
        return
    examples = doctest.DocTestFinder(recurse=False).find(getattr(methods, name), name, globs={})
    assert examples[0].examples
    report: list[str] = []
    assert doctest.DocTestRunner().run(examples[0], out=report.append).failed == 0, "".join(report)
