#pragma once

#include <array>
#include <tuple>

#include "upconv_tiles.h"

namespace tokenfusion {

// Of x, weight and bias, for the gradient of the up-sampled map, which has contiguous rows; those not needed are of
// size 0.
std::tuple<Tensor, Tensor, Tensor> upconv_gradients(const Tensor& grad_up, const Tensor& x, const Tensor& weight,
                                                    std::array<bool, 3> needed);

}  // namespace tokenfusion
