"""The CUDA kernel of cross-entropy of few classes without a GPU: its source on the CPU, and what nvcc makes of it in
the interpreter of PTX. Triton's kernels before and after it run in Triton's interpreter.
"""

from __future__ import annotations

import random
import re

import pytest
import torch
import torch.nn.functional as F
from cases import INTEGERS, LAYOUTS, assert_accurate, assert_matches, class_weights, id_of, labels, scores
from cuda_cross_entropy import MARKS
from cuda_cross_entropy import library as library  # the fixtures
from cuda_cross_entropy import machine as machine
from cuda_cross_entropy import on_host as on_host
from cuda_cross_entropy import on_ptx as on_ptx
from ptx.parser import PtxError, names_of
from test_cross_entropy import EXTREMES, pair
from test_cuda import sparse
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
    text = ptx_of("cross_entropy_few", tmp_path_factory)
    assert len(names_of(text)) == 18  # three dtypes; 2, 3 and 4 classes, adjacent or not
    return text


every_dtype = pytest.mark.parametrize("dtype", cuda.LOSS_DTYPES, ids=id_of)
every_number = pytest.mark.parametrize("C", cuda.FEW_CLASSES)
every_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def few(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> dict[str, torch.Tensor]:
    return {"input": LAYOUTS[layout](scores(*shape, dtype=dtype))}


def blocks_of(voxels: int, dtype: torch.dtype) -> int:
    return -(-voxels // (cuda.FEW_THREADS * 16 // dtype.itemsize))


# ---- values and gradients ----


@every_layout
@every_dtype
@every_number
def test_classes(machine, C, dtype, layout):
    """Two items, each with a full tile and an incomplete one, some labels ignored."""
    shape = (2, C, 1032)
    target = labels(shape, ignore_index=-100)
    for reduction in ("mean", "sum"):
        assert_matches(*pair(target, "triton", reduction=reduction), few(*shape, dtype=dtype, layout=layout))
    rows_of_all = layout == "channels_last"  # of both items, which follow one another
    assert set(machine.launches) == {blocks_of(2064, dtype) if rows_of_all else 2 * blocks_of(1032, dtype)}
    assert len(machine.launches) == (4 if dtype == torch.float16 else 2)  # backward of float16 computes it again


@pytest.mark.parametrize("size", [8, 24, 248, 256, 264, 512, 520, 1016, 1024, 2056])
def test_sizes(machine, size):
    """The last tile may be of any size that is a multiple of eight. Classes and items may lie apart."""
    for dtype in (torch.float32, torch.bfloat16):
        for C in cuda.FEW_CLASSES:
            planes = torch.full((3, C + 2, size + 16), torch.nan, dtype=dtype)[:, 1:-1, 8 : size + 8]
            rows = torch.full((3, size + 16, C), torch.nan, dtype=dtype)[:, 8 : size + 8].movedim(-1, 1)
            for apart in (planes, rows):
                x, target = apart.copy_(scores(3, C, size)), labels((3, C, size), ignore_index=1)
                assert_matches(*pair(target, "triton", ignore_index=1), {"input": x})
    assert machine.launches == 6 * [3 * blocks_of(size, torch.float32)] + 6 * [3 * blocks_of(size, torch.bfloat16)]


@pytest.mark.parametrize("label_dtype", INTEGERS, ids=id_of)
def test_labels(machine, label_dtype):
    """Labels of every dtype, ignored or not, with an ignored class, and one that the dtype cannot have."""
    for C, ignore_index in ((2, 100), (3, 1), (4, -1), (2, 2**40), (3, 255)):
        shape = (2, C, 8, 20)
        holds = torch.iinfo(label_dtype).min <= ignore_index <= torch.iinfo(label_dtype).max
        flat = labels(shape, ignore_index=ignore_index if holds else None)
        target = flat.to(label_dtype)
        for dtype in (torch.float32, torch.float16):
            assert_matches(
                lambda input, target=target, ignore_index=ignore_index: calseg.vls_cross_entropy(
                    input, target, ignore_index=ignore_index, backend="triton"
                ),
                pair(flat, None, ignore_index=ignore_index)[1], few(*shape, dtype=dtype),
            )  # fmt: skip
    assert len(machine.launches) == 15


@every_layout
@every_dtype
@every_number
def test_extremes(machine, C, dtype, layout):
    """Logits of -inf, inf and NaN give what F.cross_entropy gives. Where a voxel is ignored, they do not matter."""
    rows = torch.tensor([[*row, -1.0][-C:] for row in EXTREMES] + [[0.5] * C] * 3, dtype=torch.float64)
    x = LAYOUTS[layout](rows.to(dtype).repeat(C, 1).T[None])  # [1, C, S]
    target = torch.arange(C).repeat_interleave(len(rows))[None]
    options = {"backend": "triton", "reduction": "sum"}
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(calseg.vls_cross_entropy(leaf, target, **options), leaf)
    wide = x.double().requires_grad_()
    losses = F.cross_entropy(wide, target, reduction="none")
    assert_accurate(got, torch.autograd.grad(losses.sum(), wide)[0], ulps=8, scale=2.0)
    for wanted in (losses.isfinite(), losses < torch.inf, losses > -torch.inf):
        chosen = torch.where(wanted, target, -100)
        value = calseg.vls_cross_entropy(x, chosen, **options)
        assert_accurate(value, losses[wanted].sum(), ulps=8)
    chosen = torch.where(x.isfinite().all(1), target, -100)
    assert_matches(
        lambda input: calseg.vls_cross_entropy(input, chosen, backend="triton"),
        lambda input: F.cross_entropy(input.nan_to_num(0, 0, 0), chosen), {"input": x},
    )  # fmt: skip
    assert len(machine.launches) >= 5


@every_layout
@every_dtype
def test_a_label_that_is_no_class(machine, dtype, layout):
    """The sum and the gradient of its voxel become NaN. Other gradients do not."""
    for C, wrong in ((2, 2), (3, 3), (4, 4), (2, -1), (3, 7), (4, 2**31), (2, 2**32), (3, -(2**63)), (4, 256)):
        shape = (1, C, 1040)
        x = few(*shape, dtype=dtype, layout=layout)["input"].requires_grad_()
        target = labels(shape, ignore_index=-100)
        target[0, 3] = target[0, 1039] = wrong
        loss = calseg.vls_cross_entropy(x, target, backend="triton")
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, x)
        for nans in (gradient.isnan().all(1), gradient.isnan().any(1)):
            assert nans.nonzero().tolist() == [[0, 3], [0, 1039]]
    assert len(machine.launches) >= 9


@every_layout
def test_no_voxel_counts(machine, layout):
    """The mean is NaN, and the gradient 0, as that of F.cross_entropy: also where an infinite number multiplies it."""
    for C in cuda.FEW_CLASSES:
        x, target = few(1, C, 64, layout=layout)["input"].requires_grad_(), torch.full((1, 64), -100)
        for scale in (1.0, torch.tensor(torch.inf)):
            loss = calseg.vls_cross_entropy(x, target, scale=scale, backend="triton")
            assert loss.isnan()
            assert not torch.autograd.grad(loss, x)[0].any()
    assert len(machine.launches) == 6


def test_a_factor_and_gradients_alone(machine):
    """The factor of the loss may be a tensor; a loss without gradient gives the same value."""
    x, target = few(2, 3, 40)["input"], labels((2, 3, 40), ignore_index=-100)
    scaled, wanted = (
        calseg.vls_cross_entropy(x, target, scale=scale, backend="triton") for scale in (torch.tensor(0.25), 0.25)
    )
    torch.testing.assert_close(scaled, wanted, rtol=0, atol=0)
    gradient, spec = torch.empty_like(x), LossSpec("cross_entropy", Labels(target, -100), None, "sum", x.dtype)
    upstream = torch.full((), 0.5).expand(2, 40)
    engine.loss(spec, LossTensors(x), LossTensors(gradient), upstream)
    leaf = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(pair(target, None, reduction="sum")[1](leaf), leaf)
    assert_accurate(gradient, 0.5 * wanted, ulps=8)
    assert machine.launches == [2, 2, 2]


@every_layout
def test_gradient_in_place_of_the_logits(machine, layout):
    shape = (2, 4, 16, 11)
    target, x = labels(shape, ignore_index=-100), few(*shape, layout=layout)["input"].requires_grad_()
    calseg.vls_cross_entropy(x * 1, target, reuse_logits=True, backend="triton").backward()
    wanted = torch.autograd.grad(pair(target, None)[1](x.double()), x)[0]
    assert_accurate(x.grad, wanted, ulps=8)
    assert len(machine.launches) == 2  # forward and backward


def test_the_sum_is_the_same_every_time(machine):
    x, target = few(3, 3, 4800)["input"], labels((3, 3, 4800))
    first, second = (calseg.vls_cross_entropy(x, target, reduction="sum", backend="triton") for _ in range(2))
    assert torch.equal(first, second)
    assert machine.launches == [30, 30]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=id_of)
