// Exponential, logarithm and Box-Muller transform of vectors.
//
// For vectors of floats the functions evaluate polynomials, with an error of 1 to 2 ulp. For arrays they call the C library
// lane by lane. NaN and Inf keep their meaning in both.
//
// A polynomial is one long chain of operations, each of which needs the result of the one before. A processor looks ahead
// too little to overlap one chain with the next. So every function takes K vectors and applies each step to all of them
// (EACH). The K chains are independent, and the processor works on them at the same time.
#pragma once

#include "cpu/simd.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

#define EACH for (int k = 0; k < K; ++k)

// ---- vectors that are arrays ----

template <class T, int K>
CALSEG_INLINE void exp_any(Array<T> (&x)[K]) {
    EACH for (auto& value : x[k].v) value = std::exp(value);
}
template <class T, int K>
CALSEG_INLINE void exp_bounded(Array<T> (&x)[K]) {
    exp_any(x);
}
template <class T, int K>
CALSEG_INLINE void exp_nonpositive(Array<T> (&x)[K]) {
    exp_any(x);
}
template <class T, int K>
CALSEG_INLINE void log_positive(Array<T> (&x)[K]) {
    EACH for (auto& value : x[k].v) value = std::log(value);
}
// Turns K pairs of random words (a, b) into K pairs of normals (z0, z1), as the noise contract defines:
//   u1 = ((a >> 8) + 0.5) / 2^24          u2 = (b >> 8) / 2^24
//   z0 = sqrt(-2 ln u1) cos(2 pi u2)      z1 = sqrt(-2 ln u1) sin(2 pi u2)
template <class T, int K>
CALSEG_INLINE void box_muller(const uint32_t* const (&a)[K], const uint32_t* const (&b)[K], Array<T> (&z0)[K], Array<T> (&z1)[K]) {
    EACH for (int i = 0; i < kLanes; ++i) {
        const T radius = std::sqrt(T(-2) * std::log((static_cast<T>(a[k][i] >> 8) + T(0.5)) * T(0x1p-24)));
        const T angle = T(6.283185307179586476925) * (static_cast<T>(b[k][i] >> 8) * T(0x1p-24));
        z0[k].v[i] = radius * std::cos(angle);
        z1[k].v[i] = radius * std::sin(angle);
    }
}

#if defined(CALSEG_NATIVE_FLOAT)

// ---- vectors of floats that are registers ----

#if !defined(__AVX512F__)
// 1.5 * 2^23. Adding this number rounds a float to an integer, which the low bits of the sum hold.
constexpr float kRoundMagic = 12582912.0f;

// Turns x into exp(x - n ln 2), where n is the nearest integer to x / ln 2. The low bits of t hold n. The relative error is
// 3e-9 before rounding.
template <int K>
CALSEG_INLINE void exp_reduced(FloatVector (&x)[K], FloatVector (&t)[K]) {
    FloatVector q[K], n[K];
    EACH t[k] = x[k] * 1.44269504088896341f + kRoundMagic;
    EACH n[k] = t[k] - kRoundMagic;
    EACH x[k] = x[k] - n[k] * 0.693359375f;
    EACH x[k] = x[k] + n[k] * 2.12194440e-4f;
    EACH q[k] = x[k] * 1.381459639e-3f + 8.368717091e-3f;
    EACH q[k] = q[k] * x[k] + 4.166838809e-2f;
    EACH q[k] = q[k] * x[k] + 1.666652063e-1f;
    EACH q[k] = q[k] * x[k] + 4.999999345e-1f;
    EACH n[k] = x[k] * x[k];
    EACH x[k] = q[k] * n[k] + x[k];
    EACH x[k] = x[k] + 1.0f;
}
#endif

