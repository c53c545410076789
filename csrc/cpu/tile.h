// Tiles: a few dozen to a few hundred consecutive voxels of one batch item, all classes, as rows [C][length] of the
// compute type (float, or double for float64) in the nearest cache. Loading and storing convert dtypes and layouts, so
// that the mathematics is written once.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/vector_math.h"
#include "kernels.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int kLanes = 16;  // rows are padded to a multiple of this, so that vector loops have no remainder
constexpr int kMinTile = 32, kMaxTile = 1024;

// Not std::min and friends: a library template compiled for one instruction set may be merged into another's code.
CALSEG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CALSEG_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
template <class T>
void fill(T* from, T* to, T value) {
    for (; from < to; ++from) *from = value;
}
CALSEG_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// ---- how a call divides ----

// The tile's length and the number of voxels of a chunk: functions of the shape alone.
struct Tiling {
    Shape shape;
    int length;          // voxels of a tile
    int64_t chunk;       // voxels of a chunk, a multiple of length
    int64_t per_item;    // chunks of a batch item

    // rows: rows of the tile's working set; chunk_elements: about how many logits a chunk should hold
    Tiling(const Shape& s, int64_t rows, int64_t element_bytes, int64_t chunk_elements) : shape(s) {
        const int64_t l1_bytes = 24 * 1024;
        int64_t fit = l1_bytes / larger(1, rows * element_bytes) / kMinTile * kMinTile;
        fit = smaller(larger(fit, kMinTile), kMaxTile);
        length = static_cast<int>(smaller(fit, round_up(larger(s.S, 1), kLanes)));
        const int64_t tiles = larger(1, chunk_elements / larger(1, length * s.C));
        chunk = length * tiles;
        per_item = (s.S + chunk - 1) / chunk;
    }
    int64_t num_chunks() const { return shape.N * per_item; }

    // body(n, first voxel in the item, count) for every tile of a chunk; no tile crosses a multiple of 2^32 voxels,
    // where the second word of the noise's counter changes.
    template <class Body>
    void for_tiles(int64_t index, const Body& body) const {
        const int64_t n = index / per_item;
        int64_t s = index % per_item * chunk;
        const int64_t end = smaller(s + chunk, shape.S);
        while (s < end) {
            const int64_t to_boundary = (int64_t{1} << 32) - ((n * shape.S + s) & 0xffffffff);
            const int64_t count = smaller(smaller(length, end - s), to_boundary);
            body(n, s, static_cast<int>(count));
            s += count;
        }
    }
};

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

CALSEG_INLINE float widen_bf16(uint16_t x) { return bits_float(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)); }

CALSEG_INLINE uint16_t narrow_bf16(float x) {  // round to nearest even; NaN stays NaN
    uint32_t bits = static_cast<uint32_t>(float_bits(x));
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

CALSEG_INLINE float widen_f16(uint16_t x) {
    const uint32_t shifted = static_cast<uint32_t>(x & 0x7fffu) << 13;
    // Multiplying by 2^112 moves the exponent and makes subnormals right; Inf and NaN need theirs set.
    float value = bits_float(static_cast<int32_t>(shifted)) * 0x1p112f;
    uint32_t bits = static_cast<uint32_t>(float_bits(value));
    bits = (x & 0x7c00u) == 0x7c00u ? (bits | 0x7f800000u) : bits;
    return bits_float(static_cast<int32_t>(bits | static_cast<uint32_t>(x & 0x8000u) << 16));
}

CALSEG_INLINE uint16_t narrow_f16(float x) {  // round to nearest even
    const uint32_t bits = static_cast<uint32_t>(float_bits(x)), sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Adding a power of two with the right ulp rounds: normals at bit 13, subnormals at 2^-24.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t subnormal = static_cast<uint32_t>(float_bits(bits_float(static_cast<int32_t>(magnitude)) + 0.5f)) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return static_cast<uint16_t>(sign | result);
}

template <class T>
void widen_row(T* CALSEG_RESTRICT to, const float* CALSEG_RESTRICT from, int count) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}
template <class T>
void widen_row(T* CALSEG_RESTRICT to, const double* CALSEG_RESTRICT from, int count) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

template <class T>
void widen_row(T* CALSEG_RESTRICT to, const BF16* CALSEG_RESTRICT from, int count) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<T>(widen_bf16(from[i].bits));
}
template <class T>
void widen_row(T* CALSEG_RESTRICT to, const F16* CALSEG_RESTRICT from, int count) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<T>(widen_f16(from[i].bits));
}

template <class To, class T>
void narrow_row(To* CALSEG_RESTRICT to, const T* CALSEG_RESTRICT from, int count) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}
template <class T>
void narrow_row(BF16* CALSEG_RESTRICT to, const T* CALSEG_RESTRICT from, int count) {
    for (int i = 0; i < count; ++i) to[i].bits = narrow_bf16(static_cast<float>(from[i]));
}
template <class T>
void narrow_row(F16* CALSEG_RESTRICT to, const T* CALSEG_RESTRICT from, int count) {
    for (int i = 0; i < count; ++i) to[i].bits = narrow_f16(static_cast<float>(from[i]));
}

