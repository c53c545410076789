// CUDA kernels of Dice and cross_entropy with one-hot labels, for logits of 16 bits and five or more classes, where the voxels
// of a class are adjacent.
//
// There are two passes, as in kernels/overlap_few.cu: the losses and the sums of the overlap, and then the gradient, given
// that of the sums. There are no class weights and no label smoothing.
//
// Least memory traffic: in each pass one read of the logits and of the labels, and in the second one write of the gradient.
//
// A number of 16 bits takes a GPU as long as about 14 instructions to read, and as long as 28 to read and write. So a block
// copies its logits to shared memory, 16 bytes a thread at once, and a thread computes the softmax of four adjacent
// voxels. For the sums over voxels the threads change roles: a warp takes two classes of all voxels there, and its lanes are
// added up once. What depends on the label is done once for a voxel, not for each class.
#include "cuda/caller.h"
#include "cuda/cross_entropy.h"
#include "cuda/device.h"
#include "cuda/numbers.h"
#include "cuda/plan.h"
#include "cuda/scalar.h"
#include "cuda/thread.h"
#include "voxel/vectors.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Least number of blocks whose registers must fit a multiprocessor at once.
constexpr int tile_blocks(int parts) { return parts == 4 ? 8 : 10; }
constexpr int kUnrolledClasses = 4;  // that the walk over the classes of a voxel has in one round of its loop
constexpr int kTogether = 4;         // adjacent voxels of which a thread computes the softmax at once
constexpr int kLaneVoxels = kPartVoxels / kCudaWarp;
constexpr int kWarpRounds = 2;  // of labels that a warp adds up together
constexpr int kTileWarps = kTileThreads / kCudaWarp;
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Read and store numbers of adjacent voxels in shared memory.
template <int K>
CALSEG_INLINE void read_numbers(const float* from, float (&x)[K]) {
#pragma unroll
    for (int i = 0; i < K; i += 4) {
        const Adjacent<float, 4> four = *reinterpret_cast<const Adjacent<float, 4>*>(from + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[i + j] = four.words[j];
    }
}
CALSEG_INLINE void store_numbers(const float (&x)[4], float* to) {
    Adjacent<float, 4> four;
    four.write(x);
    *reinterpret_cast<Adjacent<float, 4>*>(to) = four;
}

// ---- the labels ----

// Classes of the kVoxels voxels that are in shared memory, or kSkipped or kNoClass, a byte each. They are the bits of numbers,
// of which every kStride-th is that of a group. A thread has its own groups.
template <int kVoxels, int kStride>
class TileLabels {
    static_assert(kTogether == 4 && kTileMost <= 128, "a word has the labels of a group");

 public:
    CALSEG_MEMBER TileLabels(const CrossEntropyLaunch& launch, float* numbers)
        : tensor_(launch.args.spec.labels.tensor), range_(launch.labels), numbers_(numbers) {}

    // Reads the labels from voxel `first` of a block on. A voxel past the end is skipped.
    CALSEG_MEMBER void load(const BlockTile& tile, int first) const {
        switch (range_.bytes) {
            case 1:
                read(static_cast<const uint8_t*>(tensor_.data), tile, first);
                break;
            case 2:
                read(static_cast<const uint16_t*>(tensor_.data), tile, first);
                break;
            case 4:
                read(static_cast<const uint32_t*>(tensor_.data), tile, first);
                break;
            default:
                read(static_cast<const uint64_t*>(tensor_.data), tile, first);
        }
    }

    // Returns the labels of the group that begins with voxel v.
    CALSEG_MEMBER uint32_t operator[](int v) const { return bits_of_float(*place(v)); }

 private:
    CALSEG_MEMBER float* place(int v) const { return numbers_ + static_cast<unsigned>(v) / kTogether * kStride; }

    // The labels of a group, as memory holds them.
    template <class Label>
    struct alignas(sizeof(Label) < sizeof(uint64_t) ? kTogether * sizeof(Label) : kCopyBytes) Group {
        uint32_t words[sizeof(Label)];

        CALSEG_MEMBER uint64_t bits(int j) const {
            constexpr int kBits = 8 * sizeof(Label);
            if constexpr (kBits == 64) return words[2 * j] | static_cast<uint64_t>(words[2 * j + 1]) << 32;
            else return words[j * kBits / 32] >> j * kBits % 32 & 0xffffffffu >> (32 - kBits);
        }
    };

    template <class Label>
    CALSEG_MEMBER void read(const Label* from, const BlockTile& tile, int first) const {
        constexpr int kStep = kTileThreads * kTogether, kGroups = (kVoxels + kStep - 1) / kStep, kAtOnce = sizeof(Label) == 1 ? kGroups : 1;
        const int begin = static_cast<int>(threadIdx.x) * kTogether, end = tile.voxels - first;
        const Label* const dense = from + (tile.n * tensor_.stride_n + tile.first + first + begin);
        // Registers hold the labels of all groups if they are bytes. Else there is a loop over the groups.
#pragma unroll 1
        for (int i = 0; i < kGroups; i += kAtOnce) {
            Group<Label> groups[kAtOnce] = {};
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
                if (begin + (i + j) * kStep < end) groups[j] = *reinterpret_cast<const Group<Label>*>(dense + (i + j) * kStep);
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const int v = begin + (i + j) * kStep;
                if (v < kVoxels) *place(v) = float_of_bits(v < end ? classes_of(groups[j]) : 0xffffffffu);
            }
        }
    }

    // Returns the classes of a group. Those of bytes that are classes need not be looked at one by one.
    template <class Label>
    CALSEG_MEMBER uint32_t classes_of(const Group<Label>& group) const {
        constexpr uint32_t kOnes = 0x01010101u, kHighest = 0x80 * kOnes;
        const uint32_t word = group.words[0], least = 0x80 - static_cast<uint32_t>(range_.classes);
        const bool are_classes = sizeof(Label) == 1 && ((word | (word + least * kOnes)) & kHighest) == 0 && !range_.ignores_class;
        return are_classes ? word : classes_unusual(group);
    }

    template <class Label>
    CALSEG_MEMBER uint32_t classes_unusual(const Group<Label>& group) const {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) word |= (static_cast<uint32_t>(class_of(group.bits(j), range_)) & 0xffu) << 8 * j;
        return word;
    }

    const TensorView& tensor_;
    const LabelRange& range_;
    float* const numbers_;
};

