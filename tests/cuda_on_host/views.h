// Tensors as plain integers.
#pragma once

#include <cstdint>

#include "host/tensor_view.h"

namespace {

// Reads [data, dtype, stride_n, stride_c, stride_s]. Null leaves the view absent.
void read_view(const int64_t* from, calseg::TensorView& to) {
    if (!from) return;
    to.data = reinterpret_cast<void*>(from[0]), to.dtype = static_cast<calseg::DType>(from[1]);
    to.stride_n = from[2], to.stride_c = from[3], to.stride_s = from[4];
}

}  // namespace
