// Vector types that hold one number for each of kLanes voxels, and their basic operations.
//
// A vector of floats or 32-bit integers is one register of the instruction set. GCC and Clang give its type the arithmetic
// operators, and so does clang-cl on Windows. A vector of doubles is a plain array of kLanes numbers, and so is every vector
// on other compilers, such as Microsoft's.
//
// All headers of csrc/cpu/ are compiled once per instruction set, so everything in them has internal linkage, or lies in the
// namespace of the instruction set. They avoid function templates of the standard library. The linker keeps one copy of such
// a function, and that copy may use an instruction set that the processor lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) || defined(__clang__)  // clang-cl defines the second only
#define CALSEG_NATIVE_FLOAT
#endif

// Functions that are compiled into each place that calls them, alone or in a class, and those that are compiled once: what is
// called once per tile or chunk would be compiled into each of some hundred kernels.
#if defined(_MSC_VER)
#define CALSEG_INLINE static __forceinline
#define CALSEG_MEMBER __forceinline
#define CALSEG_ONCE __declspec(noinline)
#else
#define CALSEG_INLINE static inline __attribute__((always_inline))
#define CALSEG_MEMBER inline __attribute__((always_inline))
#define CALSEG_ONCE __attribute__((noinline))
#endif

// The most classes that kernels have code of their own for. It takes most of the time to compile, so a build may limit it.
#if !defined(CALSEG_MOST_FEW_CLASSES)
#define CALSEG_MOST_FEW_CLASSES 4
#endif

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int kMostFewClasses = CALSEG_MOST_FEW_CLASSES;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// ---- vectors that are arrays ----

template <class T>
struct Array {
    T v[kLanes];
    T& operator[](int i) { return v[i]; }
    T operator[](int i) const { return v[i]; }
};

#define CALSEG_ARRAY_OPERATOR(op)                                   \
    template <class T>                                              \
    CALSEG_INLINE Array<T> operator op(Array<T> a, Array<T> b) {    \
        for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] op b.v[i]; \
        return a;                                                   \
    }
CALSEG_ARRAY_OPERATOR(+)
CALSEG_ARRAY_OPERATOR(-)
CALSEG_ARRAY_OPERATOR(*)
CALSEG_ARRAY_OPERATOR(/)
CALSEG_ARRAY_OPERATOR(&)
CALSEG_ARRAY_OPERATOR(|)
CALSEG_ARRAY_OPERATOR(^)
#undef CALSEG_ARRAY_OPERATOR

#define CALSEG_ARRAY_COMPARISON(name, op)                           \
    template <class T>                                              \
    CALSEG_INLINE Array<bool> name(Array<T> a, Array<T> b) {        \
        Array<bool> r;                                              \
        for (int i = 0; i < kLanes; ++i) r.v[i] = a.v[i] op b.v[i]; \
        return r;                                                   \
    }
CALSEG_ARRAY_COMPARISON(equal, ==)
CALSEG_ARRAY_COMPARISON(less, <)
#undef CALSEG_ARRAY_COMPARISON

