// The up-convolutions by the CPU's own matrix product, which stores the channels of each pixel at their place.
#pragma once

#include "upconv_tiles.h"

namespace tokenfusion {

// Whether that product takes the dtype on this processor, and the channels that lie together fill its panels.
bool gemm_pays(const Tensor& out, int64_t scale);

// out = proj_up up(x) + proj_skip skip + bias, where a projection that is absent is 1 and a skip that is absent 0.
// Either the channels or the pixels of a row of out are contiguous.
void write_upconv(const Tensor& out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& skip, const OptionalTensor& proj_up, const OptionalTensor& proj_skip);

}  // namespace tokenfusion
