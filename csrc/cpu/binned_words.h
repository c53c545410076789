// Sums per bin, collected in 64-bit words that hold several sums in bit fields.
//
// A voxel adds one or more words to its bin. Each bin has several copies. Successive voxels add to different copies, so
// that no addition waits for the one before, which often goes to the same bin. Before a bit field can overflow, the words
// are added to the sums of the chunk. At the end of the chunk, these are added to the sums of the call. All sums are
// integers, so the result is the same for any number of threads.
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
#if defined(CALSEG_NATIVE_FLOAT)
    __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
#else
    _InterlockedExchangeAdd64(to, value);
#endif
}

constexpr int64_t kWordBytes = 16 * 1024;  // bound on the size of all copies: about half of the first-level cache

// Returns a number of logits per chunk for which the work of adding up the bins at the end of the chunk is small.
CALSEG_INLINE int64_t logits_of_chunk(int64_t bins) { return larger(1 << 18, 16 * bins); }

// Function object that turns the bins of kLanes voxels into the places of their words. Each lane uses its own copy of the
// bins, or shares it with as few lanes as possible.
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

// Bins of a chunk. The class Format says what the words hold:
//   kWords                                          number of words per voxel
//   kSums                                           number of sums per bin
//   kMostVoxels                                     number of voxels whose sum the bit fields can hold
//   add_to(int64_t* sums, const uint64_t* words)    adds the words to the sums of a bin
// The first word counts the voxels, so it is 0 only if no voxel was added.
template <class Format>
class BinnedWords {
 public:
    // `kinds` is the number of sets of bins, as a rule one per class. `length` is the length of the tiles.
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

    // Adds the words of a tile, [kWords][length], to the places that WordPlaces gave.
    CALSEG_MEMBER void add(int64_t kind, const int32_t* place, const uint64_t* word, int blocks) {
        uint64_t* words = words_ + kind * bins_per_kind_ * copies_ * Format::kWords;
        for (int b = 0; b < blocks; ++b, place += kLanes, word += kLanes)
            for (int i = 0; i < kLanes; ++i)
                for (int w = 0; w < Format::kWords; ++w) words[place[i] * Format::kWords + w] += word[w * length_ + i];
    }

    // Ends a tile of `voxels` voxels. Empties the words if another tile could make a bit field overflow.
    void end_tile(int64_t voxels) {
        held_ += round_up(voxels, kLanes) / copies_;
        if (held_ + kMaxTile / copies_ > Format::kMostVoxels) empty();
    }

    // Ends the chunk. Adds its sums to those of the call, [kinds][bins_per_kind][kSums].
    void finish_chunk(int64_t* to) {
        empty();
        for (int64_t i = 0; i < bins_ * Format::kSums; ++i)
            if (sums_[i]) atomic_add(to + i, sums_[i]);
    }

 private:
    // Returns the number of copies of each bin: one per lane, fewer if they would take too much memory.
    static int64_t copies_of(int64_t bins) {
        int64_t n = kLanes;
        while (n > 4 && bins * n * Format::kWords * static_cast<int64_t>(sizeof(uint64_t)) > kWordBytes) n /= 2;
        return n;
    }

    // Adds the words to the sums of the chunk, and sets them to 0.
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
    int64_t held_ = 0;  // largest number of voxels that a copy of a bin can have received since empty()
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
