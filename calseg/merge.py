"""Union of the reports of parts of a data set, for ``calseg evaluate merge``.

A report keeps the integer sums of every case. So the union is the report of one evaluation of all cases, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from calseg.errors import CalsegError, RunError
from calseg.evaluate import CONFIG, FOLDER_FILES, STORE, STORE_FORMAT, Store, finish, no_scores, preset_metrics
from calseg.files import read_json
from calseg.report import REPORT, EvaluateConfig
from calseg.runs import RunFolder, check_apart, differences
from calseg.scores import CaseScores

__all__ = ["merge_reports"]


def merge_reports(reports: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the report of all cases of several reports.

    Args:
        reports: folders that ``calseg evaluate`` or this function wrote, with the same classes and settings. No case is
            in two of them.
        out: folder of the report.
        overwrite: True to replace the merged report that ``out`` holds.

    Returns:
        The content of ``report.json``.

    Raises:
        CalsegError: a folder holds no finished report, two do not fit together, or ``out`` is not free.
    """
    folders = [Path(report) for report in reports]
    if not folders:
        raise RunError("reports: got none, wanted the folders of one or more")
    check_apart(Path(out), *folders)
    first = _read_settings(folders[0])
    presets = preset_metrics(first.config.presets, len(first.classes))
    like = no_scores(len(first.classes), first.config, presets)
    merged, places, left_out = Store(Path(out) / STORE), dict[str, Path](), set[str]()
    for folder in folders:
        settings = _read_settings(folder)
        if differing := differences(first.content, settings.content):
            raise RunError(f"{folder}: cannot be merged with {folders[0]}: {differing} there")
        store, without = _read_cases(folder, like)
        for name in store.scores:
            if name in places:
                raise RunError(f"{folder}: holds the case {name!r}, which {places[name]} holds too")
            places[name] = folder
        merged.scores |= store.scores
        merged.notes |= store.notes
        left_out |= without
    merged.scores = dict(sorted(merged.scores.items()))

    target = RunFolder(Path(out), "evaluate merge", FOLDER_FILES, has_resume=False)
    with target.open(first.content, overwrite=overwrite) as run:
        run.write_json(CONFIG, first.content)
        run.claim(STORE)
        merged.write()
        rest = sorted(left_out - merged.scores.keys())
        return finish(run, merged, first.classes, first.config, presets, rest)


@dataclass(frozen=True)
class Settings:
    """The file ``config.json`` of a report, as it stands there and in its parts."""

    content: dict[str, Any]
    classes: tuple[str, ...]
    config: EvaluateConfig


def _read_settings(folder: Path) -> Settings:
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder}: not a report of calseg evaluate; it has no {CONFIG}")
    content = read_json(path)
    names = {"format", "classes", *(item.name for item in fields(EvaluateConfig))}
    if not isinstance(content, dict) or not {"format", "classes"} <= content.keys():
        raise RunError(f"{path}: not that of a report of calseg evaluate")
    if content["format"] != STORE_FORMAT:
        raise RunError(f"{folder}: a report of format {content['format']}, wanted is {STORE_FORMAT}; evaluate it again")
    classes = content["classes"]
    try:
        if content.keys() != names or not all(isinstance(name, str) for name in classes) or len(classes) < 2:
            raise TypeError
        values = {name: content[name] for name in names - {"format", "classes"}}
        config = EvaluateConfig(**values | {"presets": tuple(values["presets"])})
    except (CalsegError, TypeError) as error:
        raise RunError(f"{path}: not that of a report of calseg evaluate") from error
    return Settings(content, tuple(classes), config)


def _read_cases(folder: Path, like: CaseScores) -> tuple[Store, set[str]]:
    """Return the cases of a finished report, and the names of the label maps that had no probability map."""
    unfinished = f"{folder}: an unfinished report; end it first, with --resume"
    if not (folder / REPORT).is_file() or not (folder / STORE).is_file():
        raise RunError(unfinished)
    report, store = read_json(folder / REPORT), Store.read(folder / STORE, like)
    if not isinstance(report, dict) or not isinstance(report.get("left_out"), list):
        raise RunError(f"{folder / REPORT}: not a report of calseg evaluate")
    if report.get("cases") != len(store.scores):
        raise RunError(unfinished)
    return store, set(map(str, report["left_out"]))
