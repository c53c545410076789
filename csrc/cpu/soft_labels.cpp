// Soft labels: sampled from the dense Gaussian (and their gradient), accumulated from logit maps, blended with labels.
#include "cpu/cross_entropy.h"
#include "cpu/gaussian.h"
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// ---- sample_soft_labels ----

template <class T>
Tiling tiling(const SoftLabelsArgs& a) {
    return Tiling(a.shape, 8 * a.shape.C, sizeof(T), 1 << 14);
}

// row = alpha * scale * row + (1 - alpha) * onehot; 0 where ignored
template <class T>
void blend_tile(const int32_t* CALSEG_RESTRICT labels, T* CALSEG_RESTRICT rows, int stride, int padded, int64_t C, T alpha, T scale) {
    const T on_estimate = alpha * scale, on_label = T(1) - alpha;
    for (int64_t c = 0; c < C; ++c) {
        T* CALSEG_RESTRICT row = rows + c * stride;
        for (int i = 0; i < padded; ++i) {
            const T blended = on_estimate * row[i] + (labels[i] == static_cast<int32_t>(c) ? on_label : T(0));
            row[i] = labels[i] < 0 ? T(0) : blended;
        }
    }
}

template <class T, bool kBackward>
void run(const SoftLabelsArgs& a, int64_t chunk, void* memory) {
    const Gaussian& g = a.gaussian;
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    const int length = tiles.length;
    Scratch scratch(memory);
    int32_t* labels = scratch.take<int32_t>(length);
    T* sample_scale = scratch.take<T>(length);
    GaussianTile<T> gaussian(scratch, C, length);
    T* soft = scratch.take<T>(C * length);  // backward: the upstream gradient
    T *grad_mu = nullptr, *grad_logvar = nullptr;
    if (kBackward) {
        grad_mu = scratch.take<T>(C * length);
        grad_logvar = scratch.take<T>(C * length);
    }
    const T alpha = a.labels.view ? static_cast<T>(a.alpha) : T(1), m = static_cast<T>(g.num_samples);
    const bool stream = streams(a.soft_labels, a.shape), stream_mu = streams(a.grad_mu, a.shape),
               stream_logvar = streams(a.grad_logvar, a.shape);
    tiles.for_tiles(chunk, [&](int64_t n, int64_t s, int count) {
        const int padded = static_cast<int>(round_up(count, kLanes));
        const bool any_ignored = load_labels(labels, a.labels, n, s, count, padded) < padded;
        gaussian.load(g, labels, any_ignored, n, s, count, padded, false);
        gaussian.philox.set_voxels(g.seed, static_cast<uint64_t>(n * a.shape.S + s), padded);
        if (kBackward) {
            load_tile(soft, length, a.grad_output, n, s, count, padded, C);
            if (any_ignored) clear_ignored(soft, length, labels, padded, C);
            fill(grad_mu, grad_mu + C * length, T(0));
            fill(grad_logvar, grad_logvar + C * length, T(0));
            for (int64_t k = 0; k < g.num_samples; ++k) gaussian.add_sample(k, padded, static_cast<T*>(nullptr), soft, grad_mu, grad_logvar);
            fill(sample_scale, sample_scale + padded, alpha / (m * static_cast<T>(g.temperature)));
            gaussian.finish_gradients(g, padded, sample_scale, static_cast<const T*>(nullptr), grad_mu, grad_logvar);
            if (a.grad_mu) store_tile(a.grad_mu, n, s, count, grad_mu, length, C, stream_mu);
            if (a.grad_logvar) store_tile(a.grad_logvar, n, s, count, grad_logvar, length, C, stream_logvar);
        } else {
            fill(soft, soft + C * length, T(0));
            for (int64_t k = 0; k < g.num_samples; ++k)
                gaussian.add_sample(k, padded, soft, static_cast<const T*>(nullptr), static_cast<T*>(nullptr), static_cast<T*>(nullptr));
            blend_tile(labels, soft, length, padded, C, alpha, T(1) / m);
            store_tile(a.soft_labels, n, s, count, soft, length, C, stream);
        }
    });
    finish_streams();
}

bool is_double(const SoftLabelsArgs& a) { return a.gaussian.mu.dtype == DType::f64; }

int64_t num_chunks(const SoftLabelsArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }

template <class T>
int64_t bytes(const SoftLabelsArgs& a) {
    const int64_t C = a.shape.C, length = tiling<T>(a).length;
    return Scratch::bytes<int32_t>(length) + Scratch::bytes<T>(length) + GaussianTile<T>::bytes(C, length) +
           3 * Scratch::bytes<T>(C * length);
}

int64_t scratch_bytes(const SoftLabelsArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }

template <bool kBackward>
void run_chunk(const SoftLabelsArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double, kBackward>(a, chunk, scratch) : run<float, kBackward>(a, chunk, scratch);
}

// ---- accumulate_softmax ----

