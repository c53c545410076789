"""Tests of torch.compile(fullgraph=True) on whole programs. test_operations.py compiles every operation."""

from __future__ import annotations

import pytest
import torch
from cases import assert_accurate, labels, scores
from internals import TRITON_ERROR, needs_native
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import calseg

SHAPE = (2, 3, 4, 5)
TARGET = labels(SHAPE, ignore_index=-100)

pytestmark = [
    needs_native,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.compile's own, on some Python versions
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_transposed_layout():
    """A layout that kernels cannot write gives a contiguous result, as the fake kernels say."""
    tensors = [scores(*SHAPE, seed=k).transpose(2, 3).contiguous().transpose(2, 3) for k in range(3)]

    def call(x, mu, logvar):
        return calseg.vls_cross_entropy(x, TARGET, mu=mu, logvar=logvar, seed=1, reduction="none")

    def outcome(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        value = function(*leaves)
        return value, *torch.autograd.grad(value, leaves, scores(*value.shape, seed=4))

    for got, wanted in zip(
        outcome(torch.compile(call, fullgraph=True, backend="aot_eager")), outcome(call), strict=True
    ):
        assert_accurate(got, wanted.detach(), ulps=4)


@pytest.mark.parametrize("name", ["beta", "alpha", "temperature", "label_smoothing", "prior_mu", "prior_logvar"])
def test_a_number_that_changes(name):
    """A KL term that is warmed up, say, changes its weight from call to call: the graph takes it as an input."""
    x, mu, logvar = (scores(*SHAPE, seed=seed) for seed in range(3))

    def call(value):
        return calseg.vls_cross_entropy(x, TARGET, mu=mu, logvar=logvar, seed=1, **{name: value})

    quick = torch.compile(call, fullgraph=True, backend="aot_eager")
    for value in (0.125, 0.25, 0.75):
        assert_accurate(quick(value), call(value), ulps=2)


@pytest.mark.parametrize("operation", ["vls", "elbo", "sample"])
def test_seeds(operation):
    """seed=None draws the same seed as in eager mode, and a new one in every call. A seed may be a tensor."""
    mu, logvar, x = scores(*SHAPE, seed=1), scores(*SHAPE, seed=2), scores(*SHAPE)
    call = {
        "vls": lambda seed: calseg.vls_cross_entropy(x, TARGET, mu=mu, logvar=logvar, seed=seed, alpha=1.0),
        "elbo": lambda seed: calseg.vls_elbo(mu, logvar, TARGET, seed=seed),
        "sample": lambda seed: calseg.sample_soft_labels(mu, logvar, seed=seed),
    }[operation]
    quick = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in (3, -3, torch.tensor(12345)):
        assert_accurate(quick(seed), call(seed), ulps=2)
    torch.manual_seed(4)
    eager = [call(None) for _ in range(2)]
    torch.manual_seed(4)
    ours = [quick(None) for _ in range(2)]
    for a, b in zip(ours, eager, strict=True):
        assert_accurate(a, b, ulps=2)
    assert not torch.equal(ours[0], ours[1])


def test_dynamic_shapes():
    """One graph for sizes that change from step to step."""
    function = lambda x, y: calseg.vls_cross_entropy(x, y)  # noqa: E731
    quick = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (4, 7, 12):
        x, target = scores(2, 3, size, size), labels((2, 3, size, size))
        assert_accurate(quick(x, target), function(x, target), ulps=2)


def test_in_a_training_step_with_inductor():
    """A layer, the loss and its gradients in one compiled step, by the default compiler."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(2, 6, 3, padding=1).double()
    image, target = scores(2, 2, 8, 8), labels((2, 3, 8, 8))

    def step(image):
        x, mu = layer(image).chunk(2, 1)
        return calseg.vls_cross_entropy(x, target, mu=mu, logvar=torch.zeros_like(mu), seed=3)

    value = step(image)
    wanted = torch.autograd.grad(value, list(layer.parameters()))
    try:
        got = torch.compile(step, fullgraph=True)(image)
    except torch._inductor.exc.InductorError as error:  # no C++ compiler at hand
        pytest.skip(str(error).splitlines()[0])
    assert_accurate(got, value, ulps=16)
    for ours, truth in zip(torch.autograd.grad(got, list(layer.parameters())), wanted, strict=True):
        assert_accurate(ours, truth, ulps=64)


def test_errors_come_through():
    quick = torch.compile(lambda x, y: calseg.vls_cross_entropy(x, y), fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"target\[0, 1\] is 7"):
        quick(scores(1, 3, 4), torch.tensor([[0, 7, 1, 2]]))


def test_opcheck_of_the_drawn_seed():
    """The operator that a compiled call without a seed starts with."""
    targets = []

    def look(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if str(node.target).startswith("calseg.draw_seed"))
        return graph

    x = scores(*SHAPE)
    torch.compile(lambda: calseg.vls_elbo(x, x, TARGET), fullgraph=True, backend=look)()
    (target,) = targets
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(target, (torch.device("cpu"),), test_utils=checks)


@pytest.mark.parametrize("operation", ["vls", "elbo", "sample"])
def test_a_graph_of_a_gpu_draws_its_seed_there(operation):
    """No node of the traced pass is on the CPU, which a CUDA graph could not replay."""
    if TRITON_ERROR is not None:
        pytest.skip(TRITON_ERROR)
    call = {
        "vls": lambda x, mu, logvar, y: calseg.vls_cross_entropy(x, y, mu=mu, logvar=logvar, alpha=0.5),
        "elbo": lambda x, mu, logvar, y: calseg.vls_elbo(mu, logvar, y) + x.sum(),
        "sample": lambda x, mu, logvar, y: (x * calseg.sample_soft_labels(mu, logvar, y)).sum(),
    }[operation]
    with FakeTensorMode():
        x, mu, logvar = (torch.empty(SHAPE, device="cuda") for _ in range(3))
        target = torch.empty(2, 4, 5, dtype=torch.uint8, device="cuda")
        graph = make_fx(call)(x, mu, logvar, target)
    nodes = list(graph.graph.nodes)
    assert any("draw_seed" in str(node.target) for node in nodes)
    assert any(operator in str(node.target) for node in nodes for operator in ("calseg.loss", "calseg.sample"))
    for node in nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (list, tuple)) else [values]:
            assert not isinstance(value, torch.Tensor) or value.device.type == "cuda", node.format_node()
