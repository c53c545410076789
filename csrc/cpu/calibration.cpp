// Calibration: softmax, the class of the largest probability, its bin, and integer sums per bin, with the negative
// log-likelihood and the Brier score, in one pass. Floor: one read of the scores and of the labels.
//
// Every sum is an integer: confidences, scores and rests of a nat in units of 2^-24. A voxel adds one 64-bit word to its
// bin, [count | hits | confidence]; a bin has several copies, so that voxels which follow each other into one bin need not
// wait for each other. Words spill into the chunk's sums before a field is full, and those into the call's.
#include "cpu/calibration.h"

#include "cpu/cross_entropy.h"
#include "cpu/operations.h"
#include "cpu/read_ahead.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int kHitShift = 40, kCountShift = 52;
constexpr int64_t kMostInWord = (1 << (64 - kCountShift)) - 1;  // voxels whose sums a word can hold
constexpr int64_t kWordBytes = 16 * 1024;                       // copies of the bins fill about half of the first cache

constexpr int64_t kMostBlocks = 64;  // of a tile: 32 bits hold that many scores of up to 2^25

// Bins with sums of their own: one set for the top label, one per class otherwise.
int64_t kinds(const BinsArgs& a) { return a.spec.class_wise ? a.shape.C - a.spec.first_class : 1; }

template <class T>
Tiling tiling(const BinsArgs& a) {
    // this tile and the next in a quarter of the second cache
    const int64_t wanted = 128 * 1024 / (a.shape.C * static_cast<int64_t>(sizeof(T)));
    return Tiling(a.shape, smaller(wanted, kMostBlocks * kLanes), larger(1 << 18, 16 * kinds(a) * a.spec.n_bins));
}

// The sums of a chunk.
class Bins {
 public:
    static int64_t bytes(const BinsArgs& a) {
        const int64_t bins = kinds(a) * a.spec.n_bins;
        return Scratch::bytes<uint64_t>(bins * copies_of(bins)) + Scratch::bytes<int64_t>(3 * bins);
    }

    Bins(Scratch& scratch, const BinsArgs& a)
        : n_bins_(a.spec.n_bins),
          bins_(kinds(a) * a.spec.n_bins),
          copies_(copies_of(bins_)),
          words_(scratch.take<uint64_t>(bins_ * copies_)),
          sums_(scratch.take<int64_t>(3 * bins_)) {
        fill<uint64_t>(words_, words_ + bins_ * copies_, 0);
        fill<int64_t>(sums_, sums_ + 3 * bins_, 0);
    }

    int32_t copies() const { return static_cast<int32_t>(copies_); }

    // Word i goes to bin at[i] / copies, in the copy that its lane has.
    CALSEG_MEMBER void add(int64_t kind, const int32_t* at, const uint64_t* word, int blocks) {
        uint64_t* words = words_ + kind * n_bins_ * copies_;
        for (int b = 0; b < blocks; ++b, at += kLanes, word += kLanes)
            for (int i = 0; i < kLanes; ++i) words[at[i]] += word[i];
    }

    // Called after a tile: whether one more of up to `voxels` might not fit.
    void end_tile(int64_t voxels) {
        held_ += round_up(voxels, kLanes) / copies_;
        if (held_ + kMaxTile / copies_ > kMostInWord) spill();
    }

    void finish(int64_t* to) {
        spill();
        for (int64_t i = 0; i < 3 * bins_; ++i)
            if (sums_[i]) atomic_add(to + i, sums_[i]);
    }

 private:
    static int64_t copies_of(int64_t bins) {
        int64_t n = kLanes;
        while (n > 4 && bins * n * static_cast<int64_t>(sizeof(uint64_t)) > kWordBytes) n /= 2;
        return n;
    }

    void spill() {
        for (int64_t b = 0; b < bins_; ++b)
            for (int64_t k = 0; k < copies_; ++k) {
                uint64_t& word = words_[b * copies_ + k];
                if (!word) continue;
                sums_[3 * b] += static_cast<int64_t>(word >> kCountShift);
                sums_[3 * b + 1] += static_cast<int64_t>(word & ((uint64_t{1} << kHitShift) - 1));
                sums_[3 * b + 2] += static_cast<int64_t>(word >> kHitShift & ((1 << (kCountShift - kHitShift)) - 1));
                word = 0;
            }
        held_ = 0;
    }

