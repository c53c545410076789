// Working memory of a loss kernel: labels, losses and upstream gradients of a tile, and the sums over a chunk.
#pragma once

#include <cstdint>

#include "cpu/labels.h"
#include "cpu/tile.h"
#include "cpu/vector_math.h"
#include "voxel/cross_entropy.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Returns the sum of a row, added in double and in a fixed order. There are so many partial sums that no addition waits for
// the result of another one.
template <class T>
CALSEG_ONCE double sum_row(const T* row, int count) {
    constexpr int kPartial = 32;
    double part[kPartial] = {};
    int i = 0;
    for (; i + kPartial <= count; i += kPartial)
        for (int j = 0; j < kPartial; ++j) part[j] += static_cast<double>(row[i + j]);
    for (; i < count; ++i) part[i % kPartial] += static_cast<double>(row[i]);
    for (int width = kPartial / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) part[j] += part[j + width];
    return part[0];
}

// Rows with one number for each voxel of a tile, the class weights, and the sums over the chunk.
template <class T>
struct LossTile {
    int count = 0;    // number of voxels in the tile
    int counted = 0;  // number of them whose label is a class
    int64_t C;
    int32_t* labels;                     // [length] -1 where ignored
    T* loss;                             // [length] loss of each voxel; hard_cross_entropy.h first keeps another number here
    T* kl;                               // [length] KL term of each voxel
    T* upstream;                         // [length] gradient of the result with respect to loss, 0 where ignored
    T* kl_upstream;                      // [length] gradient of the result with respect to kl, 0 where ignored
    T *sum, *label_weight, *weighted_d;  // [length] intermediate results of hard_cross_entropy.h
    T* weight;                           // [C] class weights, all 1 if none are given
    T weight_sum = 0;                    // sum of the class weights
    LossSums sums;                       // sums over the tiles of the chunk so far
    LabelsAhead labels_ahead;

    CALSEG_ONCE LossTile(Scratch& scratch, int64_t num_classes, int length, const double* class_weight) : C(num_classes) {
        labels = scratch.take<int32_t>(length);
        loss = scratch.take<T>(length);
        kl = scratch.take<T>(length);
        upstream = scratch.take<T>(length);
        kl_upstream = scratch.take<T>(length);
        sum = scratch.take<T>(length);
        label_weight = scratch.take<T>(length);
        weighted_d = scratch.take<T>(length);
        weight = scratch.take<T>(C);
        if (scratch.is_counting()) return;
        for (int64_t c = 0; c < C; ++c) {
            weight[c] = class_weight ? static_cast<T>(class_weight[c]) : T(1);
            weight_sum += weight[c];
        }
    }

    CALSEG_ONCE void load(const Labels& from, const Upstream& up, const Span& span, const Span& next) {
        labels_ahead = LabelsAhead(from, next);
        count = span.count;
        counted = load_labels(labels, from, span, C);
        sums.uncounted += count - counted;
        load_upstream(up, span);
    }

    bool any_ignored() const { return counted < count; }

    // Adds the tile's losses and KL terms to the sums, and stores scale * (loss + beta * kl) if the call wants it.
    template <bool kKL>
    CALSEG_ONCE void finish_tile(const LossArgs& a, const Span& span) {
        sums.loss += sum_row(loss, count);
        if (kKL) sums.kl += sum_row(kl, count);
        if (!a.loss) return;
        const T scale = static_cast<T>(a.spec.scale), beta = static_cast<T>(a.spec.sampling.beta);
        for (int i = 0; i < count; ++i) loss[i] = scale * (kKL ? loss[i] + beta * kl[i] : loss[i]);
        store_tile(a.loss, span, loss, 1, false);
    }

    void finish_chunk(LossSums* chunk_sums, int64_t chunk) const {
        if (chunk_sums) chunk_sums[chunk] = sums;
    }

 private:
    // Number of entries of upstream and kl_upstream that hold the constant gradient of a voxel that counts. The next tile
    // without ignored voxels need not write them again.
    int filled_ = 0;

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

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
