"""Training and prediction, for ``calseg train``, ``calseg soft-labels`` and ``calseg predict``.

The package needs the extra ``calseg[train]`` (MONAI, nibabel). :func:`train` is imported, and MONAI with it, when it is
first used. So importing the package is fast.
"""

from __future__ import annotations

from typing import Any

from calseg.errors import RunError as TrainingError
from calseg.training.config import TrainConfig

__all__ = ["TrainConfig", "TrainingError", "train"]


def __getattr__(name: str) -> Any:
    """Import :func:`train` when it is first used."""
    if name == "train":
        from calseg.training.stage_two import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
