// Pair of tiles of a tensor: the current one, and the next one, which is read while the current one is computed.
//
// Cross-entropy takes about as long to compute as its logits take to arrive from memory. A processor overlaps the two only
// if they alternate in small steps. So the kernel reads one line of the next tile for every line of the current tile that
// it computes. A line is kLanes voxels of one class.
//
// Lines are read in the order of memory, row by row, where a row is one class of a tile. They are prefetched two rows
// before they are read, into the second-level cache. That cache can have more requests in flight than the first-level
// cache, and rows that lie a power of two apart do not evict each other there.
#pragma once

#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// T is the compute type. From is the type in which the tensor is stored.
template <class T, class From>
class ReadAhead {
 public:
    ReadAhead(Scratch& scratch, const TensorView& view, int64_t C, int length) : view_(view), C_(C) {
        for (T*& tile : tiles_) tile = scratch.take<T>(C * length);
    }

    T* tile() { return tiles_[0]; }
    T* block(int b) { return tiles_[0] + b * C_ * kLanes; }

    // Makes the tile of `span` the current one. From then on, read_line() reads the tile of `next`.
    CALSEG_ONCE void begin(const Span& span, const Span& next) {
        if (class_ == C_) {  // the tile has been read while the one before it was computed
            T* read = tiles_[1];
            tiles_[1] = tiles_[0];
            tiles_[0] = read;
        } else {
            load_tile(tiles_[0], view_, span, C_);
        }
        next_ = next;
        class_ = view_.stride_s == 1 && next.count >= kLanes ? 0 : kNothing;
        if (class_ == 0) begin_row();
    }

    // Reads a line of the next tile, if one is left.
    CALSEG_MEMBER void read_line() {
        if (class_ >= C_) return;
        prefetch_line(prefetched_);
        widen_lanes(to_, from_);
        prefetched_ += kLanes;
        from_ += kLanes;
        to_ += C_ * kLanes;
        if (--lines_ == 0) end_row();
    }

    // Reads K lines of the next tile. K is 1 or 2.
    template <int K>
    CALSEG_MEMBER void read_lines() {
        read_line();
        if (K == 2) read_line();
    }

    // Reads the lines of the next tile that are left.
    CALSEG_ONCE void end() {
        while (class_ < C_) read_line();
    }

 private:
    static constexpr int64_t kNothing = INT64_MAX;  // value of class_ if no line is to be read
    static constexpr int64_t kRowsAhead = 2;

    void begin_row() {
        from_ = address<From>(view_, next_, class_);
        to_ = tiles_[1] + class_ * kLanes;
        lines_ = next_.count / kLanes;
        // After the last row, prefetch the first rows of the tile after the next one.
        const int64_t ahead = class_ + kRowsAhead;
        if (ahead < C_) prefetched_ = address<From>(view_, next_, ahead);
        else prefetched_ = address<From>(view_, next_, ahead - C_ < C_ ? ahead - C_ : 0) + next_.count;
    }

    CALSEG_ONCE void end_row() {
        if (const int rest = next_.count % kLanes) store(to_, load_widened<T>(from_, rest));
        if (++class_ < C_) begin_row();
    }

    TensorView view_;
    int64_t C_;
    T* tiles_[2];  // current tile, next tile
    Span next_;
    int64_t class_ = kNothing;          // class of the line that is read next
    int lines_ = 0;                     // number of whole lines left in its row
    const From* from_ = nullptr;        // place of that line in the tensor
    const From* prefetched_ = nullptr;  // place of the line that is prefetched at the same time
    T* to_ = nullptr;                   // place of that line in the next tile
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
