// A tensor as the kernels see it. Plain data only: this header is compiled under every instruction set.
#pragma once

#include <cstdint>

namespace calseg {

enum class DType : int32_t { f32, f64, bf16, f16, u8, i8, i16, i32, i64, u16, u32, u64 };

// A tensor seen as [N, C, S]: the spatial axes collapse to one stride. Strides are in elements.
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride_n = 0, stride_c = 0, stride_s = 0;
    explicit operator bool() const { return data != nullptr; }
};

struct Scores : TensorView {};   // a floating-point number for every voxel and class
struct Voxels : TensorView {};   // a floating-point number for every voxel: stride_c is 0
struct Indices : TensorView {};  // an integer for every voxel: stride_c is 0

struct Classes {  // a number for every class, float64 [C]
    const double* data = nullptr;
};

struct Shape {
    int64_t N = 0, C = 0, S = 0;
    int64_t voxels() const { return N * S; }
};

enum class Reduction : int32_t { none, mean, sum };

}  // namespace calseg
