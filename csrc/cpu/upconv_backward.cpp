#include "upconv_backward.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <vector>

namespace tokenfusion {
namespace {

// Threads take blocks of their own, as in the forward pass.
Tensor input_gradient(const Tensor& grad_up, const Tensor& x, const Tensor& weight, Product product) {
  const UpconvTiles tiles(x, grad_up, weight.size(2), product);
  const Tensor matrix = tiles.weight_matrix(weight).t(), grad_x = tiles.empty_pixels();
  const std::vector<UpconvBlock> blocks = tiles.blocks(true);
  at::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Tensor buffer = tiles.buffer(true, weight.size(1));
    for (int64_t i = begin; i < end; ++i) {
      tiles.gather(buffer, blocks[i]);
      tiles.set_pixels(grad_x, blocks[i], tiles.product(buffer, blocks[i], weight.size(1)), matrix);
    }
  });
  return in_format_of(grad_x, x);
}

// All tensors are the parts of some channels; gradients that are not defined are not needed.
void set_parameter_gradients(const Tensor& grad_up, const Tensor& x, const Tensor& grad_weight, const Tensor& grad_bias,
                             Product product) {
  const int64_t channels = grad_up.size(1), scale = grad_up.size(2) / x.size(2);
  const UpconvTiles tiles(x, grad_up, scale, product);
  const Tensor buffer = tiles.buffer(true, channels);
  const bool in_place = grad_weight.defined() && tiles.is_matrix(grad_weight) && x.scalar_type() != at::kBFloat16;
  const Tensor weight_sum = in_place                ? tiles.weight_matrix(grad_weight)
                            : grad_weight.defined() ? empty_sum({x.size(1), channels * scale * scale}, x)
                                                    : Tensor();
  const Tensor bias_sum = grad_bias.defined() ? empty_sum({channels}, x).zero_() : Tensor();
  for (const UpconvBlock& block : tiles.blocks(true)) {
    tiles.gather(buffer, block);
    if (grad_weight.defined())
      tiles.accumulate(weight_sum, tiles.pixel_matrix(block).t(), tiles.product(buffer, block, channels),
                       block.first_row == 0);
    if (grad_bias.defined())
      bias_sum.add_(tiles.by_channel(buffer, block, channels).sum(0, false, bias_sum.scalar_type()));
  }
  if (grad_weight.defined() && !in_place) grad_weight.copy_(tiles.weight_of_matrix(weight_sum));
  if (grad_bias.defined()) grad_bias.copy_(bias_sum);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> upconv_backward(const Tensor& grad_up, const Tensor& x, const Tensor& weight,
                                                   std::array<bool, 3> needed, Product product) {
  const Tensor none = at::empty({0}, x.options());
  const Tensor grad_x = needed[0] ? input_gradient(grad_up, x, weight, product) : none;
  const Tensor grad_weight = needed[1] ? at::empty_like(weight) : none;
  const Tensor grad_bias = needed[2] ? at::empty({weight.size(1)}, x.options()) : none;
  if (x.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
  } else if (needed[1] || needed[2]) {
    // Threads take channels of their own, so that none adds to what another has computed.
    const int64_t channels = weight.size(1), part = at::divup(channels, at::get_num_threads());
    at::parallel_for(0, at::divup(channels, part), 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;
      for (int64_t first = begin * part; first < std::min(end * part, channels); first += part) {
        const int64_t count = std::min(part, channels - first);
        set_parameter_gradients(grad_up.narrow(1, first, count), x,
                                needed[1] ? grad_weight.narrow(1, first, count) : Tensor(),
                                needed[2] ? grad_bias.narrow(0, first, count) : Tensor(), product);
      }
    });
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace tokenfusion
