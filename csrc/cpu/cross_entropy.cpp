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

// Loads labels and logits of a tile. The logits of ignored voxels become 0.
template <class T, class Ahead>
void begin_tile(const LossArgs& a, LossTile<T>& t, Ahead& logits, const Span& span, const Span& next) {
    t.load(a.spec.labels, a.upstream, span, next);
    logits.begin(span, next);
    if (t.any_ignored()) clear_ignored(logits.tile(), t.labels, span.count, t.C);
}

// Computes a chunk with one-hot labels. D is the type in which the logits are stored.
template <bool kGradient, bool kPlain, class D, class T>
void compute_hard(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const Smoothing<T> smoothing(a.spec.label_smoothing, a.shape.C);
    const bool stream = is_streamed(a.gradients.logits, a.shape);
    LossTile<T> t(scratch, a.shape.C, tiles.length, a.spec.weight.data);
    ReadAhead<T, D> logits(scratch, a.tensors.logits, a.shape.C, tiles.length);
    if (scratch.is_counting()) return;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        begin_tile(a, t, logits, span, next);
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
        begin_tile(a, t, logits, span, next);
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
        begin_tile(a, t, logits, span, next);
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

// Computes the gradients of a block with soft labels `y`, for loss and overlap. The logits become their gradient. If
// `soft_gradient`, y becomes its own, which only the loss has.
template <class T>
CALSEG_INLINE void soft_overlap_gradient(const LossTile<T>& t, int block, int64_t C, T* logits, T* e, T* y, const OverlapSlopes<T>& slopes,
                                         const Smoothing<T>& smoothing, bool soft_gradient) {
    const F<T> none = zero<T>(), keep = broadcast<F<T>>(smoothing.keep), spread = broadcast<F<T>>(smoothing.spread);
    const F<T> upstream = load<F<T>>(t.upstream + block * kLanes), sum = exponentials_block(logits, e, C);
    const F<T> per_sum = per_sum_where_counted<T>(load<I<T>>(t.labels + block * kLanes), sum);
    const F<T> log_sum = soft_gradient ? log_positive(sum) : none;
    F<T> base = none;
    for (int64_t c = 0; c < C; ++c) {
        const F<T> p = load<F<T>>(e + c * kLanes) * per_sum, label = load<F<T>>(y + c * kLanes), weight = broadcast<F<T>>(t.weight[c]);
        const F<T> smoothed = keep * label + spread, q = slopes.of(c, p, label);
        const F<T> pull = upstream * select(equal(smoothed, none), none, weight * smoothed);
        base = base + (pull - q * p);
        if (soft_gradient) {
            const F<T> log_p = load<F<T>>(logits + c * kLanes) - log_sum;
            store(y + c * kLanes, soft_label_gradient<T>(upstream, keep * weight, log_p, label));
        }
        store(e + c * kLanes, p);
        store(logits + c * kLanes, p * q - pull);
    }
    for (int64_t c = 0; c < C; ++c) store(logits + c * kLanes, load<F<T>>(e + c * kLanes) * base + load<F<T>>(logits + c * kLanes));
}

// Computes a chunk with soft labels of any number of classes.
template <class T>
void compute_soft(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    const int64_t C = a.shape.C;
    const Smoothing<T> smoothing(a.spec.label_smoothing, C);
    const bool gradient = bool(a.gradients.logits), soft_gradient = bool(a.gradients.soft_labels);
    LossTile<T> t(scratch, C, tiles.length, a.spec.weight.data);
    T* e = scratch.take<T>(C * kLanes);
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
            if (a.overlap_slopes) {
                soft_overlap_gradient(t, b, C, x, e, y, slopes, smoothing, soft_gradient);
                continue;
            }
            const F<T> sum = exponentials_block(x, e, C);
            const F<T> per_sum = per_sum_where_counted<T>(load<I<T>>(t.labels + b * kLanes), sum);
            if (overlap) {
                const auto ignored = equal(per_sum, zero<T>());
                for (int64_t c = 0; c < C; ++c)
                    overlap.add(c, load<F<T>>(e + c * kLanes) * per_sum, select(ignored, zero<T>(), load<F<T>>(y + c * kLanes)));
            }
            log_softmax_block(x, sum, C, [](int64_t, F<T>) {});
            store(t.loss + b * kLanes, soft_cross_entropy_block(t, b, C, x, e, sum, y, smoothing, gradient, soft_gradient));
        }
        for (auto* tensor : {&logits, &soft}) tensor->end(span);
        overlap.finish_tile(span.count);
        if (!a.overlap_slopes) t.template finish_tile<false>(a, span);
    }
    overlap.finish_chunk(a.chunk_overlap, chunk);
    t.finish_chunk(a.chunk_sums, chunk);
}