// ---- the logits ----

// kParts parts of kPartVoxels voxels in shared memory, [kParts][C][kPartVoxels]. Later the gradients lie there.
template <class From, int kParts>
class TilePlanes {
 public:
    using Group = Adjacent<From, kTogether>;
    using Vector = Adjacent<From, kLaneVoxels>;
    static_assert(sizeof(Vector) == kCopyBytes);

    explicit CALSEG_MEMBER TilePlanes(const CrossEntropyLaunch& launch)
        : data_(reinterpret_cast<From*>(shared_memory() + launch.rows_offset)), C_(static_cast<int>(launch.args.shape.C)) {}

    // Returns the place of voxel v of those in shared memory, in the first class. Those of other classes are kPartVoxels apart.
    CALSEG_MEMBER From* at(int v) const {
        const auto part = static_cast<int>(static_cast<unsigned>(v) / kPartVoxels);
        return data_ + (part * (C_ - 1) * kPartVoxels + v);
    }
    // Returns the vector of a lane in a class.
    CALSEG_MEMBER Vector* vector(int part, int c) const {
        return reinterpret_cast<Vector*>(data_ + ((part * C_ + c) * kPartVoxels + lane() * kLaneVoxels));
    }

    // Begins to copy the logits from voxel `first` of a block on.
    CALSEG_MEMBER void load(const Scores& logits, const BlockTile& tile, int first) const {
        for_vectors(logits, tile, first, [](Vector* dense, Vector* own) { copy_16_bytes(own, dense); });
    }
    // Writes the gradient in the same places.
    CALSEG_MEMBER void store(const Scores& gradient, const BlockTile& tile, int first) const {
        for_vectors(gradient, tile, first, [](Vector* dense, Vector* own) { *dense = *own; });
    }