// Computes exp(x) for |x| <= 87, with a relative error of |x| / 2 + 1 ulp.
template <int K>
CALSEG_INLINE void exp_bounded(FloatVector (&x)[K]) {
#if defined(__AVX512F__)
    // With y = x / ln 2 and f = y - floor(y), the result is 2^floor(y) 2^f. The relative error of 2^f is 2e-9. If x is -inf,
    // f is 0 and the result is 0.
    FloatVector f[K], q[K];
    EACH x[k] = x[k] * 1.44269504088896341f;
    EACH f[k] = _mm512_reduce_ps(x[k], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    EACH q[k] = f[k] * 2.1565972e-4f + 1.248229e-3f;
    EACH q[k] = q[k] * f[k] + 9.673775e-3f;
    EACH q[k] = q[k] * f[k] + 5.5486184e-2f;
    EACH q[k] = q[k] * f[k] + 2.4022909e-1f;
    EACH q[k] = q[k] * f[k] + 6.9314706e-1f;
    EACH q[k] = q[k] * f[k] + 1.0f;
    EACH x[k] = _mm512_scalef_ps(q[k], x[k]);
#else
    FloatVector t[K];
    exp_reduced(x, t);
    EACH x[k] = x[k] * to_float_bits((to_int_bits(t[k]) + 127) << 23);
#endif
}

// Computes exp(x) for x <= 0 with an absolute error of half an ulp of 1. In a softmax the largest exponential is 1, so
// smaller ones need no more precision.
template <int K>
CALSEG_INLINE void exp_nonpositive(FloatVector (&x)[K]) {
#if defined(__AVX512F__)
    exp_bounded(x);  // which is right for all numbers down to -inf
#else
    FloatVector y[K];
    EACH y[k] = larger(broadcast<FloatVector>(-87.33654f), x[k]);
    exp_bounded(y);
    EACH x[k] = select(less(x[k], broadcast<FloatVector>(-87.33654f)), FloatVector{}, y[k]);  // 0 below the smallest normal
#endif
}

// Computes exp(x) for any x.
template <int K>
CALSEG_INLINE void exp_any(FloatVector (&x)[K]) {
#if defined(__AVX512F__)
    // The result is 2^y with y = x / ln 2. Let n be the multiple of 1/16 nearest to y. Then 2^y is the product of
    // 2^floor(n), 2^(n - floor(n)) from a table, and 2^(y - n) from a polynomial with a relative error of 2e-9. The factor
    // 1 / ln 2 is the sum of two floats: the rounded number and its rounding error.
    const FloatVector roots = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                               1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.83400810f, 1.91520655f};
    constexpr float kSixteenths = 786432.0f;  // 1.5 * 2^19: adding it rounds to a multiple of 1/16, held in the low bits
    FloatVector t[K], n[K], f[K], p[K];
    EACH x[k] = larger(broadcast<FloatVector>(-150.0f), x[k]);
    EACH x[k] = _mm512_min_ps(broadcast<FloatVector>(150.0f), x[k]);
    EACH t[k] = x[k] * 1.44269504088896341f + kSixteenths;
    EACH n[k] = t[k] - kSixteenths;
    // The subtraction must be fused: a rounded product would lack the bits that remain in the difference.
    EACH f[k] = _mm512_fmsub_ps(x[k], broadcast<FloatVector>(1.44269504f), n[k]);
    EACH f[k] = x[k] * 1.9259630e-8f + f[k];
    EACH p[k] = f[k] * 5.5505950e-2f + 2.4023429e-1f;
    EACH p[k] = p[k] * f[k] + 6.9314718e-1f;
    EACH p[k] = p[k] * f[k];
    EACH {
        const FloatVector root = _mm512_permutexvar_ps((__m512i)t[k], roots);
        x[k] = _mm512_scalef_ps(root * p[k] + root, n[k]);
    }
#else
    FloatVector t[K];
    EACH x[k] = larger(broadcast<FloatVector>(-104.0f), x[k]);
    EACH x[k] = select(less(broadcast<FloatVector>(89.0f), x[k]), broadcast<FloatVector>(89.0f), x[k]);
    exp_reduced(x, t);
    EACH {
        const IntVector n = (to_int_bits(t[k]) << 9) >> 9, half = n >> 1;
        // Multiply by 2^n in two steps. Each factor is a normal number even where the result is subnormal or infinite.
        x[k] = x[k] * to_float_bits((half + 127) << 23) * to_float_bits((n - half + 127) << 23);
    }
#endif
}

