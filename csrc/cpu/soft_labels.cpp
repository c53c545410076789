// Soft labels: sampled from the dense Gaussian (and their gradient), accumulated from logit maps, blended with labels.
#include "cpu/gaussian.h"
#include "cpu/operations.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// ---- sample_soft_labels ----

template <class T>
Tiling tiling(const SampleArgs& a) {
    return Tiling(a.shape, voxels_in_cache(a.shape.C, 3, sizeof(T)), 1 << 14);
}

// block = alpha * scale * block + (1 - alpha) * onehot; 0 where ignored
template <class T>
CALSEG_INLINE void blend_block(const int32_t* labels_of, T* block, int64_t C, T alpha, T scale) {
    const I<T> labels = load<I<T>>(labels_of);
    const auto ignored = less(labels, broadcast<I<T>>(0));
    const F<T> on_estimate = broadcast<F<T>>(alpha * scale), on_label = broadcast<F<T>>(T(1) - alpha), none = zero<T>();
    for (int64_t c = 0; c < C; ++c) {
        const F<T> hard = select(equal(labels, broadcast<I<T>>(static_cast<int32_t>(c))), on_label, none);
        const F<T> blended = on_estimate * load<F<T>>(block + c * kLanes) + hard;
        store(block + c * kLanes, select(ignored, none, blended));
    }
}

// Forward: soft = the soft labels. Backward: soft holds the upstream gradient, mu and logvar become their gradients.
template <class T, bool kBackward>
void run(const SampleArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    Scratch scratch(memory);
    int32_t* labels = scratch.take<int32_t>(tiles.length);
    GaussianBlock<T> gaussian(scratch, a.spec.sampling, C);
    TensorTile<T> mu(scratch, a.tensors.mu, a.gradients.mu, a.shape, tiles.length);
    TensorTile<T> logvar(scratch, a.tensors.logvar, a.gradients.logvar, a.shape, tiles.length);
    TensorTile<T> soft(scratch, a.grad_output, a.soft_labels, a.shape, tiles.length);
    const T alpha = a.spec.labels.tensor ? static_cast<T>(a.spec.alpha) : T(1), m = static_cast<T>(a.spec.sampling.num_samples);
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        const int count = span.count;
        const bool any_ignored = load_labels(labels, a.spec.labels, span, C) < count;
        for (auto* tensor : {&mu, &logvar, &soft}) tensor->begin(span, next);
        if (any_ignored)
            for (auto* tensor : {&mu, &logvar, &soft}) clear_ignored(tensor->tile(), labels, count, C);
        for (int b = 0; b * kLanes < count; ++b) {
            for (auto* tensor : {&mu, &logvar, &soft}) tensor->prefetch_next(b);
            T* soft_block = soft.block(b);
            gaussian.template set<false>(mu.block(b), logvar.block(b), static_cast<uint64_t>(span.n * a.shape.S + span.s + b * kLanes));
            if (kBackward) {
                gaussian.template add_samples<false, true>(nullptr, soft_block);
                const F<T> scale = broadcast<F<T>>(alpha / (m * static_cast<T>(a.spec.sampling.temperature)));
                gaussian.template finish_gradients<false>(scale, zero<T>());
            } else {
                gaussian.template add_samples<true, false>(soft_block, nullptr);
                blend_block(labels + b * kLanes, soft_block, C, alpha, T(1) / m);
            }
        }
        for (auto* tensor : {&mu, &logvar, &soft}) tensor->end(span);
    });
}

bool is_double(const SampleArgs& a) { return a.tensors.mu.dtype == DType::f64; }

int64_t num_chunks(const SampleArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }

template <class T>
int64_t bytes(const SampleArgs& a) {
    const int64_t C = a.shape.C, length = tiling<T>(a).length;
    return Scratch::bytes<int32_t>(length) + GaussianBlock<T>::bytes(C) + 3 * TensorTile<T>::bytes(C, length);
}

int64_t scratch_bytes(const SampleArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }

template <bool kBackward>
void run_chunk(const SampleArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double, kBackward>(a, chunk, scratch) : run<float, kBackward>(a, chunk, scratch);
}

// ---- accumulate_softmax ----

template <class T>
Tiling tiling(const AccumulateArgs& a) {
    return Tiling(a.shape, voxels_in_cache(a.shape.C, 2, sizeof(T)), 1 << 15);
}

