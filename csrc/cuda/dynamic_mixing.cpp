#include "dynamic_mixing.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>

#include "../common/dynamic_mixing_checks.h"
#include "common/limits.h"
#include "common/tensors.h"
#include "dynamic_mixing_launch.h"

namespace tokenfusion {
namespace {

typedef DynamicMixingKernel Kernel;

constexpr int64_t kMaxTokens = 64, kMaxReduced = 16;
constexpr int64_t kTargets = kDynamicMixingTargets;
constexpr int64_t kMaxSplits = 64;  // sums of the generator's gradients, each as large as the generator

DynamicMixingView view_of(const Tensor& tensor, int64_t segments, int64_t dim) {
  const bool aligned = has_aligned_rows(tensor) && tensor.size(3) / segments * tensor.element_size() % 16 == 0;
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(3 - dim), tensor.stride(dim),
          aligned};
}

// [N * N, K], its rows padded with zeros to 16 bytes where they are not of 16 bytes already.
Tensor with_aligned_columns(const Tensor& weight) {
  const int64_t unit = 16 / weight.element_size(), missing = (unit - weight.size(1) % unit) % unit;
  if (missing > 0) return at::constant_pad_nd(weight, {0, missing});
  return weight.is_contiguous() && has_aligned_rows(weight) ? weight : weight.clone(at::MemoryFormat::Contiguous);
}

// [N * N, K] as DynamicMixingParams::weight_columns.
Tensor columns_of(const Tensor& weight, int64_t tokens) {
  const int64_t missing = (kTargets - tokens % kTargets) % kTargets;
  const Tensor columns = weight.reshape({tokens, tokens, -1}).permute({2, 0, 1});
  const Tensor padded = at::constant_pad_nd(columns, {0, missing, 0, tokens % 2});
  return padded.unflatten(2, {-1, kTargets}).transpose(1, 2).contiguous();
}

struct Call {
  DynamicMixingParams p{};
  const Dtype dtype;
  const at::TensorOptions float32;
  Tensor weight, bias;

  // The tensors hold at least one element each.
  Call(const Tensor& x, const Tensor& compressed, const Tensor& weight_, const Tensor& bias_, int64_t segments,
       int64_t dim)
      : dtype(dtype_of("x", x)),
        float32(x.options().dtype(at::kFloat)),
        weight(with_aligned_columns(weight_)),
        bias(bias_.contiguous()) {
    const int64_t tokens = x.size(dim), reduced = compressed.size(3) / segments;
    const int64_t most = dynamic_mixing_cuda_max_reduced(tokens, x.element_size(), x.get_device());
    TORCH_CHECK_VALUE(reduced <= most, "compressed: got d = ", reduced, ", expected at most ", most,
                      " for N = ", tokens);
    TORCH_CHECK_VALUE(std::max(x.size(3 - dim), x.size(3)) <= std::numeric_limits<int32_t>::max(), "x: got shape ",
                      x.sizes(), ", expected fewer lines and channels");
    p.x = view_of(x, segments, dim);
    p.compressed = view_of(compressed, segments, dim);
    p.weight = weight.const_data_ptr();
    p.bias = bias.const_data_ptr();
    p.rows = x.size(0) * x.size(3 - dim) * segments;
    p.lines = x.size(3 - dim);
    p.tokens = tokens;
    p.channels = x.size(3);
    p.segments = segments;
    p.reduced = reduced;
    p.weight_pitch = weight.size(1);
    p.splits = 1;
    for (Kernel kernel : {Kernel::kGradX, Kernel::kGradCompressed})
      TORCH_CHECK_VALUE(blocks(kernel) <= std::numeric_limits<int32_t>::max(), "x: got shape ", x.sizes(),
                        ", expected a smaller batch");
  }

  int64_t blocks(Kernel kernel) const { return dynamic_mixing_blocks(p, kernel, dtype == Dtype::kFloat32 ? 4 : 2); }

