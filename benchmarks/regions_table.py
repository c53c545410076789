"""Calibration error of the true probabilities, in each region over which calibration is measured.

``python benchmarks/regions_table.py`` writes benchmarks/results/regions.json and prints it as a table. The cases are
those of ``calseg demo``, whose probability of every label is known for each voxel. A perfect forecaster predicts these
probabilities. So what is measured here is the error that a region adds by itself. Labels are of two kinds: the map of
one simulated rater, whose errors at neighbouring voxels are alike, and labels that are drawn voxel by voxel. The script
needs nibabel.
"""

from __future__ import annotations

import json

import tables
import torch
from torch import Tensor

import calseg
from calseg.regions import REGIONS
from calseg.simulation import DemoConfig, make_case, training_rater

CASES = 8
SEED = 0


def drawn(truth: Tensor, generator: torch.Generator) -> Tensor:
    """Return a label for each voxel, uint8 ``[1, *S]``, drawn from its probabilities ``[1, C, *S]``."""
    below = truth.cumsum(1)[:, :-1]
    return (torch.rand(truth[:, 0].shape, generator=generator)[:, None] >= below).sum(1).to(torch.uint8)


def main() -> None:
    config = DemoConfig()
    generator = torch.Generator().manual_seed(SEED)
    cases = []
    for index in range(CASES):
        _, raters, probabilities = make_case(SEED, index, config)
        truth = torch.from_numpy(probabilities)[None]
        truth = truth / truth.sum(1, keepdim=True)  # their float32 sum is not always 1
        rater = torch.from_numpy(raters[training_rater(index, config)])[None]
        cases.append((truth, {"rater": rater, "drawn": drawn(truth, generator)}))
    regions: dict[str, dict[str, float]] = {title: {} for title in REGIONS.values()}
    for region, title in REGIONS.items():
        for kind in ("rater", "drawn"):
            bins = [
                calseg.calibration_bins(truth, labels[kind], region=region, from_logits=False)
                for truth, labels in cases
            ]
            total = calseg.CalibrationBins(*(torch.stack(sums).sum(0) for sums in zip(*bins, strict=True)))
            regions[title][kind] = float(calseg.calibration_error_from_bins(total))
    content = {"cases": CASES, "seed": SEED, "side": config.side, "regions": regions}
    (tables.RESULTS / "regions.json").write_text(json.dumps(content, indent=1) + "\n")
    print(tables.regions())


if __name__ == "__main__":
    main()
