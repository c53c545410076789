// Types that describe tensors to the kernels.
//
// They hold plain data only, because this header is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace calseg {

enum class DType : int32_t { f32, f64, bf16, f16, u8, i8, i16, i32, i64, u16, u32, u64 };

// Tensor as [N, C, S], where one axis S stands for all spatial axes. Strides count elements.
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride_n = 0, stride_c = 0, stride_s = 0;
    explicit operator bool() const { return data != nullptr; }
};

struct Scores : TensorView {};   // one number per voxel and class: a floating-point number, or a fraction of u8 or u16
struct Voxels : TensorView {};   // one floating-point number per voxel; stride_c is 0
struct Indices : TensorView {};  // one label per voxel, of any dtype; stride_c is 0

// One float64 per class, contiguous.
struct Classes {
    const double* data = nullptr;
};

// Extents of the tensors of a call.
struct Shape {
    int64_t N = 0, C = 0, S = 0;
    int64_t voxels() const { return N * S; }
};

enum class Reduction : int32_t { none, mean, sum };

}  // namespace calseg