// Computes a chunk of a small constant number of classes. Returns false if FewClasses does not support the tensors.
template <int C, Wanted kWanted, bool kSoft, class D, class T>
bool compute_few(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    using Few = FewClasses<C, kWanted, kSoft, D, T>;
    const bool stream = is_streamed(a.gradients.logits, a.shape);
    if (!Few::can_compute(a, stream)) return false;
    LossTile<T> t(scratch, C, tiles.length, nullptr);
    OverlapSums<T> overlap(scratch, C, kWanted == Wanted::overlap);
    const OverlapSlopes<T> slopes(scratch, C, a.overlap_slopes, tiles, chunk);
    if (scratch.is_counting()) return true;
    for (const auto& [span, next] : TilesOfChunk(tiles, chunk)) {
        t.load(a.spec.labels, a.upstream, span, next);
        const Few few(a, t, slopes, span, stream);
        t.any_ignored() ? few.template compute<true>(span.count, overlap) : few.template compute<false>(span.count, overlap);
        overlap.finish_tile(span.count);
        if (kWanted != Wanted::gradient_with_overlap) t.template finish_tile<false>(a, span);
    }
    finish_streams();
    overlap.finish_chunk(a.chunk_overlap, chunk);
    t.finish_chunk(a.chunk_sums, chunk);
    return true;
}

// Does as compute_few() for the number of classes of the call. Returns false if there is no code for few classes.
template <Wanted kWanted, bool kSoft, class D, class T>
bool try_few(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    if (a.spec.weight.data || a.spec.label_smoothing != 0.0 || a.gradients.soft_labels) return false;
    if constexpr (kMostFewClasses >= 2)
        if (a.shape.C == 2) return compute_few<2, kWanted, kSoft, D, T>(a, tiles, chunk, scratch);
    if constexpr (kMostFewClasses >= 3)
        if (a.shape.C == 3) return compute_few<3, kWanted, kSoft, D, T>(a, tiles, chunk, scratch);
    if constexpr (kMostFewClasses >= 4)
        if (a.shape.C == 4) return compute_few<4, kWanted, kSoft, D, T>(a, tiles, chunk, scratch);
    return false;
}

// D is the type in which the logits are stored.
template <Wanted kWanted, class D, class T>
void choose(const LossArgs& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
    // Other types have no code of their own for few classes where that would take long to compile.
    constexpr bool kAlone = kWanted == Wanted::loss || kWanted == Wanted::gradient, kIsFloat = std::is_same<D, float>::value;
    if (a.tensors.soft_labels) {
        if constexpr (kIsFloat)
            if (try_few<kWanted, true, D, T>(a, tiles, chunk, scratch)) return;
        return compute_soft<T>(a, tiles, chunk, scratch);
    }
    if constexpr (kIsFloat || (kAlone && std::is_same<T, float>::value))
        if (try_few<kWanted, false, D, T>(a, tiles, chunk, scratch)) return;
    compute_many<kWanted, D, T>(a, tiles, chunk, scratch);
}

struct CrossEntropy {
    using Args = LossArgs;

    template <class T>
    static Tiling tiling(const Args& a) {
        constexpr int64_t kElement = sizeof(T);
        // With one-hot labels, the current tile and the next one fill half of a second-level cache of 1 MiB.
        return Tiling(a.shape, a.tensors.soft_labels ? voxels_in_cache(a.shape.C, 2, kElement) : 256 * 1024 / (a.shape.C * kElement),
                      1 << 18);
    }

    template <class T>
    static void compute_chunk(const Args& a, const Tiling& tiles, int64_t chunk, Scratch& scratch) {
        with_stored_type<T>(a.tensors.logits.dtype, [&](auto* type) {
            using D = std::remove_pointer_t<decltype(type)>;
            if (a.overlap_slopes) choose<Wanted::gradient_with_overlap, D, T>(a, tiles, chunk, scratch);
            else if (a.overlap_sums) choose<Wanted::overlap, D, T>(a, tiles, chunk, scratch);
            else if (a.gradients.logits) choose<Wanted::gradient, D, T>(a, tiles, chunk, scratch);
            else choose<Wanted::loss, D, T>(a, tiles, chunk, scratch);
        });
    }
};

}  // namespace

const Kernel<LossArgs> cross_entropy = make_kernel<CrossEntropy>();

}  // namespace CALSEG_ISA
}  // namespace calseg
