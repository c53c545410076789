"""Simulation of a small data set with ambiguous borders, for ``calseg demo``.

Every case has a smooth latent field ``f``, which is positive inside a lesion. Rater ``r`` marks the lesion where
``f + b_r + g_r > 0``, and its core where ``f + b_r + g_r > CORE``. Here ``b_r`` is a bias for the whole case and
``g_r`` is a smooth field of errors, both normally distributed. The standard deviation of their sum is ``SPREAD``. So
the probability that a random rater marks a voxel is known exactly: ``Phi(f / SPREAD)`` for the lesion,
``Phi((f - CORE) / SPREAD)`` for its core.

The image shows ``f`` after a smooth ramp function, with a bias field, noise, and a random contrast per case. The
training label of a case is the map of one rater, as it often is in practice. The maps of the other raters and the true
probabilities are used to score predictions. The module needs nibabel (the extra ``calseg[train]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from calseg.errors import RunError
from calseg.files import write_json
from calseg.settings import SEED, at_least, check_settings, setting

CLASS_NAMES = ("background", "lesion", "core")
CORE = 1.0
SPREAD = 0.35


@dataclass(frozen=True)
class DemoConfig:
    """The settings of a demo."""

    cases: int = setting(
        16, "Number of volumes to simulate; half of them are trained on, the others are scored.", at_least(4)
    )
    raters: int = setting(
        5, "Number of raters who mark every volume; one of them gives its training label.", at_least(2)
    )
    side: int = setting(40, "Mean side length of a volume, in voxels.", at_least(16))
    iterations: int = setting(300, "Number of training updates of each network.", at_least(1))
    seed: int = setting(0, "Seed of the simulated data and of the training.", SEED)

    def __post_init__(self) -> None:
        check_settings(self)


def _smooth_field(rng: np.random.Generator, shape: Sequence[int], length: float) -> NDArray[np.float64]:
    """Return a Gaussian random field ``[*shape]`` with variance 1 at every voxel, correlated over ``length`` voxels.

    It is white noise, filtered by a periodic Gaussian in the Fourier domain. Padding removes the correlation between
    opposite faces.
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
    """Return the standard normal distribution function of ``x``."""
    return np.asarray(torch.special.ndtr(torch.from_numpy(x)))


def make_case(
    seed: int, index: int, config: DemoConfig
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
    """Simulate a case.

    Returns:
        The image, float32 ``[x, y, z]``, the maps of the raters, uint8 ``[raters, x, y, z]``, and the true
        probabilities, float32 ``[3, x, y, z]``.
    """
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


def dataset_files(config: DemoConfig) -> list[str]:
    """The files that :func:`make_dataset` writes, within its folder."""
    root = Path()
    names = [_case_name(index) for index in range(config.cases)]
    raters = [rater_file(root, name, number) for name in names for number in range(config.raters)]
    files = [*(f(root, name) for name in names for f in (_image_file, _label_file, truth_file)), *raters]
    return [*(file.as_posix() for file in files), "dataset.json"]


def make_dataset(folder: Path, config: DemoConfig) -> None:
    """Write the cases in the layout of the Decathlon, plus ``raters/CASE_rK.nii.gz`` and ``truth/CASE.nii.gz``."""
    try:
        for part in ("imagesTr", "labelsTr", "raters", "truth"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        training = []
        for index in range(config.cases):
            name = _case_name(index)
            image, raters, truth = make_case(config.seed, index, config)
            _save(image, _image_file(folder, name))
            _save(raters[training_rater(index, config)], _label_file(folder, name))
            for number, rater in enumerate(raters):
                _save(rater, rater_file(folder, name, number))
            _save(np.moveaxis(truth, 0, -1), truth_file(folder, name))
            paths = {"image": _image_file(Path(), name), "label": _label_file(Path(), name)}
            training.append({key: f"./{path.as_posix()}" for key, path in paths.items()})
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from error
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


def training_rater(index: int, config: DemoConfig) -> int:
    """Return the rater whose map is the training label of case ``index``. The raters take turns."""
    return index % config.raters


def _case_name(index: int) -> str:
    return f"demo_{index:03d}"


def _image_file(folder: Path, name: str) -> Path:
    return folder / "imagesTr" / f"{name}.nii.gz"


def _label_file(folder: Path, name: str) -> Path:
    return folder / "labelsTr" / f"{name}.nii.gz"


def rater_file(folder: Path, name: str, rater: int) -> Path:
    """Return the path of the label map of a rater for case ``name``."""
    return folder / "raters" / f"{name}_r{rater}.nii.gz"


def truth_file(folder: Path, name: str) -> Path:
    """Return the path of the true probabilities of case ``name``, ``[x, y, z, classes]``."""
    return folder / "truth" / f"{name}.nii.gz"


def _save(voxels: NDArray[Any], path: Path) -> None:
    """Write voxels to a NIfTI file."""
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
