#include "dynamic_mixing_backward.cuh"
#include "dynamic_mixing_launch.cuh"

namespace tokenfusion {
namespace dynamic_mixing {

template <typename T, int kSourceTiles>
__global__ void __launch_bounds__(kThreads)
    grad_x_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  run_block<GradX<T, kSourceTiles>>(p, plan);
}

template <typename T, int kSourceTiles>
__global__ void __launch_bounds__(kThreads)
    grad_compressed_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  run_block<GradCompressed<T, kSourceTiles>>(p, plan);
}

template <typename T, int kSourceTiles>
__global__ void __launch_bounds__(kThreads)
    grad_weight_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  run_block<GradWeight<T, kSourceTiles>>(p, plan);
}

}  // namespace dynamic_mixing

int64_t dynamic_mixing_shared_bytes(int tokens, int reduced, int itemsize) {
  using namespace dynamic_mixing;
  Params p{};
  p.tokens = tokens, p.reduced = reduced, p.segments = p.channels = 1;
  return make_plan(p, Kernel::kGradCompressed, itemsize, 0).shared_bytes;
}

int64_t dynamic_mixing_blocks(const DynamicMixingParams& p, DynamicMixingKernel kernel, int itemsize) {
  return dynamic_mixing::make_plan(p, kernel, itemsize, 0).blocks;
}

cudaError_t run_dynamic_mixing_backward(const DynamicMixingParams& p, DynamicMixingKernel kernel, Dtype dtype,
                                        cudaStream_t stream) {
  using namespace dynamic_mixing;
  return with_variant(dtype, p.tokens, [&](auto variant) {
    typedef decltype(variant) V;
    typedef typename V::Element T;
    switch (kernel) {
      case Kernel::kGradX:
        return launch<T>(grad_x_kernel<T, V::source_tiles>, p, kernel, stream);
      case Kernel::kGradCompressed:
        return launch<T>(grad_compressed_kernel<T, V::source_tiles>, p, kernel, stream);
      default:
        return launch<T>(grad_weight_kernel<T, V::source_tiles>, p, kernel, stream);
    }
  });
}

}  // namespace tokenfusion
