// Kernels of the losses that use the average calibration error (ACE).
//
// The forward kernel computes softmax probabilities p and sums per batch item, class and cell. A cell is an interval of p.
// The sums of a cell are the number of its voxels, the number of hits (voxels whose label is the class), and sums of a
// number f. The backward kernel computes the gradient of the logits from three slopes per cell, which Python computes from
// these sums.
//
// With hard bins, a cell is a bin, and f = p. With soft bins, each voxel belongs in part to the two bins whose centres are
// nearest. A cell then lies between two neighbouring centres, and f = p * n_bins + 1/2 - cell is the share of the upper
// bin. The sums of the bins follow from the sums of f and f^2 over the voxels of a cell, and of f over its hits.
//
// Least memory traffic: one read of the logits forward, one read and one write backward.
#include "cpu/binned_words.h"
#include "cpu/kernel.h"
#include "cpu/labels.h"
#include "cpu/read_ahead.h"
#include "cpu/softmax.h"
#include "voxel/calibration.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Places of the sums of a cell. Sums of f take two places each: see add_fraction().
enum Sum { kCount, kHits, kF, kFSquared = kF + 2, kFHits = kF + 4, kSums = kF + 6 };
static_assert(kSums == kAceSums, "host/arguments.h gives the number");

// Number of classes that have cells.
int64_t kinds(const AceArgs& a) { return a.shape.C - a.spec.first_class; }
// Number of cells of a class.
int64_t cells(const AceArgs& a) { return a.spec.n_bins + a.spec.soft; }

// Adds a sum, which counts units of 2^-unit. Adds the whole multiples of 2^-20 to to[0], and the rest in units of 2^-50 to
// to[1].
CALSEG_INLINE void add_fraction(int64_t* to, uint64_t sum, int unit) {
    to[0] += static_cast<int64_t>(sum >> (unit - 20));
    to[1] += static_cast<int64_t>(sum & ((uint64_t{1} << (unit - 20)) - 1)) << (50 - unit);
}

// Adds words to the sums of a cell. The words are those of one voxel, or the sum of the words of several voxels. CellFormat
// describes them. The type of the last argument is the compute type.
template <bool kSoft>
void add_words(int64_t* to, const uint64_t* words, float) {
    to[kCount] += static_cast<int64_t>(words[0] >> 52);
    to[kHits] += static_cast<int64_t>(words[0] >> 40 & 0xfff);
    add_fraction(to + kF, words[0] & ((uint64_t{1} << 40) - 1), 24);
    if (!kSoft) return;
    add_fraction(to + kFSquared, words[kSoft] & 0xffffffffu, 20);
    add_fraction(to + kFHits, words[kSoft] >> 32, 20);
}
template <bool kSoft>
void add_words(int64_t* to, const uint64_t* words, double) {
    to[kCount] += static_cast<int64_t>(words[0] >> 32);
    to[kHits] += static_cast<int64_t>(words[0] & 0xffffffffu);
    add_fraction(to + kF, words[1], 50);
    if (!kSoft) return;
    add_fraction(to + kFSquared, words[1 + kSoft], 50);
    add_fraction(to + kFHits, words[1 + 2 * kSoft], 50);
}

// Words of a voxel, for BinnedWords. Numbers are widths of bit fields, from the highest bit down. hit is 0 or 1.
//   float:   [count 12 | hit 12 | f 40], with soft bins also [f * hit 32 | f^2 32]. f is in units of 2^-24 in the first word, and
//            f * hit and f^2 are in units of 2^-20.
//   double:  [count 32 | hit 32], [f 64], with soft bins also [f^2 64], [f * hit 64], all in units of 2^-50.
template <bool kSoft, class T>
struct CellFormat {
    static constexpr bool kDouble = sizeof(T) == 8;
    static constexpr int kWords = kDouble ? (kSoft ? 4 : 2) : (kSoft ? 2 : 1);
    static constexpr int kSums = kAceSums;
    static constexpr int64_t kMostVoxels = kDouble ? 1 << 13 : (1 << 12) - 1;

    static void add_to(int64_t* sums, const uint64_t* words) { add_words<kSoft>(sums, words, T()); }
};

