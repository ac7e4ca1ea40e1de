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
#include "common/products.h"
#include "common/tensors.h"
#include "dynamic_mixing_backward.h"
#include "dynamic_mixing_forward.h"

namespace tokenfusion {
namespace {

constexpr int64_t kMaxTokens = 64, kMaxReduced = 16;
constexpr int64_t kMinChunk = 16;  // rows

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

// Rows whose logits' gradients exist together: as many as the L2 cache holds, in equal chunks.
int64_t chunk_of(int64_t rows, int64_t logits, const Tensor& x) {
  const int64_t cache = attribute(cudaDevAttrL2CacheSize, x.get_device());
  const int64_t most = std::max<int64_t>(cache / (logits * x.element_size()), kMinChunk);
  return std::min(rows, divide_up(divide_up(rows, divide_up(rows, most)), kMinChunk) * kMinChunk);
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
    TORCH_CHECK_VALUE(p.rows <= std::numeric_limits<int32_t>::max(), "x: got shape ", x.sizes(),
                      ", expected a smaller batch");
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
  const Tensor grad_mixed = with_contiguous_rows(grad_mixed_);
  const DynamicMixingParams& of_call = call.p;
  DynamicMixingBackward p{};
  p.x = of_call.x, p.compressed = of_call.compressed, p.grad_mixed = view_of(grad_mixed, segments, dim);
  p.weight = of_call.weight, p.bias = of_call.bias, p.weight_pitch = of_call.weight_pitch;
  p.lines = of_call.lines, p.tokens = of_call.tokens, p.channels = of_call.channels;
  p.segments = segments, p.reduced = of_call.reduced;
  Tensor grad_mean;
  if (grad_mean_) {
    grad_mean = grad_mean_->to(at::kFloat).div(x.size(1) * x.size(2)).contiguous();
    p.grad_mean = grad_mean.const_data_ptr<float>();
  }
  if (needed[0]) p.grad_x = view_of(grad_x, segments, dim);
  if (needed[1]) p.grad_compressed = view_of(grad_compressed, segments, dim);
  const auto run = [&](int64_t first, int64_t rows) {
    p.first_row = first, p.rows = rows;
    C10_CUDA_CHECK(run_dynamic_mixing_backward(p, call.dtype, c10::cuda::getCurrentCUDAStream()));
  };
  if (!needed[2] && !needed[3]) {
    run(0, of_call.rows);
    return {grad_x, grad_compressed, grad_weight, grad_bias};
  }
  const int64_t padded = dynamic_mixing_padded_tokens(p.tokens), logits = padded * padded;
  const int64_t columns = dynamic_mixing_columns(p.tokens * p.reduced), chunk = chunk_of(of_call.rows, logits, x);
  const Tensor logit_gradients = at::empty({chunk, logits}, x.options());
  const Tensor inputs = at::empty({chunk, columns}, x.options());
  const Tensor product = at::empty({logits, columns}, call.float32);
  p.logit_gradients = logit_gradients.data_ptr(), p.rows_of_inputs = inputs.data_ptr();
  for (int64_t first = 0; first < of_call.rows; first += chunk) {
    const int64_t rows = std::min(chunk, of_call.rows - first);
    run(first, rows);
    add_product(product, logit_gradients.narrow(0, 0, rows), inputs.narrow(0, 0, rows), first == 0);
  }
  DynamicMixingGenerator generator{};
  generator.product = product.const_data_ptr<float>();
  if (needed[2]) generator.grad_weight = grad_weight.data_ptr();
  if (needed[3]) generator.grad_bias = grad_bias.data_ptr();
  generator.tokens = p.tokens, generator.padded_tokens = padded;
  generator.inputs = p.tokens * p.reduced, generator.columns = columns;
  C10_CUDA_CHECK(run_dynamic_mixing_generator(generator, call.dtype, c10::cuda::getCurrentCUDAStream()));
  return {grad_x, grad_compressed, grad_weight, grad_bias};
}

// Of a block, forward or backward.
int64_t least_shared_bytes(int64_t tokens, int64_t reduced, int64_t itemsize) {
  return std::max(dynamic_mixing_forward_shared_bytes(int(tokens), int(reduced), int(itemsize)),
                  dynamic_mixing_backward_shared_bytes(int(tokens), int(reduced), int(itemsize)));
}

}  // namespace

int64_t dynamic_mixing_cuda_max_reduced(int64_t tokens, int64_t itemsize, int64_t device) {
  if (tokens > kMaxTokens) return 0;
  const int64_t available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, int(device));
  int64_t reduced = kMaxReduced;
  while (reduced > 0 && least_shared_bytes(tokens, reduced, itemsize) > available) --reduced;
  return reduced;
}

TORCH_LIBRARY_IMPL(tokenfusion, CUDA, library) {
  library.impl("dynamic_mixing_cuda", forward);
  library.impl("dynamic_mixing_backward_cuda", backward);
}

}  // namespace tokenfusion