  void run_backward(Kernel kernel) const {
    C10_CUDA_CHECK(run_dynamic_mixing_backward(p, kernel, dtype, c10::cuda::getCurrentCUDAStream()));
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& compressed, const Tensor& generate_weight,
                                   const Tensor& generate_bias, int64_t segments, int64_t dim, bool with_mean) {
  dynamic_mixing::check_operands(x, compressed, generate_weight, generate_bias, segments, dim);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor mixed = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return {mixed, with_mean ? x.new_empty({x.size(0), x.size(3)}) : x.new_empty({0})};
  Call call(x, compressed, generate_weight, generate_bias, segments, dim);
  call.p.mixed = view_of(mixed, segments, dim);
  Tensor line_sums;
  if (with_mean) {
    line_sums = at::empty({x.size(0), x.size(3 - dim), x.size(3)}, call.float32);
    call.p.line_sums = line_sums.data_ptr<float>();
  }
  C10_CUDA_CHECK(run_dynamic_mixing_forward(call.p, call.dtype, c10::cuda::getCurrentCUDAStream()));
  if (!with_mean) return {mixed, at::empty({0}, x.options())};
  return {mixed, line_sums.sum(1).div_(x.size(1) * x.size(2)).to(x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_mixed_, const OptionalTensor& grad_mean_,
                                                    const Tensor& x, const Tensor& compressed,
                                                    const Tensor& generate_weight, const Tensor& generate_bias,
                                                    int64_t segments, int64_t dim, std::array<bool, 4> needed) {
  dynamic_mixing::check_operands(x, compressed, generate_weight, generate_bias, segments, dim);
  dynamic_mixing::check_gradients(grad_mixed_, grad_mean_, x);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor grad_x = empty_gradient(needed[0], x), grad_compressed = empty_gradient(needed[1], compressed);
  Tensor grad_weight = empty_gradient(needed[2], generate_weight), grad_bias = empty_gradient(needed[3], generate_bias);
  if (x.numel() == 0) {
    for (const Tensor& grad : {grad_x, grad_compressed, grad_weight, grad_bias}) grad.zero_();
    return {grad_x, grad_compressed, grad_weight, grad_bias};
  }
  Call call(x, compressed, generate_weight, generate_bias, segments, dim);
  DynamicMixingParams& p = call.p;
  const Tensor grad_mixed = with_contiguous_rows(grad_mixed_);
  p.grad_mixed = view_of(grad_mixed, segments, dim);
  Tensor grad_mean, columns, partial_weight, partial_bias;
  if (grad_mean_) {
    grad_mean = grad_mean_->to(at::kFloat).div(x.size(1) * x.size(2)).contiguous();
    p.grad_mean = grad_mean.const_data_ptr<float>();
  }
  if (needed[0]) {
    p.grad_x = view_of(grad_x, segments, dim);
    call.run_backward(Kernel::kGradX);
  }
  if (needed[1]) {
    columns = columns_of(generate_weight, p.tokens);
    p.weight_columns = columns.const_data_ptr();
    p.grad_compressed = view_of(grad_compressed, segments, dim);
    call.run_backward(Kernel::kGradCompressed);
  }
  if (needed[2] || needed[3]) {
    const int64_t most = std::min(kMaxSplits, call.blocks(Kernel::kForward));
    p.splits = std::clamp<int64_t>(
        attribute(cudaDevAttrMultiProcessorCount, x.get_device()) / call.blocks(Kernel::kGradWeight), 1, most);
    partial_weight = at::empty({p.splits, generate_weight.size(0), generate_weight.size(1)}, call.float32);
    partial_bias = at::empty({p.splits, generate_bias.size(0)}, call.float32);
    p.grad_weight = partial_weight.data_ptr<float>();
    p.grad_bias = partial_bias.data_ptr<float>();
    call.run_backward(Kernel::kGradWeight);
    if (needed[2]) grad_weight = partial_weight.sum(0).to(x.scalar_type());
    if (needed[3]) grad_bias = partial_bias.sum(0).to(x.scalar_type());
  }
  return {grad_x, grad_compressed, grad_weight, grad_bias};
}

}  // namespace

int64_t dynamic_mixing_cuda_max_reduced(int64_t tokens, int64_t itemsize, int64_t device) {
  if (tokens > kMaxTokens) return 0;
  const int64_t available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, int(device));
  int64_t reduced = kMaxReduced;
  const auto needed = [&] {
    return std::max(dynamic_mixing_shared_bytes(int(tokens), int(reduced), int(itemsize)),
                    dynamic_mixing_forward_shared_bytes(int(tokens), int(reduced), int(itemsize)));
  };
  while (reduced > 0 && needed() > available) --reduced;
  return reduced;
}

TORCH_LIBRARY_IMPL(tokenfusion, CUDA, library) {
  library.impl("dynamic_mixing_cuda", forward);
  library.impl("dynamic_mixing_backward_cuda", backward);
}

}  // namespace tokenfusion
