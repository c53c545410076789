"""Evaluation of a folder of probability maps against a folder of label maps, for ``calseg evaluate``.

The result is a folder. It holds ``config.json``, ``cases.jsonl`` with one line of integer sums per case, which is
written when the case is done, and the files of :mod:`calseg.report`, which are written last and follow from the sums.
An interrupted evaluation can be resumed, and then ends with the same bytes, with any number of processes. The module
needs nibabel and matplotlib (the extra ``calseg[train]``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calseg.errors import RunError
from calseg.files import InputFile, as_json, failing, file_stamp, write_atomic
from calseg.regions import NEAR_RADIUS, near_foreground
from calseg.report import REPORT_FILES, EvaluateConfig, preset_key, write_report
from calseg.runs import CasesInterruptedError, Progress, Run, RunFolder, check_apart, no_progress
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
from calseg.workers import share_out

if TYPE_CHECKING:
    from calseg.metrics import CalibrationError

__all__ = ["FOLDER_FILES", "EvaluateConfig", "evaluate_folders"]

STORE_FORMAT = 3
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


def no_scores(classes: int, config: EvaluateConfig, presets: Mapping[str, CalibrationError]) -> CaseScores:
    """Return the sums of no voxels."""
    empty = Slab(0, np.zeros((classes, 0, 1, 1), np.float32), np.zeros((0, 1, 1), np.int16), 0)
    return _sums(empty, config, presets)


# -------------------------------------------------------------------------------------------------- store


@dataclass
class Store:
    """The file of the finished cases, which has a line of JSON for each.

    Attributes:
        path: the file.
        scores: the sums of every case.
        notes: what is unusual about every case.
    """

    path: Path
    scores: dict[str, CaseScores] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, like: CaseScores) -> Store:
        """Read a file, whose sums have the names and shapes of ``like``."""
        store = cls(path)
        with failing(path, "read"):
            lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                name, notes, scores = record.pop("case"), record.pop("notes"), CaseScores.from_json(record)
                is_right = record == scores.to_json() and _shapes(scores) == _shapes(like)
                is_right = is_right and isinstance(name, str) and all(isinstance(note, str) for note in notes)
                store.scores[name], store.notes[name] = scores, list(notes)
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
                is_right = False
            if not is_right:
                raise RunError(f"{path}: line {number} is corrupt")
        return store

    @classmethod
    def resume(cls, path: Path, like: CaseScores) -> Store:
        """Read the file of an earlier run, if there is one. An incomplete last line is removed from it."""
        if not path.exists():
            return cls(path)
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_atomic(path, whole)
        try:
            return cls.read(path, like)
        except RunError as error:
            raise RunError(f"{error}; give --overwrite to start anew") from None

    def add(self, name: str, scores: CaseScores, notes: list[str]) -> None:
        """Append a case and flush it to the disk."""
        self.scores[name], self.notes[name] = scores, notes
        try:
            with open(self.path, "ab") as file:
                file.write(self._line(name))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def sort(self) -> None:
        """Put the cases into the order of their names. With several processes they come in that of their ends."""
        names = sorted(self.scores)
        if names != list(self.scores):
            self.scores = {name: self.scores[name] for name in names}
            self.write()

    def write(self) -> None:
        """Write the whole file."""
        write_atomic(self.path, b"".join(map(self._line, self.scores)))

    def _line(self, name: str) -> bytes:
        content = {"case": name, "notes": self.notes[name], **self.scores[name].to_json()}
        return json.dumps(content).encode() + b"\n"

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


def _work(case: MapCase, classes: int, config: EvaluateConfig, memory: int) -> tuple[list[InputFile], dict[str, Any]]:
    """Return what identifies the files of a case, and its sums as JSON. This may run in another process."""
    stamps = case_stamps(case)
    scores = score_case(case, classes, config, preset_metrics(config.presets, classes), memory)
    return stamps, scores.to_json()


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
    workers: int = 1,
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
        memory: number of bytes of memory to use, approximately. The processes share it.
        workers: number of processes that cases are shared out to. The result has the same bytes for any number.
        progress: function that is called after every case.

    Returns:
        The content of ``report.json``.

    Raises:
        CalsegError: a file or a setting is wrong, and the user can fix it.
        CasesInterruptedError: Ctrl-C was pressed. The finished cases are kept in ``out``.
    """
    if workers < 1:
        raise RunError(f"workers must be at least 1; got {workers}")
    maps, truth = Path(probabilities), Path(labels)
    check_apart(Path(out), maps, truth, *([] if dataset_json is None else [dataset_json]))
    cases, left_out = find_map_cases(maps, truth)
    check_apart(Path(out), files=[file for case in cases for file in case.files])
    named, ignore_label = class_names_of(None if dataset_json is None else Path(dataset_json), maps, truth)
    class_names, notes = _check_cases(cases, named)
    if config.ignore_label is None:
        config = replace(config, ignore_label=ignore_label)
    presets = preset_metrics(config.presets, len(class_names))

    settings = as_json({"format": STORE_FORMAT, "classes": class_names, **asdict(config)})
    folder = RunFolder(Path(out), "evaluate", FOLDER_FILES)
    with folder.open(settings, resume=resume, overwrite=overwrite) as run:
        run.claim(STORE)
        store = Store.resume(run.path / STORE, no_scores(len(class_names), config, presets))
        store.check_cases(cases)
        run.check_inputs({case.name: case_stamps(case) for case in cases if case.name in store.scores})
        run.write_json(CONFIG, settings)
        left = [case for case in cases if case.name not in store.scores]
        work = partial(_work, classes=len(class_names), config=config, memory=memory // min(workers, max(len(left), 1)))
        try:
            progress("evaluate", len(store.scores), len(cases), None)
            with closing(share_out(work, left, workers)) as done:
                for case, (stamps, sums) in done:
                    run.remember({case.name: stamps})
                    store.add(case.name, CaseScores.from_json(sums), notes[case.name])
                    progress("evaluate", len(store.scores), len(cases), None)
        except KeyboardInterrupt:
            raise CasesInterruptedError(store.path, len(store.scores), len(cases)) from None
        store.sort()
        return finish(run, store, class_names, config, presets, left_out)


def finish(
    run: Run,
    store: Store,
    class_names: Sequence[str],
    config: EvaluateConfig,
    presets: Mapping[str, CalibrationError],
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Write the files that follow from the sums of all cases, and return the content of ``report.json``."""
    run.claim(*REPORT_FILES)
    notes = [note for name in store.scores for note in store.notes[name]]
    return write_report(run.path, store.scores, class_names, config, presets, notes, left_out)


def _check_cases(
    cases: Sequence[MapCase], class_names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Check the headers of all files before anything is computed or written.

    Returns:
        The names of the classes, and notes for the report on what is unusual about each case.
    """
    notes, first, is_counted = {}, cases[0], class_names is None
    for case in cases:
        classes, notes[case.name] = check_headers(case)
        if class_names is None:
            class_names = tuple(f"class {number}" for number in range(classes))
        if classes != len(class_names):
            of = f"{first.maps[0]} has" if is_counted else "dataset.json names"
            raise DataError(f"{case.maps[0]}: {classes} classes, but {of} {len(class_names)}")
    assert class_names is not None
    return class_names, notes
