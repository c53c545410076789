// What follows from the operations of a vector alone, whatever it is: an instruction set's (cpu/simd.h) or a single number
// (cuda/scalar.h). Included by either.
#pragma once

#include <cstdint>

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Numbers as they lie in memory
struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <class T>
using F = typename Vectors<T>::F;
template <class T>
using I = typename Vectors<T>::I;

template <class T>
CALSEG_INLINE F<T> zero() {
    return broadcast<F<T>>(T(0));
}

// In pairs, so that a long sum waits for one addition a group, not for one a class
template <class V, int K>
CALSEG_INLINE V sum_of(const V (&x)[K]) {
    if constexpr (K == 1) return x[0];
    else return x[0] + x[1];
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
