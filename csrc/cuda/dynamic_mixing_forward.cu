#include "dynamic_mixing_forward.cuh"
#include "dynamic_mixing_launch.cuh"

namespace tokenfusion {
namespace dynamic_mixing {

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1)
    forward_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  run_block<Forward<T>>(p, plan);
}

}  // namespace dynamic_mixing

cudaError_t run_dynamic_mixing_forward(const DynamicMixingParams& p, Dtype dtype, cudaStream_t stream) {
  using namespace dynamic_mixing;
  return with_dtype(dtype, [&](auto element) {
    typedef decltype(element) T;
    return launch<T>(forward_kernel<T>, p, Kernel::kForward, stream);
  });
}

}  // namespace tokenfusion
