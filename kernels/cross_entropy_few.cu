// CUDA kernel of cross_entropy with one-hot labels, for logits of few classes: either the voxels of a class are adjacent, or
// the classes of a voxel.
//
// It computes the loss and the gradient in one pass. csrc/voxel/cross_entropy.h has the mathematics, which the CPU kernel
// uses too. There are no class weights, no label smoothing, and no tensor with a number for each voxel but the labels.
//
// Least memory traffic: one read of the logits and of the labels, and one write of the gradient.
//
// With so few bytes a voxel, the instructions count. A thread has four or eight adjacent voxels, which are 16 bytes of each
// class, and holds them in registers. Nothing is left to do for other threads but the sum of the losses. One logarithm of a
// product stands for the logarithms of all voxels of a thread. One comparison finds whether any of their labels is not a
// class, which is rare.
#include "cuda/caller.h"
#include "cuda/cross_entropy.h"
#include "cuda/device.h"
#include "cuda/numbers.h"
#include "cuda/plan.h"
#include "cuda/scalar.h"
#include "cuda/thread.h"
#include "voxel/cross_entropy.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Least number of blocks whose registers must fit a multiprocessor at once.
constexpr int few_blocks(int C) { return C == 2 ? 10 : 7; }

// Labels of V adjacent voxels.
template <int V, int C>
class AdjacentLabels {
    static_assert(C >= 2 && C <= 4, "a class is a number of one or two bits");

 public:
    uint32_t skipped = 0, no_class = 0;  // the voxels of which this is true, a bit each

    CALSEG_MEMBER AdjacentLabels(const TensorView& from, const LabelRange& range, int64_t n, int64_t s) {
        const int64_t at = n * from.stride_n + s;
        switch (range.bytes) {
            case 1:
                read<1>(static_cast<const uint8_t*>(from.data) + at, range);
                break;
            case 2:
                read<2>(static_cast<const uint16_t*>(from.data) + at, range);
                break;
            case 4:
                read<4>(static_cast<const uint32_t*>(from.data) + at, range);
                break;
            default:
                read<8>(static_cast<const uint64_t*>(from.data) + at, range);
        }
    }

    // Returns whether the label of a voxel is class c. A voxel without a class has label 0.
    CALSEG_MEMBER bool is(int v, int c) const {
        if (C == 2) return (bytes_[v / 4] & 1u << v % 4 * 8) != 0 ? c == 1 : c == 0;
        return (bytes_[v / 4] >> v % 4 * 8 & 0xffu) == static_cast<uint32_t>(c);
    }

 private:
    // Reads labels of kBytes bytes each.
    template <int kBytes>
    CALSEG_MEMBER void read(const void* from, const LabelRange& range) {
        constexpr int kWords = V * kBytes / 4, kAtOnce = kWords < 4 ? kWords : 4, kBits = kBytes < 4 ? 8 * kBytes : 32;
        constexpr uint32_t kLabel = 0xffffffffu >> (32 - kBits), kFirstBits = 0xffffffffu / kLabel;  // bits of a word
        struct alignas(4 * kAtOnce) Words {
            uint32_t words[kAtOnce];
        } parts[kWords / kAtOnce];
#pragma unroll
        for (int i = 0; i < kWords / kAtOnce; ++i) parts[i] = static_cast<const Words*>(from)[i];
        const auto word = [&](int i) { return parts[i / kAtOnce].words[i % kAtOnce]; };
        const auto low = [&](int v) { return word(v * kBytes / 4) >> v * kBits % 32 & kLabel; };
        const auto high = [&](int v) { return kBytes == 8 ? word(v * kBytes / 4 + kBytes / 8) : 0; };
        uint32_t others = range.ignores_class;  // bits that no class has, of all labels; not 0 if a class is ignored
#pragma unroll
        for (int i = 0; i < kWords; i += kBytes == 8 ? 2 : 1) {
            others |= word(i) & ~(kFirstBits * (C == 2 ? 1 : 3));
            if (C == 3) others |= word(i) & word(i) >> 1 & kFirstBits;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) others |= high(v);
        if (others == 0) {
#pragma unroll
            for (int i = 0; i < V / 4; ++i)
                bytes_[i] = kBytes == 1 ? word(i) : low(4 * i) | low(4 * i + 1) << 8 | low(4 * i + 2) << 16 | low(4 * i + 3) << 24;
        } else {
#pragma unroll
            for (int v = 0; v < V; ++v) set_any(v, static_cast<uint64_t>(high(v)) << 32 | low(v), range);
        }
    }

