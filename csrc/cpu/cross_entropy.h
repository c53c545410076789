// What the losses share, and cross-entropy of one block of voxels against soft labels, forward and gradient.
// Blocks are [C][kLanes]; what there is one of per voxel lives in registers.
#pragma once

#include "cpu/tile.h"
#include "cpu/vector_math.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// What there is one of per voxel of a tile, and the class weights.
template <class T>
struct LossTile {
    int count = 0, counted = 0;
    int64_t C;
    int32_t* labels;                     // [length], -1 where ignored
    T *loss, *kl;                        // [length]
    T* upstream;                         // [length] dLoss/dl, 0 where ignored
    T* kl_upstream;                      // [length] dLoss/dK, 0 where ignored
    T *sum, *label_weight, *weighted_d;  // [length] between the steps of one-hot labels
    T* weight;                           // [C], ones without class weights
    T weight_sum = 0;
    bool weighted;
    LossSums sums;  // of the tiles so far
    LabelsAhead labels_ahead;

    static int64_t bytes(int64_t C, int64_t length) {
        return Scratch::bytes<int32_t>(length) + 7 * Scratch::bytes<T>(length) + Scratch::bytes<T>(C);
    }

    LossTile(Scratch& scratch, int64_t num_classes, int length, const double* class_weight)
        : C(num_classes), weighted(class_weight != nullptr) {
        labels = scratch.take<int32_t>(length);
        loss = scratch.take<T>(length);
        kl = scratch.take<T>(length);
        upstream = scratch.take<T>(length);
        kl_upstream = scratch.take<T>(length);
        sum = scratch.take<T>(length);
        label_weight = scratch.take<T>(length);
        weighted_d = scratch.take<T>(length);
        weight = scratch.take<T>(C);
        for (int64_t c = 0; c < C; ++c) {
            weight[c] = class_weight ? static_cast<T>(class_weight[c]) : T(1);
            weight_sum += weight[c];
        }
    }

    void load(const Labels& from, const Upstream& up, const Span& span, const Span& next) {
        labels_ahead = LabelsAhead(from, next);
        count = span.count;
        counted = load_labels(labels, from, span, C);
        sums.uncounted += count - counted;
        load_upstream(up, span);
    }

    bool any_ignored() const { return counted < count; }

 private:
    int filled_ = 0;  // so many upstream gradients are those of the tile before, in which no voxel was ignored

    void load_upstream(const Upstream& up, const Span& span) {
        const T scale = static_cast<T>(up.scale), kl_scale = static_cast<T>(up.kl_scale);
        const int padded = static_cast<int>(round_up(count, kLanes));
        if (up.grad_output) load_tile(upstream, up.grad_output, span, 1);
        else if (!any_ignored()) {
            if (padded > filled_) {
                fill(upstream, upstream + padded, scale);
                fill(kl_upstream, kl_upstream + padded, kl_scale);
                filled_ = padded;
            }
            return;
        } else fill(upstream, upstream + padded, T(1));
        filled_ = 0;
        for (int i = 0; i < padded; ++i) {
            kl_upstream[i] = labels[i] < 0 ? T(0) : upstream[i] * kl_scale;
            upstream[i] = labels[i] < 0 ? T(0) : upstream[i] * scale;
        }
    }
};

template <int K>
struct Group {
    static constexpr int value = K;
};

// body(Group<K>, c) for all classes, two at a time: see vector_math.h for why. (With four the registers run out.)
template <class Body>
CALSEG_INLINE void for_classes(int64_t C, const Body& body) {
    int64_t c = 0;
    for (; c + 2 <= C; c += 2) body(Group<2>(), c);
    if (c < C) body(Group<1>(), c);
}

template <class T>
CALSEG_INLINE void clear_block(T* block, int64_t C) {
    for (int64_t c = 0; c < C; ++c) store(block + c * kLanes, zero<T>());
}

