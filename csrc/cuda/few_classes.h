// What the kernels of two to four classes share: the labels and the numbers of the voxels of a thread, and their softmax.
//
// With so few bytes a voxel, the instructions count. A thread has four or eight adjacent voxels, which are 16 bytes of each
// class, or several groups of them, and holds them in registers. One logarithm of a product stands for the logarithms of all
// voxels of a thread. One comparison finds whether any of their labels is not a class, which is rare.
#pragma once

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

// Places of the groups of V adjacent voxels that a thread has, in an item. A group past the last one is that one again.
template <int V, int kGroups>
struct Groups {
    int64_t first;  // first voxel of the block
    int last;       // place of the last group, from there on

    explicit CALSEG_MEMBER Groups(const BlockTile& tile) : first(tile.first), last(tile.voxels - V) {}

    CALSEG_MEMBER int at(int g) const { return (g * kFewThreads + static_cast<int>(threadIdx.x)) * V; }
    CALSEG_MEMBER bool is_past(int g) const { return at(g) > last; }
    CALSEG_MEMBER int64_t operator[](int g) const { return first + (is_past(g) ? last : at(g)); }
};

// Labels of groups of adjacent voxels. If there are several groups, those past the last one are skipped.
template <int V, int C, int kGroups = 1>
class AdjacentLabels {
    static constexpr int kVoxels = kGroups * V;
    static_assert(C >= kFewLeast && C <= kFewMost, "a class is a number of one or two bits");
    static_assert(kVoxels <= 32, "a voxel has a bit of a word");

 public:
    uint32_t skipped = 0, no_class = 0;  // the voxels of which this is true, a bit each

    CALSEG_MEMBER AdjacentLabels(const TensorView& from, const LabelRange& range, int64_t n, const Groups<V, kGroups>& groups) {
        switch (range.bytes) {
            case 1:
                read(static_cast<const uint8_t*>(from.data) + n * from.stride_n, range, groups);
                break;
            case 2:
                read(static_cast<const uint16_t*>(from.data) + n * from.stride_n, range, groups);
                break;
            case 4:
                read(static_cast<const uint32_t*>(from.data) + n * from.stride_n, range, groups);
                break;
            default:
                read(static_cast<const uint64_t*>(from.data) + n * from.stride_n, range, groups);
        }
    }

    // Returns whether the label of a voxel is class c. A voxel without a class has label 0.
    CALSEG_MEMBER bool is(int v, int c) const {
        if (C == 2) return (bytes_[v / 4] & 1u << v % 4 * 8) != 0 ? c == 1 : c == 0;
        return (bytes_[v / 4] >> v % 4 * 8 & 0xffu) == static_cast<uint32_t>(c);
    }

    // Computes how many voxels each class has.
    CALSEG_MEMBER void count(int (&n)[C]) const {
        constexpr uint32_t kOnes = 0x01010101u;
        uint32_t low = 0, high = 0, both = 0;  // sums over the words: how often a bit of a label is set
#pragma unroll
        for (int i = 0; i < kVoxels / 4; ++i) {
            low += bytes_[i] & kOnes;
            high += bytes_[i] >> 1 & kOnes;
            both += bytes_[i] & bytes_[i] >> 1 & kOnes;
        }
        const auto total = [&](uint32_t bytes) { return static_cast<int>(bytes * kOnes >> 24); };
        const int first = total(low), second = C > 2 ? total(high) : 0, third = C > 3 ? total(both) : 0;
        n[0] = kVoxels - (first + second - third);
        n[1] = first - third;
        if constexpr (C > 2) n[2] = second - third;
        if constexpr (C > 3) n[3] = third;
        if (skipped | no_class) n[0] -= __popc(skipped | no_class);
    }

