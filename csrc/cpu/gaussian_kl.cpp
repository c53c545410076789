// KL(N(mu, exp(logvar)) || prior), summed over classes: loss and gradients in one pass. Floor: two reads, two writes.
#include "cpu/cross_entropy.h"
#include "cpu/gaussian.h"
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
Tiling tiling(const GaussianKLArgs& a) {
    return Tiling(a.shape, 4 * a.shape.C, sizeof(T), 1 << 15);
}

template <class T>
void run(const GaussianKLArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    const int length = tiles.length;
    Scratch scratch(memory);
    LossTile<T> t(scratch, C, length, nullptr);
    GaussianTile<T> gaussian(scratch, C, length);
    T* grad_mu = scratch.take<T>(C * length);
    T* grad_logvar = scratch.take<T>(C * length);
    const bool gradient = a.grad_mu || a.grad_logvar;
    const bool stream_mu = streams(a.grad_mu, a.shape), stream_logvar = streams(a.grad_logvar, a.shape);
    double total = 0.0;
    tiles.for_tiles(chunk, [&](int64_t n, int64_t s, int count) {
        t.load(Labels(), a.upstream, n, s, count);
        gaussian.load(a.gaussian, t.labels, false, n, s, count, t.padded, true);
        if (gradient) {
            fill(grad_mu, grad_mu + C * length, T(0));
            fill(grad_logvar, grad_logvar + C * length, T(0));
            gaussian.finish_gradients(a.gaussian, t.padded, t.upstream, t.upstream, grad_mu, grad_logvar);
            if (a.grad_mu) store_tile(a.grad_mu, n, s, count, grad_mu, length, C, stream_mu);
            if (a.grad_logvar) store_tile(a.grad_logvar, n, s, count, grad_logvar, length, C, stream_logvar);
        }
        total += sum_row(gaussian.kl, count);
        if (a.loss) store_row(a.loss, n, 0, s, count, gaussian.kl, false);
    });
    finish_streams();
    if (a.chunk_sums) a.chunk_sums[chunk].kl = total;
}

int64_t num_chunks(const GaussianKLArgs& a) {
    return a.gaussian.mu.dtype == DType::f64 ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks();
}

template <class T>
int64_t bytes(const GaussianKLArgs& a) {
    const int64_t C = a.shape.C, length = tiling<T>(a).length;
    return LossTile<T>::bytes(C, length) + GaussianTile<T>::bytes(C, length) + 2 * Scratch::bytes<T>(C * length);
}

int64_t scratch_bytes(const GaussianKLArgs& a) { return a.gaussian.mu.dtype == DType::f64 ? bytes<double>(a) : bytes<float>(a); }

void run_chunk(const GaussianKLArgs& a, int64_t chunk, void* scratch) {
    a.gaussian.mu.dtype == DType::f64 ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<GaussianKLArgs> gaussian_kl = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