    // Sets a label that need not be a class, given its bits.
    CALSEG_MEMBER void set_any(int v, uint64_t bits, const LabelRange& range) {
        const int32_t label = class_of(bits, range);
        if (v % 4 == 0) bytes_[v / 4] = 0;
        if (label >= 0) bytes_[v / 4] |= static_cast<uint32_t>(label) << v % 4 * 8;
        if (label == kSkipped) skipped |= 1u << v;
        if (label == kNoClass) no_class |= 1u << v;
    }

    uint32_t bytes_[V / 4];  // a byte for each label
};

// Sums over the voxels of a thread.
struct FewSums {
    float product, label_d;  // product of the sums of exponentials, and sum of the labels' d = logit - max

    CALSEG_MEMBER float loss() const { return log_positive(product) - label_d; }
};

// Turns the logits of a voxel into their gradient. Returns the sums of this voxel.
template <int C>
CALSEG_INLINE FewSums finish_voxel(float (&x)[C], const bool (&is_label)[C], float upstream) {
    float top = x[0], e[C];
#pragma unroll
    for (int c = 1; c < C; ++c) top = fmaxf(x[c], top);  // where x is NaN, so is the sum below
#pragma unroll
    for (int c = 0; c < C; ++c) e[c] = x[c] - top;
    HardSums<float> sums{0.0f, e[0], 0.0f, 0.0f};
#pragma unroll
    for (int c = 1; c < C; ++c) sums.label_d = is_label[c] ? e[c] : sums.label_d;
    exp_nonpositive(e);
    sums.sum = e[0];
#pragma unroll
    for (int c = 1; c < C; ++c) sums.sum += e[c];
    const HardLoss<float> result = hard_loss<true, float>(sums, upstream, Smoothing<float>(0.0, C), 0.0f);
#pragma unroll
    for (int c = 0; c < C; ++c) x[c] = e[c] * result.scale_e - (is_label[c] ? result.scale_label : 0.0f);
    return {sums.sum, sums.label_d};
}

// The numbers of V adjacent voxels, in C vectors of 16 bytes. If kRows, the vectors are adjacent, and the classes of a voxel
// too; else a vector has one class.
template <class From, int C, bool kRows>
struct FewVoxels {
    static constexpr int V = kCopyBytes / sizeof(From);
    using Vector = Adjacent<From, V>;

    Vector vectors[C];

    // Returns vector i of the voxels from s on, in a tensor.
    static CALSEG_MEMBER Vector* place(const Scores& tensor, int64_t n, int64_t s, int i) {
        const int64_t at = kRows ? s * C + i * V : s + i * tensor.stride_c;
        return reinterpret_cast<Vector*>(static_cast<From*>(tensor.data) + (n * tensor.stride_n + at));
    }

    // Stores the voxels from s on of S, of rows. The lanes of a warp do so together, for the vectors that they store at the
    // same time must be adjacent: they hand them round in shared memory. A lane may have no voxels, which are past the end.
    CALSEG_MEMBER void store_rows(const Scores& to, int64_t n, int64_t s, int64_t S, Vector* of_warp) const {
        if (s < S)
#pragma unroll
            for (int i = 0; i < C; ++i) of_warp[slot(lane() * C + i)] = vectors[i];
        __syncwarp();
        const int64_t first = s - lane() * V, left = S - first;
        const int count = left < kCudaWarp * V ? static_cast<int>(left) / V * C : kCudaWarp * C;  // of vectors
        Vector* const rows = place(to, n, first, 0) + lane();
#pragma unroll
        for (int i = 0; i < kCudaWarp * C; i += kCudaWarp)
            if (i + lane() < count) rows[i] = of_warp[slot(i + lane())];
    }

    // Replaces all numbers of the voxels that have a bit in `which`: by `first` in class 0, by x in the others.
    CALSEG_MEMBER void replace(uint32_t which, float first, float x) {
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (which >> v & 1)
#pragma unroll
                for (int c = 0; c < C; ++c) vectors[vector_of(v, c)].set(place_of(v, c), c == 0 ? first : x);
    }

