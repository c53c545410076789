// Labels of a tile: reading them, prefetching them, and clearing the voxels that they ignore.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/dtypes.h"
#include "cpu/tiling.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Comparison of labels of one integer type with ignore_index. If the type cannot hold the index, no label equals it.
template <class From>
struct IgnoreIndex {
    From value;
    bool possible;

    explicit IgnoreIndex(int64_t index)
        : value(static_cast<From>(index)),
          possible((std::is_signed<From>::value || index >= 0) && static_cast<int64_t>(static_cast<From>(index)) == index) {}
    CALSEG_MEMBER bool operator==(From label) const { return possible & (label == value); }
    CALSEG_MEMBER bool operator!=(From label) const { return !(*this == label); }
};

// Test whether labels of one integer type are classes, which are 0 to C - 1.
template <class From>
struct ClassLabels {
    using Unsigned = std::make_unsigned_t<From>;
    Unsigned last;

    explicit ClassLabels(int64_t C) : last(static_cast<Unsigned>(smaller(C - 1, kMaxLabel))) {}
    CALSEG_MEMBER bool contain(From label) const { return static_cast<Unsigned>(label) <= last; }

 private:
    static constexpr auto kMaxLabel = static_cast<int64_t>(static_cast<Unsigned>(-1) / (std::is_signed<From>::value ? 2 : 1) & INT64_MAX);
};

// Calls visit(row, step) with the labels of a span as integers: label i is row[i * step]. Labels that are stored as
// floating-point numbers are converted. One that is not whole becomes a number that is no class.
template <class Visit>
CALSEG_INLINE void with_labels(const TensorView& labels, const Span& span, const Visit& visit) {
    const int64_t step = labels.stride_s;
    if (labels.dtype > DType::f16)
        return with_integer_type(labels.dtype,
                                 [&](auto* type) { visit(address<std::remove_pointer_t<decltype(type)>>(labels, span), step); });
    alignas(64) int32_t whole[kMaxTile];
    with_float_type(labels.dtype, [&](auto* type) {
        const auto* from = address<std::remove_pointer_t<decltype(type)>>(labels, span);
        for (int i = 0; i < span.count; ++i) {
            const auto value = widened(from[i * step]);
            const bool fits = value > -2147483648.0f && value < 2147483648.0f;
            const int32_t truncated = static_cast<int32_t>(fits ? value : 0);
            whole[i] = fits && static_cast<decltype(value)>(truncated) == value ? truncated : INT32_MIN;
        }
    });
    visit(static_cast<const int32_t*>(whole), int64_t{1});
}

// Reads the labels of a tile. Stores the class of each voxel that counts, or 0 if the labels are a mask. Stores -1 for an
// ignored voxel, for a label that is not a class, and for the padding of the last block. Returns the number of voxels that
// count.
inline int load_labels(int32_t* to, const Labels& labels, const Span& span, int64_t C) {
    const int count = span.count;
    const int padded = static_cast<int>(round_up(count, kLanes));
    fill<int32_t>(to + count, to + padded, -1);
    if (!labels.tensor) {
        fill<int32_t>(to, to + count, 0);
        return count;
    }
    with_labels(labels.tensor, span, [&](const auto* from, int64_t step) {
        using From = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
        const IgnoreIndex<From> ignore(labels.ignore_index);
        const ClassLabels<From> classes(labels.is_mask ? INT64_MAX : C);
        const int32_t keep = labels.is_mask ? 0 : -1;
        // If ignore_index is not a class, the test for classes already rejects it, and no comparison with it is needed.
        const bool may_be_class = ignore.possible && classes.contain(ignore.value);
        const auto convert = [&](auto any_ignored, auto by) {
            for (int i = 0; i < count; ++i) {
                const From label = from[i * by];
                const bool counts = classes.contain(label) & (!any_ignored | (ignore != label));
                to[i] = counts ? static_cast<int32_t>(label) & keep : -1;
            }
        };
        using Yes = std::true_type;
        using No = std::false_type;
        using One = std::integral_constant<int64_t, 1>;
        if (step != 1) convert(Yes(), step);
        else if (may_be_class) convert(Yes(), One());
        else convert(No(), One());
    });
    int counted = 0;
    for (int i = 0; i < count; ++i) counted += to[i] >= 0;
    return counted;
}

// Prefetcher for the labels of the next tile. It is called for one block at a time while the current tile is computed.
// Without it, load_labels() would wait for memory.
class LabelsAhead {
 public:
    LabelsAhead() = default;
    LabelsAhead(const Labels& labels, const Span& next)
        : from_(static_cast<const char*>(labels.tensor.data) +
                (next.n * labels.tensor.stride_n + next.s * labels.tensor.stride_s) * dtype_bytes(labels.tensor.dtype)),
          block_bytes_(labels.tensor && labels.tensor.stride_s == 1 && next.count > 0 ? kLanes * dtype_bytes(labels.tensor.dtype) : 0) {}

    CALSEG_MEMBER void prefetch(int b) const {
#if defined(__GNUC__)
        for (int64_t at = 0; at < block_bytes_; at += 64) __builtin_prefetch(from_ + b * block_bytes_ + at, 0, 2);
#else
        (void)b;
#endif
    }

 private:
    const char* from_ = nullptr;
    int64_t block_bytes_ = 0;
};

// Sets the values of ignored voxels to 0. They may be NaN, which must not reach the arithmetic.
template <class T>
void clear_ignored(T* tile, const int32_t* labels, int count, int64_t C) {
    for (int b = 0; b * kLanes < count; ++b)
        for (int64_t c = 0; c < C; ++c)
            for (int i = 0; i < kLanes; ++i) {
                T& value = tile[(b * C + c) * kLanes + i];
                value = labels[b * kLanes + i] < 0 ? T(0) : value;
            }
}

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
