// What the average-calibration-error losses need of the logits: per batch item, class and cell of confidence, how many
// voxels, how many of the class, and sums over them; and the way back, the gradient of the logits from a slope per cell.
// Floor: one read of the logits, and for the gradient one more with a write.
//
// Hard bins: a cell is a bin, f = p. Soft bins: a voxel is shared between the two nearest bin centres, and a cell lies
// between two centres; f = p * n_bins + 1/2 - cell is the share of the upper one, and what the bins get follows from the
// sums of f, f^2 and f where the class is the label. Every sum is an integer: the same for any number of threads.
#include "cpu/calibration.h"
#include "cpu/cross_entropy.h"
#include "cpu/operations.h"
#include "cpu/read_ahead.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

enum Sum { kCount, kHits, kF, kFSquared = kF + 2, kFHits = kF + 4, kSums = kF + 6 };  // of f each: see add_fraction
static_assert(kSums == kAceSums, "kernels.h says how many");

// A voxel adds one to four 64-bit words to its cell.
//   float:  [count 12 | hits 12 | f 40], and of soft bins [f * hit 32 | f^2 32]; f in units of 2^-24, the others 2^-20
//   double: [count 32 | hits 32], f, and of soft bins f^2, f * hit; in units of 2^-50
template <bool kSoft, class T>
constexpr int kWords = sizeof(T) == 4 ? (kSoft ? 2 : 1) : (kSoft ? 4 : 2);
template <class T>
constexpr int64_t kMostInWord = sizeof(T) == 4 ? (1 << 12) - 1 : 1 << 13;
constexpr int64_t kWordBytes = 16 * 1024;  // copies of the words fill about half of the first cache

bool is_double(const AceArgs& a) { return a.logits.dtype == DType::f64; }
int64_t kinds(const AceArgs& a) { return a.shape.C - a.spec.first_class; }
int64_t cells(const AceArgs& a) { return a.spec.n_bins + a.spec.soft; }

template <class T>
Tiling tiling(const AceArgs& a) {
    // this tile and the next in a quarter of the second cache
    return Tiling(a.shape, 128 * 1024 / (a.shape.C * static_cast<int64_t>(sizeof(T))), larger(1 << 18, 16 * kinds(a) * cells(a)));
}

// A sum in units of 2^-unit, as whole 2^-20 and a rest in units of 2^-50.
CALSEG_INLINE void add_fraction(int64_t* to, uint64_t sum, int unit) {
    to[0] += static_cast<int64_t>(sum >> (unit - 20));
    to[1] += static_cast<int64_t>(sum & ((uint64_t{1} << (unit - 20)) - 1)) << (50 - unit);
}

template <bool kSoft>
void unpack(int64_t* to, const uint64_t* words, float) {
    to[kCount] += static_cast<int64_t>(words[0] >> 52);
    to[kHits] += static_cast<int64_t>(words[0] >> 40 & 0xfff);
    add_fraction(to + kF, words[0] & ((uint64_t{1} << 40) - 1), 24);
    if (!kSoft) return;
    add_fraction(to + kFSquared, words[kSoft] & 0xffffffffu, 20);
    add_fraction(to + kFHits, words[kSoft] >> 32, 20);
}
template <bool kSoft>
void unpack(int64_t* to, const uint64_t* words, double) {
    to[kCount] += static_cast<int64_t>(words[0] >> 32);
    to[kHits] += static_cast<int64_t>(words[0] & 0xffffffffu);
    add_fraction(to + kF, words[1], 50);
    if (!kSoft) return;
    add_fraction(to + kFSquared, words[1 + kSoft], 50);
    add_fraction(to + kFHits, words[1 + 2 * kSoft], 50);
}

