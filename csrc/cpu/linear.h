// x W^T + b by whichever of PyTorch's libraries is the faster one for it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace tokenfusion {

// x: [rows, in]; weight: [out, in], itself or its transpose contiguous. The result [rows, out] is `out`, or a new
// tensor.
at::Tensor linear(at::Tensor out, const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias = std::nullopt);

}  // namespace tokenfusion
