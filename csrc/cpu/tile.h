// Tiles: a few dozen to a few hundred consecutive voxels of one batch item, all classes, in the nearest cache, in the
// compute type (float, or double for float64). A tile is blocks of kLanes voxels, each [C][kLanes]: loading and storing
// walk long rows of memory, converting dtypes and layouts, and the mathematics, written once, walks the classes of one
// block with everything per voxel in registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "cpu/simd.h"
#include "host/arguments.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int kMaxTile = 1024;

// Not std::min and friends: a library template compiled for one instruction set may be merged into another's code.
CALSEG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CALSEG_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
template <class T>
void fill(T* from, T* to, T value) {
    for (; from < to; ++from) *from = value;
}
CALSEG_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// ---- how a call divides ----

// The voxels of a tile: s .. s + count of item n.
struct Span {
    int64_t n = 0, s = 0;
    int count = 0;
};

// The tile's length and the number of voxels of a chunk: functions of the shape alone.
struct Tiling {
    Shape shape;
    int length;        // voxels of a tile, a multiple of kLanes
    int64_t chunk;     // voxels of a chunk, a multiple of length
    int64_t per_item;  // chunks of a batch item

    // wanted: voxels of a tile; chunk_elements: about how many logits a chunk should hold
    Tiling(const Shape& s, int64_t wanted, int64_t chunk_elements) : shape(s) {
        const int64_t bounded = smaller(larger(wanted / 64 * 64, 128), kMaxTile);
        length = static_cast<int>(smaller(bounded, round_up(larger(s.S, 1), kLanes)));
        chunk = length * larger(1, chunk_elements / (length * s.C));
        per_item = (s.S + chunk - 1) / chunk;
    }
    int64_t num_chunks() const { return shape.N * per_item; }

    // body(tile, the one after it) for every tile of a chunk; no tile crosses a multiple of 2^32 voxels, where the second
    // word of the noise's counter changes.
    template <class Body>
    CALSEG_MEMBER void for_tiles(int64_t index, const Body& body) const {
        Span tile = span(index, index % per_item * chunk);
        while (tile.count > 0) {
            const Span next = span(index, tile.s + tile.count);
            body(tile, next);
            tile = next;
        }
    }

 private:
    Span span(int64_t index, int64_t s) const {
        const int64_t n = index / per_item, end = smaller((index % per_item + 1) * chunk, shape.S);
        const int64_t to_boundary = (int64_t{1} << 32) - ((n * shape.S + s) & 0xffffffff);
        return {n, s, static_cast<int>(smaller(smaller(length, end - s), to_boundary))};
    }
};

// How many voxels of several [C] tensors the nearest cache holds.
CALSEG_INLINE int64_t voxels_in_cache(int64_t C, int64_t tensors, int64_t element_bytes) {
    return 16 * 1024 / (tensors * C * element_bytes);
}

// Scratch memory handed out in rows that start on a cache line.
class Scratch {
 public:
    explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(next_);
        next_ += bytes<T>(count);
        return p;
    }
    template <class T>
    static int64_t bytes(int64_t count) {
        return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    }

 private:
    char* next_;
};

// ---- dtypes ----

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

