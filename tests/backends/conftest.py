"""Fixtures of the tests of backends."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Triton kernels that the test launches, in order."""
    from calseg.kernels import launch

    names, launch_kernel = [], launch.launch_kernel

    def recorded(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        launch_kernel(kernel, *arguments)

    monkeypatch.setattr(launch, "launch_kernel", recorded)
    return names
