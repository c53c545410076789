// Division of a call into chunks and tiles.
//
// A chunk is the unit of work that a thread takes. It is a run of consecutive voxels of one batch item. A chunk is computed
// tile by tile. A tile is so short that all of its classes fit a cache.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "host/arguments.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int kMaxTile = 1024;  // voxels

// Range of the voxels of a tile: s to s + count of batch item n.
struct Span {
    int64_t n = 0, s = 0;
    int count = 0;
};

// Returns the place of voxel s of item n, and of class c, in a tensor that is stored as D.
template <class D>
CALSEG_INLINE D* address(const TensorView& view, int64_t n, int64_t s, int64_t c = 0) {
    return static_cast<D*>(view.data) + n * view.stride_n + c * view.stride_c + s * view.stride_s;
}
template <class D>
CALSEG_INLINE D* address(const TensorView& view, const Span& span, int64_t c = 0) {
    return address<D>(view, span.n, span.s, c);
}

// Lengths of tiles and chunks. They depend on the shape alone, so that no sum depends on the number of threads.
struct Tiling {
    Shape shape;
    int length;        // voxels of a tile, a multiple of kLanes
    int64_t chunk;     // voxels of a chunk, a multiple of length
    int64_t per_item;  // chunks of a batch item

    // `wanted` is the wanted number of voxels of a tile. `chunk_elements` is about how many logits a chunk should hold.
    Tiling(const Shape& s, int64_t wanted, int64_t chunk_elements) : shape(s) {
        const int64_t bounded = smaller(larger(wanted / 64 * 64, 128), kMaxTile);
        length = static_cast<int>(smaller(bounded, round_up(larger(s.S, 1), kLanes)));
        chunk = length * larger(1, chunk_elements / (length * s.C));
        per_item = (s.S + chunk - 1) / chunk;
    }
    int64_t num_chunks() const { return shape.N * per_item; }

    // Returns the tile that begins with voxel s of the chunk with number `index`. No tile crosses a multiple of 2^32
    // voxels, because there the second word of the noise's counter changes.
    CALSEG_MEMBER Span tile(int64_t index, int64_t s) const {
        const int64_t n = index / per_item, end = smaller((index % per_item + 1) * chunk, shape.S);
        const int64_t to_boundary = (int64_t{1} << 32) - ((n * shape.S + s) & 0xffffffff);
        return {n, s, static_cast<int>(smaller(smaller(length, end - s), to_boundary))};
    }
};

// Range of the tiles of a chunk, for loops of the form
//     for (const auto& [span, next] : TilesOfChunk(tiling, chunk))
// `next` is the tile after `span`. It is empty at the end of the chunk.
class TilesOfChunk {
 public:
    struct Step {
        Span span, next;
    };
    struct End {};

    CALSEG_MEMBER TilesOfChunk(const Tiling& tiling, int64_t chunk) : tiling_(tiling), chunk_(chunk) {
        step_.span = tiling.tile(chunk, chunk % tiling.per_item * tiling.chunk);
        step_.next = next();
    }
    CALSEG_MEMBER TilesOfChunk begin() const { return *this; }
    CALSEG_MEMBER End end() const { return {}; }
    CALSEG_MEMBER bool operator!=(End) const { return step_.span.count > 0; }
    CALSEG_MEMBER const Step& operator*() const { return step_; }
    CALSEG_MEMBER void operator++() {
        step_.span = step_.next;
        step_.next = next();
    }

 private:
    CALSEG_MEMBER Span next() const { return tiling_.tile(chunk_, step_.span.s + step_.span.count); }

    const Tiling& tiling_;
    int64_t chunk_;
    Step step_;
};

// Returns the number of voxels for which `tensors` tensors of C classes fill half of a first-level cache of 32 KiB.
CALSEG_INLINE int64_t voxels_in_cache(int64_t C, int64_t tensors, int64_t element_bytes) {
    return 16 * 1024 / (tensors * C * element_bytes);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
