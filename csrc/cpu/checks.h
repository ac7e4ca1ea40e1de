// What the operators ask of tensors whose memory they read by themselves. The public functions have checked all of it;
// who calls an operator directly gets an error, too.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace tokenfusion {

inline void check(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, ": got shape ", tensor.sizes(), ", expected ", sizes);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": got dtype ", tensor.scalar_type(), ", expected ", dtype);
}

inline void check(const char* name, const std::optional<at::Tensor>& tensor, at::IntArrayRef sizes,
                  at::ScalarType dtype) {
  if (tensor) check(name, *tensor, sizes, dtype);
}

inline void check_rank(const char* name, const at::Tensor& tensor, int64_t rank) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, name, ": got shape ", tensor.sizes(), ", expected ", rank, " dimensions");
}

}  // namespace tokenfusion
