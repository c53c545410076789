// Kernel of cross_entropy with one-hot or soft labels, which computes the loss and the gradients in one pass.
//
// Least memory traffic: one read of the logits and of the soft labels, and one write of each gradient.
#include "cpu/few_classes.h"
#include "cpu/hard_cross_entropy.h"
#include "cpu/kernel.h"
#include "cpu/overlap.h"
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
        if (kGradient)
            store_hard_gradient(a.gradients.logits, span, t, logits.tile(), stream,
                                [&](int64_t c) { return HardGradient<kPlain, T>(t, logits.tile(), c, smoothing); });
        t.template finish_tile<false>(a, span);
    }
    finish_streams();
    t.finish_chunk(a.chunk_sums, chunk);
}

// Computes the loss of a chunk with one-hot labels, and the sums of the overlap.
template <bool kPlain, class D, class T>
void compute_hard_overlap(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const Smoothing<T> smoothing(a.spec.label_smoothing, a.shape.C);
    LossTile<T> t(scratch, a.shape.C, tiles.length, a.spec.weight.data);
    T* per_sum = scratch.take<T>(tiles.length);
    OverlapSums<T> overlap(scratch, a.shape.C, true);
    ReadAhead<T, D> logits(scratch, a.tensors.logits, a.shape.C, tiles.length);
    if (scratch.is_counting()) return;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        t.load(a.spec.labels, a.upstream, span, next);
        logits.begin(span, next);
        if (t.any_ignored()) clear_ignored(logits.tile(), t.labels, span.count, t.C);
        const int blocks = (span.count + kLanes - 1) / kLanes;
        for (int first = 0, last; first < blocks; first = last) {
            last = static_cast<int>(smaller(first + blocks_in_cache<T>(t.C), blocks));
            for (int b = first; b < last; ++b) {
                t.labels_ahead.prefetch(b);
                hard_exponentials<true, kPlain>(t, b, logits.block(b), logits);
            }
            for (int b = first; b < last; ++b) {
                const int64_t at = b * kLanes;
                store(per_sum + at, per_sum_where_counted<T>(load<I<T>>(t.labels + at), load<F<T>>(t.sum + at)));
                hard_loss<kPlain>(t, b, smoothing);
            }
            overlap.add_hard(t, logits.tile(), per_sum, first, last);
        }
        logits.end();
        overlap.finish_tile(span.count);
        t.template finish_tile<false>(a, span);
    }
    overlap.finish_chunk(a.chunk_overlap, chunk);
    t.finish_chunk(a.chunk_sums, chunk);
}

// Computes the gradient of loss and overlap for a chunk with one-hot labels.
template <class D, class T>
void compute_hard_slopes(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const Smoothing<T> smoothing(a.spec.label_smoothing, a.shape.C);
    const bool stream = is_streamed(a.gradients.logits, a.shape);
    LossTile<T> t(scratch, a.shape.C, tiles.length, a.spec.weight.data);
    const OverlapSlopes<T> slopes(scratch, a.shape.C, a.overlap_slopes, tiles, chunk);
    ReadAhead<T, D> logits(scratch, a.tensors.logits, a.shape.C, tiles.length);
    if (scratch.is_counting()) return;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        t.load(a.spec.labels, a.upstream, span, next);
        logits.begin(span, next);
        if (t.any_ignored()) clear_ignored(logits.tile(), t.labels, span.count, t.C);
        const int blocks = (span.count + kLanes - 1) / kLanes;
        for (int first = 0, last; first < blocks; first = last) {
            last = static_cast<int>(smaller(first + blocks_in_cache<T>(t.C), blocks));
            for (int b = first; b < last; ++b) {
                t.labels_ahead.prefetch(b);
                overlap_exponentials(t, b, slopes, logits.block(b), logits);
            }
            for (int b = first; b < last; ++b) overlap_factors(t, b, smoothing);
            const Span part{span.n, span.s + first * kLanes, static_cast<int>(smaller(last * kLanes, span.count)) - first * kLanes};
            store_hard_gradient(a.gradients.logits, part, t, logits.block(first), stream, [&](int64_t c) {
                return HardOverlapGradient<T>(t, logits.block(first), c, slopes, smoothing, first * kLanes);
            });
        }
        logits.end();
    }
    finish_streams();
}

