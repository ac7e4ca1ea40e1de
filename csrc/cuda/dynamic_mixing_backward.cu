#include "common/limits_of_device.h"
#include "dynamic_mixing_backward.cuh"

namespace tokenfusion {
namespace dynamic_mixing {
namespace {

constexpr int kGeneratorThreads = 256;

}  // namespace

template <typename T, int kTiles, bool kResident>
__global__ void __launch_bounds__(32 * backward_warps(sizeof(T)), 1)
    backward_kernel(const __grid_constant__ DynamicMixingBackward p, const __grid_constant__ BackwardPlan plan) {
  extern __shared__ __align__(16) char memory[];
  Backward<T, kTiles, kResident>(p, plan, memory).run();
}

template <typename T>
__global__ void __launch_bounds__(kGeneratorThreads)
    generator_kernel(const __grid_constant__ DynamicMixingGenerator p) {
  make_generator<T>(p, block_index() * kGeneratorThreads + thread_index());
}

}  // namespace dynamic_mixing

int64_t dynamic_mixing_backward_shared_bytes(int tokens, int reduced, int itemsize) {
  DynamicMixingBackward p{};
  p.tokens = tokens, p.reduced = reduced, p.rows = p.segments = p.channels = 1;
  return dynamic_mixing::make_backward_plan(p, itemsize, 0, 1).shared_bytes;
}

cudaError_t run_dynamic_mixing_backward(const DynamicMixingBackward& p, Dtype dtype, cudaStream_t stream) {
  using namespace dynamic_mixing;
  LimitsOfDevice limits;
  const cudaError_t error = limits.read();
  if (error != cudaSuccess) return error;
  const int itemsize = dtype == Dtype::kFloat32 ? 4 : 2;
  const BackwardPlan plan = make_backward_plan(p, itemsize, limits.shared_bytes, limits.multiprocessors);
  return with_variant(dtype, p.tokens, plan.resident, [&](auto variant) {
    typedef decltype(variant) V;
    const auto function = backward_kernel<typename V::T, V::kTiles, V::kResident>;
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   limits.shared_bytes);  // of any call
    if (error != cudaSuccess) return error;
    function<<<plan.blocks, 32 * plan.warps, plan.shared_bytes, stream>>>(p, plan);
    return cudaGetLastError();
  });
}

cudaError_t run_dynamic_mixing_generator(const DynamicMixingGenerator& p, Dtype dtype, cudaStream_t stream) {
  using namespace dynamic_mixing;
  return with_dtype(dtype, [&](auto element) {
    typedef decltype(element) T;
    const int numbers = p.tokens * p.tokens * (p.inputs + 1);
    generator_kernel<T><<<divide_up(numbers, kGeneratorThreads), kGeneratorThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace tokenfusion
