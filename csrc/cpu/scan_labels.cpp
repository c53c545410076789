// Kernel that reads the labels alone: it counts voxels, sums class weights, and finds the first label that is not a class.
#include "cpu/labels.h"
#include "cpu/table.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr int64_t kChunk = 1 << 16;  // voxels

int64_t per_item(const ScanArgs& a) { return (a.shape.S + kChunk - 1) / kChunk; }

// Scans a row of labels, of which the first is that of voxel `position`. Compares and counts in the type of the labels, so
// that a vector holds as many as possible. The counters start again after kBlock voxels, because a counter of one byte holds
// no more than 255.
template <class From>
void scan(const ScanArgs& a, const From* from, int64_t step, int64_t position, int length, LabelSums& sums) {
    using Unsigned = std::make_unsigned_t<From>;
    constexpr int kBlock = sizeof(From) == 1 ? 192 : kMaxTile;
    const IgnoreIndex<From> ignore(a.labels.ignore_index);
    const ClassLabels<From> classes(a.labels.is_mask ? INT64_MAX : a.shape.C);
    for (int block = 0; block < length; block += kBlock) {
        const int count = static_cast<int>(smaller(kBlock, length - block));
        const From* row = from + block * step;
        Unsigned ignored = 0, bad = 0;
        const auto tally = [&](auto by) {
            for (int i = 0; i < count; ++i) {
                const bool skip = ignore == row[i * by];
                ignored = static_cast<Unsigned>(ignored + skip);
                bad = static_cast<Unsigned>(bad + (!skip & !classes.contain(row[i * by])));
            }
        };
        if (step == 1) tally(std::integral_constant<int64_t, 1>());
        else tally(step);
        if (bad && sums.bad_position < 0)
            for (int i = 0; i < count; ++i)
                if (ignore != row[i * step] && !classes.contain(row[i * step])) {
                    sums.bad_position = position + block + i;
                    return;
                }
        sums.counted += count - static_cast<int>(ignored);
        if (a.weight)
            for (int i = 0; i < count; ++i)
                if (ignore != row[i * step]) sums.weight += a.weight[static_cast<int64_t>(row[i * step])];
    }
}

int64_t num_chunks(const ScanArgs& a) { return a.shape.N * per_item(a); }
int64_t scratch_bytes(const ScanArgs&) { return 0; }

void scan_chunk(const ScanArgs& a, int64_t chunk, void*) {
    const int64_t n = chunk / per_item(a), first = chunk % per_item(a) * kChunk;
    const int64_t last = smaller(first + kChunk, a.shape.S);
    LabelSums sums;
    for (int64_t at = first; at < last && sums.bad_position < 0; at += kMaxTile) {
        const Span span{n, at, static_cast<int>(smaller(kMaxTile, last - at))};
        with_labels(a.labels.tensor, span,
                    [&](const auto* from, int64_t step) { scan(a, from, step, n * a.shape.S + at, span.count, sums); });
    }
    a.chunk_sums[chunk] = sums;
}

}  // namespace

const Kernel<ScanArgs> scan_labels = {num_chunks, scratch_bytes, scan_chunk};

}  // namespace CALSEG_ISA
}  // namespace calseg
