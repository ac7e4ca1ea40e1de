// The up-convolutions by the CPU's own matrix product, which stores the channels of each pixel at their place.
#pragma once

#include <string_view>

#include "upconv_tiles.h"

namespace tokenfusion {

// What makes the products of an up-convolution, by the name of a form: "library", PyTorch's, into tiles, from which
// they are brought to their places; "tiles", the CPU's own into tiles; "" that at once where there are many pixels and
// the channels that lie together fill its panels, else into tiles.
struct UpconvForm {
  bool in_place;
  Product product;  // of tiles, and of the backward pass
};
UpconvForm upconv_form(std::string_view name, const Tensor& out, int64_t scale);

// out = proj_up up(x) + proj_skip skip + bias, where a projection that is absent is 1 and a skip that is absent 0.
// Either the channels or the pixels of a row of out are contiguous.
void write_upconv(const Tensor& out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& skip, const OptionalTensor& proj_up, const OptionalTensor& proj_skip);

}  // namespace tokenfusion
