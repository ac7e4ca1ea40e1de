// x W^T + b by one of PyTorch's libraries. The package's `linear` does the same for
// whole layers in Python, where this extension may be missing.
#pragma once

#include "../../common/tensors.h"

namespace tokenfusion {

// Whose product in float32: oneDNN's, where it is there, or BLAS's. Those of other dtypes are library_product.h's.
enum class Library { kOneDnn, kBlas };

// x: [rows, in]; weight: [out, in], itself or its transpose contiguous, and widened or not. The result [rows, out] is
// `out`, or a new tensor.
Tensor linear(Library library, Tensor out, const Tensor& x, const Tensor& weight,
              const OptionalTensor& bias = std::nullopt);

}  // namespace tokenfusion
