"""Tables and figure of the README, from benchmarks/results/calibration-*.json.

    python benchmarks/calibration/figures.py

prints a Markdown table per data set and writes benchmarks/results/calibration.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from scores import TITLES

RESULTS = Path(__file__).parents[1] / "results"
DATASETS = ("hippocampus", "multirater", "synthetic")
NAMES = {
    "cross_entropy": "cross-entropy",
    "temperature_scaling": "temperature scaling",
    "label_smoothing": "label smoothing",
    "svls": "SVLS",
    "focal": "focal",
    "mbls": "MbLS",
    "nacl": "NACL",
    "vls": "vls (one stage)",
    "calseg": "CALSeg, chosen",
    "calseg_defaults": "CALSeg, default",
}
COLUMNS = ("dice", "fg_ece", "ece", "nll", "brier", "disputed_ece", "truth_error")
STYLES = {
    "cross_entropy": ("#222222", "o"),
    "temperature_scaling": ("#777777", "s"),
    "label_smoothing": ("#1f77b4", "^"),
    "svls": ("#17becf", "D"),
    "focal": ("#2ca02c", "v"),
    "mbls": ("#9467bd", "<"),
    "nacl": ("#8c564b", ">"),
    "vls": ("#e6a800", "P"),
    "calseg": ("#ff7f0e", "X"),
    "calseg_defaults": ("#d62728", "*"),
}
NLL_TICKS = (-0.1, -0.05, -0.02, -0.01, -0.005, 0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
DRAWN = ("cross_entropy", "temperature_scaling", "svls", "calseg", "calseg_defaults")
"""Methods whose reliability is drawn. More lines could not be told apart."""


def _settings(entry: Mapping[str, Any]) -> str:
    """Return the settings of a method in words."""
    words = [f"{name} {value:g}" for name, value in entry["settings"].items()]
    if "temperatures" in entry and "temperature" not in entry["settings"]:
        words.append("fitted temperatures " + ", ".join(f"{value:.2f}" for value in entry["temperatures"]))
    return "; ".join(words) or "-"


def _short(value: float, digits: int, *, sign: bool = False) -> str:
    """Format ``value`` without the 0 before the point."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("0.", ".", 1)


