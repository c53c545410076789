// Emulation of CUDA on a CPU for tests. It gives kernels/*.cu the functions of csrc/cuda/device.h and of the CUDA headers.
//
// A grid runs block by block. The threads of a block are coroutines that change over where they wait for each other. So the
// emulation sees a wait that not all threads of the block, or lanes of the warp, reach, and reports it as the launch's error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned count = 1) : x(count) {}
};

static struct {
    unsigned x;
} threadIdx, blockIdx;

namespace on_host {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 256 * 1024;

// ---- the current block ----

// Barrier at which every thread gives a value, and gets those of all threads.
struct Meeting {
    const char* what = nullptr;
    unsigned members = 0, arrived = 0, generation = 0;
    uint64_t values[2][kWarp];
};

struct Coroutine {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    bool done = true;
    void* fake_stack = nullptr;
};

struct Block {
    std::vector<Coroutine> threads;
    unsigned current = 0, running = 0, idle = 0;
    Meeting all;
    std::vector<Meeting> warps;
    std::vector<unsigned char> shared;
    ucontext_t host;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    std::string error;
};
static Block block;

inline void change_to(ucontext_t& from, ucontext_t& to, void** fake_stack, const void* stack, std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, stack, size);
    swapcontext(&from, &to);
    __sanitizer_finish_switch_fiber(fake_stack ? *fake_stack : nullptr, nullptr, nullptr);
#else
    (void)fake_stack, (void)stack, (void)size;
    swapcontext(&from, &to);
#endif
}

// Changes over to the next thread that is not done.
inline void change_over() {
    Coroutine& self = block.threads[block.current];
    const unsigned mine = block.current, count = static_cast<unsigned>(block.threads.size());
    do block.current = (block.current + 1) % count;
    while (block.threads[block.current].done);
    if (block.current == mine) return;
    Coroutine& next = block.threads[block.current];
    threadIdx.x = block.current;
    change_to(self.context, next.context, &self.fake_stack, next.stack.data(), kStack);
}

// Ends the whole block.
[[noreturn]] inline void leave() {
    Coroutine& self = block.threads[block.current];
    change_to(self.context, block.host, nullptr, nullptr, 0);
    std::abort();
}

[[noreturn]] inline void fail(const std::string& error) {
    block.error = error + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(block.current) + ")";
    leave();
}

inline const uint64_t* meet(Meeting& meeting, const char* what, unsigned place, uint64_t value) {
    if (meeting.arrived == 0) meeting.what = what;
    else if (std::strcmp(meeting.what, what) != 0) fail(std::string(what) + " meets " + meeting.what);
    const unsigned generation = meeting.generation;
    meeting.values[generation % 2][place] = value;
    block.idle = 0;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.generation;
    }
    while (meeting.generation == generation) {
        if (++block.idle > 2 * block.threads.size()) fail(std::string(what) + " is not reached by all");
        change_over();
    }
    return meeting.values[generation % 2];
}

inline const uint64_t* meet_warp(unsigned mask, const char* what, uint64_t value) {
    if (mask != 0xffffffffu) fail(std::string(what) + " is not for the whole warp");
    return meet(block.warps[threadIdx.x / kWarp], what, threadIdx.x % kWarp, value);
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    block.body(block.argument);
    block.threads[block.current].done = true;
    block.idle = 0;
    if (--block.running == 0) leave();
    change_over();
    std::abort();
}

inline void run_block(unsigned threads, std::size_t shared_bytes) {
    block.threads.resize(threads);
    block.shared.assign(shared_bytes, 0xa5);  // not zero, so that a kernel which does not clear its memory fails
    block.shared.shrink_to_fit();
    block.all = Meeting();
    block.all.members = threads;
    block.warps.assign(threads / kWarp, Meeting());
    for (Meeting& warp : block.warps) warp.members = kWarp;
    for (Coroutine& thread : block.threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = kStack;
        thread.done = false;
        makecontext(&thread.context, run_thread, 0);
    }
    block.running = threads;
    block.idle = 0;
    block.current = 0;
    threadIdx.x = 0;
    void* fake_stack = nullptr;
    change_to(block.host, block.threads[0].context, &fake_stack, block.threads[0].stack.data(), kStack);
}

// ---- the GPU ----

struct Device {
    int current = 0, count = 2;
    int multiprocessors = 4, shared_per_multiprocessor = 228 * 1024, shared_per_block = 227 * 1024;
    unsigned first_block = 0, last_block = UINT_MAX;  // the blocks of a grid that are executed
    int64_t blocks = 0, shared_bytes = 0;             // of the last launch
    int shared_allowed = 48 * 1024;
    int device_of_launch = -1;
};
static Device device;

}  // namespace on_host

// ---- device functions ----