#if defined(__AVX512F__)
// Computes log(x) for normal x > 0. NaN and Inf are returned unchanged.
//
// Let x = m 2^e with m in [3/4, 3/2). A table of 16 segments gives r, about 1 / m. With f = m r - 1, the result is
//   e ln 2 - ln r + log(1 + f).
// On both sides of x = 1, r is exactly 1, so that nothing cancels there. The relative error of log(1 + f) is 3e-9 before
// rounding.
template <int K>
CALSEG_INLINE void log_positive(FloatVector (&x)[K]) {
    const FloatVector r = {1.0f,        0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
                           1.30612242f, 1.25490201f,  1.20754719f,  1.16363633f,  1.12280703f,  1.08474576f,  1.04918027f,  1.0f};
    const FloatVector minus_ln_r = {0.0f,          0.0896121531f,  0.145181986f,   0.19782573f,   0.247836201f,  0.295464217f,
                                    0.340926563f,  0.384411731f,   -0.267062765f,  -0.227057486f, -0.188591185f, -0.151549866f,
                                    -0.115831823f, -0.0813456413f, -0.0480091633f, 0.0f};
    const FloatVector one = broadcast<FloatVector>(1.0f);
    FloatVector f[K], e[K], p[K], minus[K];
    EACH f[k] = _mm512_getmant_ps(x[k], _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    EACH e[k] = _mm512_getexp_ps(x[k]);
    EACH {
        const __m512i segment = _mm512_srli_epi32((__m512i)f[k], 19);
        e[k] = _mm512_mask_add_ps(e[k], less(f[k], one), e[k], one);
        f[k] = f[k] * (FloatVector)_mm512_permutexvar_ps(segment, r) - 1.0f;
        minus[k] = _mm512_permutexvar_ps(segment, minus_ln_r);
    }
    EACH p[k] = f[k] * 0.188602873f - 0.250069094f;
    EACH p[k] = p[k] * f[k] + 0.333344402f;
    EACH p[k] = p[k] * f[k] - 0.5f;
    EACH p[k] = (p[k] * f[k] * f[k] + f[k]) + minus[k];
    EACH x[k] = e[k] * 0.693145752f + (e[k] * 1.42860677e-6f + p[k]);
}
#else
// Computes log(x) for normal x > 0. NaN and Inf are returned unchanged.
//
// With x = (1 + f) 2^e and 1 + f in [sqrt(1/2), sqrt(2)), the result is log(2^e) + log(1 + f). Its relative error is 6e-9
// before rounding.
template <int K>
CALSEG_INLINE void log_positive(FloatVector (&x)[K]) {
    FloatVector e[K], f[K], p[K], z[K];
    EACH {
        const IntVector bits = to_int_bits(x[k]) - 0x3f3504f3;  // 0x3f3504f3 is sqrt(1/2)
        e[k] = convert(bits >> 23);
        f[k] = to_float_bits((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    }
    EACH p[k] = f[k] * -7.634429837e-2f + 1.276155034e-1f;
    EACH p[k] = p[k] * f[k] - 1.316019507e-1f;
    EACH p[k] = p[k] * f[k] + 1.420176247e-1f;
    EACH p[k] = p[k] * f[k] - 1.662335648e-1f;
    EACH p[k] = p[k] * f[k] + 2.000122667e-1f;
    EACH p[k] = p[k] * f[k] - 2.500082106e-1f;
    EACH p[k] = p[k] * f[k] + 3.333333171e-1f;
    EACH z[k] = f[k] * f[k];
    EACH p[k] = p[k] * f[k] * z[k] - 0.5f * z[k] + f[k];
    EACH p[k] = (p[k] + e[k] * -2.12194440e-4f) + e[k] * 0.693359375f;
    EACH x[k] = select(less(x[k], broadcast<FloatVector>(INFINITY)), p[k], x[k]);
}
#endif

#if defined(__AVX512F__)
// Makes the pairs of normals from tables of 16 and 32 segments, which fit one or two registers. The tables shorten the
// polynomials, and no case per quadrant is needed.
template <int K>
CALSEG_INLINE void box_muller(const uint32_t* const (&a)[K], const uint32_t* const (&b)[K], FloatVector (&z0)[K], FloatVector (&z1)[K]) {
    // Compute -2 ln(u1) for u1 = m 2^e with m in [1, 2). With r about 1 / m and f = m r - 1 it is
    //   -2 ln(2) e + 2 ln(r) - 2 ln(1 + f).
    // In the last segment r is exactly 1/2, so that the first two terms cancel exactly where u1 is near 1.
    const FloatVector r = {0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
                           0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f, 0.561403513f, 0.542372882f, 0.524590135f, 0.5f};
    const FloatVector two_ln_r = {-0.061543256f, -0.179224312f, -0.290363967f, -0.39565146f,  -0.495672405f, -0.590928435f,
                                  -0.681853116f, -0.768823445f, -0.852168858f, -0.932179391f, -1.009112f,    -1.08319461f,
                                  -1.15463066f,  -1.22360313f,  -1.29027605f,  -1.38629436f};
    FloatVector u[K], e[K], f[K], p[K];
    UintVector word[K];
    EACH word[k] = load<UintVector>(a[k]);
    EACH u[k] = _mm512_cvtepu32_ps((__m512i)(word[k] & 0xffffff00u));
    EACH u[k] = _mm512_fmadd_round_ps(u[k], broadcast<FloatVector>(0x1p-32f), broadcast<FloatVector>(0x1p-25f),
                                      _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    EACH e[k] = _mm512_getexp_ps(u[k]);
    EACH f[k] = _mm512_getmant_ps(u[k], _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
    EACH {
        const __m512i segment = _mm512_srli_epi32((__m512i)u[k], 19);
        f[k] = f[k] * (FloatVector)_mm512_permutexvar_ps(segment, r) - 1.0f;
        e[k] = e[k] * -1.38629436f + (FloatVector)_mm512_permutexvar_ps(segment, two_ln_r);
    }
    // From 1/2 on, u1 has one bit more than a float holds. Add that bit to f: near u1 = 1 the logarithm depends on it.
    EACH f[k] = _mm512_mask_add_ps(f[k], _mm512_movepi32_mask((__m512i)word[k]), f[k], broadcast<FloatVector>(0x1p-25f));
    EACH p[k] = f[k] * 0.50123346f - 0.66704532f;
    EACH p[k] = p[k] * f[k] + 0.99999949f;
    EACH p[k] = p[k] * f[k] - 2.0f;
    EACH p[k] = p[k] * f[k] + e[k];
    EACH u[k] = square_root(p[k]);  // the radius

    // The angle is the nearest of 32 directions, which a table gives, plus a rest d of up to 1/64 of a turn.
    const FloatVector first_cosines = {1.0f,          0.980785280f,  0.923879533f,  0.831469612f,  0.707106781f,  0.555570233f,
                                       0.382683432f,  0.195090322f,  0.0f,          -0.195090322f, -0.382683432f, -0.555570233f,
                                       -0.707106781f, -0.831469612f, -0.923879533f, -0.980785280f};
    const FloatVector first_sines = {0.0f,         0.195090322f, 0.382683432f, 0.555570233f, 0.707106781f, 0.831469612f,
                                     0.923879533f, 0.980785280f, 1.0f,         0.980785280f, 0.923879533f, 0.831469612f,
                                     0.707106781f, 0.555570233f, 0.382683432f, 0.195090322f};
    const FloatVector last_cosines = -first_cosines, last_sines = -first_sines;
    constexpr double kTurn = 6.283185307179586476925 / 4294967296.0, kTurn2 = kTurn * kTurn;
    FloatVector d[K], z[K], cosine[K], sine[K];
    UintVector turns[K];
    EACH turns[k] = load<UintVector>(b[k]) + 0x04000000u;
    EACH d[k] = convert((IntVector)((turns[k] & 0x07ffff00u) - 0x04000000u));
    EACH z[k] = d[k] * d[k];
    EACH sine[k] = z[k] * static_cast<float>(-0.16662651 * kTurn2 * kTurn) + static_cast<float>(kTurn);
    EACH cosine[k] = z[k] * static_cast<float>(0.04165331 * kTurn2 * kTurn2) - static_cast<float>(0.49999998 * kTurn2);
    EACH sine[k] = sine[k] * d[k];
    EACH cosine[k] = cosine[k] * z[k] + 1.0f;
    EACH {
        const __m512i direction = _mm512_srli_epi32((__m512i)turns[k], 27);
        const FloatVector x = u[k] * (FloatVector)_mm512_permutex2var_ps(first_cosines, direction, last_cosines);
        const FloatVector y = u[k] * (FloatVector)_mm512_permutex2var_ps(first_sines, direction, last_sines);
        z0[k] = x * cosine[k] - y * sine[k];
        z1[k] = y * cosine[k] + x * sine[k];
    }
}
#else
// Makes the pairs of normals from polynomials. The random words stay integers as long as a float would round them.
template <int K>
CALSEG_INLINE void box_muller(const uint32_t* const (&a)[K], const uint32_t* const (&b)[K], FloatVector (&z0)[K], FloatVector (&z1)[K]) {
    // With u1 = (1 + f) 2^e, -2 ln(u1) is -2 ln(2) e - 2 f + f^2 (1 - 2 f P(f)) for a polynomial P.
    FloatVector n[K], u[K], f[K], e[K], p[K], z[K];
    IntVector bits[K];
    EACH n[k] = convert((IntVector)(load<UintVector>(a[k]) >> 8));
    EACH u[k] = n[k] + 0.5f;
    EACH bits[k] = to_int_bits(u[k]) - (0x3f3504f3 + (24 << 23));
    EACH e[k] = convert(bits[k] >> 23);
    EACH f[k] = to_float_bits((bits[k] & 0x007fffff) + 0x3f3504f3) - 1.0f;
    // From 2^23 on, n + 0.5 is rounded. Add the lost bit to f: near u1 = 1 the logarithm depends on it.
    EACH f[k] = f[k] + ((n[k] - u[k]) + 0.5f) * 0x1p-24f;
    EACH p[k] = f[k] * -1.740071989e-1f + 2.853495264e-1f;
    EACH p[k] = p[k] * f[k] - 2.982957404e-1f;
    EACH p[k] = p[k] * f[k] + 3.315517202e-1f;
    EACH p[k] = p[k] * f[k] - 3.992612458e-1f;
    EACH p[k] = p[k] * f[k] + 5.000267404e-1f;
    EACH p[k] = p[k] * f[k] - 6.666782154e-1f;
    EACH z[k] = f[k] * f[k];
    EACH p[k] = p[k] * f[k] + 1.0f;
    EACH e[k] = e[k] * -1.38629436f;
    EACH e[k] = f[k] * -2.0f + e[k];
    EACH p[k] = p[k] * z[k] + e[k];
    EACH u[k] = square_root(p[k]);  // the radius

    // The upper 24 bits of the word are u2, in turns. Its two uppermost bits, rounded, are the number of the quadrant. The
    // other bits, read as a signed number, are the exact angle within the quadrant, in [-1/8, 1/8] of a turn.
    FloatVector t[K], sine[K], cosine[K];
    UintVector turns[K];
    EACH turns[k] = load<UintVector>(b[k]);
    EACH t[k] = convert((IntVector)((turns[k] << 2) & ~0x3ffu)) * 3.657295198e-10f;  // (pi / 2) / 2^32
    EACH turns[k] = turns[k] + 0x20000000u;
    EACH z[k] = t[k] * t[k];
    EACH sine[k] = z[k] * -1.9515295891e-4f + 8.3321608736e-3f;
    EACH cosine[k] = z[k] * 2.443315711809948e-5f - 1.388731625493765e-3f;
    EACH sine[k] = sine[k] * z[k] - 1.6666654611e-1f;
    EACH cosine[k] = cosine[k] * z[k] + 4.166664568298827e-2f;
    EACH sine[k] = sine[k] * z[k];
    EACH cosine[k] = cosine[k] * z[k] - 0.5f;
    EACH sine[k] = sine[k] * t[k] + t[k];
    EACH cosine[k] = cosine[k] * z[k] + 1.0f;
    EACH {
        const auto even = equal((IntVector)(turns[k] & 0x40000000u), IntVector{});
        const FloatVector c = select(even, cosine[k], sine[k]), s = select(even, sine[k], cosine[k]);
        z0[k] = u[k] * to_float_bits(to_int_bits(c) ^ (IntVector)((turns[k] + 0x40000000u) & 0x80000000u));
        z1[k] = u[k] * to_float_bits(to_int_bits(s) ^ (IntVector)(turns[k] & 0x80000000u));
    }
}

#endif

#endif

#undef EACH

template <class V>
CALSEG_INLINE V log_positive(V x) {
    V each[1] = {x};
    log_positive(each);
    return each[0];
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
