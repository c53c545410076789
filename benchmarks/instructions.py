"""Instructions of the GPU kernels, counted in their machine code: ``python benchmarks/instructions.py [NAME ...]``.

No GPU is needed. Triton compiles every configuration ahead of time for sm_90, nvcc the kernels in CUDA C++, and the
instructions are counted along the path that a program takes: loops as often as they run, subroutines for rare values
not at all. In the kernels in CUDA C++, that path has labels of one byte, a full tile and no ignored voxel, and lines
for other calls are not counted. The counts are facts, and `tests/backends/test_instructions.py` bounds them. **The
times that follow from them are predictions**, from a model with the constants below: nothing here was measured on a
GPU.

A program waits for memory once per phase, and its multiprocessor issues the instructions of all programs that it holds.
So programs pass at the rate ``held / (phases * LATENCY + held * issue)``, and the memory bounds the rate too. A phase
is the first use of loaded data after other loads, as if no data were in a cache, so the prediction is low where a
kernel loads a few numbers that all programs share. A number at an address that is an argument of the kernel is in the
first-level cache, and does not count. The share of a copy is the time in which the GPU copies the logits
``copies`` times, divided by the time of the kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
NVCC = shutil.which("nvcc")

MULTIPROCESSORS, CLOCK = 132, 1.755e9  # of an H100 and an H200; in Hz
COPY = {"H100": 3.0e12, "H200": 4.3e12}  # bytes read and written in a second
LATENCY = 1.0e-6  # seconds from a load to its data while the memory is busy
PIPES = ("alu", "fma", "xu", "lsu")
LABELS_TOGETHER = 1.25  # classes of the labels of 128 adjacent voxels
REGISTERS, MOST_WARPS, MOST_PROGRAMS = 65536, 64, 32  # of a multiprocessor


class Case(NamedTuple):
    """A configuration: a call of tests/backends/ahead_of_time.py, and how often its loops run.

    ``copies`` is the least memory traffic in copies of the logits. ``trips`` are the runs of loops by nesting depth.
    With ``cuda``, the main kernel is one in CUDA C++.
    """

    call: dict[str, Any]
    copies: float = 1.0
    trips: tuple[int, ...] = ()
    cuda: bool = False


def _cases() -> dict[str, Case]:
    cases = {}
    classes = (2, 4, 14, 33, 117)
    for dtype in ("float32", "bfloat16"):
        for C in classes:
            call = {"operation": "cross_entropy", "C": C, "dtype": dtype}
            cases[f"cross_entropy C={C} {dtype}"] = Case(call)
            if C <= 4 and NVCC is not None:
                cases[f"cross_entropy C={C} {dtype}, CUDA C++"] = Case(call, cuda=True)
    for dtype in ("float32", "bfloat16"):
        for C in (2, 4, 14, 32, 33, 117):
            call = {"operation": "cross_entropy", "C": C, "dtype": dtype, "layout": "channels_last"}
            cases[f"cross_entropy C={C} {dtype} channels-last"] = Case(call)
            if NVCC is not None:
                cases[f"cross_entropy C={C} {dtype} channels-last, CUDA C++"] = Case(call, cuda=True)
    for C in classes:
        cases[f"dice C={C}"] = Case({"operation": "hard_overlap", "C": C}, 1.5)
    for C in (2, 3, 4):
        for dtype, layout in product(("float32", "bfloat16"), ("channel_first", "channels_last")):
            name = f"dice C={C} {dtype}{' channels-last' if layout == 'channels_last' else ''}"
            call = {"operation": "hard_overlap", "C": C, "dtype": dtype, "layout": layout}
            if C != 3 and (dtype, layout) != ("float32", "channel_first"):
                cases[name] = Case(call, 1.5)
            if NVCC is not None:
                cases[name + ", CUDA C++"] = Case(call, 1.5, cuda=True)
    for C in (5, 8, 14, 33, 117):
        call = {"operation": "hard_overlap", "C": C, "dtype": "bfloat16"}
        cases[f"dice C={C} bfloat16"] = Case(call, 1.5)
        if NVCC is not None:
            cases[f"dice C={C} bfloat16, CUDA C++"] = Case(call, 1.5, cuda=True)
    for C in classes:  # of 4 samples, two pairs; of up to 2 classes, all pairs at once
        trips = (1, 2) if C == 2 else (2, 2)
        cases[f"vls C={C}"] = Case({"operation": "vls_cross_entropy", "C": C}, 3.0, trips)
    for C in (2, 4, 14, 117):
        cases[f"bins C={C}"] = Case({"operation": "top_label_bins", "C": C}, 0.5)
    return cases


CASES = _cases()


# ---- machine code ----


class Instruction(NamedTuple):
    """A line of the disassembly."""

    name: str
    arguments: str
    always: bool  # without a predicate
    unusual: bool = False  # from a line of the source that only other calls come to


UNUSUAL = (
    "<const uint16_t*>", "<const uint32_t*>", "<const uint64_t*>", "to[rest] = from[rest]", "read<2>", "read<4>",
    "read<8>", "set_any(", "replace(", "_unusual(",
)  # fmt: skip


@cache
def lines_of(path: str) -> list[str]:
    """Return the lines of a file of the source."""
    return Path(path).read_text(encoding="utf-8").splitlines()


@cache
def assembly(cubin: bytes) -> str:
    """Return the disassembly of machine code, with the lines of the source if it names them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-gi", "-c", file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes, kernel: str = "") -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of the kernel in whose name ``kernel`` is found, and where its labels are."""
    text = assembly(cubin)
    code: list[Instruction] = []
    labels = {}
    (text,) = (part for part in text.split(".section\t.text.")[1:] if re.search(kernel, part.split(",")[0]))
    unusual, is_new = False, True
    for line in text.splitlines():
        if found := re.match(r'\s*//## File "(.+?)", line (\d+)', line):
            if kernel:  # several are those of a function and of its callers
                source = lines_of(found[1])[int(found[2]) - 1]
                unusual, is_new = any(part in source for part in UNUSUAL) or (unusual and not is_new), False
        elif found := re.match(r"\s*(\.L_\S+):\s*$", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);", line):
            code.append(Instruction(found[2], found[3], found[1] is None, unusual))
            is_new = True
    return code, labels


