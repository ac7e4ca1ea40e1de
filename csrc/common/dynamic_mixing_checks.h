// What dynamic_mixing asks of its operands, on every device.
#pragma once

#include "checks.h"

namespace tokenfusion {
namespace dynamic_mixing {

inline void check_operands(const Tensor& x, const Tensor& compressed, const Tensor& generate_weight,
                           const Tensor& generate_bias, int64_t segments, int64_t dim) {
  check_rank("x", x, 4);
  check_rank("compressed", compressed, 4);
  TORCH_CHECK_VALUE(dim == 1 || dim == 2, "dim: got ", dim, ", expected 1 or 2");
  const int64_t length = x.size(dim), all = compressed.size(3);
  TORCH_CHECK_VALUE(segments > 0 && x.size(3) % segments == 0 && all % segments == 0, "segments: got ", segments,
                    ", expected a divisor of ", x.size(3), " and ", all);
  TORCH_CHECK_VALUE(length > 0 && all > 0, "x, compressed: got shapes ", x.sizes(), ", ", compressed.sizes(),
                    ", expected at least one token and one channel");
  check("compressed", compressed, {x.size(0), x.size(1), x.size(2), all}, x.options());
  check("generate_weight", generate_weight, {length * length, length * (all / segments)}, x.options());
  check("generate_bias", generate_bias, {length * length}, x.options());
  check_contiguous_rows("x", x);
  check_contiguous_rows("compressed", compressed);
}

// Beside check_operands, for the backward pass.
inline void check_gradients(const Tensor& grad_mixed, const OptionalTensor& grad_mean, const Tensor& x) {
  check("grad_mixed", grad_mixed, x.sizes(), x.options());
  check("grad_mean", grad_mean, {x.size(0), x.size(3)}, x.options());
}

}  // namespace dynamic_mixing
}  // namespace tokenfusion
