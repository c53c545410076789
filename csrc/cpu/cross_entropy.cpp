// Kernel of cross_entropy with one-hot or soft labels, which computes the loss and the gradients in one pass.
//
// Least memory traffic: one read of the logits and of the soft labels, and one write of each gradient.
#include "cpu/few_classes.h"
#include "cpu/hard_cross_entropy.h"
#include "cpu/kernel.h"
#include "cpu/read_ahead.h"
#include "cpu/soft_cross_entropy.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Computes a chunk with one-hot labels. D is the type in which the logits are stored.
template <bool kGradient, bool kPlain, class D, class T>
void compute_hard(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const Smoothing<T> smoothing(a.spec.label_smoothing, a.shape.C);
    const bool stream = is_streamed(a.gradients.logits, a.shape);
    LossTile<T> t(scratch, a.shape.C, tiles.length, a.spec.weight.data);
    ReadAhead<T, D> logits(scratch, a.tensors.logits, a.shape.C, tiles.length);
    if (scratch.is_counting()) return;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        t.load(a.spec.labels, a.upstream, span, next);
        logits.begin(span, next);
        if (t.any_ignored()) clear_ignored(logits.tile(), t.labels, span.count, t.C);
        for (int b = 0; b * kLanes < span.count; ++b) {
            t.labels_ahead.prefetch(b);
            hard_exponentials<kGradient, kPlain>(t, b, logits.block(b), logits);
        }
        logits.end();
        for (int b = 0; b * kLanes < span.count; ++b) hard_loss<kPlain>(t, b, smoothing);
        if (kGradient) store_hard_gradient<kPlain>(a.gradients.logits, span, t, logits.tile(), smoothing, stream);
        t.template finish_tile<false>(a.loss, 0.0, span);
    }
    finish_streams();
    t.finish_chunk(a.chunk_sums, chunk);
}

// Does as compute_hard() for a small constant number of classes, if FewClasses supports the tensors.
template <int C, bool kGradient, class D, class T>
void compute_few(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    using Few = FewClasses<C, kGradient, D, T>;
    const bool stream = is_streamed(a.gradients.logits, a.shape);
    if (!Few::can_compute(a.tensors.logits, a.gradients.logits, stream))
        return compute_hard<kGradient, true, D, T>(a, tiles, chunk, scratch);
    LossTile<T> t(scratch, C, tiles.length, nullptr);
    if (scratch.is_counting()) return;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        t.load(a.spec.labels, a.upstream, span, next);
        const Few few(a.tensors.logits, a.gradients.logits, t, span, stream);
        t.any_ignored() ? few.template compute<true>(span.count) : few.template compute<false>(span.count);
        t.template finish_tile<false>(a.loss, 0.0, span);
    }
    finish_streams();
    t.finish_chunk(a.chunk_sums, chunk);
}

template <bool kGradient, class D, class T>
void choose_hard(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    if (a.spec.weight.data || a.spec.label_smoothing != 0.0) return compute_hard<kGradient, false, D, T>(a, tiles, chunk, scratch);
    switch (a.shape.C) {
        case 2:
            return compute_few<2, kGradient, D, T>(a, tiles, chunk, scratch);
        case 3:
            return compute_few<3, kGradient, D, T>(a, tiles, chunk, scratch);
        case 4:
            return compute_few<4, kGradient, D, T>(a, tiles, chunk, scratch);
        default:
            return compute_hard<kGradient, true, D, T>(a, tiles, chunk, scratch);
    }
}

template <class T>
void compute_soft(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const Smoothing<T> smoothing(a.spec.label_smoothing, a.shape.C);
    const bool gradient = bool(a.gradients.logits), soft_gradient = bool(a.gradients.soft_labels);
    LossTile<T> t(scratch, a.shape.C, tiles.length, a.spec.weight.data);
    T* e = scratch.take<T>(t.C * kLanes);
    TensorTile<T> logits(scratch, a.tensors.logits, a.gradients.logits, a.shape, tiles.length);
    TensorTile<T> soft(scratch, a.tensors.soft_labels, a.gradients.soft_labels, a.shape, tiles.length);
    if (scratch.is_counting()) return;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        t.load(a.spec.labels, a.upstream, span, next);
        for (auto* tensor : {&logits, &soft}) {
            tensor->begin(span, next);
            if (t.any_ignored()) clear_ignored(tensor->tile(), t.labels, span.count, t.C);
        }
        for (int b = 0; b * kLanes < t.count; ++b) {
            t.labels_ahead.prefetch(b);
            for (auto* tensor : {&logits, &soft}) tensor->prefetch_next(b);
            T *x = logits.block(b), *y = soft.block(b);
            const F<T> sum = exponentials_block(x, e, t.C);
            log_softmax_block(x, sum, t.C, [](int64_t, F<T>) {});
            store(t.loss + b * kLanes, soft_cross_entropy_block(t, b, t.C, x, e, sum, y, smoothing, gradient, soft_gradient));
        }
        for (auto* tensor : {&logits, &soft}) tensor->end(span);
        t.template finish_tile<false>(a.loss, 0.0, span);
    }
    t.finish_chunk(a.chunk_sums, chunk);
}

struct CrossEntropy {
    using Args = LossArgs;

    static DType dtype(const Args& a) { return a.tensors.logits.dtype; }

    template <class T>
    static Tiling tiling(const Args& a) {
        constexpr int64_t kElement = sizeof(T);
        // With one-hot labels, the current tile and the next one fill half of a second-level cache of 1 MiB.
        return Tiling(a.shape, a.tensors.soft_labels ? voxels_in_cache(a.shape.C, 2, kElement) : 256 * 1024 / (a.shape.C * kElement),
                      1 << 18);
    }

    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        if (a.tensors.soft_labels) return compute_soft<T>(a, tiles, chunk, scratch);
        with_stored_type<T>(a.tensors.logits.dtype, [&](auto* type) {
            using D = std::remove_pointer_t<decltype(type)>;
            a.gradients.logits ? choose_hard<true, D, T>(a, tiles, chunk, scratch) : choose_hard<false, D, T>(a, tiles, chunk, scratch);
        });
    }
};

}  // namespace

const Kernel<LossArgs> cross_entropy = make_kernel<CrossEntropy>();

}  // namespace CALSEG_ISA
}  // namespace calseg
