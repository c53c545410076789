// Reading of the next tile while this one is computed.
//
// Cross-entropy computes about as long as it waits for memory. A processor overlaps the two only if they are mixed finely:
// one line of the next tile is read for every line of this one that is computed. A line is kLanes voxels of one class.
// Lines are read in the order of memory, row by row, and prefetched two rows before. They are prefetched into the second
// cache, which has room for more requests under way than the first, and where rows a power of two apart do not evict each
// other.
#pragma once

#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// From is the type in which the tensor is stored.
template <class T, class From>
class ReadAhead {
 public:
    ReadAhead(Scratch& scratch, const TensorView& view, int64_t C, int length) : view_(view), C_(C) {
        for (T*& tile : tiles_) tile = scratch.take<T>(C * length);
    }

    T* tile() { return tiles_[0]; }
    T* block(int b) { return tiles_[0] + b * C_ * kLanes; }

    // Makes the span's tile the current one. From now on lines of the next one can be read.
    void begin(const Span& span, const Span& next) {
        if (class_ == C_) {  // read while its predecessor was computed
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

    // Reads a line of the next tile.
    CALSEG_MEMBER void line() {
        if (class_ >= C_) return;
#if defined(__GNUC__)
        __builtin_prefetch(wanted_, 0, 2);
#endif
        widen_lanes(to_, from_);
        wanted_ += kLanes;
        from_ += kLanes;
        to_ += C_ * kLanes;
        if (--lines_ == 0) end_row();
    }

    template <int K>
    CALSEG_MEMBER void lines() {
        line();
        if (K == 2) line();
    }

    // Reads the lines that are left.
    void end() {
        while (class_ < C_) line();
    }

 private:
    static constexpr int64_t kNothing = INT64_MAX;  // class_ where there is nothing to read
    static constexpr int64_t kRowsAhead = 2;

    void begin_row() {
        from_ = address<From>(view_, next_, class_);
        to_ = tiles_[1] + class_ * kLanes;
        lines_ = next_.count / kLanes;
        // after the last row comes the first one of the tile after the next
        const int64_t ahead = class_ + kRowsAhead;
        wanted_ =
            ahead < C_ ? address<From>(view_, next_, ahead) : address<From>(view_, next_, ahead - C_ < C_ ? ahead - C_ : 0) + next_.count;
    }

    void end_row() {
        if (const int rest = next_.count % kLanes) store(to_, load_widened<T>(from_, rest));
        if (++class_ < C_) begin_row();
    }

    TensorView view_;
    int64_t C_;
    T* tiles_[2];  // the current tile, the next one
    Span next_;
    int64_t class_ = kNothing;  // of the line that is read next
    int lines_ = 0;             // whole lines left in this row
    const From *from_ = nullptr, *wanted_ = nullptr;
    T* to_ = nullptr;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