inline void __syncthreads() { on_host::meet(on_host::block.all, "__syncthreads", 0, 0); }
inline void __syncwarp() { on_host::meet_warp(0xffffffffu, "__syncwarp", 0); }
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const uint64_t* votes = on_host::meet_warp(mask, "__ballot_sync", vote);
    unsigned result = 0;
    for (unsigned i = 0; i < on_host::kWarp; ++i) result |= static_cast<unsigned>(votes[i]) << i;
    return result;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
    return static_cast<T>(on_host::meet_warp(mask, "__shfl_sync", static_cast<uint64_t>(value))[from]);
}
template <class T>
T shuffled(unsigned mask, const char* what, T value, unsigned from) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    const uint64_t* values = on_host::meet_warp(mask, what, bits);
    if (from < on_host::kWarp) std::memcpy(&value, values + from, sizeof value);
    return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    return shuffled(mask, "__shfl_down_sync", value, threadIdx.x % on_host::kWarp + by);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned by) {
    return shuffled(mask, "__shfl_xor_sync", value, threadIdx.x % on_host::kWarp ^ by);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    const uint64_t* values = on_host::meet_warp(mask, "__reduce_add_sync", value);
    unsigned sum = 0;
    for (unsigned i = 0; i < on_host::kWarp; ++i) sum += static_cast<unsigned>(values[i]);
    return sum;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T atomicAdd(T* to, T value) {
    const T before = *to;
    *to += value;
    return before;
}
template <class T>
T atomicMin(T* to, T value) {
    const T before = *to;
    *to = std::min(before, value);
    return before;
}
// Copies that a thread has begun. They are done when it waits for them, so that a kernel which does not wait fails.
struct Copy {
    unsigned thread;
    void* to;
    const void* from;
};
static std::vector<Copy> copies;

// Converts as the GPU's instructions: a number beyond int32 becomes the nearest int32, and NaN becomes 0.
inline int to_int_saturated(float x) { return x != x ? 0 : x >= 0x1p31f ? INT_MAX : x < -0x1p31f ? INT_MIN : static_cast<int>(x); }
inline int __float2int_rn(float x) { return to_int_saturated(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return to_int_saturated(x); }

namespace calseg {
namespace {

inline unsigned char* shared_memory() { return on_host::block.shared.data(); }
inline float exp2_flushed(float x) {
    const float y = std::exp2(x);
    return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
inline float reciprocal_flushed(float x) { return flushed(static_cast<float>(1.0 / static_cast<double>(flushed(x)))); }
inline float float_of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline float widen_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent == 31  ? (mantissa ? std::nanf("") : INFINITY)
                            : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                            : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
}
inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline uint16_t narrow_bfloat(float x) {
    const uint32_t bits = bits_of_float(x);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t narrow_half(float x) {
    const uint16_t sign = static_cast<uint16_t>(bits_of_float(x) >> 16 & 0x8000);
    if (x != x) return 0x7fff;
    const float magnitude = std::fabs(x);
    if (magnitude == 0.0f) return sign;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int lowest = std::max(exponent - 11, -24);  // exponent of the last bit
    const float steps = std::nearbyint(std::ldexp(magnitude, -lowest));
    // Where the steps are rounded up to 2^11, the sum carries into the exponent.
    const int first = lowest == -24 ? 0 : lowest + 24;
    return static_cast<uint16_t>(sign | ((first << 10) + static_cast<int>(steps)));
}
inline uint32_t narrow_halves(float low, float high) { return narrow_half(low) | static_cast<uint32_t>(narrow_half(high)) << 16; }
inline uint32_t narrow_bfloats(float low, float high) { return narrow_bfloat(low) | static_cast<uint32_t>(narrow_bfloat(high)) << 16; }

template <class Widen>
uint32_t larger_of_words(uint32_t a, uint32_t b, const Widen& widen) {
    uint32_t word = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
        const bool takes_first = widen(y) != widen(y) || widen(x) > widen(y);
        word |= static_cast<uint32_t>(takes_first ? x : y) << shift;
    }
    return word;
}
inline uint32_t larger_halves(uint32_t a, uint32_t b) { return larger_of_words(a, b, widen_half); }
inline uint32_t larger_bfloats(uint32_t a, uint32_t b) {
    return larger_of_words(a, b, [](uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); });
}

inline void copy_16_bytes(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || (static_cast<unsigned char*>(to) - shared_memory()) % 16)
        on_host::fail("a misaligned copy");
    copies.push_back({threadIdx.x, to, from});
}
inline void wait_for_copies() {
    const auto mine = std::stable_partition(copies.begin(), copies.end(), [](const Copy& each) { return each.thread != threadIdx.x; });
    for (auto each = mine; each != copies.end(); ++each) std::memcpy(each->to, each->from, 16);
    copies.erase(mine, copies.end());
}

}  // namespace
}  // namespace calseg

// ---- host functions ----

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidDevice, cudaErrorLaunchFailure };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorLaunchFailure) return on_host::block.error.c_str();
    return error == cudaErrorInvalidDevice ? "invalid device ordinal" : error == cudaErrorInvalidValue ? "invalid argument" : "no error";
}
inline cudaError_t cudaGetDevice(int* current) {
    *current = on_host::device.current;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index >= on_host::device.count) return cudaErrorInvalidDevice;
    on_host::device.current = index;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    const on_host::Device& device = on_host::device;
    *value = which == cudaDevAttrMultiProcessorCount                ? device.multiprocessors
             : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? device.shared_per_multiprocessor
                                                                    : device.shared_per_block;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
    if (bytes > on_host::device.shared_per_block) return cudaErrorInvalidValue;
    on_host::device.shared_allowed = bytes;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, std::size_t shared) {
    *blocks = std::min(3, on_host::device.shared_per_multiprocessor / (static_cast<int>(shared) + 1024));
    return cudaSuccess;
}
template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument), const Argument& argument) {
    using namespace on_host;
    if (config->dynamicSmemBytes > static_cast<std::size_t>(device.shared_allowed)) return cudaErrorInvalidValue;
    struct Call {
        void (*kernel)(Argument);
        const Argument* argument;
    } call{kernel, &argument};
    block.body = [](void* each) { static_cast<Call*>(each)->kernel(*static_cast<Call*>(each)->argument); };
    block.argument = &call;
    block.error.clear();
    device.blocks = config->gridDim.x;
    device.shared_bytes = static_cast<int64_t>(config->dynamicSmemBytes);
    device.device_of_launch = device.current;
    for (unsigned b = device.first_block; b < config->gridDim.x && b <= device.last_block && block.error.empty(); ++b) {
        blockIdx.x = b;
        run_block(config->blockDim.x, config->dynamicSmemBytes);
    }
    return block.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
