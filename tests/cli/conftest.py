"""Fixture of the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small data set."""
    from calseg.simulation import DemoConfig, make_dataset

    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, DemoConfig(cases=4, raters=2, side=16))
    return folder
