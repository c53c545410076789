// CUDA kernel of calibration_bins: sums per bin of confidence, and sums of the negative log-likelihood and the Brier score.
//
// For each voxel it computes the softmax, the class with the largest probability, the bin of that probability, the negative
// log-likelihood and the Brier score, all in one pass. csrc/voxel/calibration.h has the mathematics, which the CPU kernel
// uses too. All sums are integers, so the order of the additions does not matter.
//
// Least memory traffic: one read of the logits or probabilities, and one of the labels.
//
// A thread holds up to 16 classes of a voxel at once, and keeps its totals in registers. The bins lie in the shared memory
// of the block. If there are few bins, every thread has a set of its own. The sets are columns of an array, so that no two
// threads of a warp use the same memory bank. If there are many bins, the block has one set. Most voxels of a segmentation
// fall into the same bin. So the threads of a warp add up their voxels in two bins with warp instructions, and add only the
// other voxels one by one.
#include <cfloat>

#include "cuda/caller.h"
#include "cuda/device.h"
#include "cuda/plan.h"
#include "cuda/scalar.h"
#include "cuda/numbers.h"
#include "cuda/thread.h"
#include "voxel/calibration.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int kCountShift = 16;  // lowest bit of the count in ColumnBin::count_and_hits; the hits lie below
constexpr int kWarpRounds = 2;   // number of bins that a warp adds up together, before it adds other voxels one by one

CALSEG_INLINE float minus_infinity(float) { return -INFINITY; }
CALSEG_INLINE BF16 minus_infinity(BF16) { return {0xff80}; }
CALSEG_INLINE F16 minus_infinity(F16) { return {0xfc00}; }

// Returns the sum of the numbers of a warp, each below 2^43.
CALSEG_INLINE unsigned long long sum_of_warp(unsigned long long x) {
    const unsigned low = __reduce_add_sync(kAllLanes, static_cast<unsigned>(x) & 0xffff);
    return (static_cast<unsigned long long>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(x >> 16))) << 16) + low;
}

// Adds to a sum in global memory.
CALSEG_INLINE void add_to(int64_t* to, unsigned long long x) {
    if (x) atomicAdd(reinterpret_cast<unsigned long long*>(to), x);
}

// ---- bins ----

// Bin of one thread, which sums up to kMostVoxels voxels.
struct alignas(8) ColumnBin {
    unsigned confidence, count_and_hits;
};

// Bin of a block. The sum of the confidences is kept in two 32-bit halves with a carry. A 64-bit atomic addition in shared
// memory would be a slow loop of compare and swap.
struct SharedBin {
    unsigned count, hits, low, high;

    CALSEG_MEMBER void add(unsigned voxels, unsigned new_hits, unsigned confidence) {
        atomicAdd(&count, voxels);
        if (new_hits) atomicAdd(&hits, new_hits);
        const unsigned before = atomicAdd(&low, confidence);
        if (before + confidence < before) atomicAdd(&high, 1u);
    }
};

// Bins of a block, in the memory that the plan chose.
class Bins {
 public:
    CALSEG_MEMBER Bins(const CalibrationLaunch& launch, int64_t* sums)
        : bins_in_(launch.bins_in),
          right_closed_(launch.args.spec.right_closed),
          n_bins_(static_cast<float>(launch.args.spec.n_bins)),
          bins_(static_cast<int32_t>(launch.bins)),
          columns_(reinterpret_cast<ColumnBin*>(shared_memory() + launch.bins_offset)),
          shared_(reinterpret_cast<SharedBin*>(shared_memory() + launch.bins_offset)),
          sums_(sums) {}

