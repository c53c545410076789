"""Tests of the handler for ignite's engines, alone and in two processes, and of the example that trains."""

from __future__ import annotations

import operator
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import labels, scores
from torch import Tensor

pytest.importorskip("monai")
pytest.importorskip("ignite")
pytest.importorskip("torchmetrics")

from ignite.engine import Engine
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import decollate_batch
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import calseg
from calseg.integrations.monai import CalibrationHandler
from calseg.metrics import BrierScore, CalibrationError, NegativeLogLikelihood, PerCase

ROOT = Path(__file__).parent.parent.parent
SHAPE = (6, 3, 5, 6, 7)
ENDED = "==== ended\n"


def volumes() -> tuple[Tensor, Tensor]:
    """Return probabilities, whose sums have the same bits whatever the batch, and labels ``[N, 1, *S]``."""
    logits = scores(*SHAPE, dtype=torch.float32)
    return torch.softmax(logits, 1), labels(SHAPE, ignore_index=None)[:, None]


def metrics() -> dict[str, Any]:
    return {
        "ece": CalibrationError(from_logits=False),
        "near": CalibrationError(from_logits=False, region="near", radius=1),
        "nll": NegativeLogLikelihood(from_logits=False),
        "cases": PerCase(CalibrationError(from_logits=False), num_resamples=10),
        "classes": CalibrationError(from_logits=False, class_wise=True, num_classes=3, average="none"),
    }


def evaluator(preds: Tensor, target: Tensor, size: int = 2, *, decollated: bool = False) -> tuple[Engine, list[Any]]:
    """Return an engine whose output is the batch, and its batches."""

    def step(engine: Engine, batch: dict[str, Tensor]) -> Any:
        return decollate_batch(batch) if decollated else batch

    batches = [
        {"pred": MetaTensor(preds[at : at + size]), "label": MetaTensor(target[at : at + size])}
        for at in range(0, len(preds), size)
    ]
    return Engine(step), batches


@pytest.mark.parametrize("decollated", [False, True])
def test_values_are_those_of_all_volumes(decollated):
    preds, target = volumes()
    engine, batches = evaluator(preds, target, decollated=decollated)
    CalibrationHandler(metrics(), from_engine(["pred", "label"])).attach(engine)
    for _ in range(2):  # every epoch begins anew
        found = engine.run(batches).metrics
    options = {"from_logits": False}
    assert found["ece"] == float(calseg.calibration_error(preds, target, **options))
    assert found["near"] == float(calseg.calibration_error(preds, target, region="near", radius=1, **options))
    assert found["nll"] == float(calseg.calibration_bins(preds, target, **options).mean_nll())
    assert found["cases"] == pytest.approx(
        float(calseg.calibration_error(preds, target, per_item=True, **options).mean())
    )
    assert found["cases_lower"] < found["cases"] < found["cases_upper"]
    bins = calseg.calibration_bins(preds, target, class_wise=True, **options)
    assert torch.equal(found["classes"], calseg.calibration_error_from_bins(bins))
    assert type(found["ece"]) is float


def test_volumes_of_unequal_sizes_and_one_hot_labels():
    """Decollated volumes keep their sizes. One-hot floats, which MONAI's Dice needs, count as class indices."""
    preds, target = volumes()
    parts = [(preds[n, :, : 3 + n % 3], target[n, :, : 3 + n % 3]) for n in range(len(preds))]
    values = []
    for one_hot in (False, True):
        output = [
            {"pred": p, "label": torch.nn.functional.one_hot(t[0], 3).movedim(-1, 0).float() if one_hot else t}
            for p, t in parts
        ]
        engine = Engine(lambda engine, batch: batch)
        CalibrationHandler(CalibrationError(from_logits=False)).attach(engine, "ece")
        values.append(engine.run([output]).metrics["ece"])
    flat = torch.cat([p.flatten(1) for p, _ in parts], 1)[None], torch.cat([t.flatten() for _, t in parts])[None]
    assert values[0] == float(calseg.calibration_error(*flat, from_logits=False))
    assert values[1] == pytest.approx(values[0], abs=1e-12)


def test_as_key_metric_of_an_evaluator():
    """MONAI's evaluator attaches it by name, and remembers the epoch with the lowest error."""
    torch.manual_seed(0)
    image, label = torch.randn(4, 1, 8, 8, 8), torch.randint(0, 3, (4, 1, 8, 8, 8)).float()
    network = torch.nn.Conv3d(1, 3, 1)
    found = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": MetaTensor(image), "label": MetaTensor(label)}],
        epoch_length=1,
        network=network,
        key_val_metric={"ece": CalibrationHandler(CalibrationError())},
        additional_metrics={"score": CalibrationHandler({"nll": NegativeLogLikelihood(), "brier": BrierScore()})},
        val_handlers=[CalibrationHandler(CalibrationError(norm="max"))],
        metric_cmp_fn=operator.lt,
    )
    found.run()
    first = found.state.best_metric
    with torch.no_grad():
        logits = network(image)
    assert first == found.state.metrics["ece"] == pytest.approx(float(calseg.calibration_error(logits, label)))
    assert set(found.state.metrics) == {"ece", "score_nll", "score_brier", "CalibrationError"}
    assert found.state.metrics["CalibrationError"] > first
    with torch.no_grad():
        network.weight.mul_(9)
    found.run()
    assert found.state.metrics["ece"] > found.state.best_metric == first


