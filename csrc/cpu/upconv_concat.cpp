#include "upconv_concat.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "upconv_tiles.h"

namespace tokenfusion {
namespace {

void write(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
           bool skip_first, Tensor& out) {
  const int64_t channels = weight.size(1), skipped = skip ? skip->size(1) : 0;
  if (x.numel() == 0) return;
  if (skip) {
    const Tensor slice = out.narrow(1, skip_first ? 0 : channels, skipped);
    if (!slice.is_alias_of(*skip) || slice.data_ptr() != skip->data_ptr()) slice.copy_(*skip);
  }
  const UpconvTiles tiles(x, out.narrow(1, skip_first ? skipped : 0, channels), weight.size(2));
  const Tensor matrix = tiles.weight_matrix(weight);
  std::vector<UpconvBlock> blocks;
  tiles.each_block(false, [&](const UpconvBlock& block) { blocks.push_back(block); });
  // Threads take blocks of their own: a product shared by threads would have them wait for each other many times.
  at::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Tensor buffer = tiles.buffer(false, channels);
    for (int64_t i = begin; i < end; ++i) {
      Tensor product = tiles.product(buffer, blocks[i], channels);
      at::mm_out(product, tiles.pixel_matrix(blocks[i]), tiles.columns(matrix, blocks[i]));
      tiles.scatter(buffer, blocks[i], bias, false);
    }
  });
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
               bool skip_first, bool channels_last) {
  const int64_t scale = weight.size(2), channels = weight.size(1) + (skip ? skip->size(1) : 0);
  Tensor out = empty_map({x.size(0), channels, scale * x.size(2), scale * x.size(3)}, x, channels_last);
  write(x, weight, bias, skip, skip_first, out);
  return out;
}

void forward_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
                 bool skip_first, Tensor& out) {
  write(x, weight, bias, skip, skip_first, out);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_up_, const Tensor& x, const Tensor& weight,
                                            std::array<bool, 3> needed) {
  const Tensor grad_up = with_contiguous_rows(grad_up_), none = at::empty({0}, x.options());
  const int64_t channels = weight.size(1), scale = weight.size(2);
  const UpconvTiles tiles(x, grad_up, scale);
  const Tensor matrix = tiles.weight_matrix(weight), buffer = tiles.buffer(true, channels);
  const Tensor grad_x = needed[0] ? tiles.empty_pixels() : none;
  const Tensor grad_matrix = needed[1] ? empty_sum(matrix.sizes(), x) : none;
  const Tensor grad_bias = needed[2] ? empty_sum({channels}, x).zero_() : none;
  if (needed[1] && x.numel() == 0) grad_matrix.zero_();
  tiles.each_block(true, [&](const UpconvBlock& block) {
    tiles.gather(buffer, block);
    const Tensor product = tiles.product(buffer, block, channels);
    if (needed[0]) tiles.set_pixels(grad_x, block, product, matrix.t());
    if (needed[1]) accumulate(grad_matrix, tiles.pixel_matrix(block).t(), product, block.first_row == 0);
    if (needed[2]) grad_bias.add_(tiles.by_channel(buffer, block, channels).sum(0, false, grad_bias.scalar_type()));
  });
  return {needed[0] ? in_format_of(grad_x, x) : none, needed[1] ? tiles.weight_from_matrix(grad_matrix, weight) : none,
          grad_bias.to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("upconv_concat_cpu", forward);
  library.impl("upconv_concat_out_cpu", forward_out);
  library.impl("upconv_concat_backward_cpu", backward);
}

}  // namespace tokenfusion
