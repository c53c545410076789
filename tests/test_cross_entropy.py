"""Cross-entropy against hard and soft labels: a drop-in for F.cross_entropy in value and gradient."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CLASSES,
    FLOATS,
    LABELS,
    LAYOUTS,
    SHAPES,
    SIZES,
    assert_accurate,
    assert_matches,
    class_weights,
    evaluate,
    id_of,
    labels,
    scores,
    upstream_of,
    voxels_of,
)
from hypothesis import given
from hypothesis import strategies as st

import calseg

REDUCTIONS = ("none", "mean", "sum")


def _positional(loss, **tensors):
    return loss(*tensors.values())


def pair(target, backend, **options):
    """The loss of the backend, and F.cross_entropy, as functions of the logits."""
    wide = dict(options)
    if options.get("weight") is not None:
        wide["weight"] = options["weight"].double()
    long = target if target.is_floating_point() else target.long()
    return (
        lambda input: calseg.vls_cross_entropy(input, target, backend=backend, **options),
        lambda input: F.cross_entropy(input, long, **wide),
    )


# ---- hard labels ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_argument(backend, reduction, dtype, shape):
    C = 5
    shape = shape(C)
    x = scores(*shape, dtype=dtype)
    for weight, label_smoothing, ignore_index in product(
        (None, class_weights(C, dtype)), (0.0, 0.3, 1.0), (None, -100, 2, 255)
    ):
        target = labels(shape, ignore_index=ignore_index)
        if target.dim() == 0 and int(target) == ignore_index:
            target = torch.ones_like(target)
        options = {"ignore_index": -100 if ignore_index is None else ignore_index, "reduction": reduction}
        assert_matches(*pair(target, backend, weight=weight, label_smoothing=label_smoothing, **options), {"input": x})


@pytest.mark.parametrize("C", CLASSES)
@pytest.mark.parametrize("kind", ["plain", "weighted_smoothed", "soft"])
def test_every_size(cpu, C, kind):
    """All sizes around vectors and tiles: voxels are independent, so one oracle call serves all."""
    longest = max(SIZES) if C < 33 else 300
    shape = (1, C, longest)
    x, target, options = scores(*shape), labels(shape, ignore_index=-100), {"reduction": "none"}
    if kind == "weighted_smoothed":
        options |= {"weight": class_weights(C), "label_smoothing": 0.1}
    if kind == "soft":
        target = torch.softmax(scores(*shape, seed=4), 1)
    truth = evaluate(pair(target, None, **options)[1], {"input": x})
    upstream = upstream_of(truth.value)
    for size, dtype in product(SIZES, (torch.float32, torch.float64)):
        if size > longest or (dtype == torch.float64 and size > 70):
            continue
        part = x[..., :size].to(dtype).contiguous().requires_grad_()
        value = pair(target[..., :size].contiguous(), cpu, **options)[0](part)
        (gradient,) = torch.autograd.grad(value, part, upstream[..., :size].to(dtype))
        ulps = 8 + C / 4  # sums of C terms
        assert_accurate(value, truth.value[..., :size], ulps=ulps, scale=8.0, what=f"S={size}")
        assert_accurate(gradient, truth.gradients["input"][..., :size], ulps=ulps, scale=2.0, what=f"S={size} gradient")


@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
@pytest.mark.parametrize("form", ["[N, *S]", "[N, 1, *S]", "strided", "transposed", "expanded"])
def test_label_types_and_forms(backend, dtype, form):
    """Labels are taken as they are: every integer type up to its largest class, any strides, a singleton axis."""
    C, ignore_index = 117, 100 if dtype == torch.int8 else 200
    shape = (2, C, 9, 11)
    x, target = scores(*shape, dtype=torch.float32), labels(shape, ignore_index=ignore_index, dtype=dtype)
    given = target
    if form == "[N, 1, *S]":
        given = target[:, None]
    elif form == "strided":
        given = target.repeat_interleave(2, -1)[..., ::2]
    elif form == "transposed":
        given = target.long().transpose(1, 2).contiguous().to(dtype).transpose(1, 2)
    elif form == "expanded":
        target = given = target[:1].expand(2, -1, -1)
    _, oracle = pair(target, backend, ignore_index=ignore_index)
    assert_matches(
        lambda input: calseg.vls_cross_entropy(input, given, ignore_index=ignore_index, backend=backend),
        oracle, {"input": x},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [(torch.uint8, 156, -100), (torch.uint8, 255, -1), (torch.int8, 3, 259), (torch.uint16, 65436, -100)],
    ids=str,
)
def test_ignore_index_is_compared_as_a_number(backend, dtype, label, ignore_index):
    """Not as bits of the labels' type: -100 in uint8 would be 156."""
    C = label + 1
    x, target = scores(2, C, 3, dtype=torch.float32), torch.full((2, 3), label, dtype=torch.int64).to(dtype)
    assert_matches(*pair(target, backend, ignore_index=ignore_index), {"input": x})


