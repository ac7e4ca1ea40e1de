#include <limits>

#include "single_query_attention_backward.cuh"
#include "single_query_attention_launch.cuh"

namespace tokenfusion {
namespace single_query_attention {

template <typename T, int kQueryTiles, bool kFull>
__global__ void __launch_bounds__(32 * Plan::max_warps(kQueryTiles))
    backward_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) char memory[];
  Backward<T, kQueryTiles, kFull> block(p, plan, memory);
  block.run(block);
}

template <typename T>
__global__ void combine_backward_kernel(const __grid_constant__ Params p) {
  combine_backward<T>(p);
}

}  // namespace single_query_attention

int64_t single_query_attention_shared_bytes(SingleQueryAttentionParams p, Dtype dtype, bool backward) {
  using namespace single_query_attention;
  p.length = p.splits = 1;
  return with_variant(dtype, p.query_tiles, [&](auto variant) {
    typedef decltype(variant) V;
    if (p.strip_channels > kUnit * V::max_units * V::max_warps) return std::numeric_limits<int64_t>::max();
    return backward ? make_plan<V, true>(p, 0).shared_bytes : make_plan<V, false>(p, 0).shared_bytes;
  });
}

cudaError_t run_single_query_attention_backward(const SingleQueryAttentionParams& p, Dtype dtype, cudaStream_t stream) {
  using namespace single_query_attention;
  return with_variant(dtype, p.query_tiles, [&](auto variant) {
    typedef decltype(variant) V;
    typedef typename V::Element T;
    constexpr int n = V::query_tiles;
    const cudaError_t error =
        launch<V, true>(backward_kernel<T, n, V::can_be_full>, backward_kernel<T, n, false>, p, stream);
    if (error != cudaSuccess || p.splits == 1 || p.grad_query == nullptr) return error;
    combine_backward_kernel<T><<<p.batch * p.queries, kCombineThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace tokenfusion
