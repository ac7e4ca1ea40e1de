// What the plans of dynamic_mixing's kernels share.
#pragma once

#include "common/with_dtype.cuh"
#include "dynamic_mixing.h"

namespace tokenfusion {
namespace dynamic_mixing {

typedef DynamicMixingParams Params;
typedef DynamicMixingView View;

TF_HOST_DEVICE constexpr int divide_up(int x, int unit) { return (x + unit - 1) / unit; }
TF_HOST_DEVICE constexpr int round_up(int x, int unit) { return divide_up(x, unit) * unit; }

}  // namespace dynamic_mixing
}  // namespace tokenfusion
