"""Why the ECE of the foreground misleads: what the perfect forecaster scores there, and how to win by being wrong.

    python benchmarks/calibration/perfect_forecaster.py

The true probability of every voxel of the demo's cases is known (calseg/simulation.py). A denier says these
probabilities, but takes away a share of that of background, and gives it to the other classes. With the share 0 it says
the truth, and with 0.999 that there is hardly any background. The script writes its scores for every share, and the
reliability of the truth, to benchmarks/results/foreground_ece.json, and draws foreground_ece.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import calseg
from calseg.calibration import CalibrationBins
from calseg.files import as_json, write_json
from calseg.operations import UNIT
from calseg.regions import REGIONS, near_foreground
from calseg.scores import MAIN_STATISTICS, CaseScores, values_of
from calseg.simulation import DemoConfig, make_case, training_rater

RESULTS = Path(__file__).parents[1] / "results"
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 0.999)
LABELS = {
    "drawn": "labels drawn voxel by voxel from the truth",
    "rater": "labels of one simulated rater",
}
"""The sources of labels. A rater's labels are smooth, so neighbouring voxels are not independent."""


def cases(config: DemoConfig) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Return the true probabilities ``[3, x, y, z]`` of each case, and labels ``[x, y, z]`` of each source."""
    for index in range(config.cases):
        _, raters, truth = make_case(config.seed, index, config)
        p = torch.from_numpy(truth).double()
        generator = torch.Generator().manual_seed(index)
        drawn = torch.multinomial(p.flatten(1).T, 1, generator=generator).view(p.shape[1:])
        yield p, {"drawn": drawn, "rater": torch.from_numpy(raters[training_rater(index, config)]).long()}


def denial(truth: Tensor, share: float) -> Tensor:
    """Return probabilities ``[C, *S]`` in which background has lost a share of its probability.

    The other classes get it in proportion to their probabilities, or in equal parts where these are 0.
    """
    others = truth[1:].clamp(min=1e-12)
    background = truth[:1] * (1 - share)
    return torch.cat([background, (1 - background) * others / others.sum(0)])


def sums(config: DemoConfig) -> dict[str, dict[float, CaseScores]]:
    """Return the sums over all cases, by source of labels and share."""
    total: dict[str, dict[float, CaseScores]] = {name: {} for name in LABELS}
    for truth, labels in cases(config):
        for name, label in labels.items():
            near = near_foreground(label[None])[0]
            for share in SHARES:
                forecast = denial(truth, share)
                scores = CaseScores.of(forecast, label, from_logits=False, class_wise=False, near=near)
                held = total[name].get(share)
                total[name][share] = scores if held is None else held + scores
    return total


def report(config: DemoConfig) -> dict[str, Any]:
    """Return the content of foreground_ece.json. Every score is a list with one value for each share."""
    result = {}
    for name, by_share in sums(config).items():
        values = [values_of(scores.bins, MAIN_STATISTICS) for scores in by_share.values()]
        result[name] = {
            "labels": LABELS[name],
            "dice": [float(scores.counts.dice()[1:].mean()) for scores in by_share.values()],
            **{
                region: {
                    **{score: [each[region][score] for each in values] for score in MAIN_STATISTICS},
                    "reliability_of_the_truth": _curve(by_share[0.0].bins[region]),
                }
                for region in REGIONS
            },
        }
    return {"cases": config.cases, "seed": config.seed, "shares": SHARES, "regions": REGIONS,
            "versions": calseg.info(), "result": result}  # fmt: skip


def _curve(bins: CalibrationBins) -> dict[str, list[Any]]:
    """Return voxels, mean confidence and accuracy of the bins that hold a voxel."""
    rows = zip(bins.count.tolist(), bins.confidence.tolist(), bins.hits.tolist(), strict=True)
    kept = [(count, total / UNIT / count, hits / count) for count, total, hits in rows if count]
    return {name: [row[place] for row in kept] for place, name in enumerate(("voxels", "confidence", "accuracy"))}


def draw(content: Mapping[str, Any]) -> Any:
    """Draw the ECE of each region over the share, and the reliability of the truth itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = content["result"]["rater"]
    for region, colour, marker in (("foreground", "#d55e00", "o"), ("near", "#0072b2", "s"), ("all", "#444444", "^")):
        name = {"near": "within 3 voxels of it", "all": "all voxels"}.get(region, region)
        left.plot(content["shares"], found[region]["ece"], color=colour, marker=marker, ms=4, lw=1.2, label=name)
        curve = found[region]["reliability_of_the_truth"]
        if region != "all":
            right.plot(curve["confidence"], curve["accuracy"], color=colour, marker=marker, ms=4, lw=1.2, label=name)
    left.set_xlabel("share of background that is denied (0: the truth itself)", fontsize=8)
    left.set_ylabel("ECE", fontsize=8)
    left.set_ylim(bottom=0)
    left.legend(fontsize=7)
    right.plot((0.3, 1), (0.3, 1), color="#bbbbbb", lw=0.8)
    right.set_xlabel("confidence of the true probabilities", fontsize=8)
    right.set_ylabel("accuracy", fontsize=8)
    right.legend(fontsize=7)
    for ax in (left, right):
        ax.tick_params(labelsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and of the figure")
    given = parser.parse_args(arguments)
    content = as_json(report(DemoConfig(cases=given.cases)))
    write_json(given.out / "foreground_ece.json", content)
    draw(content).savefig(given.out / "foreground_ece.png", dpi=200)
    for name, found in content["result"].items():
        for region in REGIONS:
            errors = found[region]["ece"]
            print(f"{name}, {region}: ECE of the truth {errors[0]:.4f}, almost without background {errors[-1]:.4f}")
        print(f"{name}: Dice of the truth {found['dice'][0]:.3f}, almost without background {found['dice'][-1]:.3f}")


if __name__ == "__main__":
    main()
