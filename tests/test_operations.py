"""The properties that every operation has, run over the table of ``operations.py``."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    FLOATS,
    LABELS,
    LAYOUTS,
    SHAPES,
    SIZES,
    Result,
    assert_accurate,
    class_weights,
    evaluate,
    id_of,
    labels,
    scores,
    upstream_of,
    voxels_of,
)
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from internals import needs_native
from operations import (
    DIFFERENTIABLE,
    OPERATIONS,
    REDUCED,
    Operation,
    assert_result,
    assert_right,
    run,
    truth,
)
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import calseg

every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
every_differentiable = pytest.mark.parametrize("operation", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
every_reduction = pytest.mark.parametrize(("operation", "reduction"), REDUCED.values(), ids=REDUCED)
SHAPE = (2, 3, 4, 5)


def those(condition: Callable[[Operation], object]) -> pytest.MarkDecorator:
    """Parametrise a test by the operations that ``which`` selects."""
    chosen = {name: operation for name, operation in OPERATIONS.items() if condition(operation)}
    return pytest.mark.parametrize("operation", chosen.values(), ids=chosen)


with_labels = those(lambda operation: operation.labels)
with_ignore_index = those(lambda operation: operation.has_ignore_index)


def bound(operation: Operation, backend: str | None, shape=SHAPE, dtype=torch.float64, **options: Any):
    """The operation as a function of its tensors by name, with its typical options where no other is given."""
    options = {**operation.typical, **options}
    return operation.bind(backend, operation.arguments(shape, dtype, **options))


def oracle_of(operation: Operation, shape=SHAPE, **options: Any):
    return operation.bind_oracle(operation.arguments(shape, **{**operation.typical, **options}))


def reducing(operation: Operation, reduction: str) -> dict[str, str]:
    return {"reduction": reduction} if len(operation.reductions) > 1 else {}


def same(got, wanted, what: object = "") -> None:
    """Check that two tensors have the same bits."""
    assert got.value.dtype == wanted.value.dtype
    assert torch.equal(got.value, wanted.value), what
    for name, gradient in wanted.gradients.items():
        assert torch.equal(got.gradients[name], gradient), (what, name)


def weighted_sum(value: Tensor) -> Tensor:
    """A scalar whose gradient differs from voxel to voxel (a plain sum over classes of soft labels is constant)."""
    return (value * (torch.arange(value.numel()) % 7 - 2.5).view(value.shape)).sum()


def leaves_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def by_position(function: Callable[..., Tensor], names: Mapping[str, Any]) -> Callable[..., Tensor]:
    return lambda *values: function(**dict(zip(names, values, strict=True)))


# ---- values and gradients ----


@pytest.mark.parametrize(
    ("operation", "C"),
    [pytest.param(o, C, id=f"{o.name}-{C}") for o in OPERATIONS.values() for C in o.classes],
)
def test_every_option(backend, operation, C):
    shape = (2, C, 6, 7)
    for dtype, options, ignore_index, reduction in product(
        (torch.float32, torch.float64), operation.options, operation.ignored_values, operation.reductions
    ):
        if dtype not in operation.dtypes_of_values or (C == 1 and ignore_index == 0):
            continue  # with one class that is ignored, no voxel counts
        assert_right(
            operation, backend, shape, dtype, ignore_index=ignore_index, **reducing(operation, reduction), **options
        )


@every_operation
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_dtype(backend, operation, shape):
    """Compare every shape and dtype with the oracle.

    The index over [N, *S] selects the noise of a voxel at every rank.
    """
    options_of_shapes = operation.options[: {"items": 2}.get(operation.result, 1 if operation.noise else None)]
    for C, dtype, reduction in product(operation.classes_of_shapes, operation.dtypes_of_values, operation.reductions):
        wide = dtype in (torch.float32, torch.float64)
        for options, ignore_index in product(
            options_of_shapes if wide else options_of_shapes[:3],
            operation.ignored_values if wide and operation.result == "loss" and not operation.noise else (-100,),
        ):
            assert_right(
                operation, backend, SHAPES[shape](C), dtype, ignore_index=ignore_index,
                **reducing(operation, reduction), **options,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "C"),
    [pytest.param(o, C, id=f"{o.name}-{C}") for o in OPERATIONS.values() if o.sizes for C in o.sizes.longest],
)
def test_every_size(cpu, operation, C):
    """Compare sizes around those of vectors, tiles and chunks.

    If voxels are independent, one call of the oracle suffices.
    """
    longest, tolerance = operation.sizes.longest[C], operation.sizes.tolerance(C)
    for options in operation.sizes.options:
        shape = (1, C, longest)
        tensors, arguments = operation.inputs(shape), operation.arguments(shape, **options)
        if operation.per_voxel:
            whole = run(operation, operation.bind_oracle(arguments), tensors)
            upstream = upstream_of(whole.value)
        for size in (s for s in SIZES if s <= longest):
            for dtype in (torch.float32, *((torch.float64,) if operation.sizes.float64 and size <= 70 else ())):
                part = {name: t[..., :size].to(dtype).contiguous() for name, t in tensors.items()}
                given = dict(arguments)
                if operation.labels:
                    given[operation.labels] = arguments[operation.labels][..., :size].contiguous()
                what = f"S={size} {dtype} {options}"
                if not operation.per_voxel:
                    wide = {name: t.double() for name, t in part.items()}
                    wanted = run(operation, operation.bind_oracle(given), wide)
                    assert_result(operation, run(operation, operation.bind(cpu, given), part), wanted, tolerance, what)
                    continue
                leaves = leaves_of(part)
                value = operation.bind(cpu, given)(**leaves)
                gradients = torch.autograd.grad(value, list(leaves.values()), upstream[..., :size].to(dtype))
                wanted = Result(whole.value[..., :size], {k: g[..., :size] for k, g in whole.gradients.items()})
                got = Result(value, dict(zip(leaves, gradients, strict=True)))
                assert_result(operation, got, wanted, tolerance, what)


@those(lambda operation: operation.per_voxel)  # elsewhere one confidence that rounds over an edge changes the result
@settings(max_examples=15)
@given(data=st.data())
def test_any_arguments(backend, operation, data):
    draw = data.draw
    C = draw(st.integers(min(operation.classes), 20), label="C")
    space = draw(st.lists(st.integers(1, 9), max_size=3), label="space")
    shape = (draw(st.integers(1, 4), label="N"), C, *space)
    dtype = draw(st.sampled_from(FLOATS), label="dtype")
    options = dict(draw(st.sampled_from(operation.options), label="options"))
    choices = {
        "label_smoothing": (0.0, 0.05, 1.0), "alpha": (0.0, 0.1, 1.0), "temperature": (0.5, 1.0, 3.0),
        "beta": (0.0, 0.01, 1.0), "num_samples": range(1, 10), "prior_logvar": (0.0, -1.0),
    }  # fmt: skip
    for name in sorted(choices.keys() & set().union(*operation.options)):
        options[name] = draw(st.sampled_from(choices[name]), label=name)
    if operation.noise:
        options["seed"] = draw(st.integers(-(2**63), 2**64 - 1), label="seed")
    options |= reducing(operation, draw(st.sampled_from(operation.reductions), label="reduction"))
    target = operation.target(shape)
    ignore_index = draw(st.sampled_from((-100, 0, C - 1, 99)), label="ignore_index")
    if operation.has_ignore_index:
        target = labels(shape, dtype=draw(st.sampled_from(LABELS), label="labels"))
        ignore_index = -100 if bool((target.long() == ignore_index).all()) else ignore_index
    layout = draw(st.sampled_from(list(LAYOUTS)), label="layout")
    tensors = operation.inputs(shape, dtype)
    if operation.labels:
        options[operation.labels] = target
    arguments = operation.arguments(shape, dtype, ignore_index=ignore_index, **options)
    strided = {name: LAYOUTS[layout](t) if t.dim() > 2 else t for name, t in tensors.items()}
    got = run(operation, operation.bind(backend, arguments), strided)
    wanted = run(operation, operation.bind_oracle(arguments), {name: t.double() for name, t in tensors.items()})
    counted = math.prod(voxels_of(shape))
    if operation.labels:
        counted -= int((target.long() == (ignore_index if operation.has_ignore_index else 1)).sum())
    # Weights are 1/4 or more, so the mean's divisor is at least that of the voxels.
    mean = options.get("reduction") == "mean" and operation.result == "loss"
    tolerance = operation.tolerance
    tolerance = tolerance._replace(
        ulps=max(tolerance.ulps, 16), scale=32.0 if operation.result == "loss" else tolerance.scale,
        grad_scale=max(tolerance.grad_scale, 16.0 / (max(1.0, counted / 4) if mean else 1.0)),
    )  # fmt: skip
    assert_result(operation, got, wanted, tolerance)


@those(lambda operation: operation.result in ("loss", "items"))
@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_autocast(backend, operation, dtype):
    """A loss of low precision is float32 under autocast, as F.cross_entropy's is; gradients keep their dtype."""
    tensors, arguments = operation.inputs(SHAPE, dtype), operation.arguments(SHAPE, dtype, reduction="mean")
    with torch.autocast("cpu", torch.bfloat16):
        stock = torch.nn.functional.cross_entropy(scores(2, 3, dtype=dtype), torch.tensor([0, 1]))
        got = evaluate(operation.bind(backend, arguments), tensors)
    assert got.value.dtype == stock.dtype
    assert all(gradient.dtype == dtype for gradient in got.gradients.values())
    assert_result(operation, got, truth(operation, SHAPE, dtype, frozenset({("reduction", "mean")})))


