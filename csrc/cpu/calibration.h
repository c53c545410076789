// What calibration_bins and ace_moments share.
#pragma once

#include "cpu/tile.h"

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

// The bin of confidences in [0, 1]: an edge is k / n_bins, rounded. Only the nearest edge can be on the wrong side.
template <class T>
CALSEG_INLINE I<T> bin_of(F<T> confidence, F<T> n_bins, I<T> last, bool right_closed) {
    const I<T> nearest = nearest_integer(confidence * n_bins), one = broadcast<I<T>>(1), none = broadcast<I<T>>(0);
    const F<T> edge = to_values(nearest, confidence) / n_bins;
    if (right_closed) {
        const I<T> bin = nearest - select(less(edge, confidence), none, one);
        return select(less(bin, none), none, bin);
    }
    const I<T> bin = nearest - select(less(confidence, edge), one, none);
    return select(less(last, bin), last, bin);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