def runs(
    code: list[Instruction], labels: dict[str, int], trips: tuple[float, ...], in_order: bool = False
) -> list[float]:  # fmt: skip
    """Return how often each instruction runs. Code that only a call reaches does not.

    Neither does what follows an addition to the counter of programs that are done, for only the last program does it.
    With ``in_order``, there is a number for each loop, and none is in another one.
    """
    targets = {}
    counter = next((place for place, each in enumerate(code) if each.name.startswith(COUNTER)), len(code))
    for place, each in enumerate(code):
        is_branch = each.name.startswith("BRA") and each.name != "BRA.DIV"  # which is for lanes that have diverged
        found = re.search(r"\.L_\w+", each.arguments) if is_branch else None
        if found and found[0] in labels:
            targets[place] = labels[found[0]]
    counts: list[float] = [0] * len(code)
    pending = [0]
    while pending:
        place = pending.pop()
        while place < len(code) and not counts[place]:
            counts[place] = 1
            target, each = targets.get(place), code[place]
            if target is not None and target != place:
                pending.append(target)
            if place > counter and each.name == "EXIT":
                break
            if each.always and (target is not None or each.name.split(".")[0] in ("EXIT", "RET")):
                break
            place += 1
    usual = {place for place, each in enumerate(code) if counts[place] and not each.unusual}
    loops = sorted((target, place) for place, target in targets.items() if target < place and place in usual)
    if in_order and len(loops) != len(trips):
        raise RuntimeError(f"got {len(loops)} loops, wanted {len(trips)}")
    for number, (first, last) in enumerate(loops):
        depth = number if in_order else sum(f <= first and last <= t for f, t in loops) - 1
        factor = trips[depth] if depth < len(trips) else 1
        counts[first : last + 1] = [count * factor for count in counts[first : last + 1]]
    return [0 if each.unusual else count for each, count in zip(code, counts, strict=True)]


def pipe(name: str) -> tuple[str, int]:
    """Return the pipe of an instruction, and the cycles for which a warp occupies it (Hopper)."""
    base = name.split(".")[0]
    if base == "MUFU" or base in ("F2I", "I2F", "F2F"):
        return "xu", 8
    if base in ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"):
        return "fma", 1
    if base in ("IMAD", "IMUL"):
        return "fma", 4 if "WIDE" in name or "HI" in name else 2
    if re.match(r"(LD|ST|ATOM|RED|SHFL)", base):
        return "lsu", 2
    if re.match(r"(BRA|EXIT|BSSY|BSYNC|BAR|S2R|CS2R|S2UR|R2UR|CALL|RET|DEPBAR|BMOV|VOTE|WARPSYNC|U[A-Z])", base):
        return "control", 1
    return "alu", 2