@those(lambda operation: operation.result == "loss")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=id_of)
@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_of_an_absent_gpu(operation, dtype, enabled):
    """On a GPU, the dtype of a loss is that of F.cross_entropy too, with autocast or without. No GPU is needed."""
    pytest.importorskip("triton")  # the reference reads values, which such tensors do not have

    def on_gpu(value):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value

    arguments = operation.arguments(SHAPE, dtype, **{**operation.typical, "reduction": "mean"})
    tensors, rows, classes = operation.inputs(SHAPE, dtype), scores(2, 3, dtype=dtype), torch.tensor([0, 1])
    with FakeTensorMode(), torch.no_grad():
        given, tensors = ({k: on_gpu(v) for k, v in each.items()} for each in (arguments, tensors))
        torch.set_autocast_enabled("cuda", enabled)
        try:
            stock = torch.nn.functional.cross_entropy(on_gpu(rows), on_gpu(classes))
            got = operation.bind(None, given)(**tensors)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert got.device.type == "cuda"
    assert got.dtype == stock.dtype
    assert stock.dtype == (torch.float32 if enabled else dtype)


def test_steps_of_a_gradient_scaler(backend):
    """Three steps under autocast and GradScaler move a net as F.cross_entropy moves it, and no step is skipped."""
    x, target = scores(2, 5, 12, 12, dtype=torch.float32), labels((2, 4, 12, 12), ignore_index=-100)
    ends = []
    for loss_of in (functools.partial(calseg.vls_cross_entropy, backend=backend), torch.nn.functional.cross_entropy):
        net = torch.nn.Conv2d(5, 4, 1)
        torch.nn.init.constant_(net.weight, 0.1), torch.nn.init.zeros_(net.bias)
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.5), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(net(x), target)
            assert loss.dtype == torch.float32
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**10
        ends.append([p.detach() for p in net.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


# Sampled labels of 16 bits wait rounded, so that a probability near one may lie on its other side.
@those(lambda operation: operation.result in ("loss", "total") and operation.name != "dice_of_samples")
def test_float16_under_loss_scaling(backend, operation):
    """A gradient scaler keeps small gradients of float16 from vanishing, as it does for F.cross_entropy."""
    shape, scale = (1, 4, 32, 32, 16), 2.0**16
    tensors = operation.inputs(shape, torch.float16)
    tensors = {name: 2 * t if t.amin() < 0 else t for name, t in tensors.items()}  # soft labels stay what they are
    reduction = {"reduction": "mean"} if operation.result == "loss" else {}
    arguments = operation.arguments(shape, torch.float16, **reduction)
    leaves = leaves_of(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        loss = operation.bind(backend, arguments)(**leaves)
    (scale * loss).backward()
    oracle = operation.bind_oracle(arguments)
    wanted = evaluate(lambda **t: scale * oracle(**t), {name: t.double() for name, t in tensors.items()}).gradients
    for name, leaf in leaves.items():
        got, exact = leaf.grad.double(), wanted[name]
        rest = scale / (32 * 32 * 16) * 2.0**-21 + 2.0**-24  # p - 1 is rounded in float32, and the result in float16
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=rest, msg=lambda text, name=name: f"{name}: {text}")


@those(lambda operation: operation.differentiable and len(operation.tensors) > 1)
def test_mixed_dtypes(backend, operation):
    """Tensors and weights of different dtypes (the usual mixed-precision net): each gradient in its own dtype."""
    shape, names = (2, 3, 100), list(operation.tensors)
    weight = {"weight": class_weights(3, torch.float16)} if operation.takes_weight else {}
    low = operation.inputs(shape, torch.bfloat16)
    tensors = {**operation.inputs(shape, torch.float32), names[0]: low[names[0]]}
    for options, reduction in product(operation.options, operation.reductions):
        given = {**options, **reducing(operation, reduction)}
        arguments = operation.arguments(shape, **{**given, "weighted": False}) | weight
        got = run(operation, operation.bind(backend, arguments), tensors)
        assert all(got.gradients[name].dtype == t.dtype for name, t in tensors.items())
        wide = {name: t.double() for name, t in tensors.items()}
        assert_result(operation, got, run(operation, operation.bind_oracle(arguments), wide), what=str(given))


# ---- ignored voxels and NaN ----


@with_labels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nothing_of_an_ignored_voxel_counts(backend, operation, bad):
    shape = (2, 4, 7, 9)
    tensors, target = operation.inputs(shape, torch.float32), operation.target(shape)
    ignored = target if operation.labels == "ignore_mask" else target == -100
    hole = ignored[:, None].expand(shape)
    soiled = {name: t.masked_fill(hole, bad) for name, t in tensors.items()}
    for options, reduction in product(operation.options, operation.reductions):
        function = bound(operation, backend, shape, torch.float32, **options, **reducing(operation, reduction))
        clean, got = run(operation, function, tensors), run(operation, function, soiled)
        same(got, clean, (options, reduction))
        for name, gradient in got.gradients.items():
            assert torch.count_nonzero(gradient[hole]) == 0, (options, reduction, name)
        if operation.per_voxel and reduction == "none":
            assert torch.count_nonzero(got.value[hole if operation.result == "map" else ignored]) == 0


@with_labels
def test_all_ignored(backend, operation):
    """If all voxels are ignored, the mean of a loss is NaN, and everything else, gradients included, is 0."""
    shape = (2, 3, 5)
    target = torch.ones(2, 5, dtype=torch.bool) if operation.labels == "ignore_mask" else torch.full((2, 5), 7)
    for dtype, options, reduction in product((torch.float32, torch.float64), operation.options, operation.reductions):
        given = {**options, **reducing(operation, reduction), operation.labels: target}
        function = bound(operation, backend, shape, dtype, ignore_index=7, **given)
        tensors = {name: torch.full_like(t, torch.nan) for name, t in operation.inputs(shape, dtype).items()}
        got = run(operation, function, tensors)
        assert bool(got.value.isnan().all()) == (reduction == "mean" and operation.result == "loss"), given
        assert torch.count_nonzero(got.value.nan_to_num()) == 0, given
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in got.gradients.values()), given


@every_operation
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3), (0, 3, 0, 2)], ids=str)
def test_empty(backend, operation, shape):
    for options, reduction in product(operation.options, operation.reductions):
        given = {**options, **reducing(operation, reduction)}
        arguments = operation.arguments(shape, ignore_index=-100, **given)
        tensors = operation.inputs(shape)
        got = run(operation, operation.bind(backend, arguments), tensors)
        wanted = operation.bind_oracle(arguments)(**tensors)
        torch.testing.assert_close(got.value, wanted, equal_nan=True, rtol=0, atol=0)
        assert all(gradient.shape == shape for gradient in got.gradients.values())


