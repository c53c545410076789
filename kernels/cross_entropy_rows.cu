// CUDA kernel of cross_entropy with one-hot labels, for logits whose classes are adjacent: each voxel is a row.
//
// It computes the loss and the gradient in one pass. csrc/voxel/cross_entropy.h has the mathematics, which the CPU kernel
// uses too. In Triton, a row lies over many lanes, and each sum over classes takes shuffles between them.
//
// Least memory traffic: one read of the logits and of the labels, and one write of the gradient.
//
// A block copies the rows of its tile to shared memory, 16 bytes a thread at once. Then each thread has a voxel: it walks
// along its row three times, and leaves the gradient there. At last the block copies the rows to the gradient. In one step
// of the walk, a thread reads 1, 2 or 4 classes, so that the number of its steps is odd. Then no two threads that read at the
// same time use the same memory bank. If C is a multiple of 8, it reads 16 bytes, and rows have a gap of 16 bytes where the
// number of their steps is even.
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

constexpr int kRowBlocks = 10;     // least number of blocks whose registers must fit a multiprocessor at once
constexpr int kCopiesAtOnce = 4;   // of a thread
constexpr int kClassesAtOnce = 8;  // that the walk along a row has in one round of its loop

// Row of a voxel in shared memory. A thread reads V classes at once, or 16 bytes if that is less.
template <class From, int V>
class Row {
 public:
    CALSEG_MEMBER Row(unsigned char* rows, int stride, int C)
        : data_(reinterpret_cast<From*>(rows) + static_cast<int>(threadIdx.x) * stride), C_(C) {}

    CALSEG_MEMBER float operator[](int32_t c) const { return widened(data_[c]); }
    CALSEG_MEMBER void set(int32_t c, float x) const { narrow(x, data_[c]); }

    // Calls body(c, x) for every class, where x is its number. If kWrite, the number becomes what body makes of x.
    template <bool kWrite, class Body>
    CALSEG_MEMBER void walk(const Body& body) const {
        From* place = data_;
        int c = 0;
#pragma unroll 1
        for (; c + kClassesAtOnce <= C_; c += kClassesAtOnce) {
#pragma unroll
            for (int j = 0; j < kClassesAtOnce; j += kStep) step<kWrite>(c + j, place + j, body);
            place += kClassesAtOnce;
        }
#pragma unroll 1
        for (; V < kClassesAtOnce && c < C_; c += V) {
            step<kWrite>(c, place, body);
            place += V;
        }
    }

 private:
    static constexpr int kMost = kCopyBytes / sizeof(From), kStep = V < kMost ? V : kMost;

    template <bool kWrite, class Body>
    static CALSEG_MEMBER void step(int c, From* place, const Body& body) {
        auto* const adjacent = reinterpret_cast<Adjacent<From, kStep>*>(place);
        Adjacent<From, kStep> numbers = *adjacent;
        float x[kStep];
        numbers.read(x);
#pragma unroll
        for (int j = 0; j < kStep; ++j) body(c + j, x[j]);
        if (kWrite) {
            numbers.write(x);
            *adjacent = numbers;
        }
    }

    From* const data_;
    const int C_;
};

// Reads or writes a number of a voxel, of any floating-point type.
CALSEG_INLINE float load_number(const TensorView& from, int64_t n, int64_t s) {
    const int64_t at = n * from.stride_n + s * from.stride_s;
    switch (from.dtype) {
        case DType::f64:
            return static_cast<float>(static_cast<const double*>(from.data)[at]);
        case DType::bf16:
            return widened(static_cast<const BF16*>(from.data)[at]);
        case DType::f16:
            return widened(static_cast<const F16*>(from.data)[at]);
        default:
            return static_cast<const float*>(from.data)[at];
    }
}
CALSEG_INLINE void store_number(const TensorView& to, int64_t n, int64_t s, float x) {
    const int64_t at = n * to.stride_n + s * to.stride_s;
    switch (to.dtype) {
        case DType::f64:
            static_cast<double*>(to.data)[at] = static_cast<double>(x);
            break;
        case DType::bf16:
            narrow(x, static_cast<BF16*>(to.data)[at]);
            break;
        case DType::f16:
            narrow(x, static_cast<F16*>(to.data)[at]);
            break;
        default:
            static_cast<float*>(to.data)[at] = x;
    }
}

struct alignas(kCopyBytes) Whole {
    uint32_t words[4];
};

