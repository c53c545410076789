// Streaming stores, which write whole cache lines to memory without reading them into the caches first.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/dtypes.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Size in bytes from which a result is streamed. Such a result is larger than the caches, so later reads find nothing
// there.
constexpr int64_t kStreamBytes = 4 << 20;

inline bool is_streamed(const TensorView& result, const Shape& shape) {
    return result && shape.voxels() * shape.C * dtype_bytes(result.dtype) >= kStreamBytes;
}

// Streams a line of 64 bytes to an address that is a multiple of 64.
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

// Streams bytes to any address. Whole lines are streamed. The bytes before the first and after the last one are copied.
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

// Whether the instruction set has a streaming store for kLanes values of a type.
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
// Streams kLanes values to an address for which is_aligned_to_lanes() holds.
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

// Waits until other threads can see the streamed lines. Every chunk ends with this call.
CALSEG_INLINE void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