// Makes the words of a block of voxels. They go to rows [kWords][length].
template <bool kSoft>
CALSEG_INLINE void make_words(uint64_t* word, int length, F<float> f, I<float> hit, I<float> counted) {
    const I<float> flags = (broadcast<I<float>>(1 << 20) | (hit & broadcast<I<float>>(1 << 8))) & counted;
    const F<float> coarse = broadcast<F<float>>(0x1p20f);
    store_words(word, nearest_integer(f * broadcast<F<float>>(0x1p24f)) & counted, flags);
    if (!kSoft) return;
    store_words(word + length, nearest_integer(f * f * coarse) & counted, nearest_integer(f * coarse) & hit & counted);
}
template <bool kSoft>
CALSEG_INLINE void make_words(uint64_t* word, int length, F<double> f, I<double> hit, I<double> counted) {
    const auto fixed = [](double x) { return static_cast<uint64_t>(std::nearbyint(x * 0x1p50)); };
    for (int i = 0; i < kLanes; ++i) {
        const bool is_counted = counted[i], is_hit = is_counted && hit[i];
        word[i] = static_cast<uint64_t>(is_counted) << 32 | static_cast<uint64_t>(is_hit);
        word[length + i] = is_counted ? fixed(f[i]) : 0;
        if (!kSoft) continue;
        word[2 * length + i] = is_counted ? fixed(f[i] * f[i]) : 0;
        word[3 * length + i] = is_hit ? fixed(f[i]) : 0;
    }
}

// Cell of each probability, and f.
template <bool kSoft, class T>
struct CellOf {
    I<T> cell;
    F<T> f;

    CALSEG_MEMBER CellOf(F<T> p, F<T> n_bins, I<T> last) {
        if (kSoft) {
            const F<T> t = p * n_bins + broadcast<F<T>>(T(0.5));
            cell = truncated_integer(t);
            f = t - to_values(cell, t);
        } else {
            cell = bin_of<T>(p, n_bins, last, false);
            f = p;
        }
    }
};

// Turns the logits of a block into softmax(logits). Returns whether one of the probabilities is NaN.
template <class T, class Ahead>
CALSEG_INLINE bool softmax_block(T* block, int64_t C, Ahead& ahead) {
    const F<T> top = max_over_classes(block, C);
    F<T> sum = zero<T>();
    for_classes(C, [&](auto at_once, int64_t c) {
        constexpr int K = decltype(at_once)::value;
        F<T> e[K];
        for (int j = 0; j < K; ++j) e[j] = load<F<T>>(block + (c + j) * kLanes) - top;
        exp_nonpositive(e);
        sum = sum + sum_of(e);
        for (int j = 0; j < K; ++j) store(block + (c + j) * kLanes, e[j]);
        ahead.template read_lines<K>();
    });
    const F<T> scale = broadcast<F<T>>(T(1)) / sum;
    for (int64_t c = 0; c < C; ++c) store(block + c * kLanes, load<F<T>>(block + c * kLanes) * scale);
    return !all(equal(sum, sum));
}

// Probabilities and labels of the current tile of a chunk. A label is -1 where the voxel is ignored.
template <class T, class From>
class Probabilities {
 public:
    Probabilities(Scratch& scratch, const AceArgs& a, int length)
        : args_(a), logits_(scratch, a.logits, a.shape.C, length), labels_(scratch.take<int32_t>(length)) {}

    void load_tile(const Span& span, const Span& next) {
        const int64_t C = args_.shape.C;
        const bool any_ignored = load_labels(labels_, args_.spec.labels, span, C) < span.count;
        logits_.begin(span, next);
        if (any_ignored) clear_ignored(logits_.tile(), labels_, span.count, C);
        has_nan = false;
        for (int b = 0; b * kLanes < span.count; ++b) has_nan |= softmax_block(logits_.block(b), C, logits_);
        logits_.end();
    }
    T* tile() { return logits_.tile(); }
    T* block(int b) { return logits_.block(b); }
    I<T> labels(int b) const { return load<I<T>>(labels_ + b * kLanes); }

    bool has_nan = false;  // whether a probability of the tile is NaN

 private:
    const AceArgs& args_;
    ReadAhead<T, From> logits_;
    int32_t* labels_;
};

// Forward kernel: adds the sums of a chunk to those of its batch item.
template <bool kSoft, class T, class From>
void sum_cells(const AceArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    using Format = CellFormat<kSoft, T>;
    Probabilities<T, From> p(scratch, a, tiles.length);
    BinnedWords<Format> to(scratch, kinds(a), cells(a), tiles.length);
    int32_t* place = scratch.take<int32_t>(tiles.length);
    uint64_t* word = scratch.take<uint64_t>(tiles.length * Format::kWords);
    if (scratch.is_counting()) return;
    const F<T> n_bins = broadcast<F<T>>(static_cast<T>(a.spec.n_bins)), one = broadcast<F<T>>(T(1));
    const I<T> last = broadcast<I<T>>(static_cast<int32_t>(a.spec.n_bins) - 1);
    const WordPlaces<T> place_of(to.copies());
    const I<T> none = broadcast<I<T>>(0), yes = broadcast<I<T>>(-1);
    int64_t item = 0, nan_tiles = 0;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        item = span.n;
        p.load_tile(span, next);
        nan_tiles += p.has_nan;
        for (int64_t c = a.spec.first_class; c < a.shape.C; ++c) {
            int b = 0;
            for (; b * kLanes < span.count; ++b) {
                F<T> confidence = larger(load<F<T>>(p.block(b) + c * kLanes), zero<T>());  // 0 where NaN
                confidence = select(less(one, confidence), one, confidence);
                const CellOf<kSoft, T> at(confidence, n_bins, last);
                const I<T> labels = p.labels(b);
                store(place + b * kLanes, place_of(at.cell));
                const auto hit = equal(labels, broadcast<I<T>>(static_cast<int32_t>(c)));
                make_words<kSoft>(word + b * kLanes, tiles.length, at.f, select(hit, yes, none), select(less(labels, none), none, yes));
            }
            to.add(c - a.spec.first_class, place, word, b);
        }
        to.end_tile(span.count);
    }
    to.finish_chunk(a.sums + item * kinds(a) * cells(a) * kSums);
    if (nan_tiles) atomic_add(a.nans + item, nan_tiles);
}