@those(lambda operation: operation.per_voxel)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_reaches_the_result(backend, operation, bad):
    """A NaN reaches the result of its voxel, and of no other one."""
    shape = (1, 3, 40)
    for name in operation.tensors:
        tensors = operation.inputs(shape, torch.float32)
        options = {"alpha": 0.5} if any("alpha" in options for options in operation.options) else {}
        function = bound(operation, backend, shape, torch.float32, ignore_index=None, **options)
        if operation.labels == "ignore_mask":
            function = bound(operation, backend, shape, ignore_mask=torch.zeros(1, 40, dtype=torch.bool))
        clean = function(**tensors)
        tensors[name][0, 1, 17] = bad
        value = function(**tensors)
        at_voxel = value[..., 17]
        assert not at_voxel.isfinite().any(), name
        others = torch.arange(40) != 17
        assert torch.equal(value[..., others], clean[..., others]), name
        if operation.result == "loss":
            assert not functools.partial(function, reduction="mean")(**tensors).isfinite(), name


# ---- memory layouts ----


@every_operation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, operation, layout):
    """Every tensor in its own layout, and all in one: bit for bit the numbers of contiguous tensors.

    Gradients have the strides that ``empty_like`` gives.
    """
    names = list(operation.tensors)
    # Bins are tested in every dtype by test_calibration.py.
    dtypes = FLOATS if operation.differentiable and len(names) == 1 else (torch.float32,)
    for shape, dtype in product(((2, 5, 6, 7), (2, 5, 6, 7, 4)), dtypes):
        tensors = operation.inputs(shape, dtype)
        functions = [operation.bind(backend, operation.arguments(shape, dtype, **o)) for o in operation.variants]
        plain = [(function, run(operation, function, tensors)) for function in functions]
        for (function, wanted), chosen in product(plain, {(name,) for name in names} | {tuple(names)}):
            strided = {name: LAYOUTS[layout](t) if name in chosen else t for name, t in tensors.items()}
            got = run(operation, function, strided)
            if backend == "reference":  # PyTorch adds over classes in an order of its own for every layout
                torch.testing.assert_close(got, wanted, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
            else:
                same(got, wanted, (shape, dtype, chosen))
            for name in chosen if backend == "cpu" and operation.differentiable else ():
                # The kernels walk the spatial axes with one stride, so a gradient is not transposed in space.
                like = tensors[name] if layout == "transposed_space" else torch.empty_like(strided[name])
                assert got.gradients[name].stride() == like.stride(), (shape, dtype, name)


LABEL_FORMS = {
    "[N, 1, *S]": lambda y: y[:, None],
    "strided": lambda y: y.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda y: y.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2),
    "sliced": lambda y: torch.cat([y, y], -1)[..., : y.shape[-1]],
    "negative bit": lambda y: torch._neg_view(-y),
}


