"""Tests of Lightning: logged values in one process and two, and diagrams in loggers."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tensorboard")
pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import lightning as L
import matplotlib.pyplot as plt
from cases import labels, scores
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

import calseg
from calseg.integrations.lightning import ReliabilityDiagrams, log_figure
from calseg.metrics import CalibrationError, NegativeLogLikelihood, PerCase

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_module.py"
# Lightning warns of small data sets, few workers and the like; PyTorch's schedulers warn of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


# ---- the example, in one process and in two ----


def arguments(folder: Path, devices: int) -> list[str]:
    return [str(EXAMPLE), "--devices", str(devices), "--epochs", "2", "--out", str(folder / f"run{devices}")]


def test_two_processes_log_the_values_of_one(tmp_path, monkeypatch, capsys, set_threads):
    """Before training both have the same network. Sums of integers then give the same bits."""
    run = subprocess.run(
        [sys.executable, *arguments(tmp_path, 2)], capture_output=True, text=True, check=False, timeout=900,
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    set_threads(1)
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # the example sets them; they are restored
    monkeypatch.setattr(sys, "argv", arguments(tmp_path, 1))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    outputs = {1: capsys.readouterr().out, 2: run.stdout}
    results = {devices: json.loads(output.splitlines()[-1]) for devices, output in outputs.items()}
    assert results[1]["before"] == results[2]["before"]
    assert len(results[1]["before"]) == 8
    for devices, result in results.items():
        assert result["after"]["val_nll"] < result["before"]["val_nll"]
        for name in ("val_ece", "val_ece_near_foreground", "cases"):
            drawn = pictures(tmp_path / f"run{devices}", f"reliability/{name}")
            assert len(drawn) == 3  # before training, and two epochs


# ---- diagrams ----


def pictures(folder: Path, tag: str) -> dict[int, np.ndarray]:
    """Return the pictures in the event files of TensorBoard, by step."""
    from PIL import Image

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    if tag not in events.Tags()["images"]:
        return {}
    return {
        image.step: np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
        for image in events.Images(tag)
    }


class Module(L.LightningModule):
    """A module with metrics in all places where they may be, which trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.direct = CalibrationError()
        self.sharing = MetricCollection(
            {"ece": CalibrationError(), "mce": CalibrationError(norm="max"), "nll": NegativeLogLikelihood()}
        )
        self.inner = torch.nn.ModuleDict({"deep": PerCase(CalibrationError()), "nll": PerCase(NegativeLogLikelihood())})
        self.classes = CalibrationError(class_wise=True, num_classes=3, average="none")
        self.never = CalibrationError()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return calseg.vls_cross_entropy(batch[0] + self.bias, batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        for metric in (self.direct, self.sharing, *self.inner.values(), self.classes):
            metric.update(*batch)
        self.log("direct", self.direct)
        self.log_dict(self.sharing)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        for metric in (*self.inner.values(), self.classes):
            metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def data() -> DataLoader:
    shape = (4, 3, 6, 5, 4)
    return DataLoader(TensorDataset(scores(*shape, dtype=torch.float32), labels(shape)), batch_size=2)


def trainer(logger: Any, *callbacks: Any, epochs: int = 3) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=logger, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


NAMES = ("direct", "ece", "mce", "inner.deep", "classes")


def test_diagrams_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fitting, module = trainer(logger, ReliabilityDiagrams(every_n_epochs=2)), Module()
    fitting.fit(module, data(), data())
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    assert float(fitting.callback_metrics["direct"]) == pytest.approx(float(calseg.calibration_error(x, y)))
    assert fitting.callback_metrics["ece"] == fitting.callback_metrics["direct"]
    bins = calseg.calibration_bins(x, y)
    assert float(fitting.callback_metrics["mce"]) == pytest.approx(
        float(calseg.calibration_error_from_bins(bins, "max"))
    )
    assert float(fitting.callback_metrics["nll"]) == pytest.approx(float(bins.mean_nll()))
    for name in NAMES:
        (picture,) = pictures(tmp_path, f"reliability/{name}").values()  # of the second of three epochs
        assert picture.shape[0] > 400
        assert len(np.unique(picture @ (1 << 16, 1 << 8, 1))) > 50  # colours
        assert (picture == (158, 202, 225)).all(-1).sum() > 1000  # the colour of the bars
    drawn = {name: pictures(tmp_path, f"reliability/{name}") for name in ("never", "nll", "inner.nll", "metric")}
    assert not any(drawn.values())
    fitting.test(module, data(), verbose=False)
    assert len(pictures(tmp_path, "reliability/direct")) == 2
    assert not plt.get_fignums()


def test_one_picture_is_that_of_the_metric(tmp_path):
    """The callback draws what ``plot`` draws of all batches together."""
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(logger, ReliabilityDiagrams()).validate(Module(), data(), verbose=False)
    metric = CalibrationError()
    for batch in data():
        metric.update(*batch)
    figure, _ = metric.plot()
    figure.canvas.draw()
    wanted = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    np.testing.assert_array_equal(pictures(tmp_path, "reliability/direct")[0], wanted)


@pytest.mark.parametrize("kind", ["CSVLogger", "none"])
def test_a_logger_without_figures_gives_one_warning(tmp_path, kind):
    logger, why = (
        (CSVLogger(tmp_path), "CSVLogger takes no figures") if kind == "CSVLogger" else (False, "there is no logger")
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(logger, ReliabilityDiagrams()).fit(Module(), data(), data())
    messages = [str(each.message) for each in caught if "ReliabilityDiagrams" in str(each.message)]
    assert messages == [f"ReliabilityDiagrams: no diagram is logged, since {why}; a TensorBoardLogger takes figures"]


def test_one_logger_of_several_takes_figures(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board", name="", version="")]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ReliabilityDiagrams")
        trainer(loggers, ReliabilityDiagrams(), epochs=1).fit(Module(), data(), data())
    assert len(pictures(tmp_path / "board", "reliability/direct")) == 1


def test_loggers_of_services():
    """Calls of the loggers of Weights & Biases, MLflow and Comet have the arguments that they document."""
    calls: list[Any] = []

    class Wandb:
        experiment = object()

        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            calls.append((key, images[0].shape, step))

    class MLflow:
        run_id = "r1"

        class experiment:  # noqa: N801
            @staticmethod
            def log_figure(run_id: str, figure: Any, artifact_file: str) -> None:
                calls.append((run_id, figure, artifact_file))

    class Comet:
        class experiment:  # noqa: N801
            @staticmethod
            def log_figure(figure_name: str, figure: Any, overwrite: bool = False, step: int | None = None) -> None:
                calls.append((figure_name, figure, step))

    figure = plt.figure(figsize=(2, 1), dpi=100)
    assert all(log_figure(logger, "a/b", figure, 7) for logger in (Wandb(), MLflow(), Comet()))
    assert calls == [("a/b", (100, 200, 4), 7), ("r1", figure, "a/b/7.png"), ("a/b", figure, 7)]
    assert not log_figure(object(), "a/b", figure, 7)
    plt.close(figure)


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_bad_options(every):
    with pytest.raises((TypeError, ValueError), match="every_n_epochs: got"):
        ReliabilityDiagrams(every_n_epochs=every)
