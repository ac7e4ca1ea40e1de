#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>
#include <vector>

#include "../common/upconv_checks.h"
#include "upconv_backward.h"
#include "upconv_gemm.h"
#include "upconv_tiles.h"

namespace tokenfusion {
namespace {

// The part of the skip in the block's fine rows: its projection, or the skip itself where there is none.
void write_skip(const UpconvTiles& tiles, const UpconvBlock& block, const Tensor& out, const Tensor& skip,
                const OptionalTensor& proj_skip) {
  std::vector<Tensor> outs = tiles.fine_matrices(out, block);
  const std::vector<Tensor> skips = tiles.fine_matrices(skip, block);
  for (size_t i = 0; i < outs.size(); ++i) {
    if (proj_skip)
      tiles.multiply(outs[i], skips[i], proj_skip->t());
    else
      outs[i].copy_(skips[i]);
  }
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
               const OptionalTensor& proj_up, const OptionalTensor& proj_skip, bool channels_last,
               std::string_view name) {
  upconv::check_projected_operands(x, weight, skip, proj_up, proj_skip);
  const int64_t scale = weight.size(2), up_channels = weight.size(1);
  const int64_t channels = proj_up ? proj_up->size(0) : up_channels;
  check("bias", bias, {channels}, x.options());
  Tensor out = empty_map(upconv::map_sizes(x, weight, channels), x, channels_last);
  if (x.numel() == 0) return out;
  const UpconvForm form = upconv_form(name, out, scale);
  if (form.in_place) {
    write_upconv(out, x, weight, bias, skip, proj_up, proj_skip);
    return out;
  }
  const UpconvTiles tiles(x, out, scale, form.product);
  const Tensor matrix = tiles.weight_matrix(weight);
  const std::vector<UpconvBlock> blocks = tiles.blocks(true);
  at::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {  // as in upconv_concat
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Tensor buffer = tiles.buffer(true, channels);
    const Tensor up_buffer = proj_up ? tiles.buffer(true, up_channels) : buffer;
    for (int64_t i = begin; i < end; ++i) {
      const UpconvBlock& block = blocks[i];
      if (skip) write_skip(tiles, block, out, *skip, proj_skip);
      Tensor product = tiles.product(up_buffer, block, up_channels);
      tiles.multiply(product, tiles.pixel_matrix(block), matrix);
      if (proj_up) {
        Tensor projected = tiles.by_channel(buffer, block, channels);
        tiles.multiply(projected, tiles.by_channel(up_buffer, block, up_channels), proj_up->t());
      }
      tiles.scatter(buffer, block, bias, skip.has_value());
    }
  });
  return out;
}

// The gradients of x, weight, bias and proj_up, where the weight is not composed with its projection.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_through_projection(const Tensor& grad_out, const Tensor& x,
                                                                        const Tensor& weight, const Tensor& proj_up,
                                                                        std::array<bool, 4> needed,
                                                                        Product multiplier) {
  const auto [need_x, need_weight, need_bias, need_proj_up] = needed;
  const int64_t channels = grad_out.size(1), up_channels = weight.size(1);
  const UpconvTiles tiles(x, grad_out, weight.size(2), multiplier);
  const Tensor matrix = tiles.weight_matrix(weight), none = at::empty({0}, x.options());
  const Tensor buffer = tiles.buffer(true, channels), up_buffer = tiles.buffer(true, up_channels);
  const Tensor grad_x = need_x ? tiles.empty_pixels() : none;
  const Tensor grad_matrix = need_weight ? empty_sum(matrix.sizes(), x) : none;
  const Tensor grad_bias = need_bias ? empty_sum({channels}, x).zero_() : none;
  const Tensor grad_proj_up = need_proj_up ? empty_sum(proj_up.sizes(), x) : none;
  if (x.numel() == 0)
    for (const Tensor& sum : {grad_matrix, grad_proj_up}) sum.zero_();
  for (const UpconvBlock& block : tiles.blocks(true)) {
    const bool first = block.first_row == 0;
    tiles.gather(buffer, block);
    const Tensor grad = tiles.by_channel(buffer, block, channels);
    Tensor product = tiles.product(up_buffer, block, up_channels);
    if (need_bias) grad_bias.add_(grad.sum(0, false, grad_bias.scalar_type()));
    if (need_proj_up) {
      tiles.multiply(product, tiles.pixel_matrix(block), matrix);
      tiles.accumulate(grad_proj_up, grad.t(), tiles.by_channel(up_buffer, block, up_channels), first);
    }
    if (need_x || need_weight) {
      Tensor grad_up = tiles.by_channel(up_buffer, block, up_channels);
      tiles.multiply(grad_up, grad, proj_up);
    }
    if (need_x) tiles.set_pixels(grad_x, block, product, matrix.t());
    if (need_weight) tiles.accumulate(grad_matrix, tiles.pixel_matrix(block).t(), product, first);
  }
  return {need_x ? in_format_of(grad_x, x) : none,
          need_weight ? at::empty_like(weight).copy_(tiles.weight_of_matrix(grad_matrix)) : none,
          grad_bias.to(x.scalar_type()), grad_proj_up.to(x.scalar_type())};
}