    // Sets the bins in shared memory to 0. All threads of the block must call it. They wait for each other at its end.
    CALSEG_MEMBER void clear() {
        static_assert(sizeof(ColumnBin) * 2 == sizeof(SharedBin));
        const int words = bins_in_ == BinsIn::columns ? bins_ * kCudaThreads : bins_in_ == BinsIn::shared ? bins_ * 2 : 0;
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < words; i += kCudaThreads) columns_[i] = {0, 0};
        __syncthreads();
    }

    // Adds the confidence p of a voxel to set number `kind` of the bins, if `counts`. All threads of a warp must call it.
    CALSEG_MEMBER void add(int32_t kind, float p, bool hit, bool counts) {
        p = within_unit<float>(p);
        const int32_t bin = bin_of<float>(p, n_bins_, static_cast<int32_t>(n_bins_.n) - 1, right_closed_);
        const unsigned confidence = static_cast<unsigned>(in_units<float>(p));
        const int32_t first = kind * static_cast<int32_t>(n_bins_.n);
        if (bins_in_ == BinsIn::columns) {
            if (!counts) return;
            ColumnBin& word = columns_[(first + bin) * kCudaThreads + static_cast<int>(threadIdx.x)];
            word = {word.confidence + confidence, word.count_and_hits + (1u << kCountShift | static_cast<unsigned>(hit))};
            return;
        }
        // In each of the first rounds, the warp takes the bin of its first voxel that is left, and adds up all of its
        // voxels in that bin. In the round after these, each thread adds its own voxel.
        unsigned left = __ballot_sync(kAllLanes, counts);
#pragma unroll 1
        for (int round = 0; left; ++round) {
            const int32_t of = round < kWarpRounds ? __shfl_sync(kAllLanes, bin, __ffs(static_cast<int>(left)) - 1) : bin;
            const bool here = counts && bin == of;
            const unsigned same = __ballot_sync(kAllLanes, here);
            unsigned count = 1, hits = hit, sum = confidence;
            bool adds = here;
            if (round < kWarpRounds) {
                count = static_cast<unsigned>(__popc(same));
                hits = static_cast<unsigned>(__popc(__ballot_sync(kAllLanes, here && hit)));
                sum = __reduce_add_sync(kAllLanes, here ? confidence : 0u);
                adds = lane() == 0;
            }
            if (adds) {
                if (bins_in_ == BinsIn::shared) shared_[first + of].add(count, hits, sum);
                else add_sums(first + of, count, hits, sum);
            }
            left &= ~same;
            counts = counts && !here;
        }
    }

    // Adds the bins in shared memory to the sums of the call. All threads of the block must call it, after a barrier.
    CALSEG_MEMBER void finish() {
        if (bins_in_ == BinsIn::columns) {
            for (int bin = warp(); bin < bins_; bin += kCudaWarps) {
                unsigned count = 0, hits = 0;
                unsigned long long confidence = 0;
                for (int w = 0; w < kCudaWarps; ++w) {
                    const ColumnBin word = columns_[bin * kCudaThreads + w * kCudaWarp + lane()];
                    count += word.count_and_hits >> kCountShift;
                    hits += word.count_and_hits & ((1u << kCountShift) - 1);
                    confidence += word.confidence;
                }
                count = __reduce_add_sync(kAllLanes, count);
                hits = __reduce_add_sync(kAllLanes, hits);
                confidence = sum_of_warp(confidence);
                if (lane() == 0) add_sums(bin, count, hits, confidence);
            }
        } else if (bins_in_ == BinsIn::shared) {
            for (int bin = static_cast<int>(threadIdx.x); bin < bins_; bin += kCudaThreads) {
                const SharedBin& b = shared_[bin];
                add_sums(bin, b.count, b.hits, static_cast<unsigned long long>(b.high) << 32 | b.low);
            }
        }
    }

 private:
    CALSEG_MEMBER void add_sums(int32_t bin, unsigned count, unsigned hits, unsigned long long confidence) {
        int64_t* const to = sums_ + 3 * static_cast<int64_t>(bin);
        add_to(to, count);
        add_to(to + 1, confidence);
        add_to(to + 2, hits);
    }

    const BinsIn bins_in_;
    const bool right_closed_;
    const Divisor n_bins_;
    const int32_t bins_;
    ColumnBin* const columns_;  // [bins][kCudaThreads]
    SharedBin* const shared_;   // [bins]
    int64_t* const sums_;       // [bins][count, confidence, hits]
};

// ---- totals ----

// Totals of one thread, which sum up to kMostVoxels voxels. finish() adds up the totals of the block.
struct Totals {
    unsigned whole = 0, rest = 0, brier = 0, voxels = 0, nans = 0, infinites = 0;

    // Adds a voxel that goes to the bins.
    CALSEG_MEMBER void add(float nll, float squared) {
        brier += static_cast<unsigned>(in_units<float>(squared));
        if (!(nll < static_cast<float>(kMaxNll))) {
            ++infinites;
            return;
        }
        nll = larger(nll, 0.0f);
        const int32_t nats = truncated_integer(nll);
        whole += static_cast<unsigned>(nats);
        rest += static_cast<unsigned>(in_units<float>(nll - to_values(nats, nll)));
    }