    // Turns the logits into their gradient. Returns the sum of the losses.
    CALSEG_MEMBER float finish(const AdjacentLabels<V, C>& labels, float upstream) {
        if (labels.skipped | labels.no_class) {
            replace(labels.skipped, 0.0f, -INFINITY);  // the loss of these logits is 0
            replace(labels.no_class, NAN, NAN);
        }
        float x[C][V];
#pragma unroll
        for (int i = 0; i < C; ++i) vectors[i].read(x[i]);
        FewSums sums{1.0f, 0.0f};
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float of_voxel[C];
            bool is_label[C];
#pragma unroll
            for (int c = 0; c < C; ++c) of_voxel[c] = x[vector_of(v, c)][place_of(v, c)], is_label[c] = labels.is(v, c);
            const FewSums more = finish_voxel(of_voxel, is_label, upstream);
            sums = v == 0 ? more : FewSums{sums.product * more.product, sums.label_d + more.label_d};
#pragma unroll
            for (int c = 0; c < C; ++c) x[vector_of(v, c)][place_of(v, c)] = of_voxel[c];
        }
#pragma unroll
        for (int i = 0; i < C; ++i) vectors[i].write(x[i]);
        if (labels.skipped) replace(labels.skipped, 0.0f, 0.0f);  // it is NaN if the upstream gradient is infinite
        return sums.loss();
    }

 private:
    // Returns the place of vector i of a warp in shared memory. With a gap after every eight, no two lanes that read at the
    // same time use one memory bank, where C is even.
    static CALSEG_MEMBER int slot(int i) { return C % 2 ? i : i + i / 8; }

    // Return the place of a class of a voxel: its vector, and where it is in that.
    static CALSEG_MEMBER int vector_of(int v, int c) { return kRows ? (v * C + c) / V : c; }
    static CALSEG_MEMBER int place_of(int v, int c) { return kRows ? (v * C + c) % V : v; }
};

// From is the type in which the logits are stored.
template <class From, int C, bool kRows>
__global__ void __launch_bounds__(kFewThreads, few_blocks(C)) cross_entropy_few(const CrossEntropyLaunch launch) {
    using Voxels = FewVoxels<From, C, kRows>;
    constexpr int V = Voxels::V;
    const LossArgs& a = launch.args;
    const BlockTile tile(launch);
    const int64_t s = tile.first + static_cast<int64_t>(threadIdx.x * V);
    float loss = 0.0f;
    Voxels voxels;
    if (s < a.shape.S) {
#pragma unroll
        for (int i = 0; i < C; ++i) voxels.vectors[i] = *Voxels::place(a.tensors.logits, tile.n, s, i);
        const AdjacentLabels<V, C> labels(a.spec.labels.tensor, launch.labels, tile.n, s);
        loss = voxels.finish(labels, Factors(launch).upstream);
        if (!kRows && a.gradients.logits.data)
#pragma unroll
            for (int i = 0; i < C; ++i) *Voxels::place(a.gradients.logits, tile.n, s, i) = voxels.vectors[i];
    }
    if (kRows && a.gradients.logits.data) {
        auto* const of_warps = reinterpret_cast<typename Voxels::Vector*>(shared_memory() + launch.rows_offset);
        voxels.store_rows(a.gradients.logits, tile.n, s, a.shape.S, of_warps + warp() * kFewSlots<C>);
    }
    store_partial<kFewThreads>(launch, loss, reinterpret_cast<float*>(shared_memory()));
}

// ---- launch, on the host ----

using FewKernel = void (*)(CrossEntropyLaunch);

template <class From, int C>
FewKernel few_kernel(const CrossEntropyLaunch& launch) {
    return launch.in_rows ? cross_entropy_few<From, C, true> : cross_entropy_few<From, C, false>;
}

template <class From>
FewKernel few_kernel(const CrossEntropyLaunch& launch) {
    const int64_t C = launch.args.shape.C;
    return C == 2 ? few_kernel<From, 2>(launch) : C == 3 ? few_kernel<From, 3>(launch) : few_kernel<From, 4>(launch);
}

FewKernel few_kernel(const CrossEntropyLaunch& launch) {
    switch (launch.args.tensors.logits.dtype) {
        case DType::bf16:
            return few_kernel<BF16>(launch);
        case DType::f16:
            return few_kernel<F16>(launch);
        default:
            return few_kernel<float>(launch);
    }
}

}  // namespace
}  // namespace CALSEG_ISA

void cuda_cross_entropy_few(const CrossEntropyLaunch& launch, int device, void* stream) {
    using namespace CALSEG_ISA;
    const Caller cuda("cross_entropy on CUDA", device);
    const FewKernel kernel = few_kernel(launch);
    if (launch.blocks() == 0) return;
    cuda.launch(kernel, launch.blocks(), kFewThreads, launch.shared_bytes, stream, launch);
}

}  // namespace calseg
