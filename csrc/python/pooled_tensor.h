// Tensors in pooled memory, which PyTorch receives as DLPack capsules.
//
// The capsules have the layout of DLPack 0.x, which every version of PyTorch accepts.
#pragma once

#include <pybind11/pybind11.h>

namespace calseg {

// Returns an uninitialised CPU tensor of a floating-point dtype, or None if the pool has no memory.
pybind11::object empty_pooled(pybind11::handle dtype, const pybind11::tuple& sizes, const pybind11::tuple& strides);

}  // namespace calseg
