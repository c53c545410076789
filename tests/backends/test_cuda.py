"""Tests of the CUDA kernels without a GPU: results in an emulation on the CPU, launches, and machine code."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import bins_of_backends
import pytest
import test_calibration as calibration
import torch
from cases import INTEGERS, LABELS, LAYOUTS, assert_near_bins, assert_same_bins, labels, scores
from hypothesis import given, settings
from hypothesis import strategies as st

import calseg
from calseg import native, tensors
from calseg.backends import choice, cuda
from calseg.operations import UNIT, BinsSpec, Labels

HERE = Path(__file__).parents[1]  # tests/
ROOT = HERE.parent
KINDS, every_kind = calibration.KINDS, calibration.every_kind
LOW = (torch.bfloat16, torch.float16)


# ---- the kernels as plain C++ ----


class Limits(NamedTuple):
    """Properties of the emulated GPU, and the blocks of a grid that are run."""

    current_device: int = 0
    multiprocessors: int = 4
    shared_per_multiprocessor: int = 228 * 1024
    shared_per_block: int = 227 * 1024
    first_block: int = 0
    last_block: int = 2**32 - 1


class Launch(NamedTuple):
    """Description of the last launch."""

    blocks: int
    shared_bytes: int
    device: int
    current_device: int


class Plan(NamedTuple):
    """CalibrationLaunch of csrc/cuda/plan.h."""

    N: int
    S: int
    score_stride: int
    label_stride: int
    bins_in: int
    classes_held: int
    transposed: int
    tiles_per_item: int
    groups: int
    tiles_per_group: int
    blocks_per_group: int
    shared_bytes: int
    classes: int
    ignored: int
    ignores: int


COLUMNS, SHARED, GLOBAL = range(3)


class Call(ctypes.Structure):
    _fields_ = [(name, ctypes.POINTER(ctypes.c_int64)) for name in
                ("shape", "scores", "labels", "mask", "numbers", "flags")]  # fmt: skip

    @classmethod
    def of(cls, *arguments: Sequence[int] | None) -> Call:
        arrays = [None if values is None else (ctypes.c_int64 * len(values))(*values) for values in arguments]
        return cls(*(ctypes.cast(array, ctypes.POINTER(ctypes.c_int64)) for array in arrays))


DTYPES = (*tensors.FLOAT_DTYPES, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
          torch.uint32, torch.uint64)  # fmt: skip  # the order of DType in csrc/host/tensor_view.h


def view_of(tensor: torch.Tensor | None, channels: bool) -> tuple[int, ...] | None:
    """Return address, dtype and strides of item, class and space, as the reader of the extension does."""
    if tensor is None:
        return None
    strides, first = tensor.stride(), 1 + channels
    if tensor.dim() <= first:  # [C] and [N, C] are one item
        rows = strides[0] if tensor.dim() == first else 1
        strides_of = (0, strides[-1] if channels else 0, rows)
    else:
        space = tensors.one_stride(tensor.shape[first:], strides[first:])
        strides_of = (strides[0], strides[1] if channels else 0, space)
    return tensor.data_ptr(), DTYPES.index(tensor.dtype), *strides_of


def call_of(spec: BinsSpec, scores: torch.Tensor) -> Call:
    """Return the arguments of a call.

    Tensors that cannot be read with one stride are copied, and kept until the process ends.
    """
    label_tensor, ignore_index, *_ = spec.labels
    read = [scores if tensors.is_walkable(scores) else scores.contiguous()]
    for voxels in (label_tensor, spec.mask):
        walkable = voxels is None or tensors.one_stride(voxels.shape[1:], voxels.stride()[1:]) is not None
        read.append(voxels if walkable else voxels.contiguous())
    read = [None if tensor is None else tensor.resolve_neg() for tensor in read]
    KEPT.extend(read)
    scores, label_tensor, mask = read
    return Call.of(
        tensors.shape_of(scores), view_of(scores, True), view_of(label_tensor, False), view_of(mask, False),
        (spec.n_bins, spec.first_class, ignore_index),
        (spec.from_logits, spec.class_wise, spec.skip_background, spec.per_item, spec.right_closed),
    )  # fmt: skip


KEPT: list[torch.Tensor | None] = []


class OnHost:
    """Stand-in for :mod:`calseg._native` that runs kernels/calibration_bins.cu on the CPU."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.calibration_bins.restype = self.library.run_wrong_kernel.restype = ctypes.c_char_p

    def cuda_calibration_bins(self, scores, spec, sums, totals, faults, device, stream):
        call = call_of(spec, scores)
        problem = self.library.calibration_bins(
            ctypes.byref(call), ctypes.c_double(spec.tolerance),
            *(ctypes.c_void_p(each.data_ptr()) for each in (sums, totals, faults)), device, ctypes.c_void_p(stream),
        )  # fmt: skip
        if problem is not None:
            raise RuntimeError(problem.decode())

    def set_limits(self, limits: Limits) -> None:
        self.library.set_device(*map(ctypes.c_uint, limits))

    def last_launch(self) -> Launch:
        numbers = (ctypes.c_int64 * len(Launch._fields))()
        self.library.last_launch(numbers)
        return Launch(*numbers)

    def plan(
        self, x: torch.Tensor, y: torch.Tensor, *, n_bins: int = 15, first_class: int | None = None,
        ignore_index: int = -100, per_item: bool = False, resident: int = 3,
    ) -> Plan:  # fmt: skip
        spec = BinsSpec(
            Labels(y, ignore_index), None, n_bins, first_class or 0, True, first_class is not None, False, per_item,
            False, 0.0,
        )  # fmt: skip
        return self.plan_of(call_of(spec, x), resident)

    def plan_of(self, call: Call, resident: int = 3) -> Plan:
        numbers = (ctypes.c_int64 * len(Plan._fields))()
        self.library.plan_launch(ctypes.byref(call), ctypes.c_int64(resident), numbers)
        return Plan(*numbers)


