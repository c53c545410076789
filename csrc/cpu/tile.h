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

// Functions for float and double in tile.cpp, as they take long to compile.

// Loads all classes of a span into the blocks [C][kLanes] of a tile. Lanes past the end of the span become 0.
template <class T>
void load_tile(T* to, const TensorView& view, const Span& span, int64_t C);

// Stores all classes of a span. `stream` asks for streaming stores where the voxels are contiguous.
template <class T>
void store_tile(const TensorView& view, const Span& span, const T* from, int64_t C, bool stream);

// Stores all classes of a span whose voxels are not contiguous, voxel by voxel.
template <class T>
void store_voxels(const TensorView& view, const Span& span, const T* from, int64_t C);

namespace {

// Prefetches all classes of kLanes voxels from s on into the second-level cache. In the first-level cache, rows that lie a
// power of two apart would evict each other.
CALSEG_INLINE void prefetch_block(const TensorView& view, int64_t n, int64_t s, int64_t C) {
    const int64_t bytes = dtype_bytes(view.dtype), step = view.stride_c * bytes;
    const char* from = static_cast<const char*>(view.data) + (n * view.stride_n + s) * bytes;
    for (int64_t c = 0; c < C; ++c) {
        prefetch_line(from + c * step);
        // Each line is requested twice, once here and once for the next block: a busy processor drops requests.
        prefetch_line(from + c * step + 64);
    }
}

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
