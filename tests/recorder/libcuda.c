// CUDA driver that runs nothing. It records the launches, so that Triton's real launcher can be tested without a GPU.
#include <stdint.h>
#include <string.h>

enum { kMostParameters = 256, kMostBytes = 4096 };

// What a launch begins with in cuda.h, as CUlaunchConfig.
typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    void *stream, *attributes;
    unsigned num_attributes;
} Config;

static int64_t launches;
static uint64_t modules;                           // that were loaded; a module is its number, and so is its function
static unsigned shape[7];                          // grid, block and shared memory of the last launch
static uint64_t last_function, last_stream;        // of the last launch
static int num_parameters, sizes[kMostParameters];  // of the next launch
static unsigned char parameters[kMostBytes];       // of the last launch, one after the other

// ---- the interface of driver.py ----

void expect_parameters(int number, const int* of_each) {
    num_parameters = number;
    memcpy(sizes, of_each, number * sizeof(int));
}
int64_t num_launches(void) { return launches; }
void last_launch(unsigned* to_shape, unsigned char* to_parameters, uint64_t* function, uint64_t* stream) {
    *function = last_function, *stream = last_stream;
    memcpy(to_shape, shape, sizeof shape);
    memcpy(to_parameters, parameters, sizeof parameters);
}

// ---- the driver ----

int cuLaunchKernelEx(const Config* config, void* function, void** given, void** extra) {
    (void)extra;
    ++launches;
    last_function = (uint64_t)function, last_stream = (uint64_t)config->stream;
    memcpy(shape, config->grid, sizeof shape);
    unsigned char* to = parameters;
    for (int i = 0; i < num_parameters; to += sizes[i++]) memcpy(to, given[i], sizes[i]);
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    enum { kSharedPerBlock = 8, kWarp = 10, kMultiprocessors = 16, kMajor = 75, kMinor = 76, kSharedOptIn = 97 };
    (void)device;
    *value = attribute == kSharedPerBlock || attribute == kSharedOptIn ? 232448
             : attribute == kWarp                                      ? 32
             : attribute == kMultiprocessors                           ? 132
             : attribute == kMajor                                     ? 9
             : attribute == kMinor                                     ? 0
                                                                       : 1024;
    return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
    (void)function;
    *value = attribute == 0 ? 1024 : 0;  // the most threads of a block; no registers, no stack
    return 0;
}
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
    (void)attribute;
    *(uint64_t*)data = pointer;
    return 0;
}
int cuModuleLoadData(void** module, const void* image) { return (void)image, *module = (void*)++modules, 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return (void)name, *function = module, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return (void)device, *context = (void*)1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuCtxGetLimit(size_t* value, int limit) { return (void)limit, *value = 0, 0; }
int cuStreamIsCapturing(void* stream, int* capturing) { return (void)stream, *capturing = 0, 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, void* config) {
    return (void)function, (void)config, *clusters = 1, 0;
}
int cuGetErrorString(int error, const char** text) { return (void)error, *text = "an error of the recording driver", 0; }

// Functions that succeed and do nothing.
#define NOTHING(name) \
    int name(void) { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxPushCurrent_v2)
NOTHING(cuCtxPopCurrent_v2)
NOTHING(cuCtxSetLimit)
NOTHING(cuModuleUnload)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuTensorMapEncodeIm2col)
