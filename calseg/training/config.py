"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calseg.errors import RunError
from calseg.methods import ESTIMATORS, METHODS
from calseg.settings import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_FRACTION,
    SEED,
    Bound,
    at_least,
    check_settings,
    one_of,
    setting,
)

UNUSED: dict[str, float | str] = {
    "alpha": 0.1,
    "sigma": 1.0,
    "gamma": 3.0,
    "margin": 5.0,
    "temperature": 1.0,
    "num_samples": 4,
    "beta": 0.001,
    "latent_size": 4,
    "reconstruction": 0.1,
    "folds": 4,
    "first_stage_share": 0.5,
    "estimator": "posterior",
    "dice_labels": "soft",
}
"""Values in ``config.json`` of settings that the method of the run does not take."""


def _of_method(name: str, help: str, bound: Bound) -> Any:
    """Return a field for a setting that only some methods take.

    Its default is None, which becomes the default of the method of the run.
    """
    users: dict[str, list[str]] = {}
    for method, entry in METHODS.items():
        if name in entry.settings:
            users.setdefault(_in_words(entry.settings[name]), []).append(method)
    uses = " and ".join(f"{', '.join(methods)} (default: {default})" for default, methods in users.items())
    return setting(None, f"{help} Used by {uses}.", bound)


def _in_words(default: float | str | None) -> str:
    """Return the default of a setting for a help text."""
    if default is None:
        return "fitted"
    return default if isinstance(default, str) else f"{default:g}"


