// Cross-entropy on sampled soft labels, plus KL: the loss and the gradients of logits, mu and logvar in one pass.
// Floor: one read of each input, one write of each gradient; num_samples * C normals a voxel (the arithmetic wins).
#include <limits>

#include "cpu/cross_entropy.h"
#include "cpu/gaussian.h"
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
Tiling tiling(const VLSCrossEntropyArgs& a) {
    return Tiling(a.ce.shape, 10 * a.ce.shape.C, sizeof(T), 1 << 14);
}

template <class T>
void run(const VLSCrossEntropyArgs& a, int64_t chunk, void* memory) {
    const CrossEntropyArgs& ce = a.ce;
    const Gaussian& g = a.gaussian;
    const Tiling tiles = tiling<T>(a);
    const int64_t C = ce.shape.C;
    const int length = tiles.length;
    Scratch scratch(memory);
    LossTile<T> t(scratch, C, length, ce.weight);
    GaussianTile<T> gaussian(scratch, C, length);
    T* log_p = scratch.take<T>(C * length);
    T* e = scratch.take<T>(C * length);
    T* soft = scratch.take<T>(C * length);
    T* grad_mu = scratch.take<T>(C * length);
    T* grad_logvar = scratch.take<T>(C * length);
    T* grad_estimate = scratch.take<T>(C * length);
    T* sample_scale = scratch.take<T>(length);
    T* kl_scale = scratch.take<T>(length);

    const T alpha = static_cast<T>(a.alpha), smoothing = static_cast<T>(ce.label_smoothing);
    const T m = static_cast<T>(g.num_samples);
    const bool gaussian_gradient = a.grad_mu || a.grad_logvar, with_kl = g.beta != 0.0, sampled = a.alpha != 0.0;
    const bool stream_logits = streams(ce.grad_logits, ce.shape), stream_mu = streams(a.grad_mu, ce.shape),
               stream_logvar = streams(a.grad_logvar, ce.shape);
    LossSums total;
    tiles.for_tiles(chunk, [&](int64_t n, int64_t s, int count) {
        t.load(ce.labels, ce.upstream, n, s, count);
        const int padded = t.padded;
        load_tile(log_p, length, ce.logits, n, s, count, padded, C);
        if (t.any_ignored()) clear_ignored(log_p, length, t.labels, padded, C);
        gaussian.load(g, t.labels, t.any_ignored(), n, s, count, padded, with_kl);
        log_softmax_tile(t, log_p, e);

        fill(soft, soft + C * length, T(0));
        if (gaussian_gradient) {
            // dl/dy_hat needs no sample. An impossible class (log p = -inf) stays finite, so that no mass on it is no NaN.
            const T lowest = std::numeric_limits<T>::lowest();
            for (int64_t c = 0; c < C; ++c) {
                const T scale = -(T(1) - smoothing) * alpha * t.weight[c];
                for (int i = 0; i < padded; ++i) {
                    const T log_p_c = log_p[c * length + i];
                    grad_estimate[c * length + i] = scale * (log_p_c < lowest ? lowest : log_p_c);
                }
            }
            fill(grad_mu, grad_mu + C * length, T(0));
            fill(grad_logvar, grad_logvar + C * length, T(0));
        }
        if (sampled) {
            gaussian.philox.set_voxels(g.seed, static_cast<uint64_t>(n * ce.shape.S + s), padded);
            for (int64_t k = 0; k < g.num_samples; ++k)
                gaussian.add_sample(k, padded, soft, gaussian_gradient ? grad_estimate : nullptr, grad_mu, grad_logvar);
        }
        for (int64_t c = 0; c < C; ++c) {
            T* CALSEG_RESTRICT row = soft + c * length;
            for (int i = 0; i < padded; ++i)
                row[i] = (t.labels[i] == static_cast<int32_t>(c) ? T(1) - alpha : T(0)) + alpha / m * row[i];
        }
        soft_cross_entropy_tile(t, log_p, e, soft, smoothing, bool(ce.grad_logits), false);

        if (ce.grad_logits) store_tile(ce.grad_logits, n, s, count, e, length, C, stream_logits);
        if (gaussian_gradient) {
            // upstream holds grad_output * scale; the KL term has a normaliser of its own
            const T to_samples = T(1) / (m * static_cast<T>(g.temperature));
            const T to_kl = static_cast<T>(g.beta * ce.upstream.kl_scale);
            if (ce.upstream.grad_output && with_kl) load_row(kl_scale, ce.upstream.grad_output, n, s, count, padded);
            for (int i = 0; i < padded; ++i) {
                sample_scale[i] = t.upstream[i] * to_samples;
                kl_scale[i] = t.labels[i] < 0 ? T(0) : ce.upstream.grad_output && with_kl ? kl_scale[i] * to_kl : to_kl;
            }
            gaussian.finish_gradients(g, padded, sample_scale, with_kl ? kl_scale : nullptr, grad_mu, grad_logvar);
            if (a.grad_mu) store_tile(a.grad_mu, n, s, count, grad_mu, length, C, stream_mu);
            if (a.grad_logvar) store_tile(a.grad_logvar, n, s, count, grad_logvar, length, C, stream_logvar);
        }
        total.loss += sum_row(t.loss, count);
        if (with_kl) total.kl += sum_row(gaussian.kl, count);
        if (ce.loss) {
            const T beta = static_cast<T>(g.beta);
            if (with_kl)
                for (int i = 0; i < padded; ++i) t.loss[i] += beta * gaussian.kl[i];
            store_row(ce.loss, n, 0, s, count, t.loss, false);
        }
    });
    finish_streams();
    if (ce.chunk_sums) ce.chunk_sums[chunk] = total;
}

int64_t num_chunks(const VLSCrossEntropyArgs& a) {
    return a.ce.logits.dtype == DType::f64 ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks();
}

template <class T>
int64_t bytes(const VLSCrossEntropyArgs& a) {
    const int64_t C = a.ce.shape.C, length = tiling<T>(a).length;
    return LossTile<T>::bytes(C, length) + GaussianTile<T>::bytes(C, length) + 6 * Scratch::bytes<T>(C * length) +
           2 * Scratch::bytes<T>(length);
}

int64_t scratch_bytes(const VLSCrossEntropyArgs& a) {
    return a.ce.logits.dtype == DType::f64 ? bytes<double>(a) : bytes<float>(a);
}

void run_chunk(const VLSCrossEntropyArgs& a, int64_t chunk, void* scratch) {
    a.ce.logits.dtype == DType::f64 ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<VLSCrossEntropyArgs> vls_cross_entropy = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