    // Adds the totals of the block to those of the call. All threads of the block must call it. It contains a barrier.
    CALSEG_MEMBER void finish(int64_t* to) const {
        unsigned long long* of_warps = reinterpret_cast<unsigned long long*>(shared_memory());  // [kCudaWarps][kTotals]
        const unsigned sums[kTotals] = {whole, rest, brier, voxels, nans, infinites};
        for (int k = 0; k < kTotals; ++k) {
            const unsigned long long sum = sum_of_warp(sums[k]);
            if (lane() == 0) of_warps[warp() * kTotals + k] = sum;
        }
        __syncthreads();
        const int k = static_cast<int>(threadIdx.x);
        if (k >= kTotals) return;
        unsigned long long sum = 0;
        for (int w = 0; w < kCudaWarps; ++w) sum += of_warps[w * kTotals + k];
        add_to(to + k, sum);
    }
};

// ---- memory ----

// Clamps the number of elements that are left to the range 0 to kMost.
template <int kMost>
CALSEG_INLINE int up_to(int64_t left) {
    return left < kMost ? left < 0 ? 0 : static_cast<int>(left) : kMost;
}

// Reads the labels of the voxels of a thread, which are s, s + kCudaThreads and so on. Each becomes its class, kSkipped or
// kNoClass.
template <int V>
CALSEG_INLINE void load_classes(int32_t (&label)[V], const CalibrationLaunch& launch, int64_t n, int64_t s) {
    const int64_t S = launch.args.shape.S;
    load_labels<V, kCudaThreads>(label, launch.args.spec.labels.tensor, launch.labels, n, s, S);
    const TensorView& mask = launch.args.spec.mask;
    if (mask.data) {
        const uint8_t* from = static_cast<const uint8_t*>(mask.data) + (n * mask.stride_n + s * mask.stride_s);
#pragma unroll
        for (int v = 0; v < V; ++v, from += kCudaThreads * mask.stride_s)
            if (s + v * kCudaThreads < S && !*from) label[v] = kSkipped;
    }
    if (launch.args.spec.skip_background) {
#pragma unroll
        for (int v = 0; v < V; ++v) label[v] = label[v] == 0 ? kSkipped : label[v];
    }
}

// Reads the scores of classes c to c + K for the voxels of a thread, which are s, s + kCudaThreads and so on. Places
// outside of the tensor get the score `missing`.
//
// In a transposed read, the lanes of a warp read K classes of 32 / K voxels at once, and then exchange the scores in shared
// memory. The rows there have an odd length, so that no two lanes use the same memory bank. The code selects `missing`
// before it converts a score to float. If it did so afterwards, registers would have to hold all conditions until then.
template <int K, int V, class From>
CALSEG_INLINE void load_scores(float (&x)[V][K], const CalibrationLaunch& launch, int64_t n, int64_t s, int c, From missing) {
    const TensorView& scores = launch.args.scores;
    const From* const item = static_cast<const From*>(scores.data) + n * scores.stride_n;
    const int classes = static_cast<int>(launch.args.shape.C) - c;
    if (!launch.transposed) {
        const int voxels = (up_to<V * kCudaThreads>(launch.args.shape.S - s) + kCudaThreads - 1) / kCudaThreads;
        const From* voxel = item + (c * scores.stride_c + s * scores.stride_s);
#pragma unroll
        for (int v = 0; v < V; ++v, voxel += kCudaThreads * scores.stride_s) {
            const From* from = voxel;
#pragma unroll
            for (int j = 0; j < K; ++j, from += scores.stride_c) x[v][j] = widened(v < voxels && j < classes ? *from : missing);
        }
        return;
    }
    constexpr int kAtOnce = kCudaWarp / K;  // number of voxels that a warp reads at once
    const int own_class = lane() % K, own_voxel = lane() / K;
    s += own_voxel - lane();
    const int voxels = own_class < classes ? up_to<V * kCudaThreads>(launch.args.shape.S - s) : 0;
    const From* voxel = item + ((c + own_class) * scores.stride_c + s * scores.stride_s);
#pragma unroll
    for (int v = 0; v < V; ++v, voxel += kCudaThreads * scores.stride_s) {
        const From* from = voxel;
#pragma unroll
        for (int j = 0; j < K; ++j, from += kAtOnce * scores.stride_s)
            x[v][j] = widened(v * kCudaThreads + j * kAtOnce < voxels ? *from : missing);
    }
    float* const rows = reinterpret_cast<float*>(shared_memory() + launch.rows_offset) + warp() * (kCudaWarp * (K + 1));
#pragma unroll
    for (int v = 0; v < V; ++v) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < K; ++j) rows[(j * kAtOnce + own_voxel) * (K + 1) + own_class] = x[v][j];
        __syncwarp();
#pragma unroll
        for (int j = 0; j < K; ++j) x[v][j] = rows[lane() * (K + 1) + j];
    }
}

// ---- voxels ----

