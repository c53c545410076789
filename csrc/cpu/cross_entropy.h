// Cross-entropy of one tile, forward and gradient, against one-hot labels or against soft labels in a tile.
#pragma once

#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Per-voxel rows and per-class values of a tile that every loss needs.
template <class T>
struct LossTile {
    int stride = 0, count = 0, padded = 0, counted = 0;
    int64_t C = 0;
    int32_t* labels;          // [padded], -1 where ignored
    T *maximum, *sum, *loss;  // [padded]
    T* upstream;              // [padded] dLoss/dl, 0 where ignored
    T* row;                   // [padded] free for use
    T* weight;                // [C], ones without class weights
    bool weighted;

    static int64_t bytes(int64_t C, int64_t length) {
        return Scratch::bytes<int32_t>(length) + 5 * Scratch::bytes<T>(length) + Scratch::bytes<T>(C);
    }

    LossTile(Scratch& scratch, int64_t num_classes, int length, const double* class_weight)
        : stride(length), C(num_classes), weighted(class_weight != nullptr) {
        labels = scratch.take<int32_t>(length);
        maximum = scratch.take<T>(length);
        sum = scratch.take<T>(length);
        loss = scratch.take<T>(length);
        upstream = scratch.take<T>(length);
        row = scratch.take<T>(length);
        weight = scratch.take<T>(C);
        for (int64_t c = 0; c < C; ++c) weight[c] = class_weight ? static_cast<T>(class_weight[c]) : T(1);
    }

    void load(const Labels& from, const Upstream& up, int64_t n, int64_t s, int voxels) {
        count = voxels;
        padded = static_cast<int>(round_up(voxels, kLanes));
        counted = load_labels(labels, from, n, s, count, padded);
        if (up.grad_output) load_row(upstream, up.grad_output, n, s, count, padded);
        const T scale = static_cast<T>(up.scale);
        for (int i = 0; i < padded; ++i) upstream[i] = labels[i] < 0 ? T(0) : up.grad_output ? upstream[i] * scale : scale;
    }

    // The loss of ignored voxels is 0, and so is what the padding holds.
    void clear_ignored_loss() {
        for (int i = 0; i < padded; ++i) loss[i] = labels[i] < 0 ? T(0) : loss[i];
    }
    bool any_ignored() const { return counted < padded; }
};

// maximum[i] = max_c rows[c][i]; a NaN anywhere stays NaN through the exponentials that follow
template <class T>
void max_over_classes(const T* CALSEG_RESTRICT rows, int stride, int padded, int64_t C, T* CALSEG_RESTRICT maximum) {
    for (int i = 0; i < padded; ++i) maximum[i] = rows[i];
    int64_t c = 1;
    for (; c + 4 <= C; c += 4) {
        const T *r0 = rows + c * stride, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
        for (int i = 0; i < padded; ++i) {
            T a = r0[i] > r1[i] ? r0[i] : r1[i];
            T b = r2[i] > r3[i] ? r2[i] : r3[i];
            a = a > b ? a : b;
            maximum[i] = a > maximum[i] ? a : maximum[i];
        }
    }
    for (; c < C; ++c)
        for (int i = 0; i < padded; ++i) maximum[i] = rows[c * stride + i] > maximum[i] ? rows[c * stride + i] : maximum[i];
}

