// Elementary functions that compilers vectorise when they stand in a plain loop. float: polynomials good to 1 to 2 ulp;
// double: the C library's. NaN and Inf keep their meaning. Compiled once per instruction set, hence internal linkage.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define CALSEG_INLINE static __forceinline
#define CALSEG_RESTRICT __restrict
#else
#define CALSEG_INLINE static inline __attribute__((always_inline))
#define CALSEG_RESTRICT __restrict__
#endif

namespace calseg {
namespace CALSEG_ISA {
namespace {

CALSEG_INLINE int32_t float_bits(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

CALSEG_INLINE float bits_float(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits

// exp(r) for |r| <= ln(2) / 2 (Cephes expf)
CALSEG_INLINE float exp_polynomial(float r) {
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r + 1.0f;
}

CALSEG_INLINE float exp_reduce(float x, int32_t& n_bits) {
    float t = x * 1.44269504088896341f + kRoundMagic;
    n_bits = float_bits(t);
    float n = t - kRoundMagic;
    return (x - n * 0.693359375f) + n * 2.12194440e-4f;
}

// exp(x) for x <= 0; below the smallest normal number: 0
CALSEG_INLINE float exp_nonpositive(float x) {
    int32_t n_bits;
    float p = exp_polynomial(exp_reduce(x, n_bits));
    float scale = bits_float(static_cast<int32_t>(static_cast<uint32_t>(n_bits + 127) << 23));
    float y = p * scale;
    return x < -87.33654f ? 0.0f : y;
}
CALSEG_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// exp(x), any x; two factors, so that the result may be subnormal or infinite
CALSEG_INLINE float exp_any(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    int32_t n_bits;
    float p = exp_polynomial(exp_reduce(x, n_bits));
    int32_t n = static_cast<int32_t>(static_cast<uint32_t>(n_bits) << 9) >> 9;
    int32_t half = n >> 1;
    return p * bits_float((half + 127) << 23) * bits_float((n - half + 127) << 23);
}
CALSEG_INLINE double exp_any(double x) { return std::exp(x); }

// log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)] (Cephes logf)
CALSEG_INLINE float log1p_polynomial(float f) {
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    float z = f * f;
    return p * f * z - 0.5f * z + f;
}

// x = m * 2^e with m in [sqrt(1/2), sqrt(2)); x > 0 and normal. Returns m - 1.
CALSEG_INLINE float log_reduce(float x, float& e) {
    int32_t bits = float_bits(x) - 0x3f3504f3;  // sqrt(1/2)
    e = static_cast<float>(bits >> 23);
    return bits_float((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
}

CALSEG_INLINE float log_sum(float e, float log_m) { return (log_m + e * -2.12194440e-4f) + e * 0.693359375f; }

// log(x) for normal x > 0; NaN and Inf pass through
CALSEG_INLINE float log_positive(float x) {
    float e;
    float f = log_reduce(x, e);
    float y = log_sum(e, log1p_polynomial(f));
    return x < INFINITY ? y : x;
}
CALSEG_INLINE double log_positive(double x) { return std::log(x); }

// One Box-Muller pair from two words (the noise contract): u1 = ((a >> 8) + 0.5) / 2^24, u2 = (b >> 8) / 2^24.
CALSEG_INLINE void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
    int32_t n1 = static_cast<int32_t>(a >> 8), n2 = static_cast<int32_t>(b >> 8);
    // Near 1, u1 needs 25 bits: there u1 - 1 is taken from the integer's complement, exactly.
    float e;
    float f = log_reduce((static_cast<float>(n1) + 0.5f) * 0x1p-24f, e);
    float minus_w = (static_cast<float>(n1 - 0xffffff) - 0.5f) * 0x1p-24f;
    bool near_one = n1 >= 0xb504f4;  // u1 > sqrt(1/2)
    f = near_one ? minus_w : f;
    e = near_one ? 0.0f : e;
    float radius = std::sqrt(-2.0f * log_sum(e, log1p_polynomial(f)));

    // u2 in turns: quadrant, and an exact remainder in [-1/8, 1/8] of a turn
    int32_t quadrant = (n2 + (1 << 21)) >> 22;
    float t = static_cast<float>(n2 - (quadrant << 22)) * 3.74507028e-7f;  // 2 pi / 2^24
    float z = t * t;
    float sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * t + t;
    float cosine = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
                   0.5f * z + 1.0f;
    bool swap = (quadrant & 1) != 0;
    float c = swap ? sine : cosine;
    float s = swap ? cosine : sine;
    int32_t c_sign = static_cast<int32_t>(static_cast<uint32_t>(quadrant + 1) << 30) & INT32_MIN;
    int32_t s_sign = static_cast<int32_t>(static_cast<uint32_t>(quadrant) << 30) & INT32_MIN;
    z0 = radius * bits_float(float_bits(c) ^ c_sign);
    z1 = radius * bits_float(float_bits(s) ^ s_sign);
}
CALSEG_INLINE void box_muller(uint32_t a, uint32_t b, double& z0, double& z1) {
    double radius = std::sqrt(-2.0 * std::log((static_cast<double>(a >> 8) + 0.5) * 0x1p-24));
    double angle = 6.283185307179586476925 * (static_cast<double>(b >> 8) * 0x1p-24);
    z0 = radius * std::cos(angle);
    z1 = radius * std::sin(angle);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