// Copies the rows of a tile, `count` numbers, by copy(to, from) for 16 bytes each. Both begin at multiples of 16 bytes.
template <class From, class Copy>
CALSEG_INLINE void copy_rows(From* to, const From* from, int count, const Copy& copy) {
    constexpr int kNumbers = kCopyBytes / sizeof(From);
    const int thread = static_cast<int>(threadIdx.x), whole = count / kNumbers, rest = whole * kNumbers + thread;
    const Whole* place = reinterpret_cast<const Whole*>(from) + thread;
    Whole* target = reinterpret_cast<Whole*>(to) + thread;
    int left = whole - thread;
#pragma unroll 1
    for (; left > (kCopiesAtOnce - 1) * kRowVoxels; left -= kCopiesAtOnce * kRowVoxels) {
#pragma unroll
        for (int j = 0; j < kCopiesAtOnce; ++j) copy(target + j * kRowVoxels, place + j * kRowVoxels);
        place += kCopiesAtOnce * kRowVoxels;
        target += kCopiesAtOnce * kRowVoxels;
    }
#pragma unroll 1
    for (; left > 0; left -= kRowVoxels) {
        copy(target, place);
        place += kRowVoxels;
        target += kRowVoxels;
    }
    if (rest >= count) return;
    to[rest] = from[rest];
}

// Copies the rows of a tile by copy(row, dense) for 16 bytes each, where there may be a gap after each row.
template <class Copy>
CALSEG_INLINE void copy_apart(const CrossEntropyLaunch& launch, unsigned char* rows, void* dense, int bytes, const Copy& copy) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < bytes / kCopyBytes; i += kRowVoxels) {
        const int row = static_cast<int>(static_cast<uint32_t>(i) / launch.per_row);
        copy(reinterpret_cast<Whole*>(rows) + (i + row * launch.row_gap), static_cast<Whole*>(dense) + i);
    }
}

// Computes the loss of a voxel whose logits are in its row, given the upstream gradient. If `gradient`, the row becomes that
// of the logits. A voxel whose label is not a class gets NaN. `weights` are the class weights, in shared memory.
template <class From, int V, bool kPlain>
CALSEG_INLINE float row_loss(const Row<From, V>& row, int32_t label, float upstream, const LossSpec& spec, int C, const float* weights,
                             bool gradient) {
    constexpr bool kKeep = sizeof(From) == sizeof(float);  // whether the row can hold e
    float top = -INFINITY;
    row.template walk<false>([&](int, float x) { top = fmaxf(x, top); });  // where x is NaN, so is the sum below
    HardSums<float> sums{label < 0 ? NAN : 0.0f, label < 0 ? 0.0f : row[label] - top, 0.0f, 0.0f};
    float weight_sum = 0.0f;
    if (!kPlain && label >= 0) sums.label_weight = weights[label];
    row.template walk<kKeep>([&](int c, float& x) {
        float e[1] = {x - top};
        if (!kPlain) {
            weight_sum += weights[c];
            sums.weighted_d += weights[c] * e[0];
        }
        exp_nonpositive(e);
        sums.sum += e[0];
        if (kKeep) x = e[0];
    });
    const Smoothing<float> smoothing(kPlain ? 0.0 : spec.label_smoothing, C);
    const HardLoss<float> result = hard_loss<kPlain, float>(sums, upstream, smoothing, weight_sum);
    if (!gradient) return result.loss;
    const float spread = smoothing.spread == 0.0f ? 0.0f : smoothing.spread * upstream;
    const auto slope = [&](int c, float x) {
        float e[1] = {kKeep ? x : x - top};
        if (!kKeep) exp_nonpositive(e);
        float g = e[0] * result.scale_e;
        if (!kPlain && spread != 0.0f) g -= spread * weights[c];
        return g;
    };
    const float of_label = label < 0 ? 0.0f : slope(label, row[label]) - result.scale_label;
    row.template walk<true>([&](int c, float& x) { x = slope(c, x); });
    if (label >= 0) row.set(label, of_label);
    return result.loss;
}

