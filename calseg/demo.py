"""Demonstration behind ``calseg demo``: cross-entropy and CALSeg, trained on simulated lesions and compared.

Training sees one rater's map of each case (:mod:`calseg.simulation`). The demo scores the predictions against the maps
of all other raters and against the true probabilities.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calseg.runs import Progress, RunFolder, no_progress, write_json
from calseg.scores import MAIN_STATISTICS, TRUTH_STATISTICS, CaseScores, TruthBins, truth_bins, values_of
from calseg.simulation import (
    CLASS_NAMES,
    DemoConfig,
    dataset_files,
    make_dataset,
    rater_file,
    training_rater,
    truth_file,
)
from calseg.training.config import TrainConfig
from calseg.training.stage_two import started, train
from calseg.volumes.datasets import find_cases, load_case
from calseg.volumes.nifti import read_volume
from calseg.volumes.probabilities import read_soft_labels, soft_labels_path

DEMO_JSON = "demo.json"
DEMO_PNG = "demo.png"
COMPARED = ("cross_entropy", "calseg")
FOLDS = 2
"""Folds of the first stage: so few that the demo takes no more than a minute or two."""


def run_demo(
    out: str | Path,
    config: DemoConfig,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, dict[str, Any]]:
    """Make ``out/data``, train ``out/cross_entropy`` and ``out/calseg``; ``{method: metrics}``.

    A folder that holds a demo with the same settings is continued where it stopped (a finished one is only
    scored again); with other settings, or with other content, ``overwrite`` is needed. The metrics of a run
    get two entries more: ``raters``, the scores against all other raters' maps, and ``truth``, the squared
    distance to the true probabilities summed over the classes.
    """
    root = Path(out)
    parts = tuple(RunFolder(root / method, "train") for method in COMPARED)
    data_files = tuple(f"data/{name}" for name in dataset_files(config))
    folder = RunFolder(root, "demo", (DEMO_JSON, DEMO_PNG, *data_files), continues=True, parts=parts)
    with folder.open(asdict(config), overwrite=overwrite) as demo:
        data = root / "data"
        if not demo.is_resumed:
            demo.write_json(DEMO_JSON, {"config": asdict(config)})
        if not (data / "dataset.json").is_file():  # make_dataset writes it last
            demo.claim(*data_files)
            make_dataset(data, config)
        results: dict[str, dict[str, Any]] = {}
        judges: dict[str, Judge] = {}
        for method in COMPARED:
            judge = judges[method] = Judge(data, config)
            settings = TrainConfig(
                method=method,
                iterations=config.iterations,
                patch_size=(32, 32, 32),
                seed=config.seed,
                val_fraction=0.5,
                folds=FOLDS,
            )
            run = root / method
            metrics = train(
                data,
                run,
                settings,
                resume=started(run),
                overwrite=not started(run),
                device=device,
                progress=progress,
                also=judge.add,
            )
            results[method] = {**metrics, **judge.scores()}
            write_json(run / "metrics.json", results[method])
        demo.write_json(DEMO_JSON, {"config": asdict(config), "results": results})
        demo.write(DEMO_PNG, draw(data, root / "calseg" / "soft_labels", judges))
    return results


# --------------------------------------------------------------------------------------------- judgement


class Judge:
    """Scores predictions against what training did not see: the other raters and the true probabilities."""

    def __init__(self, data: Path, config: DemoConfig) -> None:
        self._data, self._config = data, config
        self.raters: CaseScores | None = None
        """Sums against every map of every other rater."""
        self.truth: dict[str, TruthBins] | None = None
        """Sums against the true probabilities, by region."""
        self.example: tuple[str, Tensor] | None = None
        """The first case and its probabilities ``[3, x, y, z]``."""

    def add(self, name: str, logits: Tensor) -> None:
        """Take the prediction ``logits`` float ``[3, x, y, z]`` of one case."""
        index = int(name.rsplit("_", 1)[1])
        for rater in range(self._config.raters):
            if rater != training_rater(index, self._config):
                voxels = read_volume(rater_file(self._data, name, rater))
                label = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.int16)).to(logits.device)
                scores = CaseScores.of(logits, label, class_wise=False)
                self.raters = scores if self.raters is None else self.raters + scores
        truth = truth_bins(logits, read_truth(self._data, name).to(logits.device))
        held = self.truth
        self.truth = truth if held is None else {region: held[region] + bins for region, bins in truth.items()}
        if self.example is None:
            self.example = name, torch.softmax(logits.double(), 0).cpu()

    def scores(self) -> dict[str, Any]:
        """The scores, to be merged into a run's metrics."""
        assert self.raters is not None
        assert self.truth is not None
        brier = TRUTH_STATISTICS["brier"].function(self.truth["all"])
        return {"raters": values_of(self.raters.bins, MAIN_STATISTICS), "truth": {"brier": float(brier)}}