    // Calls body(c, group) for every class, with its numbers of adjacent voxels from number v on.
    template <class Body>
    CALSEG_MEMBER void walk(int v, const Body& body) const {
        constexpr int kGroups = kPartVoxels / kTogether;
        Group* place = reinterpret_cast<Group*>(at(v));
        int c = 0;
#pragma unroll 1
        for (; c + kUnrolledClasses <= C_; c += kUnrolledClasses) {
#pragma unroll
            for (int j = 0; j < kUnrolledClasses; ++j) body(c + j, place[j * kGroups]);
            place += kUnrolledClasses * kGroups;
        }
#pragma unroll 1
        for (; c < C_; ++c) {
            body(c, *place);
            place += kGroups;
        }
    }

    // Sets the numbers of voxel v to 0.
    CALSEG_MEMBER void clear(int v) const {
#pragma unroll 1
        for (int c = 0; c < C_; ++c) narrow(0.0f, at(v)[c * kPartVoxels]);
    }

 private:
    // Calls each(dense, own) for the vectors that lie in a tensor from voxel `first` of a block on, and their places here. A
    // warp has one part, and several warps share its classes.
    template <class Each>
    CALSEG_MEMBER void for_vectors(const Scores& tensor, const BlockTile& tile, int first, const Each& each) const {
        constexpr int kStep = kTileWarps / kParts;
        const int part = warp() % kParts, v = first + part * kPartVoxels + lane() * kLaneVoxels;
        if (v >= tile.voxels) return;
        int c = warp() / kParts;
        From* dense = static_cast<From*>(tensor.data) + (tile.n * tensor.stride_n + c * tensor.stride_c + tile.first + v);
        const int64_t step = kStep * tensor.stride_c;
        Vector* own = vector(part, c);
#pragma unroll 1
        for (; c + 3 * kStep < C_; c += 4 * kStep) {
#pragma unroll
            for (int j = 0; j < 4; ++j, dense += step) each(reinterpret_cast<Vector*>(dense), own + j * kStep * kCudaWarp);
            own += 4 * kStep * kCudaWarp;
        }
#pragma unroll 1
        for (; c < C_; c += kStep, dense += step, own += kStep * kCudaWarp) each(reinterpret_cast<Vector*>(dense), own);
    }

    From* const data_;
    const int C_;
};

// ---- the softmax ----

// Computes exp(x - largest) for adjacent voxels, where `shift` is the largest logit in units of -ln 2. A product and a sum are
// rounded once. The shift is rounded too, but as it is the same for all classes, that has no effect on a probability.
template <int K>
CALSEG_INLINE void exp_of_logits(float (&x)[K], const float (&shift)[K]) {
#pragma unroll
    for (int i = 0; i < K; ++i) x[i] = exp2_flushed(fmaf(x[i], kLog2e, shift[i]));
}

// Softmax of adjacent voxels. A voxel that is skipped has a factor of 0, and so no probability, and one without a class NaN.
template <class From, int kParts>
struct GroupSoftmax {
    using Planes = TilePlanes<From, kParts>;
    using Group = typename Planes::Group;

    int32_t label[kTogether];
    bool is_usual;             // whether all labels are classes
    unsigned skipped = 0;      // number of voxels
    float shift[kTogether];    // largest logit in units of -ln 2
    float others[kTogether];   // sum of e = exp(logit - largest) over the classes that are not the label
    float label_d[kTogether];  // the label's logit less the largest, in units of ln 2
    float label_e[kTogether];  // exp(logit - largest) of the label
    float sum[kTogether];      // of e over all classes; 1 where skipped
    float factor[kTogether];   // 1 / sum