@with_labels
@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
def test_label_types_and_forms(backend, operation, dtype):
    """Labels may have any type that holds whole numbers, any strides, and a singleton axis."""
    C, ignore_index = 117, 100 if dtype == torch.int8 else 200
    shape = (2, C, 9, 11)
    tensors, wide = operation.inputs(shape, torch.float32), operation.target(shape, ignore_index)
    if operation.labels == "ignore_mask":
        if dtype != LABELS[0]:
            pytest.skip("a mask has one type")
        dtype = torch.bool

    def result(target):
        options = {operation.labels: target, "ignore_index": ignore_index}
        return run(operation, bound(operation, backend, shape, torch.float32, **options), tensors)

    wanted = result(wide)
    same(result(wide.to(dtype)), wanted)
    for form, change in LABEL_FORMS.items():
        if form == "negative bit" and dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool):
            continue  # PyTorch negates none of these
        given = change(wide).to(dtype) if form == "[N, 1, *S]" else _in_form(wide, dtype, change)
        assert torch.equal(given.reshape(wide.shape).long(), wide.long())
        same(result(given), wanted, form)
    same(result(wide[:1].to(dtype).expand(2, -1, -1)), result(wide[:1].repeat(2, 1, 1)), "expanded")


def _in_form(wide, dtype, change):
    """Apply ``change`` to labels of any type, some of which PyTorch does not support."""
    template = change(wide)
    made = torch.empty_strided(template.shape, template.stride(), dtype=dtype).copy_(wide)
    return torch._neg_view(made.neg_()) if template.is_neg() else made


@with_ignore_index
@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [(torch.uint8, 156, -100), (torch.uint8, 255, -1), (torch.int8, 3, 259), (torch.uint16, 65436, -100),
     (torch.int64, 1, 1 + 2**32)],
    ids=str,
)  # fmt: skip
def test_ignore_index_is_compared_as_a_number(backend, operation, dtype, label, ignore_index):
    """ignore_index is not converted to the type of the labels, where -100 in uint8 would be 156.

    No voxel is ignored here.
    """
    if operation.result == "items" and label > 1000:
        pytest.skip("slow: bins for every class")
    shape = (1, label + 1, 3)
    tensors, target = operation.inputs(shape, torch.float32), torch.full((1, 3), label)
    function = lambda y, number: bound(  # noqa: E731
        operation, backend, shape, torch.float32, target=y, ignore_index=number
    )
    got = function(target.to(dtype), ignore_index)(**tensors)
    assert torch.equal(got, function(target, -1 - 2**40)(**tensors))
    if operation.result == "loss":
        assert bool((got != 0).all())


@those(lambda operation: operation.takes_weight)
def test_negative_bit_of_weights(backend, operation):
    """Weights may have the negative bit, so that memory holds their negatives."""
    tensors, weight = operation.inputs(SHAPE), class_weights(3)
    wanted = run(operation, bound(operation, backend, weight=weight), tensors)
    same(run(operation, bound(operation, backend, weight=torch._neg_view(-weight)), tensors), wanted)
    assert not torch.equal(wanted.value, bound(operation, backend, weighted=False)(**tensors))


AXES = [(0,), (1,), (2,), (3,), (2, 3), (0, 2, 3), (0, 1, 2, 3)]


