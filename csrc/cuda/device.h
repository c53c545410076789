// Functions that need CUDA's own compiler. tests/cuda_on_host/cuda/device.h defines the same functions for a CPU.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace calseg {
namespace {

// Returns the dynamic shared memory of the block.
static __device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char dynamic[];
    return dynamic;
}

// Computes 2^x with an error of up to 2 ulp. Results below the smallest normal number become 0.
static __device__ __forceinline__ float exp2_flushed(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
static __device__ __forceinline__ float widen_half(uint16_t bits) { return __half2float(__half_raw{bits}); }

}  // namespace
}  // namespace calseg
