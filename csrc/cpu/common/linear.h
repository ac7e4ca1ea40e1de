// x W^T + b by whichever of PyTorch's libraries is the faster one for it. The package's `linear` does the same for
// whole layers in Python, where this extension may be missing.
#pragma once

#include "../../common/tensors.h"

namespace tokenfusion {

// x: [rows, in]; weight: [out, in], itself or its transpose contiguous. The result [rows, out] is `out`, or a new
// tensor.
Tensor linear(Tensor out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt);

}  // namespace tokenfusion