    // Computes it for those in shared memory from voxel v on. The logits of the labels become -inf, and those of skipped voxels
    // 0. It calls add(c, e) for every class, where e is 0 if it is the label.
    template <class Labels, class Add>
    CALSEG_MEMBER GroupSoftmax(const Planes& planes, const Labels& labels, int v, const Add& add) {
        const uint32_t word = labels[v];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) label[j] = static_cast<int8_t>(word >> 8 * j);
        is_usual = (word & 0x80808080u) == 0;
        if (!is_usual) clear_unusual(planes, v);
        Group largest;
        float top[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) top[j] = -INFINITY;
        largest.write(top);
        planes.walk(v, [&](int, const Group& place) {  // where a logit is NaN, so is the sum below
            const Group group = place;
#pragma unroll
            for (int i = 0; i < kTogether / 2; ++i) largest.words[i] = larger_pair(From(), group.words[i], largest.words[i]);
        });
        largest.read(top);
        float size = 0.0f;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) size = fmaxf(size, fabsf(top[j]));
        if (size > kLargest) subtract_unusual(planes, v, top);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            From* const place = label_place(planes, v, j);
            shift[j] = top[j] * -kLog2e;
            label_d[j] = fmaf(widened(*place), kLog2e, shift[j]);
            others[j] = 0.0f;
            narrow(-INFINITY, *place);
        }
        planes.walk(v, [&](int c, const Group& place) {
            const Group group = place;
            float x[kTogether];
            group.read(x);
            exp_of_logits(x, shift);
#pragma unroll
            for (int j = 0; j < kTogether; ++j) others[j] += x[j];
            add(c, x);
        });
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            label_e[j] = exp2_flushed(label_d[j]);
            sum[j] = others[j] + label_e[j];
            factor[j] = reciprocal(sum[j]);
        }
        if (!is_usual) replace_unusual();
    }

    // Returns the place of the label of voxel v + j. A voxel without a class has that of class 0.
    CALSEG_MEMBER From* label_place(const Planes& planes, int v, int j) const { return planes.at(v) + (class_or_0(j) * kPartVoxels + j); }
    CALSEG_MEMBER int class_or_0(int j) const { return label[j] < 0 ? 0 : label[j]; }

    // Clears skipped voxels in shared memory.
    CALSEG_MEMBER void clear_unusual(const Planes& planes, int v) {
        skipped = 0;
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
            if (label[j] == kSkipped) planes.clear(v + j), ++skipped;
    }

 private:
    static constexpr float kLargest = 0x1p126f;  // products of larger logits and log2(e) may be infinite

    CALSEG_MEMBER void replace_unusual() {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            if (label[j] == kNoClass) sum[j] = factor[j] = NAN;
            if (label[j] == kSkipped) sum[j] = 1.0f, factor[j] = label_d[j] = 0.0f;
        }
    }

    // Subtracts the largest logit of a voxel from those in shared memory, if it is above kLargest. Differences that 16 bits
    // cannot hold are so large then that their exponentials are 0.
    CALSEG_MEMBER void subtract_unusual(const Planes& planes, int v, float (&top)[kTogether]) const {
        float by[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            by[j] = fabsf(top[j]) > kLargest ? top[j] : 0.0f;
            top[j] -= by[j];
        }
        planes.walk(v, [&](int, Group& group) {
            float x[kTogether];
            group.read(x);
#pragma unroll
            for (int j = 0; j < kTogether; ++j) x[j] -= by[j];
            group.write(x);
        });
    }
};

// ---- the sums of the overlap ----

// Sums over the voxels of a block, in shared memory. The label of a voxel is 1 in one class, where |p - Y| is 1 - p, and else 0.
//
// What depends on the label are sums of integers, which are the same in any order: the numbers of voxels, and of 1 - p, which
// is a whole number of units of 2^-21 and a rest in units of 2^-42.
class TileSums {
    static constexpr float kUnits = 0x1p21f, kWhole = 0x1p23f, kRest = 0x1.8p23f;
    static_assert(kTileVoxels <= 1024, "32 bits hold the sums of that many numbers of up to 2^21");
    static_assert(kTogether <= 4, "and 24 bits those of a thread");

    // The number of voxels, the units and the rests. Their sums are kept modulo 2^32.
    struct Integers {
        uint32_t words[3];

        // `miss` is the sum of 1 - p. A number that is added to 2^23 is rounded to an integer, which its lower bits hold.
        CALSEG_MEMBER Integers(uint32_t count, float miss) {
            const float whole = fmaf(miss, kUnits, kWhole), rest = fmaf(fmaf(miss, kUnits, kWhole - whole), kUnits, kRest);
            words[0] = count, words[1] = bits_of_float(whole) - bits_of_float(kWhole),
            words[2] = bits_of_float(rest) - bits_of_float(kRest);
        }
    };

 public:
    explicit CALSEG_MEMBER TileSums(const CrossEntropyLaunch& launch)
        : C_(static_cast<int>(launch.args.shape.C)),
          wrong_(reinterpret_cast<float*>(shared_memory() + launch.sums_offset)),
          of_labels_(reinterpret_cast<uint32_t*>(wrong_ + C_)) {}

