"""The CUDA kernels of cross-entropy without a GPU: what stands in place of the extension in their tests."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ptx.execution import run, span_of
from ptx.parser import PtxError, names_of
from test_cuda import compiled_for_host, view_of
from test_cuda_ptx import TYPES

from calseg import native, tensors
from calseg.backends import choice, cuda

if choice.TRITON_ERROR is None:
    from calseg.backends import triton as engine

MARKS = [
    pytest.mark.skipif(choice.TRITON_ERROR is not None, reason=str(choice.TRITON_ERROR)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU"),
    pytest.mark.timeout(300),
]

Pointer = ctypes.POINTER(ctypes.c_int64)


class Call(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("shape", "logits", "gradient", "labels", "grad_output", "loss")),
        *((name, ctypes.c_void_p) for name in ("weight", "factor", "divisor")),
        *((name, ctypes.c_void_p) for name in ("partials", "counts", "overlap", "slopes")),
        ("ignore_index", ctypes.c_int64), ("scale", ctypes.c_double), ("label_smoothing", ctypes.c_double),
    ]  # fmt: skip


class Machine:
    """Stand-in for :mod:`calseg._native`, whose kernels of cross-entropy run on the CPU. The rest is the extension's.

    ``launches`` has the blocks of every launch.
    """

    CUDA_ARCHITECTURES = ("on a CPU",)

    def __init__(self, extension: object, library: ctypes.CDLL) -> None:
        self.extension, self.library, self.launches = extension, library, []
        library.cross_entropy.restype = ctypes.c_char_p
        library.launch_bytes.restype = ctypes.c_int64

    def __getattr__(self, name: str) -> object:
        return getattr(self.extension, name)

    def cuda_cross_entropy(
        self, given, spec, gradients, grad_output, loss, factor, divisor, partials, counts, overlap, slopes, blocks,
        device, stream,
    ):  # fmt: skip
        assert (device, stream) == (0, 0)
        weight = None if spec.weight is None else spec.weight.double().contiguous()
        views = [(given.logits, True), (gradients.logits, True), (spec.labels.tensor, False), (grad_output, False),
                 (loss, False)]  # fmt: skip
        arrays = [tensors.shape_of(given.logits), *(view_of(tensor, channels) for tensor, channels in views)]
        pointers = [None if values is None else (ctypes.c_int64 * len(values))(*values) for values in arrays]
        numbers = [weight, factor, divisor, partials, counts, overlap, slopes]
        for tensor, dtype in zip(numbers, [torch.float64, *[torch.float32] * 5, torch.float64], strict=True):
            assert tensor is None or (tensor.dtype == dtype and tensor.is_contiguous())
        places = [None if tensor is None else tensor.data_ptr() for tensor in numbers]
        call = Call(
            *(ctypes.cast(pointer, Pointer) for pointer in pointers), *places, spec.labels.ignore_index, spec.scale,
            spec.label_smoothing,
        )  # fmt: skip
        used = [tensor for tensor, _ in views] + numbers
        self.launches.append(blocks)
        self.launch(call, given.logits.dtype, blocks, [tensor for tensor in used if tensor is not None])

    def launch(self, call: Call, dtype: torch.dtype, blocks: int, used: list[torch.Tensor]) -> None:
        problem = self.library.cross_entropy(ctypes.byref(call))
        if problem is not None:
            raise RuntimeError(problem.decode())


class OnPtx(Machine):
    """Does the same with the PTX of a kernel."""

    text = ""

    def launch(self, call: Call, dtype: torch.dtype, blocks: int, used: list[torch.Tensor]) -> None:
        to, plan = (ctypes.c_ubyte * 4096)(), (ctypes.c_int64 * 8)()
        size = self.library.launch_bytes(ctypes.byref(call), plan, to)
        planned, shared_bytes, vector, plain, few, in_rows, of_pass, parts = plan
        assert planned == blocks
        kernel = ["cross_entropy", "overlap", "overlap_gradient"][of_pass]
        kernel += "_few" if few else "_tiles" if of_pass else "_rows"
        numbers = (call.shape[1], in_rows) if few else (parts,) if of_pass else (vector, plain)
        instance = f"Li{numbers[0]}E" + "".join(f"Lb{flag}E" for flag in numbers[1:])
        name = rf"\d{kernel}I{TYPES[dtype]}{instance}E"
        (entry,) = (entry for entry in names_of(self.text) if re.search(name, entry))
        run(self.text, bytes(to[:size]), blocks, list(map(span_of, used)), name=entry, shared_bytes=shared_bytes)

    def assert_found(
        self, fault: tuple[str, str], call: Callable[[], object], error: Any = PtxError, match: str | None = None
    ) -> None:  # fmt: skip
        """Check that a call works, and that it raises an error with a fault in the PTX: what stands there, and what
        takes its place.
        """
        call()
        self.text, changes = re.subn(*fault, self.text)
        assert changes
        with pytest.raises(error, match=match):
            call()


def set_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Let the Triton backend launch the kernel for CPU tensors, in calls of any size."""
    monkeypatch.setattr(native, "extension", machine)
    monkeypatch.setattr(cuda, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda, "FEWEST_ROWS", 1)
    monkeypatch.setattr(cuda, "AT_ONCE_VOXELS", 0)
    monkeypatch.setattr(cuda, "FEWEST_IN_TILES", 1)
    monkeypatch.setattr(cuda, "_device_and_stream", lambda tensor: (0, 0))
    monkeypatch.setattr(engine, "_plans", {})
    return machine


# ---- fixtures, which a file of tests imports. It has one of its own: ``compiled``, the PTX of its kernel ----


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Return the kernels, compiled for the CPU."""
    return ctypes.CDLL(str(compiled_for_host("cross_entropy.cpp", tmp_path_factory)))


@pytest.fixture
def on_host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return set_up(Machine(native.extension, library), monkeypatch)


@pytest.fixture
def on_ptx(library: ctypes.CDLL, compiled: str, monkeypatch: pytest.MonkeyPatch) -> OnPtx:
    machine = OnPtx(native.extension, library)
    machine.text = compiled
    return set_up(machine, monkeypatch)


@pytest.fixture(params=["host", "ptx"])
def machine(request: pytest.FixtureRequest) -> Machine:
    return request.getfixturevalue(f"on_{request.param}")