    int64_t n_bins_, bins_, copies_;
    uint64_t* words_;  // [kinds][n_bins][copies]
    int64_t* sums_;    // [kinds][n_bins][count, confidence, hits]
    int64_t held_ = 0;
};

// A label as the 32 or 64 bits of its number, for comparisons.
template <class From>
using LabelBits = std::conditional_t<sizeof(From) == 8, uint64_t, uint32_t>;

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

// Labels of a tile: the class, or kSkipped where the voxel does not count (padding included). Returns the place of the
// first label that is no class, -1 if all are.
int load_checked_labels(int32_t* to, const BinsArgs& a, const Span& span) {
    const int count = span.count;
    with_integer_type(a.spec.labels.tensor.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const int64_t step = a.spec.labels.tensor.stride_s;
        const From* from = static_cast<const From*>(a.spec.labels.tensor.data) + span.n * a.spec.labels.tensor.stride_n + span.s * step;
        classes_of(to, from, step, count, a.shape.C, a.spec.labels.ignore_index, a.spec.skip_background);
    });
    fill<int32_t>(to + count, to + round_up(count, kLanes), kSkipped);
    if (a.spec.mask) {
        const int64_t step = a.spec.mask.stride_s;
        const uint8_t* mask = static_cast<const uint8_t*>(a.spec.mask.data) + span.n * a.spec.mask.stride_n + span.s * step;
        for (int i = 0; i < count; ++i) to[i] = mask[i * step] ? to[i] : kSkipped;
    }
    int32_t least = 0;
    for (int i = 0; i < count; ++i) least = to[i] < least ? to[i] : least;
    for (int i = 0; least == kNoClass; ++i)
        if (to[i] == kNoClass) return i;
    return -1;
}

int64_t label_at(const TensorView& labels, const Span& span, int i) {
    int64_t label = 0;
    with_integer_type(labels.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        label = static_cast<int64_t>(static_cast<const From*>(labels.data)[span.n * labels.stride_n + (span.s + i) * labels.stride_s]);
    });
    return label;
}

template <bool kLogits, class T>
using VoxelSums = std::conditional_t<kLogits, LogitSums<T>, ProbabilitySums<T>>;

// Rows of a tile, a value per voxel.
template <class T>
struct VoxelRows {
    int32_t* labels;  // kSkipped where the voxel does not count
    int32_t* binned;  // class-wise: -1 where the voxel is in the bins, else 0
    T* scale;         // class-wise: what makes probabilities of e
    char* sums;       // [blocks] of VoxelSums
    int32_t* at;      // where the voxel's word goes
    uint64_t* word;

