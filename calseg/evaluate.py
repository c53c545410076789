"""Scores of probability maps against label maps, folder against folder: what ``calseg evaluate`` runs.

A report is a folder: ``config.json``; ``cases.jsonl``, one line per case with the integer sums from which all else
follows, written as cases are done; and at the end ``report.json``, ``cases.csv`` and the reliability diagrams. An
interrupted evaluation goes on where it stopped, and ends with the same bytes. Needs the extra ``calseg[train]``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calseg._version import __version__
from calseg.bootstrap import NUM_RESAMPLES, Interval, check_options, mean_interval, pooled_interval
from calseg.calibration import CalibrationBins, calibration_bins, calibration_error_from_bins
from calseg.data import IGNORE_INDEX, DataError
from calseg.probabilities import (
    MEMORY,
    MapCase,
    Slab,
    check_headers,
    class_names_of,
    explain,
    find_map_cases,
    read_slabs,
)
from calseg.training import (
    CasesInterruptedError,
    Progress,
    TrainingError,
    no_progress,
    prepare_run,
    read_json,
    write_atomic,
    write_json,
)

STORE_FORMAT = 1
STORE = "cases.jsonl"
DIAGRAMS = ("reliability_all", "reliability_foreground", "reliability_classes")
REPORT_FILES = (
    "config.json", STORE, "report.json", "cases.csv",
    *(f"{name}.{ending}" for name in DIAGRAMS for ending in ("png", "pdf")),
)  # fmt: skip
CONFIDENCE_LEVEL = 0.95

Statistic = Callable[[CalibrationBins], Tensor]


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that decides a report on given files; ``calseg evaluate --help`` explains each."""

    n_bins: int = 15
    ignore_label: int | None = None
    presets: tuple[str, ...] = ()
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n_bins <= 1000:
            raise TrainingError(f"n_bins must lie in 1 to 1000; got {self.n_bins}")
        try:
            check_options(CONFIDENCE_LEVEL, self.num_resamples, self.seed)
        except ValueError as error:
            raise TrainingError(str(error)) from error


# ------------------------------------------------------------------------------------------------- scores


def _error(norm: str) -> Statistic:
    return lambda bins: calibration_error_from_bins(bins._replace(num_nan=torch.zeros_like(bins.num_nan)), norm)


REGIONS: dict[str, dict[str, Statistic]] = {
    region: {
        "nll": CalibrationBins.mean_nll,
        "brier": CalibrationBins.mean_brier,
        "ece": _error("l1"),
        "ace": _error("average"),
        "mce": _error("max"),
        "class_wise_ece": lambda bins: _error("l1")(bins).mean(-1),
    }
    for region in ("all", "foreground")
}
CLASS_WISE = ("class_wise_ece",)


