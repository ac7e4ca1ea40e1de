// How the files that instantiate single_query_attention's kernels launch them.
#pragma once

#include "common/limits_of_device.h"
#include "single_query_attention_launch.h"
#include "single_query_attention_plan.h"

namespace tokenfusion {
namespace single_query_attention {

constexpr int kCombineThreads = 128;

// `full` takes plans whose warps all have as many channels as they can, `any` takes every plan.
template <typename V, bool kBackward, typename Function>
cudaError_t launch_one(Function full, Function any, const Params& p, cudaStream_t stream) {
  LimitsOfDevice limits;
  cudaError_t error = limits.read();
  if (error != cudaSuccess) return error;
  const Plan plan = make_plan<V, kBackward>(p, limits.shared_bytes);
  const Function kernel = p.channels == kUnit * V::max_units * plan.warps ? full : any;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);  // of any call
  if (error != cudaSuccess) return error;
  kernel<<<p.batch * p.splits * p.strips * p.slices, plan.threads(), plan.shared_bytes, stream>>>(p, plan);
  return cudaGetLastError();
}

// Of one slice after the other, or all at once, as p has it.
template <typename V, bool kBackward, typename Function>
cudaError_t launch(Function full, Function any, const Params& p_, cudaStream_t stream) {
  Params p = p_;
  const int slices = (p.queries + 8 * p.query_tiles - 1) / (8 * p.query_tiles);
  for (; p.first_slice < slices; p.first_slice += p.slices) {
    p.adds = p.first_slice > 0, p.is_last = p.first_slice + p.slices == slices;
    for (const Params::Part part : {Params::kProducts, Params::kRest}) {
      p.part = p.strips > 1 ? part : Params::kWhole;
      const cudaError_t error = launch_one<V, kBackward>(full, any, p, stream);
      if (error != cudaSuccess) return error;
      if (p.part == Params::kWhole) break;
    }
  }
  return cudaSuccess;
}

}  // namespace single_query_attention
}  // namespace tokenfusion
