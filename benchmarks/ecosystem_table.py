"""Table of calibration errors by several packages on large volumes, which shows which of them are wrong.

``python benchmarks/ecosystem_table.py`` writes benchmarks/results/ecosystem.json and prints it as a table. Every voxel
has the same probabilities, so one bin holds all voxels, and the true calibration error is 0.0750. The script needs
torchmetrics, MONAI 1.6 or newer, and 5 GiB of memory.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable
from importlib import metadata

import tables
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


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "torchmetrics": by_torchmetrics,
    "monai": by_monai,
    "calseg": by_calseg,
}


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for voxels in map(int, VOXELS):
        p, target = volume(voxels)
        truth = abs(CONFIDENCE - float(target.double().mean()))
        rows.append({"voxels": voxels, "truth": truth, **{name: metric(p, target) for name, metric in METRICS.items()}})
    content = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in METRICS if name != "calseg"}
        | {"calseg": calseg.__version__},
        "rows": rows,
    }
    (tables.RESULTS / "ecosystem.json").write_text(json.dumps(content, indent=1) + "\n")
    print(tables.counts())


if __name__ == "__main__":
    main()
