// What an operator's kernels are for a dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include "isa.h"

namespace tokenfusion {

// `name` is that of the tensor with the dtype.
template <typename Kernels>
const typename Kernels::ForDtype& kernels_for(const Kernels& kernels, const char* name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kernels.float32;
    case at::kBFloat16:
      return kernels.bfloat16;
    case at::kDouble:
      return kernels.float64;
    default:
      TORCH_CHECK_TYPE(false, name, ": got dtype ", dtype, ", expected float32, bfloat16 or float64");
  }
}

}  // namespace tokenfusion
