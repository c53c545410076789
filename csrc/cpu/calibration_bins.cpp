// Kernel of calibration_bins: sums per bin of confidence, and sums of the negative log-likelihood and the Brier score.
//
// For each voxel it computes the softmax, the class with the largest probability, the bin of that probability, the negative
// log-likelihood and the Brier score, all in one pass. All sums are integers: confidences, Brier scores and fractions of a
// nat are in fixed point, in units of 2^-24.
//
// Least memory traffic: one read of the logits or probabilities, and one of the labels.
#include "cpu/binned_words.h"
#include "cpu/kernel.h"
#include "cpu/labels.h"
#include "cpu/read_ahead.h"
#include "cpu/softmax.h"
#include "voxel/calibration.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int kHitShift = 40, kCountShift = 52;
constexpr int64_t kMostBlocks = 64;  // blocks of a tile: 32 bits hold the sum of that many numbers of up to 2^25

// Word of a voxel, for BinnedWords: [count 12 | hit 12 | confidence 40], where the numbers are widths of bit fields.
struct BinFormat {
    static constexpr int kWords = 1, kSums = 3;  // the sums are count, confidence, hits
    static constexpr int64_t kMostVoxels = (1 << (64 - kCountShift)) - 1;

    static void add_to(int64_t* sums, const uint64_t* word) {
        sums[0] += static_cast<int64_t>(*word >> kCountShift);
        sums[1] += static_cast<int64_t>(*word & ((uint64_t{1} << kHitShift) - 1));
        sums[2] += static_cast<int64_t>(*word >> kHitShift & ((1 << (kCountShift - kHitShift)) - 1));
    }
};
using Bins = BinnedWords<BinFormat>;

// Unsigned type of 32 or 64 bits in which labels are compared.
template <class From>
using LabelBits = std::conditional_t<sizeof(From) == 8, uint64_t, uint32_t>;

// Turns labels into classes, kSkipped or kNoClass.
template <class From>
void classes_of(int32_t* to, const From* from, int64_t step, int count, int64_t C, int64_t ignore_index, bool skip_background) {
    using Bits = LabelBits<From>;
    const IgnoreIndex<From> ignore(ignore_index);
    const Bits classes = static_cast<Bits>(C), background = 0;
    const int32_t of_background = skip_background ? kSkipped : 0;
    const auto class_of = [&](From label) {
        const Bits bits = static_cast<Bits>(label);
        int32_t result = bits < classes ? static_cast<int32_t>(bits) : kNoClass;
        result = bits == background ? of_background : result;
        return ignore == label ? kSkipped : result;
    };
    if (step == 1)
        for (int i = 0; i < count; ++i) to[i] = class_of(from[i]);
    else
        for (int i = 0; i < count; ++i) to[i] = class_of(from[i * step]);
}

// Reads the labels of a tile. Stores the class of each voxel that counts. Stores kSkipped for voxels that do not count and
// for the padding of the last block. Returns the place of the first label that is not a class, or -1 if there is none.
int load_checked_labels(int32_t* to, const BinsArgs& a, const Span& span) {
    const int count = span.count;
    with_labels(a.spec.labels.tensor, span, [&](const auto* from, int64_t step) {
        classes_of(to, from, step, count, a.shape.C, a.spec.labels.ignore_index, a.spec.skip_background);
    });
    fill<int32_t>(to + count, to + round_up(count, kLanes), kSkipped);
    if (a.spec.mask) {
        const int64_t step = a.spec.mask.stride_s;
        const uint8_t* mask = address<uint8_t>(a.spec.mask, span);
        for (int i = 0; i < count; ++i) to[i] = mask[i * step] ? to[i] : kSkipped;
    }
    int32_t least = 0;
    for (int i = 0; i < count; ++i) least = to[i] < least ? to[i] : least;
    for (int i = 0; least == kNoClass; ++i)
        if (to[i] == kNoClass) return i;
    return -1;
}

template <bool kLogits, class T>
using VoxelSums = std::conditional_t<kLogits, LogitSums<T>, ProbabilitySums<T>>;