@dataclass
class CaseSums:
    """The integer sums of one case, or of a slab of it.

    ``bins`` holds the top-label and class-wise bins of both regions, and those of presets; ``hits``, ``predicted`` and
    ``labelled`` count the voxels ``[C]`` of each class: in both maps, in the arg max, in the label map. A voxel with a
    NaN probability is in no count.
    """

    bins: dict[str, CalibrationBins]
    hits: Tensor
    predicted: Tensor
    labelled: Tensor

    def __add__(self, other: CaseSums) -> CaseSums:
        return CaseSums(
            {name: bins + other.bins[name] for name, bins in self.bins.items()},
            self.hits + other.hits,
            self.predicted + other.predicted,
            self.labelled + other.labelled,
        )

    def to_json(self) -> dict[str, Any]:
        """Nested lists of integers."""
        bins = {name: {key: sums.tolist() for key, sums in each._asdict().items()} for name, each in self.bins.items()}
        return {"bins": bins, **{name: getattr(self, name).tolist() for name in ("hits", "predicted", "labelled")}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CaseSums:
        """The inverse of :meth:`to_json`."""
        bins = {
            name: CalibrationBins(
                **{key: torch.tensor(sums, dtype=torch.int64, device="cpu") for key, sums in each.items()}
            )
            for name, each in content["bins"].items()
        }
        counts = (
            torch.tensor(content[name], dtype=torch.int64, device="cpu") for name in ("hits", "predicted", "labelled")
        )
        return cls(bins, *counts)


def slab_sums(probabilities: Tensor, label: Tensor, config: EvaluateConfig) -> CaseSums:
    """The sums of ``probabilities`` float ``[1, C, *S]`` and ``label`` ``[1, *S]``."""
    options: dict[str, Any] = {"n_bins": config.n_bins, "from_logits": False, "ignore_index": IGNORE_INDEX}
    foreground = label > 0
    bins = {
        "all": calibration_bins(probabilities, label, **options),
        "foreground": calibration_bins(probabilities, label, mask=foreground, **options),
        "all_classes": calibration_bins(probabilities, label, class_wise=True, **options),
        "foreground_classes": calibration_bins(probabilities, label, class_wise=True, mask=foreground, **options),
    }
    classes = probabilities.shape[1]
    for name in config.presets:
        bins[f"preset_{name}"] = preset(name, classes).item_bins(probabilities, label).pool()
    valid = label != IGNORE_INDEX
    if int(bins["all"].num_nan):
        valid &= ~probabilities.isnan().any(1)
    pairs = torch.bincount(label[valid].long() * classes + probabilities.argmax(1)[valid], minlength=classes**2)
    table = pairs.view(classes, classes)
    return CaseSums(bins, table.diagonal().clone(), table.sum(0), table.sum(1))


def preset(name: str, classes: int) -> Any:
    """The metric of one case by another package's convention; needs torchmetrics."""
    from calseg.metrics import PRESETS, CalibrationError

    if name not in PRESETS:
        raise TrainingError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    settings = dict(PRESETS[name])
    if settings.get("class_wise"):
        settings["num_classes"] = classes
    return CalibrationError(**settings, from_logits=False, ignore_index=IGNORE_INDEX)


def score_case(case: MapCase, classes: int, config: EvaluateConfig, memory: int = MEMORY) -> CaseSums:
    """Read one case slab by slab and sum it up."""
    total: CaseSums | None = None
    for slab in read_slabs(case, classes, config.ignore_label, memory):
        sums = _score_slab(slab, case, config)
        total = sums if total is None else total + sums
    assert total is not None  # check_headers refuses empty axes
    return total


def _score_slab(slab: Slab, case: MapCase, config: EvaluateConfig) -> CaseSums:
    probabilities, label = torch.from_numpy(slab.probabilities)[None], torch.from_numpy(slab.label)[None]
    try:
        return slab_sums(probabilities, label, config)
    except ValueError as error:
        raise explain(error, slab, case) from error


# -------------------------------------------------------------------------------------------------- store


@dataclass
class Store:
    """The cases that are done, one JSON line each; a line that an interruption cut short is taken off."""

    path: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Read what an earlier run left."""
        store = cls(path)
        if not path.exists():
            return store
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_atomic(path, whole)
        try:
            store.records = {record["case"]: record for record in map(json.loads, whole.splitlines())}
        except (ValueError, TypeError, KeyError) as error:
            raise TrainingError(f"{path}: a line is corrupt; give --overwrite to start anew") from error
        return store

    def add(self, case: MapCase, sums: CaseSums) -> None:
        """Append a case and flush it to the disk."""
        record = {"case": case.name, "files": _stamps(case), **sums.to_json()}
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self.records[case.name] = record

    def check_files(self, cases: Sequence[MapCase]) -> None:
        """Refuse to mix with cases that were done from other files."""
        present = {case.name: case for case in cases}
        for name, record in self.records.items():
            if name not in present:
                raise TrainingError(f"{self.path}: cannot be resumed; the case {name!r} is gone")
            stamps = _stamps(present[name])
            if stamps != record["files"]:
                changed = next((file for file in stamps if stamps[file] != record["files"].get(file)), name)
                raise TrainingError(f"{self.path}: cannot be resumed; {changed} changed since")


def _stamps(case: MapCase) -> dict[str, list[int]]:
    """Size and time of last change of each file."""
    stamps = {}
    for path in case.files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        stamps[str(path.resolve())] = [status.st_size, status.st_mtime_ns]
    return stamps


# ----------------------------------------------------------------------------------------------- evaluation


def evaluate_folders(
    probabilities: str | Path,
    labels: str | Path,
    out: str | Path,
    config: EvaluateConfig,
    *,
    dataset_json: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    memory: int = MEMORY,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Score every probability map of one folder against the label map of that name in another; what ``report.json``
    holds.

    Raises :class:`~calseg.data.DataError` or :class:`~calseg.training.TrainingError` for what the user can mend, and
    :class:`~calseg.training.CasesInterruptedError` after Ctrl-C. ``memory`` is about the number of bytes to
    work in.
    """
    maps, truth, report = Path(probabilities), Path(labels), Path(out)
    cases, left_out = find_map_cases(maps, truth)
    named = class_names_of(None if dataset_json is None else Path(dataset_json), maps, truth)
    class_names, notes = _check_cases(cases, None if named is None else named[0])
    if config.ignore_label is None and named is not None:
        config = EvaluateConfig(**{**asdict(config), "ignore_label": named[1]})
    for name in config.presets:
        preset(name, len(class_names))
    if left_out:
        notes.insert(0, f"{len(left_out)} label maps have no probability map: {_few(left_out)}")

    content = json.loads(json.dumps({"format": STORE_FORMAT, "classes": class_names, **asdict(config)}))
    prepare_run(report, resume=resume, overwrite=overwrite, files=REPORT_FILES, state="config.json")
    if resume:
        _check_same(report / "config.json", content)
    store = Store.open(report / STORE)
    store.check_files(cases)
    write_json(report / "config.json", content)
    try:
        for done, case in enumerate(cases, 1):
            if case.name not in store.records:
                store.add(case, score_case(case, len(class_names), config, memory))
            progress("evaluate", done, len(cases), None)
    except KeyboardInterrupt:
        raise CasesInterruptedError(store.path, len(store.records), len(cases)) from None
    sums = {case.name: CaseSums.from_json(store.records[case.name]) for case in cases}
    return write_report(report, sums, class_names, config, notes)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_cases(cases: Sequence[MapCase], class_names: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[str]]:
    """Class names, and what is odd, from the headers of all files: before anything is computed or written."""
    notes, first = [], cases[0]
    for case in cases:
        classes, odd = check_headers(case)
        notes += odd
        if class_names is None:
            class_names = tuple(f"class {number}" for number in range(classes))
        if classes != len(class_names):
            of = f"{first.maps[0]} has" if class_names[-1] == f"class {len(class_names) - 1}" else "dataset.json names"
            raise DataError(f"{case.maps[0]}: {classes} classes, but {of} {len(class_names)}")
    assert class_names is not None
    return class_names, notes


def _check_same(path: Path, wanted: Mapping[str, Any]) -> None:
    saved = read_json(path)
    changed = [
        f"{key} is {value!r} but was {saved.get(key)!r}" for key, value in wanted.items() if value != saved.get(key)
    ]
    if changed:
        raise TrainingError(f"{path}: cannot be resumed with other settings: {'; '.join(changed)}")


# --------------------------------------------------------------------------------------------------- report


def write_report(
    out: Path, cases: Mapping[str, CaseSums], class_names: Sequence[str], config: EvaluateConfig, notes: Sequence[str]
) -> dict[str, Any]:
    """Write ``report.json``, ``cases.csv`` and the diagrams; returns the report."""
    items = {name: _stack([sums.bins[name] for sums in cases.values()]) for name in next(iter(cases.values())).bins}
    options: dict[str, Any] = {"num_resamples": config.num_resamples, "seed": config.seed}
    columns = {f"dice_{name}": values for name, values in zip(class_names, _dice(cases).unbind(1), strict=True)}
    report: dict[str, Any] = {
        "calseg": __version__,
        "cases": len(cases),
        "classes": list(class_names),
        "config": asdict(config),
        "confidence_level": CONFIDENCE_LEVEL,
        "notes": list(notes),
        "voxels": {region: int(items[region].num_voxels.sum()) for region in REGIONS},
        "nan_voxels": int(items["all"].num_nan.sum()),
        "infinite_voxels": int(items["all"].num_infinite.sum()),
        "dice": {},
    }
    for name in class_names:
        report["dice"][name] = {"mean": _entry(mean_interval(columns[f"dice_{name}"], **options))}
    mean_dice = _dice(cases)[:, 1:].nanmean(1)
    report["dice_foreground_mean"] = {"mean": _entry(mean_interval(mean_dice, **options))}
    for region, statistics in REGIONS.items():
        report[region] = {}
        for score, statistic in statistics.items():
            bins = items[f"{region}_classes" if score in CLASS_WISE else region]
            values = columns[f"{score}_{region}"] = statistic(bins)
            report[region][score] = {
                "pooled": _entry(pooled_interval(bins, statistic, **options)),
                "mean": _entry(mean_interval(values, **options)),
            }
        by_class = _error("l1")(items[f"{region}_classes"].pool())
        named = zip(class_names, by_class.tolist(), strict=True)
        report[region]["ece_of_class"] = {name: _number(value) for name, value in named}
    report["presets"] = {}
    for name in config.presets:
        metric, bins = preset(name, len(class_names)), items[f"preset_{name}"]
        columns[f"ece_{name}"] = metric.value_of(bins)
        report["presets"][name] = {
            "pooled": _entry(pooled_interval(bins, metric.value_of, **options)),
            "mean": _entry(mean_interval(columns[f"ece_{name}"], **options)),
        }
    report["bins"] = {
        name: {key: sums.tolist() for key, sums in bins.pool()._asdict().items()} for name, bins in items.items()
    }
    _write_csv(out / "cases.csv", cases, items, columns)
    _draw(out, items, class_names)
    write_json(out / "report.json", report)
    return report


def _stack(parts: Sequence[CalibrationBins]) -> CalibrationBins:
    return CalibrationBins(*(torch.stack(sums) for sums in zip(*parts, strict=True)))


def _dice(cases: Mapping[str, CaseSums]) -> Tensor:
    """Dice of the arg max, float64 ``[cases, C]``; NaN where neither map of a case holds the class."""
    rows = [2.0 * sums.hits.double() / (sums.predicted + sums.labelled) for sums in cases.values()]
    return torch.stack(rows)


def _number(value: float) -> float | str | None:
    """As JSON has it: null for NaN, "inf"."""
    return None if math.isnan(value) else "inf" if math.isinf(value) else value


def _entry(interval: Interval) -> dict[str, Any]:
    value, lower, upper = (_number(float(each)) for each in interval)
    return {"value": value, "interval": None if lower is None or upper is None else [lower, upper]}


def _write_csv(
    path: Path, cases: Mapping[str, CaseSums], items: Mapping[str, CalibrationBins], columns: Mapping[str, Tensor]
) -> None:
    """One row per case: counts, Dice and scores; empty where there is no value."""
    counts = {
        "voxels": items["all"].num_voxels,
        "foreground_voxels": items["foreground"].num_voxels,
        "nan_voxels": items["all"].num_nan,
        "infinite_voxels": items["all"].num_infinite,
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *counts, *columns])
    for number, name in enumerate(cases):
        numbers = [int(values[number]) for values in counts.values()]
        writer.writerow([name, *numbers, *(_number(float(values[number])) for values in columns.values())])
    write_atomic(path, text.getvalue())


def _draw(out: Path, items: Mapping[str, CalibrationBins], class_names: Sequence[str]) -> None:
    import matplotlib.pyplot as plt

    from calseg.plots import class_reliability_diagrams, reliability_diagram

    for name in DIAGRAMS:
        region = name.removeprefix("reliability_")
        if region == "classes":
            bins = items["all_classes"]
            figure, _ = class_reliability_diagrams(bins.pool(), class_names, cases=bins)
        else:
            title = "All voxels" if region == "all" else "Foreground (label not 0)"
            figure, _ = reliability_diagram(items[region].pool(), cases=items[region], title=title)
        for ending in ("png", "pdf"):
            buffer = io.BytesIO()
            # Without the time of day, so that equal reports are equal files.
            figure.savefig(buffer, format=ending, dpi=200, metadata={"CreationDate": None} if ending == "pdf" else None)
            write_atomic(out / f"{name}.{ending}", buffer.getvalue())
        plt.close(figure)
