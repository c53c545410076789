# ruff: noqa: E501 (a table reads better with one case a line)
"""Wrong arguments: the type of the error, the name of the argument, what came and what was wanted."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from cases import FLOATS, id_of, labels, scores

import calseg

SHAPE = (2, 3, 4, 5)
X = scores(*SHAPE, dtype=torch.float32)
Y = labels(SHAPE)
MU, LOGVAR = scores(*SHAPE, dtype=torch.float32, seed=1), scores(*SHAPE, dtype=torch.float32, seed=2)
NAN, INF = float("nan"), float("inf")


def vls(input=X, target=Y, **options):
    return calseg.vls_cross_entropy(input, target, **options)


def sampled(**options):
    return vls(**{"mu": MU, "logvar": LOGVAR, **options})


def soft(input=X, soft_target=MU, **options):
    return calseg.soft_cross_entropy(input, soft_target, **options)


def elbo(mu=MU, logvar=LOGVAR, target=Y, **options):
    return calseg.vls_elbo(mu, logvar, target, **options)


def kl(mu=MU, logvar=LOGVAR, **options):
    return calseg.gaussian_kl(mu, logvar, **options)


def sample(mu=MU, logvar=LOGVAR, target=None, **options):
    return calseg.sample_soft_labels(mu, logvar, target, **options)


def accumulate(logit_maps=(X, X), target=None, **options):
    return calseg.accumulate_soft_labels(logit_maps, target, **options)


def ace(input=X, target=Y, **options):
    return calseg.ace_loss(input, target, **options)


def each(functions, error, match, **arguments):
    return [(f, arguments, error, match) for f in functions]


WITH_LABELS = (vls, sampled, elbo, sample, accumulate, ace)
SAMPLING = (sampled, elbo, sample)
LOSSES = (vls, sampled, soft, elbo, kl, ace)
CASES = [
    *each((vls, elbo, sample, accumulate), ValueError, "ignore_index: got .*, wanted an integer of 64 bits", ignore_index=7 - 2**64),
    # scores
    *each((vls, sampled, soft, ace), TypeError, r"input: got \[\[1.0\]\] \(list\), wanted a tensor", input=[[1.0]]),
    *each((vls, soft, ace), TypeError, r"input: got a int64 tensor of shape \[2, 3\] on cpu, wanted float32", input=torch.ones(2, 3).long()),
    *each((vls, soft, ace), TypeError, r"input: got a complex64 tensor", input=torch.ones(2, 3, dtype=torch.complex64)),
    *each((vls, soft, ace), ValueError, r"input: got .*shape \[\].*wanted \[C\], \[N, C\] or \[N, C, \*S\]", input=torch.ones(())),
    *each((vls, soft, ace), ValueError, r"input: got .*shape \[2, 0, 4\].*at least one class", input=torch.ones(2, 0, 4)),
    *each((elbo, kl, sample), TypeError, "mu: got None", mu=None),
    *each((elbo, kl, sample), ValueError, r"logvar: .*\[2, 3, 4\].*wanted the shape of mu, \[2, 3, 4, 5\]", logvar=torch.ones(2, 3, 4)),
    *each((elbo, kl, sample), TypeError, "logvar: got a int64 tensor", logvar=torch.ones(SHAPE).long()),
    *each((sampled,), ValueError, r"mu: .*\[2, 4, 4, 5\].*wanted the shape of input, \[2, 3, 4, 5\]", mu=torch.ones(2, 4, 4, 5)),
    *each((sampled,), TypeError, "logvar: got 0.5", logvar=0.5),
    *each((soft,), ValueError, r"soft_target: .*\[2, 4, 5\].*wanted the shape of input", soft_target=torch.ones(2, 4, 5)),
    *each((vls,), ValueError, r"soft_labels: .*\[2, 4, 5\].*wanted the shape of input", soft_labels=torch.ones(2, 4, 5)),
    # labels
    *each(WITH_LABELS, TypeError, r"target: got \[0\] \(list\), wanted a tensor of class indices", target=[0]),
    *each(WITH_LABELS, ValueError, r"target: .*\[2, 4\] on cpu, wanted shape \[2, 4, 5\] for scores of shape \[2, 3, 4, 5\]", target=Y[..., 0]),
    *each(WITH_LABELS, ValueError, r"target: .*\[2, 2, 4, 5\].*wanted shape \[2, 4, 5\]", target=torch.stack([Y, Y], 1)),
    *each(WITH_LABELS, IndexError, r"target\[0, 0, 0\] is 0.5: wanted a class in \[0, 3\)", target=torch.full(Y.shape, 0.5)),
    *each(WITH_LABELS, TypeError, r"target: got a complex64 tensor .*wanted class indices", target=Y.to(torch.complex64)),
    # both, or half, of a thing
    *each((sampled,), ValueError, "soft_labels: got both soft_labels and mu, logvar", soft_labels=X),
    *each((vls,), ValueError, "logvar: got None, wanted mu and logvar together", mu=MU),
    *each((vls,), ValueError, "mu: got None, wanted mu and logvar together", logvar=LOGVAR),
    *each((vls,), ValueError, "ignore_index: got 1, wanted none with class probabilities", target=X, ignore_index=1),
    # weights
    *each((vls, sampled, soft, elbo, ace), ValueError, r"weight: .*\[4\].*wanted shape \[3\]: one value per class", weight=torch.ones(4)),
    *each((vls, sampled, soft, elbo, ace), ValueError, r"weight: .*\[1, 3\]", weight=torch.ones(1, 3)),
    *each((vls, sampled, soft, elbo, ace), TypeError, r"weight: got \[1, 1, 1\] \(list\)", weight=[1, 1, 1]),
    *each((vls, sampled, soft, elbo, ace), TypeError, "weight: got a int64 tensor", weight=torch.ones(3).long()),
    *each((vls, sampled, soft, elbo, ace), ValueError, "weight: .*requires a gradient", weight=torch.ones(3, requires_grad=True)),
    # options
    *each(LOSSES, ValueError, "reduction: got 'average'.*wanted 'none', 'mean' or 'sum'", reduction="average"),
    *each(LOSSES, ValueError, "reduction: got 1", reduction=1),
    *each((*LOSSES, sample, accumulate), ValueError, "backend: got 'cuda2', wanted None or one of 'reference', 'cpu'", backend="cuda2"),
    *(case for value in (-0.1, 1.1, NAN, INF) for case in
      each((vls, sampled, soft), ValueError, r"label_smoothing: got .*wanted a number in \[0, 1\]", label_smoothing=value)),
    *(case for value in (-0.1, 1.1, NAN, INF) for case in
      each((sampled, sample, accumulate), ValueError, r"alpha: got .*wanted a number in \[0, 1\]", alpha=value)),
    *each((sampled, sample, accumulate), TypeError, "alpha: got '0.1'", alpha="0.1"),
    *(case for value in (0.0, -1.0, NAN, INF) for case in
      each((sampled, sample, accumulate), ValueError, "temperature: got .*above 0", temperature=value)),
    *(case for value in (0, -1) for case in
      each(SAMPLING, ValueError, f"num_samples: got {value}, wanted at least 1", num_samples=value)),
    *(case for value in (2.0, True, None) for case in
      each(SAMPLING, TypeError, "num_samples: got .*wanted an integer", num_samples=value)),
    *(case for value in (NAN, INF, -INF) for case in each((sampled, elbo), ValueError, "beta: got .*finite", beta=value)),
    *(case for value in (NAN, INF) for name in ("prior_mu", "prior_logvar") for case in
      each((sampled, elbo, kl), ValueError, f"{name}: got .*wanted a finite number", **{name: value})),
    *each((sampled, elbo), TypeError, "beta: got None", beta=None),
    *each(WITH_LABELS, TypeError, "ignore_index: got 1.5", ignore_index=1.5),
    *(case for value in (2**64, -(2**63) - 1) for case in
      each(SAMPLING, ValueError, "seed: got .*wanted a 64-bit number", seed=value)),
    *each(SAMPLING, TypeError, "seed: got 1.5", seed=1.5),
    *each(SAMPLING, ValueError, "seed: got a int32 tensor.*wanted a 0-d int64 tensor on cpu", seed=torch.tensor(1, dtype=torch.int32)),
    *each(SAMPLING, ValueError, r"seed: got a int64 tensor of shape \[1\]", seed=torch.tensor([1])),
    # masks and maps
    *each((soft,), TypeError, "ignore_mask: got a int64 tensor.*wanted a bool tensor", ignore_mask=Y),
    *each((soft,), ValueError, r"ignore_mask: .*\[2, 4\].*wanted shape \[2, 4, 5\]", ignore_mask=torch.ones(2, 4).bool()),
    *each((ace,), ValueError, "binning: got 'medium'.*wanted 'hard' or 'soft'", binning="medium"),
    *each((ace,), ValueError, "n_bins: got 0, wanted at least 1", n_bins=0),
    *each((ace,), ValueError, "n_bins: got 65537, wanted at most 65536", n_bins=65537),
    *each((ace,), TypeError, "n_bins: got 1.5", n_bins=1.5),
    *each((ace,), ValueError, "include_background: got False for one class.*wanted 2 or more", input=X[:, :1], include_background=False),
    *each((ace,), TypeError, "include_background: got 1", include_background=1),
    *each((ace,), TypeError, "ignore_empty_classes: got None", ignore_empty_classes=None),
    *(case for value in (-0.1, NAN) for case in each((ace,), ValueError, "empty_weight: got .*of at least 0", empty_weight=value)),
    *each((accumulate,), ValueError, "logit_maps: got none, wanted at least one", logit_maps=[]),
    *each((accumulate,), ValueError, r"logit_maps\[1\]: .*\[2, 3, 4\].*wanted \[2, 3, 4, 5\]", logit_maps=[X, X[..., 0]]),
    *each((accumulate,), TypeError, r"logit_maps\[0\]: got 3", logit_maps=[3]),
    # devices
    *each((vls, sampled, soft), ValueError, "on meta.*backend='cpu'|backend='cpu': got a tensor on meta", input=X.to("meta"),
          target=Y.to("meta"), mu=MU.to("meta"), logvar=LOGVAR.to("meta"), soft_target=X.to("meta"), backend="cpu"),
    *each(WITH_LABELS, ValueError, "target: .*on meta, wanted it on cpu", target=Y.to("meta")),
    *each((sampled,), ValueError, "mu: .*on meta, wanted it on cpu, where input is", mu=MU.to("meta")),
    *each((elbo, kl, sample), ValueError, "logvar: .*on meta, wanted it on cpu", logvar=LOGVAR.to("meta")),
    *each((vls, sampled, soft, elbo, ace), ValueError, "weight: .*on meta, wanted it on cpu", weight=torch.ones(3, device="meta")),
    *each(SAMPLING, ValueError, "seed: got a int64 tensor.*on meta", seed=torch.zeros((), dtype=torch.int64, device="meta")),
]  # fmt: skip


def accepted(function, arguments):
    """Only what the function takes (the table gives a case to several functions)."""
    takes_anything = {"input", "target", "mu", "logvar", "soft_target"} & set(arguments)
    if function in (vls, soft) and len(takes_anything) > 2:
        drop = {"mu", "logvar"} | ({"soft_target"} if function is vls else {"target"})
        return {k: v for k, v in arguments.items() if k not in drop}
    if function is sampled:
        return {k: v for k, v in arguments.items() if k != "soft_target"}
    return arguments


@pytest.mark.parametrize(("function", "arguments", "error", "match"), CASES)
def test_the_error_names_the_argument(function, arguments, error, match):
    with pytest.raises(error, match=match):
        function(**accepted(function, arguments))


def test_place_of_a_bad_label_at_every_rank(backend):
    for x, target, place in (
        (scores(3), torch.tensor(5), r"target\[\]"),
        (scores(4, 3), torch.tensor([0, 1, -1, 2]), r"target\[2\]"),
        (scores(1, 3, 70000), torch.zeros(1, 70000, dtype=torch.uint8).index_fill(1, torch.tensor([69999]), 3),
         r"target\[0, 69999\]"),
        (scores(2, 3, 4, 5), torch.full((2, 1, 4, 5), 1.25), r"target\[0, 0, 0, 0\] is 1.25"),
        (scores(2, 3, 2), torch.tensor([[[0, 1]], [[2, -5]]]), r"target\[1, 0, 1\] is -5"),
        (scores(2, 3, 4, 5), torch.where(torch.arange(40).view(2, 5, 4) == 39, 9, 0).transpose(1, 2), r"target\[1, 3, 4\]"),
    ):  # fmt: skip
        with pytest.raises(IndexError, match=place):
            calseg.vls_cross_entropy(x, target, backend=backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_what_is_not_an_error(backend, dtype):
    """Numbers of Python's or NumPy's kinds, hyper-parameters at the ends of their ranges, integers for floats."""
    x, mu = X.to(dtype), MU.to(dtype)
    for options in (
        {"alpha": 0, "label_smoothing": 1, "beta": 0},
        {"alpha": 1, "temperature": 1, "num_samples": 1, "beta": 2, "prior_mu": 1, "prior_logvar": 0},
        {"alpha": True + 0.0, "temperature": 1e-3, "seed": 2**64 - 1},
        {"temperature": 1e6, "seed": -(2**63)},
    ):
        loss = calseg.vls_cross_entropy(x, Y, mu=mu, logvar=mu, backend=backend, **options)
        assert bool(loss.isfinite())


# ---- strange values, in the place of any argument ----


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no text")


STRANGE = {
    "list of tensors": [torch.ones(30, 30)] * 50,
    "long text": "x" * 100_000,
    "large dict": {k: torch.ones(50) for k in range(200)},
    "no repr": Unprintable(),
    "many axes": torch.ones(*[1] * 60),
    "function": len,
    "complex": 1 + 2j,
    "huge integer": 10**400,
}
CALLED = (vls, sampled, soft, elbo, kl, sample, accumulate, ace)


def parameters_of(call):
    public = {
        vls: calseg.vls_cross_entropy, sampled: calseg.vls_cross_entropy, soft: calseg.soft_cross_entropy,
        elbo: calseg.vls_elbo, kl: calseg.gaussian_kl, sample: calseg.sample_soft_labels,
        accumulate: calseg.accumulate_soft_labels, ace: calseg.ace_loss,
    }  # fmt: skip
    return list(inspect.signature(public[call]).parameters)


@pytest.mark.filterwarnings("ignore:.*size_average and reduce args will be deprecated")
@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("call", CALLED, ids=lambda call: call.__name__)
def test_a_message_is_short_whatever_the_value(call, strange):
    """A strange value in the place of any argument is an error that names the argument, in one short line."""
    refused = 0
    for name in parameters_of(call):
        if name in ("size_average", "reduce", "reuse_logits"):  # taken as true or false, as PyTorch takes them
            continue
        try:
            call(**{name: strange})
        except (TypeError, ValueError, IndexError) as error:
            message = str(error)
            refused += 1
            assert len(message) < 500, name
            assert re.match(r"\w+(\[\d+\])?: got [^\n]*$", message), (name, message)
    assert refused >= 2
