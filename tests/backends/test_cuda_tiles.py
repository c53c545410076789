"""The CUDA kernels of Dice and cross-entropy of more classes without a GPU: their source on the CPU, and what nvcc
makes of it in the interpreter of PTX. Triton's kernels beside them run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import INTEGERS, LAYOUTS, assert_accurate, assert_matches, class_weights, evaluate, id_of, labels, scores
from cuda_cross_entropy import MARKS
from cuda_cross_entropy import library as library  # the fixtures
from cuda_cross_entropy import machine as machine
from cuda_cross_entropy import on_host as on_host
from cuda_cross_entropy import on_ptx as on_ptx
from ptx.parser import PtxError, names_of
from test_cross_entropy import EXTREMES
from test_cuda import sparse
from test_cuda_few import few as logits
from test_cuda_overlap import dice, pair, spec_of, sums_of
from test_cuda_ptx import ptx_of

from calseg import tensors
from calseg.backends import choice, cuda
from calseg.operations import LossTensors

pytestmark = MARKS

if choice.TRITON_ERROR is None:
    from calseg.kernels.launch import Geometry

    from calseg.backends import triton as engine

HALVES = (torch.bfloat16, torch.float16)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=id_of)


PARTS = (6, 20, 35)  # classes of which four, two and one parts are in shared memory at once


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = ptx_of("overlap_tiles", tmp_path_factory)
    assert len(names_of(text)) == 12  # two passes; two dtypes; 1, 2 and 4 parts
    return text


# ---- values and gradients ----


@every_half
@pytest.mark.parametrize("C", [5, 8, 14, 16, 17, 32, 33, 64, 117, 128])
def test_classes(machine, C, dtype):
    """Two items, each with a full tile and an incomplete one, some labels ignored."""
    shape = (2, C, 1024 + 72)
    x, target = logits(*shape, dtype=dtype), labels(shape, ignore_index=-100)
    assert_matches(*pair(target), x, ulps=16, grad_scale=1e-3)
    if C < 20:
        options = {"reduction": "sum", "batch_dice": True, "include_background": True}
        assert_matches(*pair(target, **options), x, ulps=16, grad_scale=1e-3)
    assert machine.launches == [4] * (4 if C < 20 else 2)


@pytest.mark.parametrize("size", [8, 24, 256, 264, 520, 1024, 1032])
def test_sizes(machine, size):
    """The last tile may be of any size that is a multiple of eight. Classes and items may lie apart."""
    for C in PARTS:
        apart = torch.full((3, C + 2, size + 16), torch.nan, dtype=torch.bfloat16)[:, 1:-1, 8 : size + 8]
        x, target = apart.copy_(scores(3, C, size)), labels((3, C, size), ignore_index=1)
        assert_matches(*pair(target, ignore_index=1), {"input": x}, ulps=16, grad_scale=0.01)
    assert machine.launches == 6 * [3 * -(-size // 1024)]


@pytest.mark.parametrize("label_dtype", INTEGERS, ids=id_of)
def test_labels(machine, label_dtype):
    """Labels of every dtype, ignored or not, with an ignored class, and one that the dtype cannot have."""
    for C, ignore_index in ((6, 100), (20, 1), (35, -1), (6, 2**40), (20, 255)):
        shape = (2, C, 72, 8)
        holds = torch.iinfo(label_dtype).min <= ignore_index <= torch.iinfo(label_dtype).max
        flat = labels(shape, ignore_index=ignore_index if holds else None)
        assert_matches(
            dice(flat.to(label_dtype), ignore_index=ignore_index), dice(flat, "reference", ignore_index=ignore_index),
            logits(*shape, dtype=torch.float16), ulps=16, grad_scale=1e-3,
        )  # fmt: skip
    assert len(machine.launches) == 10


@pytest.mark.parametrize("C", PARTS)
def test_labels_in_runs(machine, C):
    """Warps whose voxels have one class, a few, and none, as in volumes of segments."""
    target = (torch.arange(2 * 1304).view(2, 1304) // 300 * 3 % C).index_fill(1, torch.arange(700, 900), -100)
    assert_matches(*pair(target), logits(2, C, 1304, dtype=torch.bfloat16), ulps=16, grad_scale=1e-3)
    assert machine.launches == [4, 4]


@every_half
@pytest.mark.parametrize("C", PARTS)
def test_extremes(machine, C, dtype):
    """Logits of inf and NaN give the NaN that Triton's kernel gives. Where a voxel is ignored, they do not matter."""
    rows = torch.tensor([row + row[2:] * (C - 3) for row in EXTREMES] + [[0.5] * C] * 3, dtype=torch.float64)
    x = rows.to(dtype).repeat(C, 1).T[None].contiguous()  # [1, C, S]
    target = torch.arange(C).repeat_interleave(len(rows))[None]
    finite = torch.where(x.isfinite().all(1), target, -100)
    assert_matches(
        dice(finite), lambda input: dice(finite, "reference")(input.nan_to_num(0, 0, 0)), {"input": x}, ulps=16,
        grad_scale=0.01,
    )  # fmt: skip
    below = torch.where((x < torch.inf).all(1) & (x > -torch.inf).any(1), target, -100)  # some logits are -inf
    got = engine.loss_and_overlap(spec_of(below), LossTensors(x), LossTensors())[1]
    assert_accurate(got.float(), sums_of(x, below), ulps=16)
    assert dice(target)(x).isnan()
    assert len(machine.launches) == 4


