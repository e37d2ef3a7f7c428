// A CUDA driver that computes nothing: Triton's launchers load it as libcuda.so.1 where there is no GPU. It answers as a
// GPU of compute capability 9.0 does, refuses what the real one refuses, and keeps the last launch for the test to read.

#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define MOST_PARAMETERS 64
#define LARGEST_PARAMETER 128

typedef struct {
  uint32_t grid[3], block[3], shared;
  int32_t overlaps, launches;
  uint64_t stream;
  uint8_t parameters[MOST_PARAMETERS][LARGEST_PARAMETER];
} Launch;

// What a tensor map holds here, in the 128 bytes that the real one keeps to itself.
typedef struct {
  uint64_t address, sizes[2], stride;
  uint32_t box[2], type, swizzle;
} Map;

static Launch last;
static int32_t sizes[MOST_PARAMETERS], parameter_count;

// The test's own: the sizes of the next launch's parameters, and the last launch.
void expect_parameters(const int32_t *bytes, int32_t count) {
  parameter_count = count;
  memcpy(sizes, bytes, count * sizeof *bytes);
}

const Launch *last_launch(void) { return &last; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const uint32_t threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (!function || extra || !config->gridDimX || threads == 0 || threads > 1024) return CUDA_ERROR_INVALID_VALUE;
  const int32_t launches = last.launches + 1;
  memset(&last, 0, sizeof last);
  last.launches = launches;
  const uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const uint32_t block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  memcpy(last.grid, grid, sizeof grid);
  memcpy(last.block, block, sizeof block);
  last.shared = config->sharedMemBytes;
  last.stream = (uint64_t)config->hStream;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      last.overlaps = config->attrs[i].value.programmaticStreamSerializationAllowed;
  for (int i = 0; i < parameter_count; i++) memcpy(last.parameters[i], parameters[i], sizes[i]);
  return CUDA_SUCCESS;
}

// The rules of the driver's API reference for maps of two dimensions without interleaving.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const uint32_t spans[] = {~0u, 32, 64, 128};
  const uint32_t element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const uint64_t largest = (uint64_t)1 << 32;
  if (rank != 2 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || (uint64_t)address % 16 || (uint64_t)map % 64)
    return CUDA_ERROR_INVALID_VALUE;
  if (strides[0] % 16 || strides[0] >= (uint64_t)1 << 40 || strides[0] < dims[0] * element) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; i++)
    if (!dims[i] || dims[i] > largest || !box[i] || box[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * element % 16 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B || box[0] * element > spans[swizzle])
    return CUDA_ERROR_INVALID_VALUE;
  const Map made = {(uint64_t)address, {dims[0], dims[1]}, strides[0], {box[0], box[1]}, type, swizzle};
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\x7f" "ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "refused";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return cuCtxGetCurrent(context);
}

CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }
CUresult cuCtxSetCurrent(CUcontext context) { return context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

// What Triton's launchers link to, and no launch of ours needs.
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                 const cuuint64_t *dims, const cuuint64_t *strides, const int *lower, const int *upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t *steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