COUNTER = "ATOMG.E.ADD.STRONG.GPU"
COPIES = "copies"  # stands for the registers of copies to shared memory
WIDTH = {".128": 16, ".64": 8, ".U8": 1, ".S8": 1, ".U16": 2}


def flight(code: list[Instruction], counts: list[float]) -> tuple[float, int]:
    """Return the most bytes of a thread's loads that are on their way at once, and how often it waits for loads.

    The code is read from top to bottom. A load is on its way until its register is used, and a copy to shared memory
    until the thread waits for it.
    """
    waiting: list[tuple[float, set[str]]] = []
    given: set[str] = set()  # registers that hold an argument
    most = phases = 0
    fresh = False
    for (name, arguments, *_), count in zip(code, counts, strict=True):
        if not count:
            continue
        if name.startswith("LDGSTS"):
            waiting.append((16 * count, {COPIES}))
            most, fresh = max(most, sum(size for size, _ in waiting)), True
            continue
        written = re.match(r"R\d+", arguments)
        if name.startswith("LDG.") and re.search(r"\[(R\d+)\.64", arguments)[1] in given:
            continue
        if written:
            (given.add if name == "LDC.64" else given.discard)(written[0])
        if name.startswith("LDG."):
            size = next((width for end, width in WIDTH.items() if end in name), 4)
            first = re.match(r"R(\d+)", arguments)
            if first:
                waiting.append((size, {f"R{int(first[1]) + i}" for i in range(max(1, size // 4))}))
                most, fresh = max(most, sum(size for size, _ in waiting)), True
            continue
        used = {COPIES} if name.startswith("DEPBAR") else set(re.findall(r"\bR\d+\b", arguments))
        left = [load for load in waiting if not load[1] & used]
        if len(left) < len(waiting) and fresh:
            phases, fresh = phases + 1, False
        waiting = left
    return most, phases


def counted(
    cubin: bytes, resources: dict[str, int], tile: int, num_warps: int, trips: tuple[float, ...], kernel: str = "",
    in_order: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of a kernel, whose program takes ``tile`` voxels."""
    code, labels = disassemble(cubin, kernel)
    counts = runs(code, labels, trips, in_order)
    instructions, cycles = 0.0, Counter()
    for each, count in zip(code, counts, strict=True):
        if each.name != "NOP":
            instructions += count
            name, busy = pipe(each.name)
            cycles[name] += count * busy
    in_flight, phases = flight(code, counts)
    registers = -(-resources["registers"] // 8) * 8
    held = min(REGISTERS // (registers * 32 * num_warps), MOST_PROGRAMS, MOST_WARPS // num_warps)
    if resources["shared"]:
        held = min(held, 227 * 1024 // (resources["shared"] + 1024))
    per_voxel = 32 * num_warps / tile
    return {
        "instructions": instructions * per_voxel,
        **{name: cycles[name] * per_voxel for name in PIPES},
        "warps": held * num_warps, "held": held, "phases": phases,
        "in_flight": in_flight * 32 * num_warps * held,
    }  # fmt: skip


def seconds_per_voxel(row: dict[str, Any], num_bytes: float, copy: float) -> float:
    """Return the predicted time of a kernel, divided by the voxels."""
    busiest = max(row["instructions"], *(row[name] for name in PIPES))
    issue = busiest / (4 * 32) * row["tile"] / CLOCK  # of a program, on the four schedulers of a multiprocessor
    rate = row["held"] / (row["phases"] * LATENCY + row["held"] * issue) * row["tile"] * MULTIPROCESSORS
    return max(num_bytes / copy, 1 / rate)


# ---- the kernels in CUDA C++ ----


@cache
def cubin_of(name: str) -> bytes:
    """Return the machine code of a file of CUDA kernels."""
    with tempfile.TemporaryDirectory() as folder:
        to, specs = Path(folder) / "kernels.cubin", [ROOT / "csrc/python/specs.py", ROOT / "calseg/operations.py"]
        subprocess.run([sys.executable, *specs, Path(folder) / "specs.h"], check=True)
        command = [
            NVCC,
            "-cubin",
            "-lineinfo",
            "-gencode=arch=compute_80,code=sm_90",
            "-std=c++17",
            f"-I{ROOT / 'csrc'}",
            f"-I{folder}",
        ]
        source = ROOT / f"kernels/{name}.cu"
        subprocess.run([*command, source, "-o", to], check=True, capture_output=True)
        return to.read_bytes()


def classes_at_once(C: int) -> int:
    """Return how many classes a thread reads at once, as in csrc/cuda/plan.cpp."""
    return next(at_once for at_once in (8, 4, 2, 1) if C % at_once == 0)


def trips_of_rows(C: int, itemsize: int, voxels: int) -> tuple[float, ...]:
    """Return how often a warp runs each loop of the kernel, for a full tile in which no voxel is ignored.

    The loops copy the tile in, walk along a row three times, walk along that of an ignored voxel, and copy the tile
    out. They are pairs: rounds of several steps, and what is left. With a multiple of 8 classes nothing is left.
    """
    whole, warps = voxels * C * itemsize // 16, range(0, voxels, 32)
    if classes_at_once(C) == 8:
        return (whole // voxels, C // 8, C // 8, C // 8, 0, whole // voxels)
    steps = [[-(-max(0, whole - warp - lane) // voxels) for lane in range(32)] for warp in warps]
    rounds = sum(max(n // 4 for n in lanes) for lanes in steps) / len(warps)
    rest = sum(max(n % 4 for n in lanes) for lanes in steps) / len(warps)
    walk = C // 8, C % 8 // classes_at_once(C)
    return (rounds, rest, *walk, *walk, *walk, 0, 0, rounds, rest)


def trips_of_tiles(kernel: str, C: int, parts: int) -> tuple[float, ...]:
    """Return how often a warp runs each loop of a pass, for a full block in which no voxel is ignored.

    ``parts`` are in shared memory at once. There are loops over rounds of parts, over copies, over groups of voxels,
    and along the classes of a group: three walks. The sums take loops over the labels that adjacent voxels have, over
    pairs of classes, and over the parts. Copies and walks have two loops: four at once, and what is left. A loop that
    runs once is none.
    """
    steps, walk = C * parts // 4, (C // 4, C % 4)
    copies, rounds = (steps // 4, steps % 4), (4 // parts,) * (parts < 4)
    if kernel == "overlap_gradient_tiles":
        return (*rounds, *copies, parts / 2, *walk, *walk, *walk, *copies)
    of_parts = (parts,) * (parts > 1)
    return (*rounds, *copies, parts / 2, *walk, *walk, LABELS_TOGETHER, -(-C // 2) / 4, *of_parts)


def row_of_cuda(kernel: str, C: int, dtype: str, in_rows: bool, num_bytes: float) -> dict[str, Any]:
    """Return the row of a kernel, in a call without class weights and label smoothing."""
    import ahead_of_time

    from calseg.backends.cuda import ALIGN, FEW_GROUPS, FEW_THREADS, ROW_VOXELS, TILE_THREADS, TILE_VOXELS

    itemsize, number = (4, "If") if dtype == "float32" else (2, r"INS\w*4BF16E")
    parts = 4 if C <= 16 else 2 if C <= 32 else 1
    if kernel.endswith("_tiles"):
        instance, threads, tile, trips = f"Li{parts}E", TILE_THREADS, TILE_VOXELS, trips_of_tiles(kernel, C, parts)
    elif kernel == "cross_entropy_rows":
        instance, threads = f"Li{classes_at_once(C)}ELb1E", ROW_VOXELS
        tile, trips = ROW_VOXELS, trips_of_rows(C, itemsize, ROW_VOXELS)
    else:
        instance, threads = f"Li{C}ELb{in_rows:d}E", FEW_THREADS
        tile, trips = FEW_THREADS * ALIGN // itemsize * (FEW_GROUPS[C] if kernel == "overlap_few" else 1), ()
    cubin, num_warps = cubin_of(kernel.replace("_gradient", "")), threads // 32
    instance = rf"\d{kernel}{number}{instance}"
    resources = ahead_of_time.resources(cubin, instance)
    sums = {"overlap_few": 10, "overlap_gradient_few": 2}.get(kernel, 1)
    has_rows = in_rows and kernel != "overlap_few"
    if kernel.endswith("_tiles"):
        of_voxels, of_classes = (8, 4) if kernel == "overlap_tiles" else (1, 2)
        resources["shared"] = 32 + 256 * parts * (itemsize * C + of_voxels) + 4 * C * of_classes
    else:
        resources["shared"] += 4 * num_warps * sums + (tile * C * itemsize if has_rows else 0)
    row = counted(cubin, resources, tile, num_warps, trips, instance, in_order=True)
    if kernel.endswith("_tiles"):
        row["phases"] += 4 // parts - 1  # a block waits for the logits of each round
        row["in_flight"] //= 4 // parts
    return {"kernel": kernel, "tile": tile, "num_warps": num_warps, **resources, **row, "bytes": num_bytes}


# ---- configurations ----


def bytes_moved(arguments: tuple[Any, ...], voxels: int) -> float:
    """Return the bytes per voxel of the tensors that a kernel reads or writes once."""
    tensors = [each.ptr for each in arguments if getattr(each, "ptr", None) is not None]
    return sum(tensor.nbytes for tensor in tensors) / voxels


def rows_of(case: Case) -> list[dict[str, Any]]:
    """Return a row for every kernel over voxels that a configuration launches."""
    sys.path[:0] = [str(TESTS / "backends"), str(TESTS)]
    import ahead_of_time
    import triton
    from calseg.kernels import launch

    from calseg import native
    from calseg.backends import cuda

    triton.runtime.driver.set_active(ahead_of_time.Driver(90))
    rows: list[dict[str, Any]] = []

    def count(kernel: Any, programs: int, like: Any, arguments: Any, num_warps: int) -> None:
        name, tile = kernel.fn.__name__, getattr(arguments[-1], "TILE", None)
        if tile is None:  # a kernel over few numbers
            return
        binary = kernel.warmup(*arguments, grid=(programs,), num_warps=num_warps, enable_fp_fusion=True)
        resources = ahead_of_time.resources(binary.asm["cubin"])
        trips = case.trips if name.startswith("vls") else ()
        voxels, tiles = like.numel() // like.shape[1], 1
        if "per_item" in kernel.arg_names:  # a program takes several tiles, one after the other
            tiles = -(-voxels // like.shape[0] // tile // arguments[kernel.arg_names.index("per_item")])
            trips, tile = (tiles,), tile * tiles
        row = counted(binary.asm["cubin"], resources, tile, num_warps, trips)
        row["phases"] *= tiles
        rows.append(
            {"kernel": name, "tile": tile, "num_warps": num_warps, **resources, **row,
             "bytes": bytes_moved(arguments, voxels)}
        )  # fmt: skip

    def count_in_cuda(given: Any, spec: Any, gradients: Any, *rest: Any) -> None:
        tensors = [tensor for tensor in (given.logits, gradients.logits, spec.labels.tensor) if tensor is not None]
        voxels, C = spec.labels.tensor.numel(), given.logits.shape[1]
        moved = sum(tensor.nbytes for tensor in tensors) / voxels
        *_, overlap, slopes, _, _, _ = rest
        kernel = "cross_entropy" if overlap is slopes is None else "overlap_gradient" if overlap is None else "overlap"
        kernel += "_few" if C in cuda.FEW_CLASSES else "_rows" if kernel == "cross_entropy" else "_tiles"
        rows.append(row_of_cuda(kernel, C, case.call["dtype"], given.logits.stride(1) == 1, moved))

    launch.launch_kernel = count
    extension = SimpleNamespace(
        geometry=native.extension.geometry, CUDA_ARCHITECTURES=["90-real"] if case.cuda else [],
        cuda_cross_entropy=count_in_cuda,
    )  # fmt: skip
    with (
        patch.object(native, "extension", extension), patch.object(cuda, "DEVICES", ("cpu",)),
        patch.object(cuda, "_device_and_stream", lambda tensor: (0, 0)),
    ):  # fmt: skip
        ahead_of_time.call(**case.call)
    return rows


def shares(case: Case, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the predicted share of the copy on each GPU: the time of the least traffic divided by the kernels'."""
    logits = case.call["C"] * (2 if case.call.get("dtype") == "bfloat16" else 4)
    return {
        gpu: 2 * case.copies * logits / copy / sum(seconds_per_voxel(row, row["bytes"], copy) for row in rows)
        for gpu, copy in COPY.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of configurations; default: all")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each configuration")
    options = parser.parse_args()
    if not options.json:
        print(
            "instructions a voxel, by pipe in issue slots; bytes in flight a multiprocessor; PREDICTED share of a copy"
        )
    for name, case in CASES.items():
        if options.names and not any(part in name for part in options.names):
            continue
        rows = rows_of(case)
        if options.json:
            print(json.dumps({"name": name, "rows": rows, "shares": shares(case, rows)}), flush=True)
            continue
        print(name, *(f"{gpu} {share:.0%}" for gpu, share in shares(case, rows).items()), flush=True)
        for r in rows:
            print(
                f"    {r['kernel']:20} {r['instructions']:7.0f} "
                + " ".join(f"{p} {r[p]:6.0f}" for p in PIPES)
                + f" | regs {r['registers']:3} stack {r['stack']:3} warps {r['warps']:2} tile {r['tile']:4}"
                + f" | {r['in_flight'] / 1024:4.0f} KiB in {r['phases']} phases",
                flush=True,
            )


if __name__ == "__main__":
    main()
