"""Tables of the README and of the documentation, made from the JSON files in benchmarks/results and from the package.

A page marks the place of a table by two comments. What stands between them is replaced:

    <!-- table: NAME -->
    <!-- end -->

The documentation is filled when it is built (docs/site/hooks.py). ``python benchmarks/tables.py README.md`` fills a
file in place. A test compares the README with the results.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TIMES = "cpu-epyc-2-cores.json"
DATASETS = ("hippocampus-20", "hippocampus-60", "synthetic", "multirater")
"""The data sets of the calibration experiment whose results lie in benchmarks/results."""
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
OPERATIONS = {
    "cross_entropy": "cross-entropy",
    "dice_cross_entropy": "Dice + cross-entropy",
    "soft_dice_cross_entropy": "Dice + cross-entropy",
    "vls_cross_entropy": "VLS cross-entropy",
    "vls_elbo": "VLS, stage 1",
    "soft_labels": "sampling of soft labels",
    "soft_labels_backward": "the same with gradients",
    "gaussian_kl": "KL divergence",
    "calibration_bins": "calibration bins",
    "ace_loss_hard": "ACE loss, hard bins",
    "ace_loss_soft": "ACE loss, soft bins",
    "small": "cross-entropy",
    "pairs_2": "2",
    "pairs_4": "4",
    "pairs_8": "8",
}

TITLES = {"monai": "MONAI"}

Row = dict[str, Any]


@cache
def load(name: str) -> dict[str, Any]:
    """Return the content of a file of results."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, whose numbers stand to the right."""
    rows = [list(row) for row in rows]
    if not rows:
        raise ValueError(f"no rows for the columns {', '.join(header)}")
    numeric = [all(re.fullmatch(r"[-+.\d ()%]*", row[column]) for row in rows) for column in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


# ---- times ----


def _shape(row: Row) -> str:
    """Return the size of the logits without the classes: the batch and the sides of the volume."""
    batch, _, *space = row["shape"]
    if not space:
        return f"{batch} rows"
    volume = f"{space[0]}{'²³'[len(space) - 2]}"
    return volume if batch == 1 else f"{batch} x {volume}"


def _ratio(row: Row, name: str) -> str:
    value = row["metrics"].get(name)
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _milliseconds(row: Row) -> str:
    value = 1e3 * row["seconds"]["calseg"]["median"]
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _memory(row: Row, name: str) -> str:
    value = (row.get("memory") or {}).get(name)
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "operation": lambda row: OPERATIONS[row["operation"]],
    "samples": lambda row: OPERATIONS[row["operation"]],
    "classes": lambda row: str(row["shape"][1]),
    "volume": _shape,
    "logits": lambda row: str(row["dtype"]),
    "labels": lambda row: str(row["labels"]),
    "ms": _milliseconds,
    "copies": partial(_ratio, name="copy"),
    "faster than plain PyTorch": partial(_ratio, name="eager"),
    "than `torch.compile`": partial(_ratio, name="compile"),
    "than MONAI": partial(_ratio, name="monai"),
    "than nnU-Net": partial(_ratio, name="nnunet"),
    "than float32": partial(_ratio, name="float32"),
    "faster at equal error": partial(_ratio, name="equal_error"),
    "ns a sample and logit": lambda row: f"{row['metrics']['ns']:.2f}",
    "memory, % of the logits": partial(_memory, name="calseg"),
    "plain PyTorch's": partial(_memory, name="eager"),
}


def _times(columns: Sequence[str], operations: Sequence[str], **wanted: str) -> str:
    """Return a table of the rows of some operations that have the wanted entries."""
    rows = [
        row
        for row in load(TIMES)["rows"]
        if row["operation"] in operations and all(row[name] == value for name, value in wanted.items())
    ]
    rows.sort(key=lambda row: operations.index(row["operation"]))
    cells = [[COLUMNS[column](row) for column in columns] for row in rows]
    used = [
        number
        for number, column in enumerate(columns)
        if any(row[number] for row in cells) and (column != "operation" or len(operations) > 1)
    ]
    return markdown([columns[number] for number in used], [[row[number] for number in used] for row in cells])


