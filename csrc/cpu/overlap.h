// Overlap of probabilities p and labels Y: its sums over a chunk, and its gradient with respect to the logits.
//
// The sums of a class are those of p + Y and of |p - Y|. If q is the gradient of the result with respect to p, which is
//   q = slope of the first sum + sign(p - Y) * slope of the second sum,
// the gradient with respect to the logit of class j is p_j * (q_j - sum over c of q_c p_c).
#pragma once

#include <cstdint>

#include "cpu/loss_tile.h"
#include "cpu/softmax.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Returns the number of blocks whose classes fill a third of a first-level cache of 32 KiB.
template <class T>
CALSEG_INLINE int blocks_in_cache(int64_t C) {
    return static_cast<int>(larger(4, 11 * 1024 / (C * kLanes * static_cast<int64_t>(sizeof(T)))));
}

// Returns 1 / sum, or 0 where the voxel is ignored: times exp(logits - max) it is the probability.
template <class T>
CALSEG_INLINE F<T> per_sum_where_counted(I<T> labels, F<T> sum) {
    return select(less(labels, broadcast<I<T>>(0)), zero<T>(), reciprocal(sum));
}

// Sums of the overlap over a chunk. The lanes of a vector are summed in T over about kMaxTile voxels, and then in double.
template <class T>
class OverlapSums {
 public:
    CALSEG_ONCE OverlapSums(Scratch& scratch, int64_t C, bool wanted) : C_(wanted ? C : 0) {
        lanes_ = scratch.take<T>(C_ * kOverlapSums * kLanes);
        sums_ = scratch.take<double>(C_ * kOverlapSums);
        if (scratch.is_counting()) return;
        fill(lanes_, lanes_ + C_ * kOverlapSums * kLanes, T(0));
        fill(sums_, sums_ + C_ * kOverlapSums, 0.0);
    }
    explicit operator bool() const { return C_ > 0; }

    // Adds class c of a block. Both numbers must be 0 where the voxel is ignored.
    CALSEG_MEMBER void add(int64_t c, F<T> p, F<T> y) { add_sums(c, p + y, magnitude(p - y)); }

    // Adds the two numbers of class c.
    CALSEG_MEMBER void add_sums(int64_t c, F<T> mass, F<T> difference) {
        T* const to = lanes_ + c * kOverlapSums * kLanes;
        store(to, load<F<T>>(to) + mass);
        store(to + kLanes, load<F<T>>(to + kLanes) + difference);
    }

    // Adds class c of one-hot labels: the sum of p, the sum of p where the class is the label, and the number of such voxels.
    CALSEG_MEMBER void add_hard_sums(int64_t c, F<T> p, F<T> p_of_label, int hits) {
        add_sums(c, p, p - (p_of_label + p_of_label));  // 1 - p is the difference of a voxel with that label
        T* const to = lanes_ + c * kOverlapSums * kLanes;
        to[0] += static_cast<T>(hits);
        to[kLanes] += static_cast<T>(hits);
    }

    // Adds the blocks from `first` to `last` of a tile with one-hot labels. `e` holds exp(logits - max), and `per_sum` the
    // factor that makes it p.
    void add_hard(const LossTile<T>& t, const T* e, const T* per_sum, int first, int last) {
        for_classes(C_, [&](auto at_once, int64_t c) {
            constexpr int K = decltype(at_once)::value;
            F<T> sum[K], of_label[K];
            int hits[K] = {};
            for (int j = 0; j < K; ++j) sum[j] = of_label[j] = zero<T>();
            for (int b = first; b < last; ++b) {
                const I<T> labels = load<I<T>>(t.labels + b * kLanes);
                const F<T> factor = load<F<T>>(per_sum + b * kLanes);
                for (int j = 0; j < K; ++j) {
                    const F<T> p = load<F<T>>(e + (b * C_ + c + j) * kLanes) * factor;
                    const auto hit = equal(labels, broadcast<I<T>>(static_cast<int32_t>(c) + j));
                    sum[j] = sum[j] + p;
                    of_label[j] = of_label[j] + select(hit, p, zero<T>());
                    hits[j] += count_of(hit);
                }
            }
            for (int j = 0; j < K; ++j) add_hard_sums(c + j, sum[j], of_label[j], hits[j]);
        });
    }

    void finish_tile(int count) {
        voxels_ += count;
        if (voxels_ >= kMaxTile) flush();
    }

    CALSEG_ONCE void finish_chunk(double* chunk_overlap, int64_t chunk) {
        flush();
        for (int64_t i = 0; i < C_ * kOverlapSums; ++i) chunk_overlap[chunk * C_ * kOverlapSums + i] = sums_[i];
    }

 private:
    CALSEG_ONCE void flush() {
        for (int64_t i = 0; i < C_ * kOverlapSums; ++i) sums_[i] += sum_row(lanes_ + i * kLanes, kLanes);
        fill(lanes_, lanes_ + C_ * kOverlapSums * kLanes, T(0));
        voxels_ = 0;
    }

    int64_t C_;
    int voxels_ = 0;  // number of voxels in lanes_
    T* lanes_;        // [C][kOverlapSums][kLanes]
    double* sums_;    // [C][kOverlapSums] sums over the chunk, without those in lanes_
};

// Slopes of an item: the number q where p is above Y, and where it is below.
template <class T>
struct OverlapSlopes {
    T *above, *below;  // [C]

