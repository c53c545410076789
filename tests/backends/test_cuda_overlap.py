"""The CUDA kernels of Dice and cross-entropy of few classes without a GPU: their source on the CPU, and what nvcc makes
of it in the interpreter of PTX. Triton's kernels beside them run in Triton's interpreter.
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
from test_cuda_few import every_dtype, every_layout, every_number, few
from test_cuda_ptx import ptx_of

import calseg
from calseg import tensors
from calseg.backends import choice, cuda
from calseg.operations import Labels, LossSpec, LossTensors

pytestmark = MARKS

if choice.TRITON_ERROR is None:
    from calseg.kernels.launch import Geometry

    from calseg.backends import triton as engine


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = ptx_of("overlap_few", tmp_path_factory)
    assert len(names_of(text)) == 36  # two passes; three dtypes; 2, 3 and 4 classes, adjacent or not
    return text


def dice(target: torch.Tensor, backend: str = "triton", **options: object) -> Callable[..., torch.Tensor]:
    return lambda input: calseg.vls_dice_cross_entropy(input, target, backend=backend, **options)


def pair(target: torch.Tensor, **options: object) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    return dice(target, **options), dice(target, "reference", **options)


def blocks_of(items: int, C: int, size: int, dtype: torch.dtype) -> list[int]:
    """Return the blocks of the pass that adds up, and of the one that writes the gradient."""
    tile = cuda.FEW_THREADS * 16 // dtype.itemsize
    return [items * -(-size // (tile * cuda.FEW_GROUPS[C])), items * -(-size // tile)]


def spec_of(target: torch.Tensor, **options: object) -> LossSpec:
    return LossSpec("cross_entropy", Labels(target, -100), None, "sum", torch.float32)._replace(**options)


# ---- values and gradients ----


@every_layout
@every_dtype
@every_number
def test_classes(machine, C, dtype, layout):
    """Two items, each with a full tile and an incomplete one, some labels ignored."""
    size = 8192 // dtype.itemsize + 536
    shape = (2, C, size)
    target = labels(shape, ignore_index=-100)
    for options in ({}, {"reduction": "sum", "batch_dice": True, "include_background": True}):
        assert_matches(*pair(target, **options), few(*shape, dtype=dtype, layout=layout), ulps=16, grad_scale=1e-3)
    assert machine.launches == 2 * blocks_of(2, C, size, dtype)


@pytest.mark.parametrize("size", [8, 24, 512, 520, 1024, 2056])
def test_sizes(machine, size):
    """The last tile may be of any size that is a multiple of eight. Classes and items may lie apart."""
    wanted = []
    for dtype in (torch.float32, torch.bfloat16):
        for C in cuda.FEW_CLASSES:
            planes = torch.full((3, C + 2, size + 16), torch.nan, dtype=dtype)[:, 1:-1, 8 : size + 8]
            rows = torch.full((3, size + 16, C), torch.nan, dtype=dtype)[:, 8 : size + 8].movedim(-1, 1)
            for apart in (planes, rows):
                x, target = apart.copy_(scores(3, C, size)), labels((3, C, size), ignore_index=1)
                assert_matches(*pair(target, ignore_index=1), {"input": x}, ulps=16, grad_scale=0.01)
                wanted += blocks_of(3, C, size, dtype)
    assert machine.launches == wanted


@pytest.mark.parametrize("label_dtype", INTEGERS, ids=id_of)
def test_labels(machine, label_dtype):
    """Labels of every dtype, ignored or not, with an ignored class, and one that the dtype cannot have."""
    for C, ignore_index in ((2, 100), (3, 1), (4, -1), (2, 2**40), (3, 255)):
        shape = (2, C, 72, 20)
        holds = torch.iinfo(label_dtype).min <= ignore_index <= torch.iinfo(label_dtype).max
        flat = labels(shape, ignore_index=ignore_index if holds else None)
        target = flat.to(label_dtype)
        for dtype in (torch.float32, torch.float16):
            assert_matches(
                dice(target, ignore_index=ignore_index), dice(flat, "reference", ignore_index=ignore_index),
                few(*shape, dtype=dtype), ulps=16, grad_scale=1e-3,
            )  # fmt: skip
    assert len(machine.launches) == 20


@every_layout
@every_dtype
@every_number
def test_extremes(machine, C, dtype, layout):
    """Logits of inf and NaN give the NaN that Triton's kernel gives. Where a voxel is ignored, they do not matter."""
    rows = torch.tensor([[*row, -1.0][-C:] for row in EXTREMES] + [[0.5] * C] * 3, dtype=torch.float64)
    x = LAYOUTS[layout](rows.to(dtype).repeat(C, 1).T[None])  # [1, C, S]
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


