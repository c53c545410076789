// Loading and storing of tiles in every dtype and layout.
#include "cpu/tile.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

// Loads class c of a span whose voxels are contiguous into the blocks [C][kLanes] of a tile. Lanes past the end of the span
// become 0.
template <class T>
void load_row(T* to, const TensorView& view, const Span& span, int64_t c, int64_t C) {
    const int whole = span.count / kLanes, rest = span.count % kLanes;
    with_score_type(view.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const From* row = address<From>(view, span, c);
        T* block = to + c * kLanes;
        for (int b = 0; b < whole; ++b, row += kLanes, block += C * kLanes) widen_lanes(block, row);
        if (rest) store(block, load_widened<T>(row, rest));
    });
}

// Loads all classes of a span whose voxels are not contiguous, voxel by voxel.
template <class T>
void load_voxels(T* to, const TensorView& view, const Span& span, int64_t C) {
    with_score_type(view.dtype, [&](auto* type) {
        using From = std::remove_pointer_t<decltype(type)>;
        const int64_t step_c = view.stride_c, step_s = view.stride_s;
        const From* from = address<From>(view, span);
        for (int i = 0; i < span.count; ++i) {
            const From* voxel = from + i * step_s;
            T* lane = to + i / kLanes * C * kLanes + i % kLanes;
            if (step_c == 1)
                for (int64_t c = 0; c < C; ++c) lane[c * kLanes] = static_cast<T>(widened(voxel[c]));
            else
                for (int64_t c = 0; c < C; ++c) lane[c * kLanes] = static_cast<T>(widened(voxel[c * step_c]));
        }
    });
    if (const int rest = span.count % kLanes)
        for (int64_t c = 0; c < C; ++c) {
            T* block = to + (span.count / kLanes * C + c) * kLanes;
            fill(block + rest, block + kLanes, T(0));
        }
}

// Stores class c of the blocks [C][kLanes] of a tile.
template <class T>
void store_row(const TensorView& view, const Span& span, int64_t c, const T* from, int64_t C, bool stream) {
    write_row<T>(view, span, c, stream, [=](int b) { return load<F<T>>(from + (b * C + c) * kLanes); });
}

// Stores all classes of a span as fractions of 16 bits.
template <class T>
void store_fractions(const TensorView& view, const Span& span, const T* from, int64_t C) {
    for (int64_t c = 0; c < C; ++c) {
        U16* to = address<U16>(view, span, c);
        for (int i = 0; i < span.count; ++i) narrow(to[i * view.stride_s], from[(i / kLanes * C + c) * kLanes + i % kLanes]);
    }
}

}  // namespace

template <class T>
void load_tile(T* to, const TensorView& view, const Span& span, int64_t C) {
    if (view.stride_s != 1) return load_voxels(to, view, span, C);
    for (int64_t c = 0; c < C; ++c) load_row(to, view, span, c, C);
}

template <class T>
void store_voxels(const TensorView& view, const Span& span, const T* from, int64_t C) {
    with_float_type(view.dtype, [&](auto* type) {
        using To = std::remove_pointer_t<decltype(type)>;
        const int64_t step_c = view.stride_c, step_s = view.stride_s;
        To* to = address<To>(view, span);
        for (int i = 0; i < span.count; ++i) {
            To* voxel = to + i * step_s;
            const T* lane = from + i / kLanes * C * kLanes + i % kLanes;
            if (step_c == 1)
                for (int64_t c = 0; c < C; ++c) narrow(voxel[c], lane[c * kLanes]);
            else
                for (int64_t c = 0; c < C; ++c) narrow(voxel[c * step_c], lane[c * kLanes]);
        }
    });
}

template <class T>
void store_tile(const TensorView& view, const Span& span, const T* from, int64_t C, bool stream) {
    if (view.dtype == DType::u16) return store_fractions(view, span, from, C);
    if (view.stride_s != 1) return store_voxels(view, span, from, C);
    for (int64_t c = 0; c < C; ++c) store_row(view, span, c, from, C, stream);
}

template void load_tile(float*, const TensorView&, const Span&, int64_t);
template void store_tile(const TensorView&, const Span&, const float*, int64_t, bool);
template void store_voxels(const TensorView&, const Span&, const float*, int64_t);
template void load_tile(double*, const TensorView&, const Span&, int64_t);
template void store_tile(const TensorView&, const Span&, const double*, int64_t, bool);
template void store_voxels(const TensorView&, const Span&, const double*, int64_t);

}  // namespace CALSEG_ISA
}  // namespace calseg
