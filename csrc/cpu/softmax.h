// Sums and softmax over the classes of a block [C][kLanes].
#pragma once

#include <cstdint>

#include "cpu/vector_math.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <int K>
struct AtOnce {
    static constexpr int value = K;
};

// Calls body(AtOnce<K>, c) to process classes c to c + K, until all C classes are processed. K is 2, or 1 for the last class if
// C is odd. The functions of vector_math.h are faster for two vectors at once than for one. Four would need too many
// registers.
template <class Body>
CALSEG_INLINE void for_classes(int64_t C, const Body& body) {
    int64_t c = 0;
    for (; c + 2 <= C; c += 2) body(AtOnce<2>(), c);
    if (c < C) body(AtOnce<1>(), c);
}

// Returns the maximum over classes. Where a class is NaN, the maximum is NaN or that of other classes. In both cases the
// sum of the exponentials becomes NaN.
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

// Turns logits into logits - max, writes the exponentials of these to e, and returns the sum of the exponentials.
template <class T>
CALSEG_INLINE F<T> exponentials_block(T* logits, T* e, int64_t C) {
    const F<T> top = max_over_classes(logits, C);
    F<T> sum = zero<T>();
    for_classes(C, [&](auto at_once, int64_t c) {
        constexpr int K = decltype(at_once)::value;
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

// Turns logits - max, as left by exponentials_block, into log p = log softmax(logits). Calls visit(c, log p) for every
// class.
template <class T, class Visit>
CALSEG_INLINE void log_softmax_block(T* logits, F<T> sum, int64_t C, const Visit& visit) {
    const F<T> log_sum_exp = log_positive(sum);
    for (int64_t c = 0; c < C; ++c) {
        const F<T> log_p = load<F<T>>(logits + c * kLanes) - log_sum_exp;
        store(logits + c * kLanes, log_p);
        visit(c, log_p);
    }
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
