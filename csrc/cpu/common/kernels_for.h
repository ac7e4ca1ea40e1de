// What an operator's kernels are for a dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include "isa.h"

namespace tokenfusion {

// Those of float16, or null where an operator has none.
template <typename Kernels>
auto float16_of(const Kernels& kernels, int) -> decltype(&kernels.float16) {
  return &kernels.float16;
}
template <typename Kernels>
const typename Kernels::ForDtype* float16_of(const Kernels&, long) {
  return nullptr;
}

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
    default: {
      const auto* const float16 = float16_of(kernels, 0);
      TORCH_CHECK_TYPE(dtype == at::kHalf && float16 != nullptr, name, ": got dtype ", dtype,
                       ", expected float32, bfloat16, ", float16 != nullptr ? "float16 " : "", "or float64");
      return *float16;
    }
  }
}

}  // namespace tokenfusion
