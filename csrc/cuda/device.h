// Functions that need CUDA's own compiler. tests/cuda_on_host/cuda/device.h defines the same functions for a CPU.
#pragma once

#include <cuda_bf16.h>
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

// Computes 1 / x with an error of up to 1 ulp. Numbers below the smallest normal number count as 0, in x and in the result.
static __device__ __forceinline__ float reciprocal_flushed(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
static __device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }
static __device__ __forceinline__ float widen_half(uint16_t bits) { return __half2float(__half_raw{bits}); }

// Round to the nearest number of 16 bits, ties to even.
static __device__ __forceinline__ uint16_t narrow_half(float x) { return __half_raw(__float2half_rn(x)).x; }
static __device__ __forceinline__ uint16_t narrow_bfloat(float x) { return __nv_bfloat16_raw(__float2bfloat16_rn(x)).x; }

// Round two numbers to the halves of a word.
static __device__ __forceinline__ uint32_t narrow_halves(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
static __device__ __forceinline__ uint32_t narrow_bfloats(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// Return the larger numbers of two words with two halves each. If one is NaN, it is the other.
static __device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}
static __device__ __forceinline__ uint32_t larger_bfloats(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}

// Begins to copy 16 bytes from global to shared memory. Both addresses are multiples of 16.
static __device__ __forceinline__ void copy_16_bytes(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from))
                 : "memory");
}
// Waits for the copies that this thread has begun. Other threads see them after a barrier.
static __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace
}  // namespace calseg
