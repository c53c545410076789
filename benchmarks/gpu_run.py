"""Everything that only a GPU can show, in ten minutes at most: ``python benchmarks/gpu_run.py --out FOLDER``.

The steps run one after the other, those of most worth first, and each has a limit of its own. So one that hangs does
not cost the others their time. A step that passes its limit is interrupted, upon which pytest still reports what it
has. After each step, these files in FOLDER are complete for all steps so far:

- ``run.json``: command, exit status, seconds and limit of every step, and why one was left out
- ``STEP.log``: what the step printed
- ``bench_OPERATION.json``: the figures of a benchmark, as ``pytest benchmarks/ --results`` writes them
- ``predictions.md``: each prediction of notes.md beside its measurement

With ``--device cpu`` the benchmarks run with tiny sizes and the tests of a GPU skip themselves: does it all still run?
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
NOTES, TESTS = HERE / "notes.md", HERE.parent / "tests"
SECONDS = 590.0  # of the whole run
GRACE_SECONDS = 10.0  # from the interruption of a step to its end by force

# The tests that come first: numbers, calls of few programs, graphs, streams, mixed precision.
FIRST_TESTS = (
    "(test_values_and_gradients and float32 and ([2- or [14- or [117-)) or few_programs or graph or stream or autocast "
    "or gradient_scaler or (test_calibration_bins and not past)"
)
BENCHMARKS = {  # name -> limit in seconds
    "cross_entropy": 80.0, "vls_cross_entropy": 60.0, "calibration": 40.0, "dice_cross_entropy": 60.0, "vls_elbo": 40.0,
    "soft_labels": 40.0, "gaussian_kl": 40.0,
}  # fmt: skip
SANITIZERS = ("memcheck", "racecheck")
SANITIZED = 4  # runs of tests/backends/every_kernel.py


class Step(NamedTuple):
    """A step: its name, its command, its limit in seconds, and a program that must be there."""

    name: str
    command: list[str]
    seconds: float
    needs: str = ""


def steps(out: Path, device: str) -> list[Step]:
    """Return all steps, those of most worth first."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    gpu_tests = [*pytest, "-m", "gpu", str(TESTS / "backends" / "test_gpu.py")]
    quick, patience = (["--quick"], 10.0) if device == "cpu" else ([], 1.0)  # a test's machine may be slow
    info = "import calseg, json; print(json.dumps(calseg.info(), indent=1, default=str))"
    return [
        Step("machine", [sys.executable, "-c", info], patience * 30.0),
        Step("first_tests", [*gpu_tests, "-k", FIRST_TESTS], 110.0),
        *(
            Step(f"bench_{name}", [
                *pytest, str(HERE / f"bench_{name}.py"), f"--device={device}",
                f"--results={out / f'bench_{name}.json'}", *quick,
            ], patience * seconds)
            for name, seconds in BENCHMARKS.items()
        ),
        *(
            Step(tool, [
                "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no",
                "--target-processes", "application-only", sys.executable, str(TESTS / "backends" / "every_kernel.py"),
                str(SANITIZED),
            ], 60.0, "compute-sanitizer")
            for tool in SANITIZERS
        ),
        Step("all_tests", [*gpu_tests, "--deselect", f"{TESTS}/backends/test_gpu.py::test_compute_sanitizer"], SECONDS),
    ]  # fmt: skip


def run_step(step: Step, out: Path, seconds: float) -> dict[str, Any]:
    """Run a step for at most ``seconds``, and return its entry of ``run.json``."""
    entry: dict[str, Any] = {"name": step.name, "command": step.command, "limit": seconds}
    if step.needs and shutil.which(step.needs) is None:
        return {**entry, "left_out": f"{step.needs} is not on PATH"}
    path = os.pathsep.join(filter(None, [str(HERE.parent), str(TESTS), os.environ.get("PYTHONPATH")]))
    # For the sanitizer, every tensor is an allocation of its own, so that a step past its end is seen.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.name in SANITIZERS else {}
    start, timed_out = time.monotonic(), False
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            step.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            cwd=HERE.parent, env={**os.environ, "PYTHONPATH": path, **alone},
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:  # also the processes that it started and left
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {**entry, "rc": process.returncode, "seconds": time.monotonic() - start, "timed_out": timed_out}


# ---- predictions ----


