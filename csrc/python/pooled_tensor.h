// A tensor over pooled memory, handed to PyTorch as a DLPack capsule (the layout of DLPack 0.x, which every torch takes).
#pragma once

#include <pybind11/pybind11.h>

namespace calseg {

// An uninitialised CPU tensor of a floating dtype; None where the memory is not to be had from the pool.
pybind11::object empty_pooled(pybind11::handle dtype, const pybind11::tuple& sizes, const pybind11::tuple& strides);

}  // namespace calseg
