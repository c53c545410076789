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

// Returns the class of a label, kSkipped or kNoClass, given its bits.
CALSEG_INLINE int32_t class_of(uint64_t bits, const LabelRange& range) {
    if (range.ignores && bits == range.ignored) return kSkipped;
    return bits >= range.classes ? kNoClass : static_cast<int32_t>(bits);
}

// Reads the label of a voxel. Returns its class, kSkipped or kNoClass.
CALSEG_INLINE int32_t load_label(const TensorView& labels, const LabelRange& range, int64_t n, int64_t s) {
    const int64_t at = n * labels.stride_n + s * labels.stride_s;
    uint64_t bits = 0;
    switch (range.bytes) {
        case 1:
            bits = static_cast<const uint8_t*>(labels.data)[at];
            break;
        case 2:
            bits = static_cast<const uint16_t*>(labels.data)[at];
            break;
        case 4:
            bits = static_cast<const uint32_t*>(labels.data)[at];
            break;
        default:
            bits = static_cast<const uint64_t*>(labels.data)[at];
    }
    return class_of(bits, range);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