def assert_expanded_as_repeated(operation, backend):
    """Check expanded tensors, labels and upstream gradients, with stride 0 along each axis, against repeated ones."""
    tensors, target = operation.inputs(SHAPE), operation.target(SHAPE) if operation.labels else None
    thin = lambda t, axes: functools.reduce(lambda u, axis: u.narrow(axis, 0, 1), axes, t)  # noqa: E731
    for reduction in operation.reductions:
        function = bound(operation, backend, **reducing(operation, reduction))
        for name, axes in product(tensors, AXES):
            if 1 in axes and operation.defaults.get("from_logits") is False:
                continue  # no probabilities

            def expanding(form, name=name, function=function, **t):
                return function(**{**t, name: form(t[name].expand(SHAPE))})

            leaves = {**tensors, name: thin(tensors[name], axes)}
            got, wanted = (
                run(operation, functools.partial(expanding, form), leaves) for form in (lambda t: t, Tensor.contiguous)
            )
            assert torch.equal(got.value, wanted.value), (reduction, name, axes)
            for key, gradient in got.gradients.items():
                assert_accurate(gradient, wanted.gradients[key], ulps=8, scale=1.0, what=f"{name} {axes} {key}")
        for axes in ((0,), (1,), (2,), (1, 2), (0, 1, 2)) if target is not None else ():
            y = thin(target, axes).expand(target.shape)
            options = reducing(operation, reduction)
            got, wanted = (
                run(operation, bound(operation, backend, **{operation.labels: form}, **options), tensors)
                for form in (y, y.contiguous())
            )
            same(got, wanted, (reduction, axes))
    if operation.differentiable:
        leaves = leaves_of(tensors)
        value = bound(operation, backend)(**leaves)
        for axes in [axes for axes in AXES if max(axes) < value.dim()]:
            upstream = thin(upstream_of(value), axes).expand(value.shape)
            got, wanted = (
                torch.autograd.grad(value, list(leaves.values()), form, retain_graph=True)
                for form in (upstream, upstream.contiguous())
            )
            assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True)), axes


@every_operation
def test_expanded_axes(backend, operation):
    assert_expanded_as_repeated(operation, backend)


@every_operation
def test_expanded_axes_by_default(operation):
    assert_expanded_as_repeated(operation, None)


# ---- threads and memory ----


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=id_of)
def test_bit_for_bit_for_any_number_of_threads(cpu, operation, dtype, set_threads):
    shape = (2, 5, 31, 67)  # several chunks of work
    if dtype not in operation.dtypes_of_values and not operation.defaults.get("from_logits"):
        pytest.skip("rounded to bfloat16, they are no probabilities")
    tensors = operation.inputs(shape, dtype)
    for options, reduction in ((operation.typical, "mean"), ({}, "none")):
        given = {**options, **reducing(operation, reduction)}
        function = operation.bind(cpu, operation.arguments(shape, dtype, **given))
        set_threads(1)
        wanted = run(operation, function, tensors)
        for threads in (2, 3, 5, 16):
            set_threads(threads)
            same(run(operation, function, tensors), wanted, (given, threads))


@every_reduction
def test_every_gradient_is_made_in_poisoned_memory(cpu, operation, reduction, poisoned_memory):
    """All gradients are allocated in poisoned memory, and have no NaN."""
    got = evaluate(bound(operation, cpu, **reducing(operation, reduction)), operation.inputs(SHAPE))
    assert poisoned_memory.count(SHAPE) >= len(operation.tensors)
    assert all(bool(t.isfinite().all()) for t in (got.value, *got.gradients.values()))


@every_reduction
def test_no_gradient_buffers_without_gradients(cpu, operation, reduction, poisoned_memory):
    """Under no_grad, and for inputs without gradient, the engine allocates only the result."""
    function, tensors = bound(operation, cpu, **reducing(operation, reduction)), operation.inputs(SHAPE)
    with torch.no_grad():
        value = function(**leaves_of(tensors))
    assert not value.requires_grad
    function(**tensors)
    own = operation.result == "map" and operation.noise
    assert poisoned_memory.count(SHAPE) == (2 if own else 0)


# ---- autograd ----


@every_reduction
def test_gradcheck(backend, operation, reduction):
    for options in ({}, {"weighted": True}) if operation.takes_weight and reduction == "mean" else ({},):
        leaves = leaves_of(operation.inputs(SHAPE))
        fixed = {name: leaves.pop(name).detach() for name in operation.held_fixed}
        function = bound(operation, backend, **reducing(operation, reduction), **options)
        call = by_position(functools.partial(function, **fixed), leaves)
        assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


@every_reduction
def test_upstream_gradient(backend, operation, reduction):
    """Scale the upstream gradient, extend the graph, and run backward twice.

    Gradients are the same, and are added up.
    """
    function, tensors = bound(operation, backend, **reducing(operation, reduction)), operation.inputs(SHAPE)
    base = evaluate(lambda **t: weighted_sum(function(**t)), tensors)
    for factor in (1.0, -2.5, 0.0):
        leaves = leaves_of(tensors)
        loss = weighted_sum(function(**leaves)) * factor
        loss.backward(retain_graph=True)
        first = {name: t.grad.clone() for name, t in leaves.items()}
        loss.backward(retain_graph=True)
        loss.backward()
        for name, t in leaves.items():
            assert_accurate(first[name], factor * base.gradients[name], ulps=8, what=name)
            assert_accurate(t.grad, 3 * factor * base.gradients[name], ulps=32, what=name)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@every_reduction
