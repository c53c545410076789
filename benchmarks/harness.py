"""What every benchmark is made of: a case, its problem, and one paired measurement.

Nothing is compared across runs or across tests. In every round each contender (copy, clone, peers, calseg)
runs once, the order of the peers rotating, and a ratio is the median over the rounds of the ratio within a
round: a machine that slows down slows both. A step is that of a training loop: drop the old gradients,
forward, backward; so freeing and taking the memory of the gradients is part of everybody's time.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import calseg

Step = Callable[[], Tensor]
Loss = Callable[..., Tensor]

AT_MOST = ("copy", "read", "memory", "ns", "floor")  # bounded from above; the other metrics are speed-ups and shares
SECONDS_PER_CASE = 4.0  # of paired rounds, at least MIN_ROUNDS
MIN_ROUNDS, MAX_ROUNDS = 7, 100
BLOCK_SECONDS = 2e-3  # a step shorter than this is repeated within one timing
GPU_SECONDS_PER_CASE = 1.5  # there are more cases, and nothing else runs there
GPU_BLOCK_SECONDS = 20e-3  # so long that waiting for the GPU at the end does not count
BANDWIDTHS = {"copy", "clone", "read"}  # what is timed beside the contenders
# (classes, edge) on a GPU for the operations whose plain PyTorch takes 10 to 26 times the logits' memory: up to 60 GB.
GPU_SIZES = ((2, 256), (4, 256), (4, 512), (14, 256), (33, 256), (117, 128))
MEMORY_BYTES = 64 << 20  # the memory of a case is measured with at least this much of logits


@dataclass(frozen=True)
class Case:
    """One row of the table. ``targets``: by metric, a key of ``_figures``' metrics or memory."""

    operation: str
    classes: int
    edge: int
    dtype: str = "float32"
    labels: str = "int64"  # "" where there are none
    batch: int = 1
    axes: int = 3
    compiled: bool = False  # also measure torch.compile of the eager peer
    memory: bool = False
    alone: bool = False  # without peers: they need more memory, or cannot count so far
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """``[N, C, *S]``."""
        return (self.batch, self.classes, *[self.edge] * self.axes)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the logits."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def scores(self) -> Tensor:
        """Normal numbers ``[N, C, *S]``."""
        return torch.randn(self.shape).to(self.torch_dtype)

    def target(self) -> Tensor:
        """Class indices ``[N, *S]``."""
        shape = (self.batch, *self.shape[2:])
        return torch.randint(0, self.classes, shape, dtype=getattr(torch, self.labels))

    def traffic(self, tensors: int, label_maps: int = 1) -> int:
        """The byte model: so many passes over tensors of the logits' size and over the labels."""
        elements = torch.Size(self.shape).numel()
        label_bytes = label_maps * getattr(torch, self.labels).itemsize if label_maps else 0
        return tensors * elements * self.torch_dtype.itemsize + elements // self.classes * label_bytes

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return "-".join(filter(None, (self.operation, size, self.dtype, self.labels)))


def gpu_case(operation: str, classes: int, edge: int, dtype: str, *, targets: dict[str, float], **options: Any) -> Case:
    """A case with labels of one byte; with targets only where the launches do not count: from 128 MiB of logits on."""
    case = Case(operation, classes, edge, dtype, **{"labels": "uint8", **options})
    large = torch.Size(case.shape).numel() * case.torch_dtype.itemsize >= 128 << 20
    left_out = {"eager", "compile"} if case.alone else set() if case.compiled else {"compile"}
    return replace(case, targets={name: bound for name, bound in targets.items() if large and name not in left_out})


def sized_gpu_cases(operation: str, targets: dict[str, float], **options: Any) -> list[Case]:
    """``GPU_SIZES`` in float32 and bfloat16; torch.compile is slow to compile: beside one size alone."""
    return [
        gpu_case(operation, classes, edge, dtype, compiled=dtype == "float32" and edge == 256, memory=True,
                 targets=targets, **options)
        for dtype in ("float32", "bfloat16") for classes, edge in GPU_SIZES
    ]  # fmt: skip


