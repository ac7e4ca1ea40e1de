// The kernels of single_query_attention in emulated blocks, for tests to call from Python.
#include "blocks.h"
#include "single_query_attention_backward.cuh"
#include "single_query_attention_forward.cuh"

using namespace tokenfusion;
using namespace tokenfusion::single_query_attention;

namespace {

constexpr int kCombineThreads = 32;

template <typename V, bool kBackward>
void run(const Params& p, int groups, int stages, const emulation::Options& options) {
  typedef typename V::Element T;
  constexpr bool is_backward = kBackward;
  typedef std::conditional_t<is_backward, Backward<T, V::query_tiles>, Forward<T, V::query_tiles>> Direction;
  Plan plan = make_plan<T, V::query_tiles, kBackward>(p, 227 << 10);
  if (groups > 0) plan.groups = groups;
  if (stages > 0) plan.stages = stages;
  if (groups > 0 || stages > 0) {
    Shared<T, V::query_tiles, kBackward> shared;
    plan.shared_bytes = shared.layout(nullptr, plan.warps, plan.groups, plan.stages, 0);
  }
  emulation::run_blocks(p.batch * p.splits, plan.threads(), plan.shared_bytes, options, [&](char* memory) {
    Direction direction(p, plan, memory);
    direction.run(direction);
  });
  if (p.splits > 1 && (!kBackward || p.grad_query != nullptr))
    emulation::run_blocks(p.batch * p.queries, kCombineThreads, options, [&] {
      if constexpr (is_backward)
        combine_backward<T>(p);
      else
        combine_forward<T>(p);
    });
}

}  // namespace

extern "C" void run_single_query_attention(const Params* p, int dtype, int backward, int groups, int stages,
                                           int backwards, int one_warp_ahead, int late_copies) {
  const emulation::Options options{backwards != 0, one_warp_ahead != 0, late_copies != 0};
  with_variant(Dtype(dtype), p->queries, [&](auto variant) {
    if (backward)
      run<decltype(variant), true>(*p, groups, stages, options);
    else
      run<decltype(variant), false>(*p, groups, stages, options);
  });
}

extern "C" int first_tile_single_query_attention(const Params* p, int split) { return first_tile_of(*p, split); }

extern "C" int64_t plan_single_query_attention(const Params* p, int dtype, int backward, int64_t most_bytes) {
  return with_variant(Dtype(dtype), p->queries, [&](auto variant) {
    typedef decltype(variant) V;
    const Plan plan = backward ? make_plan<typename V::Element, V::query_tiles, true>(*p, most_bytes)
                               : make_plan<typename V::Element, V::query_tiles, false>(*p, most_bytes);
    return plan.shared_bytes;
  });
}