 private:
    template <class Label>
    CALSEG_MEMBER void read(const Label* from, const LabelRange& range, const Groups<V, kGroups>& groups) {
        constexpr int kBytes = sizeof(Label), kWords = V * kBytes / 4, kAtOnce = kWords < 4 ? kWords : 4;
        constexpr int kBits = kBytes < 4 ? 8 * kBytes : 32;  // bits of a word that are of one label
        constexpr uint32_t kFirstByte = 0xffu * (0xffffffffu / (0xffffffffu >> (32 - kBits))), kClass = C == 2 ? 1 : 3;
        struct alignas(4 * kAtOnce) Words {
            uint32_t words[kAtOnce];
        };
        uint32_t others = range.ignores_class;  // bits that no class has, of all labels; not 0 if one need be looked at
        // Registers hold the labels of all groups if they are bytes. Else there is a loop over the groups.
#pragma unroll(kBytes == 1 ? kGroups : 1)
        for (int g = 0; g < kGroups; ++g) {
            Words parts[kWords / kAtOnce];
            uint32_t bytes[V / 4];
#pragma unroll
            for (int i = 0; i < kWords / kAtOnce; ++i) parts[i] = reinterpret_cast<const Words*>(from + groups[g])[i];
            const auto word = [&](int i) { return parts[i / kAtOnce].words[i % kAtOnce]; };
            const auto byte = [&](int v) { return word(v * kBytes / 4) >> v * kBits % 32 & 0xffu; };
#pragma unroll
            for (int i = 0; i < kWords; ++i) others |= kBytes == 8 && i % 2 ? word(i) : word(i) & ~kFirstByte;
#pragma unroll
            for (int i = 0; i < V / 4; ++i)
                bytes[i] = kBytes == 1 ? word(i) : byte(4 * i) | byte(4 * i + 1) << 8 | byte(4 * i + 2) << 16 | byte(4 * i + 3) << 24;
            append(bytes);
            if (kGroups > 1) others |= groups.is_past(g);
        }
#pragma unroll
        for (int i = 0; i < kVoxels / 4; ++i) {
            others |= bytes_[i] & ~(kClass * 0x01010101u);
            if (C == 3) others |= bytes_[i] & bytes_[i] >> 1 & 0x01010101u;
        }
        if (others != 0) set_any(from, range, groups);
    }

    // Sets labels that need not be classes, given their lower bytes. It reads wider ones again, one by one.
    template <class Label>
    CALSEG_MEMBER void set_any(const Label* from, const LabelRange& range, const Groups<V, kGroups>& groups) {
#pragma unroll 1
        for (int i = 0; i < kVoxels / 4; ++i) {
            const int g = i / (V / 4);
            const volatile Label* const four = from + (groups[g] + i * 4 % V);  // volatile: no register holds them until here
            uint32_t word[1] = {0};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint64_t bits = sizeof(Label) == 1 ? bytes_[0] >> 8 * j & 0xffu : four[j];
                const int32_t label = kGroups > 1 && groups.is_past(g) ? kSkipped : class_of(bits, range);
                if (label >= 0) word[0] |= static_cast<uint32_t>(label) << 8 * j;
                skipped |= static_cast<uint32_t>(label == kSkipped) << (4 * i + j);
                no_class |= static_cast<uint32_t>(label == kNoClass) << (4 * i + j);
            }
            append(word);
        }
    }

    // Moves the labels to lower places, and sets the last ones. So a loop needs no places that are not constants.
    template <int K>
    CALSEG_MEMBER void append(const uint32_t (&bytes)[K]) {
#pragma unroll
        for (int i = 0; i < kVoxels / 4; ++i) bytes_[i] = i + K < kVoxels / 4 ? bytes_[i + K] : bytes[i + K - kVoxels / 4];
    }

    uint32_t bytes_[kVoxels / 4] = {};  // a byte for each label
};

// Softmax of a voxel: e = exp(logit - max), the sum of e, and the label's logit - max.
template <int C>
struct FewSoftmax {
    float e[C], sum, label_d;

    CALSEG_MEMBER FewSoftmax(const float (&x)[C], const bool (&is_label)[C]) {
        float top = x[0];
#pragma unroll
        for (int c = 1; c < C; ++c) top = fmaxf(x[c], top);  // where x is NaN, so is the sum below
#pragma unroll
        for (int c = 0; c < C; ++c) e[c] = x[c] - top;
        label_d = e[0];
#pragma unroll
        for (int c = 1; c < C; ++c) label_d = is_label[c] ? e[c] : label_d;
        exp_nonpositive(e);
        sum = e[0];
#pragma unroll
        for (int c = 1; c < C; ++c) sum += e[c];
    }
};

// Sum of the losses of up to 32 voxels: the logarithm of the product of their sums of exponentials, which are in [1, C], less
// the sum of their label_d.
struct FewLosses {
    float product = 1.0f, label_d = -0.0f;  // what is added to -0 stays the same, so the compiler need not add it