// Accumulator for the classes of a voxel with logits. It subtracts the largest logit so far, and rescales its sums when a
// larger one comes.
class LogitFold {
 public:
    // Adds the classes c to c + K of C. Turns their logits into exp(logit - shift).
    template <int K>
    CALSEG_MEMBER void add(int32_t label, int c, int C, float (&x)[K]) {
        const float before = top_;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (j > 1 && c + j >= C) break;
            top_class_ = top_ < x[j] ? c + j : top_class_;
            top_ = larger(x[j], top_);
        }
        if (c > 0 && before < top_) {
            float lower[1] = {before - top_};
            sum_.label_d += lower[0];
            exp_nonpositive(lower);
            sum_.total *= lower[0];
            sum_.label_e *= lower[0];
            sum_.squares *= lower[0] * lower[0];
        }
#pragma unroll
        for (int j = 0; j < K; j += 2) {
            if (j > 0 && c + j >= C) break;
            float pair[2] = {x[j] - shift(), x[j + 1] - shift()};
            sum_.add(label, c + j, pair);
            x[j] = pair[0];
            x[j + 1] = pair[1];
        }
    }
    // Returns the number that was subtracted: the largest logit so far, or the lowest float if all are -inf.
    CALSEG_MEMBER float shift() const { return larger(top_, -FLT_MAX); }
    CALSEG_MEMBER LogitSums<float> result() const {
        LogitSums<float> sums = sum_.result(top_class_);
        if (sums.total == 0.0f) sums.total = NAN;  // all logits are -inf, which is no distribution
        return sums;
    }

 private:
    LogitAccumulator<float> sum_;
    float top_ = -INFINITY;
    int32_t top_class_ = 0;
};

// Accumulator for the classes of a voxel with probabilities.
class ProbabilityFold {
 public:
    template <int K>
    CALSEG_MEMBER void add(int32_t label, int c, int C, const float (&p)[K]) {
#pragma unroll
        for (int j = 0; j < K; ++j)
            if (c + j < C) sums_.add(label, c + j, p[j]);
    }
    CALSEG_MEMBER const ProbabilitySums<float>& result() const { return sums_; }

 private:
    ProbabilitySums<float> sums_{0.0f};
};

template <bool kLogits>
using Fold = std::conditional_t<kLogits, LogitFold, ProbabilityFold>;

// Adds a voxel to the totals, and records its faults. Returns whether it goes to the bins.
template <class Sums>
CALSEG_INLINE bool add_totals(Totals& totals, const CalibrationLaunch& launch, const Sums& sums, float confidence, int32_t label,
                              int64_t position) {
    if (label == kNoClass) atomicMin(reinterpret_cast<long long*>(launch.faults), static_cast<long long>(position));
    const bool counts = label >= 0, binned = counts && sums.total == sums.total;
    totals.voxels += counts;
    totals.nans += counts && !binned;
    if (binned) totals.add(sums.nll(), sums.brier(confidence));
    if constexpr (std::is_same_v<Sums, ProbabilitySums<float>>)
        if (binned && sums.off(static_cast<float>(launch.args.spec.tolerance)) < 0)
            atomicMin(reinterpret_cast<long long*>(launch.faults) + 1, static_cast<long long>(position));
    return binned;
}

// Adds K classes from c on to their bins, and moves them in x. The probability of a class is x * scale. The loop has the code
// for four classes, as that for all would take a minute to compile.
template <int K>
CALSEG_INLINE void add_classes(Bins& bins, const CalibrationLaunch& launch, int32_t label, int c, float (&x)[K], float scale, bool binned) {
    constexpr int kAtOnce = 4;
    const int first = static_cast<int>(launch.args.spec.first_class), C = static_cast<int>(launch.args.shape.C), end = c + K;
#pragma unroll 1
    for (; c < C && c < end; c += kAtOnce) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
            if (c + j >= first && c + j < C) bins.add(c + j - first, x[j] * scale, label == c + j, binned);
#pragma unroll
        for (int j = 0; j + kAtOnce < K; ++j) x[j] = x[j + kAtOnce];
    }
}