TIMED = ("operation", "classes", "volume", "ms", "copies", "faster than plain PyTorch", "than `torch.compile`",
         "than MONAI", "than nnU-Net", "memory, % of the logits", "plain PyTorch's")  # fmt: skip
SHORT = (*TIMED[:4], "faster than plain PyTorch", *TIMED[-2:])
FRONT = (("cross_entropy", 4), ("dice_cross_entropy", 3), ("vls_cross_entropy", 4), ("calibration_bins", 14))


def front() -> str:
    """Return one case of each kind of operation."""
    rows = []
    for operation, classes in FRONT:
        found = [
            row
            for row in load(TIMES)["rows"]
            if (row["operation"], row["shape"][1], row["dtype"]) == (operation, classes, "float32")
        ]
        rows.append([COLUMNS[column](found[0]) for column in SHORT])
    rows[-1][0] = "ECE of a volume"
    return markdown(SHORT, rows)


def machine() -> str:
    """Return on what the times were measured, as a sentence."""
    head = load(TIMES)["header"]
    return (
        f"Measured on {head['cores']} cores of an {head['cpu']} ({head['isa'].upper()}), with PyTorch {head['torch']},"
        f" Python {head['python']} and calseg {head['calseg']}, on {head['date'][:10]}."
    )


# ---- calibration ----


def _experiment() -> Any:
    """Return the module that makes tables of the calibration experiment, which has a folder of its own."""
    folder = str(Path(__file__).parent / "calibration")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("markdown_tables")


def evidence(dataset: str) -> str:
    """Return the scores of all methods on one data set of the calibration experiment."""
    made: str = _experiment().table(load(f"calibration-{dataset}.json"))
    return made


def evidence_front() -> str:
    """Return the scores of a few methods on all data sets of the calibration experiment."""
    made: str = _experiment().front_table({dataset: load(f"calibration-{dataset}.json") for dataset in DATASETS})
    return made


# ---- pairs of trainings in nnU-Net ----


def nnunet_pairs() -> str:
    """Return the scores of networks that nnU-Net has trained on labels and on soft labels, and how it did."""
    content = load("nnunet_pairs.json")
    rows = []
    for start, group in content["starts"].items():
        for targets in content["targets"]:
            scores = [pair[targets] for pair in group["pairs"]]
            means = [_figure(name, sum(each[name] for each in scores) / len(scores)) for name in content["scores"]]
            rows.append([start, str(group["updates"]), targets, *means])
    plan, soft, versions = content["plan"], content["soft_labels"], content["versions"]
    return (
        f"{markdown(['start', 'updates', 'trained on', *content['scores'].values()], rows)}\n\n"
        f"Means over {content['seeds']} seeds. {content['dataset']}: {plan['training']} cases to train"
        f" on, {plan['test']} others to score. The 2d network has {plan['features']} to {plan['most_features']}"
        f" features, and is trained by AdamW with {plan['batch_size']} patches in an update. Share of the estimate in"
        f" the soft labels: {soft['alpha']:g}; its temperature: {soft['temperature']:.2f}. Run on"
        f" {content['date'][:10]} with nnU-Net {versions['nnunetv2']}, PyTorch {versions['torch']} and calseg"
        f" {versions['calseg']}, on a CPU."
    )


def nnunet_differences() -> str:
    """Return the differences within the pairs of networks, their spread, and in how many pairs they are gains."""
    content = load("nnunet_pairs.json")
    rows = []
    for start, group in content["starts"].items():
        for difference in group["differences"]:
            cells = [
                f"{_figure(name, difference[name]['mean'], sign=True)} ± {_figure(name, difference[name]['sd'])},"
                f" {difference[name]['better']} of {len(group['pairs'])}"
                for name in content["scores"]
            ]
            rows.append([start, f"{difference['of']} against {difference['from']}", *cells])
    return markdown(["start", "difference", *content["scores"].values()], rows)


