#include "single_query_attention_forward.cuh"
#include "single_query_attention_launch.cuh"

namespace tokenfusion {
namespace single_query_attention {

template <typename T, int kQueryTiles, bool kFull>
__global__ void __launch_bounds__(32 * Plan::max_warps(kQueryTiles))
    forward_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) char memory[];
  Forward<T, kQueryTiles, kFull> block(p, plan, memory);
  block.run(block);
}

template <typename T>
__global__ void combine_forward_kernel(const __grid_constant__ Params p) {
  combine_forward<T>(p);
}

}  // namespace single_query_attention

cudaError_t run_single_query_attention_forward(const SingleQueryAttentionParams& p, Dtype dtype, cudaStream_t stream) {
  using namespace single_query_attention;
  return with_variant(dtype, p.query_tiles, [&](auto variant) {
    typedef decltype(variant) V;
    typedef typename V::Element T;
    constexpr int n = V::query_tiles;
    const cudaError_t error =
        launch<V, false>(forward_kernel<T, n, V::can_be_full>, forward_kernel<T, n, false>, p, stream);
    if (error != cudaSuccess || p.splits == 1) return error;
    combine_forward_kernel<T><<<p.batch * p.queries, kCombineThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace tokenfusion