// Kernel whose threads hold K classes of V voxels at once. From is the type in which the scores are stored.
template <class From, int K, int V, bool kLogits, bool kClassWise>
__global__ void __launch_bounds__(kCudaThreads, kCudaResident) calibration_bins(const CalibrationLaunch launch) {
    const From missing = kLogits ? minus_infinity(From()) : From();
    const int C = static_cast<int>(launch.args.shape.C);
    const int64_t S = launch.args.shape.S;
    const int64_t group = blockIdx.x / launch.blocks_per_group, block = blockIdx.x % launch.blocks_per_group;
    Bins bins(launch, launch.args.sums + group * 3 * launch.bins);
    Totals totals;
    bins.clear();

    int64_t tile = block * launch.tiles_per_group / launch.blocks_per_group;
    const int64_t end = (block + 1) * launch.tiles_per_group / launch.blocks_per_group;
    int64_t n = group + tile / launch.tiles_per_item, of_item = tile % launch.tiles_per_item;
    for (; tile < end; ++tile) {
        const int64_t first = of_item * (V * kCudaThreads) + threadIdx.x;
        float x[V][K];
        if constexpr (V > 1) load_scores(x, launch, n, first, 0, missing);
        int32_t label[V];
        load_classes(label, launch, n, first);
        // The loop has the code for two voxels, as that for all would take a minute to compile.
        constexpr int kAtOnce = V > 1 ? 2 : 1;
        int64_t position = n * S + first;
#pragma unroll 1
        for (int done = 0; done < V; done += kAtOnce) {
#pragma unroll
            for (int v = 0; v < kAtOnce; ++v, position += kCudaThreads) {
                Fold<kLogits> fold;
                if constexpr (V > 1) {
                    fold.add(label[v], 0, C, x[v]);
                } else {
#pragma unroll 1
                    for (int c = 0; c < C; c += K) {
                        load_scores(x, launch, n, first, c, missing);
                        fold.add(label[v], c, C, x[v]);
                    }
                }
                const auto sums = fold.result();
                const float confidence = sums.confidence();
                const bool binned = add_totals(totals, launch, sums, confidence, label[v], position);
                if constexpr (!kClassWise) {
                    bins.add(0, confidence, label[v] == sums.top, binned);
                } else {
                    for (int c = 0; c < C; c += K) {
                        if constexpr (V == 1)
                            if (C > K) {  // the thread does not hold all classes, so it reads them again
                                load_scores(x, launch, n, first, c, missing);
                                if constexpr (kLogits) {
                                    for (auto& each : x[v]) each -= fold.shift();
                                    exp_nonpositive(x[v]);
                                }
                            }
                        add_classes(bins, launch, label[v], c, x[v], kLogits ? confidence : 1.0f, binned);
                    }
                }
            }
#pragma unroll
            for (int v = 0; v + kAtOnce < V; ++v) {
                label[v] = label[v + kAtOnce];
#pragma unroll
                for (int j = 0; j < K; ++j) x[v][j] = x[v + kAtOnce][j];
            }
        }
        if (++of_item == launch.tiles_per_item) of_item = 0, ++n;
    }
    totals.finish(launch.args.totals + group * kTotals);  // has the barrier that bins.finish() needs
    bins.finish();
}

// ---- launch, on the host ----

using Function = void (*)(CalibrationLaunch);

template <class From, int K>
Function kernel_of(const BinsArgs& a) {
    constexpr int V = voxels_held(K);
    if (a.spec.class_wise) return a.spec.from_logits ? calibration_bins<From, K, V, true, true> : calibration_bins<From, K, V, false, true>;
    return a.spec.from_logits ? calibration_bins<From, K, V, true, false> : calibration_bins<From, K, V, false, false>;
}

template <class From>
Function kernel_of(const CalibrationLaunch& launch) {
    return launch.classes_held == 4 ? kernel_of<From, 4>(launch.args) : kernel_of<From, 16>(launch.args);
}

Function kernel_of_dtype(const CalibrationLaunch& launch) {
    switch (launch.args.scores.dtype) {
        case DType::bf16:
            return kernel_of<BF16>(launch);
        case DType::f16:
            return kernel_of<F16>(launch);
        default:
            return kernel_of<float>(launch);
    }
}

}  // namespace
}  // namespace CALSEG_ISA

void cuda_calibration_bins(const BinsArgs& args, int64_t* faults, int device, void* stream) {
    using namespace CALSEG_ISA;
    const Caller cuda("calibration_bins on CUDA", device);
    const CudaLimits limits{cuda.attribute(cudaDevAttrMultiProcessorCount), cuda.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                            cuda.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    CalibrationLaunch launch = calibration_launch(args, limits);
    launch.faults = faults;
    const auto kernel = kernel_of_dtype(launch);
    // Set the same value in every call, because the call of another thread may come between this line and the launch.
    cuda.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits.shared_per_block)));
    int resident = 0;
    cuda.check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kCudaThreads, launch.shared_bytes));
    set_blocks(launch, limits, resident);
    if (launch.blocks() == 0) return;
    cuda.launch(kernel, launch.blocks(), kCudaThreads, launch.shared_bytes, stream, launch);
}

}  // namespace calseg
