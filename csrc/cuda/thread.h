// What a thread of a GPU does in every kernel: it finds its place, and reads labels.
#pragma once

#include "cuda/device.h"
#include "cuda/plan.h"
#include "cuda/scalar.h"
#include "voxel/labels.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

CALSEG_INLINE int lane() { return static_cast<int>(threadIdx.x % kCudaWarp); }
CALSEG_INLINE int warp() { return static_cast<int>(threadIdx.x / kCudaWarp); }

// Adds K numbers, a power of two, over the lanes of a warp. Returns the sum of number `lane() / (kCudaWarp / K)`. In each step
// a lane keeps half of its numbers and hands the others to the lane that keeps them.
template <int K>
CALSEG_INLINE float sum_over_lanes(float (&x)[K]) {
    int step = kCudaWarp / 2;
#pragma unroll
    for (int half = K / 2; half > 0; half /= 2) {
        const bool is_upper = lane() & step;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float kept = is_upper ? x[i + half] : x[i], sent = is_upper ? x[i] : x[i + half];
            x[i] = kept + __shfl_xor_sync(kAllLanes, sent, step);
        }
        step /= 2;
    }
    float sum = x[0];
#pragma unroll
    for (int by = kCudaWarp / K / 2; by > 0; by /= 2) sum += __shfl_xor_sync(kAllLanes, sum, by);
    return sum;
}

// Returns the class of a label, kSkipped or kNoClass, given its bits.
CALSEG_INLINE int32_t class_of(uint64_t bits, const LabelRange& range) {
    if (range.ignores && bits == range.ignored) return kSkipped;
    return bits >= range.classes ? kNoClass : static_cast<int32_t>(bits);
}

// Reads the labels of V voxels, which are s, s + kStep and so on. Each becomes its class, kSkipped or kNoClass. A place from
// `end` on is skipped.
template <int V, int kStep>
CALSEG_INLINE void load_labels(int32_t (&label)[V], const TensorView& labels, const LabelRange& range, int64_t n, int64_t s, int64_t end) {
    uint64_t bits[V];
    const auto read = [&](auto* data) {
        const auto* from = data + (n * labels.stride_n + s * labels.stride_s);
#pragma unroll
        for (int v = 0; v < V; ++v, from += kStep * labels.stride_s) bits[v] = s + v * kStep < end ? *from : 0;
    };
    switch (range.bytes) {
        case 1:
            read(static_cast<const uint8_t*>(labels.data));
            break;
        case 2:
            read(static_cast<const uint16_t*>(labels.data));
            break;
        case 4:
            read(static_cast<const uint32_t*>(labels.data));
            break;
        default:
            read(static_cast<const uint64_t*>(labels.data));
    }
#pragma unroll
    for (int v = 0; v < V; ++v) label[v] = s + v * kStep < end ? class_of(bits[v], range) : kSkipped;
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
