// Cross-entropy on one-hot or given soft labels: loss and gradients in one pass.
// Floor: one read of the logits (and soft labels), one write of each gradient.
#include "cpu/cross_entropy.h"

#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

int64_t tile_rows(const CrossEntropyArgs& a) { return a.soft_labels ? 3 * a.shape.C : a.shape.C; }

template <class T>
Tiling tiling(const CrossEntropyArgs& a) {
    return Tiling(a.shape, tile_rows(a), sizeof(T), 1 << 16);
}

template <class T>
void run(const CrossEntropyArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    Scratch scratch(memory);
    LossTile<T> t(scratch, a.shape.C, tiles.length, a.weight);
    T* rows = scratch.take<T>(tile_rows(a) * tiles.length);
    T* smooth = scratch.take<T>(tiles.length);
    T *e = rows + a.shape.C * tiles.length, *soft = e + a.shape.C * tiles.length;  // with soft labels only
    const T smoothing = static_cast<T>(a.label_smoothing);
    const bool stream = streams(a.grad_logits, a.shape), stream_soft = streams(a.grad_soft_labels, a.shape);
    double total = 0.0;
    tiles.for_tiles(chunk, [&](int64_t n, int64_t s, int count) {
        t.load(a.labels, a.upstream, n, s, count);
        load_tile(rows, t.stride, a.logits, n, s, count, t.padded, t.C);
        if (s + 2 * tiles.length <= a.shape.S) prefetch_tile(a.logits, n, s + tiles.length, tiles.length, t.C);
        if (t.any_ignored()) clear_ignored(rows, t.stride, t.labels, t.padded, t.C);
        if (a.soft_labels) {
            load_tile(soft, t.stride, a.soft_labels, n, s, count, t.padded, t.C);
            if (t.any_ignored()) clear_ignored(soft, t.stride, t.labels, t.padded, t.C);
            log_softmax_tile(t, rows, e);
            soft_cross_entropy_tile(t, rows, e, soft, smoothing, bool(a.grad_logits), bool(a.grad_soft_labels));
            if (a.grad_logits) store_tile(a.grad_logits, n, s, count, e, t.stride, t.C, stream);
            if (a.grad_soft_labels) store_tile(a.grad_soft_labels, n, s, count, rows, t.stride, t.C, stream_soft);
        } else {
            hard_cross_entropy_tile(t, rows, smoothing, bool(a.grad_logits), smooth);
            if (a.grad_logits) store_tile(a.grad_logits, n, s, count, rows, t.stride, t.C, stream);
        }
        if (a.loss) store_row(a.loss, n, 0, s, count, t.loss, false);
        total += sum_row(t.loss, count);
    });
    finish_streams();
    if (a.chunk_sums) a.chunk_sums[chunk].loss = total;
}

int64_t num_chunks(const CrossEntropyArgs& a) {
    return a.logits.dtype == DType::f64 ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks();
}

template <class T>
int64_t bytes(const CrossEntropyArgs& a) {
    const int64_t length = tiling<T>(a).length;
    return LossTile<T>::bytes(a.shape.C, length) + Scratch::bytes<T>(tile_rows(a) * length) + Scratch::bytes<T>(length);
}

int64_t scratch_bytes(const CrossEntropyArgs& a) {
    return a.logits.dtype == DType::f64 ? bytes<double>(a) : bytes<float>(a);
}

void run_chunk(const CrossEntropyArgs& a, int64_t chunk, void* scratch) {
    a.logits.dtype == DType::f64 ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<CrossEntropyArgs> cross_entropy = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