// max over classes; a NaN anywhere stays NaN through the exponentials that follow
template <class T>
CALSEG_INLINE F<T> max_over_classes(const T* block, int64_t C) {
    F<T> a = load<F<T>>(block), b = a;
    int64_t c = 1;
    for (; c + 2 <= C; c += 2) {
        a = larger(load<F<T>>(block + c * kLanes), a);
        b = larger(load<F<T>>(block + (c + 1) * kLanes), b);
    }
    if (c < C) a = larger(load<F<T>>(block + c * kLanes), a);
    return larger(a, b);
}

// logits become logits - max, e their exponentials, whose sum is returned.
template <class T>
CALSEG_INLINE F<T> exponentials_block(T* logits, T* e, int64_t C) {
    const F<T> top = max_over_classes(logits, C);
    F<T> sum = zero<T>();
    for_classes(C, [&](auto group, int64_t c) {
        constexpr int K = decltype(group)::value;
        F<T> d[K], exponential[K];
        for (int j = 0; j < K; ++j) exponential[j] = d[j] = load<F<T>>(logits + (c + j) * kLanes) - top;
        exp_nonpositive(exponential);
        sum = sum + sum_of(exponential);
        for (int j = 0; j < K; ++j) {
            store(logits + (c + j) * kLanes, d[j]);
            store(e + (c + j) * kLanes, exponential[j]);
        }
    });
    return sum;
}

// What exponentials_block leaves becomes log softmax(logits), which visit(c, .) is shown.
template <class T, class Visit>
CALSEG_INLINE void log_softmax_block(T* logits, F<T> sum, int64_t C, const Visit& visit) {
    const F<T> log_sum_exp = log_positive(sum);
    for (int64_t c = 0; c < C; ++c) {
        const F<T> log_p = load<F<T>>(logits + c * kLanes) - log_sum_exp;
        store(logits + c * kLanes, log_p);
        visit(c, log_p);
    }
}

// Uniform label smoothing, Yt = keep * Y + spread: made once, as a division in every block shows.
template <class T>
struct Smoothing {
    T keep, spread;
    Smoothing(double label_smoothing, int64_t C)
        : keep(T(1) - static_cast<T>(label_smoothing)), spread(static_cast<T>(label_smoothing) / static_cast<T>(C)) {}
};

// Soft labels Y. log_p becomes dLoss/dlogits if gradient; soft becomes dLoss/dY if soft_gradient.
template <class T>
CALSEG_INLINE F<T> soft_cross_entropy_block(const LossTile<T>& t, int block, int64_t C, T* log_p, const T* e, F<T> sum, T* soft,
                                            const Smoothing<T>& smoothing, bool gradient, bool soft_gradient) {
    const F<T> upstream = load<F<T>>(t.upstream + block * kLanes), none = zero<T>();
    const F<T> keep = broadcast<F<T>>(smoothing.keep), spread = broadcast<F<T>>(smoothing.spread);
    F<T> loss = none, mass = none;
    for (int64_t c = 0; c < C; ++c) {
        const F<T> smoothed = keep * load<F<T>>(soft + c * kLanes) + spread, y = broadcast<F<T>>(t.weight[c]) * smoothed;
        mass = mass + y;
        // the limit of t log t is 0, also where log p is -inf
        loss = loss - select(equal(smoothed, none), none, y * load<F<T>>(log_p + c * kLanes));
    }
    const F<T> scale_p = upstream * mass * reciprocal(sum), impossible = broadcast<F<T>>(T(-INFINITY));
    for (int64_t c = 0; c < C && (gradient || soft_gradient); ++c) {
        const F<T> weight = broadcast<F<T>>(t.weight[c]), y = load<F<T>>(soft + c * kLanes), lp = load<F<T>>(log_p + c * kLanes);
        if (gradient) store(log_p + c * kLanes, load<F<T>>(e + c * kLanes) * scale_p - upstream * (weight * (keep * y + spread)));
        if (soft_gradient) {
            // an impossible class without mass: as the loss takes it, nothing to change
            const F<T> finite = select(equal(lp, impossible), select(equal(y, none), none, lp), lp);
            store(soft + c * kLanes, select(equal(upstream, none), none, (none - keep * weight * upstream) * finite));
        }
    }
    return select(less(load<I<T>>(t.labels + block * kLanes), broadcast<I<T>>(0)), none, loss);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