CALSEG_INLINE uint16_t narrow_bf16(float x) {  // round to nearest even; NaN stays NaN
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

CALSEG_INLINE float widen_f16(uint16_t x) {
    // Multiplying by 2^112 moves the exponent and makes subnormals right; Inf and NaN need theirs set.
    uint32_t bits = bits_of(float_of(static_cast<uint32_t>(x & 0x7fffu) << 13) * 0x1p112f);
    bits = (x & 0x7c00u) == 0x7c00u ? (bits | 0x7f800000u) : bits;
    return float_of(bits | static_cast<uint32_t>(x & 0x8000u) << 16);
}

CALSEG_INLINE uint16_t narrow_f16(float x) {  // round to nearest even
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normals round at bit 13; adding 1/2 rounds subnormals at 2^-24.
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

// kLanes contiguous values
template <class T, class From>
CALSEG_INLINE void widen_lanes(T* to, const From* from) {
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<T>(widened(from[i]));
}
template <class To, class T>
CALSEG_INLINE void narrow_lanes(To* to, const T* from) {
    for (int i = 0; i < kLanes; ++i) narrow(to[i], from[i]);
}
#if defined(CALSEG_NATIVE_FLOAT)
// Spelt out: inlined into a long loop, the plain ones above are not vectorised.
typedef uint16_t ShortVector __attribute__((vector_size(2 * kLanes)));
CALSEG_INLINE void widen_lanes(float* to, const float* from) { store(to, load<FloatVector>(from)); }
CALSEG_INLINE void narrow_lanes(float* to, const float* from) { store(to, load<FloatVector>(from)); }
CALSEG_INLINE void widen_lanes(float* to, const BF16* from) {
#if defined(__AVX512F__)
    // one instruction, for which the compiler, asked for the conversion, takes four
    store(to, _mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16));
#else
    store(to, __builtin_convertvector(load<ShortVector>(from), UintVector) << 16);
#endif
}
CALSEG_INLINE void narrow_lanes(BF16* to, const float* from) {  // as narrow_bf16
    const FloatVector x = load<FloatVector>(from);
    const UintVector bits = (UintVector)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const IntVector nan = IntVector{} + 0x7fc0;
    store(to, __builtin_convertvector((UintVector)select(equal(x, x), (IntVector)rounded, nan), ShortVector));
}
#endif
#if defined(__F16C__)
// GCC does not vectorise half precision by itself: the processor's conversions, eight at a time.
CALSEG_INLINE void widen_lanes(float* to, const F16* from) {
    for (int i = 0; i < kLanes; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
}
CALSEG_INLINE void narrow_lanes(F16* to, const float* from) {
    for (int i = 0; i < kLanes; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
}
#endif

// N values, a multiple of kLanes
template <class To, class T, int N>
CALSEG_INLINE void narrow_line(To* to, const T (&from)[N]) {
    for (int i = 0; i < N; i += kLanes) narrow_lanes(to + i, from + i);
}
#if defined(__AVX512F__)
CALSEG_INLINE void narrow_line(BF16* to, const float (&from)[32]) {  // as narrow_bf16: the upper halves of two vectors at once
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

// visit(typed null pointer) for the floating dtype of a view
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

// ---- load ----

// Class c of the blocks [C][kLanes] <- voxels of a span, where voxels are contiguous. The lanes beyond become 0.
template <class T>
void load_row(T* to, const TensorView& view, const Span& span, int64_t c, int64_t C) {
    const int whole = span.count / kLanes, rest = span.count % kLanes;
    with_float_type(view.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const From* row = static_cast<const From*>(view.data) + span.n * view.stride_n + c * view.stride_c + span.s;
        T* block = to + c * kLanes;
        for (int b = 0; b < whole; ++b, row += kLanes, block += C * kLanes) widen_lanes(block, row);
        for (int i = 0; i < rest; ++i) block[i] = static_cast<T>(widened(row[i]));
        if (rest) fill(block + rest, block + kLanes, T(0));
    });
}

// The same for all classes where voxels are not contiguous: voxel by voxel.
template <class T>
void load_voxels(T* to, const TensorView& view, const Span& span, int64_t C) {
    with_float_type(view.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const int64_t step_c = view.stride_c, step_s = view.stride_s;
        const From* from = static_cast<const From*>(view.data) + span.n * view.stride_n + span.s * step_s;
        for (int i = 0; i < span.count; ++i) {
            const From* voxel = from + i * step_s;
            T* lane = to + i / kLanes * C * kLanes + i % kLanes;
            if (step_c == 1)
                for (int64_t c = 0; c < C; ++c) lane[c * kLanes] = static_cast<T>(widened(voxel[c]));
            else
                for (int64_t c = 0; c < C; ++c) lane[c * kLanes] = static_cast<T>(widened(voxel[c * step_c]));
        }
    });
    if (const int rest = span.count % kLanes)
        for (int64_t c = 0; c < C; ++c) {
            T* block = to + (span.count / kLanes * C + c) * kLanes;
            fill(block + rest, block + kLanes, T(0));
        }
}

template <class T>
void load_tile(T* to, const TensorView& view, const Span& span, int64_t C) {
    if (view.stride_s != 1) return load_voxels(to, view, span, C);
    for (int64_t c = 0; c < C; ++c) load_row(to, view, span, c, C);
}

// Ask for kLanes voxels from s on, all classes: into the second cache, where rows a power of two apart do not evict each other.
CALSEG_INLINE void prefetch_block(const TensorView& view, int64_t n, int64_t s, int64_t C) {
#if defined(__GNUC__)
    const int64_t bytes = dtype_bytes(view.dtype), step = view.stride_c * bytes;
    const char* from = static_cast<const char*>(view.data) + (n * view.stride_n + s) * bytes;
    for (int64_t c = 0; c < C; ++c) {
        __builtin_prefetch(from + c * step, 0, 2);
        __builtin_prefetch(from + c * step + 64, 0, 2);  // again with the next block: a processor drops what it has no room for
    }
#else
    (void)view, (void)n, (void)s, (void)C;
#endif
}

// ignore_index among labels of one type, which may not be able to hold it: then no label is ignored.
template <class From>
struct IgnoreIndex {
    From value;
    bool possible;

    explicit IgnoreIndex(int64_t index)
        : value(static_cast<From>(index)),
          possible((std::is_signed<From>::value || index >= 0) && static_cast<int64_t>(static_cast<From>(index)) == index) {}
    CALSEG_MEMBER bool operator==(From label) const { return possible & (label == value); }
    CALSEG_MEMBER bool operator!=(From label) const { return !(*this == label); }
};

// The classes among labels of one type.
template <class From>
struct ClassLabels {
    using Unsigned = std::make_unsigned_t<From>;
    Unsigned last;

    explicit ClassLabels(int64_t C) : last(static_cast<Unsigned>(smaller(C - 1, kMaxLabel))) {}
    CALSEG_MEMBER bool contain(From label) const { return static_cast<Unsigned>(label) <= last; }

 private:
    static constexpr auto kMaxLabel = static_cast<int64_t>(static_cast<Unsigned>(-1) / (std::is_signed<From>::value ? 2 : 1) & INT64_MAX);
};

// Labels of a tile: the class, or -1 where the voxel is ignored or the label is no class (padding included). Returns the
// number that count.
inline int load_labels(int32_t* to, const Labels& labels, const Span& span, int64_t C) {
    const int count = span.count;
    const int padded = static_cast<int>(round_up(count, kLanes));
    fill<int32_t>(to + count, to + padded, -1);
    if (!labels.tensor) {
        fill<int32_t>(to, to + count, 0);
        return count;
    }
    with_integer_type(labels.tensor.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const int64_t step = labels.tensor.stride_s;
        const IgnoreIndex<From> ignore(labels.ignore_index);
        const ClassLabels<From> classes(labels.is_mask ? INT64_MAX : C);
        const From* from = static_cast<const From*>(labels.tensor.data) + span.n * labels.tensor.stride_n + span.s * step;
        const int32_t keep = labels.is_mask ? 0 : -1;
        // an index that is no class needs no comparison
        const bool may_be_class = ignore.possible && classes.contain(ignore.value);
        const auto convert = [&](auto any_ignored, auto by) {
            for (int i = 0; i < count; ++i) {
                const From label = from[i * by];
                const bool counts = classes.contain(label) & (!any_ignored | (ignore != label));
                to[i] = counts ? static_cast<int32_t>(label) & keep : -1;
            }
        };
        using Yes = std::true_type;
        using No = std::false_type;
        using One = std::integral_constant<int64_t, 1>;
        if (step != 1) convert(Yes(), step);
        else if (may_be_class) convert(Yes(), One());
        else convert(No(), One());
    });
    int counted = 0;
    for (int i = 0; i < count; ++i) counted += to[i] >= 0;
    return counted;
}

// Asks for the labels of the next tile, a block at a time: read all at once, they would have to be waited for.
class LabelsAhead {
 public:
    LabelsAhead() = default;
    LabelsAhead(const Labels& labels, const Span& next)
        : from_(static_cast<const char*>(labels.tensor.data) +
                (next.n * labels.tensor.stride_n + next.s * labels.tensor.stride_s) * dtype_bytes(labels.tensor.dtype)),
          block_bytes_(labels.tensor && labels.tensor.stride_s == 1 && next.count > 0 ? kLanes * dtype_bytes(labels.tensor.dtype) : 0) {}

    CALSEG_MEMBER void block(int b) const {
#if defined(__GNUC__)
        for (int64_t at = 0; at < block_bytes_; at += 64) __builtin_prefetch(from_ + b * block_bytes_ + at, 0, 2);
#else
        (void)b;
#endif
    }

 private:
    const char* from_ = nullptr;
    int64_t block_bytes_ = 0;
};

// What lies under an ignored voxel, NaN included, must not reach the arithmetic.
template <class T>
void clear_ignored(T* tile, const int32_t* labels, int count, int64_t C) {
    for (int b = 0; b * kLanes < count; ++b)
        for (int64_t c = 0; c < C; ++c)
            for (int i = 0; i < kLanes; ++i) {
                T& value = tile[(b * C + c) * kLanes + i];
                value = labels[b * kLanes + i] < 0 ? T(0) : value;
            }
}

// ---- store ----

// Results larger than the caches are not read again soon: streaming stores save reading each line first.
constexpr int64_t kStreamBytes = 4 << 20;

inline bool is_streamed(const TensorView& result, const Shape& shape) {
    return result && shape.voxels() * shape.C * dtype_bytes(result.dtype) >= kStreamBytes;
}

// 64 bytes to an address that is a multiple of 64.
CALSEG_INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
    for (int i = 0; i < 2; ++i)
        _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
#elif defined(__SSE2__)
    for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
#else
    std::memcpy(to, from, 64);
#endif
}

