// What single_query_attention asks of its operands, on every device.
#pragma once

#include "checks.h"

namespace tokenfusion {
namespace single_query_attention {

inline void check_lengths(const Tensor& lengths, const Tensor& tokens) {
  const at::ScalarType dtype = lengths.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, "lengths: got dtype ", dtype, ", expected Int or Long");
  check("lengths", lengths, {tokens.size(0)}, tokens.options().dtype(dtype));
}

inline void check_operands(const Tensor& query, const Tensor& tokens, const OptionalTensor& extra_token,
                           const OptionalTensor& lengths) {
  check_rank("tokens", tokens, 3);
  check_rank("query", query, 3);
  const int64_t batch = tokens.size(0), channels = tokens.size(2);
  TORCH_CHECK_VALUE(tokens.size(1) > 0, "tokens: got shape ", tokens.sizes(), ", expected at least one token");
  check("query", query, {batch, query.size(1), channels}, tokens.options());
  check("extra_token", extra_token, {batch, channels}, tokens.options());
  if (lengths) check_lengths(*lengths, tokens);
}

// Beside check_operands, for the backward pass.
inline void check_results(const Tensor& grad_context, const Tensor& context, const Tensor& log_sum_exp,
                          const Tensor& query) {
  check("grad_context", grad_context, query.sizes(), query.options());
  check("context", context, query.sizes(), query.options());
  check("log_sum_exp", log_sum_exp, {query.size(0), query.size(1)}, query.options().dtype(accumulation_dtype(query)));
}

}  // namespace single_query_attention
}  // namespace tokenfusion
