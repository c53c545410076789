"""Tables in Markdown from the results of the experiment. ``benchmarks/tables.py`` puts them into the pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contenders import CONTENDERS, REFERENCE
from scores import TITLES

FRONT = (
    REFERENCE, "dice_cross_entropy_near", "cross_entropy", "ace_hard_dice", "ace_soft_dice", "calseg", "calseg_near",
)  # fmt: skip
"""The contenders of the short table for all data sets."""
FRONT_SCORES = ("dice", "near_ece", "near_nll", "near_brier", "nll", "truth_ece")
DIFFERENCES = ("dice", "near_ece", "near_nll")


def short(value: float, digits: int = 4, *, sign: bool = False) -> str:
    """Format ``value`` without the 0 before the point."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("0.", ".", 1)


def digits_of(score: str) -> int:
    """Return how many digits of a score are shown."""
    return 3 if score == "dice" else 4


def settings_in_words(entry: Mapping[str, Any], keeps_dice: bool = True) -> str:
    """Return the chosen settings of a contender, its fitted temperatures, and whether it lost Dice when it was tuned.

    The title of a contender tells of the Dice loss and of the source of estimates, which are left out here.
    """
    shown = {name: value for name, value in entry.get("settings", {}).items() if name not in OF_TITLES}
    parts = [f"{name} {value:g}" for name, value in shown.items()]
    if entry.get("temperatures"):
        parts.append("fitted temperatures " + ", ".join(f"{value:.2f}" for value in entry["temperatures"]))
    if not keeps_dice:
        parts.append("less Dice on the tuning cases")
    return "; ".join(parts) or "-"


OF_TITLES = ("dice_weight", "dice_labels", "estimator")


def difference(entry: Mapping[str, Any], score: str) -> str:
    """Return the difference of a score from the reference's, with its interval."""
    found = entry["scores"][score].get("minus_reference")
    if found is None:
        return "-"
    mean, low, high = (short(value, digits_of(score), sign=True) for value in (found["mean"], *found["interval"]))
    return f"{mean} ({low} to {high})"


def seconds_in_words(entry: Mapping[str, Any]) -> str:
    """Return the seconds of training: of the first stage plus the second, or of the only one."""
    seconds = entry.get("seconds", {})
    return " + ".join(f"{seconds[stage]:.0f}" for stage in ("first_stage", "second_stage") if stage in seconds) or "-"


def table(content: Mapping[str, Any]) -> str:
    """Return the table of a data set: means over the seeds, and paired differences from the reference."""
    test = content["test"]
    keys = [key for key in TITLES if key in test[REFERENCE]["scores"]]
    against = [f"{TITLES[key]} less {CONTENDERS[REFERENCE].title}'s" for key in DIFFERENCES]
    lines = [
        "| " + " | ".join(["method", "setting", *(TITLES[key] for key in keys), *against, "seconds"]) + " |",
        "|---" * (len(keys) + len(against) + 3) + "|",
    ]
    for name, entry in test.items():
        keeps_dice = content["tuning"].get(name, {}).get("keeps_dice", True)
        cells = [entry["title"], settings_in_words(entry, keeps_dice)]
        cells += [short(entry["scores"][key]["mean"], digits_of(key)) for key in keys]
        cells += [difference(entry, key) for key in DIFFERENCES]
        lines.append("| " + " | ".join([*cells, seconds_in_words(entry)]) + " |")
    return "\n".join(lines)


def front_table(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the short table of all data sets, with the contenders of :data:`FRONT`."""
    lines = [
        "| data set | method | " + " | ".join(TITLES[key] for key in FRONT_SCORES) + " |",
        "|---" * (len(FRONT_SCORES) + 2) + "|",
    ]
    for dataset, content in contents.items():
        label = dataset
        for name in FRONT:
            if name in content["test"]:
                entry = content["test"][name]
                values = (entry["scores"].get(key) for key in FRONT_SCORES)
                cells = [
                    "" if value is None else short(value["mean"], digits_of(key))
                    for key, value in zip(FRONT_SCORES, values, strict=True)
                ]
                lines.append(f"| {label} | {entry['title']} | " + " | ".join(cells) + " |")
                label = ""
    return "\n".join(lines)