// Words of a block, [kWords][length] in rows.
template <bool kSoft>
CALSEG_INLINE void store_voxels_words(uint64_t* word, int length, F<float> f, I<float> hit, I<float> counted) {
    const I<float> flags = (broadcast<I<float>>(1 << 20) | (hit & broadcast<I<float>>(1 << 8))) & counted;
    store_words(word, nearest_integer(f * 0x1p24f) & counted, flags);
    if (!kSoft) return;
    store_words(word + length, nearest_integer(f * f * 0x1p20f) & counted, nearest_integer(f * 0x1p20f) & hit & counted);
}
template <bool kSoft>
CALSEG_INLINE void store_voxels_words(uint64_t* word, int length, F<double> f, I<double> hit, I<double> counted) {
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

// The sums of a chunk.
template <bool kSoft, class T>
class Cells {
 public:
    static constexpr int kPerCell = kWords<kSoft, T>;

    static int64_t bytes(const AceArgs& a) {
        const int64_t all = kinds(a) * cells(a);
        return Scratch::bytes<uint64_t>(all * copies_of(all) * kPerCell) + Scratch::bytes<int64_t>(all * kSums);
    }

    Cells(Scratch& scratch, const AceArgs& a)
        : cells_(cells(a)),
          all_(kinds(a) * cells_),
          copies_(copies_of(all_)),
          words_(scratch.take<uint64_t>(all_ * copies_ * kPerCell)),
          sums_(scratch.take<int64_t>(all_ * kSums)) {
        fill<uint64_t>(words_, words_ + all_ * copies_ * kPerCell, 0);
        fill<int64_t>(sums_, sums_ + all_ * kSums, 0);
    }

    int32_t copies() const { return static_cast<int32_t>(copies_); }

    // Voxel i adds to cell at[i] / copies, in the copy that its lane has.
    CALSEG_MEMBER void add(int64_t kind, const int32_t* at, const uint64_t* word, int length, int count) {
        uint64_t* words = words_ + kind * cells_ * copies_ * kPerCell;
        for (int i = 0; i < count; ++i)
            for (int w = 0; w < kPerCell; ++w) words[at[i] * kPerCell + w] += word[w * length + i];
    }

    // Called after a tile: whether one more of up to `voxels` might not fit.
    void end_tile(int64_t voxels) {
        held_ += round_up(voxels, kLanes) / copies_;
        if (held_ + kMaxTile / copies_ > kMostInWord<T>) spill();
    }

    void finish(int64_t* to) {
        spill();
        for (int64_t i = 0; i < all_ * kSums; ++i)
            if (sums_[i]) atomic_add(to + i, sums_[i]);
    }

 private:
    static int64_t copies_of(int64_t cells) {
        int64_t n = kLanes;
        while (n > 4 && cells * n * kPerCell * static_cast<int64_t>(sizeof(uint64_t)) > kWordBytes) n /= 2;
        return n;
    }

    void spill() {
        uint64_t* words = words_;
        for (int64_t cell = 0; cell < all_; ++cell)
            for (int64_t k = 0; k < copies_; ++k, words += kPerCell) {
                unpack<kSoft>(sums_ + cell * kSums, words, T());
                for (int w = 0; w < kPerCell; ++w) words[w] = 0;
            }
        held_ = 0;
    }

    int64_t cells_, all_, copies_;
    uint64_t* words_;  // [kinds][cells][copies][kPerCell]
    int64_t* sums_;    // [kinds][cells][kSums]
    int64_t held_ = 0;
};

// The cell of probabilities, and the place in it.
template <bool kSoft, class T>
struct Place {
    I<T> cell;
    F<T> f;

    CALSEG_MEMBER Place(F<T> p, F<T> n_bins, I<T> last) {
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

// Logits become softmax(logits); returns whether there is a NaN.
template <class T, class Ahead>
CALSEG_INLINE bool softmax_block(T* block, int64_t C, Ahead& ahead) {
    const F<T> top = max_over_classes(block, C);
    F<T> sum = zero<T>();
    for_classes(C, [&](auto group, int64_t c) {
        constexpr int K = decltype(group)::value;
        F<T> e[K];
        for (int j = 0; j < K; ++j) e[j] = load<F<T>>(block + (c + j) * kLanes) - top;
        exp_nonpositive(e);
        sum = sum + sum_of(e);
        for (int j = 0; j < K; ++j) store(block + (c + j) * kLanes, e[j]);
        ahead.template lines<K>();
    });
    const F<T> scale = broadcast<F<T>>(T(1)) / sum;
    for (int64_t c = 0; c < C; ++c) store(block + c * kLanes, load<F<T>>(block + c * kLanes) * scale);
    return !all(equal(sum, sum));
}

// The tiles of a chunk: body(span, probabilities) with the labels, -1 where ignored.
template <class T, class From>
class Probabilities {
 public:
    static int64_t bytes(const AceArgs& a) {
        const int64_t length = tiling<T>(a).length;
        return ReadAhead<T, From>::bytes(a.shape.C, length) + Scratch::bytes<int32_t>(length);
    }
    Probabilities(Scratch& scratch, const AceArgs& a, int length)
        : args_(a), logits_(scratch, a.logits, a.shape.C, length), labels_(scratch.take<int32_t>(length)) {}

    void begin(const Span& span, const Span& next) {
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

    bool has_nan = false;

 private:
    const AceArgs& args_;
    ReadAhead<T, From> logits_;
    int32_t* labels_;
};

template <bool kSoft, class T, class From>
struct Forward {
    static int64_t bytes(const AceArgs& a) {
        const int64_t length = tiling<T>(a).length;
        return Probabilities<T, From>::bytes(a) + Cells<kSoft, T>::bytes(a) + Scratch::bytes<int32_t>(length) +
               Scratch::bytes<uint64_t>(length * kWords<kSoft, T>);
    }

    static void run(const AceArgs& a, int64_t chunk, void* memory) {
        const Tiling tiles = tiling<T>(a);
        Scratch scratch(memory);
        Probabilities<T, From> p(scratch, a, tiles.length);
        Cells<kSoft, T> to(scratch, a);
        int32_t* at = scratch.take<int32_t>(tiles.length);
        uint64_t* word = scratch.take<uint64_t>(tiles.length * kWords<kSoft, T>);
        const F<T> n_bins = broadcast<F<T>>(static_cast<T>(a.spec.n_bins)), one = broadcast<F<T>>(T(1));
        const I<T> last = broadcast<I<T>>(static_cast<int32_t>(a.spec.n_bins) - 1), copies = broadcast<I<T>>(to.copies());
        const I<T> none = broadcast<I<T>>(0), yes = broadcast<I<T>>(-1);
        int32_t lanes[kLanes];
        for (int i = 0; i < kLanes; ++i) lanes[i] = i & (to.copies() - 1);
        const I<T> copy = load<I<T>>(lanes);
        int64_t item = 0, nan_tiles = 0;
        tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
            item = span.n;
            p.begin(span, next);
            nan_tiles += p.has_nan;
            for (int64_t c = a.spec.first_class; c < a.shape.C; ++c) {
                int b = 0;
                for (; b * kLanes < span.count; ++b) {
                    F<T> confidence = larger(load<F<T>>(p.block(b) + c * kLanes), zero<T>());  // zero where NaN
                    confidence = select(less(one, confidence), one, confidence);
                    const Place<kSoft, T> place(confidence, n_bins, last);
                    const I<T> labels = p.labels(b);
                    store(at + b * kLanes, place.cell * copies + copy);
                    const auto hit = equal(labels, broadcast<I<T>>(static_cast<int32_t>(c)));
                    store_voxels_words<kSoft>(word + b * kLanes, tiles.length, place.f, select(hit, yes, none),
                                              select(less(labels, none), none, yes));
                }
                to.add(c - a.spec.first_class, at, word, tiles.length, b * kLanes);
            }
            to.end_tile(span.count);
        });
        to.finish(a.sums + item * kinds(a) * cells(a) * kSums);
        if (nan_tiles) atomic_add(a.nans + item, nan_tiles);
    }
};

// The gradient: of p it is slope[0] + slope[1] * f + slope[2] where the class is the label.
template <bool kSoft, class T, class From>
struct Backward {
    static int64_t bytes(const AceArgs& a) { return Probabilities<T, From>::bytes(a) + Scratch::bytes<T>(a.shape.C * kLanes); }

    static void run(const AceArgs& a, int64_t chunk, void* memory) {
        const Tiling tiles = tiling<T>(a);
        Scratch scratch(memory);
        Probabilities<T, From> p(scratch, a, tiles.length);
        T* slope = scratch.take<T>(a.shape.C * kLanes);
        const bool stream = is_streamed(a.grad_logits, a.shape);
        tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
            p.begin(span, next);
            const T* table = static_cast<const T*>(a.slopes) + span.n * kinds(a) * cells(a) * kAceSlopes;
            for (int b = 0; b * kLanes < span.count; ++b) block(a, table, p.labels(b), p.block(b), slope);
            store_tile(a.grad_logits, span, p.tile(), a.shape.C, stream);
        });
        finish_streams();
    }

 private:
    // Probabilities of a block become the gradient of the logits, p_j * (slope_j - sum_k p_k * slope_k).
    static void block(const AceArgs& a, const T* table, I<T> labels, T* p, T* slope) {
        const F<T> n_bins = broadcast<F<T>>(static_cast<T>(a.spec.n_bins)), none = zero<T>();
        const I<T> last = broadcast<I<T>>(static_cast<int32_t>(a.spec.n_bins) - 1);
        const int64_t step = cells(a);
        F<T> mean = none;
        for (int64_t c = a.spec.first_class; c < a.shape.C; ++c, table += step * kAceSlopes) {
            const F<T> confidence = load<F<T>>(p + c * kLanes);
            const Place<kSoft, T> place(larger(confidence, none), n_bins, last);
            F<T> g = gather(table, place.cell);
            if (kSoft) {
                g = g + gather(table + step, place.cell) * place.f;
                const auto hit = equal(labels, broadcast<I<T>>(static_cast<int32_t>(c)));
                g = g + select(hit, gather(table + 2 * step, place.cell), none);
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
};

template <template <bool, class, class> class Pass, bool kSoft>
void run_as(const AceArgs& a, int64_t chunk, void* scratch) {
    switch (a.logits.dtype) {
        case DType::f64:
            return Pass<kSoft, double, double>::run(a, chunk, scratch);
        case DType::bf16:
            return Pass<kSoft, float, BF16>::run(a, chunk, scratch);
        case DType::f16:
            return Pass<kSoft, float, F16>::run(a, chunk, scratch);
        default:
            return Pass<kSoft, float, float>::run(a, chunk, scratch);
    }
}

template <template <bool, class, class> class Pass>
void run_chunk(const AceArgs& a, int64_t chunk, void* scratch) {
    a.spec.soft ? run_as<Pass, true>(a, chunk, scratch) : run_as<Pass, false>(a, chunk, scratch);
}

template <template <bool, class, class> class Pass>
int64_t scratch_bytes(const AceArgs& a) {
    if (is_double(a)) return a.spec.soft ? Pass<true, double, double>::bytes(a) : Pass<false, double, double>::bytes(a);
    return a.spec.soft ? Pass<true, float, float>::bytes(a) : Pass<false, float, float>::bytes(a);
}

int64_t num_chunks(const AceArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }

}  // namespace

const Kernel<AceArgs> ace_moments = {num_chunks, scratch_bytes<Forward>, run_chunk<Forward>};
const Kernel<AceArgs> ace_moments_backward = {num_chunks, scratch_bytes<Backward>, run_chunk<Backward>};

}  // namespace CALSEG_ISA
}  // namespace calseg
