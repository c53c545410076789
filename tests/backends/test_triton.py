"""The Triton backend without a GPU: its numbers in Triton's interpreter, and the machine code of its kernels.

The interpreter is slow, so these tests choose some of the other backends' cases. With CALSEG_TEST_TRITON=1 the files
of the operations run all of them. With ``-m ptx`` the kernels run as they were compiled for a GPU, in an interpreter of
its assembly. test_gpu.py tests what only a GPU can show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import bins_of_backends
import naive
import pytest
import test_calibration as calibration
import torch
import torch.nn.functional as F
from cases import (
    LABELS,
    LAYOUTS,
    REDUCTIONS,
    SHAPES,
    assert_accurate,
    assert_matches,
    assert_near_bins,
    assert_same_bins,
    class_weights,
    evaluate,
    id_of,
    labels,
    scores,
)
from operations import OPERATIONS
from test_cross_entropy import EXTREMES, pair
from test_soft_labels import sampler
from test_vls_cross_entropy import gaussian, vls
from test_vls_elbo import elbo

import calseg
from calseg import checks, dice, installation
from calseg.backends import choice, rng
from calseg.dice import DiceOptions
from calseg.operations import UNIT, Labels, LossSpec, LossTensors, Sampling

pytestmark = [
    pytest.mark.skipif(choice.TRITON_ERROR is not None, reason=str(choice.TRITON_ERROR)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU: test_gpu.py"),
    pytest.mark.timeout(300),
]

ON_PTX = "TRITON_INTERPRET" not in os.environ  # the kernels run in the interpreter of PTX, not in Triton's
if ON_PTX:
    pytestmark.append(pytest.mark.ptx)

if choice.TRITON_ERROR is None:
    import triton
    import triton.language as tl
    from calseg.kernels import launch, noise, reductions
    from calseg.kernels.gaussian import Statistics, statistic_pointers
    from calseg.kernels.labels import holds
    from calseg.kernels.launch import HARD, SAMPLED, SOFT, WEIGHTED, Geometry
    from calseg.kernels.noise import normals, philox4x32
    from calseg.kernels.overlap import finished_overlap
    from calseg.kernels.reductions import Partials
    from calseg.kernels.tile import Tile, locate
    from calseg.kernels.vls_elbo import vls_elbo

    from calseg.backends import triton as engine

    if ON_PTX:
        from ptx.launch import run_program
    else:
        from interpreter import run_program

LOW = (torch.bfloat16, torch.float16)
ULPS = 48  # as for the CPU engine: the noise is good to 1e-6


# ---- cross-entropy ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cross_entropy(shape, reduction):
    shape = shape(5)
    for weighted, label_smoothing, ignore_index in ((False, 0.0, -100), (True, 0.3, 2), (False, 0.1, 255)):
        target = labels(shape, ignore_index=ignore_index)
        if target.dim() == 0:
            target = torch.ones_like(target)
        weight = class_weights(5, torch.float32) if weighted else None
        options = {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
        function = pair(target, "triton", reduction=reduction, **options)
        assert_matches(*function, {"input": scores(*shape, dtype=torch.float32)})


@pytest.mark.parametrize("C", [1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 117])
def test_classes_and_odd_sizes(C):
    """Test all layouts of classes over threads, and odd sizes."""
    for size in (1, 37, 128):
        shape = (2, C, size)
        assert_matches(*pair(labels(shape), "triton", reduction="none"), {"input": scores(*shape, dtype=torch.float32)},
                       ulps=8 + C / 4)  # fmt: skip


def test_a_tile_and_its_edges():
    """Test sizes around the tile of 2048 voxels, with several programs, and an incomplete last one."""
    for size in (2047, 2049, 4097):
        shape = (1, 2, size)
        x = scores(*shape, dtype=torch.float32)
        for reduction in ("none", "mean"):
            assert_matches(*pair(labels(shape, ignore_index=-100), "triton", reduction=reduction), {"input": x})


@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
def test_label_types(dtype):
    C, ignore_index = 117, 100 if dtype == torch.int8 else 200
    shape = (2, C, 5, 3)
    target = labels(shape, ignore_index=ignore_index, dtype=dtype)
    x = {"input": scores(*shape, dtype=torch.float32)}
    transposed = target.long().transpose(1, 2).contiguous().to(dtype).transpose(1, 2)
    for given in (target[:, None], transposed, target[:1].expand(2, -1, -1)):
        flat = given.squeeze(1) if given.dim() == 4 else given
        assert_matches(
            lambda input, given=given: calseg.vls_cross_entropy(
                input, given, ignore_index=ignore_index, backend="triton"
            ),
            pair(flat.long(), None, ignore_index=ignore_index)[1], x,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [(torch.uint8, 156, -100), (torch.uint8, 255, -1), (torch.int8, 3, 259), (torch.int32, 7, 2**32 + 7)],
    ids=str,
)
def test_ignore_index_is_compared_as_a_number(dtype, label, ignore_index):
    shape = (2, label + 1, 3)
    target = torch.full((2, 3), label, dtype=torch.int64).to(dtype)
    function = lambda input: calseg.vls_cross_entropy(input, target, ignore_index=ignore_index, backend="triton")  # noqa: E731
    assert_matches(function, pair(target, None)[1], {"input": scores(*shape, dtype=torch.float32)})


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_extreme_logits(kind):
    x = torch.tensor(EXTREMES, dtype=torch.float32).repeat(3, 1)
    target = torch.arange(3).repeat_interleave(len(EXTREMES))
    if kind == "soft":
        target = 0.2 * torch.ones(len(x), 3) + 0.4 * F.one_hot(target, 3)
    for dtype, weight in product((torch.float32, torch.bfloat16), (None, class_weights(3).float())):
        wanted = target.to(dtype) if kind == "soft" else target
        options = {"reduction": "none", "weight": None if weight is None else weight.to(dtype)}
        assert_matches(*pair(wanted, "triton", **options), {"input": x.to(dtype)}, grad_scale=2.0)


@pytest.mark.parametrize("dtype", LOW, ids=id_of)
@pytest.mark.parametrize(("kind", "C"), [("hard", 2), ("weighted", 5), ("soft", 3)])
def test_low_precision(dtype, kind, C):
    """Low precision is computed in float32, so value and gradient are rounded once."""
    shape = (2, C, 17, 19)
    x, target, options = scores(*shape, dtype=dtype, scale=3.0), labels(shape), {}
    if kind == "weighted":
        options["weight"] = class_weights(C).to(dtype)
    if kind == "soft":
        target = torch.softmax(scores(*shape, seed=4), 1).to(dtype)
    wide = target.double() if kind == "soft" else target
    for reduction in ("none", "mean"):
        options["reduction"] = reduction
        assert_matches(pair(target, "triton", **options)[0], pair(wide, None, **options)[1], {"input": x})


def test_a_gradient_scaler_reaches_float16_before_it_is_rounded():
    """A scale of 2^13 keeps the gradient of a mean over 2^14 voxels above the smallest normal float16."""
    shape = (1, 2, 2**14)
    x, target = scores(*shape, dtype=torch.float16).requires_grad_(), labels(shape, dtype=torch.uint8)
    loss = calseg.vls_cross_entropy(x, target, ignore_index=255, backend="triton")
    (gradient,) = torch.autograd.grad(loss.float() * 2.0**13, x)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(wide, target.long()) * 2.0**13, wide)
    assert_accurate(gradient, wanted, ulps=8)


@pytest.mark.parametrize("name", ["channels_last", "sliced_channels", "sliced_channels_last", "every_second",
                                  "transposed_space", "batch_inside", "odd_offset", "negative_bit"])  # fmt: skip
def test_layouts(name):
    """Tensors of different layouts give the results of contiguous ones. Gradients have the strides of empty_like."""
    shape = (2, 5, 6, 7)
    x, soft = scores(*shape, dtype=torch.float32), torch.softmax(scores(*shape, dtype=torch.float32, seed=2), 1)
    function = lambda input, soft: calseg.soft_cross_entropy(input, soft, backend="triton")  # noqa: E731
    wanted = evaluate(function, {"input": x, "soft": soft})
    for of in ("input", "soft"):
        tensors = {"input": x, "soft": soft}
        tensors[of] = LAYOUTS[name](tensors[of])
        got = evaluate(function, tensors)
        assert_accurate(got.value, wanted.value, ulps=2)
        for key, gradient in got.gradients.items():
            assert_accurate(gradient, wanted.gradients[key], ulps=4, what=key)
            like = x if name == "transposed_space" or key != of else torch.empty_like(tensors[of])
            assert gradient.stride() == like.stride()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nothing_of_an_ignored_voxel_counts(bad):
    shape = (2, 4, 7, 9)
    target = labels(shape, ignore_index=-100)
    hole = (target == -100)[:, None].expand(shape)
    tensors = gaussian(*shape, dtype=torch.float32)
    for function, names in (
        (pair(target, "triton", label_smoothing=0.1)[0], ("input",)),
        (vls(target, "triton", alpha=0.5), ("input", "mu", "logvar")),
        (elbo(target, "triton"), ("mu", "logvar")),
        (sampler(target, "triton", alpha=0.5), ("mu", "logvar")),
        (lambda mu, logvar: calseg.accumulate_soft_labels((mu, logvar), target, alpha=0.5, backend="triton"),
         ("mu", "logvar")),
    ):  # fmt: skip
        given = {name: tensors[name] for name in names}
        clean = evaluate(function, given)
        soiled = evaluate(function, {k: t.masked_fill(hole, bad) for k, t in given.items()})
        assert torch.equal(clean.value, soiled.value)
        for name, gradient in soiled.gradients.items():
            assert torch.count_nonzero(gradient[hole]) == 0, name
            assert torch.equal(gradient, clean.gradients[name]), name


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored_and_empty(reduction):
    weight = class_weights(3).float()
    for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
        function, oracle = pair(torch.full((2, 5), -100), "triton", reduction=reduction, **options)
        x = scores(2, 3, 5, dtype=torch.float32)
        got = evaluate(function, {"input": x})
        assert torch.equal(got.value.isnan(), oracle(x.double()).isnan())
        assert torch.count_nonzero(got.value.nan_to_num()) == 0
        assert torch.equal(got.gradients["input"], torch.zeros_like(x))
    for shape in ((0, 3, 4), (2, 3, 0), (0, 3)):
        x = scores(*shape, dtype=torch.float32)
        assert_matches(*pair(labels(shape), "triton", reduction=reduction), {"input": x})
        assert_matches(
            lambda mu, logvar: calseg.gaussian_kl(mu, logvar, reduction=reduction, backend="triton"),
            lambda mu, logvar: calseg.gaussian_kl(mu, logvar, reduction=reduction, backend="reference"),
            {"mu": x, "logvar": x},
        )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_soft_labels_and_masks(reduction):
    """Test probabilities, soft labels with hard ones, masks, mixed dtypes, and a class with logit -inf and share 0."""
    shape = (2, 4, 5, 6)
    target, weight = labels(shape, ignore_index=3), class_weights(4).float()
    mask = labels(shape, ignore_index=-1) < 0
    tensors = {"input": scores(*shape, dtype=torch.bfloat16), "soft": scores(*shape, dtype=torch.float32, seed=2).abs()}
    for call in (
        lambda b, input, soft: calseg.soft_cross_entropy(
            input, soft, weight.to(soft.dtype), label_smoothing=0.3, reduction=reduction, backend=b
        ),
        lambda b, input, soft: calseg.soft_cross_entropy(input, soft, ignore_mask=mask, reduction=reduction, backend=b),
        lambda b, input, soft: calseg.vls_cross_entropy(
            input, target, weight.to(soft.dtype), ignore_index=3, soft_labels=soft, reduction=reduction, backend=b
        ),
    ):
        assert_matches(
            lambda input, soft, call=call: call("triton", input, soft),
            lambda input, soft, call=call: call("reference", input, soft), tensors, ulps=16,
        )  # fmt: skip
    x = torch.tensor([[0.5, -torch.inf, 1.0]])
    got = evaluate(
        lambda x, y: calseg.soft_cross_entropy(x, y, backend="triton"), {"x": x, "y": torch.tensor([[0.25, 0.0, 0.75]])}
    )
    assert all(bool(g.isfinite().all()) and float(g[0, 1]) == 0.0 for g in got.gradients.values())
    assert got.value.isfinite()


# ---- the Gaussian ----

SAMPLED_OPTIONS = [
    {},
    {"alpha": 1.0, "temperature": 2.0, "num_samples": 3, "beta": 0.2, "prior_mu": 0.5, "prior_logvar": -1.0},
    {"alpha": 0.3, "label_smoothing": 0.2, "beta": 0.0, "num_samples": 5, "seed": -9, "weighted": True},
    {"alpha": 0.0, "beta": 2.0},
]  # fmt: skip


def against_reference(make, target, tensors, **options):
    return assert_matches(
        make(target, "triton", **options), make(target, "reference", **options), tensors, ulps=ULPS, scale=2.0
    )


@pytest.mark.parametrize("options", SAMPLED_OPTIONS, ids=range(len(SAMPLED_OPTIONS)))
@pytest.mark.parametrize("C", [1, 2, 3, 5, 14, 33])
def test_vls(C, options):
    """Test quads of one to several samples and classes, with and without padding."""
    shape = (2, C, 6, 7) if C < 14 else (1, C, 33)
    for reduction in ("none", "mean") if C == 5 else ("mean",):
        target = labels(shape, ignore_index=-100)
        against_reference(vls, target, gaussian(*shape, dtype=torch.float32), reduction=reduction, **options)


@pytest.mark.parametrize("dtype", LOW, ids=id_of)
@pytest.mark.parametrize("shape", ["C", "NC", "NCDHW"])
def test_vls_in_shapes_and_dtypes(shape, dtype):
    shape = SHAPES[shape](4)
    tensors = gaussian(*shape, dtype=dtype)
    tensors["mu"] = tensors["mu"].float()
    against_reference(vls, labels(shape), tensors, alpha=0.5, reduction="sum")


@pytest.mark.parametrize("layout", ["channels_last", "sliced_space"])
def test_vls_layouts(layout):
    shape = (2, 5, 6, 7)
    tensors, target = gaussian(*shape, dtype=torch.float32), labels(shape, ignore_index=-100)
    wanted = evaluate(vls(target, "triton", alpha=0.5), tensors)
    for names in (("mu",), ("input", "mu", "logvar")):
        changed = {k: LAYOUTS[layout](t) if k in names else t for k, t in tensors.items()}
        got = evaluate(vls(target, "triton", alpha=0.5), changed)
        assert_accurate(got.value, wanted.value, ulps=4)
        for name, gradient in got.gradients.items():
            assert_accurate(gradient, wanted.gradients[name], ulps=8, what=name)


@pytest.mark.parametrize("C", [1, 2, 4, 5, 33])
def test_elbo(C):
    shape = (2, C, 6, 7) if C < 14 else (1, C, 33)
    tensors = {k: t for k, t in gaussian(*shape, dtype=torch.float32).items() if k != "input"}
    for options in ({"reduction": "none"}, {"weighted": True, "num_samples": 3, "beta": 0.0, "prior_mu": -0.5}):
        target = labels(shape, ignore_index=-100)
        against_reference(elbo, target, tensors, **options)


@pytest.mark.parametrize("C", [1, 2, 3, 14, 33])
def test_sampled_soft_labels(C):
    shape = (2, C, 6, 7) if C < 14 else (1, C, 33)
    tensors = {k: t for k, t in gaussian(*shape, dtype=torch.float32).items() if k != "input"}
    for target, options in (
        (None, {"num_samples": 3, "temperature": 0.5}), (labels(shape, ignore_index=-100), {"alpha": 0.6, "seed": -1})
    ):  # fmt: skip
        against_reference(sampler, target, tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=id_of)
def test_accumulated_soft_labels(dtype):
    shape = (2, 4, 5, 7)
    maps = {f"map{k}": scores(*shape, dtype=dtype, seed=k) for k in range(2)}
    for target, options in ((None, {"temperature": 2.0}), (labels(shape, ignore_index=-100), {"alpha": 0.7})):
        assert_matches(
            lambda *, target=target, options=options, **maps: calseg.accumulate_soft_labels(
                maps.values(), target, backend="triton", **options
            ),
            lambda *, y=target, o=options, **maps: naive.accumulate_soft_labels(list(maps.values()), y, **o),
            maps, ulps=16, scale=1.0, grad_scale=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gaussian_kl(reduction):
    for shape in ((19, 1), (2, 5, 4, 3), (1, 33, 20)):
        tensors = {"mu": scores(*shape, dtype=torch.float32), "logvar": scores(*shape, dtype=torch.float32, seed=1)}
        assert_matches(
            *(lambda mu, logvar, b=b: calseg.gaussian_kl(mu, logvar, 0.5, -1.0, reduction, backend=b)
              for b in ("triton", "reference")), tensors, ulps=16,
        )  # fmt: skip


def test_gaussian_kl_of_extremes():
    mu = torch.tensor([[0.0], [1e4], [0.0], [0.0], [torch.nan], [torch.inf], [0.0]])
    logvar = torch.tensor([[0.0], [0.0], [-1e4], [80.0], [0.0], [0.0], [torch.nan]])
    wanted = 0.5 * (logvar.double().exp() + mu.double() ** 2 - 1 - logvar.double())[:, 0]
    got = calseg.gaussian_kl(mu, logvar, reduction="none", backend="triton")
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0, equal_nan=True)


def test_impossible_class_without_mass():
    tensors, target = gaussian(4, 3, dtype=torch.float32), torch.tensor([0, 2, 0, 2])
    tensors["input"][:, 1], tensors["mu"][:, 1] = -torch.inf, -1e5
    got = evaluate(vls(target, "triton", reduction="none", alpha=0.5, beta=0.0), tensors)
    wanted = evaluate(vls(target, "reference", reduction="none", alpha=0.5, beta=0.0), {
        k: t.double() for k, t in tensors.items()
    })  # fmt: skip
    assert_accurate(got.value, wanted.value, ulps=ULPS)
    assert_accurate(got.gradients["input"], wanted.gradients["input"], ulps=ULPS)
    for name, gradient in got.gradients.items():
        assert bool(gradient.isfinite().all()), name
        assert torch.count_nonzero(gradient[:, 1]) == 0, name


# ---- more classes than a program can hold ----


BLOCKED = {
    "hard": lambda b, r, y, w, x: calseg.vls_cross_entropy(x, y, w, reduction=r, backend=b, label_smoothing=0.1),
    "soft": lambda b, r, y, w, x, soft: calseg.soft_cross_entropy(x, soft, w, reduction=r, backend=b),
    "masked": lambda b, r, y, w, x, soft: calseg.soft_cross_entropy(x, soft, ignore_mask=y < 0, reduction=r, backend=b),
    "given": lambda b, r, y, w, x, soft: calseg.vls_cross_entropy(x, y, soft_labels=soft, reduction=r, backend=b),
    "vls": lambda b, r, y, w, x, mu, logvar: calseg.vls_cross_entropy(
        x, y, w, mu=mu, logvar=logvar, alpha=0.6, temperature=0.7, seed=1, num_samples=3, label_smoothing=0.1,
        reduction=r, backend=b),
    "elbo": lambda b, r, y, w, mu, logvar: calseg.vls_elbo(
        mu, logvar, y, seed=1, num_samples=3, reduction=r, backend=b),
    "kl": lambda b, r, y, w, mu, logvar: calseg.gaussian_kl(mu, logvar, 0.2, -0.3, r, backend=b),
    "sample": lambda b, r, y, w, mu, logvar: calseg.sample_soft_labels(mu, logvar, y, seed=1, num_samples=3, backend=b),
    "estimate": lambda b, r, y, w, mu, logvar: calseg.sample_soft_labels(mu, logvar, seed=1, num_samples=3, backend=b),
    "accumulate": lambda b, r, y, w, mu, logvar: calseg.accumulate_soft_labels(
        (mu, logvar), y, alpha=0.4, temperature=2.0, backend=b),
    "hard_overlap": lambda b, r, y, w, x: calseg.vls_dice_cross_entropy(x, y, w, label_smoothing=0.1, backend=b),
    "soft_overlap": lambda b, r, y, w, x, soft: calseg.vls_dice_cross_entropy(x, y, w, soft_labels=soft, backend=b),
    "sampled_overlap": lambda b, r, y, w, x, mu, logvar: calseg.vls_dice_cross_entropy(
        x, y, w, mu=mu, logvar=logvar, alpha=0.6, temperature=0.7, seed=1, num_samples=3, backend=b),
}  # fmt: skip
OVERLAPS = [name for name in BLOCKED if name.endswith("overlap")]
WITHOUT_REDUCTION = ("sample", "estimate", "accumulate", *OVERLAPS)


def blocked(name: str, shape: tuple[int, ...], target: torch.Tensor, backend: str, reduction: str = "none"):
    """Return an entry of BLOCKED as a function of its tensors, and the tensors in float32."""
    function, weight = BLOCKED[name], class_weights(shape[1])
    all_tensors = {"x": scores(*shape), "soft": torch.softmax(scores(*shape, seed=9), 1), "mu": scores(*shape, seed=1),
                   "logvar": scores(*shape, seed=2, scale=0.8)}  # fmt: skip
    names = function.__code__.co_varnames[4 : function.__code__.co_argcount]
    dtype_of = lambda tensors: next(iter(tensors.values())).dtype  # noqa: E731
    return (
        lambda **t: function(backend, reduction, target, weight.to(dtype_of(t)), **t),
        {name: all_tensors[name].float() for name in names},
    )


@pytest.mark.parametrize("name", BLOCKED)
def test_classes_in_blocks(name, monkeypatch):
    """Tiles of four classes give the results of one tile for all classes."""
    monkeypatch.setattr(engine, "_plans", {})
    monkeypatch.setattr(launch, "choose_tile", lambda kind, geometry, itemsize: (Tile(4, 64, LANE_MAJOR=kind.noise), 4))
    shape, target = (2, 10, 4, 5), labels((2, 10, 4, 5), ignore_index=-100)
    for reduction in ("none",) if name in WITHOUT_REDUCTION else ("none", "mean"):
        function, tensors = blocked(name, shape, target, "triton", reduction)
        oracle, _ = blocked(name, shape, target, "reference", reduction)
        assert_matches(function, oracle, tensors, ulps=ULPS, scale=2.0)


# ---- the program that is done last computes the loss ----

FINISHED = ("hard", "plain", "masked", "given", "vls", "elbo", "kl")
ORDERS = {
    "as numbered": lambda programs: range(programs),
    "backwards": lambda programs: reversed(range(programs)),
    "shuffled": lambda programs: torch.randperm(programs, generator=torch.Generator().manual_seed(3)).tolist(),
}


def small_loss(name, backend, ignored=0.2):
    """Return a mean as a function of its tensors, and the tensors, of 1600 voxels in several programs."""
    shape = (2, 3, 32, 25)
    target = labels(shape, ignore_index=-100)
    target[torch.rand(target.shape, generator=torch.Generator().manual_seed(5)) < ignored] = -100
    if name == "plain":  # without weights
        return (
            lambda x: calseg.vls_cross_entropy(x, target, reduction="mean", backend=backend),
            {"x": scores(*shape).float()},
        )
    return blocked(name, shape, target, backend, "mean")


def of_parts(monkeypatch, order=None):
    """Let tiles be small, and programs run in an order. Return a list of the launches."""
    launches, launch_kernel = [], launch.launch_kernel

    def ordered(kernel, programs, like, arguments, num_warps):
        launches.append((kernel.fn.__name__, programs))
        if order is None:
            launch_kernel(kernel, programs, like, arguments, num_warps)
            return
        for program in order(programs):
            run_program(kernel, programs, program, arguments, num_warps)

    monkeypatch.setattr(engine, "_plans", {})
    monkeypatch.setattr(launch, "choose_tile", lambda kind, geometry, itemsize: (Tile(4, 128), 1))
    monkeypatch.setattr(launch, "launch_kernel", ordered)
    return launches


@pytest.mark.parametrize("name", FINISHED)
def test_programs_may_end_in_any_order(name, monkeypatch):
    """The loss and the gradients have the same bits, the counter is back at 0, and one launch computes the loss."""
    function, tensors = small_loss(name, "triton")
    results = []
    for order in ORDERS.values():
        launches = of_parts(monkeypatch, order)
        results.append(evaluate(function, tensors))
        monkeypatch.undo()
        main = [each for each in launches if each[0] != "scale_gradients"]
        scan = [each for each in main if each[0] == "scan_labels"]
        assert len(scan) == (name in ("hard", "vls")), launches  # those with class weights
        assert len(main) == len(scan) + 1, launches
        assert main[-1][1] > 10, "there are several programs"
        assert all(int(counter) == 0 for counter in reductions._counters.values())
    for got in results[1:]:
        assert torch.equal(got.value, results[0].value)
        assert all(torch.equal(g, results[0].gradients[k]) for k, g in got.gradients.items())


@pytest.mark.parametrize("ignored", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("name", FINISHED)
def test_few_programs_and_many(name, ignored, monkeypatch):
    """The one launch of few programs gives what the launches of many give, and what the reference does."""
    function, tensors = small_loss(name, "triton", ignored)
    wanted = evaluate(small_loss(name, "reference", ignored)[0], tensors)
    of_parts(monkeypatch)
    few = evaluate(function, tensors)
    monkeypatch.setattr(engine, "FEW_PROGRAMS", 0)
    launches = of_parts(monkeypatch)
    many = evaluate(function, tensors)
    assert "finish_loss" in [name for name, _ in launches]
    for got in (few, many):
        assert_accurate(got.value, wanted.value, ulps=ULPS)
        for k, gradient in got.gradients.items():
            assert_accurate(gradient, wanted.gradients[k], ulps=ULPS, scale=2.0 / 1600, what=k)


# ---- the overlap ----


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("C", [2, 3, 14, 33, 117])
def test_overlap(C, name):
    """Every number of classes, and one or several items with several programs each."""
    for shape in ((2, C, 300), (19, C)) if C < 14 else ((1, C, 33),):
        target = labels(shape, ignore_index=-100)
        function, tensors = blocked(name, shape, target, "triton")
        assert_matches(function, blocked(name, shape, target, "reference")[0], tensors, ulps=ULPS, scale=1.0,
                       grad_scale=2.0 / target.numel())  # fmt: skip


@pytest.mark.parametrize("dtype", LOW, ids=id_of)
@pytest.mark.parametrize("name", OVERLAPS)
def test_overlap_of_low_precision(dtype, name):
    """Value and gradients are computed in float32, and rounded once. Sampled labels wait in 16 bits."""
    shape = (2, 4, 9, 5)
    target = labels(shape, ignore_index=-100)
    function, tensors = blocked(name, shape, target, "triton")
    tensors = {key: t.to(dtype) for key, t in tensors.items()}
    ulps = 512 if name == "sampled_overlap" else 16
    assert_matches(function, blocked(name, shape, target, "reference")[0], tensors, ulps=ulps)


@pytest.mark.parametrize(
    "layout", ["channels_last", "sliced_channels_last", "every_second", "batch_inside", "odd_offset"]
)
@pytest.mark.parametrize("name", OVERLAPS)
def test_overlap_of_layouts(name, layout):
    """Layouts give the numbers of contiguous tensors. The items of a batch are never merged."""
    shape = (3, 5, 6, 7)
    target = labels(shape, ignore_index=-100)
    function, tensors = blocked(name, shape, target, "triton")
    wanted = evaluate(function, tensors)
    for changed in ((next(iter(tensors)),), tuple(tensors)):
        got = evaluate(function, {key: LAYOUTS[layout](t) if key in changed else t for key, t in tensors.items()})
        assert_accurate(got.value, wanted.value, ulps=4)
        for key, gradient in got.gradients.items():
            assert_accurate(gradient, wanted.gradients[key], ulps=16, what=key)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=id_of)
def test_overlap_of_fractions(dtype):
    """Soft labels that are fractions of an integer equal the numbers that they stand for."""
    shape, largest = (2, 4, 9, 5), torch.iinfo(dtype).max
    steps = (torch.softmax(scores(*shape, seed=3), 1) * largest).round().long()
    x = {"input": scores(*shape, dtype=torch.float32)}
    target = labels(shape, ignore_index=-100)
    for call in (
        lambda input, soft: calseg.soft_cross_entropy(input, soft, backend="triton"),
        lambda input, soft: calseg.vls_dice_cross_entropy(input, target, soft_labels=soft, backend="triton"),
    ):
        got, wanted = (
            evaluate(lambda input, call=call, soft=soft: call(input, soft), x)
            for soft in (steps.to(dtype), steps.float() / largest)
        )
        assert_accurate(got.value, wanted.value, ulps=4)
        assert_accurate(got.gradients["input"], wanted.gradients["input"], ulps=8)


@pytest.mark.parametrize("kind", ["hard", "sampled"])
def test_overlap_and_the_sum_of_the_losses(kind):
    """The sum over voxels has no divisor, neither in the value nor in the gradients."""
    shape = (2, 3, 9, 5)
    tensors = {"input": scores(*shape, dtype=torch.float32)}
    if kind == "sampled":
        tensors |= {
            name: scores(*shape, dtype=torch.float32, seed=seed) for seed, name in enumerate(("mu", "logvar"), 1)
        }
    got, wanted = (
        evaluate(
            lambda backend=backend, **given: calseg.vls_dice_cross_entropy(
                target=labels(shape, ignore_index=-100), reduction="sum", seed=1, backend=backend, **given
            ),
            tensors,
        )
        for backend in ("triton", "reference")
    )
    assert_accurate(got.value, wanted.value, ulps=16)
    for name, gradient in wanted.gradients.items():
        assert_accurate(got.gradients[name], gradient, ulps=64, what=name)


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlap_launches_few_kernels(name, launched):
    """One pass forward and one backward, and the labels are scanned for the class weights; two calls give the same
    bits.
    """
    shape = (2, 3, 400)
    function, tensors = blocked(name, shape, labels(shape, ignore_index=-100), "triton")
    first, second = evaluate(function, tensors), evaluate(function, tensors)
    assert torch.equal(first.value, second.value)
    assert all(torch.equal(second.gradients[key], gradient) for key, gradient in first.gradients.items())
    forward = {"hard_overlap": "hard_overlap", "soft_overlap": "soft_cross_entropy"}.get(name, "vls_cross_entropy")
    backward = "hard_cross_entropy" if name == "hard_overlap" else "soft_cross_entropy"
    scaled = ["scale_gradients"] if name == "sampled_overlap" else []
    assert launched == ["scan_labels", forward, "finish_dice", backward, *scaled] * 2


DICE = {
    "usual": {},
    "of several items": {
        "batch_dice": True,
        "include_background": True,
        "dice_class_weight": torch.tensor([1.0, 0.0, 3.0]),
    },
    "other smoothing": {"smooth": (0.5, 0.0), "reduction": "sum", "scale": torch.tensor(-2.0)},
    "Dice alone": {"ce_weight": 0.0, "dice_weight": -0.5, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("counted", [1, 0, -1], ids=["some", "none here", "none anywhere"])
@pytest.mark.parametrize("name", DICE)
def test_slopes_of_the_sums(name, counted, monkeypatch):
    """The last kernel of the forward pass gives what autograd makes of the formula, with sums of other processes."""
    usual = DiceOptions(1.0, 1.0, False, False, (1e-5, 1e-5), None, "mean", 1.0, torch.float32, None)
    options, shape = usual._replace(**DICE[name]), (2, 3, 40)
    monkeypatch.setattr(dice, "over_processes", lambda _, sums: 3 * sums + (counted >= 0))
    monkeypatch.setattr(engine, "over_processes", dice.over_processes)
    target = labels(shape, ignore_index=-100) if counted > 0 else torch.full((2, 40), -100)
    spec = LossSpec("cross_entropy", Labels(target, -100), None, options.reduction, torch.float32)
    tensors = LossTensors(scores(*shape, dtype=torch.float32))
    (value, slopes), parts = (
        engine.dice_loss(spec, options, tensors, LossTensors()), engine.loss_and_overlap(spec, tensors, LossTensors())
    )  # fmt: skip
    wanted, wanted_slopes = dice.dice_and_slopes(options, *parts)
    assert value.dtype == options.dtype
    assert_accurate(value, wanted, ulps=8, scale=1.0)
    for got, of_sums in ((slopes[:-2], wanted_slopes[:-2]), (slopes[-2:], wanted_slopes[-2:])):
        assert_accurate(got.float(), of_sums, ulps=8)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("C", "S"), [(2, 5000), (14, 1540), (33, 1028), (45, 532), (117, 270)])
def test_programs_take_several_tiles(C, S, layout, options, monkeypatch):
    """A program adds up its tiles, of which the last may be in part or not there. Ignored voxels hold any number."""
    monkeypatch.setattr(engine, "_plans", {})
    monkeypatch.setattr(launch, "ENOUGH_WARPS", 1)
    monkeypatch.setattr(launch, "OVERLAP", launch.OVERLAP._replace(tiles=3))
    monkeypatch.setattr("calseg.kernels.overlap.OVERLAP", launch.OVERLAP)
    programs, launch_kernel = {}, launch.launch_kernel

    def recorded(kernel, number, like, arguments, num_warps):
        programs[kernel.fn.__name__] = number, arguments[-1]
        launch_kernel(kernel, number, like, arguments, num_warps)

    monkeypatch.setattr(launch, "launch_kernel", recorded)
    shape = (2, C, S)
    target, x = labels(shape, ignore_index=-100), scores(*shape).float()
    x.movedim(1, -1)[target == -100] = torch.nan
    function, oracle = (
        partial(calseg.vls_dice_cross_entropy, target=target, backend=backend, **options)
        for backend in ("triton", "reference")
    )
    tensors = {"input": LAYOUTS[layout](x)}
    assert_matches(function, oracle, tensors, ulps=ULPS, scale=1.0, grad_scale=2.0 / target.numel())
    number, tile = programs["hard_overlap"]
    tiles = -(-S // tile.TILE)
    assert tiles > 3, "an item has several programs"
    assert number == 2 * -(-tiles // 3)


def test_programs_are_enough():
    """A program takes several tiles only where the programs are enough for a GPU, and it has all classes."""
    tile, few, many = Tile(16, 512), Geometry(2, 14, 2**16, [], []), Geometry(2, 14, 2**22, [], [])
    assert launch.num_programs(few, tile, 4, 8) == 2 * 2**7
    assert launch.num_programs(many, tile, 4, 8) == 2 * 2**13 // 8
    assert launch.num_programs(many, tile, 4, 1) == 2 * 2**13
    assert launch.num_programs(many._replace(C=17), tile, 4, 8) == 2 * 2**13
    between = Geometry(2, 14, 3 * 2**19 + 1, [], [])  # 2 * 3073 tiles of 4 warps: three times enough warps
    assert launch.num_programs(between, tile, 4, 8) == 2 * 1025


def test_sums_of_programs_are_added_in_float64():
    """The sums of many programs, which float32 could not add, agree with float64."""
    call = SimpleNamespace(geometry=Geometry(2, 3, 10**8, [], []), C=3)
    parts = 1000 * torch.rand(2 * 50_000, 3, 2, generator=torch.Generator().manual_seed(1)) + 0.001
    got = finished_overlap(call, parts)
    assert_accurate(got, parts.double().view(2, -1, 3, 2).sum(1), ulps=64)


@pytest.mark.parametrize("name", OVERLAPS)
def test_a_label_out_of_range_makes_the_overlap_nan(name):
    """The item of a bad label has a NaN loss, and other voxels of other items are untouched."""
    shape = (2, 3, 12)
    target = labels(shape)
    target[0, 7] = 3
    function, tensors = blocked(name, shape, target, "triton")
    got = evaluate(function, tensors)
    assert got.value.isnan()
    assert got.gradients["x"][0].isnan().any()


# ---- calibration bins: the tests of the other backends, a choice of their cases ----


@pytest.mark.parametrize("from_logits", [True, False])
@calibration.every_kind
def test_calibration(kind, from_logits):
    bins_of_backends.check_voxels_that_count("triton", kind, from_logits)
    for C in (2, 3, 14, 33):
        calibration.test_logits_against_float64("triton", torch.float32, C, kind)


@pytest.mark.parametrize("right_closed", [False, True])
@pytest.mark.parametrize("n_bins", [1, 7, 15, 20, 64, 100, 4096])
def test_calibration_edges(n_bins, right_closed):
    calibration.test_edges("triton", n_bins, torch.float32, right_closed)


def test_calibration_extremes():
    bins_of_backends.check_extremes("triton")


@pytest.mark.parametrize("name", ["channels_last", "sliced_channels_last", "every_second", "transposed_space",
                                  "odd_offset"])  # fmt: skip
def test_calibration_layouts(name):
    calibration.test_layouts("triton", name, 2)


def test_calibration_of_any_labels_and_shapes():
    for dtype in LABELS:
        calibration.test_label_types_and_forms("triton", dtype, "strided")
    bins_of_backends.check_shapes("triton")


@calibration.every_kind
@pytest.mark.parametrize("n_bins", [15, 200])
def test_calibration_in_blocks_of_classes(kind, n_bins, monkeypatch):
    """With tiles of four classes, probabilities give the integers of the reference."""
    monkeypatch.setattr(engine, "_plans", {})
    monkeypatch.setattr(launch, "choose_tile", lambda kind, geometry, itemsize: (Tile(4, 64), 4))
    p, target = calibration.probabilities(2, 10, 9, 11), labels((2, 10, 9, 11), ignore_index=-100)
    for per_item in (False, True):
        options = {"n_bins": n_bins, "per_item": per_item, "from_logits": False, **kind}
        got = calseg.calibration_bins(p, target, backend="triton", **options)
        wanted = calseg.calibration_bins(p, target, backend="reference", **options)
        assert_same_bins(got, wanted, units=8)
    x = p.log()
    got = calseg.calibration_bins(x, target, backend="triton", n_bins=n_bins, **kind)
    wanted = calseg.calibration_bins(x.double(), target, backend="reference", n_bins=n_bins, **kind)
    assert_near_bins(got, wanted, units=4)


@pytest.mark.parametrize("n_bins", [1, 4096])
def test_a_full_tile_in_one_bin(n_bins):
    """The bit fields of a word hold the 4096 voxels of the largest tile."""
    assert launch.choose_tile(launch.BINS, Geometry(1, 1, 2**20, [(0, 2**20, 1)], []), 4)[0].TILE <= 4096
    size = 8192 + 5
    bins = calseg.calibration_bins(
        torch.zeros(1, 1, size), torch.zeros(1, size, dtype=torch.uint8), n_bins=n_bins, backend="triton"
    )
    assert int(bins.count[-1]) == int(bins.hits[-1]) == int(bins.num_voxels) == size
    assert int(bins.confidence[-1]) == size * UNIT


# ---- the noise ----


def _philox_known_answers():
    @triton.jit
    def kernel(out, c0, c1, c2, c3, k0, k1):
        words = philox4x32(
            tl.load(c0), tl.load(c1), tl.load(c2), tl.load(c3), tl.load(k0).to(tl.uint32), tl.load(k1).to(tl.uint32)
        )
        for i in tl.static_range(4):
            tl.store(out + i, words[i])

    return kernel


def test_philox_known_answers():
    word = lambda value: torch.tensor([value], dtype=torch.int64).to(torch.uint32)  # noqa: E731
    kernel = _philox_known_answers()
    for counter, key, wanted in (
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ):  # fmt: skip
        out = torch.zeros(4, dtype=torch.int64).to(torch.uint32)
        launch.launch_kernel(kernel, 1, out, (out, *map(word, counter), *map(word, key)), 4)
        assert tuple(out.long().tolist()) == wanted


@pytest.mark.parametrize("lane_major", [False, True])
def test_normals(lane_major):
    """Normals equal those of the noise contract to rounding, on both sides of voxel 2^32, in both orders of rows."""

    @triton.jit
    def kernel(out, start, k0, k1, LANE_MAJOR: tl.constexpr):
        column, row = tl.arange(0, 128), tl.arange(0, 16)
        z = normals(tl.load(k0).to(tl.uint32), tl.load(k1).to(tl.uint32), tl.load(start) + column, tl.arange(0, 4),
                    LANE_MAJOR)  # fmt: skip
        c = 4 * (row % 4) + row // 4 if LANE_MAJOR else row
        tl.store(out + c[:, None] * 128 + column[None, :], z)

    for seed, start in ((5, 0), (-7, 2**32 - 64), (2**40 + 3, 2**33)):
        out = torch.full((16, 128), torch.nan)
        halves = [torch.tensor(seed >> shift & 0xFFFFFFFF) for shift in (0, 32)]
        launch.launch_kernel(kernel, 1, out, (out, torch.tensor(start), *halves, lane_major), 4)
        wanted = rng.standard_normal(seed, 128, 16, 0, first_voxel=start, device=torch.device("cpu"))
        assert_accurate(out, wanted, ulps=4)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_normals_by_the_functions_of_a_gpu(sign, monkeypatch):
    """With errors as large as NVIDIA states, a normal is within 2e-4, and all but 1 in 10,000 are within 5e-6.

    A logarithm in base 2 may be off by 2^-22, a sine or cosine by 2^-20.5 (PTX ISA, lg2.approx, sin.approx).
    """

    @triton.jit
    def kernel(out, a, b):
        i = tl.arange(0, 65536)
        z0, z1 = noise._fast_box_muller(tl.load(a + i).to(tl.uint32), tl.load(b + i).to(tl.uint32))
        tl.store(out + i, z0)
        tl.store(out + 65536 + i, z1)

    off, turn = sign * 2.0**-22, sign * 2.0**-20.5
    functions = SimpleNamespace(
        fast_log2f=lambda x: tl.log2(x) + off, fast_cosf=lambda x: tl.cos(x) + turn,
        fast_sinf=lambda x: tl.sin(x) - turn,
    )  # fmt: skip
    monkeypatch.setattr(noise, "libdevice", functions)
    generator = torch.Generator().manual_seed(3)
    off_by = []
    for part in range(4):
        a, b = (torch.randint(2**32, (65536,), generator=generator) for _ in range(2))
        if part == 0:  # the largest and the smallest radii
            a[:1000], a[1000:2000] = torch.arange(1000) << 8, 2**32 - 1 - (torch.arange(1000) << 8)
        out = torch.empty(2, 65536)
        kernel[(1,)](out, a, b)
        off_by.append((out - torch.stack(rng._box_muller(a, b))).abs().flatten())
    errors = torch.cat(off_by)
    assert float(errors.max()) < 2e-4
    assert float((errors > 5e-6).double().mean()) < 1e-4


def test_seeds():
    tensors, target = gaussian(2, 3, 20, dtype=torch.float32), labels((2, 3, 20))
    loss = lambda seed: float(vls(target, "triton", alpha=1.0, seed=seed, num_samples=1)(**tensors))  # noqa: E731
    assert loss(7) == loss(torch.tensor(7))
    assert loss(-3) == loss(2**64 - 3) == loss(torch.tensor(-3))
    assert len({loss(seed) for seed in (0, 1, 2**32, 2**63, -1)}) == 5
    torch.manual_seed(5)
    first = loss(None)
    torch.manual_seed(5)
    assert loss(None) == first


# ---- labels that are no class ----


@pytest.mark.parametrize("label", [5, 255, -1, -7, 2**31 + 1, 2**32 + 1])
def test_a_label_out_of_range_makes_the_loss_nan(label):
    """A bad label makes the loss and gradient of its voxel NaN, and nothing is read outside of the tensors."""
    shape = (1, 5, 12)
    target = labels(shape)
    target[0, 7] = label
    tensors = gaussian(*shape, dtype=torch.float32)
    for function, names in (
        (pair(target, "triton", reduction="none")[0], ("input",)),
        (pair(target, "triton", reduction="none", weight=class_weights(5).float(), label_smoothing=0.1)[0], ("input",)),
        (vls(target, "triton", reduction="none"), ("input", "mu", "logvar")),
        (elbo(target, "triton", reduction="none"), ("mu", "logvar")),
    ):
        got = evaluate(function, {name: tensors[name] for name in names})
        assert got.value.isnan().nonzero().tolist() == [[0, 7]]
        assert all(bool(g[..., 7].isnan().any()) for g in got.gradients.values())
        assert all(bool(g[..., :7].isfinite().all()) for g in got.gradients.values())
    assert pair(target, "triton")[0](tensors["input"]).isnan()
    soft = sampler(target, "triton")(tensors["mu"], tensors["logvar"])
    assert soft.isnan().all(1).nonzero().tolist() == [[0, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=id_of)
def test_a_label_that_is_no_whole_number_makes_the_loss_nan(dtype):
    bad = torch.tensor([1.5, -0.5, torch.nan, torch.inf, -torch.inf, 5.0, -100.5, 3e4], dtype=dtype)
    if dtype == torch.bfloat16:
        bad[6] = -1.25  # it rounds -100.5 to -100
    target = labels((1, 5, 12), ignore_index=-100).to(dtype)
    target[0, :8] = bad
    got = evaluate(pair(target, "triton", reduction="none")[0], {"input": scores(1, 5, 12, dtype=torch.float32)})
    assert got.value[0, :8].isnan().all()
    assert got.value[0, 8:].isfinite().all()
    assert got.gradients["input"][..., 8:].isfinite().all()
    exact = {257: dtype != torch.bfloat16, 2**24 + 1: dtype == torch.float64}
    for number in (-100, 0, 255, *exact):
        assert holds(dtype, number) == exact.get(number, True), number


def test_a_label_out_of_range_raises_if_asked_to(monkeypatch):
    monkeypatch.setattr(checks, "CHECK_LABELS", True)
    target = torch.tensor([[0, 1, 2, 9]], dtype=torch.uint8)
    x = scores(1, 3, 4, dtype=torch.float32)
    for call in (
        lambda: calseg.vls_cross_entropy(x, target, backend="triton"),
        lambda: calseg.vls_elbo(x, x, target, backend="triton", seed=0),
        lambda: calseg.sample_soft_labels(x, x, target, backend="triton", seed=0),
        lambda: calseg.accumulate_soft_labels([x], target, backend="triton"),
    ):
        with pytest.raises(IndexError, match=r"target\[0, 3\] is 9: wanted a class in \[0, 3\)"):
            call()


def test_the_switch_in_the_environment():
    code = "from calseg.checks import CHECK_LABELS; print(CHECK_LABELS)"
    for value, wanted in (("1", "True"), ("0", "False"), ("", "False")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "CALSEG_CHECK_LABELS": value}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == wanted


# ---- beyond 32 bits ----


def far_apart(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return the values in a storage with offsets beyond 2^31, whose untouched pages take no memory."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    return torch.empty(extent, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(
    "strides",
    [(2**31 + 48, 40, 1), (200, 2**30 + 16, 1), (160, 1, 2**26 + 8), (7, 2**30 + 5, 3 * 2**24 + 1)],
    ids=["batch", "class", "voxels, channels last", "all"],
)
def test_offsets_past_two_to_the_31(strides):
    """Batch items, classes and voxels with offsets beyond 32 bits give the results of contiguous tensors."""
    shape = (2, 4, 40)
    x, y = scores(*shape, dtype=torch.bfloat16), torch.softmax(scores(*shape, seed=3), 1).bfloat16()
    target = labels(shape, dtype=torch.uint8, ignore_index=3)
    spec = LossSpec("cross_entropy", Labels(target, 3), None, "none", torch.float32)
    to = LossTensors(torch.full_like(x, torch.nan), torch.full_like(x, torch.nan))
    wanted = engine.loss(spec, LossTensors(x, y), to)
    far_to = LossTensors(*(far_apart(torch.full_like(x, torch.nan), strides) for _ in range(2)))
    far_spec = spec._replace(labels=Labels(far_apart(target, (strides[0], strides[2])), 3))
    got = engine.loss(far_spec, LossTensors(far_apart(x, strides), far_apart(y, strides)), far_to)
    assert_accurate(got, wanted, ulps=2)
    assert torch.equal(far_to.logits, to.logits)
    assert torch.equal(far_to.soft_labels, to.soft_labels)


@pytest.mark.parametrize("S", [1, 1024, 1025, 2**31 - 1024, 2**31 - 1023, 2**31 - 1, 2**31, 2**33 + 5])
def test_the_last_tile_is_found(S):
    """Tiles are numbered to the last one, also where S and a tile's length together pass 2^31."""

    @triton.jit
    def kernel(out, S, tile: tl.constexpr):
        n, first, inside = locate(tl.load(out).to(tl.int32), S, tile)
        tl.store(out, n)
        tl.store(out + 1, first)
        tl.store(out + 2, tl.sum(inside.to(tl.int64), 0))

    tiles = -(-S // 1024)
    for step in {0, tiles - 1, tiles}:
        out = torch.tensor([step, 0, 0])
        launch.launch_kernel(kernel, 1, out, (out, S, Tile(1, 1024)), 4)
        item, tile = divmod(step, tiles)
        assert out.tolist() == [item, 1024 * tile, min(1024, S - 1024 * tile)]


def test_rows_of_statistics_past_two_to_the_31():
    """A row of the sums of many samples starts where the product of its number and the voxels says."""

    @triton.jit
    def kernel(out, row, num_voxels):
        pointers = statistic_pointers(Statistics(out, num_voxels), row, tl.arange(0, 1))
        tl.store(out + tl.arange(0, 1), (pointers.to(tl.int64) - out.to(tl.int64)) // 8)

    out = torch.zeros(1, dtype=torch.int64)
    launch.launch_kernel(kernel, 1, out, (out, 14, 2**30), 4)
    assert out.item() == 14 * 2**30


def test_too_many_tiles_are_an_error():
    x = torch.zeros(1, 1, 1).expand(1, 1, 2**45)
    with pytest.raises(ValueError, match=f"got {2**45} voxels, wanted up to"):
        calseg.gaussian_kl(x, x, backend="triton")


def test_voxels_past_two_to_the_32(monkeypatch):
    """With more than 2^32 voxels in expanded tensors, the programs around voxel 2^32 and the last one are right."""
    size, sums = 2**32 + 3001, {}
    mu, logvar = (torch.tensor([a, b]).view(1, 2, 1).expand(1, 2, size) for a, b in ((0.3, -0.2), (0.5, 0.1)))
    target = torch.ones(1, 1, dtype=torch.uint8).expand(1, size)

    def some_programs(kernel, programs, like, arguments, num_warps):
        if kernel is vls_elbo:
            tile = arguments[-1].TILE
            assert programs == -(-size // tile)
            partials = next(a for a in arguments if isinstance(a, Partials)).ptr
            for program in (2**32 // tile - 1, 2**32 // tile, programs - 1):
                run_program(kernel, programs, program, arguments, num_warps)
                sums[program * tile, min(size, (program + 1) * tile)] = float(partials[program])

    monkeypatch.setattr(launch, "launch_kernel", some_programs)
    sampling = Sampling(num_samples=3, seed=99)
    spec = LossSpec("vls_elbo", Labels(target, 255), None, "sum", torch.float32, sampling=sampling)
    engine.loss(spec, LossTensors(mu=mu, logvar=logvar))
    assert len(sums) == 3
    for (start, stop), got in sums.items():
        wanted = 0.0
        for k in range(3):
            eps = rng.standard_normal(99, stop - start, 2, k, first_voxel=start, device=torch.device("cpu"))
            nu = mu[0, :, :1].double() + (logvar[0, :, :1].double() / 2).exp() * eps
            wanted -= float(torch.log_softmax(nu, 0)[1].sum()) / 3
        assert abs(got / wanted - 1) < 1e-6, start


# ---- autograd, compile, streams of calls ----


def operation(name):
    """Return a function of (backend, tensors), and tensors, for an entry of the table of operations."""
    kind, _, reduction = name.partition("-")
    entry, shape = OPERATIONS[kind], (2, 3, 4, 5)
    arguments = entry.arguments(shape, **{**entry.typical, **({"reduction": reduction} if reduction else {})})
    return (lambda backend, tensors: entry.bind(backend, arguments)(**tensors)), entry.inputs(shape)


@pytest.mark.parametrize(
    "name", ["cross_entropy-mean", "vls_cross_entropy-mean", "vls_elbo-none", "sample_soft_labels"]
)
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_upstream_gradient(name, factor):
    """Scaled upstream gradients, and two backward passes through a kept graph, give the same gradients each time."""
    call, tensors = operation(name)
    weights = lambda v: (torch.arange(v.numel()) % 7 - 2.5).view(v.shape)  # noqa: E731
    leaves = {k: t.float().requires_grad_() for k, t in tensors.items()}
    value = call("triton", leaves)
    loss = (value * weights(value)).sum() * factor
    loss.backward(retain_graph=True)
    first = {k: t.grad.clone() for k, t in leaves.items()}
    loss.backward()
    wide = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    value = call("reference", wide)
    ((value * weights(value)).sum() * factor).backward()
    for k, t in leaves.items():
        assert_accurate(first[k], wide[k].grad, ulps=ULPS, what=k)
        assert_accurate(t.grad, 2 * wide[k].grad, ulps=ULPS, what=k)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


LOSSES = [f"{name}-{reduction}" for name, entry in OPERATIONS.items() if entry.result == "loss"
          for reduction in REDUCTIONS]  # fmt: skip
TOTALS = [name for name, entry in OPERATIONS.items() if entry.result == "total"]


@pytest.mark.parametrize("name", [*LOSSES, *TOTALS])
def test_scale(name):
    """A power of two as the scale, a number or a tensor, multiplies loss and gradients exactly."""
    kind, _, reduction = name.partition("-")
    entry, shape = OPERATIONS[kind], (2, 3, 4, 5)
    options = {**entry.typical, **({"reduction": reduction} if reduction else {})}
    results = []
    for scale in (1.0, -0.5, torch.tensor(-0.5, dtype=torch.bfloat16)):
        arguments = entry.arguments(shape, torch.float32, scale=scale, **options)
        results.append(evaluate(entry.bind("triton", arguments), entry.inputs(shape, torch.float32)))
    for got in results[1:]:
        assert torch.equal(got.value, -0.5 * results[0].value)
        for key, gradient in results[0].gradients.items():
            assert torch.equal(got.gradients[key], -0.5 * gradient), key


def test_nothing_waits_for_the_host(monkeypatch):
    """No operation reads a value of a tensor, forward or backward, which would make the host wait for a GPU."""

    def refuse(*_):
        raise AssertionError("a tensor's value was asked for")

    seed, gaussians = torch.tensor(11), OPERATIONS["estimate"].inputs((2, 3, 4, 5))
    losses = [operation(name) for name in (*LOSSES, *TOTALS) if not name.endswith(("none", "sum"))]
    cases = [
        *((lambda f=f, **t: f("triton", t), tensors) for f, tensors in losses),
        (lambda mu, logvar: calseg.gaussian_kl(mu, logvar, scale=torch.tensor(0.5), backend="triton"), gaussians),
        (lambda mu, logvar: calseg.accumulate_soft_labels((mu, logvar), backend="triton").sum(), gaussians),
        (lambda mu, logvar: calseg.sample_soft_labels(mu, logvar, seed=seed, backend="triton").sum(),
         gaussians),
    ]  # fmt: skip
    prepared = [(f, {k: t.float().requires_grad_() for k, t in tensors.items()}) for f, tensors in cases]
    for name in ("item", "__bool__", "__int__", "__float__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for function, leaves in prepared:
        torch.autograd.grad(function(**leaves), list(leaves.values()))


def test_reuse_logits():
    shape = (2, 3, 4, 5)
    target, x = labels(shape, ignore_index=-100), scores(2, 3, 4, 5, dtype=torch.float32).requires_grad_()
    logits = x + 0.0
    seen = []
    logits.register_hook(seen.append)
    calseg.vls_cross_entropy(logits, target, reuse_logits=True, backend="triton").backward()
    assert seen[0].data_ptr() == logits.data_ptr()
    wanted = torch.autograd.grad(calseg.vls_cross_entropy(x, target, backend="triton"), x)[0]
    assert_accurate(x.grad, wanted, ulps=4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile instantiates the autograd.Function itself
@pytest.mark.parametrize(
    "name",
    ["cross_entropy-mean", "vls_cross_entropy-mean", "vls_elbo-mean", "sample_soft_labels", "accumulate_soft_labels"],
)
def test_compiled(name):
    """torch.compile(fullgraph=True) calls the same kernels."""
    torch._dynamo.reset()
    function, tensors = operation(name)
    tensors = {k: t.float() for k, t in tensors.items()}
    call = lambda **t: function("triton", t)  # noqa: E731
    eager = evaluate(lambda **t: call(**t).square().sum(), tensors)
    quick = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = evaluate(lambda **t: quick(**t).square().sum(), tensors)
    assert_accurate(got.value, eager.value, ulps=4)
    for key, gradient in got.gradients.items():
        assert_accurate(gradient, eager.gradients[key], ulps=8, what=key)
    torch._dynamo.reset()


@pytest.mark.parametrize("capturing", [True, False])
def test_a_failing_first_launch_in_a_capture_says_what_to_do(monkeypatch, capturing):
    class Kernel:
        fn = test_seeds

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                raise RuntimeError("operation not permitted when stream is capturing")

            return launch

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    like = SimpleNamespace(device=torch.device("cpu"), is_cuda=True, get_device=lambda: -1)
    message = (
        "test_seeds: the launch failed while a CUDA graph is captured. Run the step once" if capturing else "^oper"
    )
    with pytest.raises(RuntimeError, match=message):
        launch.launch_kernel(Kernel(), 1, like, (), 4)


# ---- the choice of the backend ----


def on(device, dtype=torch.float32):
    """Return an object that looks like a tensor on an absent device."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_the_backend_of_a_gpu(monkeypatch):
    """The backend is Triton if it can compute the call, else the reference. One warning says what to install."""
    for device in ("cuda", "cuda:3", "xpu"):
        assert choice.choose(on(device), None) == choice.choose(on(device), "triton") == "triton"
        assert choice.choose(on(device, torch.float64), None) == "reference"
        assert choice.choose(on(device, torch.float64), "triton") == "reference"
        assert choice.choose(on(device), "reference") == "reference"
    assert choice.choose(on("mps"), None) == "reference"
    with pytest.raises(ValueError, match="backend='triton': got a tensor on mps, wanted one on a GPU"):
        choice.choose(on("mps"), "triton")
    with monkeypatch.context() as patch:
        patch.setattr(choice, "is_interpreted", lambda scores: False)
        with pytest.raises(ValueError, match="got a tensor on cpu, wanted one on a GPU"):
            choice.choose(torch.zeros(1), "triton")
    monkeypatch.setattr(choice, "TRITON_ERROR", "Triton is not installed: pip install triton")
    monkeypatch.setattr(choice, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"pip install triton; on cuda the slow reference backend is used") as seen:
        assert choice.choose(on("cuda"), None) == choice.choose(on("cuda"), None) == "reference"
    assert len(seen) == 1
    with pytest.raises(RuntimeError, match="backend='triton': Triton is not installed"):
        choice.choose(on("cuda"), "triton")


def test_float64_takes_the_reference():
    x, target = scores(2, 3, 5), labels((2, 3, 5))
    got = calseg.vls_cross_entropy(x, target, backend="triton")
    assert torch.equal(got, calseg.vls_cross_entropy(x, target, backend="reference"))


def test_an_old_triton_is_none(monkeypatch):
    monkeypatch.setattr(installation.metadata, "version", lambda _: "3.1.0+git")
    assert "Triton 3.1.0+git is too old: pip install 'triton>=3.6'" in str(installation._triton_error())


# ---- launches ----

KINDS = {"HARD": (66, 32, 64), "WEIGHTED": (32, 32, 16), "SOFT": (32, 16, 16), "SAMPLED": (16, 8, 16)}


def geometry_of(C, S, layout):
    strides = {"first": (C * S, S, 1), "last": (C * S, 1, C), "odd": (C * S, S, 1)}[layout]
    return Geometry(2, C, S, [strides], [])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layout", ["first", "last", "odd"])
def test_tiles(name, layout):
    """Tiles are powers of two that fit registers, have rows of whole sectors, and state true alignments."""
    kind = {"HARD": HARD, "WEIGHTED": WEIGHTED, "SOFT": SOFT, "SAMPLED": SAMPLED}[name]
    held, fill, spread = KINDS[name]
    for C, itemsize in product((*range(1, 70), 100, 117, 128, 129, 500, 513, 1000, 5000, 50000), (2, 4)):
        S = 4095 if layout == "odd" else 4096
        geometry = geometry_of(C, S, layout)
        tile, warps = launch.choose_tile(kind, geometry, itemsize)
        for number in (tile.BLOCK_C, tile.TILE, tile.VEC_C, tile.VEC_S, warps):
            assert number > 0
            assert number & (number - 1) == 0
        assert warps <= 16
        # one class has no layout; noise comes in fours, of classes or of samples, and all of a quad are held
        in_one_thread = (layout != "last" or C == 1) and held >= C
        rows = -(-C // 4) * 4 if in_one_thread and name == "SAMPLED" else min(C, tile.BLOCK_C)
        elements = rows * tile.TILE / (32 * warps)
        assert elements <= (held if in_one_thread else spread), (C, tile, warps)
        assert not in_one_thread or 2 * elements > fill or 32 * warps * launch.MAX_VOXELS == tile.TILE
        if C > tile.BLOCK_C:  # blocks only where nothing else is possible
            thin = {"SAMPLED": 8, "HARD": 16 if layout == "last" else spread}
            assert 16 * 32 * thin.get(name, spread) == tile.BLOCK_C * tile.TILE
        if layout != "last" or C == 1:
            assert tile.TILE * itemsize >= 32
            assert S % tile.ALIGN_C == 0
            assert tile.VEC_S * itemsize <= 16
            if layout == "first" and name != "SAMPLED" and not held // 2 < C <= held:
                assert tile.VEC_S > 1
            if layout == "odd" or name == "SAMPLED":
                assert tile.VEC_S == 1
        else:
            assert C % tile.ALIGN_S == 0
            assert max(1, tile.ALIGN_S) >= tile.VEC_C
        if name == "SAMPLED" and C > 2:
            assert tile.BLOCK_C >= 4


@pytest.mark.parametrize("name", ["OVERLAP", "SLOPES"])
@pytest.mark.parametrize("layout", ["first", "last", "odd"])
def test_tiles_of_the_overlap(name, layout):
    """Few voxels of many classes, or the other way round: a thread also holds numbers of each of its classes."""
    kind = getattr(launch, name)
    for C, itemsize in product((*range(2, 70), 100, 117, 128, 129, 500, 1000, 5000), (2, 4)):
        tile, warps = launch.choose_tile(kind, geometry_of(C, 4095 if layout == "odd" else 4096, layout), itemsize)
        for number in (tile.BLOCK_C, tile.TILE, tile.VEC_C, tile.VEC_S, tile.GROUPS, warps):
            assert number > 0
            assert number & (number - 1) == 0
        assert warps <= 16
        assert tile.TILE % (tile.VEC_S * tile.GROUPS) == 0
        assert tile.TILE * itemsize >= 32 or layout == "last"
        elements = tile.BLOCK_C * tile.TILE / (32 * warps)
        if layout != "last" and kind.classes >= C:
            assert tile.TILE == 128 * tile.VEC_S * tile.GROUPS
            at_once = C * tile.VEC_S
            assert at_once <= kind.held, (C, tile, warps)
        else:
            assert elements <= kind.spread, (C, tile, warps)
            assert layout == "last" or elements / tile.VEC_S <= kind.spread / kind.adjacent, (C, tile, warps)
        if layout == "first":
            assert tile.VEC_S > 1 or kind.held // 2 < C <= kind.classes


def test_alignment():
    assert launch.common_alignment(64, 16, 8) == 8
    assert launch.common_alignment(0, 32) == 16
    assert launch.common_alignment(36, 12) == 4
    assert launch.common_alignment(7) == 1


# ---- machine code ----

# The registers a thread may take, by operation, over all classes and layouts here: see benchmarks/notes.md.
REGISTERS = {
    "cross_entropy": 184, "weighted_cross_entropy": 128, "soft_cross_entropy": 168, "vls_cross_entropy": 240,
    "vls_elbo": 208, "gaussian_kl": 128, "sample_soft_labels": 136, "accumulate_soft_labels": 96, "scale_gradients": 64,
    "calibration_bins": 248, "hard_overlap": 208, "soft_overlap": 168, "sampled_overlap": 240,
}  # fmt: skip
COMPILED = [
    *({"operation": "cross_entropy", "C": C} for C in (2, 4, 14, 33, 117)),
    *({"operation": "cross_entropy", "C": C, "dtype": "bfloat16"} for C in (4, 14)),
    *({"operation": "cross_entropy", "C": 4, "layout": layout} for layout in ("odd", "channels_last")),
    {"operation": "cross_entropy", "C": 14, "gradient": False},
    *({"operation": "weighted_cross_entropy", "C": C} for C in (4, 14)),
    {"operation": "soft_cross_entropy", "C": 14},
    *({"operation": "vls_cross_entropy", "C": C} for C in (2, 4, 14, 33, 117)),
    {"operation": "vls_cross_entropy", "C": 4, "layout": "channels_last"},
    {"operation": "vls_elbo", "C": 14},
    {"operation": "vls_elbo", "C": 600, "architectures": [90]},
    {"operation": "gaussian_kl", "C": 14},
    {"operation": "sample_soft_labels", "C": 14},
    {"operation": "accumulate_soft_labels", "C": 14},
    # no label is ignored
    *(
        {"operation": operation, "C": 14, "ignore_index": -100}
        for operation in ("cross_entropy", "soft_cross_entropy", "sample_soft_labels", "accumulate_soft_labels")
    ),
    *({"operation": "calibration_bins", "C": C} for C in (2, 14, 117)),
    {"operation": "calibration_bins", "C": 14, "layout": "channels_last"},
    {"operation": "calibration_bins", "C": 4, "dtype": "bfloat16"},
    {"operation": "scale_gradients", "C": 4, "dtype": "bfloat16"},
    *({"operation": operation, "C": C} for operation in OVERLAPS for C in (2, 4, 14, 33, 117)),
    *({"operation": operation, "C": 4, "dtype": "bfloat16"} for operation in OVERLAPS),
    *({"operation": operation, "C": 4, "layout": "channels_last"} for operation in OVERLAPS),
]
OPTIONS = {"dtype", "layout", "gradient", "ignore_index"}
# Cases that may take all registers of a thread, by (Triton, operation, C). They must not spill either.
ALL_REGISTERS = {("3.6", "hard_overlap", 33), ("3.6", "hard_overlap", 117), ("3.9", "hard_overlap", 117)}
# Bytes of stack a thread, by (Triton, kernel, C, layout, architecture), summed over a case. All others have none.
SPILLS = {
    ("3.7", "sample_statistics", 600, None, 90): 16,
    ("3.7", "calibration_bins", 14, "channels_last", 80): 8,
    ("3.7", "calibration_bins", 14, "channels_last", 90): 8,
}


def compile_ahead_of_time(cases):
    """Return the rows of ahead_of_time.py, from a process in which Triton compiles. In this one it interprets."""
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(here / "ahead_of_time.py")], input="\n".join(map(json.dumps, cases)), env=environment,
        capture_output=True, text=True, check=False, cwd=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def machine_code():
    return compile_ahead_of_time(COMPILED)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case.values())))
def test_nothing_spills(machine_code, case):
    """No kernel spills registers on sm_80 and sm_90, and none needs more registers than stated."""
    rows = [row for row in machine_code if all(row.get(key) == value for key, value in case.items()
                                               if key != "architectures")]  # fmt: skip
    rows = [row for row in rows if len(OPTIONS & row.keys()) == len(OPTIONS & case.keys())]
    assert {row["architecture"] for row in rows} == set(case.get("architectures", (80, 90)))
    version = ".".join(triton.__version__.split(".")[:2])
    spills = Counter()
    for row in rows:
        assert row["local"] == 0, row
        takes_all = (version, case["operation"], case["C"]) in ALL_REGISTERS
        assert takes_all or row["registers"] <= REGISTERS[case["operation"]], row
        spills[version, row["kernel"], row["C"], row.get("layout"), row["architecture"]] += row["stack"]
    for key, stack in spills.items():
        assert stack <= SPILLS.get(key, 0), (key, rows)


@pytest.mark.timeout(900)
def test_wide_loads(machine_code):
    """Loads and stores have 16 bytes per thread if the alignment allows it, and 4 with an odd number of voxels.

    Where the classes of a voxel are spread over threads, they have two voxels.
    """

    def widest(**case):
        (row,) = (
            row
            for row in machine_code
            if row["architecture"] == 90
            and row["kernel"] == "hard_cross_entropy"
            and all(row.get(k) == v for k, v in {**dict.fromkeys(OPTIONS), **case}.items())
        )
        return {kind: any(".v4.b32" in m or ".v2.b64" in m for m in row["memory"] if m.startswith(kind))
                for kind in ("ld", "st")}  # fmt: skip

    assert widest(operation="cross_entropy", C=4) == {"ld": True, "st": True}
    assert widest(operation="cross_entropy", C=14) == {"ld": True, "st": True}
    assert widest(operation="cross_entropy", C=117) == {"ld": False, "st": False}
    assert widest(operation="cross_entropy", C=4, dtype="bfloat16") == {"ld": True, "st": True}
    assert widest(operation="cross_entropy", C=4, layout="channels_last") == {"ld": True, "st": True}
    assert widest(operation="cross_entropy", C=4, layout="odd") == {"ld": False, "st": False}


@pytest.mark.timeout(900)
def test_only_adjacent_voxels_are_loaded_at_once():
    """Labels, masks and upstream gradients are loaded one by one unless their own stride is 1.

    The scores beside them have a stride of 1 and are loaded with 16 bytes, whatever the stride of the others.
    """
    common, strides = {"C": 4, "architectures": [90]}, (0, 1, 2, 16)
    of_labels = {"cross_entropy": "hard_cross_entropy", "masked_cross_entropy": "soft_cross_entropy",
                 "calibration_bins": "calibration_bins"}  # fmt: skip
    rows = compile_ahead_of_time(
        [
            *({"operation": operation, "label_stride": n, **common} for operation in of_labels for n in strides),
            *({"operation": "cross_entropy", "upstream_stride": n, **common} for n in strides),
        ]
    )
    fours = "ld.global.v4.b32"
    for stride in strides:
        for operation, kernel in of_labels.items():
            found = [r["memory"] for r in rows if (r["kernel"], r.get("label_stride")) == (kernel, stride)]
            assert found, operation
            for memory in found:
                assert memory[fours] >= 4, (operation, memory)
                assert ("ld.global.b8" in memory) == (stride != 1), (operation, memory)
    alone, adjacent, *apart = (row["memory"][fours] for row in rows if "upstream_stride" in row)
    assert adjacent - alone == 2  # 8 voxels of float32
    assert apart == [alone, alone]
