// Of the CUDA runtime what hosts of kernels call, for a process without a GPU: the device has the attributes that a
// test gives it, and launches go to a function of the test's.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

// Interprets a kernel; 0 where that went well.
typedef int (*Launch)(const char* kernel, const dim3* grid, const dim3* block, void** arguments, size_t shared_bytes);

constexpr int kSharedBytesUnasked = 48 << 10;  // that a kernel gets without an attribute of its own

struct Function {
  std::string name;
  int shared_bytes = kSharedBytesUnasked;
};

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

int multiprocessors, most_shared_bytes, cache_bytes;
Launch launch;
Configuration configuration;  // of the launch that is under way
cudaError_t last_error = cudaSuccess;

std::map<const void*, Function>& functions() {  // registered before main, in any order
  static std::map<const void*, Function> all;
  return all;
}

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

extern "C" {

void set_device(int multiprocessors_, int most_shared_bytes_, int cache_bytes_, Launch launch_) {
  multiprocessors = multiprocessors_, most_shared_bytes = most_shared_bytes_, cache_bytes = cache_bytes_;
  launch = launch_;
  for (auto& [_, function] : functions()) function.shared_bytes = kSharedBytesUnasked;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  switch (name) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared_bytes;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = cache_bytes;
      return cudaSuccess;
    default:
      return note(cudaErrorInvalidValue);
  }
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute name, int value) {
  if (name != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most_shared_bytes)
    return note(cudaErrorInvalidValue);
  functions().at(function).shared_bytes = value;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const Function& f = functions().at(function);
  if (shared_bytes > size_t(f.shared_bytes)) return note(cudaErrorInvalidValue);
  return note(launch(f.name.c_str(), &grid, &block, arguments, shared_bytes) == 0 ? cudaSuccess
                                                                                  : cudaErrorLaunchFailure);
}

// What nvcc makes of <<<>>> and of kernels.

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared_bytes = configuration.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  functions()[function].name = name;
}

}  // extern "C"
