"""Evaluation of a folder of probability maps against a folder of label maps, for ``calseg evaluate``.

The result is a folder. It holds ``config.json``, ``cases.jsonl`` with one line of integer sums per case, which is
written when the case is done, and the files of :mod:`calseg.report`, which are written last and follow from the sums.
An interrupted evaluation can be resumed, and then ends with the same bytes. The module needs nibabel and matplotlib
(the extra ``calseg[train]``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calseg.errors import RunError, listing
from calseg.files import InputFile, as_json, file_stamp, write_atomic
from calseg.regions import NEAR_RADIUS, near_foreground
from calseg.report import REPORT_FILES, EvaluateConfig, preset_key, write_report
from calseg.runs import CasesInterruptedError, Progress, RunFolder, check_apart, no_progress
from calseg.scores import CaseScores
from calseg.volumes.datasets import IGNORE_INDEX
from calseg.volumes.nifti import DataError
from calseg.volumes.probabilities import (
    MEMORY,
    MapCase,
    Slab,
    check_headers,
    class_names_of,
    explain,
    find_map_cases,
    normalised,
    read_slabs,
)

if TYPE_CHECKING:
    from calseg.metrics import CalibrationError

__all__ = ["FOLDER_FILES", "EvaluateConfig", "evaluate_folders"]

STORE_FORMAT = 2
CONFIG = "config.json"
STORE = "cases.jsonl"
FOLDER_FILES = (CONFIG, STORE, *REPORT_FILES)


# ------------------------------------------------------------------------------------------------- scores


def preset_metrics(names: Sequence[str], classes: int) -> dict[str, CalibrationError]:
    """Return the metric of one case as each package in ``names`` defines it. This needs torchmetrics."""
    if not names:
        return {}
    from calseg.metrics import PRESETS, CalibrationError

    metrics = {}
    for name in names:
        if name not in PRESETS:
            raise RunError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
        settings = dict(PRESETS[name])
        if settings.get("class_wise"):
            settings["num_classes"] = classes
        metrics[name] = CalibrationError(**settings, from_logits=False, ignore_index=IGNORE_INDEX)
    return metrics


def score_case(
    case: MapCase,
    classes: int,
    config: EvaluateConfig,
    presets: Mapping[str, CalibrationError],
    memory: int = MEMORY,
) -> CaseScores:
    """Read a case slab by slab, and return its sums."""
    total: CaseScores | None = None
    for slab in read_slabs(case, classes, config.ignore_label, memory, margin=int(NEAR_RADIUS)):
        scores = _score_slab(slab, case, config, presets)
        total = scores if total is None else total + scores
    assert total is not None  # check_headers() raises for empty axes
    return total


def _score_slab(
    slab: Slab, case: MapCase, config: EvaluateConfig, presets: Mapping[str, CalibrationError]
) -> CaseScores:
    """Return the sums of a slab. Probabilities that were rounded in the file are divided by their sums first."""
    try:
        return _sums(slab, config, presets)
    except ValueError as error:
        rounded = normalised(slab)
        if rounded is None:
            raise explain(error, slab, case) from error
    try:
        return _sums(rounded, config, presets)
    except ValueError as error:
        raise explain(error, slab, case) from error


def _sums(slab: Slab, config: EvaluateConfig, presets: Mapping[str, CalibrationError]) -> CaseScores:
    """Return the sums of the probabilities and labels of a slab."""
    label = torch.from_numpy(slab.label)
    near = near_foreground(torch.from_numpy(slab.around)[None], ignore_index=IGNORE_INDEX)[0]
    return CaseScores.of(
        torch.from_numpy(slab.probabilities),
        label,
        near=near[slab.margin : slab.margin + len(label)],
        from_logits=False,
        n_bins=config.n_bins,
        conventions={preset_key(name): metric.item_bins for name, metric in presets.items()},
        ignore_index=IGNORE_INDEX,
    )


# -------------------------------------------------------------------------------------------------- store


@dataclass
class Store:
    """File of the finished cases, one line of JSON per case. An incomplete last line is removed."""

    path: Path
    scores: dict[str, CaseScores] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, like: CaseScores) -> Store:
        """Read the cases of an earlier run, if the file exists. Their sums have the names and shapes of ``like``."""
        store = cls(path)
        if not path.exists():
            return store
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_atomic(path, whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                scores = CaseScores.from_json(record)
                store.scores[record.pop("case")] = scores
                is_right = record == scores.to_json() and _shapes(scores) == _shapes(like)
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
                is_right = False
            if not is_right:
                raise RunError(f"{path}: line {number} is corrupt; give --overwrite to start anew")
        return store

    def add(self, case: MapCase, scores: CaseScores) -> None:
        """Append a case and flush it to the disk."""
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps({"case": case.name, **scores.to_json()}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self.scores[case.name] = scores

    def check_cases(self, cases: Sequence[MapCase]) -> None:
        """Refuse to mix with a case that is no longer there."""
        present = {case.name for case in cases}
        for name in self.scores:
            if name not in present:
                raise RunError(f"{self.path}: cannot be resumed; the case {name!r} is gone")


def _shapes(scores: CaseScores) -> dict[str, Any]:
    """The shape of every tensor of the sums, by name."""
    fields = {**scores.bins, **scores.truth, "counts": scores.counts}
    return {name: [each.shape for each in sums] for name, sums in fields.items()}


def case_stamps(case: MapCase) -> list[InputFile]:
    """The files of a case by their size and time, for a run to remember."""
    roles = (*("map" for _ in case.maps), "label")
    return [
        InputFile(file, f"{role} {file.name}", file_stamp(file)) for role, file in zip(roles, case.files, strict=True)
    ]


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
    """Score every probability map of a folder against the label map with the same name in another folder.

    Args:
        probabilities: folder of the probability maps, in a form that :mod:`calseg.volumes.probabilities` reads.
        labels: folder of the label maps.
        out: folder of the report.
        config: settings of the report.
        dataset_json: file with the names of the classes. Default: the ``dataset.json`` beside or above the maps, if
            there is one.
        resume: True to continue an interrupted evaluation with the same settings.
        overwrite: True to replace the report that ``out`` holds.
        memory: number of bytes of memory to use, approximately.
        progress: function that is called after every case.

    Returns:
        The content of ``report.json``.

    Raises:
        CalsegError: a file or a setting is wrong, and the user can fix it.
        CasesInterruptedError: Ctrl-C was pressed. The finished cases are kept in ``out``.
    """
    maps, truth = Path(probabilities), Path(labels)
    check_apart(Path(out), maps, truth, *([] if dataset_json is None else [dataset_json]))
    cases, left_out = find_map_cases(maps, truth)
    check_apart(Path(out), files=[file for case in cases for file in case.files])
    named, ignore_label = class_names_of(None if dataset_json is None else Path(dataset_json), maps, truth)
    class_names, notes = _check_cases(cases, named)
    if config.ignore_label is None:
        config = replace(config, ignore_label=ignore_label)
    presets = preset_metrics(config.presets, len(class_names))
    if left_out:
        notes.insert(0, f"{len(left_out)} label maps have no probability map: {listing(left_out)}")

    settings = as_json({"format": STORE_FORMAT, "classes": class_names, **asdict(config)})
    folder = RunFolder(Path(out), "evaluate", FOLDER_FILES)
    with folder.open(settings, resume=resume, overwrite=overwrite) as run:
        run.claim(STORE)
        empty = Slab(0, np.zeros((len(class_names), 0, 1, 1), np.float32), np.zeros((0, 1, 1), np.int16), 0)
        nothing = _sums(empty, config, presets)
        store = Store.open(run.path / STORE, like=nothing)
        store.check_cases(cases)
        run.check_inputs({case.name: case_stamps(case) for case in cases if case.name in store.scores})
        run.write_json(CONFIG, settings)
        try:
            for done, case in enumerate(cases, 1):
                if case.name not in store.scores:
                    run.remember({case.name: case_stamps(case)})
                    store.add(case, score_case(case, len(class_names), config, presets, memory))
                progress("evaluate", done, len(cases), None)
        except KeyboardInterrupt:
            raise CasesInterruptedError(store.path, len(store.scores), len(cases)) from None
        scores = {case.name: store.scores[case.name] for case in cases}
        run.claim(*REPORT_FILES)
        return write_report(run.path, scores, class_names, config, presets, notes)


def _check_cases(cases: Sequence[MapCase], class_names: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[str]]:
    """Check the headers of all files before anything is computed or written.

    Returns:
        The names of the classes, and notes for the report on what is unusual.
    """
    notes, first, is_counted = [], cases[0], class_names is None
    for case in cases:
        classes, odd = check_headers(case)
        notes += odd
        if class_names is None:
            class_names = tuple(f"class {number}" for number in range(classes))
        if classes != len(class_names):
            of = f"{first.maps[0]} has" if is_counted else "dataset.json names"
            raise DataError(f"{case.maps[0]}: {classes} classes, but {of} {len(class_names)}")
    assert class_names is not None
    return class_names, notes
