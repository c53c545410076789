"""Tests of the streaming metrics: exact sums, merging, synchronisation, and presets against other packages."""

from __future__ import annotations

import copy
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import labels, scores
from torch import Tensor

pytest.importorskip("torchmetrics")

from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

import calseg
from calseg import metrics as module
from calseg.bootstrap import mean_interval, pooled_interval
from calseg.metrics import BrierScore, CalibrationError, NegativeLogLikelihood, PerCase, preset_metric

SHAPE = (4, 3, 6, 7, 8)


def volumes(count: int = 4, *, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return logits and labels that mostly agree. A fifth of the voxels is ignored."""
    x = scores(count, *SHAPE[1:], dtype=dtype, scale=scale)
    target = labels((count, *SHAPE[1:]), ignore_index=-100)
    guess = torch.rand(target.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    return x, torch.where(guess & (target != -100), x.argmax(1), target)


def probabilities(count: int = 4) -> tuple[Tensor, Tensor]:
    """Return the same as probabilities, for tests of equal bits, because torch's softmax rounds by a voxel's place."""
    x, target = volumes(count)
    return x.softmax(1), target


P: dict[str, Any] = {"from_logits": False}


def same_state(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) and a.dtype == torch.int64 for a, b in zip(first.bins, second.bins, strict=True))


SETTINGS: dict[str, dict[str, Any]] = {
    "ece": {},
    "ace": {"norm": "average", "n_bins": 10},
    "mce": {"norm": "max"},
    "rmsce": {"norm": "l2", "right_closed": True},
    "foreground": {"include_background": False},
    "equal_mass": {"equal_mass": True, "n_bins": 6},
    "class_wise": {"class_wise": True},
    "classes_of_foreground": {"class_wise": True, "include_background": False, "norm": "average"},
    "ignore": {"ignore_index": 2},
}


def make(settings: dict[str, Any], **more: Any) -> CalibrationError:
    classes = {"num_classes": SHAPE[1]} if settings.get("class_wise") else {}
    return CalibrationError(**settings, **classes, **more)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_stream_has_the_value_of_the_whole(settings: dict[str, Any]) -> None:
    x, target = probabilities()
    target = target.clamp(min=0) if "ignore_index" in settings else target
    metric = make(settings, **P)
    for item in range(len(x)):
        for slab in (slice(0, 2), slice(2, 3), slice(3, 6)):  # of one volume
            metric.update(x[item : item + 1, :, slab], target[item : item + 1, slab])
    assert torch.equal(metric.compute(), calseg.calibration_error(x, target, **settings, **P))
    metric.reset()
    metric.update(x[:1], target[:1])
    assert torch.equal(metric.compute(), calseg.calibration_error(x[:1], target[:1], **settings, **P))


def test_probabilities_masks_and_foreground_of_classes() -> None:
    x, target = volumes()
    p, mask = x.double().softmax(1), scores(4, 6, 7, 8) > 0
    metric = CalibrationError(from_logits=False, class_wise=True, num_classes=3, foreground_only=True, average="none")
    metric.update(p, target[:, None], mask[:, None])
    bins = calseg.calibration_bins(p, target, from_logits=False, class_wise=True, mask=mask & (target != 0))
    assert torch.equal(metric.compute(), calseg.calibration_error_from_bins(bins))
    assert metric.compute().shape == (3,)
    assert 0 < int(bins.num_voxels) < int((target > -1).sum())


def test_regions() -> None:
    x, target = volumes()
    target = target * (scores(4, 6, 7, 8) > 2)
    for options in (
        {"region": "near"},
        {"region": "near", "radius": 4, "spacing": (2, 1, 3)},
        {"region": "foreground"},
    ):
        metric = CalibrationError(**options)
        for item in range(len(x)):
            metric.update(preds=x[item : item + 1], target=target[item : item + 1, None])
        wanted = calseg.calibration_bins(x, target, **options)
        assert all(map(torch.equal, metric.bins, wanted))
        assert 0 < int(wanted.num_voxels) < target.numel()
        assert torch.equal(metric.compute(), calseg.calibration_error(x, target, **options))
    both = CalibrationError(foreground_only=True)
    both.merge_state(metric)  # the same settings
    assert same_state(both, metric)
    for other in (CalibrationError(region="near"), CalibrationError(region="near", radius=2)):
        with pytest.raises(ValueError, match="other settings"):
            CalibrationError(region="near", spacing=2.0).merge_state(other)
    with pytest.raises(ValueError, match="foreground_only: got True with region='near'"):
        CalibrationError(foreground_only=True, region="near")
    with pytest.raises(ValueError, match="region: got 'rim'"):
        NegativeLogLikelihood(region="rim")


def test_soft_labels_and_binary_predictions() -> None:
    x, generator = scores(4, 3, 5, 6), torch.Generator().manual_seed(0)
    maps = torch.randint(0, 3, (5, 4, 5, 6), generator=generator)
    soft = torch.nn.functional.one_hot(maps, 3).float().mean(0).movedim(-1, 1)
    metric, per_case = CalibrationError(), PerCase(CalibrationError(), pooled=True)
    for item in range(4):
        metric.update(x[item : item + 1], soft[item : item + 1])
        per_case.update(x[item : item + 1], soft[item : item + 1])
    assert torch.equal(metric.compute(), calseg.calibration_error(x, soft))
    assert torch.equal(per_case.compute()["value"], metric.compute())
    assert metric.bins.partial_hits.any()
    assert metric.diagram_bins(metric.bins).accuracy().nan_to_num().max() <= 1
    p, target = scores(2, 5, 6).sigmoid(), maps[0, :2].clamp(max=1)
    for settings in ({}, {"separate_one": True}, {"class_wise": True, "num_classes": 2, "include_background": False}):
        metric = CalibrationError(from_logits=False, **settings)
        metric.update(p, target)
        two = CalibrationError(from_logits=False, **settings)
        two.update(torch.stack([1 - p, p], 1), target)
        assert same_state(metric, two)
        assert float(metric.compute()) > 0


def test_a_mixed_collection_by_keyword() -> None:
    """Metrics of calseg and of torchmetrics in one collection; each takes the keywords that it knows."""
    shape = (4, 3, 6, 5, 4)
    p, y = torch.softmax(scores(*shape, dtype=torch.float32), 1), labels(shape)
    mask = scores(4, 6, 5, 4) > 0
    metrics = MetricCollection(
        {
            "ece": CalibrationError(from_logits=False), "brier": BrierScore(from_logits=False),
            "cases": PerCase(CalibrationError(from_logits=False), num_resamples=10),
            "accuracy": MulticlassAccuracy(3, average="micro"), "theirs": MulticlassCalibrationError(3),
        }
    )  # fmt: skip
    for item in range(4):
        part = slice(item, item + 1)
        values = metrics(preds=p[part], target=y[part])
        assert torch.equal(values["ece"], calseg.calibration_error(p[part], y[part], from_logits=False))
    result = metrics.compute()
    assert torch.equal(result["ece"], calseg.calibration_error(p, y, from_logits=False))
    assert torch.equal(result["brier"], calseg.calibration_bins(p, y, from_logits=False).mean_brier())
    assert float(result["theirs"]) == pytest.approx(float(result["ece"]), abs=1e-4)
    assert float(result["accuracy"]) == pytest.approx(float((p.argmax(1) == y).float().mean()))
    metrics.reset()
    metrics.update(preds=p, target=y, mask=mask)
    groups = sorted(map(sorted, metrics.compute_groups.values()))
    assert groups == [["accuracy"], ["brier", "ece"], ["cases"], ["theirs"]]
    result = metrics.compute()
    assert torch.equal(result["ece"], calseg.calibration_error(p, y, mask=mask, from_logits=False))
    assert float(result["accuracy"]) == pytest.approx(float((p.argmax(1) == y).float().mean()))  # it knows no mask


def test_nll_and_brier() -> None:
    x, target = volumes(dtype=torch.float64)
    nll, brier = NegativeLogLikelihood(), BrierScore(include_background=False)
    for item in range(len(x)):
        nll.update(x[item : item + 1], target[item : item + 1])
        brier.update(x[item : item + 1], target[item : item + 1])
    wanted = torch.nn.functional.cross_entropy(x, target)
    torch.testing.assert_close(nll.compute(), wanted, rtol=0, atol=1e-8)
    p, keep = x.softmax(1).movedim(1, -1), target > 0
    error = (p[keep] - torch.nn.functional.one_hot(target[keep], 3)).square().sum(1).mean()
    torch.testing.assert_close(brier.compute(), error, rtol=0, atol=1e-8)


def test_any_order_threads_and_merges_give_the_same_bits(set_threads: Any) -> None:
    x, target = probabilities(6)
    forward, backward = CalibrationError(**P), CalibrationError(**P)
    parts = [CalibrationError(**P) for _ in range(3)]
    set_threads(2)
    for item in range(6):
        forward.update(x[item : item + 1], target[item : item + 1])
        parts[item % 3].update(x[item : item + 1], target[item : item + 1])
    set_threads(1)
    for item in reversed(range(6)):
        backward.update(x[item : item + 1], target[item : item + 1])
    merged = CalibrationError(**P)
    for part in (parts[2], parts[0].metric_state, parts[1]):
        merged.merge_state(part)
    assert same_state(forward, backward)
    assert same_state(forward, merged)
    assert torch.equal(forward.compute(), merged.compute())  # no warning that update was not called


def test_counts_far_beyond_float32() -> None:
    """2^24 + 1 hits, and sums of 2^34 voxels, are exact."""
    one = calseg.calibration_bins(torch.tensor([[0.75, 0.25]]), torch.tensor([0]), from_logits=False)
    many = calseg.CalibrationBins(*(sums * (2**24 + 1) for sums in one))
    metric = CalibrationError(from_logits=False)
    for _ in range(1000):
        metric.update(many)
    assert int(metric.count.sum()) == int(metric.hits.sum()) == 1000 * (2**24 + 1)
    assert float(metric.compute()) == 0.25


def test_forward_gives_the_value_of_the_batch_and_accumulates() -> None:
    x, target = probabilities()
    metric, case = CalibrationError(**P), PerCase(CalibrationError(**P), num_resamples=10)
    for item in range(4):
        value = calseg.calibration_error(x[item : item + 1], target[item : item + 1], **P)
        assert torch.equal(metric(x[item : item + 1], target[item : item + 1]), value)
        assert torch.equal(case(x[item : item + 1], target[item : item + 1])["value"], value)
    assert torch.equal(metric.compute(), calseg.calibration_error(x, target, **P))
    assert torch.equal(case.values, calseg.calibration_error(x, target, per_item=True, **P))


# ---- collections ----


def test_a_collection_reads_a_volume_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target = probabilities()
    calls = []
    original = calseg.calibration_bins
    monkeypatch.setattr(module, "calibration_bins", lambda *a, **k: calls.append(1) or original(*a, **k))
    members = {
        "ece": CalibrationError(**P),
        "ace": CalibrationError(norm="average", **P),
        "mce": CalibrationError(norm="max", **P),
        "nll": NegativeLogLikelihood(**P),
        "brier": BrierScore(**P),
        "cases": PerCase(CalibrationError(**P), num_resamples=10),
        "pooled": PerCase(NegativeLogLikelihood(**P), pooled=True, num_resamples=10),
    }
    collection = MetricCollection(members)
    for item in range(4):
        collection.update(x[item : item + 1], target[item : item + 1])
        if not item:
            assert sorted(map(sorted, collection.compute_groups.values())) == [
                ["ace", "brier", "ece", "mce", "nll"],
                ["cases", "pooled"],
            ]
            calls.clear()
    assert len(calls) == 3 * 2  # three more volumes, two groups
    result = collection.compute()
    assert torch.equal(result["ace"], calseg.calibration_error(x, target, norm="average", **P))
    assert torch.equal(result["nll"], calseg.calibration_bins(x, target, **P).mean_nll())
    assert torch.equal(
        result["cases_value"], calseg.calibration_error(x, target, per_item=True, **P).sort().values.mean()
    )
    collection.reset()
    collection.update(x[:1], target[:1])
    assert torch.equal(collection.compute()["mce"], calseg.calibration_error(x[:1], target[:1], norm="max", **P))


def test_equal_first_sums_do_not_tie_metrics_together() -> None:
    """Metrics with different settings are not grouped, even if their first sums are equal, as without background."""
    x, target = probabilities()
    collection = MetricCollection(
        {"all": CalibrationError(**P), "front": CalibrationError(include_background=False, **P)}
    )
    collection.update(x[:1], target[:1].clamp(min=1))
    collection.update(x, target)
    whole = (torch.cat([x[:1], x]), torch.cat([target[:1].clamp(min=1), target]))
    result = collection.compute()
    assert torch.equal(result["all"], calseg.calibration_error(*whole, **P))
    assert torch.equal(result["front"], calseg.calibration_error(*whole, include_background=False, **P))


def test_metrics_with_other_settings_are_not_merged() -> None:
    x, target = volumes()
    here, there = CalibrationError(), CalibrationError(right_closed=True)
    here.update(x, target)
    there.update(x, target)
    before = copy.deepcopy(here.bins)
    for state in (there, there.metric_state, {}):
        with pytest.raises(ValueError, match="incoming_state: got the state of a metric with other settings"):
            here.merge_state(state)
    with pytest.raises(ValueError, match="instance"):
        here.merge_state(BrierScore())
    assert all(torch.equal(a, b) for a, b in zip(before, here.bins, strict=True))


# ---- use by frameworks ----


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m.set_dtype(torch.float16),
        lambda m: m.to("cpu"),
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.deepcopy,
        lambda m: m.clone(),
        lambda m: torch.nn.ModuleList([m]).half()[0],
        lambda m: torch.nn.ModuleList([m]).to(torch.float16)[0],
        lambda m: torch.nn.ModuleList([m]).type(torch.float16)[0],
        lambda m: torch.nn.ModuleList([m]).bfloat16()[0],
    ],
)
@pytest.mark.parametrize("per_case", [False, True])
def test_the_state_stays_exact(change: Any, per_case: bool) -> None:
    x, target = volumes()
    metric = PerCase(CalibrationError()) if per_case else CalibrationError()
    metric.update(x[:2], target[:2])
    metric = change(metric)
    metric.update(x[2:], target[2:])
    bins = metric.cases.pool() if per_case else metric.bins
    for sums, wanted in zip(bins, calseg.calibration_bins(x, target), strict=True):
        assert sums.dtype == torch.int64
        assert torch.equal(sums, wanted)
    metric.reset()
    metric.update(x[:1], target[:1])
    bins = metric.cases.pool() if per_case else metric.bins
    assert torch.equal(bins.confidence, calseg.calibration_bins(x[:1], target[:1]).confidence)


def test_state_dict(tmp_path: Path) -> None:
    x, target = volumes()
    metric = CalibrationError()
    assert metric.state_dict() == {}  # as torchmetrics': states are saved only where asked for
    metric.persistent(True)
    metric.update(x, target)
    torch.save(metric.state_dict(), tmp_path / "metric.pt")
    again = CalibrationError()
    again.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    assert same_state(metric, again)
    other = CalibrationError(n_bins=15, include_background=False)
    with pytest.raises(RuntimeError, match="settings: got the state of a metric with other settings"):
        other.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    assert int(other.count.sum()) == 0


def test_the_state_is_kilobytes() -> None:
    x, target = volumes(8)
    pooled, cases = CalibrationError(), PerCase(CalibrationError())
    for item in range(8):
        pooled.update(x[item : item + 1], target[item : item + 1])
        cases.update(x[item : item + 1], target[item : item + 1])
    assert sum(sums.nbytes for sums in pooled.bins) < 1024
    assert sum(sums.nbytes for sums in cases.cases) < 1024 * 8


def _rank(rank: int, port: int, folder: str) -> None:
    """Run one of two processes. Rank 0 has volumes 0 to 2, rank 1 volume 3. The third metric has no case on rank 1."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, target = probabilities()
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    metric = CalibrationError(**P)
    cases = PerCase(CalibrationError(class_wise=True, num_classes=3, average="none", **P))
    lonely = PerCase(NegativeLogLikelihood(**P))
    collection = MetricCollection({"ece": CalibrationError(**P), "nll": NegativeLogLikelihood(**P)})
    for each in (metric, cases, collection):
        each.update(x[mine], target[mine])
    if rank == 0:
        lonely.update(x, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank 1 has not updated the third
        result = {
            "value": metric.compute(),
            "cases": cases.compute(),
            "lonely": lonely.compute(),
            "collection": collection.compute(),
            "local": metric.bins.count,
            "diagram": [float(bar.get_height()) for bar in metric.plot()[1][0].patches],
        }
        metric.update(x[mine], target[mine])  # after a sync each rank goes on with its own sums
        result["twice"] = metric.compute()
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    x, target = probabilities()
    alone = PerCase(CalibrationError(class_wise=True, num_classes=3, average="none", **P))
    alone.update(x, target)
    lonely = PerCase(NegativeLogLikelihood(**P))
    lonely.update(x.flip(0), target.flip(0))
    for result in ranks:
        assert torch.equal(result["value"], calseg.calibration_error(x, target, **P))
        assert torch.equal(result["twice"], result["value"])
        assert torch.equal(result["collection"]["nll"], calseg.calibration_bins(x, target, **P).mean_nll())
        for name in ("value", "lower", "upper"):
            assert torch.equal(result["cases"][name], alone.compute()[name])
            assert torch.equal(result["lonely"][name], lonely.compute()[name])
    assert int(ranks[0]["local"].sum()) == int((target[:3] != -100).sum())
    assert int(ranks[1]["local"].sum()) == int((target[3:] != -100).sum())
    assert ranks[0]["diagram"] == ranks[1]["diagram"]


# ---- per case, and the bootstrap ----


def test_per_case_mean_and_cases_without_a_value() -> None:
    x, target = volumes()
    target[2] = 0  # no foreground
    metric = PerCase(CalibrationError(include_background=False))
    metric.update(x, target)
    each = [calseg.calibration_error(x[i : i + 1], target[i : i + 1], include_background=False) for i in (0, 1, 3)]
    assert torch.isnan(metric.values[2])
    result = metric.compute()
    torch.testing.assert_close(result["value"], torch.stack(each).mean(), rtol=1e-15, atol=0)
    assert float(min(each)) <= float(result["lower"]) < float(result["value"]) < float(result["upper"])
    assert float(result["upper"]) <= float(max(each))


def test_slabs_of_a_case() -> None:
    x, target = probabilities(2)
    whole, slabs = PerCase(CalibrationError(**P)), PerCase(CalibrationError(**P))
    whole.update(x, target)
    for item in (1, 0):
        parts = [
            calseg.calibration_bins(x[item : item + 1, :, slab], target[item : item + 1, slab], **P)
            for slab in (slice(3), slice(3, 6))
        ]
        slabs.update(parts[0] + parts[1])
    assert torch.equal(whole.values.flip(0), slabs.values)
    assert all(torch.equal(whole.compute()[name], slabs.compute()[name]) for name in ("value", "lower", "upper"))


def test_mean_interval_against_a_loop() -> None:
    values = scores(23).exp()
    result = mean_interval(values, confidence_level=0.9, num_resamples=500, seed=7)
    sorted_values = values.sort().values
    draws = torch.randint(23, (500, 23), generator=torch.Generator().manual_seed(7))
    means = sorted(float(sorted_values[draw].mean()) for draw in draws)
    assert abs(float(result.value) - float(values.mean())) < 1e-12
    assert abs(float(result.lower) - means[int(0.05 * 499)]) < 1e-12
    assert abs(float(result.upper) - means[-1 - int(0.05 * 499)]) < 1e-12


def test_mean_interval_is_that_of_theory() -> None:
    """For many normal values, the interval is the mean plus and minus 1.96 standard errors."""
    values = scores(4000, scale=1.0)
    lower, upper = mean_interval(values)[1:]
    half = 1.96 * float(values.std(correction=0)) / 4000**0.5
    assert float(values.mean() - lower) == pytest.approx(half, rel=0.06)
    assert float(upper - values.mean()) == pytest.approx(half, rel=0.06)


def test_pooled_interval_against_a_loop() -> None:
    x, target = volumes(9)
    bins = calseg.calibration_bins(x, target, per_item=True, class_wise=True)
    result = pooled_interval(bins, calseg.calibration_error_from_bins, num_resamples=60, seed=2)
    order = sorted(range(9), key=lambda case: [*bins.count[case].flatten().tolist()])
    draws = torch.randint(9, (60, 9), generator=torch.Generator().manual_seed(2))
    values = []
    for draw in draws.tolist():
        chosen = torch.tensor([order[case] for case in draw])
        values.append(calseg.calibration_error_from_bins(calseg.CalibrationBins(*(f[chosen].sum(0) for f in bins))))
    by_class = torch.stack(values).sort(0).values
    assert torch.equal(result.value, calseg.calibration_error_from_bins(bins.pool()))
    assert torch.equal(result.lower, by_class[int(0.025 * 59)])
    assert torch.equal(result.upper, by_class[-1 - int(0.025 * 59)])


@pytest.mark.parametrize("pooled", [False, True])
def test_intervals_do_not_depend_on_the_order_of_cases(pooled: bool) -> None:
    x, target = volumes(12)
    results = []
    for order in (torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(1))):
        metric = PerCase(CalibrationError(norm="average"), pooled=pooled)
        for case in order.tolist():
            metric.update(x[case : case + 1], target[case : case + 1])
        results.append(metric.compute())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert float(results[0]["lower"]) < float(results[0]["value"]) < float(results[0]["upper"])


def test_too_few_cases_have_no_interval() -> None:
    x, target = volumes(1)
    for pooled in (False, True):
        metric = PerCase(CalibrationError(), pooled=pooled)
        metric.update(x, target)
        result = metric.compute()
        assert torch.equal(result["value"], calseg.calibration_error(x, target))
        assert torch.isnan(result["lower"])
        assert torch.isnan(result["upper"])
        metric.update(x, torch.full_like(target, -100))  # without a voxel that counts: not a case
        assert torch.isnan(metric.compute()["upper"])


def test_infinite_values_stay_infinite() -> None:
    p = torch.tensor([[[0.5, 0.0], [0.5, 1.0]]]).expand(3, 2, 2)
    metric = PerCase(NegativeLogLikelihood(from_logits=False))
    metric.update(p, torch.tensor([[0, 1], [1, 1], [0, 0]]))
    result = metric.compute()
    assert (float(result["value"]), float(result["upper"])) == (float("inf"), float("inf"))
    assert float(result["lower"]) == pytest.approx(0.5 * np.log(2))


# ---- presets against the real packages ----


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_preset_torchmetrics(norm: str, scale: float) -> None:
    x, target = volumes(scale=scale)
    x[0, 1, 0] = 200.0  # a confidence of exactly 1 for both, in torchmetrics' extra bin
    ours = preset_metric("torchmetrics", norm=norm)
    theirs = MulticlassCalibrationError(num_classes=3, n_bins=15, norm=norm, ignore_index=-100)
    for item in range(len(x)):
        ours.update(x[item : item + 1], target[item : item + 1])
        theirs.update(x[item : item + 1], target[item : item + 1])
    assert int(ours.count[-1]) > 0
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_the_extra_bin_of_torchmetrics_matters() -> None:
    """Confidences of exactly 1 are right, and slightly smaller ones mostly wrong. A common bin would hide the error."""
    p = torch.tensor([[1.0, 0.0]] * 50 + [[0.99, 0.01]] * 50)
    target = torch.tensor([0] * 50 + [1] * 50)
    theirs = MulticlassCalibrationError(num_classes=2, norm="max")(p, target)
    assert float(preset_metric("torchmetrics", norm="max", **P)(p, target)) == pytest.approx(float(theirs)) == 0.99
    assert float(CalibrationError(norm="max", **P)(p, target)) == pytest.approx(0.495)


@pytest.mark.parametrize(("norm", "theirs"), [("l1", "expected"), ("average", "average"), ("max", "maximum")])
@pytest.mark.parametrize("include_background", [True, False])
def test_preset_monai(norm: str, theirs: str, include_background: bool) -> None:
    monai = pytest.importorskip("monai.metrics")
    if not hasattr(monai, "CalibrationErrorMetric"):
        pytest.skip("needs monai 1.6")
    x, target = volumes()
    target = target.clamp(min=0)
    x[0, :, 0] = torch.tensor([0.0, 0.0, -200.0])[:, None, None]  # probabilities 0.5, an edge of their bins, and 0
    ours = preset_metric("monai", num_classes=3, norm=norm, include_background=include_background)
    metric = monai.CalibrationErrorMetric(calibration_reduction=theirs, include_background=include_background)
    ours.update(x, target)
    metric(y_pred=x.softmax(1), y=torch.nn.functional.one_hot(target, 3).movedim(-1, 1))
    assert float(ours.compute()["value"]) == pytest.approx(float(metric.aggregate()), rel=1e-5)


def naive_ece(confidence: np.ndarray, hit: np.ndarray, n_bins: int) -> float:
    """Return the ECE with bins (lo, hi], by comparisons for each bin."""
    total = 0.0
    for number in range(n_bins):
        inside = (confidence > np.float32(number / n_bins)) & (confidence <= np.float32((number + 1) / n_bins))
        if inside.any():
            gap = abs(confidence[inside].astype(np.float64).mean() - hit[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("class_wise", [False, True])
def test_preset_marginloss(class_wise: bool) -> None:
    x, target = volumes()
    x[1, :, 2] = torch.tensor([0.0, 0.0, -20.0])[:, None, None]  # a confidence on an edge of 10 bins
    errors = []
    for p, y in zip(x.softmax(1).numpy(), target.numpy(), strict=True):
        front = (y != 0) & (y != -100)
        p, y = p[:, front], y[front]
        if class_wise:
            errors.append(np.mean([naive_ece(p[c], y == c, 10) for c in range(3)]))
        else:
            errors.append(naive_ece(p.max(0), p.argmax(0) == y, 10))
    metric = preset_metric("marginloss", n_bins=10, class_wise=class_wise, **({"num_classes": 3} if class_wise else {}))
    metric.update(x, target)
    np.testing.assert_allclose(metric.values.numpy(), errors, rtol=1e-6)
    assert float(metric.compute()["value"]) == pytest.approx(np.mean(errors), rel=1e-6)


# ---- plots, warnings, errors ----


def test_plots() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    x, target = volumes()
    collection = MetricCollection({"ece": CalibrationError(), "brier": BrierScore()})
    values = [collection(x[item : item + 1], target[item : item + 1]) for item in range(3)]
    ece = collection["ece"]
    _, ax = ece.plot([value["ece"] for value in values])  # over time, as torchmetrics draws it
    assert ax.lines[0].get_ydata().tolist() == [float(value["ece"]) for value in values]
    assert ax.get_ylabel() == "CalibrationError"
    collection.plot()
    _, (diagram, _) = ece.plot()
    accuracy = ece.bins.accuracy()[ece.bins.count > 0]
    assert [bar.get_height() for bar in diagram.patches[: len(accuracy)]] == accuracy.tolist()
    _, mine = plt.subplots()
    assert ece.plot(ax=mine) == (None, mine)
    by_class = CalibrationError(class_wise=True, num_classes=3, include_background=False)
    by_class.update(x, target)
    assert [pair[0].get_title() for pair in by_class.plot()[1]] == ["class 1", "class 2"]
    with pytest.raises(ValueError, match="ax: got Axes"):
        by_class.plot(ax=mine)
    cases = PerCase(CalibrationError())
    cases.update(x, target)
    assert any("4 cases" in text.get_text() for text in cases.plot()[1][0].texts)
    cases.plot(cases.compute())
    plt.close("all")


@pytest.mark.parametrize("settings", [{"equal_mass": True}, {"separate_one": True}])
def test_diagrams_of_other_bins(settings: dict[str, Any]) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    x, target = volumes(scale=20.0)
    metric = CalibrationError(**settings)
    metric.update(x, target)
    n_bins = 16 if "equal_mass" in settings else 15
    wanted = calseg.calibration_bins(x, target, n_bins=n_bins)
    assert torch.equal(metric.diagram_bins(metric.bins).count, wanted.count)
    assert torch.equal(metric.diagram_bins(metric.bins).hits, wanted.hits)
    metric.plot()
    plt.close("all")


def test_nan_is_reported_once() -> None:
    x, target = volumes()
    x[1, 0, 0, 0, 0] = torch.nan
    target[1, 0, 0, 0] = 1
    for metric in (
        CalibrationError(),
        BrierScore(),
        PerCase(CalibrationError()),
        PerCase(CalibrationError(), pooled=True),
    ):
        metric.update(x, target)
        with pytest.warns(RuntimeWarning, match=f"^1 of {int((target != -100).sum())} voxels have a NaN") as caught:
            metric.compute()
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: CalibrationError(norm="l3"), ValueError, "norm: got 'l3'"),
        (lambda: CalibrationError(n_bins=0), ValueError, "n_bins: got 0"),
        (lambda: CalibrationError(equal_mass=True, n_bins=0), ValueError, "n_bins: got 0"),
        (lambda: CalibrationError(n_bins=2.5), TypeError, "n_bins: got 2.5"),
        (lambda: CalibrationError(class_wise=True), ValueError, "num_classes: got None"),
        (lambda: CalibrationError(num_classes=3), ValueError, "num_classes: got 3"),
        (lambda: CalibrationError(class_wise=True, num_classes=1, include_background=False), ValueError, "num_classes"),
        (lambda: CalibrationError(average="micro"), ValueError, "average: got 'micro'"),
        (lambda: CalibrationError(from_logits="yes"), TypeError, "from_logits: got 'yes'"),
        (lambda: CalibrationError(separate_one=True, right_closed=True), ValueError, "separate_one"),
        (lambda: CalibrationError(bins=3), ValueError, "Unexpected keyword arguments: `bins`"),
        (lambda: PerCase(MulticlassCalibrationError(3)), TypeError, "metric: got"),
        (lambda: PerCase(BrierScore(), confidence_level=1.0), ValueError, "confidence_level"),
        (lambda: PerCase(BrierScore(), num_resamples=0), ValueError, "num_resamples: got 0"),
        (lambda: PerCase(BrierScore(), seed=-1), ValueError, "seed: got -1"),
        (lambda: preset_metric("guo"), ValueError, "name: got 'guo', wanted one of 'torchmetrics'"),
        (lambda: CalibrationError().update(torch.zeros(2, 3)), TypeError, "target: got None"),
        (lambda: CalibrationError().update(torch.zeros(2, 3), torch.zeros(3).long()), ValueError, "target: got"),
        (
            lambda: CalibrationError(class_wise=True, num_classes=4).update(torch.zeros(2, 3), torch.zeros(2).long()),
            ValueError,
            r"preds: got bins \[3, 15\], wanted \[4, 15\]",
        ),
        (
            lambda: CalibrationError(from_logits=False).update(torch.ones(2, 3), torch.zeros(2).long()),
            ValueError,
            "sums to 3",
        ),
        (lambda: CalibrationError().update(torch.zeros(2, 3), torch.tensor([0, 3])), IndexError, "is 3"),
    ],
)  # fmt: skip
def test_errors(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_an_update_that_fails_changes_nothing() -> None:
    x, target = volumes()
    metric = CalibrationError()
    metric.update(x, target)
    before = copy.deepcopy(metric.bins)
    with pytest.raises(IndexError):
        metric.update(x, target.clamp(min=0) + 2)
    assert all(torch.equal(a, b) for a, b in zip(before, metric.bins, strict=True))


@pytest.mark.parametrize(("name", "package"), [("metrics", "torchmetrics"), ("plots", "matplotlib")])
def test_without_the_extra(name: str, package: str) -> None:
    code = f"""
import sys
sys.modules["{package}"] = None
import calseg
try:
    import calseg.{name}
except ModuleNotFoundError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"calseg.{name} needs {package}: pip install 'calseg[{name}]'"
