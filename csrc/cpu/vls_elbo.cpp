// The stage-1 objective in dense form: the expected cross-entropy of the logit samples, plus KL; loss and gradients.
#include "cpu/cross_entropy.h"
#include "cpu/gaussian.h"
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

template <class T>
Tiling tiling(const VLSElboArgs& a) {
    return Tiling(a.shape, 6 * a.shape.C, sizeof(T), 1 << 14);
}

// Adds -log softmax(nu_k)[label] to t.loss, and with gradient dLoss/dnu (up to the voxel's weight) to the sums.
template <class T>
void add_sample(LossTile<T>& t, GaussianTile<T>& gaussian, int64_t k, T* CALSEG_RESTRICT grad_mu, T* CALSEG_RESTRICT grad_logvar) {
    const T* CALSEG_RESTRICT z = gaussian.softmax_sample(k, t.padded);
    const T *CALSEG_RESTRICT e = gaussian.e, *CALSEG_RESTRICT per_sum = gaussian.inverse;
    const int32_t* CALSEG_RESTRICT labels = t.labels;
    T *CALSEG_RESTRICT picked = t.row, *CALSEG_RESTRICT loss = t.loss;
    for (int i = 0; i < t.padded; ++i) picked[i] = gaussian.maximum[i];
    for (int64_t c = 0; c < t.C; ++c) {
        const int64_t row = c * t.stride;
        const T *CALSEG_RESTRICT mean = gaussian.mean + row, *CALSEG_RESTRICT deviation = gaussian.deviation + row;
        for (int i = 0; i < t.padded; ++i)
            picked[i] = labels[i] == static_cast<int32_t>(c) ? mean[i] + deviation[i] * z[row + i] : picked[i];
        if (!grad_mu) continue;
        for (int i = 0; i < t.padded; ++i) {
            const T g = e[row + i] * per_sum[i] - (labels[i] == static_cast<int32_t>(c) ? T(1) : T(0));
            grad_mu[row + i] += g;
            grad_logvar[row + i] += g * z[row + i];
        }
    }
    for (int i = 0; i < t.padded; ++i) loss[i] += gaussian.maximum[i] - picked[i] - log_positive(per_sum[i]);
}

template <class T>
void run(const VLSElboArgs& a, int64_t chunk, void* memory) {
    const Gaussian& g = a.gaussian;
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    const int length = tiles.length;
    Scratch scratch(memory);
    LossTile<T> t(scratch, C, length, a.weight);
    GaussianTile<T> gaussian(scratch, C, length);
    T* grad_mu = scratch.take<T>(C * length);
    T* grad_logvar = scratch.take<T>(C * length);
    T* voxel_weight = scratch.take<T>(length);
    T* kl_scale = scratch.take<T>(length);

    const bool gradient = a.grad_mu || a.grad_logvar, with_kl = g.beta != 0.0;
    const T per_sample = T(1) / static_cast<T>(g.num_samples);
    const bool stream_mu = streams(a.grad_mu, a.shape), stream_logvar = streams(a.grad_logvar, a.shape);
    LossSums total;
    tiles.for_tiles(chunk, [&](int64_t n, int64_t s, int count) {
        t.load(a.labels, a.upstream, n, s, count);
        const int padded = t.padded;
        gaussian.load(g, t.labels, t.any_ignored(), n, s, count, padded, with_kl);
        gaussian.philox.set_voxels(g.seed, static_cast<uint64_t>(n * a.shape.S + s), padded);
        fill(t.loss, t.loss + padded, T(0));
        if (gradient) {
            fill(grad_mu, grad_mu + C * length, T(0));
            fill(grad_logvar, grad_logvar + C * length, T(0));
        }
        for (int64_t k = 0; k < g.num_samples; ++k) add_sample(t, gaussian, k, gradient ? grad_mu : nullptr, grad_logvar);

        for (int i = 0; i < padded; ++i) voxel_weight[i] = (t.labels[i] < 0 ? T(0) : t.weight[t.labels[i]]) * per_sample;
        for (int i = 0; i < padded; ++i) t.loss[i] *= voxel_weight[i];
        t.clear_ignored_loss();
        if (gradient) {
            const T to_kl = static_cast<T>(g.beta * a.upstream.kl_scale);
            if (a.upstream.grad_output && with_kl) load_row(kl_scale, a.upstream.grad_output, n, s, count, padded);
            for (int i = 0; i < padded; ++i) {
                voxel_weight[i] = t.labels[i] < 0 ? T(0) : voxel_weight[i] * t.upstream[i];
                kl_scale[i] = t.labels[i] < 0 ? T(0) : a.upstream.grad_output && with_kl ? kl_scale[i] * to_kl : to_kl;
            }
            gaussian.finish_gradients(g, padded, voxel_weight, with_kl ? kl_scale : nullptr, grad_mu, grad_logvar);
            if (a.grad_mu) store_tile(a.grad_mu, n, s, count, grad_mu, length, C, stream_mu);
            if (a.grad_logvar) store_tile(a.grad_logvar, n, s, count, grad_logvar, length, C, stream_logvar);
        }
        total.loss += sum_row(t.loss, count);
        if (with_kl) total.kl += sum_row(gaussian.kl, count);
        if (a.loss) {
            const T beta = static_cast<T>(g.beta);
            if (with_kl)
                for (int i = 0; i < padded; ++i) t.loss[i] += beta * gaussian.kl[i];
            store_row(a.loss, n, 0, s, count, t.loss, false);
        }
    });
    finish_streams();
    if (a.chunk_sums) a.chunk_sums[chunk] = total;
}

int64_t num_chunks(const VLSElboArgs& a) {
    return a.gaussian.mu.dtype == DType::f64 ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks();
}

template <class T>
int64_t bytes(const VLSElboArgs& a) {
    const int64_t C = a.shape.C, length = tiling<T>(a).length;
    return LossTile<T>::bytes(C, length) + GaussianTile<T>::bytes(C, length) + 2 * Scratch::bytes<T>(C * length) +
           2 * Scratch::bytes<T>(length);
}

int64_t scratch_bytes(const VLSElboArgs& a) { return a.gaussian.mu.dtype == DType::f64 ? bytes<double>(a) : bytes<float>(a); }

void run_chunk(const VLSElboArgs& a, int64_t chunk, void* scratch) {
    a.gaussian.mu.dtype == DType::f64 ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<VLSElboArgs> vls_elbo = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
