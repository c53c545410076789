// Mathematics of calibration_bins for a vector of voxels, which the CPU and the CUDA kernels share.
//
// T is float or double. F<T> and I<T> are vectors with one number per voxel. On a CPU they hold kLanes voxels, on a GPU
// one. Include the vectors and their elementary functions first: cpu/simd.h and cpu/vector_math.h, or cuda/scalar.h.
#pragma once

#include "host/arguments.h"
#include "voxel/labels.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr double kUnit = 0x1p24;    // the number 1 in fixed point
constexpr double kMaxNll = 0x1p25;  // a negative log-likelihood that is not below this number counts as infinite

// Sums over the voxels of an item. host/arguments.h describes them.
enum Total { kNllWhole, kNllRest, kBrier, kVoxels, kNan, kInfinite, kTotals };
static_assert(kTotals == kBinsTotals, "host/arguments.h gives the number");

// Converts x to fixed point: units of 2^-24, rounded to the nearest, ties to even.
template <class T>
CALSEG_INLINE I<T> in_units(F<T> x) {
    return nearest_integer(x * broadcast<F<T>>(T(kUnit)));
}

// Clamps confidences to [0, 1]. NaN becomes 0.
template <class T>
CALSEG_INLINE F<T> within_unit(F<T> p) {
    const F<T> one = broadcast<F<T>>(T(1));
    p = larger(p, zero<T>());
    return select(less(one, p), one, p);
}

// Returns the bins of confidences in [0, 1], where `last` is the last bin.
//
// Edge k of the bins is the rounded number k / n_bins. The product confidence * n_bins is rounded too, so it can lie on the
// wrong side of the edge nearest to it, but of no other edge. The function compares the confidence with that edge. N is
// F<T>, or another type by which F<T> can be multiplied and divided.
template <class T, class N>
CALSEG_INLINE I<T> bin_of(F<T> confidence, N n_bins, I<T> last, bool right_closed) {
    const I<T> nearest = nearest_integer(confidence * n_bins), one = broadcast<I<T>>(1), none = broadcast<I<T>>(0);
    const F<T> edge = to_values(nearest, confidence) / n_bins;
    if (right_closed) {
        const I<T> bin = nearest - select(less(edge, confidence), none, one);
        return select(less(bin, none), none, bin);
    }
    const I<T> bin = nearest - select(less(confidence, edge), one, none);
    return select(less(last, bin), last, bin);
}

// Computes -log p for p >= 0.
template <class T>
CALSEG_INLINE F<T> minus_log(F<T> p) {
    // log_positive() needs normal numbers. Small ones are multiplied by 2^64 first, and 64 ln 2 is added afterwards.
    const auto small = less(p, broadcast<F<T>>(T(0x1p-64)));
    const F<T> log_p = log_positive(select(small, p * broadcast<F<T>>(T(0x1p64)), p));
    const F<T> nll = select(small, broadcast<F<T>>(T(44.3614195558364998)), zero<T>()) - log_p;
    return select(less(zero<T>(), p), nll, broadcast<F<T>>(T(INFINITY)));
}

// Sums over all classes of a voxel's logits.
template <class T>
struct LogitSums {
    F<T> total;    // sum of e = exp(logit - max)
    F<T> label_d;  // logit - max of the label's class
    F<T> squares;  // Brier score times total^2
    I<T> top;      // first class with the largest logit

    CALSEG_MEMBER F<T> confidence() const { return broadcast<F<T>>(T(1)) / total; }  // the largest probability
    CALSEG_MEMBER F<T> nll() const { return log_positive(total) - label_d; }
    CALSEG_MEMBER F<T> brier(F<T> confidence) const { return squares * (confidence * confidence); }
};

// Accumulator that makes LogitSums from the classes one after another.
template <class T>
struct LogitAccumulator {
    F<T> total = zero<T>(), squares = total, label_d = total, label_e = total;

    // Adds K classes from c on. On entry e holds logit - max. The function turns it into exp(logit - max).
    template <int K>
    CALSEG_MEMBER void add(I<T> labels, int64_t c, F<T> (&e)[K]) {
        F<T> d[K];
        for (int j = 0; j < K; ++j) d[j] = e[j];
        exp_nonpositive(e);
        for (int j = 0; j < K; ++j) {
            const auto is_label = equal(labels, broadcast<I<T>>(static_cast<int32_t>(c) + j));
            label_d = select(is_label, d[j], label_d);
            label_e = select(is_label, e[j], label_e);
            squares = squares + e[j] * e[j];
        }
        total = total + sum_of(e);
    }
    CALSEG_MEMBER LogitSums<T> result(I<T> top) const {
        const F<T> others = total - label_e;
        return {total, label_d, (squares - label_e * label_e) + others * others, top};
    }
};

// Sums over classes of a voxel's probabilities, if these are given in place of logits. add() adds the classes one after
// another.
template <class T>
struct ProbabilitySums {
    F<T> total, label_p;
    F<T> squares;  // Brier score
    F<T> largest, least;
    I<T> top;

    explicit CALSEG_MEMBER ProbabilitySums(F<T> first)
        : total(zero<T>()), label_p(total), squares(total), largest(first), least(first), top(broadcast<I<T>>(0)) {}

    CALSEG_MEMBER void add(I<T> labels, int64_t c, F<T> p) {
        const I<T> own = broadcast<I<T>>(static_cast<int32_t>(c));
        top = select(less(largest, p), own, top);
        largest = larger(p, largest);
        least = select(less(p, least), p, least);
        const auto is_label = equal(labels, own);
        label_p = select(is_label, p, label_p);
        total = total + p;
        const F<T> miss = select(is_label, broadcast<F<T>>(T(1)) - p, p);
        squares = squares + miss * miss;
    }
    CALSEG_MEMBER F<T> confidence() const { return largest; }
    CALSEG_MEMBER F<T> nll() const { return minus_log<T>(label_p); }
    CALSEG_MEMBER F<T> brier(F<T>) const { return squares; }

    // Returns a negative number where the scores are no probabilities: where their sum differs from 1, or one of them lies
    // below 0, by more than the tolerance. Returns 0 elsewhere.
    CALSEG_MEMBER I<T> off(F<T> tolerance) const {
        const I<T> none = broadcast<I<T>>(0), yes = broadcast<I<T>>(-1);
        const F<T> one = broadcast<F<T>>(T(1));
        const I<T> high = select(less(tolerance, total - one), yes, none), low = select(less(tolerance, one - total), yes, none);
        return high | low | select(less(least, zero<T>() - tolerance), yes, none);
    }
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