// Computes a chunk with one-hot labels of any number of classes.
template <Wanted kWanted, class D, class T>
void compute_many(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const bool plain = !a.spec.weight.data && a.spec.label_smoothing == 0.0;
    if constexpr (kWanted == Wanted::gradient_with_overlap) compute_hard_slopes<D, T>(a, tiles, chunk, scratch);
    else if constexpr (kWanted == Wanted::overlap)
        plain ? compute_hard_overlap<true, D, T>(a, tiles, chunk, scratch) : compute_hard_overlap<false, D, T>(a, tiles, chunk, scratch);
    else
        plain ? compute_hard<kWanted == Wanted::gradient, true, D, T>(a, tiles, chunk, scratch)
              : compute_hard<kWanted == Wanted::gradient, false, D, T>(a, tiles, chunk, scratch);
}

// Does as compute_many() for a small constant number of classes, if FewClasses supports the tensors.
template <int C, Wanted kWanted, class D, class T>
void compute_few(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    using Few = FewClasses<C, kWanted, D, T>;
    const bool stream = is_streamed(a.gradients.logits, a.shape);
    if (!Few::can_compute(a.tensors.logits, a.gradients.logits, stream)) return compute_many<kWanted, D, T>(a, tiles, chunk, scratch);
    LossTile<T> t(scratch, C, tiles.length, nullptr);
    OverlapSums<T> overlap(scratch, C, kWanted == Wanted::overlap);
    const OverlapSlopes<T> slopes(scratch, C, a.overlap_slopes, tiles, chunk);
    if (scratch.is_counting()) return;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        t.load(a.spec.labels, a.upstream, span, next);
        const Few few(a.tensors.logits, a.gradients.logits, t, slopes, span, stream);
        t.any_ignored() ? few.template compute<true>(span.count, overlap) : few.template compute<false>(span.count, overlap);
        overlap.finish_tile(span.count);
        if (kWanted != Wanted::gradient_with_overlap) t.template finish_tile<false>(a, span);
    }
    finish_streams();
    overlap.finish_chunk(a.chunk_overlap, chunk);
    t.finish_chunk(a.chunk_sums, chunk);
}

template <Wanted kWanted, class D, class T>
void choose_hard(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    if (a.spec.weight.data || a.spec.label_smoothing != 0.0) return compute_many<kWanted, D, T>(a, tiles, chunk, scratch);
    switch (a.shape.C) {
        case 2:
            return compute_few<2, kWanted, D, T>(a, tiles, chunk, scratch);
        case 3:
            return compute_few<3, kWanted, D, T>(a, tiles, chunk, scratch);
        case 4:
            return compute_few<4, kWanted, D, T>(a, tiles, chunk, scratch);
        default:
            return compute_many<kWanted, D, T>(a, tiles, chunk, scratch);
    }
}

// Computes the gradient of the logits of a block with soft labels `y`, for loss and overlap. The logits become the gradient.
template <class T>
CALSEG_INLINE void soft_overlap_gradient(const LossTile<T>& t, int block, int64_t C, T* logits, T* e, const T* y,
                                         const OverlapSlopes<T>& slopes, const Smoothing<T>& smoothing) {
    const F<T> none = zero<T>(), keep = broadcast<F<T>>(smoothing.keep), spread = broadcast<F<T>>(smoothing.spread);
    const F<T> upstream = load<F<T>>(t.upstream + block * kLanes);
    const F<T> per_sum = per_sum_where_counted<T>(load<I<T>>(t.labels + block * kLanes), exponentials_block(logits, e, C));
    F<T> base = none;
    for (int64_t c = 0; c < C; ++c) {
        const F<T> p = load<F<T>>(e + c * kLanes) * per_sum, label = load<F<T>>(y + c * kLanes);
        const F<T> smoothed = keep * label + spread, q = slopes.of(c, p, label);
        const F<T> pull = upstream * select(equal(smoothed, none), none, broadcast<F<T>>(t.weight[c]) * smoothed);
        base = base + (pull - q * p);
        store(e + c * kLanes, p);
        store(logits + c * kLanes, p * q - pull);
    }
    for (int64_t c = 0; c < C; ++c) store(logits + c * kLanes, load<F<T>>(e + c * kLanes) * base + load<F<T>>(logits + c * kLanes));
}

