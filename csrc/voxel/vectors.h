// Names and functions of vectors that the CPU and the CUDA code share.
//
// A vector is one of an instruction set (cpu/simd.h) or a single number (cuda/scalar.h). Include one of those headers
// first.
#pragma once

#include <cstdint>

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Floating-point numbers of 16 bits, as memory holds them.
struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

// Fractions of the largest integer of 8 or 16 bits, as memory holds them.
struct U8 {
    uint8_t steps;
};
struct U16 {
    uint16_t steps;
};

// Vectors of T and of 32-bit integers.
template <class T>
using F = typename Vectors<T>::F;
template <class T>
using I = typename Vectors<T>::I;
template <class T>
using M = typename Vectors<T>::M;

template <class T>
CALSEG_INLINE F<T> zero() {
    return broadcast<F<T>>(T(0));
}

// Returns the sum of one or two vectors. A long sum that takes its terms in pairs waits for one addition per pair instead
// of one per term.
template <class V, int K>
CALSEG_INLINE V sum_of(const V (&x)[K]) {
    if constexpr (K == 1) return x[0];
    else return x[0] + x[1];
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
