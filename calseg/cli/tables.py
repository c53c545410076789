"""What the commands print: tables on stdout, progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from calseg.regions import NEAR_RADIUS, REGIONS
from calseg.scores import MAIN_STATISTICS, N_BINS, STATISTICS, TRUTH_STATISTICS

ABOUT_REGIONS = f"""\
near: voxels within {NEAR_RADIUS:g} voxels of the label's foreground, where both outcomes occur
foreground: voxels whose label is not 0, as in many papers; the outcome itself chooses this region, so that even the
  true probabilities have a calibration error there"""


@contextmanager
def progress_bars() -> Iterator[Any]:
    """A progress callback that draws one bar on stderr per stage."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    open_task: list[Any] = []

    def progress(stage: str, done: int, total: int, loss: float | None) -> None:
        with suppress(OSError):  # a terminal that was closed is no reason to stop
            bars.start()  # only now, so that an error before the first stage stays a single line
            if not open_task or open_task[0] != stage:
                open_task[:] = [stage, bars.add_task(stage, total=total, loss="")]
            bars.update(open_task[1], completed=done, loss="" if loss is None else f"loss {loss:.4f}")

    try:
        yield progress
    finally:
        if open_task:
            with suppress(OSError):
                bars.stop()


def _print_table(table: Any) -> None:
    """Print a table of rich's on stdout. A name with brackets or colons is text, and no markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def print_estimate(summary: Mapping[str, Any]) -> None:
    """Print how good the first stage's estimates are, before they are blended with the labels."""
    estimate = summary["estimate"]
    print(
        f"{len(summary['cases'])} cases; the estimate alone, before it is blended with the label, mean over the cases:"
    )
    print(f"  Dice {estimate['dice']:.4f}; over the foreground: NLL {estimate['nll']:.4f},")
    print(
        f"  confidence {estimate['confidence']:.4f} against an accuracy of {estimate['accuracy']:.4f};"
        f" temperature {summary['temperature']:.2f}"
    )


def print_metrics(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the scores of training runs in one table with a column per run."""
    from rich.table import Table

    first = next(iter(runs.values()))
    count = len(first["cases"])
    table = Table()
    table.add_column("score")
    table.add_column("over")
    for name in runs:
        table.add_column(name, justify="right")

    def row(score: str, over: str, *path: str, digits: int = 4) -> None:
        values = []
        for metrics in runs.values():
            value: Any = metrics
            for key in path:
                value = value[key]
            values.append("-" if value is None else f"{value:.{digits}f}")
        table.add_row(score, over, *values)

    for name in first["dice"]:
        row(f"Dice {name}", "cases", "dice", name)
    row("Dice mean", "classes", "dice_mean")
    for region in REGIONS:
        table.add_section()
        for name in MAIN_STATISTICS:
            row(STATISTICS[name].title, region, region, name)
    if "raters" in first:
        table.add_section()
        for region in ("near", "all"):
            for name in MAIN_STATISTICS:
                row(STATISTICS[name].title, f"{region}, other raters", "raters", region, name)
        row(TRUTH_STATISTICS["brier"].title, "all, true probability", "truth", "brier")
    table.add_section()
    row("temperature", "near", "temperature", digits=2)
    totals = (metrics["seconds"]["train"] + metrics["seconds"].get("stage1", 0.0) for metrics in runs.values())
    table.add_row("training", "seconds, all stages", *(f"{total:.0f}" for total in totals))
    print(f"{first['dataset']}: {first['iterations']} iterations, {count} validation case{'s' * (count != 1)}")
    _print_table(table)
    print(f"{ABOUT_REGIONS}\nECE: {N_BINS} equal bins of the top probability")


def print_report(report: Mapping[str, Any]) -> None:
    """Print the table of ``calseg evaluate``: each score with its interval over the cases."""
    from rich.table import Table

    def cell(entry: Mapping[str, Any] | None) -> str:
        if entry is None or entry["value"] is None:
            return "-"
        if entry["interval"] is None:
            return f"{float(entry['value']):.4f}"
        lower, upper = map(float, entry["interval"])
        return f"{float(entry['value']):.4f} [{lower:.4f}, {upper:.4f}]"

    table = Table()
    for name in ("score", "over"):
        table.add_column(name)
    for name in ("pooled", "mean over cases"):
        table.add_column(f"{name} [{report['confidence_level']:.0%}]", justify="right")

    def row(score: str, over: str, entry: Mapping[str, Any]) -> None:
        table.add_row(score, over, cell(entry.get("pooled")), cell(entry["mean"]))

    for name, entry in report["dice"].items():
        row("Dice", name, entry)
    row("Dice", "classes 1 and up", report["dice_foreground_mean"])
    for region in REGIONS:
        table.add_section()
        for name, statistic in STATISTICS.items():
            row(statistic.title, f"{region} voxels", report[region][name])
    if report["presets"]:
        table.add_section()
    for name, entry in report["presets"].items():
        row(f"ECE, {name}", "its voxels", entry)
    voxels = report["voxels"]
    count = report["cases"]
    print(
        f"{count} case{'s' * (count != 1)}, {voxels['all']:,} voxels, {voxels['near']:,} of them near the foreground,"
        f" {voxels['foreground']:,} foreground"
    )
    _print_table(table)
    print(f"{ABOUT_REGIONS}\ncalibration errors: {report['config']['n_bins']} equal bins of the probability")
    for number, what in (
        ("nan_voxels", "a NaN probability; they are left out"),
        ("infinite_voxels", "a label of probability 0, whose NLL is infinite"),
    ):
        if report[number]:
            print(f"{report[number]:,} voxels have {what}")
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