EXTREMES = [
    [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -torch.inf], [-torch.inf, 0.0, 1.0], [0.0, -torch.inf, -torch.inf],
    [torch.inf, 0.0, 1.0], [torch.nan, 0.0, 1.0], [0.0, torch.nan, torch.inf], [-torch.inf] * 3, [0.0] * 3,
    [88.0, -88.0, 0.0], [-104.0, 0.0, -87.4], [6e4, -6e4, 1e-7],
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_extreme_logits(backend, dtype, weighted, kind):
    """Impossible classes, NaN and infinities mean what they mean to F.cross_entropy, in the loss and the gradient."""
    x = torch.tensor(EXTREMES, dtype=torch.float64).to(dtype).repeat(3, 1)
    target = torch.arange(3).repeat_interleave(len(EXTREMES))
    if kind == "soft":
        target = (0.2 * torch.ones(len(x), 3) + 0.4 * F.one_hot(target, 3)).to(dtype)
    weight = class_weights(3).to(dtype) if weighted else None
    assert_matches(*pair(target, backend, reduction="none", weight=weight), {"input": x}, grad_scale=2.0)
    finite = x.isfinite().all(1)
    assert_matches(*pair(target[finite], backend, weight=weight), {"input": x[finite]})


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nothing_of_an_ignored_voxel_counts(backend, label_smoothing, bad):
    shape = (2, 4, 7, 9)
    x, target = scores(*shape, dtype=torch.float32), labels(shape, ignore_index=-100)
    ignored = (target == -100)[:, None].expand(shape)
    clean = evaluate(pair(target, backend, label_smoothing=label_smoothing)[0], {"input": x})
    soiled = evaluate(pair(target, backend, label_smoothing=label_smoothing)[0], {"input": x.masked_fill(ignored, bad)})
    assert torch.equal(clean.value, soiled.value)
    assert torch.equal(clean.gradients["input"], soiled.gradients["input"])
    assert torch.count_nonzero(soiled.gradients["input"][ignored]) == 0
    per_voxel = calseg.vls_cross_entropy(x.masked_fill(ignored, bad), target, reduction="none", backend=backend)
    assert torch.count_nonzero(per_voxel[target == -100]) == 0


@pytest.mark.parametrize("C", [2, 5, 17])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("place", [1, 60_000, -2])
@pytest.mark.parametrize("reuse_logits", [False, True])
def test_one_ignored_voxel(C, reduction, place, reuse_logits):
    """The kernel is the first to meet it; in float64 a mean over one voxel too many shows."""
    shape = (2, C, 40, 40, 40)
    x, target = scores(*shape).requires_grad_(), labels(shape)
    target.view(-1)[place] = -100
    value = calseg.vls_cross_entropy(x * 1, target, reduction=reduction, reuse_logits=reuse_logits, backend="cpu")
    truth = F.cross_entropy(x, target, reduction=reduction)
    upstream = upstream_of(truth)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(value, x, upstream)
    (expected,) = torch.autograd.grad(truth, x, upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_the_first_bad_label_is_named(reduction, needs_gradient):
    """Also where it comes after an ignored voxel, and another thread may meet another bad label before."""
    shape = (2, 3, 50, 50, 50)
    x, target = scores(*shape, dtype=torch.float32).requires_grad_(needs_gradient), labels(shape)
    for place, label in ((60_001, -100), (160_001, 77), (240_001, 78)):
        target.view(-1)[place] = label
    with pytest.raises(IndexError, match=r"target\[1, 14, 0, 1\] is 77"):
        calseg.vls_cross_entropy(x, target, reduction=reduction, backend="cpu")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_ignored(backend, reduction, label_smoothing, weighted):
    weight = class_weights(3).float() if weighted else None
    function, oracle = pair(
        torch.full((2, 5), -100), backend, reduction=reduction, label_smoothing=label_smoothing, weight=weight
    )
    x = scores(2, 3, 5, dtype=torch.float32)
    got = evaluate(function, {"input": x})
    assert torch.equal(got.value.isnan(), oracle(x.double()).isnan())
    assert bool(got.value.isnan().all()) == (reduction == "mean")
    assert torch.count_nonzero(got.value.nan_to_num()) == 0
    assert torch.equal(got.gradients["input"], torch.zeros_like(x))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3), (0, 3, 0, 2)], ids=str)