def test_a_collection_with_metrics_of_torchmetrics():
    preds, target = volumes()
    engine, batches = evaluator(preds, target[:, 0])
    collection = MetricCollection(
        {"ece": CalibrationError(from_logits=False), "accuracy": MulticlassAccuracy(3, average="micro")}, prefix="val_"
    )
    CalibrationHandler(collection).attach(engine)
    found = engine.run(batches).metrics
    assert set(found) == {"val_ece", "val_accuracy"}
    assert found["val_accuracy"] == pytest.approx(float((preds.argmax(1) == target[:, 0]).double().mean()))


def _rank(rank: int, store: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    torch.set_num_threads(1)
    try:
        preds, target = volumes()
        mine = slice(0, 4) if rank == 0 else slice(4, 6)  # unequal parts
        engine, batches = evaluator(preds[mine], target[mine])
        CalibrationHandler(metrics()).attach(engine)
        torch.save(engine.run(batches).metrics, f"{out}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_values_of_one(tmp_path, set_threads):
    places = str(tmp_path / "store"), str(tmp_path)
    other = torch.multiprocessing.get_context("spawn").Process(target=_rank, args=(1, *places), daemon=True)
    other.start()
    _rank(0, *places)
    other.join()
    assert other.exitcode == 0
    engine, batches = evaluator(*volumes())
    CalibrationHandler(metrics()).attach(engine)
    wanted = engine.run(batches).metrics
    for rank in (0, 1):
        found = torch.load(tmp_path / str(rank))
        assert torch.equal(found.pop("classes"), wanted["classes"])
        assert found == {name: value for name, value in wanted.items() if name != "classes"}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("ece", "metrics: got 'ece'"),
        ({}, "metrics: got none, wanted metrics of torchmetrics by name"),
        ({"ece": 3}, "metrics: got 'ece': 3"),
        ([CalibrationError()], "metrics: got .*list"),
    ],
    ids=str,
)
def test_bad_metrics(metrics, message):
    with pytest.raises(TypeError, match=message):
        CalibrationHandler(metrics)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ({"pred": torch.rand(1, 3, 4), "label": torch.zeros(1, 1, 5)}, ValueError, r"target: got .*shape \[1, 1, 5\]"),
        (
            {"pred": [torch.rand(3, 4)], "label": []},
            TypeError,
            "predictions list of 1 and target list of 0, wanted two",
        ),
        ({"pred": [torch.rand(3, 4)], "label": torch.zeros(1, 1, 4)}, TypeError, "list of 1 and target Tensor of 1"),
        ({"pred": np.ones((2, 3, 4)), "label": torch.zeros(2, 1, 4)}, TypeError, "predictions ndarray of 2"),
        (
            {"pred": torch.rand(1, 3, 4).softmax(1), "label": torch.zeros(1, 1, 4)},
            ValueError,
            "CalibrationError: got predictions that are probabilities, wanted logits; give .* from_logits=False",
        ),
        ({"pred": torch.rand(1, 3, 4)}, KeyError, "label"),
        ([1, 2, 3], ValueError, "output_transform: got .*, wanted predictions and target"),
    ],
    ids=str,
)
def test_bad_outputs(output, error, message):
    engine = Engine(lambda engine, batch: batch)
    transform = from_engine(["pred", "label"]) if isinstance(output, dict) else lambda output: output
    CalibrationHandler(CalibrationError(), transform).attach(engine)
    with pytest.raises(error, match=message):
        engine.run([output])


def test_several_metrics_are_no_key_metric():
    with pytest.raises(ValueError, match="ece: got 2 metrics by name, wanted one metric as the key metric"):
        SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=[],
            epoch_length=1,
            network=torch.nn.Identity(),
            key_val_metric={"ece": CalibrationHandler({"a": CalibrationError(), "b": BrierScore()})},
        )
    with pytest.raises(TypeError, match="output_transform: got 'pred'"):
        CalibrationHandler(CalibrationError(), "pred")


# ---- the example ----


def test_the_example_trains_on_a_decathlon_folder(tmp_path):
    """With hard labels and with soft ones: the loss falls, the checkpoint is there, soft labels fit their labels."""
    from calseg.simulation import DemoConfig, make_dataset
    from calseg.volumes.datasets import find_cases, load_case
    from calseg.volumes.probabilities import soft_labels_file, soft_labels_path

    data, soft = tmp_path / "Task00_Demo", tmp_path / "soft_labels"
    make_dataset(data, DemoConfig(cases=6, raters=2, side=16))
    soft.mkdir()
    dataset = find_cases(data)
    for case in dataset.cases:
        label = torch.from_numpy(load_case(case, dataset)[1]).long()
        blended = 0.9 * torch.nn.functional.one_hot(label, 3).movedim(-1, 0) + 0.1 / 3
        soft_labels_path(soft, case.name).write_bytes(soft_labels_file(blended.float().numpy(), case.images[0]))
    example = ROOT / "examples" / "monai_decathlon.py"
    assert len(example.read_text().splitlines()) < 60
    settings = [str(data), "--epochs", "3", "--patch", "16", "--out"]
    options = {"hard": [], "soft": ["--soft-labels", str(soft)]}
    calls = [[str(example), *settings, str(tmp_path / name), *more] for name, more in options.items()]
    code = f"import runpy, sys\nfor sys.argv in {calls!r}:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    command = [sys.executable, "-c", f"{code}    print({ENDED!r})"]  # one import of MONAI
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    for name, output in zip(options, run.stdout.split(ENDED)[:2], strict=True):
        assert "'ece_near_foreground': 0." in output
        losses = [float(loss) for loss in re.findall(r"-- loss: ([\d.]+)", output)]
        assert len(losses) == 9
        assert sum(losses[-3:]) < sum(losses[:3])
        assert list((tmp_path / name).glob("*.pt"))
