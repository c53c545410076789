// Numbers of 32 and 16 bits in memory, which the kernels compute with as float.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/scalar.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

CALSEG_INLINE float widened(float x) { return x; }
CALSEG_INLINE float widened(BF16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
CALSEG_INLINE float widened(F16 x) { return widen_half(x.bits); }

CALSEG_INLINE void narrow(float x, float& to) { to = x; }
CALSEG_INLINE void narrow(float x, BF16& to) { to.bits = narrow_bfloat(x); }
CALSEG_INLINE void narrow(float x, F16& to) { to.bits = narrow_half(x); }

// The two numbers of a word, and the word of two numbers.
CALSEG_INLINE float lower(BF16, uint32_t word) { return float_of_bits(word << 16); }
CALSEG_INLINE float upper(BF16, uint32_t word) { return float_of_bits(word & 0xffff0000u); }
CALSEG_INLINE float lower(F16, uint32_t word) { return widen_half(static_cast<uint16_t>(word)); }
CALSEG_INLINE float upper(F16, uint32_t word) { return widen_half(static_cast<uint16_t>(word >> 16)); }
CALSEG_INLINE uint32_t pair(BF16, float low, float high) { return narrow_bfloats(low, high); }
CALSEG_INLINE uint32_t pair(F16, float low, float high) { return narrow_halves(low, high); }
// The larger numbers of two words.
CALSEG_INLINE uint32_t larger_pair(BF16, uint32_t a, uint32_t b) { return larger_bfloats(a, b); }
CALSEG_INLINE uint32_t larger_pair(F16, uint32_t a, uint32_t b) { return larger_halves(a, b); }

// V adjacent numbers, as memory holds them.
template <class From, int V>
struct alignas(sizeof(From) * V) Adjacent {
    static constexpr bool kPairs = sizeof(From) == 2 && V > 1;  // whether two numbers are in one word
    std::conditional_t<kPairs, uint32_t, From> words[kPairs ? V / 2 : V];

    CALSEG_MEMBER void read(float (&x)[V]) const {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if constexpr (kPairs) x[j] = j % 2 ? upper(From(), words[j / 2]) : lower(From(), words[j / 2]);
            else x[j] = widened(words[j]);
        }
    }
    CALSEG_MEMBER void write(const float (&x)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if constexpr (!kPairs) narrow(x[j], words[j]);
            else if (j % 2) words[j / 2] = pair(From(), x[j - 1], x[j]);
        }
    }
    CALSEG_MEMBER void set(int j, float x) {
        if constexpr (!kPairs) narrow(x, words[j]);
        else
            words[j / 2] =
                j % 2 ? (words[j / 2] & 0x0000ffffu) | pair(From(), 0.0f, x) : (words[j / 2] & 0xffff0000u) | pair(From(), x, 0.0f);
    }
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