class Prediction(NamedTuple):
    """A prediction of notes.md. ``copies`` is None for a time, else the least traffic in copies of the logits."""

    what: str
    text: str
    operation: str
    classes: int
    dtype: str
    copies: float | None
    edge: int | None = None  # of the volume; None for the largest one that was measured


# The first cell of a row of the table of shares -> operation and dtype of the benchmark, copies of the logits.
KINDS = {
    "cross-entropy": ("cross_entropy", "float32", 1.0),
    "cross-entropy, bfloat16": ("cross_entropy", "bfloat16", 1.0),
    "Dice + cross-entropy": ("dice_cross_entropy", "float32", 1.5),
    "VLS, m = 4": ("vls_cross_entropy", "float32", 3.0),
}


def _rows(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the header and the cells of each row of the tables of a Markdown text."""
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif not set(line) <= set("|-: "):
            yield header, cells


def predictions(notes: str) -> list[Prediction]:
    """Return the predictions of notes.md that a benchmark measures: shares of a copy, and times of the bins."""
    found, kind = [], ""
    for header, cells in _rows(notes):
        if header[-1].startswith("predicted, H100 / H200"):
            kind = cells[0] or kind
            if kind in KINDS:
                operation, dtype, copies = KINDS[kind]
                what = f"{kind}, C = {cells[1]}: share of {copies:g} copies"
                found.append(Prediction(what, cells[-1], operation, int(cells[1]), dtype, copies))
        elif header[0] == "call" and header[-1] == "predicted":
            call = re.match(r"C = (\d+), (\d+)\^3, top label", cells[0])
            if call:
                classes, edge = map(int, call.groups())
                what = f"calibration bins, {cells[0]}: time"
                found.append(Prediction(what, cells[-1], "calibration_bins", classes, "float32", None, edge))
    return found


def measured(prediction: Prediction, rows: list[dict[str, Any]]) -> str:
    """Return the measurement that a prediction is about, or a dash if there is none."""
    fitting = [
        row for row in rows
        if (row["operation"], row["shape"][1], row["dtype"]) == (prediction.operation, prediction.classes,
                                                                 prediction.dtype)
        and prediction.edge in (None, row["shape"][-1])
    ]  # fmt: skip
    if not fitting:
        return "-"
    row = max(fitting, key=lambda row: row["shape"][-1])
    size = f"{row['shape'][0]} x {row['shape'][-1]}^{len(row['shape']) - 2}"
    if prediction.copies is None:
        return f"{1e6 * row['seconds']['calseg']['median']:.0f} us ({size})"
    return f"{prediction.copies / row['metrics']['copy']:.0%} ({size})"


def write_predictions(out: Path) -> None:
    """Write the table of predictions and of what the benchmarks have measured so far."""
    rows, gpu = [], None
    for file in sorted(out.glob("bench_*.json")):
        result = json.loads(file.read_text())
        rows += result["rows"]
        gpu = result["header"].get("gpu", gpu)
    lines = [f"| prediction | predicted, H100 / H200 | measured, {gpu or 'no GPU'} |", "|---|---|---|"]
    lines += [f"| {p.what} | {p.text} | {measured(p, rows)} |" for p in predictions(NOTES.read_text())]
    (out / "predictions.md").write_text("\n".join(lines) + "\n")


# ---- the run ----


def main() -> None:
    """Run all steps, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files are written")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the benchmarks run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of the whole run")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="names of steps; default: all")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    known = {step.name: step for step in steps(out, options.device)}
    if unknown := set(options.steps or ()) - set(known):
        parser.error(f"--steps: got {', '.join(sorted(unknown))}, wanted some of {', '.join(known)}")
    end, entries = time.monotonic() + options.seconds, []
    for name in options.steps or known:
        left = end - time.monotonic() - GRACE_SECONDS
        if left > 0:
            entry = run_step(known[name], out, min(left, known[name].seconds))
        else:
            entry = {"name": name, "command": known[name].command, "left_out": "the time was over"}
        entries.append(entry)
        (out / "run.json").write_text(json.dumps(entries, indent=1) + "\n")
        write_predictions(out)
        outcome = entry.get("left_out") or f"rc {entry['rc']}" + " at its limit" * entry["timed_out"]
        print(f"{name:24}{entry.get('seconds', 0.0):7.1f} s  {outcome}", flush=True)


if __name__ == "__main__":
    main()