def test_only_some_inputs_need_gradients(backend, operation, reduction):
    function, tensors = bound(operation, backend, **reducing(operation, reduction)), operation.inputs(SHAPE)
    base = evaluate(lambda **t: weighted_sum(function(**t)), tensors)
    for needing in product((False, True), repeat=len(tensors)):
        leaves = {k: t.detach().clone().requires_grad_(n) for (k, t), n in zip(tensors.items(), needing, strict=True)}
        value = weighted_sum(function(**leaves))
        assert value.requires_grad == any(needing)
        if any(needing):
            value.backward()
        for (name, t), need in zip(leaves.items(), needing, strict=True):
            assert (t.grad is not None) == need
            if need:
                assert_accurate(t.grad, base.gradients[name], ulps=2, what=name)


@every_reduction
def test_double_backward(operation, reduction):
    """The engine raises an error that names the reference. The reference has the right second derivative."""
    options, leaves = reducing(operation, reduction), leaves_of(operation.inputs(SHAPE))
    value = bound(operation, "cpu", **options)(**leaves)
    for gradient in torch.autograd.grad((value**2).sum(), list(leaves.values()), create_graph=True):
        with pytest.raises(RuntimeError, match=r"double backward.*backend='reference'"):
            (gradient**2).sum().backward(retain_graph=True)
    call = by_position(bound(operation, "reference", **options), leaves)
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()), fast_mode=True)


@every_reduction
def test_create_graph_gives_the_right_first_derivative(cpu, operation, reduction):
    options, tensors = reducing(operation, reduction), operation.inputs(SHAPE)
    leaves, function = leaves_of(tensors), bound(operation, cpu, **options)
    gradients = torch.autograd.grad(weighted_sum(function(**leaves)), list(leaves.values()), create_graph=True)
    oracle = oracle_of(operation, **options)
    wanted = evaluate(lambda **t: weighted_sum(oracle(**t)), tensors).gradients
    for gradient, name in zip(gradients, leaves, strict=True):
        assert_accurate(gradient, wanted[name], ulps=64, scale=0.1, what=name)


@those(lambda operation: operation.differentiable and operation.result != "total")
def test_strides_of_the_upstream_gradient(cpu, operation):
    """The upstream gradient may be transposed, strided, negative or expanded."""
    leaves = leaves_of(operation.inputs(SHAPE))
    value = bound(operation, cpu)(**leaves)
    upstream = scores(*value.shape, seed=3)
    ones = torch.ones((), dtype=value.dtype).expand(value.shape)
    for form, plain in (
        (upstream.transpose(-1, -2).contiguous().transpose(-1, -2), upstream),
        (upstream.movedim(0, -1).contiguous().movedim(-1, 0), upstream),
        (upstream.repeat_interleave(2, -1)[..., ::2], upstream),
        (torch._neg_view(-upstream), upstream),
        (ones, torch.ones_like(value)),
    ):
        got, wanted = (torch.autograd.grad(value, list(leaves.values()), g, retain_graph=True) for g in (form, plain))
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


# ---- torch.func, forward mode, fake tensors ----


@every_reduction
def test_function_transforms(operation, reduction):
    """torch.func.grad and vmap, which choose the reference, give the results of autograd and of a loop."""
    tensors, options = operation.inputs(SHAPE), reducing(operation, reduction)
    function = bound(operation, None, **options)
    call = by_position(lambda **t: weighted_sum(function(**t)), tensors)
    got = torch.func.grad(call, argnums=tuple(range(len(tensors))))(*tensors.values())
    wanted = evaluate(lambda **t: weighted_sum(bound(operation, "cpu", **options)(**t)), tensors).gradients
    for gradient, name in zip(got, tensors, strict=True):
        assert_accurate(gradient, wanted[name], ulps=64, scale=0.1, what=name)
    batch = [torch.stack([t, t.flip(0), 2 * t]) for t in tensors.values()]
    looped = torch.stack([call(*(t[i] for t in batch)) for i in range(3)])
    assert_accurate(torch.func.vmap(call)(*batch), looped, ulps=64)


@every_reduction
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmap(operation, reduction, axis):
    """vmap maps over an axis of scores and labels, of the scores alone, and of the gradient."""
    tensors, options = operation.inputs(SHAPE), reducing(operation, reduction)
    names = [*tensors, *([operation.labels] if operation.labels else [])]
    call = by_position(bound(operation, None, **options), names)
    batch = [torch.stack([t, t.flip(0), 2 * t]) for t in tensors.values()]
    if operation.labels:
        target = operation.target(SHAPE)
        batch.append(torch.stack([target, target.flip(0), target.flip(1)]))
    looped = torch.stack([call(*(t[i] for t in batch)) for i in range(3)])
    moved = [t.movedim(0, axis) for t in batch]
    assert_accurate(torch.func.vmap(call, in_dims=axis)(*moved), looped, ulps=64)
    if operation.labels:
        shared = [call(*(t[i] for t in batch[:-1]), target) for i in range(3)]
        in_dims = (*[axis] * len(tensors), None)
        got = torch.func.vmap(call, in_dims=in_dims)(*moved[:-1], target)
        assert_accurate(got, torch.stack(shared), ulps=64)
    gradient = torch.func.grad(lambda *values: weighted_sum(call(*values)), argnums=tuple(range(len(tensors))))
    for got, wanted in zip(
        torch.func.vmap(gradient, in_dims=axis)(*moved),
        zip(*(gradient(*(t[i] for t in batch)) for i in range(3)), strict=True), strict=True,
    ):  # fmt: skip
        assert_accurate(got, torch.stack(wanted), ulps=64, scale=0.1)


