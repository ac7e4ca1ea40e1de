// What the operators ask of tensors whose memory they read by themselves, on every device. The public functions have
// checked all of it; whoever calls an operator directly gets an error, too.
#pragma once

#include <ATen/core/Tensor.h>

#include "tensors.h"

namespace tokenfusion {

// `expected` gives the dtype and the device.
inline void check(const char* name, const Tensor& tensor, at::IntArrayRef sizes, const at::TensorOptions& expected) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(expected.dtype());
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, ": got shape ", tensor.sizes(), ", expected ", sizes);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": got dtype ", tensor.scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(tensor.device() == expected.device(), name, ": got a tensor on ", tensor.device(), ", expected ",
                    expected.device());
}

inline void check(const char* name, const OptionalTensor& tensor, at::IntArrayRef sizes,
                  const at::TensorOptions& expected) {
  if (tensor) check(name, *tensor, sizes, expected);
}

inline void check_rank(const char* name, const Tensor& tensor, int64_t rank) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, name, ": got shape ", tensor.sizes(), ", expected ", rank, " dimensions");
}

inline void check_contiguous_rows(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.stride(-1) == 1 || tensor.size(-1) == 1 || tensor.numel() == 0, name, ": got strides ",
                    tensor.strides(), ", expected a contiguous innermost dimension");
}

}  // namespace tokenfusion
