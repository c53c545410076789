// Cross-entropy of one block of voxels with soft labels, and its gradients.
#pragma once

#include "cpu/loss_tile.h"
#include "cpu/softmax.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

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
    const F<T> scale_p = upstream * mass * reciprocal(sum), impossible = broadcast<F<T>>(T(-INFINITY));
    for (int64_t c = 0; c < C && (gradient || soft_gradient); ++c) {
        const F<T> weight = broadcast<F<T>>(t.weight[c]), y = load<F<T>>(soft + c * kLanes), lp = load<F<T>>(log_p + c * kLanes);
        const F<T> smoothed = keep * y + spread;
        if (gradient)
            store(log_p + c * kLanes,
                  load<F<T>>(e + c * kLanes) * scale_p - upstream * select(equal(smoothed, none), none, weight * smoothed));
        if (soft_gradient) {
            // Where Y is 0 and log p is -inf, the term of the loss is 0, and so is its gradient.
            const F<T> finite = select(equal(lp, impossible), select(equal(y, none), none, lp), lp);
            store(soft + c * kLanes, select(equal(upstream, none), none, (none - keep * weight * upstream) * finite));
        }
    }
    return select(less(load<I<T>>(t.labels + block * kLanes), broadcast<I<T>>(0)), none, loss);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