def test_empty(backend, reduction, shape):
    assert_matches(*pair(labels(shape), backend, reduction=reduction), {"input": scores(*shape)})
    soft = torch.ones(shape, dtype=torch.float64)
    function = lambda input, soft: calseg.soft_cross_entropy(input, soft, reduction=reduction, backend=backend)  # noqa: E731
    oracle = lambda input, soft: F.cross_entropy(input, soft, reduction=reduction)  # noqa: E731
    if len(shape) == 3 and shape[0] == 0 and reduction == "mean":  # 0 / 0, where F.cross_entropy has 0 / 0 too
        assert oracle(scores(*shape), soft).isnan()
    assert_matches(function, oracle, {"input": scores(*shape), "soft": soft})


@pytest.mark.parametrize("flags", list(product((None, True, False), (None, True, False))), ids=str)
def test_legacy_reduction_arguments(backend, flags):
    shape = (2, 3, 5)
    options = {"size_average": flags[0], "reduce": flags[1], "reduction": "sum"}
    with pytest.warns(UserWarning, match="reduction") if flags != (None, None) else _nothing():
        assert_matches(*pair(labels(shape), backend, **options), {"input": scores(*shape)})


class _nothing:  # noqa: N801
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None


# ---- memory layouts ----


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("axes", [2, 3])
def test_layouts(backend, name, axes):
    """Read as they are, with the same numbers as contiguous; gradients have the strides that empty_like gives."""
    shape = (2, 5, *(6, 7, 4)[:axes])
    for dtype in FLOATS:
        x, target = scores(*shape, dtype=dtype), labels(shape, ignore_index=-100)
        function, _ = pair(target, backend, reduction="none")
        wanted = evaluate(function, {"input": x})
        strided = LAYOUTS[name](x)
        assert torch.equal(strided, x)
        got = evaluate(function, {"input": strided})
        assert torch.equal(got.value, wanted.value)
        assert torch.equal(got.gradients["input"], wanted.gradients["input"])
        # the kernels walk the spatial axes with one stride, so a result is not transposed in space
        like = x if name == "transposed_space" else torch.empty_like(strided)
        of_reference = backend == "reference" or (backend == "triton" and dtype == torch.float64)
        assert got.gradients["input"].stride() == like.stride() or of_reference


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_soft_targets(backend, layout):
    shape = (2, 5, 6, 7)
    x, soft = scores(*shape, dtype=torch.float32), torch.softmax(scores(*shape, dtype=torch.float32, seed=2), 1)
    function = lambda input, soft: calseg.soft_cross_entropy(input, soft, backend=backend)  # noqa: E731
    wanted, got = evaluate(function, {"input": x, "soft": soft}), evaluate(function, {"input": x, "soft": layout(soft)})
    assert torch.equal(got.value, wanted.value)
    for name in ("input", "soft"):
        assert torch.equal(got.gradients[name], wanted.gradients[name])


def test_expanded_inputs(backend):
    """Stride 0 in every place; the gradient that autograd sums over the expanded axes is the oracle's."""
    target = labels((3, 4, 5, 6))
    small = {"batch": scores(1, 4, 5, 6), "classes": scores(3, 1, 5, 6), "space": scores(3, 4, 1, 1)}
    for x in small.values():
        assert_matches(*(
            lambda input, f=f: f(input.expand(3, 4, 5, 6)) for f in pair(target, backend)
        ), {"input": x})  # fmt: skip


def test_negative_bit(backend):
    """Memory that holds the negative of what it stands for, in the place of labels, weights and upstream gradients."""
    x, target, weight = scores(2, 5, 6, 7), labels((2, 5, 6, 7)), class_weights(5)
    wanted = evaluate(lambda input: calseg.vls_cross_entropy(input, target, weight, backend=backend), {"input": x})
    negative = torch._neg_view(-target), torch._neg_view(-weight)
    got = evaluate(lambda input: calseg.vls_cross_entropy(input, *negative, backend=backend), {"input": x})
    assert torch.equal(got.value, wanted.value)
    assert torch.equal(got.gradients["input"], wanted.gradients["input"])