    // Sets them to 0. A barrier must follow.
    CALSEG_MEMBER void reset() const {
        static_assert(kTileMost <= kTileThreads, "a thread has one class at most");
        const int c = static_cast<int>(threadIdx.x);
        if (c >= C_) return;
        wrong_[c] = 0.0f;
#pragma unroll
        for (int i = 0; i < kWords; ++i) of_labels_[i * C_ + c] = 0;
    }

    // Adds the labels of the voxels that a thread has at once. All threads of a warp must call it.
    template <class Softmax>
    CALSEG_MEMBER void add_labels(const Softmax& softmax) const {
        int32_t label[kTogether];
        float miss[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) label[j] = softmax.label[j], miss[j] = softmax.others[j] * softmax.factor[j];
        // In each of the first rounds, the warp takes the class of its first voxel that is left, and adds up all of its voxels
        // of that class. After these, each thread adds its own.
#pragma unroll 1
        for (int round = 0; round < kWarpRounds; ++round) {
            int32_t any = label[0];
#pragma unroll
            for (int j = 1; j < kTogether; ++j) any = any < label[j] ? label[j] : any;
            const unsigned left = __ballot_sync(kAllLanes, any >= 0);
            if (left == 0) return;
            const int32_t of = __shfl_sync(kAllLanes, any, __ffs(static_cast<int>(left)) - 1);
            uint32_t count = 0;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < kTogether; ++j)
                if (label[j] == of) ++count, sum += miss[j], label[j] = kSkipped;
            const Integers own(count, sum);
            uint32_t of_warp[kWords];
#pragma unroll
            for (int i = 0; i < kWords; ++i) of_warp[i] = __reduce_add_sync(kAllLanes, own.words[i]);
            const int i = lane();
            if (i < kWords) atomicAdd(of_labels_ + (i * C_ + of), i == 0 ? of_warp[0] : i == 1 ? of_warp[1] : of_warp[2]);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
            if (label[j] >= 0) add_unusual(label[j], Integers(1, miss[j]));
    }

    // Adds p of the classes that are not the label, given the logits in shared memory, and the shift and the factor of each voxel
    // there. All threads of a block must call it.
    template <class From, int kParts>
    CALSEG_MEMBER void add_wrong(const TilePlanes<From, kParts>& planes, const float* shifts, const float* factors) const {
        using Vector = typename TilePlanes<From, kParts>::Vector;
#pragma unroll 1
        for (int c = 2 * warp(); c < C_; c += 2 * kTileWarps) {  // if C is odd, the last pair has the last class twice
            const Vector* place = planes.vector(0, c);
            const int other = c + 1 < C_ ? kCudaWarp : 0;
            float sums[2] = {};
#pragma unroll 1
            for (int part = 0; part < kParts; ++part) {
                const int v = part * kPartVoxels + lane() * kLaneVoxels;
                const Vector pair[2] = {place[0], place[other]};
                float shift[kLaneVoxels], factor[kLaneVoxels], x[kLaneVoxels];
                read_numbers(shifts + v, shift);
                read_numbers(factors + v, factor);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    pair[j].read(x);
                    exp_of_logits(x, shift);
#pragma unroll
                    for (int i = 0; i < kLaneVoxels; ++i) sums[j] = fmaf(x[i], factor[i], sums[j]);
                }
                place += C_ * kCudaWarp;
            }
            const float sum = sum_over_lanes(sums);
            const int own = c + lane() / (kCudaWarp / 2);
            if (lane() % (kCudaWarp / 2) == 0 && own < C_) wrong_[own] += sum;
        }
    }

    // Stores the sums of p + Y and of |p - Y| of every class.
    CALSEG_MEMBER void store(float* to) const {
        const int c = static_cast<int>(threadIdx.x);
        if (c >= C_) return;
        const uint32_t count = of_labels_[c], whole = of_labels_[C_ + c], rest = of_labels_[2 * C_ + c];
        const float units = static_cast<float>(whole) + static_cast<float>(static_cast<int32_t>(rest)) * (1.0f / kUnits);
        const float wrong = wrong_[c], miss = units * (1.0f / kUnits);
        to[kOverlapSums * c] = wrong + (static_cast<float>(2 * count) - miss);
        to[kOverlapSums * c + 1] = wrong + miss;
    }

 private:
    static constexpr int kWords = 3;

    CALSEG_MEMBER void add_unusual(int32_t label, const Integers& own) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) atomicAdd(of_labels_ + (i * C_ + label), own.words[i]);
    }

    const int C_;
    float* const wrong_;         // [C], each with one warp that adds to it
    uint32_t* const of_labels_;  // [kWords][C]
};

