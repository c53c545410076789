// Cross-entropy with one-hot labels, and its gradient, for any number of classes.
//
// The computation has three steps: exponentials, losses, gradient. Each step goes over all blocks of a tile before the next
// one begins. So no block waits for the logarithm or the division of another one. The template argument kPlain says that
// there are neither class weights nor label smoothing.
#pragma once

#include "cpu/loss_tile.h"
#include "cpu/softmax.h"
#include "voxel/cross_entropy.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Step 1 for a block: computes the sums over classes that the loss needs. With d = logits - max and e = exp(d), it stores
//   t.sum           sum of e
//   t.loss          d of the label; step 2 replaces it with the loss
//   t.label_weight  class weight of the label, unless kPlain
//   t.weighted_d    sum of weight * d, unless kPlain
// If kKeep, the logits become e. For every class, `ahead` reads a line of the next tile.
template <bool kKeep, bool kPlain, class T, class Ahead>
CALSEG_INLINE void hard_exponentials(LossTile<T>& t, int block, T* logits, Ahead& ahead) {
    const I<T> labels = load<I<T>>(t.labels + block * kLanes);
    const F<T> top = max_over_classes(logits, t.C), none = zero<T>();
    F<T> sum = none, label_d = none, label_weight = none, weighted_d = none;
    for_classes(t.C, [&](auto at_once, int64_t c) {
        constexpr int K = decltype(at_once)::value;
        F<T> d[K], e[K];
        for (int j = 0; j < K; ++j) e[j] = d[j] = load<F<T>>(logits + (c + j) * kLanes) - top;
        exp_nonpositive(e);
        sum = sum + sum_of(e);
        for (int j = 0; j < K; ++j) {
            const auto hit = equal(labels, broadcast<I<T>>(static_cast<int32_t>(c) + j));
            label_d = select(hit, d[j], label_d);
            if (kKeep) store(logits + (c + j) * kLanes, e[j]);
            if (!kPlain) {
                const F<T> weight = broadcast<F<T>>(t.weight[c + j]);
                label_weight = select(hit, weight, label_weight);
                weighted_d = weighted_d + weight * d[j];
            }
        }
        ahead.template read_lines<K>();
    });
    store(t.sum + block * kLanes, sum);
    store(t.loss + block * kLanes, label_d);
    if (!kPlain) {
        store(t.label_weight + block * kLanes, label_weight);
        store(t.weighted_d + block * kLanes, weighted_d);
    }
}

// Step 2 for a block: computes the loss, and the factors of the gradient. It stores
//   t.loss          loss
//   t.sum           factor of e in the gradient
//   t.label_weight  number that the gradient subtracts in the class of the label
template <bool kPlain, class T>
CALSEG_INLINE void hard_loss(LossTile<T>& t, int block, const Smoothing<T>& smoothing) {
    const int64_t at = block * kLanes;
    const F<T> none = zero<T>();
    HardSums<T> sums{load<F<T>>(t.sum + at), load<F<T>>(t.loss + at), none, none};
    if (!kPlain) {
        sums.label_weight = load<F<T>>(t.label_weight + at);
        sums.weighted_d = load<F<T>>(t.weighted_d + at);
    }
    const HardLoss<T> result = hard_loss<kPlain, T>(sums, load<F<T>>(t.upstream + at), smoothing, t.weight_sum);
    store(t.loss + at, select(less(load<I<T>>(t.labels + at), broadcast<I<T>>(0)), none, result.loss));
    store(t.sum + at, result.scale_e);
    store(t.label_weight + at, result.scale_label);
}

// Step 3: function object that computes the gradient of the logits of one class, block by block.
template <bool kPlain, class T>
struct HardGradient {
    const int32_t* labels;
    const T *e, *scale_e, *scale_label, *upstream;
    int64_t C, c;
    T weight;  // class weight times the spread of label smoothing

    HardGradient(const LossTile<T>& t, const T* tile, int64_t class_index, const Smoothing<T>& smoothing)
        : labels(t.labels),
          e(tile + class_index * kLanes),
          scale_e(t.sum),
          scale_label(t.label_weight),
          upstream(t.upstream),
          C(t.C),
          c(class_index),
          weight(smoothing.spread == T(0) ? T(0) : t.weight[class_index] * smoothing.spread) {}

    CALSEG_MEMBER F<T> operator()(int b) const {
        const int at = b * kLanes;
        const auto hit = equal(load<I<T>>(labels + at), broadcast<I<T>>(static_cast<int32_t>(c)));
        F<T> g = load<F<T>>(e + at * C) * load<F<T>>(scale_e + at) - select(hit, load<F<T>>(scale_label + at), zero<T>());
        if (!kPlain) g = g - broadcast<F<T>>(weight) * load<F<T>>(upstream + at);
        return g;
    }
};

// Stores the gradient of the logits of a tile. gradient_of(c) returns the function object of class c. The tile e, which it
// reads, is overwritten if the voxels of the gradient are not contiguous.
template <class T, class GradientOf>
void store_hard_gradient(const TensorView& to, const Span& span, const LossTile<T>& t, T* e, bool stream, const GradientOf& gradient_of) {
    const bool rows = to.stride_s == 1;
    for (int64_t c = 0; c < t.C; ++c) {
        const auto gradient = gradient_of(c);
        if (rows) write_row<T>(to, span, c, stream, gradient);
        else
            for (int b = 0; b * kLanes < span.count; ++b) store(e + (b * t.C + c) * kLanes, gradient(b));
    }
    if (!rows) store_voxels(to, span, e, t.C);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
