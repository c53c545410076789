#include "python/pooled_tensor.h"

#include <memory>
#include <vector>

#include "host/buffer_pool.h"
#include "python/dlpack.h"
#include "python/reader.h"

namespace calseg {
namespace {

// DLPack tensor, together with the arrays to which it points.
struct Owned {
    DLManagedTensor managed;
    std::vector<int64_t> sizes, strides;
};

// Returns the memory of a tensor to the pool.
void release(DLManagedTensor* managed) {
    auto* owned = static_cast<Owned*>(managed->context);
    pool_release(managed->tensor.data);
    delete owned;
}

DLDataType dl_dtype(DType dtype) {
    switch (dtype) {
        case DType::f64:
            return {kDLFloat, 64, 1};
        case DType::f16:
            return {kDLFloat, 16, 1};
        case DType::bf16:
            return {kDLBfloat, 16, 1};
        default:
            return {kDLFloat, 32, 1};
    }
}

}  // namespace

pybind11::object empty_pooled(pybind11::handle dtype, const pybind11::tuple& sizes, const pybind11::tuple& strides) {
    auto owned = std::make_unique<Owned>();
    int64_t elements = 1;
    for (const auto& size : sizes) {
        owned->sizes.push_back(size.cast<int64_t>());
        elements *= owned->sizes.back();
    }
    for (const auto& stride : strides) owned->strides.push_back(stride.cast<int64_t>());
    const DLDataType type = dl_dtype(dtype_of(dtype));
    void* memory = pool_allocate(static_cast<std::size_t>(elements) * type.bits / 8);
    if (!memory) return pybind11::none();
    owned->managed = {{memory, {kDLCPU, 0}, static_cast<int32_t>(owned->sizes.size()), type, owned->sizes.data(), owned->strides.data(), 0},
                      owned.get(),
                      release};
    // A consumer of the capsule renames it, and later calls the deleter. A capsule that was not consumed calls it when it
    // is freed.
    return pybind11::reinterpret_steal<pybind11::object>(PyCapsule_New(&owned.release()->managed, "dltensor", [](PyObject* capsule) {
        if (PyCapsule_IsValid(capsule, "dltensor")) {
            auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
            managed->deleter(managed);
        }
    }));
}

}  // namespace calseg