def directional(operation, reduction, tensors, tangents):
    """Value and directional derivative of the oracle, by differentiating twice backwards."""
    oracle = oracle_of(operation, **reducing(operation, reduction))
    call = by_position(oracle, tensors)
    return torch.autograd.functional.jvp(call, tuple(tensors.values()), tuple(tangents.values()))


def tangents_of(tensors):
    return {name: scores(*t.shape, seed=20 + k) for k, (name, t) in enumerate(tensors.items())}


@every_reduction
def test_forward_ad(operation, reduction):
    """Forward-mode differentiation works for all tensors at once and for each of them."""
    tensors = operation.inputs(SHAPE)
    function = bound(operation, None, **reducing(operation, reduction))
    for chosen in [list(tensors), *([name] for name in tensors)]:
        tangents = {k: t if k in chosen else torch.zeros_like(t) for k, t in tangents_of(tensors).items()}
        value, wanted = directional(operation, reduction, tensors, tangents)
        with forward_ad.dual_level():
            duals = {k: forward_ad.make_dual(t, tangents[k]) if k in chosen else t for k, t in tensors.items()}
            got = forward_ad.unpack_dual(function(**duals))
        assert got.tangent is not None, chosen
        assert_accurate(got.primal, value, ulps=64)
        assert_accurate(got.tangent, wanted, ulps=64, scale=1.0, what=str(chosen))


@every_reduction
def test_jvp(operation, reduction):
    """torch.func.jvp, and forward over reverse mode: the Hessian times a vector."""
    tensors = operation.inputs(SHAPE)
    tangents = tangents_of(tensors)
    call = by_position(bound(operation, None, **reducing(operation, reduction)), tensors)
    value, derivative = torch.func.jvp(call, tuple(tensors.values()), tuple(tangents.values()))
    wanted_value, wanted = directional(operation, reduction, tensors, tangents)
    assert_accurate(value, wanted_value, ulps=64)
    assert_accurate(derivative, wanted, ulps=64, scale=1.0)

    oracle = by_position(oracle_of(operation, **reducing(operation, reduction)), tensors)
    primals, vectors = tuple(tensors.values()), tuple(tangents.values())
    gradient = torch.func.grad(lambda *v: weighted_sum(call(*v)), argnums=tuple(range(len(primals))))
    products = torch.func.jvp(gradient, primals, vectors)[1]
    _, hvp = torch.autograd.functional.hvp(lambda *v: weighted_sum(oracle(*v)), primals, vectors)
    for got, exact in zip(products, hvp, strict=True):
        assert_accurate(got, exact, ulps=512, scale=1.0)


@every_differentiable
def test_jacobian(operation):
    """A Jacobian from one batched backward (``vectorize=True``) equals the one row by row."""
    tensors = {name: t[..., :2, :2] for name, t in operation.inputs(SHAPE).items()}
    shape = (2, 3, 2, 2)
    call = by_position(bound(operation, None, shape), tensors)
    got = torch.autograd.functional.jacobian(call, tuple(tensors.values()), vectorize=True)
    oracle = by_position(oracle_of(operation, shape), tensors)
    wanted = torch.autograd.functional.jacobian(oracle, tuple(tensors.values()))
    for ours, theirs in zip(got, wanted, strict=True):
        assert_accurate(ours, theirs, ulps=64, scale=0.1)


def _metadata(t: Tensor) -> tuple[object, ...]:
    return t.shape, t.dtype, t.stride(), t.requires_grad


