// Cross-entropy of one block of voxels with soft labels, and its gradients.
#pragma once

#include "cpu/loss_tile.h"
#include "cpu/softmax.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Returns the gradient of a soft label y. `weight` is the class weight times what label smoothing keeps of y.
template <class T>
CALSEG_INLINE F<T> soft_label_gradient(F<T> upstream, F<T> weight, F<T> log_p, F<T> y) {
    const F<T> none = zero<T>();
    // Where y is 0 and log p is -inf, the term of the loss is 0, and so is its gradient.
    const F<T> finite = select(equal(log_p, broadcast<F<T>>(T(-INFINITY))), select(equal(y, none), none, log_p), log_p);
    return select(equal(upstream, none), none, (none - weight * upstream) * finite);
}

// Returns the losses of a block with soft labels Y. On entry, `log_p` holds log softmax(logits), `e` and `sum` hold
// exp(logits - max) and its sum over classes, and `soft` holds Y. If `gradient`, log_p becomes the gradient of the logits.
// If `soft_gradient`, soft becomes the gradient of Y.
template <class T>
CALSEG_INLINE F<T> soft_cross_entropy_block(const LossTile<T>& t, int block, int64_t C, T* log_p, const T* e, F<T> sum, T* soft,
                                            const Smoothing<T>& smoothing, bool gradient, bool soft_gradient) {
    const F<T> upstream = load<F<T>>(t.upstream + block * kLanes), none = zero<T>();
    const F<T> keep = broadcast<F<T>>(smoothing.keep), spread = broadcast<F<T>>(smoothing.spread);
    F<T> loss = none, mass = none;
    for (int64_t c = 0; c < C; ++c) {
        const F<T> smoothed = keep * load<F<T>>(soft + c * kLanes) + spread, y = broadcast<F<T>>(t.weight[c]) * smoothed;
        // Where Y is 0, the term is 0 even if log p is -inf, as the limit of t log t, or if the weight is infinite.
        const auto absent = equal(smoothed, none);
        mass = mass + select(absent, none, y);
        loss = loss - select(absent, none, y * load<F<T>>(log_p + c * kLanes));
    }
    const F<T> scale_p = upstream * mass * reciprocal(sum);
    for (int64_t c = 0; c < C && (gradient || soft_gradient); ++c) {
        const F<T> weight = broadcast<F<T>>(t.weight[c]), y = load<F<T>>(soft + c * kLanes), lp = load<F<T>>(log_p + c * kLanes);
        const F<T> smoothed = keep * y + spread;
        if (gradient)
            store(log_p + c * kLanes,
                  load<F<T>>(e + c * kLanes) * scale_p - upstream * select(equal(smoothed, none), none, weight * smoothed));
        if (soft_gradient) store(soft + c * kLanes, soft_label_gradient<T>(upstream, keep * weight, lp, y));
    }
    return select(less(load<I<T>>(t.labels + block * kLanes), broadcast<I<T>>(0)), none, loss);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
