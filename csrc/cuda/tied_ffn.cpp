#include "tied_ffn.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <string_view>
#include <tuple>

#include "../common/tied_ffn_checks.h"
#include "common/products.h"
#include "common/tensors.h"
#include "tied_ffn_launch.h"

namespace tokenfusion {
namespace {

// Of the hidden layer so many tokens exist together that the narrower product has kTiles tiles of 128 x 128 for each
// multiprocessor, within kChunkBytes, but no fewer than kMinChunk; then up to twice as many, in equal chunks.
constexpr int64_t kTiles = 2, kChunkBytes = 64 << 20, kMinChunk = 128;

constexpr int64_t kThreadsPerMultiprocessor = 1024;
constexpr int64_t kMaxDepth = 32;  // a longer sum would lose precision

int64_t chunk_of(int64_t tokens, const Tensor& weight) {
  const int64_t features = weight.size(0), narrow = std::min(features, weight.size(1));
  const int64_t wanted = kTiles * 128 * 128 * multiprocessors(weight) / narrow;
  const int64_t least = std::max(std::min(wanted, kChunkBytes / (features * weight.element_size())), kMinChunk);
  const int64_t chunks = std::max<int64_t>(tokens / least, 1);
  return std::min(divide_up(divide_up(tokens, chunks), kMinChunk) * kMinChunk, tokens);
}

TiedFfnPass pass_of(int64_t tokens, const Tensor& weight) {
  const int64_t features = weight.size(0), vector = 16 / weight.element_size();
  TiedFfnPass p{};
  p.elements = tokens * features;
  p.line = std::lcm(features, vector);
  const int64_t vectors = p.lines() * (p.line / vector);
  p.depth = int32_t(
      std::clamp<int64_t>(divide_up(vectors, kThreadsPerMultiprocessor * multiprocessors(weight)), 1, kMaxDepth));
  TORCH_CHECK_VALUE(p.threads(weight.element_size()) <= std::numeric_limits<int32_t>::max(), "weight: got shape ",
                    weight.sizes(), ", expected fewer features");
  return p;
}

// Rows of [features] that the sums of a bias gradient have before they are added up, for chunks of so many tokens.
int64_t sums_of(int64_t tokens, int64_t chunk, const Tensor& weight) {
  const auto of_pass = [&](int64_t count) {
    const TiedFfnPass p = pass_of(count, weight);
    return p.sums() * p.line / weight.size(0);
  };
  return tokens == 0 ? 0 : tokens / chunk * of_pass(chunk) + of_pass(tokens % chunk);
}

// As cuBLAS and the kernels take them without another copy.
Tensor with_dense_rows(const Tensor& t) { return t.stride(1) == 1 && t.stride(0) >= t.size(1) ? t : t.contiguous(); }

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias_in,
                                   const OptionalTensor& bias_out, std::string_view activation_name, bool hold) {
  const Activation activation = tied_ffn::activation_of(activation_name);
  tied_ffn::check_operands(x_, weight, bias_in, bias_out);
  const Dtype dtype = dtype_of("x", x_);
  const c10::cuda::CUDAGuard guard(x_.device());
  const at::AutoDispatchBelowADInplaceOrView below;
  Tensor y = at::empty(x_.sizes(), x_.options());
  Tensor hidden = at::empty(hold ? tied_ffn::hidden_sizes(x_, weight) : std::vector<int64_t>{0}, x_.options());
  if (y.numel() == 0) return {y, hidden};
  const Tensor x = with_dense_rows(tied_ffn::flat(x_)), flat_y = tied_ffn::flat(y);
  const Tensor flat_hidden = hold ? tied_ffn::flat(hidden) : hidden;
  const int64_t tokens = x.size(0), chunk = chunk_of(tokens, weight);
  const Tensor scratch = at::empty({chunk, weight.size(0)}, x.options());
  for (int64_t first = 0; first < tokens; first += chunk) {
    const int64_t count = std::min(chunk, tokens - first);
    const Tensor activated = scratch.narrow(0, 0, count), u = hold ? flat_hidden.narrow(0, first, count) : activated;
    multiply(u, x.narrow(0, first, count), weight.t(), bias_in);
    TiedFfnPass p = pass_of(count, weight);
    p.hidden = u.const_data_ptr();
    p.activated = activated.data_ptr();
    C10_CUDA_CHECK(run_tied_ffn_forward(p, activation, dtype, c10::cuda::getCurrentCUDAStream()));
    multiply(flat_y.narrow(0, first, count), activated, weight, bias_out);
  }
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y_, const Tensor& x_, const Tensor& weight,
                                                    const OptionalTensor& bias_in, const Tensor& hidden_,
                                                    std::string_view activation_name, std::array<bool, 4> needed) {
  const Activation activation = tied_ffn::activation_of(activation_name);
  tied_ffn::check_operands(x_, weight, bias_in, std::nullopt);
  tied_ffn::check_gradient(grad_y_, hidden_, x_, weight);
  const Dtype dtype = dtype_of("x", x_);
  const c10::cuda::CUDAGuard guard(x_.device());
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor x = with_dense_rows(tied_ffn::flat(x_)), grad_y = with_dense_rows(tied_ffn::flat(grad_y_));
  const bool held = hidden_.numel() > 0;
  const Tensor hidden = held ? with_aligned_memory(tied_ffn::flat(hidden_)) : hidden_;
  const int64_t tokens = x.size(0), features = weight.size(0), chunk = chunk_of(tokens, weight);
  const bool goes_back = needed[0] || needed[1] || needed[2];
  const Tensor activated_part = at::empty({needed[1] || (goes_back && !held) ? chunk : 0, features}, x.options());
  const Tensor grad_part = at::empty({goes_back ? chunk : 0, features}, x.options());
  const auto float32 = x.options().dtype(at::kFloat);
  const Tensor sums = at::empty({needed[2] ? sums_of(tokens, chunk, weight) : 0, features}, float32);
  const Tensor grad_x = empty_gradient(needed[0], x_), grad_weight = empty_gradient(needed[1], weight, at::kFloat);
  const Tensor flat_grad_x = needed[0] ? tied_ffn::flat(grad_x) : grad_x;
  if (tokens == 0) grad_weight.zero_();
  float* grad_bias = needed[2] ? sums.data_ptr<float>() : nullptr;
  for (int64_t first = 0; first < tokens && goes_back; first += chunk) {
    const int64_t count = std::min(chunk, tokens - first);
    const Tensor x_rows = x.narrow(0, first, count), grad_rows = grad_y.narrow(0, first, count);
    const Tensor grad_hidden = grad_part.narrow(0, 0, count);
    const Tensor u = held ? hidden.narrow(0, first, count) : activated_part.narrow(0, 0, count);
    if (!held) multiply(u, x_rows, weight.t(), bias_in);
    multiply(grad_hidden, grad_rows, weight.t());
    TiedFfnPass p = pass_of(count, weight);
    p.hidden = u.const_data_ptr();
    p.activated = needed[1] ? activated_part.data_ptr() : nullptr;
    p.grad = grad_hidden.data_ptr();
    p.grad_bias = grad_bias;
    C10_CUDA_CHECK(run_tied_ffn_backward(p, activation, dtype, c10::cuda::getCurrentCUDAStream()));
    if (needed[0]) multiply(flat_grad_x.narrow(0, first, count), grad_hidden, weight);
    if (needed[1]) {
      add_product(grad_weight, grad_hidden, x_rows, first == 0);
      add_product(grad_weight, activated_part.narrow(0, 0, count), grad_rows, false);
    }
    if (needed[2]) grad_bias += p.sums() * p.line;
  }
  const auto none = [&] { return at::empty({0}, x.options()); };
  const auto finished = [&](const Tensor& sum) { return sum.to(x.scalar_type()); };
  return {grad_x, needed[1] ? finished(grad_weight) : none(), needed[2] ? finished(sums.sum(0)) : none(),
          needed[3] ? at::sum(grad_y, 0, false, x.scalar_type()) : none()};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CUDA, library) {
  library.impl("tied_ffn_cuda", forward);
  library.impl("tied_ffn_backward_cuda", backward);
}

}  // namespace tokenfusion