// Rows with one number for each voxel of a tile.
template <class T>
struct VoxelRows {
    int32_t* labels;  // kSkipped where the voxel does not count
    int32_t* binned;  // class-wise only: -1 where the voxel goes to the bins, else 0
    T* scale;         // class-wise only: factor that turns exp(logit - max) into a probability
    char* sums;       // VoxelSums of each block
    int32_t* place;   // place in the bins of the voxel's word
    uint64_t* word;   // word that the voxel adds to the bins

    VoxelRows(Scratch& scratch, int length) {
        for (auto* row : {&labels, &binned, &place}) *row = scratch.take<int32_t>(length);
        scale = scratch.take<T>(length);
        sums = scratch.take<char>(length / kLanes * static_cast<int64_t>(sizeof(ProbabilitySums<T>)));
        word = scratch.take<uint64_t>(length);
    }
    CALSEG_MEMBER I<T> labels_of(int b) const { return load<I<T>>(labels + b * kLanes); }
    template <class Sums>
    CALSEG_MEMBER Sums* sums_of(int b) const {
        return reinterpret_cast<Sums*>(sums) + b;
    }
};

// Step 1 for a block of logits: computes the sums over classes. If kKeep, the block becomes exp(logits - max), and the top
// class is not computed. For every class, `ahead` reads a line of the next tile.
template <bool kKeep, class T, class Ahead>
CALSEG_INLINE LogitSums<T> sum_logits(I<T> labels, T* block, int64_t C, Ahead& ahead) {
    F<T> top = load<F<T>>(block);
    I<T> top_class = broadcast<I<T>>(0);
    for (int64_t c = 1; c < C; ++c) {
        const F<T> x = load<F<T>>(block + c * kLanes);
        if (!kKeep) top_class = select(less(top, x), broadcast<I<T>>(static_cast<int32_t>(c)), top_class);
        top = larger(x, top);
    }
    LogitAccumulator<T> sum;
    for_classes(C, [&](auto at_once, int64_t c) {
        constexpr int K = decltype(at_once)::value;
        F<T> e[K];
        for (int j = 0; j < K; ++j) e[j] = load<F<T>>(block + (c + j) * kLanes) - top;
        sum.add(labels, c, e);
        if (kKeep)
            for (int j = 0; j < K; ++j) store(block + (c + j) * kLanes, e[j]);
        ahead.template read_lines<K>();
    });
    return sum.result(top_class);
}

// Step 1 for a block with so few classes that registers hold all logits, which are read from the tensor itself. `count` is
// kLanes, or less for the last block of a tile.
template <int C, class T, class From>
CALSEG_INLINE LogitSums<T> sum_few_logits(I<T> labels, const From* const (&row)[C], int at, int count) {
    const auto logits = [&](int c) { return load_widened<T>(row[c] + at, count); };
    // The first two classes have code of their own. The compiler does not unroll a loop over all of them, and would keep
    // the array in memory.
    F<T> low[2] = {logits(0), logits(1)}, high[C - 2 > 0 ? C - 2 : 1];
    for (int j = 0; j < C - 2; ++j) high[j] = logits(2 + j);
    I<T> top_class = select(less(low[0], low[1]), broadcast<I<T>>(1), broadcast<I<T>>(0));
    F<T> top = larger(low[1], low[0]);
    for (int j = 0; j < C - 2; ++j) {
        top_class = select(less(top, high[j]), broadcast<I<T>>(2 + j), top_class);
        top = larger(high[j], top);
    }
    LogitAccumulator<T> sum;
    for (auto& x : low) x = x - top;
    sum.add(labels, 0, low);
    if constexpr (C > 2) {
        for (auto& x : high) x = x - top;
        sum.add(labels, 2, high);
    }
    return sum.result(top_class);
}

// Step 1 for a block of probabilities. For every class, `ahead` reads a line of the next tile.
template <class T, class Ahead>
CALSEG_INLINE ProbabilitySums<T> sum_probabilities(I<T> labels, const T* block, int64_t C, Ahead& ahead) {
    ProbabilitySums<T> v(load<F<T>>(block));
    for (int64_t c = 0; c < C; ++c) {
        v.add(labels, c, load<F<T>>(block + c * kLanes));
        ahead.read_line();
    }
    return v;
}

// Maker of the words of a block and of their places. The word of a voxel that does not go to the bins is 0.
template <class T>
class Binning {
 public:
    Binning(const BinsArgs& a, const Bins& bins)
        : right_closed_(a.spec.right_closed),
          n_bins_(broadcast<F<T>>(static_cast<T>(a.spec.n_bins))),
          last_(broadcast<I<T>>(static_cast<int32_t>(a.spec.n_bins) - 1)),
          place_of_(bins.copies()) {}