// Calls body(first) for the rounds in which a block has kParts parts of its voxels, from voxel `first` on.
template <int kParts, class Body>
CALSEG_INLINE void for_rounds(const BlockTile& tile, const Body& body) {
    constexpr int kAtOnce = kParts * kPartVoxels;
#pragma unroll 1
    for (int round = 0; round < kTileVoxels / kAtOnce; ++round) {
        if (round > 0 && round * kAtOnce >= tile.voxels) return;
        body(round * kAtOnce);
    }
}

// From is the type in which the logits are stored. There are kParts parts in shared memory at once.
template <class From, int kParts>
__global__ void __launch_bounds__(kTileThreads, tile_blocks(kParts)) overlap_tiles(const CrossEntropyLaunch launch) {
    constexpr int kAtOnce = kParts * kPartVoxels;
    const BlockTile tile(launch);
    const int thread = static_cast<int>(threadIdx.x);
    float* const of_warps = reinterpret_cast<float*>(shared_memory());  // [2][warps]
    float* const shift = reinterpret_cast<float*>(shared_memory() + launch.voxels_offset);
    float* const factor = shift + kAtOnce;
    const TilePlanes<From, kParts> planes(launch);
    const TileLabels<kAtOnce, kTogether> labels(launch, shift);  // until a thread writes the shifts of its voxels there
    const TileSums sums(launch);
    sums.reset();
    // The sum of the losses is the logarithm of the product of the sums of exponentials, less the sum of label_d.
    static_assert(kTileVoxels / kTileThreads <= 16, "a product of that many numbers in [1, kTileMost] is finite");
    float product = 1.0f, label_d = 0.0f;
    unsigned count = 0;
    for_rounds<kParts>(tile, [&](int first) {
        planes.load(launch.args.tensors.logits, tile, first);
        labels.load(tile, first);
        wait_for_copies();
        __syncthreads();
#pragma unroll 1
        for (int v = kTogether * thread; v < kAtOnce; v += kTogether * kTileThreads) {
            const GroupSoftmax<From, kParts> softmax(planes, labels, v, [](int, const float (&)[kTogether]) {});
            store_numbers(softmax.shift, shift + v);
            store_numbers(softmax.factor, factor + v);
            count += kTogether - softmax.skipped;
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                product *= softmax.sum[j];
                label_d += softmax.label_d[j];
            }
            sums.add_labels(softmax);
        }
        __syncthreads();
        sums.add_wrong(planes, shift, factor);
        __syncthreads();
    });
    sums.store(launch.overlap + static_cast<int64_t>(blockIdx.x) * (kOverlapSums * launch.args.shape.C));
    float loss[1] = {log_positive(product) - kLn2 * label_d};
    const float losses = sum_over_lanes(loss), counted = static_cast<float>(__reduce_add_sync(kAllLanes, count));
    if (lane() < 2) of_warps[lane() * kTileWarps + warp()] = lane() == 0 ? losses : counted;
    __syncthreads();
    float* const to = thread == 0 ? launch.partials : thread == 1 ? launch.counts : nullptr;
    if (!to) return;
    float numbers[kTileWarps];
    read_numbers(of_warps + thread * kTileWarps, numbers);
    to[blockIdx.x] = (numbers[0] + numbers[1]) + (numbers[2] + numbers[3]);
}

// ---- the gradient of losses and overlap ----