#if defined(__F16C__)
// GCC does not vectorise half precision by itself: the conversions of the processor, eight at a time.
inline void widen_row(float* CALSEG_RESTRICT to, const F16* CALSEG_RESTRICT from, int count) {
    int i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (; i < count; ++i) to[i] = widen_f16(from[i].bits);
}
inline void narrow_row(F16* CALSEG_RESTRICT to, const float* CALSEG_RESTRICT from, int count) {
    int i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    for (; i < count; ++i) to[i].bits = narrow_f16(from[i]);
}
#endif

// visit(typed null pointer) for the floating dtype of a view
template <class Visit>
CALSEG_INLINE void with_float_type(DType dtype, const Visit& visit) {
    switch (dtype) {
        case DType::f64: return visit(static_cast<double*>(nullptr));
        case DType::bf16: return visit(static_cast<BF16*>(nullptr));
        case DType::f16: return visit(static_cast<F16*>(nullptr));
        default: return visit(static_cast<float*>(nullptr));
    }
}

template <class Visit>
CALSEG_INLINE void with_integer_type(DType dtype, const Visit& visit) {
    switch (dtype) {
        case DType::i8: return visit(static_cast<int8_t*>(nullptr));
        case DType::i16: return visit(static_cast<int16_t*>(nullptr));
        case DType::u16: return visit(static_cast<uint16_t*>(nullptr));
        case DType::i32: return visit(static_cast<int32_t*>(nullptr));
        case DType::u32: return visit(static_cast<uint32_t*>(nullptr));
        case DType::i64: return visit(static_cast<int64_t*>(nullptr));
        case DType::u64: return visit(static_cast<uint64_t*>(nullptr));
        default: return visit(static_cast<uint8_t*>(nullptr));  // uint8 and bool
    }
}

CALSEG_INLINE int64_t dtype_bytes(DType dtype) {
    switch (dtype) {
        case DType::f64: case DType::i64: case DType::u64: return 8;
        case DType::f32: case DType::i32: case DType::u32: return 4;
        case DType::bf16: case DType::f16: case DType::i16: case DType::u16: return 2;
        default: return 1;
    }
}

// ---- load ----

// Rows [C][stride] <- voxels s .. s + count of item n; lanes up to `padded` become 0.
template <class T>
void load_tile(T* CALSEG_RESTRICT to, int stride, const TensorView& view, int64_t n, int64_t s, int count, int padded, int64_t C) {
    with_float_type(view.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const From* from = static_cast<const From*>(view.data) + n * view.stride_n + s * view.stride_s;
        if (view.stride_s == 1) {
            for (int64_t c = 0; c < C; ++c) widen_row(to + c * stride, from + c * view.stride_c, count);
        } else if (view.stride_c == 1) {
            T voxel[kLanes];
            for (int i = 0; i < count; ++i) {
                const From* classes = from + i * view.stride_s;
                for (int64_t c0 = 0; c0 < C; c0 += kLanes) {
                    const int width = static_cast<int>(smaller(kLanes, C - c0));
                    widen_row(voxel, classes + c0, width);
                    for (int c = 0; c < width; ++c) to[(c0 + c) * stride + i] = voxel[c];
                }
            }
        } else {
            for (int64_t c = 0; c < C; ++c)
                for (int i = 0; i < count; ++i) widen_row(to + c * stride + i, from + c * view.stride_c + i * view.stride_s, 1);
        }
    });
    if (padded > count)
        for (int64_t c = 0; c < C; ++c) fill(to + c * stride + count, to + c * stride + padded, T(0));
}

// Ask for the next tile's rows while this one is computed: many short rows are too much for the hardware's streams.
CALSEG_INLINE void prefetch_tile(const TensorView& view, int64_t n, int64_t s, int count, int64_t C) {
#if defined(__GNUC__)
    const int64_t bytes = dtype_bytes(view.dtype);
    const char* from = static_cast<const char*>(view.data) + (n * view.stride_n + s * view.stride_s) * bytes;
    if (view.stride_s == 1) {
        for (int64_t c = 0; c < C; ++c)
            for (int64_t at = 0; at < count * bytes; at += 64) __builtin_prefetch(from + c * view.stride_c * bytes + at, 0, 3);
    }
#else
    (void)view, (void)n, (void)s, (void)count, (void)C;
#endif
}