template <class T>
Tiling tiling(const AccumulateArgs& a) {
    return Tiling(a.shape, 3 * a.shape.C, sizeof(T), 1 << 15);
}

template <class T, bool kBackward>
void run(const AccumulateArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    const int length = tiles.length;
    Scratch scratch(memory);
    LossTile<T> t(scratch, C, length, nullptr);
    T* rows = scratch.take<T>(C * length);
    T* e = scratch.take<T>(C * length);
    T* other = scratch.take<T>(C * length);  // the running total, or the upstream gradient
    const T per_temperature = T(1) / static_cast<T>(a.temperature);
    const bool stream = streams(kBackward ? a.grad_logits : a.total, a.shape);
    tiles.for_tiles(chunk, [&](int64_t n, int64_t s, int count) {
        t.load(Labels(), Upstream(), n, s, count);
        const int padded = t.padded;
        load_tile(rows, length, a.logits, n, s, count, padded, C);
        load_tile(other, length, kBackward ? a.grad_output : a.total, n, s, count, padded, C);
        for (int64_t at = 0; at < C * length; ++at) rows[at] *= per_temperature;
        log_softmax_tile(t, rows, e);
        T *CALSEG_RESTRICT per_sum = t.sum, *CALSEG_RESTRICT dot = t.row;
        for (int i = 0; i < padded; ++i) {
            per_sum[i] = T(1) / per_sum[i];
            dot[i] = T(0);
        }
        if (kBackward) {
            for (int64_t c = 0; c < C; ++c)
                for (int i = 0; i < padded; ++i) dot[i] += e[c * length + i] * per_sum[i] * other[c * length + i];
            for (int64_t c = 0; c < C; ++c)
                for (int i = 0; i < padded; ++i)
                    e[c * length + i] *= per_sum[i] * per_temperature * (other[c * length + i] - dot[i]);
            store_tile(a.grad_logits, n, s, count, e, length, C, stream);
        } else {
            for (int64_t c = 0; c < C; ++c)
                for (int i = 0; i < padded; ++i) other[c * length + i] += e[c * length + i] * per_sum[i];
            store_tile(a.total, n, s, count, other, length, C, stream);
        }
    });
    finish_streams();
}

bool is_double(const AccumulateArgs& a) { return a.logits.dtype == DType::f64; }

int64_t num_chunks(const AccumulateArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }

template <class T>
int64_t bytes(const AccumulateArgs& a) {
    const int64_t length = tiling<T>(a).length;
    return LossTile<T>::bytes(a.shape.C, length) + 3 * Scratch::bytes<T>(a.shape.C * length);
}

int64_t scratch_bytes(const AccumulateArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }

template <bool kBackward>
void run_chunk(const AccumulateArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double, kBackward>(a, chunk, scratch) : run<float, kBackward>(a, chunk, scratch);
}

// ---- blend_soft_labels ----

template <class T>
Tiling tiling(const BlendArgs& a) {
    return Tiling(a.shape, a.shape.C, sizeof(T), 1 << 16);
}

template <class T>
void run(const BlendArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    Scratch scratch(memory);
    int32_t* labels = scratch.take<int32_t>(tiles.length);
    T* rows = scratch.take<T>(a.shape.C * tiles.length);
    const bool stream = streams(a.blended, a.shape);
    tiles.for_tiles(chunk, [&](int64_t n, int64_t s, int count) {
        const int padded = static_cast<int>(round_up(count, kLanes));
        load_labels(labels, a.labels, n, s, count, padded);
        load_tile(rows, tiles.length, a.estimate, n, s, count, padded, a.shape.C);
        blend_tile(labels, rows, tiles.length, padded, a.shape.C, a.labels.view ? static_cast<T>(a.alpha) : T(1), static_cast<T>(a.scale));
        store_tile(a.blended, n, s, count, rows, tiles.length, a.shape.C, stream);
    });
    finish_streams();
}

bool is_double(const BlendArgs& a) { return a.estimate.dtype == DType::f64; }

int64_t num_chunks(const BlendArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }

template <class T>
int64_t bytes(const BlendArgs& a) {
    const int64_t length = tiling<T>(a).length;
    return Scratch::bytes<int32_t>(length) + Scratch::bytes<T>(a.shape.C * length);
}

int64_t scratch_bytes(const BlendArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }

void run_blend(const BlendArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<SoftLabelsArgs> sample_soft_labels = {num_chunks, scratch_bytes, run_chunk<false>};
const Kernel<SoftLabelsArgs> sample_soft_labels_backward = {num_chunks, scratch_bytes, run_chunk<true>};
const Kernel<AccumulateArgs> accumulate_softmax = {num_chunks, scratch_bytes, run_chunk<false>};
const Kernel<AccumulateArgs> accumulate_softmax_backward = {num_chunks, scratch_bytes, run_chunk<true>};
const Kernel<BlendArgs> blend_soft_labels = {num_chunks, scratch_bytes, run_blend};

}  // namespace CALSEG_ISA
}  // namespace calseg
