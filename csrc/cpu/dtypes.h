// Conversion of stored numbers to the compute type and back, and dispatch from a dtype to a C++ type.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"
#include "host/arguments.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// ---- conversion of one number ----

CALSEG_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
CALSEG_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

CALSEG_INLINE float widen_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// Rounds to the nearest bfloat16, ties to even. NaN stays NaN.
CALSEG_INLINE uint16_t narrow_bf16(float x) {
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

CALSEG_INLINE float widen_f16(uint16_t x) {
    // Multiplying by 2^112 corrects the bias of the exponent, also for subnormal numbers. Inf and NaN then get the largest
    // exponent.
    uint32_t bits = bits_of(float_of(static_cast<uint32_t>(x & 0x7fffu) << 13) * 0x1p112f);
    bits = (x & 0x7c00u) == 0x7c00u ? (bits | 0x7f800000u) : bits;
    return float_of(bits | static_cast<uint32_t>(x & 0x8000u) << 16);
}

// Rounds to the nearest float16, ties to even. NaN stays NaN.
CALSEG_INLINE uint16_t narrow_f16(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal numbers are rounded at bit 13. Adding 1/2 rounds subnormal ones to a multiple of 2^-24.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return static_cast<uint16_t>(sign | result);
}

CALSEG_INLINE float widened(float x) { return x; }
CALSEG_INLINE double widened(double x) { return x; }
CALSEG_INLINE float widened(BF16 x) { return widen_bf16(x.bits); }
CALSEG_INLINE float widened(F16 x) { return widen_f16(x.bits); }
CALSEG_INLINE float widened(U8 x) { return static_cast<float>(x.steps) * (1.0f / 255.0f); }
CALSEG_INLINE float widened(U16 x) { return static_cast<float>(x.steps) * (1.0f / 65535.0f); }

template <class T>
CALSEG_INLINE void narrow(float& to, T from) {
    to = static_cast<float>(from);
}
template <class T>
CALSEG_INLINE void narrow(double& to, T from) {
    to = static_cast<double>(from);
}
template <class T>
CALSEG_INLINE void narrow(BF16& to, T from) {
    to.bits = narrow_bf16(static_cast<float>(from));
}
template <class T>
CALSEG_INLINE void narrow(F16& to, T from) {
    to.bits = narrow_f16(static_cast<float>(from));
}
template <class T>
CALSEG_INLINE void narrow(U16& to, T from) {
    to.steps = static_cast<uint16_t>(from * T(65535) + T(0.5));
}

// ---- conversion of kLanes contiguous numbers ----

template <class T, class From>
CALSEG_INLINE void widen_lanes(T* to, const From* from) {
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<T>(widened(from[i]));
}
template <class To, class T>
CALSEG_INLINE void narrow_lanes(To* to, const T* from) {
    for (int i = 0; i < kLanes; ++i) narrow(to[i], from[i]);
}
#if defined(CALSEG_NATIVE_FLOAT)
// Explicit vector code. The compiler does not vectorise the loops above where they are inlined into a long loop.
typedef uint16_t ShortVector __attribute__((vector_size(2 * kLanes)));
CALSEG_INLINE void widen_lanes(float* to, const float* from) { store(to, load<FloatVector>(from)); }
CALSEG_INLINE void narrow_lanes(float* to, const float* from) { store(to, load<FloatVector>(from)); }
CALSEG_INLINE void widen_lanes(float* to, const BF16* from) {
#if defined(__AVX512F__)
    // The intrinsic is one instruction. The compiler makes four of __builtin_convertvector.
    store(to, _mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16));
#else
    store(to, __builtin_convertvector(load<ShortVector>(from), UintVector) << 16);
#endif
}
CALSEG_INLINE void narrow_lanes(BF16* to, const float* from) {
    const FloatVector x = load<FloatVector>(from);
    const UintVector bits = (UintVector)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const IntVector nan = IntVector{} + 0x7fc0;
    store(to, __builtin_convertvector((UintVector)select(equal(x, x), (IntVector)rounded, nan), ShortVector));
}
#endif
#if defined(__F16C__)
// The processor's own conversions, eight numbers at a time on x86. GCC does not use them when it vectorises a loop.
CALSEG_INLINE void widen_lanes(float* to, const F16* from) {
    for (int i = 0; i < kLanes; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
}
CALSEG_INLINE void narrow_lanes(F16* to, const float* from) {
    for (int i = 0; i < kLanes; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
}
#elif defined(__aarch64__) && defined(CALSEG_NATIVE_FLOAT)
CALSEG_INLINE void widen_lanes(float* to, const F16* from) { vst1q_f32(to, vcvt_f32_f16(load<float16x4_t>(from))); }
CALSEG_INLINE void narrow_lanes(F16* to, const float* from) { store(to, vcvt_f16_f32(vld1q_f32(from))); }
#endif

// Loads `count` numbers, kLanes at most. The lanes beyond become 0.
template <class T, class From>
CALSEG_INLINE F<T> load_widened(const From* from, int count) {
    alignas(64) T lanes[kLanes];
    if (count == kLanes) widen_lanes(lanes, from);
    else
        for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? static_cast<T>(widened(from[i])) : T(0);
    return load<F<T>>(lanes);
}

// Narrows N values, a multiple of kLanes.
template <class To, class T, int N>
CALSEG_INLINE void narrow_line(To* to, const T (&from)[N]) {
    for (int i = 0; i < N; i += kLanes) narrow_lanes(to + i, from + i);
}
#if defined(__AVX512F__)
// Does as narrow_bf16 for two vectors at once.
CALSEG_INLINE void narrow_line(BF16* to, const float (&from)[32]) {
    __m512i rounded[2];
    for (int i = 0; i < 2; ++i) {
        const __m512 x = _mm512_loadu_ps(from + 16 * i);
        const __m512i bits = _mm512_castps_si512(x), down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
        const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        rounded[i] = _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
        rounded[i] = _mm512_mask_mov_epi32(rounded[i], nan, _mm512_set1_epi32(0x7fc00000));
    }
    const UintVector upper = {0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d,
                              0x00230021, 0x00270025, 0x002b0029, 0x002f002d, 0x00330031, 0x00370035, 0x003b0039, 0x003f003d};
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(rounded[0], (__m512i)upper, rounded[1]));
}
#endif

// ---- dispatch from a dtype to a C++ type ----

// Calls visit with a null pointer to the C++ type of a floating dtype.
template <class Visit>
CALSEG_INLINE void with_float_type(DType dtype, const Visit& visit) {
    switch (dtype) {
        case DType::f64:
            return visit(static_cast<double*>(nullptr));
        case DType::bf16:
            return visit(static_cast<BF16*>(nullptr));
        case DType::f16:
            return visit(static_cast<F16*>(nullptr));
        default:
            return visit(static_cast<float*>(nullptr));
    }
}

// Does as with_float_type, and knows the types of fractions too.
template <class Visit>
CALSEG_INLINE void with_score_type(DType dtype, const Visit& visit) {
    if (dtype == DType::u8) visit(static_cast<U8*>(nullptr));
    else if (dtype == DType::u16) visit(static_cast<U16*>(nullptr));
    else with_float_type(dtype, visit);
}

// Does as with_float_type for a tensor that is computed in T. float64 is computed in double, every other dtype in float, so
// each T needs code for its own dtypes only.
template <class T, class Visit>
CALSEG_INLINE void with_stored_type(DType dtype, const Visit& visit) {
    if constexpr (std::is_same<T, double>::value) visit(static_cast<double*>(nullptr));
    else if (dtype == DType::bf16) visit(static_cast<BF16*>(nullptr));
    else if (dtype == DType::f16) visit(static_cast<F16*>(nullptr));
    else visit(static_cast<float*>(nullptr));
}

// Calls visit with a null pointer to the C++ type of an integer dtype or bool.
template <class Visit>
CALSEG_INLINE void with_integer_type(DType dtype, const Visit& visit) {
    switch (dtype) {
        case DType::i8:
            return visit(static_cast<int8_t*>(nullptr));
        case DType::i16:
            return visit(static_cast<int16_t*>(nullptr));
        case DType::u16:
            return visit(static_cast<uint16_t*>(nullptr));
        case DType::i32:
            return visit(static_cast<int32_t*>(nullptr));
        case DType::u32:
            return visit(static_cast<uint32_t*>(nullptr));
        case DType::i64:
            return visit(static_cast<int64_t*>(nullptr));
        case DType::u64:
            return visit(static_cast<uint64_t*>(nullptr));
        default:
            return visit(static_cast<uint8_t*>(nullptr));  // uint8 and bool
    }
}

CALSEG_INLINE int64_t dtype_bytes(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64:
        case DType::u64:
            return 8;
        case DType::f32:
        case DType::i32:
        case DType::u32:
            return 4;
        case DType::bf16:
        case DType::f16:
        case DType::i16:
        case DType::u16:
            return 2;
        default:
            return 1;
    }
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
