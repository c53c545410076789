"""The demo of ``calseg demo``, which compares Dice + cross-entropy and CALSeg on simulated lesions.

Each case is trained on the map of one rater (:mod:`calseg.simulation`). The demo scores the predictions against the
maps of all other raters and against the true probabilities.
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

from calseg.files import write_json
from calseg.runs import Progress, RunFolder, no_progress
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
COMPARED = {"dice_cross_entropy": "Dice + CE", "calseg": "CALSeg"}
"""The methods that are compared, with their names in the picture."""


def run_demo(
    out: str | Path,
    config: DemoConfig,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, dict[str, Any]]:
    """Write data to ``out/data``, train in ``out/METHOD`` for both methods, and return ``{method: metrics}``.

    If ``out`` holds a demo with the same settings, the demo continues where it stopped. A finished one is only scored
    again. For a demo with other settings, or a folder with other content, ``overwrite`` is needed.

    The metrics of a run have two more entries than usual. ``raters`` is the scores against the maps of all other
    raters. ``truth`` is the squared distance to the true probabilities, summed over classes.
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
    """Scores of predictions against the maps of the other raters and against the true probabilities."""

    def __init__(self, data: Path, config: DemoConfig) -> None:
        self._data, self._config = data, config
        self.raters: CaseScores | None = None
        """Sums against the maps of all other raters."""
        self.truth: dict[str, TruthBins] | None = None
        """Sums against the true probabilities, by region."""
        self.example: tuple[str, Tensor] | None = None
        """The first case and its probabilities ``[3, x, y, z]``."""

    def add(self, name: str, logits: Tensor) -> None:
        """Add the prediction ``logits``, float ``[3, x, y, z]``, of a case."""
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
        """Return the scores, in the form in which they are added to the metrics of a run."""
        assert self.raters is not None
        assert self.truth is not None
        brier = TRUTH_STATISTICS["brier"].function(self.truth["all"])
        return {"raters": values_of(self.raters.bins, MAIN_STATISTICS), "truth": {"brier": float(brier)}}


def read_truth(data: Path, name: str) -> Tensor:
    """Return the true probabilities of a case, ``[3, x, y, z]``."""
    return torch.from_numpy(read_volume(truth_file(data, name))).movedim(-1, 0).double()


# --------------------------------------------------------------------------------------------- picture


def draw(data: Path, soft_labels: Path, judges: Mapping[str, Judge]) -> bytes:
    """Draw the demo in one picture, and return it as a PNG file.

    The first row shows a case that was trained on: its image, the label of one rater, the soft label, and the true
    probability. Each other row shows, for one method, a case that was not trained on: its image, the predicted
    probability, its difference from the true one, and the reliability diagram over all such cases against the maps of
    the other raters, near their foreground. Probabilities are those of the lesion with its core. The slice is the one
    in which the true probability is most uncertain.
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
        shown_as = COMPARED[method]
        case, probabilities = judge.example
        truth = read_truth(data, case).numpy()
        cut = _most_disputed(truth)
        predicted = 1 - probabilities[0].numpy()
        image, _ = load_case(cases[case], dataset)
        _slice(figure, row[0], f"image ({case}, not seen)", image[0, ..., cut], {"cmap": "gray"})
        _slice(figure, row[1], f"{shown_as}: prediction", predicted[..., cut], probability)
        error = predicted - (1 - truth[0])
        style = {"cmap": "RdBu_r", "vmin": -0.5, "vmax": 0.5}
        _slice(figure, row[2], f"{shown_as}: prediction - truth", error[..., cut], style)
        assert judge.raters is not None
        reliability_diagram(judge.raters.bins["near"], ax=row[3], title=f"{shown_as}: other raters, near")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _most_disputed(truth: NDArray[np.float64]) -> int:
    """Return the slice along the last axis in which the true probability is most uncertain."""
    return int((truth[0] * (1 - truth[0])).sum((0, 1)).argmax())


def _slice(figure: Any, ax: Any, title: str, pixels: NDArray[Any], style: dict[str, Any]) -> None:
    """Draw a slice with its colour bar."""
    shown = ax.imshow(pixels.T, origin="lower", interpolation="nearest", **style)
    figure.colorbar(shown, ax=ax, shrink=0.8)
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