    template <int C>
    CALSEG_MEMBER void add(const FewSoftmax<C>& softmax) {
        product *= softmax.sum;
        label_d += softmax.label_d;
    }
    CALSEG_MEMBER float loss() const { return log_positive(product) - label_d; }
};

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

    // Loads the voxels from s on. Where the gradient is written in place of the logits, a thread past the end may read what
    // another one has written: it does not use it.
    CALSEG_MEMBER void load(const Scores& from, int64_t n, int64_t s) {
#pragma unroll
        for (int i = 0; i < C; ++i) vectors[i] = *place(from, n, s, i);
    }

    // Stores the voxels of a group, unless it is past the last one. Of rows, the lanes of a warp do so together, for the vectors
    // that they store at the same time must be adjacent: they hand them round in `of_warps`, shared memory.
    CALSEG_MEMBER void store(const Scores& to, int64_t n, const Groups<V, 1>& group, unsigned char* of_warps) const {
        if constexpr (!kRows) {
            if (group.is_past(0)) return;
#pragma unroll
            for (int i = 0; i < C; ++i) *place(to, n, group[0], i) = vectors[i];
        } else {
            Vector* const of_warp = reinterpret_cast<Vector*>(of_warps) + warp() * kFewSlots<C>;
            if (!group.is_past(0))
#pragma unroll
                for (int i = 0; i < C; ++i) of_warp[slot(lane() * C + i)] = vectors[i];
            __syncwarp();
            const int first = group.at(0) - lane() * V, left = group.last + V - first;
            const int count = left < kCudaWarp * V ? left / V * C : kCudaWarp * C;  // of vectors
            Vector* const rows = place(to, n, group.first + first, 0) + lane();
#pragma unroll
            for (int i = 0; i < kCudaWarp * C; i += kCudaWarp)
                if (i + lane() < count) rows[i] = of_warp[slot(i + lane())];
        }
    }

    // Replaces all numbers of the voxels that have a bit in `which`: by `first` in class 0, by x in the others.
    CALSEG_MEMBER void replace(uint32_t which, float first, float x) {
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (which >> v & 1)
#pragma unroll
                for (int c = 0; c < C; ++c) vectors[vector_of(v, c)].set(place_of(v, c), c == 0 ? first : x);
    }

    // Calls each(x, is_label) for every voxel, with its numbers and whether a class is its label. `labels` are those of
    // several groups, of which these voxels are one. A voxel that is skipped gets logits whose loss is 0, and one without a
    // class NaN. What `each` makes of the numbers takes their place, and 0 where the voxel is skipped.
    template <int kGroups, class Each>
    CALSEG_MEMBER void for_voxels(const AdjacentLabels<V, C, kGroups>& labels, int group, const Each& each) {
        if (labels.skipped | labels.no_class) {
            replace(labels.skipped >> group * V, 0.0f, -INFINITY);
            replace(labels.no_class >> group * V, NAN, NAN);
        }
        float x[C][V];
#pragma unroll
        for (int i = 0; i < C; ++i) vectors[i].read(x[i]);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float of_voxel[C];
            bool is_label[C];
#pragma unroll
            for (int c = 0; c < C; ++c) of_voxel[c] = x[vector_of(v, c)][place_of(v, c)], is_label[c] = labels.is(group * V + v, c);
            each(of_voxel, is_label);
#pragma unroll
            for (int c = 0; c < C; ++c) x[vector_of(v, c)][place_of(v, c)] = of_voxel[c];
        }
#pragma unroll
        for (int i = 0; i < C; ++i) vectors[i].write(x[i]);
        if (labels.skipped) replace(labels.skipped >> group * V, 0.0f, 0.0f);  // it is NaN if the upstream gradient is infinite
    }

 private:
    // Returns the place of vector i of a warp in shared memory. With a gap after every eight, no two lanes that read at the
    // same time use one memory bank, where C is even.
    static CALSEG_MEMBER int slot(int i) { return C % 2 ? i : i + i / 8; }

    // Return the place of a class of a voxel: its vector, and where it is in that.
    static CALSEG_MEMBER int vector_of(int v, int c) { return kRows ? (v * C + c) / V : c; }
    static CALSEG_MEMBER int place_of(int v, int c) { return kRows ? (v * C + c) % V : v; }
};

// ---- launch, on the host ----

using FewKernel = void (*)(CrossEntropyLaunch);

template <template <class From, int C, bool kRows> class Kernel, class From, int C>
FewKernel few_kernel(const CrossEntropyLaunch& launch) {
    return launch.in_rows ? Kernel<From, C, true>::kernel : Kernel<From, C, false>::kernel;
}

template <template <class From, int C, bool kRows> class Kernel, class From>
FewKernel few_kernel(const CrossEntropyLaunch& launch) {
    const int64_t C = launch.args.shape.C;
    return C == 2   ? few_kernel<Kernel, From, 2>(launch)
           : C == 3 ? few_kernel<Kernel, From, 3>(launch)
                    : few_kernel<Kernel, From, 4>(launch);
}

// Launches the kernel for the logits, of those in Kernel<From, C, kRows>. From is the type in which they are stored.
template <template <class From, int C, bool kRows> class Kernel>
void launch_few(const CrossEntropyLaunch& launch, int device, void* stream) {
    const Caller cuda("cross_entropy on CUDA", device);
    if (launch.blocks() == 0) return;
    const DType dtype = launch.args.tensors.logits.dtype;
    const FewKernel kernel = dtype == DType::bf16  ? few_kernel<Kernel, BF16>(launch)
                             : dtype == DType::f16 ? few_kernel<Kernel, F16>(launch)
                                                   : few_kernel<Kernel, float>(launch);
    cuda.launch(kernel, launch.blocks(), kFewThreads, launch.shared_bytes, stream, launch);
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
