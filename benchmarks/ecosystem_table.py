"""Table of calibration errors by several packages on large volumes, which shows which of them are wrong.

``python benchmarks/ecosystem_table.py`` prints the table in Markdown. Every voxel has the same probabilities, so one
bin holds all voxels, and the true calibration error is 0.0750. The script needs torchmetrics, MONAI 1.6 or newer, and 5
GiB of memory.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

import calseg

CONFIDENCE = 0.875  # not on an edge of 15 or 20 bins
VOXELS = (2.1e6, 8.4e6, 16.8e6, 25.2e6, 41.9e6)


def volume(voxels: int) -> tuple[Tensor, Tensor]:
    """Return probabilities of class 1, and labels of which 4 in 5 are class 1, ``[voxels]``."""
    return torch.full((voxels,), CONFIDENCE), (torch.arange(voxels) % 5 != 0).to(torch.uint8)


def by_torchmetrics(p: Tensor, target: Tensor) -> float:
    """Return the error by torchmetrics."""
    from torchmetrics.classification import BinaryCalibrationError

    metric = BinaryCalibrationError(n_bins=15, validate_args=False)
    metric.update(p, target)
    return float(metric.compute())


def by_monai(p: Tensor, target: Tensor) -> float:
    """Return the error by MONAI."""
    from monai.metrics import CalibrationErrorMetric

    metric = CalibrationErrorMetric(num_bins=20, calibration_reduction="expected")
    metric(p[None, None], target[None, None])
    return float(metric.aggregate())


def by_calseg(p: Tensor, target: Tensor) -> float:
    """Return the error by calseg."""
    both = torch.stack([1 - p, p])[None]
    return float(calseg.calibration_error(both, target[None], from_logits=False))


METRICS: dict[str, tuple[str, Callable[[Tensor, Tensor], float]]] = {
    "torchmetrics": ("BinaryCalibrationError", by_torchmetrics),
    "monai": ("CalibrationErrorMetric", by_monai),
    "calseg": ("calibration_error", by_calseg),
}


def main() -> None:
    warnings.simplefilter("ignore")
    rows = [
        ["true error"],
        *([f"{package} {metadata.version(package)} {name}"] for package, (name, _) in METRICS.items()),
    ]
    for voxels in map(int, VOXELS):
        p, target = volume(voxels)
        rows[0].append(f"{abs(CONFIDENCE - float(target.double().mean())):.4f}")
        for row, (_, metric) in zip(rows[1:], METRICS.values(), strict=True):
            row.append(f"{metric(p, target):.4f}")
    print(f"torch {torch.__version__}, CPU, Python {platform.python_version()}\n")
    print("| metric | " + " | ".join(f"{voxels / 1e6:.1f} M voxels" for voxels in VOXELS) + " |")
    print("|---" * (len(VOXELS) + 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
