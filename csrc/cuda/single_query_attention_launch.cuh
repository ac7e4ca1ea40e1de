// How the files that instantiate single_query_attention's kernels launch them.
#pragma once

#include "single_query_attention_launch.h"
#include "single_query_attention_plan.h"

namespace tokenfusion {
namespace single_query_attention {

constexpr int kCombineThreads = 128;

// `full` takes plans whose warps all have as many channels as they can, `any` takes every plan.
template <typename V, bool kBackward, typename Function>
cudaError_t launch(Function full, Function any, const Params& p, cudaStream_t stream) {
  int device, most_bytes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const Plan plan = make_plan<V, kBackward>(p, most_bytes);
  const Function kernel = p.channels == kUnit * V::max_units * plan.warps ? full : any;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);  // of any call
  if (error != cudaSuccess) return error;
  kernel<<<p.batch * p.splits, plan.threads(), plan.shared_bytes, stream>>>(p, plan);
  return cudaGetLastError();
}

}  // namespace single_query_attention
}  // namespace tokenfusion
