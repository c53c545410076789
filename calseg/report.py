"""The report of ``calseg evaluate``: ``report.json``, ``cases.csv`` and the reliability diagrams.

All values follow from the integer sums of the cases (:class:`calseg.scores.CaseScores`), so equal sums give equal
files.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calseg._version import __version__
from calseg.bootstrap import NUM_RESAMPLES, Interval, mean_interval, pooled_interval
from calseg.calibration import CalibrationBins
from calseg.errors import listing
from calseg.files import write_atomic, write_json
from calseg.regions import REGIONS
from calseg.scores import N_BINS, STATISTICS, CaseScores, lists_of, quiet_calibration_error, stack
from calseg.settings import SEED, at_least, check_settings, setting, whole

if TYPE_CHECKING:
    from calseg.metrics import CalibrationError

CONFIDENCE_LEVEL = 0.95
CLASS_DIAGRAM = "reliability_classes"
DIAGRAMS = (*(f"reliability_{region}" for region in REGIONS), CLASS_DIAGRAM)
DIAGRAM_CLASSES = 16
"""The largest number of classes with a diagram each. More classes are drawn as rows of one map."""

REPORT = "report.json"
REPORT_FILES = (REPORT, "cases.csv", *(f"{name}.{ending}" for name in DIAGRAMS for ending in ("png", "pdf")))


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of a report."""

    n_bins: int = setting(
        N_BINS, "Number of confidence bins of equal width, for every calibration error.", whole(1, 1000)
    )
    ignore_label: int | None = setting(
        None, "Label of the voxels to leave out of all scores. Default: the label named ignore in dataset.json."
    )
    presets: tuple[str, ...] = setting(
        (),
        "Add the expected calibration error as another package defines it: torchmetrics, monai or marginloss. The value"
        " to compare with torchmetrics is the pooled one, with the others the mean over the cases.",
        option="--preset",
    )
    num_resamples: int = setting(
        NUM_RESAMPLES, "Number of times that the cases are drawn with replacement for the 95 % intervals.", at_least(1)
    )
    seed: int = setting(0, "Seed of the random draws for the intervals.", SEED)

    def __post_init__(self) -> None:
        check_settings(self)


def preset_key(name: str) -> str:
    """Return the name of the entry of :attr:`CaseScores.bins` that holds the bins of a preset."""
    return f"preset_{name}"