def write_specs(folder: Path) -> None:
    """Write the header that CMake generates."""
    generator, operations = ROOT / "csrc" / "python" / "specs.py", ROOT / "calseg" / "operations.py"
    subprocess.run([sys.executable, str(generator), str(operations), str(folder / "specs.h")], check=True)


def compiled_for_host(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile a file of tests/cuda_on_host to a library, once for all files of tests."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    folder = tmp_path_factory.getbasetemp() / "cuda_on_host"
    built = (folder / source).with_suffix(".so")
    if built.exists():
        return built
    folder.mkdir(exist_ok=True)
    write_specs(folder)
    # a library under AddressSanitizer loads only into a process that started with it
    sanitizers = "address,undefined" if "libasan" in os.environ.get("LD_PRELOAD", "") else "undefined"
    done = subprocess.run(
        [compiler, "-std=c++17", "-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-Wall",
         "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared", f"-I{HERE / 'cuda_on_host'}",
         f"-I{ROOT / 'csrc'}", f"-I{folder}", str(HERE / "cuda_on_host" / source), "-o", str(built)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    return OnHost(compiled_for_host("calibration.cpp", tmp_path_factory))


def set_up(library: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``backend="cuda"`` run CPU tensors in the emulation."""
    library.set_limits(Limits())
    monkeypatch.setattr(
        native, "extension",
        SimpleNamespace(cuda_calibration_bins=library.cuda_calibration_bins, CUDA_ARCHITECTURES=["on a CPU"]),
    )  # fmt: skip
    monkeypatch.setattr(cuda, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda, "_device_and_stream", lambda tensor: (0, 0))


@pytest.fixture
def on_host(library: OnHost, monkeypatch: pytest.MonkeyPatch) -> OnHost:
    set_up(library, monkeypatch)
    return library


# ---- the tests of the other backends ----


@every_kind
@pytest.mark.parametrize("from_logits", [True, False])
def test_voxels_that_count(on_host, kind, from_logits):
    bins_of_backends.check_voxels_that_count("cuda", kind, from_logits)


@every_kind
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 14, 16, 17, 33, 117])
def test_logits(on_host, C, kind):
    for dtype in (torch.float32, *LOW):
        calibration.test_logits_against_float64("cuda", dtype, C, kind)


@pytest.mark.parametrize("right_closed", [False, True])
@pytest.mark.parametrize("n_bins", [1, 2, 7, 15, 20, 100, 4096, 65536])
def test_edges(on_host, n_bins, right_closed):
    calibration.test_edges("cuda", n_bins, torch.float32, right_closed)


def test_extremes(on_host):
    bins_of_backends.check_extremes("cuda")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(on_host, name):
    calibration.test_layouts("cuda", name, 2)


def test_labels_and_shapes(on_host):
    for form in ("[N, *S]", "strided", "transposed", "expanded"):
        for dtype in LABELS:
            calibration.test_label_types_and_forms("cuda", dtype, form)
    bins_of_backends.check_shapes("cuda")
    calibration.test_low_precision_is_widened("cuda")
    calibration.test_merge_is_not_concatenation("cuda")


# ---- where bins are added up, tiles, blocks ----

# name -> (options, shared memory of a block, where bins are added up)
PLACES = {
    "columns": ({"n_bins": 15}, 227, COLUMNS),
    "shared": ({"n_bins": 200}, 227, SHARED),
    "shared, few": ({"n_bins": 15}, 24, SHARED),
    "global": ({"n_bins": 4096}, 48, GLOBAL),
    "class-wise columns": ({"n_bins": 7, "class_wise": True}, 227, COLUMNS),
    "class-wise shared": ({"n_bins": 15, "class_wise": True}, 227, SHARED),
    "class-wise global": ({"n_bins": 4096, "class_wise": True}, 100, GLOBAL),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_space"])
@pytest.mark.parametrize("C", [3, 5, 21])
@pytest.mark.parametrize("place", PLACES)
def test_places(on_host, place, C, layout):
    """With several tiles and blocks, and bins in any memory, probabilities give the integers of the reference."""
    options, kilobytes, wanted_place = PLACES[place]
    shape = (3, C, 7, 83)
    p, target = LAYOUTS[layout](calibration.probabilities(*shape)), labels(shape, ignore_index=-100)
    first_class = 0 if options.get("class_wise") else None
    if place != "class-wise columns" or C == 3:
        on_host.set_limits(Limits(shared_per_block=kilobytes * 1024))
        assert on_host.plan(p, target, n_bins=options["n_bins"], first_class=first_class).bins_in == wanted_place
    for per_item, from_logits in ((False, False), (True, True)):
        given = {"from_logits": from_logits, "per_item": per_item, **options}
        scores = p.log() if from_logits else p
        got = calseg.calibration_bins(scores, target, backend="cuda", **given)
        assert on_host.last_launch().blocks > 1
        wanted = calseg.calibration_bins(scores, target, backend="reference", **given)
        if from_logits:
            assert_near_bins(got, wanted, units=4)
        else:
            assert_same_bins(got, wanted, units=4 + C // 8)


@every_kind
def test_impossible_blocks_of_classes(on_host, kind):
    """The first 16 or 32 classes, or all after the first 16, may be -inf. The other classes are then a distribution."""
    x, target = scores(1, 37, 600, dtype=torch.float32), labels((1, 37, 600))
    x[:, :16, ::3] = x[:, 16:, 1::3] = x[:, :32, 2::3] = -torch.inf
    x[..., 5] = -torch.inf
    target[0, 5] = 1
    got = calseg.calibration_bins(x, target, backend="cuda", **kind)
    assert_near_bins(got, calseg.calibration_bins(x, target, backend="reference", **kind), units=4)
    assert int(got.num_nan) == 1
    assert int(got.num_infinite) > 100


@pytest.mark.parametrize("C", [2, 5])
@pytest.mark.parametrize(("place", "n_bins", "kilobytes"), [(COLUMNS, 1, 227), (SHARED, 300, 227), (GLOBAL, 4096, 48)])
def test_full_words(on_host, place, n_bins, kilobytes, C):
    """No bit field overflows if a thread adds as many voxels of confidence 1 as it may to one bin."""
    voxels = 124 if C == 2 else 127
    size = 3 * voxels * 256
    x, target = torch.full((1, C, size), -1000.0), torch.zeros(1, size, dtype=torch.uint8)
    x[:, 0] = 0
    on_host.set_limits(Limits(multiprocessors=1, shared_per_block=kilobytes * 1024))
    plan = on_host.plan(x, target, n_bins=n_bins, resident=3)
    assert plan.bins_in == place
    assert plan.blocks_per_group == 3
    bins = calseg.calibration_bins(x, target, n_bins=n_bins, backend="cuda")
    assert int(bins.count[-1]) == int(bins.hits[-1]) == int(bins.num_voxels) == size
    assert int(bins.confidence[-1]) == size * UNIT
    x[:, 1] = 2.0**25 - 2  # the largest likelihood that counts
    bins = calseg.calibration_bins(x, target, n_bins=n_bins, backend="cuda")
    assert bins.nll.tolist() == [size * (2**25 - 2), 0]
    assert int(bins.brier) == 2 * size * UNIT


def test_plan(on_host):
    """Check plans: a wave of blocks, up to 127 voxels per thread, not more blocks than tiles, and transposed reads."""
    x, y = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.uint8, device="meta")  # all strides 0

    def of(*shape: int, **options: int) -> Plan:
        return on_host.plan(x.expand(shape), y.expand(shape[:1] + shape[2:]), **options)

    on_host.set_limits(Limits(multiprocessors=132))
    small, large, huge = of(1, 4, 1000), of(1, 4, 2**20), of(1, 4, 2**40)
    assert (small.classes_held, small.tiles_per_item, small.blocks_per_group) == (4, 1, 1)
    assert (large.tiles_per_item, large.blocks_per_group) == (1024, 132 * 3)
    assert huge.tiles_per_item == 2**30
    assert huge.blocks_per_group == -(-(2**30) // 31)
    assert of(5, 4, 2**20).blocks_per_group == 132 * 3
    items = of(5, 4, 2**20, per_item=True)
    assert (items.groups, items.tiles_per_group, items.blocks_per_group) == (5, 1024, -(-132 * 3 // 5))
    assert of(1, 5, 2**20).classes_held == of(1, 117, 2**20).classes_held == 16
    assert of(1, 5, 2**20).tiles_per_item == 4096
    for n_bins in (1, 15, 35, 36, 200, 14000, 15000):
        for layout in ("contiguous", "channels_last"):
            flat = LAYOUTS[layout](torch.empty(2, 14, 3, 5, device="meta"))
            plan = on_host.plan(flat, y.expand(2, 3, 5), n_bins=n_bins)
            assert plan.transposed == (layout == "channels_last")
            size = [2048 * n_bins, 16 * n_bins, 0][plan.bins_in]
            assert plan.shared_bytes == 8 * 6 * 8 + size + (256 * 17 * 4 if plan.transposed else 0)
            assert plan.shared_bytes <= 227 * 1024
    assert [of(1, 14, 9, n_bins=n).bins_in for n in (36, 40, 14000, 15000)] == [COLUMNS, SHARED, SHARED, GLOBAL]


def test_items_that_are_one(on_host):
    """Items that follow one another in scores and labels are merged. Others are not, and none with per_item."""
    x, y = scores(3, 5, 4, 7), labels((3, 5, 4, 7))
    last = LAYOUTS["channels_last"](x)
    plan = on_host.plan(last, y)
    assert (plan.N, plan.S, plan.score_stride, plan.label_stride) == (1, 84, 5, 1)
    assert on_host.plan(last, y, per_item=True)[:2] == (3, 28)
    assert on_host.plan(x, y)[:2] == (3, 28)
    assert on_host.plan(last, labels((3, 5, 6, 7))[:, :4])[:2] == (3, 28)
    rows = scores(9, 5, 1)
    plan = on_host.plan(rows, labels((9, 5, 1)))
    assert (plan.N, plan.S, plan.score_stride, plan.label_stride) == (1, 9, 5, 1)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_as_bits(on_host, dtype):
    """Labels are compared by value, so a negative label is not a class, although its bits are a large number."""
    info = torch.iinfo(dtype)
    x = torch.empty(1, 300, 4, device="meta")
    for ignore_index in (-1, 0, 255, 259, -129, 2**31, 2**40, info.min, min(info.max, 2**63 - 1)):
        plan = on_host.plan(x, torch.empty(1, 4, dtype=dtype, device="meta"), ignore_index=ignore_index)
        assert plan.classes == min(300, info.max + 1)
        assert bool(plan.ignores) == (info.min <= ignore_index <= info.max)
        if plan.ignores:
            assert plan.ignored % 2**info.bits == ignore_index % 2**info.bits


# ---- faults, sizes, devices ----


def test_the_first_of_many_faults(on_host):
    shape = (2, 3, 3000)
    p, target = calibration.probabilities(*shape), labels(shape, dtype=torch.int8)
    bad = target.clone()
    bad[1, 100] = bad[0, 2500:] = -3
    bad[1, 5] = 3
    for per_item in (False, True):
        with pytest.raises(IndexError, match=r"target\[0, 2500\] is -3: wanted a class in \[0, 3\)"):
            calseg.calibration_bins(p, bad, from_logits=False, per_item=per_item, backend="cuda")
        with pytest.raises(IndexError, match=r"target\[1, 5\] is 3"):
            calseg.calibration_bins(p, bad, from_logits=False, ignore_index=-3, per_item=per_item, backend="cuda")
        wrong = p.clone()
        wrong[1, 0, 70], wrong[0, 2, 2999] = -0.5, 1e30
        with pytest.raises(ValueError, match=r"\[0, .*2999\]"):
            calseg.calibration_bins(wrong, target, from_logits=False, per_item=per_item, backend="cuda")


MAP_NORESERVE = 0x4000  # Linux; Python has no name for it


def sparse(dtype: torch.dtype, elements: int) -> torch.Tensor:
    """Return zeros that take memory only where they are written."""
    size = elements * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=dtype)


@pytest.mark.parametrize("strides", [(2**32 + 5, 2**31 + 3, 7), (2**31 + 100, 1, 2**28 + 1), (7, 2**32, 2**30 + 1)])
@pytest.mark.parametrize("C", [2, 5])
def test_strides_past_two_to_the_31(on_host, strides, C):
    """Offsets of scores, labels and mask have 64 bits."""
    shape = (2, C, 3)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    x = sparse(torch.bfloat16, extent).as_strided(shape, strides)
    x.copy_(scores(*shape))
    target = sparse(torch.uint8, 2**31 + 2**32 + 6).as_strided((2, 3), (2**31 + 5, 2**31)).copy_(labels(shape))
    mask = sparse(torch.bool, 2**31 + 2**32 + 6).as_strided((2, 3), (2**31 + 5, 2**31)).fill_(True)
    mask[1, 2] = False
    for kind in KINDS:
        got = calseg.calibration_bins(x, target, mask=mask, backend="cuda", **kind)
        wanted = calseg.calibration_bins(
            x.contiguous(), target.contiguous(), mask=mask.contiguous(), backend="cuda", **kind
        )
        assert_same_bins(got, wanted)


def test_more_than_two_to_the_31_voxels(on_host):
    """The last block of a large volume counts its voxels, and reports the position of a fault."""
    size = 2**31 + 2**20 + 77
    x, target = sparse(torch.bfloat16, 2 * size).view(1, 2, size), sparse(torch.uint8, size).view(1, size)
    x[..., -5:] = scores(1, 2, 5)
    target[0, -1] = 9
    on_host.set_limits(Limits(multiprocessors=132))
    plan = on_host.plan(x, target)
    first = (plan.blocks_per_group - 1) * plan.tiles_per_group // plan.blocks_per_group * 1024
    on_host.set_limits(Limits(multiprocessors=132, first_block=plan.blocks_per_group - 1))
    with pytest.raises(IndexError, match=rf"target\[0, {size - 1}\] is 9"):
        calseg.calibration_bins(x, target, backend="cuda")
    target[0, -1] = 1
    got = calseg.calibration_bins(x, target, backend="cuda")
    assert int(got.num_voxels) == size - first
    on_host.set_limits(Limits())
    tail = calseg.calibration_bins(x[..., first:], target[..., first:], backend="cuda")
    assert_same_bins(got, tail)


def test_devices_and_errors(on_host, monkeypatch):
    """The device of a call is current only during the launch, and errors hold the text of CUDA."""
    x, target = torch.zeros(1, 2, 5), torch.zeros(1, 5, dtype=torch.uint8)
    monkeypatch.setattr(cuda, "_device_and_stream", lambda tensor: (1, 77))
    calseg.calibration_bins(x, target, backend="cuda")
    assert on_host.last_launch()[2:] == (1, 0)
    monkeypatch.setattr(cuda, "_device_and_stream", lambda tensor: (2, 0))
    with pytest.raises(RuntimeError, match="calibration_bins on CUDA: invalid device ordinal"):
        calseg.calibration_bins(x, target, backend="cuda")
    assert on_host.last_launch().current_device == 0


def test_the_emulation_sees_wrong_kernels(on_host):
    reasons = [on_host.library.run_wrong_kernel(which).decode() for which in range(5)]
    wanted = ("__syncthreads is not reached by all", "__ballot_sync is not reached by all", "meets",
              "__ballot_sync is not for the whole warp", "")  # fmt: skip
    for reason, text in zip(reasons, wanted, strict=True):
        assert text in reason
        assert bool(text) == bool(reason)


@settings(max_examples=40)
@given(data=st.data())
def test_any_arguments(library, data):
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_up(library, monkeypatch)
        draw = data.draw
        library.set_limits(Limits(shared_per_block=draw(st.sampled_from((24, 48, 227)), label="KiB") * 1024))
        calibration.test_any_arguments.hypothesis.inner_test("cuda", data)


# ---- the choice of the backend ----


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, architectures: list[str], capability: tuple[int, int]) -> SimpleNamespace:
    """Return an object that looks like a tensor on a GPU, for a build with these architectures."""
    monkeypatch.setattr(native, "extension", SimpleNamespace(CUDA_ARCHITECTURES=architectures))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda, "run_on_nothing", lambda device: None)
    cuda.refusal.cache_clear()
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, is_cuda=True)


def test_default_backend(monkeypatch):
    """The default is the CUDA kernel if it is built for the device, else Triton, else the reference, with a warning."""
    x = on_a_gpu(monkeypatch, ["80-real"], (9, 0))
    monkeypatch.setattr(choice, "TRITON_ERROR", None)
    choose = lambda x, backend=None: choice.choose(x, backend, "calibration_bins")  # noqa: E731
    assert choose(x) == choose(x, "cuda") == "cuda"
    assert choose(x, "triton") == choice.choose(x, None) == "triton"
    wide = SimpleNamespace(**{**vars(x), "dtype": torch.float64})
    assert choose(wide) == choose(wide, "cuda") == "reference"
    old = on_a_gpu(monkeypatch, ["80-real"], (7, 5))
    assert choose(old) == "triton"
    with pytest.raises(RuntimeError, match=r"cuda:0 has compute capability 7\.5, wanted 8\.0 or more"):
        choose(old, "cuda")
    without = on_a_gpu(monkeypatch, [], (9, 0))
    assert choose(without) == "triton"
    with pytest.raises(RuntimeError, match="backend='cuda': calseg was built without CUDA: reinstall with nvcc"):
        choose(without, "cuda")
    monkeypatch.setattr(choice, "TRITON_ERROR", "Triton is not installed: pip install triton")
    monkeypatch.setattr(choice, "_warned", set())
    with pytest.warns(RuntimeWarning, match="pip install triton; on cuda the slow reference backend"):
        assert choose(without) == "reference"


def test_a_driver_that_is_too_old(monkeypatch):
    """Triton takes the calls of a device that the CUDA runtime of the extension cannot use, and it is asked once."""
    x, asked = on_a_gpu(monkeypatch, ["80-real"], (9, 0)), []

    def refuse(device):
        asked.append(device)
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(cuda, "run_on_nothing", refuse)
    monkeypatch.setattr(choice, "TRITON_ERROR", None)
    for _ in range(2):
        assert choice.choose(x, None, "calibration_bins") == "triton"
        with pytest.raises(RuntimeError, match="backend='cuda': cuda:0: CUDA driver version is insufficient"):
            choice.choose(x, "cuda", "calibration_bins")
    assert asked == [x.device]
    cuda.refusal.cache_clear()


def test_operations_without_a_cuda_kernel():
    x, y = scores(1, 3, 5), labels((1, 3, 5))
    for call in (calseg.vls_cross_entropy, calseg.ace_loss):
        with pytest.raises(ValueError, match="backend='cuda': only calibration_bins has a CUDA kernel"):
            call(x, y, backend="cuda")


def test_on_a_cpu_tensor(monkeypatch):
    monkeypatch.setattr(native, "extension", SimpleNamespace(CUDA_ARCHITECTURES=["80-real"]))
    with pytest.raises(ValueError, match="backend='cuda': got a tensor on cpu, wanted one on a CUDA device"):
        calseg.calibration_error(scores(1, 3, 5), labels((1, 3, 5)), backend="cuda")


# ---- machine code ----

CUOBJDUMP = shutil.which("cuobjdump")
if CUOBJDUMP is None and choice.TRITON_ERROR is None and (spec := find_spec("triton")) is not None:
    CUOBJDUMP = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
built = pytest.mark.skipif(not (native.extension and native.extension.CUDA_ARCHITECTURES), reason="built without CUDA")


# the name of a kernel -> its instantiations, the threads of a block, the least number of blocks of a multiprocessor
RESOURCES = {
    "calibration_bins": (24, 256, 3),  # three dtypes, 4 and 16 classes, logits or probabilities, top label or classes
    "cross_entropy_few": (18, 128, 7),  # three dtypes; 2, 3 and 4 classes, adjacent or not
    "cross_entropy_rows": (24, 128, 10),  # three dtypes, 1, 2, 4 and 8 classes at once, plain or not
    "overlap_few": (36, 128, 7),  # as cross_entropy_few, in two passes
    "overlap_tiles": (12, 128, 8),  # two dtypes; 1, 2 and 4 parts; in two passes
}


@built
@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump")
@pytest.mark.parametrize("kernel", RESOURCES)
def test_nothing_spills(kernel):
    """No kernel uses stack, and all have few enough registers for as many blocks as they say."""
    instantiations, threads, blocks = RESOURCES[kernel]

    def dump(option: str) -> str:
        command = [CUOBJDUMP, option, native.extension.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    architectures = {}
    for part in dump("--dump-resource-usage").split("arch = ")[1:]:
        numbers = re.findall(rf"Function \S*{kernel}\S*:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part)
        architectures.setdefault(part.split()[0], []).extend(tuple(map(int, each)) for each in numbers)
    kernels = {name: rows for name, rows in architectures.items() if rows}
    assert kernels.keys() == {"sm_80", "sm_90"}
    for rows in kernels.values():
        assert len(rows) == instantiations
        for registers, stack, shared, local in rows:
            assert registers <= 65536 // (blocks * threads) // 8 * 8
            assert stack == local == 0
            assert shared <= 1024  # CUDA's own on sm_90; all that the kernel uses is dynamic
    assert "sm_80.ptx" in dump("--list-ptx")


@built
def test_loads_without_a_driver():
    """The extension loads without CUDA: the runtime is linked in, and the driver is loaded when it is first used."""
    done = subprocess.run(["ldd", native.extension.__file__], capture_output=True, text=True, check=True)
    assert "cuda" not in done.stdout
    assert calseg.info()["cuda_architectures"] == ["80-real", "90-real", "80-virtual"]
    if not torch.cuda.is_available():
        x, y = torch.zeros(1, 2, 5), torch.zeros(1, 5, dtype=torch.uint8)
        spec = BinsSpec(Labels(y, -100), None, 15, 0, True, False, False, False, False, 0.1)
        with pytest.raises(ValueError, match="wanted a tensor on a CUDA device"):
            native.extension.cuda_calibration_bins(x, spec, None, None, None, 0, 0)
