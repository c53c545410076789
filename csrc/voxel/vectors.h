// Functions of vectors that need only the operations of a vector. A vector belongs to an instruction set (cpu/simd.h) or is a
// single number (cuda/scalar.h). Included after either.
#pragma once

#include <cstdint>

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Numbers of 16 bits in memory.
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

// Sum of one or two vectors. A long sum over classes in pairs waits for one addition a pair, not for one a class.
template <class V, int K>
CALSEG_INLINE V sum_of(const V (&x)[K]) {
    if constexpr (K == 1) return x[0];
    else return x[0] + x[1];
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
