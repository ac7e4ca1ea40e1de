// The kernels of dynamic_mixing in emulated blocks, for tests to call from Python.
#include "blocks.h"
#include "dynamic_mixing_backward.cuh"
#include "dynamic_mixing_forward.cuh"

using namespace tokenfusion;
using namespace tokenfusion::dynamic_mixing;

namespace {

template <typename Direction>
void run(const Params& p, Kernel kernel, int itemsize, int64_t most_bytes, const emulation::Options& options) {
  const Plan plan = make_plan(p, kernel, itemsize, most_bytes);
  emulation::run_blocks(plan.blocks, kThreads, plan.shared_bytes, options, [&](char* memory) {
    Direction direction(p, plan, memory);
    direction.run();
  });
}

}  // namespace

extern "C" void run_dynamic_mixing(const Params* p, int dtype, int kernel, int64_t most_bytes, int backwards,
                                   int one_warp_ahead, int late_copies) {
  const emulation::Options options{backwards != 0, one_warp_ahead != 0, late_copies != 0};
  with_variant(Dtype(dtype), p->tokens, [&](auto variant) {
    typedef decltype(variant) V;
    typedef typename V::Element T;
    constexpr int kSourceTiles = V::source_tiles;
    switch (Kernel(kernel)) {
      case Kernel::kForward:
        return run<Forward<T>>(*p, Kernel::kForward, sizeof(T), most_bytes, options);
      case Kernel::kGradX:
        return run<GradX<T, kSourceTiles>>(*p, Kernel::kGradX, sizeof(T), most_bytes, options);
      case Kernel::kGradCompressed:
        return run<GradCompressed<T, kSourceTiles>>(*p, Kernel::kGradCompressed, sizeof(T), most_bytes, options);
      case Kernel::kGradWeight:
        return run<GradWeight<T, kSourceTiles>>(*p, Kernel::kGradWeight, sizeof(T), most_bytes, options);
    }
  });
}

extern "C" int64_t plan_dynamic_mixing(const Params* p, int itemsize, int kernel, int64_t most_bytes, int* chunk) {
  const Plan plan = make_plan(*p, Kernel(kernel), itemsize, most_bytes);
  *chunk = plan.chunk;
  return plan.shared_bytes;
}