def read_truth(data: Path, name: str) -> Tensor:
    """The true probabilities ``[3, x, y, z]``."""
    return torch.from_numpy(read_volume(truth_file(data, name))).movedim(-1, 0).double()


# --------------------------------------------------------------------------------------------- picture


def draw(data: Path, soft_labels: Path, judges: Mapping[str, Judge]) -> bytes:
    """The demo in one picture, as a PNG file.

    Above, a case that was trained on: image, one rater's label, the soft label, the true probability. Below, for each
    method, a case that was not: the predicted probability, its distance from the truth, and the reliability diagram
    over all such cases against the other raters' maps. Everything is of the lesion (with its core), in the slice
    through the most disputed voxels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from calseg.plots import reliability_diagram

    dataset = find_cases(data)
    cases = {case.name: case for case in dataset.cases}
    name = min(path.name.split(".")[0] for path in soft_labels.glob("*.nii.gz"))
    image, label = load_case(cases[name], dataset)
    soft = read_soft_labels(soft_labels_path(soft_labels, name), label, len(CLASS_NAMES))
    truth = read_truth(data, name).numpy()
    cut = _most_disputed(truth)

    figure = Figure(figsize=(11, 3 * (1 + len(judges))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(judges), 4)
    probability = {"cmap": "viridis", "vmin": 0, "vmax": 1}
    shown: list[tuple[str, NDArray[Any], dict[str, Any]]] = [
        (f"image ({name}, trained on)", image[0], {"cmap": "gray"}),
        ("label: one rater", label > 0, probability),
        ("soft label", 1 - soft[0], probability),
        ("true probability", 1 - truth[0], probability),
    ]
    for ax, (title, volume, style) in zip(axes[0], shown, strict=True):
        _slice(figure, ax, title, volume[..., cut], style)
    for row, (method, judge) in zip(axes[1:], judges.items(), strict=True):
        assert judge.example is not None
        case, probabilities = judge.example
        truth = read_truth(data, case).numpy()
        cut = _most_disputed(truth)
        predicted = 1 - probabilities[0].numpy()
        image, _ = load_case(cases[case], dataset)
        _slice(figure, row[0], f"image ({case}, not seen)", image[0, ..., cut], {"cmap": "gray"})
        _slice(figure, row[1], f"{method}: prediction", predicted[..., cut], probability)
        error = predicted - (1 - truth[0])
        style = {"cmap": "RdBu_r", "vmin": -0.5, "vmax": 0.5}
        _slice(figure, row[2], f"{method}: prediction - truth", error[..., cut], style)
        assert judge.raters is not None
        reliability_diagram(judge.raters.bins["all"], ax=row[3], title=f"{method}: other raters")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _most_disputed(truth: NDArray[np.float64]) -> int:
    """The slice along the last axis in which the truth is furthest from certainty."""
    return int((truth[0] * (1 - truth[0])).sum((0, 1)).argmax())


def _slice(figure: Any, ax: Any, title: str, pixels: NDArray[Any], style: dict[str, Any]) -> None:
    shown = ax.imshow(pixels.T, origin="lower", interpolation="nearest", **style)
    figure.colorbar(shown, ax=ax, shrink=0.8)
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
