// Sums per bin of a chunk, as words that hold several sums in bit fields.
//
// A voxel adds one or more 64-bit words to its bin. A bin has several copies, so that voxels which follow each other into
// one bin need not wait for each other. The words are added to the chunk's sums before a field is full, and those to the
// call's. Every sum is an integer: the result is the same for any number of threads.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"
#include "cpu/tiling.h"
#include "cpu/vector_math.h"
#include "voxel/calibration.h"

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace calseg {
namespace CALSEG_ISA {
namespace {

CALSEG_INLINE void atomic_add(int64_t* to, int64_t value) {
#if defined(__GNUC__)
    __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
#else
    _InterlockedExchangeAdd64(to, value);
#endif
}

constexpr int64_t kWordBytes = 16 * 1024;  // size of the copies: about half of the first cache

// Number of logits of a chunk, beside which the work of adding up its bins is small.
CALSEG_INLINE int64_t logits_of_chunk(int64_t bins) { return larger(1 << 18, 16 * bins); }

// Places of the words of kLanes voxels: every lane adds to a copy of its own.
template <class T>
class WordPlaces {
 public:
    explicit WordPlaces(int copies) : copies_(broadcast<I<T>>(copies)) {
        int32_t lanes[kLanes];
        for (int i = 0; i < kLanes; ++i) lanes[i] = i & (copies - 1);
        copy_ = load<I<T>>(lanes);
    }
    CALSEG_MEMBER I<T> operator()(I<T> bin) const { return bin * copies_ + copy_; }

 private:
    I<T> copies_, copy_;
};

// Format says what the words of a voxel hold:
//   kWords                                          number of words
//   kSums                                           number of sums of a bin
//   kMostVoxels                                     number of voxels whose sums the words can hold
//   add_to(int64_t* sums, const uint64_t* words)    adds words to the sums of a bin
// The first word counts the voxels, and so is 0 only if no voxel was added.
template <class Format>
class BinnedWords {
 public:
    // Bins come in kinds, as a rule one per class. `length` is that of the tiles.
    BinnedWords(Scratch& scratch, int64_t kinds, int64_t bins_per_kind, int length)
        : length_(length),
          bins_per_kind_(bins_per_kind),
          bins_(kinds * bins_per_kind),
          copies_(copies_of(bins_)),
          words_(scratch.take<uint64_t>(bins_ * copies_ * Format::kWords)),
          sums_(scratch.take<int64_t>(bins_ * Format::kSums)) {
        if (scratch.is_counting()) return;
        fill<uint64_t>(words_, words_ + bins_ * copies_ * Format::kWords, 0);
        fill<int64_t>(sums_, sums_ + bins_ * Format::kSums, 0);
    }

    int copies() const { return static_cast<int>(copies_); }

    // Adds the words of a tile's voxels, [kWords][length], to the places that WordPlaces gave.
    CALSEG_MEMBER void add(int64_t kind, const int32_t* place, const uint64_t* word, int blocks) {
        uint64_t* words = words_ + kind * bins_per_kind_ * copies_ * Format::kWords;
        for (int b = 0; b < blocks; ++b, place += kLanes, word += kLanes)
            for (int i = 0; i < kLanes; ++i)
                for (int w = 0; w < Format::kWords; ++w) words[place[i] * Format::kWords + w] += word[w * length_ + i];
    }

    // Called after a tile of `voxels`. Empties the words if those of another tile might not fit.
    void end_tile(int64_t voxels) {
        held_ += round_up(voxels, kLanes) / copies_;
        if (held_ + kMaxTile / copies_ > Format::kMostVoxels) empty();
    }

    // Adds the chunk's sums, [kinds][bins_per_kind][kSums], to the call's.
    void finish_chunk(int64_t* to) {
        empty();
        for (int64_t i = 0; i < bins_ * Format::kSums; ++i)
            if (sums_[i]) atomic_add(to + i, sums_[i]);
    }

 private:
    static int64_t copies_of(int64_t bins) {
        int64_t n = kLanes;
        while (n > 4 && bins * n * Format::kWords * static_cast<int64_t>(sizeof(uint64_t)) > kWordBytes) n /= 2;
        return n;
    }

    void empty() {
        uint64_t* words = words_;
        for (int64_t bin = 0; bin < bins_; ++bin)
            for (int64_t k = 0; k < copies_; ++k, words += Format::kWords) {
                if (!words[0]) continue;
                Format::add_to(sums_ + bin * Format::kSums, words);
                for (int w = 0; w < Format::kWords; ++w) words[w] = 0;
            }
        held_ = 0;
    }

    int length_;
    int64_t bins_per_kind_, bins_, copies_;
    uint64_t* words_;   // [kinds][bins_per_kind][copies][kWords]
    int64_t* sums_;     // [kinds][bins_per_kind][kSums]
    int64_t held_ = 0;  // number of voxels that a copy may hold
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