def table(content: Mapping[str, Any]) -> str:
    """Return a table in Markdown: means over the seeds, and paired differences from cross-entropy with intervals."""
    test = content["test"]
    keys = [key for key in COLUMNS if key in test["cross_entropy"]["scores"]]
    lines = [
        "| method | settings | " + " | ".join(TITLES[key] for key in keys) + " | Dice - CE's | NLL - CE's |",
        "|---" * (len(keys) + 4) + "|",
    ]
    for method, name in NAMES.items():
        if method not in test:
            continue
        scores = test[method]["scores"]
        cells = [_short(scores[key]["mean"], 3 if key == "dice" else 4) for key in keys]
        for key, digits in (("dice", 3), ("nll", 4)):
            difference = scores[key].get("minus_cross_entropy")
            if difference is None:
                cells.append("-")
            else:
                low, high = (_short(end, digits, sign=True) for end in difference["interval"])
                cells.append(f"{_short(difference['mean'], digits, sign=True)} ({low} to {high})")
        lines.append(f"| {name} | {_settings(test[method])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(contents: Mapping[str, Mapping[str, Any]]) -> Any:
    """Draw a row per data set: Dice and NLL over ECE, as differences from cross-entropy, and reliability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6 * len(contents) + 0.9), layout="constrained")
    axes = figure.subplots(len(contents), 3, squeeze=False)
    handles: dict[str, Any] = {}
    for row, (dataset, content) in zip(axes, contents.items(), strict=True):
        test = content["test"]
        plan, seeds = content["plan"], len(test["cross_entropy"]["scores"]["dice"]["seeds"])
        # Use the error against the true probabilities if they are known.
        error = "disputed_ece" if "disputed_ece" in test["cross_entropy"]["scores"] else "fg_ece"
        for ax, key, name in ((row[0], "dice", "Dice"), (row[1], "nll", "NLL")):
            ax.axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
            ax.axvline(0, color="#bbbbbb", lw=0.8, zorder=0)
            for method in NAMES:
                if method in test:
                    x, y = (_difference(test[method]["scores"][score]) for score in (error, key))
                    colour, marker = STYLES[method]
                    handles[method] = ax.errorbar(
                        x[0], y[0], xerr=_bars(x), yerr=_bars(y), color=colour, marker=marker,
                        ms=11 if marker == "*" else 7, mec="white", mew=0.6, ls="", elinewidth=1, alpha=0.9,
                    )  # fmt: skip
            if key == "nll":  # some methods double it, so that a linear axis could not show the others
                ax.set_yscale("symlog", linthresh=0.01)
                limits = ax.get_ylim()
                ax.set_yticks(NLL_TICKS, [f"{tick:g}" for tick in NLL_TICKS])
                ax.minorticks_off()
                ax.set_ylim(limits)
            ax.locator_params(axis="x", nbins=4)
            against = "to the truth, disputed voxels" if error == "disputed_ece" else "of the foreground"
            ax.set_xlabel(f"ECE {against}, less cross-entropy's")
            ax.set_ylabel(f"{name}, less cross-entropy's")
            better = "up and to the left" if key == "dice" else "down and to the left"
            ax.set_title(f"{dataset}: {name} (better: {better})", fontsize=10)
        ax = row[2]
        ax.plot((0, 1), (0, 1), color="#bbbbbb", lw=0.8)
        curve_name = error.replace("_ece", "_curve")
        for method in DRAWN:
            curve = test.get(method, {"curves": {}})["curves"].get(curve_name)
            if curve:
                share = [count / sum(curve["voxels"]) for count in curve["voxels"]]
                kept = [number for number, part in enumerate(share) if part >= 0.002]  # fewer are noise
                x, y = ([curve[part][number] for number in kept] for part in ("confidence", "frequency"))
                colour, marker = STYLES[method]
                ax.plot(x, y, color=colour, marker=marker, ms=4, lw=1.2)
        ax.set_xlim(0.3, 1)
        ax.set_ylim(0.0 if error == "fg_ece" else 0.2, 1)
        ax.set_xlabel("confidence")
        ax.set_ylabel("accuracy" if error == "fg_ece" else "true probability of the top label")
        region = "foreground" if error == "fg_ece" else "disputed voxels"
        ax.set_title(f"{dataset}: reliability, {region}", fontsize=10)
        ax.text(
            0.98, 0.03, f"{plan['training']} training, {plan['test']} test cases, {seeds} seeds",
            transform=ax.transAxes, ha="right", fontsize=8, color="#555555",
        )  # fmt: skip
    figure.legend(
        [handles[method] for method in NAMES if method in handles],
        [NAMES[method] for method in NAMES if method in handles],
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        title="bars: 95 % intervals, paired over test cases (bootstrap), of the mean over the seeds",
        title_fontsize=9,
    )
    return figure


def _difference(score: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return mean, lower and upper end of a difference from cross-entropy, which is 0 for cross-entropy itself."""
    entry = score.get("minus_cross_entropy", {"mean": 0.0, "interval": (0.0, 0.0)})
    return (entry["mean"], *entry["interval"])


def _bars(values: tuple[float, float, float]) -> list[list[float]]:
    """Return the lengths of error bars."""
    mean, low, high = values
    return [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]


def main() -> None:
    contents = {}
    for dataset in DATASETS:
        path = RESULTS / f"calibration-{dataset}.json"
        if path.is_file():
            contents[dataset] = json.loads(path.read_text())
            print(f"{dataset}\n\n{table(contents[dataset])}\n")
    if not contents:
        raise SystemExit(f"{RESULTS}: no calibration-*.json; run.py makes them")
    path = RESULTS / "calibration.png"
    draw(contents).savefig(path, dpi=100)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