// Labels of a tile: the class, or -1 where the voxel is ignored (padding included). Returns the number that count.
inline int load_labels(int32_t* CALSEG_RESTRICT to, const Labels& labels, int64_t n, int64_t s, int count, int padded) {
    int counted = count;
    if (!labels.view) {
        fill<int32_t>(to, to + count, 0);
    } else {
        counted = 0;
        with_integer_type(labels.view.dtype, [&](auto* type) {
            using From = std::remove_pointer_t<decltype(type)>;
            const int64_t step = labels.view.stride_s, ignore = labels.ignore_index;
            const From* from = static_cast<const From*>(labels.view.data) + n * labels.view.stride_n + s * step;
            const int32_t keep = labels.is_mask ? 0 : -1;
            if (step == 1) {
                for (int i = 0; i < count; ++i)
                    to[i] = static_cast<int64_t>(from[i]) == ignore ? -1 : static_cast<int32_t>(from[i]) & keep;
            } else {
                for (int i = 0; i < count; ++i)
                    to[i] = static_cast<int64_t>(from[i * step]) == ignore ? -1 : static_cast<int32_t>(from[i * step]) & keep;
            }
        });
        for (int i = 0; i < count; ++i) counted += to[i] >= 0;
    }
    fill<int32_t>(to + count, to + padded, -1);
    return counted;
}

// What lies under an ignored voxel, NaN included, must not reach the arithmetic.
template <class T>
void clear_ignored(T* CALSEG_RESTRICT rows, int stride, const int32_t* CALSEG_RESTRICT labels, int padded, int64_t C) {
    for (int64_t c = 0; c < C; ++c)
        for (int i = 0; i < padded; ++i) rows[c * stride + i] = labels[i] < 0 ? T(0) : rows[c * stride + i];
}

// ---- store ----

// Gradients are larger than the caches and not read again soon: streaming stores save reading each line first.
constexpr int64_t kStreamBytes = 4 << 20;

CALSEG_INLINE bool streams(const TensorView& view, const Shape& shape) {
    return view && shape.voxels() * shape.C * dtype_bytes(view.dtype) >= kStreamBytes;
}

inline void stream_bytes(void* to, const void* from, int64_t bytes) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
#if defined(__SSE2__)
    const int64_t head = smaller(-reinterpret_cast<intptr_t>(out) & 63, bytes);
    std::memcpy(out, in, static_cast<size_t>(head));
    int64_t at = head;
    for (; at + 64 <= bytes; at += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + at), _mm512_loadu_si512(in + at));
#elif defined(__AVX__)
        for (int part = 0; part < 64; part += 32)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(out + at + part),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + at + part)));
#else
        for (int part = 0; part < 64; part += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(out + at + part),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + at + part)));
#endif
    }
    out += at;
    in += at;
    bytes -= at;
#endif
    std::memcpy(out, in, static_cast<size_t>(bytes));
}

// Streamed lines must be seen by whoever reads after the chunk.
CALSEG_INLINE void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

template <class T>
void store_row(const TensorView& view, int64_t n, int64_t c, int64_t s, int count, const T* CALSEG_RESTRICT from, bool stream) {
    with_float_type(view.dtype, [&](auto* type) {
        using To = std::remove_pointer_t<decltype(type)>;
        To* to = static_cast<To*>(view.data) + n * view.stride_n + c * view.stride_c + s * view.stride_s;
        if (view.stride_s != 1) {
            for (int i = 0; i < count; ++i) narrow_row(to + i * view.stride_s, from + i, 1);
        } else if (!stream) {
            narrow_row(to, from, count);
        } else if (std::is_same<To, T>::value) {
            stream_bytes(to, from, count * static_cast<int64_t>(sizeof(To)));
        } else {
            To row[kMaxTile];
            narrow_row(row, from, count);
            stream_bytes(to, row, count * static_cast<int64_t>(sizeof(To)));
        }
    });
}

// Rows [C][stride] -> voxels s .. s + count of item n.
template <class T>
void store_tile(const TensorView& view, int64_t n, int64_t s, int count, const T* CALSEG_RESTRICT from, int stride, int64_t C, bool stream) {
    if (view.stride_c != 1 || view.stride_s == 1) {
        for (int64_t c = 0; c < C; ++c) store_row(view, n, c, s, count, from + c * stride, stream);
        return;
    }
    with_float_type(view.dtype, [&](auto* type) {
        using To = std::remove_pointer_t<decltype(type)>;
        To* to = static_cast<To*>(view.data) + n * view.stride_n + s * view.stride_s;
        T voxel[kLanes];
        for (int i = 0; i < count; ++i)
            for (int64_t c0 = 0; c0 < C; c0 += kLanes) {
                const int width = static_cast<int>(smaller(kLanes, C - c0));
                for (int c = 0; c < width; ++c) voxel[c] = from[(c0 + c) * stride + i];
                narrow_row(to + i * view.stride_s + c0, voxel, width);
            }
    });
}

// A per-voxel row: loss out, or upstream gradient in.
template <class T>
void load_row(T* CALSEG_RESTRICT to, const TensorView& view, int64_t n, int64_t s, int count, int padded) {
    load_tile(to, padded, view, n, s, count, padded, 1);
}

// The sum of a row in double: eight partial sums in a fixed order, so that it vectorises and never changes.
template <class T>
double sum_row(const T* row, int count) {
    double part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; ++j) part[j] += static_cast<double>(row[i + j]);
    for (; i < count; ++i) part[i & 7] += static_cast<double>(row[i]);
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
