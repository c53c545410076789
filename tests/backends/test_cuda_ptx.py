"""The CUDA kernels as nvcc compiles them, in the interpreter of PTX. test_cuda.py runs their source on the CPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import test_calibration as calibration
import torch
from cases import LAYOUTS, assert_same_bins, id_of, labels
from ptx.execution import run, span_of
from ptx.parser import PtxError, names_of
from test_cuda import COLUMNS, GLOBAL, KEPT, LOW, ROOT, SHARED, Limits, OnHost, call_of, set_up, write_specs
from test_cuda import library as library  # the fixture

import calseg

pytestmark = pytest.mark.timeout(300)

TYPES = {torch.float32: "f", torch.bfloat16: r"NS\w*_4BF16E", torch.float16: r"NS\w*_3F16E"}
RESIDENT = 3


class OnPtx(OnHost):
    """Stand-in for :mod:`calseg._native` that runs the PTX of kernels/calibration_bins.cu."""

    def __init__(self, host: OnHost, text: str) -> None:
        self.library, self.text = host.library, text

    def cuda_calibration_bins(self, scores, spec, sums, totals, faults, device, stream):
        call, read = call_of(spec, scores), KEPT[-3:]
        plan, results = self.plan_of(call, RESIDENT), (sums, totals, faults)
        blocks = plan.groups * plan.blocks_per_group
        if blocks == 0:
            return
        to = (ctypes.c_ubyte * 1024)()
        size = self.library.launch_bytes(
            ctypes.byref(call), ctypes.c_double(spec.tolerance),
            *(ctypes.c_void_p(each.data_ptr()) for each in results), ctypes.c_int64(RESIDENT), to,
        )  # fmt: skip
        held = plan.classes_held
        name = rf"I{TYPES[scores.dtype]}Li{held}ELi\d+ELb{int(spec.from_logits)}ELb{int(spec.class_wise)}EE"
        (entry,) = (entry for entry in names_of(self.text) if re.search(name, entry))
        spans = [span_of(tensor) for tensor in (*read, *results) if tensor is not None]
        run(self.text, bytes(to[:size]), blocks, spans, name=entry, shared_bytes=plan.shared_bytes)


def ptx_of(name: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the PTX of a file of CUDA kernels."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp(name)
    write_specs(folder)
    command = [nvcc, "-ptx", "-arch=compute_80", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    source, to = ROOT / "kernels" / f"{name}.cu", folder / f"{name}.ptx"
    done = subprocess.run([*command, str(source), "-o", str(to)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return to.read_text()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = ptx_of("calibration_bins", tmp_path_factory)
    assert len(names_of(text)) == 24  # three dtypes, 4 and 16 classes, logits or probabilities, top label or classes
    return text


@pytest.fixture
def on_ptx(compiled: str, library: OnHost, monkeypatch: pytest.MonkeyPatch) -> OnPtx:
    machine = OnPtx(library, compiled)
    set_up(machine, monkeypatch)
    return machine


# name -> (options, kilobytes of shared memory of a block, where bins are added up)
PLACES = {
    "columns": ({"n_bins": 15}, 227, COLUMNS),
    "shared": ({"n_bins": 200}, 227, SHARED),
    "global": ({"n_bins": 4096}, 48, GLOBAL),
    "class-wise": ({"n_bins": 15, "class_wise": True}, 227, SHARED),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("C", [3, 21])
@pytest.mark.parametrize("place", PLACES)
def test_places(on_ptx, place, C, layout):
    """With several blocks, and bins in any memory, probabilities give the integers of the reference."""
    options, kilobytes, wanted_place = PLACES[place]
    shape = (2, C, 3, 83) if C > 16 else (2, C, 11, 83)
    p, target = LAYOUTS[layout](calibration.probabilities(*shape)), labels(shape, ignore_index=-100)
    on_ptx.set_limits(Limits(shared_per_block=kilobytes * 1024, multiprocessors=1))
    first_class = 0 if options.get("class_wise") else None
    plan = on_ptx.plan(p, target, n_bins=options["n_bins"], first_class=first_class, resident=RESIDENT)
    if (place, C) != ("class-wise", 3):
        assert plan.bins_in == wanted_place
    got, wanted = (calseg.calibration_bins(p, target, from_logits=False, backend=backend, **options)
                   for backend in ("cuda", "reference"))  # fmt: skip
    assert_same_bins(got, wanted, units=4 + C // 8)


@pytest.mark.parametrize("kind", [{}, {"class_wise": True}], ids=["top", "classes"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=id_of)
def test_logits(on_ptx, dtype, kind):
    """The bins of logits are those of float64, but for voxels at an edge. The rest of the integers are equal."""
    for C in (2, 17):
        calibration.test_logits_against_float64("cuda", dtype, C, kind)


def test_faults_and_items(on_ptx):
    """A label out of range and scores that are no probabilities are found; items are added up on their own."""
    shape = (2, 3, 1500)
    p, target = calibration.probabilities(*shape), labels(shape, dtype=torch.int8)
    got, wanted = (calseg.calibration_bins(p, target, from_logits=False, per_item=True, backend=backend)
                   for backend in ("cuda", "reference"))  # fmt: skip
    assert_same_bins(got, wanted, units=4)
    target[1, 5] = 3
    with pytest.raises(IndexError, match=r"target\[1, 5\] is 3"):
        calseg.calibration_bins(p, target, from_logits=False, backend="cuda")
    p[0, 2, 1400] = 1e30
    with pytest.raises(ValueError, match=r"\[0, .*1400\]"):
        calseg.calibration_bins(p, target.clamp(max=2), from_logits=False, backend="cuda")


def test_a_mask_of_a_stride(on_ptx):
    shape = (2, 5, 9, 31)
    p, target = calibration.probabilities(*shape), labels(shape)
    mask = torch.rand(2, 9, 31, 3, generator=torch.Generator().manual_seed(2))[..., 1] < 0.4
    got, wanted = (calseg.calibration_bins(p, target, from_logits=False, mask=mask, backend=backend)
                   for backend in ("cuda", "reference"))  # fmt: skip
    assert_same_bins(got, wanted, units=4)


@pytest.mark.parametrize("barrier", [r"bar\.sync \s*0", r"bar\.warp\.sync \s*-1"], ids=["block", "warp"])
def test_a_missing_barrier(on_ptx, barrier):
    """Without the barriers of the block, or those of the warps in a transposed read, there is a race."""
    p, target = LAYOUTS["channels_last"](calibration.probabilities(1, 5, 9, 31)), labels((1, 5, 9, 31))
    calls = lambda: calseg.calibration_bins(p, target, from_logits=False, n_bins=200, backend="cuda")  # noqa: E731
    calls()
    on_ptx.text = re.sub(barrier + ";", ";", on_ptx.text)
    with pytest.raises(PtxError, match="race in shared memory"):
        calls()
