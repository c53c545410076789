"""The CUDA kernel of cross-entropy of rows without a GPU: its source on the CPU, and what nvcc makes of it in the
interpreter of PTX. Triton's kernels before and after it run in Triton's interpreter.
"""

from __future__ import annotations

import re

import pytest
import torch
from cases import INTEGERS, LAYOUTS, REDUCTIONS, assert_accurate, assert_matches, class_weights, id_of, labels, scores
from cuda_cross_entropy import MARKS
from cuda_cross_entropy import library as library  # the fixtures
from cuda_cross_entropy import machine as machine
from cuda_cross_entropy import on_host as on_host
from cuda_cross_entropy import on_ptx as on_ptx
from ptx.parser import PtxError, names_of
from test_cross_entropy import EXTREMES, pair
from test_cuda import DTYPES, sparse
from test_cuda_ptx import ptx_of

import calseg
from calseg import tensors
from calseg.backends import choice, cuda
from calseg.operations import Labels, LossSpec, LossTensors

pytestmark = MARKS

if choice.TRITON_ERROR is None:
    from calseg.kernels.launch import Geometry

    from calseg.backends import triton as engine

last = LAYOUTS["channels_last"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = ptx_of("cross_entropy_rows", tmp_path_factory)
    assert len(names_of(text)) == 24  # three dtypes, 1, 2, 4 and 8 classes at once, with weights and smoothing or not
    return text


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"input": last(scores(*shape, dtype=dtype))}


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", cuda.LOSS_DTYPES, ids=id_of)
@pytest.mark.parametrize("C", [3, 5, 12, 14, 16, 24, 33, 36, 117])
def test_classes(machine, C, dtype):
    """Rows of 1, 2, 4 and 8 classes at once, with a full tile and an incomplete one, some labels ignored."""
    shape = (1, C, 150)
    target = labels(shape, ignore_index=-100)
    assert_matches(*pair(target, "triton", reduction="none"), rows(*shape, dtype=dtype), ulps=8 + C / 4)
    assert machine.launches == [2, 2]  # forward and backward


