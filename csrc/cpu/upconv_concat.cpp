#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
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

void write(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
           bool skip_first, Tensor& out, std::string_view name) {
  const int64_t channels = weight.size(1), skipped = skip ? skip->size(1) : 0;
  if (x.numel() == 0) return;
  if (skip) {
    const Tensor slice = out.narrow(1, skip_first ? 0 : channels, skipped);
    if (!upconv::is_same_memory(slice, *skip)) slice.copy_(*skip);
  }
  const Tensor up = out.narrow(1, skip_first ? skipped : 0, channels);
  const UpconvForm form = upconv_form(name, up, weight.size(2));
  if (form.in_place) return write_upconv(up, x, weight, bias, std::nullopt, std::nullopt, std::nullopt);
  const UpconvTiles tiles(x, up, weight.size(2), form.product);
  const Tensor matrix = tiles.weight_matrix(weight);
  const std::vector<UpconvBlock> blocks = tiles.blocks(false);
  // Threads take blocks of their own: a product shared by threads would have them wait for each other many times.
  at::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Tensor buffer = tiles.buffer(false, channels);
    for (int64_t i = begin; i < end; ++i) {
      Tensor product = tiles.product(buffer, blocks[i], channels);
      tiles.multiply(product, tiles.pixel_matrix(blocks[i]), tiles.columns(matrix, blocks[i]));
      tiles.scatter(buffer, blocks[i], bias, false);
    }
  });
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
               bool skip_first, bool channels_last, std::string_view form) {
  upconv::check_operands(x, weight, bias, skip);
  const int64_t channels = weight.size(1) + (skip ? skip->size(1) : 0);
  Tensor out = empty_map(upconv::map_sizes(x, weight, channels), x, channels_last);
  write(x, weight, bias, skip, skip_first, out, form);
  return out;
}

void forward_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
                 bool skip_first, Tensor& out, std::string_view form) {
  upconv::check_operands(x, weight, bias, skip);
  upconv::check_out(out, x, weight, weight.size(1) + (skip ? skip->size(1) : 0));
  write(x, weight, bias, skip, skip_first, out, form);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_up, const Tensor& x, const Tensor& weight,
                                            std::array<bool, 3> needed, std::string_view form) {
  upconv::check_operands(x, weight, std::nullopt, std::nullopt);
  upconv::check_map("grad_up", grad_up, x, weight, weight.size(1));
  const Product product = upconv_form(form, grad_up, weight.size(2)).product;
  return upconv_backward(upconv::with_planes_or_pixels(grad_up), x, weight, needed, product);
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("upconv_concat_cpu", forward);
  library.impl("upconv_concat_out_cpu", forward_out);
  library.impl("upconv_concat_backward_cpu", backward);
}

}  // namespace tokenfusion
