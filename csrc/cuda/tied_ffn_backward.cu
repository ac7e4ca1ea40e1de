#include "tied_ffn_pass.cuh"

namespace tokenfusion {
namespace tied_ffn {

template <typename T, typename Act>
__global__ void __launch_bounds__(kTiedFfnThreads) backward_kernel(const __grid_constant__ Pass p) {
  run_block<T, Backward<T, Act>>(p);
}

}  // namespace tied_ffn

cudaError_t run_tied_ffn_backward(const TiedFfnPass& p, Activation activation, Dtype dtype, cudaStream_t stream) {
  using namespace tied_ffn;
  return launch(p, activation, dtype, stream,
                [](auto element, auto act) { return backward_kernel<decltype(element), decltype(act)>; });
}

}  // namespace tokenfusion