    // Makes the words for confidences p. kAll says that every voxel goes to the bins, with a confidence in [0, 1].
    template <bool kAll, class Hit>
    CALSEG_MEMBER void set(const VoxelRows<T>& rows, int b, F<T> p, Hit hit, I<T> binned) const {
        if (!kAll) p = within_unit<T>(p);
        store(rows.place + b * kLanes, place_of_(bin_of<T>(p, n_bins_, last_, right_closed_)));
        const I<T> confidence = in_units<T>(p);
        constexpr int32_t kCount = 1 << (kCountShift - 32), kHit = 1 << (kHitShift - 32);
        const I<T> flags = select(hit, broadcast<I<T>>(kCount | kHit), broadcast<I<T>>(kCount));
        if (kAll) store_words(rows.word + b * kLanes, confidence, flags);
        else store_words(rows.word + b * kLanes, confidence & binned, flags & binned);
    }

 private:
    bool right_closed_;
    F<T> n_bins_;
    I<T> last_;
    WordPlaces<T> place_of_;
};

// Step 2: totals over the voxels of a tile, and, unless class-wise, the words of the top labels.
template <bool kClassWise, class T>
class TileTotals {
 public:
    TileTotals(const BinsArgs& a, const VoxelRows<T>& rows, const Binning<T>& binning)
        : rows_(rows), binning_(binning), tolerance_(broadcast<F<T>>(static_cast<T>(a.spec.tolerance))) {}

    CALSEG_MEMBER void add(int b, I<T> labels, const LogitSums<T>& v) {
        const F<T> confidence = v.confidence(), nll = v.nll(), brier = v.brier(confidence);
        if (kClassWise) store(rows_.scale + b * kLanes, confidence);
        const auto finite = less(nll, broadcast<F<T>>(static_cast<T>(kMaxNll))), skipped = less(labels, broadcast<I<T>>(0));
        if (all(finite) && !any(skipped)) {
            counted_ += kLanes;
            finish<true>(b, labels, v.top, confidence, nll, brier, broadcast<I<T>>(-1));
        } else {
            add_unusual(b, labels, v.top, v.total, confidence, nll, brier);
        }
    }

    CALSEG_MEMBER void add(int b, I<T> labels, const ProbabilitySums<T>& v) {
        const I<T> binned = add_unusual(b, labels, v.top, v.total, v.confidence(), v.nll(), v.brier(v.confidence()));
        bad_ = bad_ | (binned & v.off(tolerance_));
    }

    void finish_tile(int64_t (&totals)[kTotals]) const {
        const I<T> sums[kTotals] = {whole_, rest_, brier_, voxels_, nans_, infinites_};
        for (int k = 0; k < kTotals; ++k) {
            uint32_t lanes[kLanes];
            store(lanes, sums[k]);
            for (int i = 0; i < kLanes; ++i) totals[k] += lanes[i];
        }
        totals[kVoxels] += counted_;
    }

    // Returns whether the scores of a voxel are no probabilities: their sum is not 1, or one of them lies below 0.
    bool met_bad() const { return any(less(bad_, broadcast<I<T>>(0))); }

 private:
    // Adds a block that may hold ignored voxels, NaN and infinite negative log-likelihoods. Returns -1 for voxels that go
    // to the bins, and 0 for others.
    CALSEG_MEMBER I<T> add_unusual(int b, I<T> labels, I<T> top, F<T> total, F<T> confidence, F<T> nll, F<T> brier) {
        const I<T> none = broadcast<I<T>>(0), yes = broadcast<I<T>>(-1);
        const F<T> nothing = zero<T>(), most = broadcast<F<T>>(static_cast<T>(kMaxNll));
        const I<T> counts = select(less(labels, none), none, yes), binned = select(equal(total, total), counts, none);
        voxels_ = voxels_ - counts;
        nans_ = nans_ - (counts ^ binned);
        infinites_ = infinites_ - select(less(nll, most), none, binned);
        nll = larger(nll, nothing);  // 0 where NaN
        finish<false>(b, labels, top, confidence, select(less(nll, most), nll, nothing), brier, binned);
        return binned;
    }

