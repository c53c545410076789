// What calibration_bins and ace_moments share.
#pragma once

#include "cpu/tile.h"
#include "cpu/vector_math.h"
#include "voxel/calibration.h"

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace calseg {
namespace CALSEG_ISA {
namespace {

CALSEG_INLINE void atomic_add(int64_t* to, int64_t value) {
#if defined(__GNUC__)
    __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
#else
    _InterlockedExchangeAdd64(to, value);
#endif
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
