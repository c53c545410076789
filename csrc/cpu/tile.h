// Loading and storing of tiles. A tile holds all classes of consecutive voxels of one batch item, in the first-level cache.
//
// The numbers of a tile have the compute type T: double for float64, else float. A tile consists of blocks of kLanes
// voxels. A block is an array [C][kLanes]. Loading and storing go through memory in long rows, and convert dtypes and
// layouts. Computation goes through the classes of one block at a time. Registers then hold the values that exist once per
// voxel.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "cpu/dtypes.h"
#include "cpu/scratch.h"
#include "cpu/streams.h"
#include "cpu/tiling.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// ---- load ----

// Loads class c of a span whose voxels are contiguous into the blocks [C][kLanes] of a tile. Lanes past the end of the span
// become 0.
template <class T>
void load_row(T* to, const TensorView& view, const Span& span, int64_t c, int64_t C) {
    const int whole = span.count / kLanes, rest = span.count % kLanes;
    with_score_type(view.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const From* row = address<From>(view, span, c);
        T* block = to + c * kLanes;
        for (int b = 0; b < whole; ++b, row += kLanes, block += C * kLanes) widen_lanes(block, row);
        if (rest) store(block, load_widened<T>(row, rest));
    });
}

// Loads all classes of a span whose voxels are not contiguous, voxel by voxel.
template <class T>
void load_voxels(T* to, const TensorView& view, const Span& span, int64_t C) {
    with_score_type(view.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const int64_t step_c = view.stride_c, step_s = view.stride_s;
        const From* from = address<From>(view, span);
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

// Prefetches all classes of kLanes voxels from s on into the second-level cache. In the first-level cache, rows that lie a
// power of two apart would evict each other.
CALSEG_INLINE void prefetch_block(const TensorView& view, int64_t n, int64_t s, int64_t C) {
#if defined(__GNUC__)
    const int64_t bytes = dtype_bytes(view.dtype), step = view.stride_c * bytes;
    const char* from = static_cast<const char*>(view.data) + (n * view.stride_n + s) * bytes;
    for (int64_t c = 0; c < C; ++c) {
        __builtin_prefetch(from + c * step, 0, 2);
        // Each line is requested twice, once here and once for the next block: a busy processor drops requests.
        __builtin_prefetch(from + c * step + 64, 0, 2);
    }
#else
    (void)view, (void)n, (void)s, (void)C;
#endif
}

// ---- store ----

// Stores class c of a span whose voxels are contiguous. block_at(b) returns the kLanes values of block b.
template <class T, class Block>
CALSEG_INLINE void write_row(const TensorView& view, const Span& span, int64_t c, bool stream, const Block& block_at) {
    with_float_type(view.dtype, [&](auto* type) {
        using To = std::remove_pointer_t<decltype(type)>;
        To* row = address<To>(view, span, c);
        const Block block = block_at;  // a copy, as the members of a referenced object would be read again after every store
        const int whole = span.count / kLanes, rest = span.count % kLanes;
        int b = 0;
        alignas(64) T lanes[kLanes];
        if (kStreamed<To> && stream && is_aligned_to_lanes(row))
            for (alignas(64) To narrowed[kLanes]; b < whole; ++b) {
                store(lanes, block(b));
                narrow_lanes(narrowed, lanes);
                stream_lanes(row + b * kLanes, narrowed);
            }
        alignas(64) To staged[kMaxTile];  // the narrowed row, which is then streamed in whole cache lines
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

// Stores class c of the blocks [C][kLanes] of a tile.
template <class T>
void store_row(const TensorView& view, const Span& span, int64_t c, const T* from, int64_t C, bool stream) {
    write_row<T>(view, span, c, stream, [=](int b) { return load<F<T>>(from + (b * C + c) * kLanes); });
}

// Stores all classes of a span whose voxels are not contiguous, voxel by voxel.
template <class T>
void store_voxels(const TensorView& view, const Span& span, const T* from, int64_t C) {
    with_float_type(view.dtype, [&](auto* type) {
        using To = std::remove_pointer_t<decltype(type)>;
        const int64_t step_c = view.stride_c, step_s = view.stride_s;
        To* to = address<To>(view, span);
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

// Stores all classes of a span as fractions of 16 bits.
template <class T>
void store_fractions(const TensorView& view, const Span& span, const T* from, int64_t C) {
    for (int64_t c = 0; c < C; ++c) {
        U16* to = address<U16>(view, span, c);
        for (int i = 0; i < span.count; ++i) narrow(to[i * view.stride_s], from[(i / kLanes * C + c) * kLanes + i % kLanes]);
    }
}

template <class T>
void store_tile(const TensorView& view, const Span& span, const T* from, int64_t C, bool stream) {
    if (view.dtype == DType::u16) return store_fractions(view, span, from, C);
    if (view.stride_s != 1) return store_voxels(view, span, from, C);
    for (int64_t c = 0; c < C; ++c) store_row(view, span, c, from, C, stream);
}

// ---- load and store of one tensor ----

// Tile of a tensor that is loaded, overwritten with the tile of a result, and stored. As a rule the result is the gradient
// of the input. While a tile is computed, the next one is prefetched block by block.
template <class T>
class TensorTile {
 public:
    // Either of `input` and `result` may be absent.
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
    // Prefetches block b of the next tile. Called once per block of the current tile.
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

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
