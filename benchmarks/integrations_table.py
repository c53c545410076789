"""Table of what was run inside other packages, made from pytest's record of ``tests/integrations``.

In an environment with these packages, such as ``integrations`` of .ci/run makes,

    python -m pytest -m "nnunet or not nnunet" --junitxml RECORD tests/integrations
    python benchmarks/integrations_table.py RECORD

writes benchmarks/results/integrations.json and prints it as a table. ``--check RECORD`` writes nothing. It fails where
a package of that file was not run, where a test failed, and where a row is missing. Tests that ran in parts have
several records.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import tables

RESULTS = tables.RESULTS / "integrations.json"
OUTCOMES = {"skipped": "skipped", "failure": "failed", "error": "failed"}
"""What an element in the record says of its test. A test without such an element has passed."""


class Package(NamedTuple):
    """A package, what is run inside it, and parts of the names of the tests that do so, each of which has to run."""

    distribution: str
    what: str
    tests: tuple[str, ...]


PACKAGES = {
    "nnU-Net": Package(
        "nnunetv2",
        "The losses beside its own, in two processes too. The trainers: training, continuing, prediction without"
        " calseg, cascades, the ignore label. Soft labels through its preprocessing, patches and augmentation. All"
        " commands of the [page](../nnunet.md).",
        ("test_nnunet_loss.", "test_nnunet_trainers.", "test_nnunet_stage_one.", "test_nnunet_soft_labels.",
         "test_nnunet_alignment.", "test_nnunet_page."),
    ),
    "MONAI": Package(
        "monai",
        "The loss beside `DiceCELoss` and in `DeepSupervisionLoss`. Soft labels in dictionary transforms and"
        " `CacheDataset`. Its trainer and evaluator. `examples/monai_decathlon.py`, and the code of the"
        " [page](../monai.md).",
        ("test_monai_loss.", "test_monai_data.", "test_monai_engine.", "test_the_code_of_a_page_runs[monai]"),
    ),
    "ignite": Package(
        "pytorch-ignite",
        "`CalibrationHandler` in engines, alone and in two processes.",
        ("test_monai_engine.test_values", "test_monai_engine.test_two_processes"),
    ),
    "Lightning": Package(
        "lightning",
        "`examples/lightning_module.py` in one process and in two, which log the same values. Diagrams in its loggers."
        " The code of the [page](../lightning.md).",
        ("test_lightning.", "test_the_code_of_a_page_runs[lightning]"),
    ),
    "torchmetrics": Package(
        "torchmetrics",
        "Metrics of both packages in one `MetricCollection`, in Lightning and in ignite.",
        ("test_lightning.test_two_processes", "test_monai_engine.test_a_collection"),
    ),
    "TensorBoard": Package(
        "tensorboard",
        "The diagrams, read from its event files.",
        ("test_lightning.test_diagrams_in_tensorboard", "test_lightning.test_one_picture"),
    ),
}  # fmt: skip


def outcomes(record: Path) -> list[tuple[str, str]]:
    """Return the name of each test in pytest's record, and whether it passed, was skipped or failed."""
    tests = []
    for case in ElementTree.parse(record).iter("testcase"):
        said = [OUTCOMES[element.tag] for element in case if element.tag in OUTCOMES]
        tests.append((f"{case.get('classname')}.{case.get('name')}", said[0] if said else "passed"))
    return tests


def run(tests: list[tuple[str, str]]) -> tuple[dict[str, Any], list[str]]:
    """Return the content of the file for these tests, and a sentence for each package that was not run."""
    packages: dict[str, Any] = {}
    faults: list[str] = []
    for title, package in PACKAGES.items():
        try:
            version = metadata.version(package.distribution)
        except metadata.PackageNotFoundError:
            faults.append(f"{title}: not installed; pip install {package.distribution}")
            continue
        faults += [
            f"{title} {version}: not run, as no test of {part} has passed"
            for part in package.tests
            if not any(part in name and outcome == "passed" for name, outcome in tests)
        ]
        counts = Counter(outcome for name, outcome in tests if any(part in name for part in package.tests))
        packages[title] = {
            "version": version, "what": package.what, **{each: counts[each] for each in ("passed", "skipped", "failed")}
        }  # fmt: skip
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "packages": packages,
    }
    return content, faults


def faults_of_check(tests: list[tuple[str, str]], stored: dict[str, Any]) -> list[str]:
    """Return a sentence for each test that failed, and for each row that is missing or too much in what is stored."""
    again = f"write {RESULTS.name} anew"
    return [
        *(f"{name}: failed" for name, outcome in tests if outcome == "failed"),
        *(f"{title}: has no row in the table; {again}" for title in PACKAGES if title not in stored["packages"]),
        *(
            f"{title}: has a row in the table, but no tests; {again}"
            for title in stored["packages"]
            if title not in PACKAGES
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD", help="file that pytest --junitxml wrote")
    parser.add_argument("--check", action="store_true", help="write nothing, and compare with what is written")
    arguments = parser.parse_args()
    for record in arguments.records:
        if not record.is_file():
            parser.error(f"{record}: no such file; pytest writes it with --junitxml {record}")
    tests = [test for record in arguments.records for test in outcomes(record)]
    content, faults = run(tests)
    if arguments.check:
        faults += faults_of_check(tests, json.loads(RESULTS.read_text()))
    if faults:
        sys.exit("\n".join(faults))
    if not arguments.check:
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        print(tables.integrations())


if __name__ == "__main__":
    main()