def write_report(
    out: Path,
    cases: Mapping[str, CaseScores],
    class_names: Sequence[str],
    config: EvaluateConfig,
    presets: Mapping[str, CalibrationError],
    notes: Sequence[str],
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Write ``report.json``, ``cases.csv`` and the diagrams, and return the content of ``report.json``.

    ``left_out`` names the label maps that have no probability map.
    """
    if left_out:
        notes = [f"{len(left_out)} label maps have no probability map: {listing(left_out)}", *notes]
    together = stack(list(cases.values()))
    columns = case_columns(together, class_names, presets)
    report = {
        "calseg": __version__,
        "cases": len(cases),
        "classes": list(class_names),
        "config": asdict(config),
        "confidence_level": CONFIDENCE_LEVEL,
        "notes": list(notes),
        "left_out": list(left_out),
        "voxels": {region: int(together.bins[region].num_voxels.sum()) for region in REGIONS},
        "nan_voxels": int(together.bins["all"].num_nan.sum()),
        "infinite_voxels": int(together.bins["all"].num_infinite.sum()),
        **_intervals(together, class_names, presets, columns, config),
        "bins": {name: lists_of(bins.pool()) for name, bins in together.bins.items()},
    }
    _write_csv(out / "cases.csv", list(cases), together.bins, columns)
    draw_diagrams(out, together.bins, class_names)
    write_json(out / REPORT, report)
    return report


def case_columns(
    together: CaseScores, class_names: Sequence[str], presets: Mapping[str, CalibrationError]
) -> dict[str, Tensor]:
    """Return the scores of all cases, float64 ``[cases]``, by the names of the CSV columns. NaN stands for no value."""
    bins = together.bins
    columns = {
        f"dice_{name}": values for name, values in zip(class_names, together.counts.dice().unbind(1), strict=True)
    }
    for region in REGIONS:
        for name, statistic in STATISTICS.items():
            columns[f"{name}_{region}"] = statistic.function(bins[statistic.key(region)])
    for name, metric in presets.items():
        columns[f"ece_{name}"] = metric.value_of(bins[preset_key(name)])
    return columns


def _intervals(
    together: CaseScores,
    class_names: Sequence[str],
    presets: Mapping[str, CalibrationError],
    columns: Mapping[str, Tensor],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Return the scores of the report, pooled over all voxels and as means over cases, each with its interval."""
    options: dict[str, Any] = {
        "confidence_level": CONFIDENCE_LEVEL,
        "num_resamples": config.num_resamples,
        "seed": config.seed,
    }

    def mean(values: Tensor) -> dict[str, Any]:
        return {"mean": _entry(mean_interval(values, **options))}

    def pooled_and_mean(bins: CalibrationBins, function: Any, column: str) -> dict[str, Any]:
        return {"pooled": _entry(pooled_interval(bins, function, **options)), **mean(columns[column])}

    result: dict[str, Any] = {
        "dice": {name: mean(columns[f"dice_{name}"]) for name in class_names},
        "dice_foreground_mean": mean(together.counts.dice()[:, 1:].nanmean(1)),
    }
    for region in REGIONS:
        result[region] = {
            name: pooled_and_mean(together.bins[statistic.key(region)], statistic.function, f"{name}_{region}")
            for name, statistic in STATISTICS.items()
        }
        of_class = quiet_calibration_error(together.bins[f"{region}_classes"].pool()).tolist()
        result[region]["ece_of_class"] = {
            name: _number(value) for name, value in zip(class_names, of_class, strict=True)
        }
    result["presets"] = {
        name: pooled_and_mean(together.bins[preset_key(name)], metric.value_of, f"ece_{name}")
        for name, metric in presets.items()
    }
    return result


def _number(value: float) -> float | str | None:
    """Return a value that JSON can hold: None for NaN, "inf" for infinity."""
    return None if math.isnan(value) else "inf" if math.isinf(value) else value


def _entry(interval: Interval) -> dict[str, Any]:
    """Return an interval in the form of the report."""
    value, lower, upper = (_number(float(each)) for each in interval)
    return {"value": value, "interval": None if lower is None or upper is None else [lower, upper]}


def _write_csv(
    path: Path, names: Sequence[str], bins: Mapping[str, CalibrationBins], columns: Mapping[str, Tensor]
) -> None:
    """Write one row of counts, Dice and scores per case. A cell without a value is empty."""
    counts = {
        "voxels": bins["all"].num_voxels,
        "near_voxels": bins["near"].num_voxels,
        "foreground_voxels": bins["foreground"].num_voxels,
        "nan_voxels": bins["all"].num_nan,
        "infinite_voxels": bins["all"].num_infinite,
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *counts, *columns])
    for number, name in enumerate(names):
        numbers = [int(values[number]) for values in counts.values()]
        writer.writerow(
            [_not_a_formula(name), *numbers, *(_number(float(values[number])) for values in columns.values())]
        )
    write_atomic(path, text.getvalue())


def _not_a_formula(name: str) -> str:
    """``name``, with an apostrophe before it where a spreadsheet would take it for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name


def draw_diagrams(out: Path, bins: Mapping[str, CalibrationBins], class_names: Sequence[str]) -> None:
    """Write all diagrams of :data:`DIAGRAMS` as PNG and PDF files. The first axis of ``bins`` is the cases."""
    import matplotlib.pyplot as plt

    from calseg.plots import class_reliability_diagrams, class_reliability_map, reliability_diagram

    figures = {
        f"reliability_{region}": reliability_diagram(bins[region].pool(), cases=bins[region], title=title.capitalize())[
            0
        ]
        for region, title in REGIONS.items()
    }
    by_class = bins["all_classes"]
    figures[CLASS_DIAGRAM] = (
        class_reliability_diagrams(by_class.pool(), class_names, cases=by_class)[0]
        if len(class_names) <= DIAGRAM_CLASSES
        else class_reliability_map(by_class.pool(), class_names)[0]
    )
    for name, figure in figures.items():
        for ending in ("png", "pdf"):
            buffer = io.BytesIO()
            # PDF files get no time of creation, so that equal reports are equal files.
            metadata = {"CreationDate": None} if ending == "pdf" else None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing")  # a class name in letters that the font lacks
                figure.savefig(buffer, format=ending, dpi=200, metadata=metadata)
            figure.set_layout_engine("none")  # the layout is that of the first file
            write_atomic(out / f"{name}.{ending}", buffer.getvalue())
        plt.close(figure)
