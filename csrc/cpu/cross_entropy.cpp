// Cross-entropy on one-hot or given soft labels: loss and gradients in one pass.
// Floor: one read of the logits (and soft labels), one write of each gradient.
#include "cpu/cross_entropy.h"

#include "cpu/few_classes.h"
#include "cpu/hard_cross_entropy.h"
#include "cpu/operations.h"
#include "cpu/read_ahead.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
Tiling tiling(const LossArgs& a) {
    constexpr int64_t kElement = sizeof(T);
    // one-hot labels: this tile and the next in half of the second cache
    return Tiling(a.shape, a.tensors.soft_labels ? voxels_in_cache(a.shape.C, 2, kElement) : 256 * 1024 / (a.shape.C * kElement), 1 << 18);
}

// What a tile leaves behind.
template <class T>
void finish_tile(const LossArgs& a, const Span& span, LossTile<T>& t) {
    if (a.loss) store_tile(a.loss, span, t.loss, 1, false);
    t.sums.loss += sum_row(t.loss, span.count);
}

// D: how the logits are stored.
template <bool kGradient, bool kPlain, class D, class T>
LossSums run_hard(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const Smoothing<T> smoothing(a.spec.label_smoothing, a.shape.C);
    const bool stream = is_streamed(a.gradients.logits, a.shape);
    LossTile<T> t(scratch, a.shape.C, tiles.length, a.spec.weight.data);
    ReadAhead<T, D> logits(scratch, a.tensors.logits, a.shape.C, tiles.length);
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        t.load(a.spec.labels, a.upstream, span, next);
        logits.begin(span, next);
        if (t.any_ignored()) clear_ignored(logits.tile(), t.labels, span.count, t.C);
        for (int b = 0; b * kLanes < span.count; ++b) {
            t.labels_ahead.block(b);
            hard_exponentials<kGradient, kPlain>(t, b, logits.block(b), logits);
        }
        logits.end();
        for (int b = 0; b * kLanes < span.count; ++b) hard_loss<kPlain>(t, b, smoothing);
        if (kGradient) store_hard_gradient<kPlain>(a.gradients.logits, span, t, logits.tile(), smoothing, stream);
        finish_tile(a, span, t);
    });
    finish_streams();
    return t.sums;
}

template <int C, bool kGradient, class D, class T>
LossSums run_few(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const bool stream = is_streamed(a.gradients.logits, a.shape);
    if (!FewClasses<C, kGradient, D, T>::takes(a, stream)) return run_hard<kGradient, true, D, T>(a, tiles, chunk, scratch);
    LossTile<T> t(scratch, C, tiles.length, nullptr);
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        t.load(a.spec.labels, a.upstream, span, next);
        const FewClasses<C, kGradient, D, T> few(a, t, span, stream);
        t.any_ignored() ? few.template run<true>(span.count) : few.template run<false>(span.count);
        finish_tile(a, span, t);
    });
    finish_streams();
    return t.sums;
}

template <bool kGradient, class D, class T>
LossSums run_hard(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    if (a.spec.weight.data || a.spec.label_smoothing != 0.0) return run_hard<kGradient, false, D, T>(a, tiles, chunk, scratch);
    switch (a.shape.C) {
        case 2:
            return run_few<2, kGradient, D, T>(a, tiles, chunk, scratch);
        case 3:
            return run_few<3, kGradient, D, T>(a, tiles, chunk, scratch);
        case kFewClasses:
            return run_few<kFewClasses, kGradient, D, T>(a, tiles, chunk, scratch);
        default:
            return run_hard<kGradient, true, D, T>(a, tiles, chunk, scratch);
    }
}

template <class D, class T>
LossSums run_hard(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    return a.gradients.logits ? run_hard<true, D, T>(a, tiles, chunk, scratch) : run_hard<false, D, T>(a, tiles, chunk, scratch);
}

LossSums run_hard(float, const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    if (a.tensors.logits.dtype == DType::bf16) return run_hard<BF16, float>(a, tiles, chunk, scratch);
    if (a.tensors.logits.dtype == DType::f16) return run_hard<F16, float>(a, tiles, chunk, scratch);
    return run_hard<float, float>(a, tiles, chunk, scratch);
}
LossSums run_hard(double, const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    return run_hard<double, double>(a, tiles, chunk, scratch);
}

template <class T>
LossSums run_soft(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const Smoothing<T> smoothing(a.spec.label_smoothing, a.shape.C);
    const bool gradient = bool(a.gradients.logits), soft_gradient = bool(a.gradients.soft_labels);
    LossTile<T> t(scratch, a.shape.C, tiles.length, a.spec.weight.data);
    T* e = scratch.take<T>(t.C * kLanes);
    // they become their gradients
    TensorTile<T> logits(scratch, a.tensors.logits, a.gradients.logits, a.shape, tiles.length);
    TensorTile<T> soft(scratch, a.tensors.soft_labels, a.gradients.soft_labels, a.shape, tiles.length);
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        t.load(a.spec.labels, a.upstream, span, next);
        for (auto* tensor : {&logits, &soft}) {
            tensor->begin(span, next);
            if (t.any_ignored()) clear_ignored(tensor->tile(), t.labels, span.count, t.C);
        }
        for (int b = 0; b * kLanes < t.count; ++b) {
            t.labels_ahead.block(b);
            for (auto* tensor : {&logits, &soft}) tensor->prefetch_next(b);
            T *x = logits.block(b), *y = soft.block(b);
            const F<T> sum = exponentials_block(x, e, t.C);
            log_softmax_block(x, sum, t.C, [](int64_t, F<T>) {});
            store(t.loss + b * kLanes, soft_cross_entropy_block(t, b, t.C, x, e, sum, y, smoothing, gradient, soft_gradient));
        }
        for (auto* tensor : {&logits, &soft}) tensor->end(span);
        finish_tile(a, span, t);
    });
    return t.sums;
}

template <class T>
void run(const LossArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    Scratch scratch(memory);
    const LossSums sums = a.tensors.soft_labels ? run_soft<T>(a, tiles, chunk, scratch) : run_hard(T(), a, tiles, chunk, scratch);
    if (a.chunk_sums) a.chunk_sums[chunk] = sums;
}

template <class T>
int64_t bytes(const LossArgs& a) {
    const int64_t C = a.shape.C, length = tiling<T>(a).length;
    const int64_t tiles = 2 * Scratch::bytes<T>(C * length), block = a.tensors.soft_labels ? Scratch::bytes<T>(C * kLanes) : 0;
    return LossTile<T>::bytes(C, length) + tiles + block;
}

bool is_double(const LossArgs& a) { return a.tensors.logits.dtype == DType::f64; }
int64_t num_chunks(const LossArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }
int64_t scratch_bytes(const LossArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }
void run_chunk(const LossArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<LossArgs> cross_entropy = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