def test_strides_past_two_to_the_31(on_host, dtype):
    """Offsets of all tensors have 64 bits."""
    shape, strides = (2, 3, 8), (2**33 + 2**30, 2**31 + 2**28, 1)
    extent = strides[0] + 2 * strides[1] + 8
    x, gradient = (sparse(dtype, extent).as_strided(shape, strides) for _ in range(2))
    x.copy_(scores(*shape))
    target = sparse(torch.uint8, 2**32 + 2**31 + 8).as_strided((2, 8), (2**32 + 2**31, 1)).copy_(labels(shape))
    spec = LossSpec("cross_entropy", Labels(target, -100), None, "sum", torch.float32)
    loss = engine.loss(spec, LossTensors(x), LossTensors(gradient))
    leaf = x.double().contiguous().requires_grad_()
    wanted = pair(target.long(), None, reduction="sum")[1](leaf)
    assert_accurate(loss, wanted, ulps=8)
    assert_accurate(gradient, torch.autograd.grad(wanted, leaf)[0], ulps=8)
    assert on_host.launches == [2]


def test_more_than_two_to_the_31_voxels(on_host):
    """The last block of a large item takes its last voxels."""
    size = 2**31 + 2**10 + 80
    x, gradient = (sparse(torch.bfloat16, 2 * size).view(1, 2, size) for _ in range(2))
    target = sparse(torch.uint8, size).view(1, size)
    x[..., -80:] = scores(1, 2, 80).to(torch.bfloat16)
    target[:, -3:] = 1
    spec = LossSpec("cross_entropy", Labels(target, -100), None, "sum", torch.float32)
    blocks = -(-size // 1024)
    partials = sparse(torch.float32, blocks)
    on_host.library.set_blocks(blocks - 1, 2**32 - 1)
    try:
        on_host.cuda_cross_entropy(
            LossTensors(x), spec, LossTensors(gradient), None, None, None, None, partials, None, None, None, blocks,
            0, 0,
        )  # fmt: skip
    finally:
        on_host.library.set_blocks(0, 2**32 - 1)
    leaf = x[..., -80:].double().requires_grad_()
    loss = pair(target[:, -80:].long(), None, reduction="sum")[1](leaf)
    assert_accurate(partials[-1:], loss[None], ulps=8)
    assert_accurate(gradient[..., -80:], torch.autograd.grad(loss, leaf)[0], ulps=8)


def test_quick_division(library):
    """The item of a block: a quotient of numbers below 2^31."""
    draw = random.Random(0)
    edges = [*range(1, 20), 2**16 - 1, 2**16, 2**16 + 1, 2**30, 2**31 - 1]
    for divisor in (*edges, *(draw.randrange(1, 2**31) for _ in range(300))):
        numbers = [0, 1, 2**31 - 1, *(draw.randrange(2**31) for _ in range(30))]
        multiples = [divisor * draw.randrange((2**31 - 1) // divisor + 1) for _ in range(30)]
        for number in (*numbers, *multiples, *(max(0, each - 1) for each in multiples)):
            assert library.quotient(number, divisor) == number // divisor


# ---- when it runs ----


def test_what_the_kernel_takes(on_host, monkeypatch):
    """Others take what begins in the wrong place, has options, or is too small. The result is the same."""
    shape = (2, 3, 8, 12)
    x, target = few(*shape)["input"], labels(shape)

    def launches(input: torch.Tensor = x, target: torch.Tensor = target, **options: object) -> int:
        before = len(on_host.launches)
        got = calseg.vls_cross_entropy(input, target, backend="triton", **options)
        torch.testing.assert_close(got, calseg.vls_cross_entropy(input, target, backend="reference", **options))
        return len(on_host.launches) - before

    last = LAYOUTS["channels_last"](x)
    for taken in (x, x.half(), x[:1], LAYOUTS["sliced_channels"](x), LAYOUTS["batch_inside"](x), x.flatten(2), last):
        assert launches(taken, target[: len(taken)].view(len(taken), *taken.shape[2:])) == 1
    assert launches(target=torch.cat([target[:1], target]).byte()[1:]) == 1
    for name in ("every_second", "odd_offset", "sliced_channels_last"):
        assert launches(LAYOUTS[name](x)) == 0, name
    odd = torch.cat([target.new_zeros(1), target.flatten()])[1:].view(target.shape)
    for other in (odd, target.float(), target.repeat_interleave(2, -1)[..., ::2]):
        assert launches(target=other) == 0
    assert launches(target=target[:1].expand(2, 8, 12)) == 1
    assert launches(x.double()) == launches(x, x.softmax(1)) == 0
    small = x[..., :7, :5], target[..., :7, :5]
    assert launches(small[0].contiguous(), small[1]) == 0
    five = torch.cat([x, x[:, :2]], 1)
    assert launches(five) == launches(x[:, :1], target * 0) == 0
    assert launches(LAYOUTS["channels_last"](small[0]), small[1]) == launches(last, odd) == 1  # the kernel of rows
    options = ({"reduction": "none"}, {"weight": class_weights(3, torch.float32)}, {"label_smoothing": 0.1})
    for each in options:
        assert launches(**each) == 0
    monkeypatch.setattr(cuda, "AT_ONCE_VOXELS", 2 * 96)
    monkeypatch.setattr(engine, "_plans", {})
    assert launches() == 0
    monkeypatch.setattr(cuda, "AT_ONCE_VOXELS", 2 * 96 - 1)
    monkeypatch.setattr(engine, "_plans", {})
    assert launches() == 1
    monkeypatch.setattr(on_host, "CUDA_ARCHITECTURES", [], raising=False)
    assert launches() == 0


def test_geometries_of_few_classes():
    S = 2**22
    dense, voxels = (0, S, 1), [(0, 0, 1)]

    def block(*given: object, itemsize: int = 2, labels: int = 1) -> int | None:
        return cuda.block_voxels("few", Geometry(*given), itemsize, labels)

    assert block(1, 2, S, [dense, dense], voxels) == 1024
    assert block(1, 4, S, [dense], voxels, itemsize=4) == 512
    assert block(1, 2, 2**21, [dense], voxels) is None
    assert block(1, 2, 2**21 + 8, [dense], voxels) == 1024
    assert block(1, 2, S - 4, [dense], voxels) is None
    assert block(1, 2, S - 4, [dense], voxels, itemsize=4) == 512
    for strides in ((0, S + 4, 1), (0, S, 2), (0, 1, 2)):
        assert block(1, 2, S, [dense, strides], voxels) is None
    assert block(2, 2, S, [(2 * S + 4, S, 1)], [(S, 0, 1)]) is None
    assert block(2, 2, S, [(2 * S, S, 1)], [(S + 8, 0, 1)]) is None
    assert block(2, 2, S, [(2 * S, S, 1)], [(S + 8, 0, 1)], labels=2) == 1024
    assert block(2, 2, S, [(2 * S, S, 1)], [(S, 0, 3)]) is None
    for C in (2, 3, 4):
        assert block(1, C, S, [(0, 1, C)], voxels) == 1024
        assert block(1, C, S, [(0, 1, C)], [(0, 0, 2)]) == (cuda.ROW_VOXELS if C == 3 else None)
        assert block(1, C, S - 4, [(0, 1, C)], voxels) == (cuda.ROW_VOXELS if C == 3 else None)
        assert block(1, C, 2**15, [(0, 1, C)], voxels) == (1024 if C == 3 else None)
        assert block(1, C, 2**15 - 8, [(0, 1, C)], voxels) is None
        assert block(2, C, S, [(C * S + 4, 1, C)], [(S, 0, 1)]) is None


def test_wrong_calls(on_host):
    """The plan refuses what no kernel can take."""
    x, target = few(1, 3, 40)["input"], labels((1, 3, 40))

    def call(x: torch.Tensor, g: torch.Tensor | None = None, target: torch.Tensor = target, **options: object) -> None:
        spec = LossSpec("cross_entropy", Labels(target, -100), None, "sum", torch.float32)._replace(**options)
        on_host.cuda_cross_entropy(
            LossTensors(x), spec, LossTensors(g), None, None, None, None, torch.empty(1), None, None, None, 1, 0, 0
        )  # fmt: skip

    call(x, x.clone())
    last = LAYOUTS["channels_last"](x)
    call(last, last.clone())
    for logits, gradient in ((x.double(), None), (x, x.bfloat16())):
        with pytest.raises(RuntimeError, match="wanted logits and gradients of one dtype"):
            call(logits, gradient)
    wrong = [
        (LAYOUTS["odd_offset"](x), None),
        (x, LAYOUTS["every_second"](x)),
        (x, last),
        (few(1, 5, 40)["input"], None),
    ]
    for logits, gradient in wrong:
        with pytest.raises(RuntimeError, match="wanted dense rows that begin at multiples of 16 bytes, or few classes"):
            call(logits, gradient)
    others = {"label_smoothing": 0.1}, {"weight": torch.ones(3)}
    strided = {"target": target.repeat_interleave(2, 1)[:, ::2]}, {"target": LAYOUTS["odd_offset"](target)}
    for options in (*others, *strided):
        with pytest.raises(RuntimeError, match="or few classes"):
            call(x, **options)
    with pytest.raises(RuntimeError, match="or few classes"):
        call(torch.zeros(1, 3, 40, dtype=torch.bfloat16)[..., :36], target=target[:, :36])


# ---- faults ----


@pytest.mark.parametrize("barrier", [r"bar\.sync \s*0", r"bar\.warp\.sync \s*-1"], ids=["block", "warp"])
def test_a_missing_barrier(on_ptx, barrier):
    """Without the barrier of the block, or that of the warps in rows, there is a race."""
    x, target = few(1, 2, 1024, layout="channels_last")["input"].requires_grad_(), labels((1, 2, 1024))
    call = lambda: calseg.vls_cross_entropy(x, target, reduction="sum", backend="triton")  # noqa: E731
    on_ptx.assert_found((barrier + ";", ";"), call, match="race in shared memory")


@every_layout
def test_a_missing_mask(on_ptx, monkeypatch, layout):
    """Eight voxels too many in the last tile are an access past the end."""
    for dtype in (torch.float32, torch.bfloat16):
        x, target = few(1, 2, 1040, dtype=dtype, layout=layout)["input"], labels((1, 2, 1040))
        spec = LossSpec("cross_entropy", Labels(target, -100), None, "sum", torch.float32)
        blocks = blocks_of(1048, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "shape_of", lambda scores: (1, 2, 1048))
            with pytest.raises(PtxError, match="past the end of a tensor"):
                on_ptx.cuda_cross_entropy(
                    LossTensors(x), spec, LossTensors(), None, None, None, None, torch.empty(blocks), None, None, None,
                    blocks, 0, 0,
                )  # fmt: skip


def test_a_wrong_place(on_ptx):
    """A vector that does not begin at a multiple of its size is an error."""
    x, target = few(1, 2, 1040, dtype=torch.bfloat16)["input"], labels((1, 2, 1040), dtype=torch.uint8)
    on_ptx.text, changes = re.subn(r"(ld\.global\.v4\S*\s+\{[^}]*\}, \[%\w+)\]", r"\1+4]", on_ptx.text)
    assert changes
    with pytest.raises(PtxError, match="aligned"):
        calseg.vls_cross_entropy(x, target, reduction="sum", backend="triton")
