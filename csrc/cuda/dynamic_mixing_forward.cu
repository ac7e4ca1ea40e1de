#include "common/limits_of_device.h"
#include "dynamic_mixing_forward.cuh"
#include "dynamic_mixing_forward.h"

namespace tokenfusion {
namespace dynamic_mixing {

template <typename T, int kSources>
__global__ void __launch_bounds__(ForwardShape(kSources).threads(), ForwardShape(kSources).blocks(sizeof(T)))
    forward_kernel(const __grid_constant__ Params p, const __grid_constant__ ForwardPlan plan) {
  extern __shared__ __align__(16) char memory[];
  Forward<T, kSources>(p, plan, memory).run();
}

template <typename T, int kSources>
cudaError_t launch_forward(const Params& p, cudaStream_t stream) {
  LimitsOfDevice limits;
  cudaError_t error = limits.read();
  if (error != cudaSuccess) return error;
  const auto kernel = forward_kernel<T, kSources>;
  const ForwardPlan plan = make_forward_plan(p, sizeof(T), limits.shared_bytes, limits.multiprocessors);
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);  // of any call
  if (error != cudaSuccess) return error;
  kernel<<<plan.blocks, ForwardShape(kSources).threads(), plan.shared_bytes, stream>>>(p, plan);
  return cudaGetLastError();
}

}  // namespace dynamic_mixing

int64_t dynamic_mixing_forward_shared_bytes(int tokens, int reduced, int itemsize) {
  using namespace dynamic_mixing;
  Params p{};
  p.tokens = tokens, p.reduced = reduced, p.segments = p.channels = p.lines = 1;
  ForwardPlan plan{};
  plan.width = 1, plan.inputs = tokens * reduced;
  choose_layout(plan, p, itemsize, 0);
  return plan.shared_bytes;
}

cudaError_t run_dynamic_mixing_forward(const DynamicMixingParams& p, Dtype dtype, cudaStream_t stream) {
  using namespace dynamic_mixing;
  return with_sources(dtype, p.tokens, [&](auto element, auto sources) {
    return launch_forward<decltype(element), decltype(sources)::value>(p, stream);
  });
}

}  // namespace tokenfusion