// e = exp(row - maximum), its sum over classes, and the label's (row - maximum) in t.loss; rows become e if kKeep.
// Class weights and smoothing also want the label's weight in t.row and sum_c w[c] * (row - maximum) in smooth.
template <bool kKeep, bool kPlain, int kRows, class T>
CALSEG_INLINE void exponentials(LossTile<T>& t, T* CALSEG_RESTRICT rows, int64_t c, T* CALSEG_RESTRICT smooth) {
    T *CALSEG_RESTRICT sum = t.sum, *CALSEG_RESTRICT picked = t.loss, *CALSEG_RESTRICT picked_weight = t.row;
    const T* CALSEG_RESTRICT maximum = t.maximum;
    const int32_t* CALSEG_RESTRICT labels = t.labels;
    const int padded = t.padded, stride = t.stride;
    T weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = t.weight[c + r];
    rows += c * stride;
    for (int i = 0; i < padded; ++i) {
        T total = sum[i], d_label = picked[i], w_label = kPlain ? T(0) : picked_weight[i], d_sum = kPlain ? T(0) : smooth[i];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const T d = rows[r * stride + i] - maximum[i];
            const T e = exp_nonpositive(d);
            const bool hit = labels[i] == static_cast<int32_t>(c) + r;
            total += e;
            d_label = hit ? d : d_label;
            if (kKeep) rows[r * stride + i] = e;
            if (!kPlain) {
                w_label = hit ? weight[r] : w_label;
                d_sum += weight[r] * d;
            }
        }
        sum[i] = total;
        picked[i] = d_label;
        if (!kPlain) {
            picked_weight[i] = w_label;
            smooth[i] = d_sum;
        }
    }
}

// rows: e -> dl/dlogits = e * scale_p - [label == c] * scale_hit - w[c] * scale_smooth
template <bool kPlain, int kRows, class T>
CALSEG_INLINE void gradients(const LossTile<T>& t, T* CALSEG_RESTRICT rows, int64_t c, const T* CALSEG_RESTRICT scale_p,
                             const T* CALSEG_RESTRICT scale_hit, T scale_smooth) {
    const int32_t* CALSEG_RESTRICT labels = t.labels;
    const T* CALSEG_RESTRICT upstream = t.upstream;
    const int padded = t.padded, stride = t.stride;
    T weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = t.weight[c + r] * scale_smooth;
    rows += c * stride;
    for (int i = 0; i < padded; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const bool hit = labels[i] == static_cast<int32_t>(c) + r;
            T g = rows[r * stride + i] * scale_p[i] - (hit ? scale_hit[i] : T(0));
            if (!kPlain) g -= weight[r] * upstream[i];
            rows[r * stride + i] = g;
        }
    }
}

template <bool kGradient, bool kPlain, class T>
void hard_cross_entropy(LossTile<T>& t, T* CALSEG_RESTRICT logits, T smoothing, T* CALSEG_RESTRICT smooth) {
    const int padded = t.padded;
    max_over_classes(logits, t.stride, padded, t.C, t.maximum);
    for (int i = 0; i < padded; ++i) t.sum[i] = t.loss[i] = T(0);
    if (!kPlain)
        for (int i = 0; i < padded; ++i) t.row[i] = smooth[i] = T(0);
    int64_t c = 0;
    for (; c + 4 <= t.C; c += 4) exponentials<kGradient, kPlain, 4>(t, logits, c, smooth);
    for (; c < t.C; ++c) exponentials<kGradient, kPlain, 1>(t, logits, c, smooth);

    T weight_sum = T(0);
    for (int64_t k = 0; k < t.C; ++k) weight_sum += t.weight[k];
    const T spread = smoothing / static_cast<T>(t.C);
    T *CALSEG_RESTRICT loss = t.loss, *CALSEG_RESTRICT scale_p = t.sum, *CALSEG_RESTRICT scale_hit = t.maximum;
    const T* CALSEG_RESTRICT upstream = t.upstream;
    for (int i = 0; i < padded; ++i) {
        const T log_sum_exp = log_positive(scale_p[i]);
        const T on_label = kPlain ? T(1) : (T(1) - smoothing) * t.row[i];
        T l = on_label * (log_sum_exp - loss[i]);
        // Without smoothing an impossible class (-inf) must not meet a zero factor.
        if (!kPlain) l += spread == T(0) ? T(0) : spread * (weight_sum * log_sum_exp - smooth[i]);
        loss[i] = l;
        scale_p[i] = upstream[i] * (on_label + (kPlain ? T(0) : spread * weight_sum)) / scale_p[i];
        scale_hit[i] = upstream[i] * on_label;
    }
    t.clear_ignored_loss();
    if (!kGradient) return;
    for (c = 0; c + 4 <= t.C; c += 4) gradients<kPlain, 4>(t, logits, c, scale_p, scale_hit, spread);
    for (; c < t.C; ++c) gradients<kPlain, 1>(t, logits, c, scale_p, scale_hit, spread);
}