// From is the type in which the logits are stored. There are kParts parts in shared memory at once.
template <class From, int kParts>
__global__ void __launch_bounds__(kTileThreads, tile_blocks(kParts)) overlap_gradient_tiles(const CrossEntropyLaunch launch) {
    using Softmax = GroupSoftmax<From, kParts>;
    constexpr int kAtOnce = kParts * kPartVoxels;
    const LossArgs& a = launch.args;
    const int C = static_cast<int>(a.shape.C), thread = static_cast<int>(threadIdx.x);
    const BlockTile tile(launch);
    const TilePlanes<From, kParts> planes(launch);
    const TileLabels<kAtOnce, 1> labels(launch, reinterpret_cast<float*>(shared_memory() + launch.voxels_offset));
    // Gradients with respect to p where it is above Y, and where it is below.
    float* const above = reinterpret_cast<float*>(shared_memory() + launch.sums_offset);  // [C]
    float* const below = above + C;                                                       // [C]
    double of_sum = 0.0, of_difference = 0.0;
    if (thread < C) {
        const double* const given = a.overlap_slopes + (static_cast<int64_t>(tile.n) * C + thread) * kOverlapSums;
        of_sum = given[0], of_difference = given[1];
    }
    const float upstream = Factors(launch).upstream;
    for_rounds<kParts>(tile, [&](int first) {
        planes.load(a.tensors.logits, tile, first);
        labels.load(tile, first);
        if (first == 0 && thread < C) {
            above[thread] = static_cast<float>(of_sum + of_difference);
            below[thread] = static_cast<float>(of_sum - of_difference);
        }
        wait_for_copies();
        __syncthreads();
#pragma unroll 1
        for (int v = kTogether * thread; v < kAtOnce; v += kTogether * kTileThreads) {
            float dot[kTogether] = {};  // sum of e times its slope
            Softmax softmax(planes, labels, v, [&](int c, const float (&e)[kTogether]) {
#pragma unroll
                for (int j = 0; j < kTogether; ++j) dot[j] = fmaf(above[c], e[j], dot[j]);
            });
            float of_label[kTogether], scaled[kTogether];  // the gradient of the label's class, and factor * shift
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                const float slope = below[softmax.class_or_0(j)];
                const float shift = upstream - fmaf(slope, softmax.label_e[j], dot[j]) * softmax.factor[j];
                // One factor for both gradients, which may cancel each other.
                of_label[j] = softmax.label_e[j] * softmax.factor[j] * (slope + shift) - upstream;
                scaled[j] = softmax.factor[j] * shift;
            }
            planes.walk(v, [&](int c, typename Softmax::Group& place) {
                typename Softmax::Group group = place;
                float x[kTogether];
                group.read(x);
                exp_of_logits(x, softmax.shift);
#pragma unroll
                for (int j = 0; j < kTogether; ++j) x[j] *= fmaf(softmax.factor[j], above[c], scaled[j]);
                group.write(x);
                place = group;
            });
#pragma unroll
            for (int j = 0; j < kTogether; ++j) narrow(of_label[j], *softmax.label_place(planes, v, j));
            if (!softmax.is_usual) softmax.clear_unusual(planes, v);  // it is NaN if the upstream gradient is infinite
        }
        __syncthreads();
        planes.store(a.gradients.logits, tile, first);
        __syncthreads();
    });
}

// ---- launch, on the host ----

using TileKernel = void (*)(CrossEntropyLaunch);

template <class From, int kParts>
TileKernel tile_kernel(const CrossEntropyLaunch& launch) {
    return launch.pass == Pass::overlap ? overlap_tiles<From, kParts> : overlap_gradient_tiles<From, kParts>;
}

template <class From>
TileKernel tile_kernel(const CrossEntropyLaunch& launch) {
    return launch.parts == 1   ? tile_kernel<From, 1>(launch)
           : launch.parts == 2 ? tile_kernel<From, 2>(launch)
                               : tile_kernel<From, 4>(launch);
}

}  // namespace
}  // namespace CALSEG_ISA

void cuda_overlap_tiles(const CrossEntropyLaunch& launch, int device, void* stream) {
    using namespace CALSEG_ISA;
    const Caller cuda("cross_entropy on CUDA", device);
    if (launch.blocks() == 0) return;
    const TileKernel kernel = launch.args.tensors.logits.dtype == DType::bf16 ? tile_kernel<BF16>(launch) : tile_kernel<F16>(launch);
    // Ask for the most in every call, because the call of another thread may come between this line and the launch.
    if (launch.shared_bytes > kAlwaysShared)
        cuda.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostSharedBytes)));
    cuda.launch(kernel, launch.blocks(), kTileThreads, launch.shared_bytes, stream, launch);
}

}  // namespace calseg