@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed_space"])
@pytest.mark.parametrize("device", ["fake", "meta"])
def test_fake(operation, reduction, dtype, layout, device):
    """Tensors without memory: shape, dtype and strides of value and gradients are those of the real call."""
    options = reducing(operation, reduction)
    tensors = {name: LAYOUTS[layout](t) for name, t in operation.inputs(SHAPE, dtype).items()}
    arguments = operation.arguments(SHAPE, dtype, **{**operation.typical, **options})
    mode = FakeTensorMode() if device == "fake" else None
    convert = mode.from_tensor if mode else lambda t: t.to("meta")
    given = {k: convert(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}

    def outcome(tensors, arguments):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        value = operation.bind(None, arguments)(**leaves)
        return value, torch.autograd.grad(value, list(leaves.values()), torch.ones_like(value))

    real = outcome(tensors, arguments)
    with mode or contextlib.nullcontext():
        value, gradients = outcome({name: convert(t) for name, t in tensors.items()}, given)
        plain = operation.bind(None, given)(**{name: convert(t) for name, t in tensors.items()})
    for got, wanted in zip((value, *gradients), (real[0], *real[1]), strict=True):
        assert got.device.type == ("cpu" if mode else "meta")
        if operation.name.startswith("accumulate") and got is not value:
            # where PyTorch looks on, its own operations accumulate; the fake softmax of PyTorch 2.13 is contiguous
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        else:
            assert _metadata(got) == _metadata(wanted)
    assert (plain.shape, plain.dtype) == (real[0].shape, real[0].dtype)


@every_reduction
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracer", ["make_fx", "jit"])
def test_traced_graphs(operation, reduction, tracer):
    """A graph that PyTorch traced gives the loss of other tensors, and their gradients: nothing is a constant in it."""
    tensors = operation.inputs(SHAPE)
    call = by_position(bound(operation, None, **reducing(operation, reduction)), tensors)
    primals = tuple(tensors.values())
    others = tuple(scores(*t.shape, seed=30 + k).mul(0.5).requires_grad_() for k, t in enumerate(primals))
    if tracer == "jit":
        graph = torch.jit.trace(call, primals, check_trace=False)
        value, wanted = graph(*others), call(*others)
        for got, exact in zip(
            torch.autograd.grad(weighted_sum(value), others), torch.autograd.grad(weighted_sum(wanted), others),
            strict=True,
        ):  # fmt: skip
            assert_accurate(got, exact, ulps=64)
    else:

        def step(*values):
            leaves = [t.detach().requires_grad_() for t in values]
            value = call(*leaves)
            return value, *torch.autograd.grad(weighted_sum(value), leaves)

        results = make_fx(step)(*primals)(*others)
        for got, exact in zip(results, step(*others), strict=True):
            assert_accurate(got, exact, ulps=64)
        value, wanted = results[0], step(*others)[0]
    assert_accurate(value.detach(), wanted.detach(), ulps=64)


# ---- torch.compile ----


compiled = [
    needs_native,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.compile's own, on some Python versions
]


# A compiler takes a second for each: no sum, which is a mean with another divisor.
COMPILED = {
    name: (operation, reduction)
    for name, (operation, reduction) in REDUCED.items()
    if reduction == "none" or (reduction == "mean" and operation.result == "loss")
}
# One loss of each kind: they share an operator.
CHECKED = {
    name: case
    for name, case in COMPILED.items()
    if case[0].name in ("cross_entropy", "soft_cross_entropy", "vls_cross_entropy") or case[0].result != "loss"
}


def marked(test):
    return functools.reduce(lambda function, mark: mark(function), compiled, test)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@marked
@pytest.mark.parametrize(("operation", "reduction"), COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_as_eager(operation, reduction, layout):
    """A compiled call gives the results of eager mode, and its graph holds the operators of the engine."""
    tensors = {name: LAYOUTS[layout](t) for name, t in operation.inputs(SHAPE).items()}
    function = bound(operation, None, **reducing(operation, reduction))
    seen = []

    def look(graph, inputs):
        parts = (part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        seen.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    quick = torch.compile(function, fullgraph=True, backend=look)
    got, wanted = (evaluate(f, tensors) for f in (quick, function))
    assert any(target.startswith("calseg.") for target in seen), seen
    assert_accurate(got.value, wanted.value, ulps=2)
    for name, gradient in got.gradients.items():
        assert_accurate(gradient, wanted.gradients[name], ulps=4, what=name)


class _Recorder(torch.fx.Interpreter):
    """Interpreter of a graph that records the calls of the engine's operators."""

    def __init__(self, graph, calls):
        super().__init__(graph)
        self.calls = calls

    def call_function(self, target, args, kwargs):
        if str(target).startswith("calseg."):
            self.calls.append((target, args, kwargs))
        return super().call_function(target, args, kwargs)


@marked
@pytest.mark.parametrize(("operation", "reduction"), CHECKED.values(), ids=CHECKED)
@pytest.mark.usefixtures("fresh_compiler")
def test_opcheck(operation, reduction):
    """Run torch.library.opcheck on every operator in the graphs of forward and backward."""
    forward, backward = [], []

    def recording(calls):
        return lambda graph, _: make_boxed_func(_Recorder(graph, calls).run)

    def compiler(graph, inputs):
        return aot_autograd(fw_compiler=recording(forward), bw_compiler=recording(backward))(graph, inputs)

    function = bound(operation, None, **reducing(operation, reduction))
    evaluate(torch.compile(function, fullgraph=True, backend=compiler), operation.inputs(SHAPE))
    assert forward
    plain = lambda t: t.detach().clone()  # noqa: E731  # an autograd.Function calls them: they have no gradient formula
    for target, args, kwargs in (*forward, *backward):
        torch.library.opcheck(target, *pytree.tree_map_only(Tensor, plain, (args, kwargs)))


# ---- errors ----


@with_ignore_index
@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
def test_label_out_of_range(backend, operation, dtype):
    """IndexError with the value and its place, the first in row-major order; bad values at both ends of the type."""
    tensors, clean = operation.inputs(SHAPE, torch.float32), operation.target(SHAPE, None)
    if dtype.is_floating_point:
        bad = (3.0, 2.5, math.nan)
    else:
        bad = (3, min(torch.iinfo(dtype).max, 2**63 - 1), torch.iinfo(dtype).min or 4)
    for place, value in zip(((0, 0, 0), (1, 2, 3), (1, 3, 4)), bad, strict=True):
        target = clean.to(torch.float64 if dtype.is_floating_point else clean.dtype, copy=True)
        target[1, 3, 4] = 77
        target[place] = value
        function = bound(operation, backend, target=target.to(dtype))
        match = rf"target\[{', '.join(map(str, place))}\] is {value}: wanted a class in \[0, 3\) or ignore_index=-100"
        for scores_of in (tensors, leaves_of(tensors)):
            with pytest.raises(IndexError, match=match):
                function(**scores_of)
    target = clean.clone()
    target[0, 1, 2] = 77
    bound(operation, backend, target=target.to(dtype), ignore_index=77)(**tensors)


@with_ignore_index
def test_what_the_caller_holds_is_as_it_was_where_a_label_is_bad(backend, operation):
    """If a label is bad, no argument is written to, and there is no gradient."""
    target = operation.target(SHAPE, None)
    target[1, 3, 4] = 3
    given = target.clone()
    for reduction in operation.reductions:
        leaves = leaves_of(operation.inputs(SHAPE)) if operation.differentiable else operation.inputs(SHAPE)
        with pytest.raises(IndexError, match=r"target\[1, 3, 4\] is 3"):
            bound(operation, backend, target=target, **reducing(operation, reduction))(**leaves)
        assert torch.equal(target, given)
        for name, t in operation.inputs(SHAPE).items():
            assert torch.equal(leaves[name], t)
            assert leaves[name].grad is None