inline void stream_bytes(void* to, const void* from, int64_t bytes) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
#if defined(__SSE2__)
    const int64_t head = smaller(-reinterpret_cast<intptr_t>(out) & 63, bytes);
    if (head) std::memcpy(out, in, static_cast<size_t>(head));
    int64_t at = head;
    for (; at + 64 <= bytes; at += 64) stream_line(out + at, in + at);
    out += at;
    in += at;
    bytes -= at;
#endif
    if (bytes) std::memcpy(out, in, static_cast<size_t>(bytes));
}

// kLanes values at an address that is a multiple of their size, where the instruction set has such a store.
template <class To>
constexpr bool kStreamed = false;
#if defined(__SSE2__)
template <>
constexpr bool kStreamed<float> = true;
#if defined(__AVX2__)
template <>
constexpr bool kStreamed<BF16> = true;
template <>
constexpr bool kStreamed<F16> = true;
#endif
template <class To>
CALSEG_INLINE void stream_lanes(To* to, const To* from) {
    constexpr int kBytes = kLanes * sizeof(To);
#if defined(__AVX512F__)
    if constexpr (kBytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#endif
#if defined(__AVX__)
    if constexpr (kBytes == 32)
        return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
    if constexpr (kBytes == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
template <class To>
CALSEG_INLINE void stream_lanes(To*, const To*) {}
#endif
template <class To>
CALSEG_INLINE bool is_aligned_to_lanes(const To* p) {
    return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(To)) == 0;
}

// Streamed lines must be seen by whoever reads after the chunk.
CALSEG_INLINE void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Class c of a span's voxels, where voxels are contiguous: block(b) gives kLanes of them.
template <class T, class Block>
CALSEG_INLINE void write_row(const TensorView& view, const Span& span, int64_t c, bool stream, const Block& block_at) {
    with_float_type(view.dtype, [&](auto* type) {
        using To = std::remove_pointer_t<decltype(type)>;
        To* row = static_cast<To*>(view.data) + span.n * view.stride_n + c * view.stride_c + span.s;
        const Block block = block_at;  // a copy: what lies behind a reference is read anew after every store
        const int whole = span.count / kLanes, rest = span.count % kLanes;
        int b = 0;
        alignas(64) T lanes[kLanes];
        if (kStreamed<To> && stream && is_aligned_to_lanes(row))
            for (alignas(64) To narrowed[kLanes]; b < whole; ++b) {
                store(lanes, block(b));
                narrow_lanes(narrowed, lanes);
                stream_lanes(row + b * kLanes, narrowed);
            }
        alignas(64) To staged[kMaxTile];  // the narrowed row, to be streamed in whole cache lines
        const bool in_stages = stream && b < whole;
        To* out = in_stages ? staged : row;
        for (; b < whole; ++b) {
            store(lanes, block(b));
            narrow_lanes(out + b * kLanes, lanes);
        }
        if (rest) {
            store(lanes, block(whole));
            for (int i = 0; i < rest; ++i) narrow(out[whole * kLanes + i], lanes[i]);
        }
        if (in_stages) stream_bytes(row, staged, span.count * static_cast<int64_t>(sizeof(To)));
    });
}

// Class c of the blocks [C][kLanes].
template <class T>
void store_row(const TensorView& view, const Span& span, int64_t c, const T* from, int64_t C, bool stream) {
    write_row<T>(view, span, c, stream, [=](int b) { return load<F<T>>(from + (b * C + c) * kLanes); });
}

// The same for all classes where voxels are not contiguous: voxel by voxel.
template <class T>
void store_voxels(const TensorView& view, const Span& span, const T* from, int64_t C) {
    with_float_type(view.dtype, [&](auto* type) {
        using To = std::remove_pointer_t<decltype(type)>;
        const int64_t step_c = view.stride_c, step_s = view.stride_s;
        To* to = static_cast<To*>(view.data) + span.n * view.stride_n + span.s * step_s;
        for (int i = 0; i < span.count; ++i) {
            To* voxel = to + i * step_s;
            const T* lane = from + i / kLanes * C * kLanes + i % kLanes;
            if (step_c == 1)
                for (int64_t c = 0; c < C; ++c) narrow(voxel[c], lane[c * kLanes]);
            else
                for (int64_t c = 0; c < C; ++c) narrow(voxel[c * step_c], lane[c * kLanes]);
        }
    });
}

template <class T>
void store_tile(const TensorView& view, const Span& span, const T* from, int64_t C, bool stream) {
    if (view.stride_s != 1) return store_voxels(view, span, from, C);
    for (int64_t c = 0; c < C; ++c) store_row(view, span, c, from, C, stream);
}

// The tiles of an input, each overwritten by that of a result (as a rule, the gradient of the input).
//
// While a tile is computed, the next one is asked for, block by block.
template <class T>
class TensorTile {
 public:
    static int64_t bytes(int64_t C, int64_t length) { return Scratch::bytes<T>(C * length); }

    // input, result: either may be absent
    TensorTile(Scratch& scratch, const TensorView& input, const TensorView& result, const Shape& shape, int length)
        : input_(input),
          result_(result),
          C_(shape.C),
          stream_(is_streamed(result, shape)),
          prefetch_(input && input.stride_s == 1),
          tile_(scratch.take<T>(C_ * length)) {}
    ~TensorTile() { finish_streams(); }

    T* tile() { return tile_; }
    T* block(int b) { return tile_ + b * C_ * kLanes; }

    void begin(const Span& tile, const Span& next) {
        if (input_) load_tile(tile_, input_, tile, C_);
        next_ = next;
    }
    // Called with every block.
    CALSEG_MEMBER void prefetch_next(int b) {
        if (prefetch_ && b * kLanes < next_.count) prefetch_block(input_, next_.n, next_.s + b * kLanes, C_);
    }
    void end(const Span& tile) {
        if (result_) store_tile(result_, tile, tile_, C_, stream_);
    }

 private:
    TensorView input_, result_;
    int64_t C_;
    bool stream_, prefetch_;
    T* tile_;
    Span next_;
};

// The sum of a row in double, in a fixed order; with so many partial sums none waits for the one before.
template <class T>
double sum_row(const T* row, int count) {
    constexpr int kPartial = 32;
    double part[kPartial] = {};
    int i = 0;
    for (; i + kPartial <= count; i += kPartial)
        for (int j = 0; j < kPartial; ++j) part[j] += static_cast<double>(row[i + j]);
    for (; i < count; ++i) part[i % kPartial] += static_cast<double>(row[i]);
    for (int width = kPartial / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) part[j] += part[j + width];
    return part[0];
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