@pytest.mark.parametrize("C", PARTS)
def test_largest_logits(machine, C):
    """Products of logits and log2(e) may be infinite, but not the logits."""
    large = [[3e38, -3e38, 0.0], [-3e38] * 3, [3e38, 3e38, -torch.inf], [3e38, 1.0, -2e38], [1.0, 2.0, 3.0]]
    rows = torch.tensor([row + row[2:] * (C - 3) for row in large] + [[0.5] * C] * 3, dtype=torch.float64)
    x = rows.bfloat16().T[None].contiguous()  # [1, C, S]
    assert_matches(*pair(torch.zeros(1, 8, dtype=torch.int64)), {"input": x}, ulps=16, grad_scale=0.01)
    assert machine.launches == [1, 1]


@pytest.mark.parametrize("C", PARTS)
def test_sums_of_rare_classes(machine, C):
    """Each sum is as accurate as its own size, also of a class that has no voxel and hardly any probability."""
    x, target = logits(2, C, 2048, dtype=torch.float16)["input"], labels((2, C, 2048))
    x[:, C - 1] -= 16.0
    x[1, 0] += 20.0
    target[0].clamp_(max=C - 2)
    target[1] = 0
    got, wanted = engine.loss_and_overlap(spec_of(target), LossTensors(x), LossTensors())[1], sums_of(x, target)
    assert float(wanted.min()) < 1e-3 < 2000 < float(wanted.max())
    torch.testing.assert_close(got, wanted, rtol=4e-6, atol=0)
    assert machine.launches == [4]


@every_half
def test_a_label_that_is_no_class(machine, dtype):
    """The loss and the sums of its item become NaN, and those of others do not."""
    wrongs = ((6, 6), (20, 20), (35, 35), (6, -1), (20, 200), (35, 2**31), (6, 2**32), (20, -(2**63)), (35, 256))
    for C, wrong in wrongs:
        shape = (2, C, 1040)
        x, target = logits(*shape, dtype=dtype)["input"], labels(shape, ignore_index=-100)
        target[0, 3] = wrong
        loss, sums, divisor = engine.loss_and_overlap(spec_of(target, reduction="mean"), LossTensors(x), LossTensors())
        assert loss.isnan()
        assert sums[0].isnan().all()
        assert sums[1].isfinite().all()
        assert int(divisor) == int((target != -100).sum())
        gradient, slopes = torch.empty_like(x), torch.zeros(2, C, 2, dtype=torch.float64)
        engine.overlap_backward(spec_of(target), LossTensors(x), LossTensors(gradient), slopes)
        nans = gradient.isnan()
        assert nans[0, :, 3].all()
        assert int(nans.sum()) == C
    assert len(machine.launches) == 18


