#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../common/upconv_checks.h"
#include "upconv_products.h"

namespace tokenfusion {
namespace {

using namespace upconv;

// up = the up-convolution with its bias, and what is added to it; joined = skip.
void write(const Tensor& up, const Tensor& x, const Tensor& weight, const OptionalTensor& bias_,
           const OptionalTensor& added_, const OptionalTensor& skip, const OptionalTensor& joined) {
  const Products products(x, weight, up);
  const bool planes = products.planes();
  OptionalTensor added = added_;
  if (added && !lies_as(*added, planes)) added = added->contiguous(format_of(planes));
  bool copies = skip && skip->size(1) > 0 && !is_same_memory(*joined, *skip);
  if (copies && !lies_as(*skip, planes)) {
    joined->copy_(*skip);
    copies = false;
  }
  const OptionalTensor bias = bias_ ? OptionalTensor(with_aligned_memory(*bias_)) : std::nullopt;
  const UpconvWay way = way_of(up, added, products.scale());
  const int64_t at_once = products.images_at_once(copies ? skip->size(1) : 0);
  for (int64_t first = 0; first < x.size(0); first += at_once) {
    const int64_t count = std::min(at_once, x.size(0) - first);
    const Tensor product = products.forward(first, count);
    UpconvPass p = pass_of(product, up.narrow(0, first, count), products.scale(), way);
    if (bias) p.bias = bias->const_data_ptr();
    if (added) p.added = described(added->narrow(0, first, count), planes);
    if (copies) p.copy = copy_of(skip->narrow(0, first, count), joined->narrow(0, first, count), planes);
    C10_CUDA_CHECK(run_upconv_forward(p, way, dtype_of("x", x), c10::cuda::getCurrentCUDAStream()));
  }
}

typedef std::tuple<Tensor, Tensor, Tensor> Gradients;

// Those of x, weight and bias.
Gradients gradients(const Tensor& grad_up, const Tensor& x, const Tensor& weight, std::array<bool, 3> needed) {
  const Tensor none = at::empty({0}, x.options());
  const Tensor grad_x = needed[0] ? at::empty_like(x, x.options(), format_like(x)) : none;
  if (x.numel() == 0 || !(needed[0] || needed[1] || needed[2]))
    return {grad_x, needed[1] ? at::empty_like(weight).zero_() : none,
            needed[2] ? at::zeros({weight.size(1)}, x.options()) : none};
  const Products products(x, weight, grad_up);
  const UpconvWay way = way_of(grad_up, std::nullopt, products.scale());
  const Tensor grad_matrix = needed[1] ? products.empty_weight_gradient() : none;
  Tensor grad_bias = none;
  const int64_t at_once = products.images_at_once(0);
  for (int64_t first = 0; first < x.size(0); first += at_once) {
    const int64_t count = std::min(at_once, x.size(0) - first);
    const Tensor gradient = products.empty_gradient(count);
    UpconvPass p = pass_of(gradient, grad_up.narrow(0, first, count), products.scale(), way);
    const Tensor sums =
        at::empty({needed[2] ? sums_of(p, products.planes()) : 0, weight.size(1)}, x.options().dtype(at::kFloat));
    if (needed[2]) p.sums = sums.data_ptr<float>();
    C10_CUDA_CHECK(run_upconv_backward(p, way, dtype_of("x", x), c10::cuda::getCurrentCUDAStream()));
    if (needed[0]) products.set_input_gradient(grad_x, gradient, first, count);
    if (needed[1]) products.add_weight_gradient(grad_matrix, gradient, first, count);
    if (needed[2]) grad_bias = first == 0 ? sums.sum(0) : grad_bias.add(sums.sum(0));
  }
  return {grad_x, needed[1] ? products.weight_of(grad_matrix) : none, grad_bias.to(x.scalar_type())};
}

void write_joined(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
                  bool skip_first, const Tensor& out) {
  if (x.numel() == 0) return;
  const int64_t channels = weight.size(1), skipped = skip ? skip->size(1) : 0;
  const Tensor up = out.narrow(1, skip_first ? skipped : 0, channels);
  write(up, x, weight, bias, std::nullopt, skip, out.narrow(1, skip_first ? 0 : channels, skipped));
}

Tensor concat(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
              bool skip_first, bool channels_last) {
  check_operands(x, weight, bias, skip);
  dtype_of("x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below;
  const int64_t channels = weight.size(1) + (skip ? skip->size(1) : 0);
  const Tensor out = at::empty(map_sizes(x, weight, channels), x.options(), format_of(!channels_last));
  write_joined(x, weight, bias, skip, skip_first, out);
  return out;
}

void concat_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
                bool skip_first, Tensor& out) {
  check_operands(x, weight, bias, skip);
  check_out(out, x, weight, weight.size(1) + (skip ? skip->size(1) : 0));
  dtype_of("x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below;
  write_joined(x, weight, bias, skip, skip_first, out);
}

Gradients concat_backward(const Tensor& grad_up, const Tensor& x, const Tensor& weight, std::array<bool, 3> needed) {
  check_operands(x, weight, std::nullopt, std::nullopt);
  check_map("grad_up", grad_up, x, weight, weight.size(1));
  dtype_of("x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below;
  return gradients(with_planes_or_pixels(grad_up), x, weight, needed);
}

void check_composed(const OptionalTensor& proj_up) {
  TORCH_CHECK_VALUE(!proj_up, "proj_up: got a projection, expected none: it is composed with the weight before");
}

// to = matrix [channels of to, channels of from] from, a pixel at a time; `to` is contiguous or channels_last.
void project(const Tensor& to, const Tensor& matrix, const Tensor& from) {
  if (!lies_in_planes(to)) return multiply(rows_of(to), rows_of(from), matrix.t());
  Tensor planes = to.flatten(2);
  at::bmm_out(planes, matrix.expand({to.size(0), matrix.size(0), matrix.size(1)}), from.flatten(2));
}

Tensor projected(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& skip,
                 const OptionalTensor& proj_up, const OptionalTensor& proj_skip, bool channels_last) {
  check_projected_operands(x, weight, skip, proj_up, proj_skip);
  check_composed(proj_up);
  check("bias", bias, {weight.size(1)}, x.options());
  dtype_of("x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor out = at::empty(map_sizes(x, weight, weight.size(1)), x.options(), format_of(!channels_last));
  if (x.numel() == 0) return out;
  const bool projects = skip && proj_skip;
  if (projects) project(out, *proj_skip, *skip);
  write(out, x, weight, bias, projects ? OptionalTensor(out) : skip, std::nullopt, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> projected_backward(
    const Tensor& grad_out_, const Tensor& x, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& proj_up, const OptionalTensor& proj_skip, std::array<bool, 6> needed) {
  check_projected_operands(x, weight, skip, proj_up, proj_skip);
  check_composed(proj_up);
  check_map("grad_out", grad_out_, x, weight, weight.size(1));
  check_needed(skip, proj_skip, needed[3] || needed[5]);
  dtype_of("x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor grad_out = with_planes_or_pixels(grad_out_), none = at::empty({0}, x.options());
  auto [grad_x, grad_weight, grad_bias] = gradients(grad_out, x, weight, {needed[0], needed[1], needed[2]});
  const Tensor grad_skip = needed[3] ? at::empty_like(*skip, skip->options(), format_like(*skip)) : none;
  if (needed[3] && skip->numel() > 0) project(grad_skip, proj_skip->t(), grad_out);
  const auto sum_of_pixels = [&] { return at::einsum("bpyx,bcyx->pc", {grad_out, *skip}).contiguous(); };
  return {grad_x, grad_weight, grad_bias, grad_skip, none, needed[5] ? sum_of_pixels() : none};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CUDA, library) {
  library.impl("upconv_concat_cuda", concat);
  library.impl("upconv_concat_out_cuda", concat_out);
  library.impl("upconv_concat_backward_cuda", concat_backward);
  library.impl("upconv_concat_project_cuda", projected);
  library.impl("upconv_concat_project_backward_cuda", projected_backward);
}

}  // namespace tokenfusion
