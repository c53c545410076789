"""torch.compile(fullgraph=True): the numbers of eager mode for every operation, and what torch.library asks."""

from __future__ import annotations

import pytest
import torch
from cases import assert_accurate, labels, scores
from test_autograd import LOSSES, MAPS, SHAPE, TARGET

import calseg
from calseg import autograd, native
from calseg.operations import AceSpec, BlendSpec, GaussianTensors, Labels, LossSpec, LossTensors, SampleSpec, Sampling
from calseg.packing import pack

pytestmark = [
    pytest.mark.skipif(native.extension is None, reason="no native engine"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.compile's own, on some Python versions
]
CASES = {
    **{f"{name}-{r}": (lambda r=r, f=f, **t: f(None, r, **t), tensors)
       for name, (f, tensors) in LOSSES.items() for r in ("none", "mean")},
    **{name: (lambda f=f, **t: f(None, **t), tensors) for name, (f, tensors) in MAPS.items()},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function, tensors):
    """The value, and gradients of a function of it that differs per element."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    value = function(**leaves)
    (value * (torch.arange(value.numel()) % 7 - 2.5).view(value.shape)).sum().backward()
    return value.detach(), {name: t.grad for name, t in leaves.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_as_eager(name, channels_last):
    function, tensors = CASES[name]
    if channels_last:
        tensors = {k: t.to(memory_format=torch.channels_last) for k, t in tensors.items()}
    value, gradients = run(function, tensors)
    got, got_gradients = run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)
    assert_accurate(got, value, ulps=2)
    for key, gradient in gradients.items():
        assert_accurate(got_gradients[key], gradient, ulps=4, what=key)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_runs(name):
    """The graph holds the engine's operators, not the reference traced through."""
    function, tensors = CASES[name]
    seen = []

    def look(graph, _inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(function, fullgraph=True, backend=look)(**tensors)
    assert any(target.startswith("calseg.") for target in seen), seen


def test_a_transposed_layout():
    """What the kernels cannot write in place comes back contiguous, as the fake kernels promise."""
    function, tensors = CASES["vls-none"]
    tensors = {k: t.transpose(2, 3).contiguous().transpose(2, 3) for k, t in tensors.items()}
    value, gradients = run(function, tensors)
    got, got_gradients = run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)
    assert_accurate(got, value, ulps=2)
    for key, gradient in gradients.items():
        assert_accurate(got_gradients[key], gradient, ulps=4, what=key)


@pytest.mark.parametrize("operation", ["vls", "elbo", "sample"])
def test_seeds(operation):
    """seed=None draws in a compiled call what it draws in eager mode; a fresh one every call; tensors are taken."""
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


def _loss_arguments(reduction, *, mu=False, soft=False, hard=True):
    leaf = lambda seed: scores(*SHAPE, seed=seed)  # noqa: E731
    tensors = LossTensors(
        leaf(0), torch.softmax(leaf(3), 1) if soft else None, *((leaf(1), leaf(2)) if mu else (None, None))
    )
    sampling = Sampling(2, 1.0, 0.5, seed=torch.tensor(5)) if mu else Sampling()
    spec = LossSpec(
        "vls_cross_entropy" if mu else "cross_entropy", Labels(TARGET, -100) if hard else None, None, reduction,
        torch.float64, 0.1, 0.3, sampling,
    )  # fmt: skip
    needed = [reduction != "none" and t is not None for t in tensors]
    return "cpu", *pack(spec, tensors), needed, None


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", [{}, {"mu": True}, {"soft": True, "hard": False}], ids=["hard", "vls", "soft"])
def test_opcheck_of_the_loss(reduction, kind):
    torch.library.opcheck(autograd.loss_operator, _loss_arguments(reduction, **kind))


def test_opcheck_of_the_soft_labels():
    tensors = GaussianTensors(scores(*SHAPE, seed=1), scores(*SHAPE, seed=2))
    for target in (None, TARGET):
        labels = None if target is None else Labels(target, -100)
        packed = pack(SampleSpec(labels, 0.3, Sampling(2, seed=5)), tensors)
        torch.library.opcheck(autograd.sample_operator, ("cpu", *packed))
        torch.library.opcheck(autograd.blend_operator, ("cpu", *pack(BlendSpec(labels, 0.3, 2)), tensors.mu))
        upstream = scores(*SHAPE, seed=4)
        for needed in ([True, True], [False, True]):
            torch.library.opcheck(autograd.sample_backward_operator, ("cpu", *packed, upstream, needed))


@pytest.mark.parametrize("soft", [False, True])
def test_opcheck_of_the_moments(soft):
    x, packed = scores(*SHAPE), pack(AceSpec(Labels(TARGET, -100), 5, 1, soft))
    moments = autograd.ace_moments_operator("cpu", *packed, x)
    torch.library.opcheck(autograd.ace_moments_operator, ("cpu", *packed, x))
    torch.library.opcheck(autograd.ace_moments_backward_operator, ("cpu", *packed, x, moments))


def test_opcheck_of_the_seed():
    torch.library.opcheck(
        autograd.draw_seed_operator, (), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