template <class T>
CALSEG_INLINE Array<T> select(Array<bool> mask, Array<T> a, Array<T> b) {
    for (int i = 0; i < kLanes; ++i) b.v[i] = mask.v[i] ? a.v[i] : b.v[i];
    return b;
}
template <class T>
CALSEG_INLINE Array<T> larger(Array<T> a, Array<T> b) {  // gives b where either is NaN
    for (int i = 0; i < kLanes; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
}
template <class T>
CALSEG_INLINE Array<T> square_root(Array<T> a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = std::sqrt(a.v[i]);
    return a;
}

template <class T>
CALSEG_INLINE Array<T> magnitude(Array<T> a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = std::fabs(a.v[i]);
    return a;
}

template <class T>
CALSEG_INLINE Array<T> reciprocal(Array<T> a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = T(1) / a.v[i];
    return a;
}

template <class T>
CALSEG_INLINE Array<T> multiply_subtract(Array<T> a, Array<T> b, Array<T> c) {
    return a * b - c;
}

template <class T>
CALSEG_INLINE Array<int32_t> nearest_integer(Array<T> a) {  // rounds halves to even
    Array<int32_t> r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<int32_t>(std::nearbyint(a.v[i]));
    return r;
}
template <class T>
CALSEG_INLINE Array<int32_t> truncated_integer(Array<T> a) {
    Array<int32_t> r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<int32_t>(a.v[i]);
    return r;
}
// Converts integers to the type of the second argument, whose values are not used.
template <class T>
CALSEG_INLINE Array<T> to_values(Array<int32_t> a, Array<T>) {
    Array<T> r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<T>(a.v[i]);
    return r;
}

CALSEG_INLINE bool any(Array<bool> mask) {
    bool r = false;
    for (bool lane : mask.v) r |= lane;
    return r;
}
CALSEG_INLINE bool all(Array<bool> mask) {
    bool r = true;
    for (bool lane : mask.v) r &= lane;
    return r;
}
CALSEG_INLINE int count_of(Array<bool> mask) {
    int r = 0;
    for (bool lane : mask.v) r += lane;
    return r;
}
// Stores 64-bit words: to[i] = high[i] * 2^32 + low[i].
CALSEG_INLINE void store_words(uint64_t* to, Array<int32_t> low, Array<int32_t> high) {
    for (int i = 0; i < kLanes; ++i)
        to[i] = static_cast<uint64_t>(static_cast<uint32_t>(high.v[i])) << 32 | static_cast<uint32_t>(low.v[i]);
}

template <class T>
CALSEG_INLINE Array<T> gather(const T* from, Array<int32_t> at) {
    Array<T> r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = from[at.v[i]];
    return r;
}

// ---- vector types for a compute type T ----

template <class T>
struct Vectors {
    using F = Array<T>;        // floating-point values
    using I = Array<int32_t>;  // integers, such as labels
    using M = Array<bool>;     // results of comparisons
};

// ---- vectors that are registers ----

#if defined(CALSEG_NATIVE_FLOAT)
typedef float FloatVector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVector __attribute__((vector_size(4 * kLanes)));

#if defined(__AVX512F__)
typedef __mmask16 MaskVector;
CALSEG_INLINE bool any(MaskVector mask) { return mask != 0; }
CALSEG_INLINE bool all(MaskVector mask) { return mask == 0xffff; }
CALSEG_INLINE int count_of(MaskVector mask) { return __builtin_popcount(mask); }
CALSEG_INLINE MaskVector equal(IntVector a, IntVector b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
CALSEG_INLINE MaskVector less(IntVector a, IntVector b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
CALSEG_INLINE MaskVector equal(FloatVector a, FloatVector b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
CALSEG_INLINE MaskVector less(FloatVector a, FloatVector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
CALSEG_INLINE FloatVector select(MaskVector m, FloatVector a, FloatVector b) { return _mm512_mask_blend_ps(m, b, a); }
CALSEG_INLINE IntVector select(MaskVector m, IntVector a, IntVector b) {
    return (IntVector)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a);
}
CALSEG_INLINE FloatVector larger(FloatVector a, FloatVector b) { return _mm512_max_ps(a, b); }
CALSEG_INLINE FloatVector square_root(FloatVector a) { return _mm512_sqrt_ps(a); }
#else
typedef IntVector MaskVector;
CALSEG_INLINE bool any(MaskVector mask) {
#if defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)mask) != 0;
#elif defined(__aarch64__)
    return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
    int32_t r = 0;
    for (int i = 0; i < kLanes; ++i) r |= mask[i];
    return r != 0;
#endif
}
CALSEG_INLINE bool all(MaskVector mask) { return !any(~mask); }
CALSEG_INLINE int count_of(MaskVector mask) {
#if defined(__AVX2__)
    return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps((__m256)mask)));
#elif defined(__SSE2__)
    return __builtin_popcount(static_cast<unsigned>(_mm_movemask_ps((__m128)mask)));
#elif defined(__aarch64__)
    return -vaddvq_s32((int32x4_t)mask);
#else
    int r = 0;
    for (int i = 0; i < kLanes; ++i) r -= mask[i];
    return r;
#endif
}
CALSEG_INLINE MaskVector equal(IntVector a, IntVector b) { return a == b; }
CALSEG_INLINE MaskVector less(IntVector a, IntVector b) { return a < b; }
CALSEG_INLINE MaskVector equal(FloatVector a, FloatVector b) { return a == b; }
CALSEG_INLINE MaskVector less(FloatVector a, FloatVector b) { return a < b; }
CALSEG_INLINE IntVector select(MaskVector m, IntVector a, IntVector b) { return (a & m) | (b & ~m); }
#if defined(__AVX2__)
CALSEG_INLINE FloatVector select(MaskVector m, FloatVector a, FloatVector b) { return _mm256_blendv_ps(b, a, (__m256)m); }
CALSEG_INLINE FloatVector larger(FloatVector a, FloatVector b) { return _mm256_max_ps(a, b); }
CALSEG_INLINE FloatVector square_root(FloatVector a) { return _mm256_sqrt_ps(a); }
#else
CALSEG_INLINE FloatVector select(MaskVector m, FloatVector a, FloatVector b) {
    return (FloatVector)(((IntVector)a & m) | ((IntVector)b & ~m));
}
#if defined(__SSE2__)
CALSEG_INLINE FloatVector larger(FloatVector a, FloatVector b) { return _mm_max_ps(a, b); }
CALSEG_INLINE FloatVector square_root(FloatVector a) { return _mm_sqrt_ps(a); }
#else
CALSEG_INLINE FloatVector larger(FloatVector a, FloatVector b) { return select(b < a, a, b); }
CALSEG_INLINE FloatVector square_root(FloatVector a) {
#if defined(__aarch64__)
    return (FloatVector)vsqrtq_f32((float32x4_t)a);
#else
    for (int i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]);
    return a;
#endif
}
#endif
#endif
#endif

// Computes 1 / a to within an ulp. No element may be 0, subnormal or infinite.
CALSEG_INLINE FloatVector reciprocal(FloatVector a) {
#if defined(__AVX512F__)
    const FloatVector r = _mm512_rcp14_ps(a);
    return r * (1.0f - a * r) + r;
#else
    return 1.0f / a;
#endif
}
CALSEG_INLINE FloatVector multiply_subtract(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
    // The intrinsic always fuses. Written as a * b - c, the expression is fused in one place and not in another.
    return _mm512_fmsub_ps(a, b, c);
#else
    return a * b - c;
#endif
}
CALSEG_INLINE IntVector to_int_bits(FloatVector a) { return (IntVector)a; }
CALSEG_INLINE FloatVector magnitude(FloatVector a) { return (FloatVector)((IntVector)a & 0x7fffffff); }
CALSEG_INLINE FloatVector to_float_bits(IntVector a) { return (FloatVector)a; }
CALSEG_INLINE FloatVector convert(IntVector a) { return __builtin_convertvector(a, FloatVector); }
CALSEG_INLINE FloatVector to_values(IntVector a, FloatVector) { return convert(a); }
CALSEG_INLINE IntVector truncated_integer(FloatVector a) { return __builtin_convertvector(a, IntVector); }
CALSEG_INLINE IntVector nearest_integer(FloatVector a) {  // rounds halves to even
#if defined(__AVX512F__)
    return (IntVector)_mm512_cvtps_epi32(a);
#elif defined(__AVX2__)
    return (IntVector)_mm256_cvtps_epi32(a);
#elif defined(__SSE2__)
    return (IntVector)_mm_cvtps_epi32(a);
#elif defined(__aarch64__)
    return (IntVector)vcvtnq_s32_f32((float32x4_t)a);
#else
    IntVector r;
    for (int i = 0; i < kLanes; ++i) r[i] = static_cast<int32_t>(std::nearbyint(a[i]));
    return r;
#endif
}

CALSEG_INLINE void store_words(uint64_t* to, IntVector low, IntVector high) {
#if defined(__AVX512F__)
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi32((__m512i)low, first, (__m512i)high));
    _mm512_storeu_si512(to + 8, _mm512_permutex2var_epi32((__m512i)low, second, (__m512i)high));
#elif defined(__SSE2__) && !defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32((__m128i)low, (__m128i)high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2), _mm_unpackhi_epi32((__m128i)low, (__m128i)high));
#elif defined(__aarch64__)
    vst1q_u64(to, (uint64x2_t)vzip1q_s32((int32x4_t)low, (int32x4_t)high));
    vst1q_u64(to + 2, (uint64x2_t)vzip2q_s32((int32x4_t)low, (int32x4_t)high));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint64_t>(static_cast<uint32_t>(high[i])) << 32 | static_cast<uint32_t>(low[i]);
#endif
}

