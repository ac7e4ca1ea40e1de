#include "single_query_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../common/single_query_attention_checks.h"
#include "common/kernels_for.h"

namespace tokenfusion {
namespace {

constexpr int64_t kItemsPerThread = 4;       // below it, images are split into parts
constexpr int64_t kMinRowsPerPart = 64;      // threads do not pay for less
constexpr int64_t kMaxRowsPerPart = 1024;    // a longer sum would lose precision
constexpr int64_t kWorkPerThread = 1 << 16;  // multiplications below which threads do not pay

int64_t count_parts(int64_t batch, int64_t rows) {
  const int64_t wanted = batch == 0 ? 1 : at::divup(kItemsPerThread * at::get_num_threads(), batch);
  return std::max(std::min(wanted, rows / kMinRowsPerPart), at::divup(rows, kMaxRowsPerPart));
}

SingleQueryAttentionParams make_params(const Tensor& query, const Tensor& tokens, const OptionalTensor& extra_token,
                                       bool normalize, double eps) {
  single_query_attention::check_operands(query, tokens, extra_token);
  check_contiguous_rows("tokens", tokens);
  SingleQueryAttentionParams p{};
  p.query = query.const_data_ptr();
  p.query_batch_stride = query.stride(0);
  p.query_stride = query.stride(1);
  p.tokens = tokens.const_data_ptr();
  p.tokens_batch_stride = tokens.stride(0);
  p.tokens_stride = tokens.stride(1);
  if (extra_token) {
    p.extra_token = extra_token->const_data_ptr();
    p.extra_token_stride = extra_token->stride(0);
  }
  p.rows = tokens.size(1) + extra_token.has_value();
  p.channels = tokens.size(2);
  p.queries = query.size(1);
  p.parts = count_parts(tokens.size(0), p.rows);
  p.normalize = normalize;
  p.eps = eps;
  return p;
}

void run_items(const SingleQueryAttentionParams& p, int64_t batch, const SingleQueryAttentionKernels::ForDtype& kernels,
               SingleQueryAttentionKernels::Items kernel) {
  const int64_t work = std::max<int64_t>(1, p.rows / p.parts * p.channels * p.queries);
  const int64_t scratch_bytes = kernels.scratch_bytes(p.channels, p.queries);
  at::parallel_for(0, batch * p.parts, std::max<int64_t>(1, kWorkPerThread / work), [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    kernel(p, begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& query_, const Tensor& tokens, const OptionalTensor& extra_token_,
                                   bool normalize, double eps) {
  const auto& kernels = kernels_for(TOKENFUSION_KERNELS(single_query_attention), "tokens", tokens.scalar_type());
  const Tensor query = with_contiguous_rows(query_);
  const OptionalTensor extra_token = extra_token_ ? OptionalTensor(with_contiguous_rows(*extra_token_)) : std::nullopt;
  SingleQueryAttentionParams p = make_params(query, tokens, extra_token, normalize, eps);
  const int64_t batch = tokens.size(0);
  const auto accumulation = query.options().dtype(accumulation_dtype(tokens));
  Tensor context = at::empty({batch, p.queries, p.channels}, query.options());
  Tensor statistics = at::empty({batch, p.queries}, accumulation);
  Tensor partial_context, partial_max, partial_sum;
  p.context = context.data_ptr();
  p.statistics = statistics.data_ptr();
  if (p.parts > 1) {
    partial_context = at::empty({batch, p.parts, p.queries, p.channels}, accumulation);
    partial_max = at::empty({batch, p.parts, p.queries}, accumulation);
    partial_sum = at::empty_like(partial_max);
    p.partial_context = partial_context.data_ptr();
    p.partial_max = partial_max.data_ptr();
    p.partial_sum = partial_sum.data_ptr();
  }
  run_items(p, batch, kernels, kernels.forward);
  if (p.parts > 1) at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) { kernels.combine(p, begin, end); });
  return {context, statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_context_, const Tensor& query_, const Tensor& tokens,
                                            const OptionalTensor& extra_token_, const Tensor& context_,
                                            const Tensor& log_sum_exp_, bool normalize, double eps,
                                            std::array<bool, 3> needed) {
  const auto& kernels = kernels_for(TOKENFUSION_KERNELS(single_query_attention), "tokens", tokens.scalar_type());
  const Tensor query = with_contiguous_rows(query_);
  const OptionalTensor extra_token = extra_token_ ? OptionalTensor(with_contiguous_rows(*extra_token_)) : std::nullopt;
  const Tensor grad_context = grad_context_.contiguous(), context = context_.contiguous();
  const Tensor log_sum_exp = log_sum_exp_.contiguous();
  SingleQueryAttentionParams p = make_params(query, tokens, extra_token, normalize, eps);
  const int64_t batch = tokens.size(0);
  const auto accumulation = query.options().dtype(accumulation_dtype(tokens));
  single_query_attention::check_results(grad_context, context, log_sum_exp, query);
  p.context = context.data_ptr();
  p.statistics = log_sum_exp.data_ptr();
  p.grad_context = grad_context.const_data_ptr();

  Tensor grad_query = empty_gradient(needed[0], query);
  Tensor grad_tokens = empty_gradient(needed[1], tokens);
  Tensor grad_extra_token = empty_gradient(needed[2], extra_token.value_or(query));
  Tensor partial_grad_query;
  if (needed[0]) {
    partial_grad_query = at::empty({batch, p.parts, p.queries, p.channels}, accumulation);
    p.grad_query = partial_grad_query.data_ptr();
  }
  if (needed[1]) p.grad_tokens = grad_tokens.data_ptr();
  if (needed[2]) p.grad_extra_token = grad_extra_token.data_ptr();
  run_items(p, batch, kernels, kernels.backward);
  if (needed[0]) grad_query.copy_(p.parts == 1 ? partial_grad_query.select(1, 0) : partial_grad_query.sum(1));
  return {grad_query, grad_tokens, grad_extra_token};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("single_query_attention_cpu", forward);
  library.impl("single_query_attention_backward_cpu", backward);
}

}  // namespace tokenfusion
