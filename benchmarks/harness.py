"""Classes and functions of all benchmarks: a case, its problem, and a paired measurement.

Times are compared only within a run and a test. In every round, each contender (copy, clone, the peers, calseg) runs
once, and the order of the peers rotates. A ratio is the median over the rounds of the ratio within a round. If the
machine slows down, it slows both contenders of a round.

A step is that of a training loop: drop the old gradients, forward, backward. So freeing and allocating the memory of
the gradients is part of the time of every contender.
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

AT_MOST = ("copy", "read", "memory", "ns", "floor", "microseconds_over_plain")
"""Metrics whose targets are upper bounds. Those of all others are lower bounds."""
SECONDS_PER_CASE = 4.0  # time for the paired rounds, of which there are at least MIN_ROUNDS
MIN_ROUNDS, MAX_ROUNDS = 7, 100
BLOCK_SECONDS = 2e-3  # a step shorter than this is repeated within one timing
GPU_SECONDS_PER_CASE = 1.5  # shorter, because a GPU has more cases and less noise
GPU_BLOCK_SECONDS = 20e-3  # long enough that the wait for the GPU at the end does not matter
BANDWIDTHS = {"copy", "clone", "read"}  # operations that are timed in addition to the contenders
# Pairs (classes, edge) on a GPU for operations whose plain PyTorch form needs 10 to 26 times the memory of the logits,
# up to 60 GB.
GPU_SIZES = ((2, 256), (4, 256), (4, 512), (14, 256), (33, 256), (117, 128))
MEMORY_BYTES = 64 << 20  # least size of the logits when the memory of a case is measured


@dataclass(frozen=True)
class Case:
    """One row of the table. ``targets`` maps metrics of :func:`_figures`, or "memory", to their bounds."""

    operation: str
    classes: int
    edge: int
    dtype: str = "float32"
    labels: str = "int64"  # "" if there are no labels
    batch: int = 1
    axes: int = 3
    compiled: bool = False  # also measure torch.compile of the eager peer
    memory: bool = False
    alone: bool = False  # without peers, which need too much memory or cannot count that many voxels
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits, ``[N, C, *S]``."""
        return (self.batch, self.classes, *[self.edge] * self.axes)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the logits."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def scores(self) -> Tensor:
        """Return standard normal numbers ``[N, C, *S]``."""
        return torch.randn(self.shape).to(self.torch_dtype)

    def target(self) -> Tensor:
        """Return random class indices ``[N, *S]``."""
        shape = (self.batch, *self.shape[2:])
        return torch.randint(0, self.classes, shape, dtype=getattr(torch, self.labels))

    def traffic(self, tensors: int, label_maps: int = 1) -> int:
        """Return the bytes of this many passes over tensors of the logits' size and over label maps."""
        elements = torch.Size(self.shape).numel()
        label_bytes = label_maps * getattr(torch, self.labels).itemsize if label_maps else 0
        return tensors * elements * self.torch_dtype.itemsize + elements // self.classes * label_bytes

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return "-".join(filter(None, (self.operation, size, self.dtype, self.labels)))


def gpu_case(operation: str, classes: int, edge: int, dtype: str, *, targets: dict[str, float], **options: Any) -> Case:
    """Return a case with labels of one byte.

    It has targets only from 128 MiB of logits on, where the time of the launches does not matter.
    """
    case = Case(operation, classes, edge, dtype, **{"labels": "uint8", **options})
    large = torch.Size(case.shape).numel() * case.torch_dtype.itemsize >= 128 << 20
    left_out = {"eager", "compile"} if case.alone else set() if case.compiled else {"compile"}
    return replace(case, targets={name: bound for name, bound in targets.items() if large and name not in left_out})


def sized_gpu_cases(operation: str, targets: dict[str, float], **options: Any) -> list[Case]:
    """Return cases of ``GPU_SIZES`` in float32 and bfloat16. Only few have the slow peer torch.compile."""
    return [
        gpu_case(operation, classes, edge, dtype, compiled=dtype == "float32" and edge == 256, memory=True,
                 targets=targets, **options)
        for dtype in ("float32", "bfloat16") for classes, edge in GPU_SIZES
    ]  # fmt: skip


