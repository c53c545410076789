// KL(N(mu, exp(logvar)) || prior), summed over classes: loss and gradients in one pass. Floor: two reads, two writes.
#include "cpu/gaussian.h"
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
Tiling tiling(const LossArgs& a) {
    return Tiling(a.shape, voxels_in_cache(a.shape.C, 2, sizeof(T)), 1 << 15);
}

template <class T>
void run(const LossArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    Scratch scratch(memory);
    LossTile<T> t(scratch, C, tiles.length, nullptr);
    GaussianBlock<T> gaussian(scratch, a.spec.sampling, C);
    TensorTile<T> mu(scratch, a.tensors.mu, a.gradients.mu, a.shape, tiles.length);
    TensorTile<T> logvar(scratch, a.tensors.logvar, a.gradients.logvar, a.shape, tiles.length);
    const bool gradient = a.gradients.mu || a.gradients.logvar;
    gaussian.clear_gradients();  // no samples: the gradients are the KL term's alone
    double total = 0.0;
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        const int count = span.count;
        t.load(Labels(), a.upstream, span, next);
        for (auto* tensor : {&mu, &logvar}) tensor->begin(span, next);
        for (int b = 0; b * kLanes < count; ++b) {
            for (auto* tensor : {&mu, &logvar}) tensor->prefetch_next(b);
            store(t.kl + b * kLanes, gaussian.template set<true>(mu.block(b), logvar.block(b), 0));
            if (gradient) gaussian.template finish_gradients<true>(zero<T>(), load<F<T>>(t.kl_upstream + b * kLanes));
        }
        for (auto* tensor : {&mu, &logvar}) tensor->end(span);
        total += sum_row(t.kl, count);
        if (a.loss) store_tile(a.loss, span, t.kl, 1, false);
    });
    if (a.chunk_sums) a.chunk_sums[chunk].kl = total;
}

template <class T>
int64_t bytes(const LossArgs& a) {
    const int64_t C = a.shape.C, length = tiling<T>(a).length;
    return LossTile<T>::bytes(C, length) + GaussianBlock<T>::bytes(C) + 2 * TensorTile<T>::bytes(C, length);
}

bool is_double(const LossArgs& a) { return a.tensors.mu.dtype == DType::f64; }
int64_t num_chunks(const LossArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }
int64_t scratch_bytes(const LossArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }
void run_chunk(const LossArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<LossArgs> gaussian_kl = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
