// The backward pass of the up-convolutions.
#pragma once

#include <array>
#include <tuple>

#include "upconv_tiles.h"

namespace tokenfusion {

// The gradients of x, weight and bias, for that of the up-sampled map, whose channels or rows are contiguous; those not
// needed are of size 0.
std::tuple<Tensor, Tensor, Tensor> upconv_backward(const Tensor& grad_up, const Tensor& x, const Tensor& weight,
                                                   std::array<bool, 3> needed, Product product);

}  // namespace tokenfusion
