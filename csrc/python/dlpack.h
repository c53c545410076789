// The binary layout of DLPack (https://dmlc.github.io/dlpack): tensors as C structures, and the functions by which
// PyTorch 2.10 and later gives them out without Python objects in between.
#pragma once

#include <cstdint>

namespace calseg {

struct DLDevice {
    int32_t device_type, device_id;
};
enum : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 };

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
enum : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

// A tensor that owns its memory, as DLPack 0.x knows it; every torch takes it.
struct DLManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};

// DLPack 1.3: the functions behind torch.Tensor.__dlpack_c_exchange_api__.
struct DLPackExchangeAPI {
    uint32_t major, minor;
    void *previous, *managed_tensor_allocator, *managed_tensor_from_py_object, *managed_tensor_to_py_object;
    int (*dltensor_from_py_object)(void* tensor, DLTensor* to);  // -1 with a Python error set where it cannot
    void* current_work_stream;
};

}  // namespace calseg