@dataclass
class Problem:
    """The tensors of a case and the functions that are compared. Each works on its own leaves over the same memory."""

    ours: Loss
    eager: Loss | None
    inputs: tuple[Tensor, ...]  # tensors that get a gradient; a copy of the first one gives the bandwidth
    traffic: int  # bytes that a step must read and write, by the byte model of the benchmark
    samples: int = 0  # number of noise samples in a step, over all elements
    operations: int = 0  # number of instructions of a thread that a step needs at least
    backward: bool = True
    upstream: Tensor | None = None  # upstream gradient, if the result is not a scalar
    copied: bool = True  # also time copy and clone of the first input
    read: bool = False  # also time a read of the first input
    rivals: dict[str, tuple[Loss, tuple[Tensor, ...]]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # root mean square errors of estimates, by contender

    def step(self, function: Loss, inputs: tuple[Tensor, ...]) -> Step:
        """Return a training step of ``function``, or its forward pass alone."""
        if not self.backward:
            return lambda: function(*inputs)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        drop = on_gpu()  # PyTorch keeps the memory of a GPU, so a contender can free its gradients before others run

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
        """Return the steps of all contenders by name, beginning with ``calseg``."""
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
    """Return the reason why the peer torch.compile is absent, such as a missing C++ compiler, or None."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(64))
    except Exception as error:  # Inductor raises many kinds of exceptions
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]


def on_gpu() -> bool:
    """Return whether ``--device cuda`` was given. All tensors are then made on the GPU."""
    return torch.get_default_device().type == "cuda"


def gpu_instructions_per_second() -> float:
    """Return the instructions of threads per second at the highest clock, or 0 if the clock is not known.

    A multiprocessor has four schedulers, each of which issues one instruction for 32 lanes per clock cycle.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    clock = 1e3 * getattr(properties, "clock_rate", 0)  # in kHz, absent in older PyTorch
    return 4 * 32 * properties.multi_processor_count * clock


def _repeat(step: Step, times: int) -> Callable[[], None]:
    """Return a function that makes this many steps and waits for the GPU."""

    def block() -> None:
        for _ in range(times):
            step()
        if on_gpu():
            torch.cuda.synchronize()

    return block


def _timed(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = perf_counter()
    function()
    return perf_counter() - start


def _size(result: Tensor) -> float:
    """Return the mean square of a result, by which results are compared."""
    return float(result.double().square().mean())


def _check_agreement(steps: dict[str, Step]) -> None:
    """Check that all contenders compute the same. The tolerance is loose, because their noise differs."""
    expected = _size(steps["calseg"]())
    for name, step in steps.items():
        assert abs(_size(step()) - expected) <= 0.05 * expected, f"calseg and {name} compute different things"


def _summary(seconds: list[float]) -> dict[str, float]:
    """Return median, minimum and quartiles."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "min": min(seconds), "q1": q1, "q3": q3}


def peak_memory(build: Build, case: Case, floor: int = MEMORY_BYTES) -> dict[str, float | None]:
    """Return the peak memory beyond inputs and results in percent of the logits, from a new process (memory.py)."""
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, str(script), build.__module__, json.dumps(asdict(case)), str(floor)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"memory.py failed:\n{answer.stderr}")
    percent: dict[str, float | None] = json.loads(answer.stdout.splitlines()[-1])
    return percent


def gpu_peak_memory(problem: Problem) -> dict[str, float | None]:
    """Return the same for a GPU, from the caching allocator of this process."""
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
    """Return the seconds of every contender in every round, or None with ``--benchmark-disable``."""
    steps = problem.steps(compiled=compiled and compile_problem() is None)
    _check_agreement(steps)
    if problem.copied:
        source = problem.inputs[0]
        steps["copy"] = functools.partial(torch.empty_like(source).copy_, source)
        steps["clone"] = source.clone
        if problem.read:
            steps["read"] = source.view(-1).max  # the reduction with the least work after reading
        for name in BANDWIDTHS & steps.keys():
            steps[name]()  # load the code onto the GPU
    seconds, block = (GPU_SECONDS_PER_CASE, GPU_BLOCK_SECONDS) if on_gpu() else (SECONDS_PER_CASE, BLOCK_SECONDS)
    once = {name: _timed(_repeat(step, 1)) for name, step in steps.items()}
    # On a GPU, every contender has its own number of repetitions, because some peers take a hundred times as long. On a
    # CPU all have the same, because a copy that is repeated more often would stay in the cache.
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
    """Return the figures of a row. ``metrics`` are medians of ratios per round, ``of_min`` ratios of shortest times."""
    ours = times["calseg"]
    metrics: dict[str, float] = {}
    of_min: dict[str, float] = {}
    for name, theirs in times.items():
        if name in BANDWIDTHS:  # time in units of the copy or read
            metrics[name] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            of_min[name] = min(ours) / min(theirs)
        elif name != "calseg":  # speed-up
            metrics[name] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
            of_min[name] = min(theirs) / min(ours)
    seconds = statistics.median(ours)
    if "plain" in times:
        metrics["microseconds_over_plain"] = 1e6 * (min(ours) - min(times["plain"]))
    if problem.samples:
        metrics["ns"] = seconds * 1e9 / problem.samples
    if problem.errors:
        # The error of independent samples falls with the root of their number, to which their time is proportional.
        ratio = problem.errors["eager"] / problem.errors["calseg"]
        metrics |= {"rms": problem.errors["calseg"], "equal_error": metrics["eager"] * ratio**2}
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
    """Return a value, its target, and whether the target is met."""
    met = None if value is None else value <= target if metric in AT_MOST else value >= target
    return {"value": value, "target": target, "met": met}


def measure(benchmark: Any, build: Build, case: Case, *, quick: bool = False) -> dict[str, Any] | None:
    """Measure time and memory of a case and its peers, and return the row of the report."""
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