    // `slopes` is [N][C][kOverlapSums] or null. A chunk lies in one item.
    CALSEG_ONCE OverlapSlopes(Scratch& scratch, int64_t C, const double* slopes, const Tiling& tiles, int64_t chunk) {
        const int64_t wanted = slopes ? C : 0;
        above = scratch.take<T>(wanted);
        below = scratch.take<T>(wanted);
        if (scratch.is_counting()) return;
        for (int64_t c = 0; c < wanted; ++c) {
            const double* of_class = slopes + (chunk / tiles.per_item * C + c) * kOverlapSums;
            above[c] = static_cast<T>(of_class[0] + of_class[1]);
            below[c] = static_cast<T>(of_class[0] - of_class[1]);
        }
    }

    // Returns q of class c.
    CALSEG_MEMBER F<T> of(int64_t c, F<T> p, F<T> y) const {
        const F<T> high = broadcast<F<T>>(above[c]), low = broadcast<F<T>>(below[c]), half = broadcast<F<T>>(T(0.5));
        return select(less(y, p), high, select(less(p, y), low, half * (high + low)));
    }
};

// ---- one-hot labels: gradient of loss and overlap in three steps, as hard_cross_entropy.h computes that of the loss ----
//
// A probability is below a label of 1 and above a label of 0, except where it equals the label. There the gradient is 0 for
// any q.

// Step 1 for a block: turns the logits into e = exp(logits - max). It stores
//   t.sum           sum of e
//   t.weighted_d    sum of q * e
//   t.label_weight  class weight of the label
template <class T, class Ahead>
CALSEG_INLINE void overlap_exponentials(LossTile<T>& t, int block, const OverlapSlopes<T>& slopes, T* logits, Ahead& ahead) {
    const I<T> labels = load<I<T>>(t.labels + block * kLanes);
    const F<T> top = max_over_classes(logits, t.C);
    F<T> sum = zero<T>(), dot = sum, label_weight = sum;
    for_classes(t.C, [&](auto at_once, int64_t c) {
        constexpr int K = decltype(at_once)::value;
        F<T> e[K];
        for (int j = 0; j < K; ++j) e[j] = load<F<T>>(logits + (c + j) * kLanes) - top;
        exp_nonpositive(e);
        sum = sum + sum_of(e);
        for (int j = 0; j < K; ++j) {
            const auto hit = equal(labels, broadcast<I<T>>(static_cast<int32_t>(c) + j));
            dot = dot + select(hit, broadcast<F<T>>(slopes.below[c + j]), broadcast<F<T>>(slopes.above[c + j])) * e[j];
            label_weight = select(hit, broadcast<F<T>>(t.weight[c + j]), label_weight);
            store(logits + (c + j) * kLanes, e[j]);
        }
        ahead.template read_lines<K>();
    });
    store(t.sum + block * kLanes, sum);
    store(t.weighted_d + block * kLanes, dot);
    store(t.label_weight + block * kLanes, label_weight);
}

// Step 2 for a block: computes the factors of the gradient. It stores
//   t.sum           factor that makes e the probability p
//   t.weighted_d    number that is added to q before it is multiplied by p
//   t.label_weight  number that the gradient subtracts in the class of the label
template <class T>
CALSEG_INLINE void overlap_factors(LossTile<T>& t, int block, const Smoothing<T>& smoothing) {
    const int64_t at = block * kLanes;
    const F<T> upstream = load<F<T>>(t.upstream + at), weights = broadcast<F<T>>(smoothing.spread == T(0) ? T(0) : t.weight_sum);
    const F<T> per_sum = per_sum_where_counted<T>(load<I<T>>(t.labels + at), load<F<T>>(t.sum + at));
    const F<T> on_label = broadcast<F<T>>(smoothing.keep) * load<F<T>>(t.label_weight + at);
    const F<T> mass = on_label + broadcast<F<T>>(smoothing.spread) * weights;
    store(t.weighted_d + at, upstream * mass - load<F<T>>(t.weighted_d + at) * per_sum);
    store(t.sum + at, per_sum);
    store(t.label_weight + at, upstream * on_label);
}

// Step 3: function object that computes the gradient of the logits of one class, block by block.
template <class T>
struct HardOverlapGradient {
    const int32_t* labels;
    const T *e, *per_sum, *base, *on_label, *upstream;
    int64_t C, c;
    T above, below;
    T weight;  // class weight times the spread of label smoothing

    // The first voxel is number `first` of the tile. `blocks` holds the exponentials from there on.
    HardOverlapGradient(const LossTile<T>& t, const T* blocks, int64_t class_index, const OverlapSlopes<T>& slopes,
                        const Smoothing<T>& smoothing, int first)
        : labels(t.labels + first),
          e(blocks + class_index * kLanes),
          per_sum(t.sum + first),
          base(t.weighted_d + first),
          on_label(t.label_weight + first),
          upstream(t.upstream + first),
          C(t.C),
          c(class_index),
          above(slopes.above[class_index]),
          below(slopes.below[class_index]),
          weight(smoothing.spread == T(0) ? T(0) : t.weight[class_index] * smoothing.spread) {}

    CALSEG_MEMBER F<T> operator()(int b) const {
        const int at = b * kLanes;
        const auto hit = equal(load<I<T>>(labels + at), broadcast<I<T>>(static_cast<int32_t>(c)));
        const F<T> q = select(hit, broadcast<F<T>>(below), broadcast<F<T>>(above));
        const F<T> p = load<F<T>>(e + at * C) * load<F<T>>(per_sum + at);
        return p * (load<F<T>>(base + at) + q) - select(hit, load<F<T>>(on_label + at), zero<T>()) -
               broadcast<F<T>>(weight) * load<F<T>>(upstream + at);
    }
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
