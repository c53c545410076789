// Cross-entropy on one-hot or given soft labels: loss and gradients in one pass.
// Floor: one read of the logits (and soft labels), one write of each gradient.
#include "cpu/cross_entropy.h"

#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
Tiling tiling(const CrossEntropyArgs& a) {
    return Tiling(a.shape, a.soft_labels ? 2 : 1, sizeof(T), 1 << 18);
}

template <class T>
struct Tile {
    LossTile<T> t;
    T* e;                        // [C][kLanes]
    TensorTile<T> logits, soft;  // become their gradients

    static int64_t bytes(const CrossEntropyArgs& a) {
        const int64_t C = a.shape.C, length = tiling<T>(a).length;
        return LossTile<T>::bytes(C, length) + Scratch::bytes<T>(C * kLanes) + 2 * TensorTile<T>::bytes(C, length);
    }
    Tile(Scratch& scratch, const CrossEntropyArgs& a, int length)
        : t(scratch, a.shape.C, length, a.weight),
          e(scratch.take<T>(a.shape.C * kLanes)),
          logits(scratch, a.logits, a.grad_logits, a.shape, length),
          soft(scratch, a.soft_labels, a.grad_soft_labels, a.shape, length) {}
};

template <bool kGradient, bool kPlain, class T>
void hard_tile(const CrossEntropyArgs& a, Tile<T>& tile) {
    const T smoothing = static_cast<T>(a.label_smoothing);
    LossTile<T>& t = tile.t;
    for (int b = 0; b * kLanes < t.count; ++b) {
        tile.logits.prefetch_next(b);
        hard_exponentials<kGradient, kPlain>(t, b, tile.logits.block(b));
    }
    for (int b = 0; b * kLanes < t.count; ++b) hard_loss<kPlain>(t, b, smoothing);
    if (!kGradient) return;
    for (int b = 0; b * kLanes < t.count; ++b) hard_gradient<kPlain>(t, b, tile.logits.block(b), smoothing);
}

template <class T>
void soft_tile(const CrossEntropyArgs& a, Tile<T>& tile) {
    const T smoothing = static_cast<T>(a.label_smoothing);
    const bool gradient = bool(a.grad_logits), soft_gradient = bool(a.grad_soft_labels);
    LossTile<T>& t = tile.t;
    for (int b = 0; b * kLanes < t.count; ++b) {
        tile.logits.prefetch_next(b);
        tile.soft.prefetch_next(b);
        T *logits = tile.logits.block(b), *soft = tile.soft.block(b);
        const F<T> sum = log_softmax_block(logits, tile.e, t.C);
        const F<T> loss = soft_cross_entropy_block(t, b, logits, tile.e, sum, soft, smoothing, gradient, soft_gradient);
        store(t.loss + b * kLanes, loss);
        // each tile now takes its gradient, from where it was computed
        if (soft_gradient) copy_block(soft, logits, t.C);
        if (gradient) copy_block(logits, tile.e, t.C);
    }
}

template <class T>
void run(const CrossEntropyArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    Scratch scratch(memory);
    Tile<T> tile(scratch, a, tiles.length);
    LossTile<T>& t = tile.t;
    const bool gradient = bool(a.grad_logits), plain = !t.weighted && a.label_smoothing == 0.0;
    const auto run_tile = a.soft_labels ? soft_tile<T>
                          : gradient    ? (plain ? hard_tile<true, true, T> : hard_tile<true, false, T>)
                                        : (plain ? hard_tile<false, true, T> : hard_tile<false, false, T>);
    double total = 0.0;
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        t.load(a.labels, a.upstream, span);
        for (auto* tensor : {&tile.logits, &tile.soft}) tensor->begin(span, next);
        if (t.any_ignored()) clear_ignored(tile.logits.tile(), t.labels, span.count, t.C);
        if (t.any_ignored() && a.soft_labels) clear_ignored(tile.soft.tile(), t.labels, span.count, t.C);
        run_tile(a, tile);
        for (auto* tensor : {&tile.logits, &tile.soft}) tensor->end(span);
        if (a.loss) store_tile(a.loss, span, t.loss, 1, false);
        total += sum_row(t.loss, span.count);
    });
    if (a.chunk_sums) a.chunk_sums[chunk].loss = total;
}

template <class T>
int64_t bytes(const CrossEntropyArgs& a) {
    return Tile<T>::bytes(a);
}

bool is_double(const CrossEntropyArgs& a) { return a.logits.dtype == DType::f64; }
int64_t num_chunks(const CrossEntropyArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }
int64_t scratch_bytes(const CrossEntropyArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }
void run_chunk(const CrossEntropyArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<CrossEntropyArgs> cross_entropy = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