def _of_every_method(name: str, help: str, bound: Bound) -> Any:
    """Return a field for a setting that every method takes, with a default that is an attribute of its entry.

    Its default is None, which becomes the default of the method of the run.
    """
    defaults = {method: getattr(entry, name) for method, entry in METHODS.items()}
    usual = min(defaults.values())
    others = "".join(f", {default:g} for {method}" for method, default in defaults.items() if default != usual)
    return setting(None, f"{help} Default: {usual:g}{others}.", bound)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run, which decide its result on given cases. ``calseg train --help`` explains each of them.

    A setting of None becomes the default of the method in :data:`calseg.methods.METHODS`. Only the ``temperature`` of
    "calseg" stays None, and is then fitted (:func:`calseg.training.stage_one.estimate`).
    """

    method: str = setting(
        "cross_entropy",
        "Training method: " + ", ".join(f"{name} ({entry.title})" for name, entry in METHODS.items()) + ".",
        one_of(METHODS),
        option=("--method", "--loss"),
    )
    iterations: int = setting(300, "Number of updates of the network that predicts.", at_least(1))
    batch_size: int = setting(2, "Number of patches in an update.", at_least(1))
    patch_size: tuple[int, int, int] = setting(
        (48, 64, 48),
        "Size of a patch in voxels along x, y and z. Each is a multiple of 8; a size of 1 along z trains a"
        " two-dimensional network on slices.",
    )
    learning_rate: float = setting(
        1e-2, "Highest learning rate of AdamW, reached after a warm-up and then lowered to 0.", POSITIVE
    )
    seed: int = setting(0, "Seed of the networks' first weights, of the patches and of the noise.", SEED)
    val_fraction: float = setting(0.2, "Fraction of the cases that are kept for validation.", PROPER_FRACTION)
    split_seed: int = setting(
        0,
        "Seed by which the cases are split into training and validation, and into folds. It is separate from --seed"
        " so that runs with different seeds share one split.",
        SEED,
    )
    foreground: float = setting(
        1 / 3, "Fraction of the patches that are centred on a voxel that is not background.", FRACTION
    )
    flip_axes: tuple[int, ...] = setting(
        (),
        "Axis (0, 1 or 2) along which half of the patches are mirrored; give the option once per axis.",
        Bound("be among 0, 1 and 2", lambda axes: all(axis in (0, 1, 2) for axis in axes)),
        option="--flip-axis",
    )
    dice_weight: float = _of_every_method(
        "dice_weight",
        "Weight of the Dice loss beside the loss of the method. It compares the probabilities with the soft labels of"
        " vls and calseg, and with the labels for other methods. With 0 there is none.",
        NOT_NEGATIVE,
    )
    alpha: float = _of_method(
        "alpha",
        "Strength of the smoothing: the share of the smooth target in the label (label_smoothing, vls, calseg), or the"
        " weight of the penalty beside the cross-entropy (mbls, nacl, ace_hard, ace_soft).",
        FRACTION,
    )
    sigma: float = _of_method("sigma", "Standard deviation of the smoothing Gaussian in voxels.", POSITIVE)
    gamma: float = _of_method(
        "gamma",
        "Exponent of the focal loss: the larger, the less a well-classified voxel counts.",
        Bound("be 0 or at least 1", lambda gamma: gamma == 0 or 1 <= gamma < math.inf),
    )
    margin: float = _of_method(
        "margin", "Distance by which a logit may lie below the largest logit without a penalty.", NOT_NEGATIVE
    )
    temperature: float = _of_method(
        "temperature",
        "Temperature of the softmax that makes soft labels; the larger, the softer they are. A fitted temperature is"
        " the one under which the soft labels of cases that a network has not seen fit the labels near the foreground"
        " best.",
        POSITIVE,
    )
    num_samples: int = _of_method(
        "num_samples", "Number of random draws that are averaged into a soft label.", at_least(1)
    )
    beta: float = _of_method(
        "beta",
        "Weight of the Kullback-Leibler term that keeps the estimated distribution near a standard normal one. For"
        " vls it acts on every voxel: 0.1 already flattens confident voxels, and 1 prevents learning.",
        NOT_NEGATIVE,
    )
    latent_size: int = _of_method("latent_size", "Number of values in the latent code of a patch.", at_least(1))
    reconstruction: float = _of_method(
        "reconstruction", "Weight of the image's reconstruction error in the first stage.", NOT_NEGATIVE
    )
    folds: int = _of_method(
        "folds",
        "Number of parts into which the cases are dealt. The soft labels of a part come from a network trained on"
        " the other parts; with 1, every case is also trained on.",
        at_least(1),
    )
    first_stage_share: float = _of_method(
        "first_stage_share",
        "Number of updates of each network of the first stage, as a share of the iterations.",
        POSITIVE,
    )
    estimator: str = _of_method(
        "estimator",
        "Source of the soft labels: " + ", ".join(f"{name} ({words})" for name, words in ESTIMATORS.items()) + ".",
        one_of(ESTIMATORS),
    )
    dice_labels: str = _of_method(
        "dice_labels",
        "Labels that the Dice loss compares with when the network to deploy is trained: soft, those of the first stage,"
        " or hard, those of the data.",
        one_of(("soft", "hard")),
    )

    def __post_init__(self) -> None:
        method = METHODS.get(self.method, METHODS["cross_entropy"])
        for name, value in {**UNUSED, **method.settings, "dice_weight": method.dice_weight}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_settings(self)
        sides = self.patch_size[:2] if self.spatial_dims == 2 else self.patch_size
        if len(self.patch_size) != 3 or any(side < 8 or side % 8 for side in sides):
            raise RunError(
                f"patch_size must be three positive multiples of 8, or two and 1 for slices; got {self.patch_size}"
            )
        if max(sides) == 8:
            raise RunError(
                f"patch_size {self.patch_size} leaves one voxel at the network's coarsest level; enlarge a side"
            )

    @property
    def spatial_dims(self) -> int:
        """Number of spatial axes of the network: 2 if a patch is a single slice, else 3."""
        return 2 if self.patch_size[2:] == (1,) else 3

    @property
    def method_settings(self) -> dict[str, Any]:
        """The settings that the method takes, by name."""
        return {name: getattr(self, name) for name in METHODS[self.method].settings}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the settings from a JSON file that holds the result of ``dataclasses.asdict``."""
        try:
            settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**settings)
        except TypeError as error:
            raise RunError(f"not the settings of a run: {error}") from error