// The gradients of the skip and of proj_skip.
std::tuple<Tensor, Tensor> skip_gradients(const Tensor& grad_out, const Tensor& skip, const Tensor& proj_skip,
                                          const UpconvTiles& tiles, std::array<bool, 2> needed) {
  const auto [need_skip, need_proj_skip] = needed;
  const Tensor none = at::empty({0}, skip.options());
  const Tensor grad_skip = need_skip ? empty_map(skip.sizes(), skip, !tiles.planes()) : none;
  const Tensor grad_proj_skip = need_proj_skip ? empty_sum(proj_skip.sizes(), skip) : none;
  if (skip.numel() == 0) grad_proj_skip.zero_();
  const std::vector<UpconvBlock> blocks = tiles.blocks(true);
  if (need_skip)
    at::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {  // as in upconv_concat
      const at::AutoDispatchBelowADInplaceOrView no_autograd;
      for (int64_t i = begin; i < end; ++i) {
        const std::vector<Tensor> grads = tiles.fine_matrices(grad_out, blocks[i]);
        std::vector<Tensor> grad_skips = tiles.fine_matrices(grad_skip, blocks[i]);
        for (size_t j = 0; j < grads.size(); ++j) tiles.multiply(grad_skips[j], grads[j], proj_skip);
      }
    });
  if (need_proj_skip)
    for (const UpconvBlock& block : blocks) {
      const std::vector<Tensor> grads = tiles.fine_matrices(grad_out, block);
      const std::vector<Tensor> skips = tiles.fine_matrices(skip, block);
      for (size_t j = 0; j < grads.size(); ++j)
        tiles.accumulate(grad_proj_skip, grads[j].t(), skips[j], block.first_row == 0 && j == 0);
    }
  return {need_skip ? in_format_of(grad_skip, skip) : none, grad_proj_skip.to(skip.scalar_type())};
}

typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> Gradients;

Gradients backward(const Tensor& grad_out_, const Tensor& x, const Tensor& weight, const OptionalTensor& skip,
                   const OptionalTensor& proj_up, const OptionalTensor& proj_skip, std::array<bool, 6> needed,
                   std::string_view form) {
  const auto [need_x, need_weight, need_bias, need_skip, need_proj_up, need_proj_skip] = needed;
  upconv::check_projected_operands(x, weight, skip, proj_up, proj_skip);
  upconv::check_map("grad_out", grad_out_, x, weight, proj_up ? proj_up->size(0) : weight.size(1));
  upconv::check_needed(skip, proj_skip, need_skip || need_proj_skip);
  const Tensor grad_out = upconv::with_planes_or_pixels(grad_out_);
  const Product product = upconv_form(form, grad_out, weight.size(2)).product;
  Tensor grad_x, grad_weight, grad_bias, grad_proj_up = at::empty({0}, x.options());
  Tensor grad_skip = grad_proj_up, grad_proj_skip = grad_proj_up;
  if (proj_up)
    std::tie(grad_x, grad_weight, grad_bias, grad_proj_up) = gradients_through_projection(
        grad_out, x, weight, *proj_up, {need_x, need_weight, need_bias, need_proj_up}, product);
  else
    std::tie(grad_x, grad_weight, grad_bias) =
        upconv_backward(grad_out, x, weight, {need_x, need_weight, need_bias}, product);
  if (need_skip || need_proj_skip)
    std::tie(grad_skip, grad_proj_skip) = skip_gradients(
        grad_out, *skip, *proj_skip, UpconvTiles(x, grad_out, weight.size(2), product), {need_skip, need_proj_skip});
  return {grad_x, grad_weight, grad_bias, grad_skip, grad_proj_up, grad_proj_skip};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("upconv_concat_project_cpu", forward);
  library.impl("upconv_concat_project_backward_cpu", backward);
}

}  // namespace tokenfusion
