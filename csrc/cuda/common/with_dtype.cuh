// From a Dtype at run time to the number type that a kernel is instantiated for.
#pragma once

#include "device.cuh"
#include "dtype.h"

namespace tokenfusion {

// f(T()) for the dtype.
template <typename F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat16:
      return f(Half());
    default:
      return f(BFloat16());
  }
}

}  // namespace tokenfusion
