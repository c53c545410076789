// The pass over the labels alone that comes first: counts, weights for the mean, and the first label out of range.
#include "cpu/operations.h"
#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int64_t kChunk = 1 << 16;
constexpr int kBlock = 1024;

int64_t per_item(const ScanLabelsArgs& a) { return (a.shape.S + kChunk - 1) / kChunk; }

// Labels as [0, C) are classes, C is ignored, C + 1 is out of range.
template <class From>
void scan(const ScanLabelsArgs& a, int64_t n, int64_t first, int64_t last, LabelSums& sums) {
    const int64_t step = a.labels.view.stride_s, C = a.labels.is_mask ? INT64_MAX : a.shape.C, ignore = a.labels.ignore_index;
    const From* from = static_cast<const From*>(a.labels.view.data) + n * a.labels.view.stride_n;
    for (int64_t block = first; block < last; block += kBlock) {
        const int count = static_cast<int>(smaller(kBlock, last - block));
        const From* row = from + block * step;
        int32_t ignored = 0, bad = 0;
        if (step == 1) {
            for (int i = 0; i < count; ++i) {
                const int64_t label = static_cast<int64_t>(row[i]);
                const bool skip = is_ignored(row[i], ignore);
                ignored += skip;
                bad += !skip & (static_cast<uint64_t>(label) >= static_cast<uint64_t>(C));
            }
        } else {
            for (int i = 0; i < count; ++i) {
                const int64_t label = static_cast<int64_t>(row[i * step]);
                const bool skip = is_ignored(row[i * step], ignore);
                ignored += skip;
                bad += !skip & (static_cast<uint64_t>(label) >= static_cast<uint64_t>(C));
            }
        }
        if (bad && sums.bad_position < 0)
            for (int i = 0; i < count; ++i) {
                const int64_t label = static_cast<int64_t>(row[i * step]);
                if (!is_ignored(row[i * step], ignore) && static_cast<uint64_t>(label) >= static_cast<uint64_t>(C)) {
                    sums.bad_position = n * a.shape.S + block + i;
                    sums.bad_value = label;
                    return;
                }
            }
        sums.counted += count - ignored;
        if (a.weight)
            for (int i = 0; i < count; ++i) {
                const int64_t label = static_cast<int64_t>(row[i * step]);
                if (!is_ignored(row[i * step], ignore)) sums.weight += a.weight[label];
            }
    }
}

int64_t num_chunks(const ScanLabelsArgs& a) { return a.shape.N * per_item(a); }
int64_t scratch_bytes(const ScanLabelsArgs&) { return 0; }

void run_chunk(const ScanLabelsArgs& a, int64_t chunk, void*) {
    const int64_t n = chunk / per_item(a), first = chunk % per_item(a) * kChunk;
    const int64_t last = smaller(first + kChunk, a.shape.S);
    LabelSums sums;
    with_integer_type(a.labels.view.dtype, [&](auto* type) { scan<std::remove_pointer_t<decltype(type)>>(a, n, first, last, sums); });
    a.chunk_sums[chunk] = sums;
}

}  // namespace

const Kernel<ScanLabelsArgs> scan_labels = {num_chunks, scratch_bytes, run_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
