// Mathematics of cross-entropy with one-hot labels for a vector of voxels, which the CPU and the CUDA kernels share.
//
// T is float or double. F<T> is a vector with one number per voxel. Include the vectors and their elementary functions
// first: cpu/simd.h and cpu/vector_math.h, or cuda/scalar.h. The template argument kPlain says that there are neither class
// weights nor label smoothing.
#pragma once

#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Factors of uniform label smoothing, which turns Y into keep * Y + spread. They are computed once per chunk, because a
// division in every block would cost time.
template <class T>
struct Smoothing {
    T keep, spread;
    CALSEG_MEMBER Smoothing(double label_smoothing, int64_t C)
        : keep(T(1) - static_cast<T>(label_smoothing)), spread(static_cast<T>(label_smoothing) / static_cast<T>(C)) {}
};

// Sums over the classes of a voxel, with d = logit - max. The last two are not read if kPlain.
template <class T>
struct HardSums {
    F<T> sum;           // sum of e = exp(d)
    F<T> label_d;       // d of the label
    F<T> label_weight;  // class weight of the label
    F<T> weighted_d;    // sum of weight * d
};

// Loss of a voxel, and the factors of its gradient. The gradient of class c is scale_e * e[c] - upstream * spread * weight[c],
// less scale_label in the class of the label.
template <class T>
struct HardLoss {
    F<T> loss, scale_e, scale_label;
};

template <bool kPlain, class T>
CALSEG_INLINE HardLoss<T> hard_loss(const HardSums<T>& s, F<T> upstream, const Smoothing<T>& smoothing, T weight_sum) {
    const F<T> log_sum_exp = log_positive(s.sum);
    F<T> loss = log_sum_exp - s.label_d, on_label = broadcast<F<T>>(T(1)), mass = on_label;
    if (!kPlain) {
        // Without label smoothing, a class that is not the label does not count, even if its weight is infinite.
        const F<T> spread = broadcast<F<T>>(smoothing.spread), weights = broadcast<F<T>>(smoothing.spread == T(0) ? T(0) : weight_sum);
        on_label = broadcast<F<T>>(smoothing.keep) * s.label_weight;
        loss = on_label * loss;
        // If spread is 0, skip the term: weighted_d is -inf where a logit is, and 0 times -inf would be NaN.
        if (smoothing.spread != T(0)) loss = loss + spread * (weights * log_sum_exp - s.weighted_d);
        mass = on_label + spread * weights;
    }
    return {loss, upstream * mass * reciprocal(s.sum), upstream * on_label};
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
