"""Tests of the cross-entropy with sampled soft labels plus KL term, and of its gradients, against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    assert_accurate,
    assert_matches,
    class_weights,
    evaluate,
    id_of,
    labels,
    scores,
)

import calseg
from calseg.backends import rng

# In float32 the noise has an error of 1e-6 (8 ulp of 1), to which a softmax and a sum over samples add.
ULPS = 48


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        "input": scores(*shape, dtype=dtype),
        "mu": scores(*shape, dtype=dtype, seed=1, scale=1.5),
        "logvar": scores(*shape, dtype=dtype, seed=2, scale=0.8),
    }


def vls(target, backend, *, weighted=False, **options):
    """Return the loss of a backend as a function of ``input, mu, logvar``."""
    options = {"seed": 11, **options}

    def function(input, mu, logvar):
        C = input.shape[1 if input.dim() > 1 else 0]
        weight = class_weights(C, input.dtype) if weighted else None
        return calseg.vls_cross_entropy(input, target, weight, mu=mu, logvar=logvar, backend=backend, **options)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
def test_extreme_gaussians(backend, dtype):
    """Compute with means of 1e4, variances from 0 to 1e8, and logits of -inf where the estimate is 0."""
    rows = 12
    tensors = gaussian(rows, 3, dtype=dtype)
    tensors["mu"][0], tensors["mu"][1, 0], tensors["mu"][2, 0] = 1e4, 1e4, -1e4
    tensors["logvar"][3], tensors["logvar"][4, 1], tensors["logvar"][5] = -1e4, -200.0, 18.0
    tensors["input"][6, 0], tensors["input"][7] = 1e4, -1e4
    target = torch.arange(rows) % 3
    for temperature in (1.0, 0.01):
        assert_matches(
            *(vls(target, name, reduction="none", alpha=0.5, temperature=temperature, beta=1e-9)
              for name in (backend, "reference")),
            tensors,
            # nu / temperature of 1e4 is known to 1e4 * eps
            ulps=ULPS, scale=1e4 / temperature, grad_scale=1e4 / temperature,
        )  # fmt: skip


def test_impossible_class_without_mass(backend):
    """A class with logit -inf, whose estimate is 0 and which is not the label, changes nothing."""
    tensors, target = gaussian(4, 3), torch.tensor([0, 2, 0, 2])
    tensors["input"][:, 1], tensors["mu"][:, 1] = -torch.inf, -1e5
    got = evaluate(vls(target, backend, reduction="none", alpha=0.5, beta=0.0), tensors)
    soft = calseg.sample_soft_labels(tensors["mu"], tensors["logvar"], target, alpha=0.5, seed=11, backend="reference")
    kept = evaluate(
        lambda input: F.cross_entropy(input[:, ::2], soft[:, ::2], reduction="none"), {"input": tensors["input"]}
    )
    assert_accurate(got.value, kept.value, ulps=ULPS)
    assert_accurate(got.gradients["input"], kept.gradients["input"], ulps=ULPS)
    for name, gradient in got.gradients.items():
        assert bool(gradient.isfinite().all()), name
        assert torch.count_nonzero(gradient[:, 1]) == 0, name


def test_without_gaussian_term_and_estimate_it_is_cross_entropy(backend):
    """With alpha = beta = 0, the loss has the bits of plain cross-entropy, and mu and logvar have gradient 0."""
    shape = (2, 3, 50)
    tensors, target = gaussian(*shape, dtype=torch.float32), labels(shape)
    plain = evaluate(
        lambda input: calseg.vls_cross_entropy(input, target, backend=backend), {"input": tensors["input"]}
    )
    got = evaluate(vls(target, backend, alpha=0.0, beta=0.0), tensors)
    assert torch.equal(got.value, plain.value)
    assert torch.equal(got.gradients["input"], plain.gradients["input"])
    assert torch.count_nonzero(got.gradients["mu"]) == torch.count_nonzero(got.gradients["logvar"]) == 0


def test_sampled_is_given_soft_labels_and_kl(backend):
    """One fused call equals sample_soft_labels, cross-entropy with these labels, and gaussian_kl."""
    shape = (2, 4, 9, 5)
    tensors, target = gaussian(*shape), labels(shape, ignore_index=-100)

    def parts(input, mu, logvar):
        soft = calseg.sample_soft_labels(mu, logvar, target, alpha=0.4, temperature=2.0, seed=11, backend=backend)
        loss = calseg.vls_cross_entropy(input, target, soft_labels=soft, reduction="none", backend=backend)
        kl = calseg.gaussian_kl(mu, logvar, reduction="none", backend=backend)
        return loss + 0.5 * kl.where(target != -100, 0.0)

    assert_matches(
        vls(target, backend, alpha=0.4, temperature=2.0, beta=0.5, reduction="none"), parts, tensors, ulps=ULPS
    )


# ---- seeds ----


def test_seeds(backend):
    tensors, target = gaussian(2, 3, 50, dtype=torch.float32), labels((2, 3, 50))
    loss = lambda seed: float(vls(target, backend, alpha=1.0, seed=seed)(**tensors))  # noqa: E731
    assert loss(7) == loss(7) == loss(torch.tensor(7))
    assert loss(-3) == loss(2**64 - 3) == loss(torch.tensor(-3))
    assert len({loss(seed) for seed in (0, 1, 2**31, 2**32, 2**63, -1)}) == 6
    torch.manual_seed(5)
    first = [loss(None) for _ in range(3)]
    torch.manual_seed(5)
    assert [loss(None) for _ in range(3)] == first
    assert len(set(first)) == 3
    torch.manual_seed(5)
    drawn = rng.draw_seed(torch.device("cpu"))
    assert loss(drawn) == first[0]


def test_every_backend_draws_the_same_seed():
    tensors, target = gaussian(2, 3, 50), labels((2, 3, 50))
    values = []
    for backend in ("reference", None):
        torch.manual_seed(9)
        values.append(vls(target, backend, seed=None)(**tensors))
    assert_accurate(values[1], values[0], ulps=ULPS)


# ---- modules ----


def test_modules_hold_the_options():
    shape = (2, 3, 5, 5)
    tensors, target, weight = gaussian(*shape), labels(shape), class_weights(3)
    mu, logvar, input = tensors["mu"], tensors["logvar"], tensors["input"]
    soft = torch.softmax(mu, 1)
    vls_options = {"alpha": 0.3, "temperature": 2.0, "seed": 4, "label_smoothing": 0.1, "ignore_index": 2}
    pairs = [
        (calseg.VLSCrossEntropyLoss(weight, **vls_options)(input, target, mu=mu, logvar=logvar),
         calseg.vls_cross_entropy(input, target, weight, mu=mu, logvar=logvar, **vls_options)),
        (calseg.VLSCrossEntropyLoss(weight)(input, target, soft_labels=soft),
         calseg.vls_cross_entropy(input, target, weight, soft_labels=soft)),
        (calseg.SoftCrossEntropyLoss(weight, reduction="sum")(input, soft, ignore_mask=target == 0),
         calseg.soft_cross_entropy(input, soft, weight, reduction="sum", ignore_mask=target == 0)),
        (calseg.VLSElboLoss(weight, seed=2, beta=0.1)(mu, logvar, target),
         calseg.vls_elbo(mu, logvar, target, weight, seed=2, beta=0.1)),
        (calseg.GaussianKLLoss(prior_mu=1.0)(mu, logvar), calseg.gaussian_kl(mu, logvar, 1.0)),
    ]  # fmt: skip
    for module, function in pairs:
        assert torch.equal(module, function)


def test_module_weight_and_repr():
    loss = calseg.VLSCrossEntropyLoss(class_weights(3), alpha=0.3)
    assert loss.state_dict() == {}
    assert loss.to(torch.float32).weight.dtype == torch.float32
    assert repr(loss) == "VLSCrossEntropyLoss(alpha=0.3)"
    for module in (calseg.VLSCrossEntropyLoss, calseg.SoftCrossEntropyLoss, calseg.VLSElboLoss, calseg.GaussianKLLoss):
        with pytest.raises(TypeError, match=rf"{module.__name__}: unknown option 'alhpa', wanted some of .*reduction"):
            module(alhpa=0.3)


# ---- memory ----


def test_memory_does_not_grow_with_the_samples(peak_growth):
    """64 samples of 8 MiB of logits need three gradients of 8 MiB, and no memory of 64 x 8 MiB."""
    shape, mib = (1, 4, 128, 64, 64), 2**20
    tensors = {k: t.requires_grad_() for k, t in gaussian(*shape, dtype=torch.float32).items()}
    target = labels(shape, dtype=torch.uint8)
    for num_samples, bound in ((1, 64 * mib), (64, 64 * mib)):
        run = lambda m=num_samples: vls(target, "cpu", num_samples=m)(**tensors).backward()  # noqa: E731
        assert peak_growth(run) < bound, num_samples


# ---- the argument space ----
