#include <ATen/ceil_div.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <utility>

#include "../common/single_query_attention_checks.h"
#include "common/tensors.h"
#include "single_query_attention_launch.h"

namespace tokenfusion {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kMinRowsPerBlock = 64;    // a block does not pay for less
constexpr int64_t kMaxRowsPerBlock = 8192;  // a longer sum would lose precision
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxTokens = int64_t(1) << 34;  // of which 32 bits count the tiles

Tensor with_aligned_rows(const Tensor& small) {
  return has_aligned_rows(small) ? small : small.clone(at::MemoryFormat::Contiguous);
}

OptionalTensor with_aligned_rows(const OptionalTensor& small) {
  if (!small) return small;
  return with_aligned_rows(*small);
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  if (!tensor) return tensor;
  return tensor->contiguous();
}

// Blocks that share an image's rows: more than one where the images and their parts are too few to fill the GPU. Of
// packed images, the mean number of rows decides.
int64_t count_splits(int64_t parts, int64_t rows, int device) {
  const int64_t blocks = kBlocksPerMultiprocessor * attribute(cudaDevAttrMultiProcessorCount, device);
  return std::max(
      {int64_t(1), std::min(blocks / parts, rows / kMinRowsPerBlock), at::ceil_div(rows, kMaxRowsPerBlock)});
}

Integers integers(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return {tensor->const_data_ptr(), tensor->scalar_type() == at::kLong};
}

// Cuts the call into what a block has room for. Forward, slices of 16 queries or 8 with all channels come first: a
// multiprocessor has more warps of these, and slices cost them no more than to read the tokens from L2 again. Backward,
// where they would add gradients of the tokens to each other's, and otherwise it is as few strips of channels as
// possible.
void cut(SingleQueryAttentionParams& p, Dtype dtype, bool backward, int device) {
  typedef SingleQueryAttentionPlan Plan;
  const int64_t available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const auto fits = [&](int query_tiles, int strips) {
    p.query_tiles = query_tiles, p.strips = strips;
    p.strip_channels = at::ceil_div(p.channels, Plan::kUnit * strips) * Plan::kUnit;
    return single_query_attention_shared_bytes(p, dtype, backward) <= available;
  };
  const int query_tiles = Plan::query_tiles_for(p.queries), most = Plan::kMaxQueries / 8;
  bool found = backward ? fits(query_tiles, 1) : query_tiles > 1 && fits(2, 1) || fits(1, 1);
  for (int strips = 1; !found && strips <= p.channels / Plan::kUnit; ++strips) found = fits(most, strips);
  TORCH_CHECK_VALUE(found, "tokens: got C = ", p.channels, " for Q = ", p.queries, ", expected a GPU with more than ",
                    available, " bytes of shared memory for a block");
  p.strips = at::ceil_div(p.channels, p.strip_channels);
  p.slices = at::ceil_div(p.queries, 8 * p.query_tiles);
}

// Memory that the launches of a call with several strips share.
Tensor make_workspace(SingleQueryAttentionParams& p, bool backward, const at::TensorOptions& float32) {
  typedef SingleQueryAttentionPlan Plan;
  if (p.strips == 1) return {};
  const int64_t parts = int64_t(p.slices) * p.strips, tokens = p.offsets.data ? p.length : p.batch * p.length;
  p.rows_apart = Plan::kTile - 1 + (p.extra_token != nullptr);
  const int64_t tiles = (tokens + int64_t(p.batch) * p.rows_apart) / Plan::kTile + 1;
  const int64_t records = tiles * parts * Plan::record(p.query_tiles, backward);
  Tensor workspace = at::empty({records + p.batch * parts * Plan::sums(p.query_tiles, backward)}, float32);
  p.strip_products = workspace.data_ptr<float>();
  p.strip_sums = p.strip_products + records;
  return workspace;
}

// The query holds at least one element; `by_slice` has launches follow each other.
SingleQueryAttentionParams make_params(const Tensor& query, const Tensor& tokens, const OptionalTensor& extra_token,
                                       const OptionalTensor& lengths, const OptionalTensor& offsets, bool normalize,
                                       double eps, bool backward, bool by_slice) {
  TORCH_CHECK_VALUE(has_aligned_rows(tokens), "tokens: got strides ", tokens.strides(), " and address ",
                    tokens.const_data_ptr(),
                    ", expected a contiguous innermost dimension and rows aligned to 16 bytes");
  TORCH_CHECK_VALUE(tokens.size(2) % 16 == 0, "tokens: got C = ", tokens.size(2), ", expected a multiple of 16");
  SingleQueryAttentionParams p{};
  p.channels = tokens.size(2);
  p.queries = query.size(1);
  cut(p, dtype_of("tokens", tokens), backward, tokens.get_device());
  if (by_slice) p.slices = 1;
  const int64_t batch = query.size(0), length = offsets ? at::ceil_div(tokens.size(1), batch) : tokens.size(1),
                parts = batch * p.slices * p.strips,
                splits = count_splits(parts, length + extra_token.has_value(), tokens.get_device());
  TORCH_CHECK_VALUE(std::max(parts * splits, batch * query.size(1)) <= kMaxBlocks && tokens.size(1) < kMaxTokens,
                    "tokens: got shape ", tokens.sizes(), ", expected fewer tokens or a smaller batch");
  p.query = query.const_data_ptr();
  p.query_batch_stride = query.stride(0);
  p.query_stride = query.stride(1);
  p.tokens = tokens.const_data_ptr();
  p.tokens_batch_stride = offsets ? 0 : tokens.stride(0);
  p.tokens_stride = tokens.stride(1);
  if (extra_token) {
    p.extra_token = extra_token->const_data_ptr();
    p.extra_token_stride = extra_token->stride(0);
  }
  p.lengths = integers(lengths);
  p.offsets = integers(offsets);
  p.length = tokens.size(1);
  p.batch = batch;
  p.splits = splits;
  p.per_channel = 1.0f / p.channels;
  p.normalize = normalize;
  p.eps = eps;
  return p;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query_, const Tensor& tokens, const OptionalTensor& extra_token_,
                                   const OptionalTensor& lengths_, const OptionalTensor& offsets_, bool normalize,
                                   double eps) {
  single_query_attention::check_operands(query_, tokens, extra_token_, lengths_, offsets_);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const Dtype dtype = dtype_of("tokens", tokens);
  const Tensor query = with_aligned_rows(query_);
  const OptionalTensor extra_token = with_aligned_rows(extra_token_);
  const OptionalTensor lengths = contiguous(lengths_), offsets = contiguous(offsets_);
  const auto float32 = query.options().dtype(at::kFloat);
  Tensor context = at::empty(query.sizes(), query.options());
  Tensor log_sum_exp = at::empty({query.size(0), query.size(1)}, float32);
  if (context.numel() == 0) return {context, log_sum_exp};
  SingleQueryAttentionParams p =
      make_params(query, tokens, extra_token, lengths, offsets, normalize, eps, false, false);
  const Tensor workspace = make_workspace(p, false, float32);
  p.context = context.data_ptr();
  p.log_sum_exp = log_sum_exp.data_ptr<float>();
  Tensor partial;  // contexts, maxima, sums
  if (p.splits > 1) {
    const int64_t parts = int64_t(p.batch) * p.splits * p.queries;
    partial = at::empty({parts * (p.channels + 2)}, float32);
    p.partial_context = partial.data_ptr<float>();
    p.partial_max = p.partial_context + parts * p.channels;
    p.partial_sum = p.partial_max + parts;
  }
  C10_CUDA_CHECK(run_single_query_attention_forward(p, dtype, c10::cuda::getCurrentCUDAStream()));
  return {context, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_context_, const Tensor& query_, const Tensor& tokens,
                                            const OptionalTensor& extra_token_, const OptionalTensor& lengths_,
                                            const OptionalTensor& offsets_, const Tensor& context_,
                                            const Tensor& log_sum_exp_, bool normalize, double eps,
                                            std::array<bool, 3> needed) {
  single_query_attention::check_operands(query_, tokens, extra_token_, lengths_, offsets_);
  single_query_attention::check_results(grad_context_, context_, log_sum_exp_, query_);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const Dtype dtype = dtype_of("tokens", tokens);
  const Tensor query = with_aligned_rows(query_);
  const OptionalTensor extra_token = with_aligned_rows(extra_token_);
  const OptionalTensor lengths = contiguous(lengths_), offsets = contiguous(offsets_);
  const Tensor grad_context = with_aligned_rows(grad_context_.contiguous());
  const Tensor context = with_aligned_rows(context_.contiguous());
  const Tensor log_sum_exp = log_sum_exp_.contiguous();
  Tensor grad_query = empty_gradient(needed[0], query);
  Tensor grad_tokens = empty_gradient(needed[1], tokens);
  Tensor grad_extra_token = empty_gradient(needed[2], extra_token.value_or(query));
  if (query.numel() == 0) {
    for (const Tensor& grad : {grad_query, grad_tokens, grad_extra_token}) grad.zero_();
    return {grad_query, grad_tokens, grad_extra_token};
  }
  if (lengths || offsets) grad_tokens.zero_();  // of what takes no part
  const auto float32 = query.options().dtype(at::kFloat);
  SingleQueryAttentionParams p =
      make_params(query, tokens, extra_token, lengths, offsets, normalize, eps, true, needed[1] || needed[2]);
  const Tensor workspace = make_workspace(p, true, float32);
  p.context = context.data_ptr();
  p.log_sum_exp = log_sum_exp.data_ptr<float>();
  p.grad_context = grad_context.const_data_ptr();
  Tensor partial;
  if (needed[0]) {
    p.grad_query = grad_query.data_ptr();
    if (p.splits > 1) {
      partial = at::empty({p.batch, p.splits, p.queries, p.channels}, float32);
      p.partial_grad_query = partial.data_ptr<float>();
    }
  }
  Tensor tokens_so_far, extra_token_so_far;
  const auto keep = [&](bool needed, const Tensor& grad, Tensor& so_far) -> float* {
    if (!needed || p.queries <= 8 * p.query_tiles || dtype == Dtype::kFloat32) return nullptr;
    so_far = at::empty(grad.sizes(), float32);
    return so_far.data_ptr<float>();
  };
  if (needed[1]) p.grad_tokens = grad_tokens.data_ptr();
  if (needed[2]) p.grad_extra_token = grad_extra_token.data_ptr();
  p.grad_tokens_so_far = keep(needed[1], grad_tokens, tokens_so_far);
  p.grad_extra_token_so_far = keep(needed[2], grad_extra_token, extra_token_so_far);
  C10_CUDA_CHECK(run_single_query_attention_backward(p, dtype, c10::cuda::getCurrentCUDAStream()));
  return {grad_query, grad_tokens, grad_extra_token};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CUDA, library) {
  library.impl("single_query_attention_cuda", forward);
  library.impl("single_query_attention_backward_cuda", backward);
}

}  // namespace tokenfusion
