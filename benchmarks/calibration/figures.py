"""Figure of the experiment, from benchmarks/results/calibration-*.json.

    python benchmarks/calibration/figures.py

draws benchmarks/results/calibration.png. A data set without a result, or with one of another format, is named and left
out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from contenders import CONTENDERS, OTHERS, REFERENCE
from datasets import PLANS
from report import FORMAT

RESULTS = Path(__file__).resolve().parents[1] / "results"
LIGHT = "#bbbbbb"


class Style(NamedTuple):
    """How a contender is drawn. A hollow marker stands for a method without the Dice loss."""

    colour: str
    marker: str
    is_hollow: bool = False


STYLES = {
    REFERENCE: Style("#000000", "s"),
    "dice_cross_entropy_scaled": Style("#000000", "D"),
    "dice_cross_entropy_near": Style("#000000", "d"),
    "cross_entropy": Style("#000000", "s", is_hollow=True),
    "cross_entropy_scaled": Style("#000000", "D", is_hollow=True),
    **{
        f"{method}{ending}": Style("#0072b2", marker, is_hollow=not ending)
        for method, marker in zip(OTHERS, "^v<>phXP", strict=True)
        for ending in ("", "_dice")
    },
    "calseg": Style("#d55e00", "*"),
    "calseg_near": Style("#d55e00", "D"),
    "calseg_no_dice": Style("#d55e00", "o", is_hollow=True),
    "calseg_dice_second": Style("#e69f00", "o"),
    "calseg_dice_hard": Style("#e69f00", "d"),
    "calseg_prior": Style("#e69f00", "P"),
    "calseg_network": Style("#009e73", "*"),
    "calseg_whole": Style("#e69f00", "s"),
    "calseg_four_folds": Style("#e69f00", "^"),
}
CURVES = {
    REFERENCE: "-",
    "dice_cross_entropy_near": ":",
    "cross_entropy": "--",
    "ace_soft_dice": "-",
    "calseg": "-",
    "calseg_near": ":",
}
"""The contenders whose reliability is drawn, with their line styles. More lines could not be told apart."""


def read_results(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the results by data set, and a sentence for each file that is absent or of another format."""
    contents, missing = {}, []
    for name in PLANS:
        path = folder / f"calibration-{name}.json"
        if not path.is_file():
            missing.append(f"{name}: there is no result yet ({path})")
            continue
        content = json.loads(path.read_text())
        if content.get("format") == FORMAT:
            contents[name] = content
        else:
            missing.append(f"{name}: {path} is of an older format, which compared with cross-entropy; it is left out")
    known = {f"calibration-{name}.json" for name in PLANS}
    others = [path for path in sorted(folder.glob("calibration-*.json")) if path.name not in known]
    return contents, missing + [f"{path}: no data set of this experiment; it is left out" for path in others]


def draw(contents: Mapping[str, Mapping[str, Any]]) -> Any:
    """Draw a row per data set: Dice over the ECE near the foreground, and reliability there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.0 * len(contents) + 1.6), layout="constrained")
    axes = figure.subplots(len(contents), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for row, (dataset, content) in zip(axes, contents.items(), strict=True):
        handles.update(_draw_scores(row[0], content["test"]))
        plan, seeds = content["plan"], len(content["seeds"])
        row[0].set_title(f"{dataset}: better is up and to the left", fontsize=9)
        _draw_curves(row[1], content["test"])
        row[1].set_title(f"{plan['test']} test cases, {seeds} seed{'s' * (seeds > 1)}", fontsize=9)
    shown = [name for name in CONTENDERS if name in handles]
    figure.legend(
        [handles[name] for name in shown],
        [CONTENDERS[name].title for name in shown],
        loc="outside lower center",
        ncols=3,
        fontsize=7,
        title="Bars: 95 % intervals of the difference from Dice + CE, paired over test cases (bootstrap).",
        title_fontsize=7,
    )
    return figure


def _draw_scores(ax: Any, test: Mapping[str, Any]) -> dict[str, Any]:
    """Draw Dice over the ECE near the foreground, and return the markers by contender."""
    handles = {}
    reference = test[REFERENCE]["scores"]
    ax.axhline(reference["dice"]["mean"], color=LIGHT, lw=0.6, zorder=0)
    ax.axvline(reference["near_ece"]["mean"], color=LIGHT, lw=0.6, zorder=0)
    for name, style in STYLES.items():
        if name in test:
            x, y = (test[name]["scores"][key] for key in ("near_ece", "dice"))
            handles[name] = ax.errorbar(
                x["mean"], y["mean"], xerr=_bars(x), yerr=_bars(y), color=style.colour, marker=style.marker, ls="",
                ms=9 if style.marker == "*" else 5.5, mfc="white" if style.is_hollow else style.colour,
                mec=style.colour, mew=0.9, elinewidth=0.7,
            )  # fmt: skip
    ax.set_xlim(left=0)
    ax.set_xlabel("ECE within 3 voxels of the foreground", fontsize=8)
    ax.set_ylabel("Dice", fontsize=8)
    ax.tick_params(labelsize=7)
    return handles


def _bars(score: Mapping[str, Any]) -> list[list[float]]:
    """Return the lengths of error bars from the interval of the difference from the reference, which has none."""
    found = score.get("minus_reference")
    if found is None:
        return [[0.0], [0.0]]
    low, high = found["interval"]
    return [[max(found["mean"] - low, 0.0)], [max(high - found["mean"], 0.0)]]


def _draw_curves(ax: Any, test: Mapping[str, Any]) -> None:
    """Draw accuracy less confidence over confidence, near the foreground. Bins with few voxels are noise, left out."""
    ax.axhline(0, color=LIGHT, lw=0.8)
    for name, line in CURVES.items():
        if name in test:
            curve = test[name]["near_curve"]
            kept = [n for n, count in enumerate(curve["voxels"]) if count >= 0.002 * sum(curve["voxels"])]
            x = [curve["confidence"][n] for n in kept]
            y = [curve["accuracy"][n] - curve["confidence"][n] for n in kept]
            style = STYLES[name]
            face = "white" if style.is_hollow else style.colour
            ax.plot(x, y, color=style.colour, ls=line, marker=style.marker, ms=3.5, mfc=face, lw=1.1)
    ax.set_xlabel("confidence, within 3 voxels", fontsize=8)
    ax.set_ylabel("accuracy less confidence", fontsize=8)
    ax.tick_params(labelsize=7)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    folder = parser.parse_args(arguments).results
    contents, missing = read_results(folder)
    for sentence in missing:
        print(sentence)
    if not contents:
        raise SystemExit(f"{folder}: no result to draw; run.py makes them")
    draw(contents).savefig(folder / "calibration.png", dpi=200)
    print(f"written to {folder / 'calibration.png'}")


if __name__ == "__main__":
    main()
