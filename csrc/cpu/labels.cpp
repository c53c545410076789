// Reading of the labels of a tile in every dtype and layout.
#include "cpu/labels.h"

namespace calseg {
namespace CALSEG_ISA {

int load_labels(int32_t* to, const Labels& labels, const Span& span, int64_t C) {
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

}  // namespace CALSEG_ISA
}  // namespace calseg