// Forward: other, the running total, gains the softmax. Backward: other, the upstream gradient, becomes the logits'.
template <class T, bool kBackward>
void run(const AccumulateArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    Scratch scratch(memory);
    const TensorView &in = kBackward ? a.grad_output : a.total, &out = kBackward ? a.grad_logits : a.total;
    TensorTile<T> logits(scratch, a.logits, TensorView(), a.shape, tiles.length);
    TensorTile<T> other(scratch, in, out, a.shape, tiles.length);
    const F<T> per_temperature = broadcast<F<T>>(T(1) / static_cast<T>(a.spec.temperature)), one = broadcast<F<T>>(T(1));
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        for (auto* tensor : {&logits, &other}) tensor->begin(span, next);
        for (int b = 0; b * kLanes < span.count; ++b) {
            for (auto* tensor : {&logits, &other}) tensor->prefetch_next(b);
            T *x = logits.block(b), *o = other.block(b);
            const F<T> top = max_over_classes(x, C);
            F<T> sum = zero<T>(), dot = sum;
            for_classes(C, [&](auto group, int64_t c) {
                constexpr int K = decltype(group)::value;
                F<T> e[K];
                for (int j = 0; j < K; ++j) e[j] = (load<F<T>>(x + (c + j) * kLanes) - top) * per_temperature;
                exp_nonpositive(e);
                for (int j = 0; j < K; ++j) {
                    sum = sum + e[j];
                    if (kBackward) dot = dot + e[j] * load<F<T>>(o + (c + j) * kLanes);
                    store(x + (c + j) * kLanes, e[j]);
                }
            });
            const F<T> per_sum = one / sum;
            for (int64_t c = 0; c < C; ++c) {
                const F<T> p = load<F<T>>(x + c * kLanes) * per_sum, y = load<F<T>>(o + c * kLanes);
                store(o + c * kLanes, kBackward ? p * per_temperature * (y - dot * per_sum) : y + p);
            }
        }
        other.end(span);
    });
}

bool is_double(const AccumulateArgs& a) { return a.logits.dtype == DType::f64; }

int64_t num_chunks(const AccumulateArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }

template <class T>
int64_t bytes(const AccumulateArgs& a) {
    const int64_t length = tiling<T>(a).length;
    return 2 * TensorTile<T>::bytes(a.shape.C, length);
}

int64_t scratch_bytes(const AccumulateArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }

template <bool kBackward>
void run_chunk(const AccumulateArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double, kBackward>(a, chunk, scratch) : run<float, kBackward>(a, chunk, scratch);
}

// ---- blend_soft_labels ----

template <class T>
Tiling tiling(const BlendArgs& a) {
    return Tiling(a.shape, voxels_in_cache(a.shape.C, 1, sizeof(T)), 1 << 16);
}

template <class T>
void run(const BlendArgs& a, int64_t chunk, void* memory) {
    const Tiling tiles = tiling<T>(a);
    const int64_t C = a.shape.C;
    Scratch scratch(memory);
    int32_t* labels = scratch.take<int32_t>(tiles.length);
    TensorTile<T> tensor(scratch, a.estimate, a.estimate, a.shape, tiles.length);
    const T alpha = a.spec.labels.tensor ? static_cast<T>(a.spec.alpha) : T(1);
    tiles.for_tiles(chunk, [&](const Span& span, const Span& next) {
        load_labels(labels, a.spec.labels, span, C);
        tensor.begin(span, next);
        for (int b = 0; b * kLanes < span.count; ++b) {
            tensor.prefetch_next(b);
            blend_block(labels + b * kLanes, tensor.block(b), C, alpha, static_cast<T>((1.0 / static_cast<double>(a.spec.num_maps))));
        }
        tensor.end(span);
    });
}

bool is_double(const BlendArgs& a) { return a.estimate.dtype == DType::f64; }

int64_t num_chunks(const BlendArgs& a) { return is_double(a) ? tiling<double>(a).num_chunks() : tiling<float>(a).num_chunks(); }

template <class T>
int64_t bytes(const BlendArgs& a) {
    const int64_t length = tiling<T>(a).length;
    return Scratch::bytes<int32_t>(length) + TensorTile<T>::bytes(a.shape.C, length);
}

int64_t scratch_bytes(const BlendArgs& a) { return is_double(a) ? bytes<double>(a) : bytes<float>(a); }

void run_blend(const BlendArgs& a, int64_t chunk, void* scratch) {
    is_double(a) ? run<double>(a, chunk, scratch) : run<float>(a, chunk, scratch);
}

}  // namespace

const Kernel<SampleArgs> sample_soft_labels = {num_chunks, scratch_bytes, run_chunk<false>};
const Kernel<SampleArgs> sample_soft_labels_backward = {num_chunks, scratch_bytes, run_chunk<true>};
const Kernel<AccumulateArgs> accumulate_softmax = {num_chunks, scratch_bytes, run_chunk<false>};
const Kernel<AccumulateArgs> accumulate_softmax_backward = {num_chunks, scratch_bytes, run_chunk<true>};
const Kernel<BlendArgs> blend_soft_labels = {num_chunks, scratch_bytes, run_blend};

}  // namespace CALSEG_ISA
}  // namespace calseg
