"""The report of the benchmarks: header, table and JSON file."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from io import StringIO
from pathlib import Path
from typing import Any

import gpu_peers
from harness import AT_MOST, compile_problem, on_gpu
from rich import box
from rich.console import Console
from rich.table import Table

import calseg

Row = dict[str, Any]

SHORT = {"float32": "f32", "bfloat16": "bf16", "int64": "i64", "uint8": "u8", "": ""}
INFO = ("isa", "num_threads", "threading_layer", "torch", "calseg", "python", "platform")

LEGEND = """\
dtype: of the logits, and of the labels
ms: median of one step (drop gradients, forward, backward); min; +-: half the distance of the quartiles
GB/s: by the byte model that the file states; BW: as a share of what copy_ moves in the same run
copy, clone: time in units of out.copy_(logits) into existing memory, and of logits.clone() into fresh memory
eager, compile: times faster than plain PyTorch and than torch.compile of it; x f32: than calseg in float32
reads: time in units of a read of the logits, logits.view(-1).max(), which in cache is faster than from memory
x liger, x flash: times faster than Liger-Kernel's and flash-attn's cross-entropy, permutes included
of read: GB/s by the byte model as a share of that read
floors: time in units of the larger of the bytes at the copy's bandwidth and the operations at the GPU's highest clock
x monai, x nnunet: times faster than MONAI's DiceCELoss and nnU-Net's DC_and_CE_loss
us over plain: by how many microseconds a step with a MetaTensor is longer than with a plain tensor, of least times
rms: root mean square error of the estimate; x at equal error: times faster than as many independent samples in eager
PyTorch as have that error
ns: per noise sample and element (samples x N x C x voxels)
memory: peak beyond inputs, result and gradients in percent of the logits; in brackets that of the eager peer
Ratios are medians over paired rounds of one run. Targets follow their figure: ✓ met, ✗ missed."""


def _cpu_model() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_peers() -> dict[str, str]:
    """Return whether each peer for GPUs is available, or why not."""
    return {f"{name}_peer": gpu_peers.problem(name) or "available" for name in gpu_peers.PEERS}


def header(*, quick: bool) -> dict[str, Any]:
    """Return the machine and the versions with which the rows were measured."""
    info = calseg.info()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": usable,
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "compile_peer": "left out by --quick" if quick else (compile_problem() or "available"),
        "quick": quick,
        **({"gpu": info["gpu"]} | _gpu_peers() if on_gpu() else {}),
        **{key: info[key] for key in INFO},
    }


def _verdict(row: Row, metric: str, shown: str) -> str:
    """Return a figure with its target, and a check mark or a cross."""
    target = row["targets"].get(metric)
    if target is None or target["met"] is None:
        return shown
    relation = "≤" if metric in AT_MOST else "≥"
    return f"{shown}{relation}{target['target']:g} {'✓' if target['met'] else '✗'}"


def _figure(row: Row, metric: str, unit: str = "") -> str:
    """Return the cell of a metric."""
    value = row["metrics"].get(metric)
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 5
    return _verdict(row, metric, f"{value:.{digits}f}{unit}")


def _further(row: Row) -> str:
    """Return the cell of the metrics that have no column of their own."""
    figures = {
        "read": _figure(row, "read", " reads"),
        "ns": _figure(row, "ns", " ns"),
        "float32": _figure(row, "float32", "x f32"),
        "liger": _figure(row, "liger", "x liger"),
        "flash": _figure(row, "flash", "x flash"),
        "read_share": _figure(row, "read_share", " of read"),
        "monai": _figure(row, "monai", "x monai"),
        "nnunet": _figure(row, "nnunet", "x nnunet"),
        "microseconds_over_plain": _figure(row, "microseconds_over_plain", " us over plain"),
        "rms": _figure(row, "rms", " rms"),
        "equal_error": _figure(row, "equal_error", "x at equal error"),
        "floor": _figure(row, "floor", " floors"),
    }
    texts = [text for metric, text in figures.items() if metric in row["metrics"]]
    return ", ".join(texts + ["no peers: too large for them"] * row["alone"])


def _memory(row: Row) -> str:
    """Return the cell of the memory."""
    memory = row.get("memory")
    if not memory or memory["calseg"] is None:
        return "-"
    eager = f" ({memory['eager']:.0f})" if "eager" in memory else ""
    return _verdict(row, "memory", f"{memory['calseg']:.1f}") + eager


def _cells(row: Row) -> list[str]:
    """Return all cells of a row."""
    ours = row["seconds"]["calseg"]
    batch, classes, *space = row["shape"]
    size = f"{batch}x{space[0]}^{len(space)}" if space else str(batch)
    share = row["metrics"].get("copy_share")
    return [
        row["operation"], str(classes), size, f"{SHORT[row['dtype']]} {SHORT[row['labels']]}",
        f"{1e3 * ours['median']:.4g}", f"{1e3 * ours['min']:.4g}",
        f"{50 * (ours['q3'] - ours['q1']) / ours['median']:.0f}%", f"{row['gb_per_s']:.1f}",
        "-" if share is None else _verdict(row, "copy_share", f"{100 * share:.0f}%"),
        _figure(row, "copy"), _figure(row, "clone"), _figure(row, "eager"), _figure(row, "compile"),
        _further(row), _memory(row),
    ]  # fmt: skip


COLUMNS = ("operation", "C", "NxS", "dtype", "ms", "min", "+-", "GB/s", "BW", "copy", "clone", "eager",
           "compile", "also", "memory")  # fmt: skip
TEXT_COLUMNS = ("operation", "dtype", "also")


def render(head: dict[str, Any], rows: list[Row]) -> str:
    """Return header, table and legend as plain text."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, row["operation"]):
            table.add_section()
        previous = row["operation"]
        table.add_row(*_cells(row))
    text = StringIO()
    console = Console(file=text, width=1000, color_system=None, highlight=False, markup=False)
    lines = [f"{key}: {value}" for key, value in head.items()]
    console.print("; ".join(lines[:5]), "; ".join(lines[5:]), sep="\n")
    if head["quick"]:
        console.print("--quick: tiny sizes, three rounds; the figures mean nothing")
    console.print(table)
    console.print(LEGEND)
    verdicts = [target["met"] for row in rows for target in row["targets"].values()]
    met, missed, unknown = (verdicts.count(outcome) for outcome in (True, False, None))
    console.print(f"targets: {met} met, {missed} missed, {unknown} not measured")
    return text.getvalue()


def write_json(path: Path, head: dict[str, Any], rows: list[Row]) -> None:
    """Write the content of the table, and the times from which it was computed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": head, "rows": rows}, indent=1) + "\n")