CALSEG_INLINE FloatVector gather(const float* from, IntVector at) {
#if defined(__AVX512F__)
    return _mm512_i32gather_ps((__m512i)at, from, 4);
#elif defined(__AVX2__)
    return _mm256_i32gather_ps(from, (__m256i)at, 4);
#else
    FloatVector r;
    for (int i = 0; i < kLanes; ++i) r[i] = from[at[i]];
    return r;
#endif
}

template <>
struct Vectors<float> {
    using F = FloatVector;
    using I = IntVector;
    using M = MaskVector;
};
#endif

// ---- memory and constants, for both kinds of vectors ----

template <class V, class T>
CALSEG_INLINE V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V, class T>
CALSEG_INLINE void store(T* to, V v) {
    std::memcpy(to, &v, sizeof v);
}
#if defined(CALSEG_NATIVE_FLOAT)
// Stores through a vector type instead of memcpy. A memcpy may change any memory, so the compiler would read every pointer
// again after it. A store of a vector changes only numbers of its own type.
typedef float FloatVectorAt __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t IntVectorAt __attribute__((vector_size(4 * kLanes), aligned(4)));
CALSEG_INLINE void store(float* to, FloatVector v) { *reinterpret_cast<FloatVectorAt*>(to) = v; }
CALSEG_INLINE void store(int32_t* to, IntVector v) { *reinterpret_cast<IntVectorAt*>(to) = v; }
#endif
template <class V>
struct Broadcast;
template <class T>
struct Broadcast<Array<T>> {
    static CALSEG_MEMBER Array<T> of(T x) {
        Array<T> r;
        for (auto& value : r.v) value = x;
        return r;
    }
};
#if defined(CALSEG_NATIVE_FLOAT)
template <>
struct Broadcast<FloatVector> {
    static CALSEG_MEMBER FloatVector of(float x) { return x - FloatVector{}; }
};
template <>
struct Broadcast<IntVector> {
    static CALSEG_MEMBER IntVector of(int32_t x) { return x - IntVector{}; }
};
#endif
template <class V, class T>
CALSEG_INLINE V broadcast(T x) {
    return Broadcast<V>::of(x);
}

// Asks for the line of memory at an address, which is read soon, to be brought into the second-level cache.
CALSEG_INLINE void prefetch_line([[maybe_unused]] const void* at) {
#if defined(CALSEG_NATIVE_FLOAT)
    __builtin_prefetch(at, 0, 2);
#endif
}

// ---- plain numbers, in place of the standard library's templates ----

CALSEG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CALSEG_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
CALSEG_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
template <class T>
void fill(T* from, T* to, T value) {
    for (; from < to; ++from) *from = value;
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
