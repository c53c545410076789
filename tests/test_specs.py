"""Tests of the specs: equal fields in Python and C++, packing, and equal functions in all backends."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import get_type_hints

import pytest
import torch

from calseg import native, operations
from calseg.backends import choice
from calseg.operations import AceSpec, BinsSpec, BlendSpec, GaussianTensors, Labels, LossSpec, LossTensors, Sampling
from calseg.packing import pack, unpack

STRUCTURES = {name: kind for name, kind in vars(operations).items() if hasattr(kind, "_fields")}
NOT_IN_CPP = {"operation", "dtype"}
LABELS = Labels(torch.tensor([[0, 1]]), -100)
EXAMPLES = [
    LABELS,
    Sampling(3, 0.5, 0.1, -1.0, 2.0, seed=2**64 - 1),
    Sampling(seed=torch.tensor(7)),
    LossTensors(torch.zeros(1, 2, 2), None, torch.ones(1, 2, 2), None),
    LossSpec("vls_elbo", LABELS, torch.ones(2), "sum", torch.bfloat16, 0.1, 0.3, Sampling(2, seed=-5)),
    LossSpec("gaussian_kl", None, None, "none", torch.float64),
    GaussianTensors(torch.zeros(2), None),
    BlendSpec(None, 0.25, 3),
    BinsSpec(LABELS, torch.ones(1, 2, dtype=torch.uint8), 15, 1, True, False, True, False, True, 1e-3),
    AceSpec(LABELS, 20, 1, True),
]


@pytest.mark.skipif(native.extension is None, reason="no native engine")
def test_cpp_has_the_same_fields():
    """C++ has the fields of Python in the same order, except for those that it does not use."""
    wanted = {name: [f for f in kind._fields if f not in NOT_IN_CPP] for name, kind in STRUCTURES.items()}
    assert wanted == native.extension.FIELDS


@pytest.mark.skipif(native.extension is None, reason="no native engine")
def test_cpp_refuses_other_fields():
    """A spec with other fields, as from another version of calseg, raises an error."""
    with pytest.raises(TypeError, match="the fields of LossTensors differ; build it again"):
        native.extension.cross_entropy(LABELS, None, None, None, None)


def assert_same(got, wanted):
    assert type(got) is type(wanted)
    for mine, other in zip(got, wanted, strict=True):
        if isinstance(other, torch.Tensor):
            assert mine is other
        elif hasattr(other, "_fields"):
            assert_same(mine, other)
        elif isinstance(other, int) and not isinstance(other, bool):
            assert (mine - other) % 2**64 == 0  # a seed comes back as the int64 of its bits
        else:
            assert mine == other


@pytest.mark.parametrize("structure", EXAMPLES, ids=lambda s: type(s).__name__)
def test_packing(structure):
    (got,) = unpack((type(structure),), pack(structure))
    assert_same(got, structure)


def test_packing_of_several():
    for got, wanted in zip(unpack(tuple(map(type, EXAMPLES)), pack(*EXAMPLES)), EXAMPLES, strict=True):
        assert_same(got, wanted)


FACES = ["cpu"] if choice.TRITON_ERROR else ["cpu", "triton"]


def face(backend: str) -> dict[str, inspect.Signature]:
    """Return the functions of a backend that take a spec."""
    module = choice.engine(backend)
    own = {
        name: inspect.signature(value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    return {name: signature for name, signature in own.items() if next(iter(signature.parameters), "") == "spec"}


@pytest.mark.parametrize("backend", FACES)
def test_the_reference_has_what_the_backends_have(backend):
    """The reference has the functions of the other backends, except for gradients, which autograd computes."""
    reference, mine = face("reference"), face(backend)
    of_gradients = ("ace_moments", "bins_of_moments", "loss_and_corrections")
    shared = {name for name in mine if not name.endswith("_backward") and name not in of_gradients}
    assert shared <= reference.keys()
    assert {"loss", "sample_soft_labels", "accumulate_softmax", "blend_soft_labels", "calibration_bins"} <= shared
    for name in shared:
        parameters = list(reference[name].parameters)
        assert list(mine[name].parameters)[: len(parameters)] == parameters, name


@pytest.mark.skipif(len(FACES) < 2, reason="no Triton")
def test_the_engines_have_one_face():
    cpu, triton = face("cpu"), face("triton")
    for name in triton:
        assert list(cpu[name].parameters) == list(triton[name].parameters), name


def test_cuda_has_its_operations():
    assert face("cuda").keys() == set(choice.IN_CUDA)
    for name, signature in face("cuda").items():
        assert list(signature.parameters) == list(face("cpu")[name].parameters)


def test_every_loss_is_in_every_backend():
    from calseg.backends import reference

    assert len(reference.LOSSES) >= 4
    for name in reference.LOSSES:
        assert native.extension is None or callable(getattr(native.extension, name))
        if choice.TRITON_ERROR is None:
            kernel = import_module(f"calseg.kernels.{name}")
            assert callable(kernel.tile_demands)
            assert callable(kernel.launch)


def test_hints_resolve():
    """All type hints of the specs can be resolved, so that an unknown type shows here."""
    for kind in STRUCTURES.values():
        assert list(get_type_hints(kind)) == list(kind._fields)