# ---- low precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=id_of)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("kind", "C"), [("hard", 2), ("weighted", 5), ("smoothed", 5), ("soft", 3), ("hard", 33)])
def test_low_precision_is_no_worse_than_pytorch(backend, dtype, reduction, kind, C):
    """The error against float64 truth is at most that of PyTorch in the same dtype and one rounding of the result."""
    shape = (2, C, 17, 19)
    x, target, options = scores(*shape, dtype=dtype, scale=3.0), labels(shape), {"reduction": reduction}
    if kind == "weighted":
        options["weight"] = class_weights(C).to(dtype)
    if kind == "smoothed":
        options["label_smoothing"] = 0.1
    if kind == "soft":
        target = torch.softmax(scores(*shape, seed=4), 1).to(dtype)
    function, _ = pair(target, backend, **options)
    truth = evaluate(pair(target.double() if kind == "soft" else target, backend, **options)[1], {"input": x.double()})
    got = evaluate(function, {"input": x})
    stock = evaluate(lambda input: F.cross_entropy(input, target, **options), {"input": x})
    for name, ours, theirs, exact in (
        ("value", got.value, stock.value, truth.value),
        ("gradient", got.gradients["input"], stock.gradients["input"], truth.gradients["input"]),
    ):
        assert ours.dtype == dtype, name
        rounding = torch.finfo(dtype).eps / 2 * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        error, stock_error = (ours.double() - exact).abs(), (theirs.double() - exact).abs()
        assert bool((error <= stock_error.max() + 1.01 * rounding).all()), (
            f"{name}: {error.max()} and {stock_error.max()}"
        )
        # and the arithmetic inside is float32's: nothing but that rounding of the result
        assert_accurate(ours, exact, ulps=8, what=name)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_autocast(backend, dtype, kind):
    """The output's dtype under autocast is F.cross_entropy's; gradients have their input's."""
    x, target = scores(2, 3, 7, dtype=dtype), labels((2, 3, 7))
    if kind == "soft":
        target = torch.softmax(scores(2, 3, 7, seed=3), 1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        stock = F.cross_entropy(x, target)
        got = evaluate(pair(target, backend)[0], {"input": x})
    assert got.value.dtype == stock.dtype
    assert got.gradients["input"].dtype == dtype
    truth = evaluate(pair(target.double() if kind == "soft" else target, None)[1], {"input": x.double()})
    assert_accurate(got.value, truth.value, ulps=8)
    assert_accurate(got.gradients["input"], truth.gradients["input"], ulps=8)


# ---- soft labels ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("loss", [calseg.vls_cross_entropy, calseg.soft_cross_entropy])
def test_class_probabilities(backend, reduction, shape, loss):
    """F.cross_entropy with probabilities, the gradient of the probabilities included (they need not sum to 1)."""
    shape = shape(5)
    for weighted, label_smoothing, dtype in product((False, True), (0.0, 0.3), (torch.float32, torch.float64)):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        weight = class_weights(5, dtype) if weighted else None
        wide = weight.double() if weighted else None
        assert_matches(
            partial(_positional, partial(loss, weight=weight, backend=backend, **options)),
            partial(_positional, partial(F.cross_entropy, weight=wide, **options)),
            {"input": scores(*shape, dtype=dtype), "target": scores(*shape, dtype=dtype, seed=2).abs()},
            ulps=16,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (7, 4)], ids=str)