// Kernel whose threads read V classes at once. With 8, there may be gaps between rows. From is the type in which the logits are stored.
// kPlain says that there are no class weights, no label smoothing, and no tensor with a number for each voxel but the labels.
template <class From, int V, bool kPlain>
__global__ void __launch_bounds__(kRowVoxels, kRowBlocks) cross_entropy_rows(const CrossEntropyLaunch launch) {
    const LossArgs& a = launch.args;
    const int thread = static_cast<int>(threadIdx.x), C = static_cast<int>(a.shape.C);
    const BlockTile tile(launch);
    const unsigned n = tile.n;
    const int64_t first = tile.first;
    const int voxels = tile.voxels;
    float* const of_warps = reinterpret_cast<float*>(shared_memory());  // [warps]
    unsigned char* const rows = shared_memory() + launch.rows_offset;
    float* const weights = reinterpret_cast<float*>(shared_memory() + launch.weights_offset);  // [C], unless kPlain

    const auto row_of = [&](const Scores& tensor) { return static_cast<From*>(tensor.data) + (n * tensor.stride_n + first * C); };
    From* const logits = row_of(a.tensors.logits);
    const int bytes = voxels * C * static_cast<int>(sizeof(From));
    if (V == kClassesAtOnce) copy_apart(launch, rows, logits, bytes, [](auto* row, auto* dense) { copy_16_bytes(row, dense); });
    else copy_rows(reinterpret_cast<From*>(rows), logits, voxels * C, [](auto* to, auto* from) { copy_16_bytes(to, from); });
    if (!kPlain)
        for (int c = thread; c < C; c += kRowVoxels) weights[c] = a.spec.weight.data ? static_cast<float>(a.spec.weight.data[c]) : 1.0f;
    const bool inside = thread < voxels;
    int32_t labels[1];
    load_labels<1, 1>(labels, a.spec.labels.tensor, launch.labels, n, first + thread, first + voxels);
    const int32_t label = labels[0];
    const Factors factors(launch);
    float upstream = factors.upstream;
    if (!kPlain && a.upstream.grad_output.data && inside) upstream *= load_number(a.upstream.grad_output, n, first + thread);
    wait_for_copies();
    __syncthreads();

    const Row<From, V> row(rows, V == kClassesAtOnce ? C + launch.row_gap * static_cast<int>(kCopyBytes / sizeof(From)) : C, C);
    float loss = 0.0f;
    if (label != kSkipped) loss = row_loss<From, V, kPlain>(row, label, upstream, a.spec, C, weights, a.gradients.logits.data);
    else if (inside) row.template walk<true>([](int, float& x) { x = 0.0f; });
    if (!kPlain && a.loss.data && inside) store_number(a.loss, n, first + thread, factors.of_loss * loss);

    store_partial<kRowVoxels>(launch, loss, of_warps);  // after it, all rows are those of the gradient
    if (!a.gradients.logits.data) return;
    From* const gradient = row_of(a.gradients.logits);
    if (V == kClassesAtOnce) copy_apart(launch, rows, gradient, bytes, [](auto* row, auto* dense) { *dense = *row; });
    else copy_rows(gradient, reinterpret_cast<const From*>(rows), voxels * C, [](auto* to, auto* from) { *to = *from; });
}

// ---- launch, on the host ----

using RowKernel = void (*)(CrossEntropyLaunch);

template <class From, int V>
RowKernel row_kernel(const CrossEntropyLaunch& launch) {
    return launch.plain ? cross_entropy_rows<From, V, true> : cross_entropy_rows<From, V, false>;
}

template <class From>
RowKernel row_kernel(const CrossEntropyLaunch& launch) {
    return launch.vector == 1   ? row_kernel<From, 1>(launch)
           : launch.vector == 2 ? row_kernel<From, 2>(launch)
           : launch.vector == 4 ? row_kernel<From, 4>(launch)
                                : row_kernel<From, 8>(launch);
}

RowKernel row_kernel(const CrossEntropyLaunch& launch) {
    switch (launch.args.tensors.logits.dtype) {
        case DType::bf16:
            return row_kernel<BF16>(launch);
        case DType::f16:
            return row_kernel<F16>(launch);
        default:
            return row_kernel<float>(launch);
    }
}

}  // namespace
}  // namespace CALSEG_ISA

void cuda_cross_entropy_rows(const CrossEntropyLaunch& launch, int device, void* stream) {
    using namespace CALSEG_ISA;
    const Caller cuda("cross_entropy on CUDA", device);
    const RowKernel kernel = row_kernel(launch);
    if (launch.blocks() == 0) return;
    // Ask for the most in every call, because the call of another thread may come between this line and the launch.
    if (launch.shared_bytes > kAlwaysShared)
        cuda.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostSharedBytes)));
    cuda.launch(kernel, launch.blocks(), kRowVoxels, launch.shared_bytes, stream, launch);
}

}  // namespace calseg
