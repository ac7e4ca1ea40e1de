// Products of matrices by PyTorch's library. In bfloat16 on a processor that it has no instructions for, PyTorch's take
// 5 to 200 times as long as those of float32, so operands are widened there, and results rounded once.
#pragma once

#include "../../common/tensors.h"

namespace tokenfusion {

// The matrix, or a wider copy where products of its dtype are computed so: for one that several of them share.
Tensor widened(const Tensor& matrix);

// out = a b, or out = added + a b, which may be out itself. out, and a or b once widened, may be float32 beside
// bfloat16.
void library_product(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& added = std::nullopt);

}  // namespace tokenfusion
