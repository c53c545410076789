// Softmax over the classes of a block [C][kLanes].
#pragma once

#include <cstdint>

#include "cpu/vector_math.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <int K>
struct Group {
    static constexpr int value = K;
};

// Calls body(Group<K>, c) for all classes, K of them at a time: vector_math.h says why. K is two, and one for a last class;
// with four the registers would run out.
template <class Body>
CALSEG_INLINE void for_classes(int64_t C, const Body& body) {
    int64_t c = 0;
    for (; c + 2 <= C; c += 2) body(Group<2>(), c);
    if (c < C) body(Group<1>(), c);
}

// Maximum over classes. A NaN anywhere stays NaN through the exponentials that follow.
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

// Turns logits into logits - max, writes their exponentials to e, and returns the sum of those.
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

// Turns the logits that exponentials_block left into log softmax(logits), and calls visit(c, log p) for every class.
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
