// Vector of one voxel, for a thread of a GPU. It has those functions of cpu/simd.h and cpu/vector_math.h that the headers
// of voxel/ need.
#pragma once

#include <cmath>
#include <cstdint>

#define CALSEG_ISA cuda
#define CALSEG_MEMBER __device__ __forceinline__
#define CALSEG_INLINE static CALSEG_MEMBER

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
struct Vectors {
    using F = T;
    using I = int32_t;
};

template <class V, class T>
CALSEG_INLINE V broadcast(T x) {
    return x;
}
template <class T>
CALSEG_INLINE T select(bool mask, T a, T b) {
    return mask ? a : b;
}
template <class T>
CALSEG_INLINE bool equal(T a, T b) {
    return a == b;
}
template <class T>
CALSEG_INLINE bool less(T a, T b) {
    return a < b;
}
CALSEG_INLINE float larger(float a, float b) { return a > b ? a : b; }  // gives b if either is NaN

CALSEG_INLINE int32_t nearest_integer(float x) { return __float2int_rn(x); }  // rounds halves to even
CALSEG_INLINE int32_t truncated_integer(float x) { return __float2int_rz(x); }
CALSEG_INLINE float to_values(int32_t x, float) { return static_cast<float>(x); }

// Divisor whose reciprocal is known. A division of two integers of up to 2^16 is correctly rounded and takes three
// instructions: the quotient from the reciprocal, its remainder, and a correction.
struct Divisor {
    float n, reciprocal;

    explicit CALSEG_MEMBER Divisor(float by) : n(by), reciprocal(1.0f / by) {}
};
CALSEG_INLINE float operator*(float a, Divisor b) { return a * b.n; }
CALSEG_INLINE float operator/(float a, Divisor b) {
    const float quotient = a * b.reciprocal;
    return fmaf(fmaf(-quotient, b.n, a), b.reciprocal, quotient);
}

// Computes exp(x) for x <= 0 with an absolute error of half an ulp of 1. In a softmax the largest exponential is 1, so
// smaller ones need no more precision.
template <int K>
CALSEG_INLINE void exp_nonpositive(float (&x)[K]) {
    for (auto& value : x) value = exp2_flushed(value * 1.44269504088896341f);
}
CALSEG_INLINE float log_positive(float x) { return logf(x); }
CALSEG_INLINE float reciprocal(float x) { return reciprocal_flushed(x); }

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
