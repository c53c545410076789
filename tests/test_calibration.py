"""Tests of the calibration bins and of the calibration errors computed from them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import (
    CLASSES,
    FLOATS,
    LABELS,
    LAYOUTS,
    SHAPES,
    SIZES,
    assert_near_bins,
    assert_near_confidences,
    assert_same_bins,
    id_of,
    labels,
    scores,
    voxels_of,
)
from hypothesis import given
from hypothesis import strategies as st
from internals import needs_native
from naive import UNIT, calibration_sums, softmax
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

import calseg

NORMS = ("l1", "l2", "max", "average")

KINDS = [{}, {"class_wise": True}, {"include_background": False}, {"class_wise": True, "include_background": False}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["top", "classes", "top-foreground", "classes-foreground"])


def probabilities(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.softmax(scores(*shape, seed=seed), 1 if len(shape) > 1 else 0).to(dtype)


# ---- against the formulas ----


@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("right_closed", [False, True])
@pytest.mark.parametrize("from_logits", [True, False])
def test_naive(backend, class_wise, right_closed, from_logits):
    """Compare float64 with the formulas voxel by voxel. Counts are equal, and sums are equal to one unit."""
    shape, n_bins = (2, 4, 7, 9), 10
    x, target = scores(*shape), labels(shape)
    rows, truth = [softmax(row) for row in x.movedim(1, -1).reshape(-1, 4).tolist()], target.flatten().tolist()
    sums, nll, brier = calibration_sums(rows, truth, n_bins, class_wise=class_wise, right_closed=right_closed)
    given = x if from_logits else torch.tensor(rows, dtype=torch.float64).view(2, 7, 9, 4).movedim(-1, 1)
    bins = calseg.calibration_bins(
        given, target, n_bins=n_bins, class_wise=class_wise, right_closed=right_closed, from_logits=from_logits,
        backend=backend,
    )  # fmt: skip
    wanted = torch.tensor(sums if class_wise else sums[0], dtype=torch.float64)
    assert torch.equal(bins.count, wanted[..., 0].long())
    assert torch.equal(bins.hits, wanted[..., 2].long())
    assert bool(((bins.confidence.double() / UNIT - wanted[..., 1]).abs() <= wanted[..., 0] / UNIT / 2 + 1e-12).all())
    assert abs(float(bins.mean_nll()) - nll / len(rows)) < 0.5 / UNIT
    assert abs(float(bins.mean_brier()) - brier / len(rows)) < 0.5 / UNIT
    torch.testing.assert_close(bins.accuracy(), wanted[..., 2] / wanted[..., 0], equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(
        bins.mean_confidence(), wanted[..., 1] / wanted[..., 0], equal_nan=True, rtol=0, atol=2**-24
    )


def _norms(sums: list[list[float]]) -> dict[str, float]:
    """Return the calibration errors of all norms from [count, sum of confidences, hits] per bin."""
    gaps = [(n, abs(conf / n - hits / n)) for n, conf, hits in sums if n]
    total = sum(n for n, _ in gaps)
    return {
        "l1": sum(n * gap for n, gap in gaps) / total,
        "l2": math.sqrt(sum(n * gap**2 for n, gap in gaps) / total),
        "max": max(gap for _, gap in gaps),
        "average": sum(gap for _, gap in gaps) / len(gaps),
    }


@pytest.mark.parametrize("norm", NORMS)
def test_norms(backend, norm):
    shape = (2, 3, 5, 7)
    x, target = scores(*shape), labels(shape)
    rows, truth = [softmax(row) for row in x.movedim(1, -1).reshape(-1, 3).tolist()], target.flatten().tolist()
    (top,), _, _ = calibration_sums(rows, truth, 15)
    per_class, _, _ = calibration_sums(rows, truth, 15, class_wise=True)
    got = calseg.calibration_error(x, target, norm=norm, backend=backend)
    assert got.dtype == torch.float64
    assert got.dim() == 0
    assert abs(float(got) - _norms(top)[norm]) < 1e-7
    got = calseg.calibration_error(x, target, norm=norm, class_wise=True, backend=backend)
    assert abs(float(got) - sum(_norms(sums)[norm] for sums in per_class) / 3) < 1e-7


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("C", [2, 5])
def test_torchmetrics(backend, norm, C):
    """Compare with torchmetrics for the pooled top-label error on a small volume, where both define the same."""
    x, target = scores(2, C, 11, 13, dtype=torch.float32), labels((2, C, 11, 13), ignore_index=-1)
    for n_bins in (1, 10, 15, 20):
        wanted = multiclass_calibration_error(x, target, C, n_bins=n_bins, norm=norm, ignore_index=-1)
        got = calseg.calibration_error(x, target, n_bins=n_bins, norm=norm, ignore_index=-1, backend=backend)
        torch.testing.assert_close(got, wanted.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("C", CLASSES)
@every_kind
def test_logits_against_float64(backend, dtype, C, kind):
    """Only confidences next to an edge fall on its other side than they do in float64."""
    if C == 1 and not kind.get("include_background", True):
        return
    n_bins, shape = 15, (1, C, 1500)
    x, target = scores(*shape, dtype=dtype), labels(shape, ignore_index=-100)
    bins = calseg.calibration_bins(x, target, n_bins=n_bins, backend=backend, **kind)
    truth = calseg.calibration_bins(x.double(), target, n_bins=n_bins, backend="reference", **kind)
    # at every edge, those whose float64 confidence is so near that float32 may round it across
    p = torch.softmax(x.double(), 1)
    first = 0 if kind.get("include_background", True) else 1
    p = p[:, first:] if kind.get("class_wise") else p.amax(1, keepdim=True)
    near = (p[..., None] - torch.arange(1, n_bins) / n_bins).abs() < 8 * torch.finfo(torch.float32).eps
    allowed = near.sum(2)[0]
    at_edges = (bins.count.cumsum(-1) - truth.count.cumsum(-1)).abs()[..., :-1]
    assert bool((at_edges <= allowed.view_as(at_edges)).all())
    assert int(allowed.sum()) <= (3 if C > 1 else 0)
    assert torch.equal(bins.hits.sum(-1), truth.hits.sum(-1))
    assert torch.equal(bins.num_voxels, truth.num_voxels)
    if torch.equal(bins.count, truth.count):
        assert torch.equal(bins.hits, truth.hits)
        error = (bins.confidence - truth.confidence).abs()
        assert bool((error <= (4 + C // 8) * bins.count).all())  # a sum of C terms, each rounded
    assert abs(float(bins.mean_nll() - truth.mean_nll())) < 8 / UNIT
    assert abs(float(bins.mean_brier() - truth.mean_brier())) < 4 / UNIT


@pytest.mark.parametrize("C", CLASSES)
@every_kind
def test_every_size(cpu, C, kind):
    """Compare with the reference for sizes around those of vectors and tiles. Probabilities give equal integers."""
    if C == 1 and kind == KINDS[-1]:
        return
    longest = max(SIZES) if C < 33 else 300
    p, target = probabilities(1, C, longest), labels((1, C, longest), ignore_index=-100, dtype=torch.uint8)
    x = p.log()
    for size in SIZES:
        if size > longest:
            continue
        for whole, from_logits in ((p, False), (x, True)):
            part, truth = whole[..., :size].contiguous(), target[..., :size].contiguous()
            options = {"from_logits": from_logits, "ignore_index": 156, **kind}
            got = calseg.calibration_bins(part, truth, backend=cpu, **options)
            wanted = calseg.calibration_bins(part, truth, backend="reference", **options)
            if from_logits:
                assert torch.equal(got.num_voxels, wanted.num_voxels)
                assert int((got.count.cumsum(-1) - wanted.count.cumsum(-1)).abs().max()) <= 1
                assert torch.equal(got.hits.sum(-1), wanted.hits.sum(-1))
            else:
                assert_same_bins(got, wanted, units=4 + C // 8)


# ---- edges, ties ----


@pytest.mark.parametrize("right_closed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
@pytest.mark.parametrize("n_bins", [1, 2, 3, 7, 10, 15, 20, 49, 100, 4096, 65536])
def test_edges(backend, n_bins, dtype, right_closed):
    """Bin confidences on every edge, which is k / n_bins rounded to the dtype, and the numbers next to it."""
    edges = torch.arange(n_bins + 1, dtype=dtype) / n_bins
    p = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)]).clamp(0, 1)
    pair = torch.stack([p, 1 - p], 1)[None].transpose(1, 2).contiguous()
    target = torch.zeros(1, len(p), dtype=torch.uint8)
    bins = calseg.calibration_bins(
        pair, target, n_bins=n_bins, from_logits=False, class_wise=True, right_closed=right_closed, backend=backend
    )
    for c in (0, 1):
        if right_closed:
            wanted = (pair[0, c, :, None] > edges[1:-1]).sum(-1) if n_bins < 5000 else None
        else:
            wanted = (pair[0, c, :, None] >= edges[1:-1]).sum(-1) if n_bins < 5000 else None
        if wanted is None:
            wanted = torch.bucketize(pair[0, c], edges[1:-1], right=not right_closed)
        assert torch.equal(bins.count[c], torch.bincount(wanted, minlength=n_bins))
        assert torch.equal(bins.hits[c], bins.count[c] * (c == 0))


def test_zero_and_one(backend):
    """0 falls into the first bin and 1 into the last, whichever side is closed."""
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    for right_closed in (False, True):
        bins = calseg.calibration_bins(
            p, torch.tensor([[0, 1]]), from_logits=False, class_wise=True, right_closed=right_closed, backend=backend
        )
        assert bins.count[:, [0, -1]].tolist() == [[1, 1], [1, 1]]
        assert bins.hits[:, [0, -1]].tolist() == [[0, 1], [0, 1]]
        assert bins.confidence[:, [0, -1]].tolist() == [[0, UNIT], [0, UNIT]]
        assert float(bins.mean_nll()) == float(bins.mean_brier()) == 0.0


def test_slightly_beyond_zero_and_one(backend):
    """Probabilities slightly outside of [0, 1], as interpolation makes them, fall into the nearest bin."""
    p = torch.tensor([[1.0004, -0.0004], [0.5, 0.5]])
    bins = calseg.calibration_bins(
        p, torch.tensor([0, 1]), from_logits=False, class_wise=True, n_bins=4, backend=backend
    )
    assert bins.count.tolist() == [[0, 0, 1, 1], [1, 0, 1, 0]]
    assert bins.confidence.tolist() == [[0, 0, UNIT // 2, UNIT], [0, 0, UNIT // 2, 0]]
    assert int(bins.nll[0]) == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("from_logits", [True, False])
def test_ties(backend, dtype, from_logits):
    """The first of several largest classes is the prediction, as in torch.argmax."""
    patterns = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]])
    x = (patterns if from_logits else patterns / patterns.sum(1, keepdim=True)).to(dtype).repeat(9, 1)
    for y in range(4):
        bins = calseg.calibration_bins(x, torch.full((54,), y), n_bins=1, from_logits=from_logits, backend=backend)
        assert int(bins.hits) == int((patterns.argmax(1) == y).sum()) * 9


# ---- which voxels count ----


@pytest.mark.parametrize("dtype", LABELS, ids=id_of)
@pytest.mark.parametrize("form", ["[N, *S]", "[N, 1, *S]", "strided", "transposed", "expanded"])
def test_label_types_and_forms(backend, dtype, form):
    C, ignore_index = 117, 100 if dtype == torch.int8 else 200
    shape = (2, C, 9, 11)
    p, target = probabilities(*shape), labels(shape, ignore_index=ignore_index, dtype=dtype)
    given = target
    if form == "[N, 1, *S]":
        given = target[:, None]
    elif form == "strided":
        given = target.repeat_interleave(2, -1)[..., ::2]
    elif form == "transposed":
        given = target.long().transpose(1, 2).contiguous().to(dtype).transpose(1, 2)
    elif form == "expanded":
        target = given = target[:1].expand(2, -1, -1)
    options = {"from_logits": False, "ignore_index": ignore_index}
    got = calseg.calibration_bins(p, given, backend=backend, **options)
    assert_same_bins(got, calseg.calibration_bins(p, target.long(), backend="reference", **options), units=20)


@every_kind
@pytest.mark.parametrize("from_logits", [True, False])
def test_mask(backend, kind, from_logits):
    """A masked voxel does not count, whatever its label and scores are."""
    shape = (2, 4, 6, 7)
    given, target = (scores(*shape) if from_logits else probabilities(*shape)), labels(shape)
    mask = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(3)) < 0.7
    options = {"from_logits": from_logits, "backend": backend, **kind}
    kept = given.movedim(1, -1)[mask], target[mask]
    wanted = calseg.calibration_bins(*kept, **options)
    soiled = given.masked_fill(~mask[:, None], torch.nan), target.masked_fill(~mask, 77)
    for form in (mask, mask[:, None], mask.repeat_interleave(2, -1)[..., ::2]):
        assert_same_bins(calseg.calibration_bins(*soiled, mask=form, **options), wanted)
    ignored = target.masked_fill(~mask, 77)
    assert_same_bins(calseg.calibration_bins(soiled[0], ignored, ignore_index=77, **options), wanted)


def test_foreground(backend):
    """Without background, voxels labelled 0 do not count (top-label), or class 0 has no bins (class-wise)."""
    shape = (2, 3, 50)
    x, target = scores(*shape), labels(shape)
    foreground = target != 0
    options = {"include_background": False, "backend": backend}
    assert_same_bins(
        calseg.calibration_bins(x, target, **options),
        calseg.calibration_bins(x, target, mask=foreground, backend=backend),
    )
    per_class = calseg.calibration_bins(x, target, class_wise=True, **options)
    every_class = calseg.calibration_bins(x, target, class_wise=True, backend=backend)
    assert torch.equal(per_class.count, every_class.count[1:])
    assert int(per_class.num_voxels) == 100
    assert torch.equal(per_class.brier, every_class.brier)


@every_kind
def test_nothing_counts(backend, kind):
    """If no voxel counts, all values are NaN, and there is no error."""
    x = scores(2, 3, 4)
    for target in (torch.full((2, 4), -100), torch.zeros(2, 4, dtype=torch.int64)):
        mask = None if int(target.min()) < 0 else torch.zeros(2, 4, dtype=torch.bool)
        bins = calseg.calibration_bins(x, target, mask=mask, backend=backend, **kind)
        assert int(bins.count.sum()) == int(bins.num_voxels) == 0
        assert bool(bins.mean_nll().isnan())
        assert bool(bins.mean_brier().isnan())
        for norm in NORMS:
            for equal_mass in (False, True):
                error = calseg.calibration_error(
                    x, target, mask=mask, norm=norm, equal_mass=equal_mass, backend=backend, **kind
                )
                assert bool(error.isnan())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3)], ids=str)
def test_empty(backend, shape):
    bins = calseg.calibration_bins(torch.ones(shape), labels(shape), per_item=len(shape) > 2, backend=backend)
    assert int(bins.num_voxels.sum()) == 0
    assert bins.count.shape == ((shape[0], 15) if len(shape) > 2 else (15,))


# ---- NaN and infinities ----


@every_kind
def test_nan(backend, kind):
    """A voxel with NaN is counted in num_nan and num_voxels, and is in no bin."""
    shape = (1, 3, 40)
    x, target = scores(*shape, dtype=torch.float32), labels(shape)
    rest = torch.ones(40, dtype=torch.bool)
    soiled = x.clone()
    soiled[0, 1, 3], soiled[0, 0, 17], soiled[0, 2, 18] = torch.nan, torch.inf, torch.inf
    soiled[0, :, 39] = -torch.inf  # no distribution at all
    target[0, [3, 17, 18, 39]] = 1
    rest[[3, 17, 18, 39]] = False
    bins = calseg.calibration_bins(soiled, target, backend=backend, **kind)
    clean = calseg.calibration_bins(x[..., rest], target[..., rest], backend=backend, **kind)
    assert int(bins.num_nan) == 4
    assert_same_bins(bins._replace(num_nan=clean.num_nan, num_voxels=bins.num_voxels - 4), clean)
    with pytest.warns(RuntimeWarning, match=r"4 of \d+ voxels have a NaN probability and are left out"):
        calseg.calibration_error(soiled, target, backend=backend, **kind)
    p = torch.softmax(x, 1)
    p[0, 2, 5] = torch.nan
    assert int(calseg.calibration_bins(p, target.fill_(1), from_logits=False, backend=backend, **kind).num_nan) == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_impossible_labels(backend, dtype):
    """A label of probability 0 is in the bins, and makes the mean negative log-likelihood infinite."""
    inf = torch.inf
    x = torch.tensor([[0.0, -inf], [-inf, 0.0], [0.0, -6e4], [1.0, 1.0]], dtype=torch.float64).to(dtype)
    bins = calseg.calibration_bins(x, torch.tensor([1, 1, 1, 1]), n_bins=2, backend=backend)
    assert bins.count.tolist() == [0, 4]
    assert int(bins.num_infinite) == 1
    assert int(bins.num_nan) == 0
    assert float(bins.mean_nll()) == inf
    assert bins.nll.tolist() == [-int(x[2, 1]), round(math.log(2) * UNIT)]
    assert int(bins.brier) == int(4.5 * UNIT)
    p = torch.softmax(x.float(), 1).to(dtype)
    bins = calseg.calibration_bins(p, torch.tensor([1, 1, 1, 1]), n_bins=2, from_logits=False, backend=backend)
    assert int(bins.num_infinite) == 2


def test_likelihoods_of_every_size(backend):
    """Sum negative log-likelihoods from tiny to huge.

    Whole nats and the rest of a sum do not overflow into each other.
    """
    gaps = torch.tensor([0.0, 1e-3, 0.5, 1.0, 15.9999, 16.0, 87.3, 88.0, 103.9, 104.0, 1e3, 1e6, 2.0**24, 2.0**25 - 2])
    x = torch.stack([torch.zeros_like(gaps), gaps], 1)
    bins = calseg.calibration_bins(x, torch.zeros(len(gaps), dtype=torch.int64), backend=backend)
    wanted = torch.nn.functional.cross_entropy(x.double(), torch.zeros(len(gaps), dtype=torch.int64), reduction="sum")
    assert int(bins.num_infinite) == 0
    assert abs(float(bins.nll.double() @ torch.tensor([1.0, 1 / UNIT], dtype=torch.float64) - wanted)) < 2e-4
    over = torch.tensor([[0.0, 2.0**25 + 4]])
    assert int(calseg.calibration_bins(over, torch.tensor([0]), backend=backend).num_infinite) == 1
    tiny = torch.tensor([[1.0, 1e-40], [1.0, 1e-30], [1.0, 1e-20], [0.9, 0.1]])
    bins = calseg.calibration_bins(tiny, torch.ones(4, dtype=torch.int64), from_logits=False, backend=backend)
    assert abs(float(bins.mean_nll()) - float(-tiny[:, 1].double().log().mean())) < 1e-5


# ---- layouts, shapes, dtypes ----


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("axes", [2, 3])
def test_layouts(backend, name, axes):
    """Every layout gives the integers of contiguous tensors. Triton's confidences may round otherwise."""
    for C in (3, 5):
        shape = (2, C, *(6, 7, 4)[:axes])
        for dtype in FLOATS:
            x, target = scores(*shape, dtype=dtype), labels(shape, ignore_index=-100)
            for kind in KINDS:
                wanted = calseg.calibration_bins(x, target, backend=backend, **kind)
                got = calseg.calibration_bins(LAYOUTS[name](x), target, backend=backend, **kind)
                if backend == "triton":
                    assert_near_bins(got, wanted, units=8)
                    assert_near_confidences(got, wanted, C)
                else:
                    assert_same_bins(got, wanted)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(backend, shape):
    """[C], [N, C] and any number of spatial axes hold the same voxels."""
    shape = shape(5)
    x, target = scores(*shape), labels(shape)
    flat = x.reshape(1, 5) if len(shape) == 1 else x.movedim(1, -1).reshape(-1, 5)
    for kind in KINDS:
        bins = calseg.calibration_bins(x, target, backend=backend, **kind)
        assert_same_bins(bins, calseg.calibration_bins(flat, target.reshape(-1), backend=backend, **kind))
    assert voxels_of(shape) == target.shape