// kClasses is the number of classes if it is known at compile time, else 0.
template <int kClasses, class T>
void compute_soft(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const int64_t C = kClasses ? kClasses : a.shape.C;
    const Smoothing<T> smoothing(a.spec.label_smoothing, C);
    const bool gradient = bool(a.gradients.logits), soft_gradient = bool(a.gradients.soft_labels);
    LossTile<T> t(scratch, C, tiles.length, a.spec.weight.data);
    T* e = scratch.take<T>(C * kLanes);
    T* of_overlap = scratch.take<T>(C * kLanes);  // gradient of the overlap
    OverlapSums<T> overlap(scratch, C, a.overlap_sums != nullptr);
    const OverlapSlopes<T> slopes(scratch, C, a.overlap_slopes, tiles, chunk);
    TensorTile<T> logits(scratch, a.tensors.logits, a.gradients.logits, a.shape, tiles.length);
    TensorTile<T> soft(scratch, a.tensors.soft_labels, a.gradients.soft_labels, a.shape, tiles.length);
    if (scratch.is_counting()) return;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        t.load(a.spec.labels, a.upstream, span, next);
        for (auto* tensor : {&logits, &soft}) {
            tensor->begin(span, next);
            if (t.any_ignored()) clear_ignored(tensor->tile(), t.labels, span.count, C);
        }
        for (int b = 0; b * kLanes < t.count; ++b) {
            t.labels_ahead.prefetch(b);
            for (auto* tensor : {&logits, &soft}) tensor->prefetch_next(b);
            T *x = logits.block(b), *y = soft.block(b);
            if (a.overlap_slopes && !soft_gradient) {
                soft_overlap_gradient(t, b, C, x, e, y, slopes, smoothing);
                continue;
            }
            const F<T> sum = exponentials_block(x, e, C);
            const F<T> per_sum = per_sum_where_counted<T>(load<I<T>>(t.labels + b * kLanes), sum);
            if (overlap) {
                const auto ignored = equal(per_sum, zero<T>());
                for (int64_t c = 0; c < C; ++c)
                    overlap.add(c, load<F<T>>(e + c * kLanes) * per_sum, select(ignored, zero<T>(), load<F<T>>(y + c * kLanes)));
            }
            if (a.overlap_slopes) slopes.gradient(of_overlap, C, e, per_sum, y);
            log_softmax_block(x, sum, C, [](int64_t, F<T>) {});
            store(t.loss + b * kLanes, soft_cross_entropy_block(t, b, C, x, e, sum, y, smoothing, gradient, soft_gradient));
            if (a.overlap_slopes && gradient)
                for (int64_t c = 0; c < C; ++c) store(x + c * kLanes, load<F<T>>(x + c * kLanes) + load<F<T>>(of_overlap + c * kLanes));
        }
        for (auto* tensor : {&logits, &soft}) tensor->end(span);
        overlap.finish_tile(span.count);
        if (!a.overlap_slopes) t.template finish_tile<false>(a, span);
    }
    overlap.finish_chunk(a.chunk_overlap, chunk);
    t.finish_chunk(a.chunk_sums, chunk);
}

template <class T>
void choose_soft(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    if constexpr (std::is_same<T, float>::value) switch (a.shape.C) {
            case 2:
                return compute_soft<2, T>(a, tiles, chunk, scratch);
            case 3:
                return compute_soft<3, T>(a, tiles, chunk, scratch);
            case 4:
                return compute_soft<4, T>(a, tiles, chunk, scratch);
        }
    compute_soft<0, T>(a, tiles, chunk, scratch);
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
        if (a.tensors.soft_labels) return choose_soft<T>(a, tiles, chunk, scratch);
        with_stored_type<T>(a.tensors.logits.dtype, [&](auto* type) {
            using D = std::remove_pointer_t<decltype(type)>;
            if (a.overlap_slopes) choose_hard<Wanted::gradient_with_overlap, D, T>(a, tiles, chunk, scratch);
            else if (a.overlap_sums) choose_hard<Wanted::overlap, D, T>(a, tiles, chunk, scratch);
            else if (a.gradients.logits) choose_hard<Wanted::gradient, D, T>(a, tiles, chunk, scratch);
            else choose_hard<Wanted::loss, D, T>(a, tiles, chunk, scratch);
        });
    }
};

}  // namespace

const Kernel<LossArgs> cross_entropy = make_kernel<CrossEntropy>();

}  // namespace CALSEG_ISA
}  // namespace calseg