@pytest.mark.parametrize("singleton", [False, True])
def test_ignore_mask(backend, reduction, shape, singleton):
    """A masked voxel counts nowhere, whatever lies there, and the mean is over the others."""
    mask = labels(shape, ignore_index=-1) < 0
    x, soft = scores(*shape), torch.softmax(scores(*shape, seed=2), 1)
    hole = mask.unsqueeze(1).expand(shape)
    given = mask.unsqueeze(1) if singleton else mask

    def oracle(input, soft):
        loss = F.cross_entropy(input, soft, reduction="none").where(~mask, 0.0)
        return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (~mask).sum()}[reduction]

    def function(input, soft):
        return calseg.soft_cross_entropy(
            input.masked_fill(hole, torch.nan), soft.masked_fill(hole, torch.inf), ignore_mask=given,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    assert_matches(function, oracle, {"input": x, "soft": soft}, ulps=16)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_given_soft_labels(backend, reduction, weighted):
    """``soft_labels`` beside hard labels, which say what is ignored and, by their weights, the mean's divisor."""
    shape = (2, 4, 5, 6)
    target, weight = labels(shape, ignore_index=3), class_weights(4) if weighted else torch.ones(4)
    ok = target != 3
    x, soft = scores(*shape), torch.softmax(scores(*shape, seed=2), 1)

    def oracle(input, soft):
        terms = -weight[None, :, None, None] * (0.9 * soft + 0.1 / 4) * torch.log_softmax(input, 1)
        loss = terms.sum(1).where(ok, 0.0)
        return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / weight[target][ok].sum()}[reduction]

    def function(input, soft):
        return calseg.vls_cross_entropy(
            input, target, weight if weighted else None, ignore_index=3, soft_labels=soft, label_smoothing=0.1,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    assert_matches(function, oracle, {"input": x, "soft": soft}, ulps=16)


def test_impossible_class_without_mass(backend):
    """t log t -> 0: where F.cross_entropy has NaN, the loss and both gradients are finite."""
    x = torch.tensor([[0.5, -torch.inf, 1.0]], dtype=torch.float64)
    soft = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64)
    got = evaluate(lambda x, y: calseg.soft_cross_entropy(x, y, backend=backend), {"x": x, "y": soft})
    kept = evaluate(F.cross_entropy, {"input": x[:, ::2], "target": soft[:, ::2]})
    assert_accurate(got.value, kept.value, ulps=4)
    assert_accurate(got.gradients["x"][:, ::2], kept.gradients["input"], ulps=4)
    assert_accurate(got.gradients["y"][:, ::2], kept.gradients["target"], ulps=4)
    assert float(got.gradients["x"][0, 1]) == float(got.gradients["y"][0, 1]) == 0.0


def test_mixed_dtypes(backend):
    """Soft labels, weights and logits of different dtypes: each gradient in its own dtype."""
    x = scores(2, 3, 50, dtype=torch.bfloat16)
    soft = torch.softmax(scores(2, 3, 50, seed=2), 1)
    weight = class_weights(3).to(torch.float16)
    assert_matches(
        lambda input, soft: calseg.soft_cross_entropy(input, soft, weight, backend=backend),
        lambda input, soft: F.cross_entropy(input, soft, weight.double()),
        {"input": x, "soft": soft.float()}, ulps=16,
    )  # fmt: skip


# ---- the argument space ----


@given(data=st.data())
def test_any_arguments(backend, data):
    draw = data.draw
    C = draw(st.integers(1, 20), label="C")
    space = draw(st.lists(st.integers(1, 9), max_size=3), label="space")
    shape = (draw(st.integers(1, 4), label="N"), C, *space)
    dtype = draw(st.sampled_from(FLOATS), label="dtype")
    soft = draw(st.booleans(), label="soft")
    options = {
        "reduction": draw(st.sampled_from(REDUCTIONS), label="reduction"),
        "label_smoothing": draw(st.sampled_from((0.0, 0.05, 1.0)), label="label_smoothing"),
        "weight": class_weights(C, torch.float32) if draw(st.booleans(), label="weighted") else None,
    }
    x = scores(*shape, dtype=dtype, seed=draw(st.integers(0, 9), label="seed"))
    if len(shape) > 2:
        x = draw(st.sampled_from(list(LAYOUTS.values())), label="layout")(x)
    if soft:
        target = torch.softmax(scores(*shape, seed=3), 1)
    else:
        options["ignore_index"] = draw(st.sampled_from((-100, 0, C - 1, 99)), label="ignore_index")
        target = labels(shape, dtype=draw(st.sampled_from(LABELS), label="labels"))
        if bool((target.long() == options["ignore_index"]).all()):
            options["ignore_index"] = -100
        if not soft and options["weight"] is not None:
            options["weight"] += 0.5  # no mean over nothing but weights of 0
    assert x.shape[:1] + x.shape[2:] == voxels_of(shape)
    count = 1.0
    if options["reduction"] == "mean" and not soft:
        ok = target.long() != options["ignore_index"]
        weight = torch.ones(C) if options["weight"] is None else options["weight"]
        count = float(weight[target.long()[ok]].sum())
    assert_matches(
        *pair(target, backend, **options), {"input": x}, ulps=16, scale=8.0 if options["reduction"] == "none" else 32.0,
        grad_scale=4.0 / count,
    )  # fmt: skip