    static int64_t bytes(int64_t length) {
        return 3 * Scratch::bytes<int32_t>(length) + Scratch::bytes<T>(length) + Scratch::bytes<ProbabilitySums<T>>(length / kLanes) +
               Scratch::bytes<uint64_t>(length);
    }
    VoxelRows(Scratch& scratch, int length) {
        for (auto* row : {&labels, &binned, &at}) *row = scratch.take<int32_t>(length);
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

// Step 1 of logits, a block: the sums; the block becomes exp(logits - max) if kKeep.
template <bool kKeep, class T, class Ahead>
CALSEG_INLINE LogitSums<T> sum_logits(I<T> labels, T* block, int64_t C, Ahead& ahead) {
    F<T> top = load<F<T>>(block);
    I<T> top_class = broadcast<I<T>>(0);
    for (int64_t c = 1; c < C; ++c) {
        const F<T> x = load<F<T>>(block + c * kLanes);
        if (!kKeep) top_class = select(less(top, x), broadcast<I<T>>(static_cast<int32_t>(c)), top_class);
        top = larger(x, top);
    }
    LogitSum<T> sum;
    for_classes(C, [&](auto group, int64_t c) {
        constexpr int K = decltype(group)::value;
        F<T> e[K];
        for (int j = 0; j < K; ++j) e[j] = load<F<T>>(block + (c + j) * kLanes) - top;
        sum.add(labels, c, e);
        if (kKeep)
            for (int j = 0; j < K; ++j) store(block + (c + j) * kLanes, e[j]);
        ahead.template lines<K>();
    });
    return sum.result(top_class);
}

// The same for C classes that the registers hold, straight from memory: kWhole blocks, or the last voxels of a tile.
template <int C, bool kWhole, class T, class From>
CALSEG_INLINE LogitSums<T> sum_few_logits(I<T> labels, const From* const (&row)[C], int at, int count) {
    const auto logits = [&](int c) {
        alignas(64) T lanes[kLanes];
        if (kWhole) widen_lanes(lanes, row[c] + at);
        else
            for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? static_cast<T>(widened(row[c][at + i])) : T(0);
        return load<F<T>>(lanes);
    };
    // written out: a loop over so much is left a loop, with its arrays in memory
    F<T> low[2] = {logits(0), logits(1)}, high[C - 2 > 0 ? C - 2 : 1];
    for (int j = 0; j < C - 2; ++j) high[j] = logits(2 + j);
    I<T> top_class = select(less(low[0], low[1]), broadcast<I<T>>(1), broadcast<I<T>>(0));
    F<T> top = larger(low[1], low[0]);
    for (int j = 0; j < C - 2; ++j) {
        top_class = select(less(top, high[j]), broadcast<I<T>>(2 + j), top_class);
        top = larger(high[j], top);
    }
    LogitSum<T> sum;
    for (auto& x : low) x = x - top;
    sum.add(labels, 0, low);
    if constexpr (C > 2) {
        for (auto& x : high) x = x - top;
        sum.add(labels, 2, high);
    }
    return sum.result(top_class);
}

// Step 1 of given probabilities, a block.
template <class T, class Ahead>
CALSEG_INLINE ProbabilitySums<T> sum_probabilities(I<T> labels, const T* block, int64_t C, Ahead& ahead) {
    ProbabilitySums<T> v(load<F<T>>(block));
    for (int64_t c = 0; c < C; ++c) {
        v.add(labels, c, load<F<T>>(block + c * kLanes));
        ahead.line();
    }
    return v;
}

// Where a block's words go, and the words: 0 where a voxel is not binned.
template <class T>
class Binning {
 public:
    Binning(const BinsArgs& a, const Bins& bins)
        : right_closed_(a.spec.right_closed),
          n_bins_(broadcast<F<T>>(static_cast<T>(a.spec.n_bins))),
          last_(broadcast<I<T>>(static_cast<int32_t>(a.spec.n_bins) - 1)),
          copies_(broadcast<I<T>>(bins.copies())) {
        int32_t lanes[kLanes];
        for (int i = 0; i < kLanes; ++i) lanes[i] = i & (bins.copies() - 1);
        copy_ = load<I<T>>(lanes);
    }

    // kAll: every voxel of the block is binned, and its confidence lies in [0, 1].
    template <bool kAll, class Hit>
    CALSEG_MEMBER void set(const VoxelRows<T>& rows, int b, F<T> p, Hit hit, I<T> binned) const {
        if (!kAll) p = within_unit<T>(p);
        store(rows.at + b * kLanes, bin_of<T>(p, n_bins_, last_, right_closed_) * copies_ + copy_);
        const I<T> confidence = in_units<T>(p);
        constexpr int32_t kCount = 1 << (kCountShift - 32), kHit = 1 << (kHitShift - 32);
        const I<T> flags = select(hit, broadcast<I<T>>(kCount | kHit), broadcast<I<T>>(kCount));
        if (kAll) store_words(rows.word + b * kLanes, confidence, flags);
        else store_words(rows.word + b * kLanes, confidence & binned, flags & binned);
    }

 private:
    bool right_closed_;
    F<T> n_bins_;
    I<T> last_, copies_, copy_;
};

// Step 2: the scores of voxels, summed over the blocks of a tile, and the words of their top labels.
template <bool kClassWise, class T>
class Scores {
 public:
    Scores(const BinsArgs& a, const VoxelRows<T>& rows, const Binning<T>& binning)
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

    // Whether a voxel's probabilities do not sum to 1, or lie below 0.
    bool met_bad() const { return any(less(bad_, broadcast<I<T>>(0))); }

 private:
    // Where there may be voxels that do not count, NaN and infinite likelihoods. Returns which voxels are binned.
    CALSEG_MEMBER I<T> add_unusual(int b, I<T> labels, I<T> top, F<T> total, F<T> confidence, F<T> nll, F<T> brier) {
        const I<T> none = broadcast<I<T>>(0), yes = broadcast<I<T>>(-1);
        const F<T> nothing = zero<T>(), most = broadcast<F<T>>(static_cast<T>(kMaxNll));
        const I<T> counts = select(less(labels, none), none, yes), binned = select(equal(total, total), counts, none);
        voxels_ = voxels_ - counts;
        nans_ = nans_ - (counts ^ binned);
        infinites_ = infinites_ - select(less(nll, most), none, binned);
        nll = larger(nll, nothing);  // zero where NaN
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
    // A lane's 32 bits hold kMostBlocks scores of up to 2^25.
    I<T> whole_ = broadcast<I<T>>(0), rest_ = whole_, brier_ = whole_, voxels_ = whole_, nans_ = whole_, infinites_ = whole_, bad_ = whole_;
    int64_t counted_ = 0;
};

template <class T, class From>
struct Tile {
    ReadAhead<T, From> scores;
    VoxelRows<T> rows;
    Bins bins;
    int64_t totals[kTotals] = {};

    static int64_t bytes(const BinsArgs& a) {
        const int64_t length = tiling<T>(a).length;
        return ReadAhead<T, From>::bytes(a.shape.C, length) + VoxelRows<T>::bytes(length) + Bins::bytes(a);
    }
    Tile(Scratch& scratch, const BinsArgs& a, int length)
        : scores(scratch, a.scores, a.shape.C, length), rows(scratch, length), bins(scratch, a) {}
};

// The first voxel of a tile whose probabilities do not sum to 1, or lie below 0.
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

template <bool kClassWise, bool kLogits, class T, class From>
void run_tile(const BinsArgs& a, Tile<T, From>& tile, const Span& span, const Span& next, BinsFault& fault) {
    const int64_t C = a.shape.C;
    const VoxelRows<T> rows = tile.rows;
    const int blocks = static_cast<int>(round_up(span.count, kLanes)) / kLanes;
    const Binning<T> binning(a, tile.bins);
    tile.scores.begin(span, next);
    using Sums = VoxelSums<kLogits, T>;
    for (int b = 0; b < blocks; ++b) {
        if constexpr (kLogits)
            *rows.template sums_of<Sums>(b) = sum_logits<kClassWise>(rows.labels_of(b), tile.scores.block(b), C, tile.scores);
        else *rows.template sums_of<Sums>(b) = sum_probabilities(rows.labels_of(b), tile.scores.block(b), C, tile.scores);
    }
    tile.scores.end();
    Scores<kClassWise, T> scores(a, rows, binning);
    for (int b = 0; b < blocks; ++b) scores.add(b, rows.labels_of(b), *rows.template sums_of<Sums>(b));
    scores.finish_tile(tile.totals);
    if constexpr (!kLogits)
        if (scores.met_bad()) find_bad(a, rows, span, fault);

    // Step 3: the words go to their bins, class by class.
    if (!kClassWise) return tile.bins.add(0, rows.at, rows.word, blocks);
    for (int64_t c = a.spec.first_class; c < C; ++c) {
        for (int b = 0; b < blocks; ++b) {
            const int at = b * kLanes;
            F<T> p = load<F<T>>(tile.scores.block(b) + c * kLanes);
            if (kLogits) p = p * load<F<T>>(rows.scale + at);
            const auto hit = equal(load<I<T>>(rows.labels + at), broadcast<I<T>>(static_cast<int32_t>(c)));
            binning.template set<false>(rows, b, p, hit, load<I<T>>(rows.binned + at));
        }
        tile.bins.add(c - a.spec.first_class, rows.at, rows.word, blocks);
    }
}

// Top-label bins of two to four classes, from rows of memory.
template <int C, class T, class From>
void run_few(const BinsArgs& a, Tile<T, From>& tile, const Span& span, const Span&, BinsFault&) {
    const VoxelRows<T> rows = tile.rows;
    const int blocks = static_cast<int>(round_up(span.count, kLanes)) / kLanes;
    const From* row[C];
    for (int c = 0; c < C; ++c)
        row[c] = static_cast<const From*>(a.scores.data) + span.n * a.scores.stride_n + c * a.scores.stride_c + span.s;
    const Binning<T> binning(a, tile.bins);
    const int whole = span.count / kLanes;
    for (int b = 0; b < whole; ++b)
        *rows.template sums_of<LogitSums<T>>(b) = sum_few_logits<C, true, T, From>(rows.labels_of(b), row, b * kLanes, kLanes);
    for (int b = whole; b < blocks; ++b)
        *rows.template sums_of<LogitSums<T>>(b) =
            sum_few_logits<C, false, T, From>(rows.labels_of(b), row, b * kLanes, span.count % kLanes);
    Scores<false, T> scores(a, rows, binning);
    for (int b = 0; b < blocks; ++b) scores.add(b, rows.labels_of(b), *rows.template sums_of<LogitSums<T>>(b));
    scores.finish_tile(tile.totals);
    tile.bins.add(0, rows.at, rows.word, blocks);
}

template <class T, class From>
auto tile_runner(const BinsArgs& a) {
    if (a.spec.class_wise) return a.spec.from_logits ? run_tile<true, true, T, From> : run_tile<true, false, T, From>;
    if (!a.spec.from_logits) return run_tile<false, false, T, From>;
    if (a.scores.stride_s == 1) {
        if (a.shape.C == 2) return run_few<2, T, From>;
        if (a.shape.C == 3) return run_few<3, T, From>;
        if (a.shape.C == 4) return run_few<4, T, From>;
    }
    return run_tile<false, true, T, From>;
}

template <class T, class From>
void run(const BinsArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    Scratch scratch(memory);
    Tile<T, From> tile(scratch, a, tiles.length);
    BinsFault fault;
    const auto run_one = tile_runner<T, From>(a);
    int64_t item = 0;
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        if (fault.label_position >= 0) return;
        item = a.spec.per_item ? span.n : 0;
        const int bad = load_checked_labels(tile.rows.labels, a, span);
        if (bad >= 0) {
            fault.label_position = span.n * a.shape.S + span.s + bad;
            fault.label = label_at(a.spec.labels.tensor, span, bad);
            return;
        }
        run_one(a, tile, span, next, fault);
        tile.bins.end_tile(span.count);
    });
    tile.bins.finish(a.sums + item * 3 * kinds(a) * a.spec.n_bins);
    for (int k = 0; k < kTotals; ++k) atomic_add(a.totals + item * kTotals + k, tile.totals[k]);
    a.chunk_faults[chunk] = fault;
}

bool is_double(const BinsArgs& a) { return a.scores.dtype == DType::f64; }
int64_t num_chunks(const BinsArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }
int64_t scratch_bytes(const BinsArgs& a) { return is_double(a) ? Tile<double, double>::bytes(a) : Tile<float, float>::bytes(a); }
void run_chunk(const BinsArgs& a, int64_t chunk, void* scratch) {
    switch (a.scores.dtype) {
        case DType::f64:
            return run<double, double>(a, chunk, scratch);
        case DType::bf16:
            return run<float, BF16>(a, chunk, scratch);
        case DType::f16:
            return run<float, F16>(a, chunk, scratch);
        default:
            return run<float, float>(a, chunk, scratch);
    }
}

}  // namespace

const Kernel<BinsArgs> calibration_bins = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