def sums_of(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the sums of the overlap in float64."""
    counted = (target != -100)[:, None]
    p = torch.softmax(torch.where(counted, x.double(), 0.0), 1)
    y = torch.nn.functional.one_hot(target.clamp(min=0), x.shape[1]).movedim(-1, 1)
    return torch.stack([torch.where(counted, part, 0.0).flatten(2).sum(2) for part in (p + y, (p - y).abs())], 2)


@every_number
def test_sums_of_rare_classes(machine, C):
    """Each sum is as accurate as its own size, also of a class that has no voxel and hardly any probability."""
    x, target = few(2, C, 4096)["input"], labels((2, C, 4096))
    x[:, C - 1] -= 16.0
    x[1, 0] += 12.0
    target[0].clamp_(max=C - 2)
    target[1] = 0
    got, wanted = engine.loss_and_overlap(spec_of(target), LossTensors(x), LossTensors())[1], sums_of(x, target)
    assert float(wanted.min()) < 1e-3 < 4000 < float(wanted.max())
    torch.testing.assert_close(got, wanted, rtol=4e-6, atol=0)
    assert machine.launches == [blocks_of(2, C, 4096, torch.float32)[0]]


@every_layout
@every_dtype
def test_a_label_that_is_no_class(machine, dtype, layout):
    """The loss and the sums of its item become NaN, and those of others do not."""
    for C, wrong in ((2, 2), (3, 3), (4, 4), (2, -1), (3, 7), (4, 2**31), (2, 2**32), (3, -(2**63)), (4, 256)):
        shape = (2, C, 1040)
        x, target = few(*shape, dtype=dtype, layout=layout)["input"], labels(shape, ignore_index=-100)
        target[0, 3] = wrong
        loss, sums, divisor = engine.loss_and_overlap(spec_of(target, reduction="mean"), LossTensors(x), LossTensors())
        assert loss.isnan()
        assert sums[0].isnan().all()
        assert sums[1].isfinite().all()
        assert int(divisor) == int((target != -100).sum())
        assert evaluate(dice(target), {"input": x}).gradients["input"].isnan().any()
    assert len(machine.launches) == 27


@every_layout
def test_no_voxel_counts(machine, layout):
    """The loss is 0 and so is the gradient, also where an infinite number multiplies it."""
    for C in cuda.FEW_CLASSES:
        x, target = few(1, C, 64, layout=layout)["input"].requires_grad_(), torch.full((1, 64), -100)
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
    shape = (3, 3, 4800)
    x, target = few(*shape), labels(shape, ignore_index=-100)
    first, second = (evaluate(dice(target), x) for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.gradients["input"], second.gradients["input"])
    assert launched == 2 * ["finish_dice"]
    divisors = {"mean": int((target != -100).sum()), "sum": 1}
    for reduction, wanted in divisors.items():
        spec = spec_of(target, reduction=reduction)
        assert float(engine.loss_and_overlap(spec, LossTensors(x["input"]), LossTensors())[2]) == wanted
    unlabelled = spec_of(target.clamp(min=0).byte(), reduction="mean")
    assert float(engine.loss_and_overlap(unlabelled, LossTensors(x["input"]), LossTensors())[2]) == 3 * 4800


def test_a_factor(machine):
    """A scale, weights of the terms, and the factor that backward brings."""
    shape = (2, 4, 16, 11)
    target, options = labels(shape, ignore_index=-100), {"scale": torch.tensor(0.25), "dice_weight": 2.0}
    got, wanted = (lambda input, call=call: 3 * call(input) for call in pair(target, ce_weight=0.5, **options))
    assert_matches(got, wanted, few(*shape), ulps=16, grad_scale=0.01)
    assert len(machine.launches) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=id_of)
def test_strides_past_two_to_the_31(on_host, dtype):
    """Offsets of all tensors have 64 bits."""
    shape, strides = (2, 3, 8), (2**33 + 2**30, 2**31 + 2**28, 1)
    extent = strides[0] + 2 * strides[1] + 8
    x, gradient = (sparse(dtype, extent).as_strided(shape, strides) for _ in range(2))
    x.copy_(scores(*shape))
    target = sparse(torch.uint8, 2**32 + 2**31 + 8).as_strided((2, 8), (2**32 + 2**31, 1)).copy_(labels(shape))
    _, sums, _ = engine.loss_and_overlap(spec_of(target), LossTensors(x), LossTensors())
    assert_accurate(sums.float(), sums_of(x, target.long()), ulps=16)
    slopes = scores(2, 3, 2)
    engine.overlap_backward(spec_of(target), LossTensors(x), LossTensors(gradient), slopes)
    leaf = x.double().contiguous().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, target.long(), reduction="sum")
    wanted = torch.autograd.grad(loss + (sums_of(leaf, target.long()) * slopes).sum(), leaf)[0]
    assert_accurate(gradient, wanted, ulps=16)
    assert on_host.launches == [2, 2]


def test_more_than_two_to_the_31_voxels(on_host):
    """The last block of a large item takes its last voxels."""
    size = 2**31 + 2**10 + 80
    x, target = sparse(torch.bfloat16, 2 * size).view(1, 2, size), sparse(torch.uint8, size).view(1, size)
    x[..., -80:] = scores(1, 2, 80).to(torch.bfloat16)
    target[:, -3:] = 1
    blocks = -(-size // 4096)
    partials, overlap = sparse(torch.float32, 2 * blocks), sparse(torch.float32, 4 * blocks).view(blocks, 2, 2)
    on_host.library.set_blocks(blocks - 1, 2**32 - 1)
    try:
        on_host.cuda_cross_entropy(
            LossTensors(x), spec_of(target), LossTensors(), None, None, None, None, partials, partials[blocks:],
            overlap, None, blocks, 0, 0,
        )  # fmt: skip
    finally:
        on_host.library.set_blocks(0, 2**32 - 1)
    last = slice((blocks - 1) * 4096, None)
    chosen = x[..., last].double(), target[:, last].long()
    loss = torch.nn.functional.cross_entropy(*chosen, reduction="sum")
    assert_accurate(partials[blocks - 1], loss, ulps=8)
    assert float(partials[-1]) == size - (blocks - 1) * 4096
    assert_accurate(overlap[-1:], sums_of(*chosen), ulps=16)


# ---- when they run ----


def test_what_the_kernels_take(on_host, monkeypatch):
    """Others take what begins in the wrong place, has options, or is too small. The result is the same."""
    shape = (2, 3, 8, 12)
    x, target = few(*shape)["input"], labels(shape)

    def launches(input: torch.Tensor = x, target: torch.Tensor = target, **options: object) -> int:
        before = len(on_host.launches)
        got, wanted = (evaluate(call, {"input": input}) for call in pair(target, **options))
        torch.testing.assert_close(got, wanted)
        return len(on_host.launches) - before

    last = LAYOUTS["channels_last"](x)
    for taken in (x, x[:1], LAYOUTS["sliced_channels"](x), LAYOUTS["batch_inside"](x), x.flatten(2), last):
        assert launches(taken, target[: len(taken)].view(len(taken), *taken.shape[2:])) == 2
    assert launches(last.movedim(1, -1).reshape(-1, 3), target.flatten()) == 2
    assert launches(target=torch.cat([target[:1], target]).byte()[1:]) == 2
    assert launches(target=target[:1].expand(2, 8, 12)) == 2
    for name in ("every_second", "odd_offset", "sliced_channels_last"):
        assert launches(LAYOUTS[name](x)) == 0, name
    odd = torch.cat([target.new_zeros(1), target.flatten()])[1:].view(target.shape)
    for other in (odd, target.float(), target.repeat_interleave(2, -1)[..., ::2]):
        assert launches(target=other) == 0
    assert launches(x.double()) == launches(soft_labels=x.roll(1, 1).softmax(1)) == 0
    small = x[..., :7, :5], target[..., :7, :5]
    assert launches(small[0].contiguous(), small[1]) == launches(LAYOUTS["channels_last"](small[0]), small[1]) == 0
    five = torch.cat([x, x[:, :2]], 1)
    assert launches(five) == launches(LAYOUTS["channels_last"](five)) == 0
    assert launches(weight=class_weights(3, torch.float32)) == launches(label_smoothing=0.1) == 0
    for most, wanted in ((2 * 96, 0), (2 * 96 - 1, 2)):
        monkeypatch.setattr(cuda, "AT_ONCE_VOXELS", most)
        monkeypatch.setattr(engine, "_plans", {})
        assert launches() == wanted
    monkeypatch.setattr(on_host, "CUDA_ARCHITECTURES", [], raising=False)
    assert launches() == 0


def test_geometries():
    S = 2**22
    for C, groups in cuda.FEW_GROUPS.items():
        geometry = Geometry(1, C, S, [(0, S, 1)], [(0, 0, 1)])
        assert cuda.block_voxels("overlap", geometry, 2, 1) == 1024 * groups
        assert cuda.block_voxels("overlap_gradient", geometry, 4, 1) == 512
        strided = geometry._replace(voxels=[(0, 0, 2)])
        rows = strided._replace(scores=[(0, 1, C)])  # for the kernel of rows, if there were no overlap
        assert cuda.block_voxels("overlap", strided, 4, 1) is cuda.block_voxels("overlap", rows, 4, 1) is None


def test_wrong_calls(on_host):
    """The plan refuses what the kernels cannot take."""
    x, target = LAYOUTS["channels_last"](few(1, 5, 40)["input"]), labels((1, 5, 40))
    places = {"overlap": (torch.empty(1, 5, 2), None), "gradient": (None, torch.empty(1, 5, 2, dtype=torch.float64))}
    for overlap, slopes in places.values():
        with pytest.raises(RuntimeError, match="wanted few classes, or planes of 16 bits, beside an overlap"):
            on_host.cuda_cross_entropy(
                LossTensors(x), spec_of(target), LossTensors(x.clone()), None, None, None, None, torch.empty(1), None,
                overlap, slopes, 1, 0, 0,
            )  # fmt: skip


# ---- faults ----


BARRIERS = {
    "sums": (r"bar\.sync \s*0", False),
    "slopes": (r"bar\.sync \s*0", True),
    "rows": (r"bar\.warp\.sync \s*-1", True),
}


@pytest.mark.parametrize("place", BARRIERS)
def test_a_missing_barrier(on_ptx, place):
    """Without the barriers of the block, or that of the warps where rows are stored, there is a race."""
    (barrier, backward), shape = BARRIERS[place], (1, 2, 1024)
    x, spec = LossTensors(few(*shape, layout="channels_last")["input"]), spec_of(labels(shape))

    def call() -> None:
        if backward:
            gradients = LossTensors(torch.empty_like(x.like()))
            engine.overlap_backward(spec, x, gradients, torch.zeros(1, 2, 2, dtype=torch.float64))
        else:
            engine.loss_and_overlap(spec, x, LossTensors())

    on_ptx.assert_found((barrier + ";", ";"), call, match="race in shared memory")


def test_a_missing_mask(on_ptx, monkeypatch):
    """Eight voxels too many are an access past the end, in both passes."""
    places = {"overlap": (torch.empty(1, 2, 2), None), "gradient": (None, torch.zeros(1, 2, 2, dtype=torch.float64))}
    monkeypatch.setattr(tensors, "shape_of", lambda scores: (1, 2, 72))
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            x, target = few(1, 2, 64, dtype=dtype, layout=layout)["input"], labels((1, 2, 64))
            for overlap, slopes in places.values():
                given = None if slopes is None else torch.empty_like(x)
                with pytest.raises(PtxError, match="past the end of a tensor"):
                    on_ptx.cuda_cross_entropy(
                        LossTensors(x), spec_of(target), LossTensors(given), None, None, None, None, torch.empty(1),
                        None, overlap, slopes, 1, 0, 0,
                    )  # fmt: skip


# name -> what stands in the PTX, and what takes its place
FAULTS = {
    "the slope below": (r"sub\.f64", "add.f64"),
    "lanes": (r"shfl\.sync\.bfly", "shfl.sync.down"),
    "voxels that count": (r"redux\.sync\.add", "redux.sync.min"),
    "exponentials": ("0f3FB8AA3B", "0f3F800000"),
    "groups past the end": (r"setp\.gt\.s32", "setp.lt.s32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(on_ptx, fault):
    """A wrong instruction changes the results, and the comparison of a mean with the reference finds it."""
    target, x = labels((2, 3, 1544), ignore_index=-100), few(2, 3, 1544)
    compare = lambda: assert_matches(*pair(target), x, ulps=16, grad_scale=1e-3)  # noqa: E731
    on_ptx.assert_found(FAULTS[fault], compare, (AssertionError, PtxError))
