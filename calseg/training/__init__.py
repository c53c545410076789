"""Training behind ``calseg train``: settings, networks, both stages, checkpoints, prediction.

Needs the extra ``calseg[train]`` (MONAI, nibabel). Importing this package is cheap: :func:`train` is loaded, and MONAI
with it, when it is asked for.
"""

from __future__ import annotations

from typing import Any

from calseg.runs import RunError as TrainingError
from calseg.training.config import TrainConfig

__all__ = ["TrainConfig", "TrainingError", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from calseg.training.stage_two import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
