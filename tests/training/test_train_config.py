"""The settings of a run: bounds, and the defaults of the methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
from boxes import config

from calseg.methods import METHODS
from calseg.training import TrainConfig, TrainingError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dice"}, "method must be one of cross_entropy, .*, calseg; got 'dice'"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"iterations": 2.5}, "iterations must be a whole number; got 2.5"),
        ({"iterations": None}, "iterations must be a whole number; got None"),
        ({"learning_rate": "x" * 9999}, "learning_rate must be a number; got 'xxx.{0,200}$"),
        ({"patch_size": 16}, "patch_size must be a tuple, each a whole number; got 16"),
        ({"patch_size": (16, 16, 16.5)}, "patch_size must be a tuple, each a whole number"),
        ({"flip_axes": ("x",)}, "flip_axes must be a tuple, each a whole number"),
        ({"method": 3}, "method must be a text; got 3"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"val_fraction": 1.0}, "val_fraction must lie strictly"),
        ({"beta": -1.0}, "beta must be finite"),
        ({"gamma": 0.5}, "gamma must be 0 or at least 1"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"margin": math.nan}, "margin must be finite"),
        ({"folds": 0}, "folds must be at least 1"),
        ({"first_stage_share": 0.0}, "first_stage_share must be positive"),
        ({"dice_weight": -1.0}, "dice_weight must be finite and not negative"),
        ({"estimator": "label"}, "estimator must be one of posterior, prior, network; got 'label'"),
        ({"dice_labels": "both"}, "dice_labels must be one of soft, hard; got 'both'"),
        ({"patch_size": (16, 12, 1)}, "two and 1 for slices"),
        ({"seed": -1}, r"must lie in 0 to 2\^63 - 1"),
        ({"patch_size": (16, 16, 12)}, "multiples of 8"),
        ({"patch_size": (8, 8, 8)}, "enlarge a side"),
        ({"flip_axes": (3,)}, "flip_axes must be among"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        config(**changes)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_brings_its_own_defaults(method: str) -> None:
    settings = TrainConfig(method=method)
    assert settings.method_settings == dict(METHODS[method].settings)
    assert TrainConfig.from_json(settings.__dict__) == settings


def test_published_defaults() -> None:
    """Defaults are those of existing runs, and ``config.json`` has a value for every setting, used or not."""
    common = {
        "alpha": 0.1, "sigma": 1.0, "gamma": 3.0, "margin": 5.0, "temperature": 1.0, "num_samples": 4, "beta": 0.001,
        "latent_size": 4, "reconstruction": 0.1, "folds": 4, "first_stage_share": 0.5,
        "estimator": "posterior", "dice_labels": "soft",
        "dice_weight": 0.0,
    }  # fmt: skip
    own = {
        "dice_cross_entropy": {"dice_weight": 1.0},
        "ace_hard": {"alpha": 1.0},
        "ace_soft": {"alpha": 1.0},
        "calseg": {"alpha": 0.4, "dice_weight": 0.5, "temperature": None, "num_samples": 8, "folds": 2},
    }
    for method in METHODS:
        settings = TrainConfig(method=method)
        assert {name: getattr(settings, name) for name in common} == {**common, **own.get(method, {})}
