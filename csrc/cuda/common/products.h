// Matrix products by the library. PyTorch decides by whose kernels, and in which precision: "TF32" is what it was set
// to.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "tensors.h"

namespace tokenfusion {

// out = a b + bias
inline void multiply(Tensor out, const Tensor& a, const Tensor& b, const OptionalTensor& bias = std::nullopt) {
  if (bias)
    at::addmm_out(out, *bias, a, b);
  else
    at::mm_out(out, a, b);
}

// sum = a^T b, in float32, or that added to it.
inline void add_product(Tensor sum, const Tensor& a, const Tensor& b, bool is_first) {
  at::addmm_out(sum, sum, a.t(), b, at::kFloat, is_first ? 0 : 1);
}

}  // namespace tokenfusion