// Turns the probabilities p of a block into the gradient of the logits, p_j * (g_j - sum_k p_k * g_k), where g is the
// gradient with respect to p. `table` holds the three slopes of each cell. For a class, g is slope[0] + slope[1] * f, plus
// slope[2] if the class is the label. Hard bins have slope[0] only.
template <bool kSoft, class T>
CALSEG_INLINE void gradient_block(const AceArgs& a, const T* table, I<T> labels, T* p, T* slope) {
    const F<T> n_bins = broadcast<F<T>>(static_cast<T>(a.spec.n_bins)), none = zero<T>();
    const I<T> last = broadcast<I<T>>(static_cast<int32_t>(a.spec.n_bins) - 1);
    const int64_t step = cells(a);
    F<T> mean = none;
    for (int64_t c = a.spec.first_class; c < a.shape.C; ++c, table += step * kAceSlopes) {
        const F<T> confidence = load<F<T>>(p + c * kLanes);
        const CellOf<kSoft, T> at(larger(confidence, none), n_bins, last);
        F<T> g = gather(table, at.cell);
        if (kSoft) {
            g = g + gather(table + step, at.cell) * at.f;
            const auto hit = equal(labels, broadcast<I<T>>(static_cast<int32_t>(c)));
            g = g + select(hit, gather(table + 2 * step, at.cell), none);
        }
        mean = mean + confidence * g;
        store(slope + c * kLanes, g);
    }
    const auto ignored = less(labels, broadcast<I<T>>(0));
    for (int64_t c = 0; c < a.shape.C; ++c) {
        const F<T> g = c < a.spec.first_class ? none : load<F<T>>(slope + c * kLanes);
        store(p + c * kLanes, select(ignored, none, load<F<T>>(p + c * kLanes) * (g - mean)));
    }
}

// Backward kernel: writes the gradient of the logits of a chunk.
template <bool kSoft, class T, class From>
void compute_gradient(const AceArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    Probabilities<T, From> p(scratch, a, tiles.length);
    T* slope = scratch.take<T>(a.shape.C * kLanes);
    if (scratch.is_counting()) return;
    const bool stream = is_streamed(a.grad_logits, a.shape);
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        p.load_tile(span, next);
        const T* table = static_cast<const T*>(a.slopes) + span.n * kinds(a) * cells(a) * kAceSlopes;
        for (int b = 0; b * kLanes < span.count; ++b) gradient_block<kSoft>(a, table, p.labels(b), p.block(b), slope);
        store_tile(a.grad_logits, span, p.tile(), a.shape.C, stream);
    }
    finish_streams();
}

template <bool kBackward>
struct AceMoments {
    using Args = AceArgs;

    template <class T>
    static Tiling tiling(const Args& a) {
        // The current tile and the next one fill a quarter of a second-level cache of 1 MiB.
        return Tiling(a.shape, 128 * 1024 / (a.shape.C * static_cast<int64_t>(sizeof(T))), logits_of_chunk(kinds(a) * cells(a)));
    }

    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        a.spec.soft ? compute<true, T>(a, tiles, chunk, scratch) : compute<false, T>(a, tiles, chunk, scratch);
    }

 private:
    template <bool kSoft, class T>
    static void compute(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        with_stored_type<T>(a.logits.dtype, [&](auto* type) {
            using From = std::remove_pointer_t<decltype(type)>;
            if constexpr (kBackward) compute_gradient<kSoft, T, From>(a, tiles, chunk, scratch);
            else sum_cells<kSoft, T, From>(a, tiles, chunk, scratch);
        });
    }
};

}  // namespace

const Kernel<AceArgs> ace_moments = make_kernel<AceMoments<false>>();
const Kernel<AceArgs> ace_moments_backward = make_kernel<AceMoments<true>>();

}  // namespace CALSEG_ISA
}  // namespace calseg