@dataclass
class Problem:
    """The tensors of a case and who works on them: each on leaves of its own over the same memory."""

    ours: Loss
    eager: Loss | None
    inputs: tuple[Tensor, ...]  # those that get a gradient; the first is what is copied for the bandwidth
    traffic: int  # bytes of the byte model
    samples: int = 0  # noise samples drawn in one step, over all elements
    operations: int = 0  # instructions of a thread that one step cannot do without
    backward: bool = True
    upstream: Tensor | None = None  # the gradient that comes in, where the result is no scalar
    copied: bool = True
    read: bool = False  # also time a read of the first input
    rivals: dict[str, tuple[Loss, tuple[Tensor, ...]]] = field(default_factory=dict)

    def step(self, function: Loss, inputs: tuple[Tensor, ...]) -> Step:
        """One training step (or forward alone) of ``function``."""
        if not self.backward:
            return lambda: function(*inputs)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        drop = on_gpu()  # the allocator keeps the memory there: who waits for its turn holds none

        def step() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            result = function(*leaves)
            result.backward(self.upstream)
            if drop:
                for leaf in leaves:
                    leaf.grad = None
            return result.detach()

        return step

    def steps(self, *, compiled: bool = False) -> dict[str, Step]:
        """The contenders by name; ``calseg`` first."""
        functions = {"calseg": (self.ours, self.inputs)}
        if self.eager is not None:
            functions["eager"] = (self.eager, self.inputs)
        functions |= self.rivals
        if compiled and self.eager is not None:
            torch.compiler.reset()
            functions["compile"] = (torch.compile(self.eager, dynamic=False, fullgraph=True), self.inputs)
        return {name: self.step(*pair) for name, pair in functions.items()}


Build = Callable[[Case], Problem]


@functools.cache
def compile_problem() -> str | None:
    """Why there is no torch.compile peer, if there is none (no C++ compiler, say)."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(64))
    except Exception as error:  # whatever Inductor raises where it does not work
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]


def on_gpu() -> bool:
    """Whether ``--device cuda`` was asked for: then all tensors are made there."""
    return torch.get_default_device().type == "cuda"


def gpu_instructions_per_second() -> float:
    """At the highest clock: a multiprocessor has four schedulers of one instruction of 32 lanes a clock. 0: unknown."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    clock = 1e3 * getattr(properties, "clock_rate", 0)  # kHz; older PyTorch does not tell
    return 4 * 32 * properties.multi_processor_count * clock


def _repeat(step: Step, times: int) -> Callable[[], None]:
    """So many steps; on a GPU until all of them have ended."""

    def block() -> None:
        for _ in range(times):
            step()
        if on_gpu():
            torch.cuda.synchronize()

    return block


def _timed(function: Callable[[], Any]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def _size(result: Tensor) -> float:
    return float(result.double().square().mean())


def _check_agreement(steps: dict[str, Step]) -> None:
    """A wrong peer makes a wrong ratio; the noise differs between contenders, hence the loose tolerance."""
    expected = _size(steps["calseg"]())
    for name, step in steps.items():
        assert abs(_size(step()) - expected) <= 0.05 * expected, f"calseg and {name} compute different things"


def _summary(seconds: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "min": min(seconds), "q1": q1, "q3": q3}


def peak_memory(build: Build, case: Case, floor: int = MEMORY_BYTES) -> dict[str, float | None]:
    """Peak memory beyond inputs and results in percent of the logits, in a fresh process (see memory.py)."""
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, str(script), build.__module__, json.dumps(asdict(case)), str(floor)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"memory.py failed:\n{answer.stderr}")
    percent: dict[str, float | None] = json.loads(answer.stdout.splitlines()[-1])
    return percent


def gpu_peak_memory(problem: Problem) -> dict[str, float | None]:
    """The same on a GPU, in this process: what the caching allocator gave out at its peak."""
    percent: dict[str, float | None] = {}
    gradients = sum(tensor.nbytes for tensor in problem.inputs) if problem.backward else 0
    for name, step in problem.steps().items():
        if name not in ("calseg", "eager"):
            continue
        step()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        percent[name] = 100 * (peak - gradients - (result.nbytes if result.dim() else 0)) / problem.inputs[0].nbytes
    return percent


