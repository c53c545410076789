// Keys of compiled Triton kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace calseg {

// Adds to a key what Triton looks at to find the kernel that it compiled for arguments of this kind: dtype and alignment of a
// tensor, that a number is a float, other values. Integers are told apart by their values, more than Triton does, for it asks
// whether they are 1 or multiples of 16.
void add_to_launch_key(const pybind11::tuple& arguments, const pybind11::list& key);

}  // namespace calseg
