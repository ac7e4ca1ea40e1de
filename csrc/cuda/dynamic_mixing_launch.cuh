// How the files that instantiate dynamic_mixing's kernels launch them.
#pragma once

#include "dynamic_mixing_launch.h"
#include "dynamic_mixing_plan.h"

namespace tokenfusion {
namespace dynamic_mixing {

template <typename Direction>
TF_DEVICE void run_block(const Params& p, const Plan& plan) {
  extern __shared__ __align__(16) char memory[];
  Direction direction(p, plan, memory);
  direction.run();
}

template <typename T, typename Function>
cudaError_t launch(Function function, const Params& p, Kernel kernel, cudaStream_t stream) {
  int device, most_bytes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const Plan plan = make_plan(p, kernel, sizeof(T), most_bytes);
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);  // of any call
  if (error != cudaSuccess) return error;
  function<<<int(plan.blocks), kThreads, plan.shared_bytes, stream>>>(p, plan);
  return cudaGetLastError();
}

}  // namespace dynamic_mixing
}  // namespace tokenfusion
