"""A small data set with real ambiguity at the borders, made on the spot, and two methods trained on it.

Every case has a latent field ``f``, smooth and positive inside a lesion. Rater ``r`` marks the lesion where
``f + b_r + g_r > 0`` and its core where ``f + b_r + g_r > CORE``, with a bias ``b_r`` of the whole case and a
smooth field ``g_r`` of errors, both normal. The standard deviation of their sum is ``SPREAD``, so that the
probability that a rater drawn at random marks a voxel is known exactly: ``Phi(f / SPREAD)`` for the lesion,
``Phi((f - CORE) / SPREAD)`` for its core. The image shows ``f`` through a soft ramp, with a bias field, noise
and a contrast of its own per case. The training label of a case is one rater's map, as it mostly is in
practice; the other raters' maps and the true probabilities serve to score what was learned.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calseg import stages
from calseg.calibration import CalibrationBins, calibration_bins
from calseg.data import find_cases, load_case, read_soft_labels, read_volume, soft_labels_path
from calseg.training import (
    RUN_FILES,
    Progress,
    Scores,
    TrainConfig,
    TrainingError,
    no_progress,
    read_json,
    write_atomic,
    write_json,
)

CLASS_NAMES = ("background", "lesion", "core")
CORE = 1.0
SPREAD = 0.35
METHODS = ("cross_entropy", "calseg")
FOLDS = 2  # in so few that the demo takes no more than a minute or two


@dataclass(frozen=True)
class DemoConfig:
    """What decides the result of a demo."""

    cases: int = 16
    raters: int = 5
    side: int = 40
    iterations: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("cases", 4), ("raters", 2), ("side", 16), ("iterations", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise TrainingError(f"{name} must be at least {least}; got {getattr(self, name)}")


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
    resume = _prepare(root, config, overwrite)
    data = root / "data"
    if not (data / "dataset.json").is_file():  # written last
        make_dataset(data, config)
    results: dict[str, dict[str, Any]] = {}
    judges: dict[str, _Judge] = {}
    for method in METHODS:
        judge = judges[method] = _Judge(data, config)
        settings = TrainConfig(
            method=method,
            iterations=config.iterations,
            patch_size=(32, 32, 32),
            seed=config.seed,
            val_fraction=0.5,
            folds=FOLDS,
        )
        run = root / method
        metrics = stages.train(
            data,
            run,
            settings,
            resume=resume and stages.started(run),
            overwrite=not stages.started(run),
            device=device,
            progress=progress,
            also=judge.add,
        )
        results[method] = {**metrics, **judge.compute()}
        write_json(run / "metrics.json", results[method])
    write_json(root / "demo.json", {"config": asdict(config), "results": results})
    write_atomic(root / "demo.png", draw(data, root / "calseg" / "soft_labels", judges))
    return results


def _prepare(root: Path, config: DemoConfig, overwrite: bool) -> bool:
    """Whether ``root`` holds a demo to continue; makes the folder, or empties it of an earlier demo."""
    marker = root / "demo.json"
    if root.exists() and not root.is_dir():
        raise TrainingError(f"{root}: exists and is not a folder")
    if marker.is_file() and not overwrite:
        if read_json(marker).get("config") == asdict(config):
            return True
        raise TrainingError(f"{root}: holds a demo with other settings; give --overwrite or another --out")
    if root.is_dir() and any(root.iterdir()) and not overwrite:
        raise TrainingError(f"{root}: not empty and not made by calseg demo; give --overwrite or another --out")
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / "data" / "dataset.json").unlink(missing_ok=True)
        for method in METHODS:
            for name in (*RUN_FILES, stages.SUMMARY):
                (root / method / name).unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"{root}: cannot be made ready ({error.strerror or error})") from error
    write_json(marker, {"config": asdict(config)})
    return False


# ------------------------------------------------------------------------------------------------- data


def _smooth_field(rng: np.random.Generator, shape: Sequence[int], length: float) -> NDArray[np.float64]:
    """Gaussian random field ``[*shape]``, variance 1 at every voxel, correlated over ``length`` voxels.

    White noise under a periodic Gaussian filter, applied in the Fourier domain; the padding keeps opposite
    faces apart.
    """
    padded = [side + int(np.ceil(4 * length)) for side in shape]
    squares = sum(
        np.square(frequency) for frequency in np.meshgrid(*(np.fft.fftfreq(side) for side in padded), indexing="ij")
    )
    gain = np.exp(-2 * np.square(np.pi * length) * squares)
    gain /= np.sqrt(np.mean(np.square(gain)))
    field = np.fft.ifftn(np.fft.fftn(rng.standard_normal(padded)) * gain).real
    return np.asarray(field[tuple(slice(side) for side in shape)])


def _phi(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard normal distribution function."""
    return np.asarray(torch.special.ndtr(torch.from_numpy(x)))


