// Merging of batch items, which turns many short items into one long one.
#pragma once

#include "host/tensor_view.h"

namespace calseg {

// Merges all batch items into one, if in every tensor each item follows the one before it in memory. The voxels keep their
// numbers.
inline void merge_items(Shape& shape, TensorView* const* views, int count) {
    if (shape.S == 1) {
        for (int i = 0; i < count; ++i) views[i]->stride_s = views[i]->stride_n;
    } else if (shape.N != 1) {
        for (int i = 0; i < count; ++i)
            if (*views[i] && views[i]->stride_n != shape.S * views[i]->stride_s) return;
    }
    for (int i = 0; i < count; ++i) views[i]->stride_n = 0;
    shape.S *= shape.N;
    shape.N = 1;
}

}  // namespace calseg
