// Blending of estimated soft labels with one-hot labels.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Turns each estimate of a block into alpha * scale * estimate + (1 - alpha) * onehot(label), and into 0 where ignored.
template <class T>
CALSEG_INLINE void blend_block(const int32_t* labels_of, T* block, int64_t C, T alpha, T scale) {
    const I<T> labels = load<I<T>>(labels_of);
    const auto ignored = less(labels, broadcast<I<T>>(0));
    const F<T> on_estimate = broadcast<F<T>>(alpha * scale), on_label = broadcast<F<T>>(T(1) - alpha), none = zero<T>();
    for (int64_t c = 0; c < C; ++c) {
        const F<T> hard = select(equal(labels, broadcast<I<T>>(static_cast<int32_t>(c))), on_label, none);
        const F<T> blended = on_estimate * load<F<T>>(block + c * kLanes) + hard;
        store(block + c * kLanes, select(ignored, none, blended));
    }
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