// One-hot labels. logits become dLoss/dlogits if gradient; t.loss is set. smooth: a row free for use.
template <class T>
void hard_cross_entropy_tile(LossTile<T>& t, T* logits, T smoothing, bool gradient, T* smooth) {
    const bool plain = !t.weighted && smoothing == T(0);
    if (gradient && plain) hard_cross_entropy<true, true>(t, logits, smoothing, smooth);
    else if (gradient) hard_cross_entropy<true, false>(t, logits, smoothing, smooth);
    else if (plain) hard_cross_entropy<false, true>(t, logits, smoothing, smooth);
    else hard_cross_entropy<false, false>(t, logits, smoothing, smooth);
}

// logits become log softmax(logits); e = exp(logits - maximum), of which t.sum is the sum over classes.
template <class T>
void log_softmax_tile(LossTile<T>& t, T* CALSEG_RESTRICT logits, T* CALSEG_RESTRICT e) {
    T *CALSEG_RESTRICT maximum = t.maximum, *CALSEG_RESTRICT sum = t.sum, *CALSEG_RESTRICT log_sum_exp = t.row;
    const int padded = t.padded;
    max_over_classes(logits, t.stride, padded, t.C, maximum);
    for (int i = 0; i < padded; ++i) sum[i] = T(0);
    for (int64_t c = 0; c < t.C; ++c)
        for (int i = 0; i < padded; ++i) {
            const T d = logits[c * t.stride + i] - maximum[i];
            const T exponential = exp_nonpositive(d);
            sum[i] += exponential;
            logits[c * t.stride + i] = d;
            e[c * t.stride + i] = exponential;
        }
    for (int i = 0; i < padded; ++i) log_sum_exp[i] = log_positive(sum[i]);
    for (int64_t c = 0; c < t.C; ++c)
        for (int i = 0; i < padded; ++i) logits[c * t.stride + i] -= log_sum_exp[i];
}

// Soft labels Y. e becomes dLoss/dlogits if gradient; log_p becomes dLoss/dY if soft_gradient; t.loss is set.
template <class T>
void soft_cross_entropy_tile(LossTile<T>& t, T* CALSEG_RESTRICT log_p, T* CALSEG_RESTRICT e, const T* CALSEG_RESTRICT soft,
                             T smoothing, bool gradient, bool soft_gradient) {
    const int padded = t.padded;
    const T keep = T(1) - smoothing, spread = smoothing / static_cast<T>(t.C);
    T *CALSEG_RESTRICT loss = t.loss, *CALSEG_RESTRICT mass = t.row, *CALSEG_RESTRICT scale_p = t.sum;
    const T* CALSEG_RESTRICT upstream = t.upstream;
    for (int i = 0; i < padded; ++i) loss[i] = mass[i] = T(0);
    for (int64_t c = 0; c < t.C; ++c) {
        const T weight = t.weight[c];
        const int64_t row = c * t.stride;
        for (int i = 0; i < padded; ++i) {
            const T smoothed = keep * soft[row + i] + spread;
            const T y = weight * smoothed;
            mass[i] += y;
            loss[i] -= smoothed == T(0) ? T(0) : y * log_p[row + i];  // the limit of t log t, also where log p is -inf
        }
    }
    t.clear_ignored_loss();
    for (int i = 0; i < padded; ++i) scale_p[i] = upstream[i] * mass[i] / scale_p[i];
    for (int64_t c = 0; c < t.C; ++c) {
        const T weight = t.weight[c];
        const int64_t row = c * t.stride;
        if (gradient)
            for (int i = 0; i < padded; ++i)
                e[row + i] = e[row + i] * scale_p[i] - upstream[i] * (weight * (keep * soft[row + i] + spread));
        if (soft_gradient)
            for (int i = 0; i < padded; ++i) {
                // where the class is impossible and has no mass, as the loss takes it: nothing to change
                const bool nothing = upstream[i] == T(0) || (soft[row + i] == T(0) && log_p[row + i] == -INFINITY);
                log_p[row + i] = nothing ? T(0) : -keep * weight * upstream[i] * log_p[row + i];
            }
    }
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