def make_case(
    seed: int, index: int, config: DemoConfig
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
    """Image float32 ``[x, y, z]``, maps uint8 ``[raters, x, y, z]``, truth float32 ``[3, x, y, z]``."""
    rng = np.random.default_rng((seed, index))
    shape = [int(side) for side in rng.integers(config.side - 4, config.side + 5, 3)]
    grid = np.meshgrid(*(np.arange(side) - side / 2 for side in shape), indexing="ij")
    field = np.full(shape, -np.inf)
    for _ in range(int(rng.integers(1, 4))):
        centre = rng.uniform(-0.22, 0.22, 3) * shape
        radius = rng.uniform(0.2, 0.3) * config.side
        axes = rng.uniform(0.8, 1.25, 3)
        distance = np.sqrt(sum(np.square((g - c) * a) for g, c, a in zip(grid, centre, axes, strict=True)))
        field = np.maximum(field, 2 * (1 - distance / radius))
    field = np.maximum(field, -4) + 0.4 * _smooth_field(rng, shape, 4)

    raters = np.empty((config.raters, *shape), np.uint8)
    for rater in raters:
        opinion = field + SPREAD * (0.6 * rng.standard_normal() + 0.8 * _smooth_field(rng, shape, 3))
        rater[...] = (opinion > 0).astype(np.uint8) + (opinion > CORE)
    lesion, core = _phi(field / SPREAD), _phi((field - CORE) / SPREAD)
    truth = np.stack([1 - lesion, lesion - core, core]).astype(np.float32)

    ramp = 1 / (1 + np.exp(-2 * (field - CORE / 2)))
    clean = ramp * (1 + 0.15 * _smooth_field(rng, shape, 12)) + 0.05 * _smooth_field(rng, shape, 6)
    noisy = clean + 0.1 * rng.standard_normal(shape)
    image = rng.uniform(0.2, 4) * 100 * (noisy + rng.uniform(0.5, 2))
    return image.astype(np.float32), raters, truth


def make_dataset(folder: Path, config: DemoConfig) -> None:
    """Write the cases in the Decathlon's layout, with ``raters/CASE_rK.nii.gz`` and ``truth/CASE.nii.gz``."""
    try:
        for part in ("imagesTr", "labelsTr", "raters", "truth"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        training = []
        for index in range(config.cases):
            name = f"demo_{index:03d}"
            image, raters, truth = make_case(config.seed, index, config)
            _save(image, folder / "imagesTr" / f"{name}.nii.gz")
            _save(raters[_training_rater(index, config)], folder / "labelsTr" / f"{name}.nii.gz")
            for number, rater in enumerate(raters):
                _save(rater, folder / "raters" / f"{name}_r{number}.nii.gz")
            _save(np.moveaxis(truth, 0, -1), folder / "truth" / f"{name}.nii.gz")
            training.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    except OSError as error:
        raise TrainingError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from error
    write_json(
        folder / "dataset.json",
        {
            "name": "calseg demo",
            "description": "Simulated lesions with ambiguous borders, several raters, true probabilities",
            "tensorImageSize": "3D",
            "modality": {"0": "simulated"},
            "labels": {str(number): name for number, name in enumerate(CLASS_NAMES)},
            "numTraining": config.cases,
            "numTest": 0,
            "training": training,
            "test": [],
        },
    )


def _training_rater(index: int, config: DemoConfig) -> int:
    return index % config.raters


def _save(voxels: NDArray[Any], path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


# --------------------------------------------------------------------------------------------- judgement


class _Judge:
    """Scores predictions against what training did not see: the other raters and the true probabilities."""

    def __init__(self, folder: Path, config: DemoConfig) -> None:
        self._dataset = find_cases(folder)
        self._cases = {case.name: case for case in self._dataset.cases}
        self._config = config
        self._scores = Scores()
        self._squared, self._voxels = 0.0, 0
        self.bins: list[CalibrationBins] = []
        """Of every map of every other rater."""
        self.example: tuple[str, Tensor] | None = None
        """The first case and its probabilities ``[3, x, y, z]``."""

    def add(self, name: str, logits: Tensor) -> None:
        """Take the prediction ``logits`` float ``[3, x, y, z]`` of one case."""
        folder, index = self._dataset.folder, int(name.rsplit("_", 1)[1])
        case = self._cases[name]
        for number in range(self._config.raters):
            if number != _training_rater(index, self._config):
                map_of_rater = replace(case, label=folder / "raters" / f"{name}_r{number}.nii.gz")
                _, label = load_case(map_of_rater, self._dataset)
                self._scores.update(logits, torch.from_numpy(label).to(logits.device))
                self.bins.append(calibration_bins(logits[None].cpu(), torch.from_numpy(label)[None]))
        probabilities = torch.softmax(logits.double(), 0)
        error = probabilities - _truth(folder, name).to(logits.device)
        self._squared += float(error.square().sum())
        self._voxels += error[0].numel()
        if self.example is None:
            self.example = name, probabilities.cpu()

    def compute(self) -> dict[str, Any]:
        """The scores, to be merged into a run's metrics."""
        return {"raters": self._scores.compute(), "truth": {"brier": self._squared / self._voxels}}


def _truth(folder: Path, name: str) -> Tensor:
    """The true probabilities ``[3, x, y, z]``."""
    return torch.from_numpy(read_volume(folder / "truth" / f"{name}.nii.gz")).movedim(-1, 0).double()


# --------------------------------------------------------------------------------------------- picture


def draw(data: Path, soft_labels: Path, judges: Mapping[str, _Judge]) -> bytes:
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
    truth = _truth(data, name).numpy()
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
        truth = _truth(data, case).numpy()
        cut = _most_disputed(truth)
        predicted = 1 - probabilities[0].numpy()
        image, _ = load_case(cases[case], dataset)
        _slice(figure, row[0], f"image ({case}, not seen)", image[0, ..., cut], {"cmap": "gray"})
        _slice(figure, row[1], f"{method}: prediction", predicted[..., cut], probability)
        error = predicted - (1 - truth[0])
        style = {"cmap": "RdBu_r", "vmin": -0.5, "vmax": 0.5}
        _slice(figure, row[2], f"{method}: prediction - truth", error[..., cut], style)
        bins = judge.bins[0]
        for more in judge.bins[1:]:
            bins = bins + more
        reliability_diagram(bins, ax=row[3], title=f"{method}: other raters")
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
