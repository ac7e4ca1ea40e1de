// What a launch asks of the current device. No torch headers here.
#pragma once

#include <cuda_runtime_api.h>

namespace tokenfusion {

struct LimitsOfDevice {
  int shared_bytes;  // of a block at most
  int multiprocessors;

  cudaError_t read() {
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    return error;
  }
};

}  // namespace tokenfusion