@pytest.mark.parametrize("size", [1, 2, 3, 31, 33, 127, 128, 129, 257])
def test_sizes(machine, size):
    """The last tile may be of any size, and its last bytes fewer than 16. Items that lie apart have their own tiles."""
    for shape in ((1, 7, size), (3, 6, size), (3, 8, size)):
        x = rows(*shape)
        if shape[0] == 3:
            apart = torch.full((3, size + 2, shape[1]), torch.nan)[:, :size].movedim(-1, 1)
            x = {"input": apart.copy_(x["input"])}
        assert_matches(*pair(labels(shape, ignore_index=2), "triton", ignore_index=2), x)
    taken = (size > 1) + (size % 2 == 0)  # of the items that lie apart
    assert machine.launches == [-(-size // 128)] + [3 * -(-size // 128)] * taken


@pytest.mark.parametrize(("C", "dtype"), [(128, torch.float32), (256, torch.bfloat16)], ids=id_of)
def test_most_classes(machine, C, dtype):
    """The largest tile, with gaps and class weights, has as much shared memory as every GPU has."""
    shape, weight = (1, C, 131), class_weights(C, torch.float64)
    target = labels(shape, ignore_index=-100)
    assert_matches(*pair(target, "triton", weight=weight), rows(*shape, dtype=dtype), ulps=8 + C / 4)
    assert machine.launches == [2]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", cuda.LOSS_DTYPES, ids=id_of)
def test_options(machine, dtype, reduction):
    """Class weights, label smoothing, a factor, a weight that is infinite, and a loss in each dtype."""
    for C, weighted, label_smoothing in ((5, True, 0.0), (6, False, 0.3), (12, True, 0.1), (16, True, 0.1)):
        shape = (2, C, 7, 11)
        target, weight = labels(shape, ignore_index=255), class_weights(C, torch.float64) if weighted else None
        options = {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": 255, "reduction": reduction}
        assert_matches(*pair(target, "triton", **options), rows(*shape, dtype=dtype))
    x, infinite = rows(2, 5, 9, dtype=dtype), torch.tensor([1.0, torch.inf, 2.0, 0.5, 1.0])
    target = labels((2, 5, 9)).clamp(min=2)
    assert_matches(*pair(target, "triton", weight=infinite, reduction="sum"), x)
    scaled, wanted = (
        calseg.vls_cross_entropy(x["input"], target, reduction=reduction, scale=scale, backend="triton")
        for scale in (torch.tensor(0.25), 0.25)
    )
    torch.testing.assert_close(scaled, wanted, rtol=0, atol=0)
    assert len(machine.launches) >= 6


@pytest.mark.parametrize("label_dtype", INTEGERS, ids=id_of)
def test_labels(machine, label_dtype):
    shape, ignore_index = (2, 5, 4, 3), 100 if label_dtype == torch.int8 else 200
    target = labels(shape, ignore_index=ignore_index, dtype=label_dtype)
    transposed = target.long().transpose(1, 2).contiguous().to(label_dtype).transpose(1, 2)
    for given in (target, transposed, target[:1].expand(2, -1, -1)):
        flat = given.long()
        assert_matches(
            lambda input, given=given: calseg.vls_cross_entropy(
                input, given, ignore_index=ignore_index, backend="triton"
            ),
            pair(flat, None, ignore_index=ignore_index)[1], rows(*shape),
        )  # fmt: skip
    assert len(machine.launches) == 3


@pytest.mark.parametrize("dtype", cuda.LOSS_DTYPES, ids=id_of)
def test_extremes(machine, dtype):
    """Logits of -inf, inf and NaN give what F.cross_entropy gives. Where a voxel is ignored, they do not matter."""
    x = torch.tensor(EXTREMES, dtype=torch.float64).to(dtype).repeat(3, 1)
    target = torch.arange(3).repeat_interleave(len(EXTREMES))
    for weight in (None, class_weights(3).to(dtype)):
        assert_matches(*pair(target, "triton", reduction="none", weight=weight), {"input": x}, grad_scale=2.0)
    target[~x.isfinite().all(1)] = -100
    assert_matches(
        lambda input: calseg.vls_cross_entropy(input, target, backend="triton"),
        lambda input: pair(target, None)[1](input.nan_to_num(0, 0, 0)), {"input": x},
    )  # fmt: skip
    assert len(machine.launches) >= 5


def test_a_label_that_is_no_class(machine):
    """Its voxel, and the sum, become NaN. Other gradients do not."""
    shape = (1, 5, 140)
    x, target = rows(*shape)["input"].requires_grad_(), labels(shape, dtype=torch.int32)
    target[0, 3], target[0, 135] = 5, -7
    loss = calseg.vls_cross_entropy(x, target, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    for nans in (loss.isnan(), gradient.isnan().all(1), gradient.isnan().any(1)):
        assert nans.nonzero().tolist() == [[0, 3], [0, 135]]
    assert calseg.vls_cross_entropy(x, target, backend="triton").isnan()
    assert len(machine.launches) == 3


def test_gradient_in_place_of_the_logits(machine):
    shape = (2, 6, 13, 11)
    target, x = labels(shape, ignore_index=-100), rows(*shape)["input"].requires_grad_()
    logits = (x * 1).clone(memory_format=torch.preserve_format)
    calseg.vls_cross_entropy(logits, target, reuse_logits=True, backend="triton").backward()
    wanted = torch.autograd.grad(pair(target, None)[1](x.double()), x)[0]
    assert_accurate(x.grad, wanted, ulps=8)
    assert machine.launches == [3, 3]


def test_the_sum_is_the_same_every_time(machine):
    x, target = rows(1, 5, 700)["input"], labels((1, 5, 700))
    first, second = (calseg.vls_cross_entropy(x, target, reduction="sum", backend="triton") for _ in range(2))
    assert torch.equal(first, second)
    assert machine.launches == [6, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=id_of)
def test_strides_past_two_to_the_31(on_host, dtype):
    """Offsets of all tensors have 64 bits."""
    shape, strides = (2, 5, 3), (2**31 + 2**30, 1, 5)
    extent = strides[0] + 15
    x, gradient = (sparse(dtype, extent).as_strided(shape, strides) for _ in range(2))
    x.copy_(scores(*shape))
    target = sparse(torch.uint8, 2**31 + 2**32 + 6).as_strided((2, 3), (2**31 + 5, 2**31)).copy_(labels(shape))
    upstream = sparse(torch.float32, 2**32 + 6).as_strided((2, 3), (2**31, 2**30)).copy_(torch.arange(6.0).view(2, 3))
    spec = LossSpec("cross_entropy", Labels(target, -100), None, "none", torch.float32)
    engine.loss(spec, LossTensors(x), LossTensors(gradient), upstream)
    leaf = x.double().contiguous().requires_grad_()
    wanted = torch.autograd.grad(pair(target.long(), None, reduction="none")[1](leaf), leaf, upstream.double())[0]
    assert_accurate(gradient, wanted, ulps=8)
    assert on_host.launches == [2]


def test_more_than_two_to_the_31_logits(on_host):
    """The last block of a large item takes its last voxels."""
    size = 2**29 + 77
    x, gradient = (sparse(torch.bfloat16, 5 * size).view(1, size, 5).movedim(-1, 1) for _ in range(2))
    target = sparse(torch.uint8, size).view(1, size)
    x[..., -77:] = scores(1, 5, 77).to(torch.bfloat16)
    spec = LossSpec("cross_entropy", Labels(target, -100), None, "sum", torch.float32)
    blocks = -(-size // 128)
    partials = sparse(torch.float32, blocks)
    on_host.library.set_blocks(blocks - 1, 2**32 - 1)
    try:
        on_host.cuda_cross_entropy(
            LossTensors(x), spec, LossTensors(gradient), None, None, None, None, partials, None, None, None, blocks,
            0, 0,
        )  # fmt: skip
    finally:
        on_host.library.set_blocks(0, 2**32 - 1)
    leaf = x[..., -77:].double().requires_grad_()
    loss = pair(torch.zeros(1, 77, dtype=torch.int64), None, reduction="sum")[1](leaf)
    assert_accurate(partials[-1:], loss[None], ulps=8)
    assert_accurate(gradient[..., -77:], torch.autograd.grad(loss, leaf)[0], ulps=8)


# ---- when it runs ----


def test_what_the_kernel_takes(on_host, monkeypatch):
    """Triton's kernel takes what is no row, begins in the wrong place, or is faster there. The result is the same."""
    x, target = rows(2, 5, 6, 7)["input"], labels((2, 5, 6, 7))
    wanted = calseg.vls_cross_entropy(x, target, backend="reference")

    def launches(input: torch.Tensor, target: torch.Tensor = target, **options: object) -> int:
        before = len(on_host.launches)
        got = calseg.vls_cross_entropy(input, target, backend="triton", **options)
        torch.testing.assert_close(got, calseg.vls_cross_entropy(input, target, backend="reference", **options))
        return len(on_host.launches) - before

    apart = torch.full((2, 8, 7, 5), torch.nan)[:, :6].movedim(-1, 1).copy_(x)
    assert launches(x) == launches(apart) == launches(x[0].flatten(1).T, target[0].flatten()) == 1
    moved = torch.cat([x.new_zeros(1), x.movedim(1, -1).flatten()])[1:].view(2, 6, 7, 5).movedim(-1, 1)
    for other in (x.contiguous(), moved, LAYOUTS["sliced_channels_last"](x), x.double()):
        assert launches(other) == 0
    four = rows(2, 4, 5, 7)["input"], labels((2, 4, 5, 7))
    assert launches(x, target.float()) == launches(x, x.softmax(1)) == launches(*four) == 0
    monkeypatch.setattr(cuda, "FEWEST_ROWS", 85)
    monkeypatch.setattr(engine, "_plans", {})
    assert launches(x) == 0
    monkeypatch.setattr(cuda, "FEWEST_ROWS", 84)
    monkeypatch.setattr(engine, "_plans", {})
    monkeypatch.setattr(on_host, "CUDA_ARCHITECTURES", [], raising=False)
    assert launches(x) == 0
    torch.testing.assert_close(calseg.vls_cross_entropy(x, target, backend="triton"), wanted)


@pytest.mark.parametrize(
    ("C", "itemsize", "wanted"),
    [(2, 4, False), (3, 4, True), (4, 4, False), (8, 4, True), (8, 2, False), (9, 4, True), (16, 2, True),
     (117, 4, True), (128, 4, True), (129, 4, False), (129, 2, True), (256, 2, True), (257, 2, False)],
)  # fmt: skip
def test_classes_that_rows_take(C, itemsize, wanted):
    row = (0, 1, C)
    voxels = lambda N, *scores: cuda.block_voxels("rows", Geometry(N, C, 2**20, scores, []), itemsize, 1)  # noqa: E731
    assert voxels(1, row, row) == (cuda.ROW_VOXELS if wanted else None)
    assert voxels(1, row, (0, 1, C + 1)) is None
    assert voxels(2, row, (2**20 * C + 1, 1, C)) is None


def test_wrong_calls(on_host):
    """The plan refuses what the kernel cannot take."""
    x, target = rows(1, 5, 9)["input"], labels((1, 5, 9))
    spec = LossSpec("cross_entropy", Labels(target, -100), None, "sum", torch.float32)
    call = lambda x, g: on_host.cuda_cross_entropy(  # noqa: E731
        LossTensors(x), spec, LossTensors(g), None, None, None, None, torch.empty(1), None, None, None, 1, 0, 0
    )  # fmt: skip
    call(x, x.clone())
    moved = torch.zeros(46)[1:].view(1, 9, 5).movedim(-1, 1)
    for logits, gradient in ((x.double(), None), (x, x.bfloat16())):
        with pytest.raises(RuntimeError, match="wanted logits and gradients of one dtype"):
            call(logits, gradient)
    for logits, gradient in ((x.contiguous(), None), (x, x.contiguous()), (x, moved)):
        with pytest.raises(RuntimeError, match="wanted dense rows that begin at multiples of 16 bytes, or few classes"):
            call(logits, gradient)


# ---- faults ----


def test_a_missing_barrier(on_ptx):
    """Without the barriers of the block there is a race, or numbers that are not there yet."""
    x, target = rows(1, 5, 140)["input"], labels((1, 5, 140))
    call = lambda: calseg.vls_cross_entropy(x, target, reduction="sum", backend="triton")  # noqa: E731
    right, text = call(), on_ptx.text
    on_ptx.text = re.sub(r"bar\.sync\s*0;", ";", text)
    with pytest.raises(PtxError, match="race in shared memory"):
        call()
    on_ptx.text = text.replace("cp.async.wait_all;", ";")
    assert not torch.allclose(call(), right)


def test_a_missing_mask(on_ptx, monkeypatch):
    """One voxel too many in the last tile is an access past the end."""
    x, target = rows(1, 5, 140)["input"], labels((1, 5, 140))
    monkeypatch.setattr(tensors, "shape_of", lambda scores: (1, 5, 141))
    spec = LossSpec("cross_entropy", Labels(target, -100), None, "sum", torch.float32)
    with pytest.raises(PtxError, match="past the end of a tensor"):
        on_ptx.cuda_cross_entropy(
            LossTensors(x), spec, LossTensors(), None, None, None, None, torch.empty(2), None, None, None, 2, 0, 0
        )  # fmt: skip


def test_dtypes_of_voxels(machine):
    """The upstream gradient and the loss of every voxel may have any floating-point dtype."""
    x, target = rows(1, 5, 9)["input"], labels((1, 5, 9))
    spec = LossSpec("cross_entropy", Labels(target, -100), None, "none", torch.float32)
    for dtype in DTYPES[:4]:
        upstream, loss, gradient = scores(1, 9).to(dtype), torch.empty(1, 9, dtype=dtype), torch.empty_like(x)
        machine.cuda_cross_entropy(
            LossTensors(x), spec, LossTensors(gradient), upstream, loss, None, None, None, None, None, None, 1, 0, 0
        )  # fmt: skip
        leaf = x.double().requires_grad_()
        wanted = pair(target, None, reduction="none")[1](leaf)
        assert_accurate(loss.float() if dtype == torch.float64 else loss, wanted, ulps=8)
        assert_accurate(gradient, torch.autograd.grad(wanted, leaf, upstream.double())[0], ulps=8)