def paired_times(benchmark: Any, problem: Problem, *, compiled: bool, max_rounds: int) -> dict[str, list[float]] | None:
    """Seconds of every contender in every round; None with ``--benchmark-disable``."""
    steps = problem.steps(compiled=compiled and compile_problem() is None)
    _check_agreement(steps)
    if problem.copied:
        source = problem.inputs[0]
        steps["copy"] = functools.partial(torch.empty_like(source).copy_, source)
        steps["clone"] = source.clone
        if problem.read:
            steps["read"] = source.view(-1).max  # the reduction that does least beside reading
        for name in BANDWIDTHS & steps.keys():
            steps[name]()  # a GPU loads its code
    seconds, block = (GPU_SECONDS_PER_CASE, GPU_BLOCK_SECONDS) if on_gpu() else (SECONDS_PER_CASE, BLOCK_SECONDS)
    once = {name: _timed(_repeat(step, 1)) for name, step in steps.items()}
    # on a GPU some peers take a hundred times as long; on a CPU a copy that is repeated more often would stay in cache
    loops = {name: max(1, round(block / once[name if on_gpu() else "calseg"])) for name in steps}
    blocks = {name: _repeat(step, loops[name]) for name, step in steps.items()}
    affordable = int(seconds / sum(loops[name] * once[name] for name in steps))
    rounds = min(max(affordable, MIN_ROUNDS), max_rounds)
    peers = [name for name in steps if name != "calseg"]
    times: dict[str, list[float]] = {name: [] for name in peers}

    def run_peers() -> None:
        shift = len(times[peers[0]]) % len(peers)
        for name in peers[shift:] + peers[:shift]:
            times[name].append(_timed(blocks[name]) / loops[name])

    benchmark.extra_info["steps_per_time"] = loops["calseg"]
    benchmark.pedantic(blocks["calseg"], setup=run_peers, rounds=rounds)
    if benchmark.stats is None:
        return None
    return {"calseg": [seconds / loops["calseg"] for seconds in benchmark.stats.stats.data], **times}


def _figures(problem: Problem, times: dict[str, list[float]]) -> dict[str, Any]:
    """Metrics are medians of per-round ratios, ``of_min`` the ratios of the shortest times."""
    ours = times["calseg"]
    metrics: dict[str, float] = {}
    of_min: dict[str, float] = {}
    for name, theirs in times.items():
        if name in BANDWIDTHS:  # in units of the copy, or of the read
            metrics[name] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            of_min[name] = min(ours) / min(theirs)
        elif name != "calseg":  # times faster than
            metrics[name] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
            of_min[name] = min(theirs) / min(ours)
    seconds = statistics.median(ours)
    if problem.samples:
        metrics["ns"] = seconds * 1e9 / problem.samples
    figures: dict[str, Any] = {"rounds": len(ours), "metrics": metrics, "of_min": of_min}
    figures["seconds"] = {name: _summary(values) for name, values in times.items()}
    figures["gb_per_s"] = problem.traffic / seconds / 1e9
    if "copy" in times:
        figures["copy_gb_per_s"] = 2 * problem.inputs[0].nbytes / statistics.median(times["copy"]) / 1e9
        metrics["copy_share"] = figures["gb_per_s"] / figures["copy_gb_per_s"]
        if "read" in times:
            figures["read_gb_per_s"] = problem.inputs[0].nbytes / statistics.median(times["read"]) / 1e9
            metrics["read_share"] = figures["gb_per_s"] / figures["read_gb_per_s"]
        if problem.operations and on_gpu() and (rate := gpu_instructions_per_second()):
            memory = problem.traffic / figures["copy_gb_per_s"] / 1e9
            metrics["floor"] = seconds / max(memory, problem.operations / rate)
    return figures


def _verdict(metric: str, value: float | None, target: float) -> dict[str, Any]:
    met = None if value is None else value <= target if metric in AT_MOST else value >= target
    return {"value": value, "target": target, "met": met}


def measure(benchmark: Any, build: Build, case: Case, *, quick: bool = False) -> dict[str, Any] | None:
    """Time and memory of a case and its peers: a row for the report."""
    if quick:
        memory = case.memory and case.classes == 4
        case = replace(case, edge=min(case.edge, 16), compiled=False, memory=memory)
    torch.manual_seed(0)
    problem = build(case)
    if case.alone:
        problem = replace(problem, eager=None, rivals={})
    times = paired_times(benchmark, problem, compiled=case.compiled, max_rounds=3 if quick else MAX_ROUNDS)
    if times is None:
        return None
    row = {name: getattr(case, name) for name in ("operation", "shape", "dtype", "labels", "alone")}
    row |= _figures(problem, times)
    if case.memory and on_gpu():
        row["memory"] = gpu_peak_memory(problem)
    del problem
    gc.collect()
    calseg.empty_cache()
    torch.cuda.empty_cache()
    if case.memory:
        if not on_gpu():
            row["memory"] = peak_memory(build, case, 0 if quick else MEMORY_BYTES)
        row["metrics"]["memory"] = row["memory"]["calseg"]
    metrics = row["metrics"]
    row["targets"] = {name: _verdict(name, metrics.get(name), bound) for name, bound in case.targets.items()}
    benchmark.extra_info |= row
    return row