def _figure(score: str, value: float, *, sign: bool = False) -> str:
    """Return a score as the tables of the calibration experiment show it."""
    experiment = _experiment()
    made: str = experiment.short(value, experiment.digits_of(score), sign=sign)
    return made


# ---- counts, regions, and what was run ----


def counts() -> str:
    """Return what several packages make of a calibration error that is known."""
    content = load("ecosystem.json")
    names = [f"{TITLES.get(name, name)} {version}" for name, version in content["packages"].items()]
    rows = [
        [f"{row['voxels'] / 1e6:.1f} million", *(f"{row[key]:.4f}" for key in ("truth", *content["packages"]))]
        for row in content["rows"]
    ]
    return markdown(["voxels", "true error", *names], rows)


def regions() -> str:
    """Return the calibration error of the true probabilities in each region."""
    content = load("regions.json")
    rows = [[title, f"{error['rater']:.4f}", f"{error['drawn']:.4f}"] for title, error in content["regions"].items()]
    return markdown(["voxels that count", "labels of one rater", "labels drawn voxel by voxel"], rows)


def integrations() -> str:
    """Return what was run inside other packages, and where."""
    content = load("integrations.json")
    rows = []
    for title, row in content["packages"].items():
        result = ", ".join(f"{row[name]} {name}" for name in ("passed", "skipped", "failed") if row[name])
        rows.append([title, row["version"], row["what"], result])
    return (
        f"{markdown(['package', 'version', 'what was run', 'tests'], rows)}\n\n"
        f"Run on {content['date'][:10]} with Python {content['python']} and PyTorch {content['torch']}, on a CPU."
    )


def methods() -> str:
    """Return the methods of ``calseg train``."""
    from calseg.methods import METHODS

    return markdown(["method", "what it is"], [[f"`{name}`", method.title] for name, method in METHODS.items()])


TABLES: dict[str, Callable[[], str]] = {
    "front": front,
    "machine": machine,
    "cross-entropy": partial(_times, TIMED, ["cross_entropy"], dtype="float32", labels="int64"),
    "cross-entropy-uint8": partial(_times, TIMED, ["cross_entropy"], dtype="float32", labels="uint8"),
    "bfloat16": partial(_times, (*TIMED[:6], "than float32"), ["cross_entropy"], dtype="bfloat16"),
    "dice": partial(_times, (*TIMED[:3], "labels", *TIMED[3:]), ["dice_cross_entropy"]),
    "dice-soft": partial(_times, TIMED, ["soft_dice_cross_entropy"]),
    "vls": partial(_times, TIMED, ["vls_cross_entropy", "vls_elbo", "soft_labels", "soft_labels_backward",
                                    "gaussian_kl"]),
    "pairs": partial(
        _times, ("samples", "classes", "volume", "ms", "ns a sample and logit", "faster than plain PyTorch",
                 "faster at equal error"), ["pairs_2", "pairs_4", "pairs_8"]
    ),
    "calibration": partial(_times, TIMED, ["calibration_bins", "ace_loss_hard", "ace_loss_soft"], dtype="float32"),
    "small": partial(_times, TIMED[:6], ["small"]),
    "counts": counts,
    "integrations": integrations,
    "methods": methods,
    "nnunet-differences": nnunet_differences,
    "nnunet-pairs": nnunet_pairs,
    "regions": regions,
    "evidence": evidence_front,
    **{f"evidence-{dataset}": partial(evidence, dataset) for dataset in DATASETS},
}  # fmt: skip


def fill(text: str) -> str:
    """Return the text with all of its tables made anew."""

    def made(place: re.Match[str]) -> str:
        if place[2] not in TABLES:
            raise KeyError(f"table: got {place[2]!r}, wanted one of {', '.join(TABLES)}")
        return f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}"

    return PLACE.sub(made, text)


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
