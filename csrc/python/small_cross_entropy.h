// Cross-entropy of a small input, the call that training makes most often: the tensors are read here, not in Python, for
// computing takes a fraction of what it takes to get there.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace calseg {

// (loss, gradient or None); None where anything is out of the ordinary, for the general way to do it or to say what is
// wrong: only dense float32 and float64 on the CPU with class indices that fit, below kPooledBytes.
pybind11::object small_cross_entropy(pybind11::handle logits, pybind11::handle target, pybind11::handle ignore_index,
                                     pybind11::handle reduction, pybind11::handle label_smoothing, bool with_gradient, int num_threads);

}  // namespace calseg