    template <bool kAll>
    CALSEG_MEMBER void finish(int b, I<T> labels, I<T> top, F<T> confidence, F<T> nll, F<T> brier, I<T> binned) {
        I<T> whole = truncated_integer(nll), rest = in_units<T>(nll - to_values(whole, nll));
        I<T> squared = in_units<T>(brier);
        if (!kAll) whole = whole & binned, rest = rest & binned, squared = squared & binned;
        whole_ = whole_ + whole;
        rest_ = rest_ + rest;
        brier_ = brier_ + squared;
        if (kClassWise) store(rows_.binned + b * kLanes, binned);
        else binning_.template set<kAll>(rows_, b, confidence, equal(labels, top), binned);
    }

    const VoxelRows<T> rows_;
    const Binning<T> binning_;
    const F<T> tolerance_;
    // Sums of each lane, with 32 bits.
    I<T> whole_ = broadcast<I<T>>(0), rest_ = whole_, brier_ = whole_, voxels_ = whole_, nans_ = whole_, infinites_ = whole_, bad_ = whole_;
    int64_t counted_ = 0;  // number of voxels in blocks where all count
};

// Working memory of a chunk.
template <class T, class From>
struct ChunkState {
    ReadAhead<T, From> scores;
    VoxelRows<T> rows;
    Bins bins;
    int64_t totals[kTotals] = {};

    ChunkState(Scratch& scratch, const BinsArgs& a, int length)
        : scores(scratch, a.scores, a.shape.C, length), rows(scratch, length), bins(scratch, a.kinds(), a.spec.n_bins, length) {}
};

// Finds the first voxel of a tile whose scores are no probabilities, and describes it in `fault`.
template <class T>
void find_bad(const BinsArgs& a, const VoxelRows<T>& rows, const Span& span, BinsFault& fault) {
    const T tolerance = static_cast<T>(a.spec.tolerance);
    for (int i = 0; i < span.count && fault.score_position < 0; ++i) {
        T totals[kLanes], leasts[kLanes];
        const auto& sums = *rows.template sums_of<ProbabilitySums<T>>(i / kLanes);
        store(totals, sums.total);
        store(leasts, sums.least);
        const T total = totals[i % kLanes], least = leasts[i % kLanes];
        if (rows.labels[i] < 0 || !(total - T(1) > tolerance || T(1) - total > tolerance || least < -tolerance)) continue;
        fault.score_position = span.n * a.shape.S + span.s + i;
        fault.total = static_cast<double>(total);
        fault.least = static_cast<double>(least);
    }
}

// Adds a tile to the bins and the totals.
template <bool kClassWise, bool kLogits, class T, class From>
void add_tile(const BinsArgs& a, ChunkState<T, From>& state, const Span& span, const Span& next, BinsFault& fault) {
    const int64_t C = a.shape.C;
    const VoxelRows<T> rows = state.rows;
    const int blocks = static_cast<int>(round_up(span.count, kLanes)) / kLanes;
    const Binning<T> binning(a, state.bins);
    state.scores.begin(span, next);
    using Sums = VoxelSums<kLogits, T>;
    for (int b = 0; b < blocks; ++b) {
        if constexpr (kLogits)
            *rows.template sums_of<Sums>(b) = sum_logits<kClassWise>(rows.labels_of(b), state.scores.block(b), C, state.scores);
        else *rows.template sums_of<Sums>(b) = sum_probabilities(rows.labels_of(b), state.scores.block(b), C, state.scores);
    }
    state.scores.end();
    TileTotals<kClassWise, T> totals(a, rows, binning);
    for (int b = 0; b < blocks; ++b) totals.add(b, rows.labels_of(b), *rows.template sums_of<Sums>(b));
    totals.finish_tile(state.totals);
    if constexpr (!kLogits)
        if (totals.met_bad()) find_bad(a, rows, span, fault);

    // Step 3: add the words to the bins, class by class.
    if (!kClassWise) return state.bins.add(0, rows.place, rows.word, blocks);
    for (int64_t c = a.spec.first_class; c < C; ++c) {
        for (int b = 0; b < blocks; ++b) {
            const int at = b * kLanes;
            F<T> p = load<F<T>>(state.scores.block(b) + c * kLanes);
            if (kLogits) p = p * load<F<T>>(rows.scale + at);
            const auto hit = equal(load<I<T>>(rows.labels + at), broadcast<I<T>>(static_cast<int32_t>(c)));
            binning.template set<false>(rows, b, p, hit, load<I<T>>(rows.binned + at));
        }
        state.bins.add(c - a.spec.first_class, rows.place, rows.word, blocks);
    }
}