def test_no_voxel_counts(machine):
    """The loss is 0 and so is the gradient, also where an infinite number multiplies it."""
    for C in PARTS:
        x, target = logits(1, C, 64, dtype=torch.bfloat16)["input"].requires_grad_(), torch.full((1, 64), -100)
        loss = dice(target)(x)
        assert float(loss.detach()) == 0.0
        assert not torch.autograd.grad(loss, x)[0].any()
        gradient, slopes = torch.full_like(x, torch.nan), torch.full((1, C, 2), torch.nan, dtype=torch.float64)
        spec = spec_of(target, scale=torch.tensor(torch.inf))
        engine.overlap_backward(spec, LossTensors(x.detach()), LossTensors(gradient), slopes)
        assert not gradient.any()
    assert machine.launches == [1] * 9


def test_the_voxels_are_counted_beside_the_loss(machine, launched):
    """No other kernel reads the labels, and the divisor is exact. Two calls give the same bits."""
    shape = (3, 6, 1800)
    x, target = logits(*shape, dtype=torch.bfloat16), labels(shape, ignore_index=-100)
    first, second = (evaluate(dice(target), x) for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.gradients["input"], second.gradients["input"])
    assert launched == 2 * ["finish_dice"]
    for reduction, wanted in {"mean": int((target != -100).sum()), "sum": 1}.items():
        spec = spec_of(target, reduction=reduction)
        assert float(engine.loss_and_overlap(spec, LossTensors(x["input"]), LossTensors())[2]) == wanted


def test_a_factor(machine):
    """A scale, weights of the terms, and the factor that backward brings."""
    shape = (2, 6, 16, 11)
    target, options = labels(shape, ignore_index=-100), {"scale": torch.tensor(0.25), "dice_weight": 2.0}
    got, wanted = (lambda input, call=call: 3 * call(input) for call in pair(target, ce_weight=0.5, **options))
    assert_matches(got, wanted, logits(*shape, dtype=torch.float16), ulps=16, grad_scale=0.01)
    assert len(machine.launches) == 2


def test_strides_past_two_to_the_31(on_host):
    """Offsets of all tensors have 64 bits."""
    shape, strides = (2, 5, 8), (2**34, 2**31 + 2**28, 1)
    extent = strides[0] + 4 * strides[1] + 8
    x, gradient = (sparse(torch.bfloat16, extent).as_strided(shape, strides) for _ in range(2))
    x.copy_(scores(*shape))
    target = sparse(torch.uint8, 2**32 + 2**31 + 8).as_strided((2, 8), (2**32 + 2**31, 1)).copy_(labels(shape))
    _, sums, _ = engine.loss_and_overlap(spec_of(target), LossTensors(x), LossTensors())
    assert_accurate(sums.float(), sums_of(x, target.long()), ulps=16)
    slopes = scores(2, 5, 2)
    engine.overlap_backward(spec_of(target), LossTensors(x), LossTensors(gradient), slopes)
    leaf = x.double().contiguous().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, target.long(), reduction="sum")
    wanted = torch.autograd.grad(loss + (sums_of(leaf, target.long()) * slopes).sum(), leaf)[0]
    assert_accurate(gradient, wanted, ulps=16)
    assert on_host.launches == [2, 2]


# ---- when they run ----


def test_what_the_kernels_take(on_host, monkeypatch):
    """Others take what begins in the wrong place, has options, or is too small. The result is the same."""
    shape = (2, 6, 8, 12)
    x, target = logits(*shape, dtype=torch.bfloat16)["input"], labels(shape)

    def launches(input: torch.Tensor = x, target: torch.Tensor = target, **options: object) -> int:
        before = len(on_host.launches)
        got, wanted = (evaluate(call, {"input": input}) for call in pair(target, **options))
        torch.testing.assert_close(got, wanted)
        return len(on_host.launches) - before

    for taken in (x, x.half(), x[:1], LAYOUTS["sliced_channels"](x), LAYOUTS["batch_inside"](x), x.flatten(2)):
        assert launches(taken, target[: len(taken)].view(len(taken), *taken.shape[2:])) == 2
    assert launches(target=target[:1].expand(2, 8, 12)) == 2
    for name in ("every_second", "odd_offset", "channels_last", "sliced_channels_last"):
        assert launches(LAYOUTS[name](x)) == 0, name
    odd = torch.cat([target.new_zeros(1), target.flatten()])[1:].view(target.shape)
    for other in (odd, target.float(), target.repeat_interleave(2, -1)[..., ::2]):
        assert launches(target=other) == 0
    assert launches(x.float()) == launches(soft_labels=x.roll(1, 1).softmax(1)) == 0
    assert launches(x[..., :7, :5].contiguous(), target[..., :7, :5]) == 0
    many = torch.cat([x] * 22, 1)
    assert launches(many[:, :128].contiguous()) == 2
    assert launches(many[:, :129].contiguous()) == 0
    assert launches(weight=class_weights(6, torch.float32)) == launches(label_smoothing=0.1) == 0
    for fewest, wanted in ((2 * 96 + 1, 0), (2 * 96, 2)):
        monkeypatch.setattr(cuda, "FEWEST_IN_TILES", fewest)
        monkeypatch.setattr(engine, "_plans", {})
        assert launches() == wanted
    monkeypatch.setattr(on_host, "CUDA_ARCHITECTURES", [], raising=False)
    assert launches() == 0