def test_low_precision_is_widened(backend):
    """bfloat16 and float16 give the result of the same numbers in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        x, target = scores(2, 6, 300, dtype=dtype), labels((2, 6, 300))
        assert_same_bins(
            calseg.calibration_bins(x, target, backend=backend),
            calseg.calibration_bins(x.float(), target, backend=backend),
        )


# ---- exact at any size, in any order ----


@needs_native
def test_more_than_two_to_the_24_in_one_bin():
    """Bins of more than 2^24 voxels have exact sums: multiples of those of one voxel."""
    size = 2**24 + 2**23 + 12345
    x = torch.tensor([[2.0, 0.0], [0.0, 2.5]]).repeat_interleave(torch.tensor([size - 5, 5]), 0).t()[None].contiguous()
    target = torch.zeros(1, size, dtype=torch.uint8)
    bins = calseg.calibration_bins(x, target, n_bins=1)
    one = [calseg.calibration_bins(x[..., i : i + 1], target[..., i : i + 1], n_bins=1) for i in (0, -1 % size)]
    for got, often, rarely in zip(bins, *one, strict=True):
        assert torch.equal(got, often * (size - 5) + rarely * 5)
    assert int(bins.count) == size
    assert int(bins.hits) == size - 5


@every_kind
@pytest.mark.parametrize(("dtype", "n_bins"), [(torch.float32, 15), (torch.float32, 4096), (torch.float64, 15)])
def test_any_threads_and_slabs(cpu, kind, dtype, n_bins, set_threads):
    """Bit for bit the same for any number of threads, for slabs in any order, and per item."""
    shape = (2, 4, 40, 64, 61)  # five chunks of work
    x, target = scores(*shape, dtype=dtype), labels(shape, ignore_index=-100, dtype=torch.int16)
    options = {"n_bins": n_bins, "backend": cpu, **kind}
    whole = calseg.calibration_bins(x, target, **options)
    for threads in (2, 3):
        set_threads(threads)
        assert_same_bins(calseg.calibration_bins(x, target, **options), whole)
    set_threads(1)
    slabs = [
        calseg.calibration_bins(x[n : n + 1, :, a:b], target[n : n + 1, a:b], **options)
        for n, (a, b) in ((1, (0, 7)), (0, (19, 40)), (1, (7, 40)), (0, (0, 1)), (0, (1, 19)))
    ]
    total = slabs[0]
    for slab in slabs[1:]:
        total = total.merge(slab)
    assert_same_bins(total, whole)
    items = calseg.calibration_bins(x, target, per_item=True, **options)
    assert items.num_voxels.shape == (2,)
    assert_same_bins(items.pool(), whole)
    for n in range(2):
        alone = calseg.calibration_bins(x[n : n + 1], target[n : n + 1], **options)
        assert_same_bins(calseg.CalibrationBins(*(sums[n] for sums in items)), alone)


def test_merge_is_not_concatenation(backend):
    x, target = scores(2, 3, 5), labels((2, 3, 5))
    bins = calseg.calibration_bins(x, target, backend=backend)
    assert_same_bins(bins + bins, bins.merge(bins))
    assert int((bins + bins).num_voxels) == 20
    assert_same_bins(bins.pool(), bins)
    with pytest.raises(ValueError, match=r"other: got bins \[20\], wanted \[15\]"):
        bins.merge(calseg.calibration_bins(x, target, n_bins=20, backend=backend))
    with pytest.raises(ValueError, match=r"other: got bins \[2, 15\], wanted \[15\]"):
        bins.merge(calseg.calibration_bins(x, target, per_item=True, backend=backend))
    with pytest.raises(TypeError, match="other: got 1"):
        bins.merge(1)


@needs_native
def test_memory_does_not_grow_with_the_volume(peak_growth):
    x, target = torch.zeros(1, 4, 2**21), torch.zeros(1, 2**21, dtype=torch.uint8)
    calseg.calibration_bins(x, target)
    for options in ({}, {"class_wise": True}, {"n_bins": 4096}):
        assert peak_growth(lambda options=options: calseg.calibration_bins(x, target, **options)) < 4 << 20


def test_no_graph_is_kept(backend):
    x = scores(2, 3, 5).requires_grad_()
    assert not calseg.calibration_error(x, labels((2, 3, 5)), backend=backend).requires_grad


# ---- equal mass ----


def _sorted_groups(confidence: Tensor, hit: Tensor, groups: int) -> Tensor:
    """Return the equal-mass ECE of voxels with these confidences and hits, by sorting. A voxel may be divided."""
    order = confidence.argsort(stable=True)
    confidence, hit, n = confidence[order].double(), hit[order].double(), len(confidence)
    ends = torch.arange(1, n + 1, dtype=torch.float64)
    error = torch.zeros((), dtype=torch.float64)
    for g in range(groups):
        share = (ends.clamp(max=n * (g + 1) / groups) - (ends - 1).clamp(min=n * g / groups)).clamp(min=0)
        error += (share * (confidence - hit)).sum().abs()
    return error / n


@pytest.mark.parametrize("groups", [1, 7, 15])
@pytest.mark.parametrize("spread", [0.3, 2.0, 30.0])
def test_equal_mass(backend, groups, spread):
    """The error equals the one by sorting the means of the cells, and is near the one by sorting the voxels."""
    shape = (1, 3, 5000)
    x, target = scores(*shape, scale=spread), labels(shape)
    target = torch.where(
        torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) < 0.7, x.argmax(1), target
    )
    got = calseg.calibration_error(x, target, n_bins=groups, equal_mass=True, backend=backend)
    confidence, top = torch.softmax(x, 1).max(1)
    confidence, hit = confidence[0], (top == target)[0].double()
    cell = (confidence * 4096).long().clamp(max=4095)
    count = torch.bincount(cell, minlength=4096)
    mean = [torch.bincount(cell, values, 4096)[cell] / count[cell] for values in (confidence, hit)]
    assert abs(float(got - _sorted_groups(*mean, groups))) < 1e-6
    # Against sorting the voxels themselves: only cells that lie across a boundary are divided otherwise.
    upper = count.cumsum(0)
    across = {int(torch.searchsorted(upper, 5000 * g / groups)) for g in range(1, groups)}
    bound = 2 * sum(int(count[c]) for c in across) / 5000
    assert abs(float(got - _sorted_groups(confidence, hit, groups))) <= bound + 1e-6


def test_equal_mass_from_bins(backend):
    """Regroup bins into one group, which compares overall means, and into as many groups as there are voxels."""
    x, target = scores(2, 3, 400), labels((2, 3, 400))
    bins = calseg.calibration_bins(x, target, n_bins=65536, per_item=True, class_wise=True, backend=backend)
    errors = calseg.calibration_error_from_bins(bins, equal_mass=1)
    assert errors.shape == (2, 3)
    p = torch.softmax(x, 1)
    wanted = (p.mean(2) - torch.stack([(target == c).double().mean(1) for c in range(3)], 1)).abs()
    torch.testing.assert_close(errors, wanted, rtol=0, atol=1e-6)


# ---- results ----


def test_per_item(backend):
    """per_item gives a value per item. The pooled value is that of all voxels, not the mean of the items."""
    x, target = scores(3, 4, 100), labels((3, 4, 100))
    for norm in NORMS:
        for class_wise in (False, True):
            options = {"norm": norm, "class_wise": class_wise, "backend": backend}
            got = calseg.calibration_error(x, target, per_item=True, **options)
            alone = [calseg.calibration_error(x[n : n + 1], target[n : n + 1], **options) for n in range(3)]
            assert torch.equal(got, torch.stack(alone))


def test_errors_name_the_argument(backend):
    x, target = probabilities(2, 3, 4, 5), labels((2, 3, 4, 5))
    bad = target.clone()
    bad[1, 2, 3] = 3
    for wrong, match in ((bad, r"target\[1, 2, 3\] is 3: wanted a class in \[0, 3\) or ignore_index=-100"),
                         (bad[:, None].to(torch.int8), r"target\[1, 0, 2, 3\] is 3")):  # fmt: skip
        with pytest.raises(IndexError, match=match):
            calseg.calibration_bins(x, wrong, from_logits=False, backend=backend)
    wrong = x.clone()
    wrong[1, 0, 3, 4] += 0.01
    wrong[0, :, 0, 1] = torch.nan  # a NaN is counted and raises nothing
    with pytest.raises(ValueError, match=r"preds\[1, :, 3, 4\] sums to 1.01, .*wanted probabilities.*from_logits=True"):
        calseg.calibration_bins(wrong, target, from_logits=False, backend=backend)
    negative = torch.tensor([[0.5, 0.5], [1.01, -0.01]])
    with pytest.raises(ValueError, match=r"preds\[1, :\] sums to 1, its smallest is -0.01"):
        calseg.calibration_bins(negative, torch.tensor([0, 0]), from_logits=False, backend=backend)
    with pytest.raises(ValueError, match=r"preds\[:\] sums to 3"):
        calseg.calibration_bins(torch.ones(3), torch.tensor(1), from_logits=False, backend=backend)
    # voxels that do not count are not checked
    calseg.calibration_bins(negative, torch.tensor([0, -100]), from_logits=False, backend=backend)
    calseg.calibration_bins(negative.half() + 0.002, torch.tensor([0, -100]), from_logits=False, backend=backend)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_bins": 0}, ValueError, "n_bins: got 0, wanted at least 1"),
        ({"n_bins": 65537}, ValueError, "n_bins: got 65537, wanted at most 65536"),
        ({"n_bins": 1.5}, TypeError, "n_bins: got 1.5"),
        ({"norm": "ece"}, ValueError, "norm: got 'ece', wanted one of 'l1', 'l2', 'max', 'average'"),
        ({"from_logits": None}, TypeError, "from_logits: got None"),
        ({"class_wise": 1}, TypeError, "class_wise: got 1"),
        ({"include_background": "no"}, TypeError, "include_background: got 'no'"),
        ({"per_item": 0}, TypeError, "per_item: got 0"),
        ({"right_closed": 0}, TypeError, "right_closed: got 0"),
        ({"equal_mass": 15}, TypeError, "equal_mass: got 15"),
        ({"equal_mass": True, "n_bins": 0}, ValueError, "n_bins: got 0"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: got 0.5"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask: got a float32 tensor.*wanted a bool tensor"),
        ({"mask": torch.ones(2, 5).bool()}, ValueError, r"mask: .*\[2, 5\].*wanted shape \[2, 4\]"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
        ({"target": torch.zeros(2, 5)}, ValueError, r"target: got a float32 tensor.*wanted shape \[2, 4\]"),
        ({"input": torch.zeros(2, 3, 4).long()}, TypeError, "preds: got a int64 tensor"),
        ({"input": torch.zeros(2, 1, 4), "class_wise": True, "include_background": False}, ValueError,
         "include_background: got False for one class"),
    ],
)  # fmt: skip
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        calseg.calibration_error(
            **{"input": torch.zeros(2, 3, 4), "target": torch.zeros(2, 4, dtype=torch.int64), **options}
        )


def test_wrong_bins():
    bins = calseg.calibration_bins(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"bins: got \(1, 2\)"):
        calseg.calibration_error_from_bins((1, 2))
    with pytest.raises(ValueError, match="norm: got 'l3'"):
        calseg.calibration_error_from_bins(bins, "l3")
    with pytest.raises(ValueError, match="equal_mass: got 0, wanted at least 1"):
        calseg.calibration_error_from_bins(bins, equal_mass=0)


# ---- the argument space ----


@given(data=st.data())
def test_any_arguments(backend, data):
    """For probabilities, all integers equal those of the reference in float64, for any arguments."""
    draw = data.draw
    C = draw(st.integers(1, 20), label="C")
    space = draw(st.lists(st.integers(1, 9), max_size=3), label="space")
    shape = (draw(st.integers(1, 4), label="N"), C, *space)
    dtype = draw(st.sampled_from((torch.float32, torch.float64)), label="dtype")
    p = probabilities(*shape, dtype=dtype, seed=draw(st.integers(0, 9), label="seed"))
    if len(shape) > 2:
        p = draw(st.sampled_from(list(LAYOUTS.values())), label="layout")(p)
    target = labels(shape, dtype=draw(st.sampled_from(LABELS), label="labels"))
    mask = None
    if draw(st.booleans(), label="masked"):
        mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(7)) < 0.6
    kinds = KINDS if C > 1 else KINDS[:-1]
    options = {
        "n_bins": draw(st.sampled_from((1, 2, 10, 15, 64, 1000)), label="n_bins"),
        "ignore_index": draw(st.sampled_from((-100, 0, C - 1, 99)), label="ignore_index"),
        "per_item": draw(st.booleans(), label="per_item"),
        "right_closed": draw(st.booleans(), label="right_closed"),
        "from_logits": False,
        "mask": mask,
        **draw(st.sampled_from(kinds), label="kind"),
    }
    got = calseg.calibration_bins(p, target, backend=backend, **options)
    wanted = calseg.calibration_bins(p.contiguous(), target.long(), backend="reference", **options)
    assert_same_bins(got, wanted, units=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for norm in NORMS:
            torch.testing.assert_close(
                calseg.calibration_error_from_bins(got, norm), calseg.calibration_error_from_bins(wanted, norm),
                equal_nan=True, rtol=0, atol=0,
            )  # fmt: skip
