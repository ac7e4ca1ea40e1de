// What the host side of every operator does with tensors, on every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

namespace tokenfusion {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What sums of the tensor's elements are held in.
inline at::ScalarType accumulation_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor itself, or a contiguous copy where its innermost dimension is not contiguous.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// An uninitialised gradient; of size 0 where it is not needed.
inline Tensor empty_gradient(bool needed, const Tensor& like, at::ScalarType dtype) {
  const auto options = like.options().dtype(dtype);
  return needed ? at::empty(like.sizes(), options) : at::empty({0}, options);
}

inline Tensor empty_gradient(bool needed, const Tensor& like) {
  return empty_gradient(needed, like, like.scalar_type());
}

}  // namespace tokenfusion