// Does as add_tile() for the top labels of two to four classes whose voxels are contiguous. Reads the logits from the
// tensor itself.
template <int C, class T, class From>
void add_tile_of_few(const BinsArgs& a, ChunkState<T, From>& state, const Span& span, const Span&, BinsFault&) {
    const VoxelRows<T> rows = state.rows;
    const int blocks = static_cast<int>(round_up(span.count, kLanes)) / kLanes;
    const From* row[C];
    for (int c = 0; c < C; ++c) row[c] = address<From>(a.scores, span, c);
    const Binning<T> binning(a, state.bins);
    const int whole = span.count / kLanes;
    for (int b = 0; b < whole; ++b)
        *rows.template sums_of<LogitSums<T>>(b) = sum_few_logits<C, T>(rows.labels_of(b), row, b * kLanes, kLanes);
    for (int b = whole; b < blocks; ++b)
        *rows.template sums_of<LogitSums<T>>(b) = sum_few_logits<C, T>(rows.labels_of(b), row, b * kLanes, span.count % kLanes);
    TileTotals<false, T> totals(a, rows, binning);
    for (int b = 0; b < blocks; ++b) totals.add(b, rows.labels_of(b), *rows.template sums_of<LogitSums<T>>(b));
    totals.finish_tile(state.totals);
    state.bins.add(0, rows.place, rows.word, blocks);
}

// Returns the function that adds a tile.
template <class T, class From>
auto choose_add_tile(const BinsArgs& a) {
    if (a.spec.class_wise) return a.spec.from_logits ? add_tile<true, true, T, From> : add_tile<true, false, T, From>;
    if (!a.spec.from_logits) return add_tile<false, false, T, From>;
    if (a.scores.stride_s == 1) {
        if constexpr (kMostFewClasses >= 2)
            if (a.shape.C == 2) return add_tile_of_few<2, T, From>;
        if constexpr (kMostFewClasses >= 3)
            if (a.shape.C == 3) return add_tile_of_few<3, T, From>;
        if constexpr (kMostFewClasses >= 4)
            if (a.shape.C == 4) return add_tile_of_few<4, T, From>;
    }
    return add_tile<false, true, T, From>;
}

template <class T, class From>
void compute(const BinsArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    ChunkState<T, From> state(scratch, a, tiles.length);
    if (scratch.is_counting()) return;
    BinsFault fault;
    const auto add = choose_add_tile<T, From>(a);
    int64_t item = 0;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        item = a.spec.per_item ? span.n : 0;
        const int bad = load_checked_labels(state.rows.labels, a, span);
        if (bad >= 0) {
            fault.label_position = span.n * a.shape.S + span.s + bad;
            break;
        }
        add(a, state, span, next, fault);
        state.bins.end_tile(span.count);
    }
    state.bins.finish_chunk(a.sums + item * a.kinds() * a.spec.n_bins * BinFormat::kSums);
    for (int k = 0; k < kTotals; ++k) atomic_add(a.totals + item * kTotals + k, state.totals[k]);
    a.chunk_faults[chunk] = fault;
}

struct CalibrationBins {
    using Args = BinsArgs;

    template <class T>
    static Tiling tiling(const Args& a) {
        // The current tile and the next one fill a quarter of a second-level cache of 1 MiB.
        const int64_t wanted = 128 * 1024 / (a.shape.C * static_cast<int64_t>(sizeof(T)));
        return Tiling(a.shape, smaller(wanted, kMostBlocks * kLanes), logits_of_chunk(a.kinds() * a.spec.n_bins));
    }

    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        with_stored_type<T>(a.scores.dtype,
                            [&](auto* type) { compute<T, std::remove_pointer_t<decltype(type)>>(a, tiles, chunk, scratch); });
    }
};

}  // namespace

const Kernel<BinsArgs> calibration_bins = make_kernel<CalibrationBins>();

}  // namespace CALSEG_ISA
}  // namespace calseg
