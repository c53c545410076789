// Calls of CUDA on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace calseg {
namespace {

// Calls of CUDA for an operation, whose name stands in front of errors. The device is the current one during its lifetime.
class Caller {
 public:
    Caller(const char* operation, int device) : operation_(operation), device_(device) {
        check(cudaGetDevice(&before_));
        if (before_ != device_) check(cudaSetDevice(device_));
    }
    ~Caller() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    Caller(const Caller&) = delete;
    Caller& operator=(const Caller&) = delete;

    void check(cudaError_t error) const {
        if (error != cudaSuccess) throw std::runtime_error(operation_ + (": " + std::string(cudaGetErrorString(error))));
    }

    int64_t attribute(cudaDeviceAttr which) const {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, which, device_));
        return value;
    }

    template <class Argument>
    void launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t shared_bytes, void* stream, const Argument& argument) const {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
        config.stream = static_cast<cudaStream_t>(stream);
        check(cudaLaunchKernelEx(&config, kernel, argument));
    }

 private:
    const char* operation_;
    int device_, before_ = 0;
};

}  // namespace
}  // namespace calseg