def test_geometries():
    S = 2**22
    geometry = Geometry(1, 14, S, [(0, S, 1)], [(0, 0, 1)])
    for kernel in ("overlap_tiles", "overlap_gradient_tiles"):
        assert cuda.block_voxels(kernel, geometry, 2, 1) == 1024
        assert cuda.block_voxels(kernel, geometry._replace(S=2**18), 2, 1) is None
        for other in (geometry._replace(voxels=[(0, 0, 2)]), geometry._replace(scores=[(0, 1, 14)])):
            assert cuda.block_voxels(kernel, other, 2, 1) is None


# ---- faults ----


def passes(x: torch.Tensor, target: torch.Tensor) -> list[Callable[[], object]]:
    """Return calls of the pass that adds up, and of the one that writes the gradient."""
    slopes, spec = torch.zeros(*x.shape[:2], 2, dtype=torch.float64), spec_of(target)
    return [
        lambda: engine.loss_and_overlap(spec, LossTensors(x), LossTensors()),
        lambda: engine.overlap_backward(spec, LossTensors(x), LossTensors(torch.empty_like(x)), slopes),
    ]


@pytest.mark.parametrize("backward", [False, True])
def test_a_missing_barrier(on_ptx, backward):
    """Without the barriers of the block there is a race."""
    call = passes(logits(1, 35, 1024, dtype=torch.bfloat16)["input"], labels((1, 35, 1024)))[backward]
    on_ptx.assert_found((r"bar\.sync \s*0;", ";"), call, match="race in shared memory")


def test_a_missing_mask(on_ptx, monkeypatch):
    """Eight voxels too many are an access past the end, in both passes."""
    x, target = logits(1, 6, 64, dtype=torch.bfloat16)["input"], labels((1, 6, 64))
    monkeypatch.setattr(tensors, "shape_of", lambda scores: (1, 6, 72))
    places = {"overlap": (torch.empty(1, 6, 2), None), "gradient": (None, torch.zeros(1, 6, 2, dtype=torch.float64))}
    for overlap, slopes in places.values():
        given = None if slopes is None else torch.empty_like(x)
        with pytest.raises(PtxError, match="past the end of a tensor"):
            on_ptx.cuda_cross_entropy(
                LossTensors(x), spec_of(target), LossTensors(given), None, None, None, None, torch.empty(1), None,
                overlap, slopes, 1, 0, 0,
            )  # fmt: skip


# name -> what stands in the PTX, and what takes its place
FAULTS = {
    "the slope below": (r"sub\.f64", "add.f64"),
    "lanes": (r"shfl\.sync\.bfly", "shfl.sync.down"),
    "sums of labels": (r"redux\.sync\.add", "redux.sync.min"),
    "exponentials": ("0f3FB8AA3B", "0f3F800000"),
    "units of 1 - p": ("0f4A000000", "0f49800000"),
    "the wait for copies": (r"cp\.async\.wait_all;", ";"),
    "the largest logit": (r"max\.bf16x2", "and.b32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(on_ptx, fault):
    """A wrong instruction changes the results, and the comparison with the reference finds it."""
    target, x = labels((2, 6, 1032), ignore_index=-100), logits(2, 6, 1032, dtype=torch.bfloat16)
    x["input"] += 100.0
    compare = lambda: assert_matches(*pair(target), x, ulps=16, grad_scale=1e-3)  # noqa: E731
    on_ptx.assert_found(FAULTS[fault], compare, (AssertionError, PtxError))
